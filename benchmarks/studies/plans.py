"""The keep rates of the study `plan`: python benchmarks/studies/plans.py

For each latency limit: the rate of every device that makes the bound least, and the best rate that all devices can keep.
"""

from dataclasses import replace
from pathlib import Path

from fedloom.wireless import allocate, read_fleet
from fedloom.wireless.allocate import describe
from fedloom.wireless.solvers.baselines import baseline

HERE = Path(__file__).parent
LIMITS_S = (0.2,)


def main() -> None:
    fleet = read_fleet(HERE / "fleet.toml").problem()
    for limit in LIMITS_S:
        problem = replace(fleet, latency_limit_s=limit)
        planned = allocate(problem)
        same, rate = baseline(problem, "uniform")
        assert rate is not None, f"no common rate keeps to {limit} s"
        for name, plan in {"planned": planned, "common": describe(problem, same, "uniform", rate)}.items():
            plan.to_json(HERE / "plans" / f"{name}-{limit * 1000:.0f}ms.json")
            print(f"{limit} s, {name:8}: " + " ".join(f"{device} {x:.3f}" for device, x in plan.keep.items()))


if __name__ == "__main__":
    main()
