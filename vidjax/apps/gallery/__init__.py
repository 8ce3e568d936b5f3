"""Galleries of people, who are enrolled, identified and deleted without training.

The module `gallery` is the Python API. `backend` compares vectors with enrolled people, `answers`
applies thresholds and writes answers, `changes` edits the content, `store` reads and writes the
file, and `grouping` groups the clips of unknown people.

JAX is imported only in functions that need it, because the import takes seconds.
"""
