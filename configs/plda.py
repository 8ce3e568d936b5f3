"""PLDA: scores clips by log-likelihood ratios, which are computed from sums of training clips.

    python -m vidjax.main --config=configs/plda.py

Time: about 16 seconds on 2 CPU cores.
Score: MAP@100 0.909 on the small synthetic dataset, 0.934 on the small real dataset (means of 3
seeds).

PLDA is common in speaker verification. It models the vector of a clip as the sum of a vector of the
identity and a random vector of the clip, both with a normal distribution. For each modality, an
identity is represented by the number of training clips and the sum of their vectors. Nothing is
optimised by gradients. First, five settings are fitted on held-out training clips. Then the clips
are read twice: once for the centre of the clips, and once for the sums. To set one of the settings
yourself, use a flag such as `--config.model.scale=0.1`.

Three extensions did not help: a scale and an offset per modality, a prior of each identity that
depends on its number of clips, and a scale that depends on frames, quality, clips and the number of
modalities. The first two extensions changed MAP on val by -.002 to 0 on real clips and by -.005 to
0 on synthetic clips, and the error of the probabilities by -.003 to +.007. The prior improved the
probabilities only on synthetic clips, in which people with many training clips appear more often.

Arguments: the words of WORDS below (`few` has no effect), and names of modalities.
"""

from ml_collections import config_dict

from vidjax.runs import config as config_lib, config_words

WORDS = {
    **config_words.SCALE_WORDS,
    "trainval": "adds up the clips of train and val, in five folds",
}


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for `args`, as in `--config=plda:ARG,ARG`."""
    words, modalities = config_words.split_args(args, WORDS)
    config = config_lib.default()
    config_words.choose_data(config, words)
    config.modalities = modalities or ("face", "head", "body", "audio")
    config.batch_size = 256
    config.num_epochs = 2.0  # the first for the centre, the second for the sums
    if "trainval" in words:
        config.data.train_splits = ("train", "val")
        config.ensemble.folds = 5
    config.data.max_frames = 512
    config.data.crop = "quality"

    mean = {"name": "mean", "weighting": "quality"}
    config.fusion = {name: {"train": mean, "evaluate": mean} for name in config.modalities}
    settings = ("within", "between", "scale", "unenrolled", "stranger")  # fitted before training
    config.model = {"name": "plda"} | {x: config_dict.placeholder(float) for x in settings}
    return config
