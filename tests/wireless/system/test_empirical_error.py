"""The three forms of e: slopes, lines below and best rates, against numbers on a grid."""

import numpy as np
import pytest

from fedloom.wireless.system.empirical_error import FORMS, Empirical, Tangent

KEEP = np.linspace(0.05, 1.0, 2001)


@pytest.mark.parametrize("name", FORMS)
def test_slope_and_shape(name: Empirical) -> None:
    form = FORMS[name]
    value = form.value(KEEP)
    assert value[-1] == 0.0 and (np.diff(value) < 0.0).all()
    h = 1e-6
    numeric = (form.value(KEEP + h) - form.value(KEEP - h)) / (2.0 * h)
    np.testing.assert_allclose(form.slope(KEEP), numeric, rtol=1e-6)
    bend = np.diff(value, 2)
    assert (bend >= -1e-12).all() if form.convex else (bend < 0.0).all()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("square", [0.0, 0.4, 1.7])
def test_the_line_lies_below_its_segment_and_touches_it(name: Empirical, square: float) -> None:
    form, price = FORMS[name], 0.9
    left, right = np.array([0.1, 0.3, 0.8]), np.array([0.2, 0.9, 1.0])

    def cost(x: np.ndarray) -> np.ndarray:
        return np.asarray(price * form.value(x) + square * x * x)

    slope = form.slope_below(left, right, price, np.full(3, square))
    for part in np.linspace(0.0, 1.0, 50):
        x = left + part * (right - left)
        assert (cost(left) + slope * (x - left) <= cost(x) + 1e-12).all()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.3])
def test_best_against_a_square(name: Empirical, ratio: float) -> None:
    best = float(np.clip(FORMS[name].best_against_square(ratio), KEEP[0], KEEP[-1]))
    value = FORMS[name].value(KEEP) + KEEP**2 / ratio
    assert abs(best - KEEP[np.argmin(value)]) <= KEEP[1] - KEEP[0]


def test_a_tangent_lies_above_a_concave_form() -> None:
    form = FORMS["sparsity"]
    tangent = Tangent(form, np.full(len(KEEP), 0.4))
    assert (tangent.value(KEEP) >= form.value(KEEP) - 1e-12).all()
    assert tangent.value(np.full(len(KEEP), 0.4))[0] == pytest.approx(float(form.value(np.array(0.4))))
