"""A split as a parquet table, one row per frame."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.data.frame_fields import FRAME_FIELDS
from vidjax.data.untrusted.names import clean_name_at, show
from vidjax.data.untrusted.packing import Clip

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
            raise ValueError(
                f"{place}: features are {width[row]} wide in row {row + 1}, "
                f"{width[rows[0]]} in row {rows[0] + 1}"
            )
        given.setdefault(name, clip)
        if modality in clips.setdefault(name, {}):
            raise ValueError(f"{place}: there with and without .mp4: keep one")
        index = start[rows][:, None] + np.arange(int(width[rows[0]]))
        fields = {name: column[rows] for name, column in scalars.items()}
        clips[name][modality] = {"features": flat[index], **fields}
    for name, modalities in clips.items():
        yield Clip(name, str(path), modalities, given[name])


def _read_columns(path: Path) -> Mapping[str, Any]:
    """Returns name -> pyarrow column without nulls; clip and modality as strings."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: parquet is read by the package pyarrow, which is not installed\n"
            "install it with vidjax's extra [parquet]: pip install 'vidjax[parquet]'"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if missing := [name for name in COLUMNS if name not in names]:
            raise ValueError(f"{path}: no column {missing[0]}; it has {show(', '.join(names))}")
        table = file.read(columns=[name for name in (*COLUMNS, *OPTIONAL) if name in names])
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: damaged: {str(error).splitlines()[0][:200]}") from None
    for name, column in columns.items():
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise ValueError(f"{path}: row {row + 1}: no {name}")
        if name in ("clip", "modality") and not pyarrow.types.is_string(column.type):
            try:
                columns[name] = column.cast(pyarrow.string())
            except pyarrow.ArrowException:
                raise ValueError(f"{path}: column {name} is {column.type}, wanted text") from None
    return columns


def _flat_features(path: Path, features: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns all values of a column of lists, and [F] int, the length of each list."""
    import pyarrow
    from pyarrow import compute

    kinds = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    if not any(kind(features.type) for kind in kinds):
        raise ValueError(f"{path}: column features is {features.type}, wanted lists of numbers")
    values = features.flatten()
    if values.null_count:
        raise ValueError(f"{path}: column features: a list holds a null")
    width = compute.call_function("list_value_length", [features])
    return values.to_numpy(zero_copy_only=False), width.to_numpy(zero_copy_only=False)


def _groups(clips: Any, modalities: Any) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields clip, modality and the numbers of their rows, in ascending order."""
    clips, modalities = clips.dictionary_encode(), modalities.dictionary_encode()
    names, kinds = clips.dictionary.to_pylist(), modalities.dictionary.to_pylist()
    code = clips.indices.to_numpy().astype(np.int64) * len(kinds) + modalities.indices.to_numpy()
    order = np.argsort(code, kind="stable")
    values, starts = np.unique(code[order], return_index=True)
    for value, rows in zip(values.tolist(), np.split(order, starts[1:]), strict=False):
        yield names[value // len(kinds)], kinds[value % len(kinds)], rows
