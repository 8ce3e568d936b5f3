"""Numbers unknown people in films: the person with number 3 has the name `unknown 3`.

A clip is the face of one person in a shot. The file `unknown.json` stores the number of each clip
for later calls of `vidjax who`. If a film is new, all clips without a name are grouped by
similarity again. A group gets the number that most of its clips had.

Corrections by users, in the log `said.jsonl`, always hold. If a user has said that some clips show
one person, the clips stay in one group. If a user has said that a clip does not show a person, the
clip never returns to the group of this person.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from vidjax.apps import earlier_said
from vidjax.apps.features_folder import NUMBERS, MediaFile
from vidjax.apps.gallery.answers import parse_group_number
from vidjax.apps.gallery.vectors import select_usable_clips
from vidjax.apps.said import Face
from vidjax.apps.video.faces import Said
from vidjax.apps.video.naming import Tracks, group_unknown
from vidjax.utils import files, json_files
from vidjax.utils.json_files import Count, Sha256, Size

REMEDY = "delete it; the next call then numbers unknown people again"
MOST_BYTES = 256 * files.MB  # the largest `unknown.json` that is read


class NumberedFace(Face, kw_only=True, frozen=True, omit_defaults=True):
    """A face, and the number of the unknown person whom it shows."""

    number: Size


class UnknownNumbers(Struct, kw_only=True, forbid_unknown_fields=True):
    """The contents of `unknown.json`: faces of unknown people in films, and their numbers."""

    format: Literal[2] = 2
    # Digests of the films and their clips, see `MediaFile.digest`.
    films: Annotated[list[Sha256], Meta(max_length=files.MAX_ITEMS)] = []
    # If a face gets a name, its number is kept.
    faces: Annotated[list[NumberedFace], Meta(max_length=files.MAX_ITEMS)] = []
    highest: Count = 0  # the highest number that an unknown person has or had

    def of_faces(self) -> dict[Face, int]:
        """Returns face -> number of the unknown person whom the face shows."""
        return {
            Face(film=x.film, at=x.at, box=x.box, places=x.places): x.number for x in self.faces
        }

    def update(
        self, films: Sequence[MediaFile], said: Said, numbers: Mapping[str, int], unread: Set[str]
    ) -> "UnknownNumbers":
        """Returns the new contents of `unknown.json`: the numbers of faces in `films` and `unread`.

        `numbers` is clip (a face in a shot of `films`) -> number. `unread` has the sha256 of films
        whose features were deleted because the nets changed: their faces keep the old numbers.
        Numbers from corrections are left out, because the log `said` contains them.
        """
        stored = said.given | {x: n for x, n in numbers.items() if x not in said.numbered}
        face_of = {clip: face for film in films for clip, face in film.faces.items()}
        faces = list[NumberedFace]()
        for key, number in stored.items():
            face = face_of.get(key) if isinstance(key, str) else key
            if face and (isinstance(key, str) or face.film in unread):
                faces.append(NumberedFace(**msgspec.structs.asdict(face), number=number))
        highest = max(self.highest, said.highest, *numbers.values(), *stored.values(), 0)
        return UnknownNumbers(
            films=sorted(film.digest for film in films), faces=faces, highest=highest
        )


def read_numbers(out: Path) -> UnknownNumbers:
    """Reads `unknown.json` in `out`. If the file is missing, returns an empty UnknownNumbers."""
    if not files.exists(path := out / NUMBERS):
        return UnknownNumbers()
    content, _ = json_files.load(path, dict, REMEDY, MOST_BYTES)
    if not earlier_said.is_earlier(content):
        return json_files.parse(path, content, UnknownNumbers, REMEDY)
    films, numbers, highest = earlier_said.number_faces(out)
    faces = [NumberedFace(**msgspec.structs.asdict(x), number=n) for x, n in numbers.items()]
    return UnknownNumbers(films=sorted(films), faces=faces, highest=highest)


def write_numbers(out: Path, numbers: UnknownNumbers) -> None:
    """Writes `unknown.json`, the numbers of unknown people, into the folder `out`."""
    files.write_json(out / NUMBERS, msgspec.to_builtins(numbers))
    files.hide(out / NUMBERS)


def number_people(
    tracks: Tracks, said: Said, before: UnknownNumbers, highest: int
) -> dict[str, int]:
    """Groups similar clips; returns clip -> number of the unknown person.

    If a film is new, only groups that a user has corrected stay together. Otherwise, all old groups
    stay together, and new clips may join them. A group gets the number that most of its clips had.

    Args:
      tracks: the clips without a name.
      said: the corrections in the log, and the numbers of clips after the last call.
      before: the contents of `unknown.json` after the last call.
      highest: no two groups with numbers up to `highest` are joined, unless a film is new.
    """
    vectors = tracks.vectors
    kept = {clip: said.numbers[clip] for clip in vectors.names if clip in said.numbers}
    together, settled = kept, {number for number in kept.values() if number <= highest}
    known_films = {*before.films}
    if any(film.digest not in known_films for film in tracks.films):
        together = {clip: number for clip, number in kept.items() if number in said.fixed}
        settled = said.fixed
    elif settled >= {*kept.values()} and not select_usable_clips(
        vectors.only({*vectors.names} - kept.keys())
    ):
        return kept
    groups = group_unknown(tracks, together, said.apart, settled)
    return _keep_numbers(groups, kept, said.fixed, max(before.highest, said.highest))


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
    rank = parse_group_number

    def order(pair: tuple[str, int]) -> tuple[bool, int, int, int]:
        return pair[1] not in fixed, -votes[pair], pair[1], rank(pair[0])

    for group, old in sorted(votes, key=order):
        if group not in number and old not in taken:
            number[group] = old
            taken.add(old)
    new_groups = sorted({*groups.values()} - number.keys(), key=rank)
    number |= {group: new for new, group in enumerate(new_groups, highest + 1)}
    return {clip: number[group] for clip, group in groups.items()}
