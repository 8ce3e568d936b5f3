"""Records on disk, written by TFDS and read by tf.data: the only folder with TensorFlow."""
