"""Renders the page `names.html`, with a timeline of each film and the times of each person."""

import base64
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlencode

from vidjax.apps.gallery.answers import FACE, Answer, rank_group
from vidjax.apps.video.media import FaceTrack, MediaFile
from vidjax.apps.video.naming import Appearance, format_certainty, format_percent, group_by_video
from vidjax.apps.video.subtitles import format_span, format_tenths
from vidjax.utils.groups import group_by_key
from vidjax.utils.messages import format_time
from vidjax.utils.names import IGNORED, strip_accents

if TYPE_CHECKING:
    import jinja2

MOST_PICTURES = 8  # pictures of a person in a film, from as many appearances
MOST_SHOWN = 100  # unknown people, or known people with a picture, on a page with forms
MOST_FACES = 200  # faces of a person or film on a page with forms
MOST_FILMS = 24  # films with a timeline on a page with forms
LEAST_WIDTH = 0.4  # per cent of the timeline, so that short appearances are visible
LEAST_GAP = 2.5  # per cent of the timeline from bar to bar, so that each bar can be clicked
SURE_PROBABILITY = 0.9  # a name with a lower probability is listed as doubtful
LIKELY_PROBABILITY = 0.1  # the page shows other people who are at least this likely
MOST_LIKELY = 3  # people whom a click chooses
MOST_DOUBTFUL = 100  # doubtful names that are listed
CLIP = "clip:\t"  # begins the key of an appearance; `check_name` refuses names with a tab

# The address of a picture, its description, the address of a larger picture, and the place of the
# face in the larger picture: left, top, width and height in per cent, or "".
Picture = tuple[str, str, str, str]


@dataclasses.dataclass(frozen=True)
class PageData:
    """What the page `names.html` shows about films and people."""

    appearances: Sequence[Appearance]  # in order of time
    films: Sequence[MediaFile]  # in the order in which the page shows them
    people: Mapping[str, Sequence[Picture]]  # name of each person -> pictures of the photos
    picture: Callable[[str], str]  # returns the URL of a clip's picture, or "" if there is none
    answers: Mapping[str, Answer]  # clip -> answer of the gallery, with the other likely people
    address: Callable[[MediaFile, float], str]  # returns the URL of a film at a time in seconds
    # The state of the forms with which a user corrects names. If None, there are no forms.
    forms: "Forms | None" = None
    note: str = ""  # a text about all names
    # Clip -> name that a more similar face of the same time has, see `NamedTracks`.
    twins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Returns the URL of a picture that contains the picture, so that the page needs no other file.
    embed: Callable[[str], str] = str

    @functools.cached_property
    def tracks(self) -> dict[str, FaceTrack]:
        """Name of a clip -> the track of the face in this clip."""
        return {track.clip: track for film in self.films for track in film.tracks}

    def rank(self, clip: str) -> tuple[float, ...]:
        """Returns a key that sorts clips by their best faces, the clearest face first."""
        x = self.tracks.get(clip)
        return (-x.clarity, -x.quality, -x.seen) if x else ()

    def list_faces(self, entries: "Sequence[PageEntry]", name: str = "") -> list[Picture]:
        """Returns pictures of a person: all photos of the person `name`.

        If there are no photos, or `name` is "", returns up to 8 pictures from films, one of each
        appearance in `entries`, the clearest face first.
        """
        if self.people.get(name):
            return [*self.people[name]]
        best = sorted(entries, key=lambda entry: self.rank(entry.best))
        found = ((entry, self.picture(entry.best)) for entry in best)
        pictures = (
            (source, entry.time, f"frame/{quote(entry.best)}", entry.box)
            if self.forms else (source, entry.time, source, "")
            for entry, source in found if source or self.forms
        )  # fmt: skip
        return [*itertools.islice(pictures, MOST_PICTURES)]


class PageEntry:
    """An appearance of a person in a film, as the page shows it.

    Texts are made only when they are needed, because a page shows few of many appearances.
    """

    def __init__(self, x: Appearance, film: MediaFile, data: PageData):
        self._x, self._film, self._data = x, film, data
        self.video = film.video
        self.name = x.identity or IGNORED  # the name of the person, or such as `unknown 3`
        self.mark = x.mark
        self.seconds = x.end_s - x.start_s

    @property
    def keys(self) -> list[str]:
        """The clips as values in HTML forms: "clip:", a tab, and the name of the clip."""
        return [CLIP + x for x in sorted(self._x.clips, key=lambda x: x not in self._data.twins)]

    @functools.cached_property
    def best(self) -> str:
        """The name of the clip with the clearest face, among the clips of this appearance."""
        return min(self._x.clips, key=self._data.rank)

    @property
    def box(self) -> str:
        """The box of the best face in its frame: left, top, width and height in per cent."""
        x = self._data.tracks.get(self.best)
        left, top, right, bottom = x.box if x and x.box else (0.0, 0.0, 0.0, 0.0)
        return " ".join(f"{100 * x:.4g}" for x in (left, top, right - left, bottom - top))

    @property
    def unclear(self) -> bool:
        """Whether all faces are too small or too blurred, see `FaceTrack.unclear`."""
        return self.best in self._data.tracks and self._data.tracks[self.best].unclear

    @property
    def certainty(self) -> str:
        """The probability of the name as text, such as "87 %", with a non-breaking space."""
        return format_certainty(self._x).replace(" %", "\u00a0%")

    @property
    def time(self) -> str:
        """The start and end as text, such as 3:12-3:15."""
        return format_appearance_time(self._x, self._film)

    @property
    def address(self) -> str:
        """The URL that plays the film from the start of the appearance."""
        return self._data.address(self._film, self._x.start_s)

    @property
    def place(self) -> tuple[float, float]:
        """The left end and the width of the bar on the timeline, in per cent of the timeline."""
        if self._film.photo:
            return 0.0, 100.0
        length = max(self._film.seconds, 1e-3)
        left = min(100 * self._x.start_s / length, 100 - LEAST_WIDTH)
        width = min(max(100 * self.seconds / length, LEAST_WIDTH), 100 - left)
        return round(left, 2), round(width, 2)

    @functools.cached_property
    def others(self) -> list[tuple[str, float]]:
        """Other likely people as (name, probability), the most likely first."""
        answers = filter(None, map(self._data.answers.get, self._x.clips))
        pairs = (pair for answer in answers for pair in answer.best if pair[0] != self.name)
        return _sort_likely((name, p) for name, p in pairs if p >= LIKELY_PROBABILITY)

    @functools.cached_property
    def doubt(self) -> float:
        """The probability that the name is wrong, 0 to 1. A probability of at most 0.1 counts as 0.

        For an unknown person, the doubt is the probability of the most likely name.
        """
        if self._x.probability is None:
            return self.others[0][1] if self.others else 0.0
        return 1.0 - self._x.probability if self._x.probability < SURE_PROBABILITY else 0.0

    @property
    def twin(self) -> str:
        """The person whom this face resembles, but less than another face at the same time, or "".

        Only the more similar face gets the name. But a mirror may show a person twice.
        """
        return next((self._data.twins[x] for x in self._x.clips if x in self._data.twins), "")

    def split(self) -> "Iterator[PageEntry]":
        """Yields new entries of the page, one for each clip of this entry."""
        for clip in self._x.clips:
            track = self._data.tracks[clip]
            part = self._x._replace(clips=(clip,), start_s=track.start_s, end_s=track.end_s)
            yield PageEntry(part, self._film, self._data)


class Forms(NamedTuple):
    """The state of the forms on the page with which a user corrects names."""

    # The number of changes when the page was made. If names have changed since then, a change on
    # this page is refused.
    version: int = 0
    # The film or person that the page shows. For an overview, both are empty.
    film: str = ""
    person: str = ""
    find: str = ""  # an overview shows people and films that contain these words
    first: int = 0  # the number of unknown people or of faces on earlier pages
    message: str = ""  # a text about the last change, or an error
    last: str = ""  # a description of the change that can be undone
    at: str = ""  # the person, or the key of the appearance, whose name is asked next
    next: str = ""  # the value of `at` after the next change
    of: Sequence[str] = ()  # the people and keys of a change that was not accepted
    typed: str = ""  # the name that the user typed, if it was not accepted
    asked: bool = False  # whether `message` is a question
    similar: str = ""  # a person whose name is similar to `typed`
    # Films that may take over the corrections of another film: (digest, a sentence about them).
    offers: Sequence[tuple[str, str]] = ()

    @property
    def part(self) -> str:
        """The film or the person that the page shows, or "" for the overview."""
        return self.film or self.person

    @property
    def url_query(self) -> str:
        """The query of the URL of this page, such as `film=holiday.mp4`."""
        view = {"film": self.film, "person": self.person, "find": self.find, "first": self.first}
        return urlencode({name: value for name, value in view.items() if value})


def render(data: PageData) -> str:
    """Returns the HTML of the page that shows who appears in films, and when."""
    forms, people, films = data.forms, data.people, data.films
    by_video = group_by_video(data.appearances)
    entries_of = {
        film.video: [PageEntry(x, film, data) for x in by_video.get(film.video, ())]
        for film in films
    }
    entries = [x for of in entries_of.values() for x in of]
    times = {name: list[PageEntry]() for name in people}
    times |= group_by_key((entry.name, entry) for entry in entries)
    unknown = sorted(
        times.keys() - people.keys() - {IGNORED},
        key=lambda name: (name.startswith(FACE), -len(times[name]), rank_group(name)),
    )
    unclear = {name for name in unknown if name.startswith(FACE)}
    everyone = [*people, *unknown, *({IGNORED} & times.keys())]
    if forms and forms.film not in entries_of and forms.person not in times:
        forms = forms._replace(film="", person="")
    # A page without forms shows everything. A page with forms shows one film, one person, or an
    # overview.
    view = forms or Forms()
    found = find(view.find, {name: name for name in everyone})
    shown = everyone
    if forms:
        nameless = [name for name in found if name not in people and name != IGNORED]
        shown = [view.person] * (view.person in times) if view.part else nameless
    of_part = entries_of.get(view.film) or times.get(view.person, ())
    grid = [face for entry in of_part for face in entry.split()]
    if view.person:
        grid.sort(key=lambda face: data.rank(face.best))
    doubtful = sorted((x for x in entries if x.doubt), key=lambda entry: -entry.doubt)
    doubtful = [] if view.part or view.find else doubtful
    step, count = (MOST_FACES, len(grid)) if view.part else (MOST_SHOWN, len(shown))
    first = min(view.first, max(count - 1, 0) // step * step)
    last = first + step if forms else None

    @functools.cache
    def portray(key: str) -> Picture | None:
        """Returns a picture of the person or face with the name or key `key`, or None."""
        clip, found = key.removeprefix(CLIP), times.get(key, [])
        if clip != key:
            found = [x for entry in entries for x in entry.split() if x.best == clip]
        return next(iter(data.list_faces(found, key)), None)

    def turn(first: int) -> str:
        """Returns the URL under which this page begins at the face or person number `first`."""
        return f"./?{view._replace(first=max(first, 0)).url_query}"

    texts = {video: " ".join([video, *{x.name for x in of}]) for video, of in entries_of.items()}
    videos = find(view.find, texts)
    banded = {view.film} if view.part else {*videos[: MOST_FILMS if forms else None]}
    if not view.part:
        shown = shown[first:last]
        order = [*(x.keys[0] for x in doubtful[:MOST_DOUBTFUL]), *shown]
        if forms and forms.at and forms.at not in order:  # the changed row is not shown any more
            forms = forms._replace(at=next(iter(order), ""))
    template, script, digest = _load_template("names.html.j2")
    return template.render(
        part=view.part, forms=forms, note=data.note, script=script, digest=digest,
        doubtful=doubtful[:MOST_DOUBTFUL], num_doubtful=len(doubtful),
        videos=videos, banded=banded,
        films=[
            _make_section(film, entries_of[film.video], people)
            for film in films if film.video in banded
        ],
        index=[name for name in found if name in people], people=shown, times_of=times,
        grid=grid[first:last], count=count,
        earlier=turn(first - step) if first else "",
        later=turn(first + step) if forms and first + step < count else "",
        once=sum(len(times[name]) == 1 for name in unknown),
        faces=data.list_faces, portray=portray, named=people, unknown={*unknown}, unclear=unclear,
        num_people=sum(name != IGNORED and name not in unclear for name in found),
        anchors={name: number for number, name in enumerate(everyone, 1)},
        embedded={*everyone[:MOST_SHOWN]}, embed=data.embed,
        likely=_list_likely, ignored=IGNORED, most_shown=MOST_SHOWN,
        percent=lambda share: format_percent(share).replace(" %", "\u00a0%"),
    )  # fmt: skip


def render_note(**values: object) -> str:
    """Returns the HTML of a page that shows a short text, and may also play a film.

    `values` are the variables of the template `note.html.j2`.
    """
    return _load_template("note.html.j2")[0].render(values, time=format_span)


def _list_likely(entries: Iterable[PageEntry]) -> list[tuple[str, float]]:
    """Returns the three most likely known people of `entries`, with probabilities, best first."""
    return _sort_likely(pair for entry in entries for pair in entry.others)[:MOST_LIKELY]


def _sort_likely(pairs: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """Returns the names in `pairs` (name, probability), the most likely name first.

    Each name is returned once, as (name, highest probability).
    """
    best = dict(sorted(pairs, key=lambda pair: pair[1]))
    return sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))


def find(words: str, texts: Mapping[str, str]) -> list[str]:
    """Returns the keys of the texts that contain all `words`. Case and accents are ignored.

    `texts` is key -> text. If no text contains all words, returns the keys of the texts that
    contain the most words. Without words, returns all keys.
    """
    wanted = strip_accents(words).split()
    if not wanted:
        return [*texts]
    plain = {key: strip_accents(text) for key, text in texts.items()}
    counts = {key: sum(word in text for word in wanted) for key, text in plain.items()}
    best = max(counts.values(), default=0)
    return [key for key, count in counts.items() if count == best and count]


@functools.cache
def _load_template(name: str) -> "tuple[jinja2.Template, str, str]":
    """Returns a template, the script of the page, and the digest of the script.

    The digest, a sha256 in base64, is for the page's Content-Security-Policy.
    """
    import jinja2

    from vidjax.evaluation import report

    # The template is in the first folder, and its style sheet in the second.
    folders = (Path(__file__).parent, Path(report.__file__).parent)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    script = (folders[0] / "names.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(name), script, digest


def format_appearance_time(appearance: Appearance, film: MediaFile) -> str:
    """Returns the time of an appearance as text, such as 3:12–3:15 or "in the photo"."""
    return "in the photo" if film.photo else format_span(appearance.start_s, appearance.end_s)


def _make_section(
    film: MediaFile, entries: list[PageEntry], people: Collection[str]
) -> tuple[str, str, list[tuple[PageEntry, int]], list[tuple[str, list[PageEntry], str]]]:
    """Returns what the page shows about a film: its name, description, timeline and people.

    The timeline is a list of (entry, number of a line). Bars in one line do not overlap. The people
    are a list of (name, entries, total duration as text). Known `people` come first, then unknown
    people, unclear faces, and ignored people. Within each of these groups, the person with the
    longest total time comes first.
    """
    rows, bars, ends = [], list[tuple[PageEntry, int]](), list[float]()
    for name, group in group_by_key((entry.name, entry) for entry in entries).items():
        total = round(sum(entry.seconds for entry in group), 3)
        rank = name == IGNORED, name.startswith(FACE), name not in people, -total, len(name), name
        duration = "" if film.photo else f"in all {_format_length(total)}"
        rows.append((rank, (name, group, duration)))
    for entry in () if film.photo else entries:
        if entry.name != IGNORED:
            left, width = entry.place
            row = next((n for n, end in enumerate(ends) if end <= left), len(ends))
            ends[row : row + 1] = [left + max(width, LEAST_GAP)]
            bars.append((entry, row))
    length = "Photo" if film.photo else f"Length {_format_length(film.seconds)}"
    about = "; the end of the film is missing" if film.damaged else ""
    about += "; too dark to find faces" if film.is_dark else ""
    about += "; upside down" if film.upside_down else ""
    by_person = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    return film.video, length + about, bars, by_person


def _format_length(seconds: float) -> str:
    return format_time(seconds, short=True) if seconds >= 1 else format_tenths(seconds)
