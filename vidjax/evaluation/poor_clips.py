"""Poor clips: those that a fallback model judges with its other modalities, too.

Lengths of feature vectors and quality scores have another scale with every face net. So the
threshold is a quantile of the training clips, computed once before training. It is part of
`TaskSpec`, so every checkpoint keeps it.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vidjax import devices, fusion
from vidjax.batch import Array, Batch, Frames
from vidjax.config import Config
from vidjax.data.clips import TrainingData
from vidjax.errors import UserError
from vidjax.models.fallback import FallbackIdentifier
from vidjax.steps.clip_values import values_of_clips
from vidjax.system import System

FAR_MORE = 0.05  # share of poor clips above which an evaluation warns
FEW = 10  # poor clips that may be chance


def training_threshold(config: Config, data: TrainingData) -> float | None:
    """Returns the measure below which the share `model.threshold_share` of the clips lies.

    All clips of the training splits count that have the modality, whatever their identity and their
    fold. At most that share of them lies below the threshold; with equal measures less, or none.

    Args:
      config: the configuration of the run.
      data: the clips.

    Returns:
      The threshold; None for a model without `threshold_share`.

    Raises:
      ValueError: The configuration has a threshold of its own, too.
    """
    spec = config.model.to_dict()
    share = spec.get("threshold_share", 0.0)
    modality = spec.get("modality", FallbackIdentifier.modality)
    if not share or modality not in config.modalities:  # the model refuses the latter
        return None
    if spec.get("threshold"):
        raise UserError(
            f"config.model.threshold={spec['threshold']} and config.model.threshold_share={share} "
            "exclude each other\nset one of them to 0"
        )
    measure = spec.get("measure", FallbackIdentifier.measure)
    splits = [data.split(name) for name in config.data.train_splits]
    exists = np.concatenate([split.lengths[modality] > 0 for split in splits])
    if not exists.any():
        return 0.0
    mean = jax.jit(functools.partial(fusion.mean_measure, measure=measure))
    return quantile(values_of_clips(config, data, modality, mean, exists), share)


def quantile(values: np.ndarray, share: float) -> float:
    """Returns the value below which lie the `share` lowest of n values, rounded down to a count.

    Args:
      values: [n] float32, at least one.
      share: 0 or more, below 1.
    """
    count = int(share * len(values) * (1 + 1e-12))  # 0.07 x 100 is less than 7 in floats
    return float(np.partition(values, count)[count])


class PoorClips:
    """Counts the poor clips of an evaluation, and warns if they are far too many."""

    def __init__(self, system: System, counts: Sequence[int] = (0, 0)):
        """Starts at `counts` of another counter; counts nothing for a system without a threshold.

        Args:
          system: the system.
          counts: poor clips, and clips with the modality.
        """
        self._system, self._before = system, tuple(counts)
        self._counts = jnp.zeros(2, jnp.int32)

    def counts(self) -> tuple[int, int]:
        """Returns the number of poor clips, and of clips with the modality."""
        poor, clips = devices.fetch(self._counts).tolist()
        poor_before, clips_before = self._before
        return poor_before + poor, clips_before + clips

    def add(self, blocks: Sequence[Batch]) -> None:
        """Counts the clips of some blocks, on the devices."""
        model, measure = self._system.model, self._system.measure
        if measure and isinstance(model, FallbackIdentifier):
            for block in blocks:
                frames = {model.modality: block.frames[model.modality]}
                counts = _count(measure, model.modality, model.threshold, frames, block.batch_mask)
                self._counts += counts

    def share(self) -> float:
        """Returns the share of the clips with the modality that are poor."""
        poor, clips = self.counts()
        return poor / max(clips, 1)

    def warn(self, split: str) -> None:
        """Warns if far more clips of a split are poor than were meant to be."""
        share, model = self.share(), self._system.model
        if not isinstance(model, FallbackIdentifier) or self.counts()[0] <= FEW:
            return
        if share > max(FAR_MORE, 5 * model.threshold_share):
            warnings.warn(
                f"{share:.1%} of the clips of {split} have a {model.modality} of a {model.measure} "
                f"below {model.threshold:.4g}\ntheir features differ in scale from those that the "
                "threshold is made for: with --config.model.threshold=0 and\n"
                "--config.model.threshold_share=0.01 training finds one for 1 % of its clips",
                stacklevel=3,
            )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _count(
    measure: Callable[[Mapping[str, Frames]], Array],
    modality: str,
    threshold: float,
    frames: Mapping[str, Frames],
    mask: Array,
) -> Array:
    """Returns the number of poor clips, and of clips with the modality, [2] int32."""
    real = mask & frames[modality].mask.any(axis=1)
    poor = real & (measure(frames) < threshold)
    return jnp.stack([jnp.sum(poor), jnp.sum(real)]).astype(jnp.int32)
