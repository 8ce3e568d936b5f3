"""Builds a model from its specification, a plain dict."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import jax.numpy as jnp
import msgspec
from flax.core import FrozenDict

from vidjax.core import fusion
from vidjax.models.base import Identifier
from vidjax.models.deepmef import DeepMEF
from vidjax.models.dense import CosineIdentifier, DenseIdentifier, NeighbourIdentifier
from vidjax.models.fallback import FallbackIdentifier
from vidjax.models.multimodal import MultimodalIdentifier
from vidjax.models.plda import PLDAIdentifier
from vidjax.utils.errors import UserError, check_choice, check_entry

# name -> model. To add a model, write a file in this folder and add a line here.
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
    """Builds a model, a hashable linen module, from its specification.

    `spec` is a dict of `name`, a key of MODELS, and attributes of that model. If an attribute is
    itself a model, as in FallbackIdentifier, its value is again a specification. `modalities` is
    name -> feature width. `num_classes` is the number of logits. `num_clips` is the number of
    training clips, for models that store clips.
    """
    options = dict(spec)
    name = options.pop("name", None)
    check_entry("model.name", name, MODELS)
    model = MODELS[name]
    if not issubclass(model, Identifier):
        raise UserError(
            f"model {name!r}: its class is not an Identifier\n"
            "derive the class from vidjax.models.base.Identifier"
        )
    fields = {field.name: field for field in dataclasses.fields(model)}
    given = {
        "modalities": FrozenDict(modalities),
        "num_classes": num_classes,
        "num_clips": num_clips,
        "dtype": jnp.dtype(dtype),
    }
    fixed = {key: value for key, value in given.items() if key in fields}
    known = {
        key: fusion.REQUIRED if field.default is dataclasses.MISSING else field.default
        for key, field in fields.items()
        if key not in ("parent", "name", *fixed)
    }
    fusion.check_options(f"model {name!r}", known, options)
    for key, value in options.items():
        _check_type(f"model {name!r}", key, value, dict if key in model.parts else fields[key].type)
    if not modalities:
        raise UserError(
            f"config.modalities is empty, but model {name!r} needs a modality\n"
            "name one, such as --config.modalities=face"
        )
    for part, choice in model.parts.items():
        names = options.get(choice) or tuple(modalities)
        if unknown := sorted(set(names) - set(modalities)):
            raise UserError(
                f"{choice} of model {name!r} names {', '.join(unknown)}; choose from "
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


def _check_type(model: str, option: str, value: object, kind: Any) -> None:  # noqa: ANN401
    """Raises UserError if the value of an option is not of the type `kind`, or is out of range."""
    if get_origin(kind) is Literal:  # the error of msgspec would not list the possible values
        check_choice(option, value, get_args(kind))
        return
    given = dict(value) if isinstance(value, Mapping) else value

    def skip(*_: object) -> None:
        raise NotImplementedError

    try:
        plain = msgspec.to_builtins(given, enc_hook=lambda x: x.tolist())  # numbers of numpy
        msgspec.convert(plain, kind, dec_hook=skip)
    except msgspec.ValidationError as error:
        raise UserError(f"{model}: {option}={str(value)[:50]}: {error}") from None
    except (AttributeError, TypeError, NotImplementedError):
        pass  # an option of a user's own model may be of a type unknown to msgspec, such as a dtype
