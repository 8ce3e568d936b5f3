"""Replays the log `said.jsonl`: who the faces in films and photos are, as people said."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from vidjax.apps.gallery.answers import UNKNOWN
from vidjax.apps.video import log
from vidjax.apps.video.faces import find_first, match
from vidjax.apps.video.log import Line
from vidjax.apps.video.media import PEOPLE, Face, MediaFile
from vidjax.utils.messages import format_time
from vidjax.utils.names import IGNORED

Key = str | Face  # a clip, or a face that no present clip shows


class Lost(NamedTuple):
    """A name or correction without effect: its face is not in the present films and photos."""

    video: str
    time: str  # such as 00:03:12.500
    correction: str  # such as `Ada`, `not Ada` or `unknown 3`


class Said:
    """What people said about faces, after all lines of the log.

    If log lines contradict each other, the last line counts. In `names` and the other dicts, the
    key of a face is a clip that shows it. If no clip shows it, the key is a `Face` of the log.
    Names are the present names of people. Methods take and return the keys of people, see `log`.
    """

    def __init__(self, lines: Iterable[Line] = (), media: Iterable[MediaFile] = ()):
        """Applies each of `lines`, from first to last, to the faces in the films and photos."""
        lines = [*lines]
        kept = [*log.drop_undone(lines)]
        self._found = match((line.face for line in kept if line.face), media)
        spoken = (line.face for line in kept if line.face and line.says != "guess")
        self._first = find_first(face for face in spoken if face not in self._found)
        self.denied: dict[Key, set[str]] = {}
        # Ignored faces -> whether a person who is enrolled later is named.
        self.ignored: dict[Key, bool] = {}
        self.numbered = set[Key]()  # faces whose numbers people have changed
        self.films = {(line.film, line.of) for line in kept if line.says == "film"}
        # Face -> name of the photo's folder or face tag -> last line that says `photo`.
        self.photos: dict[Key, dict[str, Line]] = {}
        # Digest of a photo, and name of its folder or tag -> person, also of photos that are gone.
        self.photo_of: dict[tuple[str | None, str], str] = {}
        self.highest = max((line.number or 0 for line in lines), default=0)
        self._joined: dict[str, str] = {}  # person -> another key of the person
        self._name: dict[str, str] = {}  # person -> name
        self._number: dict[str, int] = {}  # unknown person -> number
        self._told: dict[Key, str | None] = {}  # face -> person, or None for a stranger
        self._not: dict[Key, list[str]] = {}
        self._unknown: dict[Key, str] = {}  # face -> unknown person
        self._members: dict[str, set[Key]] = {}  # unknown person -> faces
        self._fixed = set[str]()  # unknown people whom a user has corrected
        self._apart = set[tuple[str, str]]()
        self._line_of: dict[Key, Line] = {}  # the last line of a user about a face
        self._face_of: dict[Key, Face] = {}  # the face of the last guess
        for line in kept:
            self._apply(line)
        people = {*self._told.values()} | {x for of in self._not.values() for x in of}
        people |= {x.person for x in self.list_photos()}
        roots = {self.find_root(x) for x in people if x}
        names = (x for x in lines if x.says == "person" and x.person and x.name)
        for line in names:  # a name whose step was undone is better than none
            if (root := self.find_root(str(line.person))) in roots:
                self._name.setdefault(root, str(line.name))
        self._describe()

    def _describe(self) -> None:
        """Translates keys of people to names and numbers, for the public fields."""
        told = ((key, person and self.call(person)) for key, person in self._told.items())
        self.names: dict[Key, str | None] = {key: name for key, name in told if name != ""}
        for key, people in self._not.items():
            if names := {*map(self.call, people)} - {""}:
                self.denied[key] = names
        # The unknown people of faces as numbers: 3 for `unknown 3`.
        self.numbers: dict[Key, int] = {}
        for key, person in self._unknown.items():
            if number := self._number.get(self.find_root(person)):
                self.numbers[key] = number
        fixed = {*map(self.find_root, self._fixed)}
        self.fixed = {number for x in fixed if (number := self._number.get(x))}
        pairs = ([self._number.get(x, 0) for x in pair] for pair in self._apart)
        self.apart = {(min(pair), max(pair)) for pair in pairs if 0 not in pair}

    # ---- people

    def find_root(self, person: str) -> str:
        """Returns the key of a person after people were joined."""
        while person in self._joined:
            person = self._joined[person]
        return person

    def call(self, person: str) -> str:
        """Returns the present name of a person, or "" if the person has no name."""
        return self._name.get(self.find_root(person), "")

    def find_people(self, name: str) -> list[str]:
        """Returns the keys of the people with this present name, the first person first."""
        return [x for x, found in self._name.items() if found == name and x not in self._joined]

    def find_unknown(self, number: int) -> str | None:
        """Returns the key of the unknown person with a number, or None."""
        people = (x for x, found in self._number.items() if found == number)
        return next((x for x in people if x not in self._joined), None)

    # ---- faces

    def find(self, face: Face) -> list[Key]:
        """Returns the clips that show `face`; [`face`] without a clip."""
        return [clip for of_file in self._find_files(face) for clip in of_file]

    def _find_files(self, face: Face) -> Sequence[Sequence[Key]]:
        """Returns the clips of `face` in each file, the best first; [[`face`]] without a clip."""
        return self._found.get(face) or [[self._first.get(face, face)]]

    def list_named(self, name: str | None) -> list[Key]:
        """Returns the faces with the name `name`; [] if `name` is None."""
        return [key for key, x in self.names.items() if x and x == name]

    def list_told(self, person: str) -> list[Key]:
        """Returns the faces that users said to show a person."""
        root, told = self.find_root(person), self._told.items()
        return [key for key, x in told if x and self.find_root(x) == root]

    def list_photos(self) -> list[Line]:
        """Returns the lines that say `photo`, and that still count."""
        return [x for of in self.photos.values() for x in of.values()]

    def list_enrolled(self) -> dict[str, str | None]:
        """Returns clip -> person, for the clips by which people are recognised; None: a stranger.

        A face in a photo shows the person of the photo's folder or face tag, unless a user has said
        something else. If a photo is in the folders of two people, it shows nobody.
        """
        enrolled = {key: name for key, name in self.names.items() if isinstance(key, str)}
        for key, photos in self.photos.items():
            people = {x.person and self.find_root(x.person) for x in photos.values()}
            if key in self.names or key in self.ignored or not isinstance(key, str):
                continue
            if len(people) == 1 and not any(x.unused for x in photos.values()):
                (person,) = people
                name = person and self.call(person)
                if name != "" and name not in self.denied.get(key, ()):
                    enrolled[key] = name
        return enrolled

    def list_spoken(self) -> Collection[Key]:
        """Returns the faces about which a user has said something."""
        return self._line_of.keys()

    def list_facts_of(self, key: Key, face: Face, video: str) -> Iterator[Line]:
        """Yields log lines that say about `face` what users said about the face `key`."""
        facts: list[tuple[str, dict[str, Any]]] = []
        if key in self.numbered:
            facts.append(("same", {"person": self.find_root(self._unknown[key])}))
        for person in dict.fromkeys(map(self.find_root, self._not.get(key, ()))):
            facts.append(("not", {"person": person}))
        if key in self._told:
            told = self._told[key]
            facts.append(("is", {"person": told and self.find_root(told)}))
        if key in self.ignored:
            facts.append(("ignore", {"once": self.ignored[key]}))
        return (log.about(face, says, video=video, **values) for says, values in facts)

    def list_lost(self, unread: Collection[str]) -> list[Lost]:
        """Returns the names and corrections of faces that no clip of the films shows.

        `unread` are the digests of films and photos that the current nets have not read yet. Faces
        in these files are left out, because the nets may find the faces later.
        """
        lost = list[Lost]()
        for key, line in self._line_of.items():
            if isinstance(key, str) or key.film in unread:
                continue
            words = [self.names[key] or IGNORED] if key in self.names else []
            words += [IGNORED] * (key in self.ignored)
            words += [f"not {name}" for name in sorted(self.denied.get(key, ()))]
            is_moved = key in self.numbered and key in self.numbers
            words += [f"{UNKNOWN}{self.numbers[key]}"] if is_moved else []
            lost += [Lost(line.video, format_time(key.at), word) for word in words]
        return lost

    # ---- replay

    def _apply(self, line: Line) -> None:
        person, face = line.person, line.face
        if line.says == "person" and person:
            if line.name is not None:
                self._name[self.find_root(person)] = line.name
            if line.number:
                self._number[self.find_root(person)] = line.number
        elif line.says == "merge" and person and line.other:
            self._merge(person, line.other)
            self._fixed.add(self.find_root(person))
        elif line.says == "apart" and person and line.other:
            self._separate({self.find_root(line.other)}, self.find_root(person))
        elif line.says == "gone":
            self._forget_photo(line)
        elif line.says == "photo" and face and line.name is not None:
            self.photo_of[line.film, line.name] = person or ""
            for key in [key for key in self.find(face) if is_photo(key)] or [face]:
                self.photos.setdefault(key, {})[line.name] = line
        elif line.says == "guess" and face and person:
            keys = [key for key in self.find(face) if key not in self.numbered]
            self._face_of |= dict.fromkeys(keys, face)
            self._move(keys, self.find_root(person))
        elif face:
            self._apply_to_face(line, face)

    def _apply_to_face(self, line: Line, face: Face) -> None:
        keys, person = self.find(face), line.person
        for key in keys:
            self._line_of.pop(key, None)  # the keys are in the order of their last lines
            self._line_of[key] = line
            told = self._told.get(key)
            denies = person and told and self.find_root(told) == self.find_root(person)
            if line.says != "not" or denies:
                self._told.pop(key, None)
                self.ignored.pop(key, None)
        if line.says == "is":
            self._told |= dict.fromkeys((clips[0] for clips in self._find_files(face)), person)
        elif line.says == "not" and person:
            for key in keys:
                self._not.setdefault(key, []).append(person)
        elif line.says == "ignore":
            self.ignored |= dict.fromkeys(keys, line.once)
        elif line.says == "same" and person:
            self._join(keys, self.find_root(person))

    def _forget_photo(self, line: Line) -> None:
        for key, photos in [*self.photos.items()]:
            name = str(line.name)
            if name in photos and photos[name].film == line.film:
                del photos[name]
                if not photos:
                    del self.photos[key]

    def _merge(self, person: str, other: str) -> None:
        person, other = self.find_root(person), self.find_root(other)
        if person == other:
            return
        self._joined[person] = other
        for facts in (self._name, self._number):
            if person in facts:
                facts.setdefault(other, facts[person])  # pyright: ignore[reportArgumentType]
        self._members.setdefault(other, set()).update(self._members.pop(person, ()))
        if person in self._fixed:
            self._fixed.add(other)
        pairs = (sorted(other if x == person else x for x in pair) for pair in self._apart)
        self._apart = {(one, two) for one, two in pairs if one != two}

    def _move(self, keys: Iterable[Key], person: str) -> None:
        for key in keys:
            if key in self._unknown:
                self._members.get(self.find_root(self._unknown[key]), set()).discard(key)
            self._unknown[key] = person
            self._members.setdefault(person, set()).add(key)

    def _join(self, keys: Sequence[Key], person: str) -> None:
        """Notes that faces certainly show the unknown person `person`.

        If the faces were taken out of another unknown person, the two people differ.
        """
        is_new = not self._members.get(person)
        old = {self.find_root(self._unknown[key]) for key in keys if key in self._unknown}
        self._move(keys, person)
        self.numbered.update(keys)
        self._fixed.add(person)
        left = {x for x in old - {person} if self._members.get(x)}
        for emptied in old - {person} - left:
            self._merge(emptied, person)
        before = {*self._apart}
        self._separate(left, person)
        if is_new:  # a new person also differs from people who differ from the old person
            self._separate({x for pair in before if {*pair} & left for x in pair}, person)

    def _separate(self, people: Iterable[str], person: str) -> None:
        for other in people:
            if other != person:
                self._apart.add((min(other, person), max(other, person)))
                self._fixed |= {other, person}

    # ---- the log anew

    def write_anew(self, without: Collection[str]) -> list[Line]:
        """Returns a log with the same content, but without the people with the keys `without`.

        The log contains the present names only. Of a face that was said to show a forgotten person,
        only denied names of other people remain. The first line has the highest number that an
        unknown person ever had, so that nobody gets the number again.
        """
        gone = {
            key for key, person in self._told.items()
            if person and self.find_root(person) in without
        }  # fmt: skip
        lines = [
            line for line in self._list_facts(gone)
            if not any(x and self.find_root(x) in without for x in (line.person, line.other))
        ]  # fmt: skip
        used = dict.fromkeys(x for line in lines for x in (line.person, line.other) if x)
        people = list[Line]()
        for person in used:
            if name := self.call(person):
                people.append(Line(says="person", person=person, name=name))
            if number := self._number.get(person):
                people.append(Line(says="person", person=person, number=number))
        return [Line(says="begin", number=self.highest), *people, *lines]

    def _list_facts(self, gone: Collection[Key]) -> Iterator[Line]:
        """Yields lines with everything that was said. Of the faces in `gone`, only denied names."""
        fixed = {*map(self.find_root, self._fixed)}
        yield from (Line(says="film", film=film, of=of) for film, of in sorted(self.films))
        for x in self.list_photos():
            person = x.person and self.find_root(x.person)
            yield msgspec.structs.replace(x, step=None, person=person)
        for key, line in self._line_of.items():
            facts = self.list_facts_of(key, line.face, line.video) if line.face else ()
            yield from (x for x in facts if x.says == "not" or key not in gone)
        for key, face in self._face_of.items():
            if key not in self.numbered and key not in gone:
                yield log.about(face, "guess", person=self.find_root(self._unknown[key]))
        yield from (Line(says="merge", person=x, other=x) for x in sorted(fixed))
        yield from (Line(says="apart", person=x, other=y) for x, y in sorted(self._apart))


def is_photo(key: Key) -> bool:
    """Returns whether a clip is a face in a photo of a person, not in a film of the tables."""
    return isinstance(key, Face) or key.startswith(f"{PEOPLE}/")
