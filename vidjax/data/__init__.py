"""Clips, labels and datasets in numpy (`order`, `resident`: jax); no TensorFlow, no unpickling."""
