"""Reads parquet tables of frames within a limit of memory, even if a stranger made the file.

A parquet file consists of compressed pages. It may contain more values than its footer lists, and
pyarrow would decode all of them. So a child process with limits decodes the pages.
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from msgspec import Meta, Struct

from vidjax.data.packed_clips import FRAME_FIELDS
from vidjax.utils import files, processes, tables
from vidjax.utils.errors import UserError, closest, require_packages
from vidjax.utils.machine import memory_bytes
from vidjax.utils.names import show

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

TEXT_COLUMNS = ("clip", "modality")
COLUMNS = (*TEXT_COLUMNS, "features")
OPTIONAL_COLUMNS = tuple(FRAME_FIELDS)
BATCH_VALUES = 1 << 20  # numbers of features that are decoded at once
# Physical type -> bytes of a value in memory. Text is dictionary-encoded: its values are indices.
VALUE_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
# The limits of the child process. The libraries need 0.4 GB of address space. A page is in memory
# three times: unpacked, decoded, and joined with other pages.
LIBRARY_BYTES, COPIES = 1 << 29, 3
CPU_SECONDS, CPU_BYTES_PER_SECOND = 30, 4 << 20

Result = TypeVar("Result")


class Columns(Struct):
    """The distinct texts of each text column, and the count and dtype of all feature values."""

    text: dict[str, list[str]]
    values: int
    dtype: Annotated[str, Meta(pattern=r"^(u?int|float)[0-9]+\Z")]


class Rows(NamedTuple):
    """The F rows of a table, one for each frame."""

    # Name of a column -> its distinct texts, and [F] int, the index of the text of each row.
    text: dict[str, tuple[list[str], np.ndarray]]
    scalars: dict[str, np.ndarray]  # name of an optional column -> [F] numbers
    values: np.ndarray  # the features of all rows, joined in one array
    width: np.ndarray  # [F] int, the number of values of each feature


def _get_room(path: Path) -> int:
    """Returns the largest size, in bytes, that is allowed for the columns of a table in memory."""
    return min(memory_bytes() // 3, files.max_unpacked_bytes(path.stat().st_size))


def read(path: Path) -> Rows:
    """Reads all rows of a table of frames in a child process. Features are a memory map.

    Raises UserError if the table is damaged, needs too much memory, or lacks a column.
    """
    with files.scratch_folder() as scratch:  # the memory map keeps the deleted file open
        found = _run(path, {"out_dir": str(scratch)}, Columns, [scratch])
        with processes.doubt(path):
            files.refuse_links(scratch)
            arrays = files.read_npz(scratch / "columns.npz", COPIES * _get_room(path))
            values = _map_features(scratch, found.values, np.dtype(found.dtype), "r")
            text = {name: (found.text[name], arrays.pop(name)) for name in TEXT_COLUMNS}
            rows = Rows(text, arrays, values, arrays.pop("width"))
            _check_rows(rows)
            return rows


def _check_rows(rows: Rows) -> None:
    """Raises ValueError if the columns that a child process wrote do not fit together."""
    bounds = [(codes, len(texts)) for texts, codes in rows.text.values()]
    bounds += [(rows.width, len(rows.values) + 1)]
    fits = [x.dtype.kind in "iuf" for x in rows.scalars.values()]
    fits += [x.dtype.kind in "iu" and not ((x < 0) | (x >= end)).any() for x, end in bounds]
    shapes = {x.shape for x in (*rows.scalars.values(), *(x for x, _ in bounds))}
    fits += [shapes == {(len(rows.width),)}, {*rows.scalars} <= {*OPTIONAL_COLUMNS}]
    if not all(fits) or rows.width.sum(dtype=float) != len(rows.values):
        raise ValueError("a column has a wrong length, dtype or value")


def read_contents(path: Path) -> tuple[list[str], list[np.ndarray], list[str]]:
    """Reads any parquet table. Nested columns are flattened. For errors, see `read`.

    Returns three lists: the distinct values of all columns of strings, an array for each column of
    floats, and the names of all columns.
    """
    with files.scratch_folder() as scratch:
        arguments = {"out_dir": str(scratch), "any_columns": True}
        texts, columns = _run(path, arguments, tuple[list[str], list[str]], [scratch])
        with processes.doubt(path):
            arrays = files.read_npz(scratch / "columns.npz", COPIES * _get_room(path))
            return texts, [*arrays.values()], columns


def _run(
    path: Path, arguments: Mapping[str, object], kind: type[Result], writes: Sequence[Path] = ()
) -> Result:
    """Calls the function `work` below in a child process with limits, and returns its result.

    The argument of `work` is a dict: `path` (the table), and the items of `arguments`. `kind` is
    the class of the result. The child process can write only in the folders `writes`.
    """
    with files.open_input(path):
        require_packages(str(path), "pyarrow", extra="parquet")
    room = _get_room(path)
    return processes.run_limited(
        __name__,
        path,
        {"path": str(path), **arguments},
        kind,
        memory_bytes=LIBRARY_BYTES + COPIES * room,
        cpu_seconds=CPU_SECONDS + room // CPU_BYTES_PER_SECOND,
        output_bytes=processes.OUTPUT_BYTES + room,  # the texts of the table
        writes=writes,
    )


def work(arguments: dict[str, Any]) -> Columns | tuple[list[str], list[str]] | None:
    """Does one of three tasks with the table `arguments["path"]`, in a child process.

    - If `arguments` has `names`, tests that the columns `names` can be decoded. Returns None.
    - If `arguments` has `any_columns`, writes all columns of floats to the folder `out_dir`.
      Returns the distinct values of all columns of strings, and the names of all columns.
    - Otherwise, writes the columns that `read` needs to `out_dir`. Returns `Columns`.
    """
    path = Path(arguments["path"])
    if names := arguments.get("names"):
        with _open(path) as file:
            file.read(columns=names, use_threads=False)
        return None
    folder = Path(arguments["out_dir"])
    if arguments.get("any_columns"):
        texts, numbers = set[str](), list[np.ndarray]()
        with _open(path) as file:
            names = file.schema_arrow.names
            for column in file.read(use_threads=False).columns:
                for leaf in _flatten(column.combine_chunks()):
                    if leaf.type in ("float", "double", "halffloat"):
                        numbers.append(leaf.drop_null().to_numpy(zero_copy_only=False))
                    elif "string" in str(leaf.type):
                        texts.update(map(str, leaf.unique().to_pylist()))
        np.savez(folder / "columns.npz", *numbers)
        return sorted(texts), names
    with _open(path) as file:
        names = _check_names(path, file.schema_arrow.names)
        _check_types(path, file.schema_arrow)
        return _write_columns(path, file, names, _check_footer(path, file, names), folder)


def _map_features(
    folder: Path, count: int, dtype: np.dtype, mode: Literal["r", "w+"]
) -> np.ndarray:
    """Maps the file `features.bin` in `folder` into memory: `count` numbers of `dtype`.

    With the mode `w+`, the file is made first.
    """
    if not count:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(folder / "features.bin", dtype, mode, shape=(count,)))


def read_clip_names(path: Path) -> list[str]:
    """Returns the distinct clip names of a table, in any order.

    This process decodes the table without limits. So first call `read`, which refuses tables that
    need too much memory.
    """
    with _open(path) as file:
        _check_footer(path, file, ["clip"])
        column = file.read(columns=["clip"])["clip"].combine_chunks()
        _refuse_nulls(path, "clip", column, 0)
        return column.unique().cast("string").to_pylist()


def read_labels(path: Path) -> Iterator[tuple[int, Any, Any]]:
    """Yields (row, clip, identity) for each distinct pair of clip and identity in a parquet table.

    `row` is the first row with this pair, counted from 1. A missing identity is "" or NaN.
    """
    from pyarrow import types

    with _open(path) as file:
        titles = file.schema_arrow.names
        names = tables.find_columns(str(path), titles, ("clip", "identity"))
        if not names:
            raise UserError(
                f"{path}: the table needs the columns clip and identity, but has only "
                f"{show(', '.join(titles))}\nrename its columns to clip and identity"
            )
        _check_footer(path, file, names)
        _run(path, {"names": names}, type(None))
        row, seen = 0, set[tuple[str, str]]()
        for batch in file.iter_batches(columns=names):
            clips, identities = (batch.column(name) for name in names)
            people: Iterable[Any] = ("" if x is None else x for x in identities.to_pylist())
            if types.is_floating(identities.type):  # scalars of numpy keep the width of the floats
                people = identities.to_numpy(zero_copy_only=False)
            for clip, person in zip(clips.to_pylist(), people, strict=True):
                row += 1
                if (pair := (str(clip), str(person))) not in seen:  # a row may be a frame
                    seen.add(pair)
                    yield row, clip, person


def has_column(path: Path, name: str) -> bool:
    """Returns True if a parquet table has the column `name`, in upper or lower case."""
    with _open(path) as file:
        return name in map(str.lower, file.schema_arrow.names)


def count_rows(path: Path) -> int:
    """Returns the number of rows of a parquet table."""
    with _open(path) as file:
        return file.metadata.num_rows


def _check_footer(path: Path, file: "parquet.ParquetFile", names: Sequence[str]) -> int:
    """Reads the sizes of the columns `names` from the footer of a table.

    Returns the number of values of the column `features`. Raises UserError if the columns need too
    much memory.
    """
    size = count = 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            name = column.path_in_schema.partition(".")[0]
            if name in names:
                width = VALUE_BYTES.get(column.physical_type, 4)
                size += max(column.total_uncompressed_size, column.num_values * width)
                count += column.num_values if name == "features" else 0
    limit = memory_bytes() // 3
    if size > limit:
        raise UserError(
            f"{path}: the table needs {size:,} bytes, more than a third of the memory ({limit:,})\n"
            "for rank, embed and gallery identify: split the table into several tables\n"
            "for train: replace the table by a file SPLIT/CLIP.npz for each clip"
        )
    if size > _get_room(path):
        raise _damaged(path, f"the table would unpack to {size:,} bytes, over 100 times its size")
    return count


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"'{path}' is not a parquet table, or is damaged ({reason}): write it again")


def _flatten(array: Any) -> Iterator[Any]:  # noqa: ANN401 (pyarrow)
    """Yields the flat arrays inside of a nested array of Apache Arrow, such as the items of lists.

    If the array is not nested, yields the array itself.
    """
    from pyarrow import types

    kind = array.type
    if types.is_nested(kind):
        inner = array.flatten()
        for part in inner if types.is_struct(kind) else [inner]:
            yield from _flatten(part)
    else:
        yield array


@contextlib.contextmanager
def _open(path: Path) -> Iterator["parquet.ParquetFile"]:
    """Opens a table in a `with` block.

    Columns of text are read as a dictionary and indices, if pyarrow can do so. Errors of pyarrow in
    the block become UserError. Errors of the operating system stay unchanged.
    """
    with files.open_input(path) as opened:
        require_packages(str(path), "pyarrow", extra="parquet")
        with files.damaged_file(functools.partial(_damaged, path)):
            import pyarrow
            from pyarrow import parquet

            string, binary = pyarrow.string(), pyarrow.binary()
            kinds = (string, pyarrow.large_string(), binary, pyarrow.large_binary())
            file = parquet.ParquetFile(opened)
            columns = [x for x in file.schema_arrow if x.name in TEXT_COLUMNS and x.type in kinds]
            for name in (*COLUMNS, *OPTIONAL_COLUMNS):
                if file.schema_arrow.names.count(name) > 1:
                    raise UserError(f"{path}: two columns are named {name}: delete one of them")
            meta = file.metadata
            groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
            chunks = [group.column(place) for group in groups for place in range(meta.num_columns)]
            # pyarrow cannot decode text with the encodings DELTA_... into a dictionary.
            delta = {x.path_in_schema for x in chunks if "DELTA" in str(x.encodings)}
            text = [column.name for column in columns if column.name not in delta]
            yield parquet.ParquetFile(
                opened, metadata=meta, read_dictionary=text, page_checksum_verification=True
            )


def _check_names(path: Path, names: Sequence[str]) -> list[str]:
    """Returns the columns to read, given the names of all columns.

    Raises UserError if a column is missing, or if the name of a column is probably misspelt.
    """
    known = (*COLUMNS, *OPTIONAL_COLUMNS)
    for name in names:
        similar = closest(name.lower(), known, cutoff=0.75)
        if name not in known and similar and similar not in names:
            raise UserError(
                f"{path}: column '{show(name)}' would be ignored: rename it to '{similar}', "
                "or delete it"
            )
    for name in known:
        if name in COLUMNS and name not in names:
            raise UserError(
                f"{path}: the table has no column {name}, only {show(', '.join(names))}\n"
                "write a row for each frame, with clip, modality and features (a list of numbers)\n"
                "the columns quality, detection and number (of the frame) are optional"
            )
    return [name for name in known if name in names]


def _check_types(path: Path, schema: "pyarrow.Schema") -> None:
    """Raises UserError if the columns of a table have wrong types.

    The column `features` must have lists of numbers. The columns OPTIONAL_COLUMNS, such as
    `quality`, must have numbers.
    """
    from pyarrow import types

    list_kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    wanted = {"features": "lists of numbers", **dict.fromkeys(OPTIONAL_COLUMNS, "numbers")}
    for column in schema:
        kind, remedy = column.type, wanted.get(column.name)
        if column.name == "features":
            kind = kind.value_type if any(is_kind(kind) for is_kind in list_kinds) else None
        if remedy and (kind is None or not (types.is_integer(kind) or types.is_floating(kind))):
            raise UserError(
                f"{path}: column {column.name} is of type {column.type}: write {remedy}"
            )


def _write_columns(
    path: Path, file: "parquet.ParquetFile", names: Sequence[str], counted: int, folder: Path
) -> Columns:
    """Decodes the columns `names`, and writes them to files in `folder`.

    `counted` is the number of all values of the features, as the footer of the table lists it.
    """
    from pyarrow import compute

    widths, first, at = [np.empty(0, np.int32)], 0, 0
    scalars = [name for name in names if name != "features"]
    joined = file.read(columns=scalars, use_threads=False)
    values = np.empty(0, np.float32)
    for number in range(file.metadata.num_row_groups):
        # Reads in batches, because pyarrow needs several times the memory of the decoded values.
        rows = max(1, BATCH_VALUES * file.metadata.num_rows // max(counted, 1))
        batches = file.iter_batches(
            rows, row_groups=[number], columns=["features"], use_threads=False
        )
        for batch in batches:
            chunk = batch.column(0)
            _refuse_nulls(path, "features", chunk, first)
            first += len(chunk)
            flat = chunk.flatten()
            if flat.null_count:
                raise UserError(f"{path}: column features: a list contains a null: remove its row")
            flat = flat.to_numpy(zero_copy_only=False)
            width = compute.call_function("list_value_length", [chunk])
            widths.append(width.to_numpy(zero_copy_only=False))
            if len(flat):
                values = values if at else _map_features(folder, counted, flat.dtype, "w+")
                values[at : at + len(flat)] = flat[: counted - at]
            at += len(flat)
    if at != counted:
        raise _damaged(path, f"features has {at:,} values, but the footer lists {counted:,}")
    arrays, text = {"width": np.concatenate(widths)}, {}
    if first != len(joined):
        raise _damaged(path, f"columns features and clip have {first:,} and {len(joined):,} rows")
    for name in scalars:
        column = joined[name].combine_chunks()
        _refuse_nulls(path, name, column, 0)
        if name in TEXT_COLUMNS:
            text[name], arrays[name] = _encode_text(path, name, column)
        else:
            arrays[name] = column.to_numpy(zero_copy_only=False)
    np.savez(folder / "columns.npz", **arrays)  # pyright: ignore[reportArgumentType]
    return Columns(text, counted, values.dtype.name)


def _refuse_nulls(path: Path, name: str, column: Any, first: int) -> None:  # noqa: ANN401 (pyarrow)
    if column.null_count:
        row = first + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise UserError(f"{path}: row {row + 1}: {name} is missing: add it, or delete the row")


def _encode_text(path: Path, name: str, column: Any) -> tuple[list[str], np.ndarray]:  # noqa: ANN401
    """Returns the distinct texts of a column, and [F] int, the index of the text of each row.

    `name` is the name of the column. Raises UserError if the column is not text in UTF-8.
    """
    import pyarrow

    try:
        codes = column.dictionary_encode()
        values = codes.dictionary.cast(pyarrow.string())
        values.validate(full=True)  # a damaged table may contain text that is not UTF-8
    except pyarrow.ArrowException:
        raise UserError(
            f"{path}: column {name} ({column.type}) is not text in UTF-8: write text in UTF-8"
        ) from None
    return values.to_pylist(), codes.indices.to_numpy()


if __name__ == "__main__":
    # Other memory pools reserve more address space, and each thread reserves some.
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    processes.serve(work)
