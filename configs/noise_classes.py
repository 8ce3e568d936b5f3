"""Noise classes, 5th place of 2018: distractors form classes, and may move to other classes.

    python -m vidjax.main --config=configs/noise_classes.py

Time: about 22 seconds on 2 CPU cores.
Score: MAP@100 0.892 on the small synthetic dataset, 0.832 on the small real dataset, out of fold
(means of 3 seeds).

DBSCAN groups the distractors into clusters, and each cluster is a class. Each identity also has a
mirror class. A distractor in no cluster begins in a random mirror class. After every epoch, if the
model takes the distractor for an identity, the distractor moves to the mirror class of this
identity.

Only val has distractors, so the members are trained on folds of train and val. Every clip of val is
scored by the member that was not trained on it. The clustering uses the distractors of all folds,
but no identities.

Arguments: the words of WORDS below, and a modality to use instead of `face`.

`published` is the system that the author ran. If the article does not describe a value, the value
is from the author's code. A batch has 10,240 clips. With `few`, or with synthetic clips, there are
not enough clips, and a batch has 256.

A comment after each value names its source: `paper` (the author's article), `code` (the author's
code, github.com/luckycallor/IQIYI_VID_5th at 72a2368) or `ours`.
"""

from ml_collections import ConfigDict

from vidjax.runs import config as config_lib, config_words

# Code: loss weights of the distractors in mirror classes, each for a tenth of the training.
STAIRS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6)
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
    published = "published" in words
    config.batch_size = 10240 if full else 256  # code; ours on few clips
    config.num_epochs = 200.0 if full or published else 40.0  # code; ours
    config.data.train_splits = ("train", "val")  # code
    config.data.max_frames = 128 if full else 64  # ours
    config.ensemble.folds = 8 if full else 5  # ours
    if published:
        config.data.max_frames = 4096  # code: all frames
        config.ensemble.folds = 8  # README of the code; the default of the code is 10
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
        weights = ((0.0, 0.1), (0.9 * config.num_epochs, 0.6))  # ours: a line through the stairs
        if published:
            config.noise.relabel_by = "train"  # code: predicts with the fusion of training
            stair = config.num_epochs / 10
            ends = [(i * stair, (i + 1) * stair, weight) for i, weight in enumerate(STAIRS)]
            weights = tuple((end, weight) for *both, weight in ends for end in both)
        config.noise.mirror_weight = weights
        config.noise.join = True  # code
        if published:
            config.noise.pieces = "random"  # code

    config.model = ConfigDict(
        {
            "name": "dense",
            "backbone": "mlp",
            "layers": ((512, "linear", False, 0.0),),  # code
            "head": "cosine",  # code
            "logit_scale": 64.0,  # code
        }
    )
    mean = {"name": "mean", "weighting": "quality"}  # ours: quality x detection
    crops = {"name": "crops", "weighting": "quality"}  # code: the crops; ours: the weights
    if published:  # paper: weights by quality, without a formula; code: by squared quality
        mean |= {"weighting": "squared", "min_quality": 0.0, "min_detection": 0.0}  # code
        crops |= {"weighting": "squared", "always_shorter": True}  # code
    config.fusion = ConfigDict({modality: {"train": mean, "evaluate": crops}})
    config.after_fusion = "examples"
    config.eval.reduce = "max"  # code: maximum over four crops, then the mean over folds

    config.loss.margin = 0.5  # code
    config.optim.name = "adam"  # code
    config.optim.learning_rate = 1e-3  # code; ours: warm-up and cosine decay
    if published:
        config.loss.mean_over = "clips"  # code
        config.optim.warmup = 0.0  # code
        config.optim.decay = "constant"  # code
    return config
