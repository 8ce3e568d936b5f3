"""The log of what people said about faces: `said.jsonl` in a folder of results of `vidjax who`.

A line is about a face or about a person. The digest of the film or photo, a time in seconds, and a
box (left, top, width and height, as fractions of the picture) identify a face. So a line stays true
if nets, file names or names of clips change. A person is a key of 128 random bits. The name is what
the person is called now: a new name is a new line about the key. An unknown person is a key with a
number. Lines are only added, and the order of lines is the only time. A step is a single action of
a user. All lines of a step have the same random id `step`. The field `says` of a line is one of
these words:

    begin   the first line of a log: `number` is the highest number that an unknown person had
    person  the person `person` is called `name`, or is the unknown person with the number `number`
    merge   the people `person` and `other` are one person, whose name is the name of `other`
    is      the face shows `person`, or if `person` is null, a stranger
    not     the face does not show `person`
    ignore  the face gets no name. If `once` is true, only until the face looks like a known person
    show    earlier lines `is` and `ignore` about the face do not count
    same    the face certainly shows the unknown person `person`
    apart   the unknown people `person` and `other` are different people
    guess   vidjax takes the face for the unknown person `person`
    film    vidjax has given numbers to the unknown people of a film; `of` is a digest of its faces
    photo   the face is in a photo of `person`, or if `person` is null, of strangers. `name` is the
            name of the photo's folder or of the face tag. An `unused` photo is doubtful
    gone    the photo is no longer in the folder `name`, or has lost the face tag `name`
    undo    the step `of` does not count
"""

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from vidjax.apps.gallery.changes import check_person
from vidjax.apps.video import media
from vidjax.apps.video.media import FEATURES, PEOPLE, Area, Face, Orientation, Seconds
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.json_files import Sha256, Text

NAME = "said.jsonl"
STRANGERS = "strangers"  # the folder of photos of people who must not get a name
MOST_BYTES = 256 * files.MB  # the largest log that is read
CUT = "Input data was truncated"  # msgspec says so about the beginning of a line
ENCODER = msgspec.json.Encoder()
Key = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
# The words of `says` that are about a face, and the fields that a line needs.
OF_FACE = ("is", "not", "ignore", "show", "same", "guess", "photo")
NEEDED = {
    "begin": ("number",), "person": ("person",), "merge": ("person", "other"), "not": ("person",),
    "same": ("person",), "apart": ("person", "other"), "guess": ("person",), "film": ("film", "of"),
    "photo": ("name",), "gone": ("film", "name"), "undo": ("of",),
}  # fmt: skip


class Line(Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A line of the log. For the field `says`, see the module."""

    says: Literal[
        "begin", "person", "merge", "is", "not", "ignore", "show", "same", "apart", "guess", "film",
        "photo", "gone", "undo",
    ]  # fmt: skip
    step: Key | None = None
    film: Sha256 | None = None
    at: Seconds = 0.0
    box: Area | None = None
    places: Annotated[tuple[tuple[Seconds, Area], ...], Meta(max_length=100)] = ()
    turn: Orientation = 1
    person: Key | None = None
    other: Key | None = None
    of: Key | None = None
    name: Text | None = None
    number: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None
    once: bool = False
    unused: bool = False
    video: Text = ""  # the name of the film, for people who read the log

    def __post_init__(self) -> None:
        needed = NEEDED.get(self.says, ()) + ("film", "box") * (self.says in OF_FACE)
        for field in needed:
            if getattr(self, field) is None:
                raise ValueError(f"a line that says `{self.says}` needs the field `{field}`")
        if self.says == "person" and self.name is not None and self.name != check_person(self.name):
            raise ValueError(f"`{self.name}` is not the name of a person")

    @property
    def face(self) -> Face | None:
        """The face that the line is about, or None."""
        if self.film is None or self.box is None:
            return None
        return Face(film=self.film, at=self.at, box=self.box, places=self.places, turn=self.turn)


def make_key() -> str:
    """Returns the key of a new person or step: 128 random bits, as hexadecimal digits."""
    return secrets.token_hex(16)


def about(face: Face, says: Any, **values: Any) -> Line:  # noqa: ANN401  (fields of `Line`)
    """Makes a line of the log about a face.

    `says` is the kind of the line, such as "is". `values` are further fields of `Line`.
    """
    return Line(says=says, **msgspec.structs.asdict(face), **values)


def make_step(lines: Iterable[Line]) -> list[Line]:
    """Marks `lines` as one step, a single action of the user; returns the new lines."""
    step = make_key()
    return [msgspec.structs.replace(line, step=step) for line in lines]


def has_log(out: Path) -> bool:
    """Returns whether the folder `out` contains the log `said.jsonl`."""
    return files.exists(out / NAME)


def read(out: Path) -> list[Line]:
    """Reads the log in a folder of results. Without a log, the result is empty.

    Raises UserError if a line is damaged, or if an earlier version of vidjax wrote the log. If a
    killed program has not finished the last line, this line is left out.
    """
    path, lines = out / NAME, list[Line]()
    if not files.exists(path):
        return lines
    content = files.read_bytes(path, MOST_BYTES).removeprefix(b"\xef\xbb\xbf")  # of Notepad
    *texts, end = content.split(b"\n")
    for number, text in enumerate(texts if _is_cut(end) else [*texts, end], 1):
        try:
            lines += [msgspec.json.decode(text, type=Line)] if text.strip() else []
        except (msgspec.DecodeError, UnicodeDecodeError, UserError) as error:
            if number == 1 and b'"begin"' not in text:
                raise refuse_earlier(out) from None
            problem = str(error).partition("\n")[0]
            raise UserError(
                f"line {number} of '{path}' is damaged: {problem}\nrepair or delete this line"
            ) from None
    if (lines or texts) and not (lines and lines[0].says == "begin"):
        raise refuse_earlier(out)
    return lines


def check_version(out: Path) -> None:
    """Raises UserError if an earlier version of vidjax wrote the folder of results `out`."""
    features, photos = (out / folder / media.NAME for folder in (FEATURES, PEOPLE))
    if (
        files.exists(out / "unknown.json")
        or any(files.exists(path) and media.is_old(path) for path in (features, photos))
        or (files.exists(features) and not has_log(out))
    ):
        raise refuse_earlier(out)


def refuse_earlier(out: Path) -> UserError:
    """Returns the error for a folder of results that an earlier version of vidjax wrote."""
    return UserError(
        f"an earlier version of vidjax wrote the results in '{out}'\n"
        "name a new folder: --out=FOLDER"
    )


def _is_cut(text: bytes) -> bool:
    """Returns whether `text` is the beginning of a line that a killed program has not finished."""
    begin = b'{"says":'
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        is_open = str(error) == CUT or not text.endswith(b"}")  # the end may be that of a number
        return is_open and text[: len(begin)] == begin[: len(text)]
    return False


def append(out: Path, lines: Sequence[Line]) -> None:
    """Adds lines to the log in the folder of results `out`. Makes the log if there is none.

    The caller must hold `lock`.
    """
    path = out / NAME
    with contextlib.closing(files.open_log(path)) as log:
        if _end_last_line(path):  # the log is new, or a killed program has just made it
            lines = [Line(says="begin", number=0, step=make_key()), *lines]
        if lines:
            files.append(log, ENCODER.encode_lines(lines))
            os.fsync(log.fileno())
    files.hide(path)


def _end_last_line(path: Path) -> bool:
    """Adds the line break that the last line lacks, or removes a line that is not finished.

    Returns whether the log is then empty.
    """
    with files.open_regular(path, os.O_RDWR) as file:
        content = file.read(MOST_BYTES)
        begin = content.rfind(b"\n") + 1
        end = b"" if _is_cut(content[begin:]) else content[begin:]
        if content[begin:]:
            file.truncate(begin)
            file.seek(begin)
            file.write(end + b"\n" if end else b"")
        return not (begin or end)


def replace(out: Path, lines: Sequence[Line]) -> None:
    """Replaces the whole log. The caller must hold `lock`."""
    begin, *lines = lines
    lines = [msgspec.structs.replace(begin, step=make_key()), *lines]  # a page notices the new step
    files.write_bytes(out / NAME, ENCODER.encode_lines(lines))
    files.hide(out / NAME)


def lock(out: Path, wait: float) -> contextlib.AbstractContextManager[None]:
    """Locks what people said in the folder of results `out`, for a `with` block.

    A program must hold this lock to change or write names. Raises InUseError if another program
    holds the lock for `wait` seconds. `vidjax who` reads films under a different lock, so a user
    can correct names while films are read.
    """
    return files.lock(out, "out", ".said.lock", wait=wait)


def drop_undone(lines: Iterable[Line]) -> Iterator[Line]:
    """Yields the lines of the log that were not undone. Undoing may be undone, too."""
    lines, undone = [*lines], set[str]()
    for line in reversed(lines):
        if line.says == "undo" and line.step not in undone:
            undone.add(str(line.of))
    return (x for x in lines if x.says != "undo" and (x.step is None or x.step not in undone))
