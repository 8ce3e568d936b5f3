"""Counts the clips of an evaluation that a model judges to be poor."""

import functools
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from vidjax import devices
from vidjax.batch import Array, Batch, Frames
from vidjax.models.base import Identifier

FEW = 10  # poor clips that may be chance


class PoorClips:
    """Counts the poor clips of an evaluation, and warns if they are far too many."""

    def __init__(self, model: Identifier, counts: Sequence[int] = (0, 0)):
        """Starts at the `counts` of another counter: poor clips, and clips that are judged."""
        self._model, self._before = model, tuple(counts)
        self._counts: Array | None = None

    def counts(self) -> tuple[int, int]:
        """Returns the number of poor clips, and of clips that are judged."""
        poor, judged = (0, 0) if self._counts is None else devices.fetch(self._counts).tolist()
        return self._before[0] + poor, self._before[1] + judged

    def add(self, blocks: Sequence[Batch]) -> None:
        """Counts the clips of some blocks, on the devices."""
        for block in blocks:
            if jax.eval_shape(self._model.clip_quality, block.frames) is None:
                return
            counts = _count(self._model, block.frames, block.batch_mask)
            self._counts = counts if self._counts is None else self._counts + counts

    def share(self) -> float:
        """Returns the share of the judged clips that are poor."""
        poor, judged = self.counts()
        return poor / max(judged, 1)

    def warn(self, split: str) -> None:
        """Warns if more than `FEW` clips are poor, and far more than the model expects."""
        if self.counts()[0] > FEW and (message := self._model.many_poor(self.share(), split)):
            warnings.warn(message, stacklevel=3)


@functools.partial(jax.jit, static_argnums=0)
def _count(model: Identifier, frames: Mapping[str, Frames], mask: Array) -> Array:
    """Returns the number of poor clips, and of judged clips, [2] int32."""
    quality = model.clip_quality(frames)
    assert quality is not None
    rows = (mask & quality.poor, mask & quality.judged)
    return jnp.stack([jnp.sum(row) for row in rows]).astype(jnp.int32)
