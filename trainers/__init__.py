"""How gates are trained and judged: arguments, losses, the trainer and evaluation under real eviction."""
