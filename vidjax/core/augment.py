"""Augments the clips of a training step, separately for each member (net) of an ensemble.

A transform is a function (rng, MemberClips) -> MemberClips. The transforms in
`System.clip_transforms` receive all frames of the clips. The transforms in `System.transforms`
receive the frames after fusion, which selects or averages frames.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vidjax.core import fusion
from vidjax.core.batch import Array, Frames
from vidjax.utils.errors import UserError, check_entry

NOISE_FRAMES = 50  # shorter distractor clips are concatenated (code of 5th place 2018)


class MemberClips(NamedTuple):
    """The B clips of a training step that a member (net) of an ensemble receives."""

    frames: Mapping[str, Frames]  # modality -> Frames [B, T]
    labels: Array  # [B] int32, column of the class of each clip in the logits
    weight: Array  # [B] float32, weight in the loss; 0 for clips that the member is not trained on
    min_quality: Array  # [] float32, lowest quality of the frames that the member is trained on
    # Pairs (labels [B] int32, share [B] float32). The loss of a clip is the sum of share x loss
    # over the pairs. The shares of a clip sum to 1.
    targets: tuple[tuple[Array, Array], ...]


BatchTransform = Callable[[Array, MemberClips], MemberClips]


def drop_poor_frames(rng: Array, clips: MemberClips, *, poor_clips: str = "keep") -> MemberClips:
    """Removes poor frames, with a quality below `clips.min_quality`. `rng` is not used.

    If all frames of a clip in a modality are poor, they are kept. If `poor_clips` is "drop", and
    all frames in the first modality are poor, the clip gets the weight 0.

    Source: Residual Dense Net (2nd place 2019), models trained on quality subsets. The paper always
    drops such clips. It also drops frames whose quality equals the limit.
    """
    frames = {
        name: fusion.filter_frames(frames, min_quality=clips.min_quality)
        for name, frames in clips.frames.items()
    }
    weight = clips.weight
    if poor_clips == "drop":
        first = next(iter(clips.frames.values()))
        good = first.mask & (fusion.ordered_quality(first.quality) >= clips.min_quality)
        weight = weight * (good.any(axis=1) | ~first.mask.any(axis=1))
    return clips._replace(frames=frames, weight=weight)


def concat_noise(
    rng: Array, clips: MemberClips, *, num_identities: int, pieces: str = "equal"
) -> MemberClips:
    """Joins short distractor clips at random, and cuts long distractor clips to random pieces.

    A distractor shows none of the identities: its label is 0, or larger than `num_identities`.
    `pieces` chooses the lengths of the pieces: `equal` or `random`, see `concat_clips`.

    Source: noise augmentation of the 5th place in the iQIYI-VID challenge 2018.
    """
    labels = clips.labels
    is_noise = (clips.weight > 0) & ((labels == 0) | (labels > num_identities))
    # Only the first modality decides, so that a clip has the same partner in all modalities.
    counts = jnp.sum(next(iter(clips.frames.values())).mask, axis=1)
    short = (counts > 0) & (counts < NOISE_FRAMES)
    frames = {
        name: concat_clips(rng, frames, is_noise, short, max_frames=NOISE_FRAMES, pieces=pieces)
        for name, frames in clips.frames.items()
    }
    return clips._replace(frames=frames)


def concat_clips(
    rng: Array,
    frames: Frames,
    chosen: Array,
    short: Array,
    *,
    max_frames: int = 50,
    pieces: str = "equal",
) -> Frames:
    """Concatenates short clips with other short clips of the batch, and cuts long clips.

    With probability 0.5, a short clip gets the frames of another short clip at its end. The added
    frames get the next frame numbers. A long clip is cut to a random piece. Call this function for
    each modality with the same `rng`, `chosen` and `short`, so that all modalities of a clip get
    frames of the same clip, or are cut at the same relative position.

    Args:
      chosen: [B] bool. Clips with False do not change, and add no frames to other clips. It must be
        False on padded rows.
      short: [B] bool, True for clips with fewer than `max_frames` frames in the first modality.
      pieces: with `equal`, a piece has `max_frames` consecutive frames, or all frames if there are
        fewer. With `random`, its first and last frame are random (uniform).

    Returns:
      Frames [B, 2 T] in the stored dtype.

    Source: noise augmentation of the 5th place in the iQIYI-VID challenge 2018, with `random`
    pieces. The paper of this system has no probability and no `equal` pieces.
    """
    partner_rng, join_rng, cut_rng = jax.random.split(rng, 3)
    num_clips = len(chosen)
    pool = chosen & short
    size = jnp.sum(pool, dtype=jnp.int32)
    # The partner is the next clip in a random cyclic order. So no clip is its own partner.
    ring = jnp.argsort(jnp.where(pool, jax.random.uniform(partner_rng, (num_clips,)), jnp.inf))
    partner = ring[(jnp.argsort(ring) + 1) % jnp.maximum(size, 1)]
    joined = pool & (size > 1) & (jax.random.uniform(join_rng, (num_clips,)) < 0.5)
    second = fusion.map_fields(lambda x: jnp.take(x, partner, axis=0, mode="clip"), frames)

    rank = jnp.cumsum(frames.mask, axis=1) - 1
    count = rank[:, -1:] + 1
    starts = count if pieces == "random" else jnp.maximum(count - max_frames, 0) + 1
    start = (jax.random.uniform(cut_rng, (num_clips,))[:, None] * starts).astype(jnp.int32)
    length = max_frames
    if pieces == "random":
        uniforms = jax.random.uniform(jax.random.fold_in(cut_rng, 1), (num_clips,))[:, None]
        length = 1 + (uniforms * (count - start)).astype(jnp.int32)
    piece = (rank >= start) & (rank < start + length)
    cut = (chosen & ~short)[:, None]
    last = jnp.max(jnp.where(frames.mask, frames.number, -1), axis=1, keepdims=True)
    first = frames._replace(mask=frames.mask & (piece | ~cut))
    second = second._replace(number=second.number + last + 1, mask=second.mask & joined[:, None])
    return fusion.map_fields(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)


def mix_up(rng: Array, clips: MemberClips, *, alpha: float) -> MemberClips:
    """Replaces every clip by share x clip + (1 - share) x a random clip of the batch.

    The share of a clip is max(s, 1 - s), where s is drawn from Beta(alpha, alpha) and alpha is
    above 0. If the random clip has weight 0, the share is 1. The `targets` of the result have the
    labels of both clips, with their shares.

    Source: Zhang et al., mixup, equation 1. Unlike the paper, each clip has its own share.
    """
    share_rng, partner_rng = jax.random.split(rng)
    weight = clips.weight
    share = jax.random.beta(share_rng, alpha, alpha, weight.shape)
    partner = jax.random.permutation(partner_rng, len(weight))
    # The member must not learn from clips of weight 0, such as clips that are held out from it.
    share = jnp.where(weight[partner] > 0, jnp.maximum(share, 1 - share), 1.0)
    frames = {name: _mix(frames, partner, share) for name, frames in clips.frames.items()}
    targets = ((clips.labels, share), (clips.labels[partner], 1 - share))
    return clips._replace(frames=frames, targets=targets)


def _mix(frames: Frames, partner: Array, share: Array) -> Frames:
    """Returns Frames of share x clip + (1 - share) x another clip. Padding counts as 0.

    `partner` [B] int is the row of the other clip. `share` is [B] float.
    """
    other = jax.tree.map(lambda x: x[partner], frames)

    def blend(first: Array, second: Array) -> Array:
        shape = (-1,) + (1,) * (first.ndim - 1)
        first = jnp.where(frames.mask.reshape(frames.mask.shape + shape[2:]), first, 0)
        second = jnp.where(other.mask.reshape(other.mask.shape + shape[2:]), second, 0)
        return share.reshape(shape) * first + (1 - share).reshape(shape) * second

    return Frames(
        features=blend(frames.features, other.features),
        quality=blend(frames.quality, other.quality),
        detection=blend(frames.detection, other.detection),
        number=frames.number,
        mask=frames.mask | (other.mask & (share[:, None] < 1)),
    )


def by_example(rng: Array, clips: MemberClips) -> MemberClips:
    """Multiplies the weight of every clip by its number of frames in the longest modality.

    Source: Residual Dense Net (2nd place 2019), whose batches consist of frames: a long clip counts
    more than a short clip.
    """
    counts = [jnp.sum(fused.mask, axis=1) for fused in clips.frames.values()]
    return clips._replace(weight=clips.weight * jnp.max(jnp.stack(counts), axis=0))


class Transform(NamedTuple):
    """An entry of the table TRANSFORMS: an augmentation of the clips of a training step."""

    function: Callable[..., MemberClips]  # (rng, MemberClips, *, options) -> MemberClips
    before_fusion: bool = False  # True: it receives all frames of the clips, not the fused frames


# name in `config.transforms` -> transform. To add a transform, write a function and a line here.
TRANSFORMS: dict[str, Transform] = {"by_example": Transform(by_example)}


def make_transforms(
    config: Mapping[str, Any], num_identities: int
) -> tuple[tuple[BatchTransform, ...], tuple[BatchTransform, ...]]:
    """Returns two tuples: the augmentations before the fusion of frames, and after the fusion.

    A fusion selects or averages the frames of a clip. Raises UserError if an option is wrong.

    The first tuple begins with the transforms of `config.ensemble.min_quality` and
    `config.noise.join`, the second with `config.mixup`. The entries of `config.transforms` follow,
    in the first tuple if `Transform.before_fusion` is True. An entry is a key of TRANSFORMS, or a
    dict with the key as `name` and with options.
    """
    before: list[BatchTransform] = []
    after: list[BatchTransform] = []
    if config["ensemble"]["min_quality"]:
        poor_clips = config["ensemble"]["poor_clips"]
        before.append(functools.partial(drop_poor_frames, poor_clips=poor_clips))
    if config["noise"]["join"]:
        if config["data"]["max_frames"] < NOISE_FRAMES:
            raise UserError(
                f"config.noise.join=True needs clips of up to {NOISE_FRAMES} frames, but "
                f"config.data.max_frames={config['data']['max_frames']}\n"
                f"set --config.data.max_frames={NOISE_FRAMES}, or a larger number"
            )
        pieces = config["noise"]["pieces"]
        before.append(functools.partial(concat_noise, num_identities=num_identities, pieces=pieces))
    if config["mixup"]:
        after.append(functools.partial(mix_up, alpha=config["mixup"]))
    for spec in config["transforms"]:
        options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
        name = str(options.pop("name", None))
        check_entry("config.transforms", name, TRANSFORMS)
        function, before_fusion = TRANSFORMS[name]
        what, known = f"config.transforms: {name!r}", fusion.list_options(function)
        fusion.check_options(what, known, options)
        (before if before_fusion else after).append(functools.partial(function, **options))
    return tuple(before), tuple(after)
