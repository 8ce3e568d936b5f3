"""Mathematics on arrays: batches, augmentation, fusion, losses, optimisers, metrics, ensembles.

It also places arrays on devices and connects processes. Nothing here depends on a run.
"""
