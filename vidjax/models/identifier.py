"""Builds a model from its specification, a plain dict."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax.core import FrozenDict

from vidjax.errors import UserError, check_entry
from vidjax.models.base import Identifier
from vidjax.models.deepmef import DeepMEF
from vidjax.models.dense import CosineIdentifier, DenseIdentifier, NeighbourIdentifier
from vidjax.models.fallback import FallbackIdentifier
from vidjax.models.multimodal import MultimodalIdentifier
from vidjax.models.plda import PLDAIdentifier

# name -> model. To add one, write a file in this folder and add a line here.
MODELS: dict[str, type[Identifier]] = {
    "cosine": CosineIdentifier,
    "deepmef": DeepMEF,
    "dense": DenseIdentifier,
    "fallback": FallbackIdentifier,
    "knn": NeighbourIdentifier,
    "mma": MultimodalIdentifier,
    "plda": PLDAIdentifier,
}


def make_identifier(
    spec: Mapping[str, Any],
    *,
    modalities: Mapping[str, int],
    num_classes: int,
    num_clips: int,
    dtype: str | jnp.dtype = "float32",
) -> Identifier:
    """Builds a model, a hashable `Identifier`.

    Args:
      spec: `name`, a key of MODELS, and attributes of that module. The value of an attribute that
        is a model, as in FallbackIdentifier, is again a specification.
      modalities: name -> feature width.
      num_classes: number of class columns, K.
      num_clips: number of training clips, for models that store them.
      dtype: dtype of the matrix products.

    Raises:
      ValueError: A name or an attribute is unknown, or an attribute is missing.
    """
    options = dict(spec)
    name = options.pop("name", None)
    check_entry("model.name", name, MODELS)
    model = MODELS[name]
    if not issubclass(model, Identifier):
        raise UserError(
            f"model {name!r}: derive its class from vidjax.models.base.Identifier, not nn.Module"
        )
    fields = {field.name: field for field in dataclasses.fields(model)}
    given = {
        "modalities": FrozenDict(modalities),
        "num_classes": num_classes,
        "num_clips": num_clips,
        "dtype": jnp.dtype(dtype),
    }
    fixed = {key: value for key, value in given.items() if key in fields}
    known = fields.keys() - {"parent", "name", *fixed}
    if unknown := sorted(options.keys() - known):
        raise UserError(
            f"model {name!r} has no option {', '.join(unknown)}; choose from "
            f"{', '.join(sorted(known))}"
        )
    _check_sizes(name, options)
    required = {key for key in known if fields[key].default is dataclasses.MISSING}
    if missing := sorted(required - options.keys()):
        raise UserError(f"model {name!r} needs {', '.join(missing)}")
    if not modalities:
        raise UserError(f"model {name!r} needs at least one modality")
    for part, choice in model.parts.items():
        names = options.get(choice) or tuple(modalities)
        if unknown := sorted(set(names) - set(modalities)):
            raise UserError(
                f"{choice} of model {name!r} names {', '.join(unknown)}; configured are "
                f"{', '.join(modalities)}"
            )
        options[part] = make_identifier(
            options[part],
            modalities={key: modalities[key] for key in names},
            num_classes=num_classes,
            num_clips=num_clips,
            dtype=dtype,
        )
    return model(**options, **fixed)


def _check_sizes(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that is a width or a count and is not at least 1."""
    for option, value in options.items():
        sizes = value if isinstance(value, tuple | list) else (value,)
        if not re.fullmatch(r"num_\w+|width|\w+_dims?", option):
            continue
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise UserError(
                f"model {name!r}: {option}={value}: widths and counts are whole numbers from 1 up"
            )
