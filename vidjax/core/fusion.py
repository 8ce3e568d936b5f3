"""Fusions: functions that select or average the frames of clips in a modality.

A fusion maps Frames [B, T] to Frames [B, T'], and can be jitted.

- Random numbers have the shape of the whole batch, so the number of devices does not matter.
- Selected features keep their stored dtype. Only the selected rows of LazyFeatures are read.
- In a mask, real frames may come after masked frames, for example after `filter_frames`.
- If a clip has no frames, the mask of its fused frames is False, and means are 0.
- If two frames have equal quality, the earlier frame counts as better. NaN is the lowest quality.
"""

import fractions
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from vidjax.core.batch import Array, Frames, LazyFeatures
from vidjax.utils.errors import UserError, check_choice, check_entry


def filter_frames(
    frames: Frames,
    *,
    min_quality: Array | float | None = None,
    min_detection: Array | float | None = None,
    top_share: float = 1.0,
    poor_clips: str = "keep",
) -> Frames:
    """Removes frames of low quality: sets their `mask` to False. Other fields are unchanged.

    Args:
      min_quality: the lowest quality of a frame to keep; None or -inf for no limit. May be traced.
      min_detection: the lowest detection score of a frame to keep; None or -inf for no limit.
      top_share: share in (0, 1] of the remaining frames of each clip to keep, rounded up. The
        frames of the highest quality are kept.
      poor_clips: what happens to a clip that would lose all frames. With `keep`, it keeps all
        frames. With `drop`, it loses them.

    Source: iQIYI challenge of 2019. The thresholds are from quality fusion (4th place), whose code
    (training.py:98) drops poor clips. A `top_share` of 0.7 is from Residual Dense Net (2nd place).
    The papers have no `keep`.
    """
    check_choice("poor_clips", poor_clips, ("drop", "keep"))
    if not 0 < top_share <= 1:
        raise UserError(f"top_share or kept_share={top_share}: must be above 0 and at most 1")
    kept = frames.mask
    if min_quality is not None:
        kept = kept & (ordered_quality(frames.quality) >= min_quality)
    if min_detection is not None:
        kept = kept & (ordered_quality(frames.detection) >= min_detection)
    if top_share < 1:
        # Whole numbers are exact, whereas 0.3 x 50 in float32 is slightly more than 15.
        share = fractions.Fraction(top_share).limit_denominator(10_000)
        share = max(share, fractions.Fraction(1, 10_000))  # a share of 0 would keep no frame
        count = jnp.sum(kept, axis=1, keepdims=True, dtype=jnp.int32)
        count = -(-count * share.numerator // share.denominator)
        place = jnp.argsort(_sort_by_quality(frames.quality, kept), axis=1)
        kept = kept & (place < count)
    if poor_clips == "keep":
        kept = jnp.where(kept.any(axis=1, keepdims=True), kept, frames.mask)
    return frames._replace(mask=kept)


def top_frames(
    rng: Array | None, frames: Frames, *, num_frames: int = 32, repeats: str = "turn"
) -> Frames:
    """Selects the `num_frames` frames of highest quality of every clip, in time order.

    If a clip has fewer frames, some frames are repeated. Returns Frames [B, num_frames]. If `rng`
    is a PRNG key, the repeated frames are random. If `rng` is None, `repeats` decides: `turn`
    repeats the frames in turn, the best first, and `random` draws them with a fixed key.

    Source: iQIYI-VID paper, section 5.1. The paper has no `turn`.
    """
    _check_count("num_frames", num_frames)
    check_choice("repeats", repeats, ("random", "turn"))
    order = _sort_by_quality(frames.quality, frames.mask)
    return _select_first(rng, frames, order, num_frames, fixed_draws=repeats == "random")


def sample_frames(
    rng: Array | None,
    frames: Frames,
    *,
    num_frames: int = 40,
    order: str = "time",
    replacement: bool = False,
) -> Frames:
    """Selects `num_frames` frames of every clip, independently of quality.

    Returns Frames [B, num_frames].

    Args:
      rng: PRNG key to draw frames at random. None selects the same frames in every call, about
        evenly spaced.
      order: order of the selected frames, `time` or `random`. If `rng` is None, the random order
        is the same for all clips.
      replacement: only for clips with fewer than `num_frames` frames. True draws frames with
        replacement. False selects every frame, and repeats some.

    Source: DeepMEF (3rd place 2019), whose code draws in random order and with `replacement`, in
    training and test. The paper has no time order, no even spacing and no `replacement=False`.
    """
    _check_count("num_frames", num_frames)
    check_choice("order", order, ("random", "time"))
    if rng is not None or replacement:
        shuffle_rng, repeat_rng = (None, None) if rng is None else jax.random.split(rng)
        draws = shuffle(shuffle_rng, frames.mask)
        chosen = _select_first(repeat_rng, frames, draws, num_frames, replacement=replacement)
        order_rng = None if repeat_rng is None else jax.random.fold_in(repeat_rng, 1)
    else:
        in_order = jnp.argsort(~frames.mask, axis=1, stable=True)  # real frames come first
        count = jnp.sum(frames.mask, axis=1, keepdims=True, dtype=jnp.int32)
        # The middles of num_frames equal pieces of the clip, computed in whole numbers.
        rank = (2 * jnp.arange(num_frames, dtype=jnp.int32) + 1) * count // (2 * num_frames)
        chosen, order_rng = _select_frames(frames, take(in_order, rank)), None
    if order == "time":
        return chosen
    turned = shuffle(order_rng, jnp.ones(chosen.mask.shape, bool))
    return map_fields(lambda values: take(values, turned), chosen)


def _check_count(name: str, value: int, least: int = 1) -> None:
    if value < least:
        raise UserError(f"{name}={value}: must be {least} or more")


def has_frames(frames: Mapping[str, Frames]) -> Array:
    """Returns [B] bool, True for clips that have a frame in any modality."""
    masks = [modality.mask.any(axis=1) for modality in frames.values()]
    return jnp.any(jnp.stack(masks), axis=0)


def frame_weights(frames: Frames, weighting: str) -> Array:
    """Computes the weight of every frame, [B, T] float32, with the formula `weighting`.

    - `uniform`: 1
    - `score`: only the quality
    - `quality`: quality x detection
    - `squared`: quality squared, so a negative quality counts too
    - `graded`: quality x detection x g. The factor g is 0 for a quality below 0, 0.2 below 20, 0.3
      below 30, 0.6 below 40, and 1 from 40 on.

    Padding has the weight 0. Negative weights and weights that are not finite become 0. If all
    weights of a clip would be 0, its frames have the weight 1.

    Source: `graded` is W(x) in the paper of the 4th place 2019 (quality fusion), without a rule for
    weights that are all 0. `squared` is from the code of the 5th place 2018 (noise classes).
    """
    uniform = frames.mask.astype(jnp.float32)
    if weighting == "uniform":
        return uniform
    factors = {"quality": frames.detection, "graded": frames.detection, "score": 1.0}
    factors["squared"] = frames.quality
    check_choice("weighting", weighting, sorted([*factors, "uniform"]))
    weights = frames.quality * factors[weighting]
    if weighting == "graded":
        below = [frames.quality < least for least in (0, 20, 30, 40)]
        weights = weights * jnp.select(below, [0.0, 0.2, 0.3, 0.6], 1.0)
    usable = frames.mask & jnp.isfinite(weights) & (weights > 0)
    weights = jnp.where(usable, weights, 0.0)
    return jnp.where(usable.any(axis=1, keepdims=True), weights, uniform)


def mean_measure(frames: Frames, measure: str) -> Array:
    """Computes the mean of a measure over the frames of each clip, [B] float32.

    `measure` is `norm` (the L2 norm of the features) or `quality`. A clip without frames gets 0.
    """
    weights = frames.mask.astype(jnp.float32)
    if measure == "norm":
        return _average_over_frames(frames.mask, weights, frames.features, _read_norm)
    return _average_over_frames(frames.mask, weights, _replace_non_finite(frames.quality))


def shuffle(rng: Array | None, mask: Array) -> Array:
    """Returns a random order of the frames of every clip: indices [B, T] int32, real frames first.

    If `rng` is None, the order is fixed and depends only on the number of real frames.
    """
    if rng is not None:
        return jnp.argsort(jnp.where(mask, per_frame_uniform(rng, mask), 2.0), axis=1)
    rank = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    # Multiples of the golden ratio modulo 1, as 31-bit integers, put frames that are close in time
    # far apart. They are computed in halves, because OpenVINO has no integers of over 32 bits.
    low, base, two = rank * 31161, jnp.int32(1 << 16), jnp.int32(2)
    high = jax.lax.rem(rank * 40503 + jax.lax.div(low, base), base)
    key = high * (1 << 15) + jax.lax.div(jax.lax.rem(low, base), two)
    return jnp.argsort(jnp.where(mask, key, (1 << 31) - 1), axis=1)


def per_frame_uniform(rng: Array, mask: Array) -> Array:
    """Draws a random number from [0, 1) for every frame, [B, T] float32.

    `mask` [B, T] gives the shape. With more padding (a larger T), the numbers stay the same.
    """
    # A draw depends on its flat index. With frames as the slow axis, padding only appends draws.
    return jax.random.uniform(rng, mask.shape[::-1], jnp.float32).T


def take(values: Array, index: Array) -> Array:
    """Selects frames by their positions `index` [B, T'], for each of B clips.

    `values` are [B, T], [B, T, D] or LazyFeatures. Returns [B, T'], [B, T', D] or LazyFeatures.
    """
    if isinstance(values, LazyFeatures):
        return values._replace(index=take(values.index, index))
    index = index.reshape(index.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1, mode="promise_in_bounds")


def read(features: Array | LazyFeatures) -> Array:
    """Returns features as an array [B, T, D]. If they are LazyFeatures, gathers their rows."""
    if not isinstance(features, LazyFeatures):
        return features
    return jnp.asarray(features.values).at[features.index].get(mode="promise_in_bounds")


def map_fields(fn: Callable[..., Array], *frames: Frames) -> Frames:
    """Applies `fn` to each field of Frames, such as `features`; returns Frames of the results.

    If several Frames are given, `fn` receives the same field of each of them. If the features are
    LazyFeatures, `fn` receives only the field `index` of LazyFeatures.
    """

    def field(*values: Array) -> Array:
        if isinstance(values[0], LazyFeatures):
            indices = [value.index for value in values if isinstance(value, LazyFeatures)]
            return values[0]._replace(index=fn(*indices))
        return fn(*values)

    return Frames(*map(field, *frames))


def ordered_quality(quality: Array) -> Array:
    """Replaces NaN and infinite qualities by the lowest finite float32."""
    return jnp.where(jnp.isfinite(quality), quality, jnp.finfo(jnp.float32).min)


def _sort_by_quality(quality: Array, mask: Array) -> Array:
    """Returns [B, T] indices of frames: first the real frames, best first, then padding."""
    quality = jnp.where(mask, ordered_quality(quality), -jnp.inf)
    # With clips on several devices, lax.top_k would gather the whole batch on every device.
    return jnp.argsort(quality, axis=1, stable=True, descending=True)


def _select_first(
    rng: Array | None,
    frames: Frames,
    order: Array,
    num_frames: int,
    *,
    replacement: bool = False,
    fixed_draws: bool = False,
) -> Frames:
    """Selects the first `num_frames` frames in `order`, and returns them in time order.

    `order` [B, T] are indices of frames, real frames first. If a clip has too few frames, all its
    frames and random repeats are selected, or only random frames if `replacement` is True.

    Draws use the PRNG key `rng`, or a fixed key if `rng` is None. If `rng` is None, and
    `replacement` and `fixed_draws` are False, nothing is drawn: frames are repeated in turn.
    """
    order = order[:, :num_frames]
    count = jnp.sum(frames.mask, axis=1, dtype=jnp.int32)[:, None]
    slot = jnp.arange(num_frames, dtype=jnp.int32)[None, :]
    if rng is None and not (replacement or fixed_draws):
        again = slot % jnp.maximum(count, 1)
    else:
        key, rows = (jax.random.key(0), 1) if rng is None else (rng, count.shape[0])
        uniforms = jax.random.uniform(key, (rows, num_frames), jnp.float32)
        again = jnp.minimum((uniforms * count).astype(jnp.int32), count - 1)
    rank = jnp.where(count >= num_frames if replacement else slot < count, slot, again)
    index = take(order, jnp.clip(rank, 0, order.shape[1] - 1))
    return _select_frames(frames, jnp.sort(index, axis=1))


def _select_frames(frames: Frames, index: Array) -> Frames:
    """Returns Frames [B, T'] of the frames at the positions `index` [B, T'] of each clip.

    The mask of a clip is all True, or if the clip has no frames, all False.
    """
    chosen = map_fields(lambda values: take(values, index), frames)
    has_frame = frames.mask.any(axis=1, keepdims=True)
    return chosen._replace(mask=jnp.broadcast_to(has_frame, index.shape))


_LEVELS = 4096  # `_draw_frames` rounds probabilities to this number of steps


def random_fusion(
    rng: Array | None,
    frames: Frames,
    *,
    num_draws: int,
    max_frames: int = 5,
    probs: Sequence[float] | None = None,
    replacement: bool = True,
    sampling: str = "uniform",
    weighting: str = "uniform",
) -> Frames:
    """Draws `num_draws` fused frames per clip, each the mean of 1 to `max_frames` random frames.

    Args:
      rng: PRNG key. None raises UserError, because this fusion is only for training.
      num_draws: number of fused frames per clip, T'.
      max_frames: largest number of frames in a fused frame.
      probs: relative probabilities that a fused frame is the mean of 1, 2, ... `max_frames` frames.
        None means equal probabilities.
      replacement: True to draw frames with replacement. If False, a mean contains a frame twice
        only if the clip has too few frames that can be drawn.
      sampling: the formula of the probability that a frame is drawn, such as `quality`, see
        `frame_weights`. Probabilities are rounded to 1/4096 of the largest.
      weighting: the formula of the weights in the mean, see `frame_weights`; or `mixup` for random
        weights (Dirichlet with parameters 1).

    Returns:
      Frames [B, T'] with float32 features. Quality and detection are means with the same weights.
        A fused frame has the frame `number` of its first drawn frame, so numbers are not in order.

    Source: quality fusion (4th place 2019) fuses 1-5 frames, drawn with replacement, with weights
    quality x detection. `replacement=False` is from Residual Dense Net (2nd place 2019), which
    shuffles and merges frames. `mixup` is from Zhang et al., but within a clip, so labels need no
    mixing. In the papers, `num_draws` is 1.
    """
    if rng is None:
        raise UserError(
            "the fusion 'random' is only for training\n"
            "for evaluation choose sample, top, windows, crops, mean or all"
        )
    _check_count("num_draws", num_draws)
    _check_count("max_frames", max_frames)
    num_clips = len(frames.mask)
    uniforms = jax.random.uniform(rng, (num_clips, num_draws, max_frames + 1), jnp.float32)

    # The last threshold is 1. It is left out: rounded down, it could count too many frames.
    thresholds = _cumulate_probs(probs, max_frames)[:-1]
    num_fused = 1 + jnp.sum(uniforms[..., :1] >= thresholds, axis=-1)  # [B, T']
    is_used = [slot < num_fused for slot in range(max_frames)]

    picks = _draw_frames(frame_weights(frames, sampling), uniforms[..., 1:], replacement)
    if weighting == "mixup":
        mix_rng = jax.random.fold_in(rng, 1)
        shares = jax.random.exponential(mix_rng, uniforms[..., 1:].shape, jnp.float32)
        weights = [shares[..., slot] for slot in range(max_frames)]
    else:
        all_weights = frame_weights(frames, weighting)
        weights = [take(all_weights, index) for index in picks]
    return _fuse(frames, picks, is_used, weights)


def merged_windows(rng: Array | None, frames: Frames, *, max_frames: int = 5) -> Frames:
    """Returns the frames and, for each frame, the mean of this frame and random other frames.

    The frames of a clip are put into a random, cyclic order. Each mean is taken over a frame and
    the next n frames in this order, with a random n from 1 to `max_frames` - 1. `random_fusion`
    with `replacement=False` makes similar frames with less computation.

    Args:
      rng: PRNG key. If it is None, the order and each n depend only on the number of real frames.
      max_frames: largest number of frames in a mean, 2 or more. No mean contains a frame twice. So
        short clips have means of fewer frames.

    Returns:
      Frames [B, 2 T] in the stored dtype: first the unchanged frames, then the means. Quality and
        detection are means too. A mean has the `number` of the frame for which it was computed, so
        the numbers of a clip are not in order.

    Source: Residual Dense Net (2nd place 2019): frames are shuffled, merged with 1-4 other frames,
    and united with the original frames. The fixed order for evaluation is not in the paper.
    """
    _check_count("max_frames", max_frames, least=2)
    frames = frames._replace(features=read(frames.features))  # all frames are needed
    order_rng, count_rng = (None, None) if rng is None else jax.random.split(rng)
    order = shuffle(order_rng, frames.mask)
    if count_rng is None:
        extra = (jnp.cumsum(frames.mask, axis=1) - 1) % (max_frames - 1)
    else:
        uniforms = per_frame_uniform(count_rng, frames.mask)
        extra = (uniforms * (max_frames - 1)).astype(jnp.int32)
    count = jnp.sum(frames.mask, axis=1, keepdims=True, dtype=jnp.int32)
    num_fused = jnp.minimum(2 + extra, count)  # [B, T]
    is_used = [slot < num_fused for slot in range(max_frames)]
    place = jnp.argsort(order, axis=1)
    picks = [take(order, (place + slot) % jnp.maximum(count, 1)) for slot in range(max_frames)]
    weights = [take(frames.mask, index).astype(jnp.float32) for index in picks]
    merged = _fuse(frames, picks, is_used, weights)
    merged = merged._replace(number=frames.number, mask=frames.mask)

    def stored(mean: Array, like: Array) -> Array:
        # A cast to int8 would cut off digits, and so make the features shorter.
        is_integer = jnp.issubdtype(like.dtype, jnp.integer)
        return (jnp.round(mean) if is_integer else mean).astype(like.dtype)

    return jax.tree.map(lambda a, b: jnp.concatenate([a, stored(b, a)], 1), frames, merged)


def mean_frame(frames: Frames, *, weighting: str = "uniform") -> Frames:
    """Computes the mean frame of every clip.

    Returns Frames [B, 1] with float32 features. Quality and detection are means too. `number` is
    the frame number of the first real frame. `weighting` names the formula of the weights in the
    mean, such as `quality`, see `frame_weights`.
    """
    weights = frame_weights(frames, weighting)

    def mean(values: Array | LazyFeatures) -> Array:
        return _average_over_frames(frames.mask, weights, values)[:, None]

    return Frames(
        features=mean(frames.features),  # [B, 1, D]
        quality=mean(_replace_non_finite(frames.quality)),
        detection=mean(_replace_non_finite(frames.detection)),
        number=take(frames.number, jnp.argmax(frames.mask, axis=1)[:, None]),
        mask=jnp.any(frames.mask, axis=1)[:, None],
    )


def _read_frame(values: Array | LazyFeatures, t: Array | int | None) -> Array:
    """Returns the frame at position `t` of every clip, [B] or [B, D].

    `values` are [B, T] or [B, T, D]. If `t` is None, returns all frames, [B, T] or [B, T, D].
    """
    if t is None:
        return read(values)
    if isinstance(values, LazyFeatures):
        return read(values._replace(index=_read_frame(values.index, t)))
    return jax.lax.dynamic_index_in_dim(values, t, axis=1, keepdims=False)


def _read_norm(features: Array | LazyFeatures, t: Array | None) -> Array:
    """Returns the L2 norms of frame `t` of every clip, [B]; of every frame, [B, T], without `t`."""
    return jnp.linalg.norm(_read_frame(features, t).astype(jnp.float32), axis=-1)


@functools.partial(jax.jit, static_argnames="read_value")
def _average_over_frames(
    mask: Array,
    weights: Array,
    values: Array | LazyFeatures,
    read_value: Callable[[Array | LazyFeatures, Array | None], Array] = _read_frame,
) -> Array:
    """Computes the weighted mean over the frames of each clip, [B, ...].

    `mask` [B, T] is True for real frames. `weights` are [B, T]. If all weights of a clip are 0, its
    mean is 0. `read_value(values, t)` returns the value of frame t of every clip, [B, ...]. If t is
    None, it returns the values of all frames, [B, T, ...].
    """
    total = jnp.sum(weights, axis=1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)  # [B, T]
    if any(map(jax.export.is_symbolic_dim, mask.shape)):  # exported: loops are slow in runtimes
        values = read_value(values, None)
        counts = mask.reshape(*mask.shape, *[1] * (values.ndim - 2))
        values = jnp.where(counts, values, 0)
        return jnp.einsum("bt,bt...->b...", weights, values, precision=jax.lax.Precision.HIGHEST)
    # Blocks are padded to a few lengths. Frames after the last real frame of the batch are skipped.
    end = jnp.max(jnp.where(mask, jnp.arange(1, 1 + mask.shape[1]), 0))

    # Reading a frame at a time in the stored dtype is 15 times faster on CPU than summing float32
    # [B, T, D], and the result does not depend on the length of the padding.
    def add(t: Array, total: Array) -> Array:
        value = read_value(values, t)
        return total + value * _read_frame(weights, t).reshape(-1, *[1] * (value.ndim - 1))

    first = jax.eval_shape(read_value, values, jnp.int32(0))
    return jax.lax.fori_loop(0, end, add, jnp.zeros(first.shape, _widen_dtype(first)))


def crop_means(
    frames: Frames, *, weighting: str = "quality", always_shorter: bool = False
) -> Frames:
    """Computes the mean frames of four temporal crops of every clip.

    The crops are the whole clip, the clip without its first third, the clip without its last third,
    and the clip without its first and last sixth. Returns Frames [B, 4], see `mean_frame`.

    Args:
      weighting: formula of the weights in the means, such as `quality`, see `frame_weights`.
      always_shorter: if True, a third or sixth is at least 1 frame, unless the crop would be
        empty. If False, thirds and sixths are rounded down, possibly to 0 frames.

    Source: test-time crops of the 5th-place system of 2018, whose code uses `always_shorter`.
    """
    rank = jnp.cumsum(frames.mask, axis=1) - 1
    count = rank[:, -1:] + 1
    third, sixth = count // 3, count // 6
    if always_shorter:
        third, sixth = jnp.maximum(third, count > 1), jnp.maximum(sixth, count > 2)
    crops = [
        frames.mask,
        frames.mask & (rank >= third),
        frames.mask & (rank < count - third),
        frames.mask & (rank >= sixth) & (rank < count - sixth),
    ]

    def mean(mask: Array) -> Frames:
        return mean_frame(frames._replace(mask=mask), weighting=weighting)

    means = jax.vmap(mean, out_axes=1)(jnp.stack(crops))  # a single pass for all crops
    return jax.tree.map(lambda values: values[:, :, 0], means)


def all_frames(frames: Frames) -> Frames:
    """Returns all frames unchanged: neither selects nor averages frames."""
    return frames


# name in `config.fusion` -> function ([rng,] Frames [B, T], *, options) -> Frames [B, T']. If the
# function has a parameter `rng`, it receives a PRNG key, or None in evaluation. To add a fusion,
# write a function and a line here.
FUSIONS: dict[str, Callable[..., Frames]] = {
    "all": all_frames,
    "crops": crop_means,
    "mean": mean_frame,
    "random": random_fusion,
    "sample": sample_frames,
    "top": top_frames,
    "windows": merged_windows,
}


def make_fusion(spec: Mapping[str, Any]) -> Callable[[Array | None, Frames], Frames]:
    """Builds a fusion, a function that selects or averages the frames of each clip.

    The function maps (rng, Frames [B, T]) to Frames [B, T']. `rng` is a PRNG key, or None in
    evaluation. The fusion `random` needs a key. Raises UserError if the name or an option is wrong.

    Args:
      spec: a dict such as `config.fusion.face.train`: `name`, a key of FUSIONS, and options of this
        fusion. Options of `filter_frames` apply before the fusion. After it, the share `kept_share`
        of the fused frames is kept, the highest quality first.
    """
    if not isinstance(spec, Mapping):
        raise UserError(f"{str(spec)[:50]!r} is not a dict such as {{'name': 'all'}}")
    options = dict(spec)
    name = options.pop("name", None)
    check_entry("name", name, FUSIONS)
    function, filters = FUSIONS[name], list_options(filter_frames)
    takes_key = "rng" in inspect.signature(function).parameters
    check_options(
        f"fusion {name!r}",
        list_options(function) | filters | {"kept_share": 1.0},
        options,
        "\n--config.fusion.MODALITY.PHASE.name=NAME keeps the options of the old fusion: "
        "change them in a copy of the configuration file",
    )
    kept_share = options.pop("kept_share", 1.0)
    filter_options = {key: options.pop(key) for key in filters if key in options}

    def fuse(rng: Array | None, frames: Frames) -> Frames:
        frames = filter_frames(frames, **filter_options) if filter_options else frames
        fused = function(rng, frames, **options) if takes_key else function(frames, **options)
        features, mask = getattr(fused, "features", None), getattr(fused, "mask", None)
        shape, kind = getattr(features, "shape", None), str(getattr(mask, "dtype", None))
        if shape is None or shape[:-1] != getattr(mask, "shape", None) or kind != "bool":
            raise UserError(
                f"fusion {name!r} must return Frames with features [B, T, D] and a mask [B, T] bool"
                f"\nnow it returns {type(fused).__name__} with features of the shape {shape}, and "
                f"a mask of the shape {getattr(mask, 'shape', None)} and the dtype {kind}"
            )
        return filter_frames(fused, top_share=kept_share) if kept_share != 1 else fused

    return fuse


REQUIRED = inspect.Parameter.empty  # instead of the default of an option that has no default


def check_options(
    what: str, known: Mapping[str, Any], options: Mapping[str, Any], more: str = ""
) -> None:
    """Raises UserError if `options`, name -> value, do not fit the options `known`.

    `known` is name -> default value. The value REQUIRED marks an option without a default: such an
    option must be given. If a default is True or False, the given value must be True or False. The
    message begins with `what`, such as `fusion 'top'`. A message about an unknown option ends with
    `more`.
    """
    if unknown := sorted(set(options) - set(known)):
        raise UserError(
            f"{what} has no option {', '.join(unknown)}; its options: "
            f"{', '.join(sorted(known)) or 'none'}{more}"
        )
    if missing := sorted(name for name in known if known[name] is REQUIRED and name not in options):
        raise UserError(
            f"{what} needs {', '.join(missing)}\nadd each missing option to the configuration"
        )
    for name, value in options.items():
        # The text "False" would count as True.
        if isinstance(known[name], bool) and not isinstance(value, bool):
            raise UserError(f"{what}: {name}={value!r}: must be True or False")


def list_options(function: Callable) -> dict[str, Any]:
    """Returns the keyword-only parameters of a function, name -> default (or REQUIRED)."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _draw_frames(weights: Array, uniforms: Array, replacement: bool) -> list[Array]:
    """Draws S frames for each of T' fused frames. Returns S arrays of indices, [B, T'] int32.

    Args:
      weights: [B, T], relative probabilities of the frames.
      uniforms: [B, T', S] float32, a random number in [0, 1) for each draw.
      replacement: True to draw with replacement. If False, a frame is drawn twice for a fused frame
        only if the clip has fewer than S frames with a weight above 0.
    """
    # The weights become whole numbers up to _LEVELS. In float32 the sum over up to 4096 frames is
    # exact, so draws depend neither on padding nor on the number of devices.
    largest = jnp.max(weights, axis=1, keepdims=True)
    levels = jnp.round(weights / jnp.where(largest > 0, largest, 1.0) * _LEVELS)
    num_clips, num_frames = levels.shape
    num_slots = uniforms.shape[-1]
    cdf = jnp.cumsum(levels, axis=1)  # [B, T]
    last = num_frames - 1  # for clips without frames the search returns num_frames
    if replacement:
        points = uniforms.reshape(num_clips, -1) * cdf[:, -1:]
        index = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(cdf, points)
        index = jnp.minimum(index, last).reshape(uniforms.shape)
        return [index[..., slot] for slot in range(num_slots)]

    # A point is drawn on the line of the remaining frames. Then it is shifted past every frame
    # drawn before it, in time order. Index T stands for "no frame".
    starts = jnp.pad(cdf, ((0, 0), (1, 0)))  # [B, T + 1]
    levels = jnp.pad(levels, ((0, 0), (0, 1)))
    drawable = jnp.maximum(jnp.sum(levels > 0, axis=1, keepdims=True), 1)
    picks = []
    for slot in range(num_slots):
        this_round = slot // drawable * drawable  # slot at which all frames became drawable again
        drawn = [jnp.where(i >= this_round, pick, num_frames) for i, pick in enumerate(picks)]
        drawn = jnp.sort(jnp.stack(drawn), axis=0) if drawn else []  # slot x [B, T']
        left = cdf[:, -1:] - sum(take(levels, index) for index in drawn)
        point = jnp.floor(uniforms[..., slot] * left)  # whole numbers remain exact when shifted
        for index in drawn:
            point += jnp.where(point >= take(starts, index), take(levels, index), 0.0)
        # A comparison compiles fast, whereas five calls of searchsorted would take seconds.
        index = jnp.sum(point[..., None] >= cdf[:, None], axis=-1, dtype=jnp.int32)
        picks.append(jnp.minimum(index, last))
    return picks


def _fuse(
    frames: Frames, picks: Sequence[Array], is_used: Sequence[Array], weights: Sequence[Array]
) -> Frames:
    """Computes fused frames, each the weighted mean of up to S frames of a clip.

    `picks` are indices of frames, `is_used` is False for picks to ignore, and `weights` are weights
    in the mean. Each is a sequence of S arrays [B, T'], for T' fused frames of B clips. The first
    pick is always used, and its frame number becomes the `number` of the fused frame. Returns
    Frames [B, T'] with float32 features. The mask is False only for clips without frames.
    """
    weights = [jnp.where(used, w, 0.0) for used, w in zip(is_used, weights, strict=True)]
    # All picked frames may have weight 0 while other frames of the clip have positive weights.
    weightless = sum(weights) <= 0
    weights = [jnp.where(weightless, used, w) for used, w in zip(is_used, weights, strict=True)]
    total = sum(weights)
    has_frame = jnp.any(frames.mask, axis=1)[:, None]
    weights = [jnp.where(has_frame, w / total, 0.0) for w in weights]

    def mean(values: Array) -> Array:
        # One slot at a time, read in the stored dtype: for 1 to 32 draws this is 2 to 20 times
        # faster on CPU than a gather for all slots, or than a weight matrix [B, T', T].
        means = []
        for index, weight in zip(picks, weights, strict=True):
            value = read(take(values, index))
            weight = weight.reshape(weight.shape + (1,) * (value.ndim - 2))
            means.append(value.astype(_widen_dtype(value)) * weight)
        return jnp.asarray(sum(means))

    return Frames(
        features=mean(frames.features),  # [B, T', D]
        quality=mean(_replace_non_finite(frames.quality)),
        detection=mean(_replace_non_finite(frames.detection)),
        number=take(frames.number, picks[0]),
        mask=jnp.broadcast_to(has_frame, picks[0].shape),
    )


def _cumulate_probs(probs: Sequence[float] | None, length: int) -> np.ndarray:
    """Returns the cumulative distribution of a random number of frames, float32 [length].

    `probs` are the relative probabilities of 1, 2, ... `length` frames, or None if they are equal.
    Raises UserError if `probs` are not `length` finite numbers of 0 or more.
    """
    try:
        weights = np.ones(length) if probs is None else np.asarray(probs, np.float64)
    except (ValueError, TypeError):
        weights = np.empty(0)
    if weights.shape != (length,) or not np.all(weights >= 0) or not 0 < weights.sum() < np.inf:
        raise UserError(
            f"probs={probs} must be {length} finite numbers of 0 or more, and not all 0"
        )
    return (np.cumsum(weights) / weights.sum()).astype(np.float32)


def _widen_dtype(values: Array) -> jnp.dtype:
    return jnp.promote_types(values.dtype, jnp.float32)


def _replace_non_finite(values: Array) -> Array:
    return jnp.where(jnp.isfinite(values), values, 0.0)
