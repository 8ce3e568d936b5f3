"""Quality fusion, 4th place of 2019: a few good faces fused into one vector, and an MLP.

    python -m vidjax.main --config=configs/quality_fusion.py

Time: about 13 seconds on 2 CPU cores.
Score: MAP@100 0.843 on the small synthetic dataset, 0.805 on the small real dataset (means of 3
seeds).

Arguments: the words of WORDS below, and names of modalities.

The team planned to join 25 nets, the five nets below on each of five folds, and completed some of
them. configs/README.md has the commands that train and join all of them. Column 0 of the classifier
is the class "other". It is trained if the training clips contain distractors. In the official
files, only val has distractors: to train column 0, add `trainval`.

`published` is the system of the code, see `configs/published/quality_fusion.py`.

A comment after each value names its source: `paper` (the team's article and slides), `code` (the
team's code) or `ours`.
"""

from vidjax.runs import config as config_lib, config_words

# Hidden layers of each net, as (width, activation, batch norm after it, dropout rate): code.
MLPS = {
    "mlp1": ((1024, "sigmoid", True, 0.25),),
    "mlp2": ((512, "sigmoid", True, 0.2), (1024, "sigmoid", True, 0.5)),
    "mlp3": ((1024, "swish", True, 0.25),),
    "mlp4": ((768, "swish", False, 0.2), (1024, "swish", False, 0.5)),
    "mlp5": ((1024, "swish", False, 0.5), (1024, "swish", False, 0.5)),
}
WORDS = {
    **config_words.SCALE_WORDS,
    "mlp1": "the 1st published net: 1024 sigmoid units, batch norm",
    "mlp2": "the 2nd published net: 512 and 1024 sigmoid units, batch norm",
    "mlp3": "the 3rd published net: 1024 swish units, batch norm",
    "mlp4": "the 4th published net: 768 and 1024 swish units",
    "mlp5": "the 5th published net, the default: 1024 and 1024 swish units",
    "published": "the code's batches, learning rate and stages; drops clips without a good face",
    "folds": "five members; each omits a different fifth of the clips",
    "trainval": "trains on train and val, in five folds of all their clips",
    "raw": "trains on single faces of any quality, without selection and fusion",
    "voting": "every face is scored separately, and the probabilities are averaged",
}


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for `args`, as in `--config=quality_fusion:ARG,ARG`."""
    words, modalities = config_words.split_args(args, WORDS)
    config = config_lib.default()
    full = config_words.choose_data(config, words)
    config.modalities = modalities or ("face",)  # paper
    config.batch_size = 512 if full else 128  # code; ours on few clips
    config.num_epochs = 200.0 if full else 100.0  # slides: best near 200; ours on few clips
    config.eval.scores = "log_sigmoid"  # code: a plain sum of sigmoids
    if words & {"folds", "trainval"}:
        config.ensemble.folds = 5  # paper; code: stratified, of train and val
    if "trainval" in words:
        config.data.train_splits = ("train", "val")  # code

    net = config_words.choose_name(words, MLPS, "mlp5")
    config.model = {
        "name": "dense",
        "backbone": "mlp",
        "layers": MLPS[net],  # code
        "head": "linear",  # code
        "feature_scale": 1.0,  # ours
        "modality_dropout_rate": 0.0,  # code: one modality; ours
    }
    train = {
        "name": "random",  # paper: 1 to 5 faces; code: with replacement
        "num_draws": 1,  # paper
        "max_frames": 5,  # paper
        "probs": (0.25, 0.0, 0.65, 0.0, 0.10),  # code
        "weighting": "quality",  # code
        # Ours: a clip keeps all faces if none passes; code: the clip is dropped.
        "poor_clips": "keep",
        "min_quality": 25.0,  # code; 30 on the slides
        "min_detection": 0.7,  # code; 0.8 on the slides
    }
    evaluate = {"name": "mean", "weighting": "graded"}  # paper, code: W(x)
    if "raw" in words:
        train = {"name": "random", "num_draws": 1, "max_frames": 1}
    if "voting" in words:
        config.after_fusion = "examples"
        evaluate = {"name": "all"}
    config.fusion.face = {"train": train, "evaluate": evaluate}

    config.loss.focal = "binary"  # code
    config.loss.gamma = 2.0  # code
    part = config.num_epochs / 200.0  # scales the stages, which are published for 200 epochs
    config.loss.schedule = (  # code
        (0.0, 0.75),
        (24.0 * part, 0.75),
        (24.0 * part, 1.0),
        (100.0 * part, 1.0),
        (100.0 * part, 0.98),
    )
    config.optim.name = "adam"  # code
    config.optim.learning_rate = 1.5e-4 if full else 1e-3  # code; ours on few steps
    config.optim.warmup = 0.045  # code: 9 epochs of 200, at a constant rate
    config.optim.warmup_scale = 0.13  # code: 2e-5
    config.optim.decay = "cosine"  # paper
    if full:
        config.eval.every_epochs = 20.0  # ours
    if "published" in words:
        config_words.follow_publication(__file__, config, words)
    return config
