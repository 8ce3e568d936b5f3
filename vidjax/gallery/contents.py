"""All clips of a gallery, by name, and what a change makes of the blocks that they lie in."""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from vidjax.gallery import blocks as blocks_lib
from vidjax.gallery.blocks import Block, Clip
from vidjax.gallery.buckets import Moves, Tree
from vidjax.gallery.coordinates import Coordinates

PERSON, STRANGER = "person", "stranger"  # the two kinds of keys


def key_of(name: str, identity: str | None) -> str:
    """Returns the key of a clip, see `buckets`: its person, or the stranger whom it shows."""
    return f"{STRANGER} {name}" if identity is None else f"{PERSON} {identity}"


def _counts(block: Block) -> dict[str, int]:
    """Returns the keys of a block with their numbers of clips."""
    keys = {key_of("", name): len(block.clips[n]) for n, name in enumerate(block.people)}
    return keys | {key_of(name, None): 1 for name in block.clips[-1]}


class Change(NamedTuple):
    """What a change does to the blocks.

    Attributes:
      moves: what it does to the buckets.
      clips: prefix -> the clips that its block has then, one or more.
      kept: identity -> a block with the same clips of it.
    """

    moves: Moves
    clips: dict[str, dict[str, Clip]]
    kept: dict[str, Block]

    def blocks(self, coordinates: Coordinates) -> Iterator[tuple[str, Block]]:
        """Yields prefix and block of all new blocks, one by one."""
        for prefix, clips in self.clips.items():
            yield prefix, blocks_lib.make(coordinates, clips, self.kept)


class Contents(Mapping[str, Clip]):
    """Name -> clip.

    Attributes:
      blocks: prefix -> block; those that have clips.
    """

    def __init__(self, most: int, blocks: Mapping[str, Block]):
        """Takes blocks.

        Args:
          most: the largest number of clips in a block of several people.
          blocks: prefix -> block.

        Raises:
          ValueError: a clip lies in two blocks, or in another one than its own.
        """
        self.blocks = dict(blocks)
        self._tree = Tree(most, {prefix: _counts(block) for prefix, block in blocks.items()})
        self._identity = {n: i for block in blocks.values() for n, i in block.pairs()}
        if len(self._identity) < sum(block.num_clips for block in blocks.values()):
            raise ValueError("a clip is named twice")

    def __len__(self) -> int:
        return len(self._identity)

    def __iter__(self) -> Iterator[str]:
        return iter(self._identity)

    def __contains__(self, name: object) -> bool:
        return name in self._identity

    def __getitem__(self, name: str) -> Clip:
        identity = self._identity[name]
        return self._block(key_of(name, identity)).clip(name, identity)

    def _block(self, key: str) -> Block:
        """Returns the block of a key; KeyError if it has no clip."""
        return self.blocks[self._tree.leaf(key)]

    def clips_of(self, identity: str) -> dict[str, Clip]:
        """Returns the clips of an identity; none if nobody has this name."""
        try:
            return self._block(key_of("", identity)).clips_of(identity)
        except KeyError:
            return {}

    @property
    def counts(self) -> dict[str, int]:
        """Identity -> its number of clips, in the order of names."""
        pairs = [
            (name, len(clips))
            for block in self.blocks.values()
            for name, clips in zip(block.people, block.clips, strict=False)
        ]
        return dict(sorted(pairs))

    @property
    def strangers(self) -> list[str]:
        """The clips of strangers, in the order of names."""
        return sorted(name for block in self.blocks.values() for name in block.clips[-1])

    def plan(self, new: Mapping[str, Clip], gone: Collection[str]) -> Change:
        """Returns what a change does to the blocks; nothing is changed yet.

        Args:
          new: clips that are new, or are another person's now.
          gone: names of clips that go.
        """
        touched: dict[str, dict[str, Clip]] = {}  # key -> its clips after the change
        for name in (*new, *gone):
            if name in self:
                identity = self._identity[name]
                key = key_of(name, identity)
                if key not in touched:
                    touched[key] = {} if identity is None else self.clips_of(identity)
                touched[key].pop(name, None)
        for name, clip in new.items():
            key = key_of(name, clip.identity)
            if key not in touched:
                touched[key] = {} if clip.identity is None else self.clips_of(clip.identity)
            touched[key][name] = clip
        moves = self._tree.moves({key: len(clips) for key, clips in touched.items()})
        leaves = self._tree.leaves
        old = {key: self.blocks[prefix] for prefix in moves.gone for key in leaves[prefix]}
        kept: dict[str, Block] = {}
        clips: dict[str, dict[str, Clip]] = {}
        for prefix, keys in moves.new.items():
            for key in keys:
                found = clips.setdefault(prefix, {})
                kind, _, name = key.partition(" ")
                if key in touched:
                    found |= touched[key]
                elif kind == STRANGER:
                    found[name] = old[key].clip(name, None)
                else:
                    found |= old[key].clips_of(name)
                    kept[name] = old[key]
        return Change(moves, clips, kept)

    def apply(self, change: Change, new: Mapping[str, Block]) -> None:
        """Makes a change, of which `new` are the blocks."""
        for prefix in change.moves.gone:
            if (block := self.blocks.pop(prefix, None)) is not None:
                for name, _ in block.pairs():
                    del self._identity[name]
        for prefix, block in new.items():
            self.blocks[prefix] = block
            self._identity.update(block.pairs())
        self._tree.apply(change.moves)
