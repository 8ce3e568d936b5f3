"""Computation on the devices: training step, evaluation step, top k, and the feeds of clips."""
