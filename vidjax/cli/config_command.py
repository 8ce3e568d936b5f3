"""`vidjax config`: lists the fields of configurations."""

import argparse
from collections.abc import Sequence
from typing import Any

from vidjax.cli import shared_flags
from vidjax.runs import config as config_lib, config_io
from vidjax.runs.config import DEFAULTS, Config
from vidjax.runs.config_io import override_names, value_text
from vidjax.runs.run_folder import CONFIG
from vidjax.training import public
from vidjax.utils import messages
from vidjax.utils.messages import Result
from vidjax.utils.parser import Parser

DEFAULT, COMMAND_LINE = "default", "command line"  # origins of the value of a field


def add_config_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax config`."""
    source = parser.add_mutually_exclusive_group()
    shared_flags.add_config(parser, of=source)
    parser.flag("--workdir FOLDER", "instead of --config: the folder of a run", of=source)
    parser.fields(example="seed=1")
    parser.command(show_config, "--config=mma --config.seed=1", "--workdir=runs/mma")


def show_config(args: argparse.Namespace) -> Result:
    """Lists the fields of a configuration file, of a run, or of the default configuration.

    If a training with these values would be refused, the exit code is 2.
    """
    if args.config:
        config, file = public.load_config(args.config), args.config
    elif args.workdir:
        config = public.open_run(args.workdir).config
        file = messages.relative_path(args.workdir / CONFIG)
    else:
        config, file = config_lib.default(), DEFAULT
    config = config_io.override(config, args.overrides)
    fields = describe_fields(config, args.overrides, file)
    problems = [] if config.join.runs else [*config_lib.problems(config)]  # no blend is trained
    for problem in problems:
        messages.print_problem(problem)
    rows = [("field", "value", "default", "from")]
    for name, row in fields.items():
        default = value_text(row["default"]) if name in DEFAULTS else ""
        rows.append((name, value_text(row["value"]), default, row["from"]))
    return Result({"fields": fields, "problems": problems}, rows=rows, code=2 if problems else 0)


def describe_fields(
    config: Config, overrides: Sequence[str], file: str
) -> dict[str, dict[str, Any]]:
    """Returns field -> {"value": ..., "default": ..., "from": where the value is from}.

    "from" is "command line" if a word `--config.FIELD=VALUE` of `overrides` sets the field.
    Otherwise, it is "default" for a default value, and the value of `file` for other values. Fields
    of models and fusions, such as `model.embed_dim`, come last. Their default is None.
    """
    values = dict(config_lib.fields(config))
    typed, rows = set(override_names(overrides)), {}
    for name in [*sorted(DEFAULTS), *sorted(values.keys() - DEFAULTS.keys())]:
        origin = DEFAULT
        if name in typed:
            origin = COMMAND_LINE
        elif name not in DEFAULTS or values[name] != DEFAULTS[name]:
            origin = file
        rows[name] = {"value": values[name], "default": DEFAULTS.get(name), "from": origin}
    return rows
