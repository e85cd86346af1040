"""Training and evaluation of gates: arguments, losses, the trainer and evaluation under real eviction."""
