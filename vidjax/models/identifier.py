"""Chooses a system's model from a plain dict."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict

from vidjax.models.deepmef import DeepMEF
from vidjax.models.dense import DenseIdentifier
from vidjax.models.fallback import FallbackIdentifier
from vidjax.models.multimodal import MultimodalIdentifier
from vidjax.models.neighbours import NeighbourIdentifier

# A system of one's own: a module of its own file here, and one line.
_SYSTEMS: dict[str, Any] = {
    "deepmef": DeepMEF,
    "dense": DenseIdentifier,
    "fallback": FallbackIdentifier,
    "knn": NeighbourIdentifier,
    "mma": MultimodalIdentifier,
}


def make_identifier(
    spec: Mapping,
    *,
    modalities: Mapping[str, int],
    num_classes: int,
    num_clips: int,
    dtype: Any = "float32",
) -> nn.Module:
    """Returns the model that a plain dict names.

    Args:
      spec: `name`, one of the systems above, and attributes of its module. A field that is a model
        itself (those of FallbackIdentifier) is a spec of this form again.
      modalities: name -> feature width.
      num_classes: class columns, 1 + C.
      num_clips: training clips, for models that remember them.
      dtype: of the matrix products.

    Returns:
      A hashable module called as (frames, *, clip_index, labels, batch_mask, train) that gives
      logits [B, 1 + C] or Branches. Its attribute `logit_scale` says what they are multiples of: 1,
      or the factor on the cosines.

    Raises:
      ValueError: for an unknown name, attribute, modality or dtype, or a missing attribute.
    """
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"unknown dtype {dtype!r}") from error
    options = dict(spec)
    name = options.pop("name", None)
    if name not in _SYSTEMS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(sorted(_SYSTEMS))}")
    system = _SYSTEMS[name]
    fields = {field.name: field for field in dataclasses.fields(system)}
    given = {
        "modalities": FrozenDict(modalities),
        "num_classes": num_classes,
        "num_clips": num_clips,
        "dtype": dtype,
    }
    fixed = {key: value for key, value in given.items() if key in fields}
    known = fields.keys() - {"parent", "name", *fixed}
    if unknown := sorted(options.keys() - known):
        raise ValueError(
            f"model {name!r} has no option {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}"
        )
    required = {key for key in known if fields[key].default is dataclasses.MISSING}
    if missing := sorted(required - options.keys()):
        raise ValueError(f"model {name!r} needs {', '.join(missing)}")
    if not modalities:
        raise ValueError(f"model {name!r} needs at least one modality")
    for part, choice in getattr(system, "parts", {}).items():
        names = options.get(choice) or tuple(modalities)
        if strange := sorted(set(names) - set(modalities)):
            raise ValueError(
                f"{choice} of model {name!r} names {', '.join(strange)}; configured are "
                f"{', '.join(modalities)}"
            )
        options[part] = make_identifier(
            options[part],
            modalities={key: modalities[key] for key in names},
            num_classes=num_classes,
            num_clips=num_clips,
            dtype=dtype,
        )
    return system(**options, **fixed)
