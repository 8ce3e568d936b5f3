"""Feature pickles in the format of Python 2 and its numpy, which Python 3 cannot write."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np


class FlatFrames(NamedTuple):
    """The frames of some clips, one after another.

    Attributes:
      present: [n] bool, whether the clip has the modality.
      lengths: [n] int, number of frames of the clip; 0 if it lacks the modality.
      features: [F, D] float16 or float32.
      number: [F] int, frame number.
      box: [F, 4] float64, x1, y1, x2, y2 in pixels.
      detection, quality: [F] float64.
    """

    present: np.ndarray
    lengths: np.ndarray
    features: np.ndarray
    number: np.ndarray
    box: np.ndarray
    detection: np.ndarray
    quality: np.ndarray

    def without(self, clips: np.ndarray) -> "FlatFrames":
        """Returns the frames as if `clips` [n] bool lacked the modality."""
        keep = ~np.repeat(clips, self.lengths)
        values = (value[keep] for value in self[2:])
        return FlatFrames(self.present & ~clips, np.where(clips, 0, self.lengths), *values)


class DictPickle:
    """A file with one dict, pickled at protocol 2 like Python 2 and its numpy.

    Python 3 has no 8-bit strings at protocol 2. The only difference from cPickle is the memo, which
    holds numpy's globals and the dtype alone.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._file.write(b"\x80\x02}")
        self._count = 0
        self._first_array = True

    def add(self, items: Iterable[bytes], like: np.ndarray) -> None:
        """Writes pickled (key, value) pairs whose arrays are rows of `like` [F, D]."""
        for item in items:
            if self._first_array and (short := _array_head(like)) in item:
                item = item.replace(short, _array_head(like, first=True), 1)
                self._first_array = False
            if self._count % 1000 == 0:
                self._file.write(b"u(" if self._count else b"(")
            self._file.write(item)
            self._count += 1

    def close(self) -> None:
        """Ends the dict and the file."""
        self._file.write(b"u." if self._count else b".")
        self._file.close()


def _array_head(like: np.ndarray, *, first: bool = False) -> bytes:
    """Pickled array of shape [D] up to its bytes; later arrays refer to the globals by memo."""
    _, dim = like.shape
    shape = b"K" + bytes([dim]) if dim < 256 else b"M" + dim.to_bytes(2, "little")
    make, array, dtype = b"h\x00", b"h\x01", b"h\x02"
    if first:
        make = b"cnumpy.core.multiarray\n_reconstruct\nq\x00"
        array = b"cnumpy\nndarray\nq\x01"
        dtype = b"cnumpy\ndtype\n" + _string(like.dtype.str[1:].encode()) + b"K\x00K\x01\x87R"
        dtype += b"(K\x03" + _string(b"<") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tbq\x02"
    size = dim * like.itemsize
    head = b"U" + bytes([size]) if size < 256 else b"T" + size.to_bytes(4, "little")
    empty = make + array + b"K\x00\x85" + _string(b"b") + b"\x87R"
    return empty + b"(K\x01" + shape + b"\x85" + dtype + b"\x89" + head


def _string(text: bytes) -> bytes:
    """An 8-bit string of under 256 bytes, pickled."""
    return b"U" + bytes([len(text)]) + text


def pickled_items(modality: str, names: list[str], frames: FlatFrames) -> Iterator[bytes]:
    """Yields pickled (name, value) pairs of the clips in the file."""
    box = (b"](", *(p for x in frames.box.T for p in (b"G", _double(x))), b"e")
    detection = (b"G", _double(frames.detection))
    quality = (b"G", _double(frames.quality))
    feature = (_array_head(frames.features), frames.features, b"tb")
    # The fields after the frame number, which alone varies in length.
    tails: dict[str, tuple[bytes | np.ndarray, ...]] = {
        "face": (*box, *detection, *quality, *feature, b"e"),
        "head": (*box, *detection, *feature, b"e"),
        "body": (*box, *feature, b"e"),
        "audio": feature,
        "scene": (*feature, b"\x86"),
    }
    tail = _rows(tails[modality], len(frames.features))
    number = frames.number.tolist()
    start = 0
    for name, length, present in zip(names, frames.lengths.tolist(), frames.present, strict=True):
        rows = range(start, start + length)
        start += length
        if modality == "audio":
            value = [tail[row] for row in rows]
        elif modality == "scene":
            entries = [b"K" + bytes([i]) + tail[row] for i, row in enumerate(rows)]
            value = [b"](", *entries, b"e"]
        else:
            entries = [b"](" + _string(b"%d" % number[row]) + tail[row] for row in rows]
            value = [b"](", *entries, b"e"] if entries else [b"]"]
        # Only the official face files list a clip that lacks the modality.
        if present or modality == "face":
            yield b"".join((_string(name.encode("ascii")), *value))


def _double(values: np.ndarray) -> np.ndarray:
    """Big-endian doubles [n, 1], as a pickle holds them."""
    return values.astype(">f8")[:, None]


def _rows(parts: tuple[bytes | np.ndarray, ...], count: int) -> list[bytes]:
    """Concatenates constants and arrays [count, k], row by row."""
    columns = [
        np.broadcast_to(np.frombuffer(part, np.uint8), (count, len(part)))
        if isinstance(part, bytes)
        else np.ascontiguousarray(part).view(np.uint8)
        for part in parts
    ]
    joined = np.concatenate(columns, axis=1)  # [count, bytes of a row]
    width, data = joined.shape[1], joined.tobytes()
    return [data[i * width : (i + 1) * width] for i in range(count)]
