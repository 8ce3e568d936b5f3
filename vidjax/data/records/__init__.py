"""Records on disk: written by TFDS, read by tf.data; TensorFlow is imported in this folder alone."""
