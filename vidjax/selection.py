"""Selection and weights of frames; `vidjax.fusion` averages them.

Features keep their stored dtype, and lazy features stay lazy: only selected features are read. The
masks of all arguments may have holes at any frame, since `filter_frames` leaves such masks.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.batch import Array, Frames, LazyFeatures
from vidjax.errors import UserError


def filter_frames(
    frames: Frames,
    *,
    min_quality: Array | float | None = None,
    min_detection: Array | float | None = None,
    top_share: float = 1.0,
) -> Frames:
    """Masks frames of low quality.

    Args:
      frames: Frames [B, T].
      min_quality: lowest quality to keep, a number or a traced scalar; None or -inf for any.
      min_detection: lowest detection score to keep, a number or a traced scalar; None or -inf for
        any.
      top_share: share in (0, 1] of the remaining frames to keep, best quality first: the smallest
        whole number not below top_share x n for n frames. Among equal qualities the earlier frame
        is better; NaN is the lowest quality.

    Returns:
      Frames [B, T] with a new mask. A clip that would lose all frames keeps all of them.

    Raises:
      ValueError: `top_share` is outside (0, 1].

    Source: thresholds on quality and detection from quality fusion (4th place 2019); the best 70 %
    by quality from Residual Dense Net (2nd place 2019). Ours: no clip loses all frames.
    """
    if not 0 < top_share <= 1:
        raise UserError(f"top_share must be above 0 and at most 1, got {top_share}")
    kept = frames.mask
    if min_quality is not None:
        kept = kept & (ordered_quality(frames.quality) >= min_quality)
    if min_detection is not None:
        kept = kept & (frames.detection >= min_detection)
    if top_share < 1:
        # The table is exact. In float32, 0.1 x 30 would be slightly more than 3.
        counts = np.ceil(top_share * np.arange(kept.shape[1] + 1) * (1 - 1e-12)).astype(np.int32)
        count = jnp.asarray(counts)[jnp.sum(kept, axis=1, keepdims=True, dtype=jnp.int32)]
        place = jnp.argsort(_best_first(frames.quality, kept), axis=1)
        kept = kept & (place < count)
    lost = ~kept.any(axis=1, keepdims=True)
    return frames._replace(mask=jnp.where(lost, frames.mask, kept))


def top_frames(rng: Array | None, frames: Frames, *, num_frames: int = 32) -> Frames:
    """Selects the `num_frames` frames of highest quality of every clip, in time order.

    Shorter clips keep all frames and repeat some: random ones with a key; without a key, all in
    turn, starting with the best. Among equal qualities the earlier frame is better; NaN is the
    lowest quality.

    Args:
      rng: PRNG key, or None.
      frames: Frames [B, T].
      num_frames: number of frames to select, T'.

    Returns:
      Frames [B, num_frames] in the stored dtype; the mask is False for clips without frames.

    Raises:
      ValueError: `num_frames` is below 1.

    Source: iQIYI-VID paper, section 5.1. Ours: repeats in turn without a key, for evaluation.
    """
    if num_frames < 1:
        raise UserError(f"top frames needs num_frames of 1 or more, got {num_frames}")
    return _first_frames(rng, frames, _best_first(frames.quality, frames.mask), num_frames)


def sample_frames(
    rng: Array | None, frames: Frames, *, num_frames: int = 40, order: str = "time"
) -> Frames:
    """Selects `num_frames` frames of every clip independently of quality.

    With a key the frames are drawn at random without replacement; shorter clips keep all frames and
    repeat random ones. Without a key the frames are evenly spaced over the clip.

    Args:
      rng: PRNG key, or None.
      frames: Frames [B, T].
      num_frames: number of frames to select, T'.
      order: `time`, or `random` for an order that has nothing to do with time: random with a key,
        without one the same for all clips.

    Returns:
      Frames [B, num_frames] in the stored dtype; the mask is False for clips without frames.

    Raises:
      ValueError: `num_frames` is below 1, or the order is unknown.

    Source: DeepMEF (3rd place 2019), whose code draws frames without order, and draws the frames of
    shorter clips with replacement. Ours: short clips keep all frames before they repeat one; the
    order of time; evenly spaced frames without a key, for evaluation.
    """
    if num_frames < 1:
        raise UserError(f"sample frames needs num_frames of 1 or more, got {num_frames}")
    if order not in ("time", "random"):
        raise UserError(f"unknown order {order!r}; choose from random, time")
    slots = jnp.ones((len(frames.mask), num_frames), bool)
    if rng is not None:
        shuffle_rng, repeat_rng = jax.random.split(rng)
        chosen = _first_frames(repeat_rng, frames, shuffle(shuffle_rng, frames.mask), num_frames)
        order_rng = jax.random.fold_in(repeat_rng, 1)
    else:
        in_order = jnp.argsort(~frames.mask, axis=1, stable=True)  # real frames first
        count = jnp.sum(frames.mask, axis=1, keepdims=True, dtype=jnp.int32)
        # The middles of num_frames equal pieces of the clip, in whole numbers.
        rank = (2 * jnp.arange(num_frames, dtype=jnp.int32) + 1) * count // (2 * num_frames)
        chosen, order_rng = _frames_at(frames, take(in_order, rank)), None
    if order == "time":
        return chosen
    turned = shuffle(order_rng, slots)
    return map_fields(lambda values: take(values, turned), chosen)


def concat_clips(
    rng: Array, frames: Frames, chosen: Array, short: Array, *, max_frames: int = 50
) -> Frames:
    """Concatenates short clips with other short clips of the batch, and cuts long ones.

    A chosen short clip is extended with probability 0.5 by the frames of another chosen short clip,
    with frame numbers that continue its own. A chosen long clip keeps `max_frames` consecutive real
    frames, or all if the modality has fewer. All other clips stay unchanged.

    Call it with the same `rng`, `chosen` and `short` for all modalities: then all are extended by
    the same other clip, and cut at the same relative position.

    Args:
      rng: PRNG key.
      frames: Frames [B, T] of one modality.
      chosen: [B] bool, True for clips that may change, such as distractors; False on padded rows.
      short: [B] bool, True for clips with fewer than `max_frames` frames in the modality that the
        caller compares.
      max_frames: number of frames that a long clip is cut to.

    Returns:
      Frames [B, 2 T] in the stored dtype.

    Source: noise augmentation of the 5th-place system of 2018. Ours: the probability, and the
    length of the pieces.
    """
    partner_rng, join_rng, cut_rng = jax.random.split(rng, 3)
    num_clips = len(chosen)
    pool = chosen & short
    size = jnp.sum(pool, dtype=jnp.int32)
    # Partners are neighbours in one random cyclic order, so no clip is its own partner.
    ring = jnp.argsort(jnp.where(pool, jax.random.uniform(partner_rng, (num_clips,)), jnp.inf))
    partner = ring[(jnp.argsort(ring) + 1) % jnp.maximum(size, 1)]
    joined = pool & (size > 1) & (jax.random.uniform(join_rng, (num_clips,)) < 0.5)
    second = map_fields(lambda x: jnp.take(x, partner, axis=0, mode="clip"), frames)

    rank = jnp.cumsum(frames.mask, axis=1) - 1
    spare = jnp.maximum(rank[:, -1:] + 1 - max_frames, 0)
    start = jax.random.uniform(cut_rng, (num_clips,))[:, None] * (spare + 1)
    start = start.astype(jnp.int32)
    piece = (rank >= start) & (rank < start + max_frames)
    cut = (chosen & ~short)[:, None]
    last = jnp.max(jnp.where(frames.mask, frames.number, -1), axis=1, keepdims=True)
    first = frames._replace(mask=frames.mask & (piece | ~cut))
    second = second._replace(number=second.number + last + 1, mask=second.mask & joined[:, None])
    return map_fields(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)


def has_frames(frames: Mapping[str, Frames]) -> Array:
    """Returns [B] bool, True for clips that have a frame of any modality."""
    masks = [modality.mask.any(axis=1) for modality in frames.values()]
    return jnp.any(jnp.stack(masks), axis=0)


def as_examples(frames: Mapping[str, Frames]) -> tuple[dict[str, Frames], Array]:
    """Turns the T' frames of B clips into B T' examples of one frame each.

    A modality with a single frame is repeated for every example of the clip. A clip that has only
    such modalities is one example.

    Args:
      frames: modality -> Frames [B, T'], where T' is 1 or the same number for all modalities.

    Returns:
      modality -> Frames [B T', 1]; and [B, T'] bool, True for examples that exist.

    Raises:
      ValueError: Two modalities have different T', and neither is 1.
    """
    sizes = {modality.mask.shape[1] for modality in frames.values()}
    if len(sizes - {1}) > 1:
        raise UserError(
            f"config.after_fusion='examples': all modalities must have 1 or equally many fused "
            f"frames, got {sorted(sizes)}"
        )
    num_examples = max(sizes)
    masks = [x.mask for x in frames.values() if x.mask.shape[1] == num_examples]
    exists = jnp.any(jnp.stack(masks), axis=0)  # [B, T']
    alone = has_frames(frames) & ~exists.any(axis=1)
    exists = exists.at[:, 0].set(exists[:, 0] | alone)

    def reshape(x: Array) -> Array:
        x = jnp.broadcast_to(x, (x.shape[0], num_examples, *x.shape[2:]))
        return x.reshape(-1, 1, *x.shape[2:])  # [B T', 1, ...]

    return {name: jax.tree.map(reshape, modality) for name, modality in frames.items()}, exists


def as_one_example(frames: Mapping[str, Frames]) -> tuple[dict[str, Frames], Array]:
    """Keeps the frames of a clip together as one example; the counterpart of `as_examples`.

    Args:
      frames: modality -> Frames [B, T'].

    Returns:
      The frames; and [B, 1] bool, all True.
    """
    num_clips = len(next(iter(frames.values())).mask)
    return dict(frames), jnp.ones((num_clips, 1), bool)


def frame_weights(frames: Frames, weighting: str) -> Array:
    """Returns the weight of every frame.

    Args:
      frames: Frames [B, T].
      weighting: `uniform`: 1. `quality`: quality x detection. `graded`: quality x detection x g,
        where g is 0, 0.2, 0.3, 0.6 for a quality below 0, 20, 30, 40, and 1 from 40 on.

    Returns:
      [B, T] float32; 0 on padding, and for weights that are negative or not finite. If all weights
      of a clip would be 0, they are uniform.

    Raises:
      ValueError: The weighting is unknown.

    Source: `graded` is W(x) of quality fusion (4th place 2019). Ours: uniform weights where W(x)
    would divide 0 by 0.
    """
    uniform = frames.mask.astype(jnp.float32)
    if weighting == "uniform":
        return uniform
    if weighting not in ("quality", "graded"):
        raise UserError(
            f"unknown weighting {weighting!r}; choose from graded, quality, uniform, and mixup in "
            "random fusion"
        )
    weights = frames.quality * frames.detection
    if weighting == "graded":
        below = [frames.quality < least for least in (0, 20, 30, 40)]
        weights = weights * jnp.select(below, [0.0, 0.2, 0.3, 0.6], 1.0)
    usable = frames.mask & jnp.isfinite(weights) & (weights > 0)
    weights = jnp.where(usable, weights, 0.0)
    return jnp.where(usable.any(axis=1, keepdims=True), weights, uniform)


def mean_measure(frames: Frames, measure: str) -> Array:
    """Returns how good the frames of every clip are on average, [B] float32; 0 without frames.

    Args:
      frames: Frames [B, T].
      measure: `norm` for the lengths of the feature vectors, `quality` for the quality scores,
        where a score that is not finite counts as 0.
    """

    def add(t: Array, total: Array) -> Array:
        frame = map_fields(
            lambda values: jax.lax.dynamic_slice_in_dim(values, t, 1, axis=1), frames
        )  # one frame of every clip at a time, as in `fusion.mean_frame`
        if measure == "norm":
            value = jnp.linalg.norm(read(frame.features).astype(jnp.float32), axis=-1)
        else:
            value = jnp.where(jnp.isfinite(frame.quality), frame.quality, 0.0)
        return total + jnp.where(frame.mask, value, 0.0)[:, 0]

    num_clips, num_frames = frames.mask.shape
    end = jnp.max(jnp.where(frames.mask, jnp.arange(1, 1 + num_frames), 0))
    total = jax.lax.fori_loop(0, end, add, jnp.zeros(num_clips, jnp.float32))
    return total / jnp.maximum(jnp.sum(frames.mask, axis=1), 1)


def shuffle(rng: Array | None, mask: Array) -> Array:
    """Shuffles the frames of every clip.

    Args:
      rng: PRNG key; None for a fixed order, which depends only on the number of real frames.
      mask: [B, T] bool, True for real frames.

    Returns:
      [B, T] int32 indices of frames, the real frames first.
    """
    if rng is not None:
        return jnp.argsort(jnp.where(mask, per_frame_uniform(rng, mask), 2.0), axis=1)
    rank = jnp.cumsum(mask, axis=1, dtype=jnp.uint32) - jnp.uint32(1)
    # Multiples of the golden ratio modulo 1 put frames that are close in time far apart.
    key = (rank * jnp.uint32(2654435769)) >> 1
    return jnp.argsort(jnp.where(mask, key, jnp.uint32(2**32 - 1)), axis=1)


def per_frame_uniform(rng: Array, mask: Array) -> Array:
    """Draws [B, T] float32 uniformly from [0, 1), independently of the length of the padding."""
    # Draws depend on their flat index. With frames as the slow axis, padding adds only later ones.
    return jax.random.uniform(rng, mask.shape[::-1], jnp.float32).T


def take(values: Array, index: Array) -> Array:
    """Selects values[b, index[b, j]] for an index [B, T'].

    Args:
      values: [B, T], [B, T, D] or LazyFeatures.
      index: [B, T'] int32.

    Returns:
      [B, T'], [B, T', D] or LazyFeatures.
    """
    if isinstance(values, LazyFeatures):
        return values._replace(index=take(values.index, index))
    index = index.reshape(index.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1, mode="promise_in_bounds")


def read(features: Array | LazyFeatures) -> Array:
    """Gathers LazyFeatures into an array [B, T, D]; returns arrays unchanged."""
    if not isinstance(features, LazyFeatures):
        return features
    return jnp.asarray(features.values).at[features.index].get(mode="promise_in_bounds")


def map_fields(fn: Callable[..., Array], *frames: Frames) -> Frames:
    """Applies `fn` to every field of some frames; for LazyFeatures, to the index."""

    def field(*values: Array) -> Array:
        if isinstance(values[0], LazyFeatures):
            indices = [value.index for value in values if isinstance(value, LazyFeatures)]
            return values[0]._replace(index=fn(*indices))
        return fn(*values)

    return Frames(*map(field, *frames))


def ordered_quality(quality: Array) -> Array:
    """Returns qualities with the lowest float32 for those that are not finite."""
    return jnp.where(jnp.isfinite(quality), quality, jnp.finfo(jnp.float32).min)


def _best_first(quality: Array, mask: Array) -> Array:
    """Sorts frames by quality; returns [B, T] indices, the best real frame first, padding last."""
    quality = jnp.where(mask, ordered_quality(quality), -jnp.inf)
    # Not lax.top_k: for clips on several devices it would gather the whole batch on every one.
    return jnp.argsort(quality, axis=1, stable=True, descending=True)


def _first_frames(rng: Array | None, frames: Frames, order: Array, num_frames: int) -> Frames:
    """Selects the first `num_frames` real frames of an order [B, T], in time order."""
    order = order[:, :num_frames]
    count = jnp.sum(frames.mask, axis=1, dtype=jnp.int32)[:, None]
    slot = jnp.arange(num_frames, dtype=jnp.int32)[None, :]
    if rng is None:
        again = slot % jnp.maximum(count, 1)
    else:
        uniforms = jax.random.uniform(rng, (len(count), num_frames), jnp.float32)
        again = jnp.minimum((uniforms * count).astype(jnp.int32), count - 1)
    rank = jnp.where(slot < count, slot, again)
    return _frames_at(frames, jnp.sort(take(order, jnp.clip(rank, 0, order.shape[1] - 1)), axis=1))


def _frames_at(frames: Frames, index: Array) -> Frames:
    """Selects frames at indices [B, T']; all are real for clips that have a frame."""
    chosen = map_fields(lambda values: take(values, index), frames)
    has_frame = frames.mask.any(axis=1, keepdims=True)
    return chosen._replace(mask=jnp.broadcast_to(has_frame, index.shape))
