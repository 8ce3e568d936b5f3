"""What a model is given as an example: one fused frame of a clip, or two clips mixed."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vidjax.batch import Array, Frames


def as_examples(frames: Mapping[str, Frames]) -> tuple[dict[str, Frames], Array]:
    """Returns [B, T'] fused frames as B T' clips of one frame, and which of them exist [B, T'].

    A modality with a single frame goes with every example of its clip. A clip that has no frame of
    the others is one example.

    Raises:
      ValueError: two modalities differ in T', and neither is 1.
    """
    sizes = {one.mask.shape[1] for one in frames.values()}
    if len(sizes - {1}) > 1:
        raise ValueError(f"config.after_fusion='examples': modalities give {sorted(sizes)} frames")
    num_examples = max(sizes)
    leading = [one.mask for one in frames.values() if one.mask.shape[1] == num_examples]
    exists = jnp.any(jnp.stack(leading), axis=0)  # [B, T']
    others = jnp.any(jnp.stack([one.mask.any(axis=1) for one in frames.values()]), axis=0)
    alone = others & ~exists.any(axis=1)
    exists = exists.at[:, 0].set(exists[:, 0] | alone)

    def reshape(x: Array) -> Array:
        x = jnp.broadcast_to(x, (x.shape[0], num_examples, *x.shape[2:]))
        return x.reshape(-1, 1, *x.shape[2:])  # [B T', 1, ...]

    return {name: jax.tree.map(reshape, one) for name, one in frames.items()}, exists


def mix_up(
    rng: Array, alpha: float, frames: Mapping[str, Frames], weight: Array
) -> tuple[dict[str, Frames], Array, Array]:
    """Returns frames mixed with those of another clip, the share of a clip's own [B], the other.

    The share is Beta(alpha, alpha), never below a half, and 1 beside a clip of weight 0: a member
    sees nothing of the fold that it must not know.

    Source: Zhang et al., mixup, equation 1; ours: a share for every clip instead of for the batch.
    """
    share_rng, partner_rng = jax.random.split(rng)
    share = jax.random.beta(share_rng, alpha, alpha, weight.shape)
    partner = jax.random.permutation(partner_rng, len(weight))
    share = jnp.where(weight[partner] > 0, jnp.maximum(share, 1 - share), 1.0)

    def mix(one: Frames) -> Frames:
        row = share[:, None]
        other = jax.tree.map(lambda x: x[partner], one)

        def blend(mine: Array, theirs: Array) -> Array:
            shape = (-1,) + (1,) * (mine.ndim - 1)
            mine = jnp.where(one.mask.reshape(one.mask.shape + shape[2:]), mine, 0)
            theirs = jnp.where(other.mask.reshape(other.mask.shape + shape[2:]), theirs, 0)
            return share.reshape(shape) * mine + (1 - share).reshape(shape) * theirs

        return Frames(
            features=blend(one.features, other.features),
            quality=blend(one.quality, other.quality),
            detection=blend(one.detection, other.detection),
            number=one.number,
            mask=one.mask | (other.mask & (row < 1)),
        )

    return {name: mix(one) for name, one in frames.items()}, share, partner


def has_frames(frames: Mapping[str, Frames]) -> Array:
    """Returns [B] bool, which clips have a frame of any modality."""
    return jnp.any(jnp.stack([one.mask.any(axis=1) for one in frames.values()]), axis=0)
