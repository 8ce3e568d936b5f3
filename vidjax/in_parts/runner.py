"""Makes a table of results for every table of a folder; see `vidjax.in_parts`."""

import argparse
import contextlib
import functools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import msgspec

from vidjax import files, tables
from vidjax.data.beam import Beam
from vidjax.data.checks import refuse_unread
from vidjax.data.clips import SPLITS
from vidjax.errors import UserError
from vidjax.run import formats, terminal
from vidjax.tables import Columns

if TYPE_CHECKING:
    from vidjax.data.frame_fields import Quality
    from vidjax.data.memory import MemoryClips

FACTS = b"vidjax"  # key of the metadata of a table
HIDDEN = (".", "_")  # begin the names of files that are no data, as in Spark
# Flag -> the word for its value, its help.
FLAGS = {
    "shard": ("k/n", "one of n shares of a folder of tables; k is from 1 to n"),
    "beam_options": ("O", "instead: Apache Beam shares the tables, see vidjax/data/README.md"),
}
KEPT = "name another folder, --out=FOLDER, or delete it"


class Stopped(UserError):
    """The means have changed: no further table may be made."""


class Shard(NamedTuple):
    """Part `number` (from 1) of `total`."""

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the shard of a text such as `2/7`."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        number, total = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= total:
            first = f"--shard=1/{total}" if total else "--shard=1/7"
            last = f"--shard={total}/{total}" if total else "--shard=7/7"
            raise UserError(
                f"--shard={text[:40]}: want k/n, where k counts the parts from 1 to n:\n"
                f"{first} is the first, {last} the last"
            )
        return cls(number, total)

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


class Facts(msgspec.Struct, kw_only=True):
    """Of what a table was made: sha256 of the clips, means that change a result, counts."""

    sha256: formats.Text
    means: Annotated[dict[str, Any], formats.FEW]
    counts: Annotated[dict[str, formats.Count], formats.FEW]


class Job(NamedTuple):
    """The tables of a folder, the folder of the results, which to make, and who makes them."""

    found: Sequence[Path]
    out: Path
    shard: Shard
    beam: Beam | None = None

    @property
    def share(self) -> Sequence[Path]:
        """The tables of the shard."""
        return self.found[self.shard.number - 1 :: self.shard.total]


class Task(NamedTuple):
    """What a command does with each table of a folder.

    Attributes:
      means: what results depend on beside the clips, as values of JSON.
      work: reads a table; returns the columns of another, and counts, with `clips` among them.
    """

    means: Mapping[str, object]
    work: Callable[[Path], tuple[Columns, Mapping[str, int]]]


class Done(NamedTuple):
    """What a call did: its tables, those skipped, counts over all and over those that were new."""

    tables: int
    skipped: int
    counts: Mapping[str, int]
    fresh: Mapping[str, int]
    began: float


def job_of(args: argparse.Namespace) -> Job | None:
    """Returns the job of `--input`, `--out` and FLAGS; None for clips that are no such folder.

    A mistake in these flags is a UserError.
    """
    found = tables_of(Path(args.input).expanduser()) if args.input else []
    given = {name: x for name in FLAGS if (x := getattr(args, name)) is not None}
    if not found:
        for name, value in given.items():
            raise UserError(
                f"--{name}={value}: --input is no folder of parquet tables, whose work can be "
                "shared"
            )
        return None
    if len(given) > 1:
        raise UserError("choose one of --shard and --beam_options: who shares the tables")
    shard = Shard.parse(args.shard) if args.shard is not None else Shard(1, 1)
    job = Job(found, _check_out(args.out, found), shard)
    if args.beam_options is None:
        return job
    beam = Beam(args.beam_options)
    beam.check()
    return job._replace(beam=beam)


def tables_of(source: Path) -> list[Path]:
    """Returns the tables of a folder in parts, sorted; none where it holds splits, or none."""
    entries = sorted(source.iterdir()) if source.is_dir() else []
    entries = [path for path in entries if not path.name.startswith(HIDDEN)]
    found = [path for path in entries if path.suffix == ".parquet"]
    if not found or {path.stem for path in found} & {*SPLITS}:
        return []
    # Not folders: the results may lie in one.
    refuse_unread((one for one in entries if one not in found and not one.is_dir()), "tables")
    return found


def _check_out(out: str | None, found: Sequence[Path]) -> Path:
    """Returns the folder of the results; a UserError where it is none."""
    path = Path(out).expanduser() if out else None
    if path is None or path.suffix in tables.ENDINGS or (path.exists() and not path.is_dir()):
        given = f"--out={out}" if out else "without --out"
        raise UserError(
            f"{given}: {found[0].parent} is a folder of {len(found):,} tables\n"
            "name a folder, which takes a table for each: --out=FOLDER"
        )
    if path.exists() and path.samefile(found[0].parent):
        raise UserError(f"--out={out}: that is the folder of the clips: name another one")
    return path


def load(
    table: Path, modalities: Mapping[str, int], identities: Sequence[str], quality: "Quality"
) -> "MemoryClips | None":
    """Returns the clips of a table; None for a table without rows, as Spark writes them."""
    from pyarrow import ArrowException, parquet

    from vidjax.data.memory import load_clips

    try:
        empty = parquet.read_metadata(table).num_rows == 0
    except ArrowException:
        empty = False  # the reader below says what is wrong
    return None if empty else load_clips(table, modalities, identities, quality=quality)


def run(job: Job, task: Task, label: str, again: Callable[[], Task]) -> Done:
    """Makes a table of results for every table of a job that is not done yet.

    A table that cannot be read is told at the end; the others are made. What workers of Beam could
    not make is tried here once more, so that its error is told.

    Args:
      job: the tables.
      task: what to do with each of them.
      label: that of the progress bar.
      again: makes the task in a worker of Beam, which has to find its files at the same paths.

    Raises:
      ValueError: the folder holds a table that was made by other means, or of other clips; or
        tables could not be read.
    """
    files.make_folder(job.out, "--out")
    mine, began = job.share, time.monotonic()
    before = {table: find(table, job.out / table.name, task.means) for table in mine}
    left = [table for table, facts in before.items() if facts is None]
    fresh, failed, todo = Counter(), [], left
    if job.beam and left:
        terminal.say(f"{label}: {len(left):,} tables by Apache Beam")
        by_beam = _by_beam(job.beam, left, job.out, task, again)
        for facts in by_beam.values():
            fresh.update(facts.counts)
        todo = [table for table in left if table not in by_beam]
    progress = terminal.Progress(
        len(mine), initial=len(mine) - len(todo), unit="table", label=label, leave=False
    )
    for table in todo:
        try:
            fresh.update(_make(table, job.out / table.name, task).counts)
        except Stopped:
            raise
        except UserError as error:
            failed.append(str(error) if table.name in str(error) else f"{table}: {error}")
        rate = fresh["clips"] / max(time.monotonic() - began, 1e-9)
        progress.advance(1, f"{rate:,.0f} clips/s")
    progress.close()
    if failed:
        lines = failed[0].splitlines()[:2]
        others = f"{len(failed):,} of {len(mine):,} tables failed, the others are done"
        raise UserError("\n".join([*lines, others]))
    counts = Counter(fresh)
    for facts in filter(None, before.values()):
        counts.update(facts.counts)
    return Done(len(mine), len(mine) - len(left), counts, fresh, began)


def _by_beam(
    beam: Beam, left: Sequence[Path], out: Path, task: Task, again: Callable[[], Task]
) -> dict[Path, Facts]:
    """Has Beam make results, and returns of what those were made that are there then."""
    means = msgspec.json.encode(task.means)
    start = functools.partial(_start, again, means, out.absolute(), Path.cwd())
    beam.run([str(table.absolute()) for table in left], start)
    results = {table: out / table.name for table in left}
    return {table: read_facts(path) for table, path in results.items() if files.exists(path)}


def _start(again: Callable[[], Task], means: bytes, out: Path, here: Path) -> Callable[[str], None]:
    """Returns what a worker of Beam calls with the path of each table."""
    with contextlib.suppress(OSError):
        os.chdir(here)  # flags may hold paths relative to it
    task = again()
    if msgspec.json.encode(task.means) != means:
        raise Stopped("run or gallery have changed: give the same command again")

    def work(table: str) -> None:
        try:
            _make(Path(table), out / Path(table).name, task)
        except Stopped:
            raise
        except UserError:
            pass  # told by `run`

    return work


def _make(table: Path, result: Path, task: Task) -> Facts:
    """Makes the results of a table, whole or not at all."""
    digest = files.sha256_file(table)
    columns, counts = task.work(table)
    facts = Facts(sha256=digest, means=dict(task.means), counts=dict(counts))
    write(result, columns, facts)
    return facts


def write(result: Path, columns: Columns, facts: Facts) -> None:
    """Writes a table with its facts, whole or not at all."""
    note = {FACTS: msgspec.json.encode(facts)}
    files.write_bytes(result, tables.to_parquet(columns, note))


def find(table: Path, result: Path, means: Mapping[str, object]) -> Facts | None:
    """Returns the facts of a result that is there; None to make it, also where it is damaged."""
    from pyarrow import ArrowException

    if not files.exists(result):
        return None
    try:
        facts = read_facts(result)
    except ArrowException as error:
        terminal.say(f"made again: '{result}' is damaged: {str(error).splitlines()[0][:200]}")
        result.unlink(missing_ok=True)  # of several calls one was faster
        return None
    differ = [] if facts.sha256 == files.sha256_file(table) else ["clips"]
    wanted = msgspec.json.decode(msgspec.json.encode(means))
    differ += [name for name in wanted if facts.means.get(name) != wanted[name]]
    if differ:
        raise UserError(
            f"'{result}' was made with another {' and another '.join(differ)}, and is kept\n{KEPT}"
        )
    return facts


def read_facts(result: Path) -> Facts:
    """Returns of what a table was made; a UserError for a table of somebody else."""
    from pyarrow import parquet

    with files.open_input(result) as file:
        found = parquet.read_metadata(file).metadata or {}
    if FACTS not in found:
        raise UserError(f"'{result}' was not made by this command, and is kept\n{KEPT}")
    return formats.parse(result, files.parse_json(found[FACTS]), Facts, KEPT)


def describe(done: Done, shard: Shard) -> tuple[dict[str, str], dict[str, object]]:
    """Returns rows of text and values for JSON of what a call did, see `terminal.timing`."""
    before = f", {done.skipped:,} of them before" if done.skipped else ""
    rows = {"tables": f"{done.tables:,}{before}", "clips": f"{done.counts.get('clips', 0):,}"}
    rows |= {"shard": str(shard)} if shard.total > 1 else {}
    timed = terminal.timing(done.began, done.fresh.get("clips", 0))
    content = {"tables": done.tables, "skipped": done.skipped, "shard": str(shard), "clips": 0}
    return rows | dict(timed[0]), {**content, **done.counts, **timed[1]}
