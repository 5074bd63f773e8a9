"""Checkpoints to a checkpoint: one method per file."""
