"""Clips, their labels and the datasets they come from: numpy (and jax in `resident`), no TensorFlow.

What needs TensorFlow lives in `records/`, what reads bytes of unknown origin in `untrusted/`.
"""
