"""Pickles of older Pythons: a writer that follows Python 2.7 with numpy 1.16, and real files."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


def dumps(value: Any, protocol: int = 2) -> bytes:
    """Returns value pickled: bytes as Python 2 str, str as unicode, arrays as numpy 1.16 wrote."""
    writer = _Writer(protocol)
    writer.save(value)
    return (b"\x80\x02" if protocol == 2 else b"") + b"".join(writer.out) + b"."


class _Writer:
    def __init__(self, protocol: int) -> None:
        self.protocol = protocol
        self.out: list[bytes] = []
        self.memo: dict[Any, int] = {}
        self.alive: list[Any] = []  # an id is only good while its object lives

    def save(self, value: Any) -> None:
        write = self.out.append
        key = ("dtype", value.str) if isinstance(value, np.dtype) else id(value)
        if key in self.memo:
            place = self.memo[key]
            write(b"g%d\n" % place if not self.protocol else b"j" + struct.pack("<I", place))
        elif value is None:
            write(b"N")
        elif isinstance(value, bool):
            write(b"\x89\x88"[value : value + 1] if self.protocol == 2 else b"I0%d\n" % value)
        elif isinstance(value, int):
            binary = b"K%c" % value if 0 <= value < 256 else b"J" + struct.pack("<i", value)
            write(binary if self.protocol else b"I%d\n" % value)
        elif type(value) is float:
            write(b"G" + struct.pack(">d", value) if self.protocol else b"F%r\n" % value)
        elif isinstance(value, bytes):
            binary = (
                b"U%c" % len(value) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
            )
            write(binary + value if self.protocol else b"S" + repr(value)[1:].encode() + b"\n")
        elif isinstance(value, str):
            text = value.encode()
            write(b"X" + struct.pack("<I", len(text)) + text if self.protocol else _line(value))
        elif isinstance(value, tuple):
            short = self.protocol == 2 and 0 < len(value) <= 3
            write(b"" if short else b"(")
            self.save_all(value)
            write(b"\x84\x85\x86\x87"[len(value) : len(value) + 1] if short else b"t")
        elif isinstance(value, list):
            write(b"]" if self.protocol else b"(l")
            self.put(value, key)
            self.gather(value, b"e", b"a")
        elif isinstance(value, dict):
            write(b"}" if self.protocol else b"(d")
            self.put(value, key)
            self.gather([part for item in value.items() for part in item], b"u", b"s")
        elif isinstance(value, np.ndarray):
            self.call("numpy.core.multiarray _reconstruct", (_NDARRAY, (0,), b"b"))
            fortran = value.ndim > 1 and value.flags.f_contiguous and not value.flags.c_contiguous
            data = value.tobytes("F" if fortran else "C")
            self.save((1, value.shape, value.dtype, fortran, data))
            write(b"b")
        elif isinstance(value, np.dtype):
            self.call("numpy dtype", (value.str[1:].encode(), 0, 1))
            self.put(value, key)
            self.save((3, value.str[:1].encode(), None, None, None, -1, -1, 0))
            write(b"b")
        elif isinstance(value, np.generic):
            self.call("numpy.core.multiarray scalar", (value.dtype, value.tobytes()))
        elif value is _NDARRAY:
            self.name("numpy ndarray")
        else:
            raise TypeError(type(value))

    def save_all(self, values: Any) -> None:
        for value in values:
            self.save(value)

    def gather(self, values: list[Any], many: bytes, one: bytes) -> None:
        if self.protocol:
            self.out.append(b"(")
            self.save_all(values)
            self.out.append(many)
            return
        step = 2 if one == b"s" else 1
        for at in range(0, len(values), step):
            self.save_all(values[at : at + step])
            self.out.append(one)

    def put(self, value: Any, key: Any) -> None:
        self.alive.append(value)
        place = self.memo[key] = len(self.memo)
        self.out.append(b"r" + struct.pack("<I", place) if self.protocol else b"p%d\n" % place)

    def name(self, words: str) -> None:
        self.out.append(b"c" + words.replace(" ", "\n").encode() + b"\n")

    def call(self, words: str, arguments: tuple[Any, ...]) -> None:
        self.name(words)
        self.save(arguments)
        self.out.append(b"R")


_NDARRAY = object()


def _line(text: str) -> bytes:
    return b"V" + text.encode("raw-unicode-escape") + b"\n"


def real() -> dict[str, bytes]:
    """Returns writer and protocol -> the face file below, as it was written there, to the byte.

    The writers are Python 2.7 (cPickle) with numpy 1.16, and Python 3 with numpy 1.16, 1.26, 2.4:

        rows = np.array([[1, 2.5, -3], [4, 5, 6], [0.5, -0.25, 100]], "f2")
        rows = [rows[0], rows[1], np.repeat(rows, 2, axis=1)[2, ::2]]
        frame = lambda i: [str(i), [1.0, 2.5, 30.5, 40.25 + i], 0.5, np.float64(80.5 - i), rows[i]]
        {"clip_1": [frame(0), frame(1)], "clip_2": [], "clip_3": [frame(2)]}
    """
    with zipfile.ZipFile(Path(__file__).with_name("real_pickles.zip")) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
