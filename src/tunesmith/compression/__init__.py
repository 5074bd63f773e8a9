"""Smaller weights: one method per file."""
