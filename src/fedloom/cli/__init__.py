"""The command line and the run file."""
