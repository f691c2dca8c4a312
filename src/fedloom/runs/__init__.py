"""A run: from a run file to a PEFT adapter, in a directory that can be resumed, checked and exported."""
