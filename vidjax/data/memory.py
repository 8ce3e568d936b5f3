"""Clips in memory as evaluation reads them: no records, no TensorFlow."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vidjax.batch import Batch, Frames
from vidjax.data.clips import BUCKETS, EvalPlan, Split, best_frames
from vidjax.data.untrusted.packing import Clip, Clips, clean_name, pack
from vidjax.data.untrusted.unpickle import show


class MemoryClips:
    """Clips in memory as evaluation reads a split of a dataset: no records, no TensorFlow.

    Attributes:
      identities: of the columns.
      names: the clips as they were given, in that order.
      places: [N] int, the clip_index of each of them.
    """

    def __init__(self, clips: Clips, modalities: Mapping[str, int], identities: Sequence[str]):
        """Checks and packs some clips.

        Args:
          clips: clip -> modality -> features, as of `load`; other modalities are passed over.
          modalities: name -> feature width of those that are wanted.
          identities: of the columns.

        Raises:
          ValueError: a clip is not what it should be; names clip, modality and field.
        """
        if not isinstance(clips, Mapping):
            raise ValueError(
                f"clips are {{clip: {{modality: features}}}}, not {type(clips).__name__}"
            )
        if not clips:
            raise ValueError("no clips: the dict is empty")
        self.identities, self.names = tuple(identities), tuple(clips)
        packed = pack(self._wanted(clips, modalities))
        for name, flat in packed.items():
            width = flat.features.shape[1]
            if len(flat.features) and width != modalities[name]:
                clip = flat.names[int(np.argmax(flat.lengths > 0))]
                raise ValueError(
                    f"clip {show(clip)}, {name}: features are {width} wide, "
                    f"the run wants {modalities[name]}"
                )
        clean = [clean_name(name, "clips:") for name in clips]
        ordered = tuple(sorted(clean))
        index = {name: place for place, name in enumerate(ordered)}
        self.places = np.array([index[name] for name in clean])
        self._packed = packed
        self._starts = {name: np.zeros(len(ordered), np.int64) for name in modalities}
        lengths = {name: np.zeros(len(ordered), np.int32) for name in modalities}
        for name, flat in packed.items():
            rows = [index[clip] for clip in flat.names]
            lengths[name][rows] = flat.lengths
            self._starts[name][rows] = np.cumsum(flat.lengths, dtype=np.int64) - flat.lengths
        self._widths = dict(modalities)
        self._split = Split(
            name="clips",
            clips=ordered,
            labels=np.zeros(len(ordered), np.int32),
            labelled=False,
            positives=np.zeros(len(self.identities), np.int64),
            num_others=0,
            lengths=lengths,
        )

    @staticmethod
    def _wanted(clips: Clips, modalities: Mapping[str, int]) -> Iterator[Clip]:
        """Yields the clips with the modalities that are wanted; ValueError where there is none."""
        for given, found in clips.items():
            name = clean_name(given, "clips:")
            if not isinstance(found, Mapping):
                kind = type(found).__name__
                raise ValueError(
                    f"clip {show(name)} is of type {kind}, wanted {{modality: features}}"
                )
            wanted = {key: found[key] for key in modalities if key in found}
            if found and not wanted:
                raise ValueError(
                    f"clip {show(name)}: the run knows {', '.join(modalities)}, "
                    f"not {show(', '.join(map(str, found)))}"
                )
            # A clip without anything is still a clip.
            yield Clip(name, "clips", wanted or {next(iter(modalities)): None})

    def split(self, name: str) -> Split:
        """Returns all clips, whatever the name."""
        del name
        return self._split

    def eval_batches(self, plan: EvalPlan, *, rows: int) -> Iterator[Batch]:
        """Yields every clip of the plan once, in blocks of `rows` rows; see `ClipSource`."""
        for bucket in range(len(BUCKETS)):
            clips = np.flatnonzero(plan.bucket == bucket).astype(np.int32)
            for at in range(0, len(clips), rows):
                chosen = clips[at : at + rows]
                frames = {
                    name: self._padded(name, chosen, rows, plan.padded_lengths[name][bucket])
                    for name in plan.modalities
                }
                clip_index = np.pad(chosen, (0, rows - len(chosen)))
                yield Batch(frames, clip_index, np.arange(rows) < len(chosen))

    def _padded(self, modality: str, clips: np.ndarray, rows: int, size: int) -> Frames:
        """Returns Frames [rows, size] of some clips."""
        flat = self._packed.get(modality)
        dtype = flat.features.dtype if flat else np.dtype(np.float16)
        frames = Frames(
            features=np.zeros((rows, size, self._widths[modality]), dtype),
            quality=np.zeros((rows, size), np.float32),
            detection=np.zeros((rows, size), np.float32),
            number=np.zeros((rows, size), np.int32),
            mask=np.zeros((rows, size), bool),
        )
        for row, clip in enumerate(clips.tolist()):
            start = int(self._starts[modality][clip])
            length = int(self._split.lengths[modality][clip])
            if not flat or not length:
                continue
            chosen = np.arange(start, start + length)
            if length > size:
                chosen = chosen[best_frames(flat.quality[chosen], size)]
            count = len(chosen)
            frames.features[row, :count] = flat.features[chosen]
            frames.quality[row, :count] = flat.quality[chosen]
            frames.detection[row, :count] = flat.detection[chosen]
            frames.number[row, :count] = flat.number[chosen]
            frames.mask[row, :count] = True
        return frames
