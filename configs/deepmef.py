"""DeepMEF, 3rd place of 2019: attention between frames, scene features, an angular margin.

    python -m vidjax.main --config=configs/deepmef.py

Time: about 21 seconds on 2 CPU cores.
Score: MAP@100 0.853 on the small synthetic dataset (means of 3 seeds).

Arguments: the words of WORDS below, in any combination, and names of modalities: `face` alone,
`scene` alone, which is the second model by itself, or others in place of `scene`.

A clip without a face is scored by a model of the scene alone. A clip whose face vectors are among
the shortest 1 % of the training clips is scored by both models.

The official files have no scene features, so `iqiyi_vid` takes the face alone. To add them, put
pickles of your own beside the official ones, `scene_{train,val,test}.pickle`, in which every clip
has a list of (frame, feature), and name both: `iqiyi_vid,face,scene`. The team took 2048 features
of one frame per clip from a SE-ResNeXt that it had trained for 20 epochs to name the person.

`published` is what the team ran: net, frames, training and test of its code, where the article is
silent or contradicts it. With `views` it has the eleven nets by their numbers, with `trainval` the
clips. The batch of 4096 needs as many clips: with `few`, or synthetic clips, one of 128 is ours.

Every value names its source: `paper` (the team's article), `code` (the team's,
github.com/LegenDong/IQIYI_VID_FACE_2019 at 258ff92) or `ours`.
"""

import math

from ml_collections import ConfigDict

from vidjax.runs import config as config_lib

WORDS = {
    **config_lib.SCALE_WORDS,
    "published": "net, training and test of the authors' code; one frame of the scene (article)",
    "danet": "channel attention as in DANet's code",
    "average": "mean weighted by quality and detection, instead of learned aggregation",
    "views": "eleven members; each omits a different sixteenth of the features",
    "bagging": "eleven bootstrap samples of the clips, in place of `views`",
    "trainval": "trains on train and val, without distractors, and ranks test",
}


# Code, scripts/main.sh: chunks that the eleven nets leave out, of 16; those of the scene's, of 32.
VIEWS = (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 15)
SCENE_VIEWS = (1, 2, 3, 4, 6, 8, 10, 11, 12, 14, 15)


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for the words after the colon of `--config=...:WORD,WORD`."""
    words, modalities = config_lib.split_args(args, WORDS)
    config = config_lib.default()
    full = config_lib.choose_data(config, words)
    published = "published" in words
    # Paper: face and scene. The organisers gave no scene.
    config.modalities = modalities or (("face",) if "iqiyi_vid" in words else ("face", "scene"))
    others = tuple(name for name in config.modalities if name != "face")
    config.batch_size = 4096 if full else 128  # code; ours on few clips
    config.num_epochs = 100.0 if full or published else 30.0  # code; ours
    config.data.distractors = "leave_out"  # code
    if "trainval" in words:
        config.data.train_splits = ("train", "val")  # code
        config.eval.split = "test"  # ours: nothing else is held out
    if "views" in words:
        config.ensemble.views = 11  # code
        config.ensemble.chunks = 16  # code
    if "bagging" in words:  # paper: it loses identities that have one or two clips
        config.ensemble.bootstraps = 11  # ours: as many as views
        config.ensemble.resample = "all"  # paper

    # Code: a quarter and a sixteenth of 2048 scene features, and twice the 514 of a face with its
    # quality and detection; less if a view leaves a sixteenth out. Paper: 128 for the scene. Ours:
    # the smaller numbers in any case, unless `published`.
    whole = published and "views" not in words
    model = {
        "name": "deepmef",
        "channel_attention": "features",  # ours
        "aggregation": "quality" if "average" in words else "attention",  # paper
        "branch_dims": (512, 128) if whole else (480, 120),  # code
        "hidden_dim": 1028 if whole else 964,  # code
        "dropout_rate": 0.5,  # code
        "modality_dropout_rate": 0.3,  # ours
        "logit_scale": 30.0,  # code, in training
    }
    other = {
        "name": "dense",
        "layers": ((480, "prelu", True, 0.5), (120, "prelu", True, 0.5)),  # ours
        "head": "cosine",  # code
        "logit_scale": 30.0,  # code, in training
    }
    if published:
        model["channel_attention"] = "channels"  # code
        model["channel_norm"] = "danet" not in words  # code
        model["rms_norm"] = False  # code
        model["num_frames"] = 40  # code
        model["layer_form"] = "published"  # code
        model["modality_dropout_rate"] = 0.0  # paper
        del other["layers"]
        other["backbone"] = "block"  # code
        other["dropout_rate"] = 0.5  # code
    if "danet" in words:
        model["channel_attention"] = "danet"  # paper
    if "face" not in config.modalities:
        model = other
    elif others:
        model = {
            "name": "fallback",
            "main": model,
            "other": other,
            "other_modalities": others,
            "missing_scale": 0.95,  # code
            "measure": "norm",  # code; paper: a quality score
            "threshold_share": 0.01,  # paper
            "threshold": 0.0,  # ours: of that share; code: 8.867, for the official faces
            "main_share": 0.2,  # code
            "other_share": 0.8,  # code
        }
    if published and "views" in words:
        chunks, views = (16, VIEWS) if "face" in config.modalities else (32, SCENE_VIEWS)
        config.ensemble.views = config.ensemble.chunks = chunks  # code
        config.ensemble.only = views  # code
    config.model = ConfigDict(model)
    sample = {"name": "sample", "num_frames": 40 if full or published else 12}  # code; ours
    evaluate = {"name": "all"}  # ours
    if published:
        sample |= {"order": "random", "replacement": True}  # code
        evaluate = sample  # code
        config.data.max_frames = 4096  # code: draws from all frames
        for name in others:
            one = {"name": "sample", "num_frames": 1}  # paper
            config.fusion[name] = ConfigDict({"train": one, "evaluate": one})
    config.fusion.face = ConfigDict({"train": sample, "evaluate": evaluate})

    config.loss.margin = 0.5  # code
    config.loss.focal = "batch" if published else "multiclass"  # code; ours
    config.loss.gamma = 2.0  # code
    config.loss.schedule = ((0.0, 1.0),)  # code
    config.loss.mean_over = "branches" if published else "weights"  # code: each net its own; ours
    config.data.whole_epochs = published  # code: its loader keeps the short last batch
    config.optim.name = "sgd"  # code
    config.optim.momentum = 0.9  # code
    config.optim.learning_rate = 0.1 if full or published else 0.02  # code; ours on few clips
    config.optim.weight_decay = 1e-5 if full or published else 0.0  # code; ours
    config.optim.total_decay = 0.0 if full or published else 2.0  # ours
    config.optim.warmup = 0.0  # code
    config.optim.decay = "cosine"  # code
    if published:
        config.optim.decay = "piecewise"  # code: CosineAnnealingLR, one rate for each epoch
        factors = [(1 + math.cos(math.pi * epoch / 100)) / 2 for epoch in range(100)]
        config.optim.points = tuple((i + end, x) for i, x in enumerate(factors) for end in (0, 1))
        config.optim.decay_all = True  # code
        config.eval.temperature = 30.0  # code: the test's logits are cosines, without their factor
    return config
