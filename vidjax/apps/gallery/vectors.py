"""The vectors of clips, and how they are computed in a gallery without a training run."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from vidjax.apps.gallery.backend import Backend
from vidjax.apps.gallery.store import StoredClip
from vidjax.data.memory import FrameClips, MemoryClips
from vidjax.data.packed_clips import Quality
from vidjax.utils.errors import UserError

Advance: TypeAlias = Callable[[int], None]  # gets the number of clips of each finished batch
MIN_SHARE = 1e-6  # smallest usable vector of a clip, relative to the centre of all vectors


class Vectors(NamedTuple):
    """The unit vectors of N clips.

    Attributes:
      names: the names of the clips.
      parts: modality -> vectors [N, D] float32. The vector of a missing modality is 0. In the
        gallery of a training run without PLDA, the only key is `embedding`.
      labels: the person of each clip. None if the person is not known.
    """

    names: tuple[str, ...]
    parts: dict[str, np.ndarray]
    labels: tuple[str | None, ...]

    def only(self, names: Collection[str]) -> "Vectors":
        """Selects the clips with the given names, in the order of `self.names`."""
        rows = [row for row, name in enumerate(self.names) if name in names]
        if len(rows) == len(self.names):
            return self
        parts = {part: x[rows] for part, x in self.parts.items()}
        labels = tuple(self.labels[row] for row in rows)
        return Vectors(tuple(self.names[row] for row in rows), parts, labels)


class NetVectors(NamedTuple):
    """Computes the vector of a clip, the mean of its frames, for a gallery without a run."""

    backend: Backend

    @property
    def reads(self) -> tuple[dict[str, int], Quality]:
        """Modality -> width of its features; and "given", the source of the quality of a frame.

        "given" means the quality in the file or, without one, the norm of the features.
        """
        return self.backend.widths, "given"

    def embed(self, clips: FrameClips, split: str | None, advance: Advance) -> Vectors:
        """Computes the vector of each clip, the mean of its frames. See `Gallery.embed`."""
        if isinstance(clips, Mapping):
            clips = MemoryClips.pack(clips, self.backend.widths, ())
        if isinstance(clips, MemoryClips) and split is not None:
            raise UserError(f"split={split!r} cannot be used with clips in memory: leave it out")
        if not isinstance(clips, MemoryClips):
            raise UserError(
                "a dataset can be used only with a gallery made from a trained run, not from nets\n"
                "give {clip: {modality: features}} in Python, or --input=FOLDER"
            )
        parts = {
            # If the centre is subtracted from a far smaller vector, only the centre remains.
            part.name: clips.mean_vectors(part.name, MIN_SHARE * np.abs(part.centre).max())
            for part in self.backend.parts
        }
        advance(len(clips.names))
        return Vectors(clips.names, parts, (None,) * len(clips.names))


def select_usable_clips(vectors: Vectors) -> dict[str, StoredClip]:
    """Returns name -> clip. A clip is left out if its vectors are 0: it has no usable frame."""
    rows = np.concatenate(list(vectors.parts.values()), axis=1)
    clips = zip(vectors.names, vectors.labels, rows, strict=True)
    return {name: StoredClip(label, row) for name, label, row in clips if row.any()}
