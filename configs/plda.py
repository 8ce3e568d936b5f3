"""PLDA: likelihood ratios in closed form, of every modality, from sums over the training clips.

    python -m vidjax.main --config=configs/plda.py

Time: about 31 seconds on 2 CPU cores.
Score: MAP@100 0.910 on the small synthetic dataset, 0.936 on the small real dataset (means of 3
seeds).

The back end of speaker verification: vectors of a clip are the identity's plus the clip's, both
normal. An identity is, in each modality, a number of clips and the sum of their vectors. Nothing is
optimised: training passes over the clips twice, once for their centre and once for their sums. The
five settings are fitted before, on held-out training clips; `--config.model.scale=0.1` and the like
give them.

`calibrated` adds the prior of an identity: a weight times the logarithm of its number of clips,
fitted with the other settings. `--config.model.calibrated=modalities,clips` also fits a scale and
an offset of each modality. What it gave on val after train, means of three draws of the held-out
clips, for synthetic also of three data seeds (CE: nats a clip, with somebody new; FNIR at an FPIR
of 1 and 10 %):

                                 MAP    CE     ECE    FNIR 1 %  10 %   AUROC
    small real         default   .935   .620   .031   .214      .132   .943
                       clips     .934   .629   .029   .225      .131   .944
                       modal.    .935   .624   .026   .222      .132   .943
                       both      .933   .635   .028   .232      .136   .944
    small synthetic    default   .909   .756   .047   .341      .104   .939
                       clips     .908   .672   .045   .372      .101   .946
                       modal.    .908   .778   .054   .367      .112   .939
                       both      .904   .707   .050   .394      .109   .944

So neither is a default: the number of clips makes probabilities better only where it says how often
a person is met, as in the synthetic data, and a scale of each modality gained nothing. Slopes of
the scale on frames, quality, clips and the number of modalities, and an offset of somebody new by
modalities, quality or frames, were fitted as well and gained nothing on val.

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
