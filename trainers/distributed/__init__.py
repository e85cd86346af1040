"""Runs of several processes: how rows and parameters are divided among them."""
