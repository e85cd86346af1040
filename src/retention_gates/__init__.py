"""Retention gates: a KV cache of fixed size for any pretrained decoder."""

__version__ = "0.1.0"
