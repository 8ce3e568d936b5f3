"""From films and photos to features, and to the people who appear in them; no training is needed.

`who` names people. `pipeline` extracts the features of many files, each in a child process with
limits. In this process, `film` uses `decode`, `shots`, `tracks`, `align` and `nets`. `cards`
describes nets, and `net_packages` converts them. `features_folder` reads and writes features.
"""
