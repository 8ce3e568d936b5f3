"""`vidjax evaluate` and `report`: the results of a split.

`evaluate` ranks a split with one or several trained runs. `report` writes the page of a run anew.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vidjax import api, config_io
from vidjax import config as config_lib
from vidjax.commands import common
from vidjax.config import Config
from vidjax.errors import UserError
from vidjax.messages import Parser, Result
from vidjax.run import results as results_lib

if TYPE_CHECKING:
    from vidjax.evaluation.restore import FoundRun

# Fields and groups that training alone reads.
TRAINED = (
    "batch_size", "checkpoint_every_seconds", "data.balance", "data.weights", "eval.every_epochs",
    "log_every_steps", "loss", "mixup", "num_epochs", "optim", "resume", "seed", "transforms",
)  # fmt: skip
# Fields that a blend reads. Each of its runs keeps its own values of all other fields.
JOINED = (
    "eval.split", "eval.block_size", "eval.members", "eval.report", "data.dir", "data.cache_dir",
    "join.weights",
)  # fmt: skip


def add_flags(parser: Parser) -> None:
    """Adds the flags of `evaluate`."""
    common.workdir_flag(parser)
    common.definitions_flag(parser)
    parser.fields()
    about = "folders of runs to join; --workdir is the folder of the results"
    parser.add_argument("--runs", metavar="A,B", help=about)
    common.process_flags(parser)
    parser.command(
        run,
        "--workdir=runs/mma --config.eval.split=test",
        "--workdir=runs/both --runs=runs/mma,runs/deepmef",
    )


def add_report_flags(parser: Parser) -> None:
    """Adds the flags of `report`."""
    common.workdir_flag(parser)
    parser.command(report, "--workdir=runs/mma")


def settings(args: argparse.Namespace) -> tuple[Config, Path]:
    """Returns the configuration of a run and its folder.

    With `--runs` the folder is that of the joined results, and the configuration names the runs.
    """
    for name in config_io.override_names(args.overrides):
        if config_lib.within(name, TRAINED):
            raise UserError(f"evaluate trains nothing: config.{name} has no effect\nleave it out")
    common.load_definitions(args)
    if args.coordinator and args.runs is not None:
        raise UserError(
            "--coordinator does not go with --runs: several processes evaluate one run\n"
            "leave out --coordinator, --num_processes and --process_id"
        )
    workdir = Path(args.workdir).expanduser()
    config = api.run_config(workdir) if args.runs is None else _joined_config(args, workdir)
    config = config_io.override(config, args.overrides)
    if config.join.runs:
        common.given_fields(args, JOINED)
    config_lib.check_ranges(config)
    return config, workdir


def _joined_config(args: argparse.Namespace, workdir: Path) -> Config:
    """Returns a configuration that joins the runs of `--runs`, on their split if it is the same."""
    runs = tuple(str(Path(name).expanduser().absolute()) for name in common.run_folders(args.runs))
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


def run(args: argparse.Namespace) -> Result:
    """Ranks a split."""
    began = time.monotonic()
    config, path = settings(args)
    from vidjax.training import dry_run

    if args.overrides and not config.join.runs:
        dry_run.check(config)
    with common.locked_folder(path) as workdir:
        from vidjax.analysis import analysis
        from vidjax.commands import blend

        api.set_up_devices(config)
        if config.join.runs:
            results = blend.blend_runs(config, workdir, api.load_data, command=args.line)
        else:
            found = find_run(config, workdir)
            data = api.load_data(config)
            common.check_same(config, data)
            results = analysis.evaluate(config, workdir, data, found, report=config.eval.report)
    return common.summary(config, workdir, results, time.monotonic() - began)


def find_run(config: Config, workdir: Path) -> "FoundRun":
    """Returns the run in a folder; also reads other files of an evaluation, for errors in them."""
    from vidjax.evaluation import restore

    run = restore.find_run(config, workdir)
    results_lib.read_metrics(workdir)
    if config.eval.report:
        results_lib.read_other_metrics(workdir)
    return run


def report(args: argparse.Namespace) -> Result:
    """Writes `report.html`."""
    workdir = Path(args.workdir).expanduser().absolute()
    api.run_config(workdir)
    from vidjax.report import run_page

    page = run_page.write(workdir)
    return Result({"workdir": str(workdir), "report": str(page)}, text=f"report: {page}")
