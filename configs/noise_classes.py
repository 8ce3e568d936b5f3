"""Noise classes, the fifth place of 2018: distractors get classes of their own, and move.

    python -m vidjax.main --config=configs/noise_classes.py

Distractors are in val alone, so training takes train and val, in folds; every clip of val is then
scored by the member that has not seen it. Only the clustering, which knows no identity, looks at
the distractors of all folds.

Arguments, in any combination: `iqiyi_vid` (official files, full size), with `few` (values for some
thousand clips), `standard` (the synthetic dataset of 1,000 identities), `other` (distractors are
one class) or `leave_out` (they are not trained on), to compare with, and the name of the modality
to use instead of `face`.

Every value says where it comes from: `paper` (the author's article), `code` (theirs) or `ours`.
"""

from ml_collections import ConfigDict

from vidjax import config as config_lib


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for the words after the colon of `--config=...:WORD,WORD`."""
    known = (*config_lib.SIZES, "other", "leave_out")
    words, modalities = config_lib.split_args(args, known)
    config = config_lib.default()
    full = config_lib.choose_data(config, words)
    config.modalities = modalities[:1] or ("face",)  # paper
    modality = config.modalities[0]
    config.batch_size = 10240 if full else 256  # code; ours on few clips
    config.num_epochs = 200.0 if full else 40.0  # code; ours
    config.data.train_splits = ("train", "val")  # code
    config.data.max_frames = 128 if full else 64  # ours
    config.ensemble.folds = 8 if full else 5  # code: 8 to 10; ours
    config.data.distractors = "noise"  # paper
    for word in ("other", "leave_out"):
        if word in words:
            config.data.distractors = word

    config.noise.method = "dbscan"  # paper
    config.noise.modality = modality
    # Between unit vectors; code: 1.2, on features of another scale. It must shrink as distractors
    # grow in number: chance neighbours chain strangers together.
    config.noise.eps = 0.85 if full else 0.9  # ours
    config.noise.min_samples = 2  # code
    config.noise.relabel_every_epochs = 1.0  # paper
    config.noise.mirror_weight = ((0.0, 0.1), (0.9 * config.num_epochs, 0.6))  # code: in ten steps
    config.noise.join = config.data.distractors == "noise"  # code

    config.model = ConfigDict(
        {
            "name": "dense",
            "backbone": "mlp",
            "layers": ((512, "linear", False, 0.0),),  # code
            "head": "cosine",  # code
            "logit_scale": 64.0,  # code
        }
    )
    mean = {"name": "mean", "weighting": "quality"}  # paper
    crops = {"name": "crops", "weighting": "quality"}  # code
    config.fusion = ConfigDict({modality: {"train": mean, "evaluate": crops}})
    config.after_fusion = "examples"
    config.eval.reduce = "max"  # code: of four crops; then the mean over folds

    config.loss.margin = 0.5  # code
    config.optim.name = "adam"  # code
    config.optim.learning_rate = 1e-3  # code
    return config
