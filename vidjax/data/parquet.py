"""Reads parquet tables of frames within a limit of memory, even if a stranger made the file.

A parquet file consists of compressed pages. It may contain more values than its footer lists, and
pyarrow would decode all of them. So the values are counted in the headers of all pages before a
page is unpacked.

Source: the format of Apache Parquet, `PageHeader` in `parquet.thrift`; Thrift's compact protocol.
"""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.utils import files
from vidjax.utils.errors import UserError, closest, require_packages
from vidjax.utils.machine import memory_bytes
from vidjax.utils.names import show

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

TEXT_COLUMNS = ("clip", "modality")
COLUMNS = (*TEXT_COLUMNS, "features")
OPTIONAL_COLUMNS = tuple(FRAME_FIELDS)
MAX_PAGES = 300_000  # most writers make pages of 1 MB
HEADER_BYTES = (1 << 10, 1 << 20)  # bytes to read for a page header, and for a longer header
BATCH_VALUES = 1 << 20  # numbers of features that are decoded at once
MAX_HEADER_DEPTH = 8  # nested structs
# Physical type -> bytes of a value in memory. Text is dictionary-encoded: its values are indices.
VALUE_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


class Rows(NamedTuple):
    """The F rows of a table, one for each frame."""

    # Name -> pyarrow column without nulls. `features` is left out. Text is dictionary-encoded.
    columns: dict[str, Any]
    values: np.ndarray  # the features of all rows, joined in one array
    width: np.ndarray  # [F] int, the number of values of each feature


def read(path: Path) -> Rows:
    """Returns all rows of a table. Raises UserError if it is damaged or needs too much memory."""
    with _open(path) as (opened, file):
        names = _check_names(path, file.schema_arrow.names)
        _check_types(path, file.schema_arrow)
        counted = _check_pages(path, opened, file, names)
        return _read_rows(path, file, names, counted)


def read_clip_names(path: Path) -> list[str]:
    """Returns the distinct clip names of a parquet table, in any order."""
    with _open(path) as (opened, file):
        _check_pages(path, opened, file, ["clip"])
        column = file.read(columns=["clip"])["clip"].combine_chunks()
        _refuse_nulls(path, "clip", column, 0)
        return column.unique().cast("string").to_pylist()


def read_labels(path: Path) -> Iterator[tuple[Any, Any]]:
    """Returns the pairs (clip, identity) of a parquet table. A missing identity is "" or NaN."""
    from pyarrow import types

    names = ["clip", "identity"]
    with _open(path) as (opened, file):
        if missing := [name for name in names if name not in file.schema_arrow.names]:
            raise UserError(
                f"{path}: the table has no column {missing[0]}, only "
                f"{show(', '.join(file.schema_arrow.names))}\nname the columns clip and identity"
            )
        _check_pages(path, opened, file, names)
        clips, identities = file.read(columns=names).select(names)
        people: Iterable[Any] = ("" if x is None else x for x in identities.to_pylist())
        if types.is_floating(identities.type):
            people = identities.to_numpy()  # its scalars keep the width of the floats
        return zip(clips.to_pylist(), people, strict=True)


def count_rows(path: Path) -> int:
    """Returns the number of rows of a parquet table."""
    with _open(path) as (_, file):
        return file.metadata.num_rows


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"'{path}' is not a parquet table, or is damaged ({reason}): write it again")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[io.FileIO, "parquet.ParquetFile"]]:
    """Opens a table in a `with` block. Yields the file, and the table as an object of pyarrow.

    Text is dictionary-encoded. Errors of pyarrow in the block become UserError, but errors of the
    system do not.
    """
    with files.open_input(path) as opened:
        require_packages(str(path), "pyarrow", extra="parquet")
        try:
            import pyarrow
            from pyarrow import parquet

            string, binary = pyarrow.string(), pyarrow.binary()
            kinds = (string, pyarrow.large_string(), binary, pyarrow.large_binary())
            file = parquet.ParquetFile(opened)
            columns = [x for x in file.schema_arrow if x.name in TEXT_COLUMNS and x.type in kinds]
            for name in (*COLUMNS, *OPTIONAL_COLUMNS):
                if file.schema_arrow.names.count(name) > 1:
                    raise UserError(f"{path}: two columns are named {name}: delete one of them")
            text = [column.name for column in columns]
            yield opened, parquet.ParquetFile(opened, metadata=file.metadata, read_dictionary=text)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno:
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise _damaged(path, reason) from error


def _check_names(path: Path, names: Sequence[str]) -> list[str]:
    """Selects the columns to read from all columns `names`. Refuses missing or misspelt columns."""
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
                "quality, detection and number are optional"
            )
    return [name for name in known if name in names]


def _check_types(path: Path, schema: "pyarrow.Schema") -> None:
    """Checks that `features` are lists of numbers, and that the optional columns are numbers."""
    from pyarrow import types

    list_kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    for column in schema:
        kind, wanted = column.type, "numbers"
        if column.name not in ("features", *OPTIONAL_COLUMNS):
            continue
        if column.name == "features":
            kind, wanted = getattr(kind, "value_type", None), "lists of numbers"
            if not any(is_kind(column.type) for is_kind in list_kinds):
                kind = None
        if kind is None or not (types.is_integer(kind) or types.is_floating(kind)):
            raise UserError(
                f"{path}: column {column.name} is of type {column.type}: write {wanted}"
            )


def _check_pages(
    path: Path, opened: io.FileIO, file: "parquet.ParquetFile", names: Sequence[str]
) -> int:
    """Checks the headers of the pages of the columns `names`, without unpacking a page.

    `opened` and `file` are the same file. Returns the number of values of the column `features`.
    Raises UserError if the headers and the footer count different numbers of values, if there are
    too many pages, or if the columns need too much memory.
    """
    size, count, pages = 0, 0, 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            name = column.path_in_schema.partition(".")[0]
            if name not in names:
                continue
            values = unpacked = 0
            for page_bytes, page_values in _walk_pages(opened, column):
                values, unpacked, pages = values + page_values, unpacked + page_bytes, pages + 1
                if pages > MAX_PAGES:
                    raise _damaged(path, f"it has more than {MAX_PAGES:,} pages")
            if values != column.num_values:
                raise _damaged(
                    path,
                    f"it has {values:,} values of {name}, but its footer lists "
                    f"{column.num_values:,}",
                )
            width = VALUE_BYTES.get(column.physical_type, 4)
            if column.physical_type == "FIXED_LEN_BYTE_ARRAY":
                width = file.schema.column(place).length
            size += max(unpacked, values * width)
            count += values if name == "features" else 0
    limit, room = memory_bytes() // 3, files.max_unpacked_bytes(os.fstat(opened.fileno()).st_size)
    if size > limit:
        raise UserError(
            f"{path}: its columns take {size:,} bytes, but only {limit:,} are allowed, a third of "
            "the memory\nfor rank, embed and gallery identify, split it into several tables\n"
            "for training, write a file SPLIT/CLIP.npz for each clip"
        )
    if size > room:
        raise _damaged(path, f"it would unpack to {size:,} bytes of almost equal values")
    return count


def _walk_pages(
    opened: io.FileIO, column: "parquet.ColumnChunkMetaData"
) -> Iterator[tuple[int, int]]:
    """Yields (bytes after unpacking, number of values) of each page of a column."""
    at, first = column.data_page_offset, column.dictionary_page_offset
    if column.has_dictionary_page and first and first < at:
        at = first
    if at < 0:
        raise ValueError("a column begins before the file")
    end, left = at + column.total_compressed_size, column.num_values
    while left > 0 and at < end:
        length, fields = _read_header(opened, at)
        data = fields.get(5) or fields.get(8) or {}  # data page of version 1 or 2; or a dictionary
        packed, unpacked, values = fields.get(3, -1), fields.get(2, -1), data.get(1, 0)
        if min(packed, unpacked, values) < 0:
            raise ValueError("a page has a negative size")
        yield unpacked, values
        at += length + packed
        left -= values


def _read_header(opened: io.FileIO, at: int) -> tuple[int, dict[int, Any]]:
    """Returns the length of the page header at byte `at`, and its fields, number -> value."""
    for size in HEADER_BYTES:
        header = _Compact(os.pread(opened.fileno(), size, at))
        with contextlib.suppress(IndexError):
            fields = header.struct()
            return header.at, fields
    raise ValueError("a page has no header")


class _Compact:
    """Parses bytes in Thrift's compact protocol. Incomplete bytes raise IndexError."""

    def __init__(self, content: bytes):
        self._content, self.at = content, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Returns field number -> an integer, a struct, or None for a value of another type."""
        if depth > MAX_HEADER_DEPTH:
            raise ValueError("a page header has too many nested structs")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._int()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:  # noqa: ANN401 (`kind` decides the type)
        match kind:
            case 1 | 2:  # True and False have no further bytes
                return None
            case 4 | 5 | 6:
                return self._int()
            case 3 | 7:
                self._skip(1 if kind == 3 else 8)
            case 8:
                self._skip(self._varint())
            case 9 | 10:
                head = self._byte()
                count = self._varint() if head >> 4 == 15 else head >> 4
                for _ in range(count):
                    self._value(3 if head & 15 in (1, 2) else head & 15, depth)
            case 12:
                return self.struct(depth + 1)
            case _:
                raise ValueError("a page has a damaged header")
        return None

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self._content):  # ends a list that claims more items than there are bytes
            raise IndexError

    def _byte(self) -> int:
        self.at += 1
        return self._content[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a page has a damaged header")

    def _int(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)


def _read_rows(path: Path, file: "parquet.ParquetFile", names: Sequence[str], counted: int) -> Rows:
    """Reads the columns `names`. `counted` is the number of values in the features of all rows."""
    import pyarrow
    from pyarrow import compute

    groups, widths, first, at = [], [], 0, 0
    scalars = [name for name in names if name != "features"]
    values = np.empty(0, np.float32)
    for number in range(file.metadata.num_row_groups):
        groups.append(file.read_row_group(number, columns=scalars))
        # Reads in batches, because pyarrow needs several times the memory of the decoded values.
        rows = max(1, BATCH_VALUES * file.metadata.num_rows // max(counted, 1))
        batches = file.iter_batches(rows, row_groups=[number], columns=["features"])
        for batch in batches:
            chunk = batch.column(0)
            _refuse_nulls(path, "features", chunk, first)
            first += len(chunk)
            flat = chunk.flatten()
            if flat.null_count:
                raise UserError(f"{path}: column features: a list contains a null: remove the row")
            flat = flat.to_numpy(zero_copy_only=False)
            width = compute.call_function("list_value_length", [chunk])
            widths.append(width.to_numpy(zero_copy_only=False))
            if len(flat):
                values = values if at else np.empty(counted, flat.dtype)
                values[at : at + len(flat)] = flat
            at += len(flat)
    joined = pyarrow.concat_tables(groups) if groups else file.schema_arrow.empty_table()
    columns = {}
    for name in scalars:
        column = joined[name].combine_chunks()
        _refuse_nulls(path, name, column, 0)
        columns[name] = _encode_text(path, name, column) if name in TEXT_COLUMNS else column
    width = np.concatenate(widths) if widths else np.empty(0, np.int32)
    if len(width) != len(joined):
        raise _damaged(path, f"it has {len(width):,} rows of features, but {len(joined):,} clips")
    return Rows(columns, values[:at], width)


def _refuse_nulls(path: Path, name: str, column: Any, first: int) -> None:  # noqa: ANN401 (pyarrow)
    if column.null_count:
        row = first + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise UserError(f"{path}: row {row + 1}: {name} is missing: add it, or delete the row")


def _encode_text(path: Path, name: str, column: Any) -> Any:  # noqa: ANN401 (pyarrow)
    """Dictionary-encodes a column of text. Raises UserError if it is not text in UTF-8."""
    import pyarrow

    try:
        codes = column.dictionary_encode()
        values = codes.dictionary.cast(pyarrow.string())
        values.validate(full=True)  # a damaged table may contain text that is not UTF-8
    except pyarrow.ArrowException:
        raise UserError(
            f"{path}: column {name} is of type {column.type}, or not UTF-8: write text in UTF-8"
        ) from None
    return pyarrow.DictionaryArray.from_arrays(codes.indices, values)
