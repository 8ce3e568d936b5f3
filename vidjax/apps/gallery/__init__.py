"""Galleries of people, who are enrolled, identified and deleted without training.

The module `gallery` is the Python API. JAX is imported only in functions that need it, because the
import takes seconds.
"""
