"""Flags that commands share, and checks of them before data are read."""

import argparse

from vidjax.runs import config_io
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Parser


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
