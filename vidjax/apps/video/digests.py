"""Computes the digest of what a photo shows, without its metadata.

The photo may be malicious. It is only split into its parts, and nothing is decompressed. A part
that claims a wrong length makes the photo damaged.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vidjax.utils import files

MOST_BYTES = 256 * files.MB  # of a photo that is read into memory
MOST_PARTS = 200_000  # of a photo
JPEG, PNG, RIFF, WEBP = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF", b"WEBP"
# The first bytes of the other photos: GIF, BMP, TIFF, JPEG 2000, PPM, and AVIF and HEIC.
OTHERS = re.compile(
    rb"GIF8|BM|II[*+]\0|MM\0[*+]|\0\0\0\x0cjP  |\xff\x4f\xff\x51|P[1-7fF]\s"
    rb"|....ftyp(?:avi[fs]|hei[cxms]|hev[cx]|mi[fa][f1]|msf1)",
    re.DOTALL,
)
# A JPEG marker; more bytes 255 before it only fill up the space. In compressed pixels, a byte 255
# before 0 or the number of a restart mark is no marker.
MARKER = re.compile(rb"\xff+[^\x00\xff]")
END_OF_PIXELS = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
SCAN, END, LONE = 0xDA, 0xD9, {0x01, *range(0xD0, 0xD9)}  # lone markers have no length
METADATA = {*range(0xE0, 0xF0), 0xFE}  # the segments APPn and COM
PNG_PICTURE = {b"IHDR", b"PLTE", b"tRNS", b"IDAT"}
WEBP_PICTURE = {b"VP8 ", b"VP8L", b"ALPH", b"ANMF"}


def digest_photo(path: Path) -> str | None:
    """Returns the digest of what a photo shows, a sha256, or None if the file may be a film.

    The digest of a JPEG, PNG or WebP photo is the sha256 of its compressed picture, without
    metadata, previews, and data after the picture. The digest of a damaged photo, and of a photo in
    another format, is the sha256 of the file. Raises OSError, or UserError if `path` is not a
    regular file.
    """
    with io.BufferedReader(files.open_input(path)) as file:
        begin = file.peek(16)[:16]
        is_riff = begin.startswith(RIFF) and begin[8:12] == WEBP
        if not (begin.startswith((JPEG, PNG)) or is_riff or OTHERS.match(begin)):
            return None
        if OTHERS.match(begin) or os.fstat(file.fileno()).st_size > MOST_BYTES:
            return files.sha256_file(path)
        split = _split_webp if is_riff else _split_png if begin.startswith(PNG) else _split_jpeg
        sha256 = hashlib.sha256()
        try:
            for number, part in enumerate(split(memoryview(file.read(MOST_BYTES)))):
                sha256.update(part)
                if number >= MOST_PARTS:
                    raise ValueError("there are too many parts")
        except ValueError:
            return files.sha256_file(path)
        return sha256.hexdigest()


def _split_jpeg(content: memoryview) -> Iterator[memoryview]:
    """Yields the markers, segments and compressed pixels of a JPEG photo. Metadata are empty.

    Raises ValueError if the photo is damaged.
    """
    place, scans, kind = len(JPEG), 0, 0
    while place < len(content):
        if not (mark := MARKER.match(content, place)):
            raise ValueError("there is no marker")
        place, kind = mark.end(), content[mark.end() - 1]
        if kind == END:
            break
        length = 0 if kind in LONE else int.from_bytes(_take(content, place, 2))
        segment = _take(content, place - 1, 1 + length)
        yield content[:0] if kind in METADATA else segment
        place += length
        if kind == SCAN:
            scans += 1
            following = END_OF_PIXELS.search(content, place)
            pixels = bytes(content[place : following.start() if following else None])
            place += len(pixels)
            yield memoryview(pixels.rstrip(b"\xff"))
    if not scans:
        raise ValueError("there are no pixels")


def _split_png(content: memoryview) -> Iterator[memoryview]:
    """Yields the parts of a PNG photo; of an animation, the first picture. Metadata are empty.

    Raises ValueError if the photo is damaged.
    """
    place, kind, kinds = len(PNG), b"", set[bytes]()
    while place < len(content) and kind != b"IEND":
        size, kind = int.from_bytes(_take(content, place, 4)), bytes(content[place + 4 : place + 8])
        part = _take(content, place + 8, size)
        if kind in PNG_PICTURE and kind not in kinds:  # the pixels may be in any number of parts
            kinds.add(kind)
            yield content[place + 4 : place + 8]
        yield part if kind in PNG_PICTURE else content[:0]
        place += 12 + size
    if b"IDAT" not in kinds:
        raise ValueError("there are no pixels")


def _split_webp(content: memoryview) -> Iterator[memoryview]:
    """Yields the pictures in a WebP photo. Metadata are empty.

    Raises ValueError if the photo is damaged.
    """
    place, end, has_pixels = 12, 8 + int.from_bytes(content[4:8], "little"), False
    while place < end:
        size = int.from_bytes(_take(content, place + 4, 4), "little")
        part = _take(content, place, 8 + size)
        is_picture = part[:4] in WEBP_PICTURE
        has_pixels |= is_picture
        yield part if is_picture else content[:0]
        place += 8 + size + size % 2
    if not has_pixels:
        raise ValueError("there are no pixels")


def _take(content: memoryview, start: int, count: int) -> memoryview:
    """Returns `count` bytes from the place `start` on. If there are fewer, raises ValueError."""
    if start + count > len(content):
        raise ValueError("the end is missing")
    return content[start : start + count]
