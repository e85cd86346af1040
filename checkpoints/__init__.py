"""Adapters that are shipped with the package, and how they are published."""
