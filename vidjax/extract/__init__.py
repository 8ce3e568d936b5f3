"""From videos and photos to features of clips, without a run, JAX or TensorFlow."""
