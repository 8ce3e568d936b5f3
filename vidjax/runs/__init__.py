"""Reads and writes the configuration, checkpoints, results and logs of a run (a training)."""
