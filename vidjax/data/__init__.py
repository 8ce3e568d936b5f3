"""Reads features and labels of video clips, checks them, and makes batches of numpy arrays.

`tfds/` is the only folder that imports TensorFlow. `untrusted/` reads files that may come from
strangers. Docstrings write a dict as key -> value. Functions raise UserError if a file, name or
argument of the user is wrong.
"""
