"""The formats of the files in a run's folder: what each key means, its type and its range.

`parse` makes a `Struct` of plain JSON. A key without a default is required; others may be absent,
or null where their type allows it; keys that are not listed are free, for later versions.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct, field

from vidjax.utils import files
from vidjax.utils.errors import UserError

T = TypeVar("T")

_LOWEST = -sys.float_info.max  # NaN is not above it
MANY, TABLE, FEW = (Meta(max_length=most) for most in (10_000, 1000, 100))
Text = Annotated[str, Meta(max_length=10_000)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Plain = Text | bool | int | float | None
Whole = Annotated[int, Meta(gt=-(1 << 53), lt=1 << 53)]
Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
Size = Annotated[int, Meta(ge=1, lt=1 << 31)]
Column = Annotated[int, Meta(ge=-1, lt=1 << 31)]  # place of an identity; -1 for none
Share = Annotated[float, Meta(ge=0, le=1)]
Known = Annotated[float, Meta(ge=_LOWEST)]  # not NaN: what answers depend on
Identities = Annotated[list[Text], Meta(max_length=files.MAX_ITEMS)]


class Data(Struct, kw_only=True):
    """What was evaluated."""

    name: Text | None = None
    dir: Text | None = None
    digest: Text | None = None
    title: Text | None = None
    size: Plain = None  # of a generated dataset, as `seed`
    seed: Plain = None


class JoinedRun(Struct, kw_only=True):
    """One of the runs that a blend joins."""

    name: Text
    weight: Known | None = None
    map: Share | None = None  # of this run only


class SplitDigests(Struct, kw_only=True):
    """Digests of a split's clip names, features, labels and modalities."""

    clips: Count
    names: Text
    features: Text
    labels: Text | None = None
    modalities: Annotated[list[Text], TABLE] | None = None


class DataDigests(Struct, kw_only=True):
    """Digests of a run's data, see `evaluation.restore`."""

    splits: Annotated[dict[str, SplitDigests], TABLE]
    weights: Text | None = None


class Metrics(Struct, kw_only=True):
    """`metrics.json`, and `metrics_<split>.json` of a split that training does not evaluate."""

    data: Data | None = None
    num_clips: Whole | None = None  # ranked
    num_identities: Whole | None = None  # that have a list
    num_distractors: Whole | None = None  # ranked clips that show no identity
    num_ties: Whole | None = None  # places of equal score, whose order names decide
    num_nan_clips: Whole | None = None  # with a score of NaN, ranked last
    map: Share | None = None  # none without ground truth, as the metrics that follow
    num_map_identities: Whole | None = None  # that have a clip: MAP is their mean
    map_kind: Text | None = None  # the split's name, `out_of_fold` or `in_sample`
    top1: Share | None = None  # as every row of `metrics.CLIP_METRICS`
    auroc: Share | None = None
    fnir_1: Share | None = field(default=None, name="fnir_at_fpir_0.01")
    fnir_10: Share | None = field(default=None, name="fnir_at_fpir_0.1")
    threshold_1: Known | None = field(default=None, name="threshold_at_fpir_0.01")
    threshold_10: Known | None = field(default=None, name="threshold_at_fpir_0.1")
    # Field -> value, where an evaluation had another one than `config.json`; scores depend on it.
    overrides: Annotated[dict[str, Any], TABLE] | None = None
    date: Text | None = None  # UTC: end of the training
    eval_date: Text | None = None  # of a later evaluation
    eval_clips_per_second: float | None = None
    eval_seconds: float | None = None  # of an evaluation in parts, their sum
    step: Whole | None = None  # optimiser steps behind the weights
    best_step: Whole | None = None  # of the best evaluation during training
    best_map: Share | None = None
    num_params: Whole | None = None  # of a member
    num_members: Whole | None = None
    train_clips_per_second: float | None = None  # median of the training steps
    waited_seconds: float | None = None
    train_seconds: float | None = None  # in training steps, by the process that ended the run
    seconds: float | None = None  # all processes of the run, from start to last evaluation
    mode: Text | None = None  # `resident` or `streaming`
    seed: Whole | None = None
    finished: bool | None = None
    command: Text | None = None
    trained_on: DataDigests | None = None
    versions: Annotated[dict[str, Text], FEW] | None = None  # of packages
    members: Annotated[list[dict[str, Plain]], MANY] | None = None  # name, MAP and own options
    runs: Annotated[list[JoinedRun], TABLE] | None = None  # of a blend


class Manifest(Struct, kw_only=True):
    """`manifest.json` of a checkpoint; keys that are absent have the defaults."""

    step: Whole
    files: Annotated[dict[str, Text], Meta(max_length=100_000)]  # name -> sha256
    arrays: Annotated[dict[str, Text], Meta(max_length=100_000)]  # name -> dtype[shape]
    data: DataDigests = field(default_factory=lambda: DataDigests(splits={}))
    map: Share = 0.0
    config: Annotated[dict[str, Any], TABLE] = {}
    modalities: Annotated[dict[str, Size], TABLE] = {}  # name -> width
    num_identities: Size = 1
    num_clips: Size = 1
    total_steps: Size = 1
    num_clusters: Count | None = None
    train_other: bool = False
    identities_sha256: Text = ""
    members_sha256: Text = ""
    mode: Text = ""
    evaluated: bool = False
    seconds: float = 0.0
    settings: Annotated[dict[str, Known | Annotated[list[Known], MANY]], TABLE] | None = None
    num_places: Size | None = None


class Line(Struct, kw_only=True):
    """A line of `metrics.jsonl` or `timing.jsonl`, of training or, with a split, an evaluation."""

    step: Whole
    epoch: float | None = None
    map: float | None = None


class DataReport(Struct, kw_only=True):
    """`data_report.json`."""

    splits: Annotated[dict[str, dict[str, Any]], TABLE] = {}  # counts; `labelled`: bool


class Clip(Struct, kw_only=True):
    """A row for a clip in a table of mistakes."""

    clip: Text
    score: float
    shows: Column = -1  # -1 for a distractor
    identity: Column = -1  # in whose list it scores highest


Clips = Annotated[list[Clip], TABLE]
Pair = tuple[Column, Column]  # an identity or -1, and a count


class WorstIdentity(Struct, kw_only=True):
    """An identity of low average precision; see `analysis.measures.worst_identities`."""

    identity: Column
    ap: Share
    clips: Whole
    lost_to: Annotated[list[Pair], FEW]
    mixed_with: Annotated[list[Pair], FEW]


class Stratum(Struct, kw_only=True):
    """A group of identities or clips; one of fewer than `fewest_identities` has no interval."""

    label: Text
    map: Share
    low: float | None = None
    high: float | None = None
    identities: Whole | None = None
    clips: Whole | None = None


class Strata(Struct, kw_only=True):
    """One way to divide identities or clips into groups."""

    by: Text
    rows: Annotated[list[Stratum], TABLE]


class WrongClips(Struct, kw_only=True):
    """Mistakes with the highest scores."""

    distractors: Clips | None = None
    known: Clips | None = None


class Rate(Struct, kw_only=True):
    """The threshold for FPIR `rate`, and its errors; none with fewer than `fewest` distractors."""

    rate: Share
    fewest: Count
    threshold: Known | None = None
    fpir: Share = 0.0
    fpir_low: Share = 0.0
    fpir_high: Share = 0.0
    fnir: Share = 0.0
    fnir_low: Share = 0.0
    fnir_high: Share = 0.0


class OpenSet(Struct, kw_only=True):
    """Identification of known people among distractors."""

    num_identities: Whole  # that a clip is compared with
    num_known: Whole  # clips of known people
    num_people: Whole
    num_strange: Whole  # distractors
    resamples: Whole
    rates: Annotated[list[Rate], FEW]


class Analysis(Struct, kw_only=True):
    """The entry `facts` of `analysis.npz`, UTF-8 JSON; arrays are its other entries."""

    split: Text | None = None
    modalities: Annotated[list[Text], TABLE] | None = None
    lead: Text | None = None  # the modality whose quality and length make the strata
    logs: bool | None = None  # scores are logarithms of probabilities
    intervals: Annotated[dict[str, tuple[Share, Share]], FEW] = {}  # 95 %, of `top1` and `auroc`
    vectors: Annotated[list[Text], Meta(max_length=64)] | None = None  # rows of `attention`
    num_others: Whole | None = None  # identities of the ground truth that the run cannot name
    worst: Annotated[list[WorstIdentity], TABLE] | None = None
    strata: Annotated[list[Strata], FEW] | None = None
    fewest_identities: Whole | None = None
    wrong_clips: WrongClips | None = None
    open_set: OpenSet | None = None  # none without distractors
    calibration_error: float = math.nan  # expected calibration error


# Arrays of `analysis.npz`. Those of a line have one length, and come together: `train_clips` may be
# absent, and `score_edges` has one entry more.
BY_IDENTITY = ("ap", "positives", "train_clips")  # average precision; clips of both splits
HISTOGRAMS = ("score_known", "score_strange", "score_edges")  # best scores of known and strange
ERRORS = ("fpir", "fnir")  # of identification, threshold by threshold
# attention: row i, column j: what vector j takes from i. calibration [bins, 3]: clips, mean
# confidence, share that is right.
MATRICES = ("attention", "calibration")
MOST_ROWS = 10_000  # of arrays that are not by identity


def parse(path: Path, value: object, kind: type[T], remedy: str) -> T:
    """Returns JSON `value` as `kind`; errors name `path`, key (`$.members[2].map`) and `remedy`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text = str(error).replace(f"`float` >= {_LOWEST}", "a number, not NaN")
        raise UserError(f"'{path}' is damaged: {text}\n{remedy}") from error


def load(path: Path, kind: type[T], remedy: str, limit: int = files.JSON_BYTES) -> tuple[Any, T]:
    """Returns a JSON file of at most `limit` bytes, as it is and as a `kind`.

    Every error of its content has the `remedy`.
    """
    try:
        value = files.read_json(path, object, limit)
    except ValueError as error:
        text = str(error)
        raise UserError(text if "\n" in text else f"{text}\n{remedy}") from error
    return value, parse(path, value, kind, remedy)


def read(path: Path, kind: type[T], remedy: str, limit: int = files.JSON_BYTES) -> T:
    """Returns the second value of `load`."""
    return load(path, kind, remedy, limit)[1]


def check_arrays(path: Path, arrays: Mapping[str, np.ndarray], remedy: str) -> None:
    """Raises UserError unless arrays of `analysis.npz` fit each other and are complete."""
    for names in (BY_IDENTITY[:2], HISTOGRAMS, ERRORS):
        if 0 < sum(name in arrays for name in names) < len(names):
            raise UserError(
                f"'{path}' is damaged: it has some, but not all, of {', '.join(names)}\n{remedy}"
            )
    for names in (BY_IDENTITY, HISTOGRAMS, ERRORS, *((name,) for name in MATRICES)):
        found = {name: arrays[name] for name in names if name in arrays}
        lengths = {array.size - (name == "score_edges") for name, array in found.items()}
        most = files.MAX_ITEMS if names is BY_IDENTITY else MOST_ROWS
        for name, array in found.items():
            right = array.dtype.kind in "iuf" and array.ndim == 1 + (name in MATRICES)
            if not right or max(array.shape) > most or len(lengths) > 1:
                shape = f"{array.dtype}{list(array.shape)}"
                raise UserError(f"'{path}' is damaged: array '{name}' is {shape[:60]}\n{remedy}")
