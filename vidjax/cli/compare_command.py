"""`vidjax compare`: compares the scores of runs, or of groups of seeds, on the same clips."""

import argparse
from pathlib import Path

from vidjax.cli import shared_flags
from vidjax.runs import config as config_lib
from vidjax.runs import config_io
from vidjax.runs.run_folder import CONFIG, make_and_lock
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Parser, Result


def add_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax compare`."""
    shared_flags.add_workdir(parser, "the folder for the comparison")
    about = "two or more runs; the others are compared with the first; seeds: A1+A2+A3,B1+B2+B3"
    parser.add_argument("--runs", metavar="A,B", required=True, help=about)
    parser.fields()
    parser.command(
        compare_runs,
        "--workdir=runs/two --runs=runs/mma,runs/deepmef",
        "--workdir=runs/seeds --runs=runs/a1+runs/a2,runs/b1+runs/b2",
    )


def compare_runs(args: argparse.Namespace) -> Result:
    """Compares runs and writes the comparison."""
    folders = shared_flags.split_runs(args.runs)
    if len(folders) < 2:
        raise UserError(
            "compare needs --runs=A,B: the folders of two or more runs, separated by commas\n"
            "the others are compared with the first"
        )
    if files.exists(Path(args.workdir).expanduser() / CONFIG):
        raise UserError(
            f"--workdir={args.workdir} holds a run: name another folder for the comparison"
        )
    overridden = shared_flags.check_fields(args, ("eval.split",))
    config = config_io.override(config_lib.default(), args.overrides)
    split = config.eval.split if overridden else None
    from vidjax.evaluation import comparison

    with make_and_lock(args.workdir) as workdir:
        result = comparison.compare([_split_seeds(name) for name in folders], split=split)
        result.write(workdir)
    page = f"{messages.relative_path(workdir)}/comparison.html"
    text = f"{result.text()}\ncomparison: {page}, .json, .tex"
    return Result({"comparison": page, "table": result.text(), **result.to_dict()}, text=text)


def _split_seeds(name: str) -> list[str]:
    """Returns the folders of `A1+A2+A3`. The name of an existing folder may contain a +."""
    if Path(name).expanduser().exists():
        return [name]
    return [folder.strip() for folder in name.split("+") if folder.strip()]
