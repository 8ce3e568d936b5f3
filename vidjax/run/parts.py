"""The parts of an evaluation: `parts/SPLIT/K-of-N.npz` in the folder of a run.

A part appears whole or not at all. Its arrays are in groups, which are read one at a time:

    facts/json      [] bytes: what the part was made of, see `Facts`; only equal ones are joined
    clips/...       clip [n] int32, ascending clip_index in the whole split; best [n] float32 and
                    right [n] bool; for a report also quality [n] float32, and attention/NAME [...]
                    int64, sums over the clips
    top/...         scores, index [C, min(n, 100)]: the best clips of every identity, sorted
    member-I/...    the same by the member at position I
"""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from msgspec import Meta, Struct, to_builtins

from vidjax import files
from vidjax.errors import UserError
from vidjax.run import formats

FOLDER = "parts"
CLIPS, TOP, ATTENTION = "clips", "top", "attention/"
FACTS_BYTES = 4 * files.MB  # there may be thousands
_NAME = re.compile(r"([1-9]\d{0,5})-of-([1-9]\d{0,5})\.npz")


def member_group(number: int) -> str:
    """Returns the name of the group with the ranking of the member at position `number`."""
    return f"member-{number}"


class Data(Struct):
    """The data that a part was made of, by digest."""

    digest: formats.Text


class Facts(Struct, kw_only=True):
    """What a part was made of."""

    number: formats.Size
    total: formats.Size
    split: formats.Text
    step: formats.Count
    checkpoint: formats.Text  # sha256 of what scores depend on
    config: Annotated[dict[str, Any], formats.TABLE]
    data: Data
    num_clips: formats.Size
    num_members: formats.Count  # whose rankings it holds
    observed: bool  # holds what a report shows
    poor: Annotated[list[formats.Count], Meta(min_length=2, max_length=2)]  # poor, judged clips
    seconds: float  # of scoring
    eval_seconds: float  # of the command
    versions: Annotated[dict[str, formats.Text], formats.FEW]


class Shard(NamedTuple):
    """Part `number` (from 1) of `total`."""

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the shard of a text such as `2/7`."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        number, total = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= total:
            first = f"--shard=1/{total}" if total else "--shard=1/7"
            last = f"--shard={total}/{total}" if total else "--shard=7/7"
            raise UserError(
                f"--shard={text[:40]}: want k/n, where k counts the parts from 1 to n:\n"
                f"{first} is the first, {last} the last"
            )
        return cls(number, total)

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    @property
    def remedy(self) -> str:
        """How to replace a part that cannot be used."""
        return f"make it again: --mode=evaluate --shard={self} with the same --workdir"


class Part(NamedTuple):
    """The file of a part, and its facts."""

    path: Path
    facts: Facts

    @property
    def shard(self) -> Shard:
        """Which part it is."""
        return Shard(self.facts.number, self.facts.total)


def most_bytes(num_identities: int, num_clips: int) -> int:
    """Returns an upper bound, in bytes, of any group in a part of so many identities and clips."""
    return formats.most_bytes({"": f"float32[{100 * num_identities + num_clips}]"})


def path_of(workdir: Path, split: str, shard: Shard) -> Path:
    """Returns the file of a part."""
    return workdir / FOLDER / split / f"{shard.number}-of-{shard.total}.npz"


def make_folder(workdir: Path, split: str) -> None:
    """Makes the folder of the parts of a split; refuses a link: something else may lie there."""
    folder = workdir / FOLDER / split
    with contextlib.suppress(FileNotFoundError), files.open_folder(folder, workdir):
        pass
    files.make_folder(folder, "--shard:")


def write(workdir: Path, facts: Facts, groups: Mapping[str, Mapping[str, np.ndarray]]) -> Part:
    """Writes a part atomically, in place of an earlier one; `groups` is group -> name -> array."""
    path = path_of(workdir, facts.split, Shard(facts.number, facts.total))
    arrays: dict[str, Any] = {"facts/json": np.bytes_(files.to_json(to_builtins(facts)))}
    for group, content in groups.items():
        arrays |= {f"{group}/{name}": array for name, array in content.items()}
    with files.atomic_file(path) as file:
        np.savez(file, **arrays)  # packing would take ten times as long, and save little
    return Part(path, facts)


def read(workdir: Path, split: str, shard: Shard) -> Part:
    """Reads the facts of a part; ValueError if its file is damaged or holds another part."""
    path = path_of(workdir, split, shard)
    content = _load(path, shard, "facts", FACTS_BYTES)
    try:
        value = files.parse_json(content["json"].tobytes())
    except (LookupError, ValueError) as error:
        raise UserError(f"'{path}' is damaged: {_first_line(error)}\n{shard.remedy}") from error
    facts = formats.parse(path, value, Facts, shard.remedy)
    if (facts.split, facts.number, facts.total) != (split, *shard):
        name = f"{facts.number}/{facts.total} of {facts.split[:40]}"
        raise UserError(f"'{path}' is that of part {name}\n{shard.remedy}")
    return Part(path, facts)


def find(workdir: Path, split: str) -> dict[Shard, Part | ValueError]:
    """Returns shard -> its part, or the error of reading its facts, for all parts of a split."""
    found: dict[Shard, Part | ValueError] = {}
    parent = workdir / FOLDER / split
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError), files.open_folder(parent, workdir) as opened:
        names = sorted(os.listdir(opened))
    for text in names:
        name = _NAME.fullmatch(text)
        shard = Shard(*map(int, name.groups())) if name else None
        if not shard or shard.number > shard.total:
            continue
        try:
            found[shard] = read(workdir, split, shard)
        except ValueError as error:
            found[shard] = error
    return found


def load(part: Part, group: str, limit: int) -> dict[str, np.ndarray]:
    """Reads the arrays of a group, see above, from the file of a part: name -> array.

    ValueError for more than `limit` bytes.
    """
    try:
        return _load(part.path, part.shard, group, limit)
    except FileNotFoundError as error:
        raise UserError(f"'{part.path}' is missing\n{part.shard.remedy}") from error


def verify(part: Part, limit: int) -> None:
    """Reads all groups of a part, each of `limit` bytes at most, to see that none is damaged."""
    for group in (CLIPS, TOP, *map(member_group, range(part.facts.num_members))):
        load(part, group, limit)


def _load(path: Path, shard: Shard, group: str, limit: int) -> dict[str, np.ndarray]:
    workdir = path.parents[2]
    try:
        with files.open_regular(path, below=workdir) as file:
            return files.load_npz(file, limit, group)
    except FileNotFoundError:
        raise
    except ValueError as error:
        said = _first_line(error)
        said = said if str(path) in said else f"'{path}' is damaged: {said}"
        raise UserError(f"{said}\n{shard.remedy}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
