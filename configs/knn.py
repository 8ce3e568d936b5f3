"""Nearest neighbours by quality-weighted mean face: the baseline of the challenge.

    python -m vidjax.main --config=configs/knn.py

Time: about 8 seconds on 2 CPU cores.
Score: MAP@100 0.869 on the small synthetic dataset, 0.796 on the small real dataset (means of 3
seeds).

A clip is represented by the mean of its faces, weighted by quality x detection score. (The code of
noise classes, 5th place of 2018, uses the square of the quality.) The score of an identity is the
cosine to its nearest training clip. Nothing is trained: the single epoch stores the training clips,
so a checkpoint contains a feature vector of each training clip.

Arguments: the words of WORDS below (`few` has no effect), and a modality to use instead of `face`.
"""

from vidjax.runs import config as config_lib, config_words

WORDS = {**config_words.SCALE_WORDS}


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for `args`, as in `--config=knn:ARG,ARG`."""
    words, modalities = config_words.split_args(args, WORDS)
    config = config_lib.default()
    config_words.choose_data(config, words)
    config.modalities = config_words.choose_modality(modalities, default="face")
    config.batch_size = 256
    config.data.max_frames = 512
    config.data.crop = "quality"
    config.eval.scores = "logits"

    mean = {"name": "mean", "weighting": "quality"}  # ours
    modality = config.modalities[0]
    config.fusion = {modality: {"train": mean, "evaluate": mean}}
    config.model = {"name": "knn", "modality": modality}
    return config
