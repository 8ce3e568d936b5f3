"""A split as a parquet table, a row a frame."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vidjax.data.untrusted.packing import Clip, clean_name
from vidjax.data.untrusted.unpickle import show

COLUMNS = ("clip", "modality", "features")
SCALARS = ("quality", "detection", "number")  # where there are any


def read_clips(path: Path) -> Iterator[Clip]:
    """Yields the clips of a table, whose rows may come in any order; the table is in memory.

    Raises:
      ValueError: pyarrow is not installed, or the table is damaged or not as it should be; names
        file and, where one is wrong, column, row or clip.
    """
    try:
        import pyarrow
        from pyarrow import compute, parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: parquet is read by the package pyarrow, which is not installed\n"
            "vidjax's extra [parquet] brings it: pip install '.[parquet]'"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        there = file.schema_arrow.names
        if missing := [name for name in COLUMNS if name not in there]:
            raise ValueError(f"{path}: no column {missing[0]}; it has {show(', '.join(there))}")
        table = file.read(columns=[name for name in (*COLUMNS, *SCALARS) if name in there])
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: damaged: {str(error).splitlines()[0][:200]}") from None
    for name, column in columns.items():
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise ValueError(f"{path}: row {row + 1}: no {name}")
        if name in ("clip", "modality") and not pyarrow.types.is_string(column.type):
            columns[name] = column = _as_text(path, name, column)
    features = columns["features"]
    kinds = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    if not any(kind(features.type) for kind in kinds):
        raise ValueError(f"{path}: column features is {features.type}, wanted lists of numbers")
    values = features.flatten()
    if values.null_count:
        raise ValueError(f"{path}: column features: a list holds a null")
    flat = values.to_numpy(zero_copy_only=False)
    width = compute.call_function("list_value_length", [features]).to_numpy(zero_copy_only=False)
    start = np.cumsum(width, dtype=np.int64) - width
    scalars = {
        name: columns[name].to_numpy(zero_copy_only=False) for name in SCALARS if name in columns
    }
    found: dict[str, dict[str, Any]] = {}
    for clip, modality, rows in _groups(columns["clip"], columns["modality"]):
        name = clean_name(clip, f"{path}:")
        where = f"{path}: clip {show(name)}, {modality}"
        odd = width[rows] != width[rows[0]]
        if odd.any():
            row = int(rows[np.argmax(odd)])
            raise ValueError(
                f"{where}: features are {width[row]} wide in row {row + 1}, "
                f"{width[rows[0]]} in row {rows[0] + 1}"
            )
        if modality in found.setdefault(name, {}):
            raise ValueError(f"{where}: there with and without .mp4")
        index = start[rows][:, None] + np.arange(width[rows[0]])
        one = {"features": flat[index], **{key: column[rows] for key, column in scalars.items()}}
        found[name][modality] = one
    for name, modalities in found.items():
        yield Clip(name, str(path), modalities)


def _as_text(path: Path, name: str, column: Any) -> Any:
    """Returns a column of names as strings, however a writer has stored them."""
    import pyarrow

    try:
        return column.cast(pyarrow.string())
    except pyarrow.ArrowException:
        raise ValueError(f"{path}: column {name} is {column.type}, wanted text") from None


def _groups(clips: Any, modalities: Any) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields clip, modality and its rows, in their order."""
    clips, modalities = clips.dictionary_encode(), modalities.dictionary_encode()
    names, kinds = clips.dictionary.to_pylist(), modalities.dictionary.to_pylist()
    code = clips.indices.to_numpy().astype(np.int64) * len(kinds) + modalities.indices.to_numpy()
    order = np.argsort(code, kind="stable")
    values, starts = np.unique(code[order], return_index=True)
    for value, rows in zip(values.tolist(), np.split(order, starts[1:]), strict=False):
        yield names[value // len(kinds)], kinds[value % len(kinds)], rows
