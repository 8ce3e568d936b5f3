"""The clips of an unpickled file, entry by entry, checked and written to flat files.

Every field of every entry is checked for type, shape and length before it is written, to a fixed
depth: a file can surprise neither this code nor the code that reads the flat files.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vidjax.data.frame_fields import FRAME_FIELDS, PackedClips, usable_rows
from vidjax.data.packing import FlatWriter
from vidjax.data.untrusted.names import clean_name, show
from vidjax.data.untrusted.unpickle import Array, UnpickleError

MB = 1 << 20
BLOCK_BYTES = 8 * MB
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
_FEATURE_CODES = ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "|i1")


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


def _is_list(value: object) -> bool:
    return type(value) in (list, tuple)


def _expect(clips: Mapping[str, Any], modality: str) -> tuple[tuple[str, ...], int, str]:
    """Returns the fields that entries must have, and the width and dtype code of their features.

    Official modalities have fixed fields. All else is decided by the majority of the first entries,
    so that an error names the clip that differs from the rest, even if it is the first one.
    """
    lengths, kinds = Counter(), Counter()
    for value in clips.values():
        # Only the first 200 entries of a clip are seen, unchecked.
        entries: Any = [value] if type(value) is Array else value[:200] if _is_list(value) else []
        for number, entry in enumerate(entries):
            feature = entry[-1] if _is_list(entry) and entry else entry
            if not number:
                lengths[len(entry) if _is_list(entry) else 1] += 1
            if type(feature) is Array and feature.shape and feature.shape[-1] > 0:
                kinds[feature.shape[-1], feature.code] += 1
        if kinds.total() >= 200:
            break
    width, code = kinds.most_common(1)[0][0] if kinds else (0, "<f2")
    length = _NUM_FIELDS.get(modality) or (lengths.most_common(1)[0][0] if lengths else 1)
    if length not in _ENTRIES:
        raise UnpickleError(
            f"{modality} entries have {length} fields, wanted 2 to 5 or bare arrays"
        )
    return _ENTRIES[length], width, code


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


def _kind(value: object) -> str:
    return "array" if type(value) is Array else type(value).__name__


class ClipWriter:
    """Checks the entries of clip after clip and writes them, some clips at once, to flat files."""

    def __init__(
        self, clips: Mapping[str, Any], modality: str, files: FlatWriter, *, size: int, drop: bool
    ) -> None:
        """Decides fields, width and dtype of all entries; UnpickleError if they are unknown.

        `clips` are from `clips_of`, `size` is the bytes of the pickle. Without `drop`, a non-finite
        feature refuses the file; with it, the frame is left out.
        """
        self.modality, self.files, self.drop = modality, files, drop
        self.fields, self.width, self.code = _expect(clips, modality)
        self.native = np.dtype(self.code).newbyteorder("=")
        if self.code not in _FEATURE_CODES:
            kinds = "float16, float32, float64 and int8"
            raise UnpickleError(f"{modality} features are {self.native}, but only {kinds} are read")
        self.row_bytes = self.width * self.native.itemsize
        # Entries may share parts, so a small file can legitimately expand, but only this far.
        self.max_frames = 100_000 + size // 8
        self.max_bytes = 64 * MB + 4 * size
        self.total = 0
        self._start_block()

    def _start_block(self) -> None:
        self.names: list[str] = []
        self.lengths: list[int] = []
        self.chunks: list[bytes | memoryview] = []
        self.values = {
            name: array("i" if field.dtype == "int32" else "d")
            for name, field in FRAME_FIELDS.items()
        }

    def add(self, name: str, value: Any) -> None:
        """Takes one clip's list of entries or array [D] or [T, D]; UnpickleError with its place."""
        place = f"clip {show(name)}, {self.modality}"
        is_list, is_array = _is_list(value), type(value) is Array
        if not is_list and not (is_array and self.fields == _BARE):
            wanted = "array" if self.fields == _BARE else f"list of [{', '.join(self.fields)}]"
            raise UnpickleError(f"{place} is of type {_kind(value)}, wanted {wanted}")
        if not is_list and (value.shape[-1:] != (self.width,) or value.code != self.code):
            raise UnpickleError(f"{place} {self._mismatch(value)}")
        count = len(value) if is_list else value.shape[0] if len(value.shape) == 2 else 1
        self.total += count
        if self.total > self.max_frames or self.total * self.row_bytes > self.max_bytes:
            raise UnpickleError(
                "the pickle repeats its parts beyond what a file of its size may hold"
            )
        if is_list:
            self._add_entries(place, value)
        else:
            self.chunks.append(value.data)
        if count and not self.width:
            raise UnpickleError(f"{place} has width 0")
        if self.fields == _BARE:
            self.values["number"].extend(range(count))
        self.names.append(name)
        self.lengths.append(count)
        if len(self.values["number"]) * self.row_bytes >= BLOCK_BYTES:
            self._write_block()

    def _add_entries(self, place: str, entries: Sequence[Any]) -> None:
        if self.fields == _BARE:
            entries = [(feature,) for feature in entries]
        field, count = "", 0
        try:
            for count, entry in enumerate(entries):  # noqa: B007  (for the error below)
                field = "entry"
                if type(entry) not in (list, tuple) or len(entry) != len(self.fields):
                    raise TypeError(self._misfit(entry))
                feature, field = entry[-1], "feature"
                if (
                    type(feature) is not Array
                    or feature.shape != (self.width,)
                    or feature.code != self.code
                ):
                    raise TypeError(self._mismatch(feature))
                self.chunks.append(feature.data)
            for column, field in enumerate(self.fields[:-1]):
                append = self._appender(field)
                for count, entry in enumerate(entries):  # noqa: B007
                    append(entry[column])
        except (TypeError, OverflowError, ValueError) as error:
            raise UnpickleError(f"{place} entry {count}, {field} {error}") from None

    def _appender(self, field: str) -> Callable[[Any], None]:
        """Returns the function that stores one value of an official field."""
        values = self.values[_FIELD_OF[field]]
        if field == "frame":
            return lambda value: values.append(_frame_number(value))
        if field == "bbox":
            return lambda value: values.extend(_box(value))
        return values.append

    def _misfit(self, entry: Any) -> str:
        nested = _is_list(entry)
        got = f"has {len(entry)} fields" if nested else f"is of type {_kind(entry)}"
        return f"{got}, wanted [{', '.join(self.fields)}]"

    def _mismatch(self, feature: object) -> str:
        if type(feature) is not Array:
            return f"is of type {_kind(feature)}, wanted array"
        if feature.shape[-1:] != (self.width,):
            return f"has width {feature.shape[-1] if feature.shape else 0}, wanted {self.width}"
        if feature.code != self.code:
            return f"is {np.dtype(feature.code)!r}, wanted {np.dtype(self.code)!r} as elsewhere"
        return f"has shape {list(feature.shape)}, wanted [{self.width}]"

    def _write_block(self) -> None:
        self.files.add(self.names, self.lengths, self._blocks())
        self._start_block()

    def _blocks(self) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """Yields frames, field -> [F, ...], and [F] bool to keep; a long clip is several blocks."""
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        columns = {}
        for name, values in self.values.items():
            field = FRAME_FIELDS[name]
            columns[name] = field.default(len(owner))
            if values:
                with np.errstate(over="ignore"):
                    column = np.array(values).astype(field.dtype)
                columns[name] = column.reshape(field.shape(len(owner)))
        chunks = self.chunks
        if ((np.diff(columns["number"]) < 0) & (np.diff(owner) == 0)).any():  # frames go by time
            order = np.lexsort((columns["number"], owner))
            columns = {name: column[order] for name, column in columns.items()}
            chunks = [chunks[i] for i in order.tolist()]  # a bare array is in order
        begin = 0
        for joined in _join(chunks):
            features = np.frombuffer(joined, self.code).reshape(-1, self.width)
            rows = slice(begin, begin + len(features))
            frames = {name: column[rows] for name, column in columns.items()}
            frames["features"] = features.astype(self.native, copy=False)
            keep = usable_rows(frames["features"])
            if not self.drop and not keep.all():
                name = show(self.names[owner[begin + np.argmin(keep)]])
                raise UnpickleError(
                    f"clip {name}, {self.modality} has a feature that is not finite"
                )
            yield frames, keep
            begin = rows.stop

    def finish(self) -> PackedClips:
        """Writes the last block and returns all clips."""
        self._write_block()
        return self.files.finish(self.width if self.total else 0, self.native)


def _join(chunks: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Yields chunks joined to BLOCK_BYTES or a little more; a larger one is not copied."""
    waiting: list[bytes | memoryview] = []
    size = 0
    for chunk in chunks:
        waiting.append(chunk)
        size += len(chunk)
        if size >= BLOCK_BYTES:
            yield waiting[0] if len(waiting) == 1 else b"".join(waiting)
            waiting, size = [], 0
    if size:
        yield b"".join(waiting)
