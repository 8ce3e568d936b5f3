"""Flags that several commands share, and their checks."""

import argparse

from vidjax.runs import config_io
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Parser


def add_workdir(parser: Parser, about: str = "the folder of a trained run") -> None:
    """Adds `--workdir`, a required flag."""
    parser.add_argument("--workdir", metavar="FOLDER", required=True, help=about)


def add_config(parser: Parser, *, required: bool = False) -> None:
    """Adds `--config`."""
    about = "a file of configs/, its name, or a run's config.json"
    parser.add_argument("--config", metavar="FILE[:ARG,...]", required=required, help=about)


def add_definitions(parser: Parser) -> None:
    """Adds `--config`, a file that defines models or losses of a trained run."""
    about = "a file that adds models or losses, if the run needs any"
    parser.add_argument("--config", metavar="FILE", help=about)


def load_definitions(args: argparse.Namespace) -> None:
    """Runs the file of `--config`, so that it can add models and losses to the tables of vidjax.

    The run keeps its configuration. Only files named on the command line are run: a path in the
    folder of a run is not trusted.
    """
    if args.config:
        config_io.load_file(args.config)


def add_processes(parser: Parser) -> None:
    """Adds the flags of a run on several processes."""
    about = "address of the first of several processes, see configs/README.md"
    parser.add_argument("--coordinator", metavar="HOST:PORT", help=about)
    parser.add_argument("--num_processes", type=int, metavar="N", help="number of processes")
    parser.add_argument("--process_id", type=int, metavar="I", help="index of this process, from 0")


def split_runs(runs: str | None) -> list[str]:
    """Splits the value of `--runs=A,B` into folders."""
    return [name.strip() for name in (runs or "").split(",") if name.strip()]


def check_fields(args: argparse.Namespace, readable: tuple[str, ...]) -> set[str]:
    """Returns the overridden fields.

    Raises:
      UserError: the command does not read a field.
    """
    overridden = set(config_io.override_names(args.overrides))
    if unread := sorted(overridden - set(readable)):
        raise UserError(
            f"{args.command} does not read config.{unread[0]}\n"
            f"choose from {', '.join(f'--config.{name}' for name in readable)}"
        )
    return overridden
