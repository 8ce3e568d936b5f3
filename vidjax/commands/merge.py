"""`vidjax merge`: joins the parts that `evaluate --shard=k/n` has scored into the run's results."""

import argparse
import time

from vidjax import api, config_io
from vidjax.commands import common, evaluate
from vidjax.messages import Command, Parser, Result


def add_flags(parser: Parser) -> None:
    """Adds the flags of the command."""
    common.workdir_flag(parser)
    common.definitions_flag(parser)
    parser.fields()


def run(args: argparse.Namespace) -> Result:
    """Joins the parts of an evaluation."""
    began = time.monotonic()
    config, path = evaluate.settings(args)
    if args.overrides:
        common.dry_run(args, config)
    with common.locked_folder(path) as workdir:
        from vidjax.commands import parts

        common.set_up_devices(config)
        evaluate.check_folder(config, workdir, config_io.override_names(args.overrides))
        data = api.load_data(config)
        results = parts.merge(config, workdir, data, overrides=args.overrides)
    return common.summary(config, workdir, results, time.monotonic() - began)


COMMAND = Command(
    "joins the parts that evaluate --shard=k/n has scored", add_flags, run, ("--workdir=runs/mma",)
)
