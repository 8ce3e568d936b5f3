"""`vidjax config`: every field of a configuration, its default, its value, and what set it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidjax.cli import shared_flags
from vidjax.runs import config as config_lib
from vidjax.runs import config_io
from vidjax.runs.config import DEFAULTS, Config
from vidjax.runs.config_io import override_names, value_text
from vidjax.runs.run_folder import CONFIG
from vidjax.training import api
from vidjax.utils import messages
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Parser, Result

DEFAULT, COMMAND_LINE = "default", "command line"


def add_flags(parser: Parser) -> None:
    """Adds the flags of the command."""
    shared_flags.config_flag(parser)
    parser.add_argument("--workdir", metavar="FOLDER", help="instead: the folder of a run")
    parser.fields()
    parser.command(run, "--config=mma --config.seed=1", "--workdir=runs/mma")


def run(args: argparse.Namespace) -> Result:
    """Shows the fields of a file, of a run, or the defaults."""
    if args.workdir and args.config:
        raise UserError("config takes --config=FILE or --workdir=FOLDER: not both")
    if args.config:
        config, file = api.load_config(args.config), args.config
    elif args.workdir:
        workdir = Path(args.workdir).expanduser()
        config, file = api.open_run(workdir).config, messages.shown(workdir / CONFIG)
    else:
        config, file = config_lib.default(), DEFAULT
    found = rows(config, args.overrides, file)
    table = [("field", "value", "default", "from")]
    for name, row in found.items():
        default = value_text(row["default"]) if name in DEFAULTS else ""
        table.append((name, value_text(row["value"]), default, row["from"]))
    return Result({"fields": found}, text="\n".join(messages.aligned(table)))


def rows(config: Config, overrides: Sequence[str], file: str) -> dict[str, dict[str, Any]]:
    """Returns field -> its value after `overrides`, its default, and what set it, `from`.

    Fields with a default come first, each by name; the default of others, such as
    `model.embed_dim`, which a file adds, is None. `config` is without the overrides; `file` is the
    name of the file that it comes from.
    """
    values = dict(config_lib.fields(config_io.override(config, overrides)))
    typed, found = set(override_names(overrides)), {}
    for name in [*sorted(DEFAULTS), *sorted(values.keys() - DEFAULTS.keys())]:
        origin = DEFAULT
        if name in typed:
            origin = COMMAND_LINE
        elif name not in DEFAULTS or values[name] != DEFAULTS[name]:
            origin = file
        found[name] = {"value": values[name], "default": DEFAULTS.get(name), "from": origin}
    return found
