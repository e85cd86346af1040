"""Decoding steps: captured in a graph, with layers computed in fewer launches."""
