"""Clips without labels, in memory: any layout that training reads, and single tables or folders.

FOLDER            official pickles, or own features as `vidjax.data.arrays` describes them
FOLDER/CLIP.npz   the clips of one split
CLIP.npz          one clip
TABLE.parquet     the clips of one split
"""

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vidjax.data import iqiyi_vid
from vidjax.data.arrays import files_by_split
from vidjax.data.clips import SPLITS
from vidjax.data.folder_names import list_entries
from vidjax.data.frame_fields import Quality, feature_norms
from vidjax.data.memory import MemoryClips
from vidjax.data.parts import read_clips
from vidjax.data.untrusted import pickles
from vidjax.data.untrusted.packing import Clip
from vidjax.errors import NoFileError, UserError


def load_clips(
    path: str | Path,
    modalities: Mapping[str, int],
    identities: Sequence[str],
    *,
    split: str | None = None,
    quality: Quality = "given",
) -> MemoryClips:
    """Returns the clips of a folder or of a parquet table.

    Frames that are not finite are left out, with a warning that counts them.

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
    check_path(path)
    if path.is_file():
        return MemoryClips.pack(read_clips([path]), modalities, identities, quality)
    if found := iqiyi_vid.find_pickles(path):
        split = _choose_split(path, {split for _, split in found}, split)
        files = {name: file for (name, of), file in found.items() if of == split}
        return _load_pickles(path, files, modalities, identities, quality)
    paths = [entry for entry in list_entries(path) if entry.suffix == ".npz"]
    if not paths:
        splits = files_by_split(path)
        paths = splits[_choose_split(path, splits, split)]
    return MemoryClips.pack(read_clips(paths), modalities, identities, quality)


def load_people(
    path: str | Path, modalities: Mapping[str, int], *, quality: Quality = "given"
) -> tuple[MemoryClips, dict[str, str]]:
    """Returns the clips of a folder with a folder for each person, and clip -> person.

    A clip `FOLDER/PERSON/CLIP.npz` is named `PERSON/CLIP`: two people may have a `1.npz` each.

    Args:
      path: the folder.
      modalities, quality: see `load_clips`.

    Raises:
      ValueError: a clip is malformed, or the folders are splits of a dataset.
      FileNotFoundError: there is no folder of clips in the folder.
    """
    path = Path(path).expanduser()
    found = {one.name: sorted(one.glob("*.npz")) for one in sorted(path.iterdir()) if one.is_dir()}
    people = {name: files for name, files in found.items() if files}
    if not people or next(path.glob("*.npz"), None):
        problem = "holds clips, and not a folder for each person" if people else "holds no clips"
        raise NoFileError(f"{path}: {problem}\nwanted {path}/PERSON/CLIP.npz")
    if people.keys() <= set(SPLITS):
        raise UserError(
            f"{path}: {', '.join(people)} are splits of a dataset, not people\n"
            f"name the dataset and --split=S, or --input={path / next(iter(people))}"
        )
    identity: dict[str, str] = {}

    def clips() -> Iterator[Clip]:
        for person, files in people.items():
            for clip in read_clips(files):
                identity[f"{person}/{clip.given or clip.name}"] = person
                yield clip._replace(
                    name=f"{person}/{clip.name}", given=f"{person}/{clip.given or clip.name}"
                )

    return MemoryClips.pack(clips(), modalities, (), quality), identity


def check_path(path: Path) -> None:
    """Raises NoFileError where clips cannot be read from a path, by its kind alone."""
    if path.is_dir() or (path.is_file() and path.suffix in (".parquet", ".npz")):
        return
    if path.suffix == ".npy" and path.exists():
        raise NoFileError(
            f"{path}: one array without a modality: "
            f"numpy.savez('{path.stem}.npz', face=numpy.load('{path.name}'))"
        )
    problem = "neither a folder nor NAME.parquet or CLIP.npz" if path.exists() else "no such file"
    raise NoFileError(f"{path}: {problem}")


def _choose_split(path: Path, splits: Collection[str], split: str | None) -> str:
    """Returns the split to read; ValueError where none is named and there are several."""
    if split is None and len(splits) == 1:
        return next(iter(splits))
    if split is None or split not in splits:
        problem = f"no split '{split}'" if split else "several splits"
        names = ", ".join(sorted(splits))
        example = sorted(splits)[0]
        raise UserError(
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
        raise UserError(
            f"{path}: the run reads {', '.join(modalities)}; there: {', '.join(sorted(files))}"
        )
    with tempfile.TemporaryDirectory() as scratch:  # the files outlive their names
        packed = {
            name: pickles.unpack(file, name, Path(scratch, name)) for name, file in wanted.items()
        }
        for name, flat in packed.items():
            frames = dict(flat.frames)
            if quality == "norm":
                frames["quality"] = feature_norms(flat.features)
            packed[name] = replace(flat, frames=frames)
        names = {name: name for flat in packed.values() for name in flat.names}
        return MemoryClips(packed, names, modalities, identities)
