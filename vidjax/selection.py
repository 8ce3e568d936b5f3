"""Which frames of a clip, and with what weight: Frames of whole frames in, of whole frames out.

Nothing is averaged here, so features keep their stored dtype, and lazy features stay lazy: no
feature is read before it is known to be wanted. `vidjax.fusion` averages. The mask of what comes in
may have holes anywhere, as `filter_frames` leaves them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.batch import Array, Frames, LazyFeatures


def filter_frames(
    frames: Frames,
    *,
    min_quality: Array | float | None = None,
    min_detection: Array | float | None = None,
    top_share: float = 1.0,
) -> Frames:
    """Returns the frames with a mask that only the good ones of a clip pass.

    Args:
      frames: Frames [B, T].
      min_quality: least quality, a number or a traced scalar; None or -inf: any.
      min_detection: least detection score, the same.
      top_share: share in (0, 1] of what the other two leave, the best by quality, that stays; of n
        frames the smallest whole number that is no less than top_share x n. Equal qualities go to
        the earlier frame; a quality that is not a number is the lowest.

    Returns:
      Frames [B, T]; only the mask is another. A clip of which nothing would be left keeps all of
      its frames.

    Raises:
      ValueError: for a share outside (0, 1].

    Source: filters of quality and detection as in quality fusion (4th place 2019), the best 70 % by
    quality as in Residual Dense Net (2nd place 2019). Ours: no clip is lost.
    """
    if not 0 < top_share <= 1:
        raise ValueError(f"top_share must be above 0 and at most 1, got {top_share}")
    kept = frames.mask
    if min_quality is not None:
        kept = kept & (_ordered_quality(frames.quality) >= min_quality)
    if min_detection is not None:
        kept = kept & (frames.detection >= min_detection)
    if top_share < 1:
        # From a table, exact: in float32 a tenth of thirty is a little more than three.
        counts = np.ceil(top_share * np.arange(kept.shape[1] + 1) * (1 - 1e-12)).astype(np.int32)
        count = jnp.asarray(counts)[jnp.sum(kept, axis=1, keepdims=True, dtype=jnp.int32)]
        place = jnp.argsort(_best_first(frames.quality, kept), axis=1)
        kept = kept & (place < count)
    lost = ~kept.any(axis=1, keepdims=True)
    return frames._replace(mask=jnp.where(lost, frames.mask, kept))


def top_frames(rng: Array | None, frames: Frames, *, num_frames: int = 32) -> Frames:
    """Returns the `num_frames` best frames of every clip by quality, in time order.

    Args:
      rng: key, or None.
      frames: Frames [B, T].
      num_frames: T'. A clip with fewer keeps them all and repeats some: at random with a key, in
        turn, the best first, without.

    Returns:
      Frames [B, num_frames] in the stored dtype; the mask is False where the clip has no frame.
      Equal qualities go to the earlier frame; a quality that is not a number comes last.

    Raises:
      ValueError: for fewer than one frame.

    Source: iQIYI-VID paper, section 5.1. Ours: repeats in turn without a key, for evaluation.
    """
    if num_frames < 1:
        raise ValueError(f"top frames needs num_frames of 1 or more, got {num_frames}")
    return _first_frames(rng, frames, _best_first(frames.quality, frames.mask), num_frames)


def sample_frames(rng: Array | None, frames: Frames, *, num_frames: int = 40) -> Frames:
    """Returns `num_frames` frames of every clip, whatever their quality, in time order.

    Args:
      rng: key, or None.
      frames: Frames [B, T].
      num_frames: T'. With a key they are drawn at random, all different; a clip with fewer keeps
        them all and repeats some at random. Without, they are evenly spaced over the clip.

    Returns:
      Frames [B, num_frames] in the stored dtype; the mask is False where the clip has no frame.

    Raises:
      ValueError: for fewer than one frame.

    Source: DeepMEF (3rd place 2019). Ours: a clip with too few shows each of its frames before it
    repeats one; evenly spaced frames without a key, for evaluation.
    """
    if num_frames < 1:
        raise ValueError(f"sample frames needs num_frames of 1 or more, got {num_frames}")
    if rng is not None:
        shuffle_rng, repeat_rng = jax.random.split(rng)
        return _first_frames(repeat_rng, frames, shuffle(shuffle_rng, frames.mask), num_frames)
    in_order = jnp.argsort(~frames.mask, axis=1, stable=True)  # real frames first
    count = jnp.sum(frames.mask, axis=1, keepdims=True, dtype=jnp.int32)
    # The middles of num_frames equal pieces of the clip, in whole numbers.
    rank = (2 * jnp.arange(num_frames, dtype=jnp.int32) + 1) * count // (2 * num_frames)
    return _frames_at(frames, take(in_order, rank))


def concat_clips(
    rng: Array, frames: Frames, chosen: Array, short: Array, *, max_frames: int = 50
) -> Frames:
    """Returns the frames with some clips joined to another of the batch, and longer ones cut.

    Args:
      rng: key. With the same key, `chosen` and `short` every modality of a clip is joined to the
        same other clip, and cut at the same share of its length.
      frames: Frames [B, T] of one modality.
      chosen: [B] bool, True for the clips that may change, such as distractors; False on padded
        rows.
      short: [B] bool, True for clips of fewer than `max_frames` frames, in whatever modality the
        caller decides that. One for all modalities, or they would be joined to different clips.
      max_frames: what a longer clip is cut to.

    Returns:
      Frames [B, 2 T] in the stored dtype. A chosen short clip is followed, in half of the cases, by
      the frames of another chosen short one; their numbers go on after its own. Of a chosen longer
      one `max_frames` real frames in a row stay, or all if this modality has fewer; the others'
      frames are as they were.

    Source: noise augmentation of the 5th-place system of 2018. Ours: the probability, and the
    length of the pieces.
    """
    partner_rng, join_rng, cut_rng = jax.random.split(rng, 3)
    num_clips = len(chosen)
    pool = chosen & short
    size = jnp.sum(pool, dtype=jnp.int32)
    # Everyone's partner is the next in one random ring, hence another clip.
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
    return jnp.any(jnp.stack([one.mask.any(axis=1) for one in frames.values()]), axis=0)


def as_examples(frames: Mapping[str, Frames]) -> tuple[dict[str, Frames], Array]:
    """Turns the T' frames of B clips into B T' clips of one frame each.

    A modality with a single frame goes with every example of its clip. A clip that has frames of
    such modalities alone is one example.

    Args:
      frames: modality -> Frames [B, T'], with one T' for all modalities, or 1.

    Returns:
      modality -> Frames [B T', 1], and [B, T'] bool, True for the examples that exist.

    Raises:
      ValueError: two modalities differ in T', and neither is 1.
    """
    sizes = {one.mask.shape[1] for one in frames.values()}
    if len(sizes - {1}) > 1:
        raise ValueError(f"config.after_fusion='examples': modalities give {sorted(sizes)} frames")
    num_examples = max(sizes)
    leading = [one.mask for one in frames.values() if one.mask.shape[1] == num_examples]
    exists = jnp.any(jnp.stack(leading), axis=0)  # [B, T']
    alone = has_frames(frames) & ~exists.any(axis=1)
    exists = exists.at[:, 0].set(exists[:, 0] | alone)

    def reshape(x: Array) -> Array:
        x = jnp.broadcast_to(x, (x.shape[0], num_examples, *x.shape[2:]))
        return x.reshape(-1, 1, *x.shape[2:])  # [B T', 1, ...]

    return {name: jax.tree.map(reshape, one) for name, one in frames.items()}, exists


def as_one_example(frames: Mapping[str, Frames]) -> tuple[dict[str, Frames], Array]:
    """Leaves the frames of a clip together: the counterpart of `as_examples`.

    Returns:
      modality -> Frames [B, T'], and [B, 1] bool, True throughout.
    """
    num_clips = len(next(iter(frames.values())).mask)
    return dict(frames), jnp.ones((num_clips, 1), bool)


def frame_weights(frames: Frames, weighting: str) -> Array:
    """Returns weights of frames, 0 on padding and not all 0 in a clip that has frames.

    Args:
      frames: Frames [B, T].
      weighting: `uniform`; `quality`, quality x detection; or `graded`, quality x detection x g, g
        = 0, .2, .3, .6 or 1 for a quality below 0, 20, 30, 40 or no less. Uniform again for a clip
        whose weights are all negative, zero or not a number.

    Returns:
      [B, T] float32.

    Raises:
      ValueError: for a weighting that does not exist.

    Source: `graded` is W(x) of quality fusion (4th place 2019). Ours: uniform weights where theirs
    divide 0 by 0.
    """
    uniform = frames.mask.astype(jnp.float32)
    if weighting == "uniform":
        return uniform
    if weighting not in ("quality", "graded"):
        raise ValueError(
            f"unknown weighting {weighting!r}; known are graded, quality, uniform, and mixup for "
            "the mean of random fusion"
        )
    weights = frames.quality * frames.detection
    if weighting == "graded":
        below = [frames.quality < least for least in (0, 20, 30, 40)]
        weights = weights * jnp.select(below, [0.0, 0.2, 0.3, 0.6], 1.0)
    usable = frames.mask & jnp.isfinite(weights) & (weights > 0)
    weights = jnp.where(usable, weights, 0.0)
    return jnp.where(usable.any(axis=1, keepdims=True), weights, uniform)


def shuffle(rng: Array | None, mask: Array) -> Array:
    """Returns the frames of every clip in another order: [B, T] indices, the real frames first.

    Args:
      rng: key, or None for an order that depends on nothing but how many real frames there are.
      mask: [B, T] bool, True for real frames.
    """
    if rng is not None:
        return jnp.argsort(jnp.where(mask, per_frame_uniform(rng, mask), 2.0), axis=1)
    rank = jnp.cumsum(mask, axis=1, dtype=jnp.uint32) - jnp.uint32(1)
    # Multiples of the golden ratio modulo 1: neighbours of the order lie far apart in time.
    key = (rank * jnp.uint32(2654435769)) >> 1
    return jnp.argsort(jnp.where(mask, key, jnp.uint32(2**32 - 1)), axis=1)


def per_frame_uniform(rng: Array, mask: Array) -> Array:
    """Returns [B, T] float32 in [0, 1), which longer padding leaves as they are."""
    # Draws go by their flat index: with frames as the slow axis more of them add only later ones.
    return jax.random.uniform(rng, mask.shape[::-1], jnp.float32).T


def take(values: Array | LazyFeatures, index: Array) -> Any:
    """Returns values[b, index[b, j]]: of [B, T], [B, T, D] or lazy, at [B, T'], in their dtype."""
    if isinstance(values, LazyFeatures):
        return values._replace(index=take(values.index, index))
    index = index.reshape(index.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1, mode="promise_in_bounds")


def read(features: Array | LazyFeatures) -> Array:
    """Returns features [B, T, D] as an array; LazyFeatures are read from where they lie."""
    if not isinstance(features, LazyFeatures):
        return features
    return jnp.asarray(features.values).at[features.index].get(mode="promise_in_bounds")


def map_fields(fn: Callable[..., Array], *frames: Frames) -> Frames:
    """Returns Frames of `fn` of every field; of lazy features `fn` maps the index."""

    def field(*values: Any) -> Any:
        if isinstance(values[0], LazyFeatures):
            return values[0]._replace(index=fn(*(rows.index for rows in values)))
        return fn(*values)

    return Frames(*map(field, *frames))


def _ordered_quality(quality: Array) -> Array:
    return jnp.where(jnp.isfinite(quality), quality, jnp.finfo(jnp.float32).min)


def _best_first(quality: Array, mask: Array) -> Array:
    """Returns [B, T] indices of frames, the best real one first and padding last."""
    quality = jnp.where(mask, _ordered_quality(quality), -jnp.inf)
    # Not lax.top_k: sharded over clips, it would gather the whole batch on every device.
    return jnp.argsort(quality, axis=1, stable=True, descending=True)


def _first_frames(rng: Array | None, frames: Frames, order: Array, num_frames: int) -> Frames:
    """Returns Frames [B, num_frames], the first real ones of an order [B, T], in time order."""
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
    """Returns Frames [B, T'] at indices [B, T'], all real where the clip has a frame."""
    chosen = map_fields(lambda values: take(values, index), frames)
    has_frame = frames.mask.any(axis=1, keepdims=True)
    return chosen._replace(mask=jnp.broadcast_to(has_frame, index.shape))
