"""The types and sizes of the values in a run's files, checked when they are read.

A schema is a `Kind` of plain values, or it is built of schemas:

    Object({"key": schema})    an object; keys that are not required may be absent or null
    Many(schema, most)         a list of at most so many values
    Table(schema, most)        an object with any keys, of at most so many values

`run.results` says what the keys mean. Keys that are not listed here are free, for later versions.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from vidjax import files
from vidjax.errors import UserError


class Kind(NamedTuple):
    """A plain value.

    Attributes:
      name: what an error calls it.
      accepts: True for a value of the kind.
    """

    name: str
    accepts: Callable[[object], bool]


class Many(NamedTuple):
    """A list of values of one schema."""

    of: "Schema"
    most: int = 10_000


class Table(NamedTuple):
    """An object whose keys are names, and whose values have one schema."""

    of: "Schema"
    most: int = 1000


class Object(NamedTuple):
    """An object with known keys."""

    keys: Mapping[str, "Schema"]
    required: tuple[str, ...] = ()
    prefixed: Mapping[str, "Schema"] = MappingProxyType({})  # start of a key -> schema
    nullable: tuple[str, ...] | None = None  # the only keys that may be null; None for all


Schema = Kind | Many | Table | Object


class Numbers(NamedTuple):
    """An array of numbers.

    Attributes:
      shape: of each axis its length, or a letter that stands for one length in the whole file.
        `B+1` is one more than `B`.
      most: the largest length of an axis.
    """

    shape: tuple[int | str, ...]
    most: int = files.MAX_ITEMS


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_whole(value) and 0 <= value < 1 << 31


def _is_size(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_known(value: object) -> bool:
    return _is_number(value) and not (isinstance(value, float) and math.isnan(value))


def _is_known_or_list(value: object) -> bool:
    return all(map(_is_known, value)) if isinstance(value, list) else _is_known(value)


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _is_column(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 1 << 31


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 10_000


ANY = Kind("a value", lambda value: True)
PLAIN = Kind("a number or a text", lambda value: not isinstance(value, (list, dict)))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number", _is_whole)
COUNT = Kind("a whole number from 0 to 2,147,483,647", _is_count)
SIZE = Kind("a whole number from 1 to 2,147,483,647", _is_size)
NUMBER = Kind("a number", _is_number)
KNOWN = Kind("a number, not NaN", _is_known)  # what answers depend on
NUMBERS = Kind("a number, or a list of numbers, not NaN", _is_known_or_list)
SHARE = Kind("a number from 0 to 1", _is_share)
COLUMN = Kind("the place of an identity, or -1", _is_column)
TEXT = Kind("a text", _is_text)

_MEMBERS = Many(Object({"map": SHARE, "member": PLAIN}))
_DATA = Object(dict.fromkeys(("name", "dir", "digest", "title"), TEXT))
_RUNS = Many(
    Object(
        {
            "name": TEXT, "weight": KNOWN, "map": SHARE, "model": TEXT, "train_splits": Many(TEXT),
            "modalities": Many(TEXT), "scored_with": Many(TEXT), "seed": WHOLE, "step": WHOLE,
            "num_params": WHOLE, "num_members": WHOLE, "data": _DATA, "held_out": FLAG,
        },
        ("name",),
    ),
    1000,
)  # fmt: skip
_DIGESTS = Object(  # of a run's data, see `evaluation.run_data`
    {
        "splits": Table(
            Object(
                {
                    "clips": COUNT,
                    "modalities": Many(TEXT, 1000),
                    **dict.fromkeys(("names", "features", "labels"), TEXT),
                },
                ("clips", "names", "features"),
            )
        ),
        "weights": TEXT,
    },
    ("splits",),
)
METRICS = Object(
    {
        **dict.fromkeys(("num_clips", "num_identities", "num_distractors", "step"), WHOLE),
        **dict.fromkeys(("best_step", "num_params", "num_members", "num_ties", "seed"), WHOLE),
        **dict.fromkeys(("map", "top1", "auroc", "best_map"), SHARE),
        **dict.fromkeys(("eval_clips_per_second", "eval_seconds", "waited_seconds"), NUMBER),
        **dict.fromkeys(("train_clips_per_second", "train_seconds", "seconds"), NUMBER),
        **dict.fromkeys(("map_kind", "mode", "command", "date", "eval_date"), TEXT),
        "weights_fitted_on": TEXT,
        "finished": FLAG,
        "members": _MEMBERS,
        "runs": _RUNS,
        "versions": Table(TEXT, 100),
        "data": _DATA,
        "trained_on": _DIGESTS,
    },
    prefixed={"fnir_at_fpir_": SHARE, "threshold_at_fpir_": KNOWN},
)
MANIFEST = Object(
    {
        "data": _DIGESTS,
        "step": WHOLE,
        "map": SHARE,
        "files": Table(TEXT, 100_000),
        "arrays": Table(TEXT, 100_000),
        "config": Table(ANY),
        "modalities": Table(SIZE),
        **dict.fromkeys(("num_identities", "num_clips", "total_steps"), SIZE),
        "num_clusters": COUNT,
        "train_other": FLAG,
        **dict.fromkeys(("identities_sha256", "members_sha256", "mode"), TEXT),
        "evaluated": FLAG,
        "seconds": NUMBER,
        "threshold": KNOWN,
        "padded_columns": COUNT,
        "settings": Table(NUMBERS),
    },
    ("step", "files", "arrays"),
    nullable=("num_clusters", "threshold", "settings", "padded_columns"),
)
CHANGES = Object({"step": WHOLE, "changes": Table(Many(ANY, 2), 10_000)}, ("step", "changes"))
LINE = Object({"step": WHOLE, **dict.fromkeys(("epoch", "map"), NUMBER)}, ("step",))
IDENTITIES = Many(TEXT, files.MAX_ITEMS)

_COUNTS = Object(
    {
        **dict.fromkeys(("frames", "frames_seen", "clips", "clips_seen", "clips_without"), WHOLE),
        **dict.fromkeys(("frames_skipped", "clips_skipped", "values_replaced"), Table(WHOLE)),
        "missing_rate": SHARE,
        "frames_per_clip": Object({"mean": NUMBER}, ("mean",)),
    },
    ("frames", "clips", "frames_skipped", "clips_skipped"),
)
DATA_REPORT = Object(
    {
        "splits": Table(
            Object(
                {
                    **dict.fromkeys(("clips", "identities", "distractors", "unknown_clips"), WHOLE),
                    "labelled": FLAG,
                    "modalities": Table(_COUNTS),
                },
                ("modalities",),
            )
        ),
        "cropped_in_an_epoch": Table(Object({"frames": NUMBER})),
        "data": _DATA,
    }
)

_PAIRS = Many(Many(COLUMN, 2), 100)
_CLIPS = Many(Object({"clip": TEXT, "shows": COLUMN, "identity": COLUMN, "score": NUMBER}), 1000)
_RATE = Object(
    {
        **dict.fromkeys(("rate", "fpir", "fnir"), SHARE),
        **dict.fromkeys(("fpir_low", "fpir_high", "fnir_low", "fnir_high"), SHARE),
        "threshold": KNOWN,
        "fewest": COUNT,
    },
    ("rate", "fewest"),
)
_BOUNDS = dict.fromkeys(("gap", "gap_low", "gap_high"), NUMBER)
_MEASURE = {**dict.fromkeys(("value", "low", "high"), SHARE), **_BOUNDS}
_ARM = {
    "shots": SIZE,
    "clips": NUMBER,
    "map": Object(_MEASURE, ("value", "gap")),
    "fnir": Many(Object({"rate": SHARE, **_MEASURE}, ("rate", "value", "gap")), 100),
}
ANALYSIS = Object(
    {
        "split": TEXT,
        "modalities": Many(TEXT, 1000),
        "lead": TEXT,
        "logs": FLAG,
        "results": Object({"map": SHARE, "map_kind": TEXT}),
        "members": _MEMBERS,
        "runs": _RUNS,
        "assignment": Table(Many(NUMBER, 1000), 100),
        "vectors": Many(TEXT, 64),
        "worst": Many(
            Object(
                {"identity": COLUMN, "ap": SHARE, "clips": WHOLE,
                 "lost_to": _PAIRS, "mixed_with": _PAIRS},
                ("identity", "ap", "clips", "lost_to", "mixed_with"),
            ),
            1000,
        ),
        "strata": Many(
            Object(
                {"by": TEXT, "rows": Many(Object({"label": TEXT, "map": SHARE}), 1000)},
                ("by", "rows"),
            ),
            100,
        ),
        **dict.fromkeys(("num_others", "num_sampled", "fewest_identities"), WHOLE),
        "wrong_clips": Object({"distractors": _CLIPS, "known": _CLIPS}),
        "named": Object({"num": COUNT, "rows": _CLIPS}, ("num", "rows")),
        "lists": Many(Object({"identity": COLUMN, "ap": SHARE, "rows": _CLIPS}, ("rows",)), 100),
        "open_set": Object(
            {
                **dict.fromkeys(("num_identities", "num_known", "num_people"), WHOLE),
                **dict.fromkeys(("num_strange", "resamples"), WHOLE),
                "rates": Many(_RATE, 100),
            },
            ("num_identities", "num_known", "num_people", "num_strange", "resamples", "rates"),
        ),
        **dict.fromkeys(("calibration_error", "calibration_error_after"), NUMBER),
        "calibration_maps": Many(Object({"slope": NUMBER, "offset": NUMBER}, ("slope", "offset"))),
        "robustness": Many(Object({"change": TEXT, "map": SHARE}, ("change", "map")), 1000),
        "gains": Many(NUMBER),
        "frames": Many(
            Object(
                {"clip": TEXT, "identity": COLUMN, "right": FLAG, "modality": TEXT,
                 **dict.fromkeys(("numbers", "quality", "falls"), Many(NUMBER, 1_000_000))},
                ("clip", "identity", "right", "modality", "quality", "falls"),
            ),
            100,
        ),
    }
)  # fmt: skip
ARRAYS = {
    "ap": Numbers(("C",)),
    "positives": Numbers(("C",)),
    "train_clips": Numbers(("C",)),
    "schedule": Numbers(("n", 2)),
    "attention": Numbers(("V", "V"), 64),
    "score_edges": Numbers(("B+1",), 1000),
    "score_known": Numbers(("B",), 1000),
    "score_strange": Numbers(("B",), 1000),
    "fpir": Numbers(("F",), 10_000),
    "fnir": Numbers(("F",), 10_000),
    "calibration": Numbers(("bins", 3), 1000),
    "calibration_after": Numbers(("bins", 3), 1000),
}
# Arrays that come together, or not at all.
TOGETHER = (("ap", "positives"), ("score_edges", "score_known", "score_strange"), ("fpir", "fnir"))


def most_bytes(arrays: Mapping[str, str]) -> int:
    """Returns a size in bytes that no file of a checkpoint with some arrays exceeds.

    Args:
      arrays: name -> dtype and shape, such as `float32[4, 2]`.
    """
    shapes = (kind.partition("[")[2] for kind in arrays.values())
    numbers = sum(math.prod(map(int, re.findall(r"\d{1,15}", shape))) for shape in shapes)
    return 64 * files.MB + 32 * numbers


def check(path: Path, value: object, schema: Schema, remedy: str) -> None:
    """Checks the content of a file.

    Args:
      path: the file, for the error.
      value: its content, as JSON gives it.
      schema: what it must be.
      remedy: the last line of the error.

    Raises:
      ValueError: a value is missing or wrong; the error names its place, as `members[2].map`.
    """
    problem = _problem(value, schema, "")
    if problem:
        raise UserError(f"'{path}' is damaged: {problem}\n{remedy}")


def _problem(value: object, schema: Schema, place: str) -> str | None:
    """Returns the first thing that is wrong with a value, None if nothing is."""
    if isinstance(schema, Kind):
        accepted = schema.accepts(value)
        return None if accepted else f"{place or 'it'} must be {schema.name}, not {_shown(value)}"
    if isinstance(schema, Many):
        if not isinstance(value, list) or len(value) > schema.most:
            return f"{place or 'it'} must be a list of at most {schema.most:,}, not {_shown(value)}"
        parts = ((item, schema.of, f"{place}[{i}]") for i, item in enumerate(value))
    elif not isinstance(value, dict):
        return f"{place or 'it'} must be an object, not {_shown(value)}"
    elif isinstance(schema, Table):
        if len(value) > schema.most:
            return f"{place or 'it'} must have at most {schema.most:,} entries"
        parts = ((item, schema.of, _below(place, key)) for key, item in value.items())
    else:
        for key in schema.required:
            if value.get(key) is None:
                return f"{_below(place, key)} is missing"
        for key in sorted(value):
            if schema.nullable is not None and value[key] is None and key not in schema.nullable:
                return f"{_below(place, key)} is null"
        known = dict(schema.keys)
        for start, inner in schema.prefixed.items():
            known |= {key: inner for key in value if key.startswith(start)}
        parts = (
            (value[key], inner, _below(place, key))
            for key, inner in known.items()
            if value.get(key) is not None
        )
    return next((found for part in parts if (found := _problem(*part))), None)


def _below(place: str, key: str) -> str:
    return ".".join(filter(None, (place, key[:40])))


def _shown(value: object) -> str:
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def check_arrays(path: Path, arrays: Mapping[str, np.ndarray], remedy: str) -> None:
    """Checks the known arrays of an `analysis.npz`: numbers, of shapes that fit each other.

    Args:
      path: the file, for the error.
      arrays: name -> array; those with other names are free.
      remedy: the last line of the error.

    Raises:
      ValueError: an array is wrong; the error names it.
    """
    for names in TOGETHER:
        if 0 < sum(name in arrays for name in names) < len(names):
            raise UserError(
                f"'{path}' is damaged: it has some, but not all, of {', '.join(names)}\n{remedy}"
            )
    lengths: dict[str, int] = {}
    for name, wanted in ARRAYS.items():
        if name not in arrays:
            continue
        array, fits = arrays[name], arrays[name].dtype.kind in "iuf"
        fits = fits and array.ndim == len(wanted.shape) and max(array.shape) <= wanted.most
        for axis, length in zip(wanted.shape, array.shape, strict=False):
            if isinstance(axis, str):
                letter, plus, _ = axis.partition("+")
                fits = fits and length - len(plus) == lengths.setdefault(letter, length - len(plus))
            else:
                fits = fits and length == axis
        if not fits:
            shape = f"{array.dtype}{list(array.shape)}"
            raise UserError(f"'{path}' is damaged: array '{name}' is {shape[:60]}\n{remedy}")
