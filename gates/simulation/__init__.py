"""A bounded cache simulated over whole sequences."""
