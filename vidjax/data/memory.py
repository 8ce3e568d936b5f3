"""Loads clips without labels into memory, for a trained model or a gallery of people.

Clips are loaded from a `.npz` file, from a parquet table, or from a folder. The folder contains
`.npz` files, folders of `.npz` files, splits of a dataset (see `vidjax.data.arrays`), or pickles of
the iQIYI-VID dataset. The readers of pickles are imported only for a folder of pickles.
"""

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vidjax.core.batch import Batch
from vidjax.data.arrays import group_files_by_split, list_npz_files
from vidjax.data.checks import explain_unread, list_entries, refuse_unread, warn_of_bad_values
from vidjax.data.clip_files import NO_NETS, Nets, read_clips
from vidjax.data.clips import SPLITS, EvalPlan, Modality, Split, eval_batches
from vidjax.data.dataset import Dataset
from vidjax.data.packed_clips import PackedClips, Quality, Reader, complete, join, map_again
from vidjax.data.packing import Clip, Clips, compute_feature_norms, pack, read_dict
from vidjax.utils import files, messages
from vidjax.utils.errors import NoFileError, UserError, closest, warn
from vidjax.utils.groups import group_by_key
from vidjax.utils.machine import memory_bytes
from vidjax.utils.names import clean_identity, show

MAX_BLOCK_FRAMES = 1 << 12  # frames that are copied as float64 at once
MAX_ROUNDING = 1e-6  # largest rounding error of a mean of float32 numbers, relative to its frames


class MemoryClips:
    """Clips in memory that a model can score. They form a single split with the name `clips`.

    Attributes:
      identities: the names of the classes of the model.
      names: N clip names as in the input, in the order of the input.
      places: [N] int, the position of each clip of `names` in `split("clips").clips`.
    """

    def __init__(
        self,
        packed: PackedClips,
        names: Mapping[str, str],
        modalities: Mapping[str, int],
        identities: Sequence[str],
        *,
        official: bool = False,
    ):
        """Makes an object from checked clips.

        Args:
          packed: the clips, from `packing.pack`.
          names: clip name -> the name in the input, which may end in `.mp4`.
          modalities: modality -> feature width. The model reads these modalities.
          official: True if the clips are from official iQIYI-VID pickles. Some of their qualities
            are negative, so a warning of negative qualities appears only if all are negative.
        """
        if not names:
            raise UserError("the input contains no clips: give one or more clips")
        self.identities, self.names = tuple(identities), tuple(names.values())
        self._modalities = dict[str, Modality]()
        for name, wanted in modalities.items():
            self._modalities[name] = Modality(wanted, "float32")
            features = packed.frames[name].features if name in packed.frames else np.empty((0, 0))
            if not len(features):
                continue
            if features.shape[1] != wanted:
                clip = packed.names[int(np.argmax(packed.lengths[name] > 0))]
                raise UserError(
                    f"clip {show(clip)}, {name}: features have width {features.shape[1]}, but the "
                    f"run needs width {wanted}\n"
                    "compute them with the same program as the training features"
                )
            self._modalities[name] = Modality(wanted, np.dtype(features.dtype).name)
        for name in packed.frames:
            _warn_of_unused(name, packed, official=official)
        self._packed = complete(packed, self._modalities)
        index = {name: place for place, name in enumerate(packed.names)}
        self.places = np.array([index[name] for name in names])
        self._split = Split(
            name="clips",
            clips=packed.names,
            labels=np.zeros(len(names), np.int32),
            labelled=False,
            positives=np.zeros(len(self.identities), np.int64),
            num_others=0,
            lengths=self._packed.lengths,
        )

    @classmethod
    def pack(
        cls,
        clips: Clips | Iterator[Clip],
        modalities: Mapping[str, int],
        identities: Sequence[str],
        quality: Quality = "given",
    ) -> "MemoryClips":
        """Checks clips, and makes an object of this class from them.

        Args:
          clips: clip -> modality -> features [T, D], or an iterator of `Clip`.
          modalities: modality -> feature width. The model reads only these modalities.
          identities: the names of the classes of the model.
          quality: the source of the qualities, as in the training. See `Quality`.

        A clip that has none of `modalities` counts as a clip without frames. Clips that have only
        other modalities cause a warning, or a UserError if no clip has one of `modalities`.
        """
        names: dict[str, str] = {}  # clip -> its name in the input
        given: dict[str, frozenset[str]] = {}  # clip -> all its modalities in the input

        def select() -> Iterator[Clip]:
            for clip in read_dict(clips, "clips") if isinstance(clips, Mapping) else clips:
                names.setdefault(clip.name, clip.given or clip.name)
                given[clip.name] = frozenset(clip.modalities)
                known = {x: clip.modalities[x] for x in modalities if x in clip.modalities}
                yield clip._replace(modalities=known or {next(iter(modalities)): None})

        packed = pack(_limit_memory(select()), quality=quality)
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
                f"{show(lost[0])}\nthey count as clips without frames: add a modality of the run"
            )
        return cls(packed, names, modalities, identities)

    def split(self, name: str) -> Split:
        """Returns all clips as a split. There is only one split, so `name` is ignored."""
        return self._split

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields every clip of `plan` once, in batches of `rows` clips. See `ClipSource`."""
        return eval_batches(Reader([self._packed]), self._modalities, plan, rows)

    def mean_vectors(self, modality: str, least: float = 0.0) -> np.ndarray:
        """Returns [N, D] float32, the mean feature of each clip of `names`.

        Frames are weighted by quality. If no frame of a clip has a quality above 0, all frames of
        the clip have equal weights. The mean of a clip without frames is 0. If the largest
        absolute value of a mean is at most `least`, the mean becomes 0, with a warning.
        """
        vectors = np.zeros((len(self.names), self._modalities[modality].dim), np.float32)
        features, quality, *_, starts, lengths = self._packed.frames[modality]
        starts, lengths = starts[self.places], lengths[self.places]
        # A few clips at a time, because all frames as float64 would take up to 8 times the memory.
        ends, empty = np.cumsum(lengths, dtype=np.int64), list[int]()
        blocks = np.flatnonzero(np.diff(ends // MAX_BLOCK_FRAMES)) + 1
        for clips in np.split(np.arange(len(lengths)), blocks):
            length = lengths[clips]
            first = starts[clips] - (np.cumsum(length) - length)
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


def _limit_memory(clips: Iterable[Clip]) -> Iterator[Clip]:
    """Yields `clips` unchanged, and adds up the bytes of their arrays.

    If the clips take more than a third of the memory, raises UserError.
    """
    left = limit = memory_bytes() // 3  # the rest is for a copy of the clips and for the model
    for clip in clips:
        for value in clip.modalities.values():
            for array in value.values() if isinstance(value, Mapping) else (value,):
                left -= getattr(array, "nbytes", 0)
        if left < 0:
            raise UserError(
                f"{clip.place}: clip {show(clip.name)}: this clip and earlier clips take more "
                f"than {limit:,} bytes, which is a third of the memory\nuse fewer clips at once"
            )
        yield clip


def warn_of_zeros(modality: str, clips: Sequence[str]) -> None:
    """Warns that the vectors of `clips` are 0, although the clips have frames."""
    if clips:
        warn(
            f"{modality}: {messages.count(len(clips), 'clip')}, such as {show(clips[0])}, have a "
            "vector that is 0 or almost 0: they count as clips without frames\n"
            "to use these clips, compute their features again"
        )


def _warn_of_unused(modality: str, packed: PackedClips, *, official: bool) -> None:
    """Warns if frames of a modality were left out, or have qualities that cannot be used.

    For `official`, see `warn_of_bad_values`.
    """
    counts = packed.counts[modality]
    if frames := counts.skipped.get("non_finite"):
        clips = counts.skipped_clips.get("non_finite", 0)
        lost = f"\n{clips:,} clips lose all frames" if clips else ""
        warn(
            f"{modality}: {frames:,} of {counts.frames:,} frames are left out, because their "
            f"features are not finite{lost}\nto use these frames, compute their features again"
        )
    bad = packed.find_bad_values(modality)
    warn_of_bad_values(modality, bad, counts.frames, official=official)


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
      quality: see `Quality`. If a pickle has no qualities, 'given' means the quality 0.
      nets: modality -> digest of the neural net whose vectors the model reads. Files with vectors
        of other nets raise UserError.

    Raises:
      FileNotFoundError: the path does not exist, or has no clips.
      UserError: the files are wrong in another way.
    """
    path = files.local(path)
    folder, paths = find_files(path, split)
    if not isinstance(paths, Mapping):
        clips = read_clips(paths, folder, nets)
        return MemoryClips.pack(clips, modalities, identities, quality)
    if not paths.keys() & modalities.keys():
        raise UserError(
            f"'{path}' contains the modalities {', '.join(sorted(paths))}, but the run reads "
            f"{', '.join(modalities)}\nadd a pickle of a modality that the run reads"
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
    """Finds the files of clips without reading them. Returns (folder of the files, files).

    `path` is a folder or a file. `split` is the split to find, or None if there is only one. The
    files are a list of paths, such as `a.npz` or `monday/a.npz`, or a list of one parquet table.
    In a folder of iQIYI-VID pickles, the files are a dict, modality -> path of the pickle.

    Raises:
      FileNotFoundError: the path does not exist, or has no clips.
      UserError: the folder does not have `split`, or mixes files that cannot be read together.
    """
    check_path(path)
    if path.is_dir():
        entries = list_entries(path)
        if any(entry.suffix == ".pickle" for entry in entries):
            from vidjax.data.iqiyi_vid import find_pickles

            if pickles := find_pickles(path):
                split = _choose_split(path, {split for _, split in pickles}, split)
                return path, {name: file for (name, of), file in pickles.items() if of == split}
        paths = [entry for entry in entries if entry.suffix == ".npz"]
        others = [entry for entry in entries if entry.suffix != ".npz"]
        if not paths and not any(entry.stem in SPLITS for entry in entries):
            paths, others = list_npz_files(path)
            remedy = next(filter(None, (explain_unread(other, path) for other in others)), "")
            if remedy and not paths:
                raise NoFileError(f"'{path}' contains no .npz file\n{remedy}")
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
            "leave out the argument split (in Python) or --config.eval.split (in a command)"
        )
    return path, paths


def load_people(
    path: str | Path,
    modalities: Mapping[str, int],
    *,
    quality: Quality = "given",
    nets: Nets = NO_NETS,
) -> tuple[MemoryClips, dict[str, str]]:
    """Loads the files `path/PERSON/CLIP.npz`. Returns the clips, and clip -> person.

    The name of a clip is `PERSON/CLIP`. `modalities` is modality -> feature width. Other modalities
    are not read. For `quality` and `nets`, see `load_clips`. Raises NoFileError if there are no
    files `PERSON/CLIP.npz`, or if there are clips directly in `path`.
    """
    path = files.local(path)
    list_entries(path)  # raises an error if there is no such folder
    found, others = list_npz_files(path)
    if not found or any(file.parent == path for file in found):
        problem = "has clips outside the folders of people" if found else "has no clips of people"
        raise NoFileError(f"'{path}' {problem}\nput each clip into {path}/PERSON/CLIP.npz")
    people = group_by_key((clean_identity(file.parent.name), file) for file in found)
    if people.keys() <= set(SPLITS):
        raise UserError(
            f"{path}: {', '.join(people)} are splits of a dataset, not names of people\n"
            "choose a split with --split, or the folder of a split: "
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
    """Raises NoFileError if a path is not a folder, a `.parquet` file or a `.npz` file."""
    if path.is_dir() or (path.is_file() and path.suffix in (".parquet", ".npz")):
        return
    present = files.is_present(path)
    problem = "is not a folder, nor a .parquet or .npz file" if present else "does not exist"
    remedy = explain_unread(path) * present or "name a folder or file of features"
    raise NoFileError(f"'{path}' {problem}\n{remedy}")


def _choose_split(path: Path, splits: Collection[str], split: str | None) -> str:
    """Returns `split`. If it is None, returns the only item of `splits`, the splits in `path`.

    Raises UserError if `split` is not in `splits`, or if it is None and there are several splits.
    """
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


# The forms of clips that `Predictor` and `Gallery` accept. A dataset also needs a split.
FrameClips = Clips | Dataset | MemoryClips
