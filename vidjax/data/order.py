"""Draws the clips of each training step, and the windows that are cut from long clips.

The draw depends only on the seed and the number of the step, so a resumed run continues with the
same clips. Clips on the devices and clips on disk have the same order.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.core.batch import Array
from vidjax.data.clips import BatchPlan

_ORDER_STREAM = np.uint32(2**32 - 1)  # folded into the seed; no net of an ensemble has this number
NUM_ROUNDS = 16  # with 8 rounds, the possible orders of six clips are not equally likely


class DrawnClips(NamedTuple):
    """The clips of a training step."""

    clip_index: Array  # [B] int32, the number of each clip in the training splits
    batch_mask: Array  # [B] bool, False for empty rows of the last batch of an epoch
    # Modality whose clips are cut -> [B] float32, uniform in [0, 1), for `choose_first_frame`.
    windows: Mapping[str, Array]


def draw_batch_clips(plan: BatchPlan, step: Array, epoch: Array, place: Array) -> DrawnClips:
    """Draws the B clips of the training step `step` [] int32. Each clip is drawn once per epoch.

    `epoch` [B] int32 is the epoch of each row of the batch. `place` [B] int32 is the position of
    each row in its epoch. Both come from `divmod(step * B + arange(B), plan.num_places)`.
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


# `clip_index` [B] int32; `batch_mask` [B] bool; and modality whose clips are cut -> [B] int32, the
# first frame of the window of each clip.
HostClips = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]


def draw_on_host(
    plan: BatchPlan, lengths: Mapping[str, np.ndarray], step: int
) -> Iterator[HostClips]:
    """Draws the clips of each training step, beginning with `step`, on the CPU.

    `lengths` is modality -> [N] int32, the number of frames of each training clip, for the
    modalities `plan.windowed`.
    """

    @jax.jit
    def draw(step: Array, epoch: Array, place: Array) -> tuple[Array, Array, dict[str, Array]]:
        clip_index, batch_mask, drawn = draw_batch_clips(plan, step, epoch, place)
        first = {}
        for name in plan.windowed:
            length = jnp.asarray(lengths[name])[clip_index] * batch_mask
            size = plan.padded_lengths[name]
            first[name] = choose_first_frame(drawn[name], length, size)
        return clip_index, batch_mask, first

    for number in itertools.count(step):
        position = number * plan.batch_size + np.arange(plan.batch_size)
        epoch, place = (part.astype(np.int32) for part in np.divmod(position, plan.num_places))
        with jax.default_device(_get_host_device()):
            drawn = jax.device_get(draw(np.int32(number), epoch, place))
        yield drawn


def _get_host_device() -> Any:  # noqa: ANN401 (JAX exports no type)
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def choose_first_frame(uniform: Array, length: Array, size: int) -> Array:
    """Returns the first frame of a random window of `size` frames in each clip, [B] int32.

    `uniform` [B] float32 are random numbers in [0, 1). `length` [B] int32 is the number of frames
    of each clip. All windows within a clip are equally likely. In a clip that is shorter than a
    window, the first frame is 0.
    """
    places = jnp.maximum(length - size, 0) + 1
    return jnp.minimum((uniform * places).astype(jnp.int32), places - 1)


def shuffle(rng: Array, epoch: Array, place: Array, num_clips: int) -> Array:
    """Returns [B] int32, the clips at given positions of shuffled epochs, in a time of O(B).

    Each epoch has a different order of N clips, which are numbered 0 to N - 1.

    Args:
      rng: the key that determines the orders of all epochs.
      epoch: [B] int32, numbers of epochs.
      place: [B] int32, positions in the epochs, 0 to N - 1.
      num_clips: the number of clips, N.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, a generalised Feistel
    network. Unlike the paper, the round function is the finaliser of MurmurHash3.
    """
    rows = math.isqrt(num_clips - 1) + 1
    columns = -(-num_clips // rows)
    # The network permutes the cells of a rectangle, of at least N cells. If a position is mapped to
    # a cell from N on, the network is applied again.
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
    x = (x * np.uint32(0x9E3779B9)) ^ key
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)
