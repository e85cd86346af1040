"""Benchmarks: one script per op or path, each of which checks before it times."""
