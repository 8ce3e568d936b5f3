"""A clip as an `.npz` file."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.untrusted.names import clean_name_at, show
from vidjax.data.untrusted.packing import Clip
from vidjax.suggest import closest


def read_npz(paths: Sequence[Path]) -> Iterator[Clip]:
    """Yields the clips of `.npz` files, one in memory at a time."""
    for path in paths:
        name = clean_name_at(f"{path}:", path.stem)
        try:
            # An array of Python objects would be a pickle: it is refused.
            with path.open("rb") as raw:
                file = np.load(raw, allow_pickle=False)
                if isinstance(file, np.ndarray):
                    raise ValueError("one array, as .npy files hold: use numpy.savez")
                with file:
                    arrays = {key: file[key] for key in file.files}
        except OSError as error:
            if error.errno:
                raise
            raise ValueError(f"{path}: damaged, or no .npz file: {error}") from None
        except Exception as error:  # zlib, zipfile and numpy raise many types on damaged archives
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if "Object arrays" in reason:
                reason = "holds Python objects: save arrays of numbers [T, D]"
            raise ValueError(f"{path}: {reason}") from None
        yield Clip(name, str(path), _by_modality(arrays, str(path)), path.stem)


def _by_modality(arrays: Mapping[str, np.ndarray], place: str) -> dict[str, dict[str, np.ndarray]]:
    """Returns modality -> field -> array, from arrays named `face`, `face_quality` and so on.

    Args:
      arrays: the arrays of one clip.
      place: the file, for messages.

    Raises:
      ValueError: a field is misspelt, such as `face_qualty`.
    """
    modalities: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        name, _, field = key.rpartition("_")
        if name in arrays and field in FRAME_FIELDS:
            modalities.setdefault(name, {})[field] = array
        elif name in arrays and (meant := closest(field, FRAME_FIELDS, cutoff=0.75)):
            raise ValueError(f"{place}: no field '{show(key)}'; did you mean '{name}_{meant}'?")
        else:
            modalities.setdefault(key, {})["features"] = array
    return modalities
