"""Clips, their labels and the datasets they come from: numpy alone, and jax in `resident`.

Code that needs TensorFlow lives in `records/`, code that reads bytes of unknown origin in
`untrusted/`.
"""
