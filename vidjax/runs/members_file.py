"""Stores the identities of a run, its members (nets of an ensemble), and their training clips.

Every checkpoint contains this content as two JSON values. The files `identities.json` and
`members.npz` in the folder of the run are copies for users and reports. A run is always restored
from a checkpoint, never from these copies.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vidjax.core.ensemble import Member, TrainingSets
from vidjax.runs import checkpoint, results
from vidjax.runs.checkpoint import CheckpointError
from vidjax.runs.run_folder import IDENTITIES
from vidjax.utils import files, json_files

FILE = "members.npz"
REMEDY = "the run was changed: use another copy of it"
Lists = tuple[tuple[str, ...], TrainingSets]  # the identities and the training sets of a run


class _Members(msgspec.Struct):
    """The JSON value `members` of a checkpoint: nets of an ensemble and their training clips."""

    members: tuple[Member, ...]
    clips: tuple[str, ...]
    trained: tuple[bytes, ...]  # of each member: a bit per clip, in base64


def make_lists(identities: Sequence[str], training_sets: TrainingSets) -> dict[str, Any]:
    """Returns the identities and the members of a run as JSON values for a checkpoint.

    `training_sets` has the members (nets of an ensemble) and the training clips of each member. The
    keys of the result are `identities` and `members`.
    """
    members, clips, trained = training_sets
    bits = tuple(row.tobytes() for row in np.packbits(trained, axis=1))
    content = msgspec.to_builtins(_Members(members, clips, bits))
    return {"identities": list(identities), "members": content}


def read_lists(saved: checkpoint.Checkpoint) -> Lists:
    """Reads the identities of a run, and the training clips of its members, from a checkpoint.

    The members are the nets of an ensemble. Raises CheckpointError if a file is damaged.
    """
    paths = [saved.folder / "state" / name / "data.json" for name in checkpoint.LISTS]
    if not any(map(files.exists, paths)):
        raise CheckpointError(
            f"'{saved.folder}' is not usable: an earlier version of vidjax wrote it\n"
            "train the run again, in a new folder"
        )
    try:
        identities, sets = _read(*paths)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"'{saved.folder}' is not usable: {reason}\n{REMEDY}") from error
    if not sets.trained.size or sets.trained.shape != (len(sets.members), len(sets.clips)):
        raise CheckpointError(f"'{saved.folder}': its list of training clips is wrong\n{REMEDY}")
    return identities, sets


def _read(identities: Path, members: Path) -> Lists:
    content = json_files.read(members, _Members, REMEDY, results.MAX_IDENTITIES_BYTES)
    rows = np.array([np.frombuffer(bits, np.uint8) for bits in content.trained], np.uint8)
    trained = np.unpackbits(rows, axis=1, count=len(content.clips)).astype(bool)
    sets = TrainingSets(content.members, content.clips, trained)
    return tuple(results.load_identities(identities)), sets


def write_copies(folder: Path, identities: Sequence[str], training_sets: TrainingSets) -> None:
    """Writes `identities.json` and `members.npz` (the training sets) to the folder of a run."""
    files.write_json(folder / IDENTITIES, list(identities))
    texts = {"members": json.dumps(training_sets.members), "clips": "\n".join(training_sets.clips)}
    arrays: Any = {name: np.frombuffer(x.encode(), np.uint8) for name, x in texts.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays, trained=training_sets.trained)
    files.write_bytes(folder / FILE, content.getvalue())
