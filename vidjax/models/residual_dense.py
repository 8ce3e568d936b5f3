"""The fully connected net with shortcuts of the second place of 2019."""

import flax.linen as nn
import jax.numpy as jnp

from vidjax.batch import Array
from vidjax.models.mlp import DenseLayer

_NUM_CONNECTED = 3


class ResidualDenseNet(nn.Module):
    """Dense layers of one width, with shortcuts among the first three.

    With f_1, f_2, ... for the layers, dropout included, and x for the input:
    `add` is h_1 = f_1(x), h_i = h_{i-1} + f_i(h_{i-1}) for i = 2, 3;
    `concat` is h_1 = f_1(x), h_2 = f_2([x, h_1]), h_3 = f_3([x, h_1, h_2]);
    from the fourth on, and everywhere with `none`, h_i = f_i(h_{i-1}).

    Attributes:
      width: of every layer.
      num_layers: how many, without the classifier.
      activation: as in DenseLayer.
      dropout_rate: of every layer.
      shortcut: add | concat | none (the plain net of the same size).
      norm_first: True for BatchNorm before the activations.
      dtype: of the matrix products.

    Source: Residual Dense Net (2nd place 2019): shortcuts among the first three layers of a deep
    fully connected net, BatchNorm, dropout. Open there, and ours: everything else. The first layer
    has no shortcut around it, as input and width differ.
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
          mask: [B] bool, True for rows that count in the statistics.
          train: as in DenseLayer.

        Returns:
          [B, width] float32.

        Raises:
          ValueError: for an unknown shortcut or activation, or no layer.
        """
        if self.shortcut not in ("add", "concat", "none"):
            raise ValueError(f"unknown shortcut {self.shortcut!r}; known are add, concat, none")
        if self.num_layers < 1:
            raise ValueError(f"ResidualDenseNet needs a layer, got num_layers={self.num_layers}")
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
