"""Sharing caches through a remote: push, pull, grow, collect. Torch-free."""
