"""Finds people and clips in all galleries and files, for `vidjax forget`.

With --delete, the found clips are deleted from galleries, and the people from folders with results
of `vidjax who`. A converted dataset in the cache is deleted as a whole if it contains one of the
clips. Unfinished files of killed processes are deleted if they may contain one of the clips.
Training runs and other files (see `traces`) are only listed.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import GALLERY_FILE, JOURNAL_FILE
from vidjax.apps.traces import PARTIAL, Trace, Traces, list_clear_names
from vidjax.apps.video import actions, log, media
from vidjax.apps.video.media import PEOPLE
from vidjax.data import store
from vidjax.utils import files, messages, names as names_lib, tables
from vidjax.utils.errors import UserError, closest
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import normal_form, show, strip_ending

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
        paths = self._survey(places)
        # Folder that is listed instead of its files -> its files. Other files have the key None.
        self._files = group_by_key((self._find_whole(path), path) for path in paths)
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
