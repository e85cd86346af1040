"""Adapters in and out: the Hub, model cards, and the form of the authors' released gates."""
