"""Clips without labels, in memory: any layout that training reads, and single tables or folders.

FOLDER            official pickles, or own features as `vidjax.data.arrays` describes them
FOLDER/CLIP.npz   the clips of one split
TABLE.parquet     the clips of one split
"""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vidjax.data import iqiyi_vid
from vidjax.data.arrays import files_by_split
from vidjax.data.frame_fields import Quality, feature_norms
from vidjax.data.memory import MemoryClips
from vidjax.data.parts import read_clips
from vidjax.data.untrusted import pickles


def load_clips(
    path: str | Path,
    modalities: Mapping[str, int],
    identities: Sequence[str],
    *,
    split: str | None = None,
    quality: Quality = "given",
) -> MemoryClips:
    """Returns the clips of a folder or of a parquet table; frames that are not finite are dropped.

    Official pickles are read in the sandbox into files that the memory maps. Names of clips in
    tables and `.npz` files stay as they are; those in pickles lose their `.mp4`.

    Args:
      path: the folder or the table.
      modalities: modality -> feature width, of the run that will score the clips.
      identities: names of the class columns.
      split: the split to read; None where the folder has one alone.
      quality: the quality of frames, as the run was trained; see `frame_fields.Quality`. A modality
        of official pickles without a quality has 0 with `given`, as in training.

    Raises:
      ValueError: malformed clips, several splits but no name of one, or a modality that the run
        does not know; names file, clip and field.
      FileNotFoundError: no such folder or table, or no clips in it.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix == ".parquet":
        return MemoryClips.pack(read_clips([path]), modalities, identities, quality)
    if not path.is_dir():
        problem = "neither a folder nor a table NAME.parquet" if path.exists() else "no such file"
        raise FileNotFoundError(f"{path}: {problem}")
    if found := iqiyi_vid.find_pickles(path):
        split = _choose_split(path, {split for _, split in found}, split)
        files = {name: file for (name, of), file in found.items() if of == split}
        return _load_pickles(path, files, modalities, identities, quality)
    paths = sorted(path.glob("*.npz"))
    if not paths:
        splits = files_by_split(path)
        paths = splits[_choose_split(path, splits, split)]
    return MemoryClips.pack(read_clips(paths), modalities, identities, quality)


def _choose_split(path: Path, splits: Collection[str], split: str | None) -> str:
    """Returns the split to read; ValueError where none is named and there are several."""
    if split is None and len(splits) == 1:
        return next(iter(splits))
    if split is None or split not in splits:
        problem = f"no split '{split}'" if split else "several splits"
        names = ", ".join(sorted(splits))
        example = sorted(splits)[0]
        raise ValueError(
            f"{path}: {problem}; there: {names}\nname one of them: --config.eval.split={example}"
        )
    return split


def _load_pickles(
    path: Path,
    files: Mapping[str, Path],
    modalities: Mapping[str, int],
    identities: Sequence[str],
    quality: Quality,
) -> MemoryClips:
    """Returns the clips of one split of official pickles."""
    wanted = {name: file for name, file in files.items() if name in modalities}
    if not wanted:
        raise ValueError(
            f"{path}: the run reads {', '.join(modalities)}; there: {', '.join(sorted(files))}"
        )
    with tempfile.TemporaryDirectory() as scratch:  # the files outlive their names
        packed = {
            name: pickles.unpack(file, name, Path(scratch, name)) for name, file in wanted.items()
        }
        if quality == "norm":
            packed = {
                name: replace(flat, frames={**flat.frames, "quality": feature_norms(flat.features)})
                for name, flat in packed.items()
            }
        names = {name: name for flat in packed.values() for name in flat.names}
        return MemoryClips(packed, names, modalities, identities)
