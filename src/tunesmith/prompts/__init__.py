"""Learned context: one method per file."""
