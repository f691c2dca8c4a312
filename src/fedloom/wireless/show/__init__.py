"""What a person sees of a plan: tables, curves, and the body of `fedloom allocate`."""
