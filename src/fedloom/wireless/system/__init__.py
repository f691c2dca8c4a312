"""The radio system: fleet, rates, generalisation bound and the allocation problem, in SI units."""
