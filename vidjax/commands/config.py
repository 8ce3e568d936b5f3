"""`vidjax config`: every field of a configuration, its default, its value, and what set it."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vidjax import api, config_io, messages
from vidjax import config as config_lib
from vidjax.commands import common
from vidjax.config import DEFAULTS, Config
from vidjax.config_io import override_names, value_text
from vidjax.errors import UserError
from vidjax.messages import Command, Parser, Result

DEFAULT, COMMAND_LINE = "default", "command line"


def add_flags(parser: Parser) -> None:
    """Adds the flags of the command."""
    common.config_flag(parser)
    parser.flag("--workdir", "FOLDER", "instead: the folder of a run")
    parser.fields()


def run(args: argparse.Namespace) -> Result:
    """Shows the fields of a file, of a run, or the defaults."""
    if args.workdir and args.config:
        raise UserError("config takes --config=FILE or --workdir=FOLDER: not both")
    if args.config:
        config, file = api.load_config(args.config), args.config
    elif args.workdir:
        workdir = Path(args.workdir).expanduser()
        config, file = api.run_config(workdir), messages.shown(workdir / common.RECORDED)
    else:
        config, file = config_lib.default(), DEFAULT
    found = list(rows(config, args.overrides, file))
    return Result({"fields": as_json(found)}, text=text(found))


class Row(NamedTuple):
    """One field; `default` is None if it has none, as `model.embed_dim`, which a file adds.

    `origin` is what set the value: DEFAULT, the name of a file, or COMMAND_LINE.
    """

    field: str
    value: Any
    default: Any
    origin: str


def rows(config: Config, overrides: Sequence[str], file: str) -> Iterator[Row]:
    """Yields every field of `config` after `overrides`: those with a default first, each by name.

    `config` is without the overrides; `file` is the name of the file that it comes from.
    """
    values = dict(config_lib.fields(config_io.override(config, overrides)))
    typed = set(override_names(overrides))
    for name in [*sorted(DEFAULTS), *sorted(values.keys() - DEFAULTS.keys())]:
        origin = DEFAULT
        if name in typed:
            origin = COMMAND_LINE
        elif name not in DEFAULTS or values[name] != DEFAULTS[name]:
            origin = file
        yield Row(name, values[name], DEFAULTS.get(name), origin)


def text(rows: Iterable[Row]) -> str:
    """Returns the fields as an aligned table, one line for each."""
    table = [("field", "value", "default", "from")]
    for row in rows:
        default = value_text(row.default) if row.field in DEFAULTS else ""
        table.append((row.field, value_text(row.value), default, row.origin))
    return "\n".join(messages.aligned(table))


def as_json(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Returns field -> its value, default and origin."""
    return {
        row.field: {"value": row.value, "default": row.default, "from": row.origin} for row in rows
    }


COMMAND = Command(
    "prints all fields: values, defaults, and where each is from",
    add_flags,
    run,
    ("--config=mma --config.seed=1", "--workdir=runs/mma"),
)
