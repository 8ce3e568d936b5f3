"""A clip as an `.npz` file."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vidjax import files
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.untrusted.names import clean_name_at, show
from vidjax.data.untrusted.packing import Clip
from vidjax.errors import UserError, closest
from vidjax.machine import memory_bytes

CLIP_BYTES = 2 << 30  # of the arrays of one clip: hours of frames, each of them kept


def read_npz(paths: Sequence[Path]) -> Iterator[Clip]:
    """Yields the clips of `.npz` files, one in memory at a time.

    Raises:
      ValueError: a file is damaged, no regular file, or unpacks to more than a clip may hold.
    """
    limit = min(CLIP_BYTES, memory_bytes() // 8)
    for path in paths:
        name = clean_name_at(f"{path}:", path.stem)
        with files.open_input(path) as file:
            try:
                arrays = files.load_npz(file, limit)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from error
        yield Clip(name, str(path), _by_modality(arrays, str(path)), path.stem)


def _by_modality(arrays: Mapping[str, np.ndarray], place: str) -> dict[str, dict[str, np.ndarray]]:
    """Returns modality -> field -> array, from arrays named `face`, `face_quality` and so on.

    Args:
      arrays: the arrays of one clip.
      place: the file, for messages.

    Raises:
      ValueError: a field is misspelt, such as `face_qualty`; or an array was saved without a name.
    """
    modalities: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        if re.fullmatch(r"arr_\d+", key):
            raise UserError(
                f"{place}: '{key}' is an array without a name\n"
                "name its modality: numpy.savez(file, face=array)"
            )
        name, _, field = key.rpartition("_")
        if name in arrays and field in FRAME_FIELDS:
            modalities.setdefault(name, {})[field] = array
        elif name in arrays and (meant := closest(field, FRAME_FIELDS, cutoff=0.75)):
            raise UserError(f"{place}: no field '{show(key)}'; did you mean '{name}_{meant}'?")
        else:
            modalities.setdefault(key, {})["features"] = array
    return modalities
