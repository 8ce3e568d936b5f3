"""Holds clips without labels in memory, for a trained model or a gallery."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from vidjax.core.batch import BATCHED, Batch, Frames
from vidjax.data.checks import warn_of_bad_values
from vidjax.data.clips import (
    EvalPlan,
    Modality,
    Split,
    TrainingData,
    make_batch,
    pad,
    split_blocks,
)
from vidjax.data.frame_fields import Quality
from vidjax.data.packed_clips import PackedClips
from vidjax.data.packing import Clip, Clips, pack, read_dict, stage
from vidjax.utils import messages
from vidjax.utils.errors import UserError, closest, warn
from vidjax.utils.machine import memory_bytes
from vidjax.utils.names import show

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
