"""`vidjax rank`: ranks new clips with a trained run, into a file with scores."""

import argparse
import time
from pathlib import Path

from vidjax import api, config_io, messages, tables
from vidjax.commands import common
from vidjax.errors import UserError
from vidjax.messages import Command, Parser, Result

READ = ("eval.split", "eval.checkpoint")  # fields


def add_flags(parser: Parser) -> None:
    """Adds the flags of the command."""
    common.workdir_flag(parser)
    common.definitions_flag(parser)
    parser.flag("--input", "PATH", "the clips: a folder, or a .parquet table", needed=True)
    parser.flag("--out", "FILE", "the new file: .csv, .tsv, .jsonl or .parquet", needed=True)
    parser.fields()


def run(args: argparse.Namespace) -> Result:
    """Ranks clips and writes the lists."""
    source, out = Path(args.input).expanduser(), Path(args.out).expanduser()
    if not source.exists():
        raise UserError(f"--input={args.input}: no such file or folder: name one with clips")
    workdir = Path(args.workdir).expanduser()
    given = common.given_fields(args, READ)
    config = config_io.override(api.run_config(workdir), args.overrides)
    tables.check_new(out)  # before what takes seconds
    common.load_definitions(args)
    from vidjax import predict
    from vidjax.data.memory import load_clips
    from vidjax.run import terminal

    trained = predict.restore(workdir, step=config.eval.checkpoint)
    clips = load_clips(
        source,
        trained.modalities,
        trained.identities,
        split=config.eval.split if "eval.split" in given else None,
        quality=trained.config.data.quality,
    )
    began, size = time.monotonic(), len(clips.names)
    progress = terminal.Progress(size, unit="clip", label="rank", leave=False, compiles=True)
    tables.write_ranking(out, trained.rank(clips, advance=progress.advance))
    progress.close()
    timed, numbers = terminal.timing(began, size)
    people = len(trained.identities)
    rows = {"clips": f"{size:,}", "identities": f"{people:,}", **dict(timed)}
    content = {"workdir": str(trained.workdir), "ranking": str(out.absolute())}
    content |= {"num_clips": size, "num_identities": people, **numbers}
    return Result(content, {**rows, "ranking": messages.shown(out)})


COMMAND = Command(
    "ranks new clips with a trained run, into a file with scores",
    add_flags,
    run,
    ("--workdir=runs/mma --input=PATH --out=ranking.tsv",),
)
