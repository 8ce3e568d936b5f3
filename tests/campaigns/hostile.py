"""Pickles that run code or need much memory or time, and damaged pickles.

As a program, this module reads the files of a folder, and prints the result of each file:

    python -m tests.campaigns.hostile each FOLDER   with `sandbox.unpack`
    python -m tests.campaigns.hostile all FOLDER    in one child process, which is faster
"""

import contextlib
import ctypes
import json
import os
import pickle
import pickletools
import random
import resource
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import python2
from vidjax.data.packed_clips import PackedClips, Summary, open_packed
from vidjax.data.untrusted import sandbox
from vidjax.utils import processes
from vidjax.utils.errors import UserError
from vidjax.utils.names import clean_name

# Functions that return parts of pickles. Opcodes have the names in `pickletools`. `words` are
# "module name", such as "os system".


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(words: str) -> bytes:
    return b"c" + words.replace(" ", "\n").encode() + b"\n"


def dotted(words: str) -> bytes:
    """Returns the opcode STACK_GLOBAL, whose name may have dots, such as "numpy ndarray.tofile"."""
    return b"\x80\x04" + b"".join(map(text, words.split())) + b"\x93"


def part(value: Any) -> bytes:
    """Returns the pickle of a value without its last byte, the opcode STOP."""
    return python2.dumps(value, 1)[:-1]


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(words: str, *parts: bytes) -> bytes:
    return name(words) + tuple_of(*parts) + b"R"


F2 = np.dtype("<f2")
SCALAR = name("numpy.core.multiarray scalar")
RECONSTRUCT = name("numpy.core.multiarray _reconstruct")
EMPTY = RECONSTRUCT + name("numpy ndarray") + b"K\x00\x85U\x01b\x87R"


def array_pickle(state: Any, kind: str = "numpy ndarray") -> bytes:
    """Returns a pickle of an array. `state` is (version, shape, dtype, is Fortran order, bytes)."""
    return EMPTY.replace(name("numpy ndarray"), name(kind)) + part(state) + b"b."


def dtype_pickle(code: bytes, *state: Any) -> bytes:
    build = part(state) + b"b" if state else b""
    return name("numpy dtype") + part((code, 0, 1)) + b"R" + build + b"."


def attacks(mark: Path) -> dict[str, tuple[bytes, str]]:
    """Returns name -> pickle, and words of its error. It would create the file `mark` if run."""
    return {words: (data, error_words) for words, error_words, data in _attacks(mark)}


def _attacks(mark: Path) -> Iterator[tuple[str, str, bytes]]:
    # Every way to run code. Each pickle would run `touch MARK`, or create this file in another way.
    command, path, system = text(f"touch {mark}"), text(str(mark)), name("os system")
    run = call("os system", command)
    yield "GLOBAL REDUCE", "os.system", system + command + b"\x85R."
    yield "STACK_GLOBAL", "os.system", dotted("os system") + command + b"\x85R."
    yield "by dots", "shutil.os.system", dotted("shutil os.system") + command + b"\x85R."
    array = EMPTY.replace(b"numpy.core", b"numpy._core")
    whole = array + part((1, (1,), np.dtype("|i1"), False, b"a")) + b"b"
    to_file = dotted("numpy ndarray.tofile") + tuple_of(whole, path) + b"R."
    yield "numpy ndarray.tofile", "numpy.ndarray.tofile", to_file
    yield "INST", "os.system", b"(" + command + b"ios\nsystem\n."
    yield "OBJ", "os.system", b"(" + system + command + b"o."
    # Without REDUCE: iterators, and a __setstate__ that is an attribute of the object.
    lazy = name("builtins map") + tuple_of(system, b"]" + command + b"a") + b"\x81"
    yield "NEWOBJ", "builtins.map", name("builtins bytes") + lazy + b"\x85\x81."
    set_state = b"}" + text("__setstate__") + system + b"s"
    namespace = name("types SimpleNamespace") + b")\x81" + set_state + b"b" + command + b"b."
    yield "BUILD of a namespace", "types.SimpleNamespace", namespace
    for number, code in {7: "8207", 257: "830101", 65537: "8401000100"}.items():
        known = call("copyreg add_extension", text("posix"), text("system"), part(number)) + b"0"
        data = known + bytes.fromhex(code) + command + b"\x85R."
        yield f"EXT {number}", "copyreg.add_extension", data
    objects = part((3, b"|", None, None, None, -1, -1, 63))
    kind = call("numpy dtype", part(b"O8"), part(0), part(1)) + objects + b"b"
    state = tuple_of(part(1), part((1,)), kind, part(False), b"]" + run + b"a")
    yield "object array", "not real numbers", array + state + b"b."
    yield "before a sound dict", "os.system", run + b"0}."
    # Other harm.
    yield "EXT1 unknown", "extension code 1", b"\x80\x02\x82\x01."
    yield "PERSID", "outside the file", b"Pthing\n."
    yield "BINPERSID", "outside the file", b"NQ."
    yield "NEXT_BUFFER", "out-of-band", b"\x80\x05\x97."
    yield "strange letters", r"os.sys\x1b[31m", name("os sys\x1b[31m\u202etem") + b"."
    calls: dict[str, list[bytes]] = {
        "__builtin__ eval": [text(f"open({str(mark)!r}, 'w').close()")],
        "os remove": [text(str(mark.parent / "keep"))], "atexit register": [system, command],
        "os _exit": [part(0)], "builtins bytearray": [b"J\xff\xff\xff\x7f"],
        "numpy.core.numeric load": [path], "_codecs decode": [part(b"ab"), text("zlib")],
    }  # fmt: skip
    for words, arguments in calls.items():
        yield words, words.replace(" ", "."), call(words, *arguments) + b"."
    for words in ("numpy.core.numeric _frombuffer.__globals__", "builtins bytes.fromhex"):
        yield words, words.replace(" ", "."), dotted(words) + b"."


def _tricks() -> Iterator[tuple[str, bytes]]:
    """Yields (name, pickle). The pickles misuse functions that pickles of arrays need."""
    new = b"}" + text("__new__") + b"Ns"
    yield "slots of ndarray", name("numpy ndarray") + b"(N" + new + b"tb."
    yield "attributes of _reconstruct", RECONSTRUCT + new + b"b."
    state = part((3, b"<", None, None, None, -1, -1, 0))
    yield "state of the class dtype", name("numpy dtype") + state + b"b."
    yield "_reconstruct of itself", 2 * RECONSTRUCT + b"K\x00\x85U\x01b\x87R."
    yield "ndarray called", name("numpy ndarray") + b"(J\xff\xff\xff\x7ftR."
    yield "NEWOBJ_EX of ndarray", name("numpy ndarray") + b")}" + text("shape") + b"K\x01s\x92."
    yield "bytes of 2 GB", name("__builtin__ bytes") + b"(J\xff\xff\xff\x7ftR."
    yield "encode as zlib", call("_codecs encode", text("a"), part("zlib")) + b"."
    yield "encode of bytes", name("_codecs encode") + b"(U\x01aU\x06latin1tR."
    yield "call of an array", EMPTY + b")R."
    yield "attributes of an array", EMPTY + b"}" + text("code") + part("|O") + b"sb."
    order = b"(" + part((b"ab", F2, (1,))) + text("K") + b"tR."
    yield "_frombuffer in another order", name("numpy._core.numeric _frombuffer") + order
    for shape in ((2,), (-1,), (True,), (1, 1, 1), [1]):
        yield f"shape {shape}", array_pickle((1, shape, F2, False, b"ab"))
    yield "array without dtype", array_pickle((1, (1,), None, False, b"ab"))
    yield "array of text", array_pickle((1, (1,), F2, False, "ab"))
    yield "array of four parts", array_pickle(((1,), F2, False, b"ab"))
    yield "array of a dtype", array_pickle((1, (1,), F2, False, b"ab"), "numpy dtype")
    for code in (b"O8", b"c8", b"f2,f2", b"<f2", b"\xff"):
        yield f"dtype {code!r}", dtype_pickle(code)
    for kind, state in {
        "fields": (3, b"<", None, (b"a",), {b"a": 1}, -1, -1, 0),
        "subarray": (3, b"<", (F2, (2,)), None, None, -1, -1, 0),
        "metadata": (4, b"<", None, None, None, -1, -1, 0, {b"meta": 1}),
        "item size": (3, b"<", None, None, None, 10**9, -1, 0),
        "flags": (3, b"<", None, None, None, -1, -1, 63), "short": (3,),
    }.items():  # fmt: skip
        yield f"dtype with {kind}", dtype_pickle(b"f2", *state)
    yield "scalar too short", SCALAR + part((np.dtype("<f8"), b"7 bytes")) + b"R."
    yield "numpy object array", pickle.dumps(np.array([None]), 2)


TRICKS = dict(_tricks())


def _shared(frames: int, clips: int) -> bytes:
    """Returns a small pickle of many clips, which are the same list of the same frame."""
    frame = [b"7", [1.0, 2.0, 30.5, 40.25], 0.5, 80.0, np.array([1, 2, 3], "<f2")]
    head = b"\x80\x02" + part(frame)
    head += b"r\xff\x00\x00\x000]r\xfe\x00\x00\x00(" + b"h\xff" * frames + b"e0"
    pairs = b"".join(b"U\x05%05dh\xfe" % clip for clip in range(clips))
    return head + b"}(" + pairs + b"u."


def wide(*shape: int) -> bytes:
    """Returns a pickle of an array that claims a large shape, but has at most three numbers."""
    count = 0 if 0 in shape else 3
    dims = b"".join(b"\x8a\x10" + n.to_bytes(16, "little") for n in shape)
    state = tuple_of(part(1), tuple_of(dims), part(F2), part(False), part(bytes(2 * count)))
    return b"}U\x01a" + EMPTY + state + b"bs."


GREED = {  # pickles that ask for gigabytes, for hours, or for a deep stack
    "memo": b"Nr\xff\xff\xff\xff.",
    "bytes of 60 GB": b"\x80\x04\x8e" + struct.pack("<Q", 60 << 30) + b"abc.",
    "frame of 60 GB": b"\x80\x04\x95" + struct.pack("<Q", 60 << 30) + b"abc.",
    "integer of 2 GB": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "nested lists": b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
    "nested tuples as a name": b"})" + b"\x85" * 10**6 + b"Ns.",
    "marks": b"(" * 10**6 + b".",
    "digits of a long": b"}L" + b"9" * 10**6 + b"L\nNs.",
    "colliding names": b"}(" + b"".join(  # whole numbers that all have the hash 0
        b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(1, 70_001)
    ) + b"u.",
    "copies of one text": b"](%s%se." % (
        name("_codecs encode") + b"q\x000" + text("x" * 900_000) + text("latin1") + b"\x86q\x010",
        b"h\x00h\x01R" * 2_000,
    ),
    "one entry, ten billion times": _shared(10**5, 10**5),
    "shape of 1e11": wide(10**11),
    "shape of 0 x 1e36": wide(0, 10**36),
    "a list in itself": b"}U\x01a]q\x00h\x00as.",
}  # fmt: skip


def damage(sound: bytes) -> dict[str, bytes]:
    """Returns name -> content: damaged copies of the pickle `sound`, and other kinds of files."""
    return {
        **{f"cut to {end} bytes": sound[:end] for end in (2, len(sound) // 2, len(sound) - 1)},
        "empty": b"", "zeros": bytes(10**5), "ground truth": b"IQIYI_VID_TRAIN_0000001.mp4 195\n",
        "web page": b"<!DOCTYPE html>\n<html><title>404 Not Found</title></html>\n",
        "zip": b"PK\3\4" + bytes(100), "picture": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(100),
        "old PyTorch": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
        "line ends of Windows": sound.replace(b"\n", b"\r\n"),
        "read as text": sound.decode("latin-1").encode(), "twice": sound + sound,
    }  # fmt: skip


def mutate(seeds: list[bytes], grafts: list[bytes], chance: random.Random) -> bytes:
    """Returns one of `seeds` with 1 to 4 random changes, which may insert an opcode or a graft."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        at, length = chance.randrange(len(data)), chance.choice([0, 1, 1, 1, 8])
        code = chance.choice(pickletools.opcodes).code.encode("latin-1")
        bits = bytes(x ^ 1 << chance.randrange(8) for x in data[at : at + length])
        new = chance.choice([bits, bits, bits, b"", code, 2 * bits, chance.choice(grafts)])
        data[at : at + length] = new
    return bytes(data)


def check(packed: PackedClips) -> None:
    """Asserts that names, lengths and counts of unpacked clips are valid."""
    ((modality, frames),) = packed.frames.items()
    names, lengths, counts = packed.names, frames.length, packed.counts[modality]
    assert len(set(names)) == len(names) and [clean_name(n) for n in names] == [*names]
    assert len(lengths) == len(names) and (lengths >= 0).all()
    assert frames.features.ndim == 2 and lengths.sum() == len(frames.features)
    assert counts.frames == lengths.sum() + sum(counts.skipped.values())
    assert sum(counts.skipped_clips.values()) == (lengths == 0).sum()


def unpack_all(paths: list[Path], place: Path) -> Iterator[str]:
    """Yields the error of each pickle, or "". If a pickle ends the child, a new one continues."""
    given = [
        (x, {"path": str(x), "modality": "face", "out_dir": f"{place}/{x.name}"}) for x in paths
    ]
    for path in paths:
        (place / path.name).mkdir()
    found = processes.run_limited_each(
        sandbox.__name__, given, Summary, memory_bytes=512 << 20, cpu_seconds=2, writes=[place]
    )
    for path, one in zip(paths, found, strict=True):
        if not isinstance(one, UserError):
            with processes.doubt(path):
                check(open_packed("face", place / path.name, one))
        yield str(one) if isinstance(one, UserError) else ""


def unpack(path: Path, place: Path) -> str:
    """Returns the error of a pickle, or ""."""
    try:
        check(sandbox.unpack(path, "face", place / "flat"))
    except ValueError as refusal:
        return str(refusal)
    finally:
        shutil.rmtree(place / "flat", ignore_errors=True)
    return ""


def main() -> None:
    """Prints [name, error, CPU seconds, most memory so far in MB] of each file."""
    paths = sorted(Path(sys.argv[2]).iterdir())
    place = Path(f"{sys.argv[2]}_out") / "flat"
    place.mkdir(parents=True)
    # PR_SET_CHILD_SUBREAPER: orphans become children of this process, so the last lines find them.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    at_once, before = sys.argv[1] == "all", 0.0
    errors = unpack_all(paths, place) if at_once else (unpack(path, place) for path in paths)
    for path, error in zip(paths, errors, strict=True):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = used.ru_utime + used.ru_stime
        row = [path.name, error, seconds - before, used.ru_maxrss / 1024]
        sys.stdout.write(json.dumps(row) + "\n")
        before = seconds
    with contextlib.suppress(ChildProcessError):
        raise AssertionError(f"a process is left: {os.waitpid(-1, os.WNOHANG)}")


if __name__ == "__main__":
    main()
