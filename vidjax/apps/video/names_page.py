"""The page of who appears when: a timeline of each film, and the times of each person."""

import base64
import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlencode

from vidjax.apps.gallery.answers import IGNORED, Answer, number_of
from vidjax.apps.video.appearances import Appearance, by_video, clock, percent, span, tenths
from vidjax.apps.video.features_folder import Film

if TYPE_CHECKING:
    import jinja2

MOST_PICTURES = 8  # of a person in a film: the longest appearances
LEAST_WIDTH = 0.4  # per cent of the timeline: a short appearance is still seen
SURE_PROBABILITY = 0.9  # a name with a lower probability is listed as doubtful
LIKELY_PROBABILITY = 0.1  # the page shows other people who are at least this likely
MOST_TIMES = 6  # of a person below a timeline; the others are folded
MOST_DOUBTFUL = 100  # names that are listed
CLIP = "clip: "  # begins the key of an appearance

Picture = tuple[str, str]  # the address, and words


class Shown(NamedTuple):
    """An appearance as the page shows it.

    Attributes:
      key: says which one; it is no name of a person.
      name: the person, or the group of an unknown person.
      known: whether `name` is a person.
      probability: of a known person.
      time: begin and end, such as 3:12\u20133:15.
      seconds: how long it is.
      left, width: the place on the timeline, in per cent.
      others: other people whom it may show, with their probabilities, the most likely first.
      address: of the film at that second; empty if it is not known.
    """

    key: str
    video: str
    name: str
    known: bool
    probability: float | None
    time: str
    seconds: float
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
    """What the page needs so that its forms can send changes, see `vidjax.apps.video.review`.

    Attributes:
      version: of the decision that the page shows; a change of an older page is refused.
      film, person: the one that the page shows; without, it lists all, and shows the unknown.
      message: what the last change did, or what is wrong, in words, or empty.
      last: the change that can be taken back, in words, or empty.
      at: the person, or the key of the appearance, beside whom the message stands.
      next: who is beside it after a change.
      typed: the name that somebody typed and that was not taken.
      similar: the name of a person that looks like it.
    """

    version: int
    film: str = ""
    person: str = ""
    message: str = ""
    last: str = ""
    at: str = ""
    next: str = ""
    typed: str = ""
    similar: str = ""

    @property
    def part(self) -> str:
        """The film or the person that the page shows; empty if it lists all."""
        return self.film or self.person

    @property
    def view(self) -> str:
        """The part, as the end of an address."""
        words = {"film": self.film, "person": self.person}
        return urlencode({key: word for key, word in words.items() if word})


class Row(NamedTuple):
    """A person, in a film or in all: the appearances, and the time of all."""

    name: str
    shown: list[Shown]
    total: str


class Part(NamedTuple):
    """A film: what is said of it, its people, and all appearances in order of time."""

    video: str
    about: str
    rows: list[Row]
    shown: list[Shown]


def render(
    found: Sequence[Appearance],
    films: Sequence[Film],
    people: Mapping[str, Sequence[Picture]],
    picture: Callable[[str], str],
    answers: Mapping[str, Answer],
    address: Callable[[Film, float], str],
    forms: Forms | None = None,
) -> str:
    """Returns the page of the appearances in films, as HTML.

    Args:
      found: the appearances, in order of time.
      films: the films, in the order of the page.
      people: everybody who is enrolled, with pictures of their photos.
      picture: gives the address of the picture of a clip; empty without.
      answers: clip -> answer, for the other people whom a clip may show.
      address: gives the address of a film from a second on, which a link opens; empty without.
      forms: for a page on which people correct names; None for a page to look at.
    """
    of_video, own = by_video(found), dict[str, list[Shown]]()
    times = {name: list[Shown]() for name in people}
    for film in films:
        appearances = of_video.get(film.video, ())
        own[film.video] = [_show(one, film, answers, address) for one in appearances]
        for one in own[film.video]:
            times.setdefault(one.name, []).append(one)
    unknown = sorted(times.keys() - people.keys() - {IGNORED}, key=number_of)
    everybody = [*people, *unknown, *({IGNORED} & times.keys())]
    doubtful = [one for some in own.values() for one in some if one.doubt]
    doubtful.sort(key=lambda one: -one.doubt)
    if forms and forms.film not in own and forms.person not in times:
        forms = forms._replace(film="", person="")
    # The page to look at has all; the other one has a part of it, or an overview.
    part = forms.part if forms else ""
    open_films = [film for film in films if forms is None or film.video == forms.film]
    open_people = everybody if forms is None else unknown
    if forms and forms.part:
        open_people, doubtful = [forms.person] * (forms.person in times), []
    listed = doubtful[:MOST_DOUBTFUL]
    shown = [*listed, *own.get(part, ()), *times.get(part, ())]
    script = (Path(__file__).parent / "names.js").read_text()

    def faces(shown: Sequence[Shown], name: str = "") -> list[Picture]:
        """Returns pictures of a person, or else of the longest appearances, in their order."""
        longest = sorted(range(len(shown)), key=lambda n: -shown[n].seconds)[:MOST_PICTURES]
        chosen = [shown[n] for n in sorted(longest)]
        there = [(picture(one.key.removeprefix(CLIP)), one.time) for one in chosen]
        return [*people.get(name, ())] or [one for one in there if one[0]]

    return _template().render(
        part=part,
        doubtful=listed,
        num_doubtful=len(doubtful),
        videos=[*own],
        films=[_part(film, own[film.video], people) for film in open_films],
        people=[Row(name, times[name], "") for name in open_people],
        faces=faces,
        shown_of=times,
        ignored=IGNORED,
        percent=percent,
        named=[*people],
        unknown=unknown,
        anchors={name: number for number, name in enumerate(everybody, 1)},
        placed=forms and forms.at in {*open_people, *(one.key for one in shown)},
        most_times=MOST_TIMES,
        forms=forms,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


@functools.cache
def _template() -> "jinja2.Template":
    import jinja2

    from vidjax.evaluation import report

    # The template, and the style that it includes.
    folders = (Path(__file__).parent, Path(report.__file__).parent)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("names.html.j2")


def time_of(one: Appearance, film: Film) -> str:
    """Returns begin and end of an appearance in a film, such as 3:12\u20133:15."""
    return "in the photo" if film.photo else span(one.start_s, one.end_s)


def _show(
    one: Appearance,
    film: Film,
    answers: Mapping[str, Answer],
    address: Callable[[Film, float], str],
) -> Shown:
    """Returns what the page shows of an appearance; see `Shown`."""
    name = one.identity or IGNORED
    best = dict[str, float]()
    for clip in one.clips:
        for other, probability in answers[clip].best if clip in answers else ():
            best[other] = max(probability, best.get(other, 0.0))
    best.pop(name, None)
    others = sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))
    likely = [(other, p) for other, p in others if p >= LIKELY_PROBABILITY]
    length = max(film.seconds, 1e-3)
    left = min(100 * one.start_s / length, 100 - LEAST_WIDTH)
    width = min(max(100 * (one.end_s - one.start_s) / length, LEAST_WIDTH), 100 - left)
    if film.photo:
        left, width = 0.0, 100.0
    return Shown(
        CLIP + one.clips[0], film.video, name, one.probability is not None, one.probability,
        time_of(one, film), one.end_s - one.start_s, round(left, 2), round(width, 2), likely,
        address(film, one.start_s),
    )  # fmt: skip


def _part(film: Film, own: list[Shown], people: Collection[str]) -> Part:
    """Returns a film with a row for each person.

    Known people come first, then people who are seen for longer, and at last the ignored.
    """
    by_name: dict[str, list[Shown]] = {}
    for one in own:
        by_name.setdefault(one.name, []).append(one)
    total = {name: round(sum(one.seconds for one in some), 3) for name, some in by_name.items()}
    order = sorted(
        by_name,
        key=lambda x: (x == IGNORED, x not in people, -total[x], len(x), x),
    )
    length = "Photo" if film.photo else f"Length {_length(film.seconds)}"
    about = "; the file ends before the end that it declares" if film.damaged else ""
    return Part(film.video, length + about, [
        Row(name, by_name[name], "" if film.photo else f"in all {_length(total[name])}")
        for name in order
    ], own)  # fmt: skip


def _length(seconds: float) -> str:
    return clock(seconds, short=True) if seconds >= 1 else tenths(seconds)
