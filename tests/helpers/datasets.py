"""Datasets by name, and the stored clips of official files."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from vidjax.data import sources
from vidjax.data.iqiyi_vid import OfficialFiles
from vidjax.data.store import convert
from vidjax.runs.config import default


def load_dataset(name, *, directory=None, cache_dir=None, **fields):
    """Returns the dataset of a configuration with these fields of `config.data`."""
    data = default().data
    folders = {"dir": directory, "cache_dir": cache_dir}
    data.update(name=name, **{key: x and str(x) for key, x in folders.items()}, **fields)
    return sources.load(data)


def prepare(directory, cache_dir=None, **options) -> Any:
    return convert(OfficialFiles(directory, cache_dir=cache_dir), cache_dir, **options)


def record_digests(folder):
    """Returns file -> sha256 of stored clips, without sources and times in the manifest."""
    found = {}
    for path in sorted(filter(Path.is_file, folder.rglob("*"))):
        content = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(content)
            del manifest["sha256"], manifest["sources"]
            content = re.sub(rb'"mtime_ns": \d+', b"", json.dumps(manifest).encode())
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found
