"""The cage: a child process that reads one pickle file nobody vouches for.

`pickles.unpack` runs this module on its own, so nothing here may import jax or TensorFlow. Three
walls stand around the file:

1. No code of its choosing: `sealed` resolves the few globals that numpy writes, and no other.
2. No more than a fair share: address space, CPU time and output are bounded by the size of the
   file, so a few bytes that ask for much end in a clear error. (Address space needs Linux.)
3. No surprise in the structure: a walk of fixed depth and bounded length checks every field before
   it is written to flat arrays.
"""

import contextlib
import gc
import json
import os
import sys
import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vidjax.data.untrusted.unpickle import Array, UnpickleError, load, show

MB = 1 << 20
EXIT_REFUSED = 2
# Honest files load at tens of MB a CPU second, which leaves a slow machine a factor of 30.
CPU_SECONDS = 2
CPU_BYTES_PER_SECOND = 2 * MB
BLOCK_BYTES = 8 * MB
READ_BYTES = MB // 16

# The flat files that the child leaves in its folder; features keep the dtype they came in.
COLUMNS = {"number": "int32", "quality": "float32", "detection": "float32", "box": "float32"}

_BARE = ("feature",)
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
_FEATURE_CODES = ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "|i1")


def clean_name(name: str) -> str:
    """Returns a clip name in its one spelling: without `.mp4` at its end.

    Raises:
      UnpickleError: the name is empty, is not valid unicode, or holds white space, which would
        break the lines of a submission.
    """
    end = len(name)
    while name.endswith(".mp4", 0, end):  # no copy: a name may be all suffixes
        end -= 4
    clean = name[:end]
    if not clean:
        raise UnpickleError(f"clip name '{show(name)}' is empty")
    if clean.split() != [clean]:
        raise UnpickleError(f"clip name '{show(name)}' holds white space")
    try:
        clean.encode("utf-8")
    except UnicodeEncodeError:
        raise UnpickleError(f"clip name '{show(name)}' is not valid unicode") from None
    return clean


def _named(held: object) -> dict[str, Any]:
    """Returns the same values under clean names, emptying the dict that the pickle held."""
    if type(held) is not dict:
        raise UnpickleError(f"the pickle holds a {type(held).__name__}, not a dict of clips")
    named: dict[str, Any] = {}
    repeated = []
    for key in list(held):
        if type(key) is bytes:
            try:
                name = key.decode("utf-8")
            except UnicodeDecodeError:
                raise UnpickleError(f"clip name '{show(key)}' is not UTF-8") from None
        elif type(key) is str:
            name = key
        else:
            raise UnpickleError(f"a clip name is a {type(key).__name__}, not text")
        name = clean_name(name)
        if name in named:
            repeated.append(show(name))
        named[name] = held.pop(key)
    if repeated:
        more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
        raise UnpickleError(f"duplicate clips: {', '.join(repeated[:5])}{more}")
    return named


def _features_of(value: Any) -> list[Any]:
    """Returns the features of the first entries of a clip, unchecked."""
    if type(value) is Array:
        return [value]
    entries = value[:200] if type(value) in (list, tuple) else ()
    return [e[-1] if type(e) in (list, tuple) and e else e for e in entries]


def _expect(clips: dict[str, Any], modality: str) -> tuple[tuple[str, ...], int, str]:
    """Returns the fields of an entry, and the width and dtype code of its feature.

    The fields are those of the modality where it is a known one, else, like width and dtype, what
    most of the first entries have: so an error names the odd clip out even where it comes first.
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


class _Walk:
    """Checks the entries of clip after clip and appends them, block by block, to the flat files."""

    def __init__(
        self,
        clips: dict[str, Any],
        modality: str,
        files: Mapping[str, BinaryIO],
        *,
        size: int,
        drop: bool,
    ) -> None:
        self.names, self.modality, self.files, self.drop = list(clips), modality, files, drop
        self.fields, self.width, self.code = _expect(clips, modality)
        self.native = np.dtype(self.code).newbyteorder("=")
        if self.code not in _FEATURE_CODES:
            kinds = "float16, float32, float64 and int8"
            raise UnpickleError(f"{modality} features are {self.native}, but only {kinds} are read")
        self.row_bytes = self.width * self.native.itemsize
        self.block_frames = max(1, BLOCK_BYTES // max(1, self.row_bytes))
        # Entries may share parts, so a small file can stand for a large one, within reason.
        self.most_frames = 100_000 + size // 8
        self.most_bytes = 64 * MB + 4 * size
        self.seen = np.zeros(len(clips), np.int64)
        self.kept = np.zeros(len(clips), np.int64)
        self.total = 0
        self.warnings = Counter()
        self._start_block()

    def _start_block(self) -> None:
        self.owners: list[tuple[int, int]] = []
        self.chunks: list[bytes | memoryview] = []
        self.numbers = array("i")
        self.floats = {key: array("d") for key in ("quality", "detection", "box")}

    def add(self, clip: int, value: Any) -> None:
        """Takes the value of one clip: a list of entries, or an array of one frame or of many."""
        if type(value) in (list, tuple):
            for start in range(0, len(value), self.block_frames):
                self._add_entries(clip, value, start)
        elif type(value) is Array and self.fields == _BARE:
            self._add_rows(clip, value)
        else:
            wanted = "array" if self.fields == _BARE else f"list of [{', '.join(self.fields)}]"
            raise UnpickleError(f"{self._clip(clip)} is of type {_kind(value)}, wanted {wanted}")

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
            self.numbers.extend(range(start, stop))
            self._close(clip, stop - start)

    def _add_entries(self, clip: int, value: Sequence[Any], start: int) -> None:
        num_fields, shape, code = len(self.fields), (self.width,), self.code
        numbers, chunks = self.numbers, self.chunks
        boxes, detections = self.floats["box"], self.floats["detection"]
        qualities = self.floats["quality"]
        stop = min(start + self.block_frames, len(value))
        field, index = "", start
        try:
            for index in range(start, stop):
                entry = value[index] if num_fields > 1 else value[index : index + 1]
                field = "entry"
                if type(entry) not in (list, tuple) or len(entry) != num_fields:
                    raise TypeError(self._misfit(entry))
                feature = entry[-1]
                field = "feature"
                if type(feature) is not Array or feature.shape != shape or feature.code != code:
                    raise TypeError(self._mismatch(feature))
                chunks.append(feature.data)
                field = "frame"
                numbers.append(_frame_number(entry[0]) if num_fields > 1 else index)
                if num_fields > 2:
                    field = "bbox"
                    boxes.extend(_box(entry[1]))
                if num_fields > 3:
                    field = "det_score"
                    detections.append(entry[2])
                if num_fields > 4:
                    field = "quality_score"
                    qualities.append(entry[3])
        except (TypeError, OverflowError, ValueError) as error:
            raise UnpickleError(f"{self._clip(clip)} entry {index}, {field} {error}") from None
        self._close(clip, stop - start)

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
        if self.total > self.most_frames or self.total * self.row_bytes > self.most_bytes:
            raise UnpickleError(
                "the pickle repeats its parts beyond what a file of its size may hold"
            )
        if len(self.numbers) >= self.block_frames:
            self._write_block()

    def _write_block(self) -> None:
        if self.width == 0:
            raise UnpickleError(f"{self._clip(self.owners[0][0])} has width 0")
        block = np.frombuffer(b"".join(self.chunks), self.code).reshape(-1, self.width)
        block = block.astype(self.native, copy=False)  # [F, D]
        owner = np.repeat(*np.array(self.owners).T)  # [F]
        if self.native.kind == "f":
            keep = np.asarray(np.isfinite(block).all(axis=1))  # [F]
        else:
            keep = np.ones(len(block), bool)
        if not keep.all():
            if not self.drop:
                raise UnpickleError(
                    f"{self._clip(owner[~keep][0])} has a feature that is not finite"
                )
            block = block[keep]
        np.add.at(self.kept, owner[keep], 1)
        self.files["features"].write(block.data)
        self.files["number"].write(np.array(self.numbers, np.int32)[keep].data)
        for key, values in self.floats.items():
            self.files[key].write(self._floats(key, values, keep).data)
        self._start_block()

    def _floats(self, key: str, values: array, keep: np.ndarray) -> np.ndarray:
        """Returns [F] or [F, 4] float32; what a modality lacks is 1 for detection, else 0."""
        shape = (len(keep), 4) if key == "box" else (len(keep),)
        if not values:
            return np.full(shape, float(key == "detection"), np.float32)[keep]
        with np.errstate(over="ignore"):
            column = np.array(values).astype(np.float32).reshape(shape)[keep]
        finite = np.isfinite(column)
        if not finite.all():
            frames = finite.all(axis=1) if key == "box" else finite
            self.warnings[f"non_finite_{key}"] += int(np.sum(~frames))
            column[~finite] = 0.0
        return column

    def finish(self) -> dict[str, Any]:
        """Writes the last block and returns the summary that the parent reads."""
        if self.owners:
            self._write_block()
        dropped = int(self.seen.sum() - self.kept.sum())
        bare = {"empty": self.seen == 0, "non_finite": (self.seen > 0) & (self.kept == 0)}
        return {
            "names": self.names,
            "lengths": self.kept.tolist(),
            "width": self.width if self.total else 0,
            "dtype": self.native.str,
            "seen": self.total,
            "skipped": {"non_finite": dropped} if dropped else {},
            "skipped_clips": {key: int(hit.sum()) for key, hit in bare.items() if hit.any()},
            "warnings": dict(self.warnings),
        }


def convert(path: Path, modality: str, out_dir: Path, *, drop: bool) -> dict[str, Any]:
    """Returns the summary of one pickle, its flat files written under out_dir.

    Args:
      path: the pickle.
      modality: its name, which decides what an entry must be; others are told by their entries.
      out_dir: an existing folder.
      drop: leave out frames with a non-finite feature, instead of refusing the file.

    Raises:
      UnpickleError: the file is not what it should be.
      MemoryError: it asks for more than the cage allows.
    """
    with path.open("rb", buffering=READ_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        clips = _named(load(file, size))
    with contextlib.ExitStack() as stack:
        files = {
            key: stack.enter_context((out_dir / f"{key}.bin").open("wb"))
            for key in ("features", *COLUMNS)
        }
        walk = _Walk(clips, modality, files, size=size, drop=drop)
        for clip, name in enumerate(walk.names):
            walk.add(clip, clips.pop(name))
        return walk.finish()


def memory_limit(size: int) -> int:
    """Returns the address space, in bytes, that the reader of a file of `size` bytes may take."""
    return 512 * MB + 4 * size


def cpu_limit(size: int) -> int:
    """Returns the CPU seconds that the reader of a file of `size` bytes may take."""
    return CPU_SECONDS + size // CPU_BYTES_PER_SECOND


def _shut(size: int) -> None:
    import resource

    cpu = int(time.process_time()) + cpu_limit(size)
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, cpu)]
    if sys.platform == "linux":
        limits.append((resource.RLIMIT_AS, memory_limit(size)))
    for which, wanted in limits:
        _, hard = resource.getrlimit(which)
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(which, (soft, hard))


def main(argv: list[str]) -> int:
    """Returns the exit status; one JSON object on stdout is the summary or the error."""
    path, modality, out_dir, non_finite = argv
    # Nothing here lives in cycles, and collections among millions of lists cost a third.
    gc.disable()
    try:
        _shut(Path(path).stat().st_size)
        answer = convert(Path(path), modality, Path(out_dir), drop=non_finite == "drop")
    except UnpickleError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "the pickle asks for more memory than a file of its size may: refused"}
    except OSError as error:
        answer = {"os_error": error.strerror or str(error)}
    sys.stdout.write(json.dumps(answer))
    return EXIT_REFUSED if "error" in answer or "os_error" in answer else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
