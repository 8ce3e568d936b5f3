"""People and strangers that lie in one file: their clips, and what search needs of the people.

A file is mapped into memory: what is not used is not read, and what is read can be dropped.
"""

import bisect
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from vidjax.gallery.coordinates import Coefficients, Coordinates

ALIGNED = 64  # bytes; numbers begin at a multiple of it


class Clip(NamedTuple):
    """An enrolled clip, or one of a stranger.

    Attributes:
      identity: the person; None for a stranger.
      vector: [sum of D] float32, the parts one after another, 0 for those that it lacks.
    """

    identity: str | None
    vector: np.ndarray


class Block(NamedTuple):
    """The content of a file.

    Attributes:
      people: P identities, in the order of names.
      clips: P + 1 tuples of clip names in order: those of each identity, then the strangers.
      starts: [P + 2] the first row of each of these tuples, and N.
      vectors: [N, sum of D] float32, the vectors of all clips in this order.
      coefficients: of the people.
    """

    people: tuple[str, ...]
    clips: tuple[tuple[str, ...], ...]
    starts: tuple[int, ...]
    vectors: np.ndarray
    coefficients: Coefficients

    @classmethod
    def of(
        cls,
        people: tuple[str, ...],
        clips: tuple[tuple[str, ...], ...],
        vectors: np.ndarray,
        coefficients: Coefficients,
    ) -> "Block":
        """Makes a block of all but `starts`."""
        starts = tuple(itertools.accumulate(map(len, clips), initial=0))
        return cls(people, clips, starts, vectors, coefficients)

    @property
    def num_clips(self) -> int:
        """N."""
        return len(self.vectors)

    def place(self, identity: str | None) -> int:
        """Returns the place of an identity in `clips`; that of the strangers for None.

        Raises:
          KeyError: the block does not have the identity.
        """
        if identity is None:
            return len(self.people)
        place = bisect.bisect_left(self.people, identity)
        if place == len(self.people) or self.people[place] != identity:
            raise KeyError(identity)
        return place

    def clip(self, name: str, identity: str | None) -> Clip:
        """Returns a clip of an identity, or of a stranger, that the block has."""
        place = self.place(identity)
        row = self.starts[place] + bisect.bisect_left(self.clips[place], name)
        return Clip(identity, self.vectors[row])

    def clips_of(self, identity: str) -> dict[str, Clip]:
        """Returns the clips of an identity by name.

        Raises:
          KeyError: the block does not have the identity.
        """
        place = self.place(identity)
        rows = self.vectors[self.starts[place] : self.starts[place + 1]]
        pairs = zip(self.clips[place], rows, strict=True)
        return {name: Clip(identity, row) for name, row in pairs}

    def pairs(self) -> Iterator[tuple[str, str | None]]:
        """Yields every clip with its identity."""
        for identity, clips in zip((*self.people, None), self.clips, strict=True):
            for name in clips:
                yield name, identity


def make(coordinates: Coordinates, clips: Mapping[str, Clip], kept: Mapping[str, Block]) -> Block:
    """Makes a block.

    Args:
      coordinates: in which people are compared.
      clips: name -> clip, one or more.
      kept: identity -> a block that has the same clips of it; its coefficients are taken over.
    """
    strangers = tuple(sorted(name for name, clip in clips.items() if clip.identity is None))
    shown = sorted(
        (clip.identity, name) for name, clip in clips.items() if clip.identity is not None
    )
    groups = {
        identity: tuple(name for _, name in pairs)
        for identity, pairs in itertools.groupby(shown, key=lambda pair: pair[0])
    }
    names = (*groups.values(), strangers)
    vectors = np.stack([clips[name].vector for name in itertools.chain(*names)])
    people = tuple(groups)
    owner = np.repeat(np.arange(len(names)), [len(group) for group in names])
    fresh = np.array([name not in kept for name in people], bool)
    rows = np.flatnonzero(np.append(fresh, False)[owner])
    place = np.cumsum(fresh) - 1  # of a person among the fresh ones
    computed = coordinates.enrol(vectors[rows], place[owner[rows]], int(fresh.sum()))
    if not fresh.all():
        computed = _merge(computed, people, kept)
    return Block.of(people, names, vectors, computed)


def _merge(
    computed: Coefficients, people: tuple[str, ...], kept: Mapping[str, Block]
) -> Coefficients:
    """Returns coefficients of all people, of whom those are computed that are not kept."""
    rows: dict[int, list[int]] = {}  # block -> places of its people here; 0 for those computed
    sources = {0: computed}
    for row, name in enumerate(people):
        block = kept.get(name)
        number = 0 if block is None else id(block)
        rows.setdefault(number, []).append(row)
        if block is not None:
            sources[number] = block.coefficients
    places = {
        number: [kept[people[row]].place(people[row]) for row in some] if number else slice(None)
        for number, some in rows.items()
    }

    def gather(values: Callable[[Coefficients], np.ndarray]) -> np.ndarray:
        like = values(computed)
        merged = np.empty((len(people), *like.shape[1:]), like.dtype)
        for number, some in rows.items():
            merged[some] = values(sources[number])[places[number]]
        return merged

    return Coefficients(
        tuple(gather(lambda x, n=n: x.linear[n]) for n in range(len(computed.linear))),
        gather(lambda x: x.constant.T).T,
        gather(lambda x: x.num_clips.T).T,
    )


def refitted(coordinates: Coordinates, block: Block) -> Block:
    """Returns a block in other coordinates."""
    sizes = [len(clips) for clips in block.clips[:-1]]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    shown = block.vectors[: len(owner)]
    return block._replace(coefficients=coordinates.enrol(shown, owner, len(sizes)))


def to_bytes(block: Block) -> bytes:
    """Returns the file of a block: a line of JSON, then numbers in the order of `num_bytes`."""
    head = json.dumps([[*pair] for pair in zip((*block.people, None), block.clips, strict=True)])
    line = head.encode()
    padded = line.ljust(-(-(len(line) + 1) // ALIGNED) * ALIGNED - 1) + b"\n"
    linear, constant, count = block.coefficients
    numbers = [constant.astype("<f8", copy=False), count.astype("<i4", copy=False)]
    numbers += [x.astype("<f4", copy=False) for x in (*linear, block.vectors)]
    return b"".join([padded, *(np.ascontiguousarray(x).data for x in numbers)])


def num_bytes(widths: Mapping[str, int], num_people: int, num_clips: int) -> int:
    """Returns the size of all numbers of a file: constants, counts, coefficients, vectors."""
    parts, width = len(widths), sum(widths.values())
    return num_people * (12 * parts + 4 * width) + num_clips * 4 * width


def numbers_of(
    content: memoryview, start: int, widths: Mapping[str, int], num_people: int, num_clips: int
) -> tuple[Coefficients, np.ndarray]:
    """Returns coefficients and vectors as views of a file.

    Args:
      content: the file.
      start: where the numbers begin.
      widths: part -> D.
      num_people: P.
      num_clips: N.
    """

    def take(dtype: str, *shape: int) -> np.ndarray:
        nonlocal start
        found = np.frombuffer(content, dtype, int(np.prod(shape)), start).reshape(shape)
        start += found.nbytes
        return found

    constant = take("<f8", len(widths), num_people)
    count = take("<i4", len(widths), num_people)
    linear = tuple(take("<f4", num_people, width) for width in widths.values())
    return Coefficients(linear, constant, count), take("<f4", num_clips, sum(widths.values()))
