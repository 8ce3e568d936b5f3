"""The division of a gallery into files: what lies together depends on its keys alone.

A key is a person or a stranger, with a number of clips. A bucket is a prefix of the bits of
sha256(key). A bucket of more than `most` clips is divided by the next bit, unless one key has them
all. So the buckets depend on what is there, not on the order in which it came, and one clip more
or less changes one or two of them.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

DEEPEST = 64  # bits of a prefix


def bits_of(key: str) -> str:
    """Returns the first bits of the sha256 of a key, as `0` and `1`."""
    digest = hashlib.sha256(key.encode()).digest()[: DEEPEST // 8]
    return f"{int.from_bytes(digest):0{DEEPEST}b}"


class Moves(NamedTuple):
    """What a change does to the buckets.

    Attributes:
      gone: prefixes that are no buckets any more, or have other clips.
      new: prefix -> its keys now, with their numbers of clips; maybe none.
    """

    gone: tuple[str, ...]
    new: dict[str, dict[str, int]]


class Tree:
    """The buckets of a set of keys.

    Attributes:
      leaves: prefix -> key -> number of clips; empty buckets are there, too.
    """

    def __init__(self, most: int, leaves: Mapping[str, dict[str, int]] | None = None):
        """Takes the buckets that have clips.

        Args:
          most: the largest number of clips in a bucket of several keys.
          leaves: prefix -> key -> number of clips.

        Raises:
          ValueError: one bucket lies within another one, is too large, or holds a key of another.
        """
        self.most = most
        self.leaves = dict(leaves or {})
        inner = {prefix[:n] for prefix in self.leaves for n in range(len(prefix))}
        if overlap := inner & self.leaves.keys():
            raise ValueError(f"bucket '{min(overlap)}' lies above another one")
        for prefix, keys in self.leaves.items():
            if not self._fits(prefix, keys):
                raise ValueError(f"bucket '{prefix}' is too large")
            if not all(bits_of(key).startswith(prefix) for key in keys):
                raise ValueError("a clip lies in another file than its own")
        if not self.leaves:
            self.leaves[""] = {}
        for prefix in inner:
            for bit in "01":
                if prefix + bit not in inner:
                    self.leaves.setdefault(prefix + bit, {})

    def _fits(self, prefix: str, keys: Mapping[str, int]) -> bool:
        """Returns whether keys may lie in one bucket."""
        return len(keys) < 2 or sum(keys.values()) <= self.most or len(prefix) == DEEPEST

    def leaf(self, key: str) -> str:
        """Returns the prefix of the bucket that a key belongs to."""
        bits = bits_of(key)
        return next(bits[:n] for n in range(DEEPEST + 1) if bits[:n] in self.leaves)

    def moves(self, changed: Mapping[str, int]) -> Moves:
        """Returns what becomes of the buckets; the tree itself stays as it is.

        Args:
          changed: key -> its number of clips after the change, of every key that has other clips;
            0 for a key that goes.
        """
        work: dict[str, dict[str, int]] = {}
        for key, count in changed.items():
            prefix = self.leaf(key)
            keys = work.setdefault(prefix, dict(self.leaves[prefix]))
            keys.pop(key, None)
            if count:
                keys[key] = count
        gone = set(work)
        todo = sorted(work, key=len)
        while todo:  # the deepest first
            prefix = todo.pop()
            if not prefix or prefix not in work:
                continue
            other = prefix[:-1] + ("1" if prefix[-1] == "0" else "0")
            keys = work.get(other, self.leaves.get(other) if other not in gone else None)
            if keys is None or not self._fits(prefix[:-1], work[prefix] | keys):
                continue
            work[prefix[:-1]] = work.pop(prefix) | keys
            work.pop(other, None)
            gone.add(other)
            todo = sorted({*todo, prefix[:-1]}, key=len)
        new = dict(pair for prefix, keys in work.items() for pair in self._divide(prefix, keys))
        return Moves(tuple(sorted(gone & self.leaves.keys())), new)

    def _divide(self, prefix: str, keys: dict[str, int]) -> Iterator[tuple[str, dict[str, int]]]:
        """Yields the buckets below a prefix."""
        if self._fits(prefix, keys):
            yield prefix, keys
            return
        ones = {key: n for key, n in keys.items() if bits_of(key)[len(prefix)] == "1"}
        yield from self._divide(prefix + "0", {k: n for k, n in keys.items() if k not in ones})
        yield from self._divide(prefix + "1", ones)

    def apply(self, moves: Moves) -> None:
        """Makes a change."""
        for prefix in moves.gone:
            del self.leaves[prefix]
        self.leaves.update(moves.new)
