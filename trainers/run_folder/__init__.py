"""The folder of a run: who writes to it, and from what a run goes on."""
