"""Pipelines of several trainings, a system per file."""
