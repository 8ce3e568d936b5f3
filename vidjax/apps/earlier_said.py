"""Reads what users said about faces in results of version 0.1.0 of `vidjax who`.

Later versions have a log, see `said`. In version 0.1.0, the gallery stored which person a face
shows, or does not show. The file `unknown.json` stored numbers of unknown people, in its fields:

    films    digest of a film -> clip -> number of the person; 0 if the user ignores the face
    fixed    the numbers that never change
    apart    pairs of numbers; a user said that the two people differ
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vidjax.apps import features_folder, said
from vidjax.apps.features_folder import VIDEOS, FaceFinder, PhotoFace, SeenClip, locate_people
from vidjax.apps.said import FEATURES, Act, Face, Line
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key

if TYPE_CHECKING:
    from vidjax.apps.gallery.store import State

EARLIER = "earlier"  # a folder with JSON files of films whose features other nets must compute
T = TypeVar("T")


class _Results:
    """Finds the faces of clips in a folder of results of version 0.1.0."""

    def __init__(self, out: Path):
        self.of_clip: dict[str, SeenClip] = {}  # of films; clips that wait begin with `earlier/`
        self.of_digest: dict[str, dict[str, SeenClip]] = {}  # digest of a film -> clip -> face
        self.find = FaceFinder(out)
        for place, *earlier in ((VIDEOS,), (EARLIER, EARLIER)):
            for path in sorted((out / FEATURES / place).glob("*.json")):
                with contextlib.suppress(UserError):  # damaged
                    film = features_folder.read_media_file(path)
                    clips = {clip: SeenClip(x, film.video) for clip, x in film.faces.items()}
                    tracks = [[x.clip, x.start_s, x.end_s] for x in film.tracks]
                    key = files.sha256_json([film.sha256, tracks, *earlier])
                    self.of_digest[key] = clips
                    self.of_clip |= {"/".join([*earlier, clip]): x for clip, x in clips.items()}

    def locate(self, films: Mapping[str, Mapping[str, T]]) -> Iterator[tuple[SeenClip, T]]:
        """Finds clips in the folder of results; yields (`SeenClip`, value) for each found clip.

        `films` are the clips to find: digest of a film -> clip -> value.
        """
        for digest, of in films.items():
            for clip, value in of.items():
                if x := self.of_digest.get(digest, {}).get(clip):
                    yield x, value


def read_numbers(out: Path) -> dict[str, Any] | None:
    """Reads `unknown.json` of version 0.1.0, the file with each unknown person's number.

    `out` is the folder of results. Returns the JSON object in the file, or None if the file is
    missing, damaged or from a later version.
    """
    # A damaged file is reported by another function.
    with contextlib.suppress(UserError, FileNotFoundError):
        path = out / features_folder.NUMBERS
        content = files.read_json(path, limit=features_folder.FILE_BYTES)
        return content if is_earlier(content) else None
    return None


def is_earlier(content: Any) -> bool:  # noqa: ANN401  (any JSON)
    """Returns whether version 0.1.0 has written `content`, the content of `unknown.json`."""
    return isinstance(content, dict) and content.get("format", 1) == 1


def number_faces(out: Path) -> tuple[list[str], dict[Face, int], int]:
    """Reads the numbers in names such as `unknown 2` from `unknown.json` of version 0.1.0.

    Returns three values: the digests of the films, face -> number of its person, and the highest
    number that a person ever had, or 0.
    """
    content = read_numbers(out) or {}
    films = content.get("films", {})
    numbers = {x.face: number for x, number in _Results(out).locate(films) if number}
    given = (number for of in films.values() for number in of.values())
    highest = max(content.get("removed", 0), *content.get("fixed", ()), *given, 0)
    return [*films], numbers, highest


@contextlib.contextmanager
def log_acts(out: Path, acts: Sequence[Act], gallery: "State") -> Iterator[None]:
    """Writes changes of names, `acts`, into the log of the folder of results `out`.

    The caller changes the gallery inside the `with` block. If the block raises an error, a new line
    of the log undoes `acts`. If `out` is not a folder of results, nothing is written.
    `gallery` is the content of the gallery before the changes.
    """
    if acts and not said.has_log(out) and read_numbers(out):
        said.append(out, list_lines(out, gallery))
    lines = _record(out, acts) if acts and said.has_log(out) else []
    try:
        yield
    except BaseException:
        if lines:
            said.append(out, said.undo(lines))
        raise


def _record(out: Path, acts: Iterable[Act]) -> list[Line]:
    """Adds changes of names to the log in the folder of results `out`; returns the new lines.

    Changes about clips that the results do not contain are left out.
    """
    lines, find = list[Line](), FaceFinder(out)
    for act in acts:
        if act.says == "rename":
            lines.append(Line(says="rename", person=act.what, of=act.of))
        elif act.says == "forgotten":
            said.forget(out, act.what)
        elif found := find(act.what):
            lines.append(said.about(found.face, act.says, of=act.of, video=found.video))
    lines = said.stamp(lines)
    said.append(out, lines)
    return lines


def list_lines(out: Path, gallery: "State") -> list[Line]:
    """Makes lines of a log from the names and corrections that version 0.1.0 stored in `out`.

    `out` is the folder of results, and `gallery` the content of the gallery in this folder.
    """
    results, content = _Results(out), read_numbers(out) or {}
    clips = {name: x.identity for name, x in gallery.clips.items()}
    lines = [*_list_numbers(results, content)]
    for x, names in results.locate(gallery.denied):
        lines += [said.about(x.face, "not", of=name, video=x.video) for name in names]
    photos = dict[str, str]()  # clip -> the person of the folder or tag
    for clip, name in clips.items():
        if photo := PhotoFace.of(clip):
            photos[clip] = photo.person
        elif x := results.of_clip.get(clip):
            lines.append(said.about(x.face, "is", of=name, video=x.video))
    return said.stamp([*_list_photos(results, clips, photos), *lines])


def _list_photos(
    results: _Results, clips: Mapping[str, str | None], photos: Mapping[str, str]
) -> Iterator[Line]:
    """Yields lines for the log, see `said`, about faces in photos that a user has renamed.

    `photos` are face -> name from the folder or a face tag of the photo. `clips` are face -> name
    in the gallery, or None for a stranger.
    """
    for person, of in group_by_key((x, clip) for clip, x in photos.items()).items():
        names = Counter(name for clip in of if (name := clips[clip]))
        label = max(names, key=lambda name: (names[name], name == person), default=person)
        if label != person:
            yield Line(says="rename", person=person, of=label)
        for clip in of:
            if clips[clip] != label and (x := results.find(clip)):
                yield said.about(x.face, "is", of=clips[clip], video=x.video)


def _list_numbers(results: _Results, content: Mapping[str, Any]) -> Iterator[Line]:
    """Converts `content`, the JSON object in `unknown.json`, to lines of the log."""
    located: Iterator[tuple[SeenClip, int]] = results.locate(content.get("films", {}))
    faces_of = group_by_key((number, x) for x, number in located)
    for x in faces_of.pop(0, ()):
        yield said.about(x.face, "ignore", video=x.video)
    for number in content.get("fixed", ()):
        for x in faces_of.get(number, ())[:1]:
            yield said.about(x.face, "same", number=number, of=x.face, video=x.video)
    for low, high in content.get("apart", ()):
        for x, other in zip(faces_of.get(high, ())[:1], faces_of.get(low, ())[:1], strict=False):
            yield said.about(x.face, "apart", number=high, of=other.face, video=x.video)


def move_descriptions(out: Path) -> None:
    """Moves the JSON files of films and photos from folders `earlier` to folders `videos`.

    `out` is a folder of results. Only version 0.1.0 of `vidjax who` used folders `earlier`. If
    `videos` already contains a file of the same name, the file in `earlier` is deleted.
    """
    for folder in (out / FEATURES, *locate_people(out).values()):
        for path in (folder / EARLIER).glob("*.json"):
            if (folder / VIDEOS / path.name).exists():
                path.unlink()
            else:
                os.replace(path, folder / VIDEOS / path.name)
        files.remove_ours(folder / EARLIER, "")
