"""Loads clips without labels into memory, for a trained model or a gallery.

Clips are read from a `.npz` file, from a parquet table, or from a folder. The folder contains
`.npz` files, or splits as in `vidjax.data.arrays`, or pickles of the iQIYI-VID dataset.
"""

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vidjax.core.batch import BATCHED, Batch, Frames
from vidjax.data import iqiyi_vid
from vidjax.data.arrays import group_files_by_split
from vidjax.data.checks import list_entries, refuse_unread, warn_of_bad_values
from vidjax.data.clip_files import read_clips
from vidjax.data.clips import (
    SPLITS,
    EvalPlan,
    Modality,
    Split,
    TrainingData,
    make_batch,
    pad,
    split_blocks,
)
from vidjax.data.frame_fields import PackedClips, Quality, compute_feature_norms
from vidjax.data.packing import Clip, Clips, pack, read_dict, stage
from vidjax.data.untrusted import sandbox
from vidjax.utils import messages
from vidjax.utils.errors import NoFileError, UserError, closest, warn
from vidjax.utils.machine import memory_bytes
from vidjax.utils.names import clean_identity, show
from vidjax.utils.scratch import scratch_folder

MAX_BLOCK_FRAMES = 1 << 12  # frames that are copied as float64 at once
MAX_ROUNDING = 1e-6  # largest rounding error of a mean of float32 numbers, relative to its frames


class MemoryClips:
    """Clips in memory that a model can score. They form a single split, which is called `clips`.

    Attributes:
      identities: the names of the classes of the model.
      names: N clip names as in the input, in the order of the input.
      places: [N] int, the position of each clip of `names` in `split("clips").clips`.
    """

    def __init__(
        self,
        packed: Mapping[str, PackedClips],
        names: Mapping[str, str],
        modalities: Mapping[str, int],
        identities: Sequence[str],
        *,
        official: bool = False,
    ):
        """Makes an object from the checked frames of clips.

        Args:
          packed: modality -> the frames of all clips, from `packing.pack`.
          names: clip name -> the name in the input, which may end in `.mp4`.
          modalities: modality -> feature width. The model reads these modalities.
          official: whether the clips are from pickles, in which some qualities are negative.
        """
        if not names:
            raise UserError("the input contains no clips: give one or more clips")
        self.identities, self.names = tuple(identities), tuple(names.values())
        self._packed, self._widths = packed, dict(modalities)
        for name, flat in packed.items():
            width = flat.features.shape[1]
            if len(flat.features) and width != modalities[name]:
                clip = flat.names[int(np.argmax(flat.lengths > 0))]
                raise UserError(
                    f"clip {show(clip)}, {name}: features have width {width}, but the run needs "
                    f"width {modalities[name]}\n"
                    "compute them with the same program as the training features"
                )
            _warn_of_unused(name, flat, official=official)
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
        """Makes an object from a dict, clip -> modality -> features [T, D]. See `pack`."""
        if not isinstance(clips, Mapping):
            raise UserError(
                f"clips are of type {type(clips).__name__}: "
                "give a dict {clip: {modality: features}}"
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
        """Checks clips, and makes an object of this class from them.

        The model reads only `modalities`, which is modality -> feature width. A clip that has only
        other modalities becomes a clip without frames, with a warning. Another warning appears if
        the name of a modality may be misspelt. `quality` (see `Quality`) must be as in the
        training. Raises UserError if all modalities of the clips are unknown to the model.
        """
        names: dict[str, str] = {}
        given: dict[str, frozenset[str]] = {}
        clips = _limit_memory(_select(clips, modalities, names, given))
        packed = pack(clips, quality=quality)
        everything = {name for of_clip in given.values() for name in of_clip}
        missing = [name for name in modalities if name not in everything]
        unread = sorted(everything - modalities.keys())
        if missing and unread:
            similar = [closest(name.lower(), missing) for name in unread]
            hints = (f"did you mean '{name}'?" for name in similar if name)
            problem = (
                f"no clip has the modality {', '.join(missing)} of the run\nthe clips have "
                f"{show(', '.join(unread))}, which the run does not use: "
                f"{next(hints, 'add a modality of the run, or rename a modality')}"
            )
            if len(missing) == len(modalities):
                raise UserError(problem)
            warn(problem)
        if lost := [x for x in given if given[x] and given[x].isdisjoint(modalities)]:
            warn(
                f"{len(lost):,} of {len(names):,} clips have no modality of the run, for example "
                f"{show(lost[0])}\nthey count as clips without frames"
            )
        return cls(packed, names, modalities, identities)

    def split(self, name: str) -> Split:
        """Returns the only split. `name` is ignored."""
        return self._split

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields every clip of `plan` once, in batches of `rows` clips. See `ClipSource`."""
        for bucket, places in split_blocks(plan.bucket, rows):
            chosen = places.astype(np.int32)
            frames = {
                name: self._padded(name, chosen, (rows, plan.padded_lengths[name][bucket]))
                for name in plan.modalities
            }
            yield make_batch(frames, chosen, rows)

    def mean_vectors(self, modality: str, least: float = 0.0) -> np.ndarray:
        """Returns [N, D] float32, the mean feature of each clip of `names`.

        Frames are weighted by quality. If no frame of a clip has a quality above 0, all its frames
        have equal weights. The mean of a clip without frames is 0. A mean is also 0, with a
        warning, if it consists of rounding errors of its frames, or of numbers below `least`.
        """
        vectors = np.zeros((len(self.names), self._widths[modality]), np.float32)
        flat = self._packed.get(modality)
        if flat is None or not len(flat.features):
            return vectors
        lengths, starts = self._split.lengths[modality][self.places], self._starts[modality]
        quality, features = flat.frames["quality"], flat.features
        # A few clips at a time, because all frames as float64 would take up to 8 times the memory.
        ends, empty = np.cumsum(lengths, dtype=np.int64), list[int]()
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
            sums, sizes = np.zeros((len(clips), vectors.shape[1])), np.zeros(len(clips))
            for at in range(0, len(owner), MAX_BLOCK_FRAMES):  # a clip may be longer than a block
                part = slice(at, at + MAX_BLOCK_FRAMES)
                present, begins = np.unique(owner[part], return_index=True)
                weighted = features[index[part]].astype(np.float64) * weight[part, None]
                sums[present] += np.add.reduceat(weighted, begins, axis=0)
                size = np.maximum(weighted.max(axis=1), -weighted.min(axis=1))
                sizes[present] += np.add.reduceat(size, begins)
            filled = length > 0
            largest = np.maximum(sums.max(axis=1), -sums.min(axis=1))[filled]
            usable = largest > np.maximum(MAX_ROUNDING * sizes, least * total)[filled]
            vectors[clips[filled]] = sums[filled] / total[filled, None] * usable[:, None]
            empty += clips[filled][~vectors[clips[filled]].any(axis=1)].tolist()
        warn_of_zeros(modality, [self.names[clip] for clip in empty])
        return vectors

    def _padded(self, modality: str, clips: np.ndarray, shape: tuple[int, int]) -> Frames:
        """Returns the frames of n clips in a modality, padded with zeros to `shape` (B, T)."""
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
    clips: Iterable[Clip],
    modalities: Mapping[str, int],
    names: dict[str, str],
    given: dict[str, frozenset[str]],
) -> Iterator[Clip]:
    """Yields each clip with only the modalities that are in `modalities`.

    Fills two dicts: `names`, clip -> its name in the input; and `given`, clip -> all its modalities
    in the input.
    """
    for clip in clips:
        names.setdefault(clip.name, clip.given or clip.name)
        given[clip.name] = frozenset(clip.modalities)
        selected = {name: clip.modalities[name] for name in modalities if name in clip.modalities}
        yield clip._replace(modalities=selected or {next(iter(modalities)): None})


def _limit_memory(clips: Iterable[Clip]) -> Iterator[Clip]:
    """Yields `clips` unchanged. Raises UserError if they take more than a third of the memory."""
    left = limit = memory_bytes() // 3  # the rest is for a copy of the clips and for the model
    for clip in clips:
        for value in clip.modalities.values():
            for array in value.values() if isinstance(value, Mapping) else (value,):
                left -= getattr(array, "nbytes", 0)
        if left < 0:
            raise UserError(
                f"{clip.place}: clip {show(clip.name)}: the clips up to this clip take more "
                f"than {limit:,} bytes, which is a third of the memory\nuse fewer clips at once"
            )
        yield clip


def warn_of_zeros(modality: str, clips: Sequence[str]) -> None:
    """Warns if there are `clips`, which have frames, but whose vectors are 0."""
    if clips:
        warn(
            f"{modality}: {messages.count(len(clips), 'clip')}, such as {show(clips[0])}, have a "
            "vector that is 0 or almost 0: they count as clips without frames\n"
            "to use these clips, compute their features again"
        )


def _warn_of_unused(modality: str, flat: PackedClips, *, official: bool) -> None:
    """Warns if frames were left out, or if values of frames are not finite or negative.

    For `official`, see `warn_of_bad_values`.
    """
    if frames := flat.skipped.get("non_finite"):
        clips = flat.skipped_clips.get("non_finite", 0)
        lost = f"\n{clips:,} clips lose all frames" if clips else ""
        warn(
            f"{modality}: {frames:,} of {flat.seen:,} frames are left out, because their features "
            f"are not finite{lost}\nto use these frames, compute their features again"
        )
    warn_of_bad_values(modality, flat.find_bad_values(), flat.seen, official=official)


# The forms of clips that `Predictor` and `Gallery` accept. A dataset also needs a split.
FrameClips = Clips | TrainingData | MemoryClips


def load_clips(
    path: str | Path,
    modalities: Mapping[str, int],
    identities: Sequence[str],
    *,
    split: str | None = None,
    quality: Quality = "given",
) -> MemoryClips:
    """Loads the clips of a folder, a parquet table or a `.npz` file for a trained model.

    Clip names lose the suffix `.mp4`. Frames that are not finite are left out, with a warning. If
    the folder contains pickles of iQIYI-VID, only the pickles of `modalities` are loaded.

    Args:
      modalities: modality -> feature width. The model reads these modalities.
      identities: the names of the classes of the model.
      split: the split to load, or None if the folder has a single split.
      quality: see `Quality`. With 'given', frames of a pickle without qualities have the quality 0.

    Raises:
      FileNotFoundError: the path does not exist, or has no clips.
      UserError: the files are wrong in another way.
    """
    path = Path(path).expanduser()
    paths = find_files(path, split)
    if not isinstance(paths, Mapping):
        return MemoryClips.pack(read_clips(paths), modalities, identities, quality)
    if not paths.keys() & modalities.keys():
        raise UserError(
            f"'{path}' contains the modalities {', '.join(sorted(paths))}, but the run reads "
            f"{', '.join(modalities)}\nadd a pickle of one of these modalities"
        )
    packed = {}
    with scratch_folder() as scratch:  # memory maps keep the deleted files open
        for name in [name for name in paths if name in modalities]:
            flat = sandbox.unpack(paths[name], name, scratch / name)
            frames = dict(flat.frames)
            if quality == "norm":
                frames["quality"] = compute_feature_norms(flat.features)
            packed[name] = replace(flat, frames=frames)
    names = {name: name for flat in packed.values() for name in flat.names}
    return MemoryClips(packed, names, modalities, identities, official=True)


def find_files(path: Path, split: str | None = None) -> Sequence[Path] | Mapping[str, Path]:
    """Returns the files that contain the clips of a folder or file, without reading the files.

    The result is a list of `.npz` files, or of one parquet table. For pickles of the iQIYI-VID
    dataset, it is modality -> pickle. `split` is the split, or None if there is only one.

    Raises:
      FileNotFoundError: the path does not exist, or has no clips.
      UserError: features would be ignored, or `split` does not fit the folder.
    """
    check_path(path)
    if path.is_dir():
        if pickles := iqiyi_vid.find_pickles(path):
            split = _choose_split(path, {split for _, split in pickles}, split)
            return {name: file for (name, of), file in pickles.items() if of == split}
        entries = list_entries(path)
        paths = [entry for entry in entries if entry.suffix == ".npz"]
        if not paths:
            splits = group_files_by_split(path)
            return splits[_choose_split(path, splits, split)]
        refuse_unread((entry for entry in entries if entry.suffix != ".npz"), "CLIP.npz")
    else:
        paths = [path]
    if split is not None:
        raise UserError(
            f"'{path}' has no splits, so the split '{split}' cannot be chosen\n"
            "leave out the argument split, or --config.eval.split of vidjax rank and embed"
        )
    return paths


def load_people(
    path: str | Path, modalities: Mapping[str, int], *, quality: Quality = "given"
) -> tuple[MemoryClips, dict[str, str]]:
    """Loads the files `path/PERSON/CLIP.npz`. Returns their clips, and clip -> person.

    The name of a clip is `PERSON/CLIP`. `modalities` is modality to read -> feature width. Raises
    NoFileError if there are no such files, or if there are clips directly in `path`.
    """
    path = Path(path).expanduser()
    people, others, entries = dict[str, list[Path]](), list[Path](), list_entries(path)
    for folder in filter(Path.is_dir, entries):
        inside = list_entries(folder)
        others += [entry for entry in inside if entry.suffix != ".npz"]
        if paths := [entry for entry in inside if entry.suffix == ".npz"]:
            people.setdefault(clean_identity(folder.name), []).extend(paths)
    if not people or any(entry.suffix == ".npz" for entry in entries):
        problem = "has clips outside the folders of people" if people else "has no clips of people"
        raise NoFileError(f"'{path}' {problem}\nput each clip into {path}/PERSON/CLIP.npz")
    if people.keys() <= set(SPLITS):
        raise UserError(
            f"{path}: {', '.join(people)} are splits of a dataset, not names of people\n"
            "choose a split with --split, or name its folder: "
            f"--input={shlex.quote(str(path / next(iter(people))))}"
        )
    refuse_unread(others, "PERSON/CLIP.npz")
    identity: dict[str, str] = {}

    def clips() -> Iterator[Clip]:
        for person, files in people.items():
            for clip in read_clips(files):
                name = f"{person}/{clip.given or clip.name}"
                identity[name] = person
                yield clip._replace(name=f"{person}/{clip.name}", given=name)

    return MemoryClips.pack(clips(), modalities, (), quality), identity


def check_path(path: Path) -> None:
    """Checks that a path is a folder, a `.parquet` file or a `.npz` file, or raises NoFileError."""
    if path.is_dir() or (path.is_file() and path.suffix in (".parquet", ".npz")):
        return
    if path.suffix == ".npy" and path.exists():
        raise NoFileError(
            f"'{path}' is an array without the name of its modality\n"
            f"name it: numpy.savez('{path.stem}.npz', face=numpy.load('{path.name}'))"
        )
    problem = "is not a folder, nor a .parquet or .npz file" if path.exists() else "does not exist"
    raise NoFileError(f"'{path}' {problem}: name a folder or file of features")


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
