"""Applies the names and corrections in the log `said.jsonl` to the faces in films and photos.

`vidjax.apps.said` describes the log, in which users name and correct faces. A face in the log is
found again by its film, time and box. So it does not matter which nets have found the faces, and
which names the clips have.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vidjax.apps import earlier_said, said as said_lib
from vidjax.apps.features_folder import FaceTrack, MediaFile
from vidjax.apps.gallery.answers import UNKNOWN, parse_group_number
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.said import ONCE, Face, Line
from vidjax.apps.video.subtitles import format_time
from vidjax.apps.video.tracks import measure_overlaps
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import IGNORED

LEAST_OVERLAP = 0.1  # intersection over union of the boxes of a face by two nets
LEAST_SHARE = 0.5  # of the shorter track, for which both tracks last
NEAR_SECONDS = 1.0  # within this time, a face hardly moves
Key = str | Face  # a clip, or a face that no present clip shows


class FacePath(NamedTuple):
    """The boxes of a face at several times of a film, or the only box in a photo."""

    start_s: float
    end_s: float
    times: np.ndarray  # [N] seconds, increasing
    boxes: np.ndarray  # [N, 4]: left, top, right, bottom

    @classmethod
    def of_track(cls, track: FaceTrack) -> "FacePath":
        """Returns the times and boxes of the face in a track: one person in one shot of a film."""
        places = track.places
        if not places and track.box:
            places = [(track.start_s if track.box_at_s is None else track.box_at_s, track.box)]
        times, boxes = zip(*places, strict=True) if places else ((), ())
        array = np.array(boxes, float).reshape(len(times), 4)
        return cls(track.start_s, track.end_s, np.array(times, float), array)

    @classmethod
    def of_face(cls, face: Face) -> "FacePath":
        """Returns the times and boxes of a face that the log `said.jsonl` describes."""
        places = face.places or ((face.at, face.box),)
        times, boxes = (np.array(x, float) for x in zip(*places, strict=True))
        boxes[:, 2:] += boxes[:, :2]
        return cls(times[0], times[-1], times, boxes)


def match(faces: Iterable[Face], films: Iterable[MediaFile]) -> dict[Face, list[str]]:
    """Finds the clips in `films` that show `faces`; returns face -> names of clips, the best first.

    A face that no clip shows is left out. The clips found for a face do not overlap in time.
    """
    asked = group_by_key((face.film, face) for face in dict.fromkeys(faces))
    found: dict[Face, list[str]] = {}
    for film in films:
        if film.sha256 in asked:
            present = {face: [clip] for clip, face in film.faces.items()}
            known = {face: present[face] for face in asked[film.sha256] if face in present}
            others = [face for face in asked[film.sha256] if face not in present]
            found |= known | (_match_paths(others, film.tracks) if others else {})
    return found


def _match_paths(faces: Sequence[Face], tracks: Sequence[FaceTrack]) -> dict[Face, list[str]]:
    """Compares times and boxes of faces and tracks; returns face -> clips of the face's tracks."""
    path_of = {face: FacePath.of_face(face) for face in faces}
    paths = [FacePath.of_track(track) for track in tracks]
    pairs = [
        (measure_overlap(path_of[face], path), face, number)
        for face in faces for number, path in enumerate(paths)
        if path.start_s <= path_of[face].end_s and path_of[face].start_s <= path.end_s
    ]  # fmt: skip
    pairs = sorted((x for x in pairs if x[0]), key=lambda x: (-x[0], x[2]))
    owner, chosen = dict[int, Face](), dict[Face, list[int]]()

    def choose(face: Face, number: int) -> None:
        first = owner.setdefault(number, face)  # faces that overlap may have the same track
        if first == face or measure_overlap(path_of[face], path_of[first]):
            chosen.setdefault(face, []).append(number)

    for _, face, number in pairs:
        if face not in chosen:
            choose(face, number)
    for _, face, number in pairs:  # parts of a divided track are at different times
        known = [paths[x] for x in chosen.get(face, ())]
        path = paths[number]
        if known and all(x.end_s < path.start_s or path.end_s < x.start_s for x in known):
            choose(face, number)
    return {face: [tracks[x].clip for x in numbers] for face, numbers in chosen.items()}


def measure_overlap(old: FacePath, new: FacePath) -> float:
    """Returns how long and how closely two paths overlap, or 0 if they overlap too little.

    The result is the common time in seconds, multiplied by the mean intersection over union of the
    boxes.
    """
    seconds = min(old.end_s, new.end_s) - max(old.start_s, new.start_s)
    if seconds < LEAST_SHARE * min(old.end_s - old.start_s, new.end_s - new.start_s):
        return 0.0
    times, known = old.times, new.times
    if not len(times) or not len(known):
        return 0.0
    near = np.abs(times - times.clip(known[0], known[-1])) <= NEAR_SECONDS
    sides = [np.interp(times[near], known, side) for side in new.boxes.T]
    overlaps = measure_overlaps(old.boxes[near], np.stack(sides, axis=1)).diagonal()
    mean = float(overlaps.mean()) if near.any() else 0.0
    return (seconds + 1e-3) * mean * (mean >= LEAST_OVERLAP)  # photos have no duration


class Lost(NamedTuple):
    """A name or correction without effect: its face is not in the present films and photos."""

    video: str
    time: str  # such as 00:03:12.500
    correction: str  # such as `Ada`, `not Ada` or `unknown 3`


class Said:
    """The names and corrections that users gave to faces, from the log `said.jsonl`.

    If log lines contradict each other, the last line counts. In `names` and the other dicts, the
    key of a face is a clip that shows it. If no clip shows it, the key is the `Face` in the log.
    """

    def __init__(
        self,
        lines: Iterable[Line] = (),
        films: Iterable[MediaFile] = (),
        numbers: Mapping[Face, int] = {},
    ):
        """Applies each of `lines`, from first to last, to the faces in `films`.

        `numbers` is face -> number of the unknown person before the corrections: 3 for `unknown 3`.
        """
        lines = [*drop_undone(lines)]
        faces = [x for line in lines for x in (line.face, line.of) if isinstance(x, Face)]
        self._found = match([*faces, *numbers], films)
        self.names: dict[Key, str | None] = {}  # None stands for a stranger
        self.denied: dict[Key, set[str]] = {}
        # Ignored faces -> whether a person who is enrolled later is named.
        self.ignored: dict[Key, bool] = {}
        self.numbers: dict[Key, int] = {}  # of the unknown people
        self.fixed = set[int]()  # the clips of these numbers certainly are one person
        self.apart = set[tuple[int, int]]()  # numbers of people who certainly differ
        self.numbered = set[Key]()  # faces whose numbers the log has changed
        self.renames = list[dict[str, str]]()  # old name -> new name, in order
        self.highest = max((line.number or 0 for line in lines), default=0)
        self._line_of: dict[Key, Line] = {}
        for face, number in numbers.items():
            self.numbers |= dict.fromkeys(self.find(face), number)
        self.given = dict(self.numbers)  # without the corrections
        steps = itertools.groupby(enumerate(lines), lambda pair: pair[1].when or pair[0])
        for step in ([line for _, line in pairs] for _, pairs in steps):
            # Two people may exchange their names in one step.
            self._rename({str(x.person): str(x.of) for x in step if x.says == "rename"})
            for line in step:
                if line.face:
                    self._apply(line, self.find(line.face))

    def find(self, face: Face) -> list[Key]:
        """Returns the clips that show `face`, the best clip first; [`face`] without a clip."""
        return [*self._found.get(face, [face])]

    def label(self, key: Key, person: str) -> str | None:
        """Returns the name of a face in a photo after the corrections; None for a stranger.

        `key` is the clip, such as `people/Ada/IMG_1`. `person` is the name before the corrections:
        the name of the photo's folder, or the name in a face tag.
        """
        if key in self.names:
            return self.names[key]
        for names in self.renames:
            person = names.get(person, person)
        return person

    def list_named(self, name: str | None) -> list[Key]:
        """Returns the keys of the faces with the name `name`; [] if `name` is None."""
        return [key for key, x in self.names.items() if x and x == name]

    def list_denied(self, name: str | None) -> list[Key]:
        """Returns the keys of the faces with the correction `not NAME`; [] if `name` is None."""
        return [key for key, names in self.denied.items() if name in names]

    def repeat(self, keys: Iterable[Key], says: str, name: str | None) -> list[Line]:
        """Returns a new log line for each face in `keys`, for example after a person was renamed.

        Each face must have an earlier line in the log. `says` is "is" if the faces show the person
        `name`, or "not" if they do not. A `name` of None stands for a stranger.
        """
        lines = (self._line_of[key] for key in keys)
        return [
            said_lib.about(face, says, of=name, video=line.video)
            for line in lines if (face := line.face)
        ]  # fmt: skip

    def list_lost(self, unread: Collection[str]) -> list[Lost]:
        """Returns the names and corrections of faces that no clip of the films shows.

        `unread` are the sha256 of films and photos that the current nets have not read yet. Faces
        in these files are left out, because the nets may find the faces later.
        """
        lost = list[Lost]()
        for key, line in self._line_of.items():
            if isinstance(key, str) or key.film in unread:
                continue
            words = [self.names[key] or IGNORED] if key in self.names else []
            words += [IGNORED] * (key in self.ignored)
            words += [f"not {name}" for name in sorted(self.denied.get(key, ()))]
            words += [f"{UNKNOWN}{self.numbers[key]}"] if key in self.numbered else []
            lost += [Lost(line.video, format_time(key.at), word) for word in words]
        return lost

    def _rename(self, names: Mapping[str, str]) -> None:
        if not names:
            return
        self.renames.append(dict(names))
        for key, name in self.names.items():
            self.names[key] = name and names.get(name, name)
        for key, denied in self.denied.items():
            self.denied[key] = {names.get(name, name) for name in denied}

    def _apply(self, line: Line, keys: Sequence[Key]) -> None:
        self._line_of |= dict.fromkeys(keys, line)
        for key in keys:
            if line.says != "not" or self.names.get(key, ()) == line.of:
                self.names.pop(key, None)
                self.ignored.pop(key, None)
        if line.says == "not":
            for key in keys:
                self.denied.setdefault(key, set()).add(str(line.of))
        elif line.says == "is":
            self.names[keys[0]] = None if line.of is None else str(line.of)
        elif line.says == "ignore":
            self.ignored |= dict.fromkeys(keys, line.of == ONCE)
        elif line.says in ("same", "apart") and line.number:
            self._move(line, keys, line.number)

    def _move(self, line: Line, keys: Sequence[Key], number: int) -> None:
        """Notes that faces show the unknown person `number`, as the log line `line` says.

        The faces are `keys` and all faces of `line.person`. Pairs of numbers of different people
        are added to `self.apart`.
        """
        is_new = number not in self.numbers.values()
        whole = parse_group_number(line.person) if line.person else 0
        moved = {*keys, *(key for key, x in self.numbers.items() if x == whole)}
        old = {self.numbers[key] for key in moved if key in self.numbers}
        if isinstance(line.of, Face) and line.says == "apart":
            old |= {self.numbers[key] for key in self.find(line.of) if key in self.numbers}
        self.numbers |= dict.fromkeys(moved, number)
        self.numbered |= moved
        divided = (old & {*self.numbers.values()}) - {number, whole}
        pairs = self.apart | {(x, number) for x in divided}
        if is_new:  # a new person also differs from people who differ from the old person
            pairs |= {(x, number) for pair in self.apart if {*pair} & divided for x in pair}
        new = dict.fromkeys(old - divided, number)
        renamed = ((new.get(x, x), new.get(y, y)) for x, y in pairs)
        self.apart = {(min(pair), max(pair)) for pair in renamed if pair[0] != pair[1]}
        self.fixed = {new.get(x, x) for x in self.fixed} | divided | {number}


def read_for(gallery: Gallery, films: Iterable[MediaFile]) -> Said:
    """Returns the names and corrections of faces in `films` from the log of `vidjax who`.

    If `vidjax who` did not make the gallery, there is no log, and the result is empty.
    """
    out = gallery.folder.parent
    if said_lib.has_log(out):
        return Said(said_lib.read(out), films)
    is_earlier = earlier_said.read_numbers(out) is not None
    return Said(earlier_said.list_lines(out, gallery.state) if is_earlier else (), films)


def drop_undone(lines: Iterable[Line]) -> Iterator[Line]:
    """Yields the lines of the log that were not undone. Undoing may be undone, too."""
    lines, undone = [*lines], set[str]()
    for line in reversed(lines):
        if line.says == "undo" and line.film is None and line.when not in undone:
            undone.add(str(line.of))
    return (x for x in lines if not (x.when and x.when in undone) and (x.film or x.says != "undo"))
