"""Scores and compares memories of bounded size."""
