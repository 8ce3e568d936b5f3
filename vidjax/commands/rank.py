"""`vidjax rank` and `embed`: new clips with a trained run, into files; see `vidjax.in_parts`."""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vidjax import api, config_io, in_parts, messages, tables
from vidjax.commands import common
from vidjax.errors import UserError
from vidjax.messages import Command, Parser, Result
from vidjax.run import terminal

if TYPE_CHECKING:
    from vidjax.data.memory import MemoryClips
    from vidjax.predict import Predictor
    from vidjax.steps.topk import TopK

READ = ("eval.split", "eval.checkpoint")  # fields
VECTORS = (".parquet",)  # endings of a table of vectors


def add_flags(parser: Parser) -> None:
    """Adds the flags of `rank`."""
    _add_flags(parser, "the new file: .csv, .tsv, .jsonl or .parquet")


def add_embed_flags(parser: Parser) -> None:
    """Adds the flags of `embed`."""
    _add_flags(parser, "the new file: .parquet, with the columns clip and vector")


def _add_flags(parser: Parser, out: str) -> None:
    common.workdir_flag(parser)
    common.definitions_flag(parser)
    about = "the clips: a folder, a .parquet table, or a folder of such tables"
    parser.flag("--input", "PATH", about, needed=True)
    parser.flag("--out", "PATH", f"{out}; of a folder of tables, a folder", needed=True)
    parser.flag("--shard", "k/n", "one of n shares of a folder of tables; k is from 1 to n")
    parser.fields()


def _check(args: argparse.Namespace, endings: Sequence[str]) -> list[Path]:
    """Returns the tables of a folder in parts, [] for other clips; mistakes are told at once."""
    source = Path(args.input).expanduser()
    if not source.exists():
        raise UserError(f"--input={args.input}: no such file or folder: name one with clips")
    common.given_fields(args, READ)
    found = in_parts.tables_of(source)
    if found:
        in_parts.check_out(args.out, found)
        in_parts.parse_shard(args.shard)
    else:
        in_parts.no_shard(args.shard)
        tables.check_new(Path(args.out).expanduser(), endings)
    return found


def _restored(args: argparse.Namespace) -> "Predictor":
    workdir = Path(args.workdir).expanduser()
    config = config_io.override(api.run_config(workdir), args.overrides)
    common.load_definitions(args)
    from vidjax import predict

    return predict.restore(workdir, step=config.eval.checkpoint)


def _clips(args: argparse.Namespace, trained: "Predictor") -> "MemoryClips":
    from vidjax.data.memory import load_clips

    given = common.given_fields(args, READ)
    config = config_io.override(trained.config, args.overrides)
    return load_clips(
        Path(args.input).expanduser(),
        trained.modalities,
        trained.identities,
        split=config.eval.split if "eval.split" in given else None,
        quality=trained.config.data.quality,
    )


def _load(table: Path, trained: "Predictor") -> "MemoryClips | None":
    quality = trained.config.data.quality
    return in_parts.load(table, trained.modalities, trained.identities, quality)


def run(args: argparse.Namespace) -> Result:
    """Ranks clips and writes the lists."""
    found = _check(args, tables.ENDINGS)
    trained = _restored(args)
    if found:
        return _rank_tables(args, trained, found)
    out, clips = Path(args.out).expanduser(), _clips(args, trained)
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


def _rank_tables(args: argparse.Namespace, trained: "Predictor", found: Sequence[Path]) -> Result:
    def top_of(table: Path) -> "tuple[Sequence[str], TopK] | None":
        clips = _load(table, trained)
        return trained.top(clips, large=True) if clips else None

    out, shard = in_parts.check_out(args.out, found), in_parts.parse_shard(args.shard)
    ranked = in_parts.rank(found, out, shard, {"run": trained.digest}, trained.identities, top_of)
    return in_parts.ranked_result(*ranked, shard)


def embed(args: argparse.Namespace) -> Result:
    """Writes a unit vector for each clip."""
    found = _check(args, VECTORS)
    trained = _restored(args)
    if found:
        return _embed_tables(args, trained, found)
    out, clips = Path(args.out).expanduser(), _clips(args, trained)
    began, size = time.monotonic(), len(clips.names)
    progress = terminal.Progress(size, unit="clip", label="embed", leave=False, compiles=True)
    vectors = trained.embed(clips, advance=progress.advance)
    progress.close()
    columns = {"clip": ("string", clips.names), "vector": ("float32", vectors)}
    tables.write_new(out, tables.to_parquet(columns))
    timed, numbers = terminal.timing(began, size)
    width = vectors.shape[1]
    rows = {"clips": f"{size:,}", "width": f"{width:,}", **dict(timed)}
    content = {"workdir": str(trained.workdir), "vectors": str(out.absolute())}
    content |= {"num_clips": size, "width": width, **numbers}
    return Result(content, {**rows, "vectors": messages.shown(out)})


def _embed_tables(args: argparse.Namespace, trained: "Predictor", found: Sequence[Path]) -> Result:
    def work(table: Path) -> tuple[tables.Columns, Mapping[str, int]]:
        clips = _load(table, trained)
        names = clips.names if clips else ()
        blank = {"none": {next(iter(trained.modalities)): None}}  # tells the width
        vectors = trained.embed(clips or blank, large=True)[: len(names)]
        columns = {"clip": ("string", names), "vector": ("float32", vectors)}
        return columns, {"clips": len(names)}

    out, shard = in_parts.check_out(args.out, found), in_parts.parse_shard(args.shard)
    task = in_parts.Task({"run": trained.digest, "of": "vectors"}, work, "embed")
    rows, content = in_parts.describe(in_parts.run(found, out, shard, task), shard)
    return Result(content | {"vectors": str(out)}, rows | {"vectors": messages.shown(out)})


COMMAND = Command(
    "ranks new clips with a trained run, into a file with scores",
    add_flags,
    run,
    (
        "--workdir=runs/mma --input=PATH --out=ranking.tsv",
        "--workdir=runs/mma --input=FOLDER --out=ranked --shard=1/4",
    ),
)
EMBED = Command(
    "makes a vector of each new clip with a trained run",
    add_embed_flags,
    embed,
    (
        "--workdir=runs/mma --input=PATH --out=vectors.parquet",
        "--workdir=runs/mma --input=FOLDER --out=vectors --shard=1/4",
    ),
)
