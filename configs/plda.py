"""PLDA: likelihood ratios in closed form, of every modality, from sums over the training clips.

    python -m vidjax.main --config=configs/plda.py

Time: about 16 seconds on 2 CPU cores.
Score: MAP@100 0.900 on the small synthetic dataset, 0.900 on the small real dataset (means of 3
seeds).

The back end of speaker verification: vectors of a clip are the identity's plus the clip's, both
normal. An identity is, in each modality, a number of clips and the sum of their vectors. Nothing is
optimised: training passes over the clips twice, once for their centre and once for their sums. The
five settings are fitted before, on held-out training clips; `--config.model.scale=0.1` and the like
give them.

`calibrated` adds the prior of an identity: a weight times the logarithm of its number of clips,
fitted with the other settings. Take it where people who have many clips are met more often, as on
the synthetic data; in a gallery, or on the real set, they are not.
`--config.model.calibrated=modalities,clips` also fits a scale and an offset of each modality. On
val, trained on train (means of 3 draws of the folds; for synthetic also of 3 data seeds; the
settings within=.8, between=.75):

FIGURES

Fitted too and not kept, since they gained less or nothing: slopes of the scale on the number of
frames, on quality, on the number of clips and on the number of modalities, an offset of somebody
new by quality, frames or the number of modalities.

Arguments: the words of WORDS below, in any combination, and names of modalities.
"""

from ml_collections import ConfigDict, config_dict

from vidjax import config as config_lib

WORDS = {
    **config_lib.SCALE_WORDS,
    "trainval": "adds up train and val, in five folds of all their clips",
    "calibrated": "fits how much the number of clips of an identity counts, too",
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
    config.model.calibrated = ("clips",) if "calibrated" in words else ()
    return config
