"""Decides who appears in films, from faces and from what people said.

`decide` is a pure function: it reads no file. The people are enrolled in memory: by their photos,
and by the faces to which users gave a name.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from vidjax.apps.gallery import answers as answers_lib, card_notes
from vidjax.apps.gallery.answers import UNKNOWN, Answer, parse_group_number
from vidjax.apps.gallery.changes import Draft
from vidjax.apps.gallery.store import State, StoredClip
from vidjax.apps.gallery.vectors import Vectors, select_usable_clips
from vidjax.apps.video import log, naming
from vidjax.apps.video.log import Line
from vidjax.apps.video.media import MediaFile
from vidjax.apps.video.naming import Appearance, NamedTracks, Tracks
from vidjax.apps.video.said import Said
from vidjax.utils.terminal import ignore_count


class Faces(NamedTuple):
    """The faces in all films of a folder of results, and in the photos of people."""

    films: Sequence[MediaFile]  # with the photos of the tables
    photos: Sequence[MediaFile]  # of people; their clips begin with `people/`
    vectors: Vectors | None  # the embeddings of the clips of `films`; None if there are no clips
    usable: Mapping[str, StoredClip]  # the clips of `vectors` with a usable frame
    # Clip -> group, see `naming.group_votes`, or None if they are not known yet.
    votes: dict[str, str] | None
    photo_vectors: Mapping[str, np.ndarray]  # clip of a photo -> vector
    # Digests of films and photos that the present nets have not read.
    unread: Collection[str]
    state: State  # a gallery with the comparison of vectors; its clips are replaced


class Rule(NamedTuple):
    """When a face gets a name, see `Gallery.identify`."""

    fpir: float | None = None
    threshold: float | None = None


class Decision(NamedTuple):
    """The names of the people in all films of a folder of results, see `decide`."""

    faces: Faces
    said: Said
    state: State  # the gallery of the people
    people: Mapping[str, Collection[str]]  # name of each enrolled or named person -> enrolled clips
    votes: dict[str, str] | None  # clip -> group. The clips of a group vote on one name
    answers: dict[str, Answer]  # clip -> answer of the gallery
    # Clip without a name -> unknown person, such as `unknown 3`, or an unclear face, such as
    # `unknown face 4`. Ignored people are left out.
    unknown: dict[str, str]
    appearances: list[Appearance]  # by video, and in order of time
    twins: Mapping[str, str]  # see `naming.NamedTracks`
    guesses: Mapping[str, int]  # clip -> number of an unknown person, if the log lacks the number
    raw: Mapping[str, Answer]  # clip -> answer of the gallery before corrections

    @property
    def films(self) -> Sequence[MediaFile]:
        """The films and photos of the tables."""
        return self.faces.films

    @property
    def highest(self) -> int:
        """The highest number that an unknown person has or had."""
        return max(self.said.highest, *self.guesses.values(), 0)

    def count_clips(self) -> dict[str, int]:
        """Returns name of a person -> number of the person's enrolled clips."""
        return {name: len(clips) for name, clips in self.people.items()}


def decide(
    faces: Faces, lines: Sequence[Line], rule: Rule, last: Decision | None = None
) -> Decision:
    """Names the people in the clips of all films, see `name_tracks`, and numbers unknown people.

    A group of similar clips without a name is an unknown person. The person keeps the number in the
    log, or gets a new number. A nameless face that is too small or too blurred is in no group.

    Args:
      lines: the lines of the log.
      last: an earlier decision on the same faces. Its comparisons are used to save time.
    """
    said = Said(lines, [*faces.films, *faces.photos])
    state = enrol(last.state if last else faces.state, faces, said)
    raw = last.raw if last and last.state.index is state.index else {}

    def answer(clips: Vectors, groups: Mapping[str, str] | None) -> Mapping[str, Answer]:
        nonlocal raw
        if not raw:
            chosen = answers_lib.choose_rule(state, *rule)
            raw = answers_lib.identify(state, chosen, clips, 5, groups, ignore_count)
        return raw

    named, numbers = NamedTracks({}, {}, None, {}), dict[str, int]()
    given = dict(said.numbers)
    if faces.vectors is not None:
        state = card_notes.check_apart(state, faces.vectors, naming.list_apart(faces.films))
        tracks = Tracks(state, faces.vectors, faces.films)
        told = {x: said.names[x] for x in faces.usable if x in said.names}
        votes, highest = (last.votes, last.highest) if last else (faces.votes, said.highest)
        named, numbers = name_and_number(tracks, said, told, answer, votes, highest)
    groups = {clip: f"{UNKNOWN}{number}" for clip, number in numbers.items()}
    groups = naming.mark_unclear(groups, faces.films)
    in_films = naming.find_appearances(named.answers, faces.films, groups)
    # People without enrolled clips: names of faces, also of films that the nets have not read.
    unread = (x for key, x in said.names.items() if not isinstance(key, str))
    names = [*(x.identity for x in named.answers.values()), *unread]
    people = {name: () for name in names if name} | state.people
    guesses = {
        clip: number for clip, number in numbers.items()
        if clip not in said.numbered and given.get(clip) != number
    }  # fmt: skip
    return Decision(
        faces, said, state, dict(sorted(people.items())), named.votes, named.answers, groups,
        in_films, named.twins, guesses, raw,
    )  # fmt: skip


def enrol(state: State, faces: Faces, said: Said) -> State:
    """Returns a gallery in which exactly the clips `said.list_enrolled` are enrolled."""
    wanted = dict[str, StoredClip]()
    for clip, name in said.list_enrolled().items():
        if clip in faces.usable:
            wanted[clip] = faces.usable[clip]._replace(identity=name)
        elif clip in faces.photo_vectors:
            wanted[clip] = StoredClip(name, faces.photo_vectors[clip])
    draft = Draft(state)
    draft.hold(wanted)
    return draft.finish()[0] if draft else state


def name_and_number(
    tracks: Tracks,
    said: Said,
    told: Mapping[str, str | None],
    identify: Callable[..., Mapping[str, Answer]],
    votes: dict[str, str] | None,
    highest: int,
) -> tuple[NamedTracks, dict[str, int]]:
    """Names the people in tracks, and gives unknown people a number, such as 3 for `unknown 3`.

    Returns the names, and clip -> unknown person's number. Adds the numbers to `said.numbers`.

    For `highest`, see `number_people`. For the other arguments, see `naming.name_tracks`.
    """
    # `said.apart` contains pairs of numbers. A new number may complete a pair, and change names.
    while True:
        named = naming.name_tracks(tracks, identify, told, votes, said)
        nameless = {clip for clip, answer in named.answers.items() if answer.identity is None}
        nameless -= named.told.keys()
        rest = tracks._replace(vectors=tracks.vectors.only(nameless))
        numbers = number_people(rest, said, highest)
        before, said.numbers = said.numbers, said.numbers | numbers
        if not said.apart or said.numbers == before:
            return named, numbers
        votes, highest = named.votes, max(said.highest, *numbers.values())


def number_people(tracks: Tracks, said: Said, highest: int) -> dict[str, int]:
    """Groups similar clips; returns clip -> number of the unknown person.

    If a film is new, only groups that a user has corrected stay together. Otherwise, all old groups
    stay together, and new clips may join them. A group gets the number that most of its clips had.

    Args:
      tracks: the clips without a name.
      said: the corrections in the log, and the numbers of clips after the last call.
      highest: no two groups with numbers up to `highest` are joined, unless a film is new.
    """
    vectors = tracks.vectors
    kept = {clip: said.numbers[clip] for clip in vectors.names if clip in said.numbers}
    together, settled = kept, {number for number in kept.values() if number <= highest}
    if any(identify_film(film) not in said.films for film in tracks.films):
        together = {clip: number for clip, number in kept.items() if number in said.fixed}
        settled = said.fixed
    elif settled >= {*kept.values()} and not select_usable_clips(
        vectors.only({*vectors.names} - kept.keys())
    ):
        return kept
    groups = naming.group_unknown(tracks, together, said.apart, settled)
    return _keep_numbers(groups, kept, said.fixed, max(highest, said.highest))


def identify_film(film: MediaFile) -> tuple[str, str]:
    """Returns the digest of a film, and a digest of its clips: other nets may find other clips."""
    return film.sha256, film.digest[:32]


def _keep_numbers(
    groups: Mapping[str, str], before: Mapping[str, int], fixed: Set[int], highest: int
) -> dict[str, int]:
    """Gives each group of clips a different number; returns clip -> number.

    `groups` is clip -> preliminary name of its group. `before` is clip -> old number. Pairs (group,
    old number of some of its clips) are chosen greedily: first the numbers in `fixed`, of people
    whom a user has corrected, then the pairs with the most clips. All other groups get numbers
    above `highest`.
    """
    votes = Counter((group, before[clip]) for clip, group in groups.items() if clip in before)
    number: dict[str, int] = {}
    taken: set[int] = set()

    def order(pair: tuple[str, int]) -> tuple[bool, int, int, int]:
        return pair[1] not in fixed, -votes[pair], pair[1], parse_group_number(pair[0])

    for group, old in sorted(votes, key=order):
        if group not in number and old not in taken:
            number[group] = old
            taken.add(old)
    new_groups = sorted({*groups.values()} - number.keys(), key=parse_group_number)
    number |= {group: new for new, group in enumerate(new_groups, highest + 1)}
    return {clip: number[group] for clip, group in groups.items()}


def list_new_lines(decision: Decision) -> list[Line]:
    """Returns lines for the log with the new numbers of unknown people, and with new films."""
    lines, said = list[Line](), decision.said
    face_of = {clip: x for film in decision.films for clip, x in film.faces.items()}
    key_of = {number: said.find_unknown(number) for number in decision.guesses.values()}
    for number in sorted(number for number, key in key_of.items() if key is None):
        key_of[number] = log.make_key()
        lines.append(Line(says="person", person=key_of[number], number=number))
    for clip, number in decision.guesses.items():
        if face := face_of.get(clip):
            lines.append(log.about(face, "guess", person=key_of[number]))
    films = dict.fromkeys(map(identify_film, decision.films))
    new = (film for film in films if film not in said.films)
    return [*lines, *(Line(says="film", film=film, of=of) for film, of in new)]
