"""The random order of training: the clips of each step, and the windows of long clips.

The order is a function of (seed, step), so a resumed run needs only its step. Resident and
streamed clips have the same order.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.core.batch import Array
from vidjax.data.clips import BatchPlan

_ORDER_STREAM = np.uint32(2**32 - 1)  # folded into the seed; no member has this number
NUM_ROUNDS = 16  # with 8 rounds, the orders of six clips are not equally likely


class DrawnClips(NamedTuple):
    """The clips of a step.

    Attributes:
      clip_index: [B] int32.
      batch_mask: [B] bool, False for the empty rows of a short batch.
      windows: modality of `plan.windowed` -> [B] float32 in [0, 1), see `choose_first_frame`.
    """

    clip_index: Array
    batch_mask: Array
    windows: Mapping[str, Array]


def draw_batch_clips(plan: BatchPlan, step: Array, epoch: Array, place: Array) -> DrawnClips:
    """Draws the B clips of a step. Each clip of `plan` comes once per epoch.

    Args:
      step: [] int32, number of the step, from 0.
      epoch, place: [B] int32, the quotient and the remainder of `step * B + arange(B)` divided by
        `plan.num_places`.
    """
    order_rng, window_rng = jax.random.split(
        jax.random.fold_in(jax.random.key(plan.seed), _ORDER_STREAM)
    )
    window_rng = jax.random.fold_in(window_rng, step)
    windows = {
        name: jax.random.uniform(jax.random.fold_in(window_rng, number), place.shape, jnp.float32)
        for number, name in enumerate(plan.modalities)
        if name in plan.windowed
    }
    if plan.epoch_clips is None:
        clip_index = shuffle(order_rng, epoch, place, plan.num_clips)
        return DrawnClips(clip_index, jnp.ones(place.shape, bool), windows)
    last = jnp.minimum(place, plan.num_clips - 1)
    clip_index = jnp.asarray(plan.epoch_clips)[shuffle(order_rng, epoch, last, plan.num_clips)]
    return DrawnClips(clip_index, place < plan.num_clips, windows)


def choose_first_frame(uniform: Array, length: Array, size: int) -> Array:
    """Returns the first frames of random windows.

    Args:
      uniform: [B] float32 in [0, 1), uniformly distributed.
      length: [B] int32, number of frames of each clip.
      size: number of frames of a window.

    Returns:
      [B] int32, uniformly distributed over the possible windows of each clip.
    """
    places = jnp.maximum(length - size, 0) + 1
    return jnp.minimum((uniform * places).astype(jnp.int32), places - 1)


def shuffle(rng: Array, epoch: Array, place: Array, num_clips: int) -> Array:
    """Returns [B] int32: the clip at position `place[i]` in the random order of epoch `epoch[i]`.

    The positions 0 to N - 1 of an epoch map to N different clips.

    Args:
      rng: the key of the orders of all epochs.
      epoch: [B] int32.
      place: [B] int32, position in the epoch, 0 to N - 1.
      num_clips: N.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002: a generalised Feistel
    network on the smallest rectangle of at least N places, repeated while a place is mapped beyond
    N. Unlike the paper, the round function is a hash (the finaliser of MurmurHash3). The cost is
    O(B); sorting N random numbers would take as long as many training steps.
    """
    rows = math.isqrt(num_clips - 1) + 1
    columns = -(-num_clips // rows)
    keys = jax.vmap(lambda e: jax.random.bits(jax.random.fold_in(rng, e), (NUM_ROUNDS,)))(epoch)

    def permute(x: Array) -> Array:
        row, column = x % rows, x // rows
        for i in range(NUM_ROUNDS):
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
