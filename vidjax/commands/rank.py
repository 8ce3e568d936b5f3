"""`vidjax rank` and `embed`: new clips with a trained run, into files; see `vidjax.in_parts`."""

import argparse
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vidjax import api, config_io, messages, tables
from vidjax.commands import common
from vidjax.errors import UserError
from vidjax.in_parts import rankings, runner
from vidjax.messages import Command, Parser, Result
from vidjax.run import terminal

if TYPE_CHECKING:
    from vidjax.data.memory import MemoryClips
    from vidjax.predict import Predictor
    from vidjax.steps.topk import TopK

    # (file, run, clips, number of clips that are done -> nothing) -> what it wrote, for --json.
    Writer = Callable[[Path, Predictor, MemoryClips, Callable[[int], None]], dict[str, int]]

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
    for name, flag in runner.FLAGS.items():
        parser.flag(f"--{name}", *flag)
    parser.fields()


def _check(args: argparse.Namespace, endings: Sequence[str]) -> runner.Job | None:
    """Returns the job of a folder of tables, None for other clips; mistakes are told at once."""
    if not Path(args.input).expanduser().exists():
        raise UserError(f"--input={args.input}: no such file or folder: name one with clips")
    given = common.given_fields(args, READ)
    job = runner.job_of(args)
    if "eval.split" in given and (job or Path(args.input).suffix == ".parquet"):
        raise UserError(
            "--config.eval.split: a table, or a folder of tables, has no splits: leave it out"
        )
    if job is None:
        tables.check_new(Path(args.out).expanduser(), endings)
    return job


def _restored(args: argparse.Namespace) -> "Predictor":
    workdir = Path(args.workdir).expanduser()
    config = config_io.override(api.run_config(workdir), args.overrides)
    common.load_definitions(args)
    from vidjax import predict

    return predict.restore(workdir, step=config.eval.checkpoint)


def _write(args: argparse.Namespace, trained: "Predictor", kind: str, write: "Writer") -> Result:
    """Writes what a run finds for clips into a file; `kind` names it."""
    from vidjax.data.memory import load_clips

    split = config_io.override(trained.config, args.overrides).eval.split
    out = Path(args.out).expanduser()
    clips = load_clips(
        Path(args.input).expanduser(),
        trained.modalities,
        trained.identities,
        split=split if "eval.split" in common.given_fields(args, READ) else None,
        quality=trained.config.data.quality,
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


def _load(table: Path, trained: "Predictor") -> "MemoryClips | None":
    quality = trained.config.data.quality
    return runner.load(table, trained.modalities, trained.identities, quality)


def _again(args: argparse.Namespace, task: "Callable[[Predictor], runner.Task]") -> runner.Task:
    """Returns a task in another process, which restores the run by the same flags."""
    return task(_restored(args))


def run(args: argparse.Namespace) -> Result:
    """Ranks clips and writes the lists."""
    job = _check(args, tables.ENDINGS)
    trained = _restored(args)
    if job is None:
        return _write(args, trained, "ranking", _write_ranking)
    again = functools.partial(_again, args, _ranking_task)
    return rankings.run(job, _ranking_task(trained), trained.identities, again)


def _write_ranking(
    out: Path, trained: "Predictor", clips: "MemoryClips", advance: Callable[[int], None]
) -> dict[str, int]:
    tables.write_ranking(out, trained.rank(clips, advance=advance))
    return {"num_identities": len(trained.identities)}


def _ranking_task(trained: "Predictor") -> runner.Task:
    def top_of(table: Path) -> "tuple[Sequence[str], TopK] | None":
        clips = _load(table, trained)
        return trained.top(clips, large=True) if clips else None

    return rankings.task({"run": trained.digest}, trained.identities, top_of)


def embed(args: argparse.Namespace) -> Result:
    """Writes a unit vector for each clip."""
    job = _check(args, VECTORS)
    trained = _restored(args)
    if job is None:
        return _write(args, trained, "vectors", _write_vectors)
    again = functools.partial(_again, args, _vectors_task)
    done = runner.run(job, _vectors_task(trained), "embed", again)
    rows, content = runner.describe(done, job.shard)
    told = {"vectors": messages.shown(job.out)}
    return Result(content | {"vectors": str(job.out)}, rows | told)


def _write_vectors(
    out: Path, trained: "Predictor", clips: "MemoryClips", advance: Callable[[int], None]
) -> dict[str, int]:
    vectors = trained.embed(clips, advance=advance)
    columns = {"clip": ("string", clips.names), "vector": ("float32", vectors)}
    tables.write_new(out, tables.to_parquet(columns))
    return {"width": vectors.shape[1]}


def _vectors_task(trained: "Predictor") -> runner.Task:
    def work(table: Path) -> tuple[tables.Columns, Mapping[str, int]]:
        clips = _load(table, trained)
        names = clips.names if clips else ()
        blank = {"none": {next(iter(trained.modalities)): None}}  # tells the width
        vectors = trained.embed(clips or blank, large=True)[: len(names)]
        columns = {"clip": ("string", names), "vector": ("float32", vectors)}
        return columns, {"clips": len(names)}

    return runner.Task({"run": trained.digest, "of": "vectors"}, work)


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
