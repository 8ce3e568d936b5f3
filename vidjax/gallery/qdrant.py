"""Export to Qdrant, a vector database whose client writes to a folder, a server or a cloud.

A point is a row of `copies`: its payload has the clip's name, the identity, and the digest of the
row. An export to a collection of before writes the points that are new or differ, and deletes those
of clips that are no longer enrolled. A folder is readable by its user alone.
"""

import contextlib
import os
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vidjax import files
from vidjax.errors import UserError, need
from vidjax.gallery import copies
from vidjax.gallery.copies import Copied, Row, point_id
from vidjax.gallery.gallery import Gallery

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import PointStruct

KEY = "QDRANT_API_KEY"  # the variable with the key of a server
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def export(gallery: Gallery, place: str, collection: str) -> Copied:
    """Makes a collection equal to the enrolled clips, and proves it.

    `place` is the address of a server, `http://...`; a folder, `./...` or `/...`; or `:memory:`.
    """
    need("export", "qdrant_client", extra="qdrant")
    from qdrant_client import QdrantClient
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    address = urllib.parse.urlsplit(place) if "://" in place else None
    _check_place(place, address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions, of keys without encryption
            if address:
                client = QdrantClient(
                    url=place, api_key=os.environ.get(KEY), check_compatibility=False
                )
            elif place == ":memory:":
                client = QdrantClient(":memory:")
            else:
                files.make_private(Path(place).expanduser().absolute())
                client = QdrantClient(path=str(Path(place).expanduser()))
        with contextlib.closing(client):
            return write(client, gallery, collection)
    except (ResponseHandlingException, UnexpectedResponse, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"Qdrant at '{place}': {reason}") from error


def _check_place(place: str, address: urllib.parse.SplitResult | None) -> None:
    """Refuses a place that may be address or folder; warns if the key is sent unencrypted."""
    if address is None:
        if place != ":memory:" and not place.startswith(("/", "./", "../", "~")):
            raise UserError(
                f"--qdrant={place}: an address begins with http:// or https://, a folder with ./ "
                f"or /\nwrite --qdrant=http://{place} or --qdrant=./{place}"
            )
    elif address.scheme not in ("http", "https"):
        raise UserError(f"--qdrant={place}: an address begins with http:// or https://")
    elif address.scheme == "http" and KEY in os.environ and address.hostname not in LOOPBACK:
        warnings.warn(
            f"{KEY} goes to {address.netloc} without encryption, as do the vectors: use https://",
            stacklevel=2,
        )


def write(client: "QdrantClient", gallery: Gallery, collection: str) -> Copied:
    """Makes a collection of an open database equal to the enrolled clips; see `export`.

    Which points are written follows from the digests in their payloads. Then all points are read.
    Where one is not what its payload says, as after a change by hand, it is written, too.
    """
    _make_collection(client, gallery, collection)
    held = {
        point.id: bytes.fromhex(payload.get("digest", ""))
        for point, payload in _points(client, collection)
    }
    written = deleted = 0
    for _ in range(2):
        expected, changed, gone = _update(client, gallery, collection, held)
        written, deleted = written + changed, deleted + gone
        held = _read(client, collection)
        if held == expected:
            return Copied(len(expected), written, deleted, copies.digest_of(expected))
    raise UserError(
        f"Qdrant's collection '{collection}' differs from the gallery after it was written\n"
        "does another program write to it? end that, and export again"
    )


def _update(
    client: "QdrantClient", gallery: Gallery, collection: str, held: Mapping[str, bytes]
) -> tuple[dict[str, bytes], int, int]:
    """Writes rows whose digest is not held, deletes points without a row.

    Returns id -> digest of all rows, and the numbers of points written and deleted.
    """
    from qdrant_client import models

    expected, written = {}, 0
    for rows in copies.blocks(gallery):
        digests = {row.id: row.digest() for row in rows}
        expected |= digests
        changed = [row for row in rows if held.get(row.id) != digests[row.id]]
        if changed:
            client.upsert(collection, [_to_point(row, digests[row.id]) for row in changed])
        written += len(changed)
    gone = sorted({*held} - {*expected})
    for at in range(0, len(gone), copies.ROWS):
        client.delete(collection, models.PointIdsList(points=[*gone[at : at + copies.ROWS]]))
    return expected, written, len(gone)


def _make_collection(client: "QdrantClient", gallery: Gallery, collection: str) -> None:
    """Creates a collection, or checks that its vectors are those of the gallery's parts."""
    from qdrant_client import models

    widths, distance = gallery.backend.widths, models.Distance.DOT
    if not client.collection_exists(collection):
        client.create_collection(
            collection,
            {n: models.VectorParams(size=size, distance=distance) for n, size in widths.items()},
        )
        return
    vectors = client.get_collection(collection).config.params.vectors
    held = vectors if isinstance(vectors, dict) else {}
    if {name: (x.size, x.distance) for name, x in held.items()} != {
        name: (size, distance) for name, size in widths.items()
    }:
        raise UserError(
            f"Qdrant's collection '{collection}' has other vectors than the gallery, and stays as "
            "it is\nname another one: --collection=NAME"
        )


def _to_point(row: Row, digest: bytes) -> "PointStruct":
    from qdrant_client import models

    vectors = {part: x.tolist() for part, x in row.vectors.items()}
    payload = {"clip": row.clip, "identity": row.identity, "digest": digest.hex()}
    return models.PointStruct(id=row.id, vector=vectors, payload=payload)


def _read(client: "QdrantClient", collection: str) -> dict[str, bytes]:
    """Returns id -> digest of every point, computed from what the collection holds."""
    found = {}
    for point, payload in _points(client, collection, vectors=True):
        vectors = {part: np.asarray(x, np.float32) for part, x in point.vector.items()}
        found[point.id] = Row(point.id, payload["clip"], payload["identity"], vectors).digest()
    return found


def _points(
    client: "QdrantClient", collection: str, *, vectors: bool = False
) -> "Iterator[tuple[Any, dict[str, Any]]]":
    """Yields (point, payload) of a collection; refuses points that vidjax did not write."""
    place = None
    while True:
        some, place = client.scroll(
            collection, limit=copies.ROWS, offset=place, with_vectors=vectors, with_payload=True
        )
        for point in some:
            payload = point.payload or {}
            if point.id != point_id(str(payload.get("clip"))):
                raise UserError(
                    f"Qdrant's collection '{collection}' has points that vidjax did not write, and "
                    "stays as it is\nname another one: --collection=NAME"
                )
            yield point, payload
        if place is None:
            return
