"""Studies: methods compared over paired draws at equal budgets, and reports that say what can be told."""
