"""Loads clips without labels into memory.

A path has any of these forms:

FOLDER            official pickles, or your own features as in `vidjax.data.arrays`
FOLDER/CLIP.npz   the clips of a split
CLIP.npz          a single clip
TABLE.parquet     the clips of a split
"""

import shlex
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vidjax.core.batch import BATCHED, Batch, Frames
from vidjax.data import iqiyi_vid
from vidjax.data.arrays import group_files_by_split
from vidjax.data.checks import list_entries, refuse_unread
from vidjax.data.clip_files import read_clips
from vidjax.data.clips import SPLITS, EvalPlan, Modality, Split, make_batch, pad, split_blocks
from vidjax.data.frame_fields import PackedClips, Quality, compute_feature_norms
from vidjax.data.packing import Clip, Clips, pack, read_dict, stage
from vidjax.data.untrusted import sandbox
from vidjax.data.untrusted.names import clean_identity, show
from vidjax.utils.errors import NoFileError, UserError, closest, warn
from vidjax.utils.machine import memory_bytes

MAX_BLOCK_FRAMES = 1 << 12  # frames that are averaged at once


class MemoryClips:
    """Clips in memory: a `ClipSource` with a single split, `clips`.

    Attributes:
      names: N clip names as in the input, in the order of the input.
      places: [N] int, the clip_index of each name.
    """

    def __init__(
        self,
        packed: Mapping[str, PackedClips],
        names: Mapping[str, str],
        modalities: Mapping[str, int],
        identities: Sequence[str],
    ):
        """Takes checked clips.

        Args:
          packed: modality of the run -> its frames.
          names: for N clips, clean name -> name as in the input.
          modalities: modality -> feature width.
          identities: names of the class columns.

        Raises:
          UserError: there are no clips, or features have a different width.
        """
        if not names:
            raise UserError("there are no clips: give one or more")
        self.identities, self.names = tuple(identities), tuple(names.values())
        self._packed, self._widths = packed, dict(modalities)
        for name, flat in packed.items():
            width = flat.features.shape[1]
            if len(flat.features) and width != modalities[name]:
                clip = flat.names[int(np.argmax(flat.lengths > 0))]
                raise UserError(
                    f"clip {show(clip)}, {name}: features are {width} wide, "
                    f"wanted {modalities[name]}"
                )
            _warn_of_unused(name, flat)
        staged = stage("clips", packed)
        index = {name: place for place, name in enumerate(staged.clips)}
        self.places, self._starts = np.array([index[name] for name in names]), staged.starts
        zeros = np.zeros(len(names), np.int32)
        self._split = Split(
            name="clips",
            clips=staged.clips,
            labels=zeros,
            labelled=False,
            positives=np.zeros(len(self.identities), np.int64),
            num_others=0,
            lengths={name: staged.lengths.get(name, zeros) for name in modalities},
        )

    @classmethod
    def from_dict(
        cls,
        clips: Clips,
        modalities: Mapping[str, int],
        identities: Sequence[str],
        quality: Quality = "given",
    ) -> "MemoryClips":
        """Packs a dict, clip -> modality -> features. See `pack` for the other arguments."""
        if not isinstance(clips, Mapping):
            raise UserError(
                f"clips must be a dict {{clip: {{modality: features}}}}, not {type(clips).__name__}"
            )
        return cls.pack(read_dict(clips, "clips"), modalities, identities, quality)

    @classmethod
    def pack(
        cls,
        clips: Iterable[Clip],
        modalities: Mapping[str, int],
        identities: Sequence[str],
        quality: Quality = "given",
    ) -> "MemoryClips":
        """Checks and packs clips.

        If no clip has a modality of the run, and a clip has an unknown modality, a warning asks
        whether its name is misspelt.

        Args:
          modalities: modality -> feature width.
          identities: names of the class columns.
          quality: the quality of frames in the training; see `frame_fields.Quality`.
        """
        names: dict[str, str] = {}
        unread: set[str] = set()
        clips = _limit_memory(_select(clips, modalities, names, unread))
        packed = pack(clips, quality=quality)
        missing = [name for name in modalities if name not in packed]
        if missing and unread:
            similar = [closest(name.lower(), missing) for name in sorted(unread)]
            hint = next((f"; did you mean '{name}'?" for name in similar if name), "")
            warn(
                f"no clip has the modality {', '.join(missing)} of the run; the clips have "
                f"{show(', '.join(sorted(unread)))}, which the run does not use{hint}"
            )
        return cls(packed, names, modalities, identities)

    def split(self, name: str) -> Split:
        """Returns the only split, whatever `name` is."""
        del name
        return self._split

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields every clip of the plan once, in blocks of `rows` rows; see `ClipSource`."""
        for bucket, places in split_blocks(plan.bucket, rows):
            chosen = places.astype(np.int32)
            frames = {
                name: self._padded(name, chosen, (rows, plan.padded_lengths[name][bucket]))
                for name in plan.modalities
            }
            yield make_batch(frames, chosen, rows)

    def mean_vectors(self, modality: str) -> np.ndarray:
        """Returns [N, D] float32, the mean feature of each clip; 0 if a clip has no frame.

        Frames are weighted by quality. If no frame of a clip has a quality above 0, its frames have
        equal weights.
        """
        vectors = np.zeros((len(self.names), self._widths[modality]), np.float32)
        flat = self._packed.get(modality)
        if flat is None or not len(flat.features):
            return vectors
        lengths, starts = self._split.lengths[modality][self.places], self._starts[modality]
        quality, features = flat.frames["quality"], flat.features
        # Computes a block at a time: all frames as float64 would take up to 8 times their memory.
        ends = np.cumsum(lengths, dtype=np.int64)
        blocks = np.flatnonzero(np.diff(ends // MAX_BLOCK_FRAMES)) + 1
        for clips in np.split(np.arange(len(lengths)), blocks):
            length = lengths[clips]
            first = starts[self.places[clips]] - (np.cumsum(length) - length)
            owner = np.repeat(np.arange(len(clips)), length)
            index = np.repeat(first, length) + np.arange(len(owner))
            weight = np.maximum(quality[index].astype(np.float64), 0.0)
            total = np.bincount(owner, weight, len(clips))
            weight = np.where(total[owner] > 0, weight, 1.0)
            total = np.bincount(owner, weight, len(clips))
            sums = np.zeros((len(clips), vectors.shape[1]))
            for at in range(0, len(owner), MAX_BLOCK_FRAMES):  # a clip may be longer than a block
                part = slice(at, at + MAX_BLOCK_FRAMES)
                present, begins = np.unique(owner[part], return_index=True)
                weighted = features[index[part]].astype(np.float64) * weight[part, None]
                sums[present] += np.add.reduceat(weighted, begins, axis=0)
            filled = length > 0
            vectors[clips[filled]] = sums[filled] / total[filled, None]
        return vectors

    def _padded(self, modality: str, clips: np.ndarray, shape: tuple[int, int]) -> Frames:
        """Returns the frames of up to B clips, padded with empty frames to `shape` = [B, T]."""
        frames: dict[str, list[np.ndarray]] = {name: [] for name in BATCHED}
        flat, dtype = self._packed.get(modality), "float32"
        if flat is not None and len(flat.features):  # without frames, features have no width
            dtype = flat.features.dtype.name
            fields = {name: flat.frames[name] for name in BATCHED}
            start, length = self._starts[modality][clips], self._split.lengths[modality][clips]
            for first, count in zip(start.tolist(), length.tolist(), strict=True):
                for name, values in fields.items():
                    frames[name].append(values[first : first + count])
        return pad(frames, shape, Modality(self._widths[modality], dtype))


def _select(
    clips: Iterable[Clip], modalities: Mapping[str, int], names: dict[str, str], unread: set[str]
) -> Iterator[Clip]:
    """Removes from each clip the modalities that a run does not read.

    Args:
      names: a dict to fill, clean name -> name as in the input.
      unread: a set to fill, the names of the removed modalities.

    Raises:
      UserError: a clip has modalities, but none of `modalities`.
    """
    for clip in clips:
        names.setdefault(clip.name, clip.given or clip.name)
        others = [str(name) for name in clip.modalities if name not in modalities]
        selected = {name: clip.modalities[name] for name in modalities if name in clip.modalities}
        if others and not selected:
            similar = closest(others[0].lower(), modalities)
            raise UserError(
                f"clip {show(clip.name)}: it has {show(', '.join(others))}, wanted "
                f"{', '.join(modalities)}{f': did you mean {similar!r}?' if similar else ''}"
            )
        unread.update(others)
        # A clip that has no modalities at all is kept, with no frames.
        yield clip._replace(modalities=selected or {next(iter(modalities)): None})


def _limit_memory(clips: Iterable[Clip]) -> Iterator[Clip]:
    """Yields clips. Raises UserError if they take more than a third of the memory."""
    left = limit = memory_bytes() // 3  # joining the clips copies them once
    for clip in clips:
        for value in clip.modalities.values():
            for array in value.values() if isinstance(value, Mapping) else (value,):
                left -= getattr(array, "nbytes", 0)
        if left < 0:
            raise UserError(
                f"{clip.place}: clip {show(clip.name)}: the clips up to this clip take more "
                f"than {limit:,} bytes, a third of the memory\nuse fewer clips at once"
            )
        yield clip


def _warn_of_unused(modality: str, flat: PackedClips) -> None:
    """Warns of frames that are left out, and of values that are replaced by 0."""
    if frames := flat.skipped.get("non_finite"):
        clips = flat.skipped_clips.get("non_finite", 0)
        lost = f"; {clips:,} clips lose all frames" if clips else ""
        warn(
            f"{modality}: {frames:,} of {flat.seen:,} frames are not read: their features are not "
            f"finite{lost}"
        )
    for name, count in flat.warnings.items():
        field = name.removeprefix("non_finite_")
        warn(
            f"{modality}: {count:,} of {flat.seen:,} frames have a {field} that is not finite: "
            "0 is used"
        )


def load_clips(
    path: str | Path,
    modalities: Mapping[str, int],
    identities: Sequence[str],
    *,
    split: str | None = None,
    quality: Quality = "given",
) -> MemoryClips:
    """Loads the clips of a folder or of a parquet table.

    Frames that are not finite are left out, with a warning that counts them. The sandbox reads
    official pickles into memory-mapped files. Clip names in tables and `.npz` files are not
    changed; clip names in pickles lose their `.mp4`. Only the pickles of the run's modalities are
    read, so a clip that is in none of these pickles is left out.

    Args:
      path: the folder or the table.
      modalities: modality of the run -> feature width.
      identities: names of the class columns.
      split: the split to read; None if the folder has a single split.
      quality: the quality of frames in the training; see `frame_fields.Quality`. With `given`,
        frames of official pickles without a quality have the quality 0, as in training.

    Raises:
      UserError: clips are malformed (the message names file, clip and field), the folder has
        several splits and `split` is None, or the run knows none of the modalities.
      FileNotFoundError: the folder or table does not exist, or has no clips.
    """
    path = Path(path).expanduser()
    paths = find_files(path, split)
    if not isinstance(paths, Mapping):
        return MemoryClips.pack(read_clips(paths), modalities, identities, quality)
    if not paths.keys() & modalities.keys():
        raise UserError(
            f"{path}: it has {', '.join(sorted(paths))}, wanted {', '.join(modalities)}"
        )
    return _load_pickles(paths, modalities, identities, quality)


def find_files(path: Path, split: str | None = None) -> Sequence[Path] | Mapping[str, Path]:
    """Returns the files of clips, without reading a file; see `load_clips` for the errors.

    Args:
      path: a folder, or a file of clips.
      split: the split; None if the folder has a single split.

    Returns:
      The `.npz` and `.parquet` files; for official pickles, modality -> pickle.
    """
    check_path(path)
    if path.is_file():
        return [path]
    if pickles := iqiyi_vid.find_pickles(path):
        split = _choose_split(path, {split for _, split in pickles}, split)
        return {name: file for (name, its_split), file in pickles.items() if its_split == split}
    entries = list_entries(path)
    if paths := [entry for entry in entries if entry.suffix == ".npz"]:
        refuse_unread((entry for entry in entries if entry.suffix != ".npz"), "CLIP.npz")
        return paths
    splits = group_files_by_split(path)
    return splits[_choose_split(path, splits, split)]


def _load_pickles(
    files: Mapping[str, Path],
    modalities: Mapping[str, int],
    identities: Sequence[str],
    quality: Quality,
) -> MemoryClips:
    packed = {}
    with tempfile.TemporaryDirectory() as scratch:  # memory maps keep the deleted files open
        for name in [name for name in files if name in modalities]:
            flat = sandbox.unpack(files[name], name, Path(scratch, name))
            frames = dict(flat.frames)
            if quality == "norm":
                frames["quality"] = compute_feature_norms(flat.features)
            packed[name] = replace(flat, frames=frames)
    names = {name: name for flat in packed.values() for name in flat.names}
    return MemoryClips(packed, names, modalities, identities)


def load_people(
    path: str | Path, modalities: Mapping[str, int], *, quality: Quality = "given"
) -> tuple[MemoryClips, dict[str, str]]:
    """Loads the clips `path/PERSON/CLIP.npz`.

    Returns:
      The clips, with names `PERSON/CLIP` (the file names of two people may be equal), and clip ->
      person.
    """
    path = Path(path).expanduser()
    people = dict[str, list[Path]]()
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and (paths := sorted(folder.glob("*.npz"))):
            people.setdefault(clean_identity(folder.name), []).extend(paths)
    if not people or next(path.glob("*.npz"), None):
        problem = "has clips outside the folders of people" if people else "has no clips"
        raise NoFileError(f"{path}: {problem}\nwanted {path}/PERSON/CLIP.npz")
    if people.keys() <= set(SPLITS):
        raise UserError(
            f"{path}: {', '.join(people)} are splits of a dataset, not people\n"
            f"add --split=S to read a split, or name it: --input={path / next(iter(people))}"
        )
    identity: dict[str, str] = {}

    def clips() -> Iterator[Clip]:
        for person, files in people.items():
            for clip in read_clips(files):
                name = f"{person}/{clip.given or clip.name}"
                identity[name] = person
                yield clip._replace(name=f"{person}/{clip.name}", given=name)

    return MemoryClips.pack(clips(), modalities, (), quality), identity


def check_path(path: Path) -> None:
    """Raises NoFileError unless a path is a folder, or a `.parquet` or `.npz` file."""
    if path.is_dir() or (path.is_file() and path.suffix in (".parquet", ".npz")):
        return
    if path.suffix == ".npy" and path.exists():
        raise NoFileError(
            f"{path}: an array without a modality; to name it: "
            f"numpy.savez('{path.stem}.npz', face=numpy.load('{path.name}'))"
        )
    problem = "neither a folder nor NAME.parquet or CLIP.npz" if path.exists() else "no such file"
    raise NoFileError(f"{path}: {problem}")


def _choose_split(path: Path, splits: Collection[str], split: str | None) -> str:
    """Returns the split to read. Raises UserError if there are several and `split` is None."""
    if split is None and len(splits) == 1:
        return next(iter(splits))
    if split is None or split not in splits:
        problem = f"no split '{split}'" if split else "several splits"
        names = ", ".join(sorted(splits))
        places = (path / f"{sorted(splits)[0]}{ending}" for ending in ("", ".parquet"))
        place = next((place for place in places if place.exists()), None)
        remedy = f"name a single table: --input={shlex.quote(str(place))}"
        if place is None:  # official pickles: all splits are in the same folder
            remedy = (
                f"vidjax rank and embed take --config.eval.split={sorted(splits)[0]}\n"
                f"a gallery takes --split={sorted(splits)[0]} --config.data.name=iqiyi_vid "
                f"--config.data.dir={shlex.quote(str(path))} in place of --input"
            )
        raise UserError(f"{path}: {problem}; it has {names}\n{remedy}")
    return split
