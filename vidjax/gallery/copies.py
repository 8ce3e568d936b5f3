"""Copies of a gallery's vectors in other stores, and the digest that proves them.

A row of a copy is an enrolled clip. Its vectors are those of the parts, in the coordinates of the
gallery and of unit length: a dot product is a cosine. The digest of a copy follows from ids, names,
people and vectors, whatever their order, so copies of one gallery state have one digest.
"""

import hashlib
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from vidjax import files
from vidjax.errors import UserError, need
from vidjax.gallery.gallery import Gallery

ROWS = 256  # of a block that is written or read at once
TEXTS = ("id", "clip", "identity")  # columns of a table beside the vectors


class Row(NamedTuple):
    """An enrolled clip; `vectors` are part -> [D] float32, without the parts that it lacks."""

    id: str
    clip: str
    identity: str
    vectors: Mapping[str, np.ndarray]

    def digest(self) -> bytes:
        """Returns the sha256 of the row."""
        found = hashlib.sha256()
        for text in (self.id, self.clip, self.identity):
            found.update(struct.pack("<Q", len(text.encode())) + text.encode())
        for part in sorted(self.vectors):
            vector = np.ascontiguousarray(self.vectors[part], "<f4")
            found.update(struct.pack("<QQ", len(part.encode()), len(vector)))
            found.update(part.encode() + vector.tobytes())
        return found.digest()


class Copied(NamedTuple):
    """Counts of the clips of a copy, of those written and deleted now, and the copy's digest."""

    clips: int
    written: int
    deleted: int
    digest: str


def point_id(clip: str) -> str:
    """Returns the id of a clip: a UUID that its name determines."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"vidjax:{clip}"))


def blocks(gallery: Gallery) -> Iterator[list[Row]]:
    """Yields the rows of all enrolled clips, in the order of their names."""
    backend, clips = gallery.backend, gallery.clips
    names = sorted(name for name, clip in clips.items() if clip.identity is not None)
    for at in range(0, len(names), ROWS):
        some = names[at : at + ROWS]
        parts = backend.whiten(backend.split(np.stack([clips[name].vector for name in some])))
        units = [(z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32) for z in parts]
        yield [
            Row(
                point_id(name),
                name,
                clips[name].identity or "",
                {
                    part: unit[row]
                    for part, unit in zip(backend.widths, units, strict=True)
                    if not np.isnan(unit[row, 0])
                },
            )
            for row, name in enumerate(some)
        ]


def digest_of(digests: Mapping[str, bytes]) -> str:
    """Returns the digest of a copy, as hex digits, from id -> digest of the row."""
    found = hashlib.sha256()
    for name in sorted(digests):
        found.update(digests[name])
    return found.hexdigest()


def to_parquet(gallery: Gallery, place: str) -> Copied:
    """Writes all enrolled clips to a table, which replaces the one of before, and reads it back.

    The columns are `id`, `clip`, `identity` and for each part its vectors, lists of D float32, null
    where a clip lacks the part.
    """
    need("export --parquet", "pyarrow", extra="parquet")
    path = Path(place).expanduser()
    if path.suffix != ".parquet":
        raise UserError(f"--parquet={place}: the name of a table ends in .parquet")
    files.make_folder(path.parent, "--parquet")
    with files.atomic_file(path) as file:
        expected = _write_table(gallery, file)
        file.seek(0)
        found = _read_table(file)
        if found != expected:
            raise UserError(f"--parquet={place}: reads differently than written; is the disk well?")
        os.fchmod(file.fileno(), 0o600)
    return Copied(len(expected), len(expected), 0, digest_of(expected))


def _write_table(gallery: Gallery, file: BinaryIO) -> dict[str, bytes]:
    import pyarrow
    from pyarrow import parquet

    widths = gallery.backend.widths
    if clash := {*TEXTS} & {*widths}:
        raise UserError(f"a part of the gallery is named '{min(clash)}', like a column of names")
    # Not of a fixed size: Arrow before 26 writes such lists with nulls, and cannot read them.
    kinds = dict.fromkeys(widths, pyarrow.list_(pyarrow.float32()))
    fields = [(name, pyarrow.string()) for name in TEXTS]
    schema = pyarrow.schema(fields + list(kinds.items()))
    expected = {}
    with parquet.ParquetWriter(file, schema) as writer:
        for rows in blocks(gallery):
            columns = [[getattr(row, name) for row in rows] for name in TEXTS]
            columns += [[row.vectors.get(part) for row in rows] for part in widths]
            arrays = [
                pyarrow.array(column, field.type)
                for column, field in zip(columns, schema, strict=True)
            ]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            expected |= {row.id: row.digest() for row in rows}
    return expected


def _read_table(file: BinaryIO) -> dict[str, bytes]:
    from pyarrow import parquet

    found = {}
    with parquet.ParquetFile(file) as table:
        for block in table.iter_batches(ROWS):
            texts = [block.column(name).to_pylist() for name in TEXTS]
            vectors: list[dict[str, np.ndarray]] = [{} for _ in range(block.num_rows)]
            for part in set(block.schema.names) - {*TEXTS}:
                column = block.column(part)
                held = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
                values = column.flatten().to_numpy()
                width = len(values) // max(len(held), 1)
                for row, vector in zip(held, values.reshape(len(held), width), strict=True):
                    vectors[row][part] = vector
            rows = (Row(*fields) for fields in zip(*texts, vectors, strict=True))
            found |= {row.id: row.digest() for row in rows}
    return found
