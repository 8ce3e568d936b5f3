"""Joins the answers of a gallery for the tracks of videos to appearances, and writes them.

A .vtt (WebVTT) or .srt file (SubRip) contains the subtitles of a video. A .rttm file contains
the times in all videos in the format of speaker diarisation: video, begin and duration in seconds,
person.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from vidjax.apps.gallery.answers import IGNORED, Answer
from vidjax.apps.video.features_folder import Box, Film, FilmTrack
from vidjax.utils import tables
from vidjax.utils.errors import UserError

TOLD = "told"  # the evidence of a clip that is enrolled: a user gave its name
GAP_SECONDS = 2.0  # two sightings of a person with a shorter gap are the same appearance
SUBTITLES = (".vtt", ".srt")
FORMATS = (*SUBTITLES, ".rttm")
# Characters that players read as markup. SubRip has no escapes, so similar characters replace them.
MARKUP = {
    ".vtt": {"&": "&amp;", "<": "&lt;", "-->": "--&gt;"},
    ".srt": {"<": "\u2039", ">": "\u203a", "{": "(", "}": ")"},
}
COLUMNS = {
    "video": "string", "start": "float64", "end": "float64", "identity": "string",
    "probability": "float64", "clips": "string", "evidence": "string",
    "box": "string", "box_at": "float64", "path": "string", "date": "string",
}  # fmt: skip


class Appearance(NamedTuple):
    """A person in a video, from `start_s` to `end_s` seconds.

    Attributes:
      identity: the person, or `unknown N` for an unknown person. If there is neither, None.
      probability: the lowest of all tracks; None for an unknown person.
      clips: the tracks that are joined.
      evidence: the parts, such as face and voice, that named a known person.
      box: the face in the picture at `box_at_s` seconds, from the track with the most sightings;
        see `FilmTrack`.
    """

    video: str
    start_s: float
    end_s: float
    identity: str | None
    probability: float | None
    clips: tuple[str, ...]
    evidence: tuple[str, ...] = ()
    box: Box | None = None
    box_at_s: float | None = None


def format_certainty(appearance: Appearance) -> str:
    """Returns how certain a name is: a percentage, or that the user gave the name."""
    if appearance.probability is None:
        return ""
    given = appearance.evidence == (TOLD,)
    return "as you said" if given else format_percent(appearance.probability)


def find_appearances(
    answers: Mapping[str, Answer], films: Iterable[Film], groups: Mapping[str, str] | None = None
) -> list[Appearance]:
    """Returns the appearances in videos, in order of time.

    Args:
      answers: clip -> answer, after `settle_answers`.
      films: the videos.
      groups: clip -> `unknown N`. A track without a name and a group is a separate appearance.
    """
    appearances = []
    for film in films:
        by_name: dict[tuple[bool, str], list[FilmTrack]] = {}
        for track in sorted(film.tracks, key=lambda track: track.start_s):
            if (answer := answers.get(track.clip)) is None:
                continue
            if name := answer.identity or (groups or {}).get(track.clip):
                by_name.setdefault((answer.identity is not None, name), []).append(track)
            else:
                appearances.append(_make_appearance(film, None, None, [track]))
        for (known, name), tracks in by_name.items():
            for joined in _join_tracks(tracks):
                least = min(answers[track.clip].probability for track in joined)
                parts = dict.fromkeys(p for track in joined for p in answers[track.clip].evidence)
                appearance = _make_appearance(film, name, least if known else None, joined)
                appearances.append(appearance._replace(evidence=tuple(parts)))
    return sorted(appearances, key=lambda x: (x.video, x.start_s, x.identity or ""))


def group_by_video(appearances: Iterable[Appearance]) -> dict[str, list[Appearance]]:
    """Returns video -> its appearances, in their order."""
    videos: dict[str, list[Appearance]] = {}
    for appearance in appearances:
        videos.setdefault(appearance.video, []).append(appearance)
    return videos


def list_places(films: Iterable[Film]) -> dict[str, tuple[str, str, str]]:
    """Returns clip -> video, begin and end as text; begin and end are empty for photos."""
    place_of = {}
    for film in films:
        for track in film.tracks:
            times = (format_time(seconds) for seconds in (track.start_s, track.end_s))
            place_of[track.clip] = (film.video, *(("", "") if film.photo else times))
    return place_of


def pair_seen_together(films: Iterable[Film]) -> list[tuple[str, str]]:
    """Returns all pairs of clips that are visible at the same time: they show two people."""
    pairs = []
    for film in films:
        live: list[FilmTrack] = []
        for track in sorted(film.tracks, key=lambda track: (track.start_s, track.clip)):
            live = [other for other in live if film.photo or other.end_s > track.start_s]
            pairs += [(other.clip, track.clip) for other in live]
            live.append(track)
    return pairs


def settle_answers(answers: Mapping[str, Answer], films: Iterable[Film]) -> dict[str, Answer]:
    """Returns answers in which no person is in two places at a time.

    If a name is given to two tracks at a time, the less probable track becomes unknown.
    """
    apart: dict[str, set[str]] = {}
    for clip, rival in pair_seen_together(films):
        apart.setdefault(clip, set()).add(rival)
        apart.setdefault(rival, set()).add(clip)
    settled = dict(answers)
    for clip in sorted(answers.keys() & apart.keys(), key=lambda clip: (answers[clip].score, clip)):
        name = answers[clip].identity
        rivals = (settled[rival].identity for rival in apart[clip] & settled.keys())
        if name is not None and name in rivals:
            settled[clip] = answers[clip]._replace(identity=None, evidence=())
    return settled


def _make_appearance(
    film: Film, name: str | None, probability: float | None, tracks: Sequence[FilmTrack]
) -> Appearance:
    end = max(track.end_s for track in tracks)
    clips = tuple(track.clip for track in tracks)
    best, begin = max(tracks, key=lambda track: track.seen), tracks[0].start_s
    return Appearance(
        film.video, begin, end, name, probability, clips, box=best.box, box_at_s=best.box_at_s
    )


def _join_tracks(tracks: Iterable[FilmTrack]) -> Iterator[list[FilmTrack]]:
    """Yields groups of tracks, sorted by begin, with gaps shorter than GAP_SECONDS."""
    group: list[FilmTrack] = []
    end = 0.0
    for track in tracks:
        if group and track.start_s - end >= GAP_SECONDS:
            yield group
            group = []
        end = max(end, track.end_s) if group else track.end_s
        group.append(track)
    if group:
        yield group


def write(path: Path, appearances: Sequence[Appearance], films: Iterable[Film]) -> None:
    """Writes appearances in films to a new file; its ending determines the format."""
    if path.suffix in SUBTITLES:
        tables.write_new(path, to_subtitles(appearances, path.suffix).encode())
    elif path.suffix == ".rttm":
        tables.write_new(path, to_rttm(appearances).encode())
    else:
        files = {film.video: _describe_file(film) for film in films}
        objects = [
            {name.removesuffix("_s"): value for name, value in appearance._asdict().items()}
            | {"probability": appearance.probability and round(appearance.probability, 4)}
            | files[appearance.video]
            for appearance in appearances
        ]
        tables.write(path, COLUMNS, map(_make_row, objects), objects)


def format_percent(probability: float) -> str:
    """Returns a probability as text for people; never 100 %, because no name is certain."""
    return "over 99 %" if probability > 0.995 else f"{round(100 * probability)} %"


def _describe_file(film: Film) -> dict[str, str]:
    """Returns the path of a film, and the time in UTC of its file's last change."""
    source = film.source
    date = datetime.fromtimestamp(source.mtime_ns // 10**9, UTC)
    path = os.fsencode(source.path).decode(errors="replace")
    return {"path": path, "date": date.strftime("%Y-%m-%dT%H:%M:%SZ")}


def _make_row(values: Mapping[str, Any]) -> tuple[object, ...]:
    """Returns the cells of an appearance. Several values in a cell are separated by blanks.

    The identity of a person who is ignored is the word IGNORED.
    """
    times = {name: round(values[name], 3) for name in ("start", "end")}
    cells = [{**values, **times, "identity": values["identity"] or IGNORED}[n] for n in COLUMNS]
    return tuple(" ".join(map(str, x)) if isinstance(x, tuple) else x for x in cells)


def to_subtitles(appearances: Sequence[Appearance], ending: str) -> str:
    """Returns the subtitles of a video; `ending` is in SUBTITLES.

    They show the names of the known people, a name per line. Subtitles never overlap, because many
    players show only a single subtitle at a time.

    Raises:
      UserError: the appearances are in several videos.
    """
    if len(videos := {appearance.video for appearance in appearances}) > 1:
        raise UserError(
            f"subtitles need one video, not {len(videos)}: {', '.join(sorted(videos)[:3])}\n"
            "write a table for all videos: --out=names.tsv"
        )
    blocks = ["WEBVTT\n"] if ending == ".vtt" else []
    for number, (start, end, names) in enumerate(_make_cues(appearances), 1):
        times = f"{format_time(start)} --> {format_time(end)}"
        lines = [times] if ending == ".vtt" else [str(number), times.replace(".", ",")]
        for name in names:
            for mark, replacement in MARKUP[ending].items():
                name = name.replace(mark, replacement)
            lines.append(name)
        blocks.append("".join(f"{line}\n" for line in lines))
    return "\n".join(blocks)


def _make_cues(appearances: Iterable[Appearance]) -> Iterator[tuple[float, float, list[str]]]:
    """Yields begin, end and sorted names of each interval with the same known people, in order."""
    changes: dict[float, list[tuple[str, int]]] = {}
    for appearance in appearances:
        if appearance.probability is not None:
            for seconds, change in ((appearance.start_s, 1), (appearance.end_s, -1)):
                changes.setdefault(round(seconds, 3), []).append((str(appearance.identity), change))
    seen = Counter[str]()
    for begin, end in itertools.pairwise(sorted(changes)):
        for name, change in changes[begin]:
            seen[name] += change
        if names := sorted((+seen).keys()):
            yield begin, end, names


def to_rttm(appearances: Iterable[Appearance]) -> str:
    """Returns a line for each appearance of a person or a group.

    Blanks in a name become `_`. If this makes two names equal, blanks become `%20`.
    """
    appearances = [x for x in appearances if x.identity is not None]
    words = _make_words({text for x in appearances for text in (x.video, str(x.identity))})
    return "".join(
        f"SPEAKER {words[x.video]} 1 {x.start_s:.3f} {x.end_s - x.start_s:.3f} <NA> <NA> "
        f"{words[str(x.identity)]} <NA> <NA>\n"
        for x in appearances
    )


def _make_words(texts: Collection[str]) -> dict[str, str]:
    """Returns text -> a word without blanks. Different texts have different words."""
    words = {text: "_".join(text.split()) or "_" for text in texts}
    count = Counter(words.values())
    return {
        text: word if count[word] == 1 else re.sub(r"\s", lambda x: quote(x[0]), text)
        for text, word in words.items()
    }


def format_span(begin: float, end: float) -> str:
    """Returns two times as 3:12\u20133:15; if they look equal, as 3:12.1\u20133:12.4."""
    times = [format_time(seconds, short=True) for seconds in (begin, end)]
    if times[0] == times[1]:
        times = [format_tenths(seconds) for seconds in (begin, end)]
    return "\u2013".join(dict.fromkeys(times))


def format_tenths(seconds: float) -> str:
    """Returns a time as 3:12.4."""
    count = round(10 * seconds)
    return f"{format_time(count // 10, short=True)}.{count % 10}"


def format_time(seconds: float, *, short: bool = False) -> str:
    """Returns a time as 00:03:12.500, or `short` as 3:12, rounded to seconds."""
    thousandths = 1000 * round(seconds) if short else round(seconds * 1000)
    whole, rest = divmod(thousandths, 1000)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if short:
        return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{hours:02}:{minute:02}:{second:02}.{rest:03}"
