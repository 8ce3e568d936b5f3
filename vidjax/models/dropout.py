"""Dropout that draws few random bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.batch import Array


class Dropout(nn.Module):
    """Sets numbers to 0 at random, and scales up the others.

    `flax.linen.Dropout` draws 32 bits a number, which takes up to a tenth of a training step on a
    CPU. Here a number takes 8 bits if the rate is a multiple of 1/256. Else it takes 16, and the
    rate is rounded to a multiple of 2**-16.

    Attributes:
      rate: probability of 0, in [0, 1].
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        """Returns x [..., D] float with numbers left out, or as it is if `deterministic`.

        What remains is divided by the probability that a number remains. The rng is `dropout`.
        """
        if deterministic or not self.rate:
            return x
        bits = 8 if (self.rate * 256).is_integer() else 16
        dropped = round(self.rate * 2**bits)  # of the 2**bits values
        kept = 1 - dropped / 2**bits
        if not kept:
            return jnp.zeros_like(x)
        is_kept = _draw(self.make_rng("dropout"), x.shape, bits) >= dropped
        return jnp.where(is_kept, x / kept, 0)


def _draw(rng: Array, shape: tuple[int, ...], bits: int) -> Array:
    """Returns random whole numbers of a shape, uint8 or uint16."""
    share = 32 // bits  # numbers of a word
    words = jax.random.bits(rng, (*shape[:-1], -(-shape[-1] // share)), jnp.uint32)
    narrow = jnp.uint8 if bits == 8 else jnp.uint16
    numbers = jax.lax.bitcast_convert_type(words, narrow)  # [..., D / share, share]
    return numbers.reshape(*shape[:-1], -1)[..., : shape[-1]]
