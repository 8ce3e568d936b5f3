"""Writes tables to new files. An error or a crash leaves no incomplete file.

The ending of the file name decides the format. A .tsv or .csv has a line of column names and a
line per row. A .jsonl has a JSON object per line. A .parquet has the columns of the .tsv.

A spreadsheet would run cells such as `=1+1` in a .tsv or .csv as formulas. So a `'` is put before
such cells, and before cells that begin with `'`. A program that reads the table must remove this
`'`.
"""

import codecs
import csv
import io
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from vidjax.utils import files
from vidjax.utils.errors import UserError, require_packages, warn

if TYPE_CHECKING:
    import pyarrow

# Name -> (type in Apache Arrow such as `float32`, values). An array [N, D] becomes N lists.
Columns = Mapping[str, tuple[str, Sequence[object] | np.ndarray]]
Ranking = Mapping[str, Sequence[tuple[str, float]]]  # identity -> (clip, score), the best first
RANKING = {"identity": "string", "rank": "int32", "clip": "string", "score": "float32"}
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
# A `'` is put before these characters. The wide forms of = + - @ start formulas in Japanese.
FORMULA_STARTS = tuple("=+-@\t\r'\uff1d\uff0b\uff0d\uff20")
BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def check_new(out: str | Path, endings: Sequence[str] = ENDINGS) -> Path:
    """Checks the path of a new table, the value of the option `--out`, and returns the path.

    A `~` becomes the home folder. Raises UserError if the file exists, its folder is missing, or
    its name has none of the `endings`.
    """
    path = files.local(out)
    if path.suffix not in endings:
        names = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        raise UserError(f"--out={path}: end the name in {names}")
    if os.path.lexists(path):
        raise UserError(files.describe_existing(path))
    if not path.parent.is_dir():
        raise UserError(f"--out={path}: the folder '{path.parent}' does not exist: make it first")
    if path.suffix == ".parquet":
        instead = "end the name in .tsv or .jsonl" if ".tsv" in endings else ""
        require_packages(f"--out={path}", "pyarrow", extra="parquet", instead=instead)
    return path


def write(
    path: Path,
    columns: Mapping[str, str],
    rows: Iterable[Sequence[object]],
    objects: Iterable[Mapping[str, object]],
) -> None:
    """Writes a table to the new file `path`. The ending of its name decides the format.

    A .jsonl file contains only `objects`, one per line. Other files contain only `rows`, where None
    is an empty cell. `columns` is name of a column -> its type in Apache Arrow, such as `float32`.
    """
    if path.suffix == ".jsonl":
        lines = (json.dumps(line, ensure_ascii=False) for line in objects)
        content = "".join(f"{line}\n" for line in lines).encode()
    elif path.suffix == ".parquet":
        content = to_parquet(to_arrow(to_columns(columns, list(rows))))
    else:
        content = to_text([columns, *rows], ".tsv" if path.suffix == ".tsv" else ".csv").encode()
    files.write_bytes(path, content, replace=False)


def write_ranking(path: Path, ranking: Ranking) -> None:
    """Writes a ranking, identity -> list of (clip, score), to a new file, see `write`.

    A line of .jsonl is {"identity": ..., "clips": [{"clip": ..., "score": ...}]}. A score has all
    digits of float32. If a clip has no usable frame, the score is -inf, or null in .jsonl.
    """
    objects = (
        {
            "identity": identity,
            "clips": [
                {"clip": clip, "score": float(str(np.float32(x))) if math.isfinite(x) else None}
                for clip, x in clips
            ],
        }
        for identity, clips in ranking.items()
    )
    write(path, RANKING, list_ranking(ranking), objects)


def list_ranking(ranking: Ranking) -> Iterator[tuple[object, ...]]:
    """Yields the rows of a ranking: identity, rank from 1, clip and score, as in RANKING."""
    for identity, clips in ranking.items():
        for rank, (clip, score) in enumerate(clips, 1):
            yield identity, rank, clip, np.float32(score)


def to_text(rows: Iterable[Iterable[object]], ending: Literal[".csv", ".tsv"]) -> str:
    """Converts rows to the text of a .csv or .tsv, quoted as in Excel. None is an empty cell."""

    def escape(cell: object) -> object:
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell

    text = io.StringIO()
    writer = csv.writer(text, delimiter=SEPARATORS[ending], lineterminator="\n")
    writer.writerows(map(escape, row) for row in rows)
    return text.getvalue()


def read_text(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells) for each row of a text table, except for blank rows.

    In a .csv, commas separate the cells. In other files, tabs separate the cells.
    """
    content = files.read_input(path)
    separator = SEPARATORS.get(path.suffix.lower(), "\t")
    # Excel saves "Unicode text" as UTF-16, and "Text" as Windows-1252.
    encoding = "utf-16" if content.startswith(BOMS) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if separator == ",":
            raise UserError(
                f"'{path}' is not a table of UTF-8 text: {error}\nsave it as CSV in UTF-8"
            ) from None
        text = content.decode("cp1252", "replace")
        warn(f"'{path}' is not UTF-8, and is read as Windows-1252: check its names")
    lines = io.StringIO(text, newline="")
    try:
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=separator == ",")
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, [*map(_unescape, cells)]
    except csv.Error as error:
        kind = "CSV" if separator == "," else "text with tabs"
        raise UserError(f"'{path}' is not a table: {error}\nsave it as {kind}") from error


def find_columns(place: str, titles: Collection[str], wanted: Sequence[str]) -> list[str]:
    """Returns the titles of the `wanted` columns as they are written in the table.

    `titles` are all titles of the table, in upper or lower case. `wanted` are titles in lower case.
    If a wanted column is missing, returns []. If two titles mean the same column, raises UserError,
    whose message begins with `place`, such as a file.
    """
    found = [[x for x in titles if x.strip().lower() == column] for column in wanted]
    if twice := next((same for same in found if len(same) > 1), []):
        raise UserError(f"{place}: the columns {' and '.join(twice)} mean the same: rename one")
    return [same[0] for same in found] if all(found) else []


def _unescape(cell: str) -> str:
    """Removes a `'` that `to_text` has added: `'=1` becomes `=1`, but `'t Hooft` stays."""
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(FORMULA_STARTS) else cell


def to_columns(kinds: Mapping[str, str], rows: Sequence[Sequence[object]]) -> Columns:
    """Converts rows of cells to columns: name of a column -> (its type, its cells).

    `kinds` is name of a column -> its type in Apache Arrow, in the order of the cells.
    """
    return {name: (kind, [row[i] for row in rows]) for i, (name, kind) in enumerate(kinds.items())}


def to_arrow(columns: Columns) -> "pyarrow.Table":
    """Converts columns, name -> (type in Apache Arrow, values), to a table of Apache Arrow."""
    import pyarrow

    arrays = []
    for kind, values in columns.values():
        if isinstance(values, np.ndarray) and values.ndim == 2:
            flat = pyarrow.array(values.ravel(), getattr(pyarrow, kind)())
            arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1]))
        else:
            arrays.append(pyarrow.array(values, getattr(pyarrow, kind)()))
    return pyarrow.table(arrays, list(columns))


def to_parquet(table: "pyarrow.Table", note: Mapping[bytes, bytes] | None = None) -> bytes:
    """Returns a table as the content of a parquet file. `note` is the metadata of the file."""
    from pyarrow import parquet

    content = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata(note), content, write_page_checksum=True)
    return content.getvalue()
