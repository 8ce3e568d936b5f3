"""Lists the TFRecord files (shards) of a dataset, with their sizes and digests.

A folder of the cache contains the shards, `index.npz` (names, order, lengths and quality of clips),
`data_report.json` and `manifest.json`. The manifest is written last, and contains the sha256 of
all other files and of its other entries. Without the manifest, a shard that was cut between two
records would be read without an error.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.data.clips import Modality
from vidjax.data.packed_clips import DTYPES
from vidjax.data.records.shards import DEPTH, NAME, Records, Shard, SplitRecords, check_changed
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.files import hash_opened, sha256_file

MAX_INDEX_BYTES = 4096  # the most bytes of `index.npz` per clip


def write_manifest(records: Records, fingerprint: list[dict[str, Any]]) -> None:
    """Writes `index.npz`, `data_report.json`, and then `manifest.json`, which lists all files."""
    folder = records.folder
    assert folder
    _write_index(folder / "index.npz", records.splits)
    files.write_json(folder / "data_report.json", records.report)
    splits = {}
    for name, split in records.splits.items():
        shards = [{**x._asdict(), "path": str(x.path.relative_to(folder))} for x in split.shards]
        splits[name] = {"records": len(split.clips), "shards": shards}
    manifest = {
        "sources": fingerprint,
        "modalities": {name: kind._asdict() for name, kind in records.modalities.items()},
        "files": {name: sha256_file(folder / name) for name in ("index.npz", "data_report.json")},
        "splits": splits,
    }
    files.write_manifest(folder / "manifest.json", manifest)


def remove(folder: Path) -> bool:
    """Removes converted clips. Returns False if files of other programs stay in the folder."""
    place = folder / NAME
    # Without the manifest, which is removed first, the folder counts as incomplete.
    if folder.is_symlink() or files.remove_ours(folder, r"manifest\.json"):
        return not files.exists(folder)
    if place.is_dir() and not place.is_symlink():
        for version in sorted(place.iterdir()):
            files.remove_ours(version, rf"{NAME}-.+|dataset_info\.json|features\.json")
    files.remove_ours(place, "")
    return files.remove_ours(folder, r"index\.npz|data_report\.json")


def load_records(folder: Path) -> Records:
    """Loads the list of converted clips. Checks TFRecord files whose size or time changed."""
    records = load_index(folder)
    splits = {
        name: split._replace(shards=check_changed(split.shards))
        for name, split in records.splits.items()
    }
    return records._replace(splits=splits)


def load_index(folder: Path) -> Records:
    """Loads the list of converted clips, without a check of the TFRecord files."""
    try:
        manifest = files.read_manifest(folder / "manifest.json", below=folder.parents[1])
        modalities = {
            name: _parse_modality(**kind) for name, kind in manifest["modalities"].items()
        }
        clips = sum(split["records"] for split in manifest["splits"].values())
        with _open(folder / "data_report.json", manifest) as file:
            report: Any = files.parse_json(file.readall())
        with _open(folder / "index.npz", manifest) as file:
            index = files.load_npz(file, files.JSON_BYTES + MAX_INDEX_BYTES * clips)
        splits = {
            name: _load_split(folder, name, split, index)
            for name, split in manifest["splits"].items()
        }
        if not all(isinstance(report["splits"][name]["modalities"], dict) for name in splits):
            raise UserError("data_report.json belongs to other data")
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
        is_clear = isinstance(error, (FileNotFoundError, UserError))
        reason = str(error).splitlines()[0] if is_clear else "a file has an unknown layout"
        raise UserError(
            f"{folder}: the converted data are damaged: {reason}\n"
            "delete this folder to convert again"
        ) from error
    return Records(folder, modalities, splits, report)


@contextlib.contextmanager
def _open(path: Path, manifest: Mapping[str, Any]) -> Iterator[io.FileIO]:
    """Opens a file in a `with` block. Raises UserError if its sha256 is not as in the manifest."""
    with files.open_regular(path, below=path.parents[2]) as file:
        if hash_opened(file) != manifest["files"][path.name]:
            raise UserError(f"{path.name} does not match its sha256")
        file.seek(0)
        yield file


def _parse_modality(dim: int, dtype: str) -> Modality:
    if not 1 <= dim <= 1 << 24 or dtype not in DTYPES:
        raise UserError(f"features cannot have the width {dim!r} and the dtype {dtype!r}")
    return Modality(dim, dtype)


def _load_split(
    folder: Path, name: str, manifest: Mapping[str, Any], index: Mapping[str, np.ndarray]
) -> SplitRecords:
    """Returns the clips of a split from its entry in the manifest and the arrays of the index."""
    names = index[f"{name}/clips"].tobytes().decode("utf-8", "surrogateescape")
    lengths, quality = (
        {key.removeprefix(prefix): index[key] for key in index if key.startswith(prefix)}
        for prefix in (f"{name}/lengths/", f"{name}/quality/")
    )
    split = SplitRecords(
        clips=tuple(names.split("\n")),
        order=index[f"{name}/order"],
        lengths=lengths,
        quality=quality,
        shards=tuple(_parse_shard(folder, **shard) for shard in manifest["shards"]),
    )
    count = len(split.clips)
    if not (
        all(array.dtype.kind == "i" for array in (split.order, *lengths.values()))
        and all(array.shape == (count,) and array.min() >= 0 for array in lengths.values())
        and all(array.shape == (count,) and array.dtype.kind == "f" for array in quality.values())
        and lengths.keys() == quality.keys()
        and np.array_equal(np.sort(split.order), np.arange(count))
        and manifest["records"] == count == sum(shard.records for shard in split.shards)
    ):
        raise UserError(f"index.npz: the clips of split {name} do not match its shards")
    return split


def _parse_shard(
    folder: Path, path: str, records: int, size: int, mtime_ns: int, sha256: str
) -> Shard:
    inside = Path(path)
    if inside.is_absolute() or ".." in inside.parts or len(inside.parts) != DEPTH:
        raise UserError("a shard is outside the folder")
    if not all(isinstance(number, int) and number >= 0 for number in (records, size, mtime_ns)):
        raise UserError(f"{path}: a number is negative or not whole")
    return Shard(folder / inside, records, size, mtime_ns, sha256)


def _write_index(path: Path, splits: Mapping[str, SplitRecords]) -> None:
    arrays = {}
    for name, split in splits.items():
        # Names are joined by newlines, because an array of str pads all names to the longest name.
        clips = "\n".join(split.clips).encode("utf-8", "surrogateescape")
        arrays[f"{name}/clips"] = np.frombuffer(clips, np.uint8)
        arrays[f"{name}/order"] = split.order
        for modality, lengths in split.lengths.items():
            arrays[f"{name}/lengths/{modality}"] = lengths
            arrays[f"{name}/quality/{modality}"] = split.quality[modality]
    np.savez(path, **arrays)
