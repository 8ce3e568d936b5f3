"""The paths in a run's `config.json`: used only if this user's vidjax wrote them there.

A folder of a run may come from anywhere, and its `config.json` may name any folder of this machine.
So `write_config` puts a seal of the paths beside it, in `.seal`, which only this user can make. A
path without a good seal needs the user's word: `--config.data.dir=FOLDER`, or `--runs=A,B`.
"""

import copy
import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vidjax import config as config_lib
from vidjax import files, ownership
from vidjax.config import Config
from vidjax.run import workdir as workdir_lib

FILE = ".seal"
PATHS = ("data.dir", "data.cache_dir", "join.runs")  # fields that name folders to read or write


def write_config(workdir: Path, config: Config) -> None:
    """Writes `config.json`, its folders as absolute paths, and their seal.

    Where the key of the seal cannot be kept, the folders have to be named again later.

    Args:
      workdir: the run's folder.
      config: the configuration.

    Raises:
      OSError: a file cannot be written.
    """
    config = absolute(config)
    workdir_lib.write_text(workdir / "config.json", config_lib.to_json(config))
    digest = ownership.seal(_content(config)) if any(_paths(config).values()) else None
    if digest:
        workdir_lib.write_text(workdir / FILE, digest + "\n")
    else:
        (workdir / FILE).unlink(missing_ok=True)


def absolute(config: Config) -> Config:
    """Returns a copy of a configuration whose folders of data and cache are absolute paths."""
    config = copy.deepcopy(config)
    for field in ("dir", "cache_dir"):
        if config.data[field]:
            config.data[field] = str(Path(config.data[field]).expanduser().absolute())
    return config


def foreign_paths(workdir: Path, config: Config) -> dict[str, Any]:
    """Returns field -> value of the paths in a configuration that this user did not write.

    Args:
      workdir: the run's folder.
      config: its `config.json`, without overrides.

    Raises:
      ValueError: `.seal` is a link, or no regular file.
    """
    named = {name: value for name, value in _paths(config).items() if value}
    if not named:
        return {}
    path = workdir / FILE
    digest = files.read_bytes(path, 1000) if files.exists(path) else b""
    sealed = ownership.is_sealed(_content(config), digest.decode("ascii", "replace").strip())
    return {} if sealed else named


def drop_foreign_paths(workdir: Path, config: Config) -> Config:
    """Returns a copy of a run's configuration in which `foreign_paths` are unset."""
    foreign, config = foreign_paths(workdir, config), copy.deepcopy(config)
    if {"data.dir", "data.cache_dir"} & foreign.keys():
        config.data.dir = config.data.cache_dir = None
    if "join.runs" in foreign:
        config.join.runs = ()
    return config


def own_config(workdir: Path, config: Config, given: Collection[str] = ()) -> Config:
    """Returns a run's configuration, with those of its paths that may be used.

    Args:
      workdir: the run's folder.
      config: its `config.json`, without overrides.
      given: the fields that the user sets on the command line.

    Raises:
      ValueError: the user has to name the folder of the data, or the joined runs; the error says
        how.
    """
    foreign = {k: v for k, v in foreign_paths(workdir, config).items() if k not in given}
    for name, value in foreign.items():
        text = ",".join(value) if isinstance(value, tuple) else value
        if name == "data.cache_dir":
            warnings.warn(
                f"the cache '{text}' is not used: {_reason(workdir)}\n"
                f"if it is yours: --config.data.cache_dir={text}",
                stacklevel=2,
            )
        elif name == "join.runs" or config.data.name != "synthetic":
            flag = "--runs" if name == "join.runs" else "--config.data.dir"
            raise ValueError(
                f"which folder? config.{name} is '{text}', but {_reason(workdir)}\n"
                f"say where it is: {flag}={text}"
            )
    return drop_foreign_paths(workdir, config) if foreign else config


def _reason(workdir: Path) -> str:
    return f"'{workdir / 'config.json'}' was not written by this user's vidjax"


def _paths(config: Config) -> dict[str, Any]:
    return {
        "data.dir": config.data.dir,
        "data.cache_dir": config.data.cache_dir,
        "join.runs": tuple(config.join.runs),
    }


def _content(config: Config) -> bytes:
    return json.dumps(_paths(config), sort_keys=True).encode()
