"""DeepMEF, 3rd place of 2019: attention between frames, scene features, an angular margin.

    python -m vidjax.main --config=configs/deepmef.py

Time: about 21 seconds on 2 CPU cores.
Score: MAP@100 0.858 on the small synthetic dataset (means of 3 seeds).

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

`published` is the system that the team ran, see `configs/published/deepmef.py`.

A comment after each value names its source: `paper` (the team's article), `code` (the team's code,
github.com/LegenDong/IQIYI_VID_FACE_2019 at 258ff92) or `ours`.
"""

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


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for `args`, as in `--config=deepmef:ARG,ARG`."""
    words, modalities = config_words.split_args(args, WORDS)
    config = config_lib.default()
    full = config_words.choose_data(config, words)
    # Paper: face and scene. The official files have no scene.
    config.modalities = modalities or (("face",) if "iqiyi_vid" in words else ("face", "scene"))
    others = tuple(name for name in config.modalities if name != "face")
    config.num_epochs = 30.0  # ours
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

    model = {
        "name": "deepmef",
        "channel_attention": "danet" if "danet" in words else "features",  # paper; ours
        "aggregation": "quality" if "average" in words else "attention",  # paper
        "branch_dims": (480, 120),  # code, of a net of `views`
        "hidden_dim": 964,  # code, of a net of `views`
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
    config.model = model
    sample = {"name": "sample", "num_frames": 40 if full else 12}  # code; ours
    config.fusion.face = {"train": sample, "evaluate": {"name": "all"}}  # ours

    config.loss.margin = 0.5  # code
    config.loss.focal = "multiclass"  # ours
    config.loss.gamma = 2.0  # code
    config.loss.schedule = ((0.0, 1.0),)  # code
    config.optim.name = "sgd"  # code
    config.optim.momentum = 0.9  # code
    config.optim.learning_rate = 0.02  # ours
    config.optim.total_decay = 2.0  # ours
    config.optim.warmup = 0.0  # code
    config.optim.decay = "cosine"  # code
    if full:
        config.batch_size = 4096  # code
        config.num_epochs = 100.0  # code
        config.optim.learning_rate = 0.1  # code
        config.optim.weight_decay = 1e-5  # code
        config.optim.total_decay = 0.0  # not in the code
    if "published" in words:
        config_words.follow_publication(__file__, config, words)
    return config
