"""`vidjax compare`: runs, or groups of seeds, on the same clips."""

import argparse
from pathlib import Path

from vidjax.cli import shared_flags
from vidjax.runs import config as config_lib
from vidjax.runs import config_io
from vidjax.runs.run_folder import CONFIG, locked
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Parser, Result


def add_flags(parser: Parser) -> None:
    """Adds the flags of the command."""
    shared_flags.workdir_flag(parser, "where the comparison is written")
    about = "two runs or more; the first is the base; groups of seeds: A1+A2+A3,B1+B2+B3"
    parser.add_argument("--runs", metavar="A,B", required=True, help=about)
    parser.fields()
    parser.command(
        run,
        "--workdir=runs/two --runs=runs/mma,runs/deepmef",
        "--workdir=runs/seeds --runs=runs/a1+runs/a2,runs/b1+runs/b2",
    )


def run(args: argparse.Namespace) -> Result:
    """Compares runs and writes the comparison."""
    folders = shared_flags.run_folders(args.runs)
    if len(folders) < 2:
        raise UserError(
            "compare needs --runs=A,B: folders of two runs or more, split by commas\n"
            "all others are compared with the first"
        )
    if files.exists(Path(args.workdir).expanduser() / CONFIG):
        raise UserError(
            f"--workdir={args.workdir} holds a run: name another folder for the comparison"
        )
    given = shared_flags.given_fields(args, ("eval.split",))
    config = config_io.override(config_lib.default(), args.overrides)
    split = config.eval.split if given else None
    from vidjax.evaluation import comparison

    with locked(args.workdir) as workdir:
        found = comparison.compare([_seeds(name) for name in folders], split=split)
        found.write(workdir)
    page = f"{messages.shown(workdir)}/comparison.html"
    text = f"{found.text()}\ncomparison: {page}, .json, .tex"
    return Result({"comparison": page, "table": found.text(), **found.to_dict()}, text=text)


def _seeds(name: str) -> list[str]:
    """Returns the folders of `A1+A2+A3`; a folder may bear a + in its name."""
    if Path(name).expanduser().exists():
        return [name]
    return [one.strip() for one in name.split("+") if one.strip()]
