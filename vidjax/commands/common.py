"""What the words of a command mean to each mode: its configuration, its folders, its data."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from vidjax import api, config_io, files, messages, metrics
from vidjax import config as config_lib
from vidjax.command_line import Arguments
from vidjax.config import Config
from vidjax.config_io import folder_suffix, override_names
from vidjax.errors import UserError
from vidjax.run import parts as parts_lib
from vidjax.run import results as results_lib
from vidjax.run.parts import Part

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
    config = config_io.override(api.load_config(args.config), args.overrides)
    workdir = Path(args.workdir or Path("runs", _default_name(args, config))).expanduser()
    if config.data.dir and workdir.absolute() == Path(config.data.dir).expanduser().absolute():
        raise UserError(
            f"--workdir: '{workdir}' is config.data.dir: name another folder for the run"
        )
    config_lib.check(config, fresh=not (workdir / "config.json").exists())
    return config, workdir


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
    unnamed = {*config_lib.MOVABLE, "resume.allow"} - {"data.dir", "data.weights"}
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
            return api.load_config(args.config or "")
        return api.run_config(Path(args.workdir or "").expanduser())

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
        if config_lib.within(name, TRAINED):
            raise UserError(
                f"--mode={args.mode} trains nothing: config.{name} has no effect\nleave it out"
            )
    workdir = Path(args.workdir).expanduser()
    in_parts = args.mode == "merge" or args.shard is not None
    if in_parts and (args.runs is not None or api.run_config(workdir).join.runs):
        raise UserError(
            f"{f'--shard={args.shard}' if args.shard else '--mode=merge'} takes one trained run, "
            "not several joined\nrank those in one process: --mode=evaluate --runs=A,B"
        )
    config = api.run_config(workdir) if args.runs is None else _joined_config(args, workdir)
    config = config_io.override(config, args.overrides)
    if config.join.runs:
        from vidjax.commands import blend  # it imports jax

        blend.check_overrides(config, override_names(args.overrides))
    if args.overrides:  # a run of an earlier version may have what is out of range now
        config_lib.check_ranges(config)
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
    splits = {api.run_config(Path(name)).eval.split for name in runs}
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
    api.run_config(workdir)
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
    config = config_io.override(api.run_config(workdir), args.overrides)
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
        config = api.load_config(args.config)
        return config_io.override(config, args.overrides), None
    if not args.workdir:
        if args.overrides:
            raise UserError("--mode=check with fields needs --workdir=FOLDER or --config=FILE")
        return None, None
    workdir = Path(args.workdir).expanduser().absolute()
    try:
        config = api.run_config(workdir)
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
        return api.load_config(args.config), args.config
    if args.workdir:
        workdir = Path(args.workdir).expanduser()
        return api.run_config(workdir), messages.shown(workdir / "config.json")
    return config_lib.default(), "default"


def rows(
    config: Config, workdir: Path, results: Mapping[str, Any], seconds: float | None
) -> dict[str, str]:
    """Returns name -> text of every row.

    Args:
      config: the configuration of the command.
      workdir: the run's folder.
      results: the content of `metrics.json`.
      seconds: time that the command took; None for a run that was finished before.
    """
    split = config.eval.split
    rows = {"workdir": messages.shown(workdir)}
    if "map" in results:
        kind = results["map_kind"].replace("_", " ")
        kind = split if kind in ("val", split) else f"{split}, {kind}"
        if results["map_kind"] == "in_sample":
            kind += ": the run was trained on these clips, and MAP is too high"
        rows["MAP@100"] = "; ".join([f"{results['map']:.4f} on {kind}", *metrics.describe(results)])
    else:
        rows["MAP@100"] = f"none: {split} has no ground truth and is ranked, not scored"
        report = results_lib.read_data_report(workdir)
        if reason := results_lib.unmeasured(config.to_dict(), results, report):
            rows["measured"] = f"nothing: {reason}"
    if "best_map" in results:
        rows["best"] = f"{results['best_map']:.4f} at step {results['best_step']:,}"
    if data := results_lib.describe_data(results):
        rows["data"] = data
    rows["clips"] = f"{results['num_clips']:,}"
    rows["identities"] = f"{results['num_identities']:,}"
    if seconds is not None:
        rows["time"] = f"{seconds:.1f} s"
    elif "seconds" in results:
        rows["trained in"] = f"{results['seconds']:.1f} s"
    return rows | {
        name: messages.shown(Path(path)) for name, path in result_files(config, workdir).items()
    }


def part_rows(workdir: Path, part: Part, seconds: float) -> dict[str, str]:
    """Returns name -> text of every row about a part, which the command took `seconds` to make."""
    facts, shard = part.facts, part.shard
    found = parts_lib.find(workdir, facts.split).items()
    there = sum(one.total == shard.total and isinstance(of, Part) for one, of in found)
    rows = {"workdir": messages.shown(workdir), "part": f"{shard} of {facts.split}"}
    rows |= {"clips": f"{facts.num_clips:,}", "time": f"{seconds:.1f} s"}
    rows["file"] = messages.shown(part.path)
    left = shard.total - there
    rows["next"] = f"{left} of {shard.total} parts are to come" if left else "--mode=merge"
    return rows


def result_files(config: Config, workdir: Path) -> dict[str, str]:
    """Returns `ranking` and, if it exists, `report` -> path."""
    own_split = config_io.load_workdir(workdir).eval.split
    paths = results_lib.paths(workdir, config.eval.split, own_split)
    report = {"report": str(paths.report)} if paths.report.exists() else {}
    return {"ranking": str(paths.ranking), **report}


def to_json(content: Mapping[str, Any]) -> str:
    """Returns a summary as one line of JSON; numbers that JSON lacks become `inf` and `nan`."""
    return json.dumps(_plain(content), allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
