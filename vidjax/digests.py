"""Digests of files and of JSON values."""

import hashlib
import io
import json
import os
from pathlib import Path

SMALL_BYTES = 1 << 20  # a file of more is read in parts, which take longer for a small one


def sha256_file(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size > SMALL_BYTES:
            return sha256_opened(file)
        return hashlib.sha256(file.readall()).hexdigest()


def sha256_opened(file: io.FileIO) -> str:
    """Returns the sha256 of an open file's bytes, in hexadecimal."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Returns the sha256 of a value's compact JSON text, in hexadecimal; dicts keep their order."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def sha256_folder(folder: Path) -> dict[str, str]:
    """Returns relative path -> sha256 of every file below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in paths}
