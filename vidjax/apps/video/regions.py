"""Names of the faces in a photo, as programs for photos write them into its XMP.

These are the regions of the Metadata Working Group, as of digiKam, Picasa and Lightroom, and where
it has none the regions of Microsoft Photo. They lie in the photo, or in a sidecar beside it.

All bytes are of unknown origin. XML is read from `<rdf:RDF` on: what stands before it, such as
definitions of entities, is left out, and XML allows none behind it.
"""

import io
import itertools
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from vidjax.data.untrusted.names import clean_identity, is_unknown, show
from vidjax.utils import files
from vidjax.utils.errors import UserError

MOST_BYTES = 4 * files.MB  # of a packet of XMP
END_BYTES = 2 * files.MB  # of a photo at its begin and at its end, where XMP lies
MOST_PACKETS, MOST_TAGS, MOST_VALUES, MOST_LETTERS = 16, 500, 100, 400
BEGIN, END = b"<rdf:RDF", b"</rdf:RDF>"
PNG = b"\x89PNG"
PACKED = b"XML:com.adobe.xmp\0\1\0"  # two texts that end with a zero follow
LI = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
MWG = "{http://www.metadataworkinggroup.com/schemas/regions/}"
AREA = "{http://ns.adobe.com/xmp/sType/Area#}"
SIZE = "{http://ns.adobe.com/xap/1.0/sType/Dimensions#}"
REGION = "{http://ns.microsoft.com/photo/1.2/t/Region#}"
REGIONS = "{http://ns.microsoft.com/photo/1.2/t/RegionInfo#}"


class Tag(NamedTuple):
    """The name of a face and its box: left, top, right and bottom as parts of the picture."""

    name: str
    box: tuple[float, float, float, float]


class Tags(NamedTuple):
    """The tags of a photo.

    `shape` are width and height of the picture that the boxes are of; None if nothing tells them.
    `problem` is a line about tags that cannot be read, or "".
    """

    tags: list[Tag]
    shape: tuple[float, float] | None = None
    problem: str = ""


def sidecars(path: Path) -> list[Path]:
    """Returns the sidecars of a photo that are there: PHOTO.JPG.xmp before PHOTO.xmp."""
    names = (name + end for name in (path.name, path.stem) for end in (".xmp", ".XMP"))
    return [place for name in names if os.path.isfile(place := path.with_name(name))]


def read(path: Path) -> Tags:
    """Returns the tags of a photo, of the first of its sidecars that has any, or else its own."""
    problems: list[str] = []
    for place in (*sidecars(path), path):
        try:
            content = _content(path) if place == path else files.read_bytes(place, MOST_BYTES)
            for packet in _packets(content):
                found = parse(packet)
                problems += [f"{show(place.name)}: {found.problem}"] if found.problem else []
                if found.tags:
                    return found._replace(problem="; ".join(problems))
        except (UserError, OSError, SyntaxError, zlib.error) as error:
            reason = show(str(error).partition("\n")[0])
            problems.append(f"{show(place.name)}: its face tags cannot be read: {reason}")
    return Tags([], problem="; ".join(problems))


def _content(path: Path) -> bytes:
    with io.BufferedReader(files.open_input(path)) as file:
        begin, size = file.read(END_BYTES), file.seek(0, os.SEEK_END)
        file.seek(max(len(begin), size - END_BYTES))
        return begin + file.read(END_BYTES)


def _packets(content: bytes) -> Iterator[bytes]:
    """Yields the XML of regions in a file; UserError for one without an end."""
    if content.startswith(PNG) and (place := content.find(PACKED)) >= 0:
        start = content.find(b"\0", content.find(b"\0", place + len(PACKED)) + 1) + 1
        content = zlib.decompressobj().decompress(content[start : start + MOST_BYTES], MOST_BYTES)
    end = 0
    for _ in range(MOST_PACKETS):
        if (place := content.find(BEGIN, end)) < 0:
            return
        end = content.find(END, place, place + MOST_BYTES)
        if end < 0:
            raise UserError(f"they have no end within {MOST_BYTES:,} bytes")
        end += len(END)
        if b"Region" in content[place:end]:
            yield content[place:end]


def parse(packet: bytes) -> Tags:
    """Returns the tags of faces in a packet of XMP, without tags of other kinds or without a name.

    SyntaxError if it is no XML.
    """
    root = ElementTree.fromstring(packet)  # noqa: S314  (nothing is defined in it)
    mwg, mp = (_items(root, name) for name in (f"{MWG}RegionList", f"{REGIONS}Regions"))
    found = [*filter(None, map(_of_mwg, mwg))] or [*filter(None, map(_of_mp, mp))]
    tags, problem = list[Tag](), f"more than {MOST_TAGS:,} face tags" * (len(found) > MOST_TAGS)
    for tag in found[:MOST_TAGS]:
        try:
            name = clean_identity(tag.name)
        except UserError as error:
            problem = str(error)
            continue
        if not is_unknown(name) and len(name) <= MOST_LETTERS:
            tags.append(tag._replace(name=name))
    applied = next(map(_values, root.iter(f"{MWG}AppliedToDimensions")), {})
    width, height = (_number(applied.get(SIZE + key)) for key in "wh")
    return Tags(tags, (width, height) if width > 0 and height > 0 else None, problem)


def _items(root: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    """Yields the items of the lists of this name, one more than are read at most."""
    items = (item for one in root.iter(name) for item in one.findall(f"*/{LI}"))
    return itertools.islice(items, MOST_TAGS + 1)


def _values(item: ElementTree.Element) -> dict[str, str]:
    """Returns name -> text of what an element holds, be it spelled as attributes or elements."""
    found: dict[str, str] = {}
    for one in itertools.islice(item.iter(), MOST_VALUES):
        for key, value in (*one.attrib.items(), (one.tag, (one.text or "").strip())):
            if value:
                found.setdefault(key, value)
    return found


def _of_mwg(item: ElementTree.Element) -> Tag | None:
    values = _values(item)
    kind, unit = values.get(f"{MWG}Type", "Face"), values.get(f"{AREA}unit", "normalized")
    x, y, width, height = (_number(values.get(AREA + key)) for key in "xywh")
    if (kind, unit) != ("Face", "normalized"):
        return None
    return _tag(values.get(f"{MWG}Name"), x - width / 2, y - height / 2, width, height)


def _of_mp(item: ElementTree.Element) -> Tag | None:
    values = _values(item)
    numbers = [*map(_number, values.get(f"{REGION}Rectangle", "").split(",", 4))]
    name = values.get(f"{REGION}PersonDisplayName")
    return _tag(name, *numbers) if len(numbers) == 4 else None


def _number(text: str | None) -> float:
    try:
        return float((text or "")[:40])
    except ValueError:
        return np.nan


def _tag(name: str | None, left: float, top: float, width: float, height: float) -> Tag | None:
    """Returns a tag, None without a name or a box in the picture."""
    x, y = left + width / 2, top + height / 2
    name = (name or "").strip()
    if not (name and 0 < width <= 1 and 0 < height <= 1 and 0 <= x <= 1 and 0 <= y <= 1):
        return None
    return Tag(name, (left, top, left + width, top + height))


def match(tags: Tags, faces: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Returns the place of the face that each tag names, int [n]; -1 if it is not found.

    Boxes are of the picture as stored, by the standard. Some programs mean the one that is shown:
    this counts if `tags.shape` is like it, or if more tags have a face so.

    Args:
      tags: n of them.
      faces: boxes [N, 4] in pixels of the picture that is shown, upright.
      size: its width and height.
      orientation: of the stored picture, by EXIF, 1 to 8.
    """
    boxes = np.array([tag.box for tag in tags.tags]).reshape(-1, 4)
    scale = np.array(size * 2)
    shown, stored = (_pair(some * scale, faces) for some in (boxes, turned(boxes, orientation)))
    if orientation > 4 and tags.shape and tags.shape[0] != tags.shape[1] and size[0] != size[1]:
        is_shown = (tags.shape[0] > tags.shape[1]) == (size[0] > size[1])
    else:
        is_shown = (shown >= 0).sum() > (stored >= 0).sum()
    return shown if is_shown else stored


def turned(boxes: np.ndarray, orientation: int) -> np.ndarray:
    """Returns boxes [n, 4] of a stored picture, as parts of it, in the picture that is shown."""
    points = boxes.reshape(-1, 2, 2)
    if orientation > 4:
        points = points[..., ::-1]
    flipped = np.isin(orientation, (2, 3, 6, 7)), np.isin(orientation, (3, 4, 7, 8))
    points = np.where(flipped, 1 - points, points)
    return np.concatenate([points.min(1), points.max(1)], 1)


def _pair(boxes: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Returns for each box [n, 4] a face [N, 4] whose centre is in it; -1 for none.

    The most alike are paired first: their common part, as a part of both together.
    """
    owner, one = np.full(len(boxes), -1), boxes[:, None]
    centres = (faces[:, :2] + faces[:, 2:]) / 2
    inside = (centres >= one[..., :2]) & (centres <= one[..., 2:])
    sides = np.minimum(one[..., 2:], faces[:, 2:]) - np.maximum(one[..., :2], faces[:, :2])
    areas = [(some[..., 2:] - some[..., :2]).prod(-1) for some in (one, faces)]
    common = sides.clip(0).prod(-1)
    alike = np.where(inside.all(-1), common / (areas[0] + areas[1] - common), -1.0)
    while alike.size and alike.max() >= 0:
        box, face = np.unravel_index(alike.argmax(), alike.shape)
        owner[box] = face
        alike[box], alike[:, face] = -1, -1
    return owner
