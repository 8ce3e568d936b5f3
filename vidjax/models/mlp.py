"""Fully connected nets: plain ones, residual blocks, and Residual Dense Net."""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vidjax.batch import Array
from vidjax.errors import UserError, check_choice
from vidjax.models.layers import Dropout, Linear, batch_norm

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "swish": jax.nn.silu,
}

# (width, activation, batch_norm, dropout_rate)
Layer = tuple[int, str, bool, float]
KAIMING = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class DenseLayer(nn.Module):
    """A linear layer, an activation, BatchNorm, and dropout.

    Attributes:
      activation: linear | relu | sigmoid | swish | prelu, whose one slope starts at 0.25 (PyTorch).
      norm_first: True for BatchNorm before the activation, False for after.
      dtype: dtype of the matrix product; parameters and everything else are at least float32.
      kernel_init: first weights, by default Xavier-uniform.

    Source: quality fusion (4th place 2019): BatchNorm after the activation (its authors report that
    BatchNorm before it is worse), Xavier-uniform weights, biases of 0. Ours: masks; BatchNorm
    momentum 0.9.
    """

    width: int
    activation: str = "relu"
    batch_norm: bool = True
    dropout_rate: float = 0.0
    norm_first: bool = False
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Returns the layer's output, [B, width] float32.

        Args:
          x: [B, D] float.
          mask: [B] bool, True for rows that count in the batch statistics.
          train: True to apply dropout (rng `dropout`), and to normalise by the batch statistics and
            update the running ones in `batch_stats`, which must be mutable.
        """
        check_choice("activation", self.activation, sorted([*_ACTIVATIONS, "prelu"]))
        param_dtype = jnp.promote_types(self.dtype, jnp.float32)
        x = Linear(self.width, dtype=self.dtype, kernel_init=self.kernel_init, name="dense")(x)
        if self.batch_norm and self.norm_first:
            x = batch_norm(x, mask, train=train)
        if self.activation == "prelu":
            slope = self.param("slope", nn.initializers.constant(0.25), (), param_dtype)
            x = jnp.where(x > 0, x, slope * x)
        else:
            x = _ACTIVATIONS[self.activation](x)
        if self.batch_norm and not self.norm_first:
            x = batch_norm(x, mask, train=train)
        return Dropout(self.dropout_rate)(x, deterministic=not train)


class ResidualBlock(nn.Module):
    """Two dense layers with a shortcut: x + f(x).

    f is Linear-BatchNorm-PReLU-dropout, then Linear-BatchNorm-PReLU back to the width of x. The
    first layer has the width `hidden_dim`, or twice that of x if 0.

    Source: DeepMEF (3rd place 2019), authors' code, whose nets all end in this block; normal
    weights of Kaiming (He et al. 2015), biases of 0. Ours: masks.
    """

    hidden_dim: int = 0
    dropout_rate: float = 0.5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Returns x + f(x), [B, D] float32, for arguments as in DenseLayer."""
        hidden_dim = self.hidden_dim or 2 * x.shape[-1]
        layer = functools.partial(
            DenseLayer, norm_first=True, dtype=self.dtype, kernel_init=KAIMING
        )
        hidden = layer(hidden_dim, "prelu", True, self.dropout_rate, name="hidden")(
            x, mask, train=train
        )
        back = layer(x.shape[-1], "prelu", name="back")
        return x + back(hidden, mask, train=train)


class MLP(nn.Module):
    """A sequence of dense layers.

    Source: quality fusion (4th place 2019), whose five nets are such sequences.
    """

    layers: tuple[Layer, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Returns the last layer's output, [B, D'] float32; x itself if there are no layers."""
        for i, layer in enumerate(self.layers):
            _check_layer(layer)
            x = DenseLayer(*layer, dtype=self.dtype, name=f"layer_{i}")(x, mask, train=train)
        return x


def _check_layer(layer: object) -> None:
    """Raises ValueError unless a layer has its four values, each in its range."""
    if not isinstance(layer, tuple) or len(layer) != 4:
        raise UserError(f"a layer is (width, activation, batch_norm, dropout_rate), got {layer!r}")
    width, _, _, dropout_rate = layer
    if not isinstance(width, int) or width < 1:
        raise UserError(f"the width of a layer must be a whole number of 1 or more, got {width!r}")
    if not isinstance(dropout_rate, (int, float)) or not 0 <= dropout_rate <= 1:
        raise UserError(f"the dropout rate of a layer must be 0 to 1, got {dropout_rate!r}")


_NUM_CONNECTED = 3


class ResidualDenseNet(nn.Module):
    """Dense layers of equal width, with shortcuts between the first three.

    With x the input and f_1, f_2, ... the layers, dropout included:

    - `add`: h_1 = f_1(x), and h_i = h_{i-1} + f_i(h_{i-1}) for i = 2, 3;
    - `concat`: h_1 = f_1(x), h_2 = f_2([x, h_1]), h_3 = f_3([x, h_1, h_2]);
    - `none`, and for i > 3 always: h_i = f_i(h_{i-1}).

    Attributes:
      num_layers: number of layers, not counting the classifier.
      activation: activation of every layer, as in DenseLayer.
      shortcut: add | concat | none (the plain net of the same size).
      gate: True to multiply the output y of each layer by sigmoid(W y + b), number by number.

    Source: Residual Dense Net (2nd place 2019): shortcuts between the first three layers of a deep
    fully connected net, BatchNorm, dropout; attention with sigmoid branches as future work. All
    else is ours; the article leaves it open. No shortcut bypasses the first layer, since input and
    output widths differ. The weights of a gate start at 0.
    """

    width: int = 4096
    num_layers: int = 3
    activation: str = "relu"
    dropout_rate: float = 0.5
    shortcut: Literal["add", "concat", "none"] = "add"
    gate: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Returns the last layer's output, [B, width] float32, for arguments as in DenseLayer."""
        seen = [x]
        for i in range(self.num_layers):
            connected = 0 < i < _NUM_CONNECTED
            if connected and self.shortcut == "concat":
                x = jnp.concatenate(seen, axis=-1)  # [B, D + i width]
            new = DenseLayer(
                self.width,
                self.activation,
                batch_norm=True,
                dropout_rate=self.dropout_rate,
                dtype=self.dtype,
                name=f"layer_{i}",
            )(x, mask, train=train)
            if self.gate:
                branch = Linear(
                    self.width,
                    dtype=self.dtype,
                    kernel_init=nn.initializers.zeros,
                    name=f"gate_{i}",
                )
                new = new * jax.nn.sigmoid(branch(new))
            x = x + new if connected and self.shortcut == "add" else new
            seen.append(new)
        return x
