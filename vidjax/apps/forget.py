"""Finds people and clips in all galleries and files, for `vidjax forget`.

With --delete, the found clips are deleted from galleries. A converted dataset in the cache is
deleted as a whole if it contains one of the clips. Unfinished files of killed processes are deleted
if they may contain one of the clips. Training runs, folders of `vidjax who` and other files (see
`traces`) are only listed.
"""

import dataclasses
import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vidjax.apps import features_folder, said
from vidjax.apps.gallery.enrolment import stack_parts
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import GALLERY_FILE, JOURNAL_FILE
from vidjax.apps.traces import PARTIAL, Traces
from vidjax.data import store
from vidjax.utils import files, messages, names as names_lib
from vidjax.utils.errors import UserError, closest
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import normal_form, show

PEOPLE_BYTES = 512 * files.MB  # limit for the list of people of a run
DELETE_FILE = "delete it"  # the remedy for a file that vidjax wrote
WAIT = "another program writes it: run the command again"
LOOK = "look at it, and delete it or the name in it"  # for files of other programs, too
REMOVE = "look at them; to delete one: vidjax gallery remove GALLERY --clip=NAME"
MIN_LETTERS = 4  # of a clip whose name is searched in files
MOST_COPIES = 3  # other clips of a gallery with a vector. A vector with more copies is no trace
# A folder of the cache that a killed process has left. The list of its clips is written last.
UNFINISHED = re.compile(r"[0-9a-f]{20}\.[0-9a-f]{8}\.partial")
# Kind of a folder that is listed instead of its files -> the remedy in `Place`.
REMEDIES = {
    "records": "--delete",
    "export": "delete it; export again when its source lacks the clips",
    "run": "its weights depend on the clips: delete it; train without them",
    "who": "remove these people's photos and tags, and run `vidjax who --forget-missing`, which "
    "replaces all files",
}


class Place(NamedTuple):
    """A folder or file that contains a searched name or vector, or could not be searched."""

    # `gallery`, `records` (a converted dataset), `run`, `export`, `who` (results of `vidjax who`),
    # `file` (any other file or folder), or `unread` if the place could not be searched.
    kind: str
    path: Path
    about: str  # the reason
    # How the user can delete the content, such as `--delete`. If vidjax has deleted it, the text
    # starts with `deleted`.
    remedy: str

    @property
    def left(self) -> bool:
        """True if the place still contains a searched name or vector."""
        return self.kind != "unread" and not self.remedy.startswith("deleted")


class Survey(NamedTuple):
    """The folders and files that `vidjax forget` must search."""

    kind_of: dict[Path, str]  # folder -> kind, see `_find_kind`
    paths: list[Path]  # sorted files and folders, except inside "records" and "unfinished"
    found: list[Place]  # places that are empty or cannot be read

    def list_folders(self, kind: str) -> list[Path]:
        """Returns the sorted folders of a kind, such as `gallery`."""
        return sorted(folder for folder, found in self.kind_of.items() if found == kind)

    def find_whole(self, path: Path) -> Path | None:
        """Returns the innermost folder of a kind in REMEDIES that is or contains `path`, or None.

        For example, if `path` is a file of a training run, returns the folder of the run.
        """
        return next((x for x in (path, *path.parents) if self.kind_of.get(x) in REMEDIES), None)


@dataclasses.dataclass(frozen=True, eq=False)  # equal clips of two galleries are two clips
class Clip:
    """A clip of a gallery, with its person and its vectors."""

    gallery: Gallery
    name: str
    identity: str | None  # None for a stranger
    vectors: dict[str, bytes]  # modality -> the numbers of its vector, if it is not 0

    def __str__(self) -> str:
        owner = f"'{show(self.identity)}'" if self.identity else "a stranger"
        return f"'{show(self.name)}' of {owner}"


def forget(
    identities: Collection[str],
    clips: Collection[str],
    places: Iterable[Path],
    *,
    delete: bool = False,
) -> tuple[list[Place], dict[str, str]]:
    """Searches for people and clips in all galleries, datasets and files below `places`.

    `identities` are names of people. The clips of these people are searched for, too. `clips` are
    names of other clips. If `delete` is True, the clips are deleted from galleries. Converted
    datasets and unfinished files that contain any of the clips are deleted, too.

    Returns two values. The first is the list of places that contain a name or vector, or could not
    be searched. The second is searched name -> similar stored name, such as `Ada` -> `ada`.

    Raises UserError if a folder does not exist, or a name is empty or invalid.
    """
    people = {normal_form(names_lib.check_name(name, "identity")) for name in identities}
    bare = {normal_form(names_lib.clean_name(name)) for name in clips}
    asked = bare | {
        name + end for name in bare for end in (names_lib.ENDING, names_lib.ENDING.upper())
    }
    survey = _survey(places)
    found, known = survey.found, set[str]()
    galleries = [*_open_galleries(survey.list_folders("gallery"), found)]
    for gallery in galleries:
        known |= {*gallery.index.names, *map(normal_form, gallery.clips)}
    shown, their_names, vectors = _search_galleries(galleries, people, asked, delete=delete)
    found += shown
    names = people | asked | their_names
    unfinished = survey.list_folders("unfinished")
    found += [_report_unfinished(folder, delete=delete) for folder in unfinished]
    for folder in survey.list_folders("run"):
        known |= _read_people(folder, found)
    for path in survey.paths if delete else ():
        if path.name == said.NAME:  # the names that a user gave to faces
            for person in people:
                said.forget(path.parent, person)
    clear = people | list_clear_names(names - people)
    found += _search_files(survey, Traces(clear, vectors, names), delete=delete)
    runs = {place.path for place in found if place.kind == "run"}
    for gallery in galleries:
        if (run := Path(gallery.origin.workdir)) in runs:
            about = f"its vectors were computed by '{run}', which was trained on the clips"
            remedy = "make the gallery again with a new run"
            found.append(Place("gallery", gallery.folder, about, remedy))
    wanted = people | bare
    return found, _find_similar(wanted, known - wanted, closely=not found)


def _open_galleries(folders: Iterable[Path], found: list[Place]) -> Iterator[Gallery]:
    """Opens and yields the galleries in `folders`. Adds reports on unreadable ones to `found`."""
    for folder in folders:
        try:
            yield Gallery(folder)
        except (UserError, OSError) as error:
            found.append(_list_unread(folder, error))


def _search_galleries(
    galleries: Iterable[Gallery], people: Collection[str], asked: Collection[str], *, delete: bool
) -> tuple[list[Place], set[str], list[np.ndarray]]:
    """Finds clips of `people`, clips with the names `asked`, and copies, see `_find_copies`.

    If `delete` is True, deletes these clips. Other clips whose name or vector points to
    `people` are reported, but never deleted.

    Returns reports about galleries, the names of the found clips, and vectors of the found clips,
    arrays [D] float32.
    """
    clips = [clip for gallery in galleries for clip in _list_clips(gallery)]
    own = {x for x in clips if x.identity in people or normal_form(x.name) in asked}
    copies, doubtful, vectors = _find_copies(clips, own, people)
    names = {normal_form(clip.name) for clip in own | copies}
    clear, traces = list_clear_names(names), Traces(people, ())
    others = {*clips} - own - copies - doubtful
    any_named = traces.in_text("\n".join(clip.name for clip in others))  # fast
    named = {
        clip for clip in others
        if names_lib.strip_ending(normal_form(clip.name)) in clear
        or (any_named and traces.in_text(clip.name))
    }  # fmt: skip
    found = [_report_gallery(*group, delete=delete) for group in _by_gallery(own | copies)]
    for reason, group in (("the vector", doubtful), ("the name", named)):
        for gallery, of in _by_gallery(group):
            about = f"clips with {reason} of the person: {', '.join(sorted(map(str, of)))}"
            found.append(Place("gallery", gallery.folder, about, REMOVE))
    return found, names, [np.frombuffer(vector, np.float32) for vector in vectors]


def _list_clips(gallery: Gallery) -> Iterator[Clip]:
    state = gallery.state
    parts = stack_parts(state, [*state.clips])
    for (name, clip), *vectors in zip(state.clips.items(), *parts, strict=True):
        of = zip(gallery.backend.widths, vectors, strict=True)
        yield Clip(gallery, name, clip.identity, {kind: x.tobytes() for kind, x in of if x.any()})


def _by_gallery(clips: Iterable[Clip]) -> list[tuple[Gallery, list[Clip]]]:
    groups = group_by_key((clip.gallery, clip) for clip in clips)
    return sorted(groups.items(), key=lambda group: group[0].folder)


def _find_copies(
    clips: Iterable[Clip], own: set[Clip], people: Iterable[str]
) -> tuple[set[Clip], set[Clip], set[bytes]]:
    """Finds clips with the same vectors as a clip in `own`, the clips to be forgotten.

    Returns three values:

    - The copies: such clips of strangers, or of a person whose name is another spelling of a name
      in `people`.
    - The doubtful clips: such clips of other people.
    - The vectors of `own` and of the copies.
    """
    holders = group_by_key((vector, clip) for clip in clips for vector in clip.vectors.items())
    spellings = [*people, *{clip.identity for clip in own if clip.identity}]
    homes = {clip.gallery for clip in own}  # such a gallery tells which names are different people
    copies, doubtful, vectors, left = set[Clip](), set[Clip](), set[bytes](), [*own]
    while left:
        mine = left.pop().vectors
        alike = {
            clip for vector in mine.items() for clip in holders[vector]
            if all(clip.vectors.get(modality, x) == x for modality, x in mine.items())
        } - own - copies  # fmt: skip
        if max(Counter(clip.gallery for clip in alike).values(), default=0) > MOST_COPIES:
            continue
        new = {
            x for x in alike
            if not x.identity or (x.gallery not in homes and is_spelling(x.identity, spellings))
        }  # fmt: skip
        vectors.update(mine.values())
        copies |= new
        doubtful |= alike - new
        left += new  # their copies may have modalities that the clip in `own` lacks
    return copies, doubtful, vectors


def is_spelling(name: str, people: Iterable[str]) -> bool:
    """Returns whether a name may be another spelling of one of `people`.

    This is so if every word of the shorter name is a word of the longer name, or the first letter
    of such a word, as in `lovelace, a.` and `Ada Lovelace`.
    """
    words = re.findall(r"[^\W_]+", names_lib.strip_accents(name))
    for person in people:
        others = re.findall(r"[^\W_]+", names_lib.strip_accents(person))
        short, long = sorted((words, others), key=len)
        if short and {*short} <= {*long, *(word[0] for word in long)}:
            return True
    return False


def _report_gallery(gallery: Gallery, clips: Collection[Clip], *, delete: bool) -> Place:
    """Returns a report, `Place`, about `clips` of a gallery. If `delete` is True, deletes them."""
    counts = Counter(f"'{show(x.identity)}'" if x.identity else "strangers" for x in clips)
    about = ", ".join(f"{messages.count(n, 'clip')} of {x}" for x, n in sorted(counts.items()))
    remedy = "--delete"
    if delete:
        try:
            gallery.remove(clip={clip.name for clip in clips})
            remedy = "deleted"
        except (UserError, OSError) as error:
            about += f", not deleted: {str(error).splitlines()[0]}"
            remedy = "repair this, then run the command again"
    return Place("gallery", gallery.folder, about, remedy)


def list_clear_names(clips: Iterable[str]) -> set[str]:
    """Selects the names to search for in files; removes the ending `.mp4`.

    `clips` are names of clips. Numbers and short names, such as `a`, are left out, because they
    occur in nearly every file.
    """
    bare = map(names_lib.strip_ending, clips)
    return {name for name in bare if len(name) >= MIN_LETTERS and not name.isdigit()}


def _search_files(survey: Survey, traces: Traces, *, delete: bool) -> Iterator[Place]:
    """Searches the files of `survey` for `traces`; yields a `Place` for each file with a trace.

    If the file is in a folder such as a training run, see `Survey.find_whole`, the `Place` is the
    folder. If `delete` is True, deletes converted datasets and unfinished files with a trace.
    """
    seen = set[Path | None]()  # listed folders, and files of the same film or photo
    for path in survey.paths:
        whole = survey.find_whole(path)
        if is_partial := PARTIAL.fullmatch(path.name) is not None:
            whole = None  # a killed process has left it, and nobody reads it
        if not seen.isdisjoint({path, path.parent, whole}):
            continue
        try:
            trace = traces.in_file(path)
        except FileNotFoundError:
            continue  # another program has deleted it
        except (UserError, OSError, EOFError, zlib.error) as error:
            yield _list_unread(path, error)
            continue
        if trace and whole:
            seen.add(whole)
            kind, about = survey.kind_of[whole], f"'{show(path.name)}' {trace.about}"
            deletes = delete and kind == "records"
            remedy = _delete_records(whole) if deletes else REMEDIES[kind]
            yield Place(kind, whole, about, remedy)
        elif trace:
            group = features_folder.list_files_of(path)
            group = group if path in group else []
            seen.update(group)
            remedy = DELETE_FILE if group or trace.ours else LOOK
            if is_partial:
                is_gone = delete and files.remove_partial(path)
                remedy = "deleted" if is_gone else WAIT if delete else "--delete"
            for file in group or [path]:
                yield Place("file", file, f"it {trace.about}", remedy)


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


def _survey(places: Iterable[Path]) -> Survey:
    """Finds the folders and files below `places` that must be searched. Does not follow links."""
    kind_of, paths, found = dict[Path, str](), set[Path](), list[Place]()
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
            here = {*inner, *names} - {GALLERY_FILE, JOURNAL_FILE}
            paths |= {folder / name for name in here}
        found += [_list_unread(error.filename or root, error) for error in unread]
    return Survey(kind_of, sorted(paths), found)


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
        "who": {"names.tsv", "gallery"} <= there,
    }
    return next((kind for kind, is_found in kinds.items() if is_found), "")


def _list_unread(path: str | Path, error: Exception) -> Place:
    about = next(iter(str(error).splitlines()), type(error).__name__)
    return Place("unread", Path(path), about, "search it yourself")


def _delete_records(folder: Path) -> str:
    """Deletes a converted dataset; returns a text that says what the user must do next."""
    with store.exclusive(folder):
        if store.remove(folder):
            return "deleted: the next run converts your files again"
    return "some files are left in this folder: run the command again to search them"


def _report_unfinished(folder: Path, *, delete: bool) -> Place:
    """Returns a report, `Place`, about the folder that a killed conversion of a dataset has left.

    If `delete` is True, deletes the folder.
    """
    remedy = "--delete"
    if delete:
        whole = folder.with_name(folder.name[:20])
        with store.exclusive(whole):  # waits for a living conversion
            files.remove_partials(whole.parent, whole.name)
            remedy = "delete the files that are left" if folder.exists() else "deleted"
    about = "a killed conversion, which may contain features of the clips"
    return Place("records", folder, about, remedy)


def _read_people(folder: Path, found: list[Place]) -> set[str]:
    """Returns the names of the people of a run. Adds an unreadable folder to the report `found`."""
    path = folder / "identities.json"
    try:
        names = files.read_json(path, list, PEOPLE_BYTES) if files.exists(path) else []
        return {*map(str, names)}
    except (UserError, OSError) as error:
        found.append(_list_unread(folder, error))
        return set()
