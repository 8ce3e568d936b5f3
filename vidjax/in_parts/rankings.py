"""Rankings of the clips of many tables: one of each, and one of all; see `vidjax.in_parts`."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vidjax import files, tables
from vidjax.data.untrusted.names import clean_name, show
from vidjax.errors import UserError
from vidjax.in_parts import runner
from vidjax.in_parts.runner import Facts, Job, Task
from vidjax.messages import Result
from vidjax.tables import Columns

if TYPE_CHECKING:
    from pyarrow import DictionaryArray

    from vidjax.steps.topk import TopK

PARTS, RANKING = "parts", "ranking.parquet"  # in the folder of a ranking


def task(
    means: Mapping[str, object],
    identities: Sequence[str],
    top_of: "Callable[[Path], tuple[Sequence[str], TopK] | None]",
) -> Task:
    """Returns the task that ranks the clips of each table.

    Args:
      means: those of `Task`; the identities are added.
      identities: [C] names.
      top_of: a table -> its N names of clips, and the best for each identity, [C, 100] indices of
        these names; None for a table without clips.
    """

    def work(table: Path) -> tuple[Columns, Mapping[str, int]]:
        names, top = top_of(table) or ((), None)
        return list_columns(identities, names, top), {"clips": len(names)}

    return Task({**means, "identities": files.sha256_json(list(identities))}, work)


def run(job: Job, task: Task, identities: Sequence[str], again: Callable[[], Task]) -> Result:
    """Ranks the clips of each table into OUT/parts, and those of all into OUT/ranking.parquet.

    The call that finds all parts joins them; of others the ranking is None. The best 100 of all
    clips are among the best 100 of their tables, so the joined lists are exact. A ranking of other
    parts is deleted first.
    """
    parts, path = job._replace(out=job.out / PARTS), job.out / RANKING
    made = [parts.out / table.name for table in job.found]
    before = _facts(path)
    if before is None or before.sha256 != _origin(made):
        path.unlink(missing_ok=True)
    done = runner.run(parts, task, "rank", again)
    joined = _all_there(parts, task)
    if joined:
        _check_once(job.found)
        names, top = join(made, identities)
        facts = Facts(sha256=_origin(made), means={}, counts={})
        runner.write(path, list_columns(identities, names, top), facts)
    rows, content = runner.describe(done, job.shard)
    rows["ranking"] = str(path) if joined else "to come, with the other shares"
    return Result(content | {"ranking": str(path) if joined else None}, rows)


def _origin(parts: Sequence[Path]) -> str:
    """Returns a digest of what parts were made of, those that are missing or damaged included."""
    found = [(part.name, _facts(part)) for part in parts]
    return files.sha256_json(
        [(name, facts and (facts.sha256, facts.means)) for name, facts in found]
    )


def _facts(path: Path) -> Facts | None:
    """Returns of what a table was made; None where it is missing, damaged or somebody else's."""
    from pyarrow import ArrowException

    try:
        return runner.read_facts(path)
    except (ArrowException, OSError, UserError):
        return None


def _all_there(parts: Job, task: Task) -> bool:
    """Returns True if the other shares are made, too, of the same clips and by the same means."""
    own = {*parts.share}
    others = [(table, parts.out / table.name) for table in parts.found if table not in own]
    return all(part.is_file() for _, part in others) and all(
        runner.find(table, part, task.means) for table, part in others
    )


def _check_once(found: Sequence[Path]) -> None:
    """Refuses a clip that is in two tables, listed or not, with or without `.mp4`.

    Memory holds 8 bytes of each name. Where they agree, the names are read again and compared.
    """
    digests = [np.array([*map(_digest, _clips(table))], np.uint64) for table in found]
    values, counts = np.unique(np.concatenate(digests), return_counts=True)
    twice, owner = {*values[counts > 1].tolist()}, {}
    for table in found if twice else ():
        for name in _clips(table):
            if _digest(name) in twice and owner.setdefault(name, table) != table:
                raise UserError(
                    f"clip '{show(name)}' is in two tables, {owner[name].name} and {table.name}\n"
                    "write all frames of a clip into one table"
                )


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _clips(table: Path) -> list[str]:
    """Returns the names of the clips of a table without `.mp4`, each once."""
    from pyarrow import parquet

    with files.open_input(table) as file:
        batches = parquet.ParquetFile(file).iter_batches(columns=["clip"])
        columns = (batch.column(0).unique().cast("string").to_pylist() for batch in batches)
        return [*dict.fromkeys(clean_name(name) for column in columns for name in column)]


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

    dictionaries = (_read_columns(part, ["clip"])[0].dictionary for part in parts)
    listed = {name for dictionary in dictionaries for name in dictionary.to_pylist()}
    names = sorted(listed, key=clean_name)
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
