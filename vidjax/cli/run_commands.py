"""`vidjax train`, `evaluate` and `report`: a run is trained, ranks a split, gets its page anew.

`train` also resumes a run, and evaluates it. `evaluate` ranks with one or several trained runs.
Functions import what they need: libraries, which take seconds, load after the flags are checked.
"""

import argparse
import contextlib
import copy
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidjax.cli import shared_flags
from vidjax.core import metrics
from vidjax.runs import config as config_lib
from vidjax.runs import config_io, signals
from vidjax.runs import results as results_lib
from vidjax.runs.config import Config
from vidjax.runs.run_folder import CONFIG, RunFolder, locked
from vidjax.training import api
from vidjax.utils import messages
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Parser, Result

# Fields and groups that training alone reads.
TRAINED = (
    "batch_size", "checkpoint_every_seconds", "data.balance", "data.weights", "eval.every_epochs",
    "log_every_steps", "loss", "mixup", "num_epochs", "optim", "seed", "transforms",
)  # fmt: skip
# Fields that a blend reads. Each of its runs keeps its own values of all other fields.
JOINED = (
    "eval.split", "eval.block_size", "eval.members", "eval.report", "data.dir", "data.cache_dir",
    "join.weights",
)  # fmt: skip


def add_train_flags(parser: Parser) -> None:
    """Adds the flags of `train`."""
    shared_flags.config_flag(parser, required=True)
    parser.add_argument("--workdir", metavar="FOLDER", help="the run's folder (default: runs/NAME)")
    parser.fields()
    shared_flags.process_flags(parser)
    examples = ("--config=configs/mma.py", "--config=mma:iqiyi_vid --config.data.dir=PATH")
    parser.command(train, *examples)


def train_settings(args: argparse.Namespace) -> tuple[Config, Path]:
    """Returns the configuration to train and the run's folder."""
    config = config_io.override(api.load_config(args.config), args.overrides)
    workdir = Path(args.workdir or Path("runs", _default_name(args, config))).expanduser()
    if config.data.dir and workdir.absolute() == Path(config.data.dir).expanduser().absolute():
        raise UserError(
            f"--workdir: '{workdir}' is config.data.dir: name another folder for the run"
        )
    config_lib.check(config)
    return config, workdir


def _default_name(args: argparse.Namespace, config: Config) -> str:
    """Returns the name of a run's folder: the file, its arguments, and the overrides.

    Of `data.dir` it has the last part alone; the run itself refuses another folder's data.
    """
    name, _, words = args.config.partition(":")
    file = Path(name)
    stem = file.absolute().parent.name if file.name == CONFIG else file.stem
    name = "-".join([stem, *(word for word in words.split(",") if word)])
    config = copy.deepcopy(config)
    if config.data.dir:
        config.data.dir = Path(config.data.dir).expanduser().absolute().name
    unnamed = {*config_lib.MOVABLE} - {"data.dir", "data.weights"}
    return name + config_io.folder_suffix(config, args.overrides, unnamed)


def train(args: argparse.Namespace) -> Result:
    """Trains a run, resumes it, or shows the results of one that was finished before."""
    began = time.monotonic()
    config, path = train_settings(args)
    from vidjax.training import plan

    if not (path / CONFIG).exists():  # before there is a folder, or data are read
        plan.dry_run(config)
        api.set_up_devices(config)
    with locked_folder(path) as workdir:
        results, before = api.train_run(config, RunFolder(workdir), command=args.line, began=began)
    seconds = None if before else results["seconds"]
    return summary(config, RunFolder(workdir), results, seconds)


def add_evaluate_flags(parser: Parser) -> None:
    """Adds the flags of `evaluate`."""
    shared_flags.workdir_flag(parser)
    shared_flags.definitions_flag(parser)
    parser.fields()
    about = "folders of runs to join; --workdir is the folder of the results"
    parser.add_argument("--runs", metavar="A,B", help=about)
    shared_flags.process_flags(parser)
    parser.command(
        evaluate,
        "--workdir=runs/mma --config.eval.split=test",
        "--workdir=runs/both --runs=runs/mma,runs/deepmef",
    )


def add_report_flags(parser: Parser) -> None:
    """Adds the flags of `report`."""
    shared_flags.workdir_flag(parser)
    parser.command(report, "--workdir=runs/mma")


def evaluate_settings(args: argparse.Namespace) -> tuple[Config, RunFolder]:
    """Returns the configuration of a run and its folder.

    With `--runs` the folder is that of the joined results, and the configuration names the runs.
    """
    for name in config_io.override_names(args.overrides):
        if config_lib.within(name, TRAINED):
            raise UserError(f"evaluate trains nothing: config.{name} has no effect\nleave it out")
    shared_flags.load_definitions(args)
    if args.coordinator and args.runs is not None:
        raise UserError(
            "--coordinator does not go with --runs: several processes evaluate one run\n"
            "leave out --coordinator, --num_processes and --process_id"
        )
    folder = RunFolder(args.workdir) if args.runs else api.open_run(args.workdir)
    config = _joined_config(args, folder) if args.runs else folder.config
    config = config_io.override(config, args.overrides)
    if config.join.runs:
        shared_flags.given_fields(args, JOINED)
    config_lib.check_ranges(config)
    return config, folder


def _joined_config(args: argparse.Namespace, folder: RunFolder) -> Config:
    """Returns a configuration that joins the runs of `--runs`, on their split if it is the same."""
    runs = tuple(
        str(Path(name).expanduser().absolute()) for name in shared_flags.run_folders(args.runs)
    )
    if not runs:
        raise UserError("--runs= is empty: name two runs or more, --runs=A,B")
    if folder.has(CONFIG):
        earlier = tuple(folder.config.join.runs)
        if earlier != runs:
            content = "a blend of other runs" if earlier else "a trained run"
            raise UserError(f"--workdir: '{args.workdir}' holds {content}: use another folder")
    config = config_lib.default()
    config.join.runs = runs
    splits = {api.open_run(name).config.eval.split for name in runs}
    if len(splits) == 1:
        (config.eval.split,) = splits
    return config


def evaluate(args: argparse.Namespace) -> Result:
    """Ranks a split."""
    began = time.monotonic()
    config, folder = evaluate_settings(args)
    from vidjax.training import plan

    if args.overrides and not config.join.runs:
        plan.dry_run(config)
    with locked_folder(folder.path):
        if config.join.runs:
            from vidjax.evaluation import blend

            api.set_up_devices(config)
            results = blend.blend_runs(config, folder, api.load_data, command=args.line)
        else:
            results = api.evaluate_run(config, folder)
    return summary(config, folder, results, time.monotonic() - began)


def report(args: argparse.Namespace) -> Result:
    """Writes `report.html`."""
    folder = api.open_run(args.workdir)
    from vidjax.evaluation.report import run_page

    page = run_page.write(folder)
    return Result({"workdir": str(folder.path), "report": str(page)}, text=f"report: {page}")


def locked_folder(path: Path) -> contextlib.AbstractContextManager[Path]:
    """Makes a run's folder and holds its lock; signals end the process even while it compiles."""
    if signal.getsignal(signal.SIGTERM) is messages.stop_at_once:
        signals.end_on_signals()
    return locked(path)


def summary(
    config: Config, folder: RunFolder, results: Mapping[str, Any], seconds: float | None
) -> Result:
    """Returns the scores of a run, `results` of `metrics.json`, and the files to look at.

    `seconds` is None for a run that was finished before.
    """
    paths = folder.paths(config.eval.split, apart=bool(results.get("overrides")))
    found = {"ranking": paths.ranking} | ({"report": paths.report} if paths.report.exists() else {})
    rows = _rows(config, folder, results, seconds)
    rows |= {name: messages.shown(path) for name, path in found.items()}
    content = {"workdir": str(folder.path), **{name: str(path) for name, path in found.items()}}
    content |= {"finished_before": seconds is None, "metrics": dict(results)}
    note = ": finished before, nothing was trained now" if seconds is None else ""
    return Result(content, rows, note=note)


def _rows(
    config: Config, folder: RunFolder, results: Mapping[str, Any], seconds: float | None
) -> dict[str, str]:
    split = config.eval.split
    rows = {"workdir": messages.shown(folder.path)}
    if "map" in results:
        kind = results["map_kind"].replace("_", " ")
        kind = split if kind in ("val", split) else f"{split}, {kind}"
        if results["map_kind"] == "in_sample":
            kind += ": the run was trained on these clips, and MAP is too high"
        rows["MAP@100"] = "; ".join([f"{results['map']:.4f} on {kind}", *metrics.describe(results)])
    else:
        rows["MAP@100"] = f"none: {split} has no ground truth and is ranked, not scored"
        if reason := results_lib.unmeasured(config.to_dict(), folder.path):
            rows["measured"] = f"nothing: {reason}"
    if settings := results_lib.describe_overrides(results):
        rows["scored with"] = settings
    if "best_map" in results:
        rows["best"] = f"{results['best_map']:.4f} at step {results['best_step']:,}"
    if data := results_lib.describe_data(results):
        rows["data"] = data
    rows["clips"] = f"{results['num_clips']:,}"
    rows["identities"] = f"{results['num_identities']:,}"
    if "num_map_identities" in results:
        rows["identities"] += f"; MAP is the mean of {results['num_map_identities']:,} with clips"
    if seconds is not None:
        rows["time"] = f"{seconds:.1f} s"
    elif "seconds" in results:
        rows["trained in"] = f"{results['seconds']:.1f} s"
    return rows
