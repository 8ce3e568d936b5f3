"""The folder of a run: its paths, its files and its lock.

The results of the split `eval.split`, which training evaluates, are `metrics.json`, `ranking.txt`
and `analysis.npz`. The files of another split carry the name of the split: `metrics_<split>.json`.
`runs.schemas` describes their content.
"""

import contextlib
import copy
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from vidjax.core import distributed
from vidjax.runs import config as config_lib
from vidjax.runs import config_io, results, schemas
from vidjax.runs.config import Config
from vidjax.utils import files
from vidjax.utils.errors import UserError

CONFIG, IDENTITIES, METRICS = "config.json", "identities.json", "metrics.json"

# Files that a folder of features has, but a folder of a run does not.
DATA_PATTERNS = ("labels.csv", "*_gt.txt", "*_train*.pickle", "train/*.npz", "val/*.npz",
                 "test/*.npz", "*.parquet")  # fmt: skip


class ResultPaths(NamedTuple):
    """The result files of a split."""

    metrics: Path
    ranking: Path
    analysis: Path
    report: Path


class RunFolder:
    """The files of a run. Each file is read at its first use, and its content is kept.

    Changes by other objects or programs appear only in a new RunFolder. A damaged file raises a
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
        """Returns the paths of the results of a split.

        Args:
          split: the split; None: the split that training evaluates.
          apart: True if the results come from settings other than the run's. The names of the
            files then contain the split even if training evaluates this split.
        """
        trained_split = str(self._config.eval.split)
        suffix = f"_{split or trained_split}" if apart or split not in (None, trained_split) else ""
        return ResultPaths(
            self.path / f"metrics{suffix}.json",
            self.path / f"ranking{suffix}.txt",
            self.path / f"analysis{suffix}.npz",
            self.path / f"report{suffix}.html",
        )

    def metrics(self, paths: ResultPaths | None = None) -> dict[str, Any]:
        """Returns the content of `paths.metrics` or `metrics.json`; {} if the file is missing."""
        path = paths.metrics if paths else self.path / METRICS
        if path not in self._metrics and files.exists(path):
            self._metrics[path] = results.load_metrics(path)
        return self._metrics.get(path, {})

    def other_metrics(self) -> dict[str, dict[str, Any]]:
        """Returns split -> results of `metrics_<split>.json`."""
        names = (path.stem.removeprefix("metrics_") for path in self.path.glob("metrics_*.json"))
        return {name: self.metrics(self.paths(name, apart=True)) for name in sorted(names)}

    def write_metrics(self, values: Mapping[str, Any], paths: ResultPaths | None = None) -> None:
        """Writes results to `paths.metrics` or, if `paths` is None, to `metrics.json`."""
        path = paths.metrics if paths else self.path / METRICS
        files.write_json(path, values)
        self._metrics[path] = cast(dict[str, Any], files.parse_json(files.to_json(values)))

    def analysis(self, paths: ResultPaths) -> tuple[schemas.Analysis, results.Arrays] | None:
        """Returns the values and the arrays of an analysis, or None if the file is missing."""
        return results.load_analysis(paths.analysis) if files.exists(paths.analysis) else None

    def write_config(self, config: Config) -> None:
        """Writes `config.json` with absolute paths and no `data.cache_dir`."""
        config = make_paths_absolute(config)
        config.data.cache_dir = None
        files.write_text(self.path / CONFIG, config_io.to_json(config))
        vars(self).pop("_config", None)


def make_paths_absolute(config: Config) -> Config:
    """Returns a copy of a configuration with absolute paths of data, cache and weights."""
    config = copy.deepcopy(config)
    for field in ("dir", "cache_dir", "weights"):
        if config.data[field]:
            config.data[field] = str(files.absolute(config.data[field]))
    return config


@contextlib.contextmanager
def make_and_lock(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes and locks the folder of a run. After an error, a new and empty folder is removed."""
    refuse_folder_of_data(Path(path).expanduser())
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


def refuse_folder_of_data(folder: Path) -> None:
    """Raises UserError if a folder contains features: a run does not write among the clips."""
    if files.exists(folder / "config.json"):
        return
    paths = (path for pattern in DATA_PATTERNS for path in folder.glob(pattern))
    if path := next(paths, None):
        raise UserError(
            f"workdir '{folder}' is a folder of data: it contains {path.relative_to(folder)}\n"
            "name another folder for the run: --workdir=FOLDER"
        )


def describe_changes(old: Config, new: Config) -> str:
    """Describes the changed fields that a resumed run may not change, in at most 300 characters.

    MOVABLE fields may change, because they do not affect results. `num_epochs` may grow.
    """
    changed = config_lib.differences(old, new)
    if old.num_epochs <= new.num_epochs:
        changed.pop("num_epochs", None)
    refused = {name: pair for name, pair in changed.items() if name not in config_lib.MOVABLE}
    return ", ".join(f"{name}: {before} -> {now}" for name, (before, now) in refused.items())[:300]


def check_resumes(workdir: Path, old: Config, new: Config) -> None:
    """Raises UserError if a run, trained with `old`, may not resume with `new`."""
    if changed := describe_changes(old, new):
        raise UserError(
            f"'{workdir}' holds a run with another configuration\n{changed}\n"
            "use another workdir: --workdir=FOLDER, or the configuration of that run "
            "(num_epochs may grow)"
        )


def check_not_moved(workdir: Path) -> None:
    """Raises UserError if the folder of a run was moved or removed during training."""
    if not files.exists(workdir / "config.json"):
        raise UserError(
            f"'{workdir}' no longer exists: was it moved during training?\n"
            "to resume from its last checkpoint, run the same command with its new place: "
            "--workdir=FOLDER"
        )
