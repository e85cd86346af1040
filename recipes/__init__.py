"""Runs that a user starts: training, evaluation, generation, calibration, inspection and the demo."""
