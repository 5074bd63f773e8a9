"""How parameters move: one method per file."""
