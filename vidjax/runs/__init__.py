"""Reads and writes the folder of a run: configuration, checkpoints, results and logs.

A run is a training that is in progress or finished.
"""
