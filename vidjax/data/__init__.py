"""Official files in, batches of frames out: the only room that knows TensorFlow, TFDS and pickles."""
