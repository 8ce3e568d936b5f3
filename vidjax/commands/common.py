"""What commands share: flags, checks before data are read, the run's folder, its summary.

Functions import what they need: libraries, which take seconds, load after the flags are checked.
"""

import argparse
import contextlib
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidjax import config_io, messages, metrics
from vidjax.config import Config
from vidjax.errors import UserError
from vidjax.messages import Parser, Result
from vidjax.run import results as results_lib
from vidjax.run import signals
from vidjax.run.folder import RunFolder, locked


def workdir_flag(parser: Parser, about: str = "the folder of a trained run") -> None:
    """Adds `--workdir`, which the command needs."""
    parser.add_argument("--workdir", metavar="FOLDER", required=True, help=about)


def config_flag(parser: Parser, *, required: bool = False) -> None:
    """Adds `--config`."""
    about = "an experiment, its name, or a run's config.json"
    parser.add_argument("--config", metavar="FILE[:ARG,...]", required=required, help=about)


def definitions_flag(parser: Parser) -> None:
    """Adds `--config` of a command that uses a trained run."""
    about = "the file that adds the models or losses of the run"
    parser.add_argument("--config", metavar="FILE", help=about)


def load_definitions(args: argparse.Namespace) -> None:
    """Runs the file of `--config`, for what it adds to the tables of vidjax.

    The run keeps its configuration. vidjax runs no file that only the folder of a run names.
    """
    if args.config:
        config_io.load_file(args.config)


def process_flags(parser: Parser) -> None:
    """Adds the flags by which several processes work on one run."""
    about = "where several processes meet, see configs/README.md"
    parser.add_argument("--coordinator", metavar="HOST:PORT", help=about)
    parser.add_argument("--num_processes", type=int, metavar="N", help="their number")
    parser.add_argument("--process_id", type=int, metavar="I", help="number of this one, from 0")


def run_folders(runs: str | None) -> list[str]:
    """Returns the folders that `--runs=A,B` names."""
    return [name.strip() for name in (runs or "").split(",") if name.strip()]


def given_fields(args: argparse.Namespace, readable: tuple[str, ...]) -> set[str]:
    """Returns the overridden fields; UserError for one that the command does not read."""
    given = set(config_io.override_names(args.overrides))
    if unread := sorted(given - set(readable)):
        raise UserError(
            f"{args.command} does not read config.{unread[0]}\n"
            f"choose from {', '.join(f'--config.{name}' for name in readable)}"
        )
    return given


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
    if seconds is not None:
        rows["time"] = f"{seconds:.1f} s"
    elif "seconds" in results:
        rows["trained in"] = f"{results['seconds']:.1f} s"
    return rows
