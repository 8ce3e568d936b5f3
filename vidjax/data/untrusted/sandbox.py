"""Reads pickles of features in a child process with limits, because a stranger may have made them.

`unpack` starts the child process, which runs this module. There are three barriers:

1. No code from the file runs, because `unpickle` resolves only the few globals that numpy writes.
2. The address space (on Linux), the CPU time and the output are limited. The limits grow with the
   size of the file, so a small file that expands to gigabytes causes an error.
3. The type and shape of every field are checked. Only then is the field written to the files that
   the parent process reads.
"""

import contextlib
import gc
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from vidjax.data.packed_clips import FRAME_FIELDS, PackedClips, Summary, open_packed, summarise
from vidjax.data.packing import NUM_PROBE_CLIPS, Clip, Packer
from vidjax.data.untrusted.pieces import load_pieces
from vidjax.data.untrusted.unpickle import REMEDY, Array, load
from vidjax.utils import processes
from vidjax.utils.errors import DiskError, UserError, prefix_errors
from vidjax.utils.names import ENDING, clean_name, show

MB = 1 << 20
# Normal files load at tens of MB per CPU second, so the limit allows a much slower machine.
CPU_SECONDS = 2
CPU_BYTES_PER_SECOND = 2 * MB
READ_BYTES = MB // 16


def work(arguments: dict[str, Any]) -> Summary:
    """Reads a pickle in the child process, writes its frames to files, and describes the clips.

    `arguments` has the arguments `path`, `modality` and `out_dir` of `unpack`.
    """
    path, out_dir = Path(arguments["path"]), Path(arguments["out_dir"])
    modality = arguments["modality"]
    # Garbage collection would take a third of the time, but there are no reference cycles.
    gc.disable()
    try:
        with path.open("rb", buffering=READ_BYTES) as file:
            size = os.fstat(file.fileno()).st_size

            def pack(pieces: Iterator[object]) -> Summary:
                with Packer(modality, out_dir) as packer:
                    for clip in read_clips(pieces, modality, str(path), size):
                        packer.add(clip, clip.modalities[modality])
                    return summarise(modality, packer.finish())

            with contextlib.suppress(Exception):
                return pack(load_pieces(file, size))
            # Some pickles have to be loaded as a whole. This call also raises the right error.
            return pack(load(file, size) for _ in range(1))
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiskError(f"'{path}' cannot be converted to files in {out_dir}: {reason}") from None


def unpack(
    path: Path, modality: str, out_dir: Path, *, children: processes.Children | None = None
) -> PackedClips:
    """Reads a pickle of features in a child process with limits.

    The pickle contains a dict, clip -> list of frames. A frame is a list, such as [frame number,
    feature]. If frames have only features, the dict is clip -> features, [D] or [T, D]. The lists
    of 'face', 'head', 'body', 'audio' and 'scene' have the same items as in the iQIYI-VID dataset.
    For any other modality, each of these layouts is allowed.

    The returned arrays are memory maps of files in `out_dir`. Keep `out_dir` as long as the arrays.
    No other call may use this folder. `children` lets another thread kill the child process.
    Raises UserError if the pickle is malformed, or exceeds a limit.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size
    summary = processes.run_limited(
        __name__,
        path,
        {"path": str(path), "modality": modality, "out_dir": str(out_dir)},
        Summary,
        memory_bytes=512 * MB + 4 * size,
        cpu_seconds=CPU_SECONDS + size // CPU_BYTES_PER_SECOND,
        output_bytes=processes.OUTPUT_BYTES + 4 * size,  # the names of the clips
        writes=[out_dir],
        children=children,
    )
    with processes.doubt(path):
        return open_packed(modality, out_dir, summary)


# Every value of an unpickled file comes from a stranger. So the functions below check its type
# before they use it, to a fixed depth.

# A pickle may have MAX_EMPTY_CLIPS clips without frames, plus 1 per BYTES_PER_EMPTY_CLIP bytes.
MAX_EMPTY_CLIPS, BYTES_PER_EMPTY_CLIP = 100_000, 64

_FEATURE_ONLY = ("feature",)
# Number of fields of an entry -> their names in the official files.
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
    """Checks `pieces`, unpickled dicts as in `unpack`, and yields their clips.

    `size` is the number of bytes of the file. If the clips are too large for a file of this size,
    raises UserError. Error messages begin with `place`. The dicts are emptied to free memory.
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
    """Returns `content`, a dict with clips as keys, without `.mp4` in the keys.

    Raises UserError if a key is not a valid name, or is already in `known`. Adds the keys to
    `known`. Empties `content` to free memory.
    """
    if type(content) is not dict:
        raise UserError(
            f"the pickle contains a {type(content).__name__}, not a dict of clips: {REMEDY}"
        )
    empty = sum(_is_list(value) and not value for value in content.values())
    budget.empty -= empty
    if budget.empty < 0:
        raise UserError(
            f"{empty} of {len(content)} clips are empty, which is too many: "
            "leave out the empty clips"
        )
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
        raise UserError(
            f"clips are repeated: {', '.join(repeated[:5])}{more}: keep one of each. "
            f"Names with and without {ENDING} count as equal"
        )
    return clips


def _clean_key(key: object) -> str:
    if type(key) is bytes:
        try:
            key = key.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"clip name '{show(key)}' is not UTF-8: rename the clip") from None
    if type(key) is not str:
        raise UserError(f"a clip name is of type {type(key).__name__}: convert it with str()")
    return clean_name(key)


class _Budget:
    """Limits the frames, bytes and clips without frames that a pickle of `size` bytes may contain.

    Without limits, a small pickle could fill the memory, because clips may share an array.
    """

    def __init__(self, size: int) -> None:
        self._frames, self._bytes = 100_000 + size // 8, 64 * MB + 4 * size
        # An empty clip takes a few bytes of the pickle, but as much time as any other clip.
        self.empty = MAX_EMPTY_CLIPS + size // BYTES_PER_EMPTY_CLIP

    def take(self, frames: int = 0, size: int = 0) -> None:
        """Subtracts frames and bytes from the budget. If nothing is left, raises UserError."""
        self._frames -= frames
        self._bytes -= size
        if self._frames < 0 or self._bytes < 0:
            raise UserError(
                "the pickle is refused, because it expands to more data than a file of this size "
                "may contain: write each array only once"
            )


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return type(value) in (list, tuple)


def _describe_type(value: object) -> str:
    if type(value) is Array:
        return f"array {list(value.shape)} of {np.dtype(value.code)}"
    return type(value).__name__


def _choose_fields(clips: Mapping[str, Any], modality: str) -> tuple[str, ...]:
    """Returns the names of the values that a frame has in a pickle, such as ('frame', 'feature').

    The number of values decides the names. Each modality of iQIYI-VID has a fixed number. For other
    modalities, the number is the most common number of values in the first clips.
    """
    length = _NUM_FIELDS.get(modality)
    if length is None:
        values = [v[0] if _is_list(v) else v for v in clips.values() if v or type(v) is Array]
        probe = values[:NUM_PROBE_CLIPS]
        lengths = Counter(len(value) if _is_list(value) else 1 for value in probe)
        length = lengths.most_common(1)[0][0] if lengths else 1
    if length not in _ENTRIES:
        raise UserError(
            f"the frames of {modality} are lists of {length} fields, but must have 1 to 5 "
            f"({', '.join(_ENTRIES[5])}): {REMEDY}"
        )
    return _ENTRIES[length]


def _read_frames(
    value: Any, fields: tuple[str, ...], where: str, budget: _Budget
) -> dict[str, Any]:
    """Checks `value`, the frames of a clip. Returns field -> array, or {} without frames.

    `fields` are the names of a frame's values in iQIYI-VID, such as `det_score`. The fields of the
    result have the names of vidjax, such as `detection`. Error messages begin with `where`.
    """
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
        budget.take(count)
        entries = [(feature,) for feature in value] if fields == _FEATURE_ONLY else value
        frames = {"features": _join_features(entries, fields, where, budget)}
        for column, field in enumerate(fields):
            if field in _FIELD_NAMES:  # boxes are not read
                values = [entry[column] for entry in entries]
                frames[_FIELD_NAMES[field]] = _read_column(values, field, where)
    else:
        wanted = "an array" if fields == _FEATURE_ONLY else f"a list of [{', '.join(fields)}]"
        raise UserError(f"{where} is of type {_describe_type(value)}: write {wanted}")
    if "quality" not in frames and frames["features"].size:  # otherwise the norm would be used
        frames["quality"] = FRAME_FIELDS["quality"].default(count)
    return frames


def _join_features(
    entries: Sequence[Any], fields: tuple[str, ...], where: str, budget: _Budget
) -> np.ndarray:
    """Checks the T frames of a clip, and returns their features [T, D].

    Each entry is a list with a value for each of `fields`. The last value is the feature. Error
    messages begin with `where`.
    """
    features: list[Array] = []
    for number, entry in enumerate(entries):
        if not _is_list(entry) or len(entry) != len(fields):
            got = f"is of type {_describe_type(entry)}"
            if _is_list(entry):
                got = f"has {len(entry)} fields"
            raise UserError(f"{where} entry {number} {got}, but must be [{', '.join(fields)}]")
        feature = entry[-1]
        if type(feature) is not Array or len(feature.shape) != 1:
            got = _describe_type(feature)
            raise UserError(f"{where} entry {number}: its feature is {got}: write a 1-D array")
        features.append(feature)
    kinds = [(feature.code, feature.shape[0]) for feature in features]
    common = Counter(kinds).most_common(1)[0][0]
    for number, kind in enumerate(kinds):
        if kind != common:
            got = _describe_type(features[number])
            others = _describe_type(features[kinds.index(common)])
            raise UserError(
                f"{where} entry {number}: its feature is {got}, but most are {others}: "
                "write features of equal length and dtype"
            )
    budget.take(size=len(features) * len(features[0].data))
    joined = b"".join([feature.data for feature in features])
    return np.frombuffer(joined, common[0]).reshape(len(features), common[1])


def _read_column(values: Sequence[Any], field: str, where: str) -> np.ndarray:
    """Converts the values of a field to [T] int64 (field 'frame') or float64 (other fields).

    If a value is not a number, raises UserError, whose message begins with `where`.
    """
    try:
        column = _convert(values, field)
    except (TypeError, OverflowError, ValueError):
        for number, value in enumerate(values):
            try:
                _convert([value], field)
            except (TypeError, OverflowError, ValueError) as error:
                raise UserError(f"{where} entry {number}, {field} {error}") from None
        raise
    return np.array(column)


def _convert(values: Iterable[Any], field: str) -> array:
    if field == "frame":
        return array("q", map(_parse_number, values))
    return array("d", values)


def _parse_number(value: Any) -> int:
    if type(value) in (bytes, str) and value.isdigit() and value.isascii():
        return int(value)
    if type(value) is not int or value < 0:
        raise TypeError("must be a whole number of 0 or more, such as 7 or '7'")
    return value


if __name__ == "__main__":
    processes.serve(work)
