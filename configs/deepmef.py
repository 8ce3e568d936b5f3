"""DeepMEF, 3rd place of 2019: attention between frames, scene features, an angular margin.

    python -m vidjax.main --config=configs/deepmef.py

Time: about 21 seconds on 2 CPU cores.
Score: MAP@100 0.853 on the small synthetic dataset (means of 3 seeds).

The system has two models. The first model uses the face and the scene. The second model uses only
the scene, and scores clips without a face. If the face vectors of a clip are among the shortest
1 %, both models score the clip.

Arguments: the words of WORDS below, and names of modalities. With only `face`,
there is no second model. With only `scene`, only the second model is trained, and `average` and
`danet` have no effect. You can also name other modalities instead of `scene`.

The official files have no scene features, so `iqiyi_vid` uses only the face. To add a scene, put
pickles `scene_{train,val,test}.pickle` next to the official files, with a list of (frame, feature)
for each clip, and name both modalities: `iqiyi_vid,face,scene`. The team used 2048 features of one
frame per clip, from a SE-ResNeXt that was trained for 20 epochs to name the person.

`published` is the system that the team ran. If the article does not describe a value, or if the
article contradicts the team's code, the value is from the code. Add `views` for the team's eleven
nets, and `trainval` for the team's training clips. A batch has 4096 clips. With `few`, or with
synthetic clips, there are not enough clips, and a batch has 128.

A comment after each value names its source: `paper` (the team's article), `code` (the team's code,
github.com/LegenDong/IQIYI_VID_FACE_2019 at 258ff92) or `ours`.
"""

import math

from ml_collections import ConfigDict

from vidjax.runs import config as config_lib, config_words

WORDS = {
    **config_words.SCALE_WORDS,
    "published": "net, training and test of the code; one frame of the scene, as in the article",
    "danet": "channel attention as in DANet's code",
    "average": "mean weighted by quality and detection, instead of learned aggregation",
    "views": "eleven members; each omits a different sixteenth of the features",
    "bagging": "eleven bootstrap samples of the clips, in place of `views`",
    "trainval": "trains on train and val, without distractors, and ranks test",
}


# Code, scripts/main.sh: the chunk that each of the eleven nets omits, out of 16; for the scene, 32.
VIEWS = (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 15)
SCENE_VIEWS = (1, 2, 3, 4, 6, 8, 10, 11, 12, 14, 15)


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for `args`, as in `--config=deepmef:ARG,ARG`."""
    words, modalities = config_words.split_args(args, WORDS)
    config = config_lib.default()
    full = config_words.choose_data(config, words)
    published = "published" in words
    # Paper: face and scene. The official files have no scene.
    config.modalities = modalities or (("face",) if "iqiyi_vid" in words else ("face", "scene"))
    others = tuple(name for name in config.modalities if name != "face")
    config.batch_size = 4096 if full else 128  # code; ours on few clips
    config.num_epochs = 100.0 if full or published else 30.0  # code; ours
    config.data.distractors = "leave_out"  # code
    if "trainval" in words:
        config.data.train_splits = ("train", "val")  # code
        config.eval.split = "test"  # ours: the only split that is left
    ensemble = config_words.choose_name(words, ("views", "bagging"), "")
    if ensemble == "views":
        config.ensemble.views = 11  # code
        config.ensemble.chunks = 16  # code
    if ensemble == "bagging":  # paper: a sample can lose identities with one or two clips
        config.ensemble.bootstraps = 11  # ours: as many as views
        config.ensemble.resample = "all"  # paper

    # Widths of layers. Code: the layers of the scene have a quarter and a sixteenth of its 2048
    # features, and the layer of the face has twice its 514 values (512 features, quality and
    # detection). With `views`, a net has a sixteenth fewer features and narrower layers. Paper:
    # 128 for the scene. Ours: the widths of `views`, except for `published`.
    whole = published and ensemble != "views"
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
            "threshold": 0.0,  # ours: computed from the share; code: 8.867, for the official faces
            "main_share": 0.2,  # code
            "other_share": 0.8,  # code
        }
    if published and ensemble == "views":
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
            single = {"name": "sample", "num_frames": 1}  # paper
            config.fusion[name] = ConfigDict({"train": single, "evaluate": single})
    config.fusion.face = ConfigDict({"train": sample, "evaluate": evaluate})

    config.loss.margin = 0.5  # code
    config.loss.focal = "batch" if published else "multiclass"  # code; ours
    config.loss.gamma = 2.0  # code
    config.loss.schedule = ((0.0, 1.0),)  # code
    config.loss.mean_over = (
        "branches" if published else "weights"
    )  # code: a mean for each net; ours
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
        config.eval.temperature = 30.0  # code: the logits of the test are cosines without a factor
    return config
