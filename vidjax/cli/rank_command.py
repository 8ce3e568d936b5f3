"""`vidjax rank` and `vidjax embed`: rank or embed new clips with a trained run, and write files."""

import argparse
import time
from functools import partial
from pathlib import Path

from vidjax.apps import bulk
from vidjax.cli import shared_flags
from vidjax.runs import config_io, terminal
from vidjax.training import api
from vidjax.utils import messages, tables
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Parser, Result

READ_FIELDS = ("eval.split", "eval.checkpoint")


def add_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax rank`."""
    _add_flags(parser, "the new file: .csv, .tsv, .jsonl or .parquet")
    parser.command(
        partial(_process, work=bulk.Rank),
        "--workdir=runs/mma --input=PATH --out=ranking.tsv",
        "--workdir=runs/mma --input=FOLDER --out=ranked",
    )


def add_embed_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax embed`."""
    _add_flags(parser, "the new file: .parquet, with the columns clip and vector")
    parser.command(
        partial(_process, work=bulk.Embed),
        "--workdir=runs/mma --input=PATH --out=vectors.parquet",
        "--workdir=runs/mma --input=FOLDER --out=vectors",
    )


def _add_flags(parser: Parser, out: str) -> None:
    shared_flags.add_workdir(parser)
    shared_flags.add_definitions(parser)
    about = "the clips: a folder, a .parquet table, or a folder of such tables"
    parser.add_argument("--input", metavar="PATH", required=True, help=about)
    about = f"{out}; if the input is a folder of tables: a folder"
    parser.add_argument("--out", metavar="PATH", required=True, help=about)
    parser.fields(example="eval.checkpoint=best")


def _process(args: argparse.Namespace, work: type[bulk.Rank | bulk.Embed]) -> Result:
    """Ranks clips for every identity, or computes a unit vector of each clip."""
    if not Path(args.input).expanduser().exists():
        raise UserError(f"--input={args.input} does not exist: name a file or a folder")
    overridden = shared_flags.check_fields(args, READ_FIELDS)
    inputs, out = bulk.list_tables(args.input), Path(args.out).expanduser()
    if "eval.split" in overridden and inputs:
        raise UserError(
            "--config.eval.split has no effect, because the tables of a folder have no splits\n"
            "leave it out"
        )
    if inputs:
        bulk.check_out(args.out, inputs, work)
    else:
        tables.check_new(out, tables.ENDINGS if work is bulk.Rank else (".parquet",))
    workdir = Path(args.workdir).expanduser()
    settings = config_io.override(api.open_run(workdir).config, args.overrides).eval
    shared_flags.load_definitions(args)
    from vidjax.evaluation import predict

    trained = predict.restore(workdir, step=settings.checkpoint)
    if inputs:
        return bulk.process_tables(inputs, args.out, work(lambda: trained))
    clips = trained.load(args.input, settings.split if "eval.split" in overridden else None)
    began, size = time.monotonic(), len(clips.names)
    progress = terminal.Progress(size, unit="clip", label=args.command, leave=False, compiles=True)
    if work is bulk.Rank:
        kind, written = "ranking", {"num_identities": len(trained.identities)}
        tables.write_ranking(out, trained.rank(clips, advance=progress.advance))
    else:
        vectors = trained.embed(clips, advance=progress.advance)
        kind, written = "vectors", {"width": vectors.shape[1]}
        columns = {"clip": ("string", clips.names), "vector": ("float32", vectors)}
        tables.write_new(out, tables.to_parquet(tables.to_arrow(columns)))
    progress.close()
    timed, numbers = terminal.measure_rate(began, size)
    content = {"workdir": str(trained.workdir), kind: str(out.absolute()), "num_clips": size}
    rows = {"clips": f"{size:,}"} | {k.removeprefix("num_"): f"{n:,}" for k, n in written.items()}
    rows |= {**timed, kind: messages.relative_path(out)}
    return Result(content | written | numbers, rows)
