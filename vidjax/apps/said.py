"""The log of what people said about faces: `said.jsonl` in a folder of results of `vidjax who`.

A line is about a face. The sha256 of the film or photo, a time in seconds, and a box (left, top,
width and height, as fractions of the picture) identify the face. So a line stays true if nets, file
names or names of clips change. Lines are only added. A step is a single action of a user. All lines
of a step have the same time `when`. The field `says` of a line is one of these words:

    is      the face shows the person `of`, or if `of` is null, a stranger
    not     the face does not show the person `of`
    same    the face shows the unknown person `number`, as does the face `of`. If `person`, such as
            `unknown 7`, is given, all faces of `person` show the unknown person `number`, too
    apart   the face shows the unknown person `number`, who is not the person of the face `of`
    ignore  the face gets no name. If `of` is "once", only until the gallery knows the person
    rename  the person `person` is called `of` from now on
    undo    the step with the time `of` does not count. If `of` is null, earlier lines `is` and
            `ignore` about the face do not count
    forgotten  replaces the lines of a forgotten person
"""

import contextlib
import operator
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.json_files import Sha256, Share, Size, Text

if TYPE_CHECKING:
    from vidjax.apps.features_folder import FaceTrack

NAME = "said.jsonl"
ONCE = "once"  # see `ignore`
FEATURES, PEOPLE = "features", "people"  # folders in the results
MOST_BYTES = 256 * files.MB  # the largest log that is read
MOST_PLACES = 5  # of a face
LOCK_SECONDS = 20.0  # the longest time for which a new line waits for another program
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Box = tuple[Share, Share, Share, Share]  # left, top, width, height
ENCODER = msgspec.json.Encoder()
Places = Annotated[tuple[tuple[Seconds, Box], ...], Meta(max_length=100)]


class Face(Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A face: the sha256 of the film or photo, a time in seconds, and a box."""

    film: Sha256
    at: Seconds
    box: Box
    places: Places = ()  # further boxes of the face, in order of time


class Line(Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A line of the log: what a user said about a face. For the field `says`, see the module."""

    says: Literal["is", "not", "same", "apart", "ignore", "rename", "undo", "forgotten"]
    film: Sha256 | None = None
    at: Seconds = 0.0
    box: Box | None = None
    of: Text | Face | None = None
    person: Text | None = None
    number: Size | None = None
    places: Places = ()
    video: Text = ""  # the name of the film, for people who read the log
    when: Text = ""

    @property
    def face(self) -> Face | None:
        """The face that the line is about, or None."""
        if self.film is None or self.box is None:
            return None
        return Face(film=self.film, at=self.at, box=self.box, places=self.places)


def make_face(film: str, track: "FaceTrack") -> Face | None:
    """Returns the face in the clip `track`, or None if the box of the face is not known.

    `film` is the sha256 of the film or photo.
    """
    if track.box is None:
        return None
    places = track.places
    if len(places) > MOST_PLACES:
        last = len(places) - 1
        places = [places[round(n * last / (MOST_PLACES - 1))] for n in range(MOST_PLACES)]
    at = track.start_s if track.box_at_s is None else track.box_at_s
    rest = tuple((seconds, _to_size(box)) for seconds, box in places)
    return Face(film=film, at=at, box=_to_size(track.box), places=rest)


def _to_size(box: Sequence[float]) -> Box:
    """Returns left, top, width and height of a box with left, top, right and bottom."""
    left, top, right, bottom = box
    return left, top, round(max(right - left, 0.0), 6), round(max(bottom - top, 0.0), 6)


def about(face: Face, says: Any, **values: Any) -> Line:  # noqa: ANN401  (fields of `Line`)
    """Makes a line of the log about a face.

    `says` is the kind of the line, such as "is". `values` are further fields of `Line`.
    """
    return Line(says=says, **msgspec.structs.asdict(face), **values)


def stamp(lines: Iterable[Line]) -> list[Line]:
    """Sets the field `when` of all `lines` to the present time; returns the new lines.

    The equal time marks all `lines` as one step, a single action of the user.
    """
    when = datetime.now(UTC).isoformat(timespec="microseconds")
    return [msgspec.structs.replace(line, when=when) for line in lines]


def undo(lines: Sequence[Line]) -> list[Line]:
    """Returns a list with the log line that undoes the step `lines`; [] if `lines` is empty."""
    return stamp([Line(says="undo", of=lines[0].when)] if lines else [])


def read(out: Path) -> list[Line]:
    """Reads the log in a folder of results. Without a log, the result is empty.

    Raises UserError if a line is damaged. If a killed program has not finished the last line, this
    line is left out.
    """
    path, lines = out / NAME, list[Line]()
    if not files.exists(path):
        return lines
    *texts, end = files.read_bytes(path, MOST_BYTES).split(b"\n")
    for number, text in enumerate(texts + [end] * _is_whole(end), 1):
        try:
            lines += [msgspec.json.decode(text, type=Line)] if text.strip() else []
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"line {number} of '{path}' is damaged: {error}\nrepair or delete this line"
            ) from None
    return lines


def has_log(out: Path) -> bool:
    """Returns whether the folder `out` contains the log `said.jsonl`."""
    return files.exists(out / NAME)


def append(out: Path, lines: Sequence[Line]) -> None:
    """Adds lines to the log in the folder of results `out`. Makes the log if there is none."""
    if not lines and has_log(out):
        return
    with _lock(out), contextlib.closing(files.open_log(out / NAME)) as log:
        _end_last_line(out / NAME)
        files.append(log, ENCODER.encode_lines(lines))
        os.fsync(log.fileno())
    files.hide(out / NAME)


def forget(out: Path, person: str) -> int:
    """Replaces each log line that contains the name `person`. The new line has no content.

    Returns the number of replaced lines.
    """
    if not has_log(out):
        return 0
    with _lock(out):
        lines = read(out)
        kept = [Line(says="forgotten") if person in (x.of, x.person) else x for x in lines]
        gone = sum(map(operator.is_not, kept, lines))
        if gone:
            files.write_bytes(out / NAME, ENCODER.encode_lines(kept))
            files.hide(out / NAME)
    return gone


def _lock(out: Path) -> contextlib.AbstractContextManager[None]:
    return files.lock(out, "out", ".said.lock", wait=LOCK_SECONDS)


def _is_whole(text: bytes) -> bool:
    """Returns whether `text`, the end of a log without a line break, is a complete log line."""
    try:
        return bool(msgspec.json.decode(text))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


def _end_last_line(path: Path) -> None:
    """Adds the line break that the last line lacks, or removes the line if it is not valid JSON."""
    content = files.read_bytes(path, MOST_BYTES)
    begin = content.rfind(b"\n") + 1
    if end := content[begin:]:
        with files.open_regular(path, os.O_RDWR) as file:
            file.truncate(begin)
            file.seek(begin)
            file.write(end + b"\n" if _is_whole(end) else b"")


class Act(NamedTuple):
    """A change of a gallery that the log records: a clip or person is renamed or removed."""

    says: str  # "is", "rename", "undo", or "forgotten" for a removed person
    what: str  # the clip, or the person
    of: str | None = None  # the new person
