"""Commands over many clips: a folder of parquet tables in, a folder of tables out, part by part.

    INPUT/NAME.parquet    clips, as `vidjax.data.clip_files` reads them; all frames of a clip in one
    OUT/NAME.parquet      what was found for them, and in its metadata of what it was made, `Facts`

A table of OUT appears whole or not at all, facts included. A call skips the tables that are done:
it goes on where another was cut off, and `--shard=1/4` to `--shard=4/4` share the work between any
four processes or machines. Two that make the same table write the same.
"""

import io
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import numpy as np

from vidjax import files, tables
from vidjax.data.clips import SPLITS
from vidjax.data.untrusted.names import clean_name, show
from vidjax.errors import UserError
from vidjax.messages import Result
from vidjax.run import formats, terminal
from vidjax.run.parts import Shard
from vidjax.tables import Columns

if TYPE_CHECKING:
    from pyarrow import DictionaryArray

    from vidjax.data.frame_fields import Quality
    from vidjax.data.memory import MemoryClips
    from vidjax.steps.topk import TopK

FACTS = b"vidjax"  # key of the metadata of a table
LINE_BYTES = 64 * files.MB  # of a clip as JSON
BLOCK_LINES = 256
PARTS, RANKING = "parts", "ranking.parquet"  # in the folder of a ranking
HIDDEN = (".", "_")  # begin the names of files that are no data, as in Spark


class Stopped(UserError):
    """The means have changed: no further table may be made."""


class Facts(msgspec.Struct, kw_only=True):
    """Of what a table was made: sha256 of the clips, means that change a result, counts."""

    sha256: formats.Text
    means: Annotated[dict[str, Any], formats.FEW]
    counts: Annotated[dict[str, formats.Count], formats.FEW]


class Task(NamedTuple):
    """What a command does with each table of a folder.

    Attributes:
      means: what results depend on beside the clips, as values of JSON.
      work: reads a table; returns the columns of another, and counts, with `clips` among them.
      label: of the progress bar.
    """

    means: Mapping[str, object]
    work: Callable[[Path], tuple[Columns, Mapping[str, int]]]
    label: str


class Done(NamedTuple):
    """What a call did: its tables, those skipped, counts over all and over those that were new."""

    tables: int
    skipped: int
    counts: Mapping[str, int]
    fresh: Mapping[str, int]
    began: float


def tables_of(source: Path) -> list[Path]:
    """Returns the tables of a folder in parts, sorted; none where it holds splits, or none."""
    found = sorted(source.glob("*.parquet")) if source.is_dir() else []
    found = [path for path in found if not path.name.startswith(HIDDEN)]
    return [] if {path.stem for path in found} & {*SPLITS} else found


def parse_shard(text: str | None) -> Shard:
    """Returns the shard of a flag `k/n`; all tables for None."""
    return Shard(1, 1) if text is None else Shard.parse(text)


def no_shard(text: str | None) -> None:
    """Refuses `--shard` where the input is no folder of tables."""
    if text is not None:
        raise UserError(
            f"--shard={text}: --input is no folder of parquet tables, whose work can be shared"
        )


def check_out(out: str | None, found: Sequence[Path]) -> Path:
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


def run(found: Sequence[Path], out: Path, shard: Shard, task: Task) -> Done:
    """Makes a table of results for every table of a shard that is not done yet.

    A table that cannot be read is told at the end; the others are made.

    Raises:
      ValueError: `out` holds a table that was made by other means, or of other clips; or tables
        could not be read.
    """
    files.make_folder(out, "--out")
    mine, counts, began = _share(found, shard), Counter(), time.monotonic()
    left: list[Path] = []
    for table in mine:
        facts = _done(table, out / table.name, task.means)
        counts.update(facts.counts if facts else {})
        left += [] if facts else [table]
    fresh, failed = Counter(), []
    progress = terminal.Progress(
        len(mine), initial=len(mine) - len(left), unit="table", label=task.label, leave=False
    )
    for table in left:
        digest = files.sha256_file(table)
        try:
            columns, numbers = task.work(table)
        except Stopped:
            raise
        except UserError as error:
            failed.append(str(error) if table.name in str(error) else f"{table}: {error}")
        else:
            note = {
                FACTS: msgspec.json.encode(
                    Facts(sha256=digest, means=dict(task.means), counts=dict(numbers))
                )
            }
            files.write_bytes(out / table.name, tables.to_parquet(columns, note))
            fresh.update(numbers)
        rate = fresh["clips"] / max(time.monotonic() - began, 1e-9)
        progress.advance(1, f"{rate:,.0f} clips/s")
    progress.close()
    if failed:
        lines = failed[0].splitlines()[:2]
        others = f"{len(failed):,} of {len(mine):,} tables failed, the others are done"
        raise UserError("\n".join([*lines, others]))
    return Done(len(mine), len(mine) - len(left), counts + fresh, fresh, began)


def _share(found: Sequence[Path], shard: Shard) -> Sequence[Path]:
    return found[shard.number - 1 :: shard.total]


def _done(table: Path, result: Path, means: Mapping[str, object]) -> Facts | None:
    """Returns the facts of a result that is there; None to make it, also where it is damaged."""
    from pyarrow import ArrowException

    if not files.exists(result):
        return None
    try:
        facts = _read_facts(result)
    except ArrowException as error:
        terminal.say(f"made again: '{result}' is damaged: {str(error).splitlines()[0][:200]}")
        return None
    differ = [] if facts.sha256 == files.sha256_file(table) else ["clips"]
    wanted = msgspec.json.decode(msgspec.json.encode(means))
    differ += [name for name in wanted if facts.means.get(name) != wanted[name]]
    if differ:
        raise UserError(
            f"'{result}' was made with another {' and another '.join(differ)}, and is kept\n"
            "name another folder, --out=FOLDER, or delete it"
        )
    return facts


def _read_facts(result: Path) -> Facts:
    """Returns of what a table was made; a UserError for a table of somebody else."""
    from pyarrow import parquet

    with files.open_input(result) as file:
        found = parquet.read_metadata(file).metadata or {}
    remedy = "name another folder, --out=FOLDER, or delete it"
    if FACTS not in found:
        raise UserError(f"'{result}' was not made by this command, and is kept\n{remedy}")
    return formats.parse(result, files.parse_json(found[FACTS]), Facts, remedy)


def describe(done: Done, shard: Shard) -> tuple[dict[str, str], dict[str, object]]:
    """Returns rows of text and values for JSON of what a call did, see `terminal.timing`."""
    before = f", {done.skipped:,} of them before" if done.skipped else ""
    rows = {"tables": f"{done.tables:,}{before}", "clips": f"{done.counts.get('clips', 0):,}"}
    rows |= {"shard": str(shard)} if shard.total > 1 else {}
    timed = terminal.timing(done.began, done.fresh.get("clips", 0))
    content = {"tables": done.tables, "skipped": done.skipped, "shard": str(shard), "clips": 0}
    return rows | dict(timed[0]), {**content, **done.counts, **timed[1]}


# A ranking of the clips of all tables.


def rank(
    found: Sequence[Path],
    out: Path,
    shard: Shard,
    means: Mapping[str, object],
    identities: Sequence[str],
    top_of: "Callable[[Path], tuple[Sequence[str], TopK] | None]",
) -> tuple[Done, Path | None]:
    """Ranks the clips of each table into OUT/parts, and those of all into OUT/ranking.parquet.

    The call that finds all parts joins them; it returns the path of the ranking, others None. The
    best 100 of all clips are among the best 100 of their tables, so the joined lists are exact.

    Args:
      identities: [C] names.
      top_of: a table -> its N names of clips, and the best for each identity, [C, 100] indices of
        these names; None for a table without clips.
    """

    def work(table: Path) -> tuple[Columns, Mapping[str, int]]:
        names, top = top_of(table) or ((), None)
        return list_columns(identities, names, top), {"clips": len(names)}

    task = Task({**means, "identities": files.sha256_json(list(identities))}, work, "rank")
    done = run(found, out / PARTS, shard, task)
    parts = [out / PARTS / table.name for table in found]
    if not all(part.is_file() for part in parts):
        return done, None
    own = {*_share(found, shard)}  # just looked at
    others = [pair for pair in zip(found, parts, strict=True) if pair[0] not in own]
    if any(_done(table, part, task.means) is None for table, part in others):
        return done, None
    names, top = join(parts, identities)
    content = tables.to_parquet(list_columns(identities, names, top))
    files.write_bytes(out / RANKING, content)
    return done, out / RANKING


def ranked_result(done: Done, path: Path | None, shard: Shard) -> Result:
    """Returns the result of a command that called `rank`."""
    rows, content = describe(done, shard)
    told = str(path) if path else "to come, with the other shares"
    return Result(content | {"ranking": str(path) if path else None}, rows | {"ranking": told})


def list_columns(identities: Sequence[str], names: Sequence[str], top: "TopK | None") -> Columns:
    """Returns the columns of a table of lists, those of `tables.RANKING`; empty without a `top`."""
    from vidjax.steps.topk import NO_CLIP

    index = np.full((0, 1), NO_CLIP) if top is None else np.asarray(top.index)
    scores = np.zeros((0, 1)) if top is None else np.asarray(top.scores)
    row, place = np.nonzero(index != NO_CLIP)
    values = (
        np.array(identities, object)[row],
        place + 1,
        np.array([*names, None], object)[index[row, place]],
        scores[row, place],
    )
    return {
        name: (kind, column)
        for (name, kind), column in zip(tables.RANKING.items(), values, strict=True)
    }


def join(parts: Sequence[Path], identities: Sequence[str]) -> "tuple[list[str], TopK]":
    """Returns the names of the listed clips and the best of all parts, see `topk.join_tops`.

    The names are in the order in which equal scores are ranked: that of names without `.mp4`.
    """
    from vidjax.steps.topk import join_tops

    owner: dict[str, Path] = {}
    for part in parts:
        for name in _read_columns(part, ["clip"])[0].dictionary.to_pylist():
            if name in owner:
                raise UserError(
                    f"clip '{show(name)}' is in two tables, {owner[name].name} and {part.name}\n"
                    "write all frames of a clip into one table"
                )
            owner[name] = part
    names = sorted(owner, key=lambda name: (clean_name(name), name))
    tops = (_read_top(part, identities, {n: i for i, n in enumerate(names)}) for part in parts)
    return names, join_tops(tops, len(identities))


def _read_top(part: Path, identities: Sequence[str], places: Mapping[str, int]) -> "TopK":
    """Returns the lists of a part, [C, 100], by the clip indices `places`."""
    from vidjax.steps.topk import MAX_NAMES, NO_CLIP, TopK

    shape = (len(identities), MAX_NAMES)
    top = TopK(np.full(shape, -np.inf, np.float32), np.full(shape, NO_CLIP, np.int32))
    identity, rank_, clip, score = _read_columns(part, [*tables.RANKING])
    column = {name: row for row, name in enumerate(identities)}
    try:
        row = _codes(identity, column)
        place = rank_.to_numpy().astype(int) - 1
        top.index[row, place], top.scores[row, place] = _codes(clip, places), score.to_numpy()
    except (LookupError, ValueError) as error:
        raise _damaged(part, error) from error
    return top


def _codes(column: "DictionaryArray", of: Mapping[str, int]) -> np.ndarray:
    codes = np.array([of[name] for name in column.dictionary.to_pylist()], int)
    return codes[column.indices.to_numpy()]


def _read_columns(part: Path, names: Sequence[str]) -> list[Any]:
    """Returns columns of a part as pyarrow arrays; text is dictionary-encoded."""
    from pyarrow import ArrowException, parquet

    text = [name for name in names if tables.RANKING[name] == "string"]
    try:
        with files.open_input(part) as file:
            table = parquet.ParquetFile(
                file, read_dictionary=text, page_checksum_verification=True
            ).read(columns=list(names))
        columns = [table.column(name).combine_chunks() for name in names]
        return [x.unify_dictionaries() if hasattr(x, "unify_dictionaries") else x for x in columns]
    except (ArrowException, LookupError, OSError) as error:
        raise _damaged(part, error) from error


def _damaged(part: Path, error: Exception) -> UserError:
    return UserError(
        f"'{part}' is damaged: {str(error).splitlines()[0][:200]}\n"
        "delete it, and give the same command again"
    )


# Lines that come one after the other.


def blocks_of_lines(stream: io.BufferedReader) -> Iterator[list[tuple[int, bytes]]]:
    """Yields (number, content) of lines, as many as are there, so that none waits for the next."""
    rest, number = b"", 0
    while more := stream.read1(1 << 20):
        *lines, rest = (rest + more).split(b"\n")
        if len(rest) > LINE_BYTES:
            raise UserError(f"line {number + len(lines) + 1}: more than {LINE_BYTES:,} bytes")
        numbered = list(enumerate(lines, number + 1))
        number += len(lines)
        for at in range(0, len(numbered), BLOCK_LINES):
            yield numbered[at : at + BLOCK_LINES]
    if rest:
        yield [(number + 1, rest)]
