"""Applies a user's corrections of names to a folder of results of `vidjax who`.

A correction becomes lines of the log `said.jsonl`, see `log`.
"""

import contextlib
import itertools
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec

from vidjax.apps.gallery import card_notes
from vidjax.apps.gallery.answers import FACE, parse_group_number, rank_group
from vidjax.apps.gallery.changes import check_person
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import heirs, log, media, results, still, who
from vidjax.apps.video.decide import Decision, Rule, decide, list_new_lines
from vidjax.apps.video.log import Line
from vidjax.apps.video.media import FEATURES, PEOPLE, THUMBNAILS, FileStamp, MediaFile
from vidjax.apps.video.names_page import CLIP, Forms, format_appearance_time
from vidjax.apps.video.naming import Appearance, pair_seen_together
from vidjax.apps.video.said import Said
from vidjax.apps.video.subtitles import format_span
from vidjax.apps.video.who import WAIT_SECONDS
from vidjax.utils import files
from vidjax.utils.errors import Expected, InUseError, UserError, closest
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import IGNORED, is_unknown, normal_form, strip_accents

IDLE_SECONDS = 1.0  # the results are written after this time without another change
MOST_LEFT = 20  # places that a message about a forgotten person lists
Search = Callable[[Path, str], Iterable[Path]]  # (folder of results, person) -> files


class Step(NamedTuple):
    """A change of names that a user can undo."""

    words: str  # a description of the change
    at: str  # the changed person, or the key of the changed face
    step: str | None  # of the lines of the log; None if the change needed no line


class Subject(NamedTuple):
    """A person or a face on the page, whose name a user changes."""

    key: str
    clips: Sequence[str]
    name: str  # of the person, or IGNORED
    is_person: bool  # False for a face


class Review:
    """Applies a user's corrections to the names in a folder of results.

    Other programs may change the results at the same time. So each change first locks the names,
    and reads what other programs have changed. The lock ends after the change is written.
    """

    def __init__(
        self,
        out: Path,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        padding: float = results.PADDING_SECONDS,
        search: Search = lambda out, person: (),
    ):
        """Opens the folder of results `out`, and decides the names.

        This needs only the folder, but no films, photos or nets. `fpir` and `threshold` decide when
        a face gets a name, see `Gallery.identify`. In timelines, `padding` seconds are added before
        and after each appearance. `search` finds the files in a folder of results that still show a
        forgotten person.
        """
        files.refuse_links(out)
        self._padding, self._rule, self._search = padding, Rule(fpir, threshold), search
        self.out, self.lines = out, log.read(out)  # of the log; refuses earlier versions
        self._gallery = Gallery(out / results.GALLERY)
        self._steps: list[Step] = []
        self.version = self._saved = 0  # number of changes. Undoing a change counts as a change
        self.waiting = 0  # number of changes that are not yet made
        # A person, the key of a face, or "" for the last step -> version of the last change.
        self._changed: dict[str, int] = {}
        self._message = self._at = ""  # of the next page, see `Forms`
        with log.lock(out, WAIT_SECONDS):
            self.lines, self._stamps = log.read(out), self._read_stamps()
            faces = results.load_faces(out, self._gallery.state)
            self._set_names(self._write_numbers(decide(faces, self.lines, self._rule)))
        self._heirs = heirs.find_heirs(self._decision)

    def _write_numbers(self, decision: Decision, lines: Sequence[Line] = ()) -> Decision:
        """Adds `lines` and the new numbers of unknown people to the log; returns the decision."""
        log.append(self.out, [*lines, *(new := list_new_lines(decision))])
        self.lines, self._stamps[0] = [*self.lines, *lines, *new], self._read_stamps()[0]
        if not new:
            return decision
        films = [*decision.faces.films, *decision.faces.photos]
        return decision._replace(said=Said(self.lines, films), guesses={})

    def _set_names(self, decision: Decision) -> None:
        self._decision = decision
        films = decision.films
        self._films = {film.video: film for film in films}
        self._film_of = {track.clip: film for film in films for track in film.tracks}
        self._tracks = {track.clip: track for film in films for track in film.tracks}
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
        UserError if one of the people or faces `keys` has changed since this version. If
        `version` is None, this is not checked. Raises InUseError if another program holds the lock
        for `wait` seconds.
        """
        with log.lock(self.out, wait):
            self._read_changes()
            latest = max((self._changed.get(key, 0) for key in keys), default=self.version)
            if version is not None and not latest <= version <= self.version:
                raise UserError("the page was out of date: repeat the change on this new page")
            yield

    def _read_stamps(self) -> list[FileStamp | None]:
        """Returns the properties of the log, and of the folders that list the films and photos.

        One of them differs after another program has changed names, films or photos.
        """
        folders = (self.out / of / media.VIDEOS for of in (FEATURES, PEOPLE))
        paths = (self.out / log.NAME, *folders)
        return [FileStamp.of(x) if files.exists(x) else None for x in paths]

    def _read_changes(self) -> None:
        """Decides all names anew if another program has changed names or films.

        The caller must hold the lock of the log.
        """
        stamps, last, faces = self._read_stamps(), self._decision, self._decision.faces
        if stamps == self._stamps:
            return
        if stamps[1:] != self._stamps[1:]:
            last, faces = None, results.load_faces(self.out, self._gallery.state)
        lines = log.read(self.out)
        decision = decide(faces, lines, self._rule, last)
        if lines[:1] != self.lines[:1]:  # the log was written anew, without steps
            self._steps = []
        self.lines, self._stamps = lines, stamps
        self._show(self._write_numbers(decision))
        if last is None:
            self._heirs = heirs.find_heirs(decision)

    def refresh(self) -> None:
        """Decides all names anew if another program has changed names or films.

        If another program holds the lock of the names at this moment, does nothing.
        """
        with contextlib.suppress(InUseError), self._lock(wait=0.0):
            pass

    @property
    def done(self) -> who.WhoResults:
        """The results of `vidjax who` after all changes."""
        card = card_notes.describe(self._decision.state)
        return who.WhoResults(self._decision.count_clips(), self._decision, {}, card=card)

    def film(self, video: str) -> Path | None:
        """Returns the path of a film or photo, or None if it is missing or has changed."""
        film = self._films.get(video)
        # A malicious folder of results may name any file of this disk as a film, but the folder
        # cannot contain the right size, time and inode of the file. So this file is not sent.
        if film and film.source.path.is_file() and film.source.is_valid:
            return film.source.path
        return None

    def list_seen(self, video: str, at_s: float) -> list[tuple[Appearance, Appearance | None]]:
        """Returns the people who appear in the film `video` at the time `at_s` in seconds.

        Each item is an appearance, and the next appearance of the same person in a film, or None.
        """
        shown = (x for x in self._decision.appearances if x.identity)
        of = group_by_key((x.identity, x) for x in shown if not self._films[x.video].photo)
        return [
            (x, later)
            for group in of.values() for x, later in itertools.zip_longest(group, group[1:])
            # The address of an appearance has its start with one digit after the point.
            if x.video == video and x.start_s - 0.1 < at_s < max(x.end_s, x.start_s + 0.1)
        ]  # fmt: skip

    def frame(self, clip: str) -> bytes | None:
        """Returns the whole picture in which a clip has its best face, as a JPEG file.

        The picture is decoded from the film or photo. If the film or photo is missing or has
        changed, returns None.
        """
        film, track = self._film_of.get(clip), self._tracks.get(clip)
        if not (film and track and (path := self.film(film.video))):
            return None
        return still.read_still(path, track.box_at_s or track.start_s, film.jumps)

    def picture(self, address: str) -> Path | None:
        """Returns the path of a face's thumbnail, or None if there is no such file.

        `address` is the path of the thumbnail in the folder of results.
        """
        path = self.out / address
        inside = path.is_relative_to(self.out) and ".." not in path.parts
        inside = inside and path.parent.parent.name == THUMBNAILS
        return path if inside and path.suffix == ".png" and files.is_file(path) else None

    def render(self, forms: Forms) -> str:
        """Returns the page of names as HTML. `forms` chooses what is shown.

        After a change that was refused, `forms` also has its fields, and a message. Without a
        message, and if the user has just made a change, the page says what was changed.
        """
        if not forms.message:
            forms = forms._replace(message=self._message, at=self._at)
        self._message = self._at = ""
        forms = forms._replace(
            version=self.version, last=self._steps[-1].words if self._steps else "",
            offers=[(x.key, x.about) for x in self._list_offers()],
        )  # fmt: skip

        def address(film: MediaFile, seconds: float) -> str:
            video = quote(film.video, safe="")
            return f"film?film={video}" if film.photo else f"play?film={video}&t={seconds:.1f}"

        note = card_notes.describe(self._decision.state)
        return results.render_page(self.out, self._decision, address, note, forms)

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
            "apart": the name of the faces is wrong. They become a new unknown person.
            "ignore": people and faces are shown as ignored, without a name.
            "once": all unknown people who appear only once are ignored.
            "show": ignored faces are shown again. IGNORED in `of` means all ignored faces.
            "join": all people and faces become one unknown person, with the lowest number.
            "take": films take over corrections of other films; `of` are keys, see `heirs.Heir`.
            "twin": faces get the name of another face in the same picture, as in a mirror.
          of: the names of people, and the keys of faces, that are changed.
          name: the new name. If it is `unknown 4`, the people and faces join this unknown person.
          after: the person or face whose name the page asks for next.
          version: the version of the page on which the user has made the change.

        Raises:
          UserError: one of `of` is not on the page, or has changed since this version, or the name
            is not allowed.
        """
        keys = {*of, name.casefold()} if is_unknown(name) else of
        with self._lock(version, keys):
            of = self._list_seen_once() if action == "once" else of
            if action == "show" and IGNORED in of:
                of = [CLIP + clip for clip, x in self._shown.items() if not x.identity]
            if action == "take":
                self._take_over(of)
                return
            found = [self._find(key) for key in dict.fromkeys(of)]
            if not found:
                raise UserError("nobody is selected: select people or faces first")
            if action == "twin":
                twins, clips = self._decision.twins, [clip for x in found for clip in x.clips]
                name = next((twins[clip] for clip in clips if clip in twins), "")
                found += self._list_rivals(found, name)
            elif action == "join":
                unknown = [x.name for x in found if is_unknown(x.name)]
                if not unknown:
                    raise UserError("all selected people have names: type the name to give to all")
                name = min(unknown, key=rank_group)
            subject, before = self._describe(found, name), self._shown
            words, lines = self._list_lines(action, found, name)
            self._save_step(f"{subject} {words}", found[0].key, lines)
            self._at = found[0].key if action == "deny" else after
            if action == "apart":
                about = self._describe_apart(found, before)
                self._message = f"{self._message.removesuffix('.')}{about}"

    def _save_step(self, words: str, at: str, lines: Sequence[Line]) -> None:
        """Adds a step to the log that the user can undo; the next page then shows a message.

        `words` and `at` are as in `Step`.
        """
        self._steps.append(Step(words, at, self._apply(log.make_step(lines))))
        self._message = f"Saved: {words}."

    def _take_over(self, keys: Sequence[str]) -> None:
        """Takes over corrections, see `heirs`. `keys` are keys of offers, see `Heir.key`."""
        offers = [x for x in self._list_offers() if x.key in keys]
        if not offers:
            raise UserError("the film is no longer on the page: reload the page")
        for heir in offers:
            lines = heirs.take_over(self._decision, heir)
            self._save_step(f"{heir.about}, and has its corrections", "", lines)

    def _list_offers(self) -> list[heirs.Heir]:
        """Returns the films that may take over corrections, and have no corrections yet."""
        spoken = {*self._decision.said.list_spoken()}
        return [x for x in self._heirs if spoken.isdisjoint(x.clips.values())]

    def _list_lines(
        self, action: str, found: Sequence[Subject], name: str
    ) -> tuple[str, list[Line]]:
        """Prepares a change of people and faces. For `action` and `name`, see `change`.

        Returns a description of the change, such as `not Ada`, and the log lines.
        """
        if action in ("ignore", "once"):
            return "ignored", self._ignore(found, once=action == "once")
        if action == "show":
            return "shown again", self._say(found, "show")
        if action == "deny":
            if name not in self._decision.people:
                raise UserError(f"'{name}' is not a person on this page: reload the page")
            return f"not {name}", self._deny(found, name)
        if action == "apart":
            names = dict.fromkeys(x.name for x in found)
            return f"not {' or '.join(names)}", self._part(found)
        if action not in ("name", "twin", "join") or not name:
            raise UserError("the name is empty: type a name")
        if is_unknown(name):
            return name.casefold(), self._join(found, name.casefold())
        name = check_person(name)
        return name, self._give_name(found, name)

    def _ignore(self, found: Sequence[Subject], *, once: bool) -> list[Line]:
        """Returns new log lines: faces are ignored, and photos of people show strangers."""
        clips = {clip for x in found for clip in x.clips}
        return self._say(found, "ignore", once=once) + [
            log.about(face, "is", video=photo.video)
            for photo in self._decision.faces.photos
            for clip, face in photo.faces.items() if clip in clips
        ]  # fmt: skip

    def _give_name(self, found: Sequence[Subject], name: str) -> list[Line]:
        """Returns new log lines, which say that people and faces have the name `name`.

        Raises UserError if `found` contains neither a known person nor a clear face.
        """
        said, clear = self._decision.said, self._decision.faces.usable
        known = [x for x in found if x.is_person and x.name in self._decision.people]
        faces = [
            x._replace(clips=[clip for clip in x.clips if clip in clear])
            for x in found if x not in known
        ]  # fmt: skip
        owners = said.find_people(name)
        others = [key for x in known if x.name != name for key in said.find_people(x.name)]
        person = next(iter([*owners, *others]), None) or log.make_key()
        lines = [Line(says="person", person=person, name=name)] * (not owners)
        lines += [Line(says="merge", person=x, other=person) for x in others if x != person]
        told = self._say(faces, "is", person=person)
        if not told and not known:
            raise UserError("no selected face is clear enough to get a name: select another face")
        return lines + told

    def _say(self, found: Sequence[Subject], says: str, **values: Any) -> list[Line]:  # noqa: ANN401
        """Returns a log line about each face in `found`, except for faces in enrolled photos.

        `says` is the kind of the line, such as "is". `values` are the other fields of the line.
        """
        return [
            log.about(film.faces[clip], says, video=film.video, **values)
            for x in found for clip in x.clips
            if (film := self._film_of.get(clip)) and clip in film.faces
        ]  # fmt: skip

    def _list_seen_once(self) -> list[str]:
        seen = Counter(x.identity for x in self._decision.appearances)
        return [name for name in dict.fromkeys(self._decision.unknown.values()) if seen[name] == 1]

    def _list_rivals(self, found: Sequence[Subject], name: str) -> list[Subject]:
        """Returns the faces with the name `name` that are visible together with one of `found`."""
        clips = {clip for x in found for clip in x.clips}
        films = [self._films[video] for video in {self._shown[clip].video for clip in clips}]
        together = {clip for pair in pair_seen_together(films) if {*pair} & clips for clip in pair}
        return [self._find(CLIP + clip) for clip in sorted(together) if self._name(clip) == name]

    def find_question(self, name: str, of: Sequence[str]) -> tuple[str, str]:
        """Returns what a user must confirm before `of` get the name `name`, or "".

        The second text is a person with a similar name whom the user may mean, or "".
        """
        people, unknown = self._decision.state.people, self._decision.unknown
        if not name or is_unknown(name):
            return "", ""
        if normal_form(name) not in people:
            if similar := _find_similar(name, people.keys() - {*of}):
                return f"the similar name {similar} is taken: do you mean {similar}?", similar
        elif joined := next((x for x in of if x in people and x != normal_form(name)), None):
            return f"the name {name} is taken. Is {joined} the same person?", ""
        if any(unknown.get(key.removeprefix(CLIP), key).startswith(FACE) for key in of):
            return "the face is unclear, and may be somebody else. Are you sure?", ""
        return "", ""

    def undo(self, version: int | None = None) -> str:
        """Undoes the last change; returns the person, or the key of the face, that it changed.

        `version` is the version of the page. Raises UserError if the last change was made after
        this version, or if there is no change to undo.
        """
        with self._lock(version, [""]):
            if not self._steps:
                raise UserError("there is no change to undo")
            step = self._steps[-1]
            lines = [Line(says="undo", of=step.step)] if step.step else []
            self._apply(log.make_step(lines))
            self._steps.pop()
            self._message, self._at = f"Undone: {step.words}.", step.at
            return step.at

    def forget(self, person: str, version: int | None = None) -> None:
        """Deletes all data of a person, see the function `forget`. This cannot be undone.

        The next page lists photos and files that still show the person. `version` is the version of
        the page on which the user has chosen the person.
        """
        with self._lock(version, [person]):
            if person not in self._decision.people:
                raise UserError(f"'{person}' is no longer on the page: reload the page")
            photos = self._forget([person])
        left = dict.fromkeys([*photos, *map(str, self._search(self.out, person))])
        lines = [f"Saved: {person} is forgotten in this folder."]
        lines += ["Delete what still shows the name:", *[*left][:MOST_LEFT]] if left else []
        command = f"vidjax forget --identity={shlex.quote(person)} FOLDER"
        self._message = "\n".join([*lines, f"To search other folders: {command}"])

    def _forget(self, names: Collection[str]) -> list[str]:
        """Forgets people; returns the paths of their photos. The caller must hold the lock.

        The log, the gallery, the tables and the page are written. The features of photos that only
        show these people are deleted.
        """
        said, faces = self._decision.said, self._decision.faces
        gone = {person for name in names for person in said.find_people(name)}
        photos, kept = list[str](), list[MediaFile]()
        for photo in faces.photos:
            of = [x for clip in photo.faces for x in said.photos.get(clip, {}).values()]
            people = {x.person and said.find_root(x.person) for x in of}
            names_them = bool(people & gone or {x.name for x in of} & {*names})
            if names_them:
                photos.append(str(photo.source.path))
            if names_them and people <= gone:
                media.remove_media_file(self.out / PEOPLE, media.make_photo_stem(photo.sha256))
            else:
                kept.append(photo)
            if photo.tags & {*names}:
                media.remove_tags(self.out / PEOPLE, media.make_photo_stem(photo.sha256), names)
        lines = said.write_anew(gone)
        decision = decide(faces._replace(photos=kept), lines, self._rule)
        log.replace(self.out, lines)
        self._steps, self.lines = [], log.read(self.out)
        self._show(self._write_numbers(decision))
        self._save()
        return photos

    def has_person(self, name: str) -> bool:
        """Returns whether the page shows a known or unknown person with this name."""
        return name in self._decision.people or name in self._clips_of

    def save_later(self) -> None:
        """Writes the results after a second. If a change comes or waits, a later call does it."""
        version = self.version
        time.sleep(IDLE_SECONDS)
        if version == self.version and not self.waiting:
            with contextlib.suppress(Expected, OSError):  # the server saves again when it ends
                self.save()

    def save(self) -> None:
        """Writes the results if names have changed since the results were last written.

        Raises InUseError if another program changes names for WAIT_SECONDS.
        """
        with self._lock():
            self._save()

    def _save(self) -> None:
        if self.version > self._saved:
            results.write(self.out, self._gallery, self._decision, self._padding)
            self._saved = self.version

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
        faces = (x.clips[0] for x in found if not x.is_person)
        for x, clips in group_by_key((self._shown[clip], clip) for clip in faces).items():
            tracks = [self._tracks[clip] for clip in clips]
            start, end = min(y.start_s for y in tracks), max(y.end_s for y in tracks)
            place = f"{x.video}, {format_span(start, end)},"
            words.append(f"a face in {x.video}" if self._films[x.video].photo else place)
        words = [x for x in words if x != name] or [name]  # not `Ada is Ada`, if possible
        return f"{words[0]} and {len(words) - 1} more are" if words[1:] else f"{words[0]} is"

    def _part(self, found: Sequence[Subject]) -> list[Line]:
        """Returns lines for the log, which say that the faces `found` have a wrong name.

        All faces with the same wrong name become one new unknown person.
        """
        lines, number = list[Line](), self._decision.highest
        for name, subjects in group_by_key((x.name, x) for x in found).items():
            clips = {clip for x in subjects for clip in x.clips}
            rest = {*self._clips_of.get(name, ())} - clips
            if any(x.is_person for x in subjects) or (name in self._clips_of and not rest):
                raise UserError(f"you selected all faces of '{name}': select only the wrong faces")
            person = self._find_whole(clips)
            if not person:
                number, person = number + 1, log.make_key()
                lines.append(Line(says="person", person=person, number=number))
            lines += self._say(subjects, "same", person=person)
            lines += self._deny(subjects)
        return lines

    def _deny(self, found: Iterable[Subject], name: str = "") -> list[Line]:
        """Returns new lines for the log, which say that the names of the faces `found` are wrong.

        If `name` is given, it is the wrong name. Faces without the name of a known person are left
        out.
        """
        named = [(x, name or x.name) for x in found if (name or x.name) in self._decision.people]
        return [
            line for x, wrong in named for person in self._decision.said.find_people(wrong)
            for line in self._say([x], "not", person=person)
        ]  # fmt: skip

    def _join(self, found: Sequence[Subject], name: str) -> list[Line]:
        """Returns new lines for the log that join people and faces into one unknown person.

        `found` are the unknown people and the faces to join, and `name` is the name of another
        unknown person to join. The joint person gets the lowest number. Raises UserError if the
        page shows no unknown person with one of these names.
        """
        names = {name, *(x.name for x in found if x.is_person)}
        for other in names.difference(self._decision.unknown.values()):
            raise UserError(f"this page has no unknown person '{other}': type another name")
        numbers = sorted(map(parse_group_number, names))
        people = [*map(self._decision.said.find_unknown, numbers)]
        lines = [Line(says="merge", person=x, other=people[0]) for x in people]
        faces = [x for x in found if not x.is_person]
        lines += self._deny(faces)
        return lines + self._say(faces, "same", person=people[0])

    def _find_whole(self, clips: Collection[str]) -> str | None:
        """Returns the key of the unknown person who has exactly these clips, or None."""
        said = self._decision.said
        of = {said.numbers.get(clip, 0) for clip in clips}
        whole = {clip for clip, number in said.numbers.items() if number in of}
        return said.find_unknown(min(of)) if len(of) == 1 and whole == {*clips} else None

    def _name(self, clip: str) -> str:
        return (x.identity if (x := self._shown.get(clip)) else None) or IGNORED

    def _describe_apart(self, found: Sequence[Subject], before: Mapping[str, Appearance]) -> str:
        """Returns the end of the message `a face in a.jpg is not Ada`, such as `, but unknown 7.`.

        If another face at the same time is now named Ada, a second sentence says so. `before` is
        clip -> appearance before the change.
        """
        about = f", but {self._name(found[0].clips[0])}."
        for name, faces in group_by_key((x.name, x) for x in found).items():
            rivals = self._list_rivals(faces, name) if name in self._decision.people else []
            for x in (self._shown[y.clips[0]] for y in rivals):
                if before[x.clips[0]].identity != name:
                    place = f"{x.video}, {format_appearance_time(x, self._films[x.video])}"
                    return (
                        f"{about} Another face of the same shot now has the name {name}: {place}."
                    )
        return about

    def _apply(self, lines: Sequence[Line]) -> str | None:
        """Adds `lines`, a step, to the log, and decides all names anew; returns the id of the step.

        After an error, such as a full disk, nothing is changed.
        """
        shown = self._decision
        decision = decide(shown.faces, [*self.lines, *lines], self._rule, shown)
        numbered = _number_again(lines, decision)
        if numbered != lines:
            return self._apply(numbered)
        self._show(self._write_numbers(decision, lines))
        self._changed[""] = self.version
        return next((x.step for x in lines), None)


def forget(out: Path, names: Collection[str]) -> None:
    """Forgets people in the folder of results `out`: writes log, gallery, tables and page anew.

    `names` are present or earlier names. Raises UserError or OSError if a file cannot be written;
    the next call then repeats the work.
    """
    review = Review(out)
    with review._lock():
        review._forget(names)


def parse_name(review: Review, text: str) -> tuple[list[str], str]:
    """Reads a text such as `unknown 3=Ada`; returns ([present name], new name) for `change`.

    Raises UserError if the page shows nobody with the present name.
    """
    for sign in reversed([*re.finditer("=", text)]):  # names may contain `=`
        old, new = text[: sign.start()].strip(), text[sign.end() :].strip()
        if review.has_person(old):
            return [old], new
    raise UserError(
        f"--name={text}: the results show nobody with the name before the ="
        '\ngive a name in names.tsv and a new name, such as --name="unknown 3=Ada"'
    )


def _number_again(lines: Sequence[Line], decision: Decision) -> list[Line]:
    """Replaces new unknown people by the unknown people of their faces in `decision`.

    A face that was taken out of a person may look like another unknown person.
    """
    present = {x.person: x.person for x in lines if x.says == "person" and x.number}
    for line in lines:
        if line.says == "same" and line.person in present and line.face:
            groups = (decision.unknown.get(str(clip)) for clip in decision.said.find(line.face))
            keys = (decision.said.find_unknown(parse_group_number(x)) for x in groups if x)
            present[line.person] = next(filter(None, keys), line.person)
    return [
        msgspec.structs.replace(x, person=present.get(x.person, x.person)) for x in lines
        if x.says != "person" or present.get(x.person, x.person) == x.person
    ]  # fmt: skip


def _find_similar(name: str, people: Iterable[str]) -> str:
    """Returns a person whose name is almost `name`, as after a typing error, or ""."""

    def fold_letters(name: str) -> str:
        return "".join(filter(str.isalnum, strip_accents(name)))

    letters = {fold_letters(person): person for person in people}
    best = closest(fold_letters(name), letters, 0.8) or ""
    digits = [re.sub(r"\D", "", word) for word in (name, best)]
    return letters[best] if best and digits[0] == digits[1] else ""
