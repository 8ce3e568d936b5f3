"""The files of a gallery as bytes: how they are written, and how they are checked when read.

A file `.numbers` is a line of JSON and the bytes of little-endian floats. `manifest.json` names
every other file with its sha256. A stranger may have made the files: sizes are checked before
anything of that size is read, and every value after it.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax import digests, files
from vidjax.data.untrusted.names import check_name
from vidjax.gallery import front as front_lib
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
REMEDY = "put back a copy of the gallery, or create it anew"


def _matches(pattern: str) -> schema.Kind:
    return schema.Kind(
        f"a text like {pattern}", lambda x: isinstance(x, str) and bool(re.fullmatch(pattern, x))
    )


_SHA = _matches("[0-9a-f]{64}")
_PART = schema.Object({"name": schema.TEXT, "width": schema.SIZE}, ("name", "width"))
_BUCKET_KEYS = {"bits": _matches(f"[01]{{0,{DEEPEST}}}"), "clips": schema.SIZE, "sha256": _SHA}
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


class Clip(NamedTuple):
    """An enrolled clip, or one of a stranger.

    Attributes:
      identity: the person; None for a stranger.
      vector: [sum of D] float32, the parts one after another, 0 for those that it lacks.
    """

    identity: str | None
    vector: np.ndarray


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
      bits: the first bits of the sha256 of the clips' names.
      clips: their number.
      sha256: of the file.
    """

    bits: str
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


def bucket_bytes(clips: Mapping[str, Clip]) -> bytes:
    """Returns the file of some clips, in the order of their names."""
    names = sorted(clips)
    head = json.dumps([[name, clips[name].identity] for name in names]).encode()
    vectors = np.stack([clips[name].vector for name in names])
    return head + b"\n" + vectors.astype("<f4", copy=False).tobytes()


def front_bytes(front: Front) -> bytes:
    """Returns the file of a front."""
    return b"[]\n" + front_lib.to_numbers(front).tobytes()


def read_front(path: Path, manifest: Manifest) -> Front:
    """Reads the front of a gallery.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged.
    """
    size = front_lib.num_numbers(manifest.widths)
    _, numbers = _read_numbers(path, manifest.front, "<f8", size, 0)
    front = front_lib.from_numbers(manifest.widths, manifest.settings, numbers)
    if any(np.any(part.space.ratio < 0) for part in front.parts):
        raise damaged(path, "a variance is below 0")
    return front


def read_bucket(path: Path, bucket: Bucket, width: int) -> dict[str, Clip]:
    """Reads a file of clips.

    Args:
      path: the file.
      bucket: what the manifest says of it.
      width: sum of D over the parts.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged.
    """
    size = bucket.clips * width
    head, numbers = _read_numbers(path, bucket.sha256, "<f4", size, bucket.clips * NAME_BYTES)
    vectors = numbers.reshape(bucket.clips, width)
    if not isinstance(head, list) or len(head) != bucket.clips:
        raise damaged(path, "it names another number of clips")
    clips: dict[str, Clip] = {}
    for pair, vector in zip(head, vectors, strict=True):
        name, identity = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if not isinstance(name, str) or not isinstance(identity, str | None) or name in clips:
            raise damaged(path, "its first line is no list of clips")
        try:
            check_name(name)
            check_name("nobody" if identity is None else identity, "identity")
        except ValueError as error:
            raise damaged(path, str(error)) from error
        clips[name] = Clip(identity, vector)
    return clips


def _read_numbers(
    path: Path, sha256: str, dtype: str, size: int, head_bytes: int
) -> tuple[object, np.ndarray]:
    """Returns the first line and the finite numbers of a file `.numbers`."""
    num_bytes = size * np.dtype(dtype).itemsize
    content = files.read_bytes(path, num_bytes + head_bytes + 64)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise damaged(path, "its sha256 is not that in the manifest")
    end = len(content) - num_bytes
    if end < 1 or content[end - 1 : end] != b"\n":
        raise damaged(path, "it has another size")
    numbers = np.frombuffer(content, dtype, offset=end)
    if not np.isfinite(numbers).all():
        raise damaged(path, "it holds a number that is not finite")
    try:
        return files.parse_json(content[: end - 1]), numbers
    except ValueError as error:
        raise damaged(path, str(error)) from error
