"""What is minimised: one objective or regulariser per file."""
