"""Defines and checks all fields of a configuration.

A row of `TABLE` contains the default value, the meaning and the range of a field. Some fields have
an effect only if another field has a certain value (`Field.read_when`). For example,
`optim.momentum` has an effect only if `optim.name` is `sgd`. If a field without effect differs from
its default, no training starts, because the user expects an effect.
"""

import enum
import json
import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from vidjax.data.synthetic import LARGEST
from vidjax.utils import files
from vidjax.utils.errors import UserError, closest, prefix_errors
from vidjax.utils.files import INTEGER_LIMIT

MAX_MEMBERS = 10_000  # of an ensemble; `metrics.json` can list as many
Values = Mapping[str, Any]  # dotted name -> value, of every field of `default()`


class ReadWhen(NamedTuple):
    """The condition under which a field, such as `optim.momentum`, has an effect."""

    field: str  # the name of the other field whose value decides, such as `optim.name`
    condition: Callable[[Values], bool]  # values of all fields -> True if the field has an effect
    remedy: str  # the flags with which the field has an effect, such as `--config.optim.name=sgd`


class Affects(enum.Flag):
    """The results of a run that change with a field of the configuration.

    If the value is `NOTHING`, all results stay equal, except for rounding.
    """

    NOTHING = 0
    TRAINING = enum.auto()  # what every model learns
    STEPS = enum.auto()  # the steps of an optimiser, which a model in closed form does not have
    SCORES = enum.auto()  # the scores of an evaluation
    CHECKPOINT = enum.auto()  # the checkpoint that `vidjax evaluate` scores; training ignores it
    LOGS = enum.auto()  # what training logs, evaluates and saves before its end
    ROUNDING = enum.auto()  # the memory that training needs; what it learns changes by rounding
    MODEL = TRAINING | STEPS  # the weights


NOTHING, TRAINING, STEPS, SCORES, CHECKPOINT, LOGS, ROUNDING = (
    Affects.NOTHING, Affects.TRAINING, Affects.STEPS, Affects.SCORES, Affects.CHECKPOINT,
    Affects.LOGS, Affects.ROUNDING,
)  # fmt: skip


class Field(NamedTuple):
    """A field of the configuration.

    Attributes:
      name: the dotted name.
      default: the default value. Its type is the type of the field. If it is None, the field is a
        text.
      doc: the meaning, as `configs/README.md` shows it.
      low, high, above, below: the range: low <= value <= high, above < value < below. None
        means no limit. Infinity is accepted only if `high` is infinity.
      choices: the accepted values. If `choices` is empty, every value in the range is accepted.
      read_when: the condition under which the field has an effect. None means always.
      affects: what depends on the value. For a path, what depends on the content of the files.
      path: True for a file or a folder. When a run resumes, the path may differ, because only the
        content is compared.
    """

    name: str
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    read_when: ReadWhen | None = None
    affects: Affects = TRAINING
    path: bool = False


class Group(NamedTuple):
    """A group of fields whose names begin with `name` and a dot."""

    name: str
    doc: str


def _focal_weights(values: Values) -> tuple[float, ...]:
    """Returns all weights that the field `loss.schedule` gives to the loss `loss.focal`.

    `values` is dotted name -> value of all fields. The schedule has pairs (epoch, weight).
    """
    try:
        return tuple(float(weight) for _, weight in values["loss.schedule"])
    except (TypeError, ValueError):  # another function reports the malformed schedule
        return (0.5,)


def _logit_losses(values: Values) -> set[str]:
    """Returns the names of the losses, such as `softmax`, that have a weight above 0 at some epoch.

    `values` is dotted name -> value of all fields.
    """
    weights = _focal_weights(values)
    focal = {values["loss.focal"]} if any(weights) else set()
    rest = {values["loss.classification"]} if any(weight != 1 for weight in weights) else set()
    return focal | rest


# The conditions of `Field.read_when`: another field has, or does not have, a value. `example` is a
# value of the other field for the remedy.
def _read_if(field: str, value: Any) -> ReadWhen:
    return ReadWhen(field, lambda values: values[field] == value, f"--config.{field}={value}")


def _read_unless(field: str, value: Any, example: Any) -> ReadWhen:
    return ReadWhen(field, lambda values: values[field] != value, f"--config.{field}={example}")


def _read_by_schedule(condition: Callable[[Values], bool], focal_weight: int) -> ReadWhen:
    remedy = f"'--config.loss.schedule=((0,{focal_weight}),)'"
    return ReadWhen("loss.schedule", condition, remedy)


SYNTHETIC, OWN_FEATURES = _read_if("data.name", "synthetic"), _read_if("data.name", "arrays")
FOLDER = _read_unless(
    "data.name", "synthetic", "arrays, or --config.data.name=iqiyi_vid for iQIYI-VID"
)
NOISE_CLASSES = _read_if("data.distractors", "noise")
CLASSIFICATION = _read_by_schedule(lambda values: any(w != 1 for w in _focal_weights(values)), 0)
FOCAL = _read_by_schedule(lambda values: any(_focal_weights(values)), 1)
# Losses that a user has added may read `loss.gamma` and `loss.label_smoothing`.
GAMMA = _read_by_schedule(lambda values: bool(_logit_losses(values) - {"softmax"}), 1)
SMOOTHING = _read_by_schedule(
    lambda values: bool(_logit_losses(values) - {"binary", "multiclass", "batch"}), 0
)
RELABELLED = _read_unless("noise.relabel_every_epochs", 0, 1)
STAIRCASE = _read_if("optim.decay", "steps")
DECAYED = ReadWhen(
    "optim.weight_decay",
    lambda values: bool(values["optim.weight_decay"] or values["optim.total_decay"]),
    "--config.optim.weight_decay=1e-5 or --config.optim.total_decay=1",
)
JOINED = ReadWhen(
    "join.runs",
    lambda values: bool(values["join.runs"] or values["join.systems"]),
    "vidjax evaluate --workdir=FOLDER --runs=A,B",
)

# A row of two or three lines is easier to read than a line for each argument.
# fmt: off
TABLE: tuple[Field | Group, ...] = (
    Field("seed", 0, "seed of parameters, random draws and the order of clips, 0 to 2**31 - 1",
          low=0, high=2**31 - 1),
    Field("init_from", "", "folder of a run whose weights training starts with, where they fit; "
          "classes are matched by the name of the identity; empty: random weights", affects=STEPS,
          path=True),
    Field("batch_size", 128, "clips per training step, over all devices", low=1, high=2**20),
    Field("num_epochs", 1.0, "passes over the training clips; a fraction is allowed. It may be "
          "larger when a run resumes", above=0, high=1e6),
    Field("modalities", ("face",), "modalities to use, in order, e.g. `face,head`",
          affects=TRAINING | SCORES),
    Field("dtype", "float32", "dtype of the computation: `float32`, `bfloat16`, or `float64` with "
          "`JAX_ENABLE_X64=1`. Parameters are at least float32.",
          choices=("float32", "bfloat16", "float64"), affects=STEPS | SCORES),
    Field("matmul_precision", "highest", "precision of matrix products in evaluation, on every "
          "backend: `highest` (float32) or another value of `jax.default_matmul_precision`. "
          "Training on a GPU uses TF32, or float32 with `JAX_DEFAULT_MATMUL_PRECISION=highest`",
          affects=SCORES),
    Field("deterministic", False, "`True`: repeated runs on a GPU give the same bits, but are "
          "slower; repeated runs on a CPU always give the same bits", affects=NOTHING),
    Field("after_fusion", "pool", "`pool`: the model takes all fused frames of a clip; `examples`: "
          "the model takes one fused frame at a time, and evaluation combines the scores of the "
          "frames as `eval.reduce` says", choices=("pool", "examples"), affects=STEPS | SCORES),
    Field("transforms", (), "additional transforms of a training batch, in order: names, or dicts "
          "of `name` and the arguments of a transform of `vidjax/core/augment.py`; empty: none",
          affects=STEPS),
    Field("mixup", 0.0, "alpha of the Beta distribution of the weights of two mixed clips; 0: no "
          "mixup", low=0, high=1e6, affects=STEPS),
    Field("log_every_steps", 20, "training steps between two lines of `metrics.jsonl`; steps 1, 2, "
          "5, 10 and the last step have a line, too", low=1, high=2**31 - 1, affects=LOGS),
    Field("profile", (), "first and last step of a trace by `jax.profiler`, e.g. `20,30`; it is "
          "written to the folder `profile` of the run; empty: no trace", affects=LOGS),
    Field("checkpoint_every_seconds", 300.0, "seconds between two checkpoints; every evaluation "
          "saves a checkpoint, too", low=0, high=math.inf, affects=LOGS),

    Group("data", "the clips, and how training reads them"),
    Field("data.name", "synthetic", "dataset: generated clips (`synthetic`), the files of "
          "iQIYI-VID (`iqiyi_vid`) or your own features (`arrays`)", affects=TRAINING | SCORES),
    Field("data.dir", None, "folder of iQIYI-VID files, or of your features", read_when=FOLDER,
          affects=TRAINING | SCORES, path=True),
    Field("data.cache_dir", None, "folder of the stored clips and of compiled programs; "
          "unset: `$VIDJAX_CACHE`, or `~/.cache/vidjax` without it", affects=NOTHING, path=True),
    Field("data.size", "small", "size of the synthetic dataset: `small` (100 identities) or "
          "`standard` (1,000)", choices=("small", "standard"), read_when=SYNTHETIC,
          affects=TRAINING | SCORES),
    Field("data.seed", 0, "seed of the synthetic dataset: another seed gives other clips", low=0,
          read_when=SYNTHETIC, affects=TRAINING | SCORES),
    Field("data.wrong_clips", 0.15, "share of synthetic clips in which a third of the frames shows "
          "another person", low=0, high=LARGEST.wrong_clips, read_when=SYNTHETIC,
          affects=TRAINING | SCORES),
    Field("data.blur", 1.0, "how strongly blur depends on the quality of synthetic frames, 0 to 4; "
          "0: all frames are blurred alike", low=0, high=LARGEST.blur, read_when=SYNTHETIC,
          affects=TRAINING | SCORES),
    Field("data.label_noise", 0.0, "share of labelled synthetic train clips with the label of "
          "another person", low=0, high=LARGEST.label_noise, read_when=SYNTHETIC,
          affects=TRAINING | SCORES),
    Field("data.train_distractors", 0.0, "share of synthetic train clips that show a stranger, 0 "
          "to 0.9; in val it is 0.375", low=0, high=LARGEST.train_distractors,
          read_when=SYNTHETIC, affects=TRAINING | SCORES),
    Field("data.missing_rate", 0.0, "share of synthetic clips without a face; head, body and audio "
          "are each missing in the same share of clips. In addition, each of these four modalities "
          "is always missing in 0.02 to 0.15 of the clips", low=0, high=LARGEST.missing_rate,
          read_when=SYNTHETIC, affects=TRAINING | SCORES),
    Field("data.false_modality", 0.0, "share of synthetic clips whose face or voice belongs to "
          "another person in all frames", low=0, high=LARGEST.false_modality, read_when=SYNTHETIC,
          affects=TRAINING | SCORES),
    Field("data.train_splits", ("train",), "splits to train on, e.g. `train,val`"),
    Field("data.quality", "given", "quality of a frame of your own features: `given`: the value in "
          "the file or, without a value, the L2 norm of the feature; `norm`: always the L2 norm",
          choices=("given", "norm"), read_when=OWN_FEATURES, affects=TRAINING | SCORES),
    Field("data.mode", "auto", "`resident`: all clips stay in device memory; `streaming`: batches "
          "are copied to the devices, in the same order; `auto`: resident if the clips take at "
          "most half of the memory that a training step leaves. On a GPU or TPU, the rest of the "
          "memory determines how many members of an ensemble train together",
          choices=("auto", "resident", "streaming"), affects=ROUNDING),
    Field("data.max_frames", 64, "maximum number of frames of a clip in training", low=1,
          high=2**20),
    Field("data.crop", "window", "frames of a clip longer than `data.max_frames` in training: a "
          "random `window`, or the frames of the best `quality`", choices=("window", "quality")),
    Field("data.whole_epochs", False, "`True`: an epoch has only the clips that a member learns "
          "from, and its last batch is short; `False`: an epoch has all clips, and a batch may "
          "span two epochs"),
    Field("data.distractors", "other", "training clips without an identity: `other` (class column "
          "0), `leave_out`, or `noise` (separate classes, see the group `noise`)",
          choices=("other", "leave_out", "noise")),
    Field("data.weights", None, "file of loss weights, `NAME.mp4 WEIGHT` on each line; a clip that "
          "is not named has weight 1", path=True),
    Field("data.balance", 0.0, "class balancing: a clip of a class of n clips has the loss weight "
          "n ** -balance, divided by the mean weight; from -10 to 10; 0: equal weights",
          low=-10, high=10, affects=STEPS),

    Group("ensemble", "the members of an ensemble: all combinations of folds, bootstrap "
          "samples, views, qualities and seeds"),
    Field("ensemble.folds", 0, "number of stratified folds, 2 or more; each member leaves out a "
          "fold; 0: no folds", low=0, high=MAX_MEMBERS),
    Field("ensemble.bootstraps", 0, "number of bootstrap samples of the training clips, each for "
          "a member; 0: none", low=0, high=MAX_MEMBERS, affects=STEPS),
    Field("ensemble.resample", "identity", "how a bootstrap sample is drawn: from the clips of "
          "each `identity` separately, or from `all` clips together. With `all`, an identity of "
          "few clips may get none. With `ensemble.bootstraps`", choices=("identity", "all"),
          read_when=_read_unless("ensemble.bootstraps", 0, 11)),
    Field("ensemble.views", 0, "number of members that each leave out a different chunk of the "
          "features; 0: none", low=0),
    Field("ensemble.chunks", 16, "number of equal chunks that a feature vector is cut into for "
          "`ensemble.views`, 2 or more", low=2, read_when=_read_unless("ensemble.views", 0, 2)),
    Field("ensemble.min_quality", (), "minimum quality of a member's training frames, a value per "
          "member, e.g. `0,20,40`"),
    Field("ensemble.poor_clips", "keep", "clips whose frames are all below "
          "`ensemble.min_quality`: `keep` trains on all their frames, `drop` leaves them out",
          choices=("keep", "drop"), read_when=_read_unless("ensemble.min_quality", (), "0,20,40")),
    Field("ensemble.seeds", 1, "number of members that differ only in their random draws", low=1,
          high=MAX_MEMBERS, affects=STEPS),
    Field("ensemble.only", (), "numbers of the members to train here, from 0, e.g. `0,2`; empty: "
          "all"),

    Group("noise", "noise classes: clusters of distractors, and a mirror class of every identity "
          "for distractors in no cluster. With `data.distractors=noise`"),
    Field("noise.eps", 0.9, "largest Euclidean distance between the unit vectors of two "
          "neighbours in DBSCAN, above 0 to 2", above=0, high=2, read_when=NOISE_CLASSES),
    Field("noise.min_samples", 2, "DBSCAN: lowest number of vectors within `noise.eps` of a "
          "vector, including this vector, that form a cluster", low=1, read_when=NOISE_CLASSES),
    Field("noise.modality", "face", "modality whose mean frames are clustered",
          read_when=NOISE_CLASSES),
    Field("noise.relabel_every_epochs", 1.0, "epochs after which the distractors in no cluster get "
          "new labels; 0: never", low=0, high=1e6, read_when=NOISE_CLASSES),
    Field("noise.keep", "label", "new class of a distractor in no cluster, if the model predicts "
          "no identity: the present `label`, or the `prediction` (a cluster or a mirror class)",
          choices=("label", "prediction"), read_when=RELABELLED),
    Field("noise.mirror_weight", ((0.0, 1.0),), "loss weight of distractors in mirror classes, 0 "
          "or more: pairs (epoch, weight), linear between them", read_when=NOISE_CLASSES,
          affects=STEPS),
    Field("noise.relabel_by", "evaluate", "entry of the group `fusion` with which a model predicts "
          "the new labels: `evaluate`, or `train` if this fusion is not random",
          choices=("evaluate", "train"), read_when=RELABELLED),
    Field("noise.join", False, "`True`: in training, short distractor clips are joined and long "
          "distractor clips are cut. With `data.distractors` `noise` or `other`",
          read_when=_read_unless("data.distractors", "leave_out", "noise"), affects=STEPS),
    Field("noise.pieces", "equal", "pieces of a long distractor clip: `equal`, of 50 frames, or "
          "of `random` length. With `noise.join`", choices=("equal", "random"),
          read_when=_read_unless("noise.join", False, True)),

    Group("eval", "evaluation and ranking"),
    Field("eval.split", "val", "split to evaluate; it may be among `data.train_splits` only with "
          "folds or bootstrap samples", affects=SCORES),
    Field("eval.splits", (), "labelled splits to evaluate, too, e.g. `train,test`; only "
          "`eval.split` chooses the best step; the MAP of training clips is `in_sample`; empty: "
          "none", affects=NOTHING),
    Field("eval.every_epochs", 0.0, "epochs between two evaluations; 0: only after training, "
          "or 1 with `early_stop.patience`", low=0, high=1e6, affects=LOGS),
    Field("eval.block_size", 256, "clips that a device scores at a time", low=1, high=2**20,
          affects=NOTHING),
    Field("eval.scores", "log_softmax", "scores that clips are ranked by", affects=SCORES),
    Field("eval.temperature", 1.0, "divisor of the logits, above 0; it changes the mean over "
          "members, and the order of clips that are ranked by probability", above=0,
          affects=SCORES),
    Field("eval.top_classes", 0, "number of highest scores that a clip keeps; the clip comes last "
          "in the lists of all other identities; 0: all scores", low=0, affects=SCORES),
    Field("eval.reduce", "mean", "`mean` or `max` of the scores of a clip's examples. With "
          "`after_fusion=examples`", choices=("mean", "max"),
          read_when=_read_if("after_fusion", "examples"), affects=SCORES),
    Field("eval.members", True, "`True`: every member of an ensemble also ranks separately, and "
          "`metrics.json` has the MAP of each member", affects=NOTHING),
    Field("eval.report", True, "`True`: write `analysis.npz` and `report.html` at the end",
          affects=NOTHING),
    Field("eval.keep_scores", False, "`True`: keep the scores of all clips in `scores.npy`, an "
          "array [clips, identities]; `scores.json` has the names", affects=NOTHING),
    Field("eval.checkpoint", "latest", "checkpoint that `vidjax evaluate` restores: `latest`, or "
          "`best` by MAP", choices=("latest", "best"), affects=CHECKPOINT),

    Group("model", "the network: `name` and the arguments of a model of "
          "`vidjax/models/build_system.py`"),

    Group("fusion", "two entries per modality, `train` and `evaluate`: `name` and the arguments of "
          "a fusion of `vidjax/core/fusion.py`. A modality without an entry keeps all its frames"),

    Group("loss", "the loss of the logits"),
    Field("loss.classification", "softmax", "first loss of the logits; its weight is 1 minus the "
          "weight of `loss.focal`, see `loss.schedule`", read_when=CLASSIFICATION, affects=STEPS),
    Field("loss.focal", "binary", "second loss of the logits, weighted by `loss.schedule`: "
          "`binary`: the focal loss of each class against the rest, summed over classes; "
          "`multiclass`: the focal loss of the softmax; `batch`: the same, but the focal factor is "
          "computed from the mean loss of the batch", read_when=FOCAL, affects=STEPS),
    Field("loss.mean_over", "weights", "the loss of a batch is the sum over its clips, divided by "
          "the sum of their `weights` or the number of `clips`; `branches`: like `weights`, but "
          "each branch of a model divides by the weights of only the clips that it learns from",
          choices=("weights", "clips", "branches"), affects=STEPS),
    Field("loss.gamma", 2.0, "focusing exponent of the focal loss, 0 or more; 0: cross-entropy",
          low=0, read_when=GAMMA, affects=STEPS),
    Field("loss.schedule", ((0.0, 0.0),), "weight of the loss `loss.focal`, 0 to 1: pairs (epoch, "
          "weight), linear between them", affects=STEPS),
    Field("loss.margin", 0.0, "margin of a cosine classifier in training, 0 to pi/2, in radians "
          "for `angular`; 0: none", low=0, high=math.pi / 2, affects=STEPS),
    Field("loss.margin_type", "angular", "kind of margin; a loss with an argument `margin` ignores "
          "the kind. With `loss.margin` above 0", read_when=_read_unless("loss.margin", 0, 0.5),
          affects=STEPS),
    Field("loss.label_smoothing", 0.0, "share of the target, from 0 to below 1, that the softmax "
          "cross-entropy spreads over all classes", low=0, below=1, read_when=SMOOTHING,
          affects=STEPS),

    Group("optim", "the optimizer and its schedule"),
    Field("optim.name", "adam", "the optimizer", affects=STEPS),
    Field("optim.learning_rate", 1e-3, "peak learning rate", low=0, affects=STEPS),
    Field("optim.warmup", 0.1, "share of all training steps, 0 to 1, in which the learning rate "
          "rises to its peak", low=0, high=1, affects=STEPS),
    Field("optim.warmup_scale", 0.0, "learning rate at the start of the warm-up, relative to the "
          "peak, 0 to 1; 0: the peak divided by the number of warm-up steps", low=0, high=1,
          read_when=_read_unless("optim.warmup", 0, 0.1), affects=STEPS),
    Field("optim.decay", "cosine", "schedule of the learning rate after the warm-up",
          affects=STEPS),
    Field("optim.final_scale", 0.01, "learning rate at the end, relative to the peak, 0 to 1. "
          "With `optim.decay=cosine`", low=0, high=1, read_when=_read_if("optim.decay", "cosine"),
          affects=STEPS),
    Field("optim.decay_factor", 0.7, "factor of the learning rate at every decay. "
          "With `optim.decay=steps`", above=0, read_when=STAIRCASE, affects=STEPS),
    Field("optim.decay_every_epochs", 1.0, "epochs between two decays; a fraction is "
          "allowed. With `optim.decay=steps`", low=0.001, read_when=STAIRCASE, affects=STEPS),
    Field("optim.points", ((0.0, 1.0),), "factors of the learning rate, 0 or more: pairs (epoch, "
          "factor), linear between them. With `optim.decay=piecewise`",
          read_when=_read_if("optim.decay", "piecewise"), affects=STEPS),
    Field("optim.weight_decay", 0.0, "L2 penalty: this share of every weight matrix is added to "
          "its gradient", low=0, affects=STEPS),
    Field("optim.total_decay", 0.0, "decoupled weight decay over the whole run: without gradients "
          "a weight matrix would shrink to about exp(-total_decay) of its size, if the run has "
          "many more steps than `optim.total_decay`", low=0, affects=STEPS),
    Field("optim.decay_all", False, "`True`: `optim.weight_decay` and `optim.total_decay` act on "
          "all parameters; `False`: only on weight matrices", read_when=DECAYED, affects=STEPS),
    Field("optim.momentum", 0.9, "momentum, 0 to 1. With `optim.name=sgd`", low=0, high=1,
          read_when=_read_if("optim.name", "sgd"), affects=STEPS),
    Field("optim.restart_epoch", 0.0, "epoch at which the moments (or the running sum of "
          "gradients) of the optimizer are reset to 0; 0: never", low=0, high=1e6, affects=STEPS),
    Field("optim.clip_norm", 0.0, "maximum global norm of the gradients; 0: no clipping", low=0,
          affects=STEPS),
    Field("optim.accumulate", 1, "number of steps whose gradients are averaged for an update of "
          "the parameters; it saves memory, compared with a larger `batch_size`", low=1, high=2**20,
          affects=STEPS),
    Field("optim.freeze", "", "regular expression: parameters with a name in which it is found "
          "stay unchanged, e.g. `^face_netvlad`; empty: none", affects=STEPS),

    Group("early_stop", "the end of a training that no longer improves"),
    Field("early_stop.patience", 0, "training ends after this number of evaluations, one after the "
          "other, without a better value of `early_stop.metric`; 0: never", low=0, high=2**31 - 1,
          affects=STEPS),
    Field("early_stop.metric", "map", "`map`, or a name in the table *metric* below, "
          "on `eval.split`. With `early_stop.patience`",
          read_when=_read_unless("early_stop.patience", 0, 3), affects=STEPS),

    Group("join", "a blend of several runs, by `vidjax evaluate --runs=A,B`"),
    Field("join.runs", (), "folders of the runs; set by `--runs`", affects=SCORES),
    Field("join.weights", (), "weight of each run, 0 or more, e.g. `2,1`; empty: equal weights. "
          "Without `join.learned`", read_when=_read_if("join.learned", False), affects=SCORES),
    Field("join.systems", (), "configurations, `FILE:ARGS`, that `vidjax train` trains and joins. "
          "Each is trained in folds of `data.train_splits`, to measure and learn the blend, and on "
          "all of these clips, to rank test"),
    Field("join.learned", False, "`True`: the scores of the runs are joined with numbers that are "
          "learned on clips that no run was trained on, not by `join.weights`",
          read_when=JOINED, affects=SCORES),
    Field("join.diffusion", False, "`True`: the order of a ranking also depends on similar clips "
          "of the split. With `join.learned`",
          read_when=_read_unless("join.learned", False, True), affects=SCORES),
)
# fmt: on
FIELDS = {row.name: row for row in TABLE if isinstance(row, Field)}
DEFAULTS: Values = {name: field.default for name, field in FIELDS.items()}
PATHS = tuple(name for name, field in FIELDS.items() if field.path)
# These fields do not distinguish runs, so they are not part of the name of a folder.
UNNAMED = tuple(x.name for x in FIELDS.values() if not x.affects & (Affects.MODEL | SCORES))
MAY_CHANGE = (*UNNAMED, *PATHS)  # when a run resumes, because the results stay the same
# The fields of these groups depend on the chosen model or fusion.
SPECIFICATIONS = ("model.", "fusion.")
# The fields that the evaluation of a blend reads. For all other fields, each run keeps its values.
BLEND_FIELDS = (
    "eval.split", "eval.splits", "eval.block_size", "eval.report", "eval.keep_scores",
    "data.dir", "data.cache_dir", "join.weights", "join.learned", "join.diffusion",
)  # fmt: skip
# Names that Lightning, the Trainer of Hugging Face and scikit-learn have for a field.
OTHER_NAMES = {
    "dtype": "precision bf16",
    "eval.every_epochs": "eval_steps",
    "num_epochs": "max_steps",
    "optim.accumulate": "accumulate_grad_batches gradient_accumulation_steps",
    "optim.clip_norm": "gradient_clip_val max_grad_norm",
    "optim.decay": "lr_scheduler lr_scheduler_type scheduler",
    "optim.learning_rate": "lr",
    "optim.name": "optimizer",
    "optim.warmup": "warmup_ratio warmup_steps",
    "seed": "random_state",
}
# With these fields of `ensemble`, a member is not trained on some clips, so that it can score them.
HOLD_OUT_FIELDS = ("folds", "bootstraps")


class Config(ConfigDict):
    """A ConfigDict whose fields have the type Any for type checkers. `repr` shows all values."""

    __repr__ = ConfigDict.__str__

    def __setitem__(self, key: str, value: object) -> None:
        # A dict would become a Config, and a ConfigDict cannot replace a Config.
        super().__setitem__(key, ConfigDict(value) if isinstance(value, dict) else value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            # `copy` and `pickle` look for methods in objects that are not complete.
            hint = "" if name.startswith("_") else suggest_field(name, dict(fields(self)))
            raise AttributeError(f"there is no field config.{name}: {hint}") from error

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Any: ...


def default() -> Config:
    """Returns a configuration in which every field has the default value."""
    config = Config()
    for row in TABLE:
        group, _, leaf = row.name.rpartition(".")
        value = ConfigDict() if isinstance(row, Group) else row.default
        parent = config[group] if group else config
        parent[leaf] = config_dict.placeholder(str) if value is None else value
    return config


def is_blend(config: Config) -> bool:
    """Returns True for the configuration of a blend, which joins the scores of several runs."""
    return bool(config.join.runs or config.join.systems)


def list_splits(config: Config) -> tuple[str, ...]:
    """Returns the names of the splits to evaluate: `eval.split`, then the rest of `eval.splits`."""
    return tuple(dict.fromkeys((config.eval.split, *config.eval.splits)))


def fields(config: Config | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of every field, such as ("optim.name", "adam"). Lists become tuples."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", leaf) for name, leaf in fields(value))
        else:
            yield key, to_tuples(value)


def to_tuples(value: Any) -> Any:
    """Returns a value with tuples instead of lists, also inside of dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: to_tuples(item) for key, item in value.items()}
    return tuple(map(to_tuples, value)) if isinstance(value, list | tuple) else value


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the differences of two configurations, dotted name -> (old value, new value).

    A field is left out if it has an effect neither with `old` nor with `new`, see `is_read`.
    """
    before, after = dict(fields(old)), dict(fields(new))
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and (is_read(name, before) or is_read(name, after))
    }


def is_read(name: str, values: Values) -> bool:
    """Returns True if the field `name` has an effect, given dotted name -> value of all fields.

    For example, `optim.momentum` has an effect only if `optim.name` is `sgd`.
    """
    field = FIELDS.get(name)
    when = field.read_when if field else None
    return not when or (when.condition(values) and is_read(when.field, values))


def affects(name: str) -> Affects:
    """Returns what a change of the configuration field `name` affects, such as TRAINING."""
    if name in FIELDS:
        return FIELDS[name].affects
    return TRAINING if re.match(r"fusion\.[^.]+\.train\b", name) else TRAINING | SCORES


def changes_scores(name: str) -> bool:
    """Returns True if a new value of `config.<name>` may change the scores of a trained run."""
    return name not in PATHS and bool(affects(name) & (SCORES | CHECKPOINT))


def is_of_training(name: str) -> bool:
    """Returns True if a field changes only training. Evaluation ignores such a field."""
    changed = affects(name)
    return changed != NOTHING and not changed & (SCORES | CHECKPOINT)


def check(config: Config) -> None:
    """Raises UserError if a value is out of range, contradicts another value, or has no effect."""
    for problem in problems(config):
        raise UserError(problem)


def problems(config: Config) -> Iterator[str]:
    """Yields a message for each value that is out of range, contradictory, or has no effect."""
    values = dict(fields(config))
    yield from _find_out_of_range(values)
    yield from _find_untrainable(values)
    yield from _find_unread(values)
    if values["join.systems"]:
        yield from _find_unread_by_systems(values)


def check_ranges(config: Config | Mapping[str, Any]) -> None:
    """Raises UserError if a value is out of range."""
    for problem in _find_out_of_range(dict(fields(config))):
        raise UserError(problem)


def _find_out_of_range(values: Values) -> Iterator[str]:
    for name, value in values.items():
        field, text = FIELDS.get(name), f"config.{name}={value}"
        numbers = list(_find_numbers(value))
        if field and field.path:
            with prefix_errors(f"config.{name}"):
                files.local(f"{value}")
        if not _is_json(value):
            yield (
                f"config.{name} is of type {type(value).__name__}: config.json cannot store it\n"
                "set it to a number, a text, True, False, None, or a list or dict of these; to "
                "choose a function, set its name, and find the function in the model"
            )
        elif any(isinstance(number, int) and abs(number) >= INTEGER_LIMIT for number in numbers):
            yield f"config.{name} is a whole number that does not fit into 64 bits: reduce it"
        elif field and _has_names(field.default) and value and not _has_names(value):
            yield f"{text}: must be names, such as {','.join(field.default)}"
        elif field and (wanted := _find_violated(field, value)):
            yield f"{text}: must be {wanted}"
        elif field and field.choices and value not in field.choices:
            yield f"config.{name}='{value}' is unknown: choose from {', '.join(field.choices)}"
        elif (field is None or field.high is None) and not all(map(math.isfinite, numbers)):
            yield f"{text}: must be finite"


def _has_names(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(x, str) for x in value)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _find_violated(field: Field, value: float) -> str:
    """Returns the range of a field, such as `at least 1`, or "" if `value` lies in the range."""
    bounds = [
        ("at least", field.low, operator.ge),
        ("above", field.above, operator.gt),
        ("at most", field.high, operator.le),
        ("below", field.below, operator.lt),
    ]
    bounds = [(words, bound, compare) for words, bound, compare in bounds if bound is not None]
    if all(compare(value, bound) for _, bound, compare in bounds):
        return ""
    return " and ".join(f"{words} {bound:,.12g}" for words, bound, _ in bounds if bound < math.inf)


def _find_numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, tuple):
        for part in value:
            yield from _find_numbers(part)
    elif isinstance(value, int | float):
        yield value


def _find_untrainable(values: Values) -> Iterator[str]:
    if not values["data.train_splits"]:
        yield "config.data.train_splits is empty: use --config.data.train_splits=train"
    window, text = values["profile"], "config.profile=" + ",".join(map(str, values["profile"]))
    if window and (len(window) != 2 or not all(type(x) is int for x in window)):
        yield f"{text}: must be two whole numbers, such as --config.profile=20,30"
    elif window and not 0 <= window[0] < window[1]:
        yield f"{text}: the first step must be 0 or more, and the last step larger"
    split = values["eval.split"]
    leaves_clips_out = any(values[f"ensemble.{name}"] for name in HOLD_OUT_FIELDS)
    if split in values["data.train_splits"] and not leaves_clips_out:
        yield (
            f"config.eval.split='{split}' is among config.data.train_splits, but training clips "
            f"cannot choose the best step\nto score them, too, use --config.eval.splits={split}; "
            "to measure out of fold, use --config.ensemble.folds=5\n"
            "to train on all clips and rank test, use --config=FILE:everything "
            "--config.eval.split=test"
        )


def _find_unread(values: Values) -> Iterator[str]:
    """Yields a message for each unknown field, and for each value that has no effect."""
    for name in values:
        if name not in FIELDS and not name.startswith(SPECIFICATIONS):
            yield f"the field config.{name} does not exist: {suggest_field(name, FIELDS)}"
    yield from filter(None, (explain_unread(name, values) for name in FIELDS))
    if runs := values["join.runs"]:
        yield (
            f"config.join.runs={','.join(map(str, runs))} has no effect on a training\n"
            "to blend runs, use vidjax evaluate --workdir=FOLDER --runs=A,B"
        )


def _find_unread_by_systems(values: Values) -> Iterator[str]:
    """Yields a message for each value in the configuration of a blend that has no effect.

    A blend trains several systems, which have their own configurations and ignore most fields of
    the blend. `values` is dotted name -> value of all fields of the blend.
    """
    read = {*BLEND_FIELDS, "seed", "modalities", "ensemble.folds", "ensemble.only"}
    for name, value in values.items():
        default = DEFAULTS.get(name)
        if name not in read and not name.startswith(("data.", "join.")) and value != default:
            yield (
                f"config.{name}={value} has no effect with config.join.systems: each system has a "
                "configuration\nset the field in a copy of the configuration of a system, and name "
                "the copy in config.join.systems\n"
                f"or leave config.{name} at the default, {default!r}"
            )


def explain_unread(name: str, values: Values) -> str:
    """Returns a message if the value of the field `name` has no effect, otherwise "".

    `values` is dotted name -> value of all fields. For example, `optim.momentum` has no effect if
    `optim.name` is `adam`. There is no message about a default value.
    """
    field = FIELDS.get(name)
    if not field or not field.read_when or is_read(name, values) or values[name] == field.default:
        return ""
    when = field.read_when
    if when.condition(values):  # then the other field has no effect, either
        when = FIELDS[when.field].read_when or when
    other = when.field
    return (
        f"config.{name}={values[name]} has no effect with config.{other}={values[other]}\n"
        f"to make it count, use {when.remedy}\n"
        f"or leave config.{name} at the default, {field.default}"
    )


def find_closest_field(name: str, known: Collection[str]) -> str | None:
    """Returns the field in `known` that the misspelt `name` probably means, or None."""
    name = name.replace("-", "_").lower()
    group, _, leaf = name.rpartition(".")
    for field, words in OTHER_NAMES.items():
        if leaf in words.split() and field in known:
            return field
    inside = {field.rpartition(".")[2]: field for field in known if field.startswith(f"{group}.")}
    if match := closest(leaf, inside, cutoff=0.7):
        return inside[match]
    # An argument of a fusion, or a modality, that the configuration lacks is no misspelling.
    return None if name.startswith("fusion.") else closest(name, known, cutoff=0.65)


def suggest_field(name: str, known: Collection[str]) -> str:
    """Returns a hint for an unknown field: a similar field, or how to list or add fields."""
    match = find_closest_field(name, known)
    hint = f"did you mean --config.{match}?\n" if match else ""
    if name.startswith(SPECIFICATIONS):
        return f"{hint}to add an argument, set it in a copy of the configuration file"
    return hint.strip() or "to list all fields, use vidjax config"
