"""The page of who appears when: a timeline of each film, and the times of each person."""

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vidjax import files
from vidjax.extract.folder import Film
from vidjax.gallery.answers import UNKNOWN, Answer, number_of
from vidjax.gallery.appearances import Appearance, by_video, clock

MOST_PICTURES = 8  # of a person in a film: the longest appearances
PICTURE_BYTES = 100_000
LEAST_WIDTH = 0.4  # per cent of the timeline: a short appearance is still seen
SURE_PROBABILITY = 0.9  # a name with a lower probability is listed as doubtful
LIKELY_PROBABILITY = 0.1  # the page shows other people who are at least this likely
MOST_TIMES = 6  # of a person below a timeline; the others are folded


class Shown(NamedTuple):
    """An appearance as the page shows it.

    Attributes:
      number: its place in the list of all appearances.
      name: the person, or the group of an unknown person.
      known: whether `name` is a person.
      probability: of a known person.
      begin, end: times such as 3:12; empty for a photo.
      left, width: the place on the timeline, in per cent.
      others: other people whom it may show, with their probabilities, the most likely first.
      address: of the film at that second; empty if it is not known.
    """

    number: int
    video: str
    name: str
    known: bool
    probability: float | None
    begin: str
    end: str
    left: float
    width: float
    others: list[tuple[str, float]]
    address: str

    @property
    def doubt(self) -> float:
        """How likely another answer is, 0 to 1; 0 if this answer is as good as certain."""
        if self.probability is None:
            return self.others[0][1] if self.others else 0.0
        return 1.0 - self.probability if self.probability < SURE_PROBABILITY else 0.0


class Forms(NamedTuple):
    """What the page needs so that its forms can send changes, see `vidjax.review`.

    Attributes:
      version: of the decision that the page shows; a change of an older page is refused.
      done: what the last change did, in words, or empty.
      can_undo: whether there is a change to take back.
    """

    version: int
    done: str
    can_undo: bool


class Row(NamedTuple):
    """A person in a film: the appearances, the time of all, and pictures with words."""

    name: str
    known: bool
    shown: list[Shown]
    total: str
    faces: list[tuple[str, str]]


def render(
    found: Sequence[Appearance],
    films: Iterable[Film],
    people: Mapping[str, Iterable[Path]],
    thumbnail: Callable[[str], Path],
    answers: Mapping[str, Answer],
    addresses: Mapping[str, str],
    forms: Forms | None = None,
) -> str:
    """Returns the page of the appearances in films, as HTML.

    Args:
      found: the appearances, in order of time.
      films: the films, in the order of the page.
      people: everybody who is enrolled, with the paths of pictures of their photos.
      thumbnail: gives the path of the picture of a clip. Pictures that do not exist are left out.
      answers: clip -> answer, for the other people whom a clip may show.
      addresses: film -> its address, which a link opens.
      forms: for a page on which people correct names; None for a page to look at.
    """
    import jinja2

    from vidjax import report

    # The template, and the style that it includes.
    folders = (Path(__file__).parent, Path(report.__file__).parent)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    script = (Path(__file__).parent / "names.js").read_text()
    of_video = by_video(found)
    number = {one: place for place, one in enumerate(found)}
    videos, times = [], {(True, name): list[Shown]() for name in people}
    for film in films:
        own = of_video.get(film.video, [])
        shown = [
            _show(number[one], one, film, answers, addresses.get(film.video, "")) for one in own
        ]
        length = "photo" if film.photo else clock(film.seconds, short=True)
        videos.append((film.video, length, _rows(own, shown, film, thumbnail), film.damaged))
        for one in shown:
            times.setdefault((one.known, one.name), []).append(one)
    everything = [one for some in times.values() for one in some]
    everybody = sorted(times, key=lambda key: _order(*key))

    def faces(known: bool, name: str) -> list[tuple[str, str]]:
        if known:
            return _pictures((path, name) for path in people.get(name, ()))
        return _faces([found[one.number] for one in times[known, name]], thumbnail)

    return environment.get_template("names.html.j2").render(
        videos=videos,
        people=[(name, known, times[known, name], faces(known, name)) for known, name in everybody],
        anchors={key: number for number, key in enumerate(everybody, 1)},
        doubtful=sorted((x for x in everything if x.doubt), key=lambda x: -x.doubt),
        unknown=[name for known, name in everybody if not known],
        most_times=MOST_TIMES,
        forms=forms,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _order(known: bool, name: str) -> tuple[bool, int, str]:
    """Sorts people by name, and then unknown people by number."""
    numbered = not known and name.startswith(UNKNOWN)
    return not known, number_of(name) if numbered else 0, name.casefold()


def _show(
    number: int, one: Appearance, film: Film, answers: Mapping[str, Answer], address: str
) -> Shown:
    """Returns what the page shows of an appearance; see `Shown`."""
    known = one.probability is not None
    name = one.identity or "unknown"
    best = dict[str, float]()
    for clip in one.clips:
        for other, probability in answers[clip].best if clip in answers else ():
            best[other] = max(probability, best.get(other, 0.0))
    best.pop(name, None)
    others = sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))
    likely = [(other, p) for other, p in others if p >= LIKELY_PROBABILITY]
    if film.photo:
        return Shown(
            number, film.video, name, known, one.probability, "", "", 0.0, 100.0, likely, address
        )
    length = max(film.seconds, 1e-3)
    left = min(100 * one.start_s / length, 100 - LEAST_WIDTH)
    width = min(max(100 * (one.end_s - one.start_s) / length, LEAST_WIDTH), 100 - left)
    begin, end = (clock(seconds, short=True) for seconds in (one.start_s, one.end_s))
    at = f"{address}#t={one.start_s:.1f}" if address else ""
    return Shown(
        number, film.video, name, known, one.probability, begin, end,
        round(left, 3), round(width, 3), likely, at,
    )  # fmt: skip


def _rows(
    found: Sequence[Appearance],
    shown: Sequence[Shown],
    film: Film,
    thumbnail: Callable[[str], Path],
) -> list[Row]:
    """Returns a row for each person in a film.

    Known people come first, and then the people who are seen for longer.
    """
    own: dict[tuple[bool, str], list[int]] = {}
    for number, one in enumerate(shown):
        own.setdefault((not one.known, one.name), []).append(number)
    total = {
        key: round(sum(found[n].end_s - found[n].start_s for n in some), 3)
        for key, some in own.items()
    }
    return [
        Row(
            name, not unknown, [shown[n] for n in own[unknown, name]],
            "" if film.photo else clock(total[unknown, name], short=True),
            _faces([found[n] for n in own[unknown, name]], thumbnail),
        )
        for unknown, name in sorted(own, key=lambda k: (k[0], -total[k], len(k[1]), k[1]))
    ]  # fmt: skip


def _faces(own: Sequence[Appearance], thumbnail: Callable[[str], Path]) -> list[tuple[str, str]]:
    """Returns a picture of each appearance of a person in a film, in order of time."""
    longest = sorted(own, key=lambda one: (one.start_s - one.end_s, one.start_s))[:MOST_PICTURES]
    chosen = sorted(longest, key=lambda one: one.start_s)
    return _pictures((thumbnail(one.clips[0]), clock(one.start_s, short=True)) for one in chosen)


def _pictures(paths: Iterable[tuple[Path, str]]) -> list[tuple[str, str]]:
    """Returns addresses of pictures with words, of paths with words, as far as they exist."""
    contents = (
        (files.read_bytes(path, PICTURE_BYTES), words) for path, words in paths if path.exists()
    )
    return [
        (f"data:image/png;base64,{base64.b64encode(content).decode()}", words)
        for content, words in contents
    ]
