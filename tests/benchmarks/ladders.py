"""The runs behind the tables of scores, and the comparisons that the publications made.

A rung compares two runs that differ in one thing. `scores` trains the runs and writes the tables.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

SEEDS = (0, 1, 2)
SYNTHETIC, REAL = "synthetic", "real"
SIMULATED = "synthetic clips only"
# Reasons why a row has no run on real clips.
NO_BODY, NO_SCENE, NO_STRANGERS, LARGER = (
    {REAL: reason}
    for reason in (
        "no body", "no scene", "no distractors in train", "the standard set is synthetic",
    )
)  # fmt: skip
# Configuration -> the modalities of real clips, which lack the other modalities.
THREE_MODALITIES = "face,head,audio"
ON_REAL = {"deepmef": "face", **dict.fromkeys(("mma", "plda", "cosine"), THREE_MODALITIES)}


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
        """Returns the words that train the row on `folder`, the real clips; a join has none.

        The seed is the seed of the net, and on the synthetic dataset also of the data.
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
REASONS = {
    "?": "not known",
    "one net": "with one net, synthetic clips gain: see below; of real ones not known",
    "all clips": (
        "three nets of all clips gain on real ones: see the recipe; on synthetic ones not known"
    ),
    "other data": "see the claims that need other data",
    "last": "the base ranks a clip without a face last, wherever it could stand",
    "small": "the published gain is smaller than these sets can tell",
    "body": "a body shows little: see body only",
    "five": "five nets of all features gain as much",
}
THREE = "--config.ensemble.seeds=3"
FIVE = "--config.ensemble.seeds=5"
HELD_OUT = "--config.data.train_splits=train,val --config.ensemble.folds=5"
MLPS = ("mlp1", "mlp2", "mlp3", "mlp4")  # in addition to mlp5, the shipped one
PLAIN = "average,concat"
PAPER_NETS = ("mma_published", "mma_published_concat", "mma_published_pooled")
# Knobs of the synthetic dataset: name -> (what turns it, keys of the rows that run with it).
KNOBS = {
    "strangers": (
        "wrong_clips=0.6", ("fusion", "fusion_voting", "fusion_raw", "deepmef", "deepmef_mean"),
    ),
    "blur": ("blur=2", ("fusion", "fusion_voting", "fusion_raw")),
    "labels": ("label_noise=0.2", ("mma", "mma_smoothing")),
    "distractors": ("train_distractors=0.375", ("fusion", "fusion_unseen")),
    "missing": (
        "missing_rate=0.3",
        ("mma", "mma_unscaled", "mma_filled", "mma_concat", "mma_pooled", *PAPER_NETS),
    ),
    "false": ("false_modality=0.3", ("mma", "mma_concat", "mma_pooled", *PAPER_NETS)),
    "standard": (
        "size=standard", ("fusion", "fusion_raw", "deepmef", "deepmef_mean", "deepmef_plain"),
    ),
}  # fmt: skip
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
NARROW, NARROW_MAIN = "--config.model.width=256", "--config.model.main.width=256"
FALLBACKS = {"dense_other": "head", "dense_fallback": "body", "dense_fallbacks": "body,head"}
DENSE = {
    "one_single": "one,single", "single": "single", "narrow": "", "plain": "plain", "one": "one",
    "one_fused": "one,fused",
}  # fmt: skip
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


def _options(
    key: str, config: str, options: Mapping[str, str], words: str = "", modalities: str = ""
) -> Iterator[Row]:
    """Yields a row for each option, as `KEY_OPTION`."""
    for name, overrides in options.items():
        yield Row(f"{key}_{name}", config, words, modalities, overrides)


def _rows() -> Iterator[Row]:
    """Yields the rows, except for rows with a knob."""
    # Nearest neighbours and noise classes (5th place 2018).
    yield Row("knn", "knn")
    yield Row("knn_folds", "knn", overrides=HELD_OUT)
    yield Row("leave_out", "noise_classes", "leave_out")
    yield Row("other", "noise_classes", "other")
    yield Row("other_joined", "noise_classes", "other", overrides="--config.noise.join=True")
    yield Row("noise", "noise_classes")
    options = {"prediction": "--config.noise.keep=prediction", "seeds": THREE}
    yield from _options("noise", "noise_classes", options)
    yield Row("noise_published", "noise_classes", "published")
    # Quality fusion (4th place 2019).
    yield Row("fusion", "quality_fusion")
    yield Row("fusion_raw", "quality_fusion", "raw")
    yield Row("fusion_voting", "quality_fusion", "voting")
    unseen = "--config.data.distractors=leave_out"
    yield Row("fusion_unseen", "quality_fusion", overrides=unseen, absent=NO_STRANGERS)
    yield from _options("fusion", "quality_fusion", FUSION_OPTIONS)
    yield Row("fusion_published", "quality_fusion", "published")
    steps = {"steps": "--config.batch_size=64"}
    yield from _options("fusion_published", "quality_fusion", steps, "published")
    yield Row("fusion_fold", "quality_fusion", "folds", overrides="--config.ensemble.only=0")
    yield Row("fusion_folds", "quality_fusion", "folds")
    for words in ("", ",folds"):
        for net in MLPS:
            yield Row(f"fusion_{net}{words.replace(',', '_')}", "quality_fusion", net + words)
    joined = ("fusion_folds", *(f"fusion_{net}_folds" for net in MLPS))
    yield Row("fusion_nets", joined=joined)
    # DeepMEF (3rd place 2019).
    yield Row("deepmef", "deepmef", "", "face")
    yield Row("deepmef_mean", "deepmef", "average", "face")
    yield Row("deepmef_danet", "deepmef", "danet", "face")
    yield from _options("deepmef", "deepmef", DEEPMEF_OPTIONS, "", "face")
    yield Row("deepmef_scene", "deepmef", absent=NO_SCENE)
    lacking = "--config.model.threshold_share=0"
    yield Row("deepmef_lacking", "deepmef", overrides=lacking, absent=NO_SCENE)
    yield Row("deepmef_published", "deepmef", "published")
    yield Row("deepmef_published_mean", "deepmef", "published,average")
    yield Row("deepmef_published_views", "deepmef", "published,views")
    # Residual Dense Net (2nd place 2019).
    yield Row("dense", "residual_dense", "", "face")
    for name, words in DENSE.items():
        yield Row(f"dense_{name}", "residual_dense", words, "face", NARROW)
    options = {name: f"{NARROW} {overrides}" for name, overrides in DENSE_OPTIONS.items()}
    yield from _options("dense", "residual_dense", options, "", "face")
    yield Row("dense_published", "residual_dense", "published", "face")
    yield Row("dense_both", joined=("dense_narrow", "dense_plain"))
    for key, others in FALLBACKS.items():
        absent = NO_BODY if "body" in others else {}
        yield Row(key, "residual_dense", "", f"face,{others}", NARROW_MAIN, absent=absent)
    for name in ("head", "body", "audio"):
        absent = NO_BODY if name == "body" else {}
        yield Row(f"dense_{name}", "residual_dense", "one,single", name, NARROW, absent=absent)
    # The iQIYI-VID paper.
    for first, net in MMA_NETS.items():
        for name, (words, modalities) in TABLE_3.items():
            arguments = ",".join(filter(None, (net, words)))
            absent = NO_BODY if modalities == "body" else {}
            yield Row(f"{first}_{name}", "mma", arguments, modalities, absent=absent)
    yield Row("mma_face", "mma", "", "face")
    for words in ("concat", "pooled", "average"):
        yield Row(f"mma_{words}", "mma", words)
    yield Row("mma", "mma")
    yield from _options("mma", "mma", {"seeds": THREE, **MMA_OPTIONS})
    yield Row("mma_published", "mma", "published")
    for words in ("average", "concat", "pooled"):
        yield Row(f"mma_published_{words}", "mma", f"published,{words}")
    yield Row("mma_unit_published", "mma", "published,unit")
    yield Row("mma_unit_published_concat", "mma", "published,unit,concat")
    yield from _options("mma_published", "mma", PUBLISHED_OPTIONS, "published")
    # Ours: likelihood ratios in closed form, and cosines with a margin.
    yield Row("plda", "plda")
    for name in THREE_MODALITIES.split(","):
        yield Row(f"plda_{name}", "plda", "", name)
    yield Row("plda_folds", "plda", "trainval")
    yield Row("cosine", "cosine")
    yield Row("cosine_seeds", "cosine", "ensemble")
    yield Row("cosine_folds", "cosine", "trainval")
    yield Row("cosine_plda", joined=("cosine_seeds", "plda"))
    yield Row("cosine_plda_folds", joined=("cosine_folds", "plda_folds"))
    for name in ("mma", "plda", "cosine"):
        yield Row(f"{name}_standard", name, "standard", absent=LARGER)


ROWS: dict[str, Row] = {row.key: row for row in _rows()}
for _name, (_override, _keys) in KNOBS.items():  # rows with a knob of the synthetic dataset
    for _row in (ROWS[key] for key in _keys):
        ROWS[f"{_row.key}_{_name}"] = _row._replace(
            key=f"{_row.key}_{_name}",
            overrides=f"{_row.overrides} --config.data.{_override}".strip(),
            absent={REAL: SIMULATED},
        )


def _ladder(text: str) -> tuple[Rung, ...]:
    """Returns the rungs of lines: text, key, base, published score and reason between `|`.

    With knobs after a sixth `|`, the comparison is repeated with each of the knobs.
    """
    rungs = []
    for line in filter(None, map(str.strip, text.splitlines())):
        text, key, base, published, why, knobs = (
            part.strip() for part in (line + "|" * (5 - line.count("|"))).split("|")
        )
        rung = Rung(text, key, base, published, REASONS.get(why, ""))
        rungs.append(rung)
        for knob in knobs.split():
            rungs.append(rung._replace(key=f"{key}_{knob}", base=f"{base}_{knob}"))
    return tuple(rungs)


# Ladders that also have the share of known clips missed where 1 % of the distractors pass.
OPEN_SET = ("noise_classes",)
# The paper's table 3, for the rows whose keys begin with `$`.
LADDER_3 = """
    head only | $_head_mean | | 0.5432
    audio only | $_audio_mean | | 0.1179
    body only | $_body_mean | | 0.0514
    face only: averages, no attention | $_face_mean | | 0.8519
    head | $_face_head_mean | $_face_mean | 0.8716
    audio | $_face_head_audio_mean | $_face_head_mean | 0.8769 | ?
    body | $_mean | $_face_head_audio_mean | 0.8780 | body
    three nets on @ of the clips | $_mean_nets | $_mean | 0.8924 | #
    NetVLAD instead of averages | $_netvlad_nets | $_mean_nets | 0.8946 | ?
    attention between modalities | $_nets | $_netvlad_nets | 0.8970 | ?
"""


def _table_3(first: str, share: str, why: str, more: str) -> tuple[Rung, ...]:
    """Returns the paper's table 3 of the rows whose keys begin with `first`, and more rungs."""
    lines = LADDER_3.replace("$", first).replace("@", share).replace("#", why)
    return tuple(
        rung._replace(absent=NO_BODY) if rung.text == "body" else rung
        for rung in _ladder(lines + more)
    )


LADDERS: Mapping[str, tuple[Rung, ...]] = {
    "residual_dense": _ladder("""
        one net, single frames | dense_one_single | | 0.875
        three quality subsets | dense_single | dense_one_single | 0.889
        frames merged in training and test | dense_narrow | dense_single | 0.9019 | one net
        joined with a net without shortcuts | dense_both | dense_narrow | 0.9035 | small
        frames merged, with one net | dense_one | dense_one_single
        three quality subsets, with merged frames | dense_narrow | dense_one
        shortcuts | dense_narrow | dense_plain | better
        the test by one mean frame | dense_one_fused | dense_one
        the body where a clip has no face | dense_fallback | dense_narrow | | last
        the head in addition to this body | dense_fallbacks | dense_fallback | no use
        the head where a clip has no face | dense_other | dense_narrow | | last
        1024 units instead of 256 | dense | dense_narrow
        sigmoid gates after the layers | dense_gates | dense_narrow
        label smoothing of 0.1 | dense_smoothing | dense_narrow
        mixup of clips, alpha 0.2 | dense_mixup | dense_narrow
        face only, one net, single frames | dense_one_single | | top1 0.81 to 0.88
        head only, one net, single frames | dense_head | | top1 0.60
        body only, one net, single frames | dense_body | | top1 0.35
        audio only, one net, single frames | dense_audio | | top1 0.25
        as published, all frames and merged ones | dense_published
    """),
    "quality_fusion": _ladder("""
        every face scored by itself | fusion_voting
        one fused face in the test | fusion | fusion_voting | +0.01 | ?
        faces filtered and fused in training | fusion | fusion_raw | +0.02 | other data
        faces fused, where they are filtered | fusion | fusion_filtered
        faces filtered, where they are fused | fusion | fusion_fused
        focal and softmax loss, not only softmax | fusion_mixed | fusion_softmax
        focal and softmax loss, not only focal | fusion_mixed | fusion_focal
        stages of this mixture | fusion | fusion_mixed
        warm-up of the learning rate | fusion | fusion_unwarmed
        cosine annealing | fusion | fusion_constant
        as published, one net | fusion_published
        batches of 64 clips, not 512: more steps | fusion_published_steps | fusion_published
        one net on four fifths of the clips | fusion_fold | | 0.8811
        five of these nets | fusion_folds | fusion_fold | 0.8955
        five kinds of nets (theirs: partially completed) | fusion_nets | fusion_folds \
            | 0.8983 | small
        mlp1 instead of mlp5 | fusion_mlp1 | fusion
        mlp2 instead of mlp5 | fusion_mlp2 | fusion
        mlp3 instead of mlp5 | fusion_mlp3 | fusion
        mlp4 instead of mlp5 | fusion_mlp4 | fusion
    """),
    "mma": _table_3("mma", "nine tenths", "all clips", """
        attention, in one net | mma | mma_concat | | ?
        concatenation, not average pooling, in one net | mma_concat | mma_pooled
        NetVLAD, in one net with attention | mma | mma_average | | ?
    """),
    "mma_published": _table_3("mma_published", "two thirds", "?", """
        one of the paper's nets | mma_published
        NetVLAD, in one net | mma_published | mma_published_average | | ?
        NetVLAD with BatchNorm | mma_published | mma_published_slow | faster | ?
        NetVLAD without L2 norms | mma_published | mma_published_l2 | better | ?
        attention, in one net | mma_published | mma_published_concat | | ?
        concatenation, not average pooling | mma_published_concat | mma_published_pooled
        missing modalities filled by attention | mma_published | mma_published_masked | | ?
        one Gram matrix, not two projections | mma_published | mma_published_two | better | ?
    """),
    "mma_unit_published": _table_3("mma_unit_published", "two thirds", "?", """
        features of unit length, in one net | mma_unit_published | mma_published
        attention, in one net | mma_unit_published | mma_unit_published_concat | | ?
    """),
    "options": _ladder("""
        label smoothing of 0.1 | mma_smoothing | mma
        mixup of clips, alpha 0.2 | mma_mixup | mma
        sigmoid gates | mma_gates | mma
        bfloat16 | mma_bfloat16 | mma
        modality dropout | mma | mma_kept
        LayerNorm after each map | mma | mma_lengths
        weight decay | mma | mma_undecayed
        a small scale of the Gram matrix | mma | mma_unscaled
        ten times the attention | mma_strong | mma
    """),
    "recipe": _ladder("""
        one net, trained on train | mma
        three nets | mma_seeds | mma
        five nets | mma_five | mma_seeds
        five nets on folds of train and val, out of fold | mma_folds
        two nets per fold | mma_folds_twice | mma_folds
    """),
    "deepmef": _ladder("""
        face only | deepmef
        learned weights of frames, not quality | deepmef | deepmef_mean | better | ?
        attention between frames | deepmef | deepmef_plain | | ?
        attention as in DANet, not ours | deepmef_danet | deepmef | | ?
        five nets | deepmef_seeds | deepmef
        each lacks other features | deepmef_views | deepmef_seeds | better | five
        each lacks other clips of every identity | deepmef_bags | deepmef_seeds
        each lacks other clips, and so some identities | deepmef_bags_lost | deepmef_seeds | worse
        identities lost, not kept | deepmef_bags_lost | deepmef_bags | worse
        the scene | deepmef_scene | deepmef
        the scene for poor faces, too | deepmef_scene | deepmef_lacking
        as published, one net | deepmef_published
        learned weights of frames, as published | deepmef_published \
            | deepmef_published_mean | better | ?
        as published, eleven nets | deepmef_published_views | | 0.8986
    """),
    "noise_classes": _ladder("""
        nearest neighbours | knn_folds
        a net | leave_out | knn_folds
        noise classes | noise | leave_out
        three seeds | noise_seeds | noise
        noise classes, not one class | noise | other_joined
        one class of distractors | other | leave_out
        the predicted class is taken | noise_prediction | noise
        as published, eight nets | noise_published | | 0.8252
    """),
    "closed_form": _ladder("""
        likelihood ratios in closed form, not the MMA net | plda | mma
        the same, of faces only | plda_face | mma_face
        a cosine net with a margin, not the MMA net | cosine | mma
        three of these nets | cosine_seeds | cosine
        joined with the closed form | cosine_plda | cosine_seeds
        the closed form, joined with three nets | cosine_plda | plda
        folds of train and val, out of fold: closed form | plda_folds
        folds of train and val, out of fold: nets | cosine_folds
        both joined | cosine_plda_folds | cosine_folds
        the MMA net, of 1,000 identities | mma_standard
        the closed form there | plda_standard | mma_standard
        the cosine net there | cosine_standard | mma_standard
        the MMA net with vectors of unit length | mma_unit | mma
        the MMA net with a cosine classifier | mma_head | mma
    """),
    "knobs": _ladder("""
        one fused face in the test | fusion | fusion_voting | | ? | strangers blur
        faces filtered and fused | fusion | fusion_raw | | | strangers blur standard
        learned weights of frames | deepmef | deepmef_mean | | ? | strangers standard
        attention between frames | deepmef | deepmef_plain | | ? | standard
        label smoothing | mma_smoothing | mma | | | labels
        a class of distractors | fusion | fusion_unseen | | | distractors
        attention between modalities | mma | mma_concat | | ? | missing false
        concatenation, not average pooling | mma_concat | mma_pooled | | | missing false
        attention, the paper's net | mma_published | mma_published_concat | | ? | missing false
        concatenation, not average pooling, the paper's net | mma_published_concat \
            | mma_published_pooled | | | missing false
        a small scale of the Gram matrix | mma | mma_unscaled | | | missing
        missing modalities filled in | mma_filled | mma | | ? | missing
    """),
}  # fmt: skip
