"""Clips, labels and datasets in numpy (`order`, `resident`: jax); TensorFlow is in `records/`."""
