"""TensorFlow's SavedModel; TensorFlow is imported, and set up, by `vidjax.data.records.tensors`.

The folder holds the compiled form of the function, as one operation that XLA inside of TensorFlow
runs: TensorFlow and TF Serving load it, TensorFlow Lite and runtimes without XLA do not. The
weights lie beside it, as variables: as constants of a graph they would be copied dozens of times,
and could not have more than 2 GB.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def write(
    path: Path,
    function: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]],
    weights: Any,
    inputs: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    """Writes a function of weights and named arrays as the folder `path`.

    Args:
      path: a new folder.
      function: weights, inputs -> outputs.
      weights: nested arrays.
      inputs: name -> shape, with symbolic dimensions, and dtype.
    """
    from jax.experimental import jax2tf

    from vidjax.data.records.tensors import tf

    shapes: Any = {name: f"({', '.join(map(str, one.shape))})" for name, one in inputs.items()}
    converted = jax2tf.convert(
        function,
        polymorphic_shapes=[None, shapes],
        with_gradient=False,
        native_serialization_platforms=("cpu", "cuda"),
    )
    given = {
        name: tf.TensorSpec(
            [x if isinstance(x, int) else None for x in one.shape], one.dtype.name, name
        )
        for name, one in inputs.items()
    }
    variables = jax.tree.map(tf.Variable, weights)
    serving: Any = tf.function(lambda **arrays: converted(variables, arrays), autograph=False)
    signature = serving.get_concrete_function(**given)
    module: Any = tf.Module()
    module.weights = jax.tree.leaves(variables)
    tf.saved_model.save(module, str(path), signatures={"serving_default": signature})


def load(path: Path) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Returns the function of the folder `path`, as TensorFlow loads it."""
    from vidjax.data.records.tensors import tf

    loaded = tf.saved_model.load(str(path)).signatures["serving_default"]

    def call(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {name: tf.constant(value) for name, value in inputs.items()}
        return {name: value.numpy() for name, value in loaded(**tensors).items()}

    return call
