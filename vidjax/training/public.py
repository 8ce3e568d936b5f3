"""Functions of the package `vidjax` for runs: load data, train, evaluate, compare and restore.

The commands call `train_run`, `evaluate_run` and other functions of this module, too. JAX and
TensorFlow are imported when a function is called.
"""

import copy
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ml_collections import ConfigDict

from vidjax.runs import config as config_lib, config_io
from vidjax.runs.config import Config
from vidjax.runs.run_folder import CONFIG, RunFolder, make_and_lock, open_run
from vidjax.utils import distributed, files, messages
from vidjax.utils.errors import ArgumentError, DiskError, UserError, check_argument

if TYPE_CHECKING:  # these modules import JAX, TensorFlow or numpy
    from vidjax.data.dataset import Dataset
    from vidjax.data.labels import LabelSource
    from vidjax.data.packed_clips import Quality
    from vidjax.data.packing import Clips
    from vidjax.evaluation.comparison import Comparison
    from vidjax.evaluation.predict import JointPredictor, Predictor
    from vidjax.runs.results import LogFunction, Results


def load_config(spec: str | Path, *overrides: str) -> Config:
    """Loads the configuration of a system.

    Args:
      spec: the name of a configuration of vidjax, such as `mma`, or the path of a Python file. Its
        arguments follow a colon, as in `mma:face,audio`. To load the configuration of a run, give
        the path of the run's `config.json`.
      overrides: flags of the command line, such as `--config.batch_size=64`.

    Raises:
      UserError: the configuration, an argument or a field does not exist, or a value has a wrong
        type.
    """
    check_argument("load_config: spec", spec, (str, Path), "a name such as 'mma', or a file")
    if Path(spec).name != "config.json":
        config = config_io.load_file(str(spec))
    else:
        config = open_run(files.local(spec).absolute().parent).config
    return config_io.override(config, overrides)


def name_run(spec: str, config: Config, overrides: Sequence[str]) -> str:
    """Returns the default name of the folder of a run, such as `mma-face_seed=1`.

    In this example, `spec` is the configuration `mma:face`, and `overrides` are the words
    `--config.seed=1`. `config` is the configuration after the overrides.
    """
    name, _, words = spec.partition(":")
    file = Path(name)
    stem = file.absolute().parent.name if file.name == CONFIG else file.stem
    name = "-".join([stem, *(word.strip() for word in words.split(",") if word.strip())])
    config = copy.deepcopy(config)
    config.init_from = Path(config.init_from).name
    if config.data.dir:  # two datasets can get the same name; then the second command fails
        config.data.dir = files.local(config.data.dir).absolute().name
    return name + config_io.folder_suffix(config, overrides, config_lib.UNNAMED)


def configure_blend(names: Sequence[str], folder: RunFolder) -> Config:
    """Returns the configuration of a blend. A blend averages the scores of runs.

    `names` are the folders of the runs. `folder` is the folder of the blend. If all runs have the
    same `eval.split`, the blend has the same split. Raises UserError if there is only one run, if a
    run is named twice, or if the folder contains another run.
    """
    runs = tuple(str(files.local(name).absolute()) for name in names)
    if len(runs) < 2:
        raise UserError(
            f"--runs={','.join(names)}: a blend needs at least two runs; name two runs, --runs=A,B"
        )
    if len({Path(name).resolve() for name in runs}) < len(runs):
        raise UserError(f"--runs={','.join(names)}: a run is named twice\nname each run once")
    if folder.has(CONFIG):
        earlier = folder.config
        if tuple(earlier.join.runs) != runs:
            content = "a blend of other runs" if earlier.join.runs else "a trained run"
            path = messages.relative_path(folder.path)
            raise UserError(f"--workdir={path} contains {content}: use another folder")
        return earlier
    config = config_lib.default()
    config.join.runs = runs
    splits = {open_run(name).config.eval.split for name in runs}
    if len(splits) == 1:
        (config.eval.split,) = splits
    return config


def configure_evaluation(config: Config, overrides: Sequence[str]) -> Config:
    """Returns a copy of a configuration for an evaluation with other values of some fields.

    `config` is of a trained run, or of a blend (averaged scores of runs). `overrides` are words
    such as `--config.eval.split=test`. Raises UserError if an override has no effect, or a value is
    out of range.
    """
    names = config_io.override_names(overrides)
    if "eval.split" in names:
        config.eval.splits = ()
    config = config_io.override(config, overrides)
    if config_lib.is_blend(config):
        config_io.check_overridden(overrides, config_lib.BLEND_FIELDS, "evaluate")
    values = dict(config_lib.fields(config))
    for problem in filter(None, (config_lib.explain_unread(name, values) for name in names)):
        raise UserError(problem)
    config_lib.check_ranges(config)
    return config


def set_up_devices(config: Config) -> None:
    """Finds the devices, and makes jax store compiled programs in the cache folder.

    Raises UserError if no device is usable.
    """
    from vidjax.core import devices
    from vidjax.runs import programs

    if config.deterministic:
        programs.make_deterministic()
    programs.cache_programs(files.cache_root(config.data.cache_dir))
    devices.make_mesh()


def load_data(
    source: "Mapping[str, Clips] | str | Path | Config",
    labels: "LabelSource" = None,
    *,
    cache_dir: str | Path | None = None,
    quality: "Quality" = "given",
) -> "Dataset":
    """Loads a dataset for training and evaluation.

    Clips in memory are checked and copied, and are never written to the disk. Clips in files are
    checked, and the first call stores them in the cache folder. Later calls read the cache
    until a byte of the source changes. A frame whose feature contains a NaN or an infinity is left
    out and counted.

    Args:
      source: the clips, in one of three forms:

        - A dict: split (`train`, `val`, `test`) -> clip name -> modality -> features. Features are
          [T, D] or [D], float16, float32, float64 or int8. Frames of a modality `face` may also
          have the values `face_quality`, `face_detection` and `face_number` (number of the frame in
          the clip), [T]. In place of the features, a dict with the keys `features`, `quality`,
          `detection` and `number` may be given. A clip may lack modalities, or have no frame.
        - The path of a folder of iQIYI-VID pickles, `.npz` files or parquet tables.
        - A configuration. Its group `config.data` describes the dataset: give no other argument.
      labels: a dict, clip name -> identity, for all splits. Or the path of a table (.csv, .tsv or
        .parquet) with the columns `clip` and `identity`, or of ground truth in the iQIYI-VID
        format. A clip without a label, or with the label None, is a distractor. A split without a
        labelled clip is ranked but not scored. None means the ground truth in the folder of the
        features.
      cache_dir: the cache folder for clips in files. None means `$VIDJAX_CACHE` or
        `~/.cache/vidjax`.
      quality: how the quality of a frame is measured. iQIYI-VID pickles contain it. `given` uses
        `quality` or, if a clip has no `quality`, the L2 norm of the feature. `norm` always uses the
        L2 norm. Use the same value as `config.data.quality` in training.

    Raises:
      UserError: clips or labels are malformed. The message names the file or split, clip and field.
      FileNotFoundError: the folder does not exist or contains no features.
      OSError: the cache cannot be written.
    """
    paths = (str, os.PathLike, type(None))
    check_argument("load_data: cache_dir", cache_dir, paths, "the path of a folder")
    from vidjax.data import sources

    if not isinstance(source, ConfigDict):
        given = cast("Mapping[str, Clips] | str | Path", source)
        return sources.load(given, labels, cache_dir=cache_dir, quality=quality)
    for name, value, default, remedy in (
        ("labels", labels, None, "leave it out: labels are read from the folder config.data.dir"),
        ("cache_dir", cache_dir, None, "set config.data.cache_dir"),
        ("quality", quality, "given", "set config.data.quality"),
    ):
        if value != default:
            raise UserError(
                f"load_data: {name} must not be given if the source is a configuration\n{remedy}"
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
            "choose another folder with --config.data.cache_dir=FOLDER or the variable VIDJAX_CACHE"
        ) from error


def train(
    config: Config,
    workdir: str | Path,
    data: "Dataset",
    *,
    num_devices: int | None = None,
    log: "LogFunction | None" = None,
) -> "Results":
    """Trains a system, and writes checkpoints and results to a folder.

    The folder is made if it does not exist, and locked until the end. A stopped run is resumed from
    the last checkpoint. A finished run is not trained again.

    Args:
      config: the result of `load_config`. The run uses a copy in which `data.name` and `data.dir`
        describe `data`.
      workdir: the folder for checkpoints, metrics, rankings and the report.
      data: the result of `load_data`.
      num_devices: the number of devices to use. None means all.
      log: a function that gets each line of `metrics.jsonl` as a dict, after it is written. If it
        raises an error, training stops, and the same call resumes the training. Then `log` may get
        some lines again. With several processes, only the first process calls it.

    Returns:
      The results of the run: `map` and all other entries of `metrics.json`.

    Raises:
      UserError: the configuration does not fit the data or the run in the folder, or another
        process has locked the folder.
      CheckpointError: the checkpoints of the run are damaged, missing, or of another model.
      Interrupted: SIGINT, SIGTERM, SIGHUP or SIGUSR1 arrived, and the state was saved. The same
        call resumes the run. A second SIGINT raises KeyboardInterrupt immediately.
    """
    check_argument("train: config", config, ConfigDict, "a configuration, from vidjax.load_config")
    check_argument("train: workdir", workdir, (str, os.PathLike), "the path of a folder")
    if not (log is None or callable(log)):
        raise ArgumentError(f"train: log must be a function, not {type(log).__name__}")
    check_loaded("train", data)
    config = _name_data(config, data)
    with make_and_lock(workdir) as path:
        metrics, _ = train_run(config, RunFolder(path), data, num_devices=num_devices, log=log)
    return _make_results(RunFolder(path), config, metrics)


def check_loaded(function: str, data: object) -> None:
    """Raises ArgumentError, which names `function`, if `data` is no result of `load_data`."""
    if not hasattr(data, "train_batches"):
        raise ArgumentError(
            f"{function}: data must be the result of vidjax.load_data, not a {type(data).__name__}"
        )


def _name_data(config: Config, data: "Dataset") -> Config:
    """Returns a copy of a configuration in which `data.name` and `data.dir` describe `data`.

    Fields that apply only to other datasets get their default values. Raises UserError if the data
    were loaded with another value of `quality` than `config.data.quality`.
    """
    config, origin = copy.deepcopy(config), data.report["data"]
    name, folder, quality = origin["name"], origin["dir"], origin["quality"]
    if name == "arrays" and config.data.quality != quality:
        raise UserError(
            f"config.data.quality={config.data.quality}, but the data were loaded with "
            f"quality={quality!r}\nuse --config.data.quality={quality}, or "
            f"vidjax.load_data(..., quality={config.data.quality!r})"
        )
    known = config.data.name, config.data.dir and str(files.absolute(config.data.dir))
    if known == (name, folder):
        return config
    config.data.update(name=name, dir=folder)
    values = dict(config_lib.fields(config))
    for field in config_lib.FIELDS.values():
        when = field.read_when
        is_of_others = when and when.field == "data.name" and not when.condition(values)
        if is_of_others and field.name != "data.dir":
            config.data[field.name.removeprefix("data.")] = field.default
    return config


def train_run(
    config: Config,
    folder: RunFolder,
    data: "Dataset | None" = None,
    *,
    num_devices: int | None = None,
    command: str | None = None,
    began: float | None = None,
    log: "LogFunction | None" = None,
) -> tuple[dict[str, Any], bool]:
    """Trains a system in a folder that the caller has locked.

    If `data` is None, the data that `config` describes are loaded. `command` is the command line
    that repeats the training. `began` is the value of `time.monotonic()` at the start of the
    process. `log` gets each line of `metrics.jsonl` as a dict.

    Returns:
      The content of `metrics.json`, and True if the run had been finished before the call.
    """
    from vidjax.data import labels
    from vidjax.evaluation import analysis
    from vidjax.runs import checkpoint, digests
    from vidjax.training import init_from, joint, loop as training, resume
    from vidjax.training.dry_run import dry_run

    config_lib.check(config)
    results = resume.read_finished_metrics(folder, config)
    if results is None:
        dry_run(config, data)
        if config.data.weights:  # reports a mistake before the data are read
            labels.refuse_no_file(Path(config.data.weights))
        set_up_devices(config)
        if config.init_from and not checkpoint.list_folders(folder.path):
            init_from.find_source(config)
    data = load_data(config) if data is None else data
    _check_same(config, data)
    if results is None:
        options: dict[str, Any] = {"num_devices": num_devices, "command": command, "began": began}
        if config.join.systems:
            train = functools.partial(train_run, num_devices=num_devices, log=log)
            return joint.train_systems(config, folder, data, train, **options), False
        return training.train(config, folder.path, data, **options, log=log), False
    digests.check_data(folder.path, results["trained_on"], config, data)
    is_missing = config.eval.report and not files.exists(folder.paths().report)
    if is_missing and distributed.is_first():
        analysis.write_report(folder, config.eval.split)  # the report was deleted
    return results, True


def _make_results(folder: RunFolder, config: Config, metrics: Mapping[str, Any]) -> "Results":
    from vidjax.runs import results

    paths = folder.paths(config.eval.split, apart=bool(metrics.get("overrides")))
    return results.Results.from_values(metrics, config.eval.split, paths)


def _check_same(config: Config, data: "Dataset") -> None:
    """Raises UserError if the processes of a run have different configurations or data."""
    fields = {name: x for name, x in config_lib.fields(config) if name not in config_lib.PATHS}
    fields["init_from"] = config.init_from  # the digest is only of the files that the others name
    distributed.check_same({"configuration": fields, "data": data.report["data"]["digest"]})


def evaluate(
    workdir: str | Path,
    data: "Dataset | None" = None,
    *,
    split: str | None = None,
    num_devices: int | None = None,
) -> "Results":
    """Ranks a split of the data with a trained run. Returns the results, as `train` does.

    Writes the results and a report to the folder of the run. The folder is locked until the end.

    Args:
      workdir: the folder of a run.
      data: the result of `load_data`. None means the dataset of the run.
      split: the split to rank, such as `test`. None means the split that training evaluated. A
        split without a labelled clip is ranked but not scored: its `map` is None.
      num_devices: the number of devices to use. None means all. Scores do not depend on it.

    Raises:
      UserError: the folder contains no run, or the data do not fit.
      CheckpointError: no checkpoint is usable.
    """
    check_argument("evaluate: workdir", workdir, (str, os.PathLike), "the path of a run's folder")
    check_argument("evaluate: split", split, (str, type(None)), "the name of a split, or None")
    if data is not None:
        check_loaded("evaluate", data)
    folder = open_run(workdir)
    config = folder.config
    config.eval.split, config.eval.splits = split or config.eval.split, ()
    with make_and_lock(folder.path):
        metrics = evaluate_run(config, folder, data, num_devices=num_devices)[config.eval.split]
    return _make_results(folder, config, metrics)


def evaluate_run(
    config: Config,
    folder: RunFolder,
    data: "Dataset | None" = None,
    *,
    num_devices: int | None = None,
    command: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Ranks the clips of `config.eval.split` and `config.eval.splits`. Returns split -> metrics.

    The clips are scored by the run in `folder`. If `config.join.runs` is set, the scores of these
    runs are joined (a blend). The caller has locked `folder`. If `data` is None, the data that
    `config` describes are loaded. `command` is the command line of the user, which is stored in the
    metrics of a new blend.
    """
    from vidjax.evaluation import analysis

    @functools.cache
    def read_data() -> "Dataset":
        loaded = load_data(config) if data is None else data
        _check_same(config, loaded)
        return loaded

    set_up_devices(config)
    # The runs of a blend may read the same clips from different folders.
    load = load_data if config.join.runs and data is None else lambda _: read_data()
    return analysis.evaluate(config, folder, load, num_devices=num_devices, command=command)


def compare(
    runs: Sequence[str | Path | Sequence[str | Path]],
    *,
    out: str | Path | None = None,
    split: str | None = None,
) -> "Comparison":
    """Compares the MAP of two or more runs on the same clips.

    The result contains the difference in MAP to the first run, with a 95 % interval. Print the
    result, or use its methods `to_dict` and `to_latex` or its attribute `differences`. The scores
    are not computed again, because the folders of the runs contain their results.

    Args:
      runs: the folders of the runs. To compare systems that were trained with several seeds, give
        lists of equal length: `[["a1", "a2", "a3"], ["b1", "b2", "b3"]]`. Then the intervals
        include the variation between seeds.
      out: a folder for `comparison.html`, `.json` and `.tex`. If it is None, no file is written.
      split: the split to compare on. None means the split that each run evaluated.

    Raises:
      UserError: there are fewer than two runs, the lists have different lengths, the runs have
        ranked different clips, or `out` contains a run.
    """
    check_argument("compare: runs", runs, (list, tuple), "a list of folders, or of lists of them")
    check_argument("compare: out", out, (str, os.PathLike, type(None)), "the path of a folder")
    lists: list[Any] = [run if type(run) in (list, tuple) else [run] for run in runs]
    for path in itertools.chain(*lists):
        check_argument("compare: run", path, (str, os.PathLike), "the path of a run's folder")
    groups = [[os.fspath(path) for path in paths] for paths in lists]
    if out is not None and RunFolder(out).has(CONFIG):
        raise UserError(f"'{out}' contains a run: choose another folder for the comparison")
    if len(groups) < 2 or not all(groups):
        raise UserError("compare: there are too few runs: give two runs, or two lists of runs")
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
) -> "Predictor | JointPredictor":
    """Loads the model of a trained run, to use it on new clips.

    The result has the methods `rank`, `identify` and `scores`, which take clips. The result also
    has the method `embed`, except for a blend (several runs whose scores are joined).

    Args:
      workdir: the folder of a run.
      step: the checkpoint to load. `best` is the checkpoint with the highest MAP.
      num_devices: the number of devices to use. None means all. Scores do not depend on it.

    Raises:
      UserError: the folder contains no run.
      CheckpointError: no checkpoint is usable.
    """
    check_argument("restore: workdir", workdir, (str, os.PathLike), "the path of a run's folder")
    from vidjax.evaluation import predict

    return predict.restore(workdir, step=step, num_devices=num_devices)
