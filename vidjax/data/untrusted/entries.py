"""The entries of an unpickled file as clips, which `packing` checks like all other features.

Every value comes from a stranger: this module tests its type before it uses it, to a fixed depth.
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.packing import PROBE_CLIPS, Clip
from vidjax.data.untrusted.names import clean_name, show
from vidjax.data.untrusted.unpickle import Array, UnpickleError

MB = 1 << 20
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
      modality: `face`, `head`, `body`, `audio` and `scene` have the entries of the official files;
        for any other name, the entries of most clips decide which fields all must have.
      place: the file, the start of an error message of `packing`.
      size: bytes of the file.

    Raises:
      UnpickleError: the content has another structure; the message names clip and field.
    """
    refuse_empty(content, size)
    clips = clips_of(content)
    fields, budget = _fields_of(clips, modality), _Budget(size)
    for name in list(clips):
        where = f"clip {show(name)}, {modality}"
        frames = _frames_of(clips.pop(name), fields, where, budget)
        yield Clip(name, place, {modality: frames})


def clips_of(content: object) -> dict[str, Any]:
    """Returns a dict: clip name without `.mp4` -> value. Empties `content`, to free memory."""
    if type(content) is not dict:
        raise UnpickleError(f"the pickle holds a {type(content).__name__}, not a dict of clips")
    clips: dict[str, Any] = {}
    repeated = []
    for key in list(content):
        name = _clip_name(key)
        if name in clips:
            repeated.append(show(name))
        clips[name] = content.pop(key)
    if repeated:
        more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
        raise UnpickleError(f"duplicate clips: {', '.join(repeated[:5])}{more}")
    return clips


def refuse_empty(content: object, size: int) -> None:
    """Raises UnpickleError for far more clips without an entry than an honest file has.

    An empty clip takes a few of the `size` bytes of the pickle, but as much time as a real one.
    """
    if type(content) is dict:
        empty = sum(_is_list(value) and not value for value in content.values())
        if empty > MOST_EMPTY + size // BYTES_PER_EMPTY:
            raise UnpickleError(f"{empty} of {len(content)} clips are empty: refused")


def _clip_name(key: object) -> str:
    if type(key) is bytes:
        try:
            key = key.decode("utf-8")
        except UnicodeDecodeError:
            raise UnpickleError(f"clip name '{show(key)}' is not UTF-8") from None
    if type(key) is not str:
        raise UnpickleError(f"a clip name is a {type(key).__name__}, not text")
    try:
        return clean_name(key)
    except ValueError as error:
        raise UnpickleError(str(error)) from None


class _Budget:
    """Frames and bytes that a file of `size` bytes may still hold.

    Entries may share parts, so a small file can legitimately expand, but only this far.
    """

    def __init__(self, size: int) -> None:
        self._frames, self._bytes = 100_000 + size // 8, 64 * MB + 4 * size

    def take(self, num_frames: int, num_bytes: int) -> None:
        """Counts frames and bytes; raises UnpickleError if they are too many."""
        self._frames -= num_frames
        self._bytes -= num_bytes
        if self._frames < 0 or self._bytes < 0:
            raise UnpickleError(
                "the pickle repeats its parts beyond what a file of its size may hold"
            )


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return type(value) in (list, tuple)


def _kind(value: object) -> str:
    return "array" if type(value) is Array else type(value).__name__


def _fields_of(clips: Mapping[str, Any], modality: str) -> tuple[str, ...]:
    """Returns the fields that entries must have: those of the official file, or of most clips."""
    length = _NUM_FIELDS.get(modality)
    if length is None:
        firsts = [v[0] if _is_list(v) else v for v in clips.values() if v or type(v) is Array]
        lengths = Counter(len(one) if _is_list(one) else 1 for one in firsts[:PROBE_CLIPS])
        length = lengths.most_common(1)[0][0] if lengths else 1
    if length not in _ENTRIES:
        raise UnpickleError(
            f"{modality} entries have {length} fields, wanted 2 to 5 or bare arrays"
        )
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
        raise UnpickleError(f"{where} is of type {_kind(value)}, wanted {wanted}")
    if "quality" not in frames and frames["features"].size:  # it is 0, and no norm
        frames["quality"] = FRAME_FIELDS["quality"].default(count)
    return frames


def _join_features(
    entries: Sequence[Any], fields: tuple[str, ...], where: str, budget: _Budget
) -> np.ndarray:
    """Returns the features of some entries, [T, D]; UnpickleError unless all have one shape."""
    features: list[Array] = []
    for number, entry in enumerate(entries):
        if type(entry) not in (list, tuple) or len(entry) != len(fields):
            got = f"has {len(entry)} fields" if _is_list(entry) else f"is of type {_kind(entry)}"
            wanted = ", ".join(fields)
            raise UnpickleError(f"{where} entry {number}, entry {got}, wanted [{wanted}]")
        feature = entry[-1]
        if type(feature) is not Array or len(feature.shape) != 1:
            got = f"an array {list(feature.shape)}" if type(feature) is Array else _kind(feature)
            raise UnpickleError(f"{where} entry {number}, feature is {got}, wanted an array [D]")
        features.append(feature)
    kinds = [(feature.shape[0], feature.code) for feature in features]
    width, code = most = Counter(kinds).most_common(1)[0][0]
    for number, (own, dtype) in enumerate(kinds):
        if (own, dtype) != most:
            got = f"has width {own}, others {width}"
            if own == width:
                got = f"is {np.dtype(dtype)!r}, others {np.dtype(code)!r}"
            raise UnpickleError(f"{where} entry {number}, feature {got}")
    budget.take(0, len(features) * len(features[0].data))
    joined = b"".join([feature.data for feature in features])
    return np.frombuffer(joined, code).reshape(len(features), width)


def _read_column(values: Sequence[Any], field: str, where: str) -> np.ndarray:
    """Returns one field of T entries, whole numbers or float64, in its shape of FRAME_FIELDS."""
    convert = _COLUMNS.get(field, _scores)
    try:
        found = convert(values)
    except (TypeError, OverflowError, ValueError):
        for number, value in enumerate(values):
            try:
                convert([value])
            except (TypeError, OverflowError, ValueError) as error:
                raise UnpickleError(f"{where} entry {number}, {field} {error}") from None
        raise
    return np.array(found).reshape(FRAME_FIELDS[_FIELD_OF[field]].shape(len(values)))


def _frame_number(value: Any) -> int:
    if type(value) in (bytes, str) and value.isdigit() and value.isascii():
        return int(value)
    if type(value) is not int or value < 0:
        raise TypeError("must be digits or a whole number from 0 up")
    return value


def _box(value: Any) -> Sequence[float]:
    is_array = type(value) is Array and len(value.shape) == 1
    numbers: Any = np.frombuffer(value.data, value.code).tolist() if is_array else value
    if type(numbers) not in (list, tuple) or len(numbers) != 4:
        raise TypeError("must be four numbers")
    return numbers


def _numbers(values: Sequence[Any]) -> array:
    return array("q", map(_frame_number, values))


def _boxes(values: Sequence[Any]) -> array:
    return array("d", itertools.chain.from_iterable(map(_box, values)))


def _scores(values: Sequence[Any]) -> array:
    return array("d", values)


_COLUMNS = {"frame": _numbers, "bbox": _boxes}
