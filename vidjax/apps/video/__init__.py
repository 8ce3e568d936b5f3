"""Extracts features from films and photos, and names the people who appear in them.

No training is needed. `who` names people. `pipeline` extracts the features of many files. It starts
child processes with limits. They run `film`. `net_packages` converts published nets.
"""
