"""`vidjax check`: reads all and changes nothing; `findings` has the checks."""

import argparse
import os
from pathlib import Path

from vidjax import api, config_io, files, messages
from vidjax.commands import common
from vidjax.config import Config
from vidjax.errors import UserError
from vidjax.messages import Parser, Result


def add_flags(parser: Parser) -> None:
    """Adds the flags of the command."""
    about = "the folder of a run or of a gallery"
    parser.add_argument("--workdir", metavar="FOLDER", help=about)
    common.config_flag(parser)
    parser.fields()
    examples = ("--workdir=runs/mma", "--config=mma:iqiyi_vid --config.data.dir=PATH")
    parser.command(run, *examples)


def settings(args: argparse.Namespace) -> tuple[Config | None, Path | None]:
    """Returns the configuration and the folder to check.

    The folder is None where `--config`, or the environment alone, is checked. The configuration is
    None for the environment alone, or where that of the run is damaged, which the check reports.
    """
    if args.workdir and args.config:
        raise UserError(
            "check takes --workdir=FOLDER, or --config=FILE for its data alone: not both"
        )
    if args.config:
        return config_io.override(api.load_config(args.config), args.overrides), None
    if not args.workdir:
        if args.overrides:
            raise UserError("check with fields needs --workdir=FOLDER or --config=FILE")
        return None, None
    workdir = Path(args.workdir).expanduser().absolute()
    try:
        config = api.run_config(workdir)
    except ValueError:
        if not files.exists(workdir / common.RECORDED):
            raise
        return None, workdir
    return config_io.override(config, args.overrides), workdir


def run(args: argparse.Namespace) -> Result:
    """Prints each finding at once, since reading data takes time, and the verdict."""
    gallery = None
    if args.workdir and not args.config:
        from vidjax.gallery import store

        folder = Path(args.workdir).expanduser().absolute()
        if any((folder / name).exists() for name in (store.NAME, store.OLD_NAME)):
            gallery = folder
    config, workdir = (None, None) if gallery else settings(args)
    # The run that is checked may still be training: its accelerator has no memory to spare.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from vidjax.commands import findings

    subject = str(gallery or workdir or args.config or "the environment")
    lines = not (args.quiet or args.json)
    if lines:
        messages.say(f"check: {subject}")
    items = []
    for item in findings.check(config, workdir, gallery):
        items.append(item)
        if lines or (args.quiet and not args.json and item.state != findings.OK):
            messages.say(f"  {item.state:7}  {item.text}")
    verdict = findings.verdict(items)
    content = {"check": subject, "findings": [item._asdict() for item in items]}
    code = findings.exit_code(items)
    return Result({**content, "verdict": verdict}, text=verdict, code=code)
