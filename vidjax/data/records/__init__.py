"""Records on disk: the only folder with TensorFlow, which is imported where it is needed.

| file | does | TensorFlow |
|---|---|---|
| `convert.py`, `write.py`, `builder.py` | any source of frames to records, by TFDS | to write |
| `staging.py`, `engines.py`, `worker.py` | what each shard holds, and who writes it | to write |
| `command.py` | conversion without training | to write |
| `manifest.py`, `report.py` | what was written, and whether it still is; labels | to name damage |
| `pipeline.py` | the clips as `TrainingData` | no |
| `reader.py`, `padding.py` | records as arrays, all clips of a split once | no |
| `random_access.py` | single records of shards by their numbers | no |
| `streaming.py`, `codec.py` | endless shuffled batches for training, by tf.data | yes |
"""
