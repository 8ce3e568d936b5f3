"""Reads and writes files of a user's own features: `.npz` files and parquet tables.

An `.npz` file usually contains a single clip, with arrays such as `face` [T, D] and `face_quality`
[T]. If it contains N clips, the array `clips` [N] has their names, the other arrays have the frames
of all clips, and `face_length` [N] has the number of frames of each clip. If `vidjax extract` wrote
the file, the array `nets` names the neural nets that computed the features, by their digests. A
parquet table has a row per frame.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from vidjax.data import parquet
from vidjax.data.packed_clips import FRAME_FIELDS
from vidjax.data.packing import Clip, group_by_modality
from vidjax.utils import files
from vidjax.utils.errors import UserError, prefix_errors
from vidjax.utils.groups import group_by_key
from vidjax.utils.machine import memory_bytes
from vidjax.utils.names import clean_name_at, show

MAX_CLIP_BYTES = 2 << 30  # limit for the arrays of a clip, enough for hours of video
FLOAT_BYTES = 4  # bytes of a float32
NETS = "nets"  # the array with `face SHA256`, the digest of the net of each modality
Nets = Mapping[str, str]  # modality -> digest of the net that computed its vectors
NO_NETS: Nets = MappingProxyType({})
Text = tuple[list[str], np.ndarray]  # see `parquet.Rows.text`


def read_clips(
    paths: Sequence[Path], folder: Path | None = None, nets: Nets = NO_NETS
) -> Iterator[Clip]:
    """Yields the clips in files, reading one file at a time.

    Args:
      paths: a single parquet table, or `.npz` files.
      folder: the folder of the split. The clip in `folder/DAY/CLIP.npz` is called `DAY/CLIP`. If
        `folder` is None, the clip is called `CLIP`.
      nets: modality -> digest of a net. A file with vectors of other nets raises UserError.
    """
    limit = min(MAX_CLIP_BYTES, memory_bytes() // 8)
    for path in paths:
        if path.suffix == ".parquet":
            yield from read_parquet(path)
            continue
        group = "" if path.parent == (folder or path.parent) else f"{path.parent.name}/"
        name = clean_name_at(str(path), given := f"{group}{path.stem}")
        with files.open_input(path) as file, prefix_errors(str(path)):
            size = os.fstat(file.fileno()).st_size
            arrays = files.load_npz(file, min(limit, files.max_unpacked_bytes(size)))
        check_nets(path, _take_nets(arrays), nets)
        if has_several_clips(arrays):
            yield from _split(arrays, str(path), group)
        else:
            yield Clip(name, str(path), group_by_modality(arrays, str(path)), given)


def _take_nets(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Removes the array `nets` from the arrays of an `.npz` file, and returns its content.

    The content is modality -> digest of the net that computed the vectors. Without the array, it is
    {}.
    """
    # If `nets` has numbers instead of texts, it is a modality.
    if NETS not in arrays or arrays[NETS].dtype.kind != "U":
        return {}
    pairs = (str(line).partition(" ") for line in arrays.pop(NETS).flat)
    return {modality: digest for modality, _, digest in pairs}


def check_nets(path: Path, made: Nets, wanted: Nets) -> None:
    """Raises UserError if vectors in the file `path` are from other nets than those of a gallery.

    `made` (for the file) and `wanted` (for the gallery) are modality -> digest of a net. If the
    file has no digest for a modality, the modality is accepted.
    """
    for modality, digest in wanted.items():
        if made.get(modality, digest) != digest:
            raise UserError(
                f"the {modality} vectors in '{path}' are not from the model of the gallery\n"
                "extract the features with the models of the gallery (--models=DIR), or create "
                "another gallery with the models of these features"
            )


def has_several_clips(arrays: Mapping[str, np.ndarray]) -> bool:
    """Returns True if the arrays of an `.npz` file contain several clips."""
    # If `clips` has numbers instead of names, it is a modality of a single clip.
    return "clips" in arrays and arrays["clips"].dtype.kind == "U"


def _split(arrays: Mapping[str, np.ndarray], path: str, group: str = "") -> Iterator[Clip]:
    """Yields the clips of an `.npz` file that contains several clips.

    `arrays` are name -> array. `group` is put before the names of the clips. Errors begin with
    `path`.
    """
    names = arrays["clips"]
    length, frames = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for key, array in arrays.items():
        modality, _, field = key.rpartition("_")
        if field == "length" and modality in arrays:
            length[modality] = array
        elif key != "clips":
            frames[key] = array
    grouped, starts = group_by_modality(frames, path), dict[str, np.ndarray]()
    for modality, fields in grouped.items():
        count = length.get(modality, np.empty(0))
        if (
            count.dtype.kind not in "iu" or count.shape != names.shape or (count < 0).any()
            # A sum of large integers could overflow.
            or any(array.shape[:1] != (count.sum(dtype=float),) for array in fields.values())
        ):  # fmt: skip
            raise UserError(
                f"{path}: '{modality}_length' does not match the clips and frames of '{modality}'\n"
                f"write the number of frames of each clip into '{modality}_length'"
            )
        starts[modality] = np.append(0, np.cumsum(count, dtype=np.int64))
    # One clip at a time, because a small file may contain millions of equal names.
    for number, given in enumerate(map(str, names.flat)):
        modalities = {
            modality: {
                field: array[starts[modality][number] : starts[modality][number + 1]]
                for field, array in fields.items()
            }
            for modality, fields in grouped.items()
        }
        yield Clip(clean_name_at(str(path), group + given), path, modalities, group + given)


def write_npz(
    path: Path, clips: Mapping[str, Mapping[str, np.ndarray]], nets: Nets = NO_NETS
) -> None:
    """Writes several clips to an `.npz` file.

    `clips` is clip -> array name -> array. An array name is, for example, `face_quality`. `nets` is
    modality -> digest of the net that computed the vectors.
    """
    parts = group_by_key(pair for arrays in clips.values() for pair in arrays.items())
    joined: dict[str, np.ndarray] = {"clips": np.array([*clips], np.str_)}
    if nets:
        joined[NETS] = np.array([f"{modality} {digest}" for modality, digest in nets.items()])
    for key, of_key in parts.items():
        joined[key] = np.concatenate(of_key)
        if key.rpartition("_")[2] not in FRAME_FIELDS:
            lengths = [len(arrays.get(key, ())) for arrays in clips.values()]
            joined[f"{key}_length"] = np.array(lengths, np.int32)
    with files.atomic_file(path) as file:
        np.savez(file, **joined)  # pyright: ignore[reportArgumentType]


def read_npz_bytes(content: bytes, name: str, limit: int, nets: Nets = NO_NETS) -> Iterator[Clip]:
    """Yields the clips in the content of an `.npz` file in memory.

    If the content has the names of its clips, `name` must be "". If not, `name` is the name of the
    only clip. `nets` are the nets of the gallery, see `check_nets`. Raises UserError if the content
    is damaged, or needs more than `limit` bytes of memory. The size is checked before the arrays
    are unpacked. Each number counts as at least 4 bytes, even if its dtype is smaller.
    """
    clean = clean_name_at("clip", name) if name else ""
    with prefix_errors(f"clip {show(clean)}" if name else "npz"):
        arrays = files.load_npz(io.BytesIO(content), limit, FLOAT_BYTES)
        several = has_several_clips(arrays)
        if several and name:
            raise UserError("the .npz contains names of clips: leave out ?clip=NAME in the URL")
        if not several and not name:
            raise UserError("the query lacks the name of the clip: add ?clip=NAME")
        check_nets(Path("npz"), _take_nets(arrays), nets)
    if several:
        yield from _split(arrays, "npz")
    else:
        yield Clip(clean, "npz", group_by_modality(arrays, "npz"), name)


def read_json(value: object, place: str) -> Clip:
    """Returns the clip in a parsed JSON value, {"clip": NAME, "face": [[D numbers for a frame]]}.

    The list of `face` has T lists, one for each frame. If there is only one frame, it may also be a
    plain list of D numbers. The value may have other modalities, and values of frames, such as
    `face_quality`. Errors begin with `place`.
    """
    if not isinstance(value, dict) or not isinstance(given := value.get("clip"), str):
        raise UserError(f'{place}: the clip has no name: write {{"clip": "NAME", "face": [[...]]}}')
    name = clean_name_at(place, given)
    arrays = {}
    for key, numbers in value.items():
        if key != "clip":
            try:
                array = np.asarray(numbers)
            except ValueError:  # the lists have different lengths
                array = np.asarray(None)
            if array.dtype.kind not in "iuf" or not array.ndim:
                raise UserError(
                    f"{place}: clip {show(name)}: '{show(key)}' must be a list of numbers, "
                    "or a list of lists of numbers with equal lengths"
                )
            with np.errstate(over="ignore"):  # `pack` leaves out frames with an Inf
                # Frame numbers stay integers, because float32 rounds integers from 2**24 on.
                arrays[key] = array if key.endswith("_number") else array.astype(np.float32)
    return Clip(name, place, group_by_modality(arrays, place), given)


def read_parquet(path: Path) -> Iterator[Clip]:
    """Yields the clips of a parquet table that fits into memory. Rows may have any order."""
    text, scalars, values, width = parquet.read(path)
    start = np.cumsum(width, dtype=np.int64) - width
    clips: dict[str, dict[str, Any]] = {}
    given: dict[str, str] = {}
    for clip, modality, rows in _group_rows(text["clip"], text["modality"]):
        name = clean_name_at(str(path), clip)
        place = f"{path}: clip {show(name)}, {modality}"
        odd = width[rows] != width[rows[0]]
        if odd.any():
            row = int(rows[np.argmax(odd)])
            raise UserError(
                f"{place}: features have width {width[row]} in row {row + 1}, but width "
                f"{width[rows[0]]} in row {rows[0] + 1}: write features of equal width"
            )
        given.setdefault(name, clip)
        if modality in clips.setdefault(name, {}):
            raise UserError(f"{place}: named with and without .mp4: delete the rows of one name")
        fields = {name: column[rows] for name, column in scalars.items()}
        features = _stack_lists(values, start[rows], int(width[rows[0]]))
        clips[name][modality] = {"features": features, **fields}
    for name, modalities in clips.items():
        yield Clip(name, str(path), modalities, given[name])


def _stack_lists(values: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    """Returns an array [n, width], with a row `values[start : start + width]` for each start."""
    first, count = int(starts[0]), len(starts)
    if not width or int(starts[-1]) - first == width * (count - 1):  # adjacent: needs no copy
        return values[first : first + width * count].reshape(count, width)
    return np.lib.stride_tricks.sliding_window_view(values, width)[starts]


def _group_rows(clips: Text, modalities: Text) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields (clip, modality, rows) for each pair of clip and modality in a parquet table.

    `rows` are the positions of the table rows with this pair, ascending. `clips` and `modalities`
    are columns of the table, in the form of `parquet.Rows.text`.
    """
    (names, clip), (kinds, modality) = clips, modalities
    code = clip.astype(np.int64) * len(kinds) + modality
    order = np.argsort(code, kind="stable")
    values, starts = np.unique(code[order], return_index=True)
    for value, rows in zip(values.tolist(), np.split(order, starts[1:]), strict=False):
        yield names[value // len(kinds)], kinds[value % len(kinds)], rows
