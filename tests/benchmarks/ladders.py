"""The runs behind the tables of scores, and the comparisons that the publications made.

A rung compares two runs that differ in one thing. `scores` trains the runs and writes the tables.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

SEEDS = (0, 1, 2)
SYNTHETIC, REAL = "synthetic", "real"
NO_BODY, NO_SCENE = "no body", "no scene"
NO_STRANGERS = "no distractors in train"
SIMULATED = "synthetic clips alone"
# Configuration -> the modalities of its own that real clips have, where they lack others.
ON_REAL = {
    "mma": "face,head,audio",
    "deepmef": "face",
    "plda": "face,head,audio",
    "cosine": "face,head,audio",
}


class Row(NamedTuple):
    """A configuration that is run once per seed and dataset, or a join of others."""

    key: str  # names the row; the folders of its runs begin with it
    config: str = ""  # file in `configs/` without its ending; empty for a join
    words: str = ""  # arguments of the configuration
    modalities: str = ""  # empty for those of the configuration, on real clips of ON_REAL
    overrides: str = ""  # further words of the command
    joined: tuple[str, ...] = ()  # keys of the rows that are joined, instead of `config`
    absent: Mapping[str, str] = MappingProxyType({})  # dataset -> why there is no run on it

    def command(self, dataset: str, seed: int, folder: str) -> list[str]:
        """Returns the words that train the row; a join has none.

        The seed is that of the net, on the synthetic dataset also of the data. `folder` holds the
        real clips.
        """
        real = dataset == REAL
        modalities = self.modalities or (ON_REAL.get(self.config, "") if real else "")
        scale = "iqiyi_vid" if self.config == "knn" else "iqiyi_vid,few"
        arguments = ",".join(filter(None, (scale if real else "", self.words, modalities)))
        spec = ":".join(filter(None, (f"configs/{self.config}.py", arguments)))
        words = [f"--config={spec}", *self.overrides.split(), f"--config.seed={seed}"]
        words += [f"--config.data.dir={folder}"] if real else [f"--config.data.seed={seed}"]
        return words

    @property
    def is_out_of_fold(self) -> bool:
        """True if members score the clips of val that they were not trained on."""
        folds = "train,val" in self.overrides or "trainval" in self.words
        return folds or self.config == "noise_classes"

    @property
    def arguments(self) -> str:
        """What stands after the colon of the configuration, but for the dataset."""
        return ",".join(filter(None, (self.words, self.modalities)))

    @property
    def spec(self) -> str:
        """The row as a reader would type it, after `--config=configs/`."""
        if self.joined:
            return " + ".join(ROWS[key].spec for key in self.joined)
        spec = ":".join(filter(None, (f"{self.config}.py", self.arguments)))
        return " ".join(filter(None, (spec, self.overrides)))


class Rung(NamedTuple):
    """A comparison of two rows that differ in one thing."""

    text: str  # what the row has and its base has not
    key: str
    base: str = ""  # the row that it is compared with; empty for the first of a ladder
    published: str = ""  # MAP in the publication, or the difference from its base with a sign
    why: str = ""  # the reason for a result that differs from the publication's
    absent: Mapping[str, str] = MappingProxyType({})  # dataset -> why nothing is compared on it


# Reasons for results that differ from a publication's, where rows show them.
UNKNOWN = "not known"
ONE_NET = "with one net, synthetic clips gain: see below; of real ones not known"
ALL_CLIPS = "three nets of all clips gain on real ones: see the recipe; on synthetic ones not known"
OTHER_DATA = "see the claims that need other data"
RANKED_LAST = "the base ranks a clip without a face last, wherever it could stand"
SMALL = "the published gain is smaller than these sets can tell"
THREE = "--config.ensemble.seeds=3"
FIVE = "--config.ensemble.seeds=5"
HELD_OUT = "--config.data.train_splits=train,val --config.ensemble.folds=5"
FIRST_FOLD = "--config.ensemble.only=0"
MORE_STEPS = "--config.batch_size=64"
MLPS = ("mlp1", "mlp2", "mlp3", "mlp4")  # beside mlp5, the shipped one
PLAIN = "average,concat"
PAPER_NETS = ("mma_published", "mma_published_concat", "mma_published_pooled")
# Knobs of the synthetic dataset: name -> (what turns it, keys of the rows that run with it).
KNOBS = {
    "strangers": (
        "--config.data.wrong_clips=0.6",
        ("fusion", "fusion_voting", "fusion_raw", "deepmef", "deepmef_mean"),
    ),
    "blur": ("--config.data.blur=2", ("fusion", "fusion_voting", "fusion_raw")),
    "labels": ("--config.data.label_noise=0.2", ("mma", "mma_smoothing")),
    "distractors": ("--config.data.train_distractors=0.375", ("fusion", "fusion_unseen")),
    "missing": (
        "--config.data.missing_rate=0.3",
        ("mma", "mma_unscaled", "mma_filled", "mma_concat", "mma_pooled", *PAPER_NETS),
    ),
    "false": (
        "--config.data.false_modality=0.3",
        ("mma", "mma_concat", "mma_pooled", *PAPER_NETS),
    ),
    "standard": (
        "--config.data.size=standard",
        ("fusion", "fusion_raw", "deepmef", "deepmef_mean", "deepmef_plain"),
    ),
}
# The paper's table 3: end of a key -> words and modalities of `mma.py`.
TABLE_3 = {
    **{f"{name}_mean": (PLAIN, name) for name in ("face", "head", "audio", "body")},
    "face_head_mean": (PLAIN, "face,head"),
    "face_head_audio_mean": (PLAIN, "face,head,audio"),
    "mean": (PLAIN, ""),
    "mean_nets": (f"{PLAIN},ensemble", ""),
    "netvlad_nets": ("concat,ensemble", ""),
    "nets": ("ensemble", ""),
}
# Nets that climb table 3: begin of their keys -> words of `mma.py`.
MMA_NETS = {"mma": "", "mma_published": "published", "mma_unit_published": "published,unit"}
OTHERS = ("head", "body", "audio")
# Modality, key of its row, published accuracy.
ACCURACIES = (
    ("face", "one_single", "0.81 to 0.88"),
    ("head", "head", "0.60"),
    ("body", "body", "0.35"),
    ("audio", "audio", "0.25"),
)
NARROW, NARROW_MAIN = "--config.model.width=256", "--config.model.main.width=256"
FALLBACKS = {"dense_other": "head", "dense_fallback": "body", "dense_fallbacks": "body,head"}
DENSE = {
    "dense_one_single": "one,single",
    "dense_single": "single",
    "dense_narrow": "",
    "dense_plain": "plain",
    "dense_one": "one",
    "dense_one_fused": "one,fused",
}
DENSE_OPTIONS = {
    "gates": "--config.model.gate=True",
    "smoothing": "--config.loss.label_smoothing=0.1",
    "mixup": "--config.mixup=0.2",
}
# What quality fusion adds to training, each left out.
FUSION_OPTIONS = {
    "filtered": "--config.fusion.face.train.probs=1,0,0,0,0",
    "fused": (
        "--config.fusion.face.train.min_quality=-1000 --config.fusion.face.train.min_detection=0"
    ),
    "softmax": "--config.loss.schedule=((0,0),)",
    "focal": "--config.loss.schedule=((0,1),)",
    "mixed": "--config.loss.schedule=((0,0.75),)",
    "unwarmed": "--config.optim.warmup=0 --config.optim.warmup_scale=0",
    "constant": "--config.optim.decay=constant",
}
MMA_OPTIONS = {
    "smoothing": "--config.loss.label_smoothing=0.1",
    "mixup": "--config.mixup=0.2",
    "gates": "--config.model.gate=True",
    "bfloat16": "--config.dtype=bfloat16",
    "kept": "--config.model.modality_dropout_rate=0",
    "lengths": "--config.model.map_norm=False",
    "undecayed": "--config.optim.total_decay=0",
    "unscaled": "--config.model.gram_scale=1",
    "strong": "--config.model.gamma=0.5",
    "filled": "--config.model.fill_missing=True",
    "folds": HELD_OUT,
    "folds_twice": f"{HELD_OUT} --config.ensemble.seeds=2",
    "five": FIVE,
    "unit": "--config.model.unit_length=True",
    "head": "--config.model.head=cosine --config.model.logit_scale=16",
}
DEEPMEF_OPTIONS = {
    "plain": "--config.model.channel_attention=none",
    "seeds": FIVE,
    "views": "--config.ensemble.views=5",
    "bags": "--config.ensemble.bootstraps=5",
    "bags_lost": "--config.ensemble.bootstraps=5 --config.ensemble.resample=all",
}
PUBLISHED_OPTIONS = {
    "slow": "--config.model.netvlad_norms=()",
    "l2": "--config.model.netvlad_norms=batch,l2",
    "masked": "--config.model.fill_missing=False",
    "two": "--config.model.attention_form=two",
}
LARGER = "the standard set is synthetic"
_ROWS = (
    # Nearest neighbours and noise classes (5th place 2018).
    Row("knn", "knn"),
    Row("knn_folds", "knn", overrides=HELD_OUT),
    Row("leave_out", "noise_classes", "leave_out"),
    Row("other", "noise_classes", "other"),
    Row("other_joined", "noise_classes", "other", overrides="--config.noise.join=True"),
    Row("noise", "noise_classes"),
    Row("noise_prediction", "noise_classes", overrides="--config.noise.keep=prediction"),
    Row("noise_seeds", "noise_classes", overrides=THREE),
    Row("noise_published", "noise_classes", "published"),
    # Quality fusion (4th place 2019).
    Row("fusion", "quality_fusion"),
    Row("fusion_raw", "quality_fusion", "raw"),
    Row("fusion_voting", "quality_fusion", "voting"),
    Row(
        "fusion_unseen", "quality_fusion", overrides="--config.data.distractors=leave_out",
        absent={REAL: NO_STRANGERS},
    ),
    *(
        Row(f"fusion_{name}", "quality_fusion", overrides=overrides)
        for name, overrides in FUSION_OPTIONS.items()
    ),
    Row("fusion_published", "quality_fusion", "published"),
    Row("fusion_published_steps", "quality_fusion", "published", overrides=MORE_STEPS),
    Row("fusion_fold", "quality_fusion", "folds", overrides=FIRST_FOLD),
    Row("fusion_folds", "quality_fusion", "folds"),
    *(Row(f"fusion_{net}", "quality_fusion", net) for net in MLPS),
    *(Row(f"fusion_{net}_folds", "quality_fusion", f"{net},folds") for net in MLPS),
    Row("fusion_nets", joined=("fusion_folds", *(f"fusion_{net}_folds" for net in MLPS))),
    # DeepMEF (3rd place 2019).
    Row("deepmef", "deepmef", "", "face"),
    Row("deepmef_mean", "deepmef", "average", "face"),
    Row("deepmef_danet", "deepmef", "danet", "face"),
    *(
        Row(f"deepmef_{name}", "deepmef", "", "face", overrides=overrides)
        for name, overrides in DEEPMEF_OPTIONS.items()
    ),
    Row("deepmef_scene", "deepmef", absent={REAL: NO_SCENE}),
    Row(
        "deepmef_lacking", "deepmef", absent={REAL: NO_SCENE},
        overrides="--config.model.threshold_share=0",
    ),
    Row("deepmef_published", "deepmef", "published"),
    Row("deepmef_published_mean", "deepmef", "published,average"),
    Row("deepmef_published_views", "deepmef", "published,views"),
    # Residual Dense Net (2nd place 2019).
    Row("dense", "residual_dense", "", "face"),
    *(Row(key, "residual_dense", words, "face", overrides=NARROW) for key, words in DENSE.items()),
    *(
        Row(f"dense_{name}", "residual_dense", "", "face", overrides=f"{NARROW} {overrides}")
        for name, overrides in DENSE_OPTIONS.items()
    ),
    Row("dense_published", "residual_dense", "published", "face"),
    Row("dense_both", joined=("dense_narrow", "dense_plain")),
    *(
        Row(
            key, "residual_dense", "", f"face,{others}", overrides=NARROW_MAIN,
            absent={REAL: NO_BODY} if "body" in others else {},
        )
        for key, others in FALLBACKS.items()
    ),
    *(
        Row(
            f"dense_{name}", "residual_dense", "one,single", name, overrides=NARROW,
            absent={REAL: NO_BODY} if name == "body" else {},
        )
        for name in OTHERS
    ),
    # The iQIYI-VID paper.
    *(
        Row(
            f"{first}_{name}", "mma", ",".join(filter(None, (net, words))), modalities,
            absent={REAL: NO_BODY} if modalities == "body" else {},
        )
        for first, net in MMA_NETS.items() for name, (words, modalities) in TABLE_3.items()
    ),
    Row("mma_face", "mma", "", "face"),
    Row("mma_concat", "mma", "concat"),
    Row("mma_pooled", "mma", "pooled"),
    Row("mma_average", "mma", "average"),
    Row("mma", "mma", ""),
    Row("mma_seeds", "mma", "", overrides=THREE),
    *(
        Row(f"mma_{name}", "mma", "", overrides=overrides)
        for name, overrides in MMA_OPTIONS.items()
    ),
    Row("mma_published", "mma", "published"),
    Row("mma_published_average", "mma", "published,average"),
    Row("mma_published_concat", "mma", "published,concat"),
    Row("mma_published_pooled", "mma", "published,pooled"),
    Row("mma_unit_published", "mma", "published,unit"),
    Row("mma_unit_published_concat", "mma", "published,unit,concat"),
    *(
        Row(f"mma_published_{name}", "mma", "published", overrides=overrides)
        for name, overrides in PUBLISHED_OPTIONS.items()
    ),
    # Ours: likelihood ratios in closed form, and cosines with a margin.
    Row("plda", "plda"),
    *(Row(f"plda_{name}", "plda", "", name) for name in ("face", "head", "audio")),
    Row("plda_folds", "plda", "trainval"),
    Row("cosine", "cosine"),
    Row("cosine_seeds", "cosine", "ensemble"),
    Row("cosine_folds", "cosine", "trainval"),
    Row("cosine_plda", joined=("cosine_seeds", "plda")),
    Row("cosine_plda_folds", joined=("cosine_folds", "plda_folds")),
    *(
        Row(f"{name}_standard", name, "standard", absent={REAL: LARGER})
        for name in ("mma", "plda", "cosine")
    ),
)  # fmt: skip


def _turned() -> Iterator[Row]:
    """Yields the rows that run with a knob of the synthetic dataset turned, as `KEY_KNOB`."""
    by_key = {row.key: row for row in _ROWS}
    for knob, (override, keys) in KNOBS.items():
        for key in keys:
            row = by_key[key]
            yield row._replace(
                key=f"{key}_{knob}",
                overrides=f"{row.overrides} {override}".strip(),
                absent={REAL: SIMULATED},
            )


ROWS: Mapping[str, Row] = {row.key: row for row in (*_ROWS, *_turned())}


def _knob(text: str, key: str, base: str, *knobs: str, why: str = "") -> tuple[Rung, ...]:
    """Returns a comparison on the synthetic dataset as it is, then with each of some knobs."""
    turned = (Rung(text, f"{key}_{knob}", f"{base}_{knob}", why=why) for knob in knobs)
    return Rung(text, key, base, why=why), *turned


# Ladders that tell the share of known clips missed where 1 % of the distractors pass, too.
OPEN_SET = ("noise_classes",)


def _table_3(first: str, nets: str, why_nets: str) -> tuple[Rung, ...]:
    """Returns the paper's table 3, climbed by the rows whose keys begin with `first`."""
    alone = {"head": "0.5432", "audio": "0.1179", "body": "0.0514"}
    return (
        *(Rung(f"{name} alone", f"{first}_{name}_mean", "", x) for name, x in alone.items()),
        Rung("face alone: averages, no attention", f"{first}_face_mean", published="0.8519"),
        Rung("head", f"{first}_face_head_mean", f"{first}_face_mean", "0.8716"),
        Rung(
            "audio", f"{first}_face_head_audio_mean", f"{first}_face_head_mean", "0.8769", UNKNOWN,
        ),
        Rung(
            "body", f"{first}_mean", f"{first}_face_head_audio_mean", "0.8780",
            "a body tells little: see body alone", {REAL: NO_BODY},
        ),
        Rung(nets, f"{first}_mean_nets", f"{first}_mean", "0.8924", why_nets),
        Rung(
            "NetVLAD instead of averages", f"{first}_netvlad_nets", f"{first}_mean_nets",
            "0.8946", UNKNOWN,
        ),
        Rung(
            "attention between modalities", f"{first}_nets", f"{first}_netvlad_nets", "0.8970",
            UNKNOWN,
        ),
    )  # fmt: skip


LADDERS: Mapping[str, tuple[Rung, ...]] = {
    "residual_dense": (
        Rung("one net, single frames", "dense_one_single", published="0.875"),
        Rung("three quality subsets", "dense_single", "dense_one_single", "0.889"),
        Rung(
            "frames merged in training and test", "dense_narrow", "dense_single", "0.9019",
            ONE_NET,
        ),
        Rung("joined with a net without shortcuts", "dense_both", "dense_narrow", "0.9035", SMALL),
        Rung("frames merged, with one net", "dense_one", "dense_one_single"),
        Rung("three quality subsets, with merged frames", "dense_narrow", "dense_one"),
        Rung("shortcuts", "dense_narrow", "dense_plain", "better"),
        Rung("the test by one mean frame", "dense_one_fused", "dense_one"),
        Rung(
            "the body where a clip has no face", "dense_fallback", "dense_narrow", why=RANKED_LAST,
        ),
        Rung("the head beside this body", "dense_fallbacks", "dense_fallback", "no use"),
        Rung("the head where a clip has no face", "dense_other", "dense_narrow", why=RANKED_LAST),
        Rung("1024 units instead of 256", "dense", "dense_narrow"),
        Rung("sigmoid gates after the layers", "dense_gates", "dense_narrow"),
        Rung("label smoothing of 0.1", "dense_smoothing", "dense_narrow"),
        Rung("mixup of clips, alpha 0.2", "dense_mixup", "dense_narrow"),
        *(
            Rung(f"{name} alone, one net, single frames", f"dense_{key}", published=f"top1 {top1}")
            for name, key, top1 in ACCURACIES
        ),
        Rung("as published, all frames and merged ones", "dense_published"),
    ),
    "quality_fusion": (
        Rung("every face scored by itself", "fusion_voting"),
        Rung(
            "one fused face in the test", "fusion", "fusion_voting", "+0.01",
            UNKNOWN,
        ),
        Rung("faces filtered and fused in training", "fusion", "fusion_raw", "+0.02", OTHER_DATA),
        Rung("faces fused, where they are filtered", "fusion", "fusion_filtered"),
        Rung("faces filtered, where they are fused", "fusion", "fusion_fused"),
        Rung("focal and softmax loss, not softmax alone", "fusion_mixed", "fusion_softmax"),
        Rung("focal and softmax loss, not focal alone", "fusion_mixed", "fusion_focal"),
        Rung("stages of this mixture", "fusion", "fusion_mixed"),
        Rung("warm-up of the learning rate", "fusion", "fusion_unwarmed"),
        Rung("cosine annealing", "fusion", "fusion_constant"),
        Rung("as published, one net", "fusion_published"),
        Rung(
            "batches of 64 clips, not 512: more steps", "fusion_published_steps",
            "fusion_published",
        ),
        Rung("one net on four fifths of the clips", "fusion_fold", published="0.8811"),
        Rung("five of these nets", "fusion_folds", "fusion_fold", "0.8955"),
        Rung(
            "five kinds of nets (theirs: partially completed)", "fusion_nets", "fusion_folds",
            "0.8983", SMALL,
        ),
        *(Rung(f"{net} instead of mlp5", f"fusion_{net}", "fusion") for net in MLPS),
    ),
    "mma": (
        *_table_3("mma", "three nets on nine tenths of the clips", ALL_CLIPS),
        Rung("attention, in one net", "mma", "mma_concat", why=UNKNOWN),
        Rung("concatenation, not average pooling, in one net", "mma_concat", "mma_pooled"),
        Rung("NetVLAD, in one net with attention", "mma", "mma_average", why=UNKNOWN),
    ),
    "mma_published": (
        *_table_3("mma_published", "three nets on two thirds of the clips", UNKNOWN),
        Rung("the paper's net, alone", "mma_published"),
        Rung("NetVLAD, in one net", "mma_published", "mma_published_average", why=UNKNOWN),
        Rung(
            "NetVLAD with BatchNorm", "mma_published", "mma_published_slow", "faster", UNKNOWN,
        ),
        Rung("NetVLAD without L2 norms", "mma_published", "mma_published_l2", "better", UNKNOWN),
        Rung("attention, in one net", "mma_published", "mma_published_concat", why=UNKNOWN),
        Rung(
            "concatenation, not average pooling", "mma_published_concat", "mma_published_pooled",
        ),
        Rung(
            "missing modalities filled by attention", "mma_published", "mma_published_masked",
            why=UNKNOWN,
        ),
        Rung(
            "one Gram matrix, not two projections", "mma_published", "mma_published_two", "better",
            UNKNOWN,
        ),
    ),
    "mma_unit_published": (
        *_table_3("mma_unit_published", "three nets on two thirds of the clips", UNKNOWN),
        Rung("features of unit length, in one net", "mma_unit_published", "mma_published"),
        Rung(
            "attention, in one net", "mma_unit_published", "mma_unit_published_concat",
            why=UNKNOWN,
        ),
    ),
    "options": (
        Rung("label smoothing of 0.1", "mma_smoothing", "mma"),
        Rung("mixup of clips, alpha 0.2", "mma_mixup", "mma"),
        Rung("sigmoid gates", "mma_gates", "mma"),
        Rung("bfloat16", "mma_bfloat16", "mma"),
        Rung("modality dropout", "mma", "mma_kept"),
        Rung("LayerNorm after each map", "mma", "mma_lengths"),
        Rung("weight decay", "mma", "mma_undecayed"),
        Rung("a small scale of the Gram matrix", "mma", "mma_unscaled"),
        Rung("ten times the attention", "mma_strong", "mma"),
    ),
    "recipe": (
        Rung("one net, trained on train", "mma"),
        Rung("three nets", "mma_seeds", "mma"),
        Rung("five nets", "mma_five", "mma_seeds"),
        Rung("five nets on folds of train and val, out of fold", "mma_folds"),
        Rung("two nets per fold", "mma_folds_twice", "mma_folds"),
    ),
    "deepmef": (
        Rung("face alone", "deepmef"),
        Rung(
            "learned weights of frames, not quality", "deepmef", "deepmef_mean", "better",
            UNKNOWN,
        ),
        Rung("attention between frames", "deepmef", "deepmef_plain", why=UNKNOWN),
        Rung("attention as in DANet, not ours", "deepmef_danet", "deepmef", why=UNKNOWN),
        Rung("five nets", "deepmef_seeds", "deepmef"),
        Rung(
            "each lacks other features", "deepmef_views", "deepmef_seeds", "better",
            "five nets of all features gain as much",
        ),
        Rung("each lacks other clips of every identity", "deepmef_bags", "deepmef_seeds"),
        Rung(
            "each lacks other clips, and so some identities", "deepmef_bags_lost", "deepmef_seeds",
            "worse",
        ),
        Rung("identities lost, not kept", "deepmef_bags_lost", "deepmef_bags", "worse"),
        Rung("the scene", "deepmef_scene", "deepmef"),
        Rung("the scene for poor faces, too", "deepmef_scene", "deepmef_lacking"),
        Rung("as published, one net", "deepmef_published"),
        Rung(
            "learned weights of frames, as published", "deepmef_published",
            "deepmef_published_mean", "better", "not known",
        ),
        Rung("as published, eleven nets", "deepmef_published_views", published="0.8986"),
    ),
    "noise_classes": (
        Rung("nearest neighbours", "knn_folds"),
        Rung("a net", "leave_out", "knn_folds"),
        Rung("noise classes", "noise", "leave_out"),
        Rung("three seeds", "noise_seeds", "noise"),
        Rung("noise classes, not one class", "noise", "other_joined"),
        Rung("one class of distractors", "other", "leave_out"),
        Rung("the predicted class is taken", "noise_prediction", "noise"),
        Rung("as published, eight nets", "noise_published", published="0.8252"),
    ),
    "closed_form": (
        Rung("likelihood ratios in closed form, not the MMA net", "plda", "mma"),
        Rung("the same, of faces alone", "plda_face", "mma_face"),
        Rung("a cosine net with a margin, not the MMA net", "cosine", "mma"),
        Rung("three of these nets", "cosine_seeds", "cosine"),
        Rung("joined with the closed form", "cosine_plda", "cosine_seeds"),
        Rung("the closed form, joined with three nets", "cosine_plda", "plda"),
        Rung("folds of train and val, out of fold: closed form", "plda_folds"),
        Rung("folds of train and val, out of fold: nets", "cosine_folds"),
        Rung("both joined", "cosine_plda_folds", "cosine_folds"),
        Rung("the MMA net, of 1,000 identities", "mma_standard"),
        Rung("the closed form there", "plda_standard", "mma_standard"),
        Rung("the cosine net there", "cosine_standard", "mma_standard"),
        Rung("the MMA net with vectors of unit length", "mma_unit", "mma"),
        Rung("the MMA net with a cosine classifier", "mma_head", "mma"),
    ),
    "knobs": (
        *_knob(
            "one fused face in the test", "fusion", "fusion_voting", "strangers", "blur",
            why=UNKNOWN,
        ),
        *_knob("faces filtered and fused", "fusion", "fusion_raw", "strangers", "blur", "standard"),
        *_knob(
            "learned weights of frames", "deepmef", "deepmef_mean", "strangers", "standard",
            why=UNKNOWN,
        ),
        *_knob("attention between frames", "deepmef", "deepmef_plain", "standard", why=UNKNOWN),
        *_knob("label smoothing", "mma_smoothing", "mma", "labels"),
        *_knob("a class of distractors", "fusion", "fusion_unseen", "distractors"),
        *_knob(
            "attention between modalities", "mma", "mma_concat", "missing", "false", why=UNKNOWN,
        ),
        *_knob(
            "concatenation, not average pooling", "mma_concat", "mma_pooled", "missing", "false",
        ),
        *_knob(
            "attention, the paper's net", "mma_published", "mma_published_concat", "missing",
            "false", why=UNKNOWN,
        ),
        *_knob(
            "concatenation, not average pooling, the paper's net", "mma_published_concat",
            "mma_published_pooled", "missing", "false",
        ),
        *_knob("a small scale of the Gram matrix", "mma", "mma_unscaled", "missing"),
        *_knob("missing modalities filled in", "mma_filled", "mma", "missing", why=UNKNOWN),
    ),
}  # fmt: skip
