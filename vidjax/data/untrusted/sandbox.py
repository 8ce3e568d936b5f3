"""Feature pickles as flat arrays, read by a child process in a sandbox.

`unpack` starts the child, which runs this module without jax and TensorFlow. Three barriers:

1. No code runs from the file: `unpickle` resolves only the few globals that numpy writes.
2. Its cost is bounded: address space (on Linux), CPU time and output grow with the size of the
   file, so a few bytes that ask for much end in a clear error.
3. Its structure is checked: `read_clips` tests every field, and `packing` the clips, before they
   are written to flat arrays.
"""

import contextlib
import gc
import itertools
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from vidjax.data import processes
from vidjax.data.frame_fields import FRAME_FIELDS, STORED, NonFinite, PackedClips
from vidjax.data.packing import PROBE_CLIPS, Clip, Packer
from vidjax.data.untrusted.names import clean_name, show
from vidjax.data.untrusted.unpickle import Array, load
from vidjax.utils.errors import DiskError, NoFileError, UserError, named

MB = 1 << 20
# Honest files load at tens of MB per CPU second, so a machine may be 30 times slower.
CPU_SECONDS = 2
CPU_BYTES_PER_SECOND = 2 * MB
READ_BYTES = MB // 16


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Writes the clips of one pickle to flat files in a folder, in this process.

    `arguments` are those of `unpack`; returns `PackedClips.summary`.
    """
    path, out_dir = Path(arguments["path"]), Path(arguments["out_dir"])
    modality = arguments["modality"]
    # Nothing here forms reference cycles, and collecting among millions of lists costs a third.
    gc.disable()
    try:
        with path.open("rb", buffering=READ_BYTES) as file:
            size = os.fstat(file.fileno()).st_size
            with named(str(path)):
                content = load(file, size)
        with Packer(modality, out_dir, arguments["non_finite"]) as packer:
            for clip in read_clips(content, modality, str(path), size):
                packer.add(clip, clip.modalities[modality])
            return packer.finish().summary()
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiskError(f"{path}: cannot be read, or not written to {out_dir}: {reason}") from None


def unpack(
    path: str | os.PathLike[str],
    modality: str,
    out_dir: str | os.PathLike[str],
    *,
    non_finite: NonFinite = "drop",
    children: processes.Children | None = None,
) -> PackedClips:
    """Reads one feature pickle in a sandbox into flat files; returns them as memory-mapped arrays.

    Args:
      path: the pickle: clip name -> list of entries, or -> array [D] or [T, D].
      modality: `face`, `head`, `body`, `audio` and `scene` have the entries of the official files;
        for any other name, the entries of most clips decide which fields all must have.
      out_dir: a folder for this call alone, made if missing. Its files must outlive the arrays.
      non_finite: 'drop' skips and counts frames whose feature holds a NaN or an Inf; 'error'
        refuses the file.
      children: the group that the child joins, so that another thread can kill it.

    Raises:
      ValueError: the file is refused, damaged, truncated or of another structure than its
        modality; names file, clip and field.
    """
    path, out_dir = Path(path), Path(out_dir)
    if not path.exists():
        raise NoFileError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a regular file: put the file there, or rename what is there")
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
        return PackedClips.of_flat_files(out_dir, summary)
    except BaseException:
        for field in STORED:
            with contextlib.suppress(OSError):
                (out_dir / f"{field}.bin").unlink()
        raise


# The entries of an unpickled file. Every value comes from a stranger: the functions below test its
# type before they use it, to a fixed depth.

MOST_EMPTY, BYTES_PER_EMPTY = 100_000, 64  # clips without an entry: so many, and one per 64 bytes

_BARE = ("feature",)
# Fields of an entry, by their number, as the official files name them.
_ENTRIES: dict[int, tuple[str, ...]] = {
    5: ("frame", "bbox", "det_score", "quality_score", "feature"),
    4: ("frame", "bbox", "det_score", "feature"),
    3: ("frame", "bbox", "feature"),
    2: ("frame", "feature"),
    1: _BARE,
}
_NUM_FIELDS = {"face": 5, "head": 4, "body": 3, "scene": 2, "audio": 1}
_FIELD_OF = {field.official: name for name, field in FRAME_FIELDS.items()}


def read_clips(content: object, modality: str, place: str, size: int) -> Iterator[Clip]:
    """Yields the clips of an unpickled file of one modality; empties `content`, to free memory.

    Args:
      content: clip name -> list of entries, or -> array [D] or [T, D].
      modality: see `unpack`.
      place: the file, the start of an error message.
      size: bytes of the file.

    Raises:
      UserError: the content has another structure; the message names clip and field.
    """
    with named(place):
        clips = _by_name(content, size)
        fields, budget = _fields_of(clips, modality), _Budget(size)
        for name in list(clips):
            frames = _frames_of(clips.pop(name), fields, f"clip {show(name)}, {modality}", budget)
            yield Clip(name, place, {modality: frames})


def _by_name(content: object, size: int) -> dict[str, Any]:
    """Returns a dict: clip name without `.mp4` -> value. Empties `content`, to free memory."""
    if type(content) is not dict:
        raise UserError(f"the pickle holds a {type(content).__name__}, not a dict of clips")
    # An empty clip takes a few bytes of the pickle, but as much time as a real one.
    empty = sum(_is_list(value) and not value for value in content.values())
    if empty > MOST_EMPTY + size // BYTES_PER_EMPTY:
        raise UserError(f"{empty} of {len(content)} clips are empty: refused")
    clips: dict[str, Any] = {}
    repeated = []
    for key in list(content):
        name = _clip_name(key)
        if name in clips:
            repeated.append(show(name))
        clips[name] = content.pop(key)
    if repeated:
        more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
        raise UserError(f"duplicate clips: {', '.join(repeated[:5])}{more}")
    return clips


def _clip_name(key: object) -> str:
    if type(key) is bytes:
        try:
            key = key.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"clip name '{show(key)}' is not UTF-8") from None
    if type(key) is not str:
        raise UserError(f"a clip name is a {type(key).__name__}, not text")
    return clean_name(key)


class _Budget:
    """Frames and bytes that a file of `size` bytes may still hold.

    Entries may share parts, so a small file can legitimately expand, but only this far.
    """

    def __init__(self, size: int) -> None:
        self._frames, self._bytes = 100_000 + size // 8, 64 * MB + 4 * size

    def take(self, num_frames: int, num_bytes: int) -> None:
        """Counts frames and bytes; raises UserError if they are too many."""
        self._frames -= num_frames
        self._bytes -= num_bytes
        if self._frames < 0 or self._bytes < 0:
            raise UserError("the pickle repeats its parts beyond what a file of its size may hold")


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return type(value) in (list, tuple)


def _kind(value: object) -> str:
    """Returns the type of a value, for messages."""
    if type(value) is Array:
        return f"array {list(value.shape)} of {np.dtype(value.code)}"
    return type(value).__name__


def _fields_of(clips: Mapping[str, Any], modality: str) -> tuple[str, ...]:
    """Returns the fields that entries must have: those of the official file, or of most clips."""
    length = _NUM_FIELDS.get(modality)
    if length is None:
        firsts = [v[0] if _is_list(v) else v for v in clips.values() if v or type(v) is Array]
        lengths = Counter(len(one) if _is_list(one) else 1 for one in firsts[:PROBE_CLIPS])
        length = lengths.most_common(1)[0][0] if lengths else 1
    if length not in _ENTRIES:
        raise UserError(f"{modality} entries have {length} fields, wanted 2 to 5 or bare arrays")
    return _ENTRIES[length]


def _frames_of(value: Any, fields: tuple[str, ...], where: str, budget: _Budget) -> dict[str, Any]:
    """Returns field -> frames of one clip, as `packing.read_frames` takes them."""
    if type(value) is Array and fields == _BARE:
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
        entries = [(feature,) for feature in value] if fields == _BARE else value
        frames = {"features": _join_features(entries, fields, where, budget)}
        for column, field in enumerate(fields[:-1]):
            values = [entry[column] for entry in entries]
            frames[_FIELD_OF[field]] = _read_column(values, field, where)
    else:
        wanted = "array" if fields == _BARE else f"list of [{', '.join(fields)}]"
        raise UserError(f"{where} is of type {_kind(value)}, wanted {wanted}")
    if "quality" not in frames and frames["features"].size:  # it is 0, and no norm
        frames["quality"] = FRAME_FIELDS["quality"].default(count)
    return frames


def _join_features(
    entries: Sequence[Any], fields: tuple[str, ...], where: str, budget: _Budget
) -> np.ndarray:
    """Returns the features of some entries, [T, D]; UserError unless all are of one kind."""
    features: list[Array] = []
    for number, entry in enumerate(entries):
        if not _is_list(entry) or len(entry) != len(fields):
            got = f"has {len(entry)} fields" if _is_list(entry) else f"is of type {_kind(entry)}"
            raise UserError(f"{where} entry {number}, entry {got}, wanted [{', '.join(fields)}]")
        feature = entry[-1]
        if type(feature) is not Array or len(feature.shape) != 1:
            got = _kind(feature)
            raise UserError(f"{where} entry {number}, feature is {got}, wanted an array [D]")
        features.append(feature)
    kinds = [(feature.code, feature.shape[0]) for feature in features]
    most = Counter(kinds).most_common(1)[0][0]
    for number, kind in enumerate(kinds):
        if kind != most:
            got, others = _kind(features[number]), _kind(features[kinds.index(most)])
            raise UserError(f"{where} entry {number}, feature is {got}, others {others}")
    budget.take(0, len(features) * len(features[0].data))
    joined = b"".join([feature.data for feature in features])
    return np.frombuffer(joined, most[0]).reshape(len(features), most[1])


def _read_column(values: Sequence[Any], field: str, where: str) -> np.ndarray:
    """Returns one field of T entries, whole numbers or float64, in its shape of FRAME_FIELDS."""
    try:
        found = _convert(values, field)
    except (TypeError, OverflowError, ValueError):
        for number, value in enumerate(values):
            try:
                _convert([value], field)
            except (TypeError, OverflowError, ValueError) as error:
                raise UserError(f"{where} entry {number}, {field} {error}") from None
        raise
    return np.array(found).reshape(FRAME_FIELDS[_FIELD_OF[field]].shape(len(values)))


def _convert(values: Sequence[Any], field: str) -> array:
    if field == "frame":
        return array("q", map(_frame_number, values))
    return array(
        "d", itertools.chain.from_iterable(map(_box, values)) if field == "bbox" else values
    )


def _frame_number(value: Any) -> int:
    if type(value) in (bytes, str) and value.isdigit() and value.isascii():
        return int(value)
    if type(value) is not int or value < 0:
        raise TypeError("must be digits or a whole number from 0 up")
    return value


def _box(value: Any) -> Sequence[float]:
    is_array = type(value) is Array and len(value.shape) == 1
    numbers: Any = np.frombuffer(value.data, value.code).tolist() if is_array else value
    if not _is_list(numbers) or len(numbers) != 4:
        raise TypeError("must be four numbers")
    return numbers


if __name__ == "__main__":
    sys.exit(processes.serve(work))
