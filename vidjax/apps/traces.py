"""Searches files for names and vectors of people, for `vidjax forget`."""

import gzip
import html
import itertools
import os
import re
import stat
import unicodedata
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vidjax.data import parquet
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import make_file_stems, normal_form

MAX_BYTES = 512 * files.MB  # of a file, also after it is unpacked
TEXTS = (
    ".tsv", ".csv", ".json", ".jsonl", ".rttm", ".vtt", ".srt", ".otio", ".m3u", ".edl", ".html",
    ".txt", ".tex",
)  # fmt: skip
BLANKS = (".rttm", ".txt")  # files in which blanks separate names, and names contain no blanks
SQLITE = b"SQLite format 3\0"  # the first bytes of a copy of a gallery
NEAR = 0.9999  # least cosine of two vectors of the same clip
PIECE = 4  # numbers of a vector that identify the vector
# A text is searched in overlapping parts, because the search takes 30 times the memory of a part.
PART_LETTERS, OVERLAP_LETTERS = 1 << 20, 1 << 14
HEAD_BYTES = 1 << 20  # are read of files of other programs, such as photos, which begin with tags
# Texts in files that are not text, such as tags of photos.
_STRINGS = re.compile(rb"(?:[\t\n\r -~]|[\xc2-\xf4][\x80-\xbf]{1,3}){16,}")
_UTF16 = re.compile(r"(?:\\u[0-9a-fA-F]{4})+")  # letters in JSON
_NO_WORD = re.compile(r"\W")
_PICTURE = re.compile(r"data:image/png;base64,[\w+/=]*")  # its letters are no names
_RATE = re.compile(r" [\d.]+ fps\b")  # `cuts` adds it to the name of a person
_LONGER = re.compile(r"\w ?\Z"), re.compile(r" ?\w")  # before and after a part of a longer name


# First columns of tables, and first fields of JSON lines, that no other program writes. A table
# with only the columns clip and identity may be the user's labels.
HEADERS = (
    ("clip", "identity", "probability", "score"), ("clip", "identity", "accepted", "log_ratio"),
    ("clip", "other", "accepted", "log_ratio"), ("clip", "identity", "video", "start", "end"),
    ("identity", "rank", "clip", "score"), ("video", "start", "end", "identity", "probability"),
    ("video", "time", "correction"),
)  # fmt: skip
# How a table in CSV, TSV or JSON lines with such columns begins.
OURS = re.compile(
    "|".join(
        rf'\ufeff?(\{{")?{between.join(header)}\b'
        for header in HEADERS for between in (",", "\t", r'": [^\n]*?, "')
    )
)  # fmt: skip
# A file that a killed process has left, and the name of the file that it would have replaced.
PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial")


class Trace(NamedTuple):
    """What a file contains about a person whom `vidjax forget` searches for."""

    about: str
    ours: bool  # True if no other program writes such a file


class Content(NamedTuple):
    """The content of a file: the texts and arrays in which names and vectors are searched."""

    texts: Sequence[str] = ()
    arrays: Sequence[np.ndarray] = ()
    raw: bytes = b""
    head: bytes = b""  # the first bytes of a file of another kind


class Traces:
    """Searches files for names of people and for the embeddings of their clips."""

    def __init__(
        self, names: Iterable[str], vectors: Iterable[np.ndarray], lines: Iterable[str] = ()
    ):
        """Sets the names and embeddings to search.

        `names` are the names of people and clips. `vectors` are the embeddings [D] of the clips.
        Each modality, such as face, may have another length D. `lines` are names that may be short,
        such as `1`. They are found only as whole lines of text that a file stores as uint8 arrays.
        """
        self._lines = {*lines}
        # First word of names -> (place of the word in a name, length of the name) -> the names. For
        # example, "ada" -> (0, 12) -> {"ada lovelace"}.
        self._names: dict[str, dict[tuple[int, int], set[str]]] = {}
        # Names without words, and names in scripts without blanks or with particles, whose letters
        # have the Unicode category Lo. They may touch other letters.
        self._parts = set[str]()
        self._pieces = set[bytes]()  # letters of each name that are the same in all codes of texts
        for name in names:
            self._pieces.add(max(re.findall(rb"[a-z0-9]*", name.lower().encode()), key=len))
            # `_simplify` takes the end of a cell, `\\"`, for a code of JSON.
            spellings = (name, name.rstrip("\\") or name, *make_file_stems([name]))
            for plain in map(_simplify, spellings):
                word = re.search(r"\w+", plain)
                if word and "Lo" not in map(unicodedata.category, plain):
                    key = (word.start(), len(plain))
                    self._names.setdefault(word[0], {}).setdefault(key, set()).add(plain)
                else:
                    self._parts.add(plain)
        self._vectors = group_by_key((len(x), x) for x in vectors if x.any())

    def in_file(self, path: Path) -> Trace | None:
        """Searches the content and the file name of `path` for the given names and embeddings.

        If `path` is a folder, only the name of the folder is searched. Returns the first trace, or
        None. Raises UserError if the file cannot be read, and OSError if the disk fails.
        """
        name = path.name
        if partial := PARTIAL.fullmatch(name):
            name = partial[1]
        content = read(path, name) if stat.S_ISREG(os.lstat(path).st_mode) else Content()
        pieces = (x[np.flatnonzero(x)[0] :][:PIECE] for of in self._vectors.values() for x in of)
        floats = (x for x in content.arrays if x.dtype.kind == "f")
        if any(x.tobytes() in content.raw for x in pieces) or any(map(self._in_array, floats)):
            return Trace("contains a vector", ours=True)
        ours = any(map(OURS.match, content.texts[:1]))
        others = (x for x in content.arrays if x.dtype.kind != "f")
        # The clip DAY/CLIP is searched as DAY_CLIP, too: see `make_file_stems`.
        if any(map(self.in_text, (name, f"{path.parent.name}_{name}"))):
            return Trace("has the name in its file name", ours)
        texts = itertools.chain(content.texts, self._list_strings(content.head))
        if any(map(self.in_text, texts)) or any(map(self._in_array, others)):
            return Trace("contains the name", ours)
        return None

    def _list_strings(self, head: bytes) -> Iterator[str]:
        """Yields the text in `head`, the first bytes of a file, if it may contain a name."""
        if any(piece in head.lower() for piece in self._pieces):
            is_text = b"\0" not in head
            yield decode(head) if is_text else decode(b"\n".join(_STRINGS.findall(head)))

    def in_text(self, text: str) -> bool:
        """Returns whether a text contains one of the searched names.

        "Ada" as a part of the longer name "Ada Lovelace" does not count.
        """
        return any(map(self._in_part, _divide(text)))

    def _in_part(self, text: str) -> bool:
        plain = _simplify(text)
        for word in self._names.keys() & {*re.findall(r"\w+", plain)}:
            places = (found.start() for found in re.finditer(rf"\b{word}\b", plain))
            for place, ((at, length), names) in itertools.product(
                places, self._names[word].items()
            ):
                begin, end = place - at, place - at + length
                if begin >= 0 and plain[begin:end] in names:
                    around = plain[max(begin - 2, 0) : begin], plain[end : end + 2]
                    if not (_LONGER[0].search(around[0]) or _LONGER[1].match(around[1])):
                        return True
        return any(part in plain for part in self._parts)

    def _in_array(self, array: np.ndarray) -> bool:
        """Returns whether an array contains a name or an embedding.

        An array of text is searched for names. In a float array [..., D], each row is compared with
        the embeddings, and so is the mean of all rows.
        """
        if array.dtype.kind in "US":
            return self.in_text("\n".join(map(str, array.ravel())))
        if array.dtype == np.uint8 and array.ndim == 1:  # a text, such as a list of names
            text = decode(array.tobytes())
            lines = {*map(normal_form, text.split("\n"))}
            return bool(self._lines & lines) or self.in_text(text)
        if array.dtype.kind != "f":
            return False
        for width, vectors in self._vectors.items():
            if array.ndim == 1 or array.shape[-1:] == (width,):
                whole = array[: len(array) // width * width] if array.ndim == 1 else array
                rows = whole.reshape(-1, width).astype(np.float64)
                means = rows.mean(axis=0, keepdims=True) if len(rows) else rows
                wanted = _scale(np.array(vectors)).T
                if any((_scale(x) @ wanted > NEAR).any() for x in (rows, means)):
                    return True
        return False


def read(path: Path, name: str) -> Content:
    """Reads the content of a file. The ending of `name` decides how it is read.

    If `path` has a temporary name, `name` is the final name of the file.
    """
    bare, ending = os.path.splitext(name.lower())
    with files.open_regular(path) as file:
        head = file.read(HEAD_BYTES)
    if ending == ".parquet":
        texts, arrays, columns = parquet.read_contents(path)
        return Content([",".join(columns), *texts], arrays)
    if ending == ".npz":
        limit = min(MAX_BYTES, files.max_unpacked_bytes(path.stat().st_size))
        arrays = files.read_npz(path, limit)
        return Content(["\n".join(arrays)], [*arrays.values()])
    if head.startswith(SQLITE) or ending == ".safetensors":
        raw = files.read_bytes(path, MAX_BYTES)
        return Content([decode(raw)], raw=raw)
    if ending == ".gz":
        with files.open_regular(path) as file, gzip.GzipFile(fileobj=file) as unpacked:
            text = decode(unpacked.read(MAX_BYTES))
            if unpacked.read(1):
                raise UserError(f"'{path}' unpacks to more than {MAX_BYTES:,} bytes")
        return Content(_list_texts(text, os.path.splitext(bare)[1]))
    if ending in TEXTS:
        text = _PICTURE.sub("", decode(files.read_bytes(path, MAX_BYTES)))
        return Content(_list_texts(text, ending))
    return Content(head=head)


def _list_texts(text: str, ending: str) -> list[str]:
    return [text, "\n".join(text.split())] if ending in BLANKS else [text]


def _divide(text: str) -> Iterator[str]:
    """Yields overlapping parts of a text. No part begins or ends within a word of usual length."""

    def find_end(at: int) -> int:
        end = min(at + OVERLAP_LETTERS // 2, len(text))
        return found.start() if (found := _NO_WORD.search(text, at, end)) else end

    begin = end = 0
    while end < len(text):
        end = find_end(begin + PART_LETTERS)
        yield text[begin:end]
        begin = find_end(end - OVERLAP_LETTERS)


def decode(content: bytes) -> str:
    """Decodes a text in UTF-8, UTF-16 or Windows-1252, so that names in it can be found.

    If the encoding is not clear, the result contains the text twice: as UTF-8, and as Windows-1252.
    """
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):  # as Excel saves tables
        return content.decode("utf-16", "replace")
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode(errors="replace") + "\n" + content.decode("cp1252", "replace")


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
    text = text.translate({ord("_"): " ", ord("\u2039"): "<", ord("\u203a"): ">"})
    text = _RATE.sub("", text.replace('""', '"'))
    return normal_form(normal_form(text).casefold())


def _scale(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
