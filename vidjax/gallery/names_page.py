"""The page that shows who appears when: a timeline for each video. It loads no file or script."""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jinja2

from vidjax import files, report
from vidjax.gallery.appearances import Appearance, clock

if TYPE_CHECKING:
    from vidjax.extract.folder import Film

# The template, and the style that it includes.
FOLDERS = (Path(__file__).parent, Path(report.__file__).parent)
MOST_PICTURES = 8  # of a person in a video: the longest appearances
PICTURE_BYTES = 100_000
LEAST_WIDTH = 0.4  # per cent of the timeline: a short appearance is still seen


class Piece(NamedTuple):
    """A piece of a timeline: begin and width in per cent, and the text that describes it."""

    left: float
    width: float
    about: str


class Picture(NamedTuple):
    """A face: the content as an address, and the words for it."""

    source: str
    about: str


class Row(NamedTuple):
    """A person in a video: name, if it is known, pieces, total seconds as text, and faces."""

    name: str
    known: bool
    pieces: list[Piece]
    total: str
    faces: list[Picture]


def page(
    found: Sequence[Appearance],
    films: "Sequence[Film]",
    people: Mapping[str, Sequence[Path]],
    thumbnail: Callable[[str], Path],
) -> str:
    """Returns the page of the appearances in films.

    `people` are all who are enrolled, with paths of pictures of their photos; `thumbnail` gives
    that of a clip. Pictures that do not exist are left out.
    """
    loader = jinja2.FileSystemLoader(FOLDERS)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    videos = [
        (film.video, "photo" if film.photo else clock(film.seconds, short=True),
         _rows(found, film, thumbnail), film.damaged)
        for film in films
    ]  # fmt: skip
    seen: dict[str, set[str]] = {name: set() for name in people}
    for one in found:
        if one.probability is not None:
            seen.setdefault(str(one.identity), set()).add(one.video)
    table = [
        (name, sorted(videos_of), _pictures((path, name) for path in people.get(name, ())))
        for name, videos_of in sorted(seen.items())
    ]
    return environment.get_template("names.html.j2").render(videos=videos, people=table)


def _rows(found: Sequence[Appearance], film: "Film", thumbnail: Callable[[str], Path]) -> list[Row]:
    """Returns a row for each person of a video: known ones first, by time on screen."""
    own: dict[tuple[bool, str], list[Appearance]] = {}
    for one in found:
        if one.video == film.video:
            own.setdefault((one.probability is None, one.identity or "unknown"), []).append(one)
    total = {
        key: round(sum(one.end_s - one.start_s for one in some), 3) for key, some in own.items()
    }
    return [
        Row(key[1], not key[0], [_piece(one, film) for one in own[key]],
            "" if film.photo else clock(total[key], short=True), _faces(own[key], thumbnail))
        for key in sorted(own, key=lambda key: (key[0], -total[key], len(key[1]), key[1]))
    ]  # fmt: skip


def _faces(own: Sequence[Appearance], thumbnail: Callable[[str], Path]) -> list[Picture]:
    """Returns a picture of each appearance of a person in a video, in order of time."""
    longest = sorted(own, key=lambda one: (one.start_s - one.end_s, one.start_s))[:MOST_PICTURES]
    shown = sorted(longest, key=lambda one: one.start_s)
    return _pictures((thumbnail(one.clips[0]), clock(one.start_s, short=True)) for one in shown)


def _pictures(paths: Iterable[tuple[Path, str]]) -> list[Picture]:
    """Returns pictures, of a path and words for each, as far as they exist."""
    read = (
        (files.read_bytes(path, PICTURE_BYTES), words) for path, words in paths if path.exists()
    )
    return [
        Picture(f"data:image/png;base64,{base64.b64encode(content).decode()}", words)
        for content, words in read
    ]


def _piece(one: Appearance, film: "Film") -> Piece:
    sure = "" if one.probability is None else f"{one.probability:.0%}"
    if film.photo:
        return Piece(0.0, 100.0, sure)
    length = max(film.seconds, 1e-3)
    left = min(100 * one.start_s / length, 100 - LEAST_WIDTH)
    width = max(100 * (one.end_s - one.start_s) / length, LEAST_WIDTH)
    about = f"{clock(one.start_s, short=True)} to {clock(one.end_s, short=True)}"
    about += f", {sure}" if sure else ""
    return Piece(round(left, 3), round(min(width, 100 - left), 3), about)
