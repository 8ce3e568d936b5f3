"""Nearest neighbours by quality-weighted mean face: the baseline that everybody starts from.

    python -m vidjax.main --config=configs/knn.py

A clip is the mean of its faces, weighted by quality x detection; an identity scores the cosine to
the nearest of its training clips. Nothing is trained: the one epoch fills the memory. A checkpoint
of this system therefore holds a feature vector of every training clip.

Arguments: `iqiyi_vid` (with or without `few`, nothing differs), `standard` (the synthetic dataset
of 1,000 identities), and the name of the modality to compare instead of `face`.
"""

from ml_collections import ConfigDict

from vidjax import config as config_lib


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for the words after the colon of `--config=configs/knn.py:...`."""
    words, modalities = config_lib.split_args(args, config_lib.SIZES)
    config = config_lib.default()
    config_lib.choose_data(config, words)
    config.modalities = modalities[:1] or ("face",)
    config.batch_size = 256
    config.data.max_frames = 512
    config.data.crop = "quality"
    config.eval.scores = "logits"

    mean = {"name": "mean", "weighting": "quality"}  # paper: noise classes, the kNN baseline
    modality = config.modalities[0]
    config.fusion = ConfigDict({modality: {"train": mean, "evaluate": mean}})
    config.model = ConfigDict({"name": "knn", "modality": modality})
    return config
