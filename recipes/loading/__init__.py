"""What commands share: YAML files, models, texts, output folders, and where results come from."""
