"""The files of a gallery as bytes: how they are written, and how they are checked when read.

A file `.numbers` is a line of JSON and the bytes of little-endian numbers. `manifest.json` names
every other file with its sha256. A stranger may have made the files: sizes are checked before
anything of that size is read, and every value after it.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax import digests, files
from vidjax.data.untrusted.names import check_name
from vidjax.gallery import blocks
from vidjax.gallery import front as front_lib
from vidjax.gallery.blocks import Block
from vidjax.gallery.buckets import DEEPEST
from vidjax.gallery.front import Front
from vidjax.models.plda import Settings
from vidjax.run import schema

NAME = "manifest.json"
FORMAT = 1
BYTES = 64 * files.MB  # of the largest manifest
MOST_PARTS, MOST_WIDTH = 64, 16_384
MOST_LETTERS = 1000  # of a name
NAME_BYTES = 32_768  # of a clip and its identity in the first line of a bucket, with escapes
FRONT_HEAD = b"[]\n"
REMEDY = "put back a copy of the gallery, or create it anew"
OTHER_SHA = "its sha256 is not that in the manifest"
OTHER_SIZE = "it has another size"
NOT_FINITE = "it holds a number that is not finite"


def _matches(pattern: str) -> schema.Kind:
    return schema.Kind(
        f"a text like {pattern}", lambda x: isinstance(x, str) and bool(re.fullmatch(pattern, x))
    )


_SHA = _matches("[0-9a-f]{64}")
_PART = schema.Object({"name": schema.TEXT, "width": schema.SIZE}, ("name", "width"))
_BUCKET_KEYS = {
    "bits": _matches(f"[01]{{0,{DEEPEST}}}"), "people": schema.COUNT, "clips": schema.SIZE,
    "sha256": _SHA,
}  # fmt: skip
SCHEMA = schema.Object(
    {
        "format": schema.SIZE,
        "version": schema.SIZE,
        "run": schema.Object(
            {"workdir": schema.TEXT, "digest": _SHA, "centred": schema.FLAG},
            ("workdir", "digest", "centred"),
        ),
        "parts": schema.Many(_PART, MOST_PARTS),
        "settings": schema.Object(
            dict.fromkeys(Settings._fields, schema.NUMBER), Settings._fields
        ),
        "front": _SHA,
        "buckets": schema.Many(schema.Object(_BUCKET_KEYS, tuple(_BUCKET_KEYS)), 1 << 19),
        "sha256": _SHA,
    },
    ("format", "version", "run", "parts", "settings", "front", "buckets", "sha256"),
)  # fmt: skip


class Origin(NamedTuple):
    """The run that makes vectors of clips.

    Attributes:
      workdir: its folder.
      digest: sha256 that tells its weights from others.
      centred: True if its vectors are centred.
    """

    workdir: str
    digest: str
    centred: bool


class Bucket(NamedTuple):
    """A file of clips.

    Attributes:
      bits: the first bits of the sha256 of its keys, see `buckets`.
      people: the number of people.
      clips: the number of clips, those of strangers included.
      sha256: of the file.
    """

    bits: str
    people: int
    clips: int
    sha256: str


class Manifest(NamedTuple):
    """The content of `manifest.json`.

    Attributes:
      version: number of changes, creation included.
      run: the run that makes vectors.
      widths: part -> D.
      settings: of the front.
      front: sha256 of the front's file.
      buckets: the files of clips, by their bits.
    """

    version: int
    run: Origin
    widths: Mapping[str, int]
    settings: Settings
    front: str
    buckets: tuple[Bucket, ...]


def to_bytes(manifest: Manifest) -> bytes:
    """Returns the content of `manifest.json`, in which the last entry is a sha256 of the others."""
    value: dict[str, Any] = {
        "format": FORMAT,
        "version": manifest.version,
        "run": manifest.run._asdict(),
        "parts": [{"name": name, "width": width} for name, width in manifest.widths.items()],
        "settings": {name: float(x) for name, x in manifest.settings._asdict().items()},
        "front": manifest.front,
        "buckets": [bucket._asdict() for bucket in manifest.buckets],
    }
    return json.dumps(value | {"sha256": digests.sha256_json(value)}).encode() + b"\n"


def parse(path: Path, content: bytes) -> Manifest:
    """Returns the manifest in some bytes.

    Args:
      path: the file, for errors.
      content: its bytes.

    Raises:
      ValueError: it is damaged, or of another version.
    """
    try:
        value = files.parse_json(content)
    except ValueError as error:
        raise damaged(path, str(error)) from error
    if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
        raise ValueError(f"'{path}' is of another version of vidjax\nuse that version for it")
    schema.check(path, value, SCHEMA, REMEDY)
    assert isinstance(value, dict)
    digest = value.pop("sha256")
    if digests.sha256_json(value) != digest:
        raise damaged(path, "its sha256 is another")
    widths = {part["name"]: part["width"] for part in value["parts"]}
    if not widths or sum(widths.values()) > MOST_WIDTH or len(widths) < len(value["parts"]):
        raise damaged(path, "its parts are none, too wide, or named twice")
    settings = Settings(**{name: float(value["settings"][name]) for name in Settings._fields})
    if not all(math.isfinite(value) for value in value["settings"].values()):
        raise damaged(path, "its settings are no numbers")
    run = Origin(**{name: value["run"][name] for name in Origin._fields})
    buckets = tuple(Bucket(*(one[name] for name in Bucket._fields)) for one in value["buckets"])
    return Manifest(value["version"], run, widths, settings, value["front"], buckets)


def damaged(path: Path, problem: str) -> ValueError:
    """Returns the error of a file that is not what vidjax wrote."""
    return ValueError(f"'{path}' is damaged: {problem}\n{REMEDY}")


def front_bytes(front: Front) -> bytes:
    """Returns the file of a front."""
    return FRONT_HEAD + front_lib.to_numbers(front).tobytes()


def read_front(path: Path, manifest: Manifest) -> Front:
    """Reads the front of a gallery.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged.
    """
    size = 8 * front_lib.num_numbers(manifest.widths)
    content = files.read_bytes(path, size + 64)
    if hashlib.sha256(content).hexdigest() != manifest.front:
        raise damaged(path, OTHER_SHA)
    if len(content) != size + len(FRONT_HEAD):
        raise damaged(path, OTHER_SIZE)
    numbers = np.frombuffer(content, "<f8", offset=len(FRONT_HEAD))
    if not np.isfinite(numbers).all():
        raise damaged(path, NOT_FINITE)
    front = front_lib.from_numbers(manifest.widths, manifest.settings, numbers)
    if any(np.any(part.space.ratio < 0) for part in front.parts):
        raise damaged(path, "a variance is below 0")
    return front


def read_block(path: Path, bucket: Bucket, widths: Mapping[str, int]) -> Block:
    """Maps a file of clips into memory and checks it.

    Args:
      path: the file.
      bucket: what the manifest says of it.
      widths: part -> D.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged.
    """
    size = blocks.num_bytes(widths, bucket.people, bucket.clips)
    content = files.map_bytes(path, size + bucket.clips * NAME_BYTES + blocks.ALIGNED)
    if hashlib.sha256(content).hexdigest() != bucket.sha256:
        raise damaged(path, OTHER_SHA)
    start = len(content) - size
    if start < 1 or start % blocks.ALIGNED or content[start - 1] != ord("\n"):
        raise damaged(path, OTHER_SIZE)
    shape = (widths, bucket.people, bucket.clips)
    coefficients, vectors = blocks.numbers_of(content, start, *shape)
    floats = (*coefficients.linear, coefficients.constant, vectors)
    if not all(np.isfinite(x).all() for x in floats):
        raise damaged(path, NOT_FINITE)
    try:
        head = files.parse_json(bytes(content[: start - 1]))
        people, clips = _people_and_clips(head, bucket)
    except ValueError as error:
        raise damaged(path, str(error)) from error
    most = np.array([len(names) for names in clips[:-1]], np.int32)
    if ((coefficients.num_clips < 0) | (coefficients.num_clips > most)).any():
        raise damaged(path, "a number of clips is another than that of the names")
    return Block.of(people, clips, vectors, coefficients)


def _people_and_clips(
    head: object, bucket: Bucket
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Returns `Block.people` and `Block.clips` of the first line of a file.

    Raises:
      ValueError: the line is no list of people with their clips.
    """
    problem = "its first line is no list of people with their clips"
    if not isinstance(head, list) or len(head) != bucket.people + 1:
        raise ValueError(problem)
    identities, groups = [], []
    for pair in head:
        identity, clips = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if not isinstance(clips, list) or not all(isinstance(name, str) for name in clips):
            raise ValueError(problem)
        if any(first >= second for first, second in itertools.pairwise(clips)):
            raise ValueError("its clips are not in order, or named twice")
        for name in clips:
            check_name(name)
        identities.append(identity)
        groups.append(tuple(clips))
    people = identities[:-1]
    if identities[-1] is not None or not all(isinstance(name, str) for name in people):
        raise ValueError(problem)
    if any(first >= second for first, second in itertools.pairwise(people)):
        raise ValueError("its people are not in order, or named twice")
    for name in people:
        check_name(name, "identity")
    if not all(groups[:-1]) or sum(map(len, groups)) != bucket.clips:
        raise ValueError("it names another number of clips")
    return tuple(people), tuple(groups)
