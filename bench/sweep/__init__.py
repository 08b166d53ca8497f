"""A run for every combination of settings."""
