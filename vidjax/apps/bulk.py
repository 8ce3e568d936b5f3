"""Results for the clips of many parquet tables: on one machine by `run`, on several by Ray Data.

    FOLDER/NAME.parquet   clips, as `vidjax.data.clip_files` reads them; all frames of a clip in one
    OUT/NAME.parquet      the results for these clips

`Embed`, `Rank` and `vidjax.apps.gallery.answers.Identify` make the results of one table.
Workers of Ray Data construct them once and call them with paths. See vidjax/data/README.md,
"Clips at size".
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from vidjax.data import parquet
from vidjax.data.checks import refuse_unread
from vidjax.data.clips import SPLITS
from vidjax.data.untrusted.names import clean_name, show
from vidjax.runs import terminal
from vidjax.utils import files, tables
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Result

if TYPE_CHECKING:
    import pyarrow

    from vidjax.data.memory import MemoryClips
    from vidjax.data.packing import Clips

NOTE = b"vidjax"  # key in the metadata of a table of results: what the results were made of
JOINED = b"ranking"  # this note of a joint ranking
HIDDEN = (".", "_")  # begin the names of files that are no data, as in Spark
LISTS, RANKING = "parts", "ranking.parquet"  # in the folder of a ranking: of each table, and of all
MOST_CLIPS = 100  # in the list of an identity


class Work:
    """Makes the results of tables of clips; a callable for `ray.data.Dataset.map_batches`.

    `Embed(vidjax.restore, "runs/mma")` calls `vidjax.restore("runs/mma")` once. `options` are
    arguments of the method that makes the results, as `fpir` of `Gallery.identify`.
    """

    joined = False  # True if the results are lists for `best`

    def __init__(self, open_trained: Callable[..., Any], *args: str, **options: float | None):
        """Opens the run or the gallery: `open_trained(*args)`."""
        self.trained, self.options = open_trained(*args), options

    def columns(self, clips: "MemoryClips | Clips") -> tables.Columns:
        """Returns the results for clips."""
        raise NotImplementedError

    def made_by(self) -> dict[str, object]:
        """Returns what the results depend on besides the clips, as values of JSON."""
        return {
            "work": type(self).__name__, "by": self.trained.digest, "options": self.options
        }  # fmt: skip

    def table(self, path: Path) -> "pyarrow.Table":
        """Returns the results for the clips of a parquet table."""
        if not _is_empty(path):
            return tables.to_arrow(self.columns(self.trained.load(path)))
        return tables.to_arrow(self.columns({"none": {}})).slice(0, 0)  # of the same columns

    def __call__(self, batch: Mapping[str, Iterable[str]]) -> "pyarrow.Table":
        """Returns the results for the tables at the paths of the column `path`."""
        import pyarrow

        return pyarrow.concat_tables([self.table(Path(path)) for path in batch["path"]])


class Embed(Work):
    """Makes the columns clip and vector: a unit vector [D] of each clip, by a run."""

    def columns(self, clips: "MemoryClips | Clips") -> tables.Columns:
        """Returns the names and the vectors of clips."""
        names = clips if isinstance(clips, Mapping) else clips.names
        return {"clip": ("string", [*names]), "vector": ("float32", self.trained.embed(clips))}


class Rank(Work):
    """Makes the columns identity, rank, clip and score: the best 100 clips of each identity.

    A run or a gallery makes them. `best` joins those of several tables.
    """

    joined = True

    def columns(self, clips: "MemoryClips | Clips") -> tables.Columns:
        """Returns the lists of clips."""
        return tables.ranking_columns(self.trained.rank(clips, **self.options))


def best(lists: "pyarrow.Table") -> "pyarrow.Table":
    """Returns the best 100 clips of each identity, from the lists of the clips of several tables.

    Equal scores are in the order of the names without `.mp4`, as in a ranking of all clips at once.
    Identities keep their order. It is a function for `ray.data` groups of the column `identity`.

    Raises:
      ValueError: the lists of an identity name a clip twice.
    """
    from pyarrow import compute

    lists = lists.select([*tables.RANKING])
    identity = lists["identity"].combine_chunks().dictionary_encode().indices
    names = [clean_name(name) for name in lists["clip"].to_pylist()]
    keyed = lists.append_column("of", [identity]).append_column("name", [names])
    pairs = keyed.group_by(["of", "name"]).aggregate([([], "count_all")])
    if twice := pairs.filter(compute.field("count_all") > 1)["name"].to_pylist():
        raise _in_two_tables(twice[0], "")
    keys = [("of", "ascending"), ("score", "descending"), ("name", "ascending")]
    ordered = keyed.sort_by(keys)
    of = ordered["of"].to_numpy()
    rank = np.arange(len(of)) - np.searchsorted(of, of) + 1
    ordered = ordered.set_column(1, "rank", [rank.astype(np.int32)])
    return ordered.filter(rank <= MOST_CLIPS).select([*tables.RANKING])


def tables_of(source: str | Path) -> list[Path]:
    """Returns the tables of a folder, sorted; none if the folder holds splits or other clips."""
    source = Path(source).expanduser()
    entries = sorted(source.iterdir()) if source.is_dir() else []
    entries = [path for path in entries if not path.name.startswith(HIDDEN)]
    found = [path for path in entries if path.suffix == ".parquet"]
    if not found or {path.stem for path in found} & {*SPLITS}:
        return []
    # Not folders: the results may lie in one.
    refuse_unread((path for path in entries if path not in found and not path.is_dir()), "tables")
    return found


def check_out(out: str | None, found: Sequence[Path], work: type[Work]) -> None:
    """Raises UserError unless `out` names a folder for the results of tables by `work`."""
    path = Path(out).expanduser() if out else None
    if path is None or path.suffix in tables.ENDINGS or (path.exists() and not path.is_dir()):
        given = f"--out={out}" if out else "without --out"
        raise UserError(
            f"{given}: {found[0].parent} is a folder of {len(found):,} tables\n"
            "name a folder, which takes a table for each: --out=FOLDER"
        )
    if path.exists() and path.samefile(found[0].parent):
        raise UserError(f"--out={out}: that is the folder of the clips: name another one")
    if work.joined and files.exists(joined := path / RANKING) and _note_in(joined) != JOINED:
        raise UserError(
            f"'{joined}' is no ranking of this command: it stays\n"
            "move it away, or name another folder: --out=FOLDER"
        )
    if work.joined and (path / LISTS).is_symlink():
        raise UserError(f"'{path / LISTS}' is a link\nname another folder: --out=FOLDER")


def run(found: Sequence[Path], out: str, work: Work) -> Result:
    """Makes the results of every table that has none yet; each appears whole or not at all.

    If the results are lists, they lie in OUT/parts, and OUT/ranking.parquet has the best of all.

    Raises:
      ValueError: there are results of other clips or by another run, gallery or rule; or a table
        cannot be read. The results of the other tables are made first.
    """
    place = Path(out).expanduser()
    folder = files.make_folder(place / LISTS if work.joined else place, "--out")
    notes = {table: _note(table, work) for table in found}
    left = [table for table, note in notes.items() if not _is_made(folder / table.name, note)]
    if work.joined:
        check_out(out, found, type(work))
        (place / RANKING).unlink(missing_ok=True)
    label, failed = type(work).__name__.lower(), []
    progress = terminal.Progress(
        len(found), initial=len(found) - len(left), unit="table", label=label, leave=False
    )
    for table in left:
        try:
            content = tables.to_parquet(work.table(table), {NOTE: notes[table]})
        except UserError as error:
            failed.append(str(error) if table.name in str(error) else f"{table}: {error}")
        else:
            if _note(table, work) != notes[table]:
                raise UserError(f"'{table}' or what reads it has changed: give the command again")
            _write(folder / table.name, content, notes[table])
        progress.advance(1)
    progress.close()
    if failed:
        others = f"{len(failed):,} of {len(found):,} tables failed, the others are done"
        raise UserError("\n".join([*failed[0].splitlines()[:2], others]))
    if work.joined:
        _check_once(found)
        content = tables.to_parquet(_join(folder, found), {NOTE: JOINED})
        _write(place / RANKING, content, JOINED)
    skipped = len(found) - len(left)
    shown = f"{len(found):,}" + (f", {skipped:,} of them before" if skipped else "")
    results = str(place / RANKING if work.joined else place)
    content = {"tables": len(found), "skipped": skipped, "results": results}
    return Result(content, {"tables": shown, "results": results})


def _write(results: Path, content: bytes, note: bytes) -> None:
    """Writes new results, unless another call has made the same meanwhile."""
    try:
        tables.write_new(results, content)
    except UserError:
        if not _is_made(results, note):
            raise


def _note(table: Path, work: Work) -> bytes:
    """Returns what the results of a table are made of: the file with its time, and the work."""
    stat = table.stat()
    clips = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return msgspec.json.encode({"clips": clips, **work.made_by()})


def _is_made(results: Path, note: bytes) -> bool:
    """Returns True if there are results with this note; others are a UserError."""
    if not files.exists(results):
        return False
    if _note_in(results) != note:
        raise UserError(
            f"'{results}' is damaged, or was made of other clips, or by another run, gallery or "
            "rule\ndelete it, or name another folder: --out=FOLDER"
        )
    return True


def _note_in(results: Path) -> bytes | None:
    """Returns what a table of results was made of; None for another file."""
    from pyarrow import ArrowException, parquet

    try:
        with files.open_regular(results) as file:
            return (parquet.read_metadata(file).metadata or {}).get(NOTE)
    except ArrowException:
        return None


def _is_empty(path: Path) -> bool:
    """Returns True for a table without rows, as Spark writes some."""
    return parquet.num_rows(path) == 0


def _check_once(found: Sequence[Path]) -> None:
    """Refuses a clip that is in two tables, with or without `.mp4`."""
    owner: dict[str, Path] = {}
    for table in found:
        for name in map(clean_name, parquet.clip_names(table)):
            if owner.setdefault(name, table) != table:
                raise _in_two_tables(name, f", {owner[name].name} and {table.name}")


def _in_two_tables(clip: str, which: str) -> UserError:
    return UserError(
        f"clip '{show(clip)}' is in two tables{which}\nwrite all frames of a clip into one table"
    )


def _join(folder: Path, found: Sequence[Path]) -> "pyarrow.Table":
    """Returns the best of the lists of all tables, of which two are in memory at a time."""
    import pyarrow
    from pyarrow import parquet

    def lists(table: Path) -> pyarrow.Table:
        with files.open_regular(folder / table.name) as file:
            return parquet.read_table(file)

    joined = lists(found[0])
    for table in found[1:]:
        joined = best(pyarrow.concat_tables([joined, lists(table)]))
    return best(joined)
