"""The iQIYI-VID paper's system: NetVLAD, one linear map per modality, Gram-matrix attention.

    python -m vidjax.main --config=configs/mma.py

Time: about 18 seconds on 2 CPU cores.
Score: MAP@100 0.902 on the small synthetic dataset, 0.906 on the small real dataset (means of 3
seeds).

Arguments: the words of WORDS below, and names of modalities. These arguments give the rows of the
paper's table 3. For the paper's net, put `published` before them:

    average,concat,face                    Face (for Head, Audio and Body, replace `face`)
    average,concat,face,head               Face + Head (then append `audio`, and then `body`)
    average,concat,ensemble                Ensemble, of all four modalities
    concat,ensemble                        + NetVLAD
    ensemble                               + NetVLAD + MMA, the paper's score

A comment after each value names its source: `paper` (iQIYI-VID: A Large Dataset for Multi-modal
Person Identification, sections 5 and 6) or `ours`. A value is ours if it scored better than the
paper's value on validation clips, or if the paper gives no value. No code was published. With
`published`, values are ours only if the paper gives no value, see `configs/published/mma.py`.
"""

from vidjax.runs import config as config_lib, config_words

WORDS = {
    **config_words.SCALE_WORDS,
    "published": "the paper's net: the 32 best frames, no LayerNorm, no dropout",
    "unit": "features of unit length; the paper does not specify the length",
    "average": "average pooling of the face instead of NetVLAD",
    "concat": "concatenated modalities, without attention",
    "pooled": "average pooling of the modalities, without attention",
    "ensemble": "three members; each omits a different tenth of the clips, or a third with "
    "`published`",
}


def get_config(args: str = "") -> config_lib.Config:
    """Returns the configuration for `args`, as in `--config=mma:ARG,ARG`."""
    words, modalities = config_words.split_args(args, WORDS)
    config = config_lib.default()
    full = config_words.choose_data(config, words)
    config.modalities = modalities or ("face", "head", "body", "audio")  # paper
    without_attention = config_words.choose_name(words, ("concat", "pooled"), "")
    config.num_epochs = 40.0 if "iqiyi_vid" in words else 30.0  # ours
    if full or "standard" in words:
        config.batch_size = 512 if full else 256  # ours
        config.num_epochs = 40.0  # ours
        config.eval.every_epochs = 10.0  # ours

    config.model = {
        "name": "mma",
        "netvlad": () if "average" in words else ("face",),  # paper
        "num_clusters": 3,  # ours: 8 is no better
        "netvlad_reduce": "mean",  # ours: does not depend on the number of frames
        "netvlad_batch_norm": True,  # paper
        "embed_dim": 512,  # paper
        "num_face_vectors": 3,  # paper
        # ours: with `map_norm`, features of unit length have the same MAP on real clips, and a
        # MAP lower by 0.010 on synthetic clips, within the error. Whitening the features by a
        # quarter of their covariance did not help, either.
        "unit_length": "unit" in words,
        "map_norm": True,  # ours: MAP 0.87 -> 0.90 on real clips
        "attention": not without_attention,  # paper
        "joined": "mean" if without_attention == "pooled" else "concat",  # paper
        "gram_dim": 64,  # paper
        # ours, 1 / D~: LayerNorm gives all vectors the same length. With the paper's 1, each
        # vector would attend only to itself (weight 0.999). MAP is the same.
        "gram_scale": 1 / 64,
        "gamma": 0.05,  # paper
        # ours: True raises MAP by 0.002 if 30 % of the clips lack each modality, but lowers MAP
        # by 0.003 on real clips (ten nets)
        "fill_missing": False,
        "feature_scale": 1.0,  # ours
        "modality_dropout_rate": 0.5,  # ours: weak modalities overfit next to a strong one
        # ours: MAP with a cosine head of scale 16 is 0.006 higher on real clips and 0.003 lower
        # on synthetic clips, both within the error
        "head": "linear",
        "logit_scale": 1.0,  # ours
        "dropout_rate": 0.5,  # ours
    }
    # Ours: the frame fusion of the quality-fusion system (4th place of 2019) instead of the best 32
    # frames. So NetVLAD pools four fused frames in training, and a single frame in evaluation. To
    # compare poolings of 32 frames, compare `published` with `published,average`.
    config.fusion.face = {
        "train": {
            "name": "random",
            "num_draws": 4,
            "max_frames": 5,
            "sampling": "uniform",
            "weighting": "quality",
        },
        "evaluate": {"name": "mean", "weighting": "quality"},
    }
    config.optim.total_decay = 2.0  # ours
    if "ensemble" in words:  # paper: different partitions, like a cross-validation
        # Ours: an identity has about six clips. With 3 folds instead of 10, a member is trained on
        # four of them, and every member scored lower.
        config.ensemble.folds = 10
        config.ensemble.only = (0, 1, 2)  # paper: three models
    if "published" in words:
        config_words.follow_publication(__file__, config, words)
    return config
