"""The numbers of unknown people in films, and which clips a user put together or took apart.

`unknown.json` contains them, so that later calls of `vidjax who` keep them. The person with number
3 has the name `unknown 3`. Clips keep their numbers until a film is added. Then all clips without a
name are grouped again. If a user has changed a person, the clips of this person stay together. If a
user has taken clips out of a person, they stay apart from the rest of this person.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from vidjax.apps.gallery.answers import parse_group_number
from vidjax.apps.gallery.vectors import Vectors, select_usable_clips
from vidjax.apps.video.appearances import group_unknown
from vidjax.apps.video.features_folder import NUMBERS, MediaFile, select_films
from vidjax.runs import schemas
from vidjax.runs.json_types import Count, Sha256, Size, Text
from vidjax.utils import files

if TYPE_CHECKING:
    from vidjax.apps.gallery.gallery import Gallery

REMEDY = "delete it; the next call then numbers unknown people again"
MOST_BYTES = 256 * files.MB  # the largest `unknown.json` that is read
IGNORED_NUMBER = 0  # of a clip that a user ignores
Pairs = Annotated[list[tuple[Size, Size]], Meta(max_length=files.MAX_ITEMS)]


class UnknownNumbers(Struct, kw_only=True, forbid_unknown_fields=True):
    """The contents of `unknown.json`.

    A film is identified by a digest of its file and its clips. `move` and other methods return a
    changed copy.
    """

    format: Literal[1] = 1
    # Digest of the film -> clip -> number of the unknown person, or 0 for a clip that a user
    # ignores. Films without unknown people are included. If a clip gets a name, its number is kept.
    films: Annotated[dict[Sha256, dict[Text, Count]], Meta(max_length=files.MAX_ITEMS)]
    # The numbers of people whom a user has changed. The clips of each number stay one person.
    fixed: Annotated[list[Size], Meta(max_length=files.MAX_ITEMS)] = []
    apart: Pairs = []  # the numbers of two people, because a user took clips out of one of them
    # Pairs (number, lower number) of unknown people whom a user joined. Only older versions wrote
    # them. They are applied when the file is read.
    same: Pairs = []
    removed: Count = 0  # the numbers up to this one are not given to new people

    def __post_init__(self) -> None:
        if any(low >= number for number, low in self.same):
            raise ValueError("the second number of a pair in `same` must be lower than the first")
        joined, self.same = self.same, []
        for number, low in sorted(joined, reverse=True):
            new = self.move({}, low, [number])
            self.films, self.fixed, self.removed = new.films, new.fixed, new.removed

    @property
    def highest(self) -> int:
        """The highest number that an unknown person has or had, or 0."""
        numbers = (number for clips in self.films.values() for number in clips.values())
        return max(self.removed, *self.fixed, *numbers, 0)

    def move(
        self, clips: Mapping[str, str], number: int, groups: Collection[int] = ()
    ) -> "UnknownNumbers":
        """Gives `number` to some clips, and to all clips of the numbers `groups`.

        `clips` is clip -> digest of its film. All clips with this number then stay one person. If
        only a part of the clips of another number is moved, the two numbers stay two people. The
        number 0 means that the clips are ignored.
        """
        old = {self.films.get(digest, {}).get(clip, 0) for clip, digest in clips.items()}
        films = {digest: {**of} for digest, of in self.films.items()}
        for clip, digest in clips.items():
            films.setdefault(digest, {})[clip] = number
        left = {x for of in films.values() for x in of.values()}
        moved = msgspec.structs.replace(
            self, films=films, removed=max(self.highest, number, *groups)
        )
        moved = moved._rename(dict.fromkeys({*groups} | old - left, number))
        if number == IGNORED_NUMBER:
            return moved
        divided = (old & left) - {0, number, *groups}
        pairs = {(min(x, number), max(x, number)) for x in divided}
        if number > self.highest:  # a new person also differs from people who differ from the old
            pairs |= {
                (x, number) for pair in self.apart for x in pair if len({*pair} & divided) == 1
            } - {(x, number) for x in old}
        return msgspec.structs.replace(
            moved,
            fixed=sorted({*moved.fixed, *divided, number}),
            apart=sorted({*moved.apart} | pairs),
        )

    def take_out(self, clips: Mapping[str, str]) -> "UnknownNumbers":
        """Makes clips a new unknown person, unless they are all clips of an unknown person.

        `clips` is as in `move`.
        """
        numbers = {self.films.get(digest, {}).get(clip) for clip, digest in clips.items()}
        pairs = (pair for of in self.films.values() for pair in of.items())
        known = {clip for clip, number in pairs if number and number in numbers}
        whole = len(numbers) == 1 and known == clips.keys()
        return self if whole else self.move(clips, self.highest + 1)

    def join(self, groups: Iterable[str]) -> "UnknownNumbers":
        """Joins unknown people, such as `unknown 5`, to one person, who gets the lowest number."""
        low, *others = sorted(map(parse_group_number, groups))
        return self.move({}, low, others)

    def _rename(self, new: Mapping[int, int]) -> "UnknownNumbers":
        """Replaces numbers, old -> new."""
        if not new:
            return self
        pairs = {tuple(sorted(new.get(x, x) for x in pair)) for pair in self.apart}
        return msgspec.structs.replace(
            self,
            films={
                digest: {clip: new.get(x, x) for clip, x in of.items()}
                for digest, of in self.films.items()
            },
            fixed=sorted({new.get(x, x) for x in self.fixed} - {IGNORED_NUMBER}),
            apart=sorted((low, high) for low, high in pairs if 0 < low < high),
        )

    def keep(self, digests: Set[str]) -> "UnknownNumbers":
        """Forgets films whose digests are not in `digests`."""
        if not self.films.keys() - digests:
            return self
        kept = {digest: self.films[digest] for digest in sorted({*digests} & self.films.keys())}
        return msgspec.structs.replace(self, films=kept, removed=self.highest)

    def update(self, films: Iterable[MediaFile], numbers: Mapping[str, int]) -> "UnknownNumbers":
        """Stores the number of each unknown clip of `films`. `numbers` is clip -> number."""
        films = [*films]
        known, fixed = select_films(self.films, films), {*self.fixed}
        # A fixed person may now be in the group of another number.
        new = {x: numbers[clip] for clip, x in known.items() if x in fixed and clip in numbers}
        updated = self._rename({x: number for x, number in new.items() if x != number})
        table = {**updated.films}
        for film in films:
            clips = sorted({track.clip for track in film.tracks} & numbers.keys())
            digest = film.digest
            table[digest] = table.get(digest, {}) | {clip: numbers[clip] for clip in clips}
        return msgspec.structs.replace(updated, films=table)


def read_numbers(out: Path) -> UnknownNumbers:
    """Returns the numbers of unknown people in a folder of results.

    If there is no `unknown.json`, no person has a number.
    """
    if not files.exists(path := out / NUMBERS):
        return UnknownNumbers(films={})
    return schemas.read(path, UnknownNumbers, REMEDY, MOST_BYTES)


def write_numbers(out: Path, numbers: UnknownNumbers) -> None:
    """Writes `unknown.json`."""
    files.write_json(out / NUMBERS, msgspec.to_builtins(numbers))
    files.hide(out / NUMBERS)


def number_people(
    gallery: "Gallery",
    vectors: Vectors,
    films: Collection[MediaFile],
    before: UnknownNumbers,
    highest: int,
) -> dict[str, int]:
    """Returns clip -> number of the unknown person, for clips without a name.

    If a film is new, all clips are grouped. Then a group keeps a number if most of its clips had
    this number. If no film is new, people keep their clips and numbers. Only clips without a
    number, and new people, are grouped and may join these people.

    Args:
      vectors: the vectors of the clips.
      before: the numbers of the last call.
      highest: the people with higher numbers are new, because a user has made them.
    """
    known = select_films(before.films, films)
    kept = {clip: known[clip] for clip in vectors.names if known.get(clip)}
    together, settled = kept, {number for number in kept.values() if number <= highest}
    if any(film.digest not in before.films for film in films):
        fixed, settled = {*before.fixed}, set[int]()
        together = {clip: number for clip, number in kept.items() if number in fixed}
    elif settled >= {*kept.values()} and not select_usable_clips(
        vectors.only({*vectors.names} - kept.keys())
    ):
        return kept
    groups = group_unknown(gallery, vectors, films, together, before.apart, settled)
    return _keep_numbers(groups, kept, before.highest)


def _keep_numbers(
    groups: Mapping[str, str], before: Mapping[str, int], highest: int
) -> dict[str, int]:
    """Gives groups of clips the numbers of the last call; returns clip -> number.

    `groups` is clip -> group, such as `unknown 3`. `before` is clip -> number in the last call. A
    group gets the number that most of its clips had. If several groups claim a number, the group
    with the most clips of this number gets it. All other groups get new numbers above `highest`.
    """
    votes = Counter((group, before[clip]) for clip, group in groups.items() if clip in before)
    number: dict[str, int] = {}
    taken: set[int] = set()
    rank = parse_group_number
    for group, old in sorted(votes, key=lambda pair: (-votes[pair], pair[1], rank(pair[0]))):
        if group not in number and old not in taken:
            number[group] = old
            taken.add(old)
    new_groups = sorted({*groups.values()} - number.keys(), key=rank)
    number |= {group: new for new, group in enumerate(new_groups, highest + 1)}
    return {clip: number[group] for clip, group in groups.items()}
