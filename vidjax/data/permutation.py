"""The order of clips in an epoch, computed for the clips of one batch alone; jax."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.batch import Array

ROUNDS = 16  # with 8, the orders of six clips would not all be equally likely


def shuffled(rng: Array, epoch: Array, place: Array, num_clips: int) -> Array:
    """Returns [B] int32, the clips at given positions in the orders of given epochs.

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
