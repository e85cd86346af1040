"""The place of adapters that ship with the package and of imports from other projects; empty so far."""
