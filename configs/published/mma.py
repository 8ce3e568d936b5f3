"""The iQIYI-VID paper's system without our additions: `--config=configs/mma.py:published`.

The paper does not specify the following values, so they are ours, as in `configs/mma.py`:

- Optimiser, learning rate, batch, epochs and loss: as in the shipped net (Adam with warm-up, a
  cosine schedule, weight decay, softmax cross-entropy), so that a comparison with the shipped net
  compares only the nets. Without weight decay, MAP on the small synthetic dataset is 0.71 instead
  of 0.83 (mean of three seeds).
- NetVLAD's K, initial centres and BatchNorm momentum: as in the shipped net.
- The length of the features: unchanged, or 1 with `unit`.
- The three face vectors: three linear maps of the same descriptor. Maps and classifier have a bias
  and no activation.
- A missing modality: its vector is 0, and has no weight in the softmax of the attention.
- Average pooling: the 32 best faces. Heads and bodies have no quality, so the first 64 are used in
  training, and 512 in the test.
- Face quality: the quality in the official files. They do not contain the norm in SphereFace.
"""

from collections.abc import Collection

from vidjax.runs.config import Config


def follow(config: Config, words: Collection[str]) -> None:
    """Changes a configuration of `configs/mma.py` to the published values.

    `words` are the arguments of the file, such as `iqiyi_vid`.
    """
    config.data.crop = "quality"  # paper: the best of the whole clip, not of a window
    top = {"name": "top", "num_frames": 32}  # paper
    config.fusion.face = {"train": top, "evaluate": {**top, "repeats": "random"}}
    config.model.netvlad_reduce = "sum"  # paper
    config.model.gram_scale = 1.0  # paper
    config.model.fill_missing = True  # paper: attention replaces missing modalities
    config.model.map_norm = False  # paper
    config.model.modality_dropout_rate = 0.0  # not in the paper
    config.model.dropout_rate = 0.0  # not in the paper
    if "ensemble" in words:
        config.ensemble.folds = 3  # ours: the paper does not give the partitions
