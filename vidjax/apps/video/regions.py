"""Reads face tags, the names of faces that photo programs store in the XMP metadata of a photo.

XMP is XML in the photo, or in a sidecar file next to the photo. digiKam, Picasa and Lightroom write
tags in the format of the Metadata Working Group. If a photo has no such tags, tags in the format of
Microsoft Photo are read.

The files may be malicious. XML is read only from `<rdf:RDF` to `</rdf:RDF>`, because definitions of
entities, which may be harmful, come before `<rdf:RDF`.
"""

import io
import itertools
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from vidjax.apps.video.align import turn_boxes
from vidjax.apps.video.tracks import measure_overlaps, pair_greedily
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.names import clean_identity, is_reserved, show

MOST_BYTES = 4 * files.MB  # the largest size of the XMP
END_BYTES = 2 * files.MB  # XMP is searched only in the first and the last 2 MB of a photo
# Limits against malicious files: the pieces of XMP and the tags in a photo, the XML elements in a
# tag, and the letters in a name.
MOST_PACKETS, MOST_TAGS, MOST_VALUES, MOST_LETTERS = 16, 500, 100, 400
# The XML parser copies the address of a namespace for each element and attribute with this prefix.
MOST_ADDRESS_BYTES = 1000
LONG_PIECE = re.compile(rb"<[^<]{%d,}" % MOST_ADDRESS_BYTES)  # a long tag, and text after it
VALUE = re.compile(rb"=\s*(\"[^\"]*\"|'[^']*')")  # of an attribute
PACKET_BEGIN, PACKET_END = b"<rdf:RDF", b"</rdf:RDF>"
PNG = b"\x89PNG"
# The start of compressed XMP in a PNG. Then follow two texts, each with a zero byte at its end, and
# the XMP.
PACKED = b"XML:com.adobe.xmp\0\1\0"
# How well a tag must fit its face, see `_Reading.fits`. If the middles of tag and face are half a
# side apart, the fit is 1/3.
LEAST_FIT = 0.35
CLEARLY = 1.5  # if tags fit in one picture this much better than in another, it is the right one
SHAPE_ERROR = 0.01  # the largest error of the ratio of width and height
# If some tags have no face, the others must fit better, and a single other tag must not be much
# smaller than its face.
DOUBTFUL_FIT, SMALL_TAGS, TINY_TAGS = 0.55, 0.75, 0.4
LI = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
TWO_WAYS = "its tags fit other faces in the stored picture than in the upright picture"
MWG = "{http://www.metadataworkinggroup.com/schemas/regions/}"
AREA = "{http://ns.adobe.com/xmp/sType/Area#}"
SIZE = "{http://ns.adobe.com/xap/1.0/sType/Dimensions#}"
REGION = "{http://ns.microsoft.com/photo/1.2/t/Region#}"
REGIONS = "{http://ns.microsoft.com/photo/1.2/t/RegionInfo#}"


class Tag(NamedTuple):
    """The name of a face in a photo."""

    name: str
    # Left, top, right and bottom, as fractions of the picture's width and height.
    box: tuple[float, float, float, float]


class Tags(NamedTuple):
    """The face tags of a photo."""

    tags: list[Tag]
    # The width and height of the picture in which the boxes were drawn; None if not stored.
    shape: tuple[float, float] | None = None
    problem: str = ""  # why some tags could not be read


def list_sidecars(path: Path) -> list[Path]:
    """Returns the existing sidecar files of a photo: first PHOTO.JPG.xmp, then PHOTO.xmp."""
    names = (name + end for name in (path.name, path.stem) for end in (".xmp", ".XMP"))
    return [sidecar for name in names if os.path.isfile(sidecar := path.with_name(name))]


def read_tags(path: Path) -> Tags:
    """Reads a photo's face tags from its sidecar files, or if these have none, from the photo."""
    problems: list[str] = []
    for place in (*list_sidecars(path), path):
        try:
            content = _read_ends(path) if place == path else files.read_bytes(place, MOST_BYTES)
            if not content:
                raise UserError("the file is empty: copy it again")
            if place != path and PACKET_BEGIN not in content:
                raise UserError("the file contains no XMP metadata: copy it again")
            for packet in _find_packets(content):
                tags = parse_packet(packet)
                problems += [f"{show(place.name)}: {tags.problem}"] if tags.problem else []
                if tags.tags:
                    return tags._replace(problem="; ".join(problems))
        except (UserError, OSError, SyntaxError, zlib.error) as error:
            reason = show(str(error).partition("\n")[0])
            problems.append(f"the face tags in {show(place.name)} cannot be read: {reason}")
    return Tags([], problem="; ".join(problems))


def _read_ends(path: Path) -> bytes:
    with io.BufferedReader(files.open_input(path)) as file:
        begin, size = file.read(END_BYTES), file.seek(0, os.SEEK_END)
        file.seek(max(len(begin), size - END_BYTES))
        return begin + file.read(END_BYTES)


def _find_packets(content: bytes) -> Iterator[bytes]:
    """Yields the pieces of XMP, `<rdf:RDF` to `</rdf:RDF>`, that may contain face tags.

    Raises UserError if a piece has no end.
    """
    if content.startswith(PNG) and (place := content.find(PACKED)) >= 0:
        start = content.find(b"\0", content.find(b"\0", place + len(PACKED)) + 1) + 1
        content = zlib.decompressobj().decompress(content[start : start + MOST_BYTES], MOST_BYTES)
    end = 0
    for _ in range(MOST_PACKETS):
        if (place := content.find(PACKET_BEGIN, end)) < 0:
            return
        end = content.find(PACKET_END, place, place + MOST_BYTES)
        if end < 0:
            raise UserError(f"the XMP metadata does not end within {MOST_BYTES:,} bytes")
        end += len(PACKET_END)
        if b"Region" in content[place:end]:
            yield content[place:end]


def parse_packet(packet: bytes) -> Tags:
    """Reads the names and boxes of faces from a piece of XMP, see `_find_packets`.

    Pets, tags of other things than faces, and empty names are skipped. Raises SyntaxError if
    `packet` is not valid XML, and UserError if it would take minutes to parse.
    """
    _refuse_long_addresses(packet)
    root = ElementTree.fromstring(packet)  # noqa: S314  (the packet cannot define entities)
    mwg, mp = (_find_items(root, name) for name in (f"{MWG}RegionList", f"{REGIONS}Regions"))
    all_tags = [*filter(None, map(_read_mwg_tag, mwg))] or [*filter(None, map(_read_mp_tag, mp))]
    tags, problem = list[Tag](), f"more than {MOST_TAGS:,} face tags" * (len(all_tags) > MOST_TAGS)
    for tag in all_tags[:MOST_TAGS]:
        try:
            name = clean_identity(tag.name)
        except UserError as error:
            problem = str(error)
            continue
        if not is_reserved(name) and len(name) <= MOST_LETTERS:
            tags.append(tag._replace(name=name))
    applied = next(map(_collect_values, root.iter(f"{MWG}AppliedToDimensions")), {})
    width, height = (_parse_number(applied.get(SIZE + key)) for key in "wh")
    return Tags(tags, (width, height) if width > 0 and height > 0 else None, problem)


def _refuse_long_addresses(packet: bytes) -> None:
    """Raises UserError if the address of an XML namespace is so long that parsing takes minutes."""
    for piece in LONG_PIECE.finditer(packet):
        end = 0  # of the previous value; between values are only names
        for value in VALUE.finditer(piece[0]):
            if len(value[1]) > MOST_ADDRESS_BYTES and b"xmlns" in piece[0][end : value.start()]:
                raise UserError(f"an XMP namespace has more than {MOST_ADDRESS_BYTES:,} bytes")
            end = value.end()


def _find_items(root: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    """Yields the items of all XML lists `name` in `root`, up to one more than MOST_TAGS."""
    items = (item for element in root.iter(name) for item in element.findall(f"*/{LI}"))
    return itertools.islice(items, MOST_TAGS + 1)


def _collect_values(item: ElementTree.Element) -> dict[str, str]:
    """Returns name -> text for the attributes and inner elements of an XML element."""
    values: dict[str, str] = {}
    for element in itertools.islice(item.iter(), MOST_VALUES):
        for key, value in (*element.attrib.items(), (element.tag, (element.text or "").strip())):
            if value:
                values.setdefault(key, value)
    return values


def _read_mwg_tag(item: ElementTree.Element) -> Tag | None:
    values = _collect_values(item)
    kind, unit = values.get(f"{MWG}Type", "Face"), values.get(f"{AREA}unit", "normalized")
    x, y, width, height = (_parse_number(values.get(AREA + key)) for key in "xywh")
    if (kind, unit) != ("Face", "normalized"):
        return None
    return _make_tag(values.get(f"{MWG}Name"), x - width / 2, y - height / 2, width, height)


def _read_mp_tag(item: ElementTree.Element) -> Tag | None:
    values = _collect_values(item)
    numbers = [*map(_parse_number, values.get(f"{REGION}Rectangle", "").split(",", 4))]
    name = values.get(f"{REGION}PersonDisplayName")
    return _make_tag(name, *numbers) if len(numbers) == 4 else None


def _parse_number(text: str | None) -> float:
    try:
        return float((text or "")[:40])
    except ValueError:
        return np.nan


def _make_tag(name: str | None, left: float, top: float, width: float, height: float) -> Tag | None:
    """Returns a face tag, or None if the name is empty or the box is wrong.

    The numbers are fractions of the picture's width and height. The middle of the box must be in
    the picture.
    """
    x, y = left + width / 2, top + height / 2
    name = (name or "").strip()
    if not (name and 0 < width <= 1 and 0 < height <= 1 and 0 <= x <= 1 and 0 <= y <= 1):
        return None
    return Tag(name, (left, top, left + width, top + height))


class _Reading(NamedTuple):
    """A guess about a photo: how its n tags (named boxes) are turned, and the face at each tag."""

    faces: np.ndarray  # int [n], the index of the face at each tag, or -1 if there is no face
    # [n], how well each tag fits its face: the overlap of the face with a box of the same size in
    # the middle of the tag. Programs draw boxes of different sizes.
    fits: np.ndarray
    # [n], the side of each box divided by the side of its face; 0 without a face.
    scales: np.ndarray
    total: float  # the sum of `fits`; a tag counts less if its scale differs from the other tags
    turn: int  # the EXIF orientation that turns the tagged picture to the displayed picture

    def list_names(self, tags: Tags) -> set[tuple[int, str]]:
        """Returns (index of the face, name) for each tag whose box overlaps a face well enough."""
        good = np.flatnonzero(self.fits >= LEAST_FIT)
        return {(int(self.faces[number]), tags.tags[number].name) for number in good}


def match_faces(
    tags: Tags, faces: np.ndarray, size: tuple[int, int], orientation: int
) -> tuple[np.ndarray, str]:
    """Finds the detected face at each of n face tags.

    Returns int [n], the index of the face at each tag, or -1 if there is no face. Also returns ""
    or a text, the reason to ignore all tags, for example that the photo seems to be turned,
    mirrored or cropped after it was tagged.

    Programs draw tags in the stored picture, which may lie on its side, or in the displayed,
    upright picture. `tags.shape` and the overlap of tags and faces decide between the two.

    `faces` [N, 4] are boxes in pixels of the displayed picture, and `size` is its width and height.
    `orientation` is the EXIF orientation of the stored picture, 1 to 8.
    """
    nobody = np.full(len(tags.tags), -1)
    # The turns from the tagged to the displayed picture that programs use, 1 to 8. If the tagged
    # picture has the shape of neither the stored nor the displayed picture, there are none.
    possible = {x for x in {1, orientation} if not tags.shape or _has_shape(tags.shape, size, x)}
    if tags.shape and not possible:
        shapes = " x ".join(f"{side:g}" for side in tags.shape), " x ".join(map(str, size))
        return nobody, (
            f"its tags were made for a picture of another shape, {shapes[0]}, not {shapes[1]}"
        )
    readings = [_read(tags, faces, size, turn) for turn in sorted(possible, reverse=True)]
    best = max(readings, key=lambda reading: reading.total)
    good, names = best.fits >= LEAST_FIT, best.list_names(tags)
    for turn in range(1, 9):
        other = _read(tags, faces, size, turn)
        seen = other.list_names(tags)
        if seen <= names or (names and names <= seen):
            continue  # both agree
        if turn in possible and other.total * CLEARLY > best.total:
            return nobody, TWO_WAYS
        drawn = turn == orientation or tags.shape is None or _has_shape(tags.shape, size, turn)
        clearly = other.total > max(best.total * CLEARLY, len(tags.tags) / 2)
        if turn not in possible and drawn and clearly:
            return nobody, "its tags fit only if the photo is turned or mirrored"
    for number in np.flatnonzero(best.faces < 0):
        tag = tags.tags[number]
        lone = _read(Tags([tag]), faces, size, best.turn).list_names(Tags([tag]))
        if any(face == taken and name != tag.name for face, _ in lone for taken, name in names):
            return nobody, "two of its tags name the same face"
    if _seems_cropped(best, good, len(faces)):
        return nobody, "its tags fit its faces poorly, as if it was cropped later"
    return np.where(good, best.faces, -1), ""


def _has_shape(shape: tuple[float, float], size: tuple[int, int], turn: int) -> bool:
    """Returns whether a stored picture, turned by `turn`, has the shape of the displayed picture.

    `shape` is (width, height) of the stored picture, `size` of the displayed picture. `turn` is an
    EXIF orientation, 1 to 8. Only the ratio of width and height counts.
    """
    width, height = shape if turn < 5 else shape[::-1]
    errors = abs(size[0] - size[1] * width / height), abs(size[1] - size[0] * height / width)
    return any(
        error <= max(1, side * SHAPE_ERROR) for error, side in zip(errors, size, strict=True)
    )


def _read(tags: Tags, faces: np.ndarray, size: tuple[int, int], turn: int) -> _Reading:
    """Finds the face at each face tag (a named box). For the arguments, see `match_faces`.

    The boxes of tags are turned by the EXIF orientation `turn`, 1 to 8, and compared with `faces`.
    """
    boxes = turn_boxes(np.array([tag.box for tag in tags.tags]).reshape(-1, 4), turn)
    boxes = boxes * np.array(size * 2)
    found = _pair_boxes(boxes, faces)
    hit = np.flatnonzero(found >= 0)
    fits, scales = np.zeros((2, len(found)))
    if not len(hit):
        return _Reading(found, fits, scales, 0.0, turn)
    boxes, faces = boxes[hit], faces[found[hit]]
    sides = faces[:, 2:] - faces[:, :2]
    apart = np.abs(boxes[:, :2] + boxes[:, 2:] - faces[:, :2] - faces[:, 2:]) / 2 / sides
    shared = np.maximum(1 - apart, 0).prod(1)
    fits[hit] = shared / (2 - shared)
    scales[hit] = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1) / sides.prod(1))
    differs = np.exp(-np.abs(np.log(scales[hit]) - np.log(scales[hit]).mean()))
    return _Reading(found, fits, scales, float(fits[hit] @ differs), turn)


def _seems_cropped(reading: _Reading, good: np.ndarray, num_faces: int) -> bool:
    """Returns whether a photo seems to be cropped after a program stored its face tags.

    Boxes of tags are fractions of the uncropped picture. So in a cropped photo, boxes are smaller
    than the faces, and some tags have no face. `good` is a mask of the tags that fit a face.
    `num_faces` is the number of detected faces.
    """
    count = int(good.sum())
    if not count:
        return False
    lost, scale = len(good) - count, np.exp(np.log(reading.scales[good]).mean())
    untagged = num_faces - count
    unlike = (untagged and lost > count) or min(lost, untagged) >= max(count, 2)
    # Several tags that fit show that nothing was moved.
    poor = reading.fits[good].mean() < DOUBTFUL_FIT or (count == 1 and scale < SMALL_TAGS)
    return bool(scale < TINY_TAGS or (lost and (poor or unlike)))


def _pair_boxes(boxes: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Finds a face for each box: returns the index of the face, int [n], or -1 if there is none.

    `boxes` [n, 4] and `faces` [N, 4] are left, top, right and bottom, in the same units. The centre
    of the face must be in the box, or the centre of the box in the face. The pair with the largest
    overlap is chosen first. No face is chosen twice.
    """
    owner = np.full(len(boxes), -1)
    inside = _contain_centres(boxes, faces) | _contain_centres(faces, boxes).T
    pairs = pair_greedily(np.where(inside, measure_overlaps(boxes, faces), 0.0), least=0.0)
    owner[[*pairs.values()]] = [*pairs]
    return owner


def _contain_centres(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Returns whether boxes `outer` [M, 4] contain the centres of boxes `inner` [N, 4]: [M, N]."""
    centres, outer = (inner[:, :2] + inner[:, 2:]) / 2, outer[:, None]
    return np.all((centres >= outer[..., :2]) & (centres <= outer[..., 2:]), axis=-1)
