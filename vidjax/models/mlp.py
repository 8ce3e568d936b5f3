"""Fully connected layers with activation, BatchNorm and dropout, one after the other."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.batch import Array
from vidjax.models import dense_general

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "swish": jax.nn.silu,
}

# Width, activation, whether BatchNorm follows, dropout rate.
Layer = tuple[int, str, bool, float]


class DenseLayer(nn.Module):
    """A matrix product, an activation, BatchNorm, dropout.

    Attributes:
      width: of the output.
      activation: linear | relu | sigmoid | swish | prelu. The slope of prelu is one parameter,
        from .25 on, as PyTorch's.
      batch_norm: True for BatchNorm.
      dropout_rate: of the output.
      norm_first: True for BatchNorm before the activation.
      dtype: of the matrix product; the rest is in float32 at least, as the parameters.

    Source: quality fusion (4th place 2019): BatchNorm after the activation (before it hurts, they
    report), Xavier-uniform weights, biases of 0. Ours: masks; BatchNorm momentum .9.
    """

    width: int
    activation: str = "relu"
    batch_norm: bool = True
    dropout_rate: float = 0.0
    norm_first: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Returns the layer's output.

        Args:
          x: [B, D] float.
          mask: [B] bool, True for rows that count in the statistics.
          train: True for dropout (rng `dropout`) and for the statistics of the batch, which update
            the running ones (the collection `batch_stats` must be mutable).

        Returns:
          [B, width] float32.

        Raises:
          ValueError: for an unknown activation.
        """
        if self.activation not in _ACTIVATIONS and self.activation != "prelu":
            known = ", ".join(sorted([*_ACTIVATIONS, "prelu"]))
            raise ValueError(f"unknown activation {self.activation!r}; known are {known}")
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = nn.Dense(
            self.width,
            dtype=self.dtype,
            param_dtype=param_dtype,
            dot_general=dense_general.dot_general,
            kernel_init=nn.initializers.xavier_uniform(),
            name="dense",
        )(x).astype(param_dtype)
        if self.norm_first:
            x = self._normalised(x, mask, train)
        if self.activation == "prelu":
            slope = self.param("slope", nn.initializers.constant(0.25), (), param_dtype)
            x = jnp.where(x > 0, x, slope * x)
        else:
            x = _ACTIVATIONS[self.activation](x)
        if not self.norm_first:
            x = self._normalised(x, mask, train)
        return nn.Dropout(self.dropout_rate)(x, deterministic=not train)

    def _normalised(self, x: Array, mask: Array, train: bool) -> Array:
        if not self.batch_norm:
            return x
        # With no real row at all the mean would be 0 / 0 and stay NaN in the running statistics.
        counted = jnp.logical_or(mask, ~mask.any())
        norm = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            dtype=x.dtype,
            param_dtype=x.dtype,
            name="norm",
        )
        return norm(x, mask=counted[:, None])


class MLP(nn.Module):
    """Dense layers, one after the other.

    Attributes:
      layers: (width, activation, batch_norm, dropout_rate) of each, as in DenseLayer.
      norm_first: True for BatchNorm before the activations.
      dtype: of the matrix products.

    Source: quality fusion (4th place 2019), whose five nets are lists of such layers.
    """

    layers: tuple[Layer, ...]
    norm_first: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Returns the last layer's output.

        Args:
          x: [B, D] float.
          mask: [B] bool, True for rows that count in the statistics.
          train: as in DenseLayer.

        Returns:
          [B, D'] float32, D' the width of the last layer; x itself without layers.

        Raises:
          ValueError: for a layer that is not four values, or an unknown activation.
        """
        for i, layer in enumerate(self.layers):
            if len(layer) != 4:
                raise ValueError(
                    f"a layer is (width, activation, batch_norm, dropout_rate), got {layer!r}"
                )
            x = DenseLayer(*layer, self.norm_first, self.dtype, name=f"layer_{i}")(
                x, mask, train=train
            )
        return x
