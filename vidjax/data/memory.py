"""Clips without labels, in memory: any layout that training reads, and single tables or folders.

FOLDER            official pickles, or own features as `vidjax.data.arrays` describes them
FOLDER/CLIP.npz   the clips of one split
CLIP.npz          one clip
TABLE.parquet     the clips of one split
"""

import shlex
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vidjax.core.batch import BATCHED, Batch, Frames
from vidjax.data import iqiyi_vid
from vidjax.data.arrays import files_by_split
from vidjax.data.checks import list_entries, refuse_unread
from vidjax.data.clip_files import read_clips
from vidjax.data.clips import SPLITS, EvalPlan, Modality, Split, batch_of, blocks_of, pad
from vidjax.data.frame_fields import PackedClips, Quality, feature_norms
from vidjax.data.packing import Clip, Clips, as_clips, pack, stage
from vidjax.data.untrusted import sandbox
from vidjax.data.untrusted.names import clean_identity, show
from vidjax.utils.errors import NoFileError, UserError, closest, warn
from vidjax.utils.machine import memory_bytes

MEAN_FRAMES = 1 << 12  # frames that are averaged at once


class MemoryClips:
    """Clips in memory; a `ClipSource` with one split, `clips`.

    Attributes:
      names: N clip names as they were given, in the order given.
      places: [N] int, the clip_index of each name.
    """

    def __init__(
        self,
        packed: Mapping[str, PackedClips],
        names: Mapping[str, str],
        modalities: Mapping[str, int],
        identities: Sequence[str],
    ):
        """Takes checked clips; ValueError for no clip, or features of another width.

        Args:
          packed: modality of the run -> its frames.
          names: clean name -> name as it was given, of N clips.
          modalities: modality -> feature width.
          identities: names of the class columns.
        """
        if not names:
            raise UserError("no clips: there is nothing to score")
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
            _tell_of_skipped(name, flat)
        staged = stage("clips", packed)
        index = {name: place for place, name in enumerate(staged.clips)}
        self.places, self._starts = np.array([index[name] for name in names]), staged.starts
        none = np.zeros(len(names), np.int32)
        self._split = Split(
            name="clips",
            clips=staged.clips,
            labels=none,
            labelled=False,
            positives=np.zeros(len(self.identities), np.int64),
            num_others=0,
            lengths={name: staged.lengths.get(name, none) for name in modalities},
        )

    @classmethod
    def of(
        cls,
        clips: Clips,
        modalities: Mapping[str, int],
        identities: Sequence[str],
        quality: Quality = "given",
    ) -> "MemoryClips":
        """Packs a dict, clip -> modality -> features; the other arguments are as in `pack`."""
        if not isinstance(clips, Mapping):
            raise UserError(
                f"clips are {{clip: {{modality: features}}}}, not {type(clips).__name__}"
            )
        return cls.pack(as_clips(clips, "clips"), modalities, identities, quality)

    @classmethod
    def pack(
        cls,
        clips: Iterable[Clip],
        modalities: Mapping[str, int],
        identities: Sequence[str],
        quality: Quality = "given",
    ) -> "MemoryClips":
        """Checks and packs clips; warns if no clip has a modality of the run, but one has another.

        Args:
          modalities: modality -> feature width.
          identities: names of the class columns.
          quality: the quality of frames, as the run was trained; see `frame_fields.Quality`.
        """
        names: dict[str, str] = {}
        unread: set[str] = set()
        clips = _within_memory(_select(clips, modalities, names, unread))
        packed = pack(clips, quality=quality)
        missing = [name for name in modalities if name not in packed]
        if missing and unread:
            meant = [closest(name.lower(), missing) for name in sorted(unread)]
            hint = next((f"; did you mean '{name}'?" for name in meant if name), "")
            warn(
                f"no clip has {', '.join(missing)}, wanted with the others; "
                f"{show(', '.join(sorted(unread)))} of clips is not read{hint}"
            )
        return cls(packed, names, modalities, identities)

    def split(self, name: str) -> Split:
        """Returns the one split, whatever the name."""
        del name
        return self._split

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields every clip of the plan once, in blocks of `rows` rows; see `ClipSource`."""
        for bucket, places in blocks_of(plan.bucket, rows):
            chosen = places.astype(np.int32)
            frames = {
                name: self._padded(name, chosen, (rows, plan.padded_lengths[name][bucket]))
                for name in plan.modalities
            }
            yield batch_of(frames, chosen, rows)

    def mean_vectors(self, modality: str) -> np.ndarray:
        """Returns the mean frame of every clip of `names`, [N, D] float32, 0 without a frame.

        Frames weigh their quality, or all the same where no frame of a clip has one above 0.
        """
        vectors = np.zeros((len(self.names), self._widths[modality]), np.float32)
        flat = self._packed.get(modality)
        if flat is None or not len(flat.features):
            return vectors
        lengths, starts = self._split.lengths[modality][self.places], self._starts[modality]
        quality, features = flat.frames["quality"], flat.features
        # A block at a time: float64 of all frames would take eight times their memory.
        blocks = np.flatnonzero(np.diff(np.cumsum(lengths, dtype=np.int64) // MEAN_FRAMES)) + 1
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
            for at in range(0, len(owner), MEAN_FRAMES):  # a clip may be longer than a block
                some = slice(at, at + MEAN_FRAMES)
                has, begins = np.unique(owner[some], return_index=True)
                weighted = features[index[some]].astype(np.float64) * weight[some, None]
                sums[has] += np.add.reduceat(weighted, begins, axis=0)
            has = length > 0
            vectors[clips[has]] = sums[has] / total[has, None]
        return vectors

    def _padded(self, modality: str, clips: np.ndarray, shape: tuple[int, int]) -> Frames:
        """Returns Frames [B, T] = `shape` of the `clips` [n <= B]."""
        frames: dict[str, list[np.ndarray]] = {name: [] for name in BATCHED}
        flat, dtype = self._packed.get(modality), "float32"
        if flat is not None and len(flat.features):  # else the features have no width
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
    """Yields clips with only the modalities of a run; ValueError for a clip that has only others.

    `names` collects clean name -> name as it was given, `unread` the names of other modalities.
    """
    for clip in clips:
        names.setdefault(clip.name, clip.given or clip.name)
        others = [str(name) for name in clip.modalities if name not in modalities]
        selected = {name: clip.modalities[name] for name in modalities if name in clip.modalities}
        if others and not selected:
            meant = closest(others[0].lower(), modalities)
            raise UserError(
                f"clip {show(clip.name)}: it has {show(', '.join(others))}, wanted "
                f"{', '.join(modalities)}{f': did you mean {meant!r}?' if meant else ''}"
            )
        unread.update(others)
        # A clip without any modality is still a clip.
        yield clip._replace(modalities=selected or {next(iter(modalities)): None})


def _within_memory(clips: Iterable[Clip]) -> Iterator[Clip]:
    """Yields clips; raises ValueError once they take more than a third of the memory."""
    left = limit = memory_bytes() // 3  # to join them takes as much again
    for clip in clips:
        for value in clip.modalities.values():
            for array in value.values() if isinstance(value, Mapping) else (value,):
                left -= getattr(array, "nbytes", 0)
        if left < 0:
            raise UserError(
                f"{clip.place}: clip {show(clip.name)}: with those before it, it takes more than "
                f"{limit:,} bytes,\na third of the memory: give fewer clips at once"
            )
        yield clip


def _tell_of_skipped(modality: str, flat: PackedClips) -> None:
    """Warns of frames that are not read, and of values that are not used."""
    if frames := flat.skipped.get("non_finite"):
        clips = flat.skipped_clips.get("non_finite", 0)
        without = f"; {clips:,} clips lose all frames" if clips else ""
        warn(
            f"{modality}: {frames:,} of {flat.seen:,} frames are not read: their features are not "
            f"finite{without}"
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
    """Returns the clips of a folder or of a parquet table.

    Frames that are not finite are left out, with a warning that counts them. Official pickles are
    read in the sandbox into memory-mapped files. Names of clips in tables and `.npz` files stay as
    they are; those in pickles lose their `.mp4`. Of pickles, only those of the run's modalities are
    read: a clip that lies in none of them is not among the clips.

    Args:
      path: the folder or the table.
      modalities: modality -> feature width, of the run that will score the clips.
      identities: names of the class columns.
      split: the split to read; None if the folder has only one.
      quality: the quality of frames, as the run was trained; see `frame_fields.Quality`. A modality
        of official pickles without a quality has 0 with `given`, as in training.

    Raises:
      ValueError: malformed clips, several splits where `split` is None, or a modality that the run
        does not know; names file, clip and field.
      FileNotFoundError: no such folder or table, or no clips in it.
    """
    path = Path(path).expanduser()
    found = find_files(path, split)
    if not isinstance(found, Mapping):
        return MemoryClips.pack(read_clips(found), modalities, identities, quality)
    if not found.keys() & modalities.keys():
        raise UserError(
            f"{path}: it has {', '.join(sorted(found))}, wanted {', '.join(modalities)}"
        )
    return _load_pickles(found, modalities, identities, quality)


def find_files(path: Path, split: str | None = None) -> Sequence[Path] | Mapping[str, Path]:
    """Returns the files of clips in a folder, or the one that is named; of pickles, by modality.

    It reads none of them. Errors are those of `load_clips`.
    """
    check_path(path)
    if path.is_file():
        return [path]
    if found := iqiyi_vid.find_pickles(path):
        split = _choose_split(path, {split for _, split in found}, split)
        return {name: file for (name, of), file in found.items() if of == split}
    entries = list_entries(path)
    if paths := [entry for entry in entries if entry.suffix == ".npz"]:
        refuse_unread((entry for entry in entries if entry.suffix != ".npz"), "CLIP.npz")
        return paths
    splits = files_by_split(path)
    return splits[_choose_split(path, splits, split)]


def _load_pickles(
    files: Mapping[str, Path],
    modalities: Mapping[str, int],
    identities: Sequence[str],
    quality: Quality,
) -> MemoryClips:
    packed = {}
    with tempfile.TemporaryDirectory() as scratch:  # the files outlive their names
        for name in [name for name in files if name in modalities]:
            flat = sandbox.unpack(files[name], name, Path(scratch, name))
            frames = dict(flat.frames)
            if quality == "norm":
                frames["quality"] = feature_norms(flat.features)
            packed[name] = replace(flat, frames=frames)
    names = {name: name for flat in packed.values() for name in flat.names}
    return MemoryClips(packed, names, modalities, identities)


def load_people(
    path: str | Path, modalities: Mapping[str, int], *, quality: Quality = "given"
) -> tuple[MemoryClips, dict[str, str]]:
    """Returns the clips of a folder with a folder for each person, and clip -> person.

    A clip `FOLDER/PERSON/CLIP.npz` is named `PERSON/CLIP`: two people may have a `1.npz` each.
    """
    path = Path(path).expanduser()
    found = {one.name: sorted(one.glob("*.npz")) for one in sorted(path.iterdir()) if one.is_dir()}
    people = dict[str, list[Path]]()
    for name, paths in found.items():
        if paths:
            people.setdefault(clean_identity(name), []).extend(paths)
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
                given = f"{person}/{clip.given or clip.name}"
                identity[given] = person
                yield clip._replace(name=f"{person}/{clip.name}", given=given)

    return MemoryClips.pack(clips(), modalities, (), quality), identity


def check_path(path: Path) -> None:
    """Raises NoFileError unless a path is a folder, or a `.parquet` or `.npz` file."""
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
        places = (path / f"{sorted(splits)[0]}{ending}" for ending in ("", ".parquet"))
        place = next((one for one in places if one.exists()), None)
        remedy = f"name one of them: --input={shlex.quote(str(place))}"
        if place is None:  # official pickles: all splits lie in one folder
            remedy = (
                f"vidjax rank and embed take --config.eval.split={sorted(splits)[0]}\n"
                f"a gallery takes --split={sorted(splits)[0]} --config.data.name=iqiyi_vid "
                f"--config.data.dir={shlex.quote(str(path))} in place of --input"
            )
        raise UserError(f"{path}: {problem}; there: {names}\n{remedy}")
    return split
