"""Faster forward passes: one method per file."""
