"""`vidjax rank` and `embed`: new clips with a trained run, into files; see `vidjax.apps.bulk`."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vidjax.apps import bulk
from vidjax.cli import shared_flags
from vidjax.runs import config_io, terminal
from vidjax.training import api
from vidjax.utils import messages, tables
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Parser, Result

if TYPE_CHECKING:
    from vidjax.data.memory import MemoryClips
    from vidjax.evaluation.predict import Predictor

    # (file, run, clips, number of clips that are done -> nothing) -> what it wrote, for --json.
    Writer = Callable[[Path, Predictor, MemoryClips, Callable[[int], None]], dict[str, int]]

READ = ("eval.split", "eval.checkpoint")  # fields


def add_flags(parser: Parser) -> None:
    """Adds the flags of `rank`."""
    _add_flags(parser, "the new file: .csv, .tsv, .jsonl or .parquet")
    parser.command(
        run,
        "--workdir=runs/mma --input=PATH --out=ranking.tsv",
        "--workdir=runs/mma --input=FOLDER --out=ranked",
    )


def add_embed_flags(parser: Parser) -> None:
    """Adds the flags of `embed`."""
    _add_flags(parser, "the new file: .parquet, with the columns clip and vector")
    parser.command(
        embed,
        "--workdir=runs/mma --input=PATH --out=vectors.parquet",
        "--workdir=runs/mma --input=FOLDER --out=vectors",
    )


def _add_flags(parser: Parser, out: str) -> None:
    shared_flags.workdir_flag(parser)
    shared_flags.definitions_flag(parser)
    about = "the clips: a folder, a .parquet table, or a folder of such tables"
    parser.add_argument("--input", metavar="PATH", required=True, help=about)
    about = f"{out}; of a folder of tables, a folder"
    parser.add_argument("--out", metavar="PATH", required=True, help=about)
    parser.fields()


def run(args: argparse.Namespace) -> Result:
    """Ranks clips and writes the lists."""
    return _run(args, "ranking", tables.ENDINGS, bulk.Rank, _write_ranking)


def embed(args: argparse.Namespace) -> Result:
    """Writes a unit vector for each clip."""
    return _run(args, "vectors", (".parquet",), bulk.Embed, _write_vectors)


def _run(
    args: argparse.Namespace, kind: str, endings: Sequence[str], work: type[bulk.Work],
    write: "Writer",
) -> Result:  # fmt: skip
    """Writes what a run finds: into a file, or for each table of a folder into another folder.

    `kind` names the file. A mistake in the flags is a UserError before the run is restored.
    """
    if not Path(args.input).expanduser().exists():
        raise UserError(f"--input={args.input}: no such file or folder: name one with clips")
    given = shared_flags.given_fields(args, READ)
    found, out = bulk.tables_of(args.input), Path(args.out).expanduser()
    if "eval.split" in given and (found or Path(args.input).suffix == ".parquet"):
        raise UserError(
            "--config.eval.split: a table, or a folder of tables, has no splits: leave it out"
        )
    if found:
        bulk.check_out(args.out, found, work)
    else:
        tables.check_new(out, endings)
    workdir = Path(args.workdir).expanduser()
    settings = config_io.override(api.open_run(workdir).config, args.overrides).eval
    shared_flags.load_definitions(args)
    from vidjax.evaluation import predict

    trained = predict.restore(workdir, step=settings.checkpoint)
    if found:
        return bulk.run(found, args.out, work(lambda: trained))
    clips = trained.load(args.input, settings.split if "eval.split" in given else None)
    began, size = time.monotonic(), len(clips.names)
    progress = terminal.Progress(size, unit="clip", label=args.command, leave=False, compiles=True)
    written = write(out, trained, clips, progress.advance)
    progress.close()
    timed, numbers = terminal.timing(began, size)
    content = {"workdir": str(trained.workdir), kind: str(out.absolute()), "num_clips": size}
    rows = {"clips": f"{size:,}"} | {k.removeprefix("num_"): f"{n:,}" for k, n in written.items()}
    rows |= {**dict(timed), kind: messages.shown(out)}
    return Result(content | written | numbers, rows)


def _write_ranking(
    out: Path, trained: "Predictor", clips: "MemoryClips", advance: Callable[[int], None]
) -> dict[str, int]:
    tables.write_ranking(out, trained.rank(clips, advance=advance))
    return {"num_identities": len(trained.identities)}


def _write_vectors(
    out: Path, trained: "Predictor", clips: "MemoryClips", advance: Callable[[int], None]
) -> dict[str, int]:
    vectors = trained.embed(clips, advance=advance)
    columns = {"clip": ("string", clips.names), "vector": ("float32", vectors)}
    tables.write_new(out, tables.to_parquet(tables.to_arrow(columns)))
    return {"width": vectors.shape[1]}
