"""The page `names.html`: a timeline of each film, and the times of each person."""

import base64
import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlencode

from vidjax.apps.gallery.answers import IGNORED, Answer, parse_group_number
from vidjax.apps.video.appearances import (
    Appearance,
    format_certainty,
    format_percent,
    format_span,
    format_tenths,
    format_time,
    group_by_video,
)
from vidjax.apps.video.features_folder import Film

if TYPE_CHECKING:
    import jinja2

MOST_PICTURES = 8  # pictures of a person in a film, from the longest appearances
LEAST_WIDTH = 0.4  # per cent of the timeline, so that short appearances are visible
SURE_PROBABILITY = 0.9  # a name with a lower probability is listed as doubtful
LIKELY_PROBABILITY = 0.1  # the page shows other people who are at least this likely
MOST_TIMES = 6  # times of a person below a timeline; more times are folded
MOST_DOUBTFUL = 100  # doubtful names that are listed
CLIP = "clip: "  # start of the key of an appearance

Picture = tuple[str, str]  # the address and a description


class PageEntry(NamedTuple):
    """An appearance as the page shows it.

    Attributes:
      key: identifies the appearance, and differs from all names of people.
      name: the person, or the group of an unknown person.
      known: whether `name` is a person.
      probability: the probability of a known person; None if unknown.
      certainty: the probability as text, or that a user gave the name; "" if unknown.
      time: begin and end, such as 3:12\u20133:15.
      seconds: the duration.
      left, width: the place on the timeline, in per cent.
      others: other possible people with their probabilities, the most likely first.
      address: the address of the film at this time; "" if there is none.
    """

    key: str
    video: str
    name: str
    known: bool
    probability: float | None
    certainty: str
    time: str
    seconds: float
    left: float
    width: float
    others: list[tuple[str, float]]
    address: str

    @property
    def doubt(self) -> float:
        """The probability of another answer, 0 to 1; 0 if the answer is almost certain."""
        if self.probability is None:
            return self.others[0][1] if self.others else 0.0
        return 1.0 - self.probability if self.probability < SURE_PROBABILITY else 0.0


class Forms(NamedTuple):
    """The state of the forms with which a user corrects names, see `vidjax.apps.video.review`.

    Attributes:
      version: the version of the shown decision. Changes from a page with another version are
        refused.
      film, person: the film or the person of the page. If both are empty, the page shows an
        overview.
      message: the last change or the last error in words; may be empty.
      last: the change that can be undone, in words; may be empty.
      at: the message is shown next to this person, or to the appearance with this key.
      next: where the next message is shown after a change.
      typed: the name that was typed and not accepted.
      similar: the person with a name similar to `typed`.
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
        """The film or the person of the page; empty for the overview."""
        return self.film or self.person

    @property
    def url_query(self) -> str:
        """The query of a URL that opens this film or person."""
        words = {"film": self.film, "person": self.person}
        return urlencode({key: word for key, word in words.items() if word})


class PersonAppearances(NamedTuple):
    """A person in a film or in all films: the appearances and their total time."""

    name: str
    entries: list[PageEntry]
    total: str


class FilmSection(NamedTuple):
    """A film: its description, its people, and all appearances in order of time."""

    video: str
    about: str
    rows: list[PersonAppearances]
    entries: list[PageEntry]


def render(
    appearances: Sequence[Appearance],
    films: Sequence[Film],
    people: Mapping[str, Sequence[Picture]],
    picture: Callable[[str], str],
    answers: Mapping[str, Answer],
    address: Callable[[Film, float], str],
    forms: Forms | None = None,
) -> str:
    """Returns the page of the appearances in films as HTML.

    Args:
      appearances: the appearances in order of time.
      films: the films, in the order of the page.
      people: enrolled person -> pictures of the photos.
      picture: returns the address of a clip's picture; "" if there is none.
      answers: clip -> answer, for the other people whom a clip may show.
      address: returns the address of a film at a second; "" if there is none.
      forms: the state of the forms; None for a page without forms.
    """
    by_video, entries_of = group_by_video(appearances), dict[str, list[PageEntry]]()
    times = {name: list[PageEntry]() for name in people}
    for film in films:
        in_film = by_video.get(film.video, ())
        entries_of[film.video] = [_make_entry(x, film, answers, address) for x in in_film]
        for entry in entries_of[film.video]:
            times.setdefault(entry.name, []).append(entry)
    unknown = sorted(times.keys() - people.keys() - {IGNORED}, key=parse_group_number)
    everyone = [*people, *unknown, *({IGNORED} & times.keys())]
    doubtful = [entry for entries in entries_of.values() for entry in entries if entry.doubt]
    doubtful.sort(key=lambda entry: -entry.doubt)
    if forms and forms.film not in entries_of and forms.person not in times:
        forms = forms._replace(film="", person="")
    # The page without forms shows everything; a page with forms shows a part or an overview.
    part = forms.part if forms else ""
    open_films = [film for film in films if forms is None or film.video == forms.film]
    open_people = everyone if forms is None else unknown
    if forms and forms.part:
        open_people, doubtful = [forms.person] * (forms.person in times), []
    listed = doubtful[:MOST_DOUBTFUL]
    shown = [*listed, *entries_of.get(part, ()), *times.get(part, ())]
    script = (Path(__file__).parent / "names.js").read_text()

    def faces(entries: Sequence[PageEntry], name: str = "") -> list[Picture]:
        """Returns pictures of a person's photos; without photos, of the longest appearances."""
        longest = sorted(range(len(entries)), key=lambda n: -entries[n].seconds)[:MOST_PICTURES]
        chosen = [entries[n] for n in sorted(longest)]
        pictures = [(picture(entry.key.removeprefix(CLIP)), entry.time) for entry in chosen]
        return [*people.get(name, ())] or [pair for pair in pictures if pair[0]]

    return _load_template().render(
        part=part,
        doubtful=listed,
        num_doubtful=len(doubtful),
        videos=[*entries_of],
        films=[_make_section(film, entries_of[film.video], people) for film in open_films],
        people=[PersonAppearances(name, times[name], "") for name in open_people],
        faces=faces,
        entries_of=times,
        ignored=IGNORED,
        percent=format_percent,
        named=[*people],
        unknown=unknown,
        anchors={name: number for number, name in enumerate(everyone, 1)},
        placed=forms and forms.at in {*open_people, *(entry.key for entry in shown)},
        most_times=MOST_TIMES,
        forms=forms,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


@functools.cache
def _load_template() -> "jinja2.Template":
    import jinja2

    from vidjax.evaluation import report

    # The folder of the template, and the folder of its style sheet.
    folders = (Path(__file__).parent, Path(report.__file__).parent)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("names.html.j2")


def format_appearance_time(appearance: Appearance, film: Film) -> str:
    """Returns begin and end of an appearance in a film, such as 3:12\u20133:15."""
    return "in the photo" if film.photo else format_span(appearance.start_s, appearance.end_s)


def _make_entry(
    x: Appearance, film: Film, answers: Mapping[str, Answer], address: Callable[[Film, float], str]
) -> PageEntry:
    """Returns the entry of an appearance on the page."""
    name = x.identity or IGNORED
    best = dict[str, float]()
    for clip in x.clips:
        for other, probability in answers[clip].best if clip in answers else ():
            best[other] = max(probability, best.get(other, 0.0))
    best.pop(name, None)
    others = sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))
    likely = [(other, p) for other, p in others if p >= LIKELY_PROBABILITY]
    length = max(film.seconds, 1e-3)
    left = min(100 * x.start_s / length, 100 - LEAST_WIDTH)
    width = min(max(100 * (x.end_s - x.start_s) / length, LEAST_WIDTH), 100 - left)
    if film.photo:
        left, width = 0.0, 100.0
    return PageEntry(
        CLIP + x.clips[0], film.video, name, x.probability is not None, x.probability,
        format_certainty(x), format_appearance_time(x, film), x.end_s - x.start_s,
        round(left, 2), round(width, 2), likely, address(film, x.start_s),
    )  # fmt: skip


def _make_section(film: Film, entries: list[PageEntry], people: Collection[str]) -> FilmSection:
    """Returns a film with a row for each person.

    Known people come before unknown people, and people with more time come first. Ignored people
    are last.
    """
    by_name: dict[str, list[PageEntry]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry)
    ranks, rows = dict[str, tuple[object, ...]](), dict[str, PersonAppearances]()
    for name, group in by_name.items():
        total = round(sum(entry.seconds for entry in group), 3)
        ranks[name] = name == IGNORED, name not in people, -total, len(name), name
        duration = "" if film.photo else f"in all {_format_length(total)}"
        rows[name] = PersonAppearances(name, group, duration)
    length = "Photo" if film.photo else f"Length {_format_length(film.seconds)}"
    about = "; the file ends before the end that it declares" if film.damaged else ""
    ordered = [rows[name] for name in sorted(rows, key=ranks.__getitem__)]
    return FilmSection(film.video, length + about, ordered, entries)


def _format_length(seconds: float) -> str:
    return format_time(seconds, short=True) if seconds >= 1 else format_tenths(seconds)
