"""The attention function of a gated model, and what it is made of."""
