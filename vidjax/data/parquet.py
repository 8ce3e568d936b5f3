"""A split as a parquet table, one row per frame."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vidjax import files
from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.untrusted.names import clean_name_at, show
from vidjax.data.untrusted.packing import Clip
from vidjax.errors import UserError, closest
from vidjax.machine import memory_bytes

COLUMNS = ("clip", "modality", "features")
OPTIONAL = tuple(name for name, field in FRAME_FIELDS.items() if field.width == 1)


def read_clips(path: Path) -> Iterator[Clip]:
    """Yields the clips of a table, whose rows may come in any order; the table is in memory.

    Raises:
      ValueError: pyarrow is not installed, or the table is damaged or malformed; names file and,
        where there is one, column, row or clip.
    """
    columns = _read_columns(path)
    flat, width = _flat_features(path, columns["features"])
    start = np.cumsum(width, dtype=np.int64) - width
    scalars = {
        name: columns[name].to_numpy(zero_copy_only=False) for name in OPTIONAL if name in columns
    }
    clips: dict[str, dict[str, Any]] = {}
    given: dict[str, str] = {}
    for clip, modality, rows in _groups(columns["clip"], columns["modality"]):
        name = clean_name_at(f"{path}:", clip)
        place = f"{path}: clip {show(name)}, {modality}"
        odd = width[rows] != width[rows[0]]
        if odd.any():
            row = int(rows[np.argmax(odd)])
            raise UserError(
                f"{place}: features are {width[row]} wide in row {row + 1}, "
                f"{width[rows[0]]} in row {rows[0] + 1}"
            )
        given.setdefault(name, clip)
        if modality in clips.setdefault(name, {}):
            raise UserError(f"{place}: there with and without .mp4: keep one")
        index = start[rows][:, None] + np.arange(int(width[rows[0]]))
        fields = {name: column[rows] for name, column in scalars.items()}
        clips[name][modality] = {"features": flat[index], **fields}
    for name, modalities in clips.items():
        yield Clip(name, str(path), modalities, given[name])


def _read_columns(path: Path) -> Mapping[str, Any]:
    """Returns name -> pyarrow column without nulls; clip and modality as codes of strings."""
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path}: parquet is read by the package pyarrow, which is not installed\n"
            "install it with vidjax's extra [parquet]: pip install 'vidjax[parquet]'"
        ) from error
    try:
        with files.open_input(path) as opened:
            table = _read_table(path, opened)
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged table raises whatever pyarrow raises
        if isinstance(error, OSError) and error.errno:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{path}: damaged, or no parquet table: write it again ({reason})"
        ) from error
    for name, column in columns.items():
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise UserError(f"{path}: row {row + 1}: no {name}")
        if name in ("clip", "modality"):
            try:
                codes = column.dictionary_encode()
                values = codes.dictionary.cast(pyarrow.string())
            except pyarrow.ArrowException:
                raise UserError(f"{path}: column {name} is {column.type}, wanted text") from None
            columns[name] = pyarrow.DictionaryArray.from_arrays(codes.indices, values)
    return columns


def _read_table(path: Path, opened: io.FileIO) -> Any:
    """Returns the columns of a parquet file that are read, as a pyarrow table; text by codes.

    Raises:
      ValueError: a column is missing or there twice, or all would take too much memory.
    """
    import pyarrow
    from pyarrow import parquet

    file = parquet.ParquetFile(opened)
    names = file.schema_arrow.names
    wanted = [name for name in (*COLUMNS, *OPTIONAL) if name in names]
    known = (*COLUMNS, *OPTIONAL)
    for name in names:
        meant = closest(name.lower(), known, cutoff=0.75)
        if name not in known and meant and meant not in names:
            raise UserError(f"{path}: no column '{show(name)}' is read; did you mean '{meant}'?")
    if missing := [name for name in COLUMNS if name not in names]:
        there = f"{path}: no column {missing[0]}; it has {show(', '.join(names))}"
        raise UserError(
            f"{there}\nwrite a row per frame: clip (text), modality (text), features (a list of "
            "numbers)\nand optionally quality, detection, number; or a file CLIP.npz per clip"
        )
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise UserError(f"{path}: two columns are named {twice[0]}: keep one")
    size, limit = 0, memory_bytes() // 3
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] in wanted:
                width = 2 if column.physical_type == "FIXED_LEN_BYTE_ARRAY" else 4  # bytes or more
                size += max(column.total_uncompressed_size, width * column.num_values)
    if size > limit:
        raise UserError(
            f"{path}: its columns take {size:,} bytes, and a third of the memory is {limit:,}\n"
            "split it into several tables"
        )
    kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())
    text = [name for name in COLUMNS if file.schema_arrow.field(name).type in kinds]
    # A long name that comes a million times is in memory once.
    file = parquet.ParquetFile(opened, metadata=file.metadata, read_dictionary=text)
    return file.read(columns=wanted)


def _flat_features(path: Path, features: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns all values of a column of lists, and [F] int, the length of each list."""
    import pyarrow
    from pyarrow import compute

    kinds = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    if not any(kind(features.type) for kind in kinds):
        raise UserError(f"{path}: column features is {features.type}, wanted lists of numbers")
    values = features.flatten()
    if values.null_count:
        raise UserError(f"{path}: column features: a list holds a null")
    width = compute.call_function("list_value_length", [features])
    return values.to_numpy(zero_copy_only=False), width.to_numpy(zero_copy_only=False)


def _groups(clips: Any, modalities: Any) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields clip, modality and the numbers of their rows, in ascending order."""
    names, kinds = clips.dictionary.to_pylist(), modalities.dictionary.to_pylist()
    code = clips.indices.to_numpy().astype(np.int64) * len(kinds) + modalities.indices.to_numpy()
    order = np.argsort(code, kind="stable")
    values, starts = np.unique(code[order], return_index=True)
    for value, rows in zip(values.tolist(), np.split(order, starts[1:]), strict=False):
        yield names[value // len(kinds)], kinds[value % len(kinds)], rows
