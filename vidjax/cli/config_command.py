"""`vidjax config`: lists the fields of a configuration, with their values and defaults."""

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
    """Adds the flags of `vidjax config`."""
    shared_flags.add_config(parser)
    about = "instead of --config: the folder of a run"
    parser.add_argument("--workdir", metavar="FOLDER", help=about)
    parser.fields(example="seed=1")
    parser.command(show_config, "--config=mma --config.seed=1", "--workdir=runs/mma")


def show_config(args: argparse.Namespace) -> Result:
    """Lists the fields of a configuration file, of a run, or of the default configuration."""
    if args.workdir and args.config:
        raise UserError("--config and --workdir cannot be used together: leave out one of them")
    if args.config:
        config, file = api.load_config(args.config), args.config
    elif args.workdir:
        workdir = Path(args.workdir).expanduser()
        config, file = api.open_run(workdir).config, messages.relative_path(workdir / CONFIG)
    else:
        config, file = config_lib.default(), DEFAULT
    fields = describe_fields(config, args.overrides, file)
    table = [("field", "value", "default", "from")]
    for name, row in fields.items():
        default = value_text(row["default"]) if name in DEFAULTS else ""
        table.append((name, value_text(row["value"]), default, row["from"]))
    return Result({"fields": fields}, text="\n".join(messages.align_columns(table)))


def describe_fields(
    config: Config, overrides: Sequence[str], file: str
) -> dict[str, dict[str, Any]]:
    """Returns field -> a dict of its `value`, its `default`, and `from`, the origin of the value.

    The entry `from` is `command line` for a field in `overrides`, the words `--config.FIELD=VALUE`.
    It is `default` for any other field with its default value, and the name `file` for all other
    fields.

    Fields with a default come first. Fields that only a file adds, such as `model.embed_dim`, come
    last and have the default None. Both groups are sorted by name.
    """
    values = dict(config_lib.fields(config_io.override(config, overrides)))
    typed, rows = set(override_names(overrides)), {}
    for name in [*sorted(DEFAULTS), *sorted(values.keys() - DEFAULTS.keys())]:
        origin = DEFAULT
        if name in typed:
            origin = COMMAND_LINE
        elif name not in DEFAULTS or values[name] != DEFAULTS[name]:
            origin = file
        rows[name] = {"value": values[name], "default": DEFAULTS.get(name), "from": origin}
    return rows
