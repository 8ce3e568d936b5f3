"""Embeds, ranks or identifies the clips of many parquet tables, on one machine or several.

    FOLDER/NAME.parquet   clips, see `vidjax.data.clip_files`; no clip is in two tables
    OUT/NAME.parquet      the results for these clips

The classes `Embed`, `Rank` and `vidjax.apps.gallery.answers.Identify` make the results of a table.
`process_tables` uses one of these classes on one machine. On several machines, each worker of Ray
Data makes one object of the class, and calls the object with paths. See vidjax/data/README.md,
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
from vidjax.data.labels import sort_identities
from vidjax.utils import files, tables, terminal
from vidjax.utils.errors import UserError, check_argument
from vidjax.utils.names import clean_name, clean_name_at, show

if TYPE_CHECKING:
    import pyarrow

    from vidjax.data.memory import MemoryClips
    from vidjax.data.packing import Clips

NOTE_KEY = b"vidjax"  # key of the parquet metadata that identifies the clips and the model
JOINED_NOTE = b"ranking"  # value of this key in a joint ranking
HIDDEN_PREFIXES = (".", "_")  # files with such names are not data, as in Spark
# In the output folder of `Rank`: a folder with a ranking per table, and the joint ranking.
LISTS, RANKING = "parts", "ranking.parquet"
MAX_LISTED_CLIPS = 100  # per identity


class TableTask:
    """Makes a table of results from a parquet table of clips.

    The subclasses are `Embed`, `Rank` and `vidjax.apps.gallery.answers.Identify`.
    """

    joined = False  # True if `join_rankings` joins the results of all tables

    def __init__(self, open_trained: Callable[..., Any], *args: str, **options: float | None):
        """Opens a model or gallery: calls `open_trained(*args)`, such as `vidjax.restore(run)`.

        `options` are keyword arguments for the method `rank` or `identify` of the model or gallery.
        """
        self.trained, self.options = open_trained(*args), options

    def columns(self, clips: "MemoryClips | Clips") -> tables.Columns:
        """Returns the results for `clips` as a table: name of a column -> (type, values)."""
        raise NotImplementedError

    def table(self, path: Path) -> "pyarrow.Table":
        """Returns a table with the results for the clips in the parquet table `path`."""
        if parquet.count_rows(path):  # Spark also writes tables without rows
            return tables.to_arrow(self.columns(self.trained.load(path)))
        return tables.to_arrow(self.columns({"none": {}})).slice(0, 0)  # no rows, same columns

    def __call__(self, batch: Mapping[str, Iterable[str]]) -> "pyarrow.Table":
        """Returns one table with the results for the clips of several parquet tables.

        `batch["path"]` contains the paths of the parquet tables. Ray Data makes such batches.
        """
        import pyarrow

        return pyarrow.concat_tables([self.table(Path(path)) for path in batch["path"]])


class Embed(TableTask):
    """Embeds clips with a trained model. Columns: `clip` (name), `vector` (float32 unit vector)."""

    def columns(self, clips: "MemoryClips | Clips") -> tables.Columns:
        """Embeds clips; returns the columns `clip` and `vector`: name -> (type, values)."""
        names = clips if isinstance(clips, Mapping) else clips.names
        return {"clip": ("string", [*names]), "vector": ("float32", self.trained.embed(clips))}


class Rank(TableTask):
    """Lists the best 100 clips of each identity, by the scores of a trained model or a gallery.

    For several parquet tables of clips, `join_rankings` joins the lists of all tables.
    """

    joined = True

    def columns(self, clips: "MemoryClips | Clips") -> tables.Columns:
        """Ranks clips; returns the columns `identity`, `rank` (1 is best), `clip` and `score`."""
        ranking = self.trained.rank(clips, **self.options)
        return tables.to_columns(tables.RANKING, [*tables.list_ranking(ranking)])


def join_rankings(lists: "pyarrow.Table") -> "pyarrow.Table":
    """Joins the rankings of several tables; returns the best 100 clips of each identity.

    `lists` contains the rankings one after the other, with the columns `identity`, `rank`, `clip`
    and `score`. The result equals a ranking of all clips at once, but has the identities in the
    order in which they first occur in `lists`. Ray Data can call this function for each identity,
    with `dataset.groupby("identity").map_groups`.

    Raises:
      ValueError: a clip occurs twice in the rankings of an identity.
    """
    import pyarrow
    from pyarrow import compute

    check_argument("join_rankings: lists", lists, pyarrow.Table, "a table of pyarrow")
    lists = lists.select([*tables.RANKING])
    identity = lists["identity"].combine_chunks().dictionary_encode().indices
    names = [clean_name(name) for name in lists["clip"].to_pylist()]
    keyed = lists.append_column("of", [identity]).append_column("name", [names])
    pairs = keyed.group_by(["of", "name"]).aggregate([([], "count_all")])
    if repeated := pairs.filter(compute.field("count_all") > 1)["name"].to_pylist():
        raise _repeated_clip_error(repeated[0], "")
    ordered = keyed.sort_by([("of", "ascending"), ("score", "descending"), ("name", "ascending")])
    of = ordered["of"].to_numpy()
    rank = np.arange(len(of)) - np.searchsorted(of, of) + 1
    ordered = ordered.set_column(1, "rank", [rank.astype(np.int32)])
    return ordered.filter(rank <= MAX_LISTED_CLIPS).select([*tables.RANKING])


def list_tables(source: str | Path) -> list[Path]:
    """Returns the sorted paths of the parquet tables in a folder.

    The list is empty if `source` is no folder, or if `source` is a dataset: a folder with a table
    of a split, such as `val.parquet`. Raises UserError if a folder has tables and other files.
    """
    source = files.local(source)
    entries = sorted(source.iterdir()) if source.is_dir() else []
    entries = [path for path in entries if not path.name.startswith(HIDDEN_PREFIXES)]
    inputs = [path for path in entries if path.suffix == ".parquet"]
    if not inputs or {path.stem for path in inputs} & {*SPLITS}:
        return []
    # Inner folders are allowed, because one may be the folder of the results.
    refuse_unread((path for path in entries if path not in inputs and not path.is_dir()), "tables")
    return inputs


def check_out(out: str | Path | None, inputs: Sequence[Path], work: type[TableTask]) -> None:
    """Raises UserError if `out`, the value of `--out`, cannot be the folder of the results.

    `inputs` are the tables of clips. `work` is the class that makes the results, such as `Rank`.
    """
    path = files.local(out) if out else None
    endings = (*tables.ENDINGS, ".txt")
    if path is None or path.suffix in endings or (path.exists() and not path.is_dir()):
        flag = f"--out={out}" if out else "without --out"
        raise UserError(
            f"{flag}: vidjax writes a file for each of the {len(inputs):,} tables in "
            f"'{inputs[0].parent}', and needs a folder for these files\nname a folder: --out=FOLDER"
        )
    if path.exists() and path.samefile(inputs[0].parent):
        raise UserError(f"--out={out} is the folder of the clips\nname another folder")
    if work.joined and files.exists(joined := path / RANKING) and _read_note(joined) != JOINED_NOTE:
        raise files.foreign_error(joined)
    if work.joined and (path / LISTS).is_symlink():
        raise UserError(
            f"'{path / LISTS}' must be a folder, but is a link\nname another folder: --out=FOLDER"
        )


def process_tables(inputs: Sequence[Path], out: str | Path, work: TableTask) -> dict[str, object]:
    """Makes the results for each table in `inputs`, and writes them to the folder `out`.

    Results of an earlier call are kept. If the process is killed, no file is incomplete, and the
    next call continues. If `work` is `Rank`, OUT/parts contains the ranking of each table, and
    OUT/ranking.parquet the ranking of all clips.

    Returns a dict with three values: `tables`, the number of tables; `skipped`, the number of
    tables whose results an earlier call has written; `results`, the path of the file or folder of
    the results.

    Raises:
      UserError: the folder `out` contains results of other clips, or results that were made with
        another run, gallery or option.
      UserError: a table cannot be read. This error is raised after all other tables are processed.
    """
    out_folder = files.local(out)
    folder = files.make_folder(out_folder / LISTS if work.joined else out_folder, "--out")
    notes = {table: _make_note(table, work) for table in inputs}
    left = [table for table, note in notes.items() if not _is_made(folder / table.name, note)]
    if work.joined:
        check_out(out, inputs, type(work))
        (out_folder / RANKING).unlink(missing_ok=True)
    label, failed, skipped = type(work).__name__.lower(), [], len(inputs) - len(left)
    progress = terminal.Progress(
        len(inputs), initial=skipped, unit="table", label=label, leave=False
    )
    for table in left:
        try:
            content = tables.to_parquet(work.table(table), {NOTE_KEY: notes[table]})
        except UserError as error:
            failed.append(str(error) if table.name in str(error) else f"'{table}': {error}")
        else:
            if _make_note(table, work) != notes[table]:
                raise UserError(
                    f"table '{table}', the gallery or the run was changed during the command\n"
                    "run the command again"
                )
            _write(folder / table.name, content, notes[table])
        progress.advance(1)
    progress.close()
    if failed:
        others = f"{len(failed):,} of {len(inputs):,} tables failed; the other tables are done"
        raise UserError("\n".join([*failed[0].splitlines()[:2], others]))
    if work.joined:
        _check_once(inputs)
        content = tables.to_parquet(_join(folder, inputs), {NOTE_KEY: JOINED_NOTE})
        _write(out_folder / RANKING, content, JOINED_NOTE)
    results = str(out_folder / RANKING if work.joined else out_folder)
    return {"tables": len(inputs), "skipped": skipped, "results": results}


def _write(results: Path, content: bytes, note: bytes) -> None:
    """Writes the bytes `content` to the new file `results`.

    `note` is part of `content`, see `_make_note`. If the file already exists with this note, it has
    the same results, and is left as it is. If it exists with another note, raises UserError.
    """
    try:
        files.write_bytes(results, content, replace=False)
    except UserError:
        if not _is_made(results, note):
            raise


def _make_note(table: Path, work: TableTask) -> bytes:
    """Returns the note that is stored with the results of a table, to recognise them later.

    The note is JSON text. It contains the size and the modification time of the file `table`, the
    class and the options of `work`, and a digest of the model or gallery that `work` uses.
    """
    stat = table.stat()
    clips = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    task = {"work": type(work).__name__, "by": work.trained.digest, "options": work.options}
    return msgspec.json.encode({"clips": clips, **task})


def _is_made(results: Path, note: bytes) -> bool:
    """Returns whether the file `results` already contains the results that `note` describes.

    Returns False if the file does not exist. Raises UserError if the file contains another note, or
    none. For notes, see `_make_note`.
    """
    if not files.exists(results):
        return False
    found = _read_note(results)
    if found is None:
        raise files.foreign_error(results)
    if found != note:
        raise UserError(
            f"'{results}' contains results of other clips, or of another run, gallery or option\n"
            "delete it, or name another folder: --out=FOLDER"
        )
    return True


def _read_note(results: Path) -> bytes | None:
    """Returns the note (see `_make_note`) that a parquet table contains, or None without it."""
    from pyarrow import ArrowException, parquet

    try:
        with files.open_regular(results) as file:
            return (parquet.read_metadata(file).metadata or {}).get(NOTE_KEY)
    except ArrowException:
        return None


def _check_once(inputs: Sequence[Path]) -> None:
    """Raises UserError if two tables contain the same clip. `a` and `a.mp4` are the same clip."""
    table_of: dict[str, Path] = {}
    for table in inputs:
        for given in parquet.read_clip_names(table):
            name = clean_name_at(str(table), given)
            if table_of.setdefault(name, table) != table:
                raise _repeated_clip_error(name, f", {table_of[name].name} and {table.name}")


def _repeated_clip_error(clip: str, names: str) -> UserError:
    return UserError(
        f"clip '{show(clip)}' is in two tables{names}\n"
        "write all frames of a clip into the same table"
    )


def _join(folder: Path, inputs: Sequence[Path]) -> "pyarrow.Table":
    """Joins several rankings to one ranking, sorted by identity.

    `inputs` are tables of clips. The ranking of a table is in `folder`, under the same file name.
    """
    import pyarrow
    from pyarrow import parquet

    joined = tables.to_arrow(tables.to_columns(tables.RANKING, []))
    for table in inputs:  # one by one, because together they may not fit in memory
        with files.open_regular(folder / table.name) as file:
            joined = join_rankings(pyarrow.concat_tables([joined, parquet.read_table(file)]))
    names = joined["identity"].to_pylist()
    place = {name: number for number, name in enumerate(sort_identities(names))}
    return joined.take(np.argsort([place[name] for name in names], stable=True))
