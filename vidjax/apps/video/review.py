"""Serves a page on which a user corrects the names of people in films (`vidjax who --review`).

The server runs on the user's machine. The address of the page contains a secret word. Requests
without this word, and changes that other pages send, are refused. Each change is saved immediately,
in the gallery or in `unknown.json`, so that the next call of `vidjax who` keeps it. The other
result files are written a second after the last change, and when the server ends.
"""

import asyncio
import contextlib
import functools
import hmac
import html
import re
import secrets
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

from vidjax.apps import web
from vidjax.apps.gallery.answers import FACE, parse_group_number, rank_group
from vidjax.apps.gallery.changes import check_person
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.labelling import find_known
from vidjax.apps.gallery.store import Denials, StoredClip
from vidjax.apps.gallery.vectors import select_usable_clips
from vidjax.apps.video import features_folder, still, who
from vidjax.apps.video.appearances import Appearance, format_time, pair_seen_together
from vidjax.apps.video.features_folder import (
    NUMBERS,
    THUMBNAILS,
    FileStamp,
    MediaFile,
)
from vidjax.apps.video.names_page import CLIP, Forms, format_appearance_time
from vidjax.apps.video.unknown_numbers import IGNORED_NUMBER, UnknownNumbers
from vidjax.utils import files, messages
from vidjax.utils.errors import Expected, InUseError, UserError, closest, describe_system_error
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import IGNORED, is_unknown, normal_form, strip_accents

HOST = "127.0.0.1"
IDLE_SECONDS = 1.0  # the results are written after this time without another change
MOST_DECODED = 2  # pictures that are decoded at the same time
FORM_BYTES = 200_000
SNIFF_BYTES = 64
# The first bytes of films and photos -> the type as which a file is sent. A browser does not run
# scripts in a file of these types. Other files are sent as bytes without a type.
TYPES = {
    rb"\x89PNG\r\n": "image/png", rb"\xff\xd8\xff": "image/jpeg", rb"GIF8": "image/gif",
    rb"RIFF.{4}WEBP": "image/webp", rb"BM": "image/bmp", rb"II\*\0|MM\0\*": "image/tiff",
    rb".{4}ftypavi[fs]": "image/avif", rb".{4}ftyp(hei|hev|mif)": "image/heic",
    rb".{4}(ftyp|moov|mdat|wide|free|skip)": "video/mp4", rb"OggS": "video/ogg",
    rb"\x1a\x45\xdf\xa3.{,59}webm": "video/webm", rb"\x1a\x45\xdf\xa3": "video/x-matroska",
    rb"RIFF.{4}AVI ": "video/x-msvideo", rb"\0\0\x01[\xb3\xba]": "video/mpeg",
}  # fmt: skip
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",  # with `no-referrer`, browsers send forms without an origin
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
SANDBOX = {"Content-Security-Policy": "sandbox", **HEADERS}  # of films and pictures


class OutdatedError(UserError):
    """The page on which a user made a change no longer shows the present names."""


class Step(NamedTuple):
    """A change of names that can be undone."""

    words: str  # a description of the change
    at: str  # the changed person, or the key of the changed face
    # The entry of each changed clip in the gallery before the change; None for a new clip.
    clips: dict[str, StoredClip | None]
    denied: Denials  # the denied names of each changed clip before the change
    numbers: UnknownNumbers  # the contents of `unknown.json` before the change


class Subject(NamedTuple):
    """A person or a face on the page."""

    key: str
    clips: Sequence[str]
    name: str  # of the person, or IGNORED
    is_person: bool  # False for a face


class Review:
    """Applies a user's corrections to the names in a folder of results.

    Other programs may change the results at the same time. So each change first reads what they
    have changed, and is written before other programs can change names.
    """

    def __init__(
        self,
        out: Path,
        decision: who.Decision,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        padding: float = who.PADDING_SECONDS,
    ):
        """Opens the folder of results `out`. `decision` contains the names before corrections.

        For the other arguments, see `who.name_people`.
        """
        files.refuse_links(out)
        self._padding = padding
        self._out, self._gallery = out, Gallery(out / "gallery")
        self._identify = functools.partial(self._gallery.identify, fpir=fpir, threshold=threshold)
        self._steps: list[Step] = []
        self.version = self._saved = 0  # number of changes. Undoing a change counts as a change
        # A person, the key of a face, or "" for the last step -> version of the last change.
        self._changed: dict[str, int] = {}
        self._forms = Forms()
        self._stamp: FileStamp | None = None  # of the last `unknown.json` that was read
        self._set_films(decision.films)
        self._set_names(decision)

    def _set_films(self, films: Sequence[MediaFile]) -> None:
        self._films = {film.video: film for film in films}
        self._digest_of, self._shot_of = dict[str, str](), dict[str, int]()  # of each clip
        for film in films:
            self._shot_of |= {track.clip: track.shot for track in film.tracks}
            self._digest_of |= dict.fromkeys((x.clip for x in film.tracks), film.digest)

    def _set_names(self, decision: who.Decision) -> None:
        self._decision = decision
        # Clip -> appearance on the page, and unknown person -> clips.
        self._shown = {clip: x for x in decision.appearances for clip in x.clips}
        self._clips_of = group_by_key((name, clip) for clip, name in decision.unknown.items())

    def _show(self, decision: who.Decision) -> None:
        """Replaces the names on the page, and remembers which people and faces have changed."""
        before = self._shown
        self._set_names(decision)
        for clip in before.keys() | self._shown.keys():
            names = [
                x and (x.identity or IGNORED) for x in (before.get(clip), self._shown.get(clip))
            ]
            if names[0] != names[1]:
                self._changed |= dict.fromkeys(
                    [CLIP + clip, *filter(None, names)], self.version + 1
                )
        self.version += 1  # last, because another thread may read the version before the names

    @contextlib.contextmanager
    def _lock(
        self, version: int | None = None, keys: Collection[str] = (), wait: float = who.WAIT_SECONDS
    ) -> Iterator[None]:
        """Reads the changes of other programs, and locks the names, in a `with` block.

        Raises OutdatedError if one of the people or faces `keys` has changed since `version`.
        """
        with who.lock_changes(self._out, wait):
            self._read_changes()
            latest = max((self._changed.get(key, 0) for key in keys), default=self.version)
            if version is not None and not latest <= version <= self.version:
                raise OutdatedError("the page was out of date: repeat the change on this new page")
            yield
            self._stamp = self._stat()

    def _stat(self) -> FileStamp | None:
        path = self._out / NUMBERS
        return FileStamp.of(path) if files.exists(path) else None

    def _read_changes(self) -> None:
        """If another program has changed names or films, decides all names again."""
        shown, last = self._decision, self._decision
        numbers, films = shown.numbers, shown.films
        if self._stat() != self._stamp:
            numbers = who.read_numbers(self._out)
            if numbers != shown.numbers:
                self._steps.clear()  # a step would restore the other numbers
                films = features_folder.read_media_files(self._out / who.FEATURES)
                is_known = {x.digest for x in films} == {x.digest for x in shown.films}
                last = shown._replace(numbers=numbers) if is_known else None
        if last is not shown or self._gallery.digest != shown.digest:
            decision = self._decide(numbers, films, last)
            self._set_films(films)
            self._show(decision)

    def _decide(
        self, numbers: UnknownNumbers, films: Sequence[MediaFile], last: who.Decision | None
    ) -> who.Decision:
        return who.decide(self._gallery, self._out, films, numbers, self._identify, last)

    def refresh(self) -> None:
        """If another program has changed names or films, decides all names again.

        While another program is changing them, the old names are kept.
        """
        with contextlib.suppress(InUseError), self._lock(wait=0.0):
            pass

    @property
    def done(self) -> who.WhoResults:
        """The results after all changes."""
        return who.WhoResults(self._decision.count_clips(), self._decision, {})

    def film(self, number: int) -> Path | None:
        """Returns the path of film `number`, or None if the file is missing or has changed."""
        films = self._decision.films
        return _find_source(films[number]) if number < len(films) else None

    def frame(self, clip: str) -> bytes | None:
        """Returns the picture with the best face of a clip as JPEG, or None if it is missing.

        The picture is decoded from the film or photo. `Appearance.box` is the place of the face.
        """
        if not (x := self._shown.get(clip)):
            return None
        films = [film for film in self._decision.films if film.video == x.video]
        found = ((film, track) for film in films for track in film.tracks if track.clip == clip)
        # In the meantime, another program may have changed the films.
        film, track = next(found, (None, None))
        path = film and _find_source(film)
        return path and track and still.read_still(path, track.box_at_s or track.start_s)

    def picture(self, address: str) -> Path | None:
        """Returns the path of the picture with this address, or None if there is no picture."""
        path = self._out / address
        inside = path.is_relative_to(self._out) and ".." not in path.parts
        inside = inside and path.parent.parent.name == THUMBNAILS
        return path if inside and path.suffix == ".png" and files.is_file(path) else None

    def render(self, view: Mapping[str, str], problem: Forms | None = None) -> str:
        """Returns the page of names as HTML. `view` chooses what it shows, see `_read_view`.

        `problem` is the state of the forms after a refused change. If it is None, the first page
        after a change says what was changed.
        """
        forms = (problem or self._forms)._replace(
            version=self.version, film=view.get("film", ""), person=view.get("person", ""),
            find=view.get("find", ""), first=int(view.get("first", 0)),
            last=self._steps[-1].words if self._steps else "",
        )  # fmt: skip
        self._forms = Forms()
        number_of = {film.video: number for number, film in enumerate(self._decision.films)}

        def address(film: MediaFile, seconds: float) -> str:
            number = number_of[film.video]
            return f"film/{number}" if film.photo else f"play/{number}?t={seconds:.1f}"

        return who.render_page(self._out, self._decision, address, forms)

    def change(
        self,
        action: str,
        of: Sequence[str],
        name: str = "",
        after: str = "",
        version: int | None = None,
    ) -> None:
        """Changes the names of people or faces, as one step that can be undone.

        Args:
          action: "name" gives all of them the name `name`. "deny" and "apart" say that the faces
            show somebody else: they become a new unknown person. "deny" with a name says that this
            suggested name is wrong: it is not suggested any more. "ignore" shows people and faces
            as ignored, without a name. "once" ignores all unknown people who appear once.
            "join" makes one unknown person of all, with the lowest number. "twin" gives faces the
            name of another face of the same time. Both have the name then, as in a mirror.
          of: the people, and the keys of the faces, to change.
          name: the new name. If it is an unknown person, such as `unknown 4`, this person and the
            people and faces `of` become one unknown person. Then the people must be unknown.
          after: the person, or the key of the face, next to which the page says what changed.
          version: the version of the page on which the user has made the change.

        Raises:
          OutdatedError: one of the people or faces has changed since this version.
          UserError: one of `of` is not on the page, or the name is not allowed.
        """
        keys = {*of, name.casefold()} if is_unknown(name) else of
        with self._lock(version, keys):
            of = self._list_seen_once() if action == "once" else of
            found = [self._find(key) for key in dict.fromkeys(of)]
            if not found:
                raise UserError("nobody is selected: select people or faces first")
            if action == "twin":
                name = self._find_twin(found)
                found += self._list_rivals(found, name)
            elif action == "join":
                unknown = [x.name for x in found if is_unknown(x.name)]
                if not unknown:
                    raise UserError("a known person is selected: type the name")
                name = min(unknown, key=rank_group)
            subject = self._describe(found, name)
            if action in ("ignore", "once"):
                self._ignore(found, subject, after)
            elif action == "deny" and name:
                self._deny_name(found, subject, name)
            elif action in ("deny", "apart"):
                self._move(found, subject, "")
            elif action not in ("name", "twin", "join") or not name:
                raise UserError("the name is empty: type a name")
            elif is_unknown(name):
                self._move(found, subject, after, self._find_group(name))
            else:
                self._give_name(found, subject, after, check_person(name))

    def _ignore(self, found: Sequence[Subject], subject: str, after: str) -> None:
        digest_of = self._digest_of
        clips = {c: digest_of[c] for x in found for c in x.clips if c in digest_of}
        numbers = self._decision.numbers.move(clips, IGNORED_NUMBER)
        entries = self._label(found, None)
        self._finish(f"{subject} ignored", found, after, entries, {}, numbers)

    def _deny_name(self, found: Sequence[Subject], subject: str, name: str) -> None:
        if name not in self._decision.people:
            raise UserError(f"'{name}' is not a person on this page: reload the page")
        denied = self._deny((clip for x in found for clip in x.clips), name)
        self._finish(f"{subject} not {name}", found, found[0].key, {}, denied)

    def _give_name(self, found: Sequence[Subject], subject: str, after: str, name: str) -> None:
        if not (entries := self._label(found, name)):
            raise UserError("no face in this appearance is clear enough: name another appearance")
        self._finish(f"{subject} {name}", found, after, entries)

    def _list_seen_once(self) -> list[str]:
        seen = Counter(x.identity for x in self._decision.appearances)
        return [name for name in dict.fromkeys(self._decision.unknown.values()) if seen[name] == 1]

    def _find_twin(self, found: Sequence[Subject]) -> str:
        """Returns the name that faces did not get, because other faces of the time have it."""
        names = (self._decision.twins.get(clip) for x in found for clip in x.clips)
        if (name := next(filter(None, names), None)) is None:
            raise UserError("no other face of this time has a name: type the name")
        return name

    def _list_rivals(self, found: Sequence[Subject], name: str) -> list[Subject]:
        """Returns the faces with the name `name` that are seen together with the faces `found`."""
        clips = {clip for x in found for clip in x.clips}
        films = [self._films[video] for video in {self._shown[clip].video for clip in clips}]
        together = {clip for pair in pair_seen_together(films) if {*pair} & clips for clip in pair}
        return [self._find(CLIP + clip) for clip in sorted(together) if self._name(clip) == name]

    def similar(self, name: str, of: Sequence[str]) -> str | None:
        """Returns an enrolled person not in `of` whose name is almost `name`, or None."""
        people = self._gallery.identities.keys() - {*of}
        if is_unknown(name) or normal_form(name) in people:
            return None
        letters = {_fold_letters(person): person for person in people}
        best = closest(_fold_letters(name), letters, 0.8)
        digits = [re.sub(r"\D", "", word) for word in (name, best or "")]
        return letters[best] if best and digits[0] == digits[1] else None

    def list_merged(self, name: str, of: Sequence[str]) -> list[str]:
        """Returns the people in `of` with names, if another person has the name `name` already."""
        people, name = self._gallery.identities, normal_form(name)
        return [x for x in of if x in people and x != name] if name in people else []

    def is_unclear(self, of: Sequence[str]) -> bool:
        """Returns whether one of the people or faces `of` is an unclear face without a name."""
        unknown = self._decision.unknown
        names = {unknown.get(key.removeprefix(CLIP), key) for key in of}
        return any(name.startswith(FACE) for name in names)

    def undo(self, version: int | None = None) -> str:
        """Undoes the last change; returns the person, or the key of the face, that it changed.

        `version` is the version of the page. Raises OutdatedError if this page shows another last
        change. Raises UserError if there is no change to undo.
        """
        with self._lock(version, [""]):
            if not self._steps:
                raise UserError("there is no change to undo")
            step = self._steps[-1]
            self._apply(step.clips, step.denied, step.numbers)
            self._steps.pop()
            self._changed[""] = self.version
            self._forms = Forms(message=f"Undone: {step.words}.", at=step.at)
            return step.at

    def has_person(self, name: str) -> bool:
        """Returns whether the page shows a known or unknown person with this name."""
        return name in self._decision.people or name in self._clips_of

    def save_later(self) -> None:
        """Waits for a second. If there was no change in this second, writes the results."""
        version = self.version
        while self._saved < version:
            time.sleep(IDLE_SECONDS)
            if version < self.version:
                return
            try:
                self.save(wait=0.0)
            except InUseError:  # `vidjax who` is running: try again
                continue
            except (Expected, OSError):  # the server saves again when it ends
                return

    def save(self, wait: float = who.WAIT_SECONDS) -> None:
        """Writes the results if names have changed since the results were last written.

        Raises InUseError if another program uses the folder of results for longer than `wait`.
        """
        with files.lock(self._out, "out", wait=wait):
            self.refresh()
            version, decision = self.version, self._decision
            if version > self._saved:
                who.write(self._out, decision, self._padding)
                self._saved = version

    def _find(self, of: str) -> Subject:
        """Returns the person or the face `of`."""
        clip = of.removeprefix(CLIP)
        if clip != of and (x := self._shown.get(clip)):
            return Subject(of, [clip], x.identity or IGNORED, is_person=False)
        clips = [*self._clips_of.get(of, ()), *self._decision.people.get(of, ())]
        if not clips:
            raise UserError(f"'{of}' is no longer on the page: reload the page, and choose again")
        return Subject(of, sorted(clips), of, is_person=True)

    def _describe(self, found: Sequence[Subject], name: str) -> str:
        """Returns the subject of a sentence, and its verb. A person `name` is left out.

        It describes each person, and the given faces of each appearance.
        """
        words = [x.name for x in found if x.is_person]
        clips = {x.key.removeprefix(CLIP): None for x in found if not x.is_person}
        for x in {self._shown[clip].clips: self._shown[clip] for clip in clips}.values():
            film = self._films[x.video]
            tracks = [y for y in film.tracks if y.clip in clips and y.clip in x.clips]
            start, end = min(y.start_s for y in tracks), max(y.end_s for y in tracks)
            time = format_appearance_time(x._replace(start_s=start, end_s=end), film)
            words.append(f"a face in {x.video}" if film.photo else f"{x.video}, {time},")
        words = [x for x in words if x != name] or [name]
        return f"{words[0]} and {len(words) - 1} more are" if words[1:] else f"{words[0]} is"

    def _find_group(self, name: str) -> str:
        """Returns the name in lower case. Raises UserError if no unknown person has this name."""
        group = name.casefold()
        if group not in self._decision.unknown.values():
            raise UserError(
                f"'{name}' is not an unknown person on this page: type the person's name instead"
            )
        return group

    def _find_enrolled(self, clips: Iterable[str]) -> set[str]:
        """Returns the names in `clips` that belong to enrolled clips.

        The name of an enrolled clip is left out if a clip of a replaced film has it now.
        """
        vectors = self._decision.vectors
        return {*find_known(self._gallery.state, vectors.only({*clips}))} if vectors else set()

    def _label(self, found: Sequence[Subject], name: str | None) -> dict[str, StoredClip | None]:
        """Returns clip -> new entry of the gallery, in which the subjects have the name `name`.

        Clips without a usable face are left out. If `name` is None, the enrolled clips become clips
        of a stranger, and other clips are left out.
        """
        vectors, enrolled = self._decision.vectors, self._gallery.clips
        people = self._gallery.identities
        clips = {clip for x in found for clip in x.clips}
        known = {clip for x in found if x.is_person and x.name in people for clip in x.clips}
        known |= self._find_enrolled(clips - known)
        new = select_usable_clips(vectors.only(clips - known)) if vectors and name else {}
        old = {clip: enrolled[clip] for clip in known}
        return {clip: entry._replace(identity=name) for clip, entry in (new | old).items()}

    def _move(self, found: Sequence[Subject], about: str, after: str, group: str = "") -> None:
        """Takes faces out of people, and joins people, so that all are the unknown person `group`.

        If `group` is "", the faces of each person become a new unknown person. `about` begins the
        description of the change.
        """
        people = [x.name for x in found if x.is_person]
        joined = {parse_group_number(self._find_group(x)) for x in [*people, group] if group}
        if people and not group:
            raise UserError(
                f"'{people[0]}' is a person: choose an appearance that does not show {people[0]}"
            )
        clips_of: dict[str, set[str]] = {}
        for x in found:
            clips_of.setdefault(x.name, set()).update(x.clips)
        denied: dict[str, Mapping[str, list[str]]] = {}
        numbers = self._decision.numbers
        for name, clips in clips_of.items():
            places = {clip: self._digest_of[clip] for clip in clips}
            if not group and len(clips) == len(self._clips_of.get(name, ())):
                raise UserError(f"these are all faces of {name}: select only the wrong faces")
            number = min(joined, default=0)
            numbers = (
                numbers.move(places, number, joined - {number})
                if group
                else numbers.take_out(places)
            )
            if name in self._decision.people:
                for digest, names in self._deny(clips, name).items():
                    denied[digest] = {**denied.get(digest, {}), **names}
        entries = dict.fromkeys(self._find_enrolled(set().union(*clips_of.values())))
        known, names = self._shown, " or ".join(clips_of)
        words = f"{about} {group or f'not {names}'}"
        self._finish(words, found, after, entries, denied, numbers)
        if not group:
            about = f"Saved: {words}, but {self._name(found[0].clips[0])}."
            for name in denied and clips_of:
                about += self._describe_rivals(clips_of[name], name, known)
            self._forms = self._forms._replace(message=about)

    def _deny(self, clips: Iterable[str], name: str) -> dict[str, dict[str, list[str]]]:
        """Returns the denied names of clips with the name `name` added, by digest of the film."""
        denied: dict[str, dict[str, list[str]]] = {}
        for clip in clips:
            if digest := self._digest_of.get(clip):
                old = self._gallery.denied.get(digest, {}).get(clip, ())
                denied.setdefault(digest, {})[clip] = [*old, name]
        return denied

    def _name(self, clip: str) -> str:
        return (x.identity if (x := self._shown.get(clip)) else None) or IGNORED

    def _describe_rivals(
        self, clips: Collection[str], name: str, before: Mapping[str, Appearance]
    ) -> str:
        """Returns a sentence about faces that got `name`, because `clips` have lost it."""
        shots = {(x.video, self._shot_of[clip]) for clip in clips if (x := self._shown.get(clip))}
        found = [
            x for clip, x in self._shown.items()
            if x.identity == name and (x.video, self._shot_of[clip]) in shots
            and (clip not in before or before[clip].identity != name)
        ]  # fmt: skip
        if not found:
            return ""
        time = format_appearance_time(found[0], self._films[found[0].video])
        return f" Another face of the same shot now has the name {name}: {found[0].video}, {time}."

    def _put(
        self, clips: Mapping[str, StoredClip | None], denied: Denials
    ) -> tuple[dict[str, StoredClip | None], Denials]:
        """Replaces entries and denied names of the gallery; returns the old values.

        The entry None means "no entry".
        """
        before = {clip: self._gallery.clips.get(clip) for clip in clips}
        with self._gallery.change() as draft:
            draft.remove(clip=[clip for clip, entry in before.items() if entry])
            draft.add({clip: entry for clip, entry in clips.items() if entry})
            return before, draft.deny(denied)

    def _apply(
        self,
        clips: Mapping[str, StoredClip | None],
        denied: Denials,
        numbers: UnknownNumbers,
    ) -> tuple[dict[str, StoredClip | None], Denials]:
        """Changes the gallery, and decides all names again; returns the old values, see `_put`.

        If the names cannot be decided, the gallery is not changed.
        """
        before = self._put(clips, denied)
        try:
            decision = self._decide(numbers, self._decision.films, self._decision)
        except BaseException:  # a full disk, or too few strangers for `fpir`
            self._put(*before)
            self._decision = self._decision._replace(digest=self._gallery.digest)
            raise
        self._show(decision)
        return before

    def _finish(
        self,
        words: str,
        found: Sequence[Subject],
        after: str,
        clips: Mapping[str, StoredClip | None],
        denied: Denials = MappingProxyType({}),
        numbers: UnknownNumbers | None = None,
    ) -> None:
        """Applies a change that can be undone, and shows its description `words` on the page.

        `found` are the changed people and faces. `clips` is clip -> new entry of the gallery, or
        None to remove the clip. `denied` are the new denied names of clips. `numbers` replace the
        contents of `unknown.json`. For `after`, see `change`.
        """
        before = self._decision.numbers
        old = self._apply(clips, denied, numbers or before)
        self._steps.append(Step(words, found[0].key, *old, before))
        self._changed[""] = self.version
        self._forms = Forms(message=f"Saved: {words}.", at=after)


def _fold_letters(name: str) -> str:
    """Returns the letters and digits of a name in lower case, without accents and blanks."""
    return "".join(filter(str.isalnum, strip_accents(name)))


def _find_source(film: MediaFile) -> Path | None:
    """Returns the path of a film or photo, or None if it is missing or has changed."""
    # A malicious folder of results may name any file of this disk as a film, but the folder cannot
    # contain the right size, time and inode of the file. So this file is not sent.
    path = film.source.path
    return path if path.is_file() and FileStamp.of(path) == film.source else None


class _Pages:
    """Answers the requests of a browser. All paths begin with `/TOKEN/`. TOKEN is a secret."""

    def __init__(self, review: Review, token: str):
        self._review, self._token = review, token
        self._lock = threading.Lock()
        self._decoding = asyncio.Semaphore(MOST_DECODED)

    def _check(self, request: Request) -> None:
        """Raises HTTPException if the secret word, the host, or the origin of a change is wrong."""
        given = request.path_params["token"]
        is_right = hmac.compare_digest(given.encode(), self._token.encode())
        if not (is_right and web.is_local(request.headers)):
            raise HTTPException(HTTPStatus.NOT_FOUND, "Open the address that vidjax printed.")
        if request.method == "POST" and not web.is_same_site(request.headers):
            raise HTTPException(HTTPStatus.FORBIDDEN, "Make changes only on the page of vidjax.")

    def show(self, request: Request) -> Response:
        """Answers with the page of names, for all films, or for one film or person in the query."""
        self._check(request)
        with self._lock:
            self._review.refresh()
            page = self._review.render(_read_view(request.query_params))
        return HTMLResponse(page, headers=HEADERS)

    def _find_film(self, request: Request) -> Path:
        self._check(request)
        number = request.path_params["number"]
        if re.fullmatch("[0-9]{1,9}", number) and (path := self._review.film(int(number))):
            return path
        about = "The film is missing or has changed. Put it back, or call vidjax who again."
        raise HTTPException(HTTPStatus.NOT_FOUND, about)

    def play(self, request: Request) -> Response:
        """Answers with a page that plays a film from the time `t` in the query, in seconds."""
        path, query = self._find_film(request), request.query_params
        seconds = float(query["t"]) if re.fullmatch(r"\d{1,9}(\.\d)?", query.get("t", "")) else 0.0
        address = f"../film/{request.path_params['number']}#t={seconds:.1f}"
        about = (
            f"{path.name}, from {format_time(seconds, short=True)}. If it does not play, your "
            f"browser does not support its format. Open it in a player, such as VLC: {path}"
        )
        back = '<p><a href="../">All people and films</a></p>'
        return _make_note(
            path.name, about, back + f'<video src="{address}" controls autoplay></video>'
        )

    def send_film(self, request: Request) -> Response:
        path = self._find_film(request)
        with path.open("rb") as file:
            start = file.read(SNIFF_BYTES)
        kinds = (kind for first, kind in TYPES.items() if re.match(first, start, re.DOTALL))
        return FileResponse(
            path, media_type=next(kinds, "application/octet-stream"), headers=SANDBOX
        )

    def send_picture(self, request: Request) -> Response:
        self._check(request)
        path = self._review.picture(request.path_params["picture"])
        if path is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "This page does not exist.")
        return FileResponse(path, media_type="image/png", headers=SANDBOX)

    async def send_frame(self, request: Request) -> Response:
        self._check(request)
        # Pictures that wait take no thread. Otherwise, the page would wait for them, too.
        async with self._decoding:
            await request.body()  # raises ClientDisconnect if the user has gone on to another face
            try:
                picture = await run_in_threadpool(self._review.frame, request.path_params["clip"])
            except UserError:
                picture = None
        if picture is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "The picture cannot be decoded.")
        return Response(picture, media_type="image/jpeg", headers=SANDBOX)

    async def change(self, request: Request) -> Response:
        """Applies the change in a form, or undoes the last change."""
        self._check(request)
        form = await _read_form(request)
        return await run_in_threadpool(self._apply, form, request.url.path.endswith("/undo"))

    def _apply(self, fields: Sequence[tuple[str, str]], back: bool) -> Response:
        """Applies the change in a form. If `back` is True, undoes the last change instead."""
        review, form = self._review, dict(fields)
        of = [value for name, value in fields if name == "of"]
        typed, action = form.get("person") or form.get("new", ""), form.get("do", "")
        if "not" in form:  # the button of a suggested name
            typed, action = form["not"], "deny"
        name, after = " ".join(typed.split()), form.get("next", "")
        name = "" if action == "deny" and "not" not in form else name
        view = _read_view(dict(urllib.parse.parse_qsl(form.get("view", ""))))
        problem = Forms(at="".join(of[:1]), next=after, of=of, typed=typed)
        status, asks = HTTPStatus.UNPROCESSABLE_ENTITY, action == "name" and "person" in form
        with self._lock:
            try:
                version = form.get("version", "")
                version = int(version) if re.fullmatch("[0-9]{1,9}", version) else -1
                if back:
                    changed = review.undo(version)
                    if "person" in view and not review.has_person(view["person"]):
                        view["person"] = changed  # the person was renamed
                elif asks and (other := review.similar(name, of)):
                    problem = problem._replace(asked=True, similar=other)
                    raise UserError(f"there is already {other}: is it the same person?")
                elif asks and (merged := review.list_merged(name, of)):
                    problem = problem._replace(asked=True)
                    raise UserError(f"there is already {name}. Is {merged[0]} the same person?")
                elif asks and name and not is_unknown(name) and review.is_unclear(of):
                    problem = problem._replace(asked=True)
                    raise UserError("unclear faces of two people look alike. Are you sure?")
                else:
                    review.change(action, of, name, after, version)
                    if action == "name" and [view.get("person")] == of:
                        view["person"] = name
            except (Expected, OSError) as error:
                if isinstance(error, OutdatedError):
                    status = HTTPStatus.CONFLICT
                about = f"Nothing was changed: {describe_system_error(error) or error}"
                page = review.render(view, problem._replace(message=about))
                return HTMLResponse(page, status, HEADERS)
        place = f"./?{urllib.parse.urlencode(view)}" if view else "./"
        headers, later = {"Location": place, **HEADERS}, BackgroundTask(review.save_later)
        return Response(None, HTTPStatus.SEE_OTHER, headers, background=later)


def _read_view(query: Mapping[str, str]) -> dict[str, str]:
    """Returns the parameters of a URL that choose what the page shows, see `Forms.url_query`."""
    view = {name: query[name] for name in ("film", "person", "find") if query.get(name)}
    if re.fullmatch("[1-9][0-9]{0,8}", query.get("first", "")):
        view["first"] = query["first"]
    return view


def make_app(review: Review, token: str) -> Starlette:
    """Returns the web application that serves the page of names at `/TOKEN/` of this machine."""
    pages = _Pages(review, token)

    def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return _make_note("vidjax", error.detail, status=error.status_code)
        about = describe_system_error(error) or str(error)
        return _make_note("vidjax", about, status=HTTPStatus.SERVICE_UNAVAILABLE)

    return Starlette(
        routes=[
            Route("/favicon.ico", lambda _: Response(status_code=HTTPStatus.NO_CONTENT)),
            Route("/{token}/", pages.show),
            Route("/{token}/play/{number}", pages.play),
            Route("/{token}/film/{number}", pages.send_film),
            Route("/{token}/frame/{clip}", pages.send_frame),
            Route("/{token}/change", pages.change, methods=["POST"]),
            Route("/{token}/undo", pages.change, methods=["POST"]),
            Route("/{token}/{picture:path}", pages.send_picture),
        ],
        # If the browser has closed the connection (ClientDisconnect), the answer reaches nobody.
        exception_handlers=dict.fromkeys(
            (HTTPException, ClientDisconnect, Expected, OSError), refuse
        ),
    )


def _make_note(title: str, about: str, more: str = "", status: int = HTTPStatus.OK) -> Response:
    """Returns a page that shows the text `about` below the HTML `more`."""
    policy = "default-src 'none'; media-src 'self'; style-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" '
        f'content="light dark"><title>{html.escape(title)}</title><style>body {{ font: 1rem/1.5 '
        "system-ui, sans-serif; overflow-wrap: anywhere; background: Canvas; color: CanvasText; } "
        "h1 { font-size: 1.4rem; } a { display: inline-block; line-height: 2; } "
        "video { max-width: 100%; }</style>"
        f"<main><h1>{html.escape(title)}</h1>{more}<p>{html.escape(about)}</p></main></html>"
    )
    return HTMLResponse(page, status, {"Content-Security-Policy": policy, **HEADERS})


async def _read_form(request: Request) -> list[tuple[str, str]]:
    """Reads the fields of a form from a request; refuses forms of more than 200 kB."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > FORM_BYTES:
            raise HTTPException(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The name is too long: type a shorter name."
            )
    return urllib.parse.parse_qsl(body.decode(errors="replace"))


def serve_review(review: Review) -> who.WhoResults:
    """Serves the page on which a user corrects names, until Ctrl-C; returns the final results."""
    token = secrets.token_urlsafe(16)
    with web.listen(HOST, 0) as listener:
        messages.print_text(f"http://{HOST}:{listener.getsockname()[1]}/{token}/")
        messages.print_text("Open this address in a browser on this machine. Stop with Ctrl-C.")
        try:
            web.serve(make_app(review, token), listener)
        finally:
            try:
                review.save()
            except InUseError:  # all changes are in the gallery and in `unknown.json`
                messages.print_text("vidjax who is still running: it writes the tables at its end.")
        return review.done
