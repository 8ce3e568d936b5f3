"""What the words of a command mean to each mode: its configuration, its folders, its data."""

import copy
from pathlib import Path
from typing import Literal, NamedTuple, cast

from vidjax import config as config_lib
from vidjax import config_io, files
from vidjax.command_line import PROGRAM, Arguments
from vidjax.config import Config, out_of_range
from vidjax.config_io import folder_suffix, override_names
from vidjax.data.clips import TrainingData
from vidjax.errors import DiskError, UserError
from vidjax.run import resume

RECORDED = "config.json"  # of a run's folder
NEEDS_WORKDIR = "name the folder of a trained run"
RANKABLE = ("eval.split", "eval.checkpoint")  # fields that a ranking of new clips reads
# Fields and groups that training alone reads.
TRAINED = (
    "batch_size", "checkpoint_every_seconds", "data.balance", "data.weights", "eval.every_epochs",
    "log_every_steps", "loss", "mixup", "num_epochs", "optim", "resume", "seed", "transforms",
)  # fmt: skip
COMPARABLE = ("eval.split", "data.dir", "data.cache_dir")  # fields that a comparison reads


class Comparison(NamedTuple):
    """What `--mode=compare` reads and writes.

    Attributes:
      workdir: the folder that the comparison is written to.
      runs: the folders of two runs or more; the others are compared with the first.
      split: the split to compare on; None for the one that the first run evaluates.
      directory: the folder of the data, None for that of each run.
      cache_dir: the folder of the records, None for that of each run.
    """

    workdir: str
    runs: list[str]
    split: str | None
    directory: str | None
    cache_dir: str | None


class RankingOptions(NamedTuple):
    """What `--mode=rank` reads and writes.

    Attributes:
      workdir: the run's folder.
      input: the folder or the table of the clips.
      out: the new file.
      split: the split to read; None where there is one alone.
      step: the checkpoint.
    """

    workdir: Path
    input: Path
    out: Path
    split: str | None
    step: Literal["latest", "best"]


def for_training(args: Arguments) -> tuple[Config, Path]:
    """Returns the configuration to train and the run's folder, for `--mode=train`.

    Raises:
      ValueError: a mistake in the words, or a value that no training can use.
    """
    if args.runs is not None:
        raise UserError(
            "--runs takes trained runs: use it with --mode=evaluate, which joins them,\n"
            "or with --mode=compare"
        )
    if not args.config:
        raise UserError("--mode=train needs --config=FILE, e.g. --config=configs/mma.py")
    config = config_io.override(experiment(args.config), args.overrides)
    workdir = Path(args.workdir or Path("runs", _default_name(args, config))).expanduser()
    if config.data.dir and workdir.absolute() == Path(config.data.dir).expanduser().absolute():
        raise UserError(
            f"--workdir: '{workdir}' is config.data.dir: name another folder for the run"
        )
    config_lib.check(config, fresh=not (workdir / "config.json").exists())
    resume.check_allowed(config)
    return config, workdir


def experiment(spec: str) -> Config:
    """Returns the configuration of `--config`: that of an experiment's file, or of an earlier run.

    Args:
      spec: `FILE[:ARG,...]`, or the `config.json` of a run.

    Raises:
      ValueError: there is no such file, or a mistake in it.
    """
    if Path(spec).name != RECORDED:
        return config_io.load_file(spec)
    return run_config(Path(spec).expanduser().absolute().parent)


def _default_name(args: Arguments, config: Config) -> str:
    """Returns the name of a run's folder: the file, its arguments, and the overrides.

    Of the folder of the data it has the last name: where two bear one, the run tells its own.
    """
    name, _, words = (args.config or "").partition(":")
    file = Path(name)
    stem = file.absolute().parent.name if file.name == RECORDED else file.stem
    name = "-".join([stem, *(word for word in words.split(",") if word)])
    config = copy.deepcopy(config)
    if config.data.dir:
        config.data.dir = Path(config.data.dir).expanduser().absolute().name
    unnamed = {*resume.MOVABLE, "resume.allow"} - {"data.dir", "data.weights"}
    return name + folder_suffix(config, args.overrides, unnamed)


def rehearse(args: Arguments, config: Config) -> None:
    """Refuses a training, or the evaluation of a run, that cannot work; reads no data.

    Args:
      args: the words of the command.
      config: what they mean: the configuration with its overrides.

    Raises:
      ValueError: a name or a value that the system or the data do not have.
      OSError: the folder of the data is absent, or has no features.
    """
    from vidjax.training.rehearsal import rehearse

    def original() -> Config:
        if args.mode == "train":
            return experiment(args.config or "")
        return run_config(Path(args.workdir or "").expanduser())

    rehearse(config, args.overrides, original, training=args.mode == "train")


def for_evaluation(args: Arguments) -> tuple[Config, Path]:
    """Returns the configuration of a run and its folder, for `--mode=evaluate` and `--mode=merge`.

    With `--runs` the folder is that of the joined results, and the configuration names the runs.

    Raises:
      ValueError: a mistake in the words, or no run in the folder.
    """
    if not args.workdir:
        raise UserError(f"--mode={args.mode} needs --workdir=FOLDER: {NEEDS_WORKDIR}")
    if args.config:
        raise UserError(
            f"--mode={args.mode} takes its configuration from --workdir, not --config:\n"
            "leave --config out, and change fields by --config.FIELD=VALUE"
        )
    for name in override_names(args.overrides):
        if resume.within(name, TRAINED):
            raise UserError(
                f"--mode={args.mode} trains nothing: config.{name} has no effect\nleave it out"
            )
    workdir = Path(args.workdir).expanduser()
    in_parts = args.mode == "merge" or args.shard is not None
    if in_parts and (args.runs is not None or run_config(workdir).join.runs):
        raise UserError(
            f"{f'--shard={args.shard}' if args.shard else '--mode=merge'} takes one trained run, "
            "not several joined\nrank those in one process: --mode=evaluate --runs=A,B"
        )
    config = run_config(workdir) if args.runs is None else _joined_config(args, workdir)
    config = config_io.override(config, args.overrides)
    if config.join.runs:
        from vidjax.commands import blend  # it imports jax

        blend.check_overrides(config, override_names(args.overrides))
    if args.overrides:  # a run of an earlier version may have what is out of range now
        for problem in out_of_range(dict(config_lib.fields(config))):
            raise UserError(problem)
    return config, workdir


def _joined_config(args: Arguments, workdir: Path) -> Config:
    """Returns a configuration that joins the runs of `--runs`, on the split that all evaluate."""
    runs = tuple(str(Path(name).expanduser().absolute()) for name in args.folders)
    if not runs:
        raise UserError("--runs= is empty: name two runs or more, --runs=A,B")
    if (workdir / "config.json").exists():
        earlier = tuple(config_io.load_workdir(workdir).join.runs)
        if earlier != runs:
            content = "a blend of other runs" if earlier else "a trained run"
            raise UserError(f"--workdir: '{args.workdir}' holds {content}: use another folder")
    config = config_lib.default()
    config.join.runs = runs
    splits = {run_config(Path(name)).eval.split for name in runs}
    if len(splits) == 1:
        (config.eval.split,) = splits
    return config


def for_report(args: Arguments) -> Path:
    """Returns the run's folder, for `--mode=report`.

    Raises:
      ValueError: a mistake in the words, or no run in the folder.
    """
    if not args.workdir:
        raise UserError(f"--mode=report needs --workdir=FOLDER: {NEEDS_WORKDIR}")
    if args.config or args.runs is not None or args.overrides:
        raise UserError("--mode=report takes --workdir alone: it shows the files of that folder")
    workdir = Path(args.workdir).expanduser().absolute()
    run_config(workdir)
    return workdir


def for_ranking(args: Arguments) -> RankingOptions:
    """Returns the run, the clips and the file of `--mode=rank`.

    Raises:
      ValueError: a mistake in the words, or no run in the folder.
    """
    if not args.workdir or not args.input or not args.out:
        raise UserError(
            f"--mode=rank needs --workdir=FOLDER: {NEEDS_WORKDIR},\n"
            "--input=PATH: a folder of features or a .parquet table, and\n"
            "--out=FILE: the new file, .csv, .tsv, .jsonl or .parquet"
        )
    if args.config or args.runs is not None:
        flag = "--config" if args.config else "--runs"
        raise UserError(f"--mode=rank takes one trained run, --workdir=FOLDER, not {flag}")
    clips = Path(args.input).expanduser()
    if not clips.exists():
        raise UserError(f"--input={args.input}: no such file or folder: name one with clips")
    workdir = Path(args.workdir).expanduser()
    given = _given(args, RANKABLE)
    config = config_io.override(run_config(workdir), args.overrides)
    split = config.eval.split if "eval.split" in given else None
    step = cast(Literal["latest", "best"], config.eval.checkpoint)
    return RankingOptions(workdir, clips, Path(args.out).expanduser(), split, step)


def _given(args: Arguments, readable: tuple[str, ...]) -> set[str]:
    """Returns the overridden fields; ValueError for one that the mode does not read."""
    given = set(override_names(args.overrides))
    if unread := sorted(given - set(readable)):
        raise UserError(
            f"--mode={args.mode} does not read config.{unread[0]}\n"
            f"choose from {', '.join(f'--config.{name}' for name in readable)}"
        )
    return given


def for_comparison(args: Arguments) -> Comparison:
    """Returns the runs and options of `--mode=compare`.

    Raises:
      ValueError: a mistake in the words.
    """
    if not args.workdir:
        raise UserError("--mode=compare needs --workdir=FOLDER, where the comparison is written")
    if args.config:
        raise UserError("--mode=compare reads trained runs: --runs=A,B, not --config")
    if len(args.folders) < 2:
        raise UserError(
            "--mode=compare needs --runs=A,B: folders of two runs or more, split by commas\n"
            "all others are compared with the first"
        )
    if files.exists(Path(args.workdir).expanduser() / RECORDED):
        raise UserError(
            f"--workdir={args.workdir} holds a run: name another folder for the comparison"
        )
    if (Path(args.workdir).expanduser() / RECORDED).exists():
        raise UserError(
            f"--workdir: '{args.workdir}' holds a run: name another folder to compare in"
        )
    config = config_io.override(config_lib.default(), args.overrides)
    given = _given(args, COMPARABLE)
    split = config.eval.split if "eval.split" in given else None
    return Comparison(args.workdir, args.folders, split, config.data.dir, config.data.cache_dir)


def for_check(args: Arguments) -> tuple[Config | None, Path | None]:
    """Returns the configuration and the folder to check, for `--mode=check`.

    The folder is None where the configuration of `--config` is checked with its data; both are None
    where only the environment is checked. The configuration is None where that of the run is
    damaged, which the check then reports.

    Raises:
      ValueError: a mistake in the words, or no run in the folder.
    """
    if args.runs is not None:
        raise UserError("--mode=check takes one --workdir=FOLDER; --runs goes with --mode=evaluate")
    if args.workdir and args.config:
        raise UserError(
            "--mode=check takes --workdir=FOLDER, or --config=FILE for its data alone: not both"
        )
    if args.config:
        config = experiment(args.config)
        return config_io.override(config, args.overrides), None
    if not args.workdir:
        if args.overrides:
            raise UserError("--mode=check with fields needs --workdir=FOLDER or --config=FILE")
        return None, None
    workdir = Path(args.workdir).expanduser().absolute()
    try:
        config = run_config(workdir)
    except ValueError:
        if not files.exists(workdir / "config.json"):
            raise
        return None, workdir
    return config_io.override(config, args.overrides), workdir


def for_display(args: Arguments) -> tuple[Config, str]:
    """Returns a configuration without its overrides, and its file, for `--mode=config`.

    Without `--config` and `--workdir` it is that of the defaults.

    Raises:
      ValueError: a mistake in the words, or no run in the folder.
    """
    if args.runs is not None:
        raise UserError("--mode=config takes --config=FILE or --workdir=FOLDER, not --runs")
    if args.workdir and args.config:
        raise UserError("--mode=config takes --config=FILE or --workdir=FOLDER: not both")
    if args.config:
        return experiment(args.config), args.config
    if args.workdir:
        workdir = Path(args.workdir).expanduser()
        return run_config(workdir), shown(workdir / "config.json")
    return config_lib.default(), "default"


def run_config(workdir: Path) -> Config:
    """Returns the configuration of the run in a folder.

    Raises:
      ValueError: no run there, or a damaged one; the error says how to make one.
    """
    try:
        return config_io.load_workdir(workdir)
    except ValueError as error:
        if files.exists(workdir / "config.json"):
            raise
        runs = sorted(path.parent for path in workdir.glob("*/config.json"))
        hint = f"train one: {PROGRAM} --config=FILE --workdir={shown(workdir)}"
        if runs:
            hint = f"it contains runs, name one: {', '.join(shown(path) for path in runs[:3])}"
        raise UserError(f"{error}\n{hint}") from error


def load_data(config: Config) -> TrainingData:
    """Returns the dataset of a configuration, converted into records where it is not yet.

    Raises:
      ValueError: an unknown name, no directory, or bad data.
      OSError: no data in the directory, or the cache cannot be written.
    """
    from vidjax.data.sources import load_dataset, synthetic_options

    cache = Path(config.data.cache_dir or files.default_cache_dir()).expanduser().absolute()
    try:
        return load_dataset(
            config.data.name,
            directory=config.data.dir,
            cache_dir=cache,
            size=config.data.size,
            seed=config.data.seed,
            non_finite=config.data.non_finite,
            quality=config.data.quality,
            knobs=synthetic_options(config.data),
        )
    except OSError as error:
        place = Path(error.filename).absolute() if error.filename else None
        if not place or not (place.is_relative_to(cache) or cache.is_relative_to(place)):
            raise
        raise DiskError(
            f"cannot write the cache '{cache}': {error.strerror}\n"
            "name another folder: --config.data.cache_dir=FOLDER, or the variable VIDJAX_CACHE"
        ) from error


def shown(path: Path) -> str:
    """Returns a path as short as it can be written from the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
