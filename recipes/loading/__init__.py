"""Shared by the commands: YAML files, models, texts, output folders, and where results come from."""
