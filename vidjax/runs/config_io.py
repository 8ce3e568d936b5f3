"""Loads configurations from Python files, applies flags to them, and converts them to JSON."""

import ast
import copy
import hashlib
import importlib.util
import json
import math
import re
import traceback
from collections.abc import Collection, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from vidjax.runs import config as config_lib
from vidjax.runs.config import DEFAULTS, Config, fields, suggest_field
from vidjax.utils import files
from vidjax.utils.errors import UserError, suggest
from vidjax.utils.files import INTEGER_LIMIT

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
MAX_SUFFIX_LENGTH = 100  # characters of `folder_suffix`
# All that most files of vidjax define; from Python 3.14 on, `__annotate__` computes annotations.
SHIPPED_FUNCTIONS = {"get_config", "follow", "__annotate__"}
own_files: list[str] = []  # configuration files that were executed and may contain code of a user


def load_file(spec: str) -> Config:
    """Executes a Python file, and returns the configuration that its `get_config(args)` makes.

    `spec` is `FILE` or `FILE:ARG,ARG`, where FILE is a path or a name. For example, the name `mma`
    means `configs/mma.py` in the working directory. If there is no such file, the name means the
    file in vidjax. The file may also register functions, such as in the dict `optim.OPTIMIZERS`.
    """
    name, _, args = spec.partition(":")
    path = find_file(spec if args.startswith("//") else name)
    try:
        module = load_module(path)
        config = module.get_config(args)
    except UserError:
        raise
    except Exception as error:  # the file is a program of the user
        raise UserError(f"--config: {_locate(path, error)}: {_describe(error)}") from error
    except SystemExit as error:
        raise UserError(
            f"--config: '{path}' calls sys.exit({error.code!r}), which would end vidjax\n"
            "remove this call from the file"
        ) from error
    if not hasattr(config, "to_dict"):
        raise UserError(
            f"--config: get_config of '{spec}' does not return a ConfigDict\n"
            "begin get_config with config = vidjax.runs.config.default(), and return config"
        )
    if problem := _find_wrong_type(dict(fields(config))):
        raise UserError(
            f"--config: '{spec}' {problem}\n"
            "begin get_config with config = vidjax.runs.config.default(), and change only values"
        )
    return config


def load_system(config: Config, spec: str, *, final: bool) -> Config:
    """Returns the configuration with which one system of a blend is trained.

    `spec`, an item of `config.join.systems`, is a configuration with arguments: `cosine:face` is
    `configs/cosine.py` with the argument `face`. The seed, and all values of `data` that are not
    defaults, are taken from `config`, the configuration of the blend. If `final` is True, the
    system is trained on all clips, otherwise in the folds of `config` (cross-validation).
    """
    if not spec.partition(":")[0].isidentifier():  # a received run must not execute any file
        raise UserError(
            f"config.join.systems: '{spec}' is not the name of a configuration\n"
            "write the NAME of a file configs/NAME.py, and its arguments, such as cosine:face"
        )
    own = load_file(spec)
    for name, value in config.data.items():
        if value != DEFAULTS[f"data.{name}"]:
            own.data[name] = value
    own.seed = config.seed
    own.ensemble.folds = 0 if final else config.ensemble.folds
    own.ensemble.only = () if final else config.ensemble.only
    own.ensemble.seeds = own.ensemble.seeds if final else 1  # more nets hardly change the blend
    own.eval.report = False
    return own


def _find_wrong_type(values: Mapping[str, Any]) -> str:
    """Returns a phrase such as "has no field config.seed", or "" if no field is wrong.

    `values` is dotted name -> value, such as "data.dir" -> "/films". The phrase is about the first
    field that is missing or has a wrong type.
    """
    for name, default in DEFAULTS.items():
        kinds = {type(None): (str, type(None)), float: (float, int)}.get(type(default))
        if name not in values:
            return f"has no field config.{name}"
        if not isinstance(values[name], kinds or type(default)):
            return f"has config.{name}={values[name]!r}, not a value such as {default!r}"
    return ""


def find_file(name: str) -> Path:
    """Returns the path of a configuration file, given its path or a name such as `mma`.

    Raises UserError if there is no such file.
    """
    path, known = files.local(name), dict[str, Path]()
    if path.is_file():
        return path
    for folder in (shipped_folder(), Path("configs")):  # the working directory takes precedence
        known |= {file.stem: file for file in folder.glob("*.py")}
    if name in known:
        return known[name]
    problem = "is a folder, not a file" if path.is_dir() else "does not exist"
    saved = path / "config.json"  # of a run
    remedy = f"did you mean '{saved}'?" if saved.is_file() else suggest(path.stem, sorted(known))
    raise UserError(f"--config: '{name}' {problem}\n{remedy}")


def shipped_folder() -> Path:
    """Returns the folder of the configurations that come with vidjax."""
    spec = importlib.util.find_spec("vidjax.configs")
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).parents[2] / "configs"


class _Loader(SourceFileLoader):
    """Loads a Python file from its source, never from cached bytecode."""

    # Python would also use bytecode of an older file, if the two are of the same second.
    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_module(path: Path) -> ModuleType:
    """Executes a configuration file. Raises UserError if it has no function `get_config`."""
    if path.name == "config.json":
        raise UserError(f"--config: '{path}' takes no arguments: remove the text after the colon")
    if path.suffix != ".py":
        raise UserError(f"--config: '{path}' is not a Python file: give a file NAME.py")
    module = execute(path)
    if not hasattr(module, "get_config"):
        raise UserError(
            f"--config: '{path}' has no function get_config\n"
            "define a function get_config(args) that returns a configuration"
        )
    return module


def execute(path: Path) -> ModuleType:
    """Executes a configuration file, and returns it as a module."""
    loader = _Loader(f"vidjax_config_{path.stem}", str(path.absolute()))
    module = ModuleType(loader.name)
    module.__file__ = loader.path
    # In a checkout, the folder of the shipped files may also contain files of the user.
    names = {x.co_name for x in loader.get_code(loader.name).co_consts if isinstance(x, CodeType)}
    if names - SHIPPED_FUNCTIONS or not Path(loader.path).is_relative_to(shipped_folder()):
        own_files.append(loader.path)
    loader.exec_module(module)
    return module


def _locate(path: Path, error: Exception) -> str:
    if isinstance(error, SyntaxError):
        line = error.lineno
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = [None, *(f.lineno for f in frames if f.filename == str(path.absolute()))][-1]
    return f"'{path}' line {line}" if line else f"'{path}'"


def _describe(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    if isinstance(error, TypeError) and text.startswith("get_config() takes 0"):
        text += '\ngive it an argument for ARGS of --config=FILE:ARGS: def get_config(args="")'
    if isinstance(error, AttributeError | KeyError) and re.fullmatch(r"[\"']+\w+[\"']+", text):
        name = text.strip("\"'")  # the error of ml_collections has only the name
        text = f"there is no field '{name}' to change\nset it first: GROUP.{name} = {{...}}"
    return f"{type(error).__name__}: {text}"


def override_names(overrides: Sequence[str]) -> list[str]:
    """Returns the name of the field that each word, such as `--config.seed=1`, overrides."""
    return [word.removeprefix("--config.").partition("=")[0] for word in overrides]


def check_overridden(overrides: Sequence[str], readable: Collection[str], command: str) -> set[str]:
    """Returns the names of the fields that the words `overrides` (--config.FIELD=VALUE) set.

    Raises UserError for a field that is not in `readable`, because the command `command` would
    ignore the field.
    """
    names = {*override_names(overrides)}
    for name in sorted(names.difference(readable)):
        raise UserError(
            f"config.{name} has no effect, because {command} does not read it\n"
            f"choose from {', '.join(f'--config.{name}' for name in readable)}"
        )
    return names


def refuse_training_fields(overrides: Sequence[str]) -> None:
    """Raises UserError if a word `--config.FIELD=VALUE` sets a field that only training reads."""
    for name in filter(config_lib.is_of_training, override_names(overrides)):
        raise UserError(
            f"config.{name} has no effect, because evaluate does not train\n"
            f"leave out --config.{name}"
        )


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Returns a copy of a configuration with changed fields.

    Each word of `overrides` is a `--config.FIELD=VALUE`. The value is converted to the type of the
    field. A tuple may be written `face,head` or as in Python. If two words set the same field, the
    last word counts. Raises UserError if there is no such field, or the value does not fit.
    """
    config = copy.deepcopy(config)  # ConfigDict(config) would share its nested fields
    known = dict(fields(config))
    for word in overrides:
        if not isinstance(word, str) or not word.startswith("--config."):
            hint = f", such as '--{word}'" if str(word).startswith("config.") else ""
            raise UserError(f"{word!r} sets no field: write '--config.FIELD=VALUE'{hint}")
        name, equals, text = word.removeprefix("--config.").partition("=")
        if name not in known:
            raise UserError(f"there is no field config.{name}: {suggest_field(name, known)}")
        if not equals:
            raise UserError(f"--config.{name} needs a value: --config.{name}=...")
        group, _, leaf = name.rpartition(".")
        parent = config[group] if group else config
        try:
            parent[leaf] = convert(text, parent.get_type(leaf), known[name])
        except ValueError as error:
            raise UserError(f"--config.{name}={text}: {error}") from error
    return config


def folder_suffix(config: Config, overrides: Sequence[str], without: Collection[str] = ()) -> str:
    """Returns the overridden fields as the end of a folder name, such as `_seed=1`.

    `overrides` are words such as `--config.seed=1`. `config` is the configuration after the
    overrides. Fields in `without` are left out. Characters that are unusual in a file name become
    `-`. If a character changed, or the text has more than 100 characters, the text is cut to 91
    characters and a digest is added.
    """
    values = dict(fields(config))
    parts = []
    for name in sorted({*override_names(overrides)} - {*without}):
        value = values[name]
        has_names = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        parts.append(f"_{name}={'+'.join(value) if has_names else value}")
    exact = "".join(parts)
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "-", exact)
    if safe == exact and len(exact) <= MAX_SUFFIX_LENGTH:
        return exact
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{safe[: MAX_SUFFIX_LENGTH - 9].rstrip('-')}-{digest}"


def convert(text: str, kind: type, example: Any) -> Any:
    """Converts the text of a flag `--config.FIELD=TEXT` to a value of the type `kind`.

    `example` is the old value of the field, which messages show. If the text does not fit, raises
    UserError. The message describes the valid values, such as `must be true or false`.
    """
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise UserError("must be true or false")
        return BOOLEANS[text.lower()]
    if kind is type(None):  # an argument of a model or a fusion that a file sets to None
        return _parse(text)
    if kind in (tuple, list):
        value = _parse(text)
        if value == text:
            value = tuple(word.strip() for word in text.split(",") if word.strip())
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        names = bool(example) and isinstance(example[0], str)
        if names and not all(isinstance(item, str) for item in value):
            raise UserError(f"must be names separated by commas, such as {','.join(example)}")
        return kind(value)
    try:
        value = kind(text)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(value, int) and abs(value) >= INTEGER_LIMIT:
        raise UserError("must be a whole number that fits into 64 bits")
    if math.isnan(value):
        example = kind(1) if example is None else example
        raise UserError(f"must be a{' whole' if kind is int else ''} number such as {example}")
    return value


def _parse(text: str) -> Any:
    """Reads a text as a Python literal, such as `(1, 2)`. Other text is returned unchanged."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def value_text(value: object) -> str:
    """Formats a value for a reader: a tuple as `face,head`, None as `unset`, () as `empty`."""
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
    """Reads a configuration from the JSON text that `to_json` wrote. Lists become tuples.

    Raises UserError if a field is missing or has a wrong type.
    """
    config, values = config_lib.default(), files.parse_json(text)
    if not isinstance(values, dict):
        raise UserError("the configuration is not a JSON object")
    try:
        with config.unlocked():
            config.update(config_lib.to_tuples(values))
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(" ".join(str(error).split())[:300]) from error
    if problem := _find_wrong_type(dict(fields(config))):
        raise UserError(f"the configuration {problem[:300]}")
    return config


def load_workdir(workdir: Path) -> Config:
    """Reads `config.json` in the folder of a run. `data.cache_dir` becomes None.

    Raises UserError if the file is missing or damaged.
    """
    path = workdir / "config.json"
    try:
        content = files.read_bytes(path, files.CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no run in '{workdir}': it has no config.json\ngive the folder of a run"
        ) from None
    try:
        config = from_json(content)
    except ValueError as error:
        raise UserError(
            f"'{path}' is damaged: {error}\n"
            "restore it from a copy, or train again in another folder: --workdir=FOLDER"
        ) from error
    config.data.cache_dir = None  # a stranger's cache may contain harmful compiled programs
    return config
