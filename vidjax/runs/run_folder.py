"""Opens, reads, writes and locks the folder of a run.

Training evaluates the split `config.eval.split`. The results are `metrics.json`, `ranking.txt`,
`analysis.npz` and `report.html`. The results of another split have its name, as in
`metrics_<split>.json`. `runs.schemas` defines the content of these files.
"""

import contextlib
import copy
import functools
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from vidjax.runs import config as config_lib, config_io, results, schemas
from vidjax.runs.config import Config
from vidjax.runs.results import ResultPaths
from vidjax.utils import distributed, files, json_files, messages
from vidjax.utils.errors import UserError

CONFIG, IDENTITIES, METRICS = "config.json", "identities.json", "metrics.json"
JOIN = "join.json"  # the learned numbers of a blend

# Files of a folder of features.
DATA_PATTERNS = ("labels.*", "*_gt.txt", "*_train*.pickle", "*.npz", "train/*.npz", "val/*.npz",
                 "test/*.npz", "*.parquet")  # fmt: skip


class RunFolder:
    """The files of a run.

    The configuration, identities and metrics are read once. To read them again, make a new object.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = files.local(path).absolute()
        self._metrics: dict[Path, dict[str, Any]] = {}

    def has(self, name: str) -> bool:
        """Returns True if the folder has a file with this name."""
        return files.exists(self.path / name)

    @functools.cached_property
    def _config(self) -> Config:
        return config_io.load_workdir(self.path)

    @property
    def config(self) -> Config:
        """A copy of the configuration of the run."""
        return copy.deepcopy(self._config)

    @functools.cached_property
    def identities(self) -> list[str]:
        """The names of the identities. The first has class 1, because class 0 is "other"."""
        return results.load_identities(self.path / IDENTITIES)

    def paths(self, split: str | None = None, *, apart: bool = False) -> ResultPaths:
        """Returns the paths of the result files of `split`, by default the `eval.split` of the run.

        `apart` is True if an evaluation used other settings than the run. Then the file names
        contain the name of the split, so that the evaluation replaces no result of the training.
        """
        trained_split = str(self._config.eval.split) if self.has(CONFIG) else split
        suffix = f"_{split or trained_split}" if apart or split not in (None, trained_split) else ""
        return ResultPaths(
            self.path / f"metrics{suffix}.json",
            self.path / f"ranking{suffix}.txt",
            self.path / f"analysis{suffix}.npz",
            self.path / f"report{suffix}.html",
            self.path / f"scores{suffix}.npy",
        )

    def metrics(self, paths: ResultPaths | None = None) -> dict[str, Any]:
        """Returns the results of an evaluation, the content of a JSON file, name -> value.

        The file is `paths.metrics`, by default `metrics.json`. Without the file, returns {}.
        """
        path = paths.metrics if paths else self.path / METRICS
        if path not in self._metrics and files.exists(path):
            self._metrics[path] = json_files.load(path, schemas.Metrics, results.REMEDY)[0]
        return self._metrics.get(path, {})

    def list_runs(self, config: Config | None = None, *, final: bool = True) -> list[Path]:
        """Returns the folders of the runs whose scores are joined, or [] if this is a single run.

        `config` is the configuration, by default of this folder. The runs are:

        - `config.join.runs`, if the user has chosen runs.
        - otherwise the runs trained on all clips, if `final` is True and all these runs exist.
        - otherwise the runs trained in folds (cross-validation).
        """
        config = config or self._config
        names = config.join.runs or name_systems(config, final=False)
        finals = [self.path / name for name in name_systems(config, final=True)]
        is_final = final and finals and all(map(files.exists, finals))
        return finals if is_final else [self.path / name for name in names]

    def make_blend_error(self) -> UserError:
        """Returns the error for a blend of runs in a place where only a trained run is possible."""
        return UserError(
            f"'{self.path}' is a blend of runs, so it has no weights and no embeddings\n"
            f"name its runs instead: {', '.join(map(str, self.list_runs()))}"
        )

    def other_metrics(self) -> dict[str, dict[str, Any]]:
        """Returns split -> content of `metrics_<split>.json`, for every such file in the folder."""
        names = (path.stem.removeprefix("metrics_") for path in self.path.glob("metrics_*.json"))
        return {name: self.metrics(self.paths(name, apart=True)) for name in sorted(names)}

    def split_metrics(self, config: Config) -> dict[str, dict[str, Any]]:
        """Returns the results on the further splits `eval.splits`, split -> metrics.

        The metrics are the content of `metrics_<split>.json`, or {} if there is no such file.
        """
        return {name: self.metrics(self.paths(name)) for name in config_lib.list_splits(config)[1:]}

    def describe(self, config: Config, metrics: Mapping[str, Any]) -> dict[str, str]:
        """Returns the results of an evaluation as rows of a table, label -> text.

        `config` is the configuration of the evaluation, and `metrics` is the content of
        `metrics.json`.
        """
        split, rows = config.eval.split, dict[str, str]()
        if "map" in metrics:
            rows["MAP@100"] = _describe_scores(metrics, f" on {_describe_kind(metrics, split)}")
            for name, other in self.split_metrics(config).items():
                kind = _describe_kind(other, name).removeprefix(name)
                rows[f"on {name}"] = _describe_scores(other, kind)
        else:
            rows["MAP@100"] = f"none: {split} has no ground truth, so it is ranked but not scored"
            if reason := results.explain_unmeasured(config.to_dict(), self.path):
                rows["measured"] = f"nothing: {reason}"
        if split != self._config.eval.split:  # "best" is about another split
            metrics = {**metrics, "best_map": None}
        return rows | {row.label: text for row, text in results.list_rows(metrics, "summary")}

    def write_metrics(self, values: Mapping[str, Any], paths: ResultPaths | None = None) -> None:
        """Writes the results of an evaluation to `paths.metrics`, by default `metrics.json`."""
        path = paths.metrics if paths else self.path / METRICS
        files.write_json(path, values)
        self._metrics[path] = cast(dict[str, Any], files.parse_json(files.to_json(values)))

    def analysis(self, paths: ResultPaths) -> tuple[schemas.Analysis, results.Arrays] | None:
        """Returns the values and arrays in the file `paths.analysis`, or None if it is missing."""
        return results.load_analysis(paths.analysis) if files.exists(paths.analysis) else None

    def write_config(self, config: Config) -> None:
        """Writes `config.json`. Its paths are absolute, and `data.cache_dir` is unset."""
        config = make_paths_absolute(config)
        config.data.cache_dir = None
        files.write_text(self.path / CONFIG, config_io.to_json(config))
        vars(self).pop("_config", None)


def _describe_kind(metrics: Mapping[str, Any], split: str) -> str:
    """Returns a split, and how its MAP was measured, such as "train, out of fold"."""
    if metrics.get("map_kind") == "in_sample":
        return f"{split}, in sample: the run was trained on these clips, so MAP is too high"
    return f"{split}, out of fold" if metrics.get("map_kind") == "out_of_fold" else split


def _describe_scores(metrics: Mapping[str, Any], place: str) -> str:
    texts = [f"{metrics['map']:.4f}{place}"] if "map" in metrics else []
    rows = results.list_rows(metrics, "scores")
    return "; ".join(texts + [f"{row.label} {value:.{row.digits}f}" for row, value in rows])


def name_systems(config: Config, *, final: bool) -> list[str]:
    """Returns the names of the folders in which the systems of a blend are trained.

    If `final` is False, returns the folders for training in folds, such as `1_cosine`. If it is
    True, returns the folders for training on all clips, such as `1_cosine_all`.
    """
    ending = "_all" if final else ""
    return [
        f"{number}_{spec.partition(':')[0]}{ending}"
        for number, spec in enumerate(config.join.systems, 1)
    ]


def open_run(workdir: str | Path) -> RunFolder:
    """Opens the folder of a run. Raises UserError if the folder contains no run."""
    folder = RunFolder(workdir)
    if not folder.has(CONFIG):
        paths = sorted(folder.path.glob(f"*/{CONFIG}"))
        runs = [messages.relative_path(path.parent) for path in paths]
        place = shlex.quote(messages.relative_path(folder.path))
        hint = f"to train a run, use vidjax train --config=mma --workdir={place}"
        if folder.path.is_dir() and any(folder.path.iterdir()):  # a new run needs an empty folder
            hint = "name the folder of a run; to train a run, use vidjax train --config=mma"
        if runs:
            hint = f"it contains folders of runs: name one of them, such as {', '.join(runs[:3])}"
        raise UserError(f"no run in '{workdir}': it has no {CONFIG}\n{hint}")
    return folder


def make_paths_absolute(config: Config) -> Config:
    """Returns a copy of a configuration in which the paths of files and folders are absolute."""
    paths = {name: path for name in config_lib.PATHS if (path := config[name])}
    words = (f"--config.{name}={files.absolute(path)}" for name, path in paths.items())
    return config_io.override(config, list(words))


@contextlib.contextmanager
def make_and_lock(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes and locks the folder of a run, and yields its absolute path.

    If the `with` block raises an error, and the folder is new and still empty, the folder is
    removed. Its new parent folders are removed, too. Raises UserError if the folder contains clips.
    """
    folder = files.local(path).absolute()
    refuse_folder_of_data(folder)
    first = distributed.is_first()
    new = [one for one in (folder, *folder.parents) if first and not one.exists()]
    workdir = files.make_folder(path)
    with files.lock(workdir) if first else contextlib.nullcontext():
        try:
            yield workdir
        except BaseException:
            if new and [file.name for file in workdir.glob("*")] == [".lock"]:
                files.remove_ours(workdir, r"\.lock")
                for parent in new[1:]:
                    with contextlib.suppress(OSError):  # another process may use it
                        parent.rmdir()
            raise


def refuse_folder_of_data(folder: Path) -> None:
    """Raises UserError if a folder contains clips, because a run must not write among them."""
    if any(files.exists(folder / name) for name in (CONFIG, IDENTITIES)):  # a run also has .npz
        return
    paths = (path for pattern in DATA_PATTERNS for path in folder.glob(pattern))
    if path := next(paths, None):
        raise UserError(
            f"workdir '{folder}' is a folder of clips, because it contains "
            f"'{path.relative_to(folder)}'\nchoose another folder for the run: --workdir=FOLDER"
        )


def describe_changes(old: Config, new: Config) -> str:
    """Returns the changed fields that prevent a run from resuming, such as `seed: 0 -> 1`.

    `old` is the configuration of the run, and `new` is the configuration with which it would
    resume. The text lists three fields and counts the others. If the run can resume, the text is
    "". `num_epochs` may grow, and fields that do not affect the results may change.
    """
    changed = config_lib.differences(old, new)
    if old.num_epochs <= new.num_epochs:
        changed.pop("num_epochs", None)
    refused = [
        messages.shorten(f"{name}: {before} -> {now}", 80)
        for name, (before, now) in changed.items()
        if name not in config_lib.MAY_CHANGE
    ]
    more = len(refused) - 3
    return ", ".join(refused[:3]) + (f" and {more} more" if more > 0 else "")


def check_resumes(workdir: Path, old: Config, new: Config) -> None:
    """Raises UserError if the run in `workdir`, trained with `old`, cannot resume with `new`.

    The folder `init_from`, the run that gave the first weights, may have been moved or deleted.
    """
    from vidjax.runs import checkpoint  # it imports JAX

    changed, before, now = describe_changes(old, new), old.init_from, new.init_from
    if before != now:
        source, own = checkpoint.manifests(Path(now or workdir)), checkpoint.manifests(workdir)
        found = [files.sha256_json(x["files"]) for x in source.values()][-1:]
        loaded = [x["init_from"]["sha256"] for x in own.values() if before][-1:]
        if not before or not now or (found and found != loaded):
            changed = f"init_from: {before or 'empty'} -> {now or 'empty'}"
    if changed:
        raise UserError(
            f"'{workdir}' contains a run with another configuration: {changed}\n"
            "use another workdir: --workdir=FOLDER, or undo these changes; "
            "a larger num_epochs is allowed"
        )


def check_not_moved(workdir: Path) -> None:
    """Raises UserError if the folder of a run was moved or removed during training."""
    if not files.exists(workdir / CONFIG):
        raise UserError(
            f"'{workdir}' was moved or removed during training\n"
            "to resume from its last checkpoint, run the same command with its new path: "
            "--workdir=FOLDER"
        )
