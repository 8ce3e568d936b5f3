"""Decides who appears when in films.

A track is a person in a shot of a film. Named tracks of a person are joined into appearances.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.gallery.answers import FACE, MIN_NAMED_PROBABILITY, NOBODY, UNKNOWN, Answer
from vidjax.apps.gallery.store import State
from vidjax.apps.gallery.vectors import Vectors, select_usable_clips
from vidjax.apps.video.media import Box, FaceTrack, MediaFile
from vidjax.apps.video.said import Said
from vidjax.utils.groups import group_by_key
from vidjax.utils.messages import format_time

TOLD = "told"  # the evidence for a clip that a user enrolled for a person or a stranger
GAP_SECONDS = 2.0  # two tracks of a person with a shorter gap between them are one appearance


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

    @property
    def mark(self) -> str:
        """Returns what texts for readers write after the name: "?" below one half, else ""."""
        return "" if (self.probability or 1.0) >= MIN_NAMED_PROBABILITY else "?"


def format_certainty(appearance: Appearance) -> str:
    """Returns the probability of a name as text, such as "87 %", or "" for an unknown person.

    If a user gave the name, the text is "as you said". If the face got the name only because of
    other shots of the person, the text is "23 %, by other shots".
    """
    if appearance.probability is None:
        return ""
    if appearance.evidence == (TOLD,):
        return "as you said"
    other = ", by other shots" if answers_lib.OTHER_CLIPS in appearance.evidence else ""
    return format_percent(appearance.probability) + other


def find_appearances(
    answers: Mapping[str, Answer],
    films: Iterable[MediaFile],
    groups: Mapping[str, str] | None = None,
) -> list[Appearance]:
    """Returns the appearances of people in films, by video and in order of time.

    If the gaps between tracks of a person are short, the tracks are joined into one appearance.

    Args:
      answers: clip -> answer of the gallery, after `settle_answers`.
      groups: clip -> unknown person, such as `unknown 3`. If a clip has no name and is not in
        `groups`, it is returned as an appearance of an ignored person.
    """
    appearances = []
    for film in films:
        by_name = group_by_key(
            ((x.identity is not None, x.identity or (groups or {}).get(track.clip)), track)
            for track in sorted(film.tracks, key=lambda track: track.start_s)
            if (x := answers.get(track.clip)) is not None
        )
        for (known, name), tracks in by_name.items():
            for joined in _join_tracks(tracks) if name else ([track] for track in tracks):
                found = [answers[track.clip] for track in joined]
                evidence = dict.fromkeys(part for x in found for part in x.evidence if name)
                best = max(joined, key=lambda track: track.seen)
                appearances.append(Appearance(
                    film.video, joined[0].start_s, max(x.end_s for x in joined), name,
                    min(x.probability for x in found) if known else None,
                    tuple(x.clip for x in joined), tuple(evidence), best.box, best.box_at_s,
                ))  # fmt: skip
    return sorted(appearances, key=lambda x: (x.video, x.start_s, x.identity or ""))


def group_by_video(appearances: Iterable[Appearance]) -> dict[str, list[Appearance]]:
    """Groups appearances by video: name of a video -> its appearances, in the given order."""
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
    """Returns the pairs of clips that show two people at the same time, as names of clips.

    These are all pairs of clips of a film that overlap in time, and all pairs of clips of a photo.
    """
    pairs = []
    for film in films:
        live: list[FaceTrack] = []
        for track in sorted(film.tracks, key=lambda track: (track.start_s, track.clip)):
            live = [other for other in live if film.photo or other.end_s > track.start_s]
            pairs += [(other.clip, track.clip) for other in live]
            live.append(track)
    return pairs


class Tracks(NamedTuple):
    """Tracks, each of a person in a shot of a film, and the gallery of the known people."""

    state: State  # the gallery
    vectors: Vectors  # the embeddings of the tracks
    films: Sequence[MediaFile]


class NamedTracks(NamedTuple):
    """The names of tracks. A track is a person in a shot of a film."""

    answers: dict[str, Answer]  # clip -> answer
    # Clip -> its person, as a user said; None for a stranger or an ignored face.
    told: dict[str, str | None]
    votes: dict[str, str] | None  # clip -> group that votes on one name, see `group_votes`
    # Clip -> name that it did not get, because a more similar face of the same time has the name. A
    # mirror or a split screen shows a person twice.
    twins: dict[str, str]


def name_tracks(
    tracks: Tracks,
    identify: Callable[[Vectors, Mapping[str, str] | None], Mapping[str, Answer]],
    told: Mapping[str, str | None],
    votes: dict[str, str] | None = None,
    said: Said | None = None,
) -> NamedTracks:
    """Names tracks. A track is a person in a shot of a film, and is stored as a clip.

    Similar tracks are grouped, and the tracks of a group vote on one name. A track does not get a
    name that a user denied. If only unclear faces of a person are enrolled, no other track gets the
    name of this person.

    `identify` returns the answers of the gallery for clips and their groups. `told` is clip -> its
    person, as a user said; None for a stranger. If `votes`, clip -> group, is given, the tracks are
    not grouped again. `said` are the corrections of users.
    """
    state, vectors, films = tracks
    answers, said = dict.fromkeys(vectors.names, NOBODY), said or Said()
    if state.index.names:
        votes = votes or group_votes(tracks)
        answers = _remove_unclear_names(identify(vectors, votes), tracks)
    ignored = {clip: said.ignored[clip] for clip in answers if clip in said.ignored}
    told = {clip: None for clip, yields in ignored.items() if not yields} | {**told}
    answers |= _deny(answers, said)
    for clip, name in told.items():
        answers[clip] = _tell(name)
    answers = _tell_apart(answers, said)
    settled = settle_answers(answers, films)
    twins = {c: x.identity for c, x in answers.items() if x.identity and not settled[c].identity}
    for clip in ignored:
        if settled[clip].identity is None:
            told[clip], settled[clip] = None, _tell(None)
    return NamedTracks(settled, told, votes, twins)


def list_apart(films: Iterable[MediaFile]) -> list[tuple[str, str, float]]:
    """Returns pairs of clear faces that are visible together: (clip, other clip, clarity).

    The clarity is the clarity of the better face. The pairs are for `card_notes.check_apart`.
    """
    clear = {x.clip: x.clarity for film in films for x in film.tracks if not x.unclear}
    pairs = (pair for pair in pair_seen_together(films) if {*pair} <= clear.keys())
    return [(x, y, max(clear[x], clear[y])) for x, y in pairs]


def _tell(name: str | None) -> Answer:
    """Returns the answer for a face to which a user has given a name.

    If `name` is None, the user has said that the face is a stranger, or is to be ignored.
    """
    known = NOBODY if name is None else Answer(name, 1.0, 0.0, ((name, 1.0),))
    return known._replace(evidence=(TOLD,))


def _unname(answer: Answer) -> Answer:
    return answer._replace(identity=None, evidence=())


def _deny(answers: Mapping[str, Answer], said: Said) -> dict[str, Answer]:
    """Removes a name from the answer of a clip if a user said that it is the wrong name.

    Returns the new answers of such clips, clip -> answer, and no other answers.
    """
    changed = {}
    for clip, names in said.denied.items():
        if isinstance(clip, str) and (answer := answers.get(clip)):
            answer = answer._replace(best=tuple(x for x in answer.best if x[0] not in names))
            changed[clip] = _unname(answer) if answer.identity in names else answer
    return changed


def _tell_apart(answers: Mapping[str, Answer], said: Said) -> dict[str, Answer]:
    """Removes the name of one of two people who share it, if a user said that the people differ.

    The less probable person loses the name, except in clips that a user has named. Returns the
    answers of all clips.
    """
    answers = dict(answers)
    clips_of = group_by_key(
        (number, clip) for clip, number in said.numbers.items()
        if said.apart and isinstance(clip, str) and clip in answers
    )  # fmt: skip

    def list_clips(number: int) -> dict[str, list[str]]:
        # A name from users only, for at most half of the clips, may be a mistake, and is ignored.
        clips = sorted(clips_of.get(number, ()))
        named = group_by_key((name, clip) for clip in clips if (name := answers[clip].identity))
        return {
            name: of for name, of in named.items()
            if 2 * len(of) > len(clips) or any(answers[x].evidence != (TOLD,) for x in of)
        }  # fmt: skip

    for number, other in sorted(said.apart):
        sides = list_clips(number), list_clips(other)
        for name in sorted(sides[0].keys() & sides[1].keys()):
            weaker = min(sides, key=lambda named: max(answers[x].score for x in named[name]))
            for clip in weaker[name]:
                if answers[clip].evidence != (TOLD,):
                    answers[clip] = _unname(answers[clip])
    return answers


def group_votes(tracks: Tracks) -> dict[str, str] | None:
    """Groups clips that seem to show the same person; returns clip -> group.

    `Gallery.identify` gives all clips of a group the same name. If the gallery was made from a
    trained run, clips are not grouped, and the result is None.
    """
    state, vectors, films = tracks
    if not state.origin.cards:
        return None
    # A face that is only a little unclear counts as clear, because other tracks of the group
    # correct a wrong name.
    clarity = dict.fromkeys(list_unclear(films), 0.0)
    apart = pair_seen_together(films)
    return answers_lib.group(state, vectors, apart, clarity=clarity, for_votes=True)


def group_unknown(
    tracks: Tracks,
    together: Mapping[str, int] | None = None,
    apart: Collection[tuple[int, int]] = (),
    settled: Collection[int] = (),
) -> dict[str, str]:
    """Groups clips without a name; returns clip -> unknown person, such as `unknown 3`.

    Faces that are too small or too blurred look alike even if they show two people. So a clip of
    such a face becomes a separate unknown person, unless `together` joins it with other clips.

    `together` is clip -> number. Clips with the same number are one person. `apart` are pairs of
    numbers of two different people. For `settled`, see `Gallery.group`.
    """
    (state, vectors, films), together = tracks, together or {}
    unclear = list_unclear(films)
    faces = sorted(unclear & select_usable_clips(vectors).keys())
    clear = vectors.only({*vectors.names} - unclear)
    clarity = {track.clip: track.clarity for film in films for track in film.tracks}
    pairs = pair_seen_together(films)
    of_number = {together[clip]: clip for clip in clear.names if clip in together}
    pairs += [(of_number[x], of_number[y]) for x, y in apart if {x, y} <= of_number.keys()]
    groups = answers_lib.group(
        state, clear, pairs, clarity=clarity, together=together, settled=settled
    )
    first = 1 + len(groups)
    place = {number: groups[clip] for number, clip in of_number.items()}
    for number, clip in enumerate(faces):
        groups[clip] = place.setdefault(together.get(clip, -number), f"{UNKNOWN}{first + number}")
    return groups


def mark_unclear(groups: Mapping[str, str], films: Iterable[MediaFile]) -> dict[str, str]:
    """Renames each unknown person who is a single unclear face: `unknown 4` to `unknown face 4`.

    `groups` is clip -> unknown person. Returns clip -> name.
    """
    unclear, sizes = list_unclear(films), Counter(groups.values())
    return {
        clip: f"{FACE}{answers_lib.parse_group_number(group)}"
        if clip in unclear and sizes[group] == 1 else group  # else a user has joined it to others
        for clip, group in groups.items()
    }  # fmt: skip


def _remove_unclear_names(answers: Mapping[str, Answer], tracks: Tracks) -> dict[str, Answer]:
    """Removes names from answers if all enrolled faces of the person are too small or too blurred.

    Such names are often wrong. When clear faces were compared with 47 unclear enrolled faces of
    women, only 27 % of the names were right.
    """
    unclear, clips = list_unclear(tracks.films), tracks.state.clips
    clear = {entry.identity for clip, entry in clips.items() if clip not in unclear}
    clear.add(None)
    return {clip: x if x.identity in clear else _unname(x) for clip, x in answers.items()}


def list_unclear(films: Iterable[MediaFile]) -> set[str]:
    """Returns the names of the clips whose faces are small or blurred, see `FaceTrack.unclear`."""
    return {track.clip for film in films for track in film.tracks if track.unclear}


def settle_answers(answers: Mapping[str, Answer], films: Iterable[MediaFile]) -> dict[str, Answer]:
    """Removes names, so that tracks of `films` that overlap in time have different names.

    The track with the less probable name loses the name, unless a user gave it. Returns all
    answers.
    """
    pairs, settled = pair_seen_together(films), dict(answers)
    apart = group_by_key((x, y) for pair in pairs for x, y in (pair, pair[::-1]))
    for clip in sorted(answers.keys() & apart.keys(), key=lambda clip: (answers[clip].score, clip)):
        name = answers[clip].identity
        rivals = (settled[rival].identity for rival in apart[clip] if rival in settled)
        by_user = answers[clip].evidence == (TOLD,)
        if name is not None and not by_user and name in rivals:
            settled[clip] = _unname(answers[clip])
    return settled


def _join_tracks(tracks: Iterable[FaceTrack]) -> list[list[FaceTrack]]:
    """Groups the tracks of a person. Gaps between the tracks of a group are below two seconds.

    `tracks` are in order of time.
    """
    groups, end = list[list[FaceTrack]](), -GAP_SECONDS
    for track in tracks:
        if track.start_s - end >= GAP_SECONDS:
            groups.append([])
        groups[-1].append(track)
        end = max(end, track.end_s)
    return groups


def format_percent(probability: float) -> str:
    """Returns a probability as text, such as "87 %", but never 100 %: at most "over 99 %"."""
    return "over 99 %" if probability >= 0.995 else f"{round(100 * probability)} %"
