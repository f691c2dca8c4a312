"""Privacy that is measured: secure sums, differential privacy, and the audit of a run."""
