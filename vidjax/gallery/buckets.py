"""The division of clips into files: which clips lie together depends on their names alone.

A bucket is a prefix of the bits of sha256(name). A bucket of more than `most` clips is divided by
the next bit. So the buckets depend on the set of clips, not on the order in which they came, and
one clip more or less changes one or two of them.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import NamedTuple

DEEPEST = 64  # bits of a prefix


def bits_of(name: str) -> str:
    """Returns the first bits of the sha256 of a name, as `0` and `1`."""
    digest = hashlib.sha256(name.encode()).digest()[: DEEPEST // 8]
    return f"{int.from_bytes(digest):0{DEEPEST}b}"


class Moves(NamedTuple):
    """What a change does to the buckets.

    Attributes:
      gone: prefixes that are no buckets any more, or have other clips.
      new: prefix -> its clips now, in the order of their names; maybe none.
    """

    gone: tuple[str, ...]
    new: dict[str, tuple[str, ...]]


class Tree:
    """The buckets of a set of clips.

    Attributes:
      leaves: prefix -> names of its clips, in order; empty buckets are there, too.
    """

    def __init__(self, most: int, leaves: Mapping[str, Iterable[str]] | None = None):
        """Takes the buckets that have clips.

        Args:
          most: the largest number of clips in a bucket.
          leaves: prefix -> names.

        Raises:
          ValueError: one bucket lies within another one.
        """
        self.most = most
        self.leaves = {prefix: tuple(sorted(names)) for prefix, names in (leaves or {}).items()}
        inner = {prefix[:n] for prefix in self.leaves for n in range(len(prefix))}
        if overlap := inner & self.leaves.keys():
            raise ValueError(f"bucket '{min(overlap)}' lies above another one")
        if not self.leaves:
            self.leaves[""] = ()
        for prefix in inner:
            for bit in "01":
                if prefix + bit not in inner:
                    self.leaves.setdefault(prefix + bit, ())

    def leaf(self, name: str) -> str:
        """Returns the prefix of the bucket that a name belongs to."""
        bits = bits_of(name)
        return next(bits[:n] for n in range(DEEPEST + 1) if bits[:n] in self.leaves)

    def moves(self, added: Set[str], removed: Set[str]) -> Moves:
        """Returns what becomes of the buckets; the tree itself stays as it is.

        Args:
          added: names of clips that are new, or whose content is.
          removed: names of clips that go.
        """
        work: dict[str, set[str]] = {}
        gone = set()
        for name in added | removed:
            prefix = self.leaf(name)
            clips = work.setdefault(prefix, set(self.leaves[prefix]))
            gone.add(prefix)
            clips.discard(name) if name in removed else clips.add(name)
        todo = sorted(work, key=len)
        while todo:  # the deepest first
            prefix = todo.pop()
            if not prefix or prefix not in work:
                continue
            other = prefix[:-1] + ("1" if prefix[-1] == "0" else "0")
            clips = work.get(other, self.leaves.get(other) if other not in gone else None)
            if clips is None or len(clips) + len(work[prefix]) > self.most:
                continue
            work[prefix[:-1]] = work.pop(prefix) | set(clips)
            work.pop(other, None)
            gone.add(other)
            todo = sorted({*todo, prefix[:-1]}, key=len)
        new = dict(pair for prefix, clips in work.items() for pair in self._divide(prefix, clips))
        return Moves(tuple(sorted(gone & self.leaves.keys())), new)

    def _divide(self, prefix: str, clips: set[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields the buckets below a prefix."""
        if len(clips) <= self.most or len(prefix) == DEEPEST:
            yield prefix, tuple(sorted(clips))
            return
        ones = {name for name in clips if bits_of(name)[len(prefix)] == "1"}
        yield from self._divide(prefix + "0", clips - ones)
        yield from self._divide(prefix + "1", ones)

    def apply(self, moves: Moves) -> None:
        """Makes a change."""
        for prefix in moves.gone:
            del self.leaves[prefix]
        self.leaves.update(moves.new)
