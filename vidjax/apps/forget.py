"""Finds people and clips in all galleries and files, for `vidjax forget`.

With --delete, the found clips are deleted from galleries, and the people from folders with results
of `vidjax who`. A converted dataset in the cache is deleted as a whole if it contains one of the
clips. Unfinished files of killed processes are deleted if they may contain one of the clips.
Training runs and other files (see `traces`) are only listed.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from vidjax.apps.gallery.enrolment import stack_parts
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
    found, known, kind_of = list[Place](), set[str](), dict[Path, str]()
    paths = _survey(places, kind_of, found)
    galleries = [*_open_all(Gallery, kind_of, "gallery", found)]
    for gallery in galleries:
        known |= {*gallery.index.names, *map(normal_form, gallery.clips)}
    for names in _open_all(_read_people, kind_of, "run", found):
        known |= names
    own = {gallery: _list_clips(gallery, people, asked) for gallery in galleries}
    # In results of `vidjax who`, clips have names of films: only their vectors are searched.
    free = [x for x in galleries if kind_of.get(x.folder.parent) != "who"]
    names = asked | {strip_ending(normal_form(name)) for x in free for name in own[x]}
    vectors = {vector for clips in own.values() for of in clips.values() for vector in of}
    arrays = [np.frombuffer(vector, np.float32) for vector in vectors]
    search = _Search(people, asked, vectors, Traces(people, names, arrays, known), found, delete)
    for gallery in free:
        alike = _list_clips(gallery, (), list_clear_names(names), vectors)
        search.in_gallery(gallery, own[gallery].keys(), alike.keys() - own[gallery])
    groups = group_by_key((_find_whole(path, kind_of), path) for path in paths)
    for folder, kind in sorted(kind_of.items()):
        inside = [x for x in galleries if kind == "who" and x.folder.parent == folder]
        search.in_folder(folder, kind, groups.get(folder, []), inside)
    search.in_files(groups.get(None, ()))
    runs = {place.path for place in found if place.kind == "run"}
    for gallery in galleries:
        if (run := Path(gallery.origin.workdir)) in runs:
            about = f"its vectors were computed by '{run}', which was trained on the clips"
            remedy = "make the gallery again with a new run"
            found.append(Place("gallery", gallery.folder, about, remedy))
    wanted = people | asked
    return [*dict.fromkeys(found)], _find_similar(wanted, known - wanted, closely=not found)


def list_left(out: Path, person: str) -> list[Path]:
    """Returns the files in the folder `out` and in the cache that contain the name of a person."""
    return [x.path for x in forget([person], (), list_roots([out]))[0] if x.left]


def _find_in_results(out: Path, people: Collection[str]) -> str:
    """Returns the name of a file of results that contains the name of a person, or "".

    The names of folders of photos do not count. All other results follow from the log, and are
    written together with the tables.
    """
    if any(line.says == "person" and line.name in people for line in log.read(out)):
        return log.NAME
    for name, column in {"names.tsv": "identity", "unmatched.tsv": "correction"}.items():
        if files.exists(out / name):
            (_, header), *rows = tables.read_text(out / name)
            place = header.index(column) if column in header else 0
            if any(cells[place].removeprefix("not ") in people for _, cells in rows):
                return name
    return ""


@dataclasses.dataclass
class _Search:
    """Searches galleries and files, and adds reports to `found`. Deletes what it can, if asked."""

    people: set[str]
    clips: set[str]
    vectors: set[bytes]
    traces: Traces
    found: list[Place]
    delete: bool

    def in_gallery(self, gallery: Gallery, own: Collection[str], alike: Collection[str]) -> None:
        """Reports the clips `own`, which are deleted, and others with their names or vectors."""
        if alike:
            shown = ", ".join(f"'{show(clip)}'" for clip in sorted(alike))
            about = f"a name or a vector of the clips is in {shown}"
            self.found.append(Place("gallery", gallery.folder, about, REMOVE))
        if own:
            owners = Counter(gallery.clips[clip].identity for clip in own)
            counts = {f"'{show(x)}'" if x else "strangers": n for x, n in owners.items()}
            texts = [f"{messages.count(n, 'clip')} of {x}" for x, n in sorted(counts.items())]
            about, remedy = self._try(lambda: gallery.remove(clip={*own}), ", ".join(texts))
            self.found.append(Place("gallery", gallery.folder, about, remedy))

    def in_files(self, paths: Iterable[Path]) -> None:
        """Searches files outside the folders of REMEDIES, or which a user has put into results."""
        seen = set[Path]()  # files of the same film or photo
        for path, trace in self._list_traces(paths):
            if path in seen:
                continue
            group = media.list_files_of(path)
            group = group if path in group else []
            seen.update(group)
            is_copy = any(files.exists(x / log.NAME) for x in path.parents)  # of a result
            remedy = DELETE_FILE if group or (trace.ours and not is_copy) else LOOK
            if PARTIAL.fullmatch(path.name):
                remedy = self._remove_partial(path)
            self.found += [Place("file", x, f"it {trace.about}", remedy) for x in group or [path]]

    def in_folder(
        self, folder: Path, kind: str, paths: Iterable[Path], galleries: Iterable[Gallery]
    ) -> None:
        """Searches the files `paths` in a folder of some kind, and `galleries` in results."""
        if kind == "unfinished":
            about = "a killed conversion, which may contain features of the clips"
            self.found.append(Place("records", folder, about, self._remove_partial(folder)))
        elif about := self._find_first(folder, kind, paths, galleries):
            remedy = REMEDIES[kind]
            acts = {"records": lambda: _delete_records(folder)}
            if self.people:
                acts["who"] = lambda: actions.forget(folder, self.people)
            if act := acts.get(kind):
                about, remedy = self._try(act, about)
            if remedy == DELETED and (left := self._find_first(folder, kind, paths, galleries)):
                about, remedy = left, REMEDIES[kind]
            self.found.append(Place(kind, folder, about, remedy))

    def _find_first(
        self, folder: Path, kind: str, paths: Iterable[Path], galleries: Iterable[Gallery]
    ) -> str:
        """Returns where a folder contains a name or vector, or ""."""
        if kind == "who":
            try:
                if name := _find_in_results(folder, self.people):
                    return f"'{name}' contains the name"
            except (UserError, OSError) as error:
                self.found.append(_list_unread(folder / log.NAME, error))
                return f"'{log.NAME}' cannot be read"
        for gallery in galleries:
            gallery.refresh()
            if clips := _list_clips(gallery, self.people, self.clips, self.vectors):
                return f"'{gallery.folder.name}' contains {messages.count(len(clips), 'clip')}"
        traces = self._list_traces(paths, is_result=kind == "who")
        return next((f"'{show(path.name)}' {trace.about}" for path, trace in traces), "")

    def _list_traces(
        self, paths: Iterable[Path], *, is_result: bool = False
    ) -> Iterator[tuple[Path, Trace]]:
        """Yields each file with a trace. `is_result` is True for results of `vidjax who`."""
        for path in paths:
            if is_result and not self.clips and path.parent.parent.name != PEOPLE:
                continue  # `_find_in_results` searches names; faces in films stay, without the name
            try:
                if trace := self.traces.in_file(path):
                    yield path, trace
            except FileNotFoundError:
                continue  # another program has deleted it
            except Exception as error:  # a damaged file may cause any error in a library
                self.found.append(_list_unread(path, error))

    def _try(self, act: Callable[[], object], about: str) -> tuple[str, str]:
        """Calls `act` to delete something; returns the reason and the remedy of a `Place`."""
        try:
            if self.delete:
                act()
            return about, DELETED if self.delete else DELETE
        except (UserError, OSError) as error:
            return f"{about}, not deleted: {str(error).splitlines()[0]}", REPAIR

    def _remove_partial(self, path: Path) -> str:
        is_gone = self.delete and files.remove_partial(path)
        return DELETED if is_gone else WAIT if self.delete else DELETE


def _open_all(
    read: Callable[[Path], T], kind_of: Mapping[Path, str], kind: str, found: list[Place]
) -> Iterator[T]:
    """Yields `read(folder)` for each folder of a kind. Adds unreadable folders to `found`."""
    for folder in sorted(folder for folder, of in kind_of.items() if of == kind):
        try:
            yield read(folder)
        except (UserError, OSError) as error:
            found.append(_list_unread(folder, error))


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
    parts = stack_parts(gallery.state, [*clips])
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


def _survey(places: Iterable[Path], kind_of: dict[Path, str], found: list[Place]) -> list[Path]:
    """Returns the sorted files below `places` that are searched. Follows no links.

    Adds each folder and its kind to `kind_of`, see `_find_kind`. Adds reports on places that are
    empty or cannot be read to `found`.
    """
    paths = set[Path]()
    for root in map(Path.absolute, places):
        if not root.is_dir():
            raise UserError(f"'{root}' is not a folder: name an existing folder as PLACE")
        if _is_empty(root):
            about = "it is empty: is the drive connected?"
            found.append(Place("unread", root, about, "connect it, and search it again"))
        unread = list[OSError]()
        for place, inner, names in os.walk(root, onerror=unread.append):
            folder = Path(place)
            kind = kind_of[folder] = _find_kind(folder, {*names, *inner})
            if kind in ("records", "unfinished"):
                inner.clear()
                names = ["index.npz"] if kind == "records" else []
            paths |= {folder / x for x in {*names} - {GALLERY_FILE, JOURNAL_FILE}}
        found += [_list_unread(error.filename or root, error) for error in unread]
    return sorted(paths)


def _find_whole(path: Path, kind_of: Mapping[Path, str]) -> Path | None:
    """Returns the innermost folder that is listed instead of the file `path`, or None.

    For example, if `path` is a file of a training run, returns the folder of the run.
    """
    whole = next((x for x in (path, *path.parents) if kind_of.get(x) in REMEDIES), None)
    if whole is None or PARTIAL.fullmatch(path.name):  # a killed process has left it
        return None
    is_own = RESULTS.fullmatch(path.relative_to(whole).as_posix())
    return whole if is_own or kind_of[whole] != "who" else None


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


def _list_unread(path: str | Path, error: Exception) -> Place:
    about = next(iter(str(error).splitlines()), type(error).__name__)
    return Place("unread", Path(path), about, "search it yourself")


def _delete_records(folder: Path) -> None:
    with store.exclusive(folder):
        if not store.remove(folder):
            raise UserError("some files are left in this folder")


def _read_people(folder: Path) -> set[str]:
    """Returns the names of the people of a run."""
    path = folder / "identities.json"
    return {*map(str, files.read_json(path, list, PEOPLE_BYTES))} if files.exists(path) else set()
