"""Parquet tables of strangers: whatever a footer or a page says, memory stays small."""

import os
import resource
import sys
import time

import numpy as np
import pytest

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

from tests.campaigns import mutations  # noqa: E402
from tests.helpers import seen  # noqa: E402
from tests.helpers.limits import slowness  # noqa: E402
from vidjax.apps import bulk  # noqa: E402
from vidjax.data import clip_files  # noqa: E402
from vidjax.utils import files  # noqa: E402
from vidjax.utils.errors import UserError  # noqa: E402

ZEROS = 20_000_000  # 80 MB of float32, in a file of a thousand bytes


def varint(value, length=1):
    """Returns a number as Thrift writes it, in `length` bytes or more."""
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


def change(path, place, before, after):
    """Changes a number of the footer, or of the pages in front of it, in as many bytes."""
    content = path.read_bytes()
    at = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    pages, footer, old = content[:at], content[at:], varint(2 * before)
    new = varint(2 * after, len(old))
    assert old in (footer if place == "footer" else pages)
    if place == "footer":
        path.write_bytes(pages + footer.replace(old, new))
    else:
        path.write_bytes(pages.replace(old, new) + footer)


def refused(path, *words):
    """Asserts that a table is refused with some words, in little memory and time."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with mutations.alarm():
        seen.refused(lambda: list(clip_files.read_parquet(path)), str(path), *words)
    scale = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * scale
    assert grown < 64 * files.MB and time.process_time() - began < 5 * slowness()


def test_table_that_unpacks_to_80_mb_of_zeros_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", ZEROS)
    assert path.stat().st_size < 2000
    refused(path, "80,0", "bytes of almost equal values")
    change(path, "footer", ZEROS, 1)
    refused(path, "20,000,000 values of features, but 1 in the footer")
    change(path, "pages", ZEROS, 1)  # both: the page is cut short
    try:
        (clip,) = clip_files.read_parquet(path)
        assert clip.modalities["face"]["features"].size <= 1
    except UserError as error:
        assert "damaged" in str(error)


@pytest.mark.parametrize(("version", "dictionary"), [("1.0", True), ("2.0", False)])
def test_table_whose_pages_and_footer_disagree_on_counts_is_refused(tmp_path, version, dictionary):
    path = tmp_path / "a.parquet"
    options = {"data_page_version": version, "use_dictionary": dictionary}
    for place, after in (("footer", 7002), ("footer", 3), ("pages", 3), ("pages", 8000)):
        write(path, 7001, **options)
        assert [len(x.modalities["face"]["features"]) for x in clip_files.read_parquet(path)] == [1]
        change(path, place, 7001, after)
        refused(path, "values of features")


def test_page_that_claims_gigabytes_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", 7001, compression="none", use_dictionary=False)
    content = path.read_bytes()
    size = next(size for size in range(28_000, 28_400) if varint(2 * size) in content)
    at = content.index(varint(2 * size))
    # The header has fewer bytes for a size than gigabytes take: the ones behind make no sense.
    path.write_bytes(content[:at] + varint(2 * ((1 << 31) - 1)) + content[at + 3 :])
    refused(path, "damaged")


def test_clip_name_of_1_mb_in_4000_rows_takes_memory_once(tmp_path):
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    long = pyarrow.DictionaryArray.from_arrays(np.zeros(4000, np.int32), ["x" * files.MB])
    table = {"clip": long, "modality": ["face"] * 4000, "features": [[1.0]] * 4000}
    parquet.write_table(pyarrow.table(table), paths[0])
    os.link(*paths)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen.refused(lambda: bulk._check_once(paths), "in two tables")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


def test_features_that_are_not_numbers_are_refused_unread(tmp_path):
    path = tmp_path / "a.parquet"
    some_bytes = pyarrow.array([[b"x" * 100]], pyarrow.list_(pyarrow.binary(100)))
    for features in ([["x"]], [[[1.0]]], some_bytes):
        columns = {"clip": ["a"], "modality": ["face"], "features": features}
        parquet.write_table(pyarrow.table(columns), path)
        refused(path, "column features is", "wanted lists of numbers")
