"""Policies and memory sizes compared on text, tasks and suites."""
