"""Stores the clips of a dataset in flat files in the cache, and checks the files.

The cache has a folder for each dataset. The folder contains files `SPLIT/MODALITY/FIELD.bin`, which
have the values of a field (such as `quality`) of all frames, clip after clip. It also contains
`index.npz` (for each clip: name, position of the frames, number of frames, quality and checksum),
`data_report.json` and `manifest.json`. The manifest is written last. It contains the sha256 of all
other files, and of the rest of the manifest. Equal datasets give equal files. Features identify
people, so only the user may read the files of the cache.
"""

import contextlib
import fcntl
import hashlib
import io
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.core.batch import BATCHED, Packed
from vidjax.data.clips import DataSource, FileSource, Modality
from vidjax.data.data_report import report_modality
from vidjax.data.packed_clips import (
    DTYPES,
    FlatFile,
    PackedClips,
    StoredFile,
    complete,
    compute_checksum,
    get_dtype,
    map_again,
    measure_quality,
    pack_arrays,
    scramble,
)
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError
from vidjax.utils.files import sha256_file, sha256_json
from vidjax.utils.machine import num_cores

# If the meaning of a file or of the manifest changes, increase the version to refill the cache.
VERSION = "2.0.0"
EARLIER = "1.4.0"  # the version whose folders contain TFRecords
MAX_INDEX_BYTES = 4096  # the most bytes of `index.npz` per clip
CLIPS_AT_ONCE = 256  # clips that are hashed before files are mapped again, to free memory
DIGEST_LETTERS = 64
TICK_NS = 2 * 10**9  # the coarsest file systems store times in steps of two seconds
_LOG = logging.getLogger(__name__)


class StoredSplit(NamedTuple):
    """The clips of a split, in files or in memory, with hashes and mean qualities of the clips."""

    packed: PackedClips  # in all modalities of the dataset; names are in byte order
    lengths: dict[str, np.ndarray]  # modality of the split -> [N] int32, number of frames
    quality: dict[str, np.ndarray]  # modality -> [N] float64, the mean quality of the frames
    # Modality -> sha256 of the frames of all clips, in the order of names. It is the same for clips
    # in files and in memory.
    digests: dict[str, str]
    fingerprints: np.ndarray  # [N] uint64, equal for clips with equal frames, 0 without frames

    @property
    def clips(self) -> tuple[str, ...]:
        """N clip names in byte order."""
        return self.packed.names


class Store(NamedTuple):
    """The clips of a dataset, in files or in memory."""

    folder: Path | None  # the folder of the files, or None for clips in memory
    modalities: dict[str, Modality]  # modality -> width and dtype of its features
    splits: dict[str, StoredSplit]
    report: dict[str, Any]  # the data report without labels, which counts frames and clips

    @property
    def clips(self) -> dict[str, tuple[str, ...]]:
        """The names of all clips: split -> names in byte order."""
        return {name: split.clips for name, split in self.splits.items()}


def cache_folder(cache_dir: str | Path | None, kind: str, key: object) -> Path:
    """Returns the path `cache_dir/kind/DIGEST`, where DIGEST is a digest of the JSON value `key`.

    If `cache_dir` is None, the path is in the user's cache, see `files.cache_root`.
    """
    return files.cache_root(cache_dir) / kind / files.sha256_json(key)[:20]


def digest_files(paths: Sequence[Path], cache_dir: str | Path | None = None) -> str:
    """Returns the sha256 of the names and contents of files, in hexadecimal.

    The digest depends on the order of `paths`. The cache stores the digest, so that unchanged files
    are not read again.
    """
    began = time.time_ns()
    states = [_read_file_state(path) for path in paths]
    place = cache_folder(cache_dir, "digests", [list(map(str, paths)), states])
    with contextlib.suppress(OSError, ValueError):
        text = files.read_bytes(place, DIGEST_LETTERS, below=place.parents[1]).decode()
        if len(text) == DIGEST_LETTERS:
            return text
    sha256 = hashlib.sha256()
    groups = [paths[first : first + 64] for first in range(0, len(paths), 64)]  # for small files
    with ThreadPoolExecutor(num_cores()) as threads:
        digests = threads.map(lambda group: [*map(files.sha256_file, group)], groups)
        for path, digest in zip(paths, itertools.chain.from_iterable(digests), strict=True):
            sha256.update(f"{path.name}\n{digest}\n".encode("utf-8", "surrogateescape"))
    text = sha256.hexdigest()
    # A second change of a file within 2 seconds might not change the time of the file.
    newest = max(changed for _, _, *times in states for changed in times)
    unchanged = newest < began - TICK_NS and states == [_read_file_state(path) for path in paths]
    if unchanged and not place.parent.is_symlink():
        with contextlib.suppress(OSError):  # the cache may be read-only
            files.make_private(place.parent)
            files.write_bytes(place, text.encode(), sync=False)
    return text


def _read_file_state(path: Path) -> tuple[int, ...]:
    """Returns inode, size and times of a file. Every write changes at least one of them."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def fill(folder: Path, write: Callable[[Path], None], last: str = "") -> None:
    """Fills a folder of the cache, if it does not exist or is incomplete.

    The function `write` gets a folder with a temporary name, and writes the files to this folder.
    The folder is renamed when it is complete. `last` is the name of the file that is written last.
    If it is given, a folder without this file counts as incomplete. Other processes wait until the
    folder is filled. Every call sets the modification time of the folder to now.
    """
    if not files.exists(folder / last):
        with exclusive(folder):
            if not files.exists(folder / last):
                remove(folder)  # it is incomplete
                with files.atomic_folder(folder) as partial:
                    write(partial)
    with contextlib.suppress(OSError):  # the cache may be read-only
        os.utime(folder)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks a folder of the cache in a `with` block, so that only one process fills it."""
    root = folder.parent
    files.make_private(root)
    path = root / f"{folder.name}.lock"
    with files.open_regular(path, os.O_RDWR | os.O_CREAT, below=root.parent) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("waiting for another process to fill %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"the cache '{root}' is on a drive without locks, like some network and cloud "
                f"drives ({error.strerror})\n"
                "set the variable VIDJAX_CACHE to a folder on another disk"
            ) from error
        yield


def convert(source: FileSource, cache_dir: str | Path | None = None) -> Store:
    """Returns the clips of a dataset, from flat files in the cache.

    If the cache does not contain the files, reads the dataset and writes the files.

    Args:
      source: the dataset.
      cache_dir: the cache, by default `$VIDJAX_CACHE` or `~/.cache/vidjax`.

    Raises:
      UserError: a clip is malformed, a clip is in two splits, files of the dataset change during
        the conversion, or files of the cache are damaged.
    """
    fingerprint = source.fingerprint()
    folder, earlier = (
        cache_folder(cache_dir, source.kind, [version, fingerprint])
        for version in (VERSION, EARLIER)
    )

    def write(partial: Path) -> None:
        if earlier.exists():
            _LOG.info("vidjax no longer uses the folder %s: you may delete it", earlier)
        write_store(source, fingerprint, partial)
        if source.fingerprint() != fingerprint:
            raise UserError(
                f"{source.place}: files were changed while they were converted\n"
                "run the command again when no program writes to them"
            )

    fill(folder, write, last="manifest.json")
    return load_store(folder)


def write_store(source: FileSource, fingerprint: list[dict[str, Any]], folder: Path) -> None:
    """Reads a dataset, and writes its flat files and their manifest to an empty folder.

    The manifest contains `fingerprint`, the digests of the files of the dataset.
    """
    _LOG.info("converting %s", source.place)
    packed = source.read(folder)
    store = make_store(source, packed)
    paths = [*folder.rglob("*.bin")]
    with ThreadPoolExecutor(num_cores()) as threads:
        state_of = dict(zip(paths, threads.map(_describe_file, paths), strict=True))
    splits: dict[str, dict[str, Any]] = {}
    index: dict[str, np.ndarray] = {}
    for name, split in store.splits.items():
        # Names are joined by newlines, because an array of str pads all names to the longest name.
        clips = "\n".join(split.clips).encode("utf-8", "surrogateescape")
        index[f"{name}/clips"] = np.frombuffer(clips, np.uint8)
        index[f"{name}/fingerprints"] = split.fingerprints
        states = dict[str, dict[str, Any]]()
        for modality, frames in packed[name].frames.items():
            arrays = {
                "start": np.asarray(frames.start),
                "lengths": split.lengths[modality],
                "quality": split.quality[modality],
                "checksums": split.packed.checksums[modality],
            }
            index |= {f"{name}/{key}/{modality}": values for key, values in arrays.items()}
            if len(frames.quality):
                place, dtype = folder / name / modality, np.dtype(frames.features.dtype).name
                found = {field: state_of[place / f"{field}.bin"] for field in BATCHED}
                states[modality] = {"dtype": dtype, "files": found}
        count = len(split.clips)
        splits[name] = {"clips": count, "digests": split.digests, "modalities": states}
    np.savez(folder / "index.npz", **index)  # pyright: ignore[reportArgumentType]
    files.write_json(folder / "data_report.json", store.report)
    manifest = {
        "sources": fingerprint,
        "modalities": {name: kind._asdict() for name, kind in store.modalities.items()},
        "files": {name: sha256_file(folder / name) for name in ("index.npz", "data_report.json")},
        "splits": splits,
    }
    files.write_manifest(folder / "manifest.json", manifest)


def _describe_file(path: Path) -> dict[str, Any]:
    """Returns a dict of a file: `size` (bytes), `mtime_ns` (last change) and `sha256` (hex)."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_file(path)}


def make_store(source: DataSource, packed: Mapping[str, PackedClips]) -> Store:
    """Checks the splits of a dataset. Returns a store with clips, digests and a data report.

    `packed` is split -> its clips, in memory or in files. The report counts clips and frames.
    Raises UserError if a split has no clips, or if a clip is in two splits.
    """
    modalities = _join_modalities(packed, source)
    for name, clips in packed.items():
        if not clips.names:
            paths = ", ".join(str(source.path_of(modality, name)) for modality in clips.frames)
            raise UserError(
                f"{paths or source.place}: split {name!r} has no clips: "
                "add clips, or remove the split"
            )
    _refuse_shared_clips(packed, source.place)
    keys = [(split, name) for split, clips in packed.items() for name in clips.frames]

    def measure(key: tuple[str, str]) -> tuple[Any, ...]:
        (split, name), frames = key, packed[key[0]].frames[key[1]]
        path = source.path_of(name, split)
        return *hash_frames(frames), *report_modality(packed[split], name, path)

    with ThreadPoolExecutor(num_cores()) as threads:
        measured = dict(zip(keys, threads.map(measure, keys), strict=True))
    splits, report = {}, {"version": VERSION, "splits": {}}
    for split, clips in packed.items():
        digests, checksums, counts, prints = (
            {name: measured[split, name][i] for name in clips.frames} for i in range(4)
        )
        splits[split] = StoredSplit(
            packed=complete(clips, modalities)._replace(checksums=checksums),
            lengths=clips.lengths,
            quality={name: measure_quality(frames) for name, frames in clips.frames.items()},
            digests=digests,
            fingerprints=join_fingerprints(prints),
        )
        without_frames = ~np.any([lengths > 0 for lengths in clips.lengths.values()], axis=0)
        report["splits"][split] = {
            "clips": len(clips.names),
            "clips_without_frames": int(without_frames.sum()),
            "modalities": counts,
        }
    return Store(None, modalities, splits, report)


def hash_frames(frames: Packed) -> tuple[str, np.ndarray]:
    """Returns the sha256 of all frames of N clips, and a checksum per clip, [N] uint64.

    The frames are hashed in the order of the names of the clips, not in the order of storage. A
    checksum covers the features of a clip.
    """
    sha256 = hashlib.sha256(np.ascontiguousarray(frames.length).data)
    checksums = np.zeros(len(frames.length), np.uint64)
    places = zip(frames.start.tolist(), frames.length.tolist(), strict=True)
    mapped = frames
    for clip, (start, length) in enumerate(places):
        if clip % CLIPS_AT_ONCE == 0:
            mapped = map_again(frames)
        parts = [getattr(mapped, field)[start : start + length] for field in BATCHED]
        for part in parts:
            sha256.update(part.data)
        checksums[clip] = compute_checksum(parts[0])
    return sha256.hexdigest(), checksums


def _join_modalities(packed: Mapping[str, PackedClips], source: DataSource) -> dict[str, Modality]:
    """Returns modality -> its feature width, and a dtype that fits the features of all splits.

    Raises UserError if the width is not the same in all splits, or if no clip has a frame.
    """
    modalities: dict[str, Modality] = {}
    first_split: dict[str, str] = {}
    dropped = 0
    for split, clips in packed.items():
        for name, frames in clips.frames.items():
            dropped += sum(clips.counts[name].skipped.values())
            if not len(frames.quality):  # without frames, width and dtype are unknown
                continue
            first = first_split.setdefault(name, split)
            features = frames.features
            modality = Modality(features.shape[1], np.dtype(features.dtype).name)
            known = modalities.get(name, modality)
            if known.dim != modality.dim:
                raise UserError(
                    f"{name}: features have width {known.dim} in {source.path_of(name, first)}, "
                    f"but width {modality.dim} in {source.path_of(name, split)}\n"
                    "compute the features of all splits with the same program"
                )
            dtype = np.result_type(known.dtype, modality.dtype)
            modalities[name] = Modality(known.dim, dtype.name)
    if not modalities:
        reason = "no clip has a frame"
        if dropped:
            reason = f"all {dropped} frames have a NaN, an Inf or a value beyond float32"
        raise UserError(
            f"{source.place}: {reason}\ncompute the features again, or name another dataset"
        )
    return dict(sorted(modalities.items()))


def _refuse_shared_clips(packed: Mapping[str, PackedClips], place: str) -> None:
    """Raises UserError if a clip is in two splits, for example in train and val."""
    owners: dict[str, str] = {}
    shared = [
        f"{clip} ({owners[clip]} and {name})"
        for name, split in sorted(packed.items())
        for clip in split.names
        if owners.setdefault(clip, name) != name
    ]
    if shared:
        more = ", ..." if len(shared) > 5 else ""
        clips = f"{messages.count(len(shared), 'clip')} {'are' if shared[1:] else 'is'}"
        raise UserError(
            f"{place}: {clips} in two splits: remove each clip from one split\n"
            f"{', '.join(shared[:5])}{more}"
        )


def join_fingerprints(prints: Mapping[str, np.ndarray]) -> np.ndarray:
    """Joins the fingerprints (hashes) of a clip in all modalities to one, for each of N clips.

    `prints` is modality -> [N] uint64. Returns [N] uint64.
    """
    names = {name: np.uint64(int(sha256_json(name)[:16], 16)) for name in prints}
    parts = [scramble(x ^ names[name]) * (x > 0) for name, x in prints.items()]
    return np.asarray(np.sum(parts, axis=0, dtype=np.uint64))


def remove(folder: Path) -> bool:
    """Removes the files of a dataset from a folder of the cache, and then the folder.

    Files of other programs are kept. Returns False if the folder still exists afterwards.
    """
    # Without the manifest, which is removed first, the folder counts as incomplete.
    if folder.is_symlink() or files.remove_ours(folder, r"manifest\.json"):
        return not files.exists(folder)
    # An earlier version has written TFRecords and two files of TFDS.
    ours = r"[a-z]+\.bin|iqiyi_vid-.+|dataset_info\.json|features\.json"
    for outer in sorted(folder.iterdir()):
        if outer.is_dir() and not outer.is_symlink():
            for inner in sorted(outer.iterdir()):
                files.remove_ours(inner, ours)
            files.remove_ours(outer, "")
    return files.remove_ours(folder, r"index\.npz|data_report\.json")


def load_store(folder: Path) -> Store:
    """Opens a dataset in the cache. Checks the sha256 of files whose size or time has changed."""
    try:
        manifest = files.read_manifest(folder / "manifest.json", below=folder.parents[1])
        modalities = {name: Modality(**kind) for name, kind in manifest["modalities"].items()}
        clips = sum(split["clips"] for split in manifest["splits"].values())
        limit = files.JSON_BYTES + MAX_INDEX_BYTES * clips
        report: Any = files.parse_json(_read(folder / "data_report.json", manifest, limit))
        index = files.load_npz(io.BytesIO(_read(folder / "index.npz", manifest, limit)), limit)
        splits = {
            name: _load_split(folder, modalities, name, split, index)
            for name, split in manifest["splits"].items()
        }
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
        is_clear = isinstance(error, (FileNotFoundError, UserError))
        reason = str(error).splitlines()[0] if is_clear else "a file has an unknown layout"
        raise UserError(
            f"{folder}: the converted data are damaged: {reason}\n"
            "delete this folder to convert again"
        ) from error
    return Store(folder, modalities, splits, report)


def _read(path: Path, manifest: Mapping[str, Any], limit: int) -> bytes:
    """Reads a file of at most `limit` bytes. Its sha256 must be as in the manifest."""
    content = files.read_bytes(path, limit, below=path.parents[2])
    if hashlib.sha256(content).hexdigest() != manifest["files"][path.name]:
        raise UserError(f"{path.name} does not match its sha256")
    return content


def _load_split(
    folder: Path,
    modalities: Mapping[str, Modality],
    name: str,
    manifest: Mapping[str, Any],
    index: Mapping[str, np.ndarray],
) -> StoredSplit:
    """Opens the files of the split `name` in a folder of the cache, and returns its clips.

    `manifest` is the entry of the split in the manifest. `index` has the arrays of `index.npz`. If
    they contradict each other or the files, raises an error, such as UserError or KeyError.
    """
    start, lengths, quality, checksums = (
        {key.removeprefix(prefix): index[key] for key in index if key.startswith(prefix)}
        for prefix in (f"{name}/{x}/" for x in ("start", "lengths", "quality", "checksums"))
    )
    frames = {}
    for modality, kept in manifest["modalities"].items():
        stored, (dim, dtype), places = kept["dtype"], modalities[modality], start[modality]
        ends, count = places + lengths[modality], int(lengths[modality].sum(dtype=np.int64))
        if (
            stored not in DTYPES
            or min(places.min(), lengths[modality].min(), count - ends.max()) < 0
        ):
            raise UserError(f"{name}/{modality}: index.npz or manifest.json has a wrong value")
        flat = {}
        for field, state in kept["files"].items():
            file = StoredFile(folder / name / modality / f"{field}.bin", **state)
            shape = (count, dim) if field == "features" else (count,)
            flat[field] = FlatFile(file, shape, get_dtype(field, stored), get_dtype(field, dtype))
        frames[modality] = pack_arrays(flat, lengths[modality])._replace(start=places)
    names = index[f"{name}/clips"].tobytes().decode("utf-8", "surrogateescape").split("\n")
    packed = PackedClips(tuple(names), frames, {}, checksums)
    prints = index[f"{name}/fingerprints"]
    return StoredSplit(complete(packed, modalities), lengths, quality, manifest["digests"], prints)
