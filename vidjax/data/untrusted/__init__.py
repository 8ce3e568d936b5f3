"""Bytes of unknown origin: pickles are opened in a sandbox, arrays are checked before use.

Only code that reads such bytes lives here: standard library and numpy, no jax, no TensorFlow.
"""
