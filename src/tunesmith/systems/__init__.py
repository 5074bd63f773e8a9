"""Long-running things: a part per file."""
