"""Mathematics on arrays: batches, augmentation, fusion, losses, optimisers, metrics, ensembles.

The package also places arrays on devices. It neither reads nor writes the files of a run. Functions
raise UserError if an option is unknown, missing or out of range.
"""
