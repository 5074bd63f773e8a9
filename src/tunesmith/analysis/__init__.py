"""What happened inside a model: one analysis per file."""
