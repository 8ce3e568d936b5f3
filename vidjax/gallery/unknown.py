"""Unknown people: the table that takes their names, and the numbers that they keep.

A group of clips is `unknown 1`, a table of groups has the columns clip and identity. Whoever writes
a name in place of a number says whom the clip shows. `Numbers` holds what clips were called before:
names of clips and numbers, no vector and no name of a person.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from vidjax import files, tables
from vidjax.data.untrusted.names import show
from vidjax.errors import UserError
from vidjax.extract.folder import Film
from vidjax.gallery.answers import UNKNOWN
from vidjax.run import formats
from vidjax.run.formats import Sha256, Size, Text

REMEDY = "delete it: unknown people are numbered anew"
FILE_BYTES = 256 * files.MB


class Numbers(Struct, kw_only=True):
    """Digest of a film's clips -> clip -> the number of its group when it was last unknown.

    A film that was replaced, or cut in other clips, has another digest: numbers go with films. One
    without unknown people is there, too.
    """

    format: Literal[1] = 1
    films: Annotated[dict[Sha256, dict[Text, Size]], Meta(max_length=files.MAX_ITEMS)]

    def of(self, films: Iterable[Film]) -> dict[str, int]:
        """Returns clip -> number, of films."""
        return {c: n for film in films for c, n in self.films.get(_digest(film), {}).items()}

    def clips(self, films: Iterable[Film]) -> set[str]:
        """Returns all clips of those films that are here."""
        return {one.clip for film in films if _digest(film) in self.films for one in film.tracks}

    @property
    def highest(self) -> int:
        """The highest number that a clip has; 0 without any."""
        return max((n for clips in self.films.values() for n in clips.values()), default=0)

    def only(self, films: Iterable[Film]) -> "Numbers":
        """Returns the numbers of films, without those of all others."""
        kept = {digest for film in films if (digest := _digest(film)) in self.films}
        return Numbers(films={digest: self.films[digest] for digest in sorted(kept)})

    def updated(self, films: Iterable[Film], groups: Mapping[str, str]) -> "Numbers":
        """Returns these numbers, and those of groups, clip -> `unknown N`, of clips of films."""
        found = {**self.films}
        for film in films:
            clips = {one.clip for one in film.tracks} & groups.keys()
            new = {clip: number_of(groups[clip]) for clip in sorted(clips)}
            found[_digest(film)] = found.get(_digest(film), {}) | new
        return Numbers(films=found)


def _digest(film: Film) -> str:
    tracks = [[track.clip, track.start_s, track.end_s] for track in film.tracks]
    return files.sha256_json([film.sha256, tracks])


def read_numbers(path: Path) -> Numbers:
    """Returns what a file of numbers says; none if there is no file."""
    if not files.exists(path):
        return Numbers(films={})
    return formats.read(path, Numbers, REMEDY, FILE_BYTES)


def write_numbers(path: Path, numbers: Numbers) -> None:
    """Writes a file of numbers; it appears whole."""
    files.write_json(path, msgspec.to_builtins(numbers))


def number_of(group: str) -> int:
    """Returns N of `unknown N`."""
    return int(group.removeprefix(UNKNOWN))


def keep_numbers(
    groups: Mapping[str, str], before: Mapping[str, int], highest: int
) -> dict[str, str]:
    """Returns clip -> `unknown N`, where groups keep the numbers that their clips had.

    A group takes the number that most of its clips had, if no other group has more clips of it.
    Others get numbers above the `highest`, larger groups lower ones.

    Args:
      groups: clip -> name of its group, see `answers.name_groups`.
      before: clip -> number.
    """
    votes = Counter((group, before[clip]) for clip, group in groups.items() if clip in before)
    number: dict[str, int] = {}
    order = sorted(votes, key=lambda pair: (-votes[pair], pair[1], number_of(pair[0])))
    for group, old in order:
        if group not in number and old not in number.values():
            number[group] = old
    new = max(highest, *before.values(), 0)
    for group in sorted({*groups.values()} - number.keys(), key=number_of):
        new += 1
        number[group] = new
    return {clip: f"{UNKNOWN}{number[group]}" for clip, group in groups.items()}


def rows(groups: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns the rows of a table of groups, in order of numbers and clips."""
    return sorted(groups.items(), key=lambda pair: (number_of(pair[1]), pair[0]))


def read_names(path: Path) -> dict[str, str]:
    """Returns clip -> person of a table of groups; leaves out people who are still unknown."""
    return {clip: name for clip, name in read(path) if not name.startswith(UNKNOWN)}


def read(path: Path) -> Iterator[tuple[str, str]]:
    """Yields clip and name of a table of groups; UserError for a line that is wrong."""
    found: dict[str, str] = {}
    for number, cells in tables.read_tsv(path):
        if cells == ["clip", "identity"]:
            continue
        if len(cells) != 2 or not all(map(str.strip, cells)):
            raise UserError(f"{path}: line {number}: wanted CLIP, a tab, and a name")
        clip, identity = (cell.strip() for cell in cells)
        if found.setdefault(clip, identity) != identity:
            raise UserError(f"{path}: line {number}: clip '{show(clip)}' has two names: keep one")
        yield clip, identity
