"""`vidjax evaluate` and `report`: the results of a split.

`evaluate` ranks a split with one or several trained runs. `report` writes the page of a run anew.
"""

import argparse
import time
from pathlib import Path

from vidjax import api, config_io
from vidjax import config as config_lib
from vidjax.commands import common
from vidjax.config import Config
from vidjax.errors import UserError
from vidjax.messages import Parser, Result
from vidjax.run.folder import CONFIG, RunFolder

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


def settings(args: argparse.Namespace) -> tuple[Config, RunFolder]:
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
    folder = RunFolder(args.workdir) if args.runs else api.open_run(args.workdir)
    config = _joined_config(args, folder) if args.runs else folder.config
    config = config_io.override(config, args.overrides)
    if config.join.runs:
        common.given_fields(args, JOINED)
    config_lib.check_ranges(config)
    return config, folder


def _joined_config(args: argparse.Namespace, folder: RunFolder) -> Config:
    """Returns a configuration that joins the runs of `--runs`, on their split if it is the same."""
    runs = tuple(str(Path(name).expanduser().absolute()) for name in common.run_folders(args.runs))
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


def run(args: argparse.Namespace) -> Result:
    """Ranks a split."""
    began = time.monotonic()
    config, folder = settings(args)
    from vidjax.training import plan

    if args.overrides and not config.join.runs:
        plan.dry_run(config)
    with common.locked_folder(folder.path):
        if config.join.runs:
            from vidjax.commands import blend

            api.set_up_devices(config)
            results = blend.blend_runs(config, folder, api.load_data, command=args.line)
        else:
            results = api.evaluate_run(config, folder)
    return common.summary(config, folder, results, time.monotonic() - began)


def report(args: argparse.Namespace) -> Result:
    """Writes `report.html`."""
    folder = api.open_run(args.workdir)
    from vidjax.report import run_page

    page = run_page.write(folder)
    return Result({"workdir": str(folder.path), "report": str(page)}, text=f"report: {page}")
