"""DeepMEF, 3rd place of 2019: attention between frames, scene features, an angular margin.

    python -m vidjax.main --config=configs/deepmef.py

Score: MAP@100 0.825 on the small synthetic dataset with the argument `face` (mean of three seeds
0.850).

Arguments: the words of WORDS below, in any combination, and names of modalities: `face` alone, or
others in place of `scene`.

A clip whose face is missing, or has a feature vector of small norm, is scored by a model of the
scene alone.

Every value names its source: `paper` (the team's article), `code` (the team's) or `ours`.
"""

from ml_collections import ConfigDict

from vidjax import config as config_lib

WORDS = {
    **config_lib.SCALE_WORDS,
    "published": "channel attention over 40 frames in their order",
    "views": "eleven members; each omits a different sixteenth of the features",
}


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for the words after the colon of `--config=...:WORD,WORD`."""
    words, modalities = config_lib.split_args(args, WORDS)
    config = config_lib.default()
    full = config_lib.choose_data(config, words)
    config.modalities = modalities or ("face", "scene")  # paper
    others = tuple(name for name in config.modalities if name != "face")
    config.batch_size = 4096 if full else 128  # code; ours on few clips
    config.num_epochs = 100.0 if full else 30.0  # code; ours
    config.data.distractors = "leave_out"  # code
    if "views" in words:
        config.ensemble.views = 11  # code
        config.ensemble.chunks = 16  # code

    main = {
        "name": "deepmef",
        "channel_attention": "features",  # ours
        "aggregation": "attention",  # code
        "branch_dims": (480, 120),  # code
        "hidden_dim": 964,  # code
        "dropout_rate": 0.5,  # code
        "modality_dropout_rate": 0.3,  # ours
        "logit_scale": 30.0,  # code
    }
    if "published" in words:
        main |= {"channel_attention": "channels", "num_frames": 40, "modality_dropout_rate": 0.0}
    model = main
    if others:
        model = {
            "name": "fallback",
            "main": main,
            "other": {
                "name": "dense",
                "layers": ((480, "prelu", True, 0.5), (120, "prelu", True, 0.5)),  # code
                "head": "cosine",  # ours
                "logit_scale": 30.0,  # code
            },
            "other_modalities": others,
            "missing_scale": 0.95,  # code
            "measure": "norm",  # code
            "threshold": 8.867,  # code: 1 % of the official faces have a smaller norm
            "main_share": 0.2,  # code
            "other_share": 0.8,  # code
        }
    config.model = ConfigDict(model)
    published = full or "published" in words
    sample = {"name": "sample", "num_frames": 40 if published else 12}  # code; ours
    config.fusion.face = ConfigDict(
        {"train": sample, "evaluate": sample if "published" in words else {"name": "all"}}
    )

    config.loss.margin = 0.5  # code
    config.loss.focal = "multiclass"  # paper; code: of the mean over the batch
    config.loss.gamma = 2.0  # code
    config.loss.schedule = ((0.0, 1.0),)  # code
    config.optim.name = "sgd"  # code
    config.optim.momentum = 0.9  # code
    config.optim.learning_rate = 0.1 if full else 0.02  # code; ours on few clips
    config.optim.weight_decay = 1e-5 if full else 0.0  # code
    config.optim.total_decay = 0.0 if full else 2.0  # ours
    config.optim.warmup = 0.0  # code
    config.optim.decay = "cosine"  # code
    return config
