"""The functions of `import vidjax`: configuration, data, training and trained runs from Python.

Each function does the same as a command, and imports JAX or TensorFlow only when it is called.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ml_collections import ConfigDict

from vidjax.core import distributed
from vidjax.runs import config as config_lib
from vidjax.runs import config_io
from vidjax.runs.config import Config
from vidjax.runs.run_folder import CONFIG, RunFolder, make_and_lock
from vidjax.utils import files, messages
from vidjax.utils.errors import ArgumentError, DiskError, UserError, check_argument

if TYPE_CHECKING:  # these modules import JAX, TensorFlow or numpy
    from vidjax.data.clips import TrainingData
    from vidjax.data.frame_fields import NonFinite, Quality
    from vidjax.data.labels import LabelSource
    from vidjax.data.packing import Clips
    from vidjax.evaluation.comparison import Comparison
    from vidjax.evaluation.predict import Predictor
    from vidjax.runs.results import Results


def load_config(spec: str | Path, *overrides: str) -> Config:
    """Loads the configuration of a system.

    Args:
      spec: a value of `--config`. It is a shipped configuration such as `mma` or a Python file,
        with arguments after a colon as in `mma:face,audio`; or the `config.json` of a run.
      overrides: values of fields, as on the command line: `--config.batch_size=64`.

    Raises:
      UserError: no such configuration, argument or field, or a value of a different type.
    """
    check_argument("load_config: spec", spec, (str, Path), "a name such as 'mma', or a file")
    if Path(spec).name != "config.json":
        config = config_io.load_file(str(spec))
    else:
        config = open_run(Path(spec).expanduser().absolute().parent).config
    return config_io.override(config, overrides)


def open_run(workdir: str | Path) -> RunFolder:
    """Opens the folder of a run. If it contains no run, raises UserError with a remedy."""
    folder = RunFolder(workdir)
    if not folder.has(CONFIG):
        paths = sorted(folder.path.glob(f"*/{CONFIG}"))
        runs = [messages.relative_path(path.parent) for path in paths]
        place = messages.relative_path(folder.path)
        hint = f"train a run: vidjax train --config=mma --workdir={place}"
        if folder.path.is_dir() and any(folder.path.iterdir()):  # a new run needs an empty folder
            hint = "name the folder of a run; to train a run: vidjax train --config=mma"
        if runs:
            hint = f"it contains runs, name one: {', '.join(runs[:3])}"
        raise UserError(f"no run in '{workdir}' (no {CONFIG})\n{hint}")
    return folder


def set_up_devices(config: Config) -> None:
    """Chooses devices and the cache of compiled programs. UserError if a device is absent."""
    from vidjax.core import devices

    if config.deterministic:
        devices.make_deterministic()
    devices.cache_programs(files.cache_root(config.data.cache_dir))
    devices.make_mesh()


def load_data(
    source: "Mapping[str, Clips] | str | Path | Config",
    labels: "LabelSource" = None,
    *,
    cache_dir: str | Path | None = None,
    non_finite: "NonFinite" = "drop",
    quality: "Quality" = "given",
) -> "TrainingData":
    """Loads a dataset for training and evaluation.

    The first call converts the clips to checked records in the cache. Later calls reuse them until
    a byte of the source changes.

    Args:
      source: a nested dict: split (`train`, `val`, `test`) -> clip name -> modality -> features.
        Features are [T, D] or [D], float16, float32, float64 or int8. In place of the features, a
        dict may have `features` and optionally `quality` [T], `detection` [T], `number` [T] and
        `box` [T, 4]. A clip may lack modalities, or have no frame at all. Or a folder of official
        pickles, `.npz` files or parquet tables. Or a configuration: then its fields `config.data`
        decide, and no other argument may be given.
      labels: clip name -> identity, for all splits. Or a file: a `.csv` with the columns `clip` and
        `identity`, or ground truth in the official format. A clip without a label (or with None) is
        a distractor. A split without a labelled clip is ranked but not scored. None means the
        ground truth in the folder of the features.
      cache_dir: the folder of the records. None means `$VIDJAX_CACHE` or `~/.cache/vidjax`.
      non_finite: `drop` leaves out and counts frames with a feature that is not finite; `error`
        refuses them.
      quality: the quality of frames of your own features. `given` takes `quality`; clips without it
        take the L2 norm of each feature. `norm` always takes the norm. Use the same value as
        `config.data.quality` in training.

    Raises:
      UserError: malformed clips or labels. The message names the file or split, clip and field.
      FileNotFoundError: no such folder, or no features in it.
      OSError: the cache cannot be written.
    """
    paths = (str, os.PathLike, type(None))
    check_argument("load_data: cache_dir", cache_dir, paths, "the path of a folder")
    from vidjax.data import sources

    if not isinstance(source, ConfigDict):
        given = cast("Mapping[str, Clips] | str | Path", source)
        return sources.load(
            given, labels, cache_dir=cache_dir, non_finite=non_finite, quality=quality
        )
    for name, value, default, remedy in (
        ("labels", labels, None, "labels are read from the folder config.data.dir"),
        ("cache_dir", cache_dir, None, "set config.data.cache_dir"),
        ("non_finite", non_finite, "drop", "set config.data.non_finite"),
        ("quality", quality, "given", "set config.data.quality"),
    ):
        if value != default:
            raise UserError(
                f"load_data: leave out {name}, because the source is a configuration\n{remedy}"
            )
    data = cast(Config, source).data
    cache = files.cache_root(data.cache_dir).absolute()
    try:
        return sources.load(data)
    except OSError as error:
        place = Path(error.filename).absolute() if error.filename else None
        if not place or not (place.is_relative_to(cache) or cache.is_relative_to(place)):
            raise
        raise DiskError(
            f"cannot write the cache '{cache}': {error.strerror}\n"
            "choose another folder: --config.data.cache_dir=FOLDER, or the variable VIDJAX_CACHE"
        ) from error


def train(
    config: Config, workdir: str | Path, data: "TrainingData", *, num_devices: int | None = None
) -> "Results":
    """Trains a system in a folder. Returns its results: `map` and all of `metrics.json`.

    The folder is made if needed, and locked until the end. A stopped run is resumed from its last
    checkpoint. A finished run is not trained again: its results are returned.

    Args:
      config: from `load_config`. The run keeps a copy in which `data.name` and `data.dir` name the
        data.
      workdir: the folder for checkpoints, metrics, rankings and the report.
      data: from `load_data`.
      num_devices: the number of devices to use. None means all.

    Raises:
      UserError: the configuration does not fit the data or the run in the folder, or another
        process has locked the folder.
      CheckpointError: the checkpoints of the run are damaged or belong to another model.
      Interrupted: SIGINT or SIGTERM arrived. The state is saved; the same call resumes the run.
    """
    check_argument("train: config", config, ConfigDict, "a configuration, from vidjax.load_config")
    check_argument("train: workdir", workdir, (str, os.PathLike), "the path of a folder")
    if not hasattr(data, "train_batches"):
        raise ArgumentError(
            f"train: data must be the result of vidjax.load_data, not a {type(data).__name__}"
        )
    config = _name_data(config, data)
    with make_and_lock(workdir) as path:
        metrics, _ = train_run(config, RunFolder(path), data, num_devices=num_devices)
    return _make_results(RunFolder(path), config, metrics)


def _name_data(config: Config, data: "TrainingData") -> Config:
    """Returns a copy of a configuration in which `data.name` and `data.dir` name the given data.

    Fields that apply only to other kinds of data get their defaults.
    """
    config, origin = copy.deepcopy(config), data.report["data"]
    name, folder = origin["name"], origin["dir"]
    known = config.data.name, config.data.dir and str(files.absolute(config.data.dir))
    if known == (name, folder):
        return config
    config.data.update(name=name, dir=folder)
    values = dict(config_lib.fields(config))
    for field in config_lib.FIELDS.values():
        when = field.read_when
        if (
            when
            and when.field == "data.name"
            and not when.condition(values)
            and field.name != "data.dir"
        ):
            config.data[field.name.removeprefix("data.")] = field.default
    return config


def train_run(
    config: Config,
    folder: RunFolder,
    data: "TrainingData | None" = None,
    *,
    num_devices: int | None = None,
    command: str | None = None,
    began: float | None = None,
) -> tuple[dict[str, Any], bool]:
    """Trains in a locked folder. Returns the metrics, and True if the run was already finished.

    For the arguments see `train` and `training.loop.train`. If `data` is None, the data of `config`
    are loaded.
    """
    from vidjax.evaluation import restore
    from vidjax.evaluation.analysis import analysis
    from vidjax.training import loop as training

    results = training.read_finished_metrics(folder, config)
    if results is None:
        set_up_devices(config)
    data = load_data(config) if data is None else data
    _check_same(config, data)
    report = config.eval.report
    if results is None:
        metrics = training.train(
            config, folder.path, data,
            num_devices=num_devices, analyse=report, command=command, began=began,
        )  # fmt: skip
        return metrics, False
    restore.check_data(folder.path, results["trained_on"], config, data)
    if report and not files.exists(folder.paths().report) and distributed.is_first():
        analysis.write_report(folder)  # the report was deleted
    return results, True


def _make_results(folder: RunFolder, config: Config, metrics: Mapping[str, Any]) -> "Results":
    from vidjax.runs import results

    paths = folder.paths(config.eval.split, apart=bool(metrics.get("overrides")))
    return results.Results.from_values(metrics, config.eval.split, paths)


def _check_same(config: Config, data: "TrainingData") -> None:
    """Raises UserError if the processes of a run have different fields or data."""
    fields = {name: x for name, x in config_lib.fields(config) if name not in config_lib.MOVABLE}
    distributed.check_same({"configuration": fields, "data": data.report["data"]["digest"]})


def evaluate(
    workdir: str | Path,
    data: "TrainingData | None" = None,
    *,
    split: str | None = None,
    num_devices: int | None = None,
) -> "Results":
    """Ranks a split with a trained run. Returns the results, as `train` does.

    Results and report are written into the run's folder, which is locked until the end.

    Args:
      workdir: the folder of a run.
      data: from `load_data`. None means the dataset of the run.
      split: the split to rank, such as `test`. None means the split that training evaluated. A
        split without a labelled clip is ranked but not scored: its `map` is None.
      num_devices: the number of devices to use. None means all. Scores do not depend on it.

    Raises:
      UserError: the folder contains no run, or a blend of other runs, or the data do not fit.
      CheckpointError: no checkpoint is usable.
    """
    check_argument("evaluate: workdir", workdir, (str, os.PathLike), "the path of a run's folder")
    check_argument("evaluate: split", split, (str, type(None)), "the name of a split, or None")
    folder = open_run(workdir)
    config = folder.config
    if config.join.runs:
        raise UserError(
            f"'{folder.path}' is a blend of other runs, which this function cannot evaluate\n"
            f"evaluate {' or '.join(config.join.runs)},\n"
            "or the blend with the command: vidjax evaluate --workdir=FOLDER"
        )
    config.eval.split = split or config.eval.split
    with make_and_lock(folder.path):
        metrics = evaluate_run(config, folder, data, num_devices=num_devices)
    return _make_results(folder, config, metrics)


def evaluate_run(
    config: Config,
    folder: RunFolder,
    data: "TrainingData | None" = None,
    *,
    num_devices: int | None = None,
) -> dict[str, Any]:
    """Ranks `config.eval.split` with the run in a locked folder. Returns the metrics."""
    from vidjax.evaluation import restore
    from vidjax.evaluation.analysis import analysis

    set_up_devices(config)
    run = restore.find_run(config, folder)
    # The files are read now, so that damaged files are reported before the evaluation.
    _ = folder.metrics(), folder.other_metrics() if config.eval.report else None
    data = load_data(config) if data is None else data
    _check_same(config, data)
    report = config.eval.report
    return analysis.evaluate(config, run, data, num_devices=num_devices, report=report)


def compare(
    runs: Sequence[str | Path | Sequence[str | Path]],
    *,
    out: str | Path | None = None,
    split: str | None = None,
) -> "Comparison":
    """Compares runs on the same clips: MAP minus the MAP of the first run, with 95 % intervals.

    Only the results in the folders are read; no model is computed. Print the result, or use its
    `to_dict`, `to_latex` or `differences`.

    Args:
      runs: folders of two or more runs. Or groups with the same number of runs, which differ only
        in their seeds: `[["a1", "a2", "a3"], ["b1", "b2", "b3"]]`. Then the intervals include the
        variation between seeds.
      out: a folder for `comparison.html`, `.json` and `.tex`. None writes no files.
      split: the split to compare on. None means the split that each run evaluated.

    Raises:
      UserError: fewer than two runs, groups of different sizes, or runs on different clips.
    """
    check_argument("compare: runs", runs, (list, tuple), "a list of folders, or of lists of them")
    groups = [
        [os.fspath(run)]
        if isinstance(run, (str, os.PathLike))
        else [os.fspath(path) for path in run]
        for run in runs
    ]
    if len(groups) < 2 or not all(groups):
        raise UserError("compare: too few runs: give two or more runs, or two groups of runs")
    from vidjax.evaluation import comparison

    result = comparison.compare(groups, split=split)
    if out is not None:
        with make_and_lock(out) as folder:
            result.write(folder)
    return result


def restore(
    workdir: str | Path,
    *,
    step: Literal["latest", "best"] = "latest",
    num_devices: int | None = None,
) -> "Predictor":
    """Restores a trained run. The methods `rank`, `identify`, `scores`, `embed` take new clips.

    Args:
      workdir: the folder of a run.
      step: the checkpoint: `latest`, or `best` by MAP.
      num_devices: the number of devices to use. None means all. Scores do not depend on it.

    Raises:
      UserError: the folder contains no run, or a blend of other runs.
      CheckpointError: no checkpoint is usable.
    """
    check_argument("restore: workdir", workdir, (str, os.PathLike), "the path of a run's folder")
    from vidjax.evaluation import predict

    return predict.restore(workdir, step=step, num_devices=num_devices)
