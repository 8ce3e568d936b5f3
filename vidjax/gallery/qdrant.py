"""Export to Qdrant, a vector database whose client writes to a folder, a server or a cloud.

A point is an enrolled clip. Its id is `point_id`, its payload the clip's name and identity. Its
vectors are those of the parts, in the coordinates of the gallery and of unit length: a dot product
is a cosine. A clip removed from the gallery stays in the database until it is deleted there, too.
A folder is readable by its user alone.
"""

import contextlib
import importlib.util
import os
import urllib.parse
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vidjax import files
from vidjax.errors import UserError
from vidjax.gallery.gallery import Gallery

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

BATCH = 256  # points of one request
KEY = "QDRANT_API_KEY"  # the variable with the key of a server
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def point_id(clip: str) -> str:
    """Returns the id of a clip's point: a UUID that its name determines."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"vidjax:{clip}"))


def export(gallery: Gallery, place: str, collection: str) -> int:
    """Copies all enrolled clips to a new collection and returns their number.

    `place` is the address of a server, `http://...`; a folder, `./...` or `/...`; or `:memory:`.
    """
    if not importlib.util.find_spec("qdrant_client"):
        raise UserError("export needs the package qdrant-client: pip install 'vidjax[qdrant]'")
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


def write(client: "QdrantClient", gallery: Gallery, collection: str) -> int:
    """Copies all enrolled clips to a new collection of an open database; see `export`."""
    from qdrant_client import models

    if client.collection_exists(collection):
        raise UserError(
            f"Qdrant has a collection '{collection}', which is not overwritten\n"
            "name another one: --collection=NAME"
        )
    distance = models.Distance.DOT
    widths = gallery.backend.widths
    client.create_collection(
        collection,
        {name: models.VectorParams(size=size, distance=distance) for name, size in widths.items()},
    )
    names = sorted(name for name, clip in gallery.clips.items() if clip.identity is not None)
    for at in range(0, len(names), BATCH):
        some = names[at : at + BATCH]
        vectors = np.stack([gallery.clips[name].vector for name in some])
        parts = gallery.backend.whiten(gallery.backend.split(vectors))
        units = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in parts]
        points = [
            models.PointStruct(
                id=point_id(name),
                vector={
                    part: z[row].tolist()
                    for part, z in zip(widths, units, strict=True)
                    if not np.isnan(z[row, 0])
                },
                payload={"clip": name, "identity": gallery.clips[name].identity},
            )
            for row, name in enumerate(some)
        ]
        client.upsert(collection, points)
    return len(names)
