"""Records on disk, in a format that tf.data and TFDS can read.

`conversion` writes a source of frames to the cache as shards (`shard_files`), `codec` adds the
metadata of TFDS, and `manifest` and `data_report` describe the result. `dataset` reads records as
`TrainingData`, with `record_reader`; `streaming` reads training batches. Only `streaming` needs
TensorFlow, and no other folder imports TensorFlow.
"""
