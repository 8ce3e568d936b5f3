"""Searches files for names and vectors of people, for `vidjax forget`.

The names of the user's own files and folders are no traces: not the name of a film in a table, and
not the path of a photo in a JSON file. So the cell or field with a name of a person is read.
"""

import codecs
import contextlib
import gzip
import html
import io
import os
import re
import stat
import unicodedata
import urllib.parse
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from vidjax.data import parquet
from vidjax.utils import files, tables
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import is_unknown, make_file_stems, normal_form, strip_ending

MAX_BYTES = 512 * files.MB  # of a file, also after it is unpacked
# A file is searched in overlapping parts, because the search takes many times the memory of a part.
# Of files of other programs, such as photos, which begin with tags, only one part is searched.
PART_BYTES, OVERLAP_BYTES = 1 << 20, 1 << 14
JSON, SUBTITLES = (".json", ".jsonl", ".otio"), (".vtt", ".srt", ".rttm")
# Ending -> the letter between the strings or cells of a text.
BREAKS = {**dict.fromkeys(JSON, '"'), **tables.SEPARATORS, ".m3u": ","}
TEXTS = (*BREAKS, *SUBTITLES, ".html", ".txt", ".tex")
BLANKS = (".rttm", ".txt")  # files in which blanks separate names, and names contain no blanks
SQLITE = b"SQLite format 3\0"  # the first bytes of a copy of a gallery
NEAR = 0.9999  # least cosine of two vectors of the same clip
PIECE = 4  # numbers of a vector that identify the vector
MIN_LETTERS = 4  # of a clip whose name is searched in texts
# First columns of tables, and first fields of JSON objects, that no other program writes. A table
# with only the columns clip and identity may be the user's labels.
HEADERS = (
    ("clip", "identity", "probability", "score"), ("clip", "identity", "accepted", "log_ratio"),
    ("clip", "other", "accepted", "log_ratio"), ("clip", "identity", "video", "start", "end"),
    ("identity", "rank", "clip", "score"), ("identity", "clips", "clip", "score"),
    ("video", "start", "end", "identity", "probability"), ("video", "time", "correction"),
    ("format", "video", "source"), ("OTIO_SCHEMA", "name", "tracks"),
)  # fmt: skip
# Fields and columns of such files with names of films and photos, and of their clips.
FILE_FIELDS = ("video", "path", "address", "clip", "clips")
_FIELD = re.compile(rf'"(?:{"|".join(FILE_FIELDS)})":\s*+(?:"[^"]*|\[[^\[\]]*)')
# A value in JSON, and the start of the next field. `*+` never tries a shorter match: it is fast.
_VALUE = r'"\s*+:\s*+(?:"(?:[^"\\]|\\.)*+"|[^"\[{,]*+),?[\s\[{]*+"'
# How a table, a JSON file, a playlist and a page of vidjax begin.
OURS = re.compile(
    "|".join(
        rf'\ufeff?(\{{\s*")?{between.join(header)}\b'
        for header in HEADERS for between in (",", "\t", _VALUE)
    )
    + r"|#EXTM3U\n#EXTINF:\d+,.*\n#EXTVLCOPT:start-time="
    r"|\s*<!DOCTYPE html>[^\0]{,3000}<title>[^<\n]*Who appears when</title>"
)  # fmt: skip
START_LETTERS = 1 << 14  # of a file, which are compared with OURS
# The lines of subtitles and .rttm of vidjax, except for the names.
_CUES = re.compile(
    r"^(WEBVTT|\d+|[\d:.,]+ --> [\d:.,]+)$|^SPEAKER \S+ 1 [\d.]+ [\d.]+ <NA> <NA> | <NA> <NA>$",
    re.MULTILINE,
)
# A path, or the name of a film, a photo, or a clip of a film.
_FILE = re.compile(
    r"(?:file:/)?[~.]*/.|.*\.(?:3gp|avi|divx|flv|m2ts|m4v|mkv|mov|mp4|mpe?g|mts|mxf|og[mv]|ts|vob|"
    r"webm|wmv|avif|bmp|gif|hei[cf]|jfif|jp2|jpe?g?|png|ppm|tiff?|webp|[sft]\d\d+)\Z"
)
_FILM_NAME = re.compile(r'<bdi dir="ltr">[^<]*|<[^<>]*>')  # in a page of vidjax, and all tags
_PICTURE = re.compile(r"data:image/png;base64,[\w+/=]*")  # its letters are no names
# Texts in files that are not text, such as tags of photos.
_STRINGS = re.compile(rb"(?:[\t\n\r -~]|[\xc2-\xf4][\x80-\xbf]{1,3}){16,}")
_UTF16 = re.compile(r"(?:\\u[0-9a-fA-F]{4})+")  # letters in JSON
_BEGIN = re.compile(rb"[\0-/:-@[-`{-\x7f]|[\xc2-\xf4]")  # of a part: not within a letter or word
# A file that a killed process has left, and the name of the file that it would have replaced.
PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial")


class Trace(NamedTuple):
    """What a file contains about a person whom `vidjax forget` searches for."""

    about: str
    ours: bool  # True if no other program writes such a file


class Traces:
    """Searches files for names of people and clips, and for the embeddings of the clips.

    Args:
      people: names of people.
      clips: names of clips. Short names and numbers, such as `1`, are searched only in lists.
      vectors: the embeddings [D] of the clips. Each modality, such as face, may have another D.
      known: the names of all people. Vidjax writes no other texts into subtitles.
    """

    def __init__(
        self,
        people: Collection[str],
        clips: Collection[str],
        vectors: Iterable[np.ndarray],
        known: Iterable[str] = (),
    ):
        self._people, self._clips = _spell(people), _spell(list_clear_names(clips))
        self._lines = {*clips}
        self._known = {*map(_simplify, (*people, *known))}
        self._vectors = group_by_key((len(x), x) for x in vectors if x.any())
        starts = (x[np.flatnonzero(x)[0] :][:PIECE] for of in self._vectors.values() for x in of)
        self._pieces = {x.tobytes() for x in starts}
        # The letters of each name that are the same in all codes of texts.
        words = (re.findall(rb"[a-z0-9]*", x.encode()) for x in (*self._people, *self._clips))
        self._words = {max(of_name, key=len) for of_name in words}

    def in_file(self, path: Path) -> Trace | None:
        """Searches the content of `path` for the given names and embeddings; returns a trace.

        Returns None if there is none, or if `path` is a link or a folder. Raises UserError if the
        file cannot be read, and OSError if the disk fails.
        """
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        partial = PARTIAL.fullmatch(path.name)
        bare, ending = os.path.splitext(partial[1] if partial else path.name)
        ending = ending.lower()
        if ending == ".parquet":
            texts, arrays, columns = parquet.read_contents(path)
            kept = "\n".join(text for text in texts if not _FILE.match(text.lower()))
            contents = [("", kept), ("clips", "\n".join(texts)), *(("", x) for x in arrays)]
            return self._in_contents(contents, bool(OURS.match(",".join(columns))))
        if ending == ".npz":
            limit = min(MAX_BYTES, files.max_unpacked_bytes(path.stat().st_size))
            arrays = files.read_npz(path, limit)
            # The clip DAY/CLIP is searched as DAY_CLIP, too: see `make_file_stems`.
            clips = "\n".join([bare, f"{path.parent.name}_{bare}", *arrays])
            return self._in_contents([("clips", clips), *arrays.items()], ours=False)
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(io.BufferedReader(files.open_regular(path)))
            is_whole = ending in (*TEXTS, ".gz", ".safetensors") or file.peek(16)[:16] == SQLITE
            if ending == ".gz":
                bare, ending = os.path.splitext(bare)
                file = cast(BinaryIO, opened.enter_context(gzip.GzipFile(fileobj=file)))
            return self._in_stream(file, bare, ending, is_whole=is_whole)

    def _in_contents(
        self, contents: Collection[tuple[str, np.ndarray | str]], ours: bool
    ) -> Trace | None:
        """Searches texts and arrays. If the name of an array is `clips`, it has names of clips."""
        if any(self._has_vector(x) for _, x in contents if not isinstance(x, str)):
            return Trace("contains a vector", ours=True)
        for name, content in contents:
            text = _to_text(content)
            lines = text.split("\n") if content is not text else ()
            is_listed = not self._lines.isdisjoint(map(normal_form, lines))
            text, is_clips = _simplify(text), name.rpartition("/")[2] == "clips"
            is_person = not is_clips and _has_name(self._people, text)
            if is_listed or is_person or _has_name(self._clips, text):
                return Trace("contains the name", ours)
        return None

    def _in_stream(self, file: BinaryIO, bare: str, ending: str, *, is_whole: bool) -> Trace | None:
        """Searches an open file with the name `bare` and an ending, or only its first part."""
        start, found, ours, only_names = "", False, False, ending in SUBTITLES
        for content, text in read_parts(file, ending in TEXTS):
            if any(piece in content for piece in self._pieces):
                return Trace("contains a vector", ours=True)
            if not is_whole and b"\0" in content:
                lower = content.lower()
                strings = _STRINGS.findall(content) if any(x in lower for x in self._words) else ()
                text = decode(b"\n".join(strings))
            start = start or text[:START_LETTERS]
            ours = ours or (ending in TEXTS and OURS.match(start) is not None)
            text = _strip(text, ending, ours)
            if only_names:
                names = {_simplify(x) for x in text.splitlines() if x}
                only_names = {x for x in names if not is_unknown(x)} <= self._known
            text = _simplify(text)
            found = found or _has_name(self._clips, text)
            if not found and _has_name(self._people, text):
                found = _has_name(self._people, _drop_files(text, ending, start if ours else ""))
            if not is_whole or (found and not only_names):
                break
        ours = ours or only_names
        title = _simplify(bare) if ours and ending in (".m3u", ".otio") else ""
        if not found and _has_name(self._people, title):
            return Trace("is named after the person", ours)
        return Trace("contains the name", ours) if found else None

    def _has_vector(self, array: np.ndarray) -> bool:
        """Returns whether a row of a float array [..., D], or the mean of all rows, is a vector."""
        for width, vectors in self._vectors.items() if array.dtype.kind == "f" else ():
            if array.ndim == 1 or array.shape[-1:] == (width,):
                whole = array[: len(array) // width * width] if array.ndim == 1 else array
                rows = whole.reshape(-1, width).astype(np.float64)
                means = rows.mean(axis=0, keepdims=True) if len(rows) else rows
                wanted = _scale(np.array(vectors)).T
                if any((_scale(x) @ wanted > NEAR).any() for x in (rows, means)):
                    return True
        return False


def list_clear_names(clips: Iterable[str]) -> set[str]:
    """Selects the names to search for in texts; removes the ending `.mp4`.

    `clips` are names of clips. Numbers and short names, such as `a`, are left out, because they
    occur in nearly every file.
    """
    bare = map(strip_ending, clips)
    return {name for name in bare if len(name) >= MIN_LETTERS and not name.isdigit()}


def _spell(names: Iterable[str]) -> set[str]:
    """Returns names as `_simplify` writes them, also as names of files."""
    # `_simplify` takes the end of a cell, `\\"`, for a code of JSON.
    spellings = ((x, x.rstrip("\\") or x, *make_file_stems([x])) for x in names)
    return {_simplify(x) for of_name in spellings for x in of_name}


def _has_name(names: Collection[str], plain: str) -> bool:
    """Returns whether a text contains one of the `names`. All are results of `_simplify`."""
    return any(name in plain and _compile(name).search(plain) for name in names)


def _compile(name: str) -> re.Pattern[str]:
    """Returns a pattern that finds a name, but not as a part of a longer name.

    Names without words may touch other letters, and so may names in scripts without blanks or with
    particles, whose letters have the Unicode category Lo.
    """
    code = re.escape(name)
    if not re.search(r"\w", name) or "Lo" in map(unicodedata.category, name):
        return re.compile(code)
    return re.compile(rf"{code}(?! ?\w)(?<!\w{code})(?<!\w {code})")


def _drop_files(plain: str, ending: str, start: str) -> str:
    """Returns a text without the cells and strings that name files.

    `plain` is a result of `_simplify`, and `ending` the ending of the file. If vidjax wrote the
    file, `start` is its start. Otherwise, `start` is "".
    """
    if not (separator := BREAKS.get(ending)):
        return plain
    columns = start.partition("\n")[0].split(separator) if ending == ".tsv" else []
    lines = list[str]()
    for line in (_FIELD.sub("", plain) if start else plain).split("\n"):
        cells = line.split(separator)
        fields = columns if len(columns) == len(cells) else [""] * len(cells)
        pairs = zip(fields, cells, strict=True)
        kept = (x for field, x in pairs if field not in FILE_FIELDS and not _FILE.match(x))
        lines.append(separator.join(kept))
    return "\n".join(lines)


def _strip(text: str, ending: str, ours: bool) -> str:
    """Returns a text without pictures, and in files of vidjax without the names of films."""
    if ending in SUBTITLES:
        text = _CUES.sub("", text)
    if ours and ending == ".html":
        text = _FILM_NAME.sub("\n", _PICTURE.sub("", text))
    if ours and ending == ".m3u":
        return ""
    text = _PICTURE.sub("", text)
    return "\n".join([text, *text.split()]) if ending in BLANKS else text


def read_parts(file: BinaryIO, is_text: bool) -> Iterator[tuple[bytes, str]]:
    """Yields the content of a file in overlapping parts, each as bytes and as text.

    Letters that are added at the ends of a part make sure that a name is found only with the
    letters around it. If `is_text` is True, the text may be in UTF-16. Raises UserError if the file
    has more than MAX_BYTES.
    """
    rest, left, following = b"", MAX_BYTES, file.read(PART_BYTES)
    code = _find_code(following) if is_text else ""
    decoder = codecs.getincrementaldecoder(code)("replace") if code else None
    while content := following:
        following, left = file.read(PART_BYTES), left - len(content)
        if left < 0:
            raise UserError(f"it has more than {MAX_BYTES:,} bytes")
        content = rest + (decoder.decode(content).encode() if decoder else content)
        yield content, "x" * bool(rest) + decode(content) + "x" * bool(following)
        rest = content[-OVERLAP_BYTES:]
        rest = rest[found.start() :] if (found := _BEGIN.search(rest)) else rest


def _find_code(content: bytes) -> str:
    """Returns the encoding of a text in UTF-16, or "" for any other text."""
    if content.startswith(tables.BOMS):  # as Excel saves tables
        return "utf-16"
    head = content[:1000]
    if 8 * head.count(b"\0") <= len(head):
        return ""
    return "utf-16-le" if head.index(b"\0") % 2 else "utf-16-be"


def decode(content: bytes) -> str:
    """Decodes a text in UTF-8 or Windows-1252, so that names in it can be found.

    If the encoding is not clear, the result contains the text twice: as UTF-8, and as Windows-1252.
    """
    try:
        return codecs.utf_8_decode(content, "strict", False)[0]  # the last letter may be divided
    except UnicodeDecodeError:
        return content.decode(errors="replace") + "\n" + content.decode("cp1252", "replace")


def _to_text(content: np.ndarray | str) -> str:
    """Returns the text in an array of text, or of bytes, such as a list of names."""
    if isinstance(content, str):
        return content
    if content.dtype == np.uint8 and content.ndim == 1:
        return decode(content.tobytes())
    return "\n".join(map(str, content.ravel())) if content.dtype.kind in "US" else ""


def _simplify(text: str) -> str:
    """Returns a text in the form in which names are compared, in lower case.

    Escape codes of JSON, HTML and URLs are replaced by their characters, and `_` by a blank.
    """
    if "\\" in text:
        text = _UTF16.sub(
            lambda x: bytes.fromhex(x[0].replace("\\u", "")).decode("utf-16-be", "replace"), text
        )
        text = text.replace('\\"', '"').replace("\\\\", "\\")
    text = html.unescape(text) if "&" in text else text
    text = urllib.parse.unquote(text) if "%" in text else text
    for code, letter in ("_", " "), ("\u2039", "<"), ("\u203a", ">"), ('""', '"'):
        text = text.replace(code, letter)
    return normal_form(normal_form(text).casefold())


def _scale(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
