"""The clips of an unpickled file, entry by entry, checked and written to flat files.

Every field of every entry is checked for type, shape and length before it is written, to a fixed
depth: a file can surprise neither this code nor the code that reads the flat files.
"""

import operator
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from vidjax.data.frame_fields import FRAME_FIELDS, counts, usable_rows
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
_MODALITIES = {
    "face": _ENTRIES[5],
    "head": _ENTRIES[4],
    "body": _ENTRIES[3],
    "scene": _ENTRIES[2],
    "audio": _BARE,
}
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
        empty = sum(type(value) in (list, tuple) and not value for value in content.values())
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


def _features_of(value: Any) -> list[Any]:
    """Returns the features of a clip's first 200 entries, unchecked."""
    if type(value) is Array:
        return [value]
    entries = value[:200] if type(value) in (list, tuple) else ()
    return [e[-1] if type(e) in (list, tuple) and e else e for e in entries]


def _expect(clips: Mapping[str, Any], modality: str) -> tuple[tuple[str, ...], int, str]:
    """Returns the fields that entries must have, and the width and dtype code of their features.

    Official modalities have fixed fields. All else is decided by the majority of the first entries,
    so that an error names the clip that differs from the rest, even if it is the first one.
    """
    lengths, kinds = Counter(), Counter()
    for value in clips.values():
        if type(value) is Array:
            lengths[1] += 1
        elif type(value) in (list, tuple) and value:
            lengths[len(value[0]) if type(value[0]) in (list, tuple) else 1] += 1
        for feature in _features_of(value):
            if type(feature) is Array and feature.shape and feature.shape[-1] > 0:
                kinds[feature.shape[-1], feature.code] += 1
        if kinds.total() >= 200:
            break
    width, code = kinds.most_common(1)[0][0] if kinds else (0, "<f2")
    length = lengths.most_common(1)[0][0] if lengths else 1
    fields = _MODALITIES.get(modality) or _ENTRIES.get(length)
    if fields is None:
        raise UnpickleError(
            f"{modality} entries have {length} fields, wanted 2 to 5 or bare arrays"
        )
    return fields, width, code


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
    """Checks the entries of clip after clip and appends them, block by block, to the flat files."""

    def __init__(
        self,
        clips: Mapping[str, Any],
        modality: str,
        files: Mapping[str, BinaryIO],
        *,
        size: int,
        drop: bool,
    ) -> None:
        """Decides fields, width and dtype of all entries; UnpickleError if they are unknown.

        `clips` are from `clips_of`, `files` one per field of STORED, `size` the bytes of the
        pickle. Without `drop`, a non-finite feature refuses the file; with it, the frame is left
        out.
        """
        self.names, self.modality, self.files, self.drop = list(clips), modality, files, drop
        self.fields, self.width, self.code = _expect(clips, modality)
        self.native = np.dtype(self.code).newbyteorder("=")
        if self.code not in _FEATURE_CODES:
            kinds = "float16, float32, float64 and int8"
            raise UnpickleError(f"{modality} features are {self.native}, but only {kinds} are read")
        self.row_bytes = self.width * self.native.itemsize
        self.block_frames = max(1, BLOCK_BYTES // max(1, self.row_bytes))
        # Entries may share parts, so a small file can legitimately expand, but only this far.
        self.max_frames = 100_000 + size // 8
        self.max_bytes = 64 * MB + 4 * size
        self.seen = np.zeros(len(clips), np.int64)
        self.kept = np.zeros(len(clips), np.int64)
        self.total = 0
        self.warnings = Counter()
        self._start_block()

    def _start_block(self) -> None:
        self.owners: list[tuple[int, int]] = []
        self.chunks: list[bytes | memoryview] = []
        self.values = {
            name: array("i" if field.dtype == "int32" else "d")
            for name, field in FRAME_FIELDS.items()
        }

    def add(self, clip: int, value: Any) -> None:
        """Takes one clip's list of entries or array [D] or [T, D]; UnpickleError with its place."""
        if type(value) in (list, tuple):
            value = self._by_time(value)
            for start in range(0, len(value), self.block_frames):
                self._add_entries(clip, value, start)
        elif type(value) is Array and self.fields == _BARE:
            self._add_rows(clip, value)
        else:
            wanted = "array" if self.fields == _BARE else f"list of [{', '.join(self.fields)}]"
            raise UnpickleError(f"{self._clip(clip)} is of type {_kind(value)}, wanted {wanted}")

    def _by_time(self, entries: Sequence[Any]) -> Sequence[Any]:
        """Returns entries in the order of their frame numbers; as they are if one has none."""
        if self.fields[0] != "frame":
            return entries
        try:
            numbers = [_frame_number(entry[0]) for entry in entries]
        except (TypeError, LookupError, ValueError):
            return entries  # the checks that follow say where the mistake is
        if all(map(operator.le, numbers, numbers[1:])):
            return entries
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        return [entries[number] for number in order]

    def _clip(self, clip: int) -> str:
        return f"clip {show(self.names[clip])}, {self.modality}"

    def _add_rows(self, clip: int, value: Array) -> None:
        if not value.shape or value.shape[-1] != self.width or value.code != self.code:
            raise UnpickleError(f"{self._clip(clip)} {self._mismatch(value)}")
        rows = value.shape[0] if len(value.shape) == 2 else 1
        data = memoryview(value.data)
        for start in range(0, rows, self.block_frames):
            stop = min(start + self.block_frames, rows)
            self.chunks.append(data[start * self.row_bytes : stop * self.row_bytes])
            self.values["number"].extend(range(start, stop))
            self._close(clip, stop - start)

    def _add_entries(self, clip: int, value: Sequence[Any], start: int) -> None:
        stop = min(start + self.block_frames, len(value))
        entries = value[start:stop]
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
            for place, field in enumerate(self.fields[:-1]):
                append = self._appender(field)
                for count, entry in enumerate(entries):  # noqa: B007
                    append(entry[place])
        except (TypeError, OverflowError, ValueError) as error:
            place = f"{self._clip(clip)} entry {start + count}"
            raise UnpickleError(f"{place}, {field} {error}") from None
        if self.fields == _BARE:
            self.values["number"].extend(range(start, stop))
        self._close(clip, stop - start)

    def _appender(self, field: str) -> Callable[[Any], None]:
        """Returns the function that stores one value of an official field."""
        values = self.values[_FIELD_OF[field]]
        if field == "frame":
            return lambda value: values.append(_frame_number(value))
        if field == "bbox":
            return lambda value: values.extend(_box(value))
        return values.append

    def _misfit(self, entry: Any) -> str:
        nested = type(entry) in (list, tuple)
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

    def _close(self, clip: int, count: int) -> None:
        self.owners.append((clip, count))
        self.seen[clip] += count
        self.total += count
        if self.total > self.max_frames or self.total * self.row_bytes > self.max_bytes:
            raise UnpickleError(
                "the pickle repeats its parts beyond what a file of its size may hold"
            )
        if len(self.values["number"]) >= self.block_frames:
            self._write_block()

    def _write_block(self) -> None:
        if self.width == 0:
            raise UnpickleError(f"{self._clip(self.owners[0][0])} has width 0")
        block = np.frombuffer(b"".join(self.chunks), self.code).reshape(-1, self.width)
        block = block.astype(self.native, copy=False)  # [F, D]
        owner = np.repeat(*np.array(self.owners).T)  # [F]
        keep = usable_rows(block)  # [F]
        if not keep.all():
            if not self.drop:
                raise UnpickleError(
                    f"{self._clip(owner[~keep][0])} has a feature that is not finite"
                )
            block = block[keep]
        np.add.at(self.kept, owner[keep], 1)
        self.files["features"].write(block.data)
        for name, values in self.values.items():
            self.files[name].write(self._column(name, values, keep).data)
        self._start_block()

    def _column(self, name: str, values: array, keep: np.ndarray) -> np.ndarray:
        """Returns values at `keep` [F] bool, 0 if not finite; defaults if `values` is empty."""
        field = FRAME_FIELDS[name]
        if not values:
            return field.default(len(keep))[keep]
        with np.errstate(over="ignore"):
            column = np.array(values).astype(field.dtype).reshape(field.shape(len(keep)))[keep]
        finite = np.isfinite(column)
        if not finite.all():
            frames = finite.reshape(len(column), -1).all(axis=1)
            self.warnings[f"non_finite_{name}"] += int(np.sum(~frames))
            column[~finite] = 0.0
        return column

    def finish(self) -> dict[str, Any]:
        """Writes the last block and returns the summary that the parent reads."""
        if self.owners:
            self._write_block()
        return {
            "names": self.names,
            "lengths": self.kept.tolist(),
            "width": self.width if self.total else 0,
            "dtype": self.native.str,
            **counts(self.seen, self.kept, self.warnings),
        }
