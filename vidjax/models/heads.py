"""Classifiers: from one vector per clip to a logit for every class column."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.batch import Array
from vidjax.errors import UserError
from vidjax.models.layers import Dropout, Linear

_SMALLEST_SQUARE = 1e-24


def unit_vectors(x: Array) -> Array:
    """Scales vectors to length 1; vectors shorter than 1e-12 become 0.

    The result, [..., D], is at least float32. Values and gradients are finite, 0 for vectors of 0.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    # The derivative of rsqrt overflows for small squares whose rsqrt is still finite.
    usable = squares > _SMALLEST_SQUARE
    return jnp.where(usable, x * jax.lax.rsqrt(jnp.where(usable, squares, 1.0)), 0.0)


def check_head(head: str, logit_scale: float) -> None:
    """Raises ValueError unless a head is `linear`, with logits of scale 1, or `cosine`."""
    if head not in ("linear", "cosine"):
        raise UserError(f"unknown head {head!r}; choose from cosine, linear")
    if head == "linear" and logit_scale != 1.0:
        raise UserError(f"config.model.logit_scale={logit_scale} needs config.model.head=cosine")


class Classifier(nn.Module):
    """Dropout and one linear layer; parameters and logits are at least float32."""

    num_classes: int
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Returns the logits, [B, 1 + C] float32, for x [B, D] float; `train` applies dropout."""
        x = Dropout(self.dropout_rate)(x, deterministic=not train)
        return Linear(
            self.num_classes,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="logits",
        )(x)


class CosineClassifier(nn.Module):
    """Scaled cosines between the input and one learned direction per class.

    The margin of ArcFace belongs to the loss, which adds it to the angle of the label. All products
    are at least float32 and at full precision: less would lose angles near 0 and pi.

    Attributes:
      scale: factor on the cosines, the s of ArcFace.
      dropout_rate: dropout rate of the unit vectors. Training then has cosines beyond 1, which the
        margin `cosine` of the loss allows and `angular` does not.

    Source: Deng et al., ArcFace, equation 2. Ours: dropout.
    """

    num_classes: int
    scale: float
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Returns the logits, [B, 1 + C] float32, for x [B, D] float; `train` applies dropout.

        They lie in [-scale, scale] without dropout, and are 0 for vectors of 0.
        """
        unit = Dropout(self.dropout_rate)(unit_vectors(x), deterministic=not train)
        kernel = self.param(
            "kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.num_classes), unit.dtype
        )
        directions = unit_vectors(kernel.T)  # [1 + C, D]
        return self.scale * jnp.einsum(
            "bd,cd->bc", unit, directions, precision=jax.lax.Precision.HIGHEST
        )
