"""Residual Dense Net, 2nd place of 2019: merged frames, three quality subsets, shortcuts.

    python -m vidjax.main --config=configs/residual_dense.py

Time: about 87 seconds on 2 CPU cores with the argument `face`.
Score: MAP@100 0.862 on the small synthetic dataset, 0.829 on the small real dataset with the
argument `face` (means of 3 seeds).

Arguments: the words of WORDS below, and names of modalities. The first name is the main
modality, by default `face`. If a clip lacks the main modality, the other modalities score the clip.

The team's score belongs to two joined nets, with and without shortcuts:

    python -m vidjax.main --config=configs/residual_dense.py --workdir=runs/residual
    python -m vidjax.main --config=configs/residual_dense.py:plain --workdir=runs/plain
    vidjax evaluate --workdir=runs/both --runs=runs/residual,runs/plain

`published` is the system of the article, see `configs/published/residual_dense.py`.

A comment after each value names its source: `paper` (the team's article) or `ours`. No code was
published.
"""

from vidjax.runs import config as config_lib, config_words

WORDS = {
    **config_words.SCALE_WORDS,
    "published": "the article's frames, subsets, epochs, learning rate and test; a clip is "
    "ranked for 100 identities",
    "trainval": "trains on nine tenths of train and val, and ranks the remaining clips",
    "plain": "no shortcuts",
    "one": "one member trained on all frames, instead of three quality subsets",
    "single": "single frames instead of merged frames",
    "fused": "a clip is scored once, by its mean frame, instead of frame by frame",
    "folds": "five folds of the training clips for each quality subset",
}


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for `args`, as in `--config=residual_dense:ARG,ARG`."""
    words, modalities = config_words.split_args(args, WORDS)
    config = config_lib.default()
    full = config_words.choose_data(config, words)
    config.modalities = modalities or ("face", "body")  # paper
    main, *others = config.modalities
    # Paper: 8 epochs of about 60 merged and original frames per clip. Here an epoch draws 2.
    config.batch_size, config.num_epochs = (512, 240.0) if full else (128, 60.0)  # ours
    config.after_fusion = "examples"  # paper
    if "one" not in words:
        config.ensemble.min_quality = (-1000.0, 20.0, 40.0)  # paper: > 20, > 40; ours: >= 20, >= 40
        config.ensemble.poor_clips = "keep"  # ours; paper: the clip is not in the subset
    config.ensemble.folds = 5 if "folds" in words else 0  # ours
    if "trainval" in words:
        config.data.train_splits = ("train", "val")  # paper
        if "folds" not in words:
            config.ensemble.folds = 10  # paper: 9 : 1
            # The members that omit the first tenth, one per quality subset. With several seeds they
            # have other numbers.
            config.ensemble.only = (0,) if "one" in words else (0, 1, 2)  # paper

    model = {
        "name": "dense",
        "backbone": "residual",
        "width": 8192 if full else 1024,  # ours: 0.44 GFLOP per frame; paper: about 0.5
        "num_layers": 3,  # ours; paper: shortcuts among the first three of a deep net
        "shortcut": "none" if "plain" in words else "add",  # paper; ours
        "activation": "relu",  # ours
        "dropout_rate": 0.5,  # ours
        "head": "linear",  # ours
        "feature_scale": 1.0,  # ours
    }
    if others:  # paper: the body, for a clip without a face
        model = {
            "name": "fallback",
            "main": model,
            "main_modalities": (main,),
            "other": {"name": "dense", "layers": ((512, "relu", True, 0.5),)},  # ours
            "other_modalities": tuple(others),
            "missing_scale": 0.95,  # ours
        }
        if main != "face":
            model["modality"] = main
    config.model = model
    # Paper: the original frames, and as many frames merged from 2 to 5 frames. So half of the draws
    # use a single frame.
    merged = {
        "name": "random",
        "num_draws": 2,  # ours
        "max_frames": 5,
        "probs": (0.5, 0.125, 0.125, 0.125, 0.125),
        "replacement": False,
    }
    # Paper: the best 70 % of all original and merged frames are used. Ours: the best 70 % of the
    # original frames are merged, which takes less time.
    evaluate = {"name": "windows", "max_frames": 5, "top_share": 0.7}
    if "single" in words:
        merged = {"name": "random", "num_draws": 2, "max_frames": 1}
        evaluate = {"name": "all", "top_share": 0.7}
    mean = {"name": "mean", "weighting": "quality"}  # ours
    if "fused" in words:
        evaluate = mean
    config.fusion[main] = {"train": merged, "evaluate": evaluate}
    for name in others:
        config.fusion[name] = {"train": mean, "evaluate": mean}

    config.optim.name = "adam"  # paper
    config.optim.learning_rate = 1e-2 if full else 1e-3  # paper; ours on few steps
    config.optim.total_decay = 2.0  # ours
    config.optim.warmup = 0.0  # not in the paper
    config.optim.decay = "steps"  # paper
    config.optim.decay_factor = 0.7  # paper
    config.optim.decay_every_epochs = config.num_epochs / 8  # paper: after each of 8 epochs
    if "published" in words:
        config_words.follow_publication(__file__, config, words)
    return config
