"""Extracts features from films and photos, and names the people who appear in them.

No training is needed. `who` names people. `pipeline` extracts the features of many files in child
processes with limits. In such a process, `film` calls `decode`, `shots`, `tracks`, `align` and
`nets`. `net_packages` converts published nets, and `cards` reads the descriptions of nets.
`features_folder` defines the files that contain features.
"""
