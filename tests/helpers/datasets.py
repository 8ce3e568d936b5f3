"""Datasets by name, and the records of official files."""

import hashlib
import json
from pathlib import Path
from typing import Any

from vidjax.data import sources
from vidjax.data.iqiyi_vid import OfficialFiles
from vidjax.data.records.conversion import convert
from vidjax.data.records.dataset import Dataset
from vidjax.data.records.manifest import Records
from vidjax.runs.config import default


def load_dataset(
    name: str, *, directory: str | Path | None = None, cache_dir: str | Path | None = None,
    **fields: Any,
) -> Dataset:  # fmt: skip
    """Returns the dataset of a configuration with these fields of `config.data`."""
    data = default().data
    data.update(name=name, dir=str(directory) if directory else None, **fields)
    data.cache_dir = str(cache_dir) if cache_dir else None
    return sources.load(data)


def prepare(directory: str | Path, cache_dir: str | Path | None = None, **options: Any) -> Records:
    """Converts official files to records."""
    return convert(OfficialFiles(directory, cache_dir=cache_dir), cache_dir, **options)


def record_digests(folder: Path) -> dict[str, str]:
    """Returns file -> sha256 of a folder of records, without sources and times in the manifest."""
    found = {}
    for path in sorted(filter(Path.is_file, folder.rglob("*"))):
        content = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(content)
            del manifest["sha256"], manifest["sources"]
            for split in manifest["splits"].values():
                for shard in split["shards"]:
                    del shard["mtime_ns"]
            content = json.dumps(manifest).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found
