"""Reads feature pickles into flat arrays, in a child process with limits (a sandbox).

`unpack` starts the child, which runs this module without jax and TensorFlow. There are three
barriers:

1. No code from the file runs: `unpickle` resolves only the few globals that numpy writes.
2. The cost is limited: the limits of address space (on Linux), CPU time and output grow with the
   size of the file. A small file that expands to gigabytes ends in a clear error.
3. The structure is checked: `read_clips` checks every field, and `packing` checks the clips, before
   they are written to flat arrays.
"""

import contextlib
import gc
import itertools
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from vidjax.data import processes
from vidjax.data.frame_fields import FRAME_FIELDS, STORED, NonFinite, PackedClips
from vidjax.data.packing import NUM_PROBE_CLIPS, Clip, Packer
from vidjax.data.untrusted.names import clean_name, show
from vidjax.data.untrusted.pieces import load_pieces
from vidjax.data.untrusted.unpickle import Array, load
from vidjax.utils.errors import DiskError, NoFileError, UserError, prefix_errors

MB = 1 << 20
# Normal files load at tens of MB per CPU second, so the limit allows a much slower machine.
CPU_SECONDS = 2
CPU_BYTES_PER_SECOND = 2 * MB
READ_BYTES = MB // 16


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Writes the clips of a pickle to flat files, in the child process.

    `arguments` are the arguments of `unpack`. Returns `PackedClips.summary`.
    """
    path, out_dir = Path(arguments["path"]), Path(arguments["out_dir"])
    modality = arguments["modality"]
    # There are no reference cycles, and garbage collection would take a third of the time.
    gc.disable()
    try:
        with path.open("rb", buffering=READ_BYTES) as file:
            size = os.fstat(file.fileno()).st_size

            def pack(pieces: Iterator[object]) -> dict[str, Any]:
                with Packer(modality, out_dir, arguments["non_finite"]) as packer:
                    for clip in read_clips(pieces, modality, str(path), size):
                        packer.add(clip, clip.modalities[modality])
                    return packer.finish().summary()

            with contextlib.suppress(Exception):
                return pack(load_pieces(file, size))
            # The file is loaded as a whole if this is necessary, and for the message of an error.
            return pack(load(file, size) for _ in range(1))
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiskError(f"{path}: cannot be read, or written to {out_dir}: {reason}") from None


def unpack(
    path: str | os.PathLike[str],
    modality: str,
    out_dir: str | os.PathLike[str],
    *,
    non_finite: NonFinite = "drop",
    children: processes.Children | None = None,
) -> PackedClips:
    """Reads a feature pickle in a sandbox into flat files, and maps them into memory.

    Args:
      path: the pickle: clip name -> list of entries, or clip name -> array [D] or [T, D].
      modality: `face`, `head`, `body`, `audio` and `scene` have the entries of the official files.
        For any other name, the majority of the clips decides which fields an entry has.
      out_dir: a folder for only this call, made if missing. Its files must outlive the arrays.
      non_finite: 'drop' leaves out and counts frames whose feature contains a NaN or an Inf;
        'error' refuses the file.
      children: the group of the child, so that another thread can kill it.

    Raises:
      UserError: the file is refused, damaged or truncated, or its structure does not match its
        modality; the message names file, clip and field.
    """
    path, out_dir = Path(path), Path(out_dir)
    if not path.exists():
        raise NoFileError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file: put the file there, or rename this path")
    out_dir.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size
    arguments = {
        "path": str(path),
        "modality": modality,
        "out_dir": str(out_dir),
        "non_finite": non_finite,
    }
    try:
        summary = processes.run_limited(
            __name__,
            path,
            arguments,
            memory_bytes=512 * MB + 4 * size,
            cpu_seconds=CPU_SECONDS + size // CPU_BYTES_PER_SECOND,
            children=children,
        )
        return PackedClips.from_flat_files(out_dir, summary)
    except BaseException:
        for field in STORED:
            with contextlib.suppress(OSError):
                (out_dir / f"{field}.bin").unlink()
        raise


# The entries of an unpickled file. Every value comes from a stranger, so the functions below check
# its type before they use it, to a fixed depth.

# A pickle may have MAX_EMPTY_CLIPS clips without entries, plus 1 per BYTES_PER_EMPTY_CLIP bytes.
MAX_EMPTY_CLIPS, BYTES_PER_EMPTY_CLIP = 100_000, 64

_FEATURE_ONLY = ("feature",)
# Number of fields -> their names in the official files.
_ENTRIES: dict[int, tuple[str, ...]] = {
    5: ("frame", "bbox", "det_score", "quality_score", "feature"),
    4: ("frame", "bbox", "det_score", "feature"),
    3: ("frame", "bbox", "feature"),
    2: ("frame", "feature"),
    1: _FEATURE_ONLY,
}
_NUM_FIELDS = {"face": 5, "head": 4, "body": 3, "scene": 2, "audio": 1}
_FIELD_NAMES = {field.official: name for name, field in FRAME_FIELDS.items()}


def read_clips(pieces: Iterable[object], modality: str, place: str, size: int) -> Iterator[Clip]:
    """Yields the clips of an unpickled file, and empties its pieces to free memory.

    Args:
      pieces: dicts, clip name -> list of entries, or clip name -> array [D] or [T, D].
      modality: see `unpack`.
      place: the file, as the start of an error message.
      size: bytes of the file.

    Raises:
      UserError: the content has a different structure; the message names clip and field.
    """
    names, budget, fields = set[str](), _Budget(size), ()
    with prefix_errors(place):
        for piece in pieces:
            clips = _clean_names(piece, names, budget)
            fields = fields or _choose_fields(clips, modality)
            for name in list(clips):
                where = f"clip {show(name)}, {modality}"
                frames = _read_frames(clips.pop(name), fields, where, budget)
                yield Clip(name, place, {modality: frames})


def _clean_names(content: object, known: set[str], budget: "_Budget") -> dict[str, Any]:
    """Returns clip name without `.mp4` -> value, and empties `content` to free memory.

    `known` are the names of all pieces so far.
    """
    if type(content) is not dict:
        raise UserError(f"the pickle contains a {type(content).__name__}, not a dict of clips")
    empty = sum(_is_list(value) and not value for value in content.values())
    budget.take_empty(empty, len(content))
    clips: dict[str, Any] = {}
    repeated = []
    for key in list(content):
        name = _clean_key(key)
        if name in known:
            repeated.append(show(name))
        known.add(name)
        clips[name] = content.pop(key)
    if repeated:
        more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
        raise UserError(f"clips are repeated: {', '.join(repeated[:5])}{more}: keep one of each")
    return clips


def _clean_key(key: object) -> str:
    if type(key) is bytes:
        try:
            key = key.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"clip name '{show(key)}' is not UTF-8") from None
    if type(key) is not str:
        raise UserError(f"a clip name is a {type(key).__name__}, not text")
    return clean_name(key)


class _Budget:
    """The limit of frames, bytes and empty clips of a pickle of `size` bytes.

    Entries may share objects, so a pickle may expand, but only up to this limit.
    """

    def __init__(self, size: int) -> None:
        self._frames, self._bytes = 100_000 + size // 8, 64 * MB + 4 * size
        # An empty clip takes a few bytes of the pickle, but as much time as any other clip.
        self._empty = MAX_EMPTY_CLIPS + size // BYTES_PER_EMPTY_CLIP

    def take_empty(self, num_clips: int, among: int) -> None:
        """Counts empty clips among some clips. Raises UserError if they exceed the limit."""
        self._empty -= num_clips
        if self._empty < 0:
            raise UserError(
                f"{num_clips} of {among} clips are empty: refused; leave out the empty clips"
            )

    def take(self, num_frames: int, num_bytes: int) -> None:
        """Counts frames and bytes. Raises UserError if they exceed the limit."""
        self._frames -= num_frames
        self._bytes -= num_bytes
        if self._frames < 0 or self._bytes < 0:
            raise UserError(
                "the pickle expands to more data than a file of this size may contain: refused; "
                "write each array only once"
            )


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return type(value) in (list, tuple)


def _describe_type(value: object) -> str:
    """Returns the type of a value, for messages."""
    if type(value) is Array:
        return f"array {list(value.shape)} of {np.dtype(value.code)}"
    return type(value).__name__


def _choose_fields(clips: Mapping[str, Any], modality: str) -> tuple[str, ...]:
    """Returns the required fields of entries: of the official file, or of most clips."""
    length = _NUM_FIELDS.get(modality)
    if length is None:
        values = [v[0] if _is_list(v) else v for v in clips.values() if v or type(v) is Array]
        probe = values[:NUM_PROBE_CLIPS]
        lengths = Counter(len(value) if _is_list(value) else 1 for value in probe)
        length = lengths.most_common(1)[0][0] if lengths else 1
    if length not in _ENTRIES:
        raise UserError(f"{modality} entries have {length} fields, wanted 2 to 5, or only arrays")
    return _ENTRIES[length]


def _read_frames(
    value: Any, fields: tuple[str, ...], where: str, budget: _Budget
) -> dict[str, Any]:
    """Returns field -> frames of a clip, as input of `packing.read_frames`."""
    if type(value) is Array and fields == _FEATURE_ONLY:
        count = value.shape[0] if len(value.shape) == 2 else 1
        if not count:
            return {}
        budget.take(count, len(value.data))
        frames = {"features": np.frombuffer(value.data, value.code).reshape(value.shape)}
    elif _is_list(value):
        count = len(value)
        if not count:
            return {}
        budget.take(count, 0)
        entries = [(feature,) for feature in value] if fields == _FEATURE_ONLY else value
        frames = {"features": _join_features(entries, fields, where, budget)}
        for column, field in enumerate(fields[:-1]):
            values = [entry[column] for entry in entries]
            frames[_FIELD_NAMES[field]] = _read_column(values, field, where)
    else:
        wanted = "array" if fields == _FEATURE_ONLY else f"list of [{', '.join(fields)}]"
        raise UserError(f"{where} is of type {_describe_type(value)}, wanted {wanted}")
    if "quality" not in frames and frames["features"].size:  # 0 instead of the norm
        frames["quality"] = FRAME_FIELDS["quality"].default(count)
    return frames


def _join_features(
    entries: Sequence[Any], fields: tuple[str, ...], where: str, budget: _Budget
) -> np.ndarray:
    """Returns the features [T, D] of T entries. Raises UserError if dtypes or widths differ."""
    features: list[Array] = []
    for number, entry in enumerate(entries):
        if not _is_list(entry) or len(entry) != len(fields):
            got = f"is of type {_describe_type(entry)}"
            if _is_list(entry):
                got = f"has {len(entry)} fields"
            raise UserError(f"{where} entry {number}, entry {got}, wanted [{', '.join(fields)}]")
        feature = entry[-1]
        if type(feature) is not Array or len(feature.shape) != 1:
            got = _describe_type(feature)
            raise UserError(f"{where} entry {number}, feature is {got}, wanted an array [D]")
        features.append(feature)
    kinds = [(feature.code, feature.shape[0]) for feature in features]
    common = Counter(kinds).most_common(1)[0][0]
    for number, kind in enumerate(kinds):
        if kind != common:
            got = _describe_type(features[number])
            others = _describe_type(features[kinds.index(common)])
            raise UserError(
                f"{where} entry {number}, feature is {got}, but most are {others}; "
                "all features of a clip need the same length and dtype"
            )
    budget.take(0, len(features) * len(features[0].data))
    joined = b"".join([feature.data for feature in features])
    return np.frombuffer(joined, common[0]).reshape(len(features), common[1])


def _read_column(values: Sequence[Any], field: str, where: str) -> np.ndarray:
    """Returns a field of T entries as integers or float64, in the shape of FRAME_FIELDS."""
    try:
        column = _convert(values, field)
    except (TypeError, OverflowError, ValueError):
        for number, value in enumerate(values):
            try:
                _convert([value], field)
            except (TypeError, OverflowError, ValueError) as error:
                raise UserError(f"{where} entry {number}, {field} {error}") from None
        raise
    return np.array(column).reshape(FRAME_FIELDS[_FIELD_NAMES[field]].shape(len(values)))


def _convert(values: Iterable[Any], field: str) -> array:
    if field == "frame":
        return array("q", map(_parse_number, values))
    if field == "bbox":
        values = itertools.chain.from_iterable(map(_parse_box, values))
    return array("d", values)


def _parse_number(value: Any) -> int:
    if type(value) in (bytes, str) and value.isdigit() and value.isascii():
        return int(value)
    if type(value) is not int or value < 0:
        raise TypeError("must be digits, or a whole number of 0 or more")
    return value


def _parse_box(value: Any) -> Sequence[float]:
    is_array = type(value) is Array and len(value.shape) == 1
    numbers: Any = np.frombuffer(value.data, value.code).tolist() if is_array else value
    if not _is_list(numbers) or len(numbers) != 4:
        raise TypeError("must be four numbers")
    return numbers


if __name__ == "__main__":
    sys.exit(processes.serve(work))
