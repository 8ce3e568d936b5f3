"""Data for training and evaluation: sources, labels, clips and batches, mostly as numpy arrays.

Only `records/` imports TensorFlow. `untrusted/` reads files that may come from strangers.
"""
