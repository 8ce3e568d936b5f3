"""sealed: real feature pickles load, and nothing else is reachable through one."""

import io
import pickle
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import python2
from vidjax.data import sealed

DTYPES = ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "|i1"]


def load(data: bytes) -> Any:
    return sealed.load(io.BytesIO(data), len(data))


def refusal(data: bytes) -> str:
    with pytest.raises(sealed.CageError) as caught:
        load(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


PurePickler: Any = pickle._Pickler


class OldNames(PurePickler):
    """Writes the names that numpy 1.x gave to the same functions."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module, name = obj.__module__.replace("numpy._core", "numpy.core"), obj.__name__
        if module == "builtins" and self.proto < 3:
            module = "__builtin__"
        if self.proto >= 4:
            self.save(module)
            self.save(name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(f"c{module}\n{name}\n".encode())
        self.memoize(obj)

    dispatch = PurePickler.dispatch | {type(textwrap.dedent): save_global}


def old_names(value: Any, protocol: int) -> bytes:
    file = io.BytesIO()
    OldNames(file, protocol).dump(value)
    return file.getvalue()


WRITERS = (
    [(f"python2-{p}", lambda value, p=p: python2.dumps(value, p)) for p in range(3)]
    + [(f"python3-{p}", lambda value, p=p: pickle.dumps(value, p)) for p in range(6)]
    + [(f"numpy1-{p}", lambda value, p=p: old_names(value, p)) for p in range(6)]
)


@pytest.mark.parametrize("writer", [w for _, w in WRITERS], ids=[name for name, _ in WRITERS])
def test_arrays_and_scalars_of_every_protocol_load_to_their_exact_bytes(writer: Any) -> None:
    rng = np.random.default_rng(0)
    for code in DTYPES:
        numbers = rng.integers(-100, 100, (6, 8)).astype(code)
        fortran = np.asfortranarray(numbers)
        for array in (numbers[0], numbers[1, ::2], numbers[2, ::-1], numbers, fortran, numbers[:0]):
            got = load(writer({b"clip": [array, 1, 2.5, b"3"]}))[b"clip"]
            assert got[1:] == [1, 2.5, b"3"]
            values = np.frombuffer(got[0].data, got[0].code).reshape(got[0].shape)
            assert values.dtype == array.dtype
            np.testing.assert_array_equal(values, array)
        scalar = numbers[3, 4]
        assert load(writer([scalar, scalar])) == [scalar, scalar]


def test_read_only_arrays_and_scalars_of_any_kind_load() -> None:
    array = np.arange(5, dtype=np.float16)
    array.flags.writeable = False
    (got,) = load(pickle.dumps([array], 5))
    assert got.shape == (5,) and got.data == array.tobytes()
    big = python2.dumps((np.dtype(">f8"), struct.pack(">d", 0.1)), 1)[:-1]
    assert load(SCALAR + big + b"R.") == 0.1
    assert load(pickle.dumps([np.int64(-7), np.uint8(200), np.True_])) == [-7, 200, True]


def array_pickle(state: Any, kind: str = "numpy ndarray") -> bytes:
    """A pickle of one array with this state, its dtype float16."""
    head = f"cnumpy.core.multiarray\n_reconstruct\nc{kind.replace(' ', chr(10))}\n"
    return head.encode() + b"K\x00\x85U\x01b\x87R" + python2.dumps(state, 1)[:-1] + b"b."


def dtype_pickle(code: bytes, *state: Any) -> bytes:
    build = python2.dumps(state, 1)[:-1] + b"b" if state else b""
    return b"cnumpy\ndtype\n" + python2.dumps((code, 0, 1), 1)[:-1] + b"R" + build + b"."


F2 = np.dtype("<f2")
SCALAR = b"cnumpy.core.multiarray\nscalar\n"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"cos\nsystem\n(S'touch {mark}'\ntR.", "os.system"),
        (b"cposix\nsystem\n(S'touch {mark}'\ntR.", "posix.system"),
        (b"(S'touch {mark}'\nios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nS'touch {mark}'\no.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0etouch {mark}\x85R.", "os.system"),
        (b'c__builtin__\neval\n(S\'open("{mark}","w")\'\ntR.', "__builtin__.eval"),
        (b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.", "builtins.getattr"),
        (b"c__builtin__\nopen\n(S'{mark}'\nS'w'\ntR.", "__builtin__.open"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "numpy.ndarray.tofile"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"cnumpy.core.multiarray\nfromfile\n.", "numpy.core.multiarray.fromfile"),
        (b"cnumpy.core.numeric\n_frombuffer.__globals__\n.", "_frombuffer.__globals__"),
        (b"c_codecs\ndecode\n.", "_codecs.decode"),
        (b"c__builtin__\nbytearray\n.", "__builtin__.bytearray"),
        (b"ccopy_reg\n_reconstructor\n.", "copy_reg._reconstructor"),
        (b"cvidjax.data.sealed\nArray\n.", "vidjax.data.sealed.Array"),
        (b"c__main__\nArray\n.", "__main__.Array"),
        (b"cos\nsys\x1b[31m\xe2\x80\xaetem\n.", r"os.sys\x1b[31m"),
        (b"\x80\x02\x82\x01.", "extension code 1"),
        (b"\x80\x02\x83\x01\x01.", "extension code 257"),
        (b"\x80\x02\x84\x01\x00\x00\x01.", "extension code"),
        (b"Pthing\n.", "PERSID"),
        (b"NQ.", "PERSID"),
        (b"\x80\x05\x97.", "out-of-band"),
    ],
)
def test_globals_extensions_and_persistent_ids_are_refused_without_side_effect(
    data: bytes, named: str, tmp_path: Path
) -> None:
    mark = tmp_path / "m"
    text = data.replace(b"{mark}", bytes(mark))
    message = refusal(text.replace(b"\x8c\x0etouch", b"\x8c%ctouch" % (6 + len(bytes(mark)))))
    assert named in message and "byte" in message
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        # Classes cannot be changed: BUILD with a dict, with slots, on any of them.
        *(
            b"c%s\n(N}X\x07\x00\x00\x00__new__Nstb." % name.replace(b" ", b"\n")
            for name in (b"numpy ndarray", b"numpy dtype", b"_codecs encode", b"__builtin__ bytes")
        ),
        RECONSTRUCT + b"N}X\x07\x00\x00\x00__new__Ns\x86b.",
        RECONSTRUCT + b"}X\x07\x00\x00\x00__new__Nsb.",
        SCALAR + b"N}X\x07\x00\x00\x00__new__Ns\x86b.",
        b"cnumpy\ndtype\n(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
        # Objects where classes are called for, classes where objects are.
        RECONSTRUCT + RECONSTRUCT + b"K\x00\x85U\x01b\x87R.",
        RECONSTRUCT + b"c_codecs\nencode\nK\x00\x85U\x01b\x87R.",
        RECONSTRUCT + b"(NNNtR.",
        RECONSTRUCT + b")R.",
        RECONSTRUCT + b")\x81.",
        b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",
        b"cnumpy\nndarray\n)\x81.",
        b"(inumpy\nndarray\n.",
        b"c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aU\x04zlibtR.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aU\x05rot13tR.",
        b"c_codecs\nencode\n(U\x01aU\x06latin1tR.",
        b"(U\x01a(ltR.",
        # Arrays whose state is not what numpy writes.
        array_pickle((1, (2,), F2, False, b"ab")),
        array_pickle((1, (-1,), F2, False, b"ab")),
        array_pickle((1, (True,), F2, False, b"ab")),
        array_pickle((1, (1, 1, 1), F2, False, b"ab")),
        array_pickle((1, [1], F2, False, b"ab")),
        array_pickle((1, (1,), None, False, b"ab")),
        array_pickle((1, (1,), F2, False, [None])),
        array_pickle((1, (1,), F2, False, "ab")),
        array_pickle(((1,), F2, False, b"ab")),
        array_pickle(None),
        array_pickle({b"data": 1}),
        array_pickle((1, (1,), F2, False, b"ab"), "numpy dtype"),
        # A dtype that is anything but a plain number, or whose state is damaged.
        *(dtype_pickle(code) for code in (b"O8", b"O", b"V8", b"M8", b"S4", b"U4", b"c8", b"f16")),
        *(dtype_pickle(code) for code in (b"f2,f2", b"<f2", b"", b"\xff", b"f2\x00")),
        dtype_pickle(b"f2", 3, b"<", None, (b"a",), {b"a": 1}, -1, -1, 0),
        dtype_pickle(b"f2", 3, b"<", (F2, (2,)), None, None, -1, -1, 0),
        dtype_pickle(b"f2", 4, b"<", None, None, None, -1, -1, 0, {b"meta": 1}),
        dtype_pickle(b"f2", 3, b"<", None, None, None, 10**9, -1, 0),
        dtype_pickle(b"f2", 3, b"<", None, None, None, -1, -1, 63),
        dtype_pickle(b"f2", 3, b"<", None, None, None, -1, -1, None),
        dtype_pickle(b"f2", 99, b"<", None, None, None, -1, -1, 0),
        dtype_pickle(b"f2", 3, b"!", None, None, None, -1, -1, 0),
        dtype_pickle(b"f2", 3, b"|", None, None, None, -1, -1, 0),
        dtype_pickle(b"i1", 3, b">", None, None, None, -1, -1, 0),
        dtype_pickle(b"f2", 3, 60, None, None, None, -1, -1, 0),
        dtype_pickle(b"f2", 3),
        SCALAR + python2.dumps((np.dtype("<f8"), b"7 bytes"), 1)[:-1] + b"R.",
        SCALAR + python2.dumps((np.dtype("<f8"), "8 unicod"), 1)[:-1] + b"R.",
        SCALAR + python2.dumps((None, b"8 bytes!"), 1)[:-1] + b"R.",
        pickle.dumps(np.array([None]), 2),
        pickle.dumps(np.zeros(2, [("a", "f2")]), 2),
        pickle.dumps(np.zeros((2, 2, 2)), 5),
        pickle.dumps(np.array(["a"]), 2),
        pickle.dumps(np.zeros(2, "M8[s]"), 2),
    ],
)
def test_tricks_with_classes_arrays_and_dtypes_are_refused(data: bytes) -> None:
    before = {name: dict(vars(found)) for name, found in sealed._GLOBALS.items()}
    assert "byte" in refusal(data)
    assert {name: dict(vars(found)) for name, found in sealed._GLOBALS.items()} == before


def test_a_shape_beyond_its_bytes_is_refused_before_anything_is_allocated() -> None:
    data = array_pickle((1, (12345,), F2, False, b"ab"))
    wide = data.replace(b"J" + struct.pack("<i", 12345), b"\x8a\x08" + struct.pack("<q", 10**11))
    assert wide != data
    assert "shape and bytes disagree" in refusal(wide)


def test_a_second_dtype_state_does_not_reach_arrays_already_made() -> None:
    array = np.array([1.5, 2.5], "<f2")
    data = python2.dumps([array], 2)[:-1]
    rebuild = b"j\x01\x00\x00\x00" + python2.dumps((3, b">", *[None] * 3, -1, -1, 0), 1)[:-1] + b"b"
    got, _ = load(data + rebuild + b"a.")
    assert got.code == "<f2" and got.data == array.tobytes()


@pytest.mark.parametrize("protocol", [0, 2])
def test_every_truncation_is_told_with_the_byte_where_the_file_ends(protocol: int) -> None:
    data = python2.dumps(
        {b"clip": [[b"1", [1.0] * 4, 0.5, 80.0, np.arange(4, dtype="f2")]]}, protocol
    )
    for end in range(1, len(data)):
        message = refusal(data[:end])
        assert f"byte {end}" in message or f"byte {end - 1}" in message
    assert "byte 0" in refusal(b"")
    assert f"ends at byte {len(data)}, but 3 bytes follow" in refusal(data + b"abc")


def test_text_and_damage_are_told_with_their_byte() -> None:
    assert "(at byte 1)" in refusal(b"hello, world\n")
    assert "(at byte 0)" in refusal(b"\xef\xbb\xbfclip 1\n")
    padding = python2.dumps([b"x" * 200] * 2000, 2)[:-1]
    assert f"(at byte {len(padding)})" in refusal(padding + b"\xfe" + b"." * 200_000)


def test_damaged_files_end_in_one_kind_of_error(tmp_path: Path) -> None:
    """Random damage, in a process of its own: some of it asks for gigabytes."""
    frames = [[b"1", [1.0] * 4, 0.5, np.float64(80), np.arange(4, dtype="f2")] for _ in range(3)]
    value = {b"clip": frames, b"other": []}
    seeds = [python2.dumps(value, p) for p in range(3)] + [pickle.dumps(value, p) for p in range(6)]
    (tmp_path / "seeds").write_bytes(pickle.dumps(seeds))
    code = """
        import io, pickle, random, resource, sys
        from vidjax.data import sealed
        resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))
        seeds = pickle.load(open(sys.argv[1], "rb"))
        chance = random.Random(0)
        ends = {}
        for _ in range(1200):
            data = bytearray(chance.choice(seeds))
            for _ in range(chance.choice([1, 1, 2, 5])):
                at, cut = chance.randrange(len(data)), chance.choice([0, 1, 1, 4])
                data[at : at + cut] = chance.randbytes(chance.choice([0, 1, 1]))
            try:
                sealed.load(io.BytesIO(bytes(data)), len(data))
                end = "loaded"
            except (sealed.CageError, MemoryError) as error:
                end = type(error).__name__
                assert "\\n" not in str(error) and len(str(error)) < 300
            ends[end] = ends.get(end, 0) + 1
        assert ends["CageError"] > 300 and ends["loaded"] > 50, ends
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(tmp_path / "seeds")]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
