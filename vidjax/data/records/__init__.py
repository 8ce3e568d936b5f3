"""Stores the features of a dataset in TFRecord files, and reads them for training and evaluation.

`conversion` checks the features and writes the files (shards) to the cache. A record of a shard is
a clip. `manifest` lists the shards and their digests, `data_report` counts frames and labels, and
`codec` writes metadata with which TFDS can read the shards. `dataset` makes batches from the shards
without TensorFlow; only `streaming` needs TensorFlow.
"""
