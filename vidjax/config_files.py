"""The files of experiments: found by name, executed, and the words that follow the colon."""

import importlib.util
import re
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from vidjax.errors import UserError
from vidjax.suggest import closest, suggest

# The arguments that every experiment takes: word -> meaning.
SCALE_WORDS: Mapping[str, str] = {
    "iqiyi_vid": "official files, and values for their full size",
    "few": "with `iqiyi_vid`: values for some thousand clips",
    "standard": "the synthetic dataset with 1,000 identities instead of 100",
    "everything": "trains on all clips of train and val, and ranks test; no MAP where test has no "
    "ground truth",
}


def choose_data(config: Any, words: Collection[str]) -> bool:
    """Sets the dataset that words ask for; returns whether values of the published size apply.

    Args:
      config: a ConfigDict, changed in place.
      words: `iqiyi_vid` for official files, with `few` for some thousand clips of them; `standard`
        for the larger synthetic dataset; `everything` to train on train and val, and to rank test.

    Raises:
      ValueError: words that contradict each other.
    """
    if {"iqiyi_vid", "standard"} <= set(words):
        raise UserError("config arguments: 'iqiyi_vid' and 'standard' are two datasets, name one")
    if "few" in words and "iqiyi_vid" not in words:
        raise UserError("config arguments: 'few' needs 'iqiyi_vid', as in iqiyi_vid,few")
    if {"everything", "trainval"} <= set(words):
        raise UserError(
            "config arguments: 'everything' and 'trainval' are two ways to train on val, name one"
        )
    if "everything" in words:
        config.data.train_splits = ("train", "val")
        config.eval.split = "test"
    if "iqiyi_vid" in words:
        config.data.name = "iqiyi_vid"
    if "standard" in words:
        config.data.size = "standard"
    return "iqiyi_vid" in words and "few" not in words


def split_args(args: str, known: Collection[str]) -> tuple[set[str], tuple[str, ...]]:
    """Splits what follows the colon of `--config=FILE:ARG,ARG` into known words and modalities.

    Args:
      args: the text after the colon, e.g. `iqiyi_vid,face,head`.
      known: the words that the configuration understands.

    Returns:
      The known words that were given, and the others, in order: names of modalities.

    Raises:
      ValueError: a word that is spelled almost like a known one.
    """
    words = [word.strip() for word in args.split(",") if word.strip()]
    given = {word for word in words if word in known}
    modalities = tuple(dict.fromkeys(word for word in words if word not in known))
    for word in modalities:
        if match := closest(word, known, cutoff=0.7):
            raise UserError(f"unknown config argument '{word}': did you mean '{match}'?")
    return given, modalities


def choose_one(words: Collection[str], names: Collection[str], default: str) -> str:
    """Returns the one of `names` that is among the words, or the default.

    Raises:
      ValueError: there are several of them.
    """
    given = sorted({*names}.intersection(words))
    if len(given) > 1:
        quoted = " and ".join(f"'{name}'" for name in given)
        raise UserError(f"config arguments: {quoted} exclude each other, name one")
    return given[0] if given else default


def one_modality(modalities: tuple[str, ...], *, default: str) -> tuple[str]:
    """Returns the modality among the words of an experiment that has one, or its default.

    Raises:
      ValueError: there are several.
    """
    if len(modalities) > 1:
        raise UserError(
            f"--config: modalities {', '.join(modalities)}: this experiment has one\n"
            f"name one of them, or a system of several: --config=plda:{','.join(modalities)}"
        )
    return (modalities or (default,))[0:1]


def load_file(spec: str) -> Any:
    """Returns the configuration that an experiment's file describes.

    Args:
      spec: `FILE` or `FILE:ARG,ARG`. FILE is a Python file with a function `get_config(args: str)`,
        or the name of one: `mma` is `configs/mma.py` in the working directory, else the file that
        is installed with vidjax.

    Returns:
      A ConfigDict.

    Raises:
      ValueError: there is no such file, or a mistake in it.
    """
    name, _, args = spec.partition(":")
    path = find_file(name)
    try:
        config = load_module(path).get_config(args)
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
            "begin it with config = vidjax.config.default(), and return config"
        )
    return config


def find_file(name: str) -> Path:
    """Returns the path of an experiment's file.

    Args:
      name: a path such as `configs/mma.py`, or a name such as `mma`.

    Raises:
      ValueError: there is no such file.
    """
    path, installed = Path(name), shipped_folder()
    if path.is_file():
        return path
    if re.fullmatch(r"\w+", name) and not path.is_dir():
        for folder in (Path("configs"), installed):
            if (folder / f"{name}.py").is_file():
                return folder / f"{name}.py"
        known = {
            file.stem for folder in ("configs", installed) for file in Path(folder).glob("*.py")
        }
        raise UserError(f"--config: no configuration '{name}'\n{suggest(name, sorted(known))}")
    same_name = Path("configs", path.name).with_suffix(".py")
    folder = path if path.is_dir() else path.parent
    near = sorted(str(folder / file.name) for file in folder.glob("*.py"))
    if same_name.is_file():
        hint = f"did you mean '{same_name}'?"
    elif not near and (installed / same_name.name).is_file():
        hint = f"did you mean '{same_name.stem}', which is installed with vidjax?"
    else:
        hint = suggest(str(path), near or sorted(file.stem for file in installed.glob("*.py")))
    raise UserError(f"--config: no such file '{name}'\n{hint}")


def shipped_folder() -> Path:
    """Returns the folder of the experiments that come with vidjax, installed or in a checkout."""
    spec = importlib.util.find_spec("vidjax.configs")
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).parents[1] / "configs"


def load_module(path: Path) -> ModuleType:
    """Executes an experiment's file and returns it as a module.

    Raises:
      ValueError: it is not a Python file, or has no function `get_config`.
    """
    spec = importlib.util.spec_from_file_location(f"vidjax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: '{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config: '{path}' has no function get_config")
    return module


def _place(path: Path, error: Exception) -> str:
    """Returns the file and the line of an error that an experiment's file raised."""
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
    return f"{type(error).__name__}: {text}"
