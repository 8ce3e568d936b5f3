"""Noise classes, 5th place of 2018: distractors form classes, and may move to other classes.

    python -m vidjax.main --config=configs/noise_classes.py

Time: about 22 seconds on 2 CPU cores.
Score: MAP@100 0.891 on the small synthetic dataset, 0.830 on the small real dataset, out of fold
(means of 3 seeds).

DBSCAN groups the distractors into clusters, and each cluster is a class. Each identity also has a
mirror class. A distractor in no cluster begins in a random mirror class. After every epoch, if the
model takes the distractor for an identity, the distractor moves to the mirror class of this
identity.

Only val has distractors, so the members are trained on folds of train and val. Every clip of val is
scored by the member that was not trained on it. The clustering uses the distractors of all folds,
but no identities.

Arguments: the words of WORDS below, and a modality to use instead of `face`.

`published` is the system that the author ran, see `configs/published/noise_classes.py`.

A comment after each value names its source: `paper` (the author's article), `code` (the author's
code, github.com/luckycallor/IQIYI_VID_5th at 72a2368) or `ours`.
"""

from vidjax.runs import config as config_lib, config_words

WORDS = {
    **config_words.SCALE_WORDS,
    "published": "the code's folds, epochs, learning rate, loss, frame weights, pieces and crops",
    "prediction": "a distractor for which no identity is predicted takes the predicted class",
    "other": "distractors are one class, for comparison",
    "leave_out": "distractors are not trained on, for comparison",
}


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for `args`, as in `--config=noise_classes:ARG,ARG`."""
    words, modalities = config_words.split_args(args, WORDS)
    config = config_lib.default()
    full = config_words.choose_data(config, words)
    config.modalities = config_words.choose_modality(modalities, default="face")  # paper
    modality = config.modalities[0]
    config.batch_size = 10240 if full else 256  # code; ours on few clips
    config.num_epochs = 200.0 if full else 40.0  # code; ours
    config.data.train_splits = ("train", "val")  # code
    config.data.max_frames = 128 if full else 64  # ours
    config.ensemble.folds = 8 if full else 5  # ours
    if "everything" in words:
        config.ensemble.folds = 0  # ours: no clip of val is scored
    word = config_words.choose_name(words, ("other", "leave_out", "prediction"), "label")
    config.data.distractors = word if word in ("other", "leave_out") else "noise"  # paper: noise

    if config.data.distractors == "noise":
        config.noise.modality = modality
        # Code: 1.2, for features of another scale. With more distractors, eps must be smaller,
        # because random neighbours would connect different strangers.
        config.noise.eps = 0.85 if full else 0.9  # ours
        config.noise.min_samples = 2  # code
        config.noise.relabel_every_epochs = 1.0  # paper
        # Paper: a clip for which no identity is predicted keeps its label. Code: the clip
        # gets the predicted class.
        config.noise.keep = word
        # Ours: a line through the ten stairs of the code.
        config.noise.mirror_weight = ((0.0, 0.1), (0.9 * config.num_epochs, 0.6))
        config.noise.join = True  # code

    config.model = {
        "name": "dense",
        "backbone": "mlp",
        "layers": ((512, "linear", False, 0.0),),  # code
        "head": "cosine",  # code
        "logit_scale": 64.0,  # code
    }
    mean = {"name": "mean", "weighting": "quality"}  # ours: quality x detection
    crops = {"name": "crops", "weighting": "quality"}  # code: the crops; ours: the weights
    config.fusion = {modality: {"train": mean, "evaluate": crops}}
    config.after_fusion = "examples"
    config.eval.reduce = "max"  # code: maximum over four crops, then the mean over folds

    config.loss.margin = 0.5  # code
    config.optim.name = "adam"  # code
    config.optim.learning_rate = 1e-3  # code; ours: warm-up and cosine decay
    if "published" in words:
        config_words.follow_publication(__file__, config, words)
    return config
