"""A configuration as values: its type, its fields, and overrides from the command line."""

import ast
import copy
import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

from ml_collections import ConfigDict

from vidjax.errors import UserError
from vidjax.files import INTEGER_LIMIT
from vidjax.suggest import closest

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
# What other programs call a field -> its name here.
SYNONYMS: Mapping[str, str] = {
    "lr": "optim.learning_rate",
    "base_lr": "optim.learning_rate",
    "wd": "optim.weight_decay",
    "optimizer": "optim.name",
    "scheduler": "optim.decay",
    "warmup_steps": "optim.warmup",
    "grad_clip": "optim.clip_norm",
    "epochs": "num_epochs",
    "max_epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "steps": "num_epochs",
    "max_steps": "num_epochs",
    "bs": "batch_size",
    "batch": "batch_size",
    "precision": "dtype",
    "data": "data.dir",
    "data_dir": "data.dir",
    "data_path": "data.dir",
    "dataset": "data.name",
    "root": "data.dir",
    "input": "data.dir",
    "cache": "data.cache_dir",
    "split": "eval.split",
    "arch": "model.name",
    "model": "model.name",
    "dropout": "model.dropout_rate",
    "criterion": "loss.classification",
    "folds": "ensemble.folds",
    "seeds": "ensemble.seeds",
    "save_every": "checkpoint_every_seconds",
    "log_every": "log_every_steps",
    "eval_every": "eval.every_epochs",
    "frames": "data.max_frames",
}
NAME_LENGTH = 100  # characters of `folder_suffix`, at most


class Config(Protocol):
    """A ConfigDict as a type checker sees it: any attribute, of any type."""

    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: Any, /) -> None: ...

    def __getitem__(self, name: str) -> Any: ...

    def __setitem__(self, name: str, value: Any) -> None: ...

    def __iter__(self) -> Iterator[str]: ...


class ShortConfig(ConfigDict):
    """A ConfigDict that a notebook shows as the lines of its values."""

    __repr__ = ConfigDict.__str__


def fields(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every leaf of a configuration."""
    for key in config:
        # A reference shows the value of a field that may be unset; None itself has no reference.
        plain = config.get_type(key) in (ConfigDict, type(None))
        value = config[key] if plain else config.get_ref(key).get()
        if isinstance(value, ConfigDict):
            yield from fields(cast(Config, value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def override_names(overrides: Sequence[str]) -> list[str]:
    """Returns the dotted names of the fields that command-line words override."""
    return [word.removeprefix("--config.").partition("=")[0] for word in overrides]


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Returns a copy of a configuration with `--config.a.b=value` applied to it.

    Args:
      config: the configuration; its values fix the types.
      overrides: command-line words, each beginning with `--config.`; a tuple may be written
        `face,head` or as a Python tuple. Of two words for one field the last one counts.

    Raises:
      ValueError: a field that does not exist, or a value of another type.
    """
    config = copy.deepcopy(config)  # ConfigDict(config) would share its nested fields
    known = dict(fields(config))
    for word in overrides:
        if not isinstance(word, str) or not word.startswith("--config."):
            meant = f": did you mean '--{word}'?" if str(word).startswith("config.") else ""
            raise UserError(f"{word!r}: a field is set by '--config.FIELD=VALUE'{meant}")
        name, equals, text = word.removeprefix("--config.").partition("=")
        if name not in known:
            match = closest_field(name, known)
            hint = f"did you mean --config.{match}?" if match else "--mode=config lists them"
            raise UserError(f"no field config.{name}: {hint}")
        if not equals:
            raise UserError(f"--config.{name} needs a value: --config.{name}=...")
        group, _, leaf = name.rpartition(".")
        parent = config[group] if group else config
        try:
            parent[leaf] = convert(text, parent.get_type(leaf), known[name])
        except ValueError as error:
            raise UserError(f"--config.{name}={text}: wants {error}") from error
    return config


def closest_field(name: str, known: Collection[str]) -> str | None:
    """Returns the field that a wrong name was meant to be, None if there is no such field.

    Args:
      name: a dotted name; `-` counts as `_`.
      known: the fields that exist.
    """
    name = name.replace("-", "_").lower()
    leaf = name.rpartition(".")[2]
    synonym = SYNONYMS.get(name) or SYNONYMS.get(leaf)
    if name not in known and synonym in known:
        return synonym
    modalities = {field.split(".")[1] for field in known if field.startswith("fusion.")}
    if name.startswith("fusion.") and name.split(".")[1] not in modalities:
        return None  # another modality is no misspelling of this one
    return closest(name, known, cutoff=0.55)


def folder_suffix(config: Config, overrides: Sequence[str], without: Collection[str] = ()) -> str:
    """Returns the end of a run's folder name that tells its overrides, such as `_seed=1`.

    Args:
      config: the configuration with the overrides.
      overrides: command-line words.
      without: fields that are left out.

    Returns:
      `_FIELD=VALUE` for every field, sorted; empty without any. It has letters, digits and `._=+-`
      alone. A digest ends it where characters had to be replaced, or where it would be too long.
    """
    values = dict(fields(config))
    parts = []
    for name in sorted({*override_names(overrides)} - {*without}):
        value = values[name]
        is_names = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        parts.append(f"_{name}={'+'.join(value) if is_names else value}")
    exact = "".join(parts)
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "-", exact)
    if safe == exact and len(exact) <= NAME_LENGTH:
        return exact
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{safe[: NAME_LENGTH - 9].rstrip('-')}-{digest}"


def convert(text: str, kind: type, example: Any) -> Any:
    """Returns the value that a command-line word gives to a field.

    Args:
      text: what follows the equals sign.
      kind: type of the field.
      example: value of the field so far.

    Raises:
      ValueError: the text is no value of that type; the error says what is wanted.
    """
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise UserError("true or false")
        return BOOLEANS[text.lower()]
    if kind is tuple:
        value = _convert_tuple(text)
        names = bool(example) and isinstance(example[0], str)
        if names and not all(isinstance(item, str) for item in value):
            raise UserError(f"names such as {','.join(example)}")
        return value
    try:
        value = kind(text)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(value, int) and abs(value) >= INTEGER_LIMIT:
        raise UserError("a whole number that 64 bits hold")
    if math.isnan(value):
        raise UserError(f"a{' whole' if kind is int else ''} number such as {example}")
    return value


def _convert_tuple(text: str) -> tuple[Any, ...]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = tuple(word.strip() for word in text.split(",") if word.strip())
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
