"""Fast siblings of the readable path: the same numbers up to rounding, by hand-written derivatives and without padding."""
