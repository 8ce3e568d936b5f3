"""Stores the features of a dataset in TFRecord files, and reads them for training and evaluation.

`conversion` checks the features and writes the files (shards) to the cache. A record of a shard is
a clip. Readers check the sha256 of files, and raise UserError if a file is missing or damaged. Only
`streaming` needs TensorFlow, and only `codec` needs TFDS.
"""
