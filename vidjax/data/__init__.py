"""Official files in, batches of frames out: alone in knowing TensorFlow, TFDS and pickles."""
