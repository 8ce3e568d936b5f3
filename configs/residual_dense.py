"""Residual Dense Net, 2nd place of 2019: merged frames, three quality subsets, shortcuts.

    python -m vidjax.main --config=configs/residual_dense.py

Score: MAP@100 0.849 on the small synthetic dataset with the argument `face` and
`--config.num_epochs=20`, in an earlier version (mean of three seeds 0.864).

Arguments: the words of WORDS below, in any combination, and names of modalities. Those other than
`face` are used for clips without a face.

Every value names its source: `paper` (the team's article) or `ours`. No code was published.
"""

from ml_collections import ConfigDict

from vidjax import config as config_lib

WORDS = {
    **config_lib.SCALE_WORDS,
    "one": "one member trained on all frames, instead of three quality subsets",
    "single": "single frames, not merged",
    "fused": "a clip is scored once, by its mean frame, instead of frame by frame",
    "folds": "five folds of the training clips for each quality subset",
}


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for the words after the colon of `--config=...:WORD,WORD`."""
    words, modalities = config_lib.split_args(args, WORDS)
    config = config_lib.default()
    full = config_lib.choose_data(config, words)
    config.modalities = modalities or ("face", "body")  # paper
    others = tuple(name for name in config.modalities if name != "face")
    config.batch_size = 512 if full else 128  # ours
    # Paper: 8 epochs of about 60 merged and original frames per clip. Here an epoch draws 2.
    config.num_epochs = 240.0 if full else 60.0  # ours
    config.after_fusion = "examples"  # paper
    if "one" not in words:
        config.ensemble.min_quality = (-1000.0, 20.0, 40.0)  # paper: all, > 20, > 40
    config.ensemble.folds = 5 if "folds" in words else 0  # ours

    model = {
        "name": "dense",
        "backbone": "residual",
        "width": 8192 if full else 1024,  # ours: 0.44 GFLOP per frame; paper: about 0.5
        "num_layers": 3,  # paper
        "shortcut": "add",  # ours
        "activation": "relu",  # ours
        "dropout_rate": 0.5,  # ours
        "head": "linear",  # paper
        "feature_scale": 1.0,  # ours
    }
    if others:  # paper: the body, for a clip without a face
        model = {
            "name": "fallback",
            "main": model,
            "main_modalities": ("face",),
            "other": {"name": "dense", "layers": ((512, "relu", True, 0.5),)},  # ours
            "other_modalities": others,
            "missing_scale": 0.95,  # ours
        }
    config.model = ConfigDict(model)
    # Paper: the original frames, and as many merged from a frame and 1 to 4 others. So half of the
    # draws take one frame.
    merged = {
        "name": "random",
        "num_draws": 2,  # ours
        "max_frames": 5,
        "probs": (0.5, 0.125, 0.125, 0.125, 0.125),
        "replacement": False,
    }
    evaluate = {"name": "windows", "max_frames": 5, "top_share": 0.7}  # paper
    if "single" in words:
        merged = {"name": "random", "num_draws": 2, "max_frames": 1}
        evaluate = {"name": "all", "top_share": 0.7}
    if "fused" in words:
        evaluate = {"name": "mean", "weighting": "quality"}
    config.fusion.face = ConfigDict({"train": merged, "evaluate": evaluate})
    for name in others:
        mean = {"name": "mean", "weighting": "quality"}  # ours
        config.fusion[name] = ConfigDict({"train": mean, "evaluate": mean})

    config.optim.name = "adam"  # paper
    config.optim.learning_rate = 1e-2 if full else 1e-3  # paper; ours on few steps
    config.optim.total_decay = 2.0  # ours
    config.optim.warmup = 0.0  # paper
    config.optim.decay = "steps"  # paper
    config.optim.decay_factor = 0.7  # paper
    config.optim.decay_every_epochs = config.num_epochs / 8  # paper: after each of 8 epochs
    return config
