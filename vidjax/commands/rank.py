"""`vidjax rank` and `embed`: new clips with a trained run, into files; see `vidjax.bulk`."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vidjax import api, bulk, config_io, messages, tables
from vidjax.commands import common
from vidjax.errors import UserError
from vidjax.messages import Parser, Result
from vidjax.run import terminal

if TYPE_CHECKING:
    from vidjax.data.memory import MemoryClips
    from vidjax.predict import Predictor

    # (file, run, clips, number of clips that are done -> nothing) -> what it wrote, for --json.
    Writer = Callable[[Path, Predictor, MemoryClips, Callable[[int], None]], dict[str, int]]

READ = ("eval.split", "eval.checkpoint")  # fields
VECTORS = (".parquet",)  # endings of a table of vectors


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
    common.workdir_flag(parser)
    common.definitions_flag(parser)
    about = "the clips: a folder, a .parquet table, or a folder of such tables"
    parser.add_argument("--input", metavar="PATH", required=True, help=about)
    about = f"{out}; of a folder of tables, a folder"
    parser.add_argument("--out", metavar="PATH", required=True, help=about)
    parser.fields()


def _check(args: argparse.Namespace, endings: Sequence[str]) -> list[Path]:
    """Returns the tables of a folder, none for other clips; a mistake is a UserError."""
    if not Path(args.input).expanduser().exists():
        raise UserError(f"--input={args.input}: no such file or folder: name one with clips")
    given = common.given_fields(args, READ)
    found = bulk.tables_of(args.input)
    if "eval.split" in given and (found or Path(args.input).suffix == ".parquet"):
        raise UserError(
            "--config.eval.split: a table, or a folder of tables, has no splits: leave it out"
        )
    if found:
        bulk.check_out(args.out, found)
    else:
        tables.check_new(Path(args.out).expanduser(), endings)
    return found


def _restored(args: argparse.Namespace) -> "Predictor":
    workdir = Path(args.workdir).expanduser()
    config = config_io.override(api.run_config(workdir), args.overrides)
    common.load_definitions(args)
    from vidjax import predict

    return predict.restore(workdir, step=config.eval.checkpoint)


def _write(args: argparse.Namespace, trained: "Predictor", kind: str, write: "Writer") -> Result:
    """Writes what a run finds for clips into a file; `kind` names it."""
    split = config_io.override(trained.config, args.overrides).eval.split
    out = Path(args.out).expanduser()
    clips = trained.load(
        args.input, split if "eval.split" in common.given_fields(args, READ) else None
    )
    began, size = time.monotonic(), len(clips.names)
    progress = terminal.Progress(size, unit="clip", label=args.command, leave=False, compiles=True)
    written = write(out, trained, clips, progress.advance)
    progress.close()
    timed, numbers = terminal.timing(began, size)
    content = {"workdir": str(trained.workdir), kind: str(out.absolute()), "num_clips": size}
    rows = {"clips": f"{size:,}"} | {k.removeprefix("num_"): f"{n:,}" for k, n in written.items()}
    rows |= {**dict(timed), kind: messages.shown(out)}
    return Result(content | written | numbers, rows)


def run(args: argparse.Namespace) -> Result:
    """Ranks clips and writes the lists."""
    found = _check(args, tables.ENDINGS)
    trained = _restored(args)
    if found:
        return bulk.run(found, args.out, bulk.Rank(lambda: trained))
    return _write(args, trained, "ranking", _write_ranking)


def _write_ranking(
    out: Path, trained: "Predictor", clips: "MemoryClips", advance: Callable[[int], None]
) -> dict[str, int]:
    tables.write_ranking(out, trained.rank(clips, advance=advance))
    return {"num_identities": len(trained.identities)}


def embed(args: argparse.Namespace) -> Result:
    """Writes a unit vector for each clip."""
    found = _check(args, VECTORS)
    trained = _restored(args)
    if found:
        return bulk.run(found, args.out, bulk.Embed(lambda: trained))
    return _write(args, trained, "vectors", _write_vectors)


def _write_vectors(
    out: Path, trained: "Predictor", clips: "MemoryClips", advance: Callable[[int], None]
) -> dict[str, int]:
    vectors = trained.embed(clips, advance=advance)
    columns = {"clip": ("string", clips.names), "vector": ("float32", vectors)}
    tables.write_new(out, tables.to_parquet(tables.to_arrow(columns)))
    return {"width": vectors.shape[1]}
