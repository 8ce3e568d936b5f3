"""`vidjax compare`: compares the MAP of runs on the same clips."""

import argparse
from pathlib import Path

from vidjax.cli import shared_flags
from vidjax.runs import config as config_lib
from vidjax.runs import config_io
from vidjax.runs.run_folder import RunFolder
from vidjax.training import api
from vidjax.utils import messages
from vidjax.utils.messages import Parser, Result


def add_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax compare`."""
    shared_flags.add_workdir(parser, "the folder for the comparison")
    about = (
        "folders of runs; each is compared with the first. A1+A2,B1+B2 compares means of several "
        "runs, e.g. with different seeds"
    )
    parser.add_argument("--runs", metavar="A,B", required=True, help=about)
    parser.fields(example="eval.split=test")
    parser.command(
        compare_runs,
        "--workdir=runs/two --runs=runs/mma,runs/deepmef",
        "--workdir=runs/seeds --runs=runs/a1+runs/a2,runs/b1+runs/b2",
    )


def compare_runs(args: argparse.Namespace) -> Result:
    """Compares runs with the first run, and writes the comparison into a folder."""
    folder = RunFolder(args.workdir)
    overridden = shared_flags.check_fields(args, ("eval.split",))
    config = config_io.override(config_lib.default(), args.overrides)
    split = config.eval.split if overridden else None
    groups = [_split_seeds(name) for name in shared_flags.split_runs(args.runs)]
    result = api.compare(groups, out=folder.path, split=split)
    page = f"{messages.relative_path(folder.path)}/comparison.html"
    text = f"{result.text()}\ncomparison: {page}, .json, .tex"
    return Result({"comparison": page, "table": result.text(), **result.to_dict()}, text=text)


def _split_seeds(name: str) -> list[str]:
    """Splits folders joined by +, such as `A1+A2`. The path of an existing folder is not split."""
    if Path(name).expanduser().exists():
        return [name]
    return [folder.strip() for folder in name.split("+") if folder.strip()]
