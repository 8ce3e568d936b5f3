"""Values of configuration fields: within their range, and read by something.

A value that nothing reads looks like an experiment and is none: `optim.momentum=0.5` beside the
optimizer `adam` trains the same weights as the default. So a training that starts refuses a value
other than the default in a field that the rest of the configuration leaves unread.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from vidjax.config_values import closest_field
from vidjax.files import INTEGER_LIMIT

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
# Knobs of the synthetic dataset, with their largest values.
KNOBS: Mapping[str, float] = {
    "data.wrong_clips": 1.0,
    "data.blur": 4.0,
    "data.label_noise": 1.0,
    "data.train_distractors": 0.9,
    "data.missing_rate": 1.0,
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


def misfits(values: Values, defaults: Values) -> Iterator[str]:
    """Yields the end of an error message for every field that is absent or of another type."""
    for name, default in defaults.items():
        if name not in values:
            yield f"has no field config.{name}"
            continue
        value, kind = values[name], type(default)
        if default is None:
            fits = value is None or isinstance(value, str)
        else:
            fits = isinstance(value, kind) or (kind is float and type(value) is int)
        if not fits:
            yield f"has config.{name}={value!r}, wanted a value such as {default!r}"


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
