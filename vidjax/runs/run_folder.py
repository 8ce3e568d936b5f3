"""The folder of a run: its files, each read once, and its lock, which one process holds at a time.

Results of the split that training evaluates, `eval.split`, are `metrics.json`, `ranking.txt` and
`analysis.npz`; those of another one carry its name, `metrics_<split>.json`. See `run.formats`.
"""

import contextlib
import copy
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from vidjax.runs import config as config_lib
from vidjax.runs import config_io
from vidjax.core import distributed
from vidjax.utils import files
from vidjax.runs.config import Config
from vidjax.utils.errors import UserError
from vidjax.runs import schemas, results

CONFIG, IDENTITIES, METRICS = "config.json", "identities.json", "metrics.json"

# What lies in a folder of features, and in no folder of a run.
DATA = ("labels.csv", "*_gt.txt", "*_train*.pickle", "train/*.npz", "val/*.npz", "test/*.npz",
        "*.parquet")  # fmt: skip


class ResultPaths(NamedTuple):
    """The result files of one split."""

    metrics: Path
    ranking: Path
    analysis: Path
    report: Path


class RunFolder:
    """The files of a run. Each is read when it is first asked for, and then kept.

    If another object writes a file, a new RunFolder reads it. An error of a damaged file is a
    UserError with a remedy.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser().absolute()
        self._metrics: dict[Path, dict[str, Any]] = {}

    def has(self, name: str) -> bool:
        """Returns True if the folder has a file of this name."""
        return files.exists(self.path / name)

    @functools.cached_property
    def _config(self) -> Config:
        return config_io.load_workdir(self.path)

    @property
    def config(self) -> Config:
        """A copy of the configuration."""
        return copy.deepcopy(self._config)

    @functools.cached_property
    def identities(self) -> list[str]:
        """The names of class columns 1..C."""
        return results.load_identities(self.path / IDENTITIES)

    def paths(self, split: str | None = None, *, apart: bool = False) -> ResultPaths:
        """Returns the paths of the results of a split; None for the one that training evaluates.

        `apart` is True for results of other splits, or of other settings than those of the run.
        """
        own = str(self._config.eval.split)
        suffix = f"_{split or own}" if apart or split not in (None, own) else ""
        return ResultPaths(
            self.path / f"metrics{suffix}.json",
            self.path / f"ranking{suffix}.txt",
            self.path / f"analysis{suffix}.npz",
            self.path / f"report{suffix}.html",
        )

    def metrics(self, paths: ResultPaths | None = None) -> dict[str, Any]:
        """Returns results, empty if there are none; `paths` None is `metrics.json`."""
        path = paths.metrics if paths else self.path / METRICS
        if path not in self._metrics and files.exists(path):
            self._metrics[path] = results.load_metrics(path)
        return self._metrics.get(path, {})

    def other_metrics(self) -> dict[str, dict[str, Any]]:
        """Returns split -> results of `metrics_<split>.json`."""
        names = (path.stem.removeprefix("metrics_") for path in self.path.glob("metrics_*.json"))
        return {name: self.metrics(self.paths(name, apart=True)) for name in sorted(names)}

    def write_metrics(self, values: Mapping[str, Any], paths: ResultPaths | None = None) -> None:
        """Writes results; `paths` None is `metrics.json`."""
        path = paths.metrics if paths else self.path / METRICS
        files.write_json(path, values)
        self._metrics[path] = cast(dict[str, Any], files.parse_json(files.to_json(values)))

    def analysis(self, paths: ResultPaths) -> tuple[schemas.Analysis, results.Arrays] | None:
        """Returns the values and the arrays of an analysis; None if there is none."""
        return results.load_analysis(paths.analysis) if files.exists(paths.analysis) else None

    def write_config(self, config: Config) -> None:
        """Writes `config.json` with absolute paths and no `data.cache_dir`."""
        config = absolute(config)
        config.data.cache_dir = None
        files.write_text(self.path / CONFIG, config_io.to_json(config))
        vars(self).pop("_config", None)


def absolute(config: Config) -> Config:
    """Returns a copy of a configuration whose data, cache and weights are absolute paths."""
    config = copy.deepcopy(config)
    for field in ("dir", "cache_dir", "weights"):
        if config.data[field]:
            config.data[field] = str(files.absolute(config.data[field]))
    return config


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes and locks a run's folder; after an error, removes it if it is new and still empty."""
    refuse_data(Path(path).expanduser())
    first = distributed.is_first()
    is_new = first and not Path(path).expanduser().exists()
    workdir = files.make_folder(path)
    with files.lock(workdir) if first else contextlib.nullcontext():
        try:
            yield workdir
        except BaseException:
            if is_new and [file.name for file in workdir.glob("*")] == [".lock"]:
                files.remove_ours(workdir, r"\.lock")
            raise


def refuse_data(folder: Path) -> None:
    """Raises ValueError if a folder holds features: the run's files would lie among the clips."""
    if files.exists(folder / "config.json"):
        return
    found = next((path for pattern in DATA for path in folder.glob(pattern)), None)
    if found:
        raise UserError(
            f"workdir '{folder}' is a folder of data: it holds {found.relative_to(folder)}\n"
            "name another one for the run: --workdir=FOLDER"
        )


def changes(old: Config, new: Config) -> str:
    """Describes in a line of at most 300 characters how a run may not change; "" if it may.

    MOVABLE fields may change, since they change no result. `num_epochs` may grow.
    """
    changed = config_lib.differences(old, new)
    if old.num_epochs <= new.num_epochs:
        changed.pop("num_epochs", None)
    kept = {name: pair for name, pair in changed.items() if name not in config_lib.MOVABLE}
    return ", ".join(f"{name}: {before} -> {now}" for name, (before, now) in kept.items())[:300]


def check_resumes(workdir: Path, old: Config, new: Config) -> None:
    """Raises ValueError if the run in a folder, trained with `old`, may not go on with `new`."""
    if changed := changes(old, new):
        raise UserError(
            f"'{workdir}' holds a run with another configuration\n{changed}\n"
            "use another workdir: --workdir=FOLDER, or the configuration of that run, with which "
            "num_epochs may grow"
        )


def check_there(workdir: Path) -> None:
    """Raises ValueError if the folder of a run was moved or removed while the run trained."""
    if not files.exists(workdir / "config.json"):
        raise UserError(
            f"'{workdir}' is not there any more: was it moved while it trained?\n"
            "run the same command with --workdir=FOLDER, where it is now, to go on from its last "
            "checkpoint"
        )
