"""How a layer changes: one method per file."""
