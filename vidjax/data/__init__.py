"""Clips, labels and datasets in numpy; TensorFlow is in `records/`, unpickling in `untrusted/`."""
