"""Ensembles, axis E: the members, the clips that each is trained on, and those that it scores.

All published ensembles (folds, partitions, quality subsets, subsets of the features, seeds) train
one net on several subsets of the same batches. So every parameter and table has a leading axis E,
and one program trains or evaluates all members in one pass over the data.
"""

import functools
import hashlib
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.core.batch import Array
from vidjax.utils import files
from vidjax.utils.errors import UserError

Tree = TypeVar("Tree")  # a tree of arrays

FILE = "members.npz"
_NO_QUALITY = float(np.finfo(np.float32).min)
MOST_CLIPS = 10_000_000  # of all training splits
MOST_BYTES = 1 << 29  # of `members.npz`, unpacked


class Member(NamedTuple):
    """The properties of one member.

    Attributes:
      number: position among all members of the ensemble; the member's random keys depend on it.
      fold: fold that the member is not trained on; -1 for none.
      bootstrap: number of its bootstrap sample; -1 for none.
      view: chunk of every feature vector that is hidden from the member; -1 for none.
      min_quality: lowest quality of the frames that it is trained on; the lowest float32 for all.
    """

    number: int = 0
    fold: int = -1
    bootstrap: int = -1
    view: int = -1
    min_quality: float = _NO_QUALITY


class TrainingSets(NamedTuple):
    """The clips that each member was trained on, so that it is only evaluated on others.

    `trained` is [E, N] bool, False if the fold or the bootstrap sample of a member excludes a clip;
    `clips` are [N] names.
    """

    members: tuple[Member, ...]
    clips: tuple[str, ...]
    trained: np.ndarray


def make_members(spec: Mapping[str, Any]) -> tuple[Member, ...]:
    """Builds the members of an ensemble: one for each combination of its options, or only some.

    `spec` are the fields of `config.ensemble`; `only` are the numbers of the members to build, from
    0 on. As numbers rise, seeds vary fastest, then qualities, views, and folds or bootstraps.
    """
    if spec["folds"] == 1:
        raise UserError("config.ensemble.folds=1: use 0 for none, or 2 or more")
    if spec["folds"] and spec["bootstraps"]:
        raise UserError("config.ensemble: folds and bootstraps exclude each other")
    if spec["views"] > spec["chunks"]:
        raise UserError(
            f"config.ensemble.views={spec['views']}: must be at most chunks={spec['chunks']}"
        )
    if not all(isinstance(quality, (int, float)) for quality in spec["min_quality"]):
        raise UserError(f"config.ensemble.min_quality={spec['min_quality']}: must be numbers")
    axes = itertools.product(
        range(spec["folds"]) if spec["folds"] else (-1,),
        range(spec["bootstraps"]) if spec["bootstraps"] else (-1,),
        range(spec["views"]) if spec["views"] else (-1,),
        tuple(float(q) for q in spec["min_quality"]) or (_NO_QUALITY,),
        range(spec["seeds"]),
    )
    members = [
        Member(number, fold, bootstrap, view, max(quality, _NO_QUALITY))
        for number, (fold, bootstrap, view, quality, _) in enumerate(axes)
    ]
    for number in spec["only"]:
        if not isinstance(number, int) or not 0 <= number < len(members):
            raise UserError(f"config.ensemble.only={number}: choose from 0 to {len(members) - 1}")
    if len({*spec["only"]}) < len(spec["only"]):
        raise UserError(f"config.ensemble.only={spec['only']}: name each member once")
    return tuple(members[number] for number in spec["only"]) or tuple(members)


def stratified_folds(labels: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Returns the fold of each clip, [N] int32 from 0; every identity is spread over all folds.

    The clips of an identity go to the folds in turn, in random order, and the next identity goes on
    from there. So the sizes of two folds differ by at most one clip, in total and within every
    identity. Labels are [N] int; 0, the distractors, is treated as an identity.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), np.int32)
    folds[order] = np.arange(len(labels)) % num_folds
    return folds


def bootstrap_counts(
    labels: np.ndarray, number: int, seed: int, resample: str = "identity"
) -> np.ndarray:
    """Draws bootstrap sample `number`; returns [N] int32, how many times it contains each clip.

    `resample` is `identity` to resample the clips of every identity separately, so that none is
    lost, or `all` to resample all clips at once, which loses some identities of one or two clips.
    """
    rng = np.random.default_rng((seed, number))
    if resample == "all":
        drawn = rng.integers(0, len(labels), len(labels))
        return np.bincount(drawn, minlength=len(labels)).astype(np.int32)
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    first, size = np.repeat(starts, sizes), np.repeat(sizes, sizes)
    drawn = order[first + (rng.random(len(labels)) * size).astype(np.int64)]
    return np.bincount(drawn, minlength=len(labels)).astype(np.int32)


def partition(
    members: Sequence[Member], labels: np.ndarray, folds: int, seed: int, resample: str = "identity"
) -> np.ndarray:
    """Returns [E, N] float32, how many times each member trains on each clip in an epoch."""
    if folds > len(labels):
        raise UserError(
            f"config.ensemble.folds={folds}: there are only {len(labels)} training clips"
        )
    fold = stratified_folds(labels, folds, seed) if folds else np.zeros(len(labels), np.int32)
    rows = [
        bootstrap_counts(labels, member.bootstrap, seed, resample)
        if member.bootstrap >= 0
        else fold != member.fold
        for member in members
    ]
    return np.stack(rows).astype(np.float32)


def make_rngs(members: Sequence[Member], seed: int) -> Array:
    """Returns one typed key per member, [E], from the seed and the member's number alone."""
    numbers = jnp.array([member.number for member in members], jnp.uint32)
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers)


def digest(training_sets: TrainingSets) -> str:
    """Returns the sha256 of training sets."""
    parts = (json.dumps(training_sets.members), "\n".join(training_sets.clips))
    sha256 = hashlib.sha256(training_sets.trained.tobytes())
    for part in parts:
        sha256.update(part.encode())
    return sha256.hexdigest()


def save(folder: Path, training_sets: TrainingSets) -> None:
    """Writes `members.npz` into the folder of a run."""
    content = io.BytesIO()
    np.savez_compressed(
        content,
        members=np.frombuffer(json.dumps(training_sets.members).encode(), np.uint8),
        clips=np.frombuffer("\n".join(training_sets.clips).encode(), np.uint8),
        trained=training_sets.trained,
    )
    files.write_bytes(folder / FILE, content.getvalue())


def check_size(training_sets: TrainingSets) -> None:
    """Refuses training sets that `load` would not read back."""
    clips = training_sets.clips
    count, members = len(clips), len(training_sets.members)
    size = training_sets.trained.nbytes + sum(len(clip.encode()) + 1 for clip in clips)
    if count > MOST_CLIPS or size > MOST_BYTES - files.MB:
        raise UserError(
            f"{count:,} training clips of {members} members: the most are {MOST_CLIPS:,} clips, "
            f"and {MOST_BYTES:,} bytes for their names and members, of which they take {size:,}\n"
            "leave some clips out, or train with fewer members"
        )


def load(folder: Path) -> TrainingSets:
    """Reads `members.npz` from the folder of a run; ValueError if it is missing or damaged."""
    path = folder / FILE
    try:
        arrays = files.read_npz(path, MOST_BYTES)
    except FileNotFoundError:
        raise UserError(f"'{path}' is missing") from None
    try:
        rows: Any = files.parse_json(arrays["members"].tobytes())
        members = tuple(Member(*row) for row in rows)
        names, trained = arrays["clips"].tobytes().decode(), arrays["trained"]
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"'{path}' is damaged: {error}") from error
    numbers = all(
        all(type(value) is int and -1 <= value < 1 << 31 for value in member[:-1])
        and isinstance(member.min_quality, (int, float))
        for member in members
    )
    shape = (len(members), names.count("\n") + 1)
    if not numbers or not members or trained.dtype != bool or trained.shape != shape:
        raise UserError(f"'{path}' is damaged: its arrays do not fit each other")
    if shape[1] > MOST_CLIPS:
        raise UserError(f"'{path}' names more than {MOST_CLIPS:,} clips")
    return TrainingSets(members, tuple(names.split("\n")), trained)


def scoring_members(training_sets: TrainingSets, clips: Sequence[str]) -> tuple[np.ndarray, bool]:
    """Returns the members that score each clip, [E, n] bool, and True if they were trained on some.

    A clip is scored by the members that were not trained on a clip of its name, in any split. But
    if all members were trained on all training clips (no folds), and `clips` has some of these, all
    members score all of `clips`.
    """
    position = _positions(training_sets.clips)
    rows = np.array([position.get(name, -1) for name in clips], np.int64)
    use = ~training_sets.trained[:, np.maximum(rows, 0)] | (rows < 0)
    if training_sets.trained.all() and not use.all():
        return np.ones_like(use), True
    return use, False


@functools.lru_cache(maxsize=8)  # single clips are scored in less time than this takes
def _positions(clips: tuple[str, ...]) -> Mapping[str, int]:
    """Returns the position of each clip by its name."""
    return {name: i for i, name in enumerate(clips)}


def drop_chunk(features: Array, view: Array, num_chunks: int) -> Array:
    """Removes chunk `view` from features [..., D]; a chunk is D // num_chunks adjacent features.

    Source: DeepMEF (3rd place 2019), ensemble over partitions of the feature space.
    """
    dim = features.shape[-1]
    kept = jnp.arange(dim - dim // num_chunks)
    index = kept + jnp.where(kept >= view * (dim // num_chunks), dim // num_chunks, 0)
    return jnp.take(features, index, axis=-1, mode="clip")  # [..., D - D // num_chunks]


@jax.jit
def take(tree: Tree, member: Array | int) -> Tree:
    """Returns the slice of one member from a tree of arrays [E, ...]; one program for all."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, member, axis=0, keepdims=False), tree
    )


def split(tree: Tree, size: int) -> tuple[Tree, ...]:
    """Splits a tree of arrays [E, ...] into trees of arrays [size, ...]."""
    num_members = len(jax.tree.leaves(tree)[0])
    if size == num_members:
        return (tree,)
    return tuple(
        jax.tree.map(lambda x, start=start: x[start : start + size], tree)
        for start in range(0, num_members, size)
    )


def merge(trees: Sequence[Tree]) -> Tree:
    """Reverses `split`."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *trees)
