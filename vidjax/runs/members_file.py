"""Reads and writes `members.npz`: the members of a run, and the training clips of each member."""

import hashlib
import io
import json
from pathlib import Path

import msgspec
import numpy as np

from vidjax.core.ensemble import Member, TrainingSets
from vidjax.utils import files
from vidjax.utils.errors import UserError

FILE = "members.npz"
MAX_BYTES = 1 << 30  # of `members.npz`, unpacked


def digest(training_sets: TrainingSets) -> str:
    """Returns the sha256 of all values in `training_sets`, in hexadecimal."""
    sha256 = hashlib.sha256(training_sets.trained.tobytes())
    sha256.update((json.dumps(training_sets.members) + "\n".join(training_sets.clips)).encode())
    return sha256.hexdigest()


def save(folder: Path, training_sets: TrainingSets) -> None:
    """Writes `training_sets` to `members.npz` in the folder of a run."""
    content = io.BytesIO()
    np.savez_compressed(
        content,
        members=np.frombuffer(json.dumps(training_sets.members).encode(), np.uint8),
        clips=np.frombuffer("\n".join(training_sets.clips).encode(), np.uint8),
        trained=training_sets.trained,
    )
    files.write_bytes(folder / FILE, content.getvalue())


def load(folder: Path) -> TrainingSets:
    """Reads `members.npz` of a run's folder."""
    path = folder / FILE
    try:
        arrays = files.read_npz(path, MAX_BYTES)
    except FileNotFoundError:
        raise UserError(f"'{path}' is missing") from None
    try:
        rows = files.parse_json(arrays["members"].tobytes())
        members = msgspec.convert(rows, tuple[Member, ...])
        names, trained = arrays["clips"].tobytes().decode(), arrays["trained"]
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"'{path}' is damaged: it does not list members and clips") from error
    shape = (len(members), names.count("\n") + 1)
    if not members or trained.dtype != bool or trained.shape != shape:
        raise UserError(f"'{path}' is damaged: its arrays do not fit each other")
    return TrainingSets(members, tuple(names.split("\n")), trained)
