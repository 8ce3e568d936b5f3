"""Unpickles a large dict in pieces, so that it needs little memory.

A piece is a new dict with some items of the large dict. A pickle can refer to earlier objects. An
unpickler keeps the earlier objects in a list, the memo. Pickles of features refer only to objects
of the same clip, and to a few shared objects in the first piece. So `load_pieces` keeps only the
objects of the first and the latest piece, and replaces all other objects by None. If a pickle
refers to a replaced object, `sandbox` finds None in a clip, and loads the pickle as a whole.
"""

import io
import mmap
import pickletools
import re
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from vidjax.data.untrusted.unpickle import Unpickler
from vidjax.utils.errors import UserError

PIECE_BYTES = 16 << 20
MAX_PATTERNS, MAX_RUN = 32, 200  # number of patterns that are tried, and of opcodes in a pattern

# Opcode whose argument begins with the size of the argument -> format of this size.
_SIZED = {
    code: struct.Struct(size)
    for size, codes in {"<B": b"UC\x8a\x8c", "<I": b"TXB", "<Q": b"\x8d\x8e\x96"}.items()
    for code in codes
}
_FRAME = 0x95  # opcode before 8 bytes with the number of bytes that a reader should fetch at once
# Opcode with an argument of fixed size -> the size of the argument. _FRAME, the opcodes of dicts
# and the last opcode of a pickle are left out.
_PLAIN = {
    ord(x.code): x.arg.n if x.arg else 0
    for x in pickletools.opcodes
    if not (x.arg and x.arg.n < 0) and ord(x.code) not in b"\x95}dsu."
}
_NUMBERING = b"\x94qr"  # opcodes that number an object
_OPCODE = re.compile(
    b"|".join(
        b"[%b].{%d}" % (re.escape(bytes(c for c, n in _PLAIN.items() if n == size)), size)
        for size in sorted({*_PLAIN.values()})
    ),
    re.DOTALL,
)
_RUN = re.compile(b"(?:%b)*+" % _OPCODE.pattern, re.DOTALL)
_GLOBAL = re.compile(rb"c[^\n]*\n[^\n]*\n")
_START = re.compile(rb"\x80[\x02-\x05](?:\x95.{8})?(\}(?:\x94|q.|r.{4})?)", re.DOTALL)


def load_pieces(file: BinaryIO, size: int) -> Iterator[dict[Any, Any]]:
    """Yields the items of a pickled dict, a few at a time, as new dicts.

    `size` is the number of bytes of the file. If the pickle is damaged or unsafe, or cannot be
    read in pieces, raises an exception of any type.
    """
    pipe = io.BytesIO()
    unpickler = Unpickler(pipe, encoding="bytes")
    old = range(0)  # the numbers of the objects of the previous piece
    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as content:
        for parts, numbers in _cut(content):
            puts = np.empty(len(old), [("opcode", "S1"), ("number", "<u4")])
            puts["opcode"], puts["number"] = b"r", np.arange(old.start, old.stop)
            parts = [b"N", puts.tobytes(), b"0", *parts, b"."]
            pipe.seek(0)
            pipe.write(b"\x95" + struct.pack("<Q", sum(map(len, parts))))
            pipe.writelines(parts)
            pipe.truncate()
            pipe.seek(0)
            del parts
            items = unpickler.load()
            if type(items) is not dict or pipe.read(1):
                raise UserError("the pickle is not a single dict, so it cannot be read in pieces")
            yield items
            old = numbers if numbers.start else range(0)


def _cut(content: mmap.mmap) -> Iterator[tuple[list[bytes], range]]:
    """Cuts a pickled dict into smaller pickles, each with some of its items.

    Yields each smaller pickle as byte strings, without the opcode STOP at the end, and the indices
    that its objects get in the memo, the list in which an unpickler keeps objects.
    """
    begin = _START.match(content)
    if not begin:
        raise UserError("the pickle is not a single dict, so it cannot be read in pieces")
    start, at = begin.span(1)
    parts, runs, left = list[bytes](), _Runs(content), PIECE_BYTES
    first, done = 0, int(at > start + 1)  # the dict may be the first numbered object
    while True:
        end, numbered = runs.skip(at)
        done += numbered
        opcode, is_last = content[end], end + 1 == len(content)
        if size := _SIZED.get(opcode):
            at = end + 1 + size.size + size.unpack_from(content, end + 1)[0]
        elif opcode == _FRAME:
            parts.append(content[start:end])
            at = start = end + 9
        elif opcode in b"su" or (opcode == ord(".") and is_last):
            at = end + (not is_last)
            if is_last or at > left:
                yield [*parts, content[start:at]], range(first, done)
                parts, start, first, left = [b"}"], at, done, at + PIECE_BYTES
                content.madvise(mmap.MADV_DONTNEED, 0, at)
            if is_last:
                return
        elif found := _GLOBAL.match(content, end):
            at = found.end()
        else:
            raise UserError("the pickle is not a single dict, so it cannot be read in pieces")


class _Runs:
    """Skips runs of opcodes whose arguments have a fixed size.

    Most arrays are pickled with the same opcodes. So earlier runs are kept as regular expressions,
    and a match with one of them is faster than parsing each opcode.
    """

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._patterns: list[tuple[re.Pattern[bytes], int]] = []

    def skip(self, at: int) -> tuple[int, int]:
        """Skips a run of opcodes whose arguments have a fixed size. The run begins at byte `at`.

        Returns the position of the byte after the run, and how many opcodes of the run store an
        object in the memo of the pickle.
        """
        for place, (pattern, count) in enumerate(self._patterns):
            found = pattern.match(self._content, at)
            if found and self._content[found.end()] not in _PLAIN:
                if place:
                    self._patterns.insert(0, self._patterns.pop(place))
                return found.end(), count
        found = _RUN.match(self._content, at)
        run = found[0] if found else b""
        opcodes = _OPCODE.findall(run)
        count = sum(code[0] in _NUMBERING for code in opcodes)
        if len(self._patterns) < MAX_PATTERNS and len(opcodes) <= MAX_RUN:
            parts = (re.escape(code[:1]) + b".{%d}" % (len(code) - 1) for code in opcodes)
            self._patterns.insert(0, (re.compile(b"".join(parts), re.DOTALL), count))
        return at + len(run), count
