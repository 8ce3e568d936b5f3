"""PLDA: likelihood ratios in closed form, of every modality, from sums over the training clips.

    python -m vidjax.main --config=configs/plda.py

Time: about 16 seconds on 2 CPU cores.
Score: MAP@100 0.909 on the small synthetic dataset, 0.934 on the small real dataset (means of 3
seeds).

The back end of speaker verification: vectors of a clip are the identity's plus the clip's, both
normal. An identity is, in each modality, a number of clips and the sum of their vectors. Nothing is
optimised: training passes over the clips twice, once for their centre and once for their sums. The
five settings are fitted before, on held-out training clips; `--config.model.scale=0.1` and the like
give them.

A scale and an offset of each modality, and a prior of an identity by its number of clips, were
fitted as well. On val after train they changed MAP by -.002 to 0 on real clips and -.005 to 0 on
synthetic ones, and the error of the probabilities by -.003 to +.007; the prior made the answers
more probable on synthetic clips alone, where the number of clips says how often a person is met.
Slopes of the scale on frames, quality, clips and the number of modalities gained nothing either.
Both were options until a538f79; its docstring of this file has the table.

Arguments: the words of WORDS below, in any combination, and names of modalities.
"""

from ml_collections import ConfigDict, config_dict

from vidjax.runs import config as config_lib

WORDS = {
    **config_lib.SCALE_WORDS,
    "trainval": "adds up train and val, in five folds of all their clips",
}


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for the words after the colon of `--config=configs/plda.py:...`."""
    words, modalities = config_lib.split_args(args, WORDS)
    config = config_lib.default()
    config_lib.choose_data(config, words)
    config.modalities = modalities or ("face", "head", "body", "audio")
    config.batch_size = 256
    config.num_epochs = 2.0  # one for the centre, one for the sums
    if "trainval" in words:
        config.data.train_splits = ("train", "val")
        config.ensemble.folds = 5
    config.data.max_frames = 512
    config.data.crop = "quality"

    mean = {"name": "mean", "weighting": "quality"}
    config.fusion = ConfigDict(
        {name: {"train": mean, "evaluate": mean} for name in config.modalities}
    )
    config.model = ConfigDict({"name": "plda"})
    for name in ("within", "between", "scale", "unenrolled", "stranger"):
        config.model[name] = config_dict.placeholder(float)  # fitted before training
    return config
