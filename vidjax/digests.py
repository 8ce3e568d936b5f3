"""Digests of files and of JSON values."""

import hashlib
import io
import json
from pathlib import Path


def sha256_file(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
