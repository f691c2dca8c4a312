"""The bound's properties, (14)-(20), and the closed form (27) against a numeric optimiser."""

import numpy as np
import pytest
from scipy.optimize import minimize

from fedloom.errors import ConfigError
from fedloom.wireless.system.empirical_error import Empirical
from fedloom.wireless.system.generalisation_bound import Bound, Gap, weights

FORMS = ("linear", "sparsity", "rescaled")
GAPS = ("pooled", "per_device")


def test_stability_gives_the_bound() -> None:
    bound, n = Bound(loss_range=2.0, lipschitz=3.0, regularisation=0.4), 700.0
    keep = np.linspace(0.0, 1.0, 11)
    beta = bound.stability(keep, n)
    textbook = np.sqrt((bound.loss_range**2 + 12.0 * bound.loss_range * n * beta) / (2.0 * n * bound.failure))
    np.testing.assert_allclose(bound.gap_at(keep**2, n), textbook, rtol=1e-14)


def test_stability_falls_with_dropout_by_the_known_ratio() -> None:
    bound = Bound(curvature_min=0.03, regularisation=0.7)
    dropout = np.linspace(0.0, 0.95, 20)
    beta = bound.stability(1.0 - dropout, 100.0)
    assert (np.diff(beta) < 0.0).all()
    np.testing.assert_allclose(beta / beta[0], 0.03 / (0.03 + 1.4 * (2.0 * dropout - dropout**2)), rtol=1e-12)
    # Without dropout the regulariser vanishes: the bound of plain LoRA.
    assert beta[0] == pytest.approx(2.0 * bound.lipschitz**2 / (0.03 * 100.0))


def test_gap_is_convex_and_increasing_with_the_right_slope() -> None:
    bound, q = Bound(), np.linspace(0.0, 1.0, 401)
    gap = bound.gap_at(q, 500.0)
    assert (np.diff(gap) > 0.0).all()
    assert (np.diff(gap, 2) >= -1e-12).all()
    h = 1e-6
    inside = q[1:-1]
    numeric = (bound.gap_at(inside + h, 500.0) - bound.gap_at(inside - h, 500.0)) / (2.0 * h)
    np.testing.assert_allclose(bound.gap_slope(inside, 500.0), numeric, rtol=1e-6)


@pytest.mark.parametrize("empirical", FORMS)
def test_bound_is_u_shaped_and_less_data_wants_more_dropout(empirical: Empirical) -> None:
    bound = Bound(empirical=empirical, dropout_penalty=1.0)
    keep = np.linspace(0.05, 1.0, 500)
    minima = []
    for n in (500.0, 1000.0, 3000.0):
        values = bound.value(keep[:, None], np.array([n]))
        at = int(np.argmin(values))
        assert 0 < at < len(keep) - 1, "the minimum is inside"
        assert (np.diff(values[: at + 1]) < 0.0).all() and (np.diff(values[at:]) > 0.0).all()
        minima.append(keep[at])
    assert minima == sorted(minima) and minima[0] < minima[-1]


@pytest.mark.parametrize("empirical", FORMS)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("seed", range(4))
def test_common_cap_rule_beats_a_numeric_optimiser(empirical: Empirical, gap: Gap, seed: int) -> None:
    rng = np.random.default_rng([seed, 27])
    bound = Bound(empirical=empirical, gap=gap, dropout_penalty=float(rng.uniform(0.2, 2.0)))
    samples, caps = rng.uniform(50.0, 900.0, 5), rng.uniform(0.1, 1.0, 5)
    best = bound.best(caps, samples, 0.05)
    assert (best <= caps).all() and (best >= 0.05).all()
    value = float(bound.value(best, samples))
    box = [(0.05, cap) for cap in caps]
    for start in (caps, np.full(5, 0.05), 0.5 * (caps + 0.05)):
        found = minimize(lambda x: float(bound.value(x, samples)), start, bounds=box, method="L-BFGS-B", tol=1e-14)
        assert value <= found.fun + 1e-9


def test_caps_below_keep_min_and_no_dropout() -> None:
    samples = np.array([1e9, 1e9])
    bound = Bound(dropout_penalty=5.0)
    np.testing.assert_array_equal(bound.best(np.array([1.0, 1.0]), samples, 0.05), [1.0, 1.0])
    np.testing.assert_array_equal(bound.best(np.array([-np.inf, 0.01]), samples, 0.05), [0.05, 0.05])


def test_weights_sum_to_one() -> None:
    np.testing.assert_allclose(weights(np.array([1.0, 3.0])), [0.25, 0.75])


@pytest.mark.parametrize(
    "wrong",
    [
        {"curvature_min": 0.0},
        {"loss_range": -1.0},
        {"failure": 1.0},
        {"empirical": "lineer"},
        {"base_error": float("nan")},
    ],
)
def test_constants_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"bound.{next(iter(wrong))}.*expected"):
        Bound(**wrong)  # type: ignore[arg-type]


def test_leave_one_out_stability_of_a_ridge_is_below_its_bound() -> None:
    """Ridge regression: strong convexity is known, so (14) can be held against retraining without each sample."""
    rng = np.random.default_rng(11)
    n, dim, dropout, strength = 60, 5, 0.4, 0.3
    inputs, targets = rng.normal(size=(n, dim)) / np.sqrt(dim), rng.normal(size=n) * 0.3
    sparsity = 2.0 * dropout - dropout**2

    def fit(rows: np.ndarray) -> np.ndarray:
        # Mean of squared errors / 2, plus lambda s ||theta||^2: (12).
        gram = inputs[rows].T @ inputs[rows] / n + 2.0 * strength * sparsity * np.eye(dim)
        return np.linalg.solve(gram, inputs[rows].T @ targets[rows] / n)

    every = np.arange(n)
    full = fit(every)

    def loss(theta: np.ndarray, i: int) -> float:
        return float(0.5 * (inputs[i] @ theta - targets[i]) ** 2)

    moved = [abs(loss(fit(every[every != i]), i) - loss(full, i)) for i in range(n)]
    hessian = inputs.T @ inputs / n
    radius = float(np.linalg.norm(full)) * 1.5
    steepest = max(
        float(np.linalg.norm(inputs[i])) * (abs(targets[i]) + float(np.linalg.norm(inputs[i])) * radius)
        for i in range(n)
    )
    lowest = float(np.linalg.eigvalsh(hessian)[0])
    bound = Bound(curvature_min=lowest, regularisation=strength, lipschitz=steepest)
    assert 0.0 < np.mean(moved) <= float(bound.stability(1.0 - dropout, n))


def test_masked_descent_on_a_quadratic_stays_below_the_convergence_bound() -> None:
    """(24) on F = theta' H theta / 2, masks i.i.d., one local step: averaged squared gradient against its bound."""
    rng = np.random.default_rng(5)
    dim, devices, rounds, trials = 12, 3, 60, 40
    curvature = np.linspace(0.1, 1.0, dim)
    smooth, rate = 1.0, 0.5
    dropout, share = np.array([0.1, 0.3, 0.5]), np.array([0.2, 0.3, 0.5])
    squares, length, steepest = [], 0.0, 0.0
    start = rng.normal(size=dim)
    for _ in range(trials):
        theta = start.copy()
        for _ in range(rounds):
            gradient = curvature * theta
            squares.append(float(gradient @ gradient))
            length, steepest = max(length, float(np.linalg.norm(theta))), max(steepest, float(np.linalg.norm(gradient)))
            masks = rng.random((devices, dim)) > dropout[:, None]
            theta = theta - rate * (share[:, None] * masks * (curvature * (masks * theta))).sum(axis=0)
    first = 0.5 * float(start @ (curvature * start))
    penalty = 2.0 * float(share @ dropout) * (smooth**2 * length**2 + steepest**2)
    assert np.mean(squares) <= 2.0 * first / (rate * rounds) + penalty
