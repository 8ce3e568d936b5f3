"""Checks clips, and joins the frames of all clips in one array per modality and field."""

import contextlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from vidjax.core.batch import BATCHED
from vidjax.data.packed_clips import (
    DTYPES,
    FRAME_FIELDS,
    LARGEST,
    Counts,
    FrameField,
    PackedClips,
    Quality,
    get_dtype,
    is_finite,
    join,
    map_files,
    pack_arrays,
)
from vidjax.utils.errors import UserError, closest
from vidjax.utils.names import ENDING, clean_name_at, show

# Clip -> modality -> features, or a dict of BATCHED fields. `face_quality` is a field of `face`.
Clips = Mapping[str, Mapping[str, Any]]

IGNORED = ("box",)  # may be given with each frame, but is not stored, because no model reads it
BLOCK_BYTES = 8 << 20  # bytes of features that are written at once
NUM_PROBE_CLIPS = 200  # their majority decides the width and the dtype of all clips


class Clip(NamedTuple):
    """The name and the frames of a clip from a file or a dict, before the frames are checked."""

    name: str  # the name of the clip, without `.mp4`
    place: str  # the file or split of the clip, with which an error message begins
    modalities: Mapping[str, Any]  # modality -> its frames, in any form that `read_frames` takes
    given: str = ""  # the name in the source, which may end in `.mp4`; "" if it equals `name`


def read_dict(clips: Clips, place: str) -> Iterator[Clip]:
    """Yields the clips of a dict, clip -> modality -> features.

    Error messages begin with `place`, for example the split.
    """
    for given, modalities in clips.items():
        name = clean_name_at(place, given)
        if not isinstance(modalities, Mapping):
            raise UserError(
                f"{place}: clip {show(name)} is of type {type(modalities).__name__}: "
                "give a dict {modality: features}"
            )
        for key in modalities:
            if not isinstance(key, str):
                raise UserError(
                    f"{place}: clip {show(name)}: modality {key!r:.40} is of type "
                    f"{type(key).__name__}: give it a name, such as 'face'"
                )
        grouped = group_by_modality(modalities, f"{place}: clip {show(name)}")
        yield Clip(name, place, grouped, given)


def group_by_modality(arrays: Mapping[str, Any], place: str) -> dict[str, dict[str, Any]]:
    """Groups arrays with names such as `face_quality`. Returns modality -> field -> array.

    The array `face` becomes the field `features` of the modality `face`. The array `face_quality`
    becomes the field `quality` of this modality. The value of `face` may also be a dict of fields.
    Raises UserError, which begins with `place`, if a name is wrong.
    """
    modalities: dict[str, dict[str, Any]] = {}
    for key, value in arrays.items():
        problem, remedy = "", ""
        name, _, field = key.rpartition("_")
        fields = dict(value) if isinstance(value, Mapping) else {"features": value}
        if name in arrays and field in (*FRAME_FIELDS, *IGNORED):
            fields = {field: value}
        elif name in arrays and (similar := closest(field, FRAME_FIELDS, cutoff=0.75)):
            problem = f"'{show(key)}' is probably misspelt: rename it to '{name}_{similar}'"
            remedy = "if it is a modality, give it another name"
        elif key in FRAME_FIELDS and len(arrays) > 1:
            other = next(other for other in arrays if other != key)
            problem = f"'{key}' is a value of frames, and the name of its modality is missing"
            remedy = f"rename it, for example to '{other}_{key}'"
        elif re.fullmatch(r"arr_\d+", key):
            problem = f"'{key}' is an array without a name"
            remedy = "name the modality: numpy.savez(file, face=array)"
        else:
            name = key
        known = {} if problem else modalities.setdefault(name, {})
        if known.keys() & fields.keys():
            problem = f"'{show(name)}_{field}' is also a key of the dict '{show(name)}'"
            remedy = "leave out one of them"
        if problem:
            raise UserError(f"{place}: {problem}\n{remedy}")
        known |= fields
    return modalities


def locate(clip: Clip, modality: str) -> str:
    """Returns the start of an error message, with the file, the clip and the modality."""
    return f"{clip.place}: clip {show(clip.name)}, {modality}"


def read_frames(value: Any, place: str, quality: Quality = "given") -> dict[str, np.ndarray]:
    """Checks the frames of a clip in a modality. Returns field -> array, sorted by frame number.

    `value` is an array of features: [T, D], or [D] for a single frame. It may also be a dict with
    `features` and, optionally, `number`, `quality` and `detection`, [T] each. The result always has
    these four fields, and `features` [T, D] keep their dtype. If the clip has no frames, the result
    is {}. If `value` is malformed, raises UserError, which begins with `place`. For `quality`, see
    `Quality`.
    """
    given = dict(value) if isinstance(value, Mapping) else {"features": value}
    given = {key: column for key, column in given.items() if key not in IGNORED}
    if unknown := [str(key) for key in given if key not in BATCHED]:
        raise UserError(
            f"{place}: the key '{show(unknown[0])}' is unknown: choose from {', '.join(BATCHED)}"
        )
    features = _to_real_array(given.get("features", ()), f"{place}: features")
    if not len(features) or features.shape == (0,):
        for name, column in given.items():
            if column is not None and np.size(column):
                raise UserError(
                    f"{place}: the clip has a {name} but no features: add features [frames, width]"
                )
        return {}
    features = features[None] if features.ndim == 1 else features
    if features.ndim != 2 or not features.shape[1]:
        raise UserError(
            f"{place}: features have shape {list(features.shape)}: "
            "give an array [T, D], with D numbers for each of T frames"
        )
    if features.dtype.name not in DTYPES:
        raise UserError(
            f"{place}: features are {features.dtype}, but must be {', '.join(DTYPES[:-1])} or "
            f"{DTYPES[-1]}: use features.astype('float32')"
        )
    frames = {"features": features}
    for name, field in FRAME_FIELDS.items():
        column = given.get(name)
        if column is None:
            frames[name] = field.default(len(features))
        else:
            frames[name] = _read_column(column, name, field, features.shape, f"{place}: {name}")
    if quality == "norm" or given.get("quality") is None:
        frames["quality"] = compute_feature_norms(features)
    if given.get("number") is not None and np.any(np.diff(frames["number"]) < 0):
        order = np.argsort(frames["number"], kind="stable")
        frames = {name: column[order] for name, column in frames.items()}
    return frames


def _read_column(
    values: Any, name: str, field: FrameField, shape: tuple[int, int], place: str
) -> np.ndarray:
    """Checks the values of a field of T frames, such as `quality`; returns them as an array [T].

    `shape` is [T, D], the shape of the features. The result has the dtype of the field. Error
    messages begin with `place`.
    """
    column, (num_frames, width) = _to_real_array(values, place), shape
    if column.size == num_frames == 1:
        column = column.reshape(1)  # the value of a single frame may be a scalar
    if column.shape != (num_frames,):
        remedy = f"give [{num_frames}], a value for each frame"
        if column.shape == (width,):
            remedy = f"{remedy}; if features are [width, frames], transpose the array, as array.T"
        raise UserError(f"{place} has shape {list(column.shape)}: {remedy}")
    if name == "number":
        whole = (column >= 0) & (column < 2**31)  # also false for a NaN
        if column.dtype.kind == "f":
            whole &= column % 1 == 0
        if not whole.all():
            raise UserError(
                f"{place} {column[~whole][0]} is not a whole number from 0 to {2**31 - 1}: "
                "write frame numbers such as 0, 25, 50"
            )
    with np.errstate(over="ignore"):
        return column.astype(field.dtype)


def _to_real_array(values: Any, place: str) -> np.ndarray:
    """Converts values to an array of real numbers with 1 or 2 axes, in native byte order.

    Raises UserError, which begins with `place`, for other values.
    """
    try:
        array = np.asarray(() if values is None else values)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged, or on a device of torch
        reason = str(error).splitlines()[0]
        if "inhomogeneous" in reason:
            reason = "its rows have different lengths"
        raise UserError(
            f"{place} must be an array of numbers, but numpy cannot make one: {reason[:200]}"
        ) from None
    if np.ma.is_masked(values):
        raise UserError(f"{place} has masked values: leave out the masked frames")
    if array.dtype.kind not in "fiu" or array.ndim > 2:
        remedy = "give floats, as from array.astype('float32')"
        if array.ndim > 2:
            remedy = "give an array [frames, width], as from array.reshape(-1, array.shape[-1])"
        raise UserError(
            f"{place} must be an array of numbers with at most 2 axes, "
            f"but has the shape {list(array.shape)} and the dtype {array.dtype}\n{remedy}"
        )
    return np.atleast_1d(array).astype(array.dtype.newbyteorder("="), copy=False)


def _refuse_repeated(clip: Clip, place: str, given: str) -> NoReturn:
    """Raises UserError, because `clip` has the same name as an earlier clip.

    `place` is the file or split of the earlier clip. `given` is its name there, maybe with `.mp4`.
    """
    places, other = " and ".join(dict.fromkeys((place, clip.place))), clip.given or clip.name
    problem = f"{places}: clip {show(clip.name)} comes twice"
    if given == other:
        raise UserError(f"{problem}: delete one of them")
    raise UserError(
        f"{problem}: without {ENDING}, '{show(given)}' and '{show(other)}' are equal\n"
        "delete or rename one of these clips"
    )


def pack(
    clips: Iterable[Clip], out_dir: Path | None = None, quality: Quality = "given"
) -> PackedClips:
    """Checks the clips of a split, and joins their frames in one array per modality and field.

    If `out_dir` is given, the arrays are memory maps of files in this folder, and the folder must
    stay as long as the arrays are used. For `quality`, see `Quality`. Raises UserError if a clip
    comes twice, is malformed, or differs from most clips in the width or dtype of its features.
    """
    packers: dict[str, Packer] = {}
    seen: dict[str, tuple[str, str]] = {}  # clip -> place, and the name in the source
    empty = []
    with contextlib.ExitStack() as stack:
        for clip in clips:
            if clip.name in seen:
                _refuse_repeated(clip, *seen[clip.name])
            seen[clip.name] = clip.place, clip.given or clip.name
            if not clip.modalities:
                empty.append(clip)
            for name, value in clip.modalities.items():
                if name not in packers:
                    _check_modality(clip, name, packers)
                    folder = out_dir and out_dir / name
                    packers[name] = stack.enter_context(Packer(name, folder, quality))
                packers[name].add(clip, value)
        for packer in list(packers.values())[:1]:
            for clip in empty:
                packer.add(clip, None)  # a clip without modalities becomes a clip without frames
        return join(packers[name].finish() for name in sorted(packers))


def _check_modality(clip: Clip, name: str, known: Iterable[str]) -> None:
    """Raises UserError if `name`, a modality of a clip, is not a usable name.

    A name is not usable if it cannot be the name of a folder, or if it differs from one of the
    modalities `known` only in upper and lower case.
    """
    problem = ""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        problem = " may have only letters, digits, '-' and '_': rename it"
    elif name.casefold() in map(str.casefold, known):  # is the same folder on some drives
        problem = " differs only in upper and lower case from another modality: rename one of them"
    if problem:
        place = f"{clip.place}: clip {show(clip.name)}"
        raise UserError(f"{place}: modality '{show(name)}'{problem}")


class Packer(contextlib.ExitStack):
    """Checks the frames of many clips in one modality, and joins them in one array per field.

    Call `add` for each clip, and then `finish`. The arrays are files in `folder`, or stay in memory
    if `folder` is None. Qualities and detections that are not finite become 0.
    """

    def __init__(self, modality: str, folder: Path | None, quality: Quality = "given") -> None:
        super().__init__()
        self._modality, self._folder = modality, folder
        self._quality: Quality = quality
        self._waiting: list[tuple[Clip, dict[str, np.ndarray]]] = []
        self._bytes = 0
        self._kind: tuple[int, np.dtype] | None = None  # width and dtype, None until decided
        self._names: list[str] = []
        self._seen: list[int] = []
        self._kept: list[int] = []
        self._warnings: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._files: dict[str, Any] = {name: io.BytesIO() for name in BATCHED}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            for name in BATCHED:
                self._files[name] = self.enter_context((folder / f"{name}.bin").open("wb"))

    def add(self, clip: Clip, value: Any) -> None:
        """Checks and adds the frames of a clip. For the form of `value`, see `read_frames`."""
        frames = read_frames(value, locate(clip, self._modality), self._quality)
        self._waiting.append((clip, frames))
        self._bytes += frames["features"].nbytes if frames else 0
        decided = self._kind or len(self._waiting) >= NUM_PROBE_CLIPS
        if self._bytes >= BLOCK_BYTES and decided:
            self._write()

    def _write(self) -> None:
        """Checks and writes the frames of all clips that were added since the last call."""
        filled = [(clip, frames) for clip, frames in self._waiting if frames]
        if filled and not self._kind:  # the majority decides, so an error names the odd clip
            features = [frames["features"] for _, frames in filled]
            kinds = Counter((array.shape[1], array.dtype) for array in features)
            self._kind = kinds.most_common(1)[0][0]
        for clip, frames in filled:
            self._check(clip, frames["features"])
        lengths = [len(frames["features"]) if frames else 0 for _, frames in self._waiting]
        names = [clip.name for clip, _ in self._waiting]
        self._names += names
        self._seen += lengths
        self._waiting, self._bytes = [], 0
        if not filled:
            self._kept += lengths
            return
        joined = {
            field: np.concatenate([frames[field] for _, frames in filled]) if filled[1:] else values
            for field, values in filled[0][1].items()
        }
        keep = is_finite(joined["features"]).all(axis=1)
        owner = np.repeat(np.arange(len(lengths)), lengths)[keep]
        self._kept += np.bincount(owner, minlength=len(lengths)).tolist()
        for name, column in joined.items():
            kept = column if keep.all() else column[keep]
            if name in FRAME_FIELDS and not (finite := np.isfinite(kept)).all():
                self._warnings[f"non_finite_{name}"] += int(np.sum(~finite))
                first = names[owner[np.argmin(finite)]]
                self._examples.setdefault(f"non_finite_{name}", first)
                kept = np.where(finite, kept, np.float32(0))
            self._files[name].write(np.ascontiguousarray(kept).data)

    def _check(self, clip: Clip, features: np.ndarray) -> None:
        """Raises UserError if features [T, D] differ from most clips in width or dtype."""
        (width, dtype), (num_frames, own) = self._kind or (0, None), features.shape
        if (own, features.dtype) == (width, dtype):
            return
        problem = f"{features.dtype}, but {dtype} in other clips: use features.astype('{dtype}')"
        if own != width:
            remedy = f"give arrays [frames, {width}] instead of [{num_frames}, {own}]"
            if num_frames == width:
                remedy = "transpose the array, as array.T"
            problem = f"{own} wide, but {width} wide in other clips: {remedy}"
        raise UserError(f"{locate(clip, self._modality)}: features are {problem}")

    def finish(self) -> PackedClips:
        """Writes the last clips, closes the files, and returns all clips in the order of `add`."""
        self._write()
        self.close()
        width, dtype = self._kind or (0, np.dtype(np.float16))
        kept, seen = np.array(self._kept, np.int32), np.array(self._seen, np.int64)
        if self._folder:
            arrays = map_files(self._folder, width, dtype.name, int(kept.sum()))
        else:
            arrays = {
                name: np.frombuffer(file.getbuffer(), get_dtype(name, dtype))
                for name, file in self._files.items()
            }
            arrays["features"] = arrays["features"].reshape(-1, width or 1)[:, :width]
        dropped = int(seen.sum() - kept.sum())
        skipped_clips = {"empty": seen == 0, "non_finite": (seen > 0) & (kept == 0)}
        counts = Counts(
            clips=len(self._names),
            frames=int(seen.sum()),
            skipped={"non_finite": dropped} if dropped else {},
            skipped_clips={
                reason: int(clips.sum()) for reason, clips in skipped_clips.items() if clips.any()
            },
            warnings=dict(self._warnings),
            examples=self._examples,
        )
        frames = {self._modality: pack_arrays(arrays, self._kept)}
        return PackedClips(tuple(self._names), frames, {self._modality: counts})


def compute_feature_norms(features: np.ndarray) -> np.ndarray:
    """Returns [F] float32, the L2 norms of features [F, D].

    The norm measures the quality of a frame: it is small for blurred faces and for side views.

    Source: iQIYI-VID paper, section 5.1, after Ranjan et al.
    """
    norms, rows = np.empty(len(features), np.float32), 512  # rows of a block, which saves memory
    for start in range(0, len(features), rows):
        block = features[start : start + rows].astype(np.float64, order="C")  # squares stay finite
        length = np.sqrt(np.einsum("fd,fd->f", block, block))
        norms[start : start + rows] = np.minimum(length, LARGEST)
    return norms
