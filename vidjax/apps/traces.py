"""Searches the files that vidjax writes for names and vectors of people, for `vidjax forget`."""

import contextlib
import gzip
import html
import itertools
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from vidjax.data import parquet
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import is_unknown, make_file_stems, normal_form

MAX_BYTES = 512 * files.MB  # of a file, also after it is unpacked
TEXTS = (
    ".tsv", ".csv", ".json", ".jsonl", ".rttm", ".vtt", ".srt", ".edl", ".html", ".txt", ".tex",
)  # fmt: skip
BLANKS = (".rttm", ".txt")  # files in which blanks separate names, and names contain no blanks
SQLITE = b"SQLite format 3\0"  # the first bytes of a copy of a gallery
NEAR = 0.9999  # least cosine of two vectors of the same clip
PIECE = 4  # numbers of a vector that identify the vector
# A text is searched in overlapping parts, because the search takes 30 times the memory of a part.
PART_LETTERS, OVERLAP_LETTERS = 1 << 20, 1 << 14
_UTF16 = re.compile(r"(?:\\u[0-9a-fA-F]{4})+")  # letters in JSON
_NO_WORD = re.compile(r"\W")
_RATE = re.compile(r" [\d.]+ fps\b")  # `cuts` adds it to the name of a person
_LONGER = re.compile(r"\w ?\Z"), re.compile(r" ?\w")  # before and after a part of a longer name


# First columns of tables, and first fields of JSON lines, that no other program writes. A table
# with only the columns clip and identity may be the user's labels.
HEADERS = (
    ("clip", "identity", "probability", "score"), ("clip", "identity", "accepted", "log_ratio"),
    ("clip", "other", "accepted", "log_ratio"), ("clip", "identity", "video", "start", "end"),
    ("identity", "rank", "clip", "score"), ("video", "start", "end", "identity", "probability"),
    ("video", "start", "end", "clip", "correction"),
)  # fmt: skip
# Lines of a file, of which the last group is a name. The other lines match without this group.
LINES = {
    ".rttm": r"SPEAKER \S+ 1 \d+\.\d{3} \d+\.\d{3} <NA> <NA> (\S+) <NA> <NA>",
    ".vtt": r"|WEBVTT|\d\d:\d\d:[\d.]+ --> \d\d:\d\d:[\d.]+|(.+)",
    ".srt": r"|\d+|\d\d:\d\d:[\d,]+ --> \d\d:\d\d:[\d,]+|(.+)",
}
STARTS = {  # how a file of vidjax begins
    ".edl": r"TITLE: .+ [\d.]+ fps\nFCM: NON-DROP FRAME\n\n001  AX       AA/V  C        ",
    ".html": r'\s*<!DOCTYPE html>\s*<html[^>]*>\s*<head>\s*<meta charset="utf-8">'
    r"[\s\S]{,2000}(<title>.*Who appears when</title>|"
    r'img-src data:">\s*<link rel="icon" href="data:,">)',
}

Found = Literal["nothing", "ours", "other"]  # "other": perhaps another program wrote the file


class Content(NamedTuple):
    """The content of a file in which names and vectors are searched."""

    texts: Sequence[str] = ()
    arrays: Sequence[np.ndarray] = ()
    raw: bytes = b""
    header: Sequence[str] = ()  # the names of columns or fields
    ending: str = ""  # of a file of text


class Traces:
    """Names and vectors that are searched in files."""

    def __init__(
        self, names: Iterable[str], vectors: Iterable[np.ndarray], known: Iterable[str] = ()
    ):
        """`names` are people and clips. `vectors` [D] are of their clips, in any modality.

        `known` are names of all people. Subtitles with only such names are results of vidjax.
        """
        self._known = set(map(_simplify, known))
        # First word of names -> (place of the word in a name, length of the name) -> the names. For
        # example, "ada" -> (0, 12) -> {"ada lovelace"}.
        self._names: dict[str, dict[tuple[int, int], set[str]]] = {}
        for name in names:
            for spelling in (name, *make_file_stems([name])):
                plain = _simplify(spelling)
                word = re.search(r"\w+", plain)
                key, at = (word[0], word.start()) if word else (plain, 0)
                self._names.setdefault(key, {}).setdefault((at, len(plain)), set()).add(plain)
        self._vectors = group_by_key((len(x), x) for x in vectors if x.any())

    def in_file(self, path: Path) -> Found:
        """Searches any name or vector in the name and the content of a file.

        Returns "ours" for a file with a vector, or if only vidjax writes such files with names.
        Returns "nothing" for files of kinds that vidjax does not write. Raises UserError if the
        file cannot be read, and OSError if the disk fails.
        """
        content = read(path)
        if content is None:
            return "nothing"
        pieces = (x[np.flatnonzero(x)[0] :][:PIECE] for of in self._vectors.values() for x in of)
        if any(x.tobytes() in content.raw for x in pieces):
            return "ours"
        if any(self._in_array(x) for x in content.arrays if x.dtype.kind == "f"):
            return "ours"
        # The clip DAY/CLIP is searched as DAY_CLIP, too: see `make_file_stems`.
        texts = (stem := path.name.partition(".")[0], f"{path.parent.name}_{stem}", *content.texts)
        others = (x for x in content.arrays if x.dtype.kind != "f")
        if any(map(self._in_text, texts)) or any(map(self._in_array, others)):
            return "ours" if self._is_ours(content) else "other"
        return "nothing"

    def _is_ours(self, content: Content) -> bool:
        """Returns whether only vidjax writes files with this header or text."""
        if any(tuple(content.header[: len(header)]) == header for header in HEADERS):
            return True
        text = content.texts[0] if content.texts else ""
        if line := LINES.get(content.ending):
            matches = [re.fullmatch(line, x) for x in text.splitlines()]
            return all(x and (x[1] is None or self._is_person(x[1])) for x in matches)
        start = STARTS.get(content.ending)
        return start is not None and re.match(start, text) is not None

    def _is_person(self, name: str) -> bool:
        return (plain := _simplify(name)) in self._known or is_unknown(plain)

    def _in_text(self, text: str) -> bool:
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
        return any(key in plain for key in self._names if not re.match(r"\w", key))

    def _in_array(self, array: np.ndarray) -> bool:
        """Returns whether a vector is a row of `array` [..., D], or the mean of its rows."""
        if array.dtype.kind in "US":
            return self._in_text("\n".join(map(str, array.ravel())))
        if array.dtype == np.uint8 and array.ndim == 1:
            return self._in_text(_decode(array.tobytes()))
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


def read(path: Path) -> Content | None:
    """Reads a file that vidjax may have written. Returns None for other kinds of files."""
    kinds = [kind.lower() for kind in path.suffixes]
    with files.open_regular(path) as file:
        is_sqlite = file.read(len(SQLITE)) == SQLITE
    if kinds[-1:] == [".parquet"]:
        texts, arrays, header = parquet.read_contents(path)
        return Content(texts, arrays, header=header)
    if kinds[-1:] == [".npz"]:
        arrays = files.read_npz(path, MAX_BYTES)
        return Content(["\n".join(arrays)], [*arrays.values()])
    if is_sqlite or kinds[-1:] == [".safetensors"]:
        raw = files.read_bytes(path, MAX_BYTES)
        return Content([_decode(raw)], raw=raw)
    if kinds[-1:] == [".gz"]:
        with files.open_regular(path) as file, gzip.GzipFile(fileobj=file) as unpacked:
            text = _decode(unpacked.read(MAX_BYTES))
            if unpacked.read(1):
                raise UserError(f"'{path}' unpacks to more than {MAX_BYTES:,} bytes")
        return _make_content(text, kinds[-2] if kinds[1:] else "")
    if kinds[-1:] and kinds[-1] in TEXTS:
        return _make_content(_decode(files.read_bytes(path, MAX_BYTES)), kinds[-1])
    return None


def _make_content(text: str, ending: str) -> Content:
    first, header = text.removeprefix("\ufeff").partition("\n")[0].rstrip("\r"), list[str]()
    if ending in (".tsv", ".csv"):
        header = first.split("\t" if ending == ".tsv" else ",")
    elif ending == ".jsonl":
        with contextlib.suppress(UserError):
            header = list(row) if isinstance(row := files.parse_json(first), dict) else []
    texts = ["\n".join(text.split())] if ending in BLANKS else []
    return Content([text, *texts], header=header, ending=ending)


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


def _decode(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):  # as Excel saves tables
        return content.decode("utf-16", "replace")
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode(errors="replace") + "\n" + content.decode("cp1252", "replace")


def _simplify(text: str) -> str:
    """Returns a text without the codes of JSON, HTML, URLs, tables and file names."""
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
