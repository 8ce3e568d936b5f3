"""The order of training: the clips of every step, and where windows of longer ones begin.

It is a function of (seed, step), which clips on the devices and clips from records share: a run
that resumes needs nothing but its step.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.core.batch import Array
from vidjax.data.clips import BatchPlan

_ORDER = np.uint32(2**32 - 1)  # folded into the seed; no member has this number
ROUNDS = 16  # with 8, the orders of six clips would not all be equally likely


class Drawn(NamedTuple):
    """The clips of a step.

    Attributes:
      clip_index: [B] int32.
      batch_mask: [B] bool, False for the empty rows of a short batch.
      windows: modality -> [B] float32 in [0, 1), see `first_frame`; only those of `plan.windowed`.
    """

    clip_index: Array
    batch_mask: Array
    windows: Mapping[str, Array]


def draw(plan: BatchPlan, step: Array, epoch: Array, place: Array) -> Drawn:
    """Returns the B clips of a step.

    Every clip of `plan` comes once per epoch.

    Args:
      step: [] int32, number of the step, from 0.
      epoch, place: [B] int32, the quotient and the rest of `step * B + arange(B)` divided by
        `plan.num_places`.
    """
    order_rng, window_rng = jax.random.split(jax.random.fold_in(jax.random.key(plan.seed), _ORDER))
    window_rng = jax.random.fold_in(window_rng, step)
    windows = {
        name: jax.random.uniform(jax.random.fold_in(window_rng, number), place.shape, jnp.float32)
        for number, name in enumerate(plan.modalities)
        if name in plan.windowed
    }
    if plan.examples is None:
        clip_index = shuffled(order_rng, epoch, place, plan.num_clips)
        return Drawn(clip_index, jnp.ones(place.shape, bool), windows)
    last = jnp.minimum(place, plan.num_clips - 1)
    clip_index = jnp.asarray(plan.examples)[shuffled(order_rng, epoch, last, plan.num_clips)]
    return Drawn(clip_index, place < plan.num_clips, windows)


def first_frame(drawn: Array, length: Array, size: int) -> Array:
    """Returns [B] int32, where windows of `size` frames begin in clips of `length` [B] frames.

    `drawn` [B] float32 in [0, 1) is evenly distributed, as the windows are.
    """
    places = jnp.maximum(length - size, 0) + 1
    return jnp.minimum((drawn * places).astype(jnp.int32), places - 1)


def shuffled(rng: Array, epoch: Array, place: Array, num_clips: int) -> Array:
    """Returns [B] int32: the clip at position `place[i]` in the random order of epoch `epoch[i]`.

    Args:
      rng: key of all orders.
      epoch: [B] int32.
      place: [B] int32, position in the epoch, 0 to num_clips - 1; all positions of an epoch
        together give every clip once.
      num_clips: N.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002: a generalised Feistel
    network on the smallest rectangle of N or more places, repeated for places mapped beyond N.
    Ours: the round function, a hash (the finaliser of MurmurHash3). It costs O(B), where sorting N
    random numbers would cost as much as many steps.
    """
    rows = math.isqrt(num_clips - 1) + 1
    columns = -(-num_clips // rows)
    keys = jax.vmap(lambda e: jax.random.bits(jax.random.fold_in(rng, e), (ROUNDS,)))(epoch)

    def permute(x: Array) -> Array:
        row, column = x % rows, x // rows
        for i in range(ROUNDS):
            if i % 2:
                column = (column + _hash(row, keys[:, i]) % columns) % columns
            else:
                row = (row + _hash(column, keys[:, i]) % rows) % rows
        return column * rows + row

    def beyond(x: Array) -> Array:
        return jnp.any(x >= num_clips)

    def walk(x: Array) -> Array:
        return jnp.where(x < num_clips, x, permute(x))

    return jax.lax.while_loop(beyond, walk, permute(place.astype(jnp.uint32))).astype(jnp.int32)


def _hash(x: Array, key: Array) -> Array:
    """Returns [B] uint32, a hash of x and a key."""
    x = (x * np.uint32(0x9E3779B9)) ^ key
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)
