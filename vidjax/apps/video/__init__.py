"""Extracts features from films and photos, and names the people who appear in them.

No training is needed. The module `who` names people. The module `pipeline` extracts the features of
many files: it starts child processes with limits, and each child process runs the module `film`.
The module `net_packages` converts published nets.
"""
