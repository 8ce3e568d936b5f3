"""Every field of a configuration: its default, its range, and what reads it.

A value that nothing reads looks like an experiment and is none: `optim.momentum=0.5` beside the
optimizer `adam` trains the same weights as the default. So a training that starts refuses a value
other than the default in a field that the rest of the configuration leaves unread.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, cast

from ml_collections import ConfigDict, config_dict

from vidjax.data import synthetic
from vidjax.errors import UserError, closest
from vidjax.files import INTEGER_LIMIT


class Config(Protocol):
    """A ConfigDict as a type checker sees it: any attribute, of any type."""

    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: Any, /) -> None: ...

    def __getitem__(self, name: str) -> Any: ...

    def __setitem__(self, name: str, value: Any) -> None: ...

    def __iter__(self) -> Iterator[str]: ...


class ShortConfig(ConfigDict):
    """A ConfigDict that a notebook shows as the lines of its values."""

    __repr__ = ConfigDict.__str__


def fields(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every leaf of a configuration."""
    for key in config:
        # A reference shows the value of a field that may be unset; None itself has no reference.
        plain = config.get_type(key) in (ConfigDict, type(None))
        value = config[key] if plain else config.get_ref(key).get()
        if isinstance(value, ConfigDict):
            yield from fields(cast(Config, value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def default() -> Config:
    """Returns a configuration with every field that every experiment has, at its default.

    The files in `configs/` start from this one and set `model`, `fusion` and what else differs.
    `model`, `fusion`, `loss` and `optim` are specifications, read by
    `models.identifier.make_identifier`, `fusion.make_fusion`, `losses.make_loss` and
    `optim.make_optimizer`.

    The comment above or beside a field is its documentation: `python -m vidjax.config` prints the
    comments as the tables of `configs/README.md`.
    """
    # whole: all fields can be read from top to bottom
    config = cast(Config, ShortConfig())
    config.seed = 0  # seed of parameters, random draws and the order of clips: 0 to 2**31 - 1
    config.batch_size = 128  # clips per training step, over all devices
    config.num_epochs = 1.0  # passes over the training clips; a fraction is allowed
    config.modalities = ("face",)  # modalities to use, in order, e.g. `face,head`
    # dtype of the computation: `float32`, `bfloat16`, or `float64` with `JAX_ENABLE_X64=1`.
    # Parameters are at least float32.
    config.dtype = "float32"
    # precision of matrix products in evaluation, on every backend: `highest` (float32) or another
    # value of `jax.default_matmul_precision`
    config.matmul_precision = "highest"
    # give bit-identical runs on a GPU, too, at some cost in speed; runs on a CPU always are
    config.deterministic = False
    # `pool`: the model takes all fused frames of a clip; `examples`: the model takes one fused
    # frame at a time, and evaluation combines the scores by `eval.reduce`
    config.after_fusion = "pool"
    # names of further transforms of a training batch, in order; empty: none
    config.transforms = ()
    # alpha of the Beta distribution that draws the shares of two mixed clips; 0: no mixup
    config.mixup = 0.0
    # training steps between two lines of `metrics.jsonl`; steps 1, 2, 5 and 10 have a line, too
    config.log_every_steps = 20
    # seconds between two checkpoints, beside the checkpoint of every evaluation
    config.checkpoint_every_seconds = 300.0

    config.data = ConfigDict()  # the clips, and how training reads them
    # dataset: made on the spot (`synthetic`), official files (`iqiyi_vid`) or features of your own
    # (`arrays`)
    config.data.name = "synthetic"
    config.data.dir = config_dict.placeholder(str)  # folder of official files, or of your features
    # folder of the converted records and of compiled programs; unset: `$VIDJAX_CACHE`, else
    # `~/.cache/vidjax`
    config.data.cache_dir = config_dict.placeholder(str)
    # size of the synthetic dataset: `small` (100 identities) or `standard` (1,000)
    config.data.size = "small"
    config.data.seed = 0  # seed of the synthetic dataset: another seed is another dataset
    # share of synthetic clips in which a third of the frames shows somebody else
    config.data.wrong_clips = 0.15
    # how strongly blur depends on the quality of synthetic frames, 0 to 4; 0: all frames are
    # blurred alike
    config.data.blur = 1.0
    config.data.label_noise = 0.0  # share of synthetic train clips labelled as somebody else
    # share of synthetic train clips that show nobody on the list, 0 to 0.9; in val it is 0.375
    config.data.train_distractors = 0.0
    # share of synthetic clips that lack face, head, body or audio, beyond what all sets lack
    config.data.missing_rate = 0.0
    config.data.train_splits = ("train",)  # splits to train on, e.g. `train,val`
    # frames whose feature holds a NaN or an infinity: `drop` leaves them out and counts them,
    # `error` refuses the file
    config.data.non_finite = "drop"
    # quality of the frames of your own features: `given`: the value in the file, or the L2 norm of
    # the feature for clips without one; `norm`: always the L2 norm of the feature
    config.data.quality = "given"
    # `resident`: all clips stay in device memory; `streaming`: clips are read from the records;
    # `auto`: resident if the clips take at most half of the free memory
    config.data.mode = "auto"
    config.data.max_frames = 64  # maximum number of frames that training reads from a clip
    # frames of a longer clip in training: a random `window`, or the best by `quality`
    config.data.crop = "window"
    # clips without an identity in training: `other` (class column 0), `leave_out`, or `noise`
    # (classes of their own, see the group `noise`)
    config.data.distractors = "other"
    # file of loss weights, `NAME.mp4 WEIGHT` on each line; a clip that is not named has weight 1
    config.data.weights = config_dict.placeholder(str)
    # exponent of class balancing: the loss of a clip is weighted by n ** -balance, where its class
    # has n clips, relative to the mean weight; 0: all clips are weighted alike
    config.data.balance = 0.0

    # the members of an ensemble: the product of all that varies
    config.ensemble = ConfigDict()
    # number of stratified folds, each left out by one member; 0: no folds, else 2 or more
    config.ensemble.folds = 0
    # number of bootstrap samples of every identity's clips, one per member; 0: none
    config.ensemble.bootstraps = 0
    # what a bootstrap sample draws from: each `identity` by itself, or `all` clips together, which
    # loses identities of few clips. With `ensemble.bootstraps`
    config.ensemble.resample = "identity"
    # number of members that each leave out another chunk of the features; 0: none
    config.ensemble.views = 0
    # number of equal chunks that a feature vector is cut into for `ensemble.views`, 2 or more
    config.ensemble.chunks = 16
    # least quality of the frames that a member is trained on, one value per member, e.g. `0,20,40`
    config.ensemble.min_quality = ()
    # clips without a frame of that quality: `keep` trains on all their frames, `drop` leaves them
    # out. With `ensemble.min_quality`
    config.ensemble.poor_clips = "keep"
    config.ensemble.seeds = 1  # number of members that differ in their random draws alone
    # numbers of the members to train here, from 0, e.g. `0,2`; empty: all
    config.ensemble.only = ()
    # `map`: members are trained one after another; `vmap`: together in one program; `auto`: `map`
    # on CPU, `vmap` elsewhere
    config.ensemble.mapping = "auto"

    # noise classes: clusters of distractors, and a mirror class of every identity for distractors
    # in no cluster. With `data.distractors=noise`
    config.noise = ConfigDict()
    config.noise.method = "dbscan"  # clustering of unit vectors: `dbscan` or `hdbscan`
    # Euclidean distance between unit vectors, 0 to 2, up to which two are neighbours
    config.noise.eps = 0.9
    config.noise.min_samples = 2  # vectors in a neighbourhood, itself included, that make a cluster
    config.noise.modality = "face"  # modality whose mean frames are clustered
    # epochs between two relabellings of the distractors in no cluster; 0: labels stay
    config.noise.relabel_every_epochs = 1.0
    # class of a distractor in no cluster for which the model predicts no identity: its own `label`,
    # or the `prediction` (a cluster or a mirror class)
    config.noise.keep = "label"
    # loss weight of distractors in no cluster: pairs (epoch, weight), linear between them
    config.noise.mirror_weight = ((0.0, 1.0),)
    # join short distractor clips and cut long ones in training. With `data.distractors` `noise` or
    # `other`
    config.noise.join = False

    config.eval = ConfigDict()  # evaluation and ranking
    # split to evaluate; it may be among `data.train_splits` only with folds or bootstrap samples
    config.eval.split = "val"
    config.eval.every_epochs = 0.0  # epochs between two evaluations; 0: one, after training
    config.eval.block_size = 256  # clips that a device scores at a time
    config.eval.scores = "log_softmax"  # scores that clips are ranked by
    # rank each clip only for this many identities, those with its highest scores; 0: for all
    config.eval.top_classes = 0
    # `mean` or `max` of the scores of a clip's examples. With `after_fusion=examples`
    config.eval.reduce = "mean"
    config.eval.members = True  # rank every member of an ensemble by itself, too
    config.eval.report = True  # write `analysis.npz` and `report.html` at the end
    # checkpoint that `--mode=evaluate` restores: `latest`, or `best` by MAP
    config.eval.checkpoint = "latest"

    # the network: `name` and the arguments of a model of `vidjax/models/identifier.py`
    config.model = ConfigDict()
    # modality -> `train` and `evaluate`: `name` and the arguments of a fusion of
    # `vidjax/fusion.py`. A modality that is not named keeps all its frames
    config.fusion = ConfigDict()

    config.loss = ConfigDict()  # the loss of the logits, and of the embeddings
    # first loss of the logits; its weight is 1 minus that of `loss.focal`, see `loss.schedule`
    config.loss.classification = "softmax"
    # second loss of the logits, weighted by `loss.schedule`: `binary`: the focal loss of each class
    # against the rest, summed over classes; `multiclass`: the focal loss of the softmax
    config.loss.focal = "binary"
    # focusing exponent of the focal loss, 0 or more; 0: cross-entropy
    config.loss.gamma = 2.0
    # weight of the loss `loss.focal`, 0 to 1: pairs (epoch, weight), linear between them
    config.loss.schedule = ((0.0, 0.0),)
    # margin of a cosine classifier in training, 0 to pi/2, in radians for `angular`; 0: none
    config.loss.margin = 0.0
    # kind of margin, used with losses that define none themselves. With `loss.margin` above 0
    config.loss.margin_type = "angular"
    config.loss.embedding = ""  # loss of the embeddings, beside that of the logits; empty: none
    # factor of the loss of the embeddings, 0 or more. With `loss.embedding`
    config.loss.embedding_weight = 1.0
    # share of the target that is spread over all classes in the softmax cross-entropy, from 0 to
    # below 1
    config.loss.label_smoothing = 0.0
    # share of the classes, above 0 to 1, that a training step compares its clips with: those of its
    # clips, and others drawn at random; 1: all classes
    config.loss.sampled_classes = 1.0

    config.optim = ConfigDict()  # the optimizer and its schedule
    config.optim.name = "adam"  # optimizer: `adam` or `sgd`
    config.optim.learning_rate = 1e-3  # learning rate at its peak
    # share of all training steps, 0 to 1, in which the learning rate rises to its peak
    config.optim.warmup = 0.1
    # learning rate at the start of the warm-up, relative to the peak, 0 to 1; 0: the peak divided
    # by the number of warm-up steps
    config.optim.warmup_scale = 0.0
    config.optim.decay = "cosine"  # learning rate after the warm-up: `cosine`, `steps`, `constant`
    # learning rate at the end, relative to the peak. With `optim.decay=cosine`
    config.optim.final_scale = 0.01
    # factor of the learning rate at every step of the stairs. With `optim.decay=steps`
    config.optim.decay_factor = 0.7
    # epochs between two steps of the stairs; a fraction is allowed. With `optim.decay=steps`
    config.optim.decay_every_epochs = 1.0
    # L2 penalty: this share of every weight matrix is added to its gradient
    config.optim.weight_decay = 0.0
    # decoupled weight decay over the whole run: without gradients a weight matrix would shrink by
    # exp(-total_decay)
    config.optim.total_decay = 0.0
    config.optim.momentum = 0.9  # momentum, 0 to 1. With `optim.name=sgd`
    # global norm that gradients are clipped to; 0: gradients are not clipped
    config.optim.clip_norm = 0.0

    # several runs as one ranking, by `--mode=evaluate --runs=A,B`
    config.join = ConfigDict()
    config.join.runs = ()  # folders of the runs; set by `--runs`
    config.join.weights = ()  # weight of each run, 0 or more, e.g. `2,1`; empty: equal weights
    # mean of the `probabilities` of the runs, or of their `logarithms`, which favours identities
    # that every run thinks possible
    config.join.mean = "probabilities"
    config.join.greedy = False  # choose the weights by MAP on `join.split`
    # split to choose weights on; each clip is scored by members that were not trained on it
    config.join.split = "train"

    config.mesh = ConfigDict()  # the devices
    # devices that share the classes: each holds its part of the classifier. The others share the
    # clips
    config.mesh.model = 1

    config.resume = ConfigDict()  # a run that goes on where an earlier process stopped
    # fields or groups that may differ from the values the run began with: `optim`, `loss`, `mixup`,
    # `num_epochs`, `log_every_steps` and `eval`, and the fields in them
    config.resume.allow = ()
    return config


def check(config: Config, *, fresh: bool = True) -> None:
    """Refuses values that no training can use, before there are data.

    Args:
      config: the configuration of a training.
      fresh: True for a training that starts, where a value that nothing reads is refused, too;
        False where a run goes on, whose configuration may be of an earlier version.

    Raises:
      ValueError: the first of the `problems`.
    """
    for problem in problems(config, fresh=fresh):
        raise UserError(problem)


def problems(config: Config, *, fresh: bool = True) -> Iterator[str]:
    """Yields an error message for every value that `check` refuses, with the same arguments."""
    values = dict(fields(config))
    yield from out_of_range(values)
    yield from untrainable(values)
    if fresh:
        yield from unread(values, dict(fields(default())))


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns field -> (old value, new value) for every field that differs and is read.

    A field that neither of the two configurations reads makes no difference.
    """
    before, after = dict(fields(old)), dict(fields(new))
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and (is_read(name, before) or is_read(name, after))
    }


Values = Mapping[str, Any]  # dotted name of a field -> value, every field of `config.default()`
POSITIVE = (
    "batch_size",
    "num_epochs",
    "log_every_steps",
    "data.max_frames",
    "eval.block_size",
    "loss.sampled_classes",
    "mesh.model",
)
KNOBS: Mapping[str, float] = {  # options of the synthetic dataset, with their largest values
    f"data.{name}": largest for name, largest in synthetic.LARGEST._asdict().items()
}
NOT_NEGATIVE = (
    *KNOBS,
    "mixup",
    "checkpoint_every_seconds",
    "noise.relabel_every_epochs",
    "eval.every_epochs",
    "eval.top_classes",
)
UNLIMITED = ("checkpoint_every_seconds",)  # fields that may be infinite
# Fields of `ensemble` by which a member is not trained on some clips, which it may then score.
HOLD_OUT = ("folds", "bootstraps")
# Names that no table of the code holds.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "data.distractors": ("other", "leave_out", "noise"),
    "data.size": ("small", "standard"),
    "data.non_finite": ("drop", "error"),
    "data.quality": ("given", "norm"),
    "data.mode": ("auto", "resident", "streaming"),
    "data.crop": ("window", "quality"),
    "ensemble.resample": ("identity", "all"),
    "ensemble.poor_clips": ("keep", "drop"),
    "noise.method": ("dbscan", "hdbscan"),
    "noise.keep": ("label", "prediction"),
    "eval.checkpoint": ("latest", "best"),
    "join.mean": ("probabilities", "logarithms"),
}
# Largest values. Beyond them a training would end in exhausted memory, or never.
LARGEST: Mapping[str, float] = {
    **KNOBS,
    "batch_size": 2**20,
    "num_epochs": 1e6,
    "log_every_steps": 2**31 - 1,
    "data.max_frames": 2**20,
    "eval.block_size": 2**20,
    "loss.sampled_classes": 1.0,
    "mesh.model": 2**16,
    "mixup": 1e6,
    "noise.relabel_every_epochs": 1e6,
    "eval.every_epochs": 1e6,
}


class ReadWhen(NamedTuple):
    """A condition under which some fields are read.

    Attributes:
      fields: dotted names.
      condition: True for values that make a training read the fields.
      otherwise: why the fields are unread, where the condition does not hold.
      remedy: command-line words under which the fields are read.
    """

    fields: tuple[str, ...]
    condition: Callable[[Values], bool]
    otherwise: str
    remedy: str


def _schedule_weights(values: Values) -> tuple[float, ...]:
    """Returns the weights of `loss.focal`; (0.5,) for a schedule that `make_loss` refuses."""
    try:
        return tuple(float(weight) for _, weight in values["loss.schedule"])
    except (TypeError, ValueError):
        return (0.5,)


def _logit_losses(values: Values) -> set[str]:
    """Returns the names of the losses of logits that have a weight at some epoch.

    The rules below exclude the losses that leave a field unread. A loss that they do not name
    counts as one that reads it.
    """
    weights = _schedule_weights(values)
    focal = {values["loss.focal"]} if any(weights) else set()
    rest = {values["loss.classification"]} if any(weight != 1 for weight in weights) else set()
    return focal | rest


READ_WHEN = (
    ReadWhen(
        ("data.dir",),
        lambda values: values["data.name"] != "synthetic",
        "config.data.name=synthetic reads no folder",
        "--config.data.name=arrays, or --config.data.name=iqiyi_vid for official files",
    ),
    ReadWhen(
        ("data.quality",),
        lambda values: values["data.name"] == "arrays",
        "official files say what their quality is",
        "--config.data.name=arrays",
    ),
    ReadWhen(
        ("data.size", "data.seed", *KNOBS),
        lambda values: values["data.name"] == "synthetic",
        "only config.data.name=synthetic generates clips",
        "--config.data.name=synthetic",
    ),
    ReadWhen(
        ("loss.focal",),
        lambda values: any(_schedule_weights(values)),
        "it has weight 0 throughout config.loss.schedule",
        "'--config.loss.schedule=((0,1),)'",
    ),
    ReadWhen(
        ("loss.classification",),
        lambda values: any(weight != 1 for weight in _schedule_weights(values)),
        "config.loss.focal has all the weight throughout config.loss.schedule",
        "'--config.loss.schedule=((0,0),)'",
    ),
    ReadWhen(
        ("loss.gamma",),
        lambda values: bool(_logit_losses(values) - {"softmax"}),
        "the focal loss has weight 0 throughout config.loss.schedule",
        "'--config.loss.schedule=((0,1),)'",
    ),
    ReadWhen(
        ("loss.label_smoothing",),
        lambda values: bool(_logit_losses(values) - {"binary", "multiclass"}),
        "the softmax cross-entropy has weight 0 throughout config.loss.schedule",
        "'--config.loss.schedule=((0,0),)'",
    ),
    ReadWhen(
        ("loss.margin_type",),
        lambda values: values["loss.margin"] > 0,
        "config.loss.margin=0 adds no margin",
        "--config.loss.margin=0.5",
    ),
    ReadWhen(
        ("loss.embedding_weight",),
        lambda values: bool(values["loss.embedding"]),
        "config.loss.embedding names no loss",
        "--config.loss.embedding=NAME",
    ),
    ReadWhen(
        ("optim.momentum",),
        lambda values: values["optim.name"] == "sgd",
        "only config.optim.name=sgd has a momentum",
        "--config.optim.name=sgd",
    ),
    ReadWhen(
        ("optim.warmup_scale",),
        lambda values: values["optim.warmup"] > 0,
        "config.optim.warmup=0 leaves the warm-up out",
        "--config.optim.warmup=0.1",
    ),
    ReadWhen(
        ("optim.final_scale",),
        lambda values: values["optim.decay"] == "cosine",
        "only config.optim.decay=cosine has a final scale",
        "--config.optim.decay=cosine",
    ),
    ReadWhen(
        ("optim.decay_factor", "optim.decay_every_epochs"),
        lambda values: values["optim.decay"] == "steps",
        "only config.optim.decay=steps decays by a factor",
        "--config.optim.decay=steps",
    ),
    ReadWhen(
        ("ensemble.resample",),
        lambda values: values["ensemble.bootstraps"] > 0,
        "config.ensemble.bootstraps=0 draws no sample",
        "--config.ensemble.bootstraps=11",
    ),
    ReadWhen(
        ("ensemble.poor_clips",),
        lambda values: bool(values["ensemble.min_quality"]),
        "config.ensemble.min_quality is empty: no frame is too poor",
        "--config.ensemble.min_quality=0,20,40",
    ),
    ReadWhen(
        ("ensemble.chunks",),
        lambda values: values["ensemble.views"] > 0,
        "config.ensemble.views=0 leaves no chunk of the features out",
        "--config.ensemble.views=2",
    ),
    ReadWhen(
        (
            "noise.method",
            "noise.eps",
            "noise.min_samples",
            "noise.modality",
            "noise.relabel_every_epochs",
            "noise.keep",
            "noise.mirror_weight",
        ),
        lambda values: values["data.distractors"] == "noise",
        "only config.data.distractors=noise has noise classes",
        "--config.data.distractors=noise",
    ),
    ReadWhen(
        ("noise.join",),
        lambda values: values["data.distractors"] != "leave_out",
        "config.data.distractors=leave_out trains on no distractor",
        "--config.data.distractors=noise",
    ),
    ReadWhen(
        ("eval.reduce",),
        lambda values: values["after_fusion"] == "examples",
        "with config.after_fusion=pool a clip has one example",
        "--config.after_fusion=examples",
    ),
    ReadWhen(
        ("join.weights", "join.mean", "join.greedy", "join.split"),
        lambda values: bool(values["join.runs"]),
        "a training joins no runs",
        "--mode=evaluate --workdir=FOLDER --runs=A,B",
    ),
)


def is_read(name: str, values: Values) -> bool:
    """Returns False for a field that the other values leave unread.

    Args:
      name: dotted name of the field.
      values: those of the whole configuration.
    """
    return all(rule.condition(values) for rule in READ_WHEN if name in rule.fields)


def _parts(value: Any) -> Iterator[Any]:
    """Yields a value, or all parts of a tuple of tuples."""
    if isinstance(value, tuple):
        for part in value:
            yield from _parts(part)
    else:
        yield value


def out_of_range(values: Values) -> Iterator[str]:
    """Yields an error message for every value that no training can use, whatever its data."""
    for name, value in values.items():
        numbers = list(_parts(value))
        infinite = any(isinstance(part, float) and not math.isfinite(part) for part in numbers)
        if infinite and name not in (*LARGEST, *UNLIMITED):
            yield f"config.{name}={value}: must be finite"
        if any(isinstance(part, int) and abs(part) >= INTEGER_LIMIT for part in numbers):
            yield f"config.{name}: holds a whole number beyond 64 bits"
    for name in POSITIVE:
        if not values[name] > 0:
            yield f"config.{name}={values[name]}: must be positive"
    for name in NOT_NEGATIVE:
        if not values[name] >= 0:
            yield f"config.{name}={values[name]}: must be 0 or more"
    if not 0 <= values["seed"] < 2**31:
        yield f"config.seed={values['seed']}: must be 0 or more, below 2**31"
    for name, largest in LARGEST.items():
        if values[name] > largest:
            yield f"config.{name}={values[name]}: must be at most {largest:,.12g}"
    for name, known in CHOICES.items():
        if values[name] not in known:
            yield f"config.{name}='{values[name]}': choose from {', '.join(known)}"
    for name, value in values.items():
        if name.endswith("dropout_rate") and not _is_share(value):
            yield f"config.{name}={value}: must lie between 0 and 1"


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def untrainable(values: Values) -> Iterator[str]:
    """Yields an error message for values that no training can use together."""
    if not values["data.train_splits"]:
        yield "config.data.train_splits is empty: name at least one"
    split = values["eval.split"]
    held_out = any(values[f"ensemble.{name}"] for name in HOLD_OUT)
    if split in values["data.train_splits"] and not held_out:
        yield (
            f"config.eval.split='{split}' is among config.data.train_splits: a score on clips\n"
            "that were trained on means nothing; to measure out of fold: "
            "--config.ensemble.folds=5\nto train on everything and rank test: "
            "--config=FILE:everything, --config.eval.split=test"
        )
    if values.get("model.name") == "plda" and values["num_epochs"] < 2:
        yield (
            f"config.num_epochs={values['num_epochs']:g}: PLDA reads every clip twice, for the "
            "centre and for its sums\n--config.num_epochs=2"
        )


# Groups whose fields depend on the model or fusion that they name.
SPECIFICATIONS = ("model.", "fusion.")


def unread(values: Values, defaults: Values) -> Iterator[str]:
    """Yields an error message for every value that was chosen and that nothing reads.

    Args:
      values: those of the configuration.
      defaults: the default of every field; a field that has its default is never refused.
    """
    for name in sorted(values.keys() - defaults.keys()):
        if not name.startswith(SPECIFICATIONS):
            close = closest_field(name, defaults.keys())
            hint = f"did you mean config.{close}?" if close else "--mode=config lists all"
            yield f"config.{name}={values[name]}: there is no such field; {hint}"
    for rule in READ_WHEN:
        if rule.condition(values):
            continue
        for name in rule.fields:
            if values[name] != defaults[name]:
                yield (
                    f"config.{name}={values[name]} has no effect: {rule.otherwise}\n"
                    f"to give it one: {rule.remedy}\n"
                    f"or leave config.{name} at its default, {defaults[name]}"
                )
    if runs := values["join.runs"]:
        yield (
            f"config.join.runs={','.join(map(str, runs))}: a training joins no runs\n"
            "to join them: --mode=evaluate --workdir=FOLDER --runs=A,B"
        )


# What other programs call a field -> its name here.
SYNONYMS: Mapping[str, str] = {
    "lr": "optim.learning_rate",
    "base_lr": "optim.learning_rate",
    "wd": "optim.weight_decay",
    "optimizer": "optim.name",
    "scheduler": "optim.decay",
    "warmup_steps": "optim.warmup",
    "grad_clip": "optim.clip_norm",
    "epochs": "num_epochs",
    "max_epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "steps": "num_epochs",
    "max_steps": "num_epochs",
    "bs": "batch_size",
    "batch": "batch_size",
    "precision": "dtype",
    "data": "data.dir",
    "data_dir": "data.dir",
    "data_path": "data.dir",
    "dataset": "data.name",
    "root": "data.dir",
    "input": "data.dir",
    "cache": "data.cache_dir",
    "split": "eval.split",
    "arch": "model.name",
    "model": "model.name",
    "dropout": "model.dropout_rate",
    "criterion": "loss.classification",
    "folds": "ensemble.folds",
    "seeds": "ensemble.seeds",
    "save_every": "checkpoint_every_seconds",
    "log_every": "log_every_steps",
    "eval_every": "eval.every_epochs",
    "frames": "data.max_frames",
}


def closest_field(name: str, known: Collection[str]) -> str | None:
    """Returns the field that a wrong name was meant to be, None if there is no such field.

    Args:
      name: a dotted name; `-` counts as `_`.
      known: the fields that exist.
    """
    name = name.replace("-", "_").lower()
    leaf = name.rpartition(".")[2]
    synonym = SYNONYMS.get(name) or SYNONYMS.get(leaf)
    if name not in known and synonym in known:
        return synonym
    modalities = {field.split(".")[1] for field in known if field.startswith("fusion.")}
    if name.startswith("fusion.") and name.split(".")[1] not in modalities:
        return None  # another modality is no misspelling of this one
    return closest(name, known, cutoff=0.55)


# The arguments that every experiment takes: word -> meaning.
SCALE_WORDS: Mapping[str, str] = {
    "iqiyi_vid": "official files, and values for their full size",
    "few": "with `iqiyi_vid`: values for some thousand clips",
    "standard": "the synthetic dataset with 1,000 identities instead of 100",
    "everything": "trains on all clips of train and val, and ranks test; no MAP where test has no "
    "ground truth",
}


def choose_data(config: Any, words: Collection[str]) -> bool:
    """Sets the dataset that words ask for; returns whether values of the published size apply.

    Args:
      config: a ConfigDict, changed in place.
      words: `iqiyi_vid` for official files, with `few` for some thousand clips of them; `standard`
        for the larger synthetic dataset; `everything` to train on train and val, and to rank test.

    Raises:
      ValueError: words that contradict each other.
    """
    if {"iqiyi_vid", "standard"} <= set(words):
        raise UserError("config arguments: 'iqiyi_vid' and 'standard' are two datasets, name one")
    if "few" in words and "iqiyi_vid" not in words:
        raise UserError("config arguments: 'few' needs 'iqiyi_vid', as in iqiyi_vid,few")
    if {"everything", "trainval"} <= set(words):
        raise UserError(
            "config arguments: 'everything' and 'trainval' are two ways to train on val, name one"
        )
    if "everything" in words:
        config.data.train_splits = ("train", "val")
        config.eval.split = "test"
    if "iqiyi_vid" in words:
        config.data.name = "iqiyi_vid"
    if "standard" in words:
        config.data.size = "standard"
    return "iqiyi_vid" in words and "few" not in words


def split_args(args: str, known: Collection[str]) -> tuple[set[str], tuple[str, ...]]:
    """Splits what follows the colon of `--config=FILE:ARG,ARG` into known words and modalities.

    Args:
      args: the text after the colon, e.g. `iqiyi_vid,face,head`.
      known: the words that the configuration understands.

    Returns:
      The known words that were given, and the others, in order: names of modalities.

    Raises:
      ValueError: a word that is spelled almost like a known one.
    """
    words = [word.strip() for word in args.split(",") if word.strip()]
    given = {word for word in words if word in known}
    modalities = tuple(dict.fromkeys(word for word in words if word not in known))
    for word in modalities:
        if match := closest(word, known, cutoff=0.7):
            raise UserError(f"unknown config argument '{word}': did you mean '{match}'?")
    return given, modalities


def choose_one(words: Collection[str], names: Collection[str], default: str) -> str:
    """Returns the one of `names` that is among the words, or the default.

    Raises:
      ValueError: there are several of them.
    """
    given = sorted({*names}.intersection(words))
    if len(given) > 1:
        quoted = " and ".join(f"'{name}'" for name in given)
        raise UserError(f"config arguments: {quoted} exclude each other, name one")
    return given[0] if given else default


def one_modality(modalities: tuple[str, ...], *, default: str) -> tuple[str]:
    """Returns the modality among the words of an experiment that has one, or its default.

    Raises:
      ValueError: there are several.
    """
    if len(modalities) > 1:
        raise UserError(
            f"--config: modalities {', '.join(modalities)}: this experiment has one\n"
            f"name one of them, or a system of several: --config=plda:{','.join(modalities)}"
        )
    return (modalities or (default,))[0:1]
