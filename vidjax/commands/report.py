"""`vidjax report`: writes the report of a run anew, from the files of its folder."""

import argparse
from pathlib import Path

from vidjax import api
from vidjax.commands import common
from vidjax.messages import Command, Parser, Result


def add_flags(parser: Parser) -> None:
    """Adds the flags of the command."""
    common.workdir_flag(parser)


def run(args: argparse.Namespace) -> Result:
    """Writes `report.html`."""
    workdir = Path(args.workdir).expanduser().absolute()
    api.run_config(workdir)
    from vidjax.report import run_page

    page = run_page.write(workdir)
    return Result({"workdir": str(workdir), "report": str(page)}, text=f"report: {page}")


COMMAND = Command(
    "writes report.html anew, from the files of a run", add_flags, run, ("--workdir=runs/mma",)
)
