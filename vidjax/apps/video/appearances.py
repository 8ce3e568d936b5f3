"""Joins the named tracks of films into appearances of people, and writes tables and subtitles.

A track is a person in a shot of a film. A .vtt (WebVTT) or .srt (SubRip) file contains the
subtitles of one video. A .rttm file, the format of speaker diarisation, contains the appearances in
all videos. Each line has the video, the start and the duration in seconds, and the person.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vidjax.apps.gallery.answers import FACE, NOBODY, UNKNOWN, Answer, parse_group_number
from vidjax.apps.gallery.labelling import find_known
from vidjax.apps.gallery.vectors import Vectors, select_usable_clips
from vidjax.apps.video.features_folder import Box, FaceTrack, MediaFile, select_films
from vidjax.utils import tables
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import IGNORED, escape

if TYPE_CHECKING:
    from vidjax.apps.gallery.gallery import Gallery

TOLD = "told"  # the evidence for a clip that a user enrolled for a person or a stranger
GAP_SECONDS = 2.0  # two tracks of a person with a shorter gap between them are one appearance
SUBTITLES = (".vtt", ".srt")
FORMATS = (*SUBTITLES, ".rttm")
# Characters that players read as markup. SubRip has no escapes, so similar characters replace them.
MARKUP = {
    ".vtt": {"&": "&amp;", "<": "&lt;", "-->": "--&gt;"},
    ".srt": {"<": "\u2039", ">": "\u203a", "{": "(", "}": ")"},
}
COLUMNS = {  # name of a column -> type in Apache Arrow
    "video": "string", "start": "float64", "end": "float64", "identity": "string",
    "probability": "float64", "clips": "string", "evidence": "string",
    "box": "string", "box_at": "float64", "path": "string", "date": "string",
}  # fmt: skip


class Appearance(NamedTuple):
    """A period, from `start_s` to `end_s` seconds, in which a video shows a person."""

    video: str
    start_s: float
    end_s: float
    identity: str | None  # the name, or `unknown 3`, or None for an ignored person
    probability: float | None  # the lowest of all joined tracks; None for an unknown person
    clips: tuple[str, ...]  # the names of the joined tracks
    evidence: tuple[str, ...] = ()  # what identified the person, such as "face" and "audio"
    box: Box | None = None  # of the face, from the track with the most sightings
    box_at_s: float | None = None  # the time of the picture with the box


def format_certainty(appearance: Appearance) -> str:
    """Returns the probability of a name as text, such as "87 %", or "" for an unknown person.

    For a name that a user gave, the text is "as you said".
    """
    if appearance.probability is None:
        return ""
    given = appearance.evidence == (TOLD,)
    return "as you said" if given else format_percent(appearance.probability)


def find_appearances(
    answers: Mapping[str, Answer],
    films: Iterable[MediaFile],
    groups: Mapping[str, str] | None = None,
) -> list[Appearance]:
    """Returns the appearances of people in films, by video and in order of time.

    If the gaps between tracks of a person are short, the tracks are joined into one appearance.

    Args:
      answers: the answer of the gallery for each clip, after `settle_answers`.
      groups: clip -> unknown person, such as `unknown 3`. If a clip has no name and is not in
        `groups`, it is an appearance of an ignored person.
    """
    appearances = []
    for film in films:
        by_name: dict[tuple[bool, str], list[FaceTrack]] = {}
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
                p = least if known else None
                appearances.append(_make_appearance(film, name, p, joined, tuple(parts)))
    return sorted(appearances, key=lambda x: (x.video, x.start_s, x.identity or ""))


def group_by_video(appearances: Iterable[Appearance]) -> dict[str, list[Appearance]]:
    """Returns name of a video -> appearances in this video, in the given order."""
    return group_by_key((appearance.video, appearance) for appearance in appearances)


def list_places(films: Iterable[MediaFile]) -> dict[str, tuple[str, str, str]]:
    """Returns clip -> (video, start, end), as texts. For photos, start and end are empty."""
    place_of = {}
    for film in films:
        for track in film.tracks:
            times = (format_time(seconds) for seconds in (track.start_s, track.end_s))
            place_of[track.clip] = (film.video, *(("", "") if film.photo else times))
    return place_of


def pair_seen_together(films: Iterable[MediaFile]) -> list[tuple[str, str]]:
    """Returns all pairs of clips that overlap in time, and so must show two different people."""
    pairs = []
    for film in films:
        live: list[FaceTrack] = []
        for track in sorted(film.tracks, key=lambda track: (track.start_s, track.clip)):
            live = [other for other in live if film.photo or other.end_s > track.start_s]
            pairs += [(other.clip, track.clip) for other in live]
            live.append(track)
    return pairs


class NamedTracks(NamedTuple):
    """The people in tracks of films."""

    answers: dict[str, Answer]  # clip -> answer
    enrolled: dict[str, str | None]  # enrolled clip -> its person, or None for a stranger
    votes: dict[str, str] | None  # clip -> group that votes on one name, see `group_votes`
    # Clip -> name that it did not get, because a more similar face of the same time has the name. A
    # mirror or a split screen shows a person twice.
    twins: dict[str, str]


def name_tracks(
    gallery: "Gallery",
    vectors: Vectors,
    films: Sequence[MediaFile],
    identify: Callable[..., Mapping[str, Answer]],
    votes: dict[str, str] | None = None,
    numbers: Mapping[str, int] | None = None,
    apart: Collection[tuple[int, int]] = (),
) -> NamedTracks:
    """Names the people in tracks of films.

    Similar tracks are grouped, and the tracks of a group vote on one name. An enrolled track gets
    the name under which it is enrolled. A track does not get a name that a user denied. If only
    unclear faces of a person are enrolled, no other track gets the name of this person.

    `identify` is the method `gallery.identify`, with fixed arguments. If `votes` are given, the
    tracks are not grouped again. `numbers` are clip -> number of an unknown person, or 0 for a clip
    that a user ignores. `apart` are numbers of people who certainly differ.
    """
    enrolled, denied = find_known(gallery.state, vectors), select_films(gallery.denied, films)
    answers = dict.fromkeys(vectors.names, NOBODY)
    if gallery.identities:
        votes = votes or group_votes(gallery, vectors, films)
        answers = remove_unclear_names(identify(vectors, groups=votes), gallery, films)
    for clip in denied.keys() & answers.keys():
        best = tuple(pair for pair in answers[clip].best if pair[0] not in denied[clip])
        answers[clip] = answers[clip]._replace(best=best)
        if answers[clip].identity in denied[clip]:
            answers[clip] = answers[clip]._replace(identity=None, evidence=())
    numbers = numbers or {}
    ignored = {clip for clip in answers.keys() & numbers.keys() if numbers[clip] == 0}
    enrolled = dict.fromkeys(ignored) | enrolled
    for clip, name in enrolled.items():
        known = NOBODY if name is None else Answer(name, 1.0, 0.0, ((name, 1.0),))
        answers[clip] = known._replace(evidence=(TOLD,))
    answers = _tell_apart(answers, numbers, apart)
    settled = settle_answers(answers, films)
    twins = {c: x.identity for c, x in answers.items() if x.identity and not settled[c].identity}
    return NamedTracks(settled, enrolled, votes, twins)


def _tell_apart(
    answers: Mapping[str, Answer], numbers: Mapping[str, int], apart: Collection[tuple[int, int]]
) -> dict[str, Answer]:
    """Returns answers in which two people who differ have different names.

    If both people have the same name, the clips of the less probable person lose it. A name by a
    user is kept. It counts only if more than half of the clips have it, because a user may name
    wrong faces one by one. For the arguments, see `name_tracks`.
    """
    numbered = sorted(answers.keys() & numbers.keys()) if apart else ()
    answers, clips_of = dict(answers), group_by_key((numbers[clip], clip) for clip in numbered)

    def list_clips(number: int) -> dict[str, list[str]]:
        clips = clips_of.get(number, ())
        named = group_by_key((name, clip) for clip in clips if (name := answers[clip].identity))
        return {
            name: of for name, of in named.items()
            if 2 * len(of) > len(clips) or any(answers[x].evidence != (TOLD,) for x in of)
        }  # fmt: skip

    for number, other in apart:
        sides = list_clips(number), list_clips(other)
        for name in sorted(sides[0].keys() & sides[1].keys()):
            weaker = min(sides, key=lambda named: max(answers[x].score for x in named[name]))
            for clip in weaker[name]:
                if answers[clip].evidence != (TOLD,):
                    answers[clip] = answers[clip]._replace(identity=None, evidence=())
    return answers


def group_votes(
    gallery: "Gallery", vectors: Vectors, films: Sequence[MediaFile]
) -> dict[str, str] | None:
    """Groups tracks that vote on one name; returns clip -> group, for `Gallery.identify`.

    A gallery of a run cannot compare groups. For such a gallery, the result is None.
    """
    if not gallery.origin.cards:
        return None
    # A face that is only a little unclear counts as clear, because other tracks of the group
    # correct a wrong name.
    clarity = dict.fromkeys(list_unclear(films), 0.0)
    return gallery.group(vectors, pair_seen_together(films), clarity=clarity, for_votes=True)


def group_unknown(
    gallery: "Gallery",
    vectors: Vectors,
    films: Collection[MediaFile],
    together: Mapping[str, int] | None = None,
    apart: Collection[tuple[int, int]] = (),
    settled: Collection[int] = (),
) -> dict[str, str]:
    """Groups tracks without a name; returns clip -> unknown person, such as `unknown 3`.

    Two people with unclear faces look alike. So an unclear face is in no group, and has a number
    that no other track has, unless it is in `together`.

    `together` is clip -> number. Clips with the same number are one person. `apart` are pairs of
    these numbers, of people who differ. For `settled`, see `Gallery.group`.
    """
    together = together or {}
    unclear = list_unclear(films)
    faces = sorted(unclear & select_usable_clips(vectors).keys())
    clear = vectors.only({*vectors.names} - unclear)
    clarity = {track.clip: track.clarity for film in films for track in film.tracks}
    pairs = pair_seen_together(films)
    of_number = {together[clip]: clip for clip in clear.names if clip in together}
    pairs += [(of_number[x], of_number[y]) for x, y in apart if {x, y} <= of_number.keys()]
    groups = gallery.group(clear, pairs, clarity=clarity, together=together, settled=settled)
    first = 1 + len(groups)
    place = {number: groups[clip] for number, clip in of_number.items()}
    for number, clip in enumerate(faces):
        groups[clip] = place.setdefault(together.get(clip, -number), f"{UNKNOWN}{first + number}")
    return groups


def mark_unclear(groups: Mapping[str, str], films: Iterable[MediaFile]) -> dict[str, str]:
    """Renames the unknown people who are single unclear faces, such as `unknown face 4`."""
    unclear, sizes = list_unclear(films), Counter(groups.values())
    return {
        clip: f"{FACE}{parse_group_number(group)}"
        if clip in unclear and sizes[group] == 1 else group  # else a user has joined it to others
        for clip, group in groups.items()
    }  # fmt: skip


def remove_unclear_names(
    answers: Mapping[str, Answer], gallery: "Gallery", films: Iterable[MediaFile]
) -> dict[str, Answer]:
    """Removes names of people of whom only unclear faces are enrolled.

    We enrolled each of 47 unclear faces of women: of all clear faces that then got the same name,
    only 27 % showed the same woman.
    """
    unclear = list_unclear(films)
    clear = {entry.identity for clip, entry in gallery.clips.items() if clip not in unclear}
    return {
        clip: x
        if x.identity is None or x.identity in clear
        else x._replace(identity=None, evidence=())
        for clip, x in answers.items()
    }


def list_unclear(films: Iterable[MediaFile]) -> set[str]:
    """Returns the clips with unclear faces, see `FaceTrack.unclear`."""
    return {track.clip for film in films for track in film.tracks if track.unclear}


def settle_answers(answers: Mapping[str, Answer], films: Iterable[MediaFile]) -> dict[str, Answer]:
    """Returns answers in which tracks that overlap in time have different names.

    If two such tracks have the same name, the less probable name is removed. A name that a user
    gave to a track remains.
    """
    apart: dict[str, set[str]] = {}
    for clip, rival in pair_seen_together(films):
        apart.setdefault(clip, set()).add(rival)
        apart.setdefault(rival, set()).add(clip)
    settled = dict(answers)
    for clip in sorted(answers.keys() & apart.keys(), key=lambda clip: (answers[clip].score, clip)):
        name = answers[clip].identity
        rivals = (settled[rival].identity for rival in apart[clip] & settled.keys())
        by_user = answers[clip].evidence == (TOLD,)
        if name is not None and not by_user and name in rivals:
            settled[clip] = answers[clip]._replace(identity=None, evidence=())
    return settled


def _make_appearance(
    film: MediaFile,
    name: str | None,
    probability: float | None,
    tracks: Sequence[FaceTrack],
    evidence: tuple[str, ...] = (),
) -> Appearance:
    end = max(track.end_s for track in tracks)
    clips = tuple(track.clip for track in tracks)
    best, begin = max(tracks, key=lambda track: track.seen), tracks[0].start_s
    return Appearance(
        film.video, begin, end, name, probability, clips, evidence, best.box, best.box_at_s
    )


def _join_tracks(tracks: Iterable[FaceTrack]) -> Iterator[list[FaceTrack]]:
    """Yields groups of tracks with gaps below two seconds. `tracks` are in order of time."""
    group: list[FaceTrack] = []
    end = 0.0
    for track in tracks:
        if group and track.start_s - end >= GAP_SECONDS:
            yield group
            group = []
        end = max(end, track.end_s)
        group.append(track)
    if group:
        yield group


def write(path: Path, appearances: Sequence[Appearance], films: Iterable[MediaFile]) -> None:
    """Writes appearances to a new file in the format of its ending, such as .tsv, .vtt or .rttm."""
    if path.suffix in SUBTITLES:
        tables.write_new(path, to_subtitles(appearances, path.suffix).encode())
    elif path.suffix == ".rttm":
        tables.write_new(path, to_rttm(appearances).encode())
    else:
        files = {film.video: _describe_file(film) for film in films}
        objects = [
            {name.removesuffix("_s"): value for name, value in x._asdict().items()}
            | {"start": round(x.start_s, 3), "end": round(x.end_s, 3)}
            | {"probability": x.probability and round(x.probability, 4), **files[x.video]}
            for x in appearances
        ]
        tables.write(path, COLUMNS, map(_make_row, objects), objects)


def format_percent(probability: float) -> str:
    """Returns a probability as text, such as "87 %", but never 100 %: at most "over 99 %"."""
    return "over 99 %" if probability >= 0.995 else f"{round(100 * probability)} %"


def _describe_file(film: MediaFile) -> dict[str, str]:
    """Returns the path of a film and the date of its last change (UTC), as columns of the table."""
    source = film.source
    date = datetime.fromtimestamp(source.mtime_ns // 10**9, UTC)
    path = os.fsencode(source.path).decode(errors="replace")
    return {"path": path, "date": date.strftime("%Y-%m-%dT%H:%M:%SZ")}


def _make_row(values: Mapping[str, Any]) -> tuple[object, ...]:
    """Returns the row of an appearance in a table. Blanks separate several values in a cell."""
    cells = [{**values, "identity": values["identity"] or IGNORED}[name] for name in COLUMNS]
    return tuple(" ".join(map(str, x)) if isinstance(x, tuple) else x for x in cells)


def to_subtitles(appearances: Sequence[Appearance], ending: str) -> str:
    """Returns the text of a .vtt or .srt file with the names of the known people in a video.

    Each name is a line. Subtitles never overlap in time, because many players show only one.
    `ending` is ".vtt" or ".srt". Raises UserError if the appearances are in several videos.
    """
    if len(videos := {appearance.video for appearance in appearances}) > 1:
        raise UserError(
            f"subtitles can show only one video, not {len(videos)}: "
            f"{', '.join(sorted(videos)[:3])}\nname the features of one video, "
            "--input=FOLDER/VIDEO.npz, or write the times of all videos: --out=names.rttm"
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
    """Yields (start, end, sorted names) of each period in which the same known people appear."""
    changes: dict[float, list[tuple[str, int]]] = {}
    for appearance in appearances:
        if appearance.probability is not None:
            for seconds, change in ((appearance.start_s, 1), (appearance.end_s, -1)):
                changes.setdefault(round(seconds, 3), []).append((str(appearance.identity), change))
    seen = Counter[str]()
    for begin, end in itertools.pairwise(sorted(changes)):
        for name, change in changes[begin]:
            seen[name] += change
        seen = +seen  # drops people who are no longer seen
        if seen:
            yield begin, end, sorted(seen)


def to_rttm(appearances: Iterable[Appearance]) -> str:
    """Returns the text of a .rttm file with a line for each appearance of a person.

    Ignored people and photos are left out. Blanks in names become `_`. If this makes two names
    equal, their blanks become `%20` instead. In all names, `%20` becomes `%2520`.
    """
    appearances = [x for x in appearances if x.identity is not None and x.end_s > x.start_s]
    words = _make_words({text for x in appearances for text in (x.video, str(x.identity))})
    return "".join(
        f"SPEAKER {words[x.video]} 1 {x.start_s:.3f} {x.end_s - x.start_s:.3f} <NA> <NA> "
        f"{words[str(x.identity)]} <NA> <NA>\n"
        for x in appearances
    )


def _make_words(texts: Collection[str]) -> dict[str, str]:
    """Returns text -> word without blanks. Different texts get different words."""
    words = {text: "_".join(map(escape, text.split())) for text in texts}
    count = Counter(words.values())
    return {text: word if count[word] == 1 else escape(text) for text, word in words.items()}


def format_span(begin: float, end: float) -> str:
    """Returns a period as text: 3:12–3:15, or if both ends are in one second, 3:12.1–3:12.4."""
    times = [format_time(seconds, short=True) for seconds in (begin, end)]
    if times[0] == times[1]:
        times = [format_tenths(seconds) for seconds in (begin, end)]
    return "\u2013".join(dict.fromkeys(times))


def format_tenths(seconds: float) -> str:
    """Returns a time as text with tenths of a second, such as 3:12.4."""
    count = round(10 * seconds)
    return f"{format_time(count // 10, short=True)}.{count % 10}"


def format_time(seconds: float, *, short: bool = False) -> str:
    """Returns a time as text, such as 00:03:12.500, or if `short` is True, 3:12."""
    thousandths = 1000 * round(seconds) if short else round(seconds * 1000)
    whole, rest = divmod(thousandths, 1000)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if short:
        return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{hours:02}:{minute:02}:{second:02}.{rest:03}"
