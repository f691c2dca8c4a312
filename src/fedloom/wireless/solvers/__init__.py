"""Solvers of the allocation problem: exact branch and bound, P-SCA, Lagrangian duals, baselines."""
