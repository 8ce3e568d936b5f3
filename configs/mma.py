"""The iQIYI-VID paper's system: NetVLAD, a map for every modality, Gram-matrix attention.

    python -m vidjax.main --config=configs/mma.py

Arguments, in any combination: `iqiyi_vid` (official files, full size), `standard` (the synthetic
dataset of 1,000 identities), `published` (the paper to the letter), and names of modalities.

Every value says where it comes from: paper (papers: iQIYI-VID, sections 5 and 6), or ours.
"""

from ml_collections import ConfigDict

from vidjax import config as config_lib


def get_config(args: str = "") -> ConfigDict:
    """Returns the configuration for the words after the colon of `--config=configs/mma.py:...`."""
    words, modalities = config_lib.split_args(args, ("iqiyi_vid", "published", "standard"))
    config = config_lib.default()
    config_lib.choose_data(config, words)
    config.modalities = modalities or ("face", "head", "body", "audio")  # paper
    config.batch_size = 128  # ours
    config.num_epochs = 60.0  # ours

    config.model = ConfigDict(
        {
            "name": "mma",
            "netvlad": ("face",),  # paper
            "num_clusters": 8,  # ours; the paper does not say
            "netvlad_reduce": "mean",  # ours: no dependence on the number of frames
            "embed_dim": 512,  # paper
            "num_face_vectors": 3,  # paper
            "attention": True,
            "gram_dim": 64,  # paper
            "gamma": 0.05,  # paper
            "train_gamma": False,  # ours; the paper does not say
            "feature_scale": 0.1,  # ours
            "modality_dropout_rate": 0.5,  # ours
            "dropout_rate": 0.5,  # ours
        }
    )
    config.fusion = ConfigDict(
        {
            "face": {
                "train": {"name": "random", "num_draws": 8, "weighting": "uniform"},
                "evaluate": {"name": "all"},
            }
        }
    )
    config.optim.learning_rate = 1e-3  # ours
    return config
