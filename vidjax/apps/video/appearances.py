"""Who appears when: answers of a gallery for the tracks of videos, joined in time.

A .vtt (WebVTT) or .srt file (SubRip) holds subtitles of one video, a .rttm file the times of all in
the format of speaker diarisation: video, begin and duration in seconds, person.
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
from vidjax.apps.video.features_folder import Box, Film, Track
from vidjax.utils import tables
from vidjax.utils.errors import UserError

GAP_SECONDS = 2.0  # between two sightings of a person that are one appearance
SUBTITLES = (".vtt", ".srt")
FORMATS = (*SUBTITLES, ".rttm")
# What a player would take for markup; SubRip has no escapes, so others stand in.
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
    """A person in a video, from `start_s` to `end_s`, by the tracks `clips`.

    `probability` is the lowest of all tracks; None for an unknown person, whose `identity` is the
    name of a group, or None. `evidence` are the parts by which a known person was found. `box` is
    where the face is at `box_at_s` seconds, see `Track`, by the track of the most sightings.
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


def find(
    answers: Mapping[str, Answer], films: Iterable[Film], groups: Mapping[str, str] | None = None
) -> list[Appearance]:
    """Returns the appearances in videos, in order of time, of the people whom answers name.

    Args:
      answers: clip -> answer, after `settle`.
      films: the videos.
      groups: clip -> name of an unknown person. A track without a name is one appearance.
    """
    found = []
    for film in films:
        by_name: dict[tuple[bool, str | None], list[Track]] = {}
        for track in sorted(film.tracks, key=lambda track: track.start_s):
            if (answer := answers.get(track.clip)) is None:
                continue
            if answer.identity is not None:
                by_name.setdefault((True, answer.identity), []).append(track)
            elif group := (groups or {}).get(track.clip):
                by_name.setdefault((False, group), []).append(track)
            else:
                found.append(_appearance(film, None, None, [track]))
        for (known, name), tracks in by_name.items():
            for run in _joined(tracks):
                least = min(answers[track.clip].probability for track in run)
                one = _appearance(film, name, least if known else None, run)
                parts = dict.fromkeys(p for track in run for p in answers[track.clip].evidence)
                found.append(one._replace(evidence=tuple(parts)))
    return sorted(found, key=lambda one: (one.video, one.start_s, one.identity or ""))


def by_video(found: Iterable[Appearance]) -> dict[str, list[Appearance]]:
    """Returns video -> its appearances, in their order."""
    videos: dict[str, list[Appearance]] = {}
    for one in found:
        videos.setdefault(one.video, []).append(one)
    return videos


def places(films: Iterable[Film]) -> dict[str, tuple[str, str, str]]:
    """Returns clip -> the video, and its begin and end there as text, which photos have not."""
    found = {}
    for film in films:
        for track in film.tracks:
            times = ("", "") if film.photo else (clock(track.start_s), clock(track.end_s))
            found[track.clip] = (film.video, *times)
    return found


def seen_together(films: Iterable[Film]) -> list[tuple[str, str]]:
    """Returns all pairs of clips that are seen at one time: they do not show one person."""
    found = []
    for film in films:
        live: list[Track] = []
        for track in sorted(film.tracks, key=lambda track: (track.start_s, track.clip)):
            live = [other for other in live if film.photo or other.end_s > track.start_s]
            found += [(other.clip, track.clip) for other in live]
            live.append(track)
    return found


def settle(answers: Mapping[str, Answer], films: Iterable[Film]) -> dict[str, Answer]:
    """Returns answers that name nobody twice at one time: the less probable track is unknown."""
    apart: dict[str, set[str]] = {}
    for one, other in seen_together(films):
        apart.setdefault(one, set()).add(other)
        apart.setdefault(other, set()).add(one)
    settled = dict(answers)
    for clip in sorted(answers.keys() & apart.keys(), key=lambda clip: (answers[clip].score, clip)):
        name = answers[clip].identity
        rivals = (settled[other].identity for other in apart[clip] & settled.keys())
        if name is not None and name in rivals:
            settled[clip] = answers[clip]._replace(identity=None, evidence=())
    return settled


def _appearance(
    film: Film, name: str | None, probability: float | None, tracks: Sequence[Track]
) -> Appearance:
    end = max(track.end_s for track in tracks)
    clips = tuple(track.clip for track in tracks)
    best, begin = max(tracks, key=lambda track: track.seen), tracks[0].start_s
    return Appearance(
        film.video, begin, end, name, probability, clips, box=best.box, box_at_s=best.box_at_s
    )


def _joined(tracks: Iterable[Track]) -> Iterator[list[Track]]:
    """Yields runs of tracks, sorted by begin, between which are less than GAP_SECONDS."""
    run: list[Track] = []
    end = 0.0
    for track in tracks:
        if run and track.start_s - end >= GAP_SECONDS:
            yield run
            run = []
        end = max(end, track.end_s) if run else track.end_s
        run.append(track)
    if run:
        yield run


def write(path: Path, found: Sequence[Appearance], films: Iterable[Film]) -> None:
    """Writes appearances in films to a new file, in the format that its ending names."""
    if path.suffix in SUBTITLES:
        tables.write_new(path, to_subtitles(found, path.suffix).encode())
    elif path.suffix == ".rttm":
        tables.write_new(path, to_rttm(found).encode())
    else:
        files = {film.video: _file_of(film) for film in films}
        objects = [
            {name.removesuffix("_s"): value for name, value in one._asdict().items()}
            | {"probability": one.probability and round(one.probability, 4)}
            | files[one.video]
            for one in found
        ]
        tables.write(path, COLUMNS, map(_row, objects), objects)


def percent(probability: float) -> str:
    """Returns how sure a name is, for people; never 100 %, which nothing is."""
    return "over 99 %" if probability > 0.995 else f"{round(100 * probability)} %"


def _file_of(film: Film) -> dict[str, str]:
    """Returns the path of a film, and when its file was last changed, by UTC."""
    source = film.source
    date = datetime.fromtimestamp(source.mtime_ns // 10**9, UTC)
    path = os.fsencode(source.path).decode(errors="replace")
    return {"path": path, "date": date.strftime("%Y-%m-%dT%H:%M:%SZ")}


def _row(values: Mapping[str, Any]) -> tuple[object, ...]:
    """Returns the cells of an appearance; several values in one are set apart by blanks.

    The identity of somebody who is ignored is the word IGNORED.
    """
    times = {name: round(values[name], 3) for name in ("start", "end")}
    cells = [{**values, **times, "identity": values["identity"] or IGNORED}[n] for n in COLUMNS]
    return tuple(" ".join(map(str, x)) if isinstance(x, tuple) else x for x in cells)


def to_subtitles(found: Sequence[Appearance], ending: str) -> str:
    """Returns subtitles of one video, of a kind of SUBTITLES; UserError for several videos.

    They name the known people who are seen, a line each. Many players show one subtitle at a time,
    so no two of them overlap.
    """
    if len(videos := {one.video for one in found}) > 1:
        raise UserError(
            f"subtitles are of one video, not of {len(videos)}: {', '.join(sorted(videos)[:3])}\n"
            "write a table of all: --out=names.tsv"
        )
    blocks = ["WEBVTT\n"] if ending == ".vtt" else []
    for number, (start, end, names) in enumerate(_cues(found), 1):
        times = f"{clock(start)} --> {clock(end)}"
        lines = [times] if ending == ".vtt" else [str(number), times.replace(".", ",")]
        for name in names:
            for mark, instead in MARKUP[ending].items():
                name = name.replace(mark, instead)
            lines.append(name)
        blocks.append("".join(f"{line}\n" for line in lines))
    return "\n".join(blocks)


def _cues(found: Iterable[Appearance]) -> Iterator[tuple[float, float, list[str]]]:
    """Yields begin, end and sorted names while the same known people are seen, in order of time."""
    changes: dict[float, list[tuple[str, int]]] = {}
    for one in found:
        if one.probability is not None:
            for seconds, change in ((one.start_s, 1), (one.end_s, -1)):
                changes.setdefault(round(seconds, 3), []).append((str(one.identity), change))
    seen = Counter[str]()
    for begin, end in itertools.pairwise(sorted(changes)):
        for name, change in changes[begin]:
            seen[name] += change
        if names := sorted((+seen).keys()):
            yield begin, end, names


def to_rttm(found: Iterable[Appearance]) -> str:
    """Returns a line for each appearance that has a name, of a person or of a group.

    A blank in a name becomes `_`. If two names would be equal then, `%20` stands for it.
    """
    found = [one for one in found if one.identity is not None]
    words = _words({text for one in found for text in (one.video, str(one.identity))})
    return "".join(
        f"SPEAKER {words[one.video]} 1 {one.start_s:.3f} {one.end_s - one.start_s:.3f} <NA> <NA> "
        f"{words[str(one.identity)]} <NA> <NA>\n"
        for one in found
    )


def _words(texts: Collection[str]) -> dict[str, str]:
    """Returns text -> a word without blanks, of its own."""
    words = {text: "_".join(text.split()) or "_" for text in texts}
    count = Counter(words.values())
    return {
        text: word if count[word] == 1 else re.sub(r"\s", lambda x: quote(x[0]), text)
        for text, word in words.items()
    }


def span(begin: float, end: float) -> str:
    """Returns two times as 3:12\u20133:15; with tenths, as 3:12.1\u20133:12.4, if they are near."""
    times = [clock(seconds, short=True) for seconds in (begin, end)]
    if times[0] == times[1]:
        times = [tenths(seconds) for seconds in (begin, end)]
    return "\u2013".join(dict.fromkeys(times))


def tenths(seconds: float) -> str:
    """Returns a time as 3:12.4."""
    count = round(10 * seconds)
    return f"{clock(count // 10, short=True)}.{count % 10}"


def clock(seconds: float, *, short: bool = False) -> str:
    """Returns a time as 00:03:12.500, or `short` as 3:12, to the nearest second."""
    thousandths = 1000 * round(seconds) if short else round(seconds * 1000)
    whole, rest = divmod(thousandths, 1000)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if short:
        return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{hours:02}:{minute:02}:{second:02}.{rest:03}"
