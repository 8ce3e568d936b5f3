"""Applies a user's corrections of names to a folder of results of `vidjax who`.

Each correction is written as lines of the log `said.jsonl`, see `vidjax.apps.said`.
"""

import contextlib
import functools
import itertools
import re
import shlex
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from vidjax.apps import features_folder, said
from vidjax.apps.features_folder import NUMBERS, THUMBNAILS, FileStamp, MediaFile, SeenClip
from vidjax.apps.forget import forget, list_roots
from vidjax.apps.gallery.answers import FACE, UNKNOWN, parse_group_number, rank_group
from vidjax.apps.gallery.changes import check_person
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.vectors import select_usable_clips
from vidjax.apps.said import Line
from vidjax.apps.video import people_photos, results, still, who
from vidjax.apps.video.decision import WAIT_SECONDS, Decision, decide, lock_changes
from vidjax.apps.video.names_page import CLIP, Forms, format_appearance_time
from vidjax.apps.video.naming import Appearance, pair_seen_together
from vidjax.utils import files
from vidjax.utils.errors import Expected, InUseError, UserError, closest
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import IGNORED, is_unknown, normal_form, strip_accents

MOST_LEFT = 20  # places that a message about a forgotten person lists
IDLE_SECONDS = 1.0  # the results are written after this time without another change


class OutdatedError(UserError):
    """A user made a change on a page whose names are out of date."""


class Step(NamedTuple):
    """A change of names that a user can undo."""

    words: str  # a description of the change
    at: str  # the changed person, or the key of the changed face
    lines: Sequence[Line]  # of the log
    # Clip -> person before the change, for clips of a renamed person that are not in the log.
    clips: Mapping[str, str | None]

    def is_about(self, person: str) -> bool:
        """Returns whether the change was made for a person, or mentions the person."""
        return person == self.at or any(person in (x.of, x.person) for x in self.lines)


class Subject(NamedTuple):
    """A person or a face on the page, whose name a user changes."""

    key: str
    clips: Sequence[str]
    name: str  # of the person, or IGNORED
    is_person: bool  # False for a face


# An appearance, the next appearance of the person, if any, and the number of its film.
Seen = tuple[Appearance, Appearance | None, int]


class Review:
    """Applies a user's corrections to the names in a folder of results.

    Other programs may change the results at the same time. So each change first locks the names,
    and reads what other programs have changed. The lock ends after the change is written.
    """

    def __init__(
        self,
        out: Path,
        decision: Decision | None = None,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        padding: float = results.PADDING_SECONDS,
    ):
        """Opens the folder of results `out`.

        `decision` are the names that a call of `vidjax who` has just decided. If it is None, the
        names are decided again. This needs only the folder, but no films, photos or nets. `fpir`
        and `threshold` decide when a face gets a name, see `Gallery.identify`. In timelines,
        `padding` seconds are added before and after each appearance.
        """
        files.refuse_links(out)
        self._padding = padding
        self._out, self._gallery = out, Gallery(out / "gallery")
        self._identify = functools.partial(self._gallery.identify, fpir=fpir, threshold=threshold)
        self._steps: list[Step] = []
        self._lines = said.read(out)
        self.version = self._saved = 0  # number of changes. Undoing a change counts as a change
        # A person, the key of a face, or "" for the last step -> version of the last change.
        self._changed: dict[str, int] = {}
        self._forms = Forms()
        self._stamp: FileStamp | None = None  # of the last `unknown.json` that was read
        if decision is None:
            with lock_changes(out):
                films = features_folder.read_media_files(out / said.FEATURES)
                decision = self._decide(self._lines, films, None)
        self._set_films(decision.films)
        self._set_names(decision)

    def _set_films(self, films: Sequence[MediaFile]) -> None:
        self._films = {film.video: film for film in films}
        self._tracks = {track.clip: track for film in films for track in film.tracks}
        self._face_of = {  # of each clip
            clip: SeenClip(x, film.video) for film in films for clip, x in film.faces.items()
        }

    def _set_names(self, decision: Decision) -> None:
        self._decision = decision
        # Clip -> appearance on the page, and unknown person -> clips.
        self._shown = {clip: x for x in decision.appearances for clip in x.clips}
        self._clips_of = group_by_key((name, clip) for clip, name in decision.unknown.items())

    def _show(self, decision: Decision) -> None:
        """Puts the names in `decision` on the page, and records which people and faces changed."""
        before = {(clip, self._name(clip)) for clip in self._shown}
        self._set_names(decision)
        for clip, name in before ^ {(clip, self._name(clip)) for clip in self._shown}:
            self._changed |= dict.fromkeys((CLIP + clip, name), self.version + 1)
        self.version += 1  # last, because another thread may read the version before the names

    @contextlib.contextmanager
    def _lock(
        self, version: int | None = None, keys: Collection[str] = (), wait: float = WAIT_SECONDS
    ) -> Iterator[None]:
        """Locks the names for a `with` block. First reads the changes of other programs.

        `version` is the version of the page on which the user has made a change. Raises
        OutdatedError if one of the people or faces `keys` has changed since this version. If
        `version` is None, this is not checked. Raises InUseError if another program holds the lock
        for `wait` seconds.
        """
        with lock_changes(self._out, wait):
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
        """Decides all names anew if another program has changed names or films.

        The caller must hold `lock_changes`.
        """
        shown, films = self._decision, self._decision.films
        last, lines = shown, said.read(self._out)
        if self._stat() != self._stamp:
            films = features_folder.read_media_files(self._out / said.FEATURES)
            is_known = {x.digest for x in films} == {x.digest for x in shown.films}
            last = shown if is_known else None
        if not last or lines != self._lines or self._gallery.digest != shown.digest:
            decision = self._decide(lines, films, last)
            self._lines = lines
            self._set_films(films)
            self._show(decision)

    def _decide(
        self, lines: Sequence[Line], films: Sequence[MediaFile], last: Decision | None
    ) -> Decision:
        return decide(self._gallery, self._out, films, self._identify, last, lines)

    def refresh(self) -> None:
        """Decides all names anew if another program has changed names or films.

        If another program holds the lock of the names at this moment, does nothing.
        """
        with contextlib.suppress(InUseError), self._lock(wait=0.0):
            pass

    @property
    def done(self) -> who.WhoResults:
        """The results of `vidjax who` after all changes."""
        return who.WhoResults(self._decision.count_clips(), self._decision, {})

    def film(self, number: int) -> Path | None:
        """Returns the path of the film at index `number`, or None if it is missing or changed."""
        films = self._decision.films
        return _find_source(films[number]) if number < len(films) else None

    def list_seen(self, number: int, at_s: float) -> list[Seen]:
        """Returns the people who appear in film `number` at the time `at_s` in seconds.

        Each item is an appearance, the next appearance of the same person, and the number of the
        film with the next appearance. Without a next appearance, the last two are None and 0.
        """
        numbers = {x.video: place for place, x in enumerate(self._decision.films) if not x.photo}
        shown = (x for x in self._decision.appearances if x.identity and x.video in numbers)
        of = group_by_key((x.identity, x) for x in shown)
        return [
            (x, later, numbers[later.video] if later else 0)
            for group in of.values() for x, later in itertools.zip_longest(group, group[1:])
            # The address of an appearance has its start with one digit after the point.
            if numbers[x.video] == number and x.start_s - 0.1 < at_s < max(x.end_s, x.start_s + 0.1)
        ]  # fmt: skip

    def frame(self, clip: str) -> bytes | None:
        """Returns the whole picture in which a clip has its best face, as a JPEG file.

        The picture is decoded from the film or photo. If the film or photo is missing or has
        changed, returns None.
        """
        x, track = self._shown.get(clip), self._tracks.get(clip)
        # In the meantime, another program may have changed the films.
        film = self._films.get(x.video) if x else None
        if not (film and track and (path := _find_source(film))):
            return None
        return still.read_still(path, track.box_at_s or track.start_s, film.jumps)

    def picture(self, address: str) -> Path | None:
        """Returns the path of a face's thumbnail, or None if there is no such file.

        `address` is the path of the thumbnail in the folder of results.
        """
        path = self._out / address
        inside = path.is_relative_to(self._out) and ".." not in path.parts
        inside = inside and path.parent.parent.name == THUMBNAILS
        return path if inside and path.suffix == ".png" and files.is_file(path) else None

    def render(self, view: Mapping[str, str], problem: Forms | None = None) -> str:
        """Returns the page of names as HTML. `view` chooses what is shown, see `_read_view`.

        `problem` is the state of the forms after a change that was refused. If it is None, and the
        user has just made a change, the page says what was changed.
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

        return results.render_page(self._out, self._decision, address, forms)

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
          action: the kind of the change.
            "name": all people and faces get the name `name`.
            "deny": the suggested name `name` is wrong, and is not suggested again.
            "apart", or "deny" without `name`: the faces of a name become a new unknown person.
            "ignore": people and faces are shown as ignored, without a name.
            "once": all unknown people who appear only once are ignored.
            "show": ignored faces are shown again. IGNORED in `of` means all ignored faces.
            "join": all people and faces become one unknown person, with the lowest number.
            "twin": faces get the name of another face in the same picture, as in a mirror.
          of: the names of people, and the keys of faces, that are changed.
          name: the new name. If it is `unknown 4`, the people and faces join this unknown person.
          after: the person or face whose name the page asks for next.
          version: the version of the page on which the user has made the change.

        Raises:
          OutdatedError: one of the people or faces has changed since this version.
          UserError: one of `of` is not on the page, or the name is not allowed.
        """
        keys = {*of, name.casefold()} if is_unknown(name) else of
        with self._lock(version, keys):
            of = self._list_seen_once() if action == "once" else of
            if action == "show" and IGNORED in of:
                of = [CLIP + clip for clip, x in self._shown.items() if not x.identity]
            found = [self._find(key) for key in dict.fromkeys(of)]
            if not found:
                raise UserError("nobody is selected: select people or faces first")
            if action == "twin":
                name = self._find_twin(found)
                found += self._list_rivals(found, name)
            elif action == "join":
                unknown = [x.name for x in found if is_unknown(x.name)]
                if not unknown:
                    raise UserError("all selected people have names: type the name to give to all")
                name = min(unknown, key=rank_group)
            subject, before = self._describe(found, name), self._shown
            is_apart = action == "apart" or (action == "deny" and not name)
            words, lines, clips = self._list_lines(action, found, name)
            identities = {clip: self._gallery.clips[clip].identity for clip in clips}
            step = Step(f"{subject} {words}", found[0].key, said.stamp(lines), identities)
            self._apply(step.lines, dict.fromkeys(clips, words))
            self._steps.append(step)
            self._changed[""] = self.version
            about = self._describe_apart(found, before) if is_apart else "."
            after = found[0].key if action == "deny" and name else after
            self._forms = Forms(message=f"Saved: {step.words}{about}", at=after)

    def _list_lines(
        self, action: str, found: Sequence[Subject], name: str
    ) -> tuple[str, list[Line], Collection[str]]:
        """Prepares a change of people and faces. For `action` and `name`, see `change`.

        Returns a description of the change, such as `not Ada`; the log lines; and the enrolled
        clips that the log lines do not rename, see `_give_name`.
        """
        if action in ("ignore", "once"):
            return "ignored", self._ignore(found, said.ONCE if action == "once" else None), ()
        if action == "show":
            return "shown again", self._say(found, "undo"), ()
        if action == "deny" and name:
            if name not in self._decision.people:
                raise UserError(f"'{name}' is not a person on this page: reload the page")
            return f"not {name}", self._say(found, "not", of=name), ()
        if action in ("deny", "apart"):
            names = dict.fromkeys(x.name for x in found)
            return f"not {' or '.join(names)}", self._part(found), ()
        if action not in ("name", "twin", "join") or not name:
            raise UserError("the name is empty: type a name")
        if is_unknown(name):
            group = self._find_group(name)
            return group, self._join(found, parse_group_number(group)), ()
        name = check_person(name)
        return name, *self._give_name(found, name)

    def _ignore(self, found: Sequence[Subject], of: str | None) -> list[Line]:
        lines = self._say(found, "ignore", of=of)
        find = features_folder.FaceFinder(self._out)
        photos = {x for subject in found for x in subject.clips} - self._face_of.keys()
        seen = filter(None, map(find, sorted(photos)))
        return lines + [said.about(x.face, "is", video=x.video) for x in seen]

    def _give_name(self, found: Sequence[Subject], name: str) -> tuple[list[Line], set[str]]:
        """Returns new log lines, which say that people and faces have the name `name`.

        Also returns the enrolled clips that the log lines do not rename. The caller must rename
        these clips in the gallery. Raises UserError if `found` contains neither a known person nor
        a clear face.
        """
        people, vectors = self._decision.people, self._decision.vectors
        renamed = [x.name for x in found if x.is_person and x.name in people]
        faces = [x for x in found if x.name not in renamed or not x.is_person]
        clear = select_usable_clips(vectors) if vectors else ()
        faces = [x._replace(clips=[clip for clip in x.clips if clip in clear]) for x in faces]
        lines = [Line(says="rename", person=person, of=name) for person in renamed]
        lines += self._say(faces, "is", of=name)
        if not lines:
            raise UserError("no selected face is clear enough to get a name: select another face")
        known = self._decision.said.names.keys() | people_photos.list_faces(self._gallery).keys()
        return lines, {clip for person in renamed for clip in people[person]} - known

    def _say(self, found: Sequence[Subject], says: str, **values: Any) -> list[Line]:  # noqa: ANN401
        """Returns a log line about each face in `found`, except for faces in enrolled photos.

        `says` is the kind of the line, such as "is". `values` are the other fields of the line.
        """
        faces = (self._face_of.get(clip) for x in found for clip in x.clips)
        return [said.about(x.face, says, video=x.video, **values) for x in faces if x]

    def _list_seen_once(self) -> list[str]:
        seen = Counter(x.identity for x in self._decision.appearances)
        return [name for name in dict.fromkeys(self._decision.unknown.values()) if seen[name] == 1]

    def _find_twin(self, found: Sequence[Subject]) -> str:
        """Returns the name that a face in `found` lost to another face of the same time.

        Raises UserError if there is no such person.
        """
        names = (self._decision.twins.get(clip) for x in found for clip in x.clips)
        if (name := next(filter(None, names), None)) is None:
            raise UserError("the face resembles no named face in this picture: type a name")
        return name

    def _list_rivals(self, found: Sequence[Subject], name: str) -> list[Subject]:
        """Returns the faces with the name `name` that are visible together with one of `found`."""
        clips = {clip for x in found for clip in x.clips}
        films = [self._films[video] for video in {self._shown[clip].video for clip in clips}]
        together = {clip for pair in pair_seen_together(films) if {*pair} & clips for clip in pair}
        return [self._find(CLIP + clip) for clip in sorted(together) if self._name(clip) == name]

    def similar(self, name: str, of: Sequence[str]) -> str | None:
        """Returns an enrolled person whose name is almost `name`, as after a typing error, or None.

        People in `of` are left out. If a person is enrolled with exactly this name, returns None.
        """
        people = self._gallery.identities.keys() - {*of}
        if is_unknown(name) or normal_form(name) in people:
            return None
        letters = {_fold_letters(person): person for person in people}
        best = closest(_fold_letters(name), letters, 0.8)
        digits = [re.sub(r"\D", "", word) for word in (name, best or "")]
        return letters[best] if best and digits[0] == digits[1] else None

    def list_merged(self, name: str, of: Sequence[str]) -> list[str]:
        """Returns the people in `of` whom the new name `name` joins with an enrolled person."""
        people, name = self._gallery.identities, normal_form(name)
        return [x for x in of if x in people and x != name] if name in people else []

    def is_unclear(self, of: Sequence[str]) -> bool:
        """Returns whether `of` contains a face without a name that is too small or blurred."""
        unknown = self._decision.unknown
        names = {unknown.get(key.removeprefix(CLIP), key) for key in of}
        return any(name.startswith(FACE) for name in names)

    def undo(self, version: int | None = None) -> str:
        """Undoes the last change; returns the person, or the key of the face, that it changed.

        `version` is the version of the page. Raises OutdatedError if the last change was made after
        this version. Raises UserError if there is no change to undo.
        """
        with self._lock(version, [""]):
            if not self._steps:
                raise UserError("there is no change to undo")
            step = self._steps[-1]
            self._apply(said.undo(step.lines), step.clips)
            self._steps.pop()
            self._changed[""] = self.version
            self._forms = Forms(message=f"Undone: {step.words}.", at=step.at)
            return step.at

    def forget(self, person: str, version: int | None = None) -> None:
        """Deletes all data of a person, as the command `vidjax forget --delete` does.

        The features of the person's photos are deleted, too. This cannot be undone. The next page
        lists files that still contain the name. `version` is the version of the page on which the
        user has chosen the person.
        """
        with self._lock(version, [person]):
            if person not in (people := self._decision.people):
                raise UserError(f"'{person}' is no longer on the page: reload the page")
            places = features_folder.locate_people(self._out)
            faces = [*filter(None, map(features_folder.PhotoFace.of, sorted(people[person])))]
            keys, photos = {x.key for x in faces}, people_photos.list_photo_files(self._out)
            left = {str(x.source.path): None for x in photos if keys & x.faces.keys()}
            clips = [str(clip) for clip in self._decision.said.list_named(person)]
            named = self._say([Subject(person, clips, person, is_person=True)], "undo")
            said.append(self._out, said.stamp(named))
            forget([person], (), [self._out], delete=True)
            self._steps = [x for x in self._steps if not x.is_about(person)]
            self._lines, shown = said.read(self._out), self._decision
            self._show(self._decide(self._lines, shown.films, shown))
            self._changed[""] = self.version
            kept = map(features_folder.PhotoFace.of, self._gallery.clips)
            for folder in {x.folder for x in faces} - {x.folder for x in kept if x}:
                features_folder.remove_features(places[folder])
        with contextlib.suppress(InUseError):  # `vidjax who` writes the results at its end
            self.save()
        for place in forget([person], (), list_roots([self._out]))[0]:
            left |= {str(place.path): None} if place.left else {}
        lines = [f"Saved: {person} is forgotten in this folder."]
        lines += ["Delete what still shows the name:", *[*left][:MOST_LEFT]] if left else []
        command = f"vidjax forget --identity={shlex.quote(person)} FOLDER"
        self._forms = Forms(message="\n".join([*lines, f"To search other folders: {command}"]))

    def has_person(self, name: str) -> bool:
        """Returns whether the page shows a known or unknown person with this name."""
        return name in self._decision.people or name in self._clips_of

    def save_later(self) -> None:
        """Writes the results after a second. If there is a change by then, a later call does it."""
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

    def save(self, wait: float = WAIT_SECONDS) -> None:
        """Writes the results if names have changed since the results were last written.

        Raises InUseError if another program uses the folder of results for `wait` seconds.
        """
        with files.lock(self._out, "out", wait=wait):
            self.refresh()
            version, decision = self.version, self._decision
            if version > self._saved:
                results.write(self._out, decision, self._padding)
                self._saved = version

    def _find(self, of: str) -> Subject:
        """Returns the person or face whose name or key is `of`.

        Raises UserError if the page does not show this person or face any more.
        """
        clip = of.removeprefix(CLIP)
        if clip != of and (x := self._shown.get(clip)):
            return Subject(of, [clip], x.identity or IGNORED, is_person=False)
        clips = [*self._clips_of.get(of, ()), *self._decision.people.get(of, ())]
        if not clips and of not in self._decision.people:
            raise UserError(f"'{of}' is no longer on the page: reload the page, and choose again")
        return Subject(of, sorted(clips), of, is_person=True)

    def _describe(self, found: Sequence[Subject], name: str) -> str:
        """Returns the beginning of a sentence about `found`, as in `unknown 3 and 1 more are`.

        The person `name` is left out, unless `found` contains nobody else.
        """
        words = [x.name for x in found if x.is_person]
        clips = {x.key.removeprefix(CLIP): None for x in found if not x.is_person}
        for x in {self._shown[clip].clips: self._shown[clip] for clip in clips}.values():
            film = self._films[x.video]
            tracks = [self._tracks[clip] for clip in x.clips if clip in clips]
            start, end = min(y.start_s for y in tracks), max(y.end_s for y in tracks)
            time = format_appearance_time(x._replace(start_s=start, end_s=end), film)
            words.append(f"a face in {x.video}" if film.photo else f"{x.video}, {time},")
        words = [x for x in words if x != name] or [name]  # not `Ada is Ada`, if possible
        return f"{words[0]} and {len(words) - 1} more are" if words[1:] else f"{words[0]} is"

    def _find_group(self, name: str) -> str:
        """Returns `name`, the name of an unknown person such as `Unknown 3`, in lower case.

        Raises UserError if the page shows no unknown person with this name.
        """
        group = name.casefold()
        if group not in self._decision.unknown.values():
            raise UserError(f"this page has no unknown person '{name}': type another name")
        return group

    def _part(self, found: Sequence[Subject]) -> list[Line]:
        """Returns lines for the log, which say that the faces `found` have a wrong name.

        All faces with the same wrong name become one new unknown person.
        """
        lines, number = list[Line](), self._decision.numbers.highest
        for name, subjects in group_by_key((x.name, x) for x in found).items():
            clips = {clip for x in subjects for clip in x.clips}
            rest = sorted({*self._clips_of.get(name, ())} - clips)
            if any(x.is_person for x in subjects) or (name in self._clips_of and not rest):
                raise UserError(f"you selected all faces of '{name}': select only the wrong faces")
            number += 1
            other = self._face_of[rest[0]].face if rest else None
            own = self._find_number(clips) or number
            lines += self._say(subjects, "apart", number=own, of=other)
            lines += self._deny(subjects)
        return lines

    def _deny(self, found: Iterable[Subject]) -> list[Line]:
        """Returns new lines for the log, which say that the names of the faces `found` are wrong.

        Faces without the name of a known person are left out.
        """
        named = (x for x in found if x.name in self._decision.people)
        return [line for x in named for line in self._say([x], "not", of=x.name)]

    def _join(self, found: Sequence[Subject], group: int) -> list[Line]:
        """Returns new lines for the log that join people and faces into one unknown person.

        `found` are the unknown people and the faces to join, and `group` is the number of another
        unknown person to join. The joint person gets the lowest number.
        """
        numbers = {parse_group_number(self._find_group(x.name)) for x in found if x.is_person}
        numbers, lines = numbers | {group}, list[Line]()
        clip_of = {parse_group_number(x): clips[0] for x, clips in self._clips_of.items()}
        for number in sorted(numbers):
            face, video = self._face_of[clip_of[number]]
            person = f"{UNKNOWN}{number}" if lines else None
            values = {"of": lines[0].face if lines else face, "person": person, "video": video}
            lines.append(said.about(face, "same", number=min(numbers), **values))
        faces = [x for x in found if not x.is_person]
        lines += self._say(faces, "same", number=min(numbers), of=lines[0].face)
        return lines + self._deny(faces)

    def _find_number(self, clips: Collection[str]) -> int | None:
        """Returns the number of the unknown person who has exactly these clips, or None."""
        numbers = self._decision.said.numbers
        of = {number for clip in clips if (number := numbers.get(clip))}
        whole = {clip for clip, number in numbers.items() if number in of}
        return min(of) if len(of) == 1 and whole == {*clips} else None

    def _name(self, clip: str) -> str:
        return (x.identity if (x := self._shown.get(clip)) else None) or IGNORED

    def _describe_apart(self, found: Sequence[Subject], before: Mapping[str, Appearance]) -> str:
        """Returns the end of the message `a face in a.jpg is not Ada`, such as `, but unknown 7.`.

        If another face of the same shot is now named Ada instead of a face in `found`, a second
        sentence says so. `before` is clip -> appearance before the change.
        """
        about = f", but {self._name(found[0].clips[0])}."
        shot_of = {
            x.clip: (film.video, x.shot) for film in self._films.values() for x in film.tracks
        }
        for name in {x.name for x in found} & self._decision.people.keys():
            shots = {shot_of[clip] for x in found if x.name == name for clip in x.clips}
            rivals = (
                x for clip, x in self._shown.items()
                if x.identity == name and shot_of[clip] in shots
                and (clip not in before or before[clip].identity != name)
            )  # fmt: skip
            for x in [*rivals][:1]:
                place = f"{x.video}, {format_appearance_time(x, self._films[x.video])}"
                about += f" Another face of the same shot now has the name {name}: {place}."
        return about

    def _apply(self, lines: Sequence[Line], clips: Mapping[str, str | None]) -> None:
        """Adds `lines` to the log of corrections, and decides all names anew.

        `clips` is enrolled clip -> its new person in the gallery, None for a stranger. After an
        error, such as a full disk, nothing is changed.
        """
        # Another program may have removed a clip since the step that is undone.
        clips, shown = {x: clips[x] for x in clips if x in self._gallery.clips}, self._decision
        before = {clip: self._gallery.clips[clip].identity for clip in clips}
        try:
            self._relabel(clips)
            decision = self._decide([*self._lines, *lines], shown.films, shown)
            numbered = [_number_again(line, decision) for line in lines]
            if numbered != lines:
                lines = numbered
                decision = self._decide([*self._lines, *lines], shown.films, shown)
            said.append(self._out, lines)
        except BaseException:  # a full disk, or too few strangers for `fpir`
            self._relabel(before)
            with contextlib.suppress(Expected, OSError):
                self._decision = self._decide(self._lines, self._decision.films, self._decision)
            raise
        self._lines = [*self._lines, *lines]
        self._show(decision)

    def _relabel(self, clips: Mapping[str, str | None]) -> None:
        with self._gallery.change(log=False) as draft:
            for clip, name in clips.items():
                if draft.clips[clip].identity != name:
                    draft.relabel(clip, name)


def _number_again(line: Line, decision: Decision) -> Line:
    """Gives an "apart" line the number of its face in `decision`; returns other lines unchanged."""
    if line.says != "apart" or not (face := line.face):
        return line
    groups = (decision.unknown.get(str(clip)) for clip in decision.said.find(face))
    group = next(filter(None, groups), None)
    number = parse_group_number(group) if group else line.number
    return msgspec.structs.replace(line, number=number)


def _fold_letters(name: str) -> str:
    """Returns the letters and digits of a name in lower case, without accents."""
    return "".join(filter(str.isalnum, strip_accents(name)))


def _find_source(film: MediaFile) -> Path | None:
    """Returns the path of a film or photo, or None if it is missing or has changed."""
    # A malicious folder of results may name any file of this disk as a film, but the folder cannot
    # contain the right size, time and inode of the file. So this file is not sent.
    path = film.source.path
    return path if path.is_file() and FileStamp.of(path) == film.source else None
