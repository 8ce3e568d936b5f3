"""Clips, labels and datasets in numpy (jax in `resident`): no TensorFlow, no unpickling here."""
