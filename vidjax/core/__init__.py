"""Mathematics on arrays: batches, augmentation, fusion, losses, optimisers, metrics, ensembles.

It also places arrays on devices and connects processes. Nothing here knows a file format or a run.
"""
