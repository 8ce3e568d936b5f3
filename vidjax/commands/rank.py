"""`--mode=rank`: writes a ranking of new clips, with scores, to a file of the user's choice.

The ending of the file's name decides its format:

    .tsv, .csv  a line per clip of a list: identity, rank, clip, score; see `vidjax.tables`
    .jsonl      an object per identity: {"identity": ..., "clips": [{"clip": ..., "score": ...}]}
    .parquet    the columns of .tsv; needs pyarrow

Names are as they were given, but for the `'` before some in .tsv and .csv. Scores have all digits
of float32. A clip without a usable frame has the score -inf, which is null in .jsonl.
"""

import functools
import importlib.util
import io
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from vidjax import files, tables
from vidjax.errors import UserError

Ranking = Mapping[str, Sequence[tuple[str, float]]]  # identity -> (clip, score), best first

COLUMNS = ("identity", "rank", "clip", "score")


def check_out(path: Path, endings: Sequence[str] = ()) -> None:
    """Checks that a ranking, or another table, can be written to a new file.

    Args:
      path: the file.
      endings: the endings that its name may have; those of FORMATS where none is given.

    Raises:
      ValueError: another ending, a file that exists, no folder, or no pyarrow for a parquet table.
    """
    if path.suffix not in (endings or FORMATS):
        raise UserError(f"--out={path}: end the name in {', '.join(endings or FORMATS)}")
    if os.path.lexists(path):
        raise UserError(_exists(path))
    if not path.parent.is_dir():
        raise UserError(f"--out={path}: there is no folder '{path.parent}': make it first")
    if path.suffix == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise UserError(
            f"--out={path}: the package pyarrow writes parquet, and is not installed\n"
            "pip install 'vidjax[parquet]', or end the name in .tsv or .jsonl"
        )


def write(path: Path, ranking: Ranking) -> None:
    """Writes a ranking to a new file, whole or not at all.

    Args:
      path: the file; its ending is a key of FORMATS.
      ranking: identity -> (clip, score), best first.

    Raises:
      ValueError: the file exists by now.
      OSError: the file cannot be written.
    """
    write_new(path, FORMATS[path.suffix](ranking))


def write_new(path: Path, content: bytes) -> None:
    """Writes a new file, whole or not at all; never replaces one. Errors are those of `write`."""
    partial = path.with_name(f".vidjax-{secrets.token_hex(4)}{path.suffix}")
    files.write_bytes(partial, content)
    try:
        try:
            os.link(partial, path)  # a renaming would replace what is there
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links, as mounted cloud drives are
            path.touch(exist_ok=False)
            os.replace(partial, path)
    except FileExistsError:
        raise UserError(_exists(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def _exists(path: Path) -> str:
    return f"--out={path}: exists and is not overwritten: name another file, or delete it"


def _rows(ranking: Ranking) -> Iterator[tuple[str, int, str, np.float32]]:
    for identity, clips in ranking.items():
        for rank, (clip, score) in enumerate(clips, 1):
            yield identity, rank, clip, np.float32(score)


def to_table(ending: Literal[".csv", ".tsv"], ranking: Ranking) -> bytes:
    """Returns a ranking as a table of commas or of tabs."""
    return tables.to_text([COLUMNS, *_rows(ranking)], ending).encode()


def to_jsonl(ranking: Ranking) -> bytes:
    """Returns a ranking as lines of JSON, one per identity."""
    lines = []
    for identity, clips in ranking.items():
        listed = [
            {"clip": clip, "score": float(str(np.float32(score))) if math.isfinite(score) else None}
            for clip, score in clips
        ]
        lines.append(json.dumps({"identity": identity, "clips": listed}, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines).encode()


def to_parquet(ranking: Ranking) -> bytes:
    """Returns a ranking as a parquet table."""
    import pyarrow
    from pyarrow import parquet

    kinds = (pyarrow.string(), pyarrow.int32(), pyarrow.string(), pyarrow.float32())
    rows = list(_rows(ranking))
    arrays = [pyarrow.array([row[i] for row in rows], kind) for i, kind in enumerate(kinds)]
    content = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays, COLUMNS), content)
    return content.getvalue()


FORMATS: Mapping[str, Callable[[Ranking], bytes]] = {
    ".csv": functools.partial(to_table, ".csv"),
    ".tsv": functools.partial(to_table, ".tsv"),
    ".jsonl": to_jsonl,
    ".parquet": to_parquet,
}
