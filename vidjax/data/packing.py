"""Checks clips of dicts, `.npz` files or tables, and packs them into flat arrays."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vidjax.data.frame_fields import (
    FRAME_FIELDS,
    STORED,
    FlatFiles,
    FrameField,
    NonFinite,
    PackedClips,
    Quality,
    compute_feature_norms,
    count_frames,
    find_usable_rows,
)
from vidjax.data.untrusted.names import clean_name_at, show
from vidjax.utils.errors import UserError

Clips = Mapping[str, Mapping[str, Any]]  # clip -> modality -> features, or a dict of STORED fields

DTYPES = (np.float16, np.float32, np.float64, np.int8)
ORDER_SEED = 0
BLOCK_BYTES = 8 << 20  # bytes of features that are written at once
NUM_PROBE_CLIPS = 200  # their majority decides the width and the dtype of all clips


class Clip(NamedTuple):
    """A clip that has not been checked.

    Attributes:
      name: the name without `.mp4`, see `clean_name`.
      place: the file or split, as the start of an error message.
      modalities: modality -> frames, as `read_frames` takes them.
      given: the name in the source, which may end in `.mp4`; "" if it equals `name`.
    """

    name: str
    place: str
    modalities: Mapping[str, Any]
    given: str = ""


def read_dict(clips: Clips, place: str) -> Iterator[Clip]:
    """Yields the clips of a dict; `place` is the start of an error message."""
    for given, modalities in clips.items():
        name = clean_name_at(f"{place}:", given)
        if not isinstance(modalities, Mapping):
            raise UserError(
                f"{place}: clip {show(name)} is of type {type(modalities).__name__}, "
                "wanted {modality: features}"
            )
        yield Clip(name, place, modalities, given)


def locate(clip: Clip, modality: str) -> str:
    """Returns place, clip and modality as the start of an error message."""
    return f"{clip.place}: clip {show(clip.name)}, {modality}"


def read_frames(value: Any, place: str, quality: Quality = "given") -> dict[str, np.ndarray]:
    """Checks the frames of a clip in a modality, and sorts them by frame number.

    Args:
      value: features [T, D] or [D], or a dict of `features` and fields of FRAME_FIELDS.
      place: the start of an error message.
      quality: the quality of frames, see `frame_fields.Quality`.

    Returns:
      field -> array: `features` [T, D] in their dtype (native byte order) and all FRAME_FIELDS.
      The dict is empty if the clip has no frames.
    """
    given = dict(value) if isinstance(value, Mapping) else {"features": value}
    if unknown := [str(key) for key in given if key not in STORED]:
        raise UserError(f"{place}: no field '{show(unknown[0])}'; choose from {', '.join(STORED)}")
    features = _to_real_array(given.get("features", ()), f"{place}: features")
    if not len(features) or features.shape == (0,):
        for name, column in given.items():
            if column is not None and np.size(column):
                raise UserError(f"{place}: there is a {name} of frames, but no features [T, D]")
        return {}
    features = features[None] if features.ndim == 1 else features
    if features.ndim != 2 or not features.shape[1]:
        raise UserError(
            f"{place}: features have shape {list(features.shape)}: "
            "give an array [T, D]: D numbers for each of T frames"
        )
    if features.dtype not in DTYPES:
        kinds = "float16, float32, float64 and int8"
        raise UserError(
            f"{place}: features are {features.dtype}, but must be {kinds}: "
            "use features.astype('float32')"
        )
    frames = {"features": features}
    for name, field in FRAME_FIELDS.items():
        column = given.get(name)
        if column is None:
            frames[name] = field.default(len(features))
        else:
            frames[name] = _read_column(column, name, field, len(features), f"{place}: {name}")
    if quality == "norm" or given.get("quality") is None:
        frames["quality"] = compute_feature_norms(features)
    if given.get("number") is not None and np.any(np.diff(frames["number"]) < 0):
        order = np.argsort(frames["number"], kind="stable")
        frames = {name: column[order] for name, column in frames.items()}
    return frames


def _read_column(
    values: Any, name: str, field: FrameField, num_frames: int, place: str
) -> np.ndarray:
    """Returns a field of T frames in its dtype. Raises UserError if its shape is wrong."""
    column, shape = _to_real_array(values, place), field.shape(num_frames)
    if column.size == 1 and shape == (1,):
        column = column.reshape(1)  # a single frame may come as a scalar, like its feature as [D]
    if column.shape != shape:
        raise UserError(f"{place} has shape {list(column.shape)}, wanted {list(shape)}")
    if name == "number":
        whole = (column >= 0) & (column < 2**31)  # also false for a NaN
        if column.dtype.kind == "f":
            whole &= column % 1 == 0
        if not whole.all():
            raise UserError(f"{place} {column[~whole][0]} is not a whole number of 0 or more")
    with np.errstate(over="ignore"):
        return column.astype(field.dtype)


def _to_real_array(values: Any, place: str) -> np.ndarray:
    """Returns an array of real numbers in native byte order."""
    try:
        array = np.asarray(() if values is None else values)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged, or on a device of torch
        reason = str(error).splitlines()[0]
        if "inhomogeneous" in reason:
            reason = "rows of different lengths"
        raise UserError(f"{place}: not an array: {reason[:200]}") from None
    if array.dtype == object:
        raise UserError(f"{place}: an array of Python objects, wanted an array of numbers")
    if array.dtype.kind not in "fiu" or array.ndim > 2:
        raise UserError(f"{place}: {array.dtype} {list(array.shape)}, wanted numbers [T, D]")
    return np.atleast_1d(array).astype(array.dtype.newbyteorder("="), copy=False)


def pack(
    clips: Iterable[Clip],
    out_dir: Path | None = None,
    non_finite: NonFinite = "drop",
    quality: Quality = "given",
) -> dict[str, PackedClips]:
    """Checks the clips of a split and joins their frames in flat arrays.

    Args:
      out_dir: folder for flat files, which must outlive the arrays; None: arrays stay in memory.
      non_finite: 'drop' leaves out and counts frames whose feature contains a NaN or an Inf;
        'error' raises UserError.
      quality: the quality of frames, see `frame_fields.Quality`.

    Returns:
      modality -> PackedClips.

    Raises:
      UserError: a clip comes twice, is malformed, or differs from most clips in width or dtype.
    """
    packers: dict[str, Packer] = {}
    seen: dict[str, str] = {}  # clip -> place
    empty = []
    with contextlib.ExitStack() as stack:
        for clip in clips:
            if clip.name in seen:
                places = " and ".join(dict.fromkeys((seen[clip.name], clip.place)))
                raise UserError(f"{places}: clip {show(clip.name)} comes twice")
            seen[clip.name] = clip.place
            if not clip.modalities:
                empty.append(clip)
            for name, value in clip.modalities.items():
                if name not in packers:
                    _check_modality(clip, name, packers)
                    folder = out_dir and out_dir / name
                    packers[name] = stack.enter_context(Packer(name, folder, non_finite, quality))
                packers[name].add(clip, value)
        for packer in list(packers.values())[:1]:
            for clip in empty:
                packer.add(clip, None)  # keeps a clip without modalities as a clip without frames
        return {name: packers[name].finish() for name in sorted(packers)}


def _check_modality(clip: Clip, name: str, known: Iterable[str]) -> None:
    """Raises UserError if a modality cannot name a new folder, given the `known` modalities."""
    problem = ""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)):
        problem = ": the name may have only letters, digits, '-' and '_'"
    elif name.casefold() in map(str.casefold, known):  # would be the same folder on macOS
        problem = " differs only in the case of letters from a modality of another clip"
    if problem:
        place = f"{clip.place}: clip {show(clip.name)}"
        raise UserError(f"{place}: modality '{show(str(name))}'{problem}")


class Packer(contextlib.ExitStack):
    """Checks the frames of a modality in a split, clip by clip, and writes them in blocks.

    Frames are written to flat files in a new folder, or to memory if `folder` is None. Values of
    FRAME_FIELDS that are not finite become 0. As a context manager, it closes its files.
    """

    def __init__(
        self,
        modality: str,
        folder: Path | None,
        non_finite: NonFinite = "drop",
        quality: Quality = "given",
    ) -> None:
        super().__init__()
        self._modality, self._folder = modality, folder
        self._non_finite: NonFinite = non_finite
        self._quality: Quality = quality
        self._waiting: list[tuple[Clip, dict[str, np.ndarray]]] = []
        self._bytes = 0
        self._kind: tuple[int, np.dtype] | None = None  # width and dtype; None: not decided
        self._names: list[str] = []
        self._seen: list[int] = []
        self._kept: list[int] = []
        self._warnings: Counter[str] = Counter()
        self._arrays: dict[str, list[np.ndarray]] = {name: [] for name in STORED}
        self._files: dict[str, BinaryIO] = {}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            for name in STORED:
                self._files[name] = self.enter_context((folder / f"{name}.bin").open("wb"))

    def add(self, clip: Clip, value: Any) -> None:
        """Checks and adds a clip; `value` is as in `read_frames`."""
        frames = read_frames(value, locate(clip, self._modality), self._quality)
        self._waiting.append((clip, frames))
        self._bytes += frames["features"].nbytes if frames else 0
        decided = self._kind or len(self._waiting) >= NUM_PROBE_CLIPS
        if self._bytes >= BLOCK_BYTES and decided:
            self._write()

    def _write(self) -> None:
        """Writes the waiting clips. At the first call, their majority decides width and dtype.

        So an error names the clip that differs from most clips, even if it is the first clip.
        """
        filled = [(clip, frames) for clip, frames in self._waiting if frames]
        if filled and not self._kind:
            features = [frames["features"] for _, frames in filled]
            kinds = Counter((array.shape[1], array.dtype) for array in features)
            self._kind = kinds.most_common(1)[0][0]
        for clip, frames in filled:
            self._check(clip, frames["features"])
        lengths = [len(frames["features"]) if frames else 0 for _, frames in self._waiting]
        self._names += [clip.name for clip, _ in self._waiting]
        self._seen += lengths
        self._waiting, self._bytes = [], 0
        if not filled:
            self._kept += lengths
            return
        joined = {
            field: np.concatenate([frames[field] for _, frames in filled]) if filled[1:] else values
            for field, values in filled[0][1].items()
        }
        keep = find_usable_rows(joined["features"])
        owner = np.repeat(np.arange(len(lengths)), lengths)[keep]
        self._kept += np.bincount(owner, minlength=len(lengths)).tolist()
        for name, column in joined.items():
            self._write_field(name, column if keep.all() else column[keep])

    def _check(self, clip: Clip, features: np.ndarray) -> None:
        """Raises UserError if features differ from most clips in width or dtype."""
        width, dtype = self._kind or (0, None)
        place, problem = locate(clip, self._modality), ""
        if features.shape[1] != width:
            shape = list(features.shape)
            problem = (
                f"{shape[1]} wide, in other clips {width}: "
                f"an array is [frames, width], here {shape}"
            )
        elif features.dtype != dtype:
            problem = f"{features.dtype}, in other clips {dtype}: use features.astype('{dtype}')"
        if problem:
            raise UserError(f"{place}: features are {problem}")
        if self._non_finite == "error" and not (keep := find_usable_rows(features)).all():
            raise UserError(f"{place}: the feature of frame {np.argmin(keep)} is not finite")

    def _write_field(self, name: str, column: np.ndarray) -> None:
        """Writes a field of a block of frames."""
        if name in FRAME_FIELDS and column.dtype.kind == "f":
            finite = np.isfinite(column)
            if not finite.all():
                wrong = ~finite.reshape(len(column), -1).all(axis=1)
                self._warnings[f"non_finite_{name}"] += int(np.sum(wrong))
                column = np.where(finite, column, np.float32(0))
        if self._folder:
            self._files[name].write(np.ascontiguousarray(column).data)
        else:
            self._arrays[name].append(column)

    def finish(self) -> PackedClips:
        """Writes the waiting clips and returns all clips."""
        self._write()
        self.close()
        width, dtype = self._kind or (0, np.dtype(np.float16))
        lengths, seen = np.array(self._kept, np.int32), np.array(self._seen, np.int64)
        if self._folder:
            frames = FlatFiles(self._folder, dtype, width, int(lengths.sum()))
        else:
            empty = {name: field.default(0) for name, field in FRAME_FIELDS.items()}
            empty["features"] = np.empty((0, width), dtype)
            frames = {name: np.concatenate([empty[name], *self._arrays[name]]) for name in STORED}
        return PackedClips(
            tuple(self._names), lengths, frames, **count_frames(seen, lengths, self._warnings)
        )


class StagedSplit(NamedTuple):
    """The clips of a split before they are divided into shards.

    Attributes:
      clips: N clip names in byte order.
      order: [N] int32, clip index of each record.
      packed: modality -> PackedClips.
      starts: modality -> [N] int64, the first frame of each clip, by clip index.
      lengths: modality -> [N] int32, number of frames of each clip, by clip index.
    """

    clips: tuple[str, ...]
    order: np.ndarray
    packed: Mapping[str, PackedClips]
    starts: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]


def stage(split: str, packed: Mapping[str, PackedClips]) -> StagedSplit:
    """Joins the modalities of each clip of a split by name, and shuffles the clips of 'train'."""
    # Python orders str by code point, which is the byte order of UTF-8.
    clips = tuple(sorted({name for flat in packed.values() for name in flat.names}))
    index = {name: position for position, name in enumerate(clips)}
    starts, lengths = {}, {}
    for modality, flat in packed.items():
        rows = np.fromiter((index[name] for name in flat.names), np.int64, len(flat.names))
        starts[modality] = np.zeros(len(clips), np.int64)
        lengths[modality] = np.zeros(len(clips), np.int32)
        starts[modality][rows] = flat.starts()
        lengths[modality][rows] = flat.lengths
    # Names are often sorted by identity. A shuffle buffer would mix only neighbouring clips, so
    # all training clips are permuted here.
    shuffled = np.random.default_rng(ORDER_SEED).permutation(len(clips))
    order = shuffled if split == "train" else np.arange(len(clips))
    return StagedSplit(clips, order.astype(np.int32), packed, starts, lengths)
