"""Finds people and clips in all galleries and files, for `vidjax forget`.

With --delete, the found clips are deleted from galleries, and the people from folders with results
of `vidjax who`. A converted dataset in the cache is deleted as a whole if it contains one of the
clips. Unfinished files of killed processes are deleted if they may contain one of the clips.
Training runs and other files are only listed.

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
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar, cast

import numpy as np

from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import GALLERY_FILE, JOURNAL_FILE
from vidjax.apps.video import actions, log, media
from vidjax.apps.video.media import PEOPLE
from vidjax.data import parquet, store
from vidjax.utils import files, messages, names as names_lib, tables
from vidjax.utils.errors import UserError, closest
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import is_unknown, make_file_stems, normal_form, show, strip_ending

PEOPLE_BYTES = 512 * files.MB  # limit for the list of people of a run
DELETE, DELETED = "--delete", "deleted"
DELETE_FILE = "delete it"  # the remedy for a file that vidjax wrote
WAIT = "another program writes it: run the command again"
LOOK = "look at it, and delete it or the name in it"  # for files of other programs, too
REMOVE = "look at them; to delete one: vidjax gallery remove GALLERY --clip=NAME"
REPAIR = "repair this, then run the command again"
# A folder of the cache that a killed process has left. The list of its clips is written last.
UNFINISHED = re.compile(r"[0-9a-f]{20}\.[0-9a-f]{8}\.partial")
# Kind of a folder that is listed instead of its files -> the remedy in `Place`.
REMEDIES = {
    "records": DELETE,
    "export": "delete it; export again when its source lacks the clips",
    "run": "its weights depend on the clips: delete it; train without them",
    "who": "delete the photos, tags and films of these people, and run "
    "`vidjax who --forget-missing --prune`",
}
# The files in a folder with results of `vidjax who`. Other files there are files of the user.
RESULTS = re.compile(
    r"(names|unknown|unmatched)\.(tsv|jsonl|html)|said\.jsonl|"
    r"(features|people)/.+\.(npz|json|png)|subtitles/.+\.(vtt|srt)|cuts/.+\.(otio|m3u)"
)
# Table of results -> its column with names of people.
NAME_COLUMNS = {"names.tsv": "identity", "unmatched.tsv": "correction"}

# ---- what a file is searched for

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

T = TypeVar("T")


class Place(NamedTuple):
    """A folder or file that contains a searched name or vector, or could not be searched."""

    # `gallery`, `records` (a converted dataset), `run`, `export`, `who` (results of `vidjax who`),
    # `file` (any other file), or `unread` if the place could not be searched.
    kind: str
    path: Path
    about: str  # the reason
    # How the user can delete the content, such as `--delete`. If vidjax has deleted it, the text
    # starts with `deleted`.
    remedy: str

    @property
    def left(self) -> bool:
        """True if the place still contains a searched name or vector."""
        return self.kind != "unread" and not self.remedy.startswith(DELETED)


class Trace(NamedTuple):
    """What a file contains about a person whom `vidjax forget` searches for."""

    about: str
    ours: bool  # True if no other program writes such a file


def forget(
    identities: Collection[str],
    clips: Collection[str],
    places: Iterable[Path],
    *,
    delete: bool = False,
) -> tuple[list[Place], dict[str, str]]:
    """Searches for people and clips in all galleries, datasets and files below `places`.

    `identities` are names of people. The clips of these people are searched for, too. `clips` are
    names of other clips. If `delete` is True, the clips are deleted from galleries, and the people
    from results of `vidjax who`. Converted datasets and unfinished files that contain any of the
    clips are deleted, too.

    Returns two values. The first is the list of places that contain a name or vector, or could not
    be searched. The second is searched name -> similar stored name, such as `Ada` -> `ada`.

    Raises UserError if a folder does not exist, or a name is empty or invalid.
    """
    people = {normal_form(names_lib.check_name(name, "identity")) for name in identities}
    asked = {normal_form(names_lib.clean_name(name)) for name in clips}
    search = _Search(people, asked, places, delete=delete)
    search.in_galleries()
    search.in_folders()
    search.in_files()
    wanted, found = people | asked, [*dict.fromkeys(search.found)]
    return found, _find_similar(wanted, search.known - wanted, closely=not found)


def list_left(out: Path, person: str) -> list[Path]:
    """Returns the files in the folder `out` and in the cache that contain the name of a person."""
    return [x.path for x in forget([person], (), list_roots([out]))[0] if x.left]


class _Search:
    """Searches galleries and files, and adds reports to `found`. Deletes what it can, if asked.

    `known` are all names of people and clips in galleries and runs.
    """

    def __init__(self, people: set[str], clips: set[str], places: Iterable[Path], *, delete: bool):
        self._people, self._clips, self._delete = people, clips, delete
        self.found, self.known, self._kinds = list[Place](), set[str](), dict[Path, str]()
        # Folder that is listed instead of its files -> its files. Other files have the key None.
        self._files = group_by_key((self._find_whole(x), x) for x in self._survey(places))
        self._own = dict[Gallery, dict[str, set[bytes]]]()
        for folder, kind in self._kinds.items():
            if kind == "gallery" and (gallery := self._read(folder, Gallery)):
                self._own[gallery] = _list_clips(gallery, people, clips)
                self.known |= {*gallery.index.names, *map(normal_form, gallery.clips)}
            if kind == "run":
                self.known |= self._read(folder, _read_people) or set()
        # In results of `vidjax who`, clips have names of films: only their vectors are searched.
        self._free = [x for x in self._own if self._kinds.get(x.folder.parent) != "who"]
        of_free = {strip_ending(normal_form(name)) for x in self._free for name in self._own[x]}
        self._names = clips | of_free
        self._vectors = {x for own in self._own.values() for of in own.values() for x in of}
        arrays = [np.frombuffer(vector, np.float32) for vector in self._vectors]
        self._traces = Traces(people, self._names, arrays, self.known)

    def in_galleries(self) -> None:
        """Reports the searched clips, which are deleted, and others with their names or vectors."""
        names = list_clear_names(self._names)
        for gallery in self._free:
            alike = _list_clips(gallery, (), names, self._vectors).keys() - self._own[gallery]
            if alike:
                shown = ", ".join(f"'{show(clip)}'" for clip in sorted(alike))
                about = f"a name or a vector of the clips is in {shown}"
                self._report("gallery", gallery.folder, about, REMOVE)
            if own := {*self._own[gallery]}:
                owners = Counter(gallery.clips[clip].identity for clip in own)
                counts = {f"'{show(x)}'" if x else "strangers": n for x, n in owners.items()}
                texts = [f"{messages.count(n, 'clip')} of {x}" for x, n in sorted(counts.items())]
                about, remedy = self._try(partial(gallery.remove, clip=own), ", ".join(texts))
                self._report("gallery", gallery.folder, about, remedy)

    def in_folders(self) -> None:
        """Searches the folders that are listed instead of their files."""
        for folder, kind in self._kinds.items():
            if kind == "unfinished":
                about = "a killed conversion, which may contain features of the clips"
                self._report("records", folder, about, self._remove_partial(folder))
            elif kind in REMEDIES and (about := self._find_first(folder, kind)):
                remedy = REMEDIES[kind]
                if kind == "records":
                    about, remedy = self._try(partial(_delete_records, folder), about)
                elif kind == "who" and self._people:
                    about, remedy = self._try(partial(actions.forget, folder, self._people), about)
                if remedy == DELETED and (left := self._find_first(folder, kind)):
                    about, remedy = left, REMEDIES[kind]
                self._report(kind, folder, about, remedy)
        runs = {place.path for place in self.found if place.kind == "run"}
        for gallery in self._own:
            if (run := Path(gallery.origin.workdir)) in runs:
                about = f"its vectors were computed by '{run}', which was trained on the clips"
                remedy = "make the gallery again with a new run"
                self._report("gallery", gallery.folder, about, remedy)

    def _find_first(self, folder: Path, kind: str) -> str:
        """Returns where a folder contains a name or vector, or ""."""
        search = self._in_result if kind == "who" else self._traces.in_file
        for path in sorted(self._files.get(folder, ()), key=lambda x: x.name != log.NAME):
            if trace := self._read(path, search):
                return f"'{show(path.name)}' {trace.about}"
        for gallery in self._own:
            if kind == "who" and gallery.folder.parent == folder:
                gallery.refresh()
                if clips := _list_clips(gallery, self._people, self._clips, self._vectors):
                    count = messages.count(len(clips), "clip")
                    return f"'{gallery.folder.name}' contains {count}"
        is_damaged = folder / log.NAME in {place.path for place in self.found}
        return f"'{log.NAME}' cannot be read" if is_damaged else ""

    def _in_result(self, path: Path) -> Trace | None:
        """Searches a file of results of `vidjax who`.

        All results follow from the log, and are written together with the tables. So names of
        people are searched only in the log, in the tables, and in the tags of photos. The names of
        folders of photos do not count.
        """
        if not self._people.isdisjoint(_list_names(path)):
            return Trace("contains the name", ours=True)
        if self._clips or path.parent.parent.name == PEOPLE:
            return self._traces.in_file(path)
        return None  # faces in films stay, without the name

    def in_files(self) -> None:
        """Searches files outside the folders of REMEDIES, or which a user has put into results."""
        seen = set[Path]()  # files of the same film or photo
        for path in self._files.get(None, ()):
            if path in seen or not (trace := self._read(path, self._traces.in_file)):
                continue
            group = media.list_files_of(path)
            group = group if path in group else []
            seen.update(group)
            is_copy = any(files.exists(x / log.NAME) for x in path.parents)  # of a result
            remedy = DELETE_FILE if group or (trace.ours and not is_copy) else LOOK
            if PARTIAL.fullmatch(path.name):
                remedy = self._remove_partial(path)
            for x in group or [path]:
                self._report("file", x, f"it {trace.about}", remedy)

    def _report(self, kind: str, path: Path, about: str, remedy: str) -> None:
        self.found.append(Place(kind, path, about, remedy))

    def _read(self, path: Path, read: Callable[[Path], T]) -> T | None:
        """Returns `read(path)`. If that is impossible, reports the file or folder as unread."""
        try:
            return read(path)
        except FileNotFoundError:
            return None  # another program has deleted it
        except Exception as error:  # a damaged file may cause any error in a library
            self._report_unread(path, error)
            return None

    def _report_unread(self, path: Path, error: Exception) -> None:
        about = next(iter(str(error).splitlines()), type(error).__name__)
        self._report("unread", path, about, "search it yourself")

    def _try(self, act: Callable[[], object], about: str) -> tuple[str, str]:
        """Calls `act` to delete something; returns the reason and the remedy of a `Place`."""
        try:
            if self._delete:
                act()
            return about, DELETED if self._delete else DELETE
        except (UserError, OSError) as error:
            return f"{about}, not deleted: {str(error).splitlines()[0]}", REPAIR

    def _remove_partial(self, path: Path) -> str:
        is_gone = self._delete and files.remove_partial(path)
        return DELETED if is_gone else WAIT if self._delete else DELETE

    def _survey(self, places: Iterable[Path]) -> list[Path]:
        """Returns the sorted files below `places` that are searched. Follows no links.

        Adds each folder and its kind to `self._kinds`, sorted, see `_find_kind`. Reports places
        that are empty or cannot be read.
        """

        def unread(error: OSError) -> None:
            self._report_unread(Path(error.filename), error)

        paths = set[Path]()
        for root in map(Path.absolute, places):
            if not root.is_dir():
                raise UserError(f"'{root}' is not a folder: name an existing folder as PLACE")
            if _is_empty(root):
                about = "it is empty: is the drive connected?"
                self._report("unread", root, about, "connect it, and search it again")
            for place, inner, names in os.walk(root, onerror=unread):
                folder = Path(place)
                kind = self._kinds[folder] = _find_kind(folder, {*names, *inner})
                if kind in ("records", "unfinished"):
                    inner.clear()
                    names = ["index.npz"] if kind == "records" else []
                paths |= {folder / x for x in {*names} - {GALLERY_FILE, JOURNAL_FILE}}
        self._kinds = dict(sorted(self._kinds.items()))
        return sorted(paths)

    def _find_whole(self, path: Path) -> Path | None:
        """Returns the innermost folder that is listed instead of the file `path`, or None.

        For example, if `path` is a file of a training run, returns the folder of the run.
        """
        whole = next((x for x in path.parents if self._kinds.get(x) in REMEDIES), None)
        if whole is None or PARTIAL.fullmatch(path.name):  # a killed process has left it
            return None
        is_own = RESULTS.fullmatch(path.relative_to(whole).as_posix())
        return whole if is_own or self._kinds[whole] != "who" else None


def _list_clips(
    gallery: Gallery,
    people: Collection[str],
    names: Collection[str],
    vectors: Collection[bytes] = frozenset(),
) -> dict[str, set[bytes]]:
    """Returns the clips of `people`, those with these names, and those with one of these vectors.

    The result is clip -> its vectors. A vector of zeros is left out.
    """
    clips, found = gallery.state.clips, dict[str, set[bytes]]()
    parts = gallery.state.stack_parts([*clips])
    for (name, clip), *of_clip in zip(clips.items(), *parts, strict=True):
        own = {part.tobytes() for part in of_clip if part.any()}
        is_named = clip.identity in people or strip_ending(normal_form(name)) in names
        if is_named or not own.isdisjoint(vectors):
            found[name] = own
    return found


def list_roots(places: Iterable[Path]) -> list[Path]:
    """Returns the folders to search: `places` (by default, the current folder) and the cache."""
    cache = files.cache_root()
    roots = [*places] or [x for x in (Path(),) if not _is_empty(x)]
    inside = any(cache.resolve().is_relative_to(x.resolve()) for x in roots)
    roots += [cache] if cache.exists() and not inside and not _is_empty(cache) else []
    return roots or [Path()]


def _is_empty(folder: Path) -> bool:
    """Returns whether a folder is empty, for example because its drive is not connected."""
    try:
        return not any(folder.iterdir())
    except OSError:
        return False  # `_survey` reports the error


def _find_similar(wanted: set[str], others: set[str], *, closely: bool) -> dict[str, str]:
    """Finds stored names that look like searched names; returns searched name -> stored name.

    `wanted` are the searched names, and `others` the stored names. Two names look alike if they are
    equal after `names.fold`, as `Ada` and `ada`. If `closely` is True, names with a similar
    spelling look alike, too.
    """
    looks = {names_lib.fold(name): name for name in sorted(others, reverse=True)}
    near = {
        name: looks.get(names_lib.fold(name)) or (closest(name, others) if closely else None)
        for name in wanted
    }
    return {name: other for name, other in near.items() if other}


def _find_kind(folder: Path, there: set[str]) -> str:
    """Returns the kind of a folder. `there` are the names of its files and inner folders.

    The kind is "gallery", "records" (a converted dataset), "unfinished" (a killed conversion),
    "run", "export" (of a run or a gallery), "who" (results of `vidjax who`), or "" for another
    folder.
    """
    kinds = {
        "unfinished": UNFINISHED.fullmatch(folder.name),
        "gallery": GALLERY_FILE in there,
        "records": {"index.npz", "manifest.json"} <= there,
        "export": "export.json" in there and "checkpoints" not in there,  # not an imported run
        "run": there & {"identities.json", "members.npz", "checkpoints"},
        "who": log.NAME in there,
    }
    return next((kind for kind, is_found in kinds.items() if is_found), "")


def _list_names(path: Path) -> set[str]:
    """Returns the names of people in the log, or in a table, of results of `vidjax who`."""
    if path.name == log.NAME:
        return {str(line.name) for line in log.read(path.parent) if line.says == "person"}
    if path.name not in NAME_COLUMNS:
        return set()
    (_, header), *rows = tables.read_text(path)
    place = header.index(NAME_COLUMNS[path.name])
    return {cells[place].removeprefix("not ") for _, cells in rows}


def _delete_records(folder: Path) -> None:
    with store.exclusive(folder):
        if not store.remove(folder):
            raise UserError("some files are left in this folder")


def _read_people(run: Path) -> set[str]:
    """Returns the names of the people of a run."""
    return {*map(str, files.read_json(run / "identities.json", list, PEOPLE_BYTES))}


# ---- the content of a file


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
