"""Next-token distributions: one method per file."""
