"""Decides who appears in films, from their faces, a gallery, and the log of users' corrections."""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vidjax.apps import features_folder, said as said_lib
from vidjax.apps.features_folder import MediaFile
from vidjax.apps.gallery import answers as answers_lib, card_notes
from vidjax.apps.gallery.answers import Answer
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.labelling import complete, find_known
from vidjax.apps.gallery.vectors import Vectors, select_usable_clips
from vidjax.apps.said import Line
from vidjax.apps.video import clip_inputs, naming, people_photos, unknown_numbers
from vidjax.apps.video.faces import Said
from vidjax.apps.video.naming import Appearance, NamedTracks, Tracks
from vidjax.apps.video.unknown_numbers import UnknownNumbers
from vidjax.utils import files

WAIT_SECONDS = 20.0  # the longest time for which a change of names waits for another program


class Decision(NamedTuple):
    """The names of the people in all films of a folder of results, see `decide`."""

    digest: str  # of the gallery
    people: Mapping[str, Collection[str]]  # name of each enrolled or named person -> enrolled clips
    films: Sequence[MediaFile]  # also photos
    vectors: Vectors | None  # the embeddings of all clips; None if there are no clips
    votes: dict[str, str] | None  # clip -> group. The clips of a group vote on one name
    answers: dict[str, Answer]  # clip -> answer of the gallery
    # Clip without a name -> unknown person, such as `unknown 3`, or an unclear face, such as
    # `unknown face 4`. Ignored people are left out.
    unknown: dict[str, str]
    appearances: list[Appearance]  # by video, and in order of time
    numbers: UnknownNumbers
    said: Said
    twins: Mapping[str, str]  # see `naming.NamedTracks`
    # `State.rows`, and clip -> answer of the gallery before corrections.
    raw: tuple[int, Mapping[str, Answer]]
    card: str  # see `card_notes.describe`

    def count_clips(self) -> dict[str, int]:
        """Returns name of a person -> number of the person's enrolled clips."""
        return {name: len(clips) for name, clips in self.people.items()}


def lock_changes(out: Path, wait: float = WAIT_SECONDS) -> contextlib.AbstractContextManager[None]:
    """Locks the names of people in the folder of results `out`, for a `with` block.

    A program must hold this lock to change or write names. Raises InUseError if another program
    holds the lock for `wait` seconds. `name_people` reads films under a different lock, so a user
    can correct names while films are read.
    """
    return files.lock(out, "out", ".changes.lock", wait=wait)


def read_said(
    out: Path,
    films: Sequence[MediaFile],
    lines: Sequence[Line] | None = None,
    numbers: UnknownNumbers | None = None,
) -> Said:
    """Returns the names and corrections that users gave to faces in `films` or enrolled photos.

    `lines` are the log lines of users, and `numbers` is the content of `unknown.json`. By default,
    both are read from the folder of results, `out`.
    """
    lines = said_lib.read(out) if lines is None else lines
    known = {film.sha256 for film in films}
    is_film = all(line.film is None or line.film in known for line in lines)
    photos = [] if is_film else people_photos.list_photo_files(out)
    return Said(lines, [*films, *photos], (numbers or unknown_numbers.read_numbers(out)).of_faces())


def decide(
    gallery: Gallery,
    out: Path,
    films: Sequence[MediaFile],
    identify: Callable[..., dict[str, Answer]],
    last: Decision | None = None,
    lines: Sequence[Line] | None = None,
) -> Decision:
    """Names the people in the clips of all films, see `name_tracks`, and numbers unknown people.

    A group of similar clips without a name is an unknown person. The person keeps the number in
    `unknown.json`, or gets a new number. A nameless face that is too small or too blurred is in no
    group. Faces to which users gave a name are enrolled. The numbers are written to `unknown.json`,
    so the caller must hold `lock_changes`.

    Args:
      out: the folder of results.
      identify: the method `gallery.identify`, with its options `fpir` and `threshold` already set.
      last: an earlier decision on the same films. Its embeddings and groups are used to save time.
      lines: the lines of the log of users' corrections. By default, they are read from `out`.
    """
    vectors, votes = (last.vectors, last.votes) if last else (None, None)
    if not last and (clips := {track.clip for film in films for track in film.tracks}):
        vectors = clip_inputs.embed_clips(gallery, out / said_lib.FEATURES, clips)
        complete(gallery, vectors)
    before = unknown_numbers.read_numbers(out)
    said = read_said(out, films, lines, before)
    if vectors:
        enrol_named(gallery, vectors, said)
    # Another program may change the gallery at any time. A change after this line is shown later.
    digest, people, rows = gallery.digest, gallery.people, gallery.state.rows
    raw = last.raw[1] if last and last.raw[0] == rows else {}

    def answer(clips: Vectors, *, groups: Mapping[str, str] | None) -> Mapping[str, Answer]:
        nonlocal raw
        raw = raw or identify(clips, groups=groups)
        return raw

    named, numbers = NamedTracks({}, {}, votes, {}), dict[str, int]()
    if vectors is not None:
        highest = max(last.numbers.highest, last.said.highest) if last else before.highest
        tracks = Tracks(gallery, vectors, films)
        named, numbers = name_and_number(tracks, said, before, answer, votes, highest)
    answers = named.answers
    groups = {clip: f"{answers_lib.UNKNOWN}{number}" for clip, number in numbers.items()}
    groups = naming.mark_unclear(groups, films)
    unread = {film.sha256 for film in features_folder.find_unread(out / said_lib.FEATURES).values()}
    after = before.update(films, said, numbers, unread)
    # The clips of `unknown.tsv` are enrolled only if their films are in `unknown.json`.
    if after != before:
        unknown_numbers.write_numbers(out, after)
    in_films = naming.find_appearances(answers, films, groups)
    people |= {x.identity: () for x in answers.values() if x.identity and x.identity not in people}
    # People who are known only from films that are not read with the present nets.
    waiting = (
        x for key, x in said.names.items() if not isinstance(key, str) and key.film in unread
    )
    people |= {name: () for name in waiting if name and name not in people}
    card = card_notes.describe(gallery.state)
    return Decision(
        digest, people, films, vectors, named.votes, answers, groups, in_films, after, said,
        named.twins, (rows, raw), card,
    )  # fmt: skip


def name_and_number(
    tracks: Tracks,
    said: Said,
    before: UnknownNumbers,
    identify: Callable[..., Mapping[str, Answer]],
    votes: dict[str, str] | None,
    highest: int,
) -> tuple[NamedTracks, dict[str, int]]:
    """Names the people in tracks, and gives unknown people a number, such as 3 for `unknown 3`.

    Returns the names, and clip -> unknown person's number. Adds the numbers to `said.numbers`.

    For `before` and `highest`, see `unknown_numbers.number_people`. For the other arguments, see
    `naming.name_tracks`.
    """
    # `said.apart` contains pairs of numbers. A new number may complete a pair, and change names.
    while True:
        named = naming.name_tracks(tracks, identify, votes, said)
        nameless = {clip for clip, answer in named.answers.items() if answer.identity is None}
        nameless -= named.told.keys()
        rest = tracks._replace(vectors=tracks.vectors.only(nameless))
        numbers = unknown_numbers.number_people(rest, said, before, highest)
        known, said.numbers = said.numbers, said.numbers | numbers
        if not said.apart or said.numbers == known:
            return named, numbers
        votes, highest = named.votes, max(before.highest, said.highest, *numbers.values())


def enrol_named(gallery: Gallery, vectors: Vectors, said: Said) -> None:
    """Enrols the faces in films under the names that users gave to the faces.

    `vectors` are the embeddings of all clips of the films. `said` are the names and corrections. A
    face whose name was taken back is removed from the gallery. A face in a photo of the gallery
    gets its new name.
    """
    names = {clip: name for clip, name in said.names.items() if isinstance(clip, str)}
    enrolled = find_known(gallery.state, vectors)  # reads the present state
    labels = {
        clip: label for clip, face in people_photos.list_faces(gallery).items()
        if (label := said.label(face.key, face.person)) != gallery.clips[clip].identity
    }  # fmt: skip
    clips = select_usable_clips(vectors.only(names))
    wanted = {clip: x._replace(identity=names[clip]) for clip, x in clips.items()}
    labels |= {
        clip: wanted[clip].identity for clip, name in enrolled.items()
        if clip in wanted and name != wanted[clip].identity
    }  # fmt: skip
    gone = enrolled.keys() - wanted.keys()
    new = {clip: x for clip, x in wanted.items() if clip not in enrolled}
    if not (labels or gone or new):
        return
    with gallery.change(log=False) as draft:
        # A film may have been replaced by a film whose clips have the same names.
        replaced = {clip: draft.clips[clip] for clip in new if clip in draft.clips}
        draft.remove(clip=[*gone, *replaced])
        draft.add(new | {f"{clip} (replaced)": x for clip, x in replaced.items()})
        for clip, label in labels.items():
            draft.relabel(clip, label)
