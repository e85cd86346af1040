"""The arguments of each command, in modules that import nothing heavy: a help page must not wait for torch."""
