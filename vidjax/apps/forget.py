"""Finds places of vidjax that contain people or clips: the search of `vidjax forget`.

Clips are deleted from galleries and from converted datasets in the cache. Runs, folders of
`vidjax who` and single files (see `traces`) are only listed. `list_commands` returns shell commands
that search the files of other programs.
"""

import html
import io
import itertools
import json
import os
import re
import shlex
import unicodedata
import urllib.parse
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vidjax.apps.traces import Traces
from vidjax.data.store import exclusive, remove
from vidjax.utils import files, messages, tables
from vidjax.utils.errors import UserError, closest
from vidjax.utils.names import (
    ENDING,
    check_name,
    clean_name,
    escape,
    fold,
    normal_form,
    read_folder_name,
    strip_ending,
    unescape,
)

if TYPE_CHECKING:
    from vidjax.apps.gallery.gallery import Gallery

INDEX_BYTES = 512 * files.MB  # limit for a converted dataset's list of clips, and a file of a run
MAX_NAMES_IN_INDEX = 10_000_000
DELETE_FILE = "delete it"  # the remedy for a file that vidjax wrote
MIN_LETTERS = 4  # of a clip whose name is searched in files
# A folder of the cache that a killed process has left. The list of its clips is written last.
UNFINISHED = re.compile(r"[0-9a-f]{20}\.[0-9a-f]{8}\.partial")


class Place(NamedTuple):
    """A folder or file that contains a searched name, or could not be searched."""

    # `gallery`, `records` (a converted dataset), `run`, `export`, `who` (results of `vidjax who`),
    # `file` (any other file of vidjax), or `unread` if the folder could not be searched.
    kind: str
    path: Path
    about: str  # a description of the content
    # How the user can delete the name, such as `--delete`. If vidjax has deleted the name, the text
    # starts with `deleted`.
    remedy: str

    @property
    def left(self) -> bool:
        """True if the folder still contains a searched name."""
        return self.kind != "unread" and not self.remedy.startswith("deleted")


class Forgotten(NamedTuple):
    """The result of a search."""

    found: list[Place]  # the folders and files that contain a name or could not be searched
    names: set[str]  # people, their clips, and other searched clips, in the Unicode form NFC
    similar: dict[str, str]  # searched name -> another stored name, such as `ada` for `Ada`


def forget(
    identities: Collection[str],
    clips: Collection[str],
    places: Iterable[Path],
    *,
    delete: bool = False,
) -> Forgotten:
    """Searches the folders `places` for galleries, datasets, runs and results with people or clips.

    `identities` are the names of people, whose clips are also searched. `clips` are the names of
    other clips. If `delete` is True, the clips are deleted from galleries, and converted datasets
    with any of the clips are deleted. Raises UserError if a folder does not exist, or a name is
    empty or invalid.
    """
    from vidjax.apps.video.features_folder import EARLIER

    people = {normal_form(check_name(name, "identity")) for name in identities}
    bare = {normal_form(clean_name(name)) for name in clips}
    asked = bare | {name + end for name in bare for end in (ENDING, ENDING.upper())}
    # After a change of nets, clips wait with another name, see `other_nets`.
    stored_as = asked | {f"{EARLIER}/{name}" for name in bare}
    folders, others, found = _survey(places)
    wanted = people | bare
    names, known, vectors = people | asked, set[str](), list[np.ndarray]()
    runs_of_galleries: dict[Path, Path] = {}
    for gallery in _open_galleries(folders["gallery"], found):
        known |= {*gallery.index.names, *map(normal_form, gallery.clips)}
        runs_of_galleries[gallery.folder] = Path(gallery.origin.workdir)
        stored = gallery.clips.items()
        shown = {n for n, clip in stored if clip.identity in people or normal_form(n) in stored_as}
        if shown:
            for name in shown:
                vectors += [x[0] for x in gallery.backend.split(gallery.clips[name].vector[None])]
            found.append(_report_gallery(gallery, shown, delete=delete))
            names.update(map(normal_form, shown))
    for folder in folders["records"]:
        found += _search_records(folder, names, delete=delete)
    for folder in folders["unfinished"]:
        found.append(_report_unfinished(folder, delete=delete))
    for kind in READERS:
        for folder in folders[kind]:
            known |= _search_names(kind, folder, names, found)
    runs = {place.path for place in found if place.kind == "run"}
    for folder, run in runs_of_galleries.items():
        if run in runs:
            about = f"its vectors were computed by '{run}', which was trained on the clips"
            found.append(Place("gallery", folder, about, "make the gallery again with a new run"))
    searched = Traces({*people, *list_clear_names(names - people)}, vectors, known | people)
    found += _search_files(others, searched, [x.path for x in found if x.kind in READERS])
    similar = _find_similar(wanted, known.difference(wanted), closely=not found)
    return Forgotten(found, names, similar)


def _open_galleries(folders: Iterable[Path], found: list[Place]) -> Iterator["Gallery"]:
    """Yields the galleries in `folders`. Adds folders that cannot be read to `found`."""
    from vidjax.apps.gallery.gallery import Gallery

    for folder in folders:
        try:
            yield Gallery(folder)
        except (UserError, OSError) as error:
            found.append(_list_unread(folder, error))


def _search_names(kind: str, folder: Path, names: set[str], found: list[Place]) -> set[str]:
    """Returns all names in a folder. Adds it to `found` if it contains one of `names`."""
    names_of, remedy = READERS[kind]
    try:
        there = {*map(normal_form, itertools.islice(names_of(folder), MAX_NAMES_IN_INDEX))}
    except (UserError, OSError) as error:
        found.append(_list_unread(folder, error))
        return set()
    if held := names & there:
        found.append(Place(kind, folder, f"{len(held):,} of the names", remedy))
    return there


def list_clear_names(clips: Iterable[str]) -> set[str]:
    """Returns the names of clips without their ending. Leaves out names such as `1` or `a`.

    Nearly every file contains such short names. Their clips are found by person and by vector.
    """
    bare = map(strip_ending, clips)
    return {name for name in bare if len(name) >= MIN_LETTERS and not name.isdigit()}


def _search_files(
    paths: Iterable[Path], traces: Traces, listed: Collection[Path]
) -> Iterator[Place]:
    """Describes the files with any of `traces`, except in the folders `listed`."""
    from vidjax.apps.video import features_folder

    seen = set[Path]()
    for path in sorted(paths):
        if path in seen or any(path.is_relative_to(folder) for folder in listed):
            continue
        try:
            kind = traces.in_file(path)
        except FileNotFoundError:
            continue  # another program has deleted it
        except (UserError, OSError, EOFError, zlib.error) as error:
            yield _list_unread(path, error)
            continue
        if kind != "nothing":
            group = features_folder.list_files_of(path)
            is_ours = path in group or kind == "ours"
            for file in group if path in group else [path]:
                seen.add(file)
                about, remedy = "it contains a name or a vector", DELETE_FILE
                if not is_ours:
                    about, remedy = "it contains the name: look at it", "delete the name in it"
                yield Place("file", file, about, remedy)


def is_empty(folder: Path) -> bool:
    """Returns whether a folder contains nothing, as the folder of a drive that is not connected."""
    try:
        return not any(folder.iterdir())
    except OSError:
        return False  # `_survey` reports the error


def _find_similar(wanted: set[str], others: set[str], *, closely: bool) -> dict[str, str]:
    """Returns wanted name -> name in `others` that equals it after `fold`, as `ada` for `Ada`.

    If no name is equal and `closely` is True, a name with a similar spelling is returned.
    """
    looks = {fold(name): name for name in sorted(others, reverse=True)}
    near = {
        name: looks.get(fold(name)) or (closest(name, others) if closely else None)
        for name in wanted
    }
    return {name: other for name, other in near.items() if other}


def _survey(places: Iterable[Path]) -> tuple[dict[str, list[Path]], list[Path], list[Place]]:
    """Finds the folders below `places` that must be searched.

    Returns kind -> sorted folders, the files in all folders except in the kinds "records" and
    "unfinished", and the places that are empty or cannot be read. The kinds are listed in
    `_find_kind`. Links are not followed.
    """
    from vidjax.apps.gallery.store import GALLERY_FILE, JOURNAL_FILE

    kind_of, others, found = dict[Path, str](), list[Path](), list[Place]()
    for root in (place.expanduser().absolute() for place in places):
        if not root.is_dir():
            raise UserError(f"'{root}' is not a folder: name an existing folder as PLACE")
        if is_empty(root):
            about = "it is empty: is the drive connected?"
            found.append(Place("unread", root, about, "connect it, and search it again"))
        unread = list[OSError]()
        for place, inner, names in os.walk(root, onerror=unread.append):
            folder = Path(place)
            if kind := _find_kind(folder, {*names, *inner}):
                kind_of[folder] = kind
            if kind in ("records", "unfinished"):
                inner.clear()
                continue
            paths = (folder / name for name in names if name not in (GALLERY_FILE, JOURNAL_FILE))
            others += [path for path in paths if path.is_file() and not path.is_symlink()]
        found += [_list_unread(error.filename or root, error) for error in unread]
    folders: dict[str, list[Path]] = {kind: [] for kind in ("gallery", "records", "unfinished")}
    folders |= {kind: [] for kind in READERS}
    for folder in sorted(kind_of):
        folders[kind_of[folder]].append(folder)
    return folders, others, found


def _find_kind(folder: Path, there: set[str]) -> str:
    """Returns the kind of a folder that contains the files and folders `there`.

    It is "gallery", "records" (a converted dataset), "unfinished" (a killed conversion), "run",
    "export" (of a run or a gallery), "who" (results of `vidjax who`), or "" for another folder.
    """
    from vidjax.apps.gallery.store import GALLERY_FILE

    kinds = {
        "unfinished": UNFINISHED.fullmatch(folder.name),
        "gallery": GALLERY_FILE in there,
        "records": {"index.npz", "manifest.json"} <= there,
        "export": "export.json" in there and "checkpoints" not in there,  # not an imported run
        "run": there & {"identities.json", "members.npz", "checkpoints"},
        "who": {"names.tsv", "gallery"} <= there,
    }
    return next((kind for kind, is_found in kinds.items() if is_found), "")


def _list_unread(path: str | Path, error: Exception) -> Place:
    about = next(iter(str(error).splitlines()), type(error).__name__)
    return Place("unread", Path(path), about, "search it yourself")


def _report_gallery(gallery: "Gallery", clips: set[str], *, delete: bool) -> Place:
    """Describes a gallery that contains `clips`. If `delete` is True, deletes the clips."""
    about, remedy = f"{len(clips):,} of its clips", "--delete"
    if delete:
        try:
            gallery.remove(clip=clips)
            remedy = "deleted"
        except (UserError, OSError) as error:
            about += f", not deleted: {str(error).splitlines()[0]}"
            remedy = "repair this, then run the command again"
    return Place("gallery", gallery.folder, about, remedy)


def _search_records(folder: Path, clips: Collection[str], *, delete: bool) -> Iterator[Place]:
    """Describes a converted dataset that contains any of `clips` or cannot be read.

    Yields at most one place. If `delete` is True, a dataset with any of the clips is deleted.
    """
    path = folder / "index.npz"
    try:
        limit = min(INDEX_BYTES, files.max_unpacked_bytes(os.lstat(path).st_size))
        index = files.read_npz(path, limit)
        lists = [_lines(array.tobytes()) for key, array in index.items() if key.endswith("/clips")]
        held = set(clips).intersection(map(normal_form, itertools.chain(*lists)))
    except (UserError, OSError) as error:
        yield _list_unread(folder, error)
        return
    if not held:
        return
    about, remedy = f"features of {messages.count(len(held), 'clip')}", "--delete"
    if delete:
        with exclusive(folder):
            remedy = "deleted: the next run converts your files again"
            if not remove(folder):
                remedy = "some files are left in this folder: run the command again to search them"
    yield Place("records", folder, about, remedy)


def _report_unfinished(folder: Path, *, delete: bool) -> Place:
    """Describes the folder of a killed conversion. If `delete` is True, deletes the folder."""
    remedy = "--delete"
    if delete:
        whole = folder.with_name(folder.name[:20])
        with exclusive(whole):  # waits for a living conversion
            files.remove_partials(whole)
            remedy = "delete the files that are left" if folder.exists() else "deleted"
    about = "a killed conversion, which may contain features of the clips"
    return Place("records", folder, about, remedy)


def _lines(content: bytes) -> Iterator[str]:
    """Yields the lines of a text. Raises UserError if there are more than ten million lines."""
    if content.count(b"\n") > MAX_NAMES_IN_INDEX:
        raise UserError(f"it contains more than {MAX_NAMES_IN_INDEX:,} names")
    for line in io.BytesIO(content):
        yield line.rstrip(b"\n").decode("utf-8", "replace")


def _read_names_of_run(folder: Path) -> Iterator[str]:
    """Yields the names of people and clips in the folder of a run or of an exported run."""
    if files.exists(folder / "identities.json"):
        yield from map(str, files.read_json(folder / "identities.json", list, INDEX_BYTES))
    if files.exists(folder / "members.npz"):
        arrays = files.read_npz(folder / "members.npz", INDEX_BYTES)
        yield from _lines(arrays["clips"].tobytes() if "clips" in arrays else b"")
    keys = ("identities", "clips", "members")
    for path in (*folder.glob("checkpoints/**/data.json"), *folder.glob("checkpoint.json")):
        value = files.read_json(path, object, INDEX_BYTES, below=folder)
        yield from _walk_texts([*map(value.get, keys)] if isinstance(value, dict) else value)
    for path in folder.glob("analysis*.npz"):
        if (facts := files.read_npz(path, INDEX_BYTES).get("facts")) is not None:
            yield from _walk_texts(files.parse_json(facts.tobytes()))
    for path in folder.glob("scores*.json"):
        yield from _walk_texts(files.read_json(path, dict, INDEX_BYTES))
    for path in folder.glob("ranking*.txt"):
        for word in re.finditer(rb"\S+", files.read_bytes(path, INDEX_BYTES)):
            yield strip_ending(unescape(word[0].decode(errors="replace")))


def _walk_texts(value: object) -> Iterator[str]:
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list):
            values += value.values() if isinstance(value, Mapping) else value


def _read_names_of_who(folder: Path) -> Iterator[str]:
    """Yields the names in a folder of results of `vidjax who`.

    Names are in tables, in corrections by a user, in names of folders, and in tags of photos.
    """
    from vidjax.apps.video.features_folder import (
        EARLIER,
        NUMBERS,
        find_earlier,
        read_media_files,
    )

    for table in ("names.tsv", "unknown.tsv", "unmatched.tsv"):
        if files.exists(folder / table):
            for _, cells in tables.read_text(folder / table):
                yield from cells
    if files.exists(folder / NUMBERS):
        yield from _walk_texts(files.read_json(folder / NUMBERS, limit=INDEX_BYTES))
    for film in find_earlier(folder / "features").values():  # the tables lack its clips
        for track in film.tracks:
            yield from (track.clip, f"{EARLIER}/{track.clip}")
    if not (people := folder / "people").is_symlink():
        for path in people.glob("*"):
            yield read_folder_name(path.name)
            for film in (*read_media_files(path), *find_earlier(path).values()):
                yield from film.tags


# Kind of folder -> the function that yields its names, and the remedy in `Place`.
READERS: dict[str, tuple[Callable[[Path], Iterator[str]], str]] = {
    "export": (_read_names_of_run, "delete it; export again when its source lacks the clips"),
    "run": (_read_names_of_run, "its weights depend on the clips: delete it; train without them"),
    "who": (
        _read_names_of_who,
        "remove these people's photos and tags, and run `vidjax who --forget-missing`, which "
        "replaces all files",
    ),
}


def list_commands(names: Iterable[str], places: Iterable[Path]) -> list[str]:
    """Returns shell commands that list the files below the folders `places` with any of `names`.

    The first command searches the paths of files. The second command searches their contents.
    """
    names, folders = [*names], list(map(str, places))
    words = [word for spelling in _list_spellings(names) for word in ("-e", spelling)]
    # Letters of the category Lo belong to scripts without blanks or with particles. A name in such
    # a script may touch other letters. All other names are searched as whole words.
    touches = any(unicodedata.category(letter) == "Lo" for name in names for letter in name)
    return [
        f"{shlex.join(['find', *folders])} | {shlex.join(['grep', '-iF', *words])}",
        shlex.join(["grep", "-rliF" if touches else "-rliwF", *words, *folders]),
    ]


def _list_spellings(names: Iterable[str]) -> list[str]:
    """Returns the spellings of names in text, JSON, HTML, URLs, RTTM, rankings and tables."""
    forms = {unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD")}
    ways: tuple[Callable[[str], str], ...] = (
        str, escape, lambda form: "_".join(form.split()), html.escape, urllib.parse.quote,
        lambda form: html.escape(form, quote=False),
        # Jinja writes other codes for quotation marks than Python. Tables double quotation marks.
        lambda form: html.escape(form).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
        lambda form: json.dumps(form)[1:-1],
        lambda form: form.replace('"', '""'),
    )  # fmt: skip
    return sorted({way(form) for form in forms for way in ways})
