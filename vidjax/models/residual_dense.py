"""Residual Dense Net, second place of 2019: a fully connected net with shortcuts."""

import flax.linen as nn
import jax.numpy as jnp

from vidjax.batch import Array
from vidjax.errors import UserError
from vidjax.models.mlp import DenseLayer

_NUM_CONNECTED = 3


class ResidualDenseNet(nn.Module):
    """Dense layers of equal width, with shortcuts between the first three.

    With x the input and f_1, f_2, ... the layers, dropout included:

    - `add`: h_1 = f_1(x), and h_i = h_{i-1} + f_i(h_{i-1}) for i = 2, 3;
    - `concat`: h_1 = f_1(x), h_2 = f_2([x, h_1]), h_3 = f_3([x, h_1, h_2]);
    - `none`, and for i > 3 always: h_i = f_i(h_{i-1}).

    Attributes:
      width: width of every layer.
      num_layers: number of layers, not counting the classifier.
      activation: activation of every layer, as in DenseLayer.
      dropout_rate: dropout rate of every layer.
      shortcut: add | concat | none (the plain net of the same size).
      norm_first: True for BatchNorm before the activations, False for after.
      dtype: dtype of the matrix products.

    Source: Residual Dense Net (2nd place 2019): shortcuts between the first three layers of a deep
    fully connected net, BatchNorm, dropout. The article leaves everything else open; ours is
    everything else. No shortcut bypasses the first layer, since input and output widths differ.
    """

    width: int = 4096
    num_layers: int = 3
    activation: str = "relu"
    dropout_rate: float = 0.5
    shortcut: str = "add"
    norm_first: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """Returns the last layer's output.

        Args:
          x: [B, D] float.
          mask: [B] bool, True for rows that count in the batch statistics.
          train: True for training, see DenseLayer.

        Returns:
          [B, width] float32.

        Raises:
          ValueError: The shortcut or the activation is unknown, or there is no layer.
        """
        if self.shortcut not in ("add", "concat", "none"):
            raise UserError(f"unknown shortcut {self.shortcut!r}; choose from add, concat, none")
        if self.num_layers < 1:
            raise UserError(
                f"ResidualDenseNet needs num_layers of 1 or more, got {self.num_layers}"
            )
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
                norm_first=self.norm_first,
                dtype=self.dtype,
                name=f"layer_{i}",
            )(x, mask, train=train)
            x = x + new if connected and self.shortcut == "add" else new
            seen.append(new)
        return x
