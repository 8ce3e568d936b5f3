"""A folder of records that can be trusted: built under a lock, named when complete, checked.

A folder holds TFRecord shards, `index.npz` (clip names, order and lengths), `data_report.json` and
`manifest.json`, which is written last: counts, sizes and sha256 of everything that is read later,
and of itself. TFRecord files need that: cut between two records they read without an error.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.data.records.codec import Modality, tf

_LOG = logging.getLogger(__name__)


class Shard(NamedTuple):
    """One TFRecord file: where it lies and what the manifest says of it."""

    path: Path
    records: int
    size: int
    mtime_ns: int
    sha256: str


class SplitRecords(NamedTuple):
    """The records of one split.

    Attributes:
      clips: clip names in byte order; a clip's index is its position here.
      order: [N] int32, the clip index of each record, in the order of the shards.
      lengths: modality -> [N] int32 frames by clip index, 0 where the clip has none; only the
        modalities that the split has a file of.
      shards: the files, in order.
    """

    clips: tuple[str, ...]
    order: np.ndarray
    lengths: dict[str, np.ndarray]
    shards: tuple[Shard, ...]


class Records(NamedTuple):
    """A finished conversion: its folder, what its manifest promises and its report."""

    folder: Path
    modalities: dict[str, Modality]
    splits: dict[str, SplitRecords]
    report: dict[str, Any]


def default_cache_dir() -> Path:
    """Returns where records go unless told otherwise: `$VIDJAX_CACHE` or `~/.cache/vidjax`."""
    given = os.environ.get("VIDJAX_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "vidjax"


@contextlib.contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Holds the one lock of a cache directory, waiting for it; clears what killed holders left.

    Raises:
      OSError: the directory cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("waiting for another process that fills %s", root)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in root.glob("*.partial"):
            # The reader of a killed holder may still write there; the next one clears it then.
            shutil.rmtree(left_over, ignore_errors=True)
        yield


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Gives a folder to fill that takes its final name only when all went well.

    Raises:
      OSError: the disk is full or refuses; the partial folder is gone then.
    """
    # Never the same name twice: nothing that outlived a killed holder writes into this one.
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        yield partial
        if folder.exists():  # it lacks what marks it as complete, or nobody would build it again
            shutil.rmtree(folder)
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(partial)) from error
        if isinstance(error, tf.errors.OpError):  # of a TensorFlow writer
            full = isinstance(error, tf.errors.ResourceExhaustedError)
            number = errno.ENOSPC if full else errno.EIO
            raise OSError(number, os.strerror(number), str(partial)) from error
        raise


def describe_shard(path: Path, num_records: int) -> Shard:
    """Returns what the manifest is to say of a file that was just written."""
    stat = path.stat()
    return Shard(path, num_records, stat.st_size, stat.st_mtime_ns, _sha256(path))


def write_manifest(records: Records, sources: list[dict[str, Any]]) -> None:
    """Writes index, report and, last, the manifest: from then on the folder is complete.

    Args:
      records: all that lies in the folder.
      sources: what tells the files that it came from from others.
    """
    folder = records.folder
    _write_index(folder / "index.npz", records.splits)
    _write_json(folder / "data_report.json", records.report)
    manifest = {
        "sources": sources,
        "modalities": {name: facts._asdict() for name, facts in records.modalities.items()},
        "sha256": {name: _sha256(folder / name) for name in ("index.npz", "data_report.json")},
        "splits": {
            name: {
                "records": len(split.clips),
                "shards": [
                    {**shard._asdict(), "path": str(shard.path.relative_to(folder))}
                    for shard in split.shards
                ],
            }
            for name, split in records.splits.items()
        },
    }
    digest = hashlib.sha256(_json(manifest)).hexdigest()
    _write_json(folder / "manifest.json", {**manifest, "manifest_sha256": digest})


def load_records(folder: Path) -> Records:
    """Returns a finished conversion, checked as far as can be without reading the shards.

    Raises:
      ValueError: a file is missing, damaged or not of its size.
    """
    records = load_index(folder)
    splits = {
        name: split._replace(shards=check_changed(split.shards))
        for name, split in records.splits.items()
    }
    return records._replace(splits=splits)


def load_index(folder: Path) -> Records:
    """Returns what manifest, index and report of a finished conversion say; no shard is looked at.

    Raises:
      ValueError: one of the three is missing or damaged.
    """
    try:
        manifest = _read_manifest(folder / "manifest.json")
        for name, digest in manifest["sha256"].items():
            if _sha256(folder / name) != digest:
                raise ValueError(f"{name} does not match its sha256")
        report = json.loads((folder / "data_report.json").read_text())
        with np.load(folder / "index.npz", allow_pickle=False) as index:
            splits = {
                name: _load_split(folder, name, facts, index)
                for name, facts in manifest["splits"].items()
            }
        modalities = {name: Modality(**facts) for name, facts in manifest["modalities"].items()}
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(
            f"{folder}: damaged records: {error}\ndelete this folder to convert again"
        ) from error
    return Records(folder, modalities, splits, report)


def _read_manifest(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
        digest = manifest.pop("manifest_sha256")
        same = _json({**manifest, "manifest_sha256": digest}) == content
        if same and hashlib.sha256(_json(manifest)).hexdigest() == digest:
            return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path.name} does not match its sha256")


def _load_split(folder: Path, name: str, facts: Mapping[str, Any], index: Any) -> SplitRecords:
    names = index[f"{name}/clips"].tobytes().decode("utf-8", "surrogateescape")
    prefix = f"{name}/lengths/"
    return SplitRecords(
        clips=tuple(names.split("\n")),
        order=index[f"{name}/order"],
        lengths={
            key.removeprefix(prefix): index[key] for key in index.files if key.startswith(prefix)
        },
        shards=tuple(
            Shard(**{**shard, "path": folder / shard["path"]}) for shard in facts["shards"]
        ),
    )


def _write_index(path: Path, splits: Mapping[str, SplitRecords]) -> None:
    arrays = {}
    for name, split in splits.items():
        # One string: an array of str is as wide as its longest name, and white space is in none.
        clips = "\n".join(split.clips).encode("utf-8", "surrogateescape")
        arrays[f"{name}/clips"] = np.frombuffer(clips, np.uint8)
        arrays[f"{name}/order"] = split.order
        for modality, lengths in split.lengths.items():
            arrays[f"{name}/lengths/{modality}"] = lengths
    np.savez(path, **arrays)


def check_changed(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Returns the shards with the times they have now; a changed one is read from end to end.

    Raises:
      ValueError: as of `check_shard`.
    """
    checked = []
    for shard in shards:
        # Its time tells a file that was put in its place; a copied folder is read once more.
        stat = shard.path.stat() if shard.path.exists() else None
        if not stat or (stat.st_size, stat.st_mtime_ns) != (shard.size, shard.mtime_ns):
            check_shard(shard)
        checked.append(shard._replace(mtime_ns=stat.st_mtime_ns) if stat else shard)
    return tuple(checked)


def check_shard(shard: Shard) -> None:
    """Reads one shard from end to end.

    Raises:
      ValueError: it is missing, holds another number of records, or is not what was written; names
        the file and the first damaged record.
    """
    hint = f"delete {shard.path.parents[2]} to convert again"
    wanted = f"{shard.path}: expected {shard.records} records, found"
    if not shard.path.exists():
        raise ValueError(f"{wanted} no such file\n{hint}")
    with contextlib.suppress(OSError):  # the reader below says how far it can be read
        if _sha256(shard.path) == shard.sha256:
            return
    found = size = 0
    dataset = tf.data.TFRecordDataset(str(shard.path), buffer_size=1 << 20)
    try:
        for record in dataset.as_numpy_iterator():
            found += 1
            size += 8 + 4 + len(record) + 4  # length and checksum, record and checksum
        if size != shard.path.stat().st_size:  # too little for a length is no error of the reader
            raise tf.errors.DataLossError(None, None, "truncated")
    except tf.errors.DataLossError as error:
        raise ValueError(f"{wanted} {found}: record {found + 1} is damaged\n{hint}") from error
    except tf.errors.OpError as error:
        reason = " ".join(str(error.message).split())[:200]
        raise ValueError(f"{wanted} {found}: {reason}\n{hint}") from error
    if found != shard.records:
        raise ValueError(f"{wanted} {found}\n{hint}")
    raise ValueError(f"{shard.path}: not the file that was written (sha256)\n{hint}")


def verify(records: Records) -> list[str]:
    """Reads every file of a conversion from end to end.

    Args:
      records: what `load_records` found.

    Returns:
      what is wrong, at most three lines each, which name the file and, where one is damaged, the
      record; empty when all is as it was written.
    """
    problems = []
    try:
        load_index(records.folder)
    except ValueError as error:
        problems.append(str(error))
    shards = [shard for split in records.splits.values() for shard in split.shards]
    for shard in shards:
        try:
            check_shard(shard)
        except ValueError as error:
            problems.append(str(error))
    named = {shard.path for shard in shards}
    problems += [
        f"{path}: the manifest does not name this shard: it is not read"
        for path in sorted(records.folder.rglob("*.tfrecord*"))
        if path not in named
    ]
    return problems


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(content: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=1)}\n".encode()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        file.write(_json(content))
        file.flush()
        os.fsync(file.fileno())
