"""`vidjax train`: trains a system, evaluates it, and writes the run's report."""

import argparse
import copy
import time
from pathlib import Path

from vidjax import api, config_io
from vidjax import config as config_lib
from vidjax.commands import common
from vidjax.config import Config
from vidjax.errors import UserError
from vidjax.messages import Parser, Result
from vidjax.run.folder import CONFIG, RunFolder


def add_flags(parser: Parser) -> None:
    """Adds the flags of the command."""
    common.config_flag(parser, required=True)
    parser.add_argument("--workdir", metavar="FOLDER", help="the run's folder (default: runs/NAME)")
    parser.fields()
    common.process_flags(parser)
    examples = ("--config=configs/mma.py", "--config=mma:iqiyi_vid --config.data.dir=PATH")
    parser.command(run, *examples)


def settings(args: argparse.Namespace) -> tuple[Config, Path]:
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


def run(args: argparse.Namespace) -> Result:
    """Trains a run, resumes it, or shows the results of one that was finished before."""
    began = time.monotonic()
    config, path = settings(args)
    from vidjax.training import plan

    if not (path / CONFIG).exists():  # before there is a folder, or data are read
        plan.dry_run(config)
        api.set_up_devices(config)
    with common.locked_folder(path) as workdir:
        results, before = api.train_run(config, RunFolder(workdir), command=args.line, began=began)
    seconds = None if before else results["seconds"]
    return common.summary(config, RunFolder(workdir), results, seconds)
