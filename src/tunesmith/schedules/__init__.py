"""What trains when: one method per file."""
