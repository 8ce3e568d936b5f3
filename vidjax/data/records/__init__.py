"""Records on disk: the only folder with TensorFlow, which is imported where it is needed.

| file | does | TensorFlow |
|---|---|---|
| `convert.py` | any source of frames to records in the cache, also by a command | to write |
| `staging.py`, `writers.py` | what each shard holds, and who writes it | no |
| `codec.py` | what TFDS is told of the records; sets TensorFlow up | yes |
| `shard_files.py` | the bytes of a shard, written and read | no |
| `manifest.py`, `report.py` | what was written, and whether it still is; labels | no |
| `dataset.py` | the clips as `TrainingData` | no |
| `padding.py` | records as padded batches, all clips of a split once | no |
| `streaming.py` | endless shuffled batches for training, in the order of tf.data | yes |
"""
