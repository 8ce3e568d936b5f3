"""Loads clips without labels from files, for a trained model or a gallery.

Clips are read from a `.npz` file, from a parquet table, or from a folder. The folder contains
`.npz` files or folders of `.npz` files, or splits as in `vidjax.data.arrays`, or pickles of the
iQIYI-VID dataset. The readers of pickles are imported only for a folder of pickles.
"""

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vidjax.data.arrays import group_files_by_split, list_npz_files
from vidjax.data.checks import explain_unread, list_entries, refuse_unread
from vidjax.data.clip_files import NO_NETS, Nets, read_clips
from vidjax.data.clips import SPLITS
from vidjax.data.memory import MemoryClips
from vidjax.data.packed_clips import Quality, join, map_again
from vidjax.data.packing import Clip, compute_feature_norms
from vidjax.utils import files
from vidjax.utils.errors import NoFileError, UserError
from vidjax.utils.names import clean_identity


def load_clips(
    path: str | Path,
    modalities: Mapping[str, int],
    identities: Sequence[str],
    *,
    split: str | None = None,
    quality: Quality = "given",
    nets: Nets = NO_NETS,
) -> MemoryClips:
    """Loads the clips of a folder, a parquet table or a `.npz` file for a trained model.

    Clip names lose the suffix `.mp4`. Frames that are not finite are left out, with a warning. If
    the folder contains pickles of iQIYI-VID, only the pickles of `modalities` are loaded.

    Args:
      modalities: modality -> feature width. The model reads these modalities.
      identities: the names of the classes of the model.
      split: the split to load, or None if the folder has a single split.
      quality: see `Quality`. With 'given', frames of a pickle without qualities have the quality 0.
      nets: the nets whose vectors the model reads. Files that name other nets are refused.

    Raises:
      FileNotFoundError: the path does not exist, or has no clips.
      UserError: the files are wrong in another way.
    """
    path = Path(path).expanduser()
    folder, paths = find_files(path, split)
    if not isinstance(paths, Mapping):
        clips = read_clips(paths, folder, nets)
        return MemoryClips.pack(clips, modalities, identities, quality)
    if not paths.keys() & modalities.keys():
        raise UserError(
            f"'{path}' contains the modalities {', '.join(sorted(paths))}, but the run reads "
            f"{', '.join(modalities)}\nadd a pickle of one of these modalities"
        )
    from vidjax.data.untrusted import sandbox

    parts = []
    with files.scratch_folder() as scratch:  # memory maps keep the deleted files open
        for name in [name for name in paths if name in modalities]:
            part = sandbox.unpack(paths[name], name, scratch / name)
            frames = map_again(part.frames[name])
            if quality == "norm":
                norms = compute_feature_norms(np.asarray(frames.features))
                frames = frames._replace(quality=norms)
            parts.append(part._replace(frames={name: frames}))
    names = {name: name for part in parts for name in part.names}
    return MemoryClips(join(parts), names, modalities, identities, official=True)


def find_files(
    path: Path, split: str | None = None
) -> tuple[Path, Sequence[Path] | Mapping[str, Path]]:
    """Returns the folder of the clips of a folder or file, and their files, without reading them.

    The files are a list of `CLIP.npz` and `DAY/CLIP.npz`, or of one parquet table. For pickles of
    the iQIYI-VID dataset, they are modality -> pickle. `split` is the split, or None if there is
    only one.

    Raises:
      FileNotFoundError: the path does not exist, or has no clips.
      UserError: features would be ignored, or `split` does not fit the folder.
    """
    check_path(path)
    if path.is_dir():
        entries = list_entries(path)
        if pickles := _find_pickles(path, entries):
            split = _choose_split(path, {split for _, split in pickles}, split)
            return path, {name: file for (name, of), file in pickles.items() if of == split}
        paths = [entry for entry in entries if entry.suffix == ".npz"]
        others = [entry for entry in entries if entry.suffix != ".npz"]
        if not paths and not any(entry.stem in SPLITS for entry in entries):
            paths, others = list_npz_files(path)
            remedy = next(filter(None, (explain_unread(other, path) for other in others)), "")
            if remedy and not paths:
                raise NoFileError(f"'{path}' contains no CLIP.npz\n{remedy}")
        if not paths:
            splits = group_files_by_split(path)
            split = _choose_split(path, splits, split)
            return path / split, splits[split]
        refuse_unread(others, "CLIP.npz")
    else:
        path, paths = path.parent, [path]
    if split is not None:
        raise UserError(
            f"'{path}' has no splits, so the split '{split}' cannot be chosen\n"
            "leave out the argument split, or --config.eval.split of vidjax rank and embed"
        )
    return path, paths


def _find_pickles(path: Path, entries: Sequence[Path]) -> dict[tuple[str, str], Path]:
    """Returns (modality, split) -> path of the pickles among the `entries` of a folder."""
    if not any(entry.suffix == ".pickle" for entry in entries):
        return {}
    from vidjax.data import iqiyi_vid

    return iqiyi_vid.find_pickles(path)


def load_people(
    path: str | Path,
    modalities: Mapping[str, int],
    *,
    quality: Quality = "given",
    nets: Nets = NO_NETS,
) -> tuple[MemoryClips, dict[str, str]]:
    """Loads the files `path/PERSON/CLIP.npz`. Returns their clips, and clip -> person.

    The name of a clip is `PERSON/CLIP`. `modalities` is modality to read -> feature width. For
    `quality` and `nets`, see `load_clips`. Raises NoFileError if there are no such files, or if
    there are clips directly in `path`.
    """
    path = Path(path).expanduser()
    list_entries(path)  # raises an error if there is no such folder
    found, others = list_npz_files(path)
    if not found or any(file.parent == path for file in found):
        problem = "has clips outside the folders of people" if found else "has no clips of people"
        raise NoFileError(f"'{path}' {problem}\nput each clip into {path}/PERSON/CLIP.npz")
    people: dict[str, list[Path]] = {}
    for file in found:
        people.setdefault(clean_identity(file.parent.name), []).append(file)
    if people.keys() <= set(SPLITS):
        raise UserError(
            f"{path}: {', '.join(people)} are splits of a dataset, not names of people\n"
            "choose a split with --split, or name its folder: "
            f"--input={shlex.quote(str(path / next(iter(people))))}"
        )
    refuse_unread(others, "PERSON/CLIP.npz")
    identity: dict[str, str] = {}

    def clips() -> Iterator[Clip]:
        for person, paths in people.items():
            for clip in read_clips(paths, nets=nets):
                name = f"{person}/{clip.given or clip.name}"
                identity[name] = person
                yield clip._replace(name=f"{person}/{clip.name}", given=name)

    return MemoryClips.pack(clips(), modalities, (), quality), identity


def check_path(path: Path) -> None:
    """Checks that a path is a folder, a `.parquet` file or a `.npz` file, or raises NoFileError."""
    if path.is_dir() or (path.is_file() and path.suffix in (".parquet", ".npz")):
        return
    present = files.is_present(path)
    problem = "is not a folder, nor a .parquet or .npz file" if present else "does not exist"
    remedy = explain_unread(path) * present or "name a folder or file of features"
    raise NoFileError(f"'{path}' {problem}\n{remedy}")


def _choose_split(path: Path, splits: Collection[str], split: str | None) -> str:
    """Returns `split` if it is one of `splits`. If `split` is None, returns the only split."""
    if split is None and len(splits) == 1:
        return next(iter(splits))
    if split is None or split not in splits:
        problem = f"has no split '{split}', only" if split else "has several splits,"
        names = ", ".join(sorted(splits))
        places = (path / f"{sorted(splits)[0]}{ending}" for ending in ("", ".parquet"))
        place = next((place for place in places if place.exists()), None)
        remedy = f"name one of them: --input={shlex.quote(str(place))}"
        if place is None:  # official pickles: all splits are in the same folder
            remedy = (
                f"for vidjax rank and embed, add --config.eval.split={sorted(splits)[0]}\n"
                f"for a gallery, replace --input by --split={sorted(splits)[0]} "
                f"--config.data.name=iqiyi_vid --config.data.dir={shlex.quote(str(path))}"
            )
        raise UserError(f"'{path}' {problem} {names}\n{remedy}")
    return split
