"""Clips as anybody may hold them into checked, flat arrays: no TensorFlow, no files of others."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vidjax.data.untrusted import sandbox
from vidjax.data.untrusted.pickles import PackedClips
from vidjax.data.untrusted.unpickle import show

Clips = Mapping[str, Mapping[str, Any]]  # clip -> modality -> features, or a dict of FIELDS
NonFinite = Literal["drop", "error"]  # what becomes of a frame whose feature holds a NaN or an Inf

FIELDS = ("features", *sandbox.COLUMNS)
DTYPES = (np.float16, np.float32, np.float64, np.int8)
LOOK_AT = 200  # clips: most of the first ones say what width and dtype all should have


class Clip(NamedTuple):
    """One clip as it was found: where, for messages, and modality -> its frames."""

    name: str
    place: str
    modalities: Mapping[str, Any]


def clean_name(name: Any, where: str) -> str:
    """Returns a clip name without `.mp4`; ValueError, which begins with `where`, for a bad one."""
    if not isinstance(name, str):
        raise ValueError(f"{where} a clip name is text, not {type(name).__name__}: {name!r:.40}")
    try:
        return sandbox.clean_name(name)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


def read_frames(value: Any, where: str) -> dict[str, np.ndarray]:
    """Returns the frames of one clip in one modality, field -> array; nothing where it has none.

    Args:
      value: features [T, D] or [D], or a dict of FIELDS.
      where: what a message begins with.

    Returns:
      `features` [T, D] in their dtype (native byte order), `quality` and `detection` [T] float32,
      `number` [T] int32 in ascending order, `box` [T, 4] float32, T and D of 1 or more.

    Raises:
      ValueError: something else than numbers, or shapes that do not fit.
    """
    given = dict(value) if isinstance(value, Mapping) else {"features": value}
    if unknown := [str(key) for key in given if key not in FIELDS]:
        raise ValueError(f"{where}: no field '{show(unknown[0])}'; known are {', '.join(FIELDS)}")
    features = _numbers(given.get("features", ()), f"{where}: features")
    if not len(features) or features.shape == (0,):
        for field, column in given.items():
            if column is not None and np.size(column):
                raise ValueError(f"{where}: {field} of frames, but no features")
        return {}
    features = features[None] if features.ndim == 1 else features
    if features.ndim != 2 or not features.shape[1]:
        raise ValueError(f"{where}: features have shape {list(features.shape)}, wanted [T, D]")
    if features.dtype not in DTYPES:
        kinds = "float16, float32, float64 and int8"
        raise ValueError(f"{where}: features are {features.dtype}, but only {kinds} are read")
    frames = {"features": features}
    for field, dtype in sandbox.COLUMNS.items():
        column = given.get(field)
        shape = (len(features), 4) if field == "box" else (len(features),)
        if column is None:
            frames[field] = np.full(shape, float(field == "detection"), dtype)
            if field == "number":
                frames[field] = np.arange(len(features), dtype=np.int32)
            continue
        column = _numbers(column, f"{where}: {field}")
        if column.size == 1 and shape == (1,):
            column = column.reshape(1)  # of one frame that is given as [D]
        if column.shape != shape:
            raise ValueError(
                f"{where}: {field} has shape {list(column.shape)}, wanted {list(shape)}"
            )
        if field == "number":
            whole = np.isfinite(column) & (column >= 0) & (column < 2**31) & (column % 1 == 0)
            if not whole.all():
                raise ValueError(
                    f"{where}: number {column[~whole][0]} is no whole number from 0 up"
                )
        with np.errstate(over="ignore"):
            frames[field] = column.astype(dtype)
    if np.any(np.diff(frames["number"]) < 0):  # frames go by time
        order = np.argsort(frames["number"], kind="stable")
        frames = {field: column[order] for field, column in frames.items()}
    return frames


def _numbers(value: Any, where: str) -> np.ndarray:
    """Returns an array of real numbers in native byte order."""
    try:
        array = np.asarray(() if value is None else value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged; or of another library's device
        reason = str(error).splitlines()[0]
        if "inhomogeneous" in reason:
            reason = "rows of different lengths"
        raise ValueError(f"{where}: not an array: {reason[:200]}") from None
    if array.dtype == object:
        raise ValueError(f"{where}: an array of Python objects, wanted one array of numbers")
    if array.dtype.kind not in "fiu" or array.ndim > 2:
        raise ValueError(f"{where}: {array.dtype} {list(array.shape)}, wanted numbers [T, D]")
    return np.atleast_1d(array).astype(array.dtype.newbyteorder("="), copy=False)


def where_of(clip: Clip, modality: str) -> str:
    """Returns what a message about a clip in one modality begins with."""
    return f"{clip.place}: clip {show(clip.name)}, {modality}"


def pack(
    clips: Iterable[Clip], out_dir: Path | None = None, *, non_finite: NonFinite = "drop"
) -> dict[str, PackedClips]:
    """Returns modality -> the frames of some clips, flat.

    Args:
      clips: of one split, every name once.
      out_dir: where flat files are to lie, which must outlive the arrays; None for memory.
      non_finite: what becomes of a frame whose feature holds a NaN or an Inf.

    Raises:
      ValueError: a clip comes twice, is not what it should be, or of another width or dtype than
        most; names clip, modality and field.
    """
    packers: dict[str, _Packer] = {}
    try:
        _fill(packers, clips, out_dir, drop=non_finite == "drop")
        return {name: packers[name].finish() for name in sorted(packers)}
    finally:
        for packer in packers.values():
            packer.close()


def _fill(
    packers: dict[str, "_Packer"], clips: Iterable[Clip], out_dir: Path | None, *, drop: bool
) -> None:
    """Takes every clip once, with a packer for each modality that comes up."""
    seen: dict[str, str] = {}
    bare = []
    for clip in clips:
        if clip.name in seen:
            places = " and ".join(dict.fromkeys((seen[clip.name], clip.place)))
            raise ValueError(f"{places}: clip {show(clip.name)} comes twice")
        seen[clip.name] = clip.place
        if not clip.modalities:
            bare.append(clip)
        for modality, value in clip.modalities.items():
            if modality not in packers:
                if not re.fullmatch(r"[A-Za-z0-9_-]+", str(modality)):
                    raise ValueError(
                        f"{clip.place}: clip {show(clip.name)}: modality "
                        f"'{show(str(modality))}': a name of letters, digits, '-' and '_' is wanted"
                    )
                folder = out_dir / modality if out_dir else None
                packers[modality] = _Packer(modality, folder, drop=drop)
            packers[modality].add(clip, value)
    for packer in list(packers.values())[:1]:
        for clip in bare:
            packer.add(clip, None)  # it is there, without a frame


class _Packer:
    """One modality of one split, filled clip by clip."""

    def __init__(self, modality: str, folder: Path | None, *, drop: bool) -> None:
        self._modality, self._folder, self._drop = modality, folder, drop
        self._names: list[str] = []
        self._seen: list[int] = []
        self._kept: list[int] = []
        self._warnings: Counter[str] = Counter()
        self._waiting: list[tuple[Clip, dict[str, np.ndarray]]] = []
        self._width, self._dtype = 0, np.dtype(np.float16)
        self._decided = False
        self._arrays: dict[str, list[np.ndarray]] = {field: [] for field in FIELDS}
        self._files: dict[str, Any] = {}
        if folder:
            folder.mkdir(parents=True)
            self._files = {field: (folder / f"{field}.bin").open("wb") for field in FIELDS}

    def add(self, clip: Clip, value: Any) -> None:
        frames = read_frames(value, where_of(clip, self._modality))
        if self._decided:
            self._take(clip, frames)
            return
        self._waiting.append((clip, frames))
        if len(self._waiting) == LOOK_AT:
            self._decide()

    def _decide(self) -> None:
        """Takes width and dtype of most clips: an error names the odd one out, not the second."""
        kinds = Counter(
            (one["features"].shape[1], one["features"].dtype) for _, one in self._waiting if one
        )
        if kinds:
            self._width, self._dtype = kinds.most_common(1)[0][0]
            self._decided = True
        if self._decided:
            for clip, frames in self._waiting:
                self._take(clip, frames)
            self._waiting = []

    def _take(self, clip: Clip, frames: dict[str, np.ndarray]) -> None:
        self._names.append(clip.name)
        count = len(frames["features"]) if frames else 0
        self._seen.append(count)
        self._kept.append(count)
        if not frames:
            return
        features, where = frames["features"], where_of(clip, self._modality)
        if features.shape[1] != self._width:
            raise ValueError(
                f"{where}: features are {features.shape[1]} wide, others {self._width}"
            )
        if features.dtype != self._dtype:
            raise ValueError(f"{where}: features are {features.dtype}, others {self._dtype}")
        keep = np.isfinite(features).all(axis=1)
        if not keep.all():
            if not self._drop:
                frame = int(np.argmin(keep))
                raise ValueError(f"{where}: the feature of frame {frame} is not finite")
            frames = {field: column[keep] for field, column in frames.items()}
            self._kept[-1] = int(keep.sum())
        for field, column in frames.items():
            if field not in ("features", "number") and not (finite := np.isfinite(column)).all():
                rows = finite.all(axis=1) if field == "box" else finite
                self._warnings[f"non_finite_{field}"] += int(np.sum(~rows))
                column = np.where(finite, column, np.float32(0))
            if self._folder:
                self._files[field].write(np.ascontiguousarray(column).data)
            else:
                self._arrays[field].append(column)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def finish(self) -> PackedClips:
        """Returns all of it."""
        self._decide()
        for clip, frames in self._waiting:  # not one frame in any of them
            self._take(clip, frames)
        self.close()
        lengths, seen = np.array(self._kept, np.int32), np.array(self._seen, np.int64)
        dropped = int(seen.sum() - lengths.sum())
        without = {"empty": seen == 0, "non_finite": (seen > 0) & (lengths == 0)}
        return PackedClips(
            names=tuple(self._names),
            lengths=lengths,
            features=self._column("features", self._dtype, (self._width,)),
            quality=self._column("quality", sandbox.COLUMNS["quality"]),
            detection=self._column("detection", sandbox.COLUMNS["detection"]),
            number=self._column("number", sandbox.COLUMNS["number"]),
            box=self._column("box", sandbox.COLUMNS["box"], (4,)),
            seen=int(seen.sum()),
            skipped={"non_finite": dropped} if dropped else {},
            skipped_clips={key: int(hit.sum()) for key, hit in without.items() if hit.any()},
            warnings=dict(self._warnings),
        )

    def _column(self, field: str, dtype: Any, row: tuple[int, ...] = ()) -> np.ndarray:
        shape = (int(sum(self._kept)), *row)
        if not self._folder:
            return np.concatenate([np.empty((0, *row), dtype), *self._arrays[field]])
        if not all(shape):
            return np.empty(shape, dtype)
        path = self._folder / f"{field}.bin"
        return np.asarray(np.memmap(path, dtype, "r", shape=shape))
