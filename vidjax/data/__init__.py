"""Reads features and labels of video clips, checks them, and makes batches of numpy arrays.

Features are vectors that a neural net has computed from the frames of a clip. A modality is a kind
of features, such as face or audio. `tfds/` is the only folder that imports TensorFlow. `untrusted/`
reads files that may come from strangers. Docstrings write a dict as key -> value. Functions raise
UserError if a file, name or argument of the user is wrong.
"""
