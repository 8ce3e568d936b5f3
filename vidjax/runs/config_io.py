"""Reads and writes configurations: files of experiments, overrides, JSON."""

import ast
import copy
import hashlib
import importlib.util
import json
import math
import re
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vidjax.runs import config as config_lib
from vidjax.utils import files
from vidjax.runs.config import (DEFAULTS, Config, fields, hint_of_field)
from vidjax.utils.errors import UserError, suggest
from vidjax.utils.files import INTEGER_LIMIT

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
NAME_LENGTH = 100  # characters of `folder_suffix`, at most


def load_file(spec: str) -> Config:
    """Returns the configuration that an experiment's file describes; an error names its line.

    The file may add functions and classes to the tables of vidjax, such as `optim.OPTIMIZERS`.

    Args:
      spec: `FILE` or `FILE:ARG,ARG`. FILE is a Python file with a function `get_config(args: str)`,
        or a name: `mma` is `configs/mma.py` in the working directory, else the file installed with
        vidjax.
    """
    name, _, args = spec.partition(":")
    path = find_file(name)
    try:
        module = load_module(path)
        config = module.get_config(args)
    except UserError:
        raise
    except Exception as error:  # the file is the user's own program
        raise UserError(f"--config: {_place(path, error)}: {_description(error)}") from error
    except SystemExit as error:
        raise UserError(
            f"--config: '{path}' ended the program: sys.exit({error.code!r})"
        ) from error
    if not hasattr(config, "to_dict"):
        raise UserError(
            f"--config: get_config of '{spec}' returns no ConfigDict\n"
            "begin it with config = vidjax.runs.config.default(), and return config"
        )
    values = dict(fields(config))
    for name, default in DEFAULTS.items():
        kinds = {type(None): (str, type(None)), float: (float, int)}.get(type(default))
        if name in values and isinstance(values[name], kinds or type(default)):
            continue
        wrong = f"has no field config.{name}"
        if name in values:
            wrong = f"has config.{name}={values[name]!r}, wanted a value such as {default!r}"
        raise UserError(
            f"--config: '{spec}' {wrong}\n"
            "begin get_config with config = vidjax.runs.config.default(), and change that"
        )
    return config


def find_file(name: str) -> Path:
    """Returns the path of an experiment's file, from a path or from a name such as `mma`."""
    path, known = Path(name), dict[str, Path]()
    if path.is_file():
        return path
    for folder in (shipped_folder(), Path("configs")):  # a file of the working directory counts
        known |= {file.stem: file for file in folder.glob("*.py")}
    if name in known:
        return known[name]
    raise UserError(f"--config: no such file '{name}'\n{suggest(path.stem, sorted(known))}")


def shipped_folder() -> Path:
    """Returns the folder of the experiments that come with vidjax, installed or in a checkout."""
    spec = importlib.util.find_spec("vidjax.configs")
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).parents[2] / "configs"


def load_module(path: Path) -> ModuleType:
    """Executes an experiment's file and returns it as a module with a function `get_config`."""
    spec = importlib.util.spec_from_file_location(f"vidjax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: '{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config: '{path}' has no function get_config")
    return module


def _place(path: Path, error: Exception) -> str:
    if isinstance(error, SyntaxError):
        line = error.lineno
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = [None, *(f.lineno for f in frames if f.filename == str(path.absolute()))][-1]
    return f"'{path}' line {line}" if line else f"'{path}'"


def _description(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    if isinstance(error, TypeError) and text.startswith("get_config() takes 0"):
        text += '\nit takes what follows the colon of --config=FILE:ARGS: def get_config(args="")'
    if isinstance(error, AttributeError | KeyError) and re.fullmatch(r"[\"']+\w+[\"']+", text):
        name = text.strip("\"'")  # of ml_collections, which says no more
        text = f"there is no field '{name}' to change\nset it first: GROUP.{name} = ConfigDict(...)"
    return f"{type(error).__name__}: {text}"


def override_names(overrides: Sequence[str]) -> list[str]:
    """Returns the dotted names of the fields that command-line words override."""
    return [word.removeprefix("--config.").partition("=")[0] for word in overrides]


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Returns a copy of a configuration with `--config.a.b=value` applied to it.

    The values of the configuration fix the types. A tuple may be written `face,head` or as in
    Python. Of two words for one field the last one counts.
    """
    config = copy.deepcopy(config)  # ConfigDict(config) would share its nested fields
    known = dict(fields(config))
    for word in overrides:
        if not isinstance(word, str) or not word.startswith("--config."):
            meant = f": did you mean '--{word}'?" if str(word).startswith("config.") else ""
            raise UserError(f"{word!r}: a field is set by '--config.FIELD=VALUE'{meant}")
        name, equals, text = word.removeprefix("--config.").partition("=")
        if name not in known:
            raise UserError(f"no field config.{name}: {hint_of_field(name, known)}")
        if not equals:
            raise UserError(f"--config.{name} needs a value: --config.{name}=...")
        group, _, leaf = name.rpartition(".")
        parent = config[group] if group else config
        try:
            parent[leaf] = convert(text, parent.get_type(leaf), known[name])
        except ValueError as error:
            raise UserError(f"--config.{name}={text}: wants {error}") from error
    return config


def folder_suffix(config: Config, overrides: Sequence[str], without: Collection[str] = ()) -> str:
    """Returns the end of a run's folder name that tells its overrides, such as `_seed=1`.

    Fields are sorted, those of `without` left out. The name has letters, digits and `._=+-` alone;
    it ends in a digest if characters were replaced or it was too long.
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
    """Returns the text of an override as a `kind`, the type of its field.

    `example` is the field's value so far. ValueError says only what is wanted: `true or false`.
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


def value_text(value: object) -> str:
    """Returns a value as the command line takes it; `unset` for None, `empty` for () and ''."""
    if value is None:
        return "unset"
    if value in ((), ""):
        return "empty"
    if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return str(value)


def to_json(config: Config) -> str:
    """Returns a configuration as JSON text, with sorted keys."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str | bytes) -> Config:
    """Returns the configuration that `to_json` wrote, with tuples and unset fields as they were."""
    config, values = config_lib.default(), files.parse_json(text)
    if not isinstance(values, dict):
        raise UserError("it is not a JSON object")
    try:
        with config.unlocked():
            config.update(_with_tuples(values))
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(" ".join(str(error).split())[:300]) from error
    return config


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def load_workdir(workdir: Path) -> Config:
    """Returns a run's configuration; unsets its cache, where a stranger may have put programs."""
    path = workdir / "config.json"
    try:
        content = files.read_bytes(path, files.CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no run in '{workdir}' (no config.json)") from None
    try:
        config = from_json(content)
    except ValueError as error:
        raise UserError(
            f"'{path}' is damaged: {error}\nput back a copy of it, or train anew in another folder"
        ) from error
    config.data.cache_dir = None
    return config
