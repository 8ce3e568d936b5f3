"""Fusion on the device: Frames [B, T] in, Frames [B, T'] out, masked throughout, for one modality.

Every function is pure and traces under jit. Random ones draw from shapes of the whole batch only,
so a draw does not depend on how many devices share it.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.batch import Array, Frames, LazyFeatures
from vidjax.selection import (
    filter_frames,
    frame_weights,
    per_frame_uniform,
    read,
    sample_frames,
    shuffle,
    take,
    top_frames,
)

# Sampling weights become whole multiples of 1 / _LEVELS of the clip's largest: sums of up to 4096
# such weights are exact in float32, whatever their order, so neither padding nor the number of
# devices can move a draw.
_LEVELS = 4096


def random_fusion(
    rng: Array,
    frames: Frames,
    *,
    num_draws: int,
    max_frames: int = 5,
    probs: Sequence[float] | None = None,
    replacement: bool = True,
    sampling: str = "uniform",
    weighting: str = "uniform",
) -> Frames:
    """Returns `num_draws` fused frames a clip, each the mean of 1 to `max_frames` random frames.

    Args:
      rng: key.
      frames: Frames [B, T].
      num_draws: fused frames a clip, T'.
      max_frames: the most frames that are fused into one.
      probs: `max_frames` weights of fusing 1, 2, ... frames; None: all the same.
      replacement: whether one fused frame may hold a frame twice; False: only where the clip has
        too few that can be drawn at all, and then only once all of them are in it.
      sampling: how frames are drawn: with probabilities proportional to `frame_weights`, one of
        `uniform`, `quality`, `graded` (to 1/4096 of the clip's largest).
      weighting: of the mean of the drawn frames: one of the same, or `mixup` for a convex
        combination at random, all being equally likely (Dirichlet with parameters 1).

    Returns:
      Frames [B, num_draws]: float32 features; quality and detection are means with the weights of
      the features; number is the first drawn frame's, hence in no order; mask is False, and the
      features 0, where the clip has no frame.

    Raises:
      ValueError: for a weighting that does not exist, or impossible counts or `probs`.

    Source: quality fusion (4th place 2019): 1-5 frames with replacement, a fused vector a clip and
    step, weights quality x detection. Without replacement: the shuffled and merged frames of
    Residual Dense Net (2nd place 2019), the first frame's own included. MixUp: Zhang et al., here
    within a clip, so that the label needs no mixing. Ours: many draws at once; uniform weights
    where the weights of all frames are negative, zero or not a number.
    """
    if num_draws < 1 or max_frames < 1:
        raise ValueError(
            f"random fusion needs num_draws and max_frames of 1 or more, got {num_draws} and "
            f"{max_frames}"
        )
    num_clips = len(frames.mask)
    uniforms = jax.random.uniform(rng, (num_clips, num_draws, max_frames + 1), jnp.float32)

    # Strictly below 1, so that float32 rounding never adds a frame more than there are slots.
    thresholds = _cumulative_probs(probs, max_frames)[:-1]
    num_fused = 1 + jnp.sum(uniforms[..., :1] >= thresholds, axis=-1)  # [B, T']
    slots = [slot < num_fused for slot in range(max_frames)]

    levels = _levels(frame_weights(frames, sampling))
    picks = _draw(levels, uniforms[..., 1:], replacement)  # max_frames x [B, T']
    if weighting == "mixup":
        shares = jax.random.exponential(jax.random.fold_in(rng, 1), uniforms[..., 1:].shape)
        weights = [shares[..., slot] for slot in range(max_frames)]
    else:
        all_weights = frame_weights(frames, weighting)
        weights = [take(all_weights, index) for index in picks]
    has_frame = jnp.any(frames.mask, axis=1)[:, None]
    has_frame = jnp.broadcast_to(has_frame, (num_clips, num_draws))
    return _fuse(frames, picks, slots, weights, has_frame)


def merged_windows(
    rng: Array | None, frames: Frames, *, max_frames: int = 5, weighting: str = "uniform"
) -> Frames:
    """Returns the frames, and for each of them its mean with others of the clip.

    Args:
      rng: key, or None for fixed windows, which depend on nothing but how many real frames the clip
        has.
      frames: Frames [B, T].
      max_frames: the most frames that are merged into one, 2 or more; every frame is merged with 1
        to max_frames - 1 others, as many as the clip has.
      weighting: of the mean, as in `frame_weights`.

    Returns:
      Frames [B, 2 T] in the stored dtype: the frames as they are, then for each one the mean of it
      and those that follow it in a random order of the clip's frames, which begins anew after the
      last. Quality and detection are means too; number is the frame's own, hence in no order.
      Training that wants only a few of them draws the like with less work by `random_fusion`
      without replacement, half of its `probs` on one frame.

    Raises:
      ValueError: for fewer than two frames, or a weighting that does not exist.

    Source: Residual Dense Net (2nd place 2019): shuffled, merged with 1-4 others, united with the
    originals. Ours: the weighting; a fixed order that strides over the clip, for evaluation.
    """
    if max_frames < 2:
        raise ValueError(f"merged windows needs max_frames of 2 or more, got {max_frames}")
    frames = frames._replace(features=read(frames.features))  # all are wanted
    order_rng, count_rng = (None, None) if rng is None else jax.random.split(rng)
    order = shuffle(order_rng, frames.mask)
    if count_rng is None:
        extra = (jnp.cumsum(frames.mask, axis=1) - 1) % (max_frames - 1)
    else:
        uniforms = per_frame_uniform(count_rng, frames.mask)
        extra = (uniforms * (max_frames - 1)).astype(jnp.int32)
    count = jnp.sum(frames.mask, axis=1, keepdims=True, dtype=jnp.int32)
    num_fused = jnp.minimum(2 + extra, count)  # [B, T]
    slots = [slot < num_fused for slot in range(max_frames)]
    place = jnp.argsort(order, axis=1)
    picks = [take(order, (place + slot) % jnp.maximum(count, 1)) for slot in range(max_frames)]
    all_weights = frame_weights(frames, weighting)
    weights = [take(all_weights, index) for index in picks]
    merged = _fuse(frames, picks, slots, weights, frames.mask)
    merged = merged._replace(number=frames.number)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], 1), frames, merged)


def mean_frame(frames: Frames, *, weighting: str = "uniform") -> Frames:
    """Returns one frame a clip, the mean of its frames.

    Args:
      frames: Frames [B, T].
      weighting: of the mean, as in `frame_weights`; `graded` is the W(x) of quality fusion.

    Returns:
      Frames [B, 1]: float32 features, quality and detection are the means; number is the first real
      frame's; where the clip has no frame, mask is False and the features are 0.

    Raises:
      ValueError: for a weighting that does not exist.
    """
    weights = frame_weights(frames, weighting)
    total = jnp.sum(weights, axis=1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)  # [B, T]
    # Blocks are padded to a few lengths; what lies beyond the last real frame adds nothing.
    end = jnp.max(jnp.where(frames.mask, jnp.arange(1, 1 + frames.mask.shape[1]), 0))

    def mean(values: Array | LazyFeatures) -> Array:
        # Frame after frame in the stored dtype: 15 times faster on CPU than a sum over float32
        # [B, T, D], and it does not depend on how long the padding is.
        def add(t: Array, total: Array) -> Array:
            value = _frame(values, t)
            weight = jax.lax.dynamic_index_in_dim(weights, t, axis=1, keepdims=False)
            return total + value * weight.reshape(weight.shape + (1,) * (value.ndim - 1))

        zeros = jnp.zeros_like(_frame(values, 0))
        return jax.lax.fori_loop(0, end, add, zeros.astype(_at_least_float32(zeros)))

    return Frames(
        features=mean(frames.features)[:, None],  # [B, 1, D]
        quality=mean(_finite(frames.quality))[:, None],
        detection=mean(_finite(frames.detection))[:, None],
        number=take(frames.number, jnp.argmax(frames.mask, axis=1)[:, None]),
        mask=jnp.any(frames.mask, axis=1)[:, None],
    )


def crop_means(frames: Frames, *, weighting: str = "quality") -> Frames:
    """Returns four frames a clip, the means of four crops of its real frames in time order.

    Args:
      frames: Frames [B, T].
      weighting: of the mean, as in `frame_weights`.

    Returns:
      Frames [B, 4], as `mean_frame` gives them, of the whole clip, of it without its first third,
      without its last third, and without its first and last sixth. Thirds and sixths are rounded
      down, so that no crop of a clip with frames is empty.

    Raises:
      ValueError: for a weighting that does not exist.

    Source: test-time crops of the 5th-place system of 2018.
    """
    rank = jnp.cumsum(frames.mask, axis=1) - 1
    count = rank[:, -1:] + 1
    third, sixth = count // 3, count // 6
    crops = [
        frames.mask,
        frames.mask & (rank >= third),
        frames.mask & (rank < count - third),
        frames.mask & (rank >= sixth) & (rank < count - sixth),
    ]

    def mean(mask: Array) -> Frames:
        return mean_frame(frames._replace(mask=mask), weighting=weighting)

    means = jax.vmap(mean, out_axes=1)(jnp.stack(crops))  # one pass over the frames for all crops
    return jax.tree.map(lambda values: values[:, :, 0], means)


def all_frames(frames: Frames) -> Frames:
    """Returns the frames as they are."""
    return frames


# Each draws from nothing but the keyword arguments that a spec gives it.
FUSIONS: dict[str, tuple[Callable[..., Frames], bool]] = {
    "all": (all_frames, False),
    "crops": (crop_means, False),
    "mean": (mean_frame, False),
    "random": (random_fusion, True),
    "sample": (sample_frames, True),
    "top": (top_frames, True),
    "windows": (merged_windows, True),
}


def make_fusion(spec: Mapping) -> Callable[[Array | None, Frames], Frames]:
    """Returns the fusion that a plain dict names, as a function of (rng, frames).

    Args:
      spec: `name`, one of `all`, `crops`, `mean`, `random`, `sample`, `top`, `windows`, and the
        keyword arguments of `all_frames`, `crop_means`, `mean_frame`, `random_fusion`,
        `sample_frames`, `top_frames` or `merged_windows`; beside them those of `filter_frames`,
        which is applied first.

    Returns:
      Function of (rng, Frames [B, T]) that gives Frames [B, T']. `all`, `crops` and `mean` draw
      nothing; `sample`, `top` and `windows` take None for a key.

    Raises:
      ValueError: for an unknown name or argument, or a missing argument.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in FUSIONS:
        raise ValueError(f"unknown fusion {name!r}; known are {', '.join(sorted(FUSIONS))}")
    function, takes_rng = FUSIONS[name]
    parameters, filters = _options(function), _options(filter_frames)
    narrow = {key: options.pop(key) for key in filters if key in options}
    if unknown := sorted(set(options) - set(parameters)):
        raise ValueError(
            f"fusion {name!r} has no option {', '.join(unknown)}; known are "
            f"{', '.join(sorted(parameters)) or 'none'}, and for every fusion {', '.join(filters)}"
        )
    required = {key for key, p in parameters.items() if p.default is inspect.Parameter.empty}
    if missing := sorted(required - set(options)):
        raise ValueError(f"fusion {name!r} needs {', '.join(missing)}")

    def fuse(rng: Array | None, frames: Frames) -> Frames:
        frames = filter_frames(frames, **narrow) if narrow else frames
        return function(rng, frames, **options) if takes_rng else function(frames, **options)

    return fuse


def _options(function: Callable) -> dict[str, inspect.Parameter]:
    """Returns the keyword-only parameters of a function."""
    parameters = inspect.signature(function).parameters
    return {key: p for key, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _draw(levels: Array, uniforms: Array, replacement: bool) -> list[Array]:
    """Returns indices of frames drawn by weight, one [B, T'] for each slot.

    Args:
      levels: [B, T] float32, whole numbers of `_levels`.
      uniforms: [B, T', slots] float32 in [0, 1).
      replacement: False: the slots of a draw are different frames while there are any left.
    """
    num_clips, num_frames = levels.shape
    num_slots = uniforms.shape[-1]
    cdf = jnp.cumsum(levels, axis=1)  # [B, T]
    last = num_frames - 1  # a clip without frames points past the end
    if replacement:
        points = uniforms.reshape(num_clips, -1) * cdf[:, -1:]
        index = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(cdf, points)
        index = jnp.minimum(index, last).reshape(uniforms.shape)
        return [index[..., slot] for slot in range(num_slots)]

    # The point is drawn from what is left, and pushed past every frame that is not: those before it
    # in time order. Index T stands for no frame.
    starts = jnp.pad(cdf, ((0, 0), (1, 0)))  # [B, T + 1]
    levels = jnp.pad(levels, ((0, 0), (0, 1)))
    drawable = jnp.maximum(jnp.sum(levels > 0, axis=1, keepdims=True), 1)
    picks = []
    for slot in range(num_slots):
        this_round = slot // drawable * drawable  # all return when all have been drawn
        gone = [jnp.where(i >= this_round, pick, num_frames) for i, pick in enumerate(picks)]
        gone = jnp.sort(jnp.stack(gone), axis=0) if gone else []  # slot x [B, T']
        left = cdf[:, -1:] - sum(take(levels, index) for index in gone)
        point = jnp.floor(uniforms[..., slot] * left)  # whole numbers stay exact when pushed
        for index in gone:
            point += jnp.where(point >= take(starts, index), take(levels, index), 0.0)
        # Five searches would take seconds to compile.
        index = jnp.sum(point[..., None] >= cdf[:, None], axis=-1, dtype=jnp.int32)
        picks.append(jnp.minimum(index, last))
    return picks


def _fuse(
    frames: Frames,
    picks: Sequence[Array],
    slots: Sequence[Array],
    weights: Sequence[Array],
    mask: Array,
) -> Frames:
    """Returns Frames [B, T'], float32 weighted means of picked frames, the number the first one's.

    Args:
      frames: Frames [B, T].
      picks: slots x [B, T'], indices of frames.
      slots: slots x [B, T'] bool, which of them count; the first always does.
      weights: slots x [B, T'] float32, 0 or more.
      mask: [B, T'] bool, of the result.
    """
    weights = [jnp.where(s, w, 0.0) for s, w in zip(slots, weights, strict=True)]
    # The picked frames may all weigh nothing although others of the clip do not.
    weightless = sum(weights) <= 0
    weights = [jnp.where(weightless, s, w) for s, w in zip(slots, weights, strict=True)]
    total = sum(weights)
    has_frame = jnp.any(frames.mask, axis=1)[:, None]
    weights = [jnp.where(has_frame, w / total, 0.0) for w in weights]

    def mean(values: Array) -> Array:
        # Slot after slot in the stored dtype: 2 to 20 times faster on CPU than one gather of all
        # slots or a [B, T', T] weight matrix, from 1 draw to 32.
        means = []
        for index, weight in zip(picks, weights, strict=True):
            value = read(take(values, index))
            weight = weight.reshape(weight.shape + (1,) * (value.ndim - 2))
            means.append(value.astype(_at_least_float32(value)) * weight)
        return jnp.asarray(sum(means))

    return Frames(
        features=mean(frames.features),  # [B, T', D]
        quality=mean(_finite(frames.quality)),
        detection=mean(_finite(frames.detection)),
        number=take(frames.number, picks[0]),
        mask=mask,
    )


def _levels(weights: Array) -> Array:
    """Returns [B, T] float32 whole numbers, proportional to the weights, the largest _LEVELS."""
    largest = jnp.max(weights, axis=1, keepdims=True)
    return jnp.round(weights / jnp.where(largest > 0, largest, 1.0) * _LEVELS)


def _cumulative_probs(probs: Sequence[float] | None, length: int) -> np.ndarray:
    """Returns [length] float32, the cumulative probabilities of fusing 1, 2, ... frames."""
    weights = np.ones(length) if probs is None else np.asarray(probs, np.float64)
    if weights.shape != (length,) or not np.all(weights >= 0) or not 0 < weights.sum() < np.inf:
        raise ValueError(f"fusion probs must be {length} numbers of 0 or more, got {probs}")
    return (np.cumsum(weights) / weights.sum()).astype(np.float32)


def _at_least_float32(values: Array) -> jnp.dtype:
    return jnp.promote_types(values.dtype, jnp.float32)


def _frame(values: Array | LazyFeatures, t: Array | int) -> Array:
    """Returns [B] or [B, D], the t-th frame of every clip."""
    if isinstance(values, LazyFeatures):
        return read(values._replace(index=_frame(values.index, t)))
    return jax.lax.dynamic_index_in_dim(values, t, axis=1, keepdims=False)


def _finite(values: Array) -> Array:
    return jnp.where(jnp.isfinite(values), values, 0.0)
