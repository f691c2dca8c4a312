"""Wireless planning: per-device dropout rates and bandwidth allocation under latency and energy limits.

FedLoDrop's second half (Xie, Wen, You, Chen, Bennis, Huang, "FedLoDrop: Federated LoRA with Dropout for Generalized LLM
Fine-tuning", arXiv 2510.12078). numpy, and cvxpy where a convex problem is solved; never imports torch.

    fleet = read_fleet("fleet.toml")           # or random_fleet(devices=5, subcarriers=12, seed=0)
    plan = allocate(fleet, solver="bnb")       # or "psca"
    plan.keep                                  # {device id: keep rate}
"""

from fedloom.wireless.allocate import Allocation, allocate
from fedloom.wireless.replay import Network
from fedloom.wireless.solvers.branch_and_bound import Solution, Status
from fedloom.wireless.system.constants import Constants, from_run
from fedloom.wireless.system.fleet import Fleet, random_fleet, read_fleet
from fedloom.wireless.system.generalisation_bound import Bound
from fedloom.wireless.system.problem import Problem

__all__ = [
    "Allocation",
    "Bound",
    "Constants",
    "Fleet",
    "Network",
    "Problem",
    "Solution",
    "Status",
    "allocate",
    "from_run",
    "random_fleet",
    "read_fleet",
]
