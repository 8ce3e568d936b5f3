"""vidjax identifies people in video from frame features, in JAX."""

__version__ = "0.1.0"
