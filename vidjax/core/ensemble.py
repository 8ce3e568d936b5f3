"""Ensembles of nets: the members, their training clips, and the clips that they score.

The members are the same network, trained on several subsets of the same clips or features. So every
array of parameters has a leading axis E, the members. A single program trains or evaluates all
members in a single pass over the data.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.core.batch import Array
from vidjax.utils.errors import UserError

Tree = TypeVar("Tree")  # a tree of arrays

_NO_QUALITY = float(np.finfo(np.float32).min)


class Member(NamedTuple):
    """The options of a member (net) of an ensemble."""

    number: int = 0  # position in the whole ensemble, from which random keys are made
    fold: int = -1  # fold that the member is not trained on, or -1
    bootstrap: int = -1  # number of the member's bootstrap sample, or -1
    view: int = 0  # with `ensemble.views`: number of the chunk of features that is hidden
    min_quality: float = _NO_QUALITY  # lowest quality of the training frames; default: no limit


class TrainingSets(NamedTuple):
    """The training clips of each of the E members (nets) of an ensemble."""

    members: tuple[Member, ...]
    clips: tuple[str, ...]  # names of the N training clips
    trained: np.ndarray  # [E, N] bool, False if the fold or bootstrap sample excludes the clip


def make_members(spec: Mapping[str, Any]) -> tuple[Member, ...]:
    """Builds the members (nets) of an ensemble, one for each combination of options in `spec`.

    `spec` is `config.ensemble`. Members are numbered from 0, in the order of four nested loops,
    the outermost first: `folds` or `bootstraps`, `views`, `min_quality`, `seeds`. If
    `spec["only"]` lists numbers, only members with these numbers are built.
    """
    if spec["folds"] == 1:
        raise UserError("config.ensemble.folds=1: must be 0 (no folds), or 2 or more")
    if spec["folds"] and spec["bootstraps"]:
        raise UserError(
            "config.ensemble.folds and config.ensemble.bootstraps exclude each other\n"
            "set one of them to 0"
        )
    if spec["views"] > spec["chunks"]:
        raise UserError(
            f"config.ensemble.views={spec['views']}: must be at most "
            f"config.ensemble.chunks={spec['chunks']}"
        )
    if not all(isinstance(quality, (int, float)) for quality in spec["min_quality"]):
        raise UserError(
            f"config.ensemble.min_quality={spec['min_quality']}: must be numbers, such as 0,20,40"
        )
    axes = itertools.product(
        range(spec["folds"]) or (-1,),
        range(spec["bootstraps"]) or (-1,),
        range(spec["views"] or 1),
        tuple(float(q) for q in spec["min_quality"]) or (_NO_QUALITY,),
        range(spec["seeds"]),
    )
    members = [
        Member(number, fold, bootstrap, view, max(quality, _NO_QUALITY))
        for number, (fold, bootstrap, view, quality, _) in enumerate(axes)
    ]
    for number in spec["only"]:
        if not isinstance(number, int) or not 0 <= number < len(members):
            raise UserError(
                f"config.ensemble.only={number}: the ensemble has no such member\n"
                f"choose from 0 to {len(members) - 1}"
            )
    if len({*spec["only"]}) < len(spec["only"]):
        raise UserError(
            f"config.ensemble.only={spec['only']} repeats a member: name each member once"
        )
    return tuple(members[number] for number in spec["only"]) or tuple(members)


def assign_folds(labels: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Returns the fold of each clip, [N] int32 from 0. Every identity is spread over all folds.

    `labels` [N] int are the identities of the clips. The label 0, distractors (clips of no
    identity), is treated like an identity. The sizes of two folds differ by at most 1 clip, in
    total and within every identity.
    """
    # The clips of an identity go to the folds in turn. The next identity starts at the next fold.
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), np.int32)
    folds[order] = np.arange(len(labels)) % num_folds
    return folds


def draw_bootstrap(
    labels: np.ndarray, number: int, seed: int, resample: str = "identity"
) -> np.ndarray:
    """Returns how many times a bootstrap sample contains each of N clips, [N] int32.

    `number` is the index of the sample, and `labels` are [N] int. If `resample` is `identity`, the
    clips of every identity are resampled separately, so no identity is lost. If it is `all`, all
    clips are resampled together, so identities with few clips may be lost.
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


def count_clip_uses(
    members: Sequence[Member], labels: np.ndarray, folds: int, seed: int, resample: str = "identity"
) -> np.ndarray:
    """Returns how often each of E members trains on each of N clips in an epoch, [E, N] float32.

    A member trains on a bootstrap sample, see `draw_bootstrap`, or on the clips outside its fold,
    see `assign_folds`. `labels` are [N] int. `folds` is the number of folds; 0 means no folds.
    Raises UserError if there are more folds than clips.
    """
    if folds > len(labels):
        raise UserError(
            f"config.ensemble.folds={folds} is too large: there are {len(labels)} training clips\n"
            f"set --config.ensemble.folds to {len(labels)} or less"
        )
    fold = assign_folds(labels, folds, seed) if folds else np.zeros(len(labels), np.int32)
    rows = [
        draw_bootstrap(labels, member.bootstrap, seed, resample)
        if member.bootstrap >= 0
        else fold != member.fold
        for member in members
    ]
    return np.stack(rows).astype(np.float32)


def add_trained_clips(sets: TrainingSets, earlier: TrainingSets) -> TrainingSets:
    """Returns `sets`, with the training clips of an earlier run added to the clips of each member.

    Member (net) i gets the clips of member i of `earlier`, because training starts from the weights
    of this member. If `earlier` has only one member, all members get the clips of this member.
    """
    known = _index_clips(sets.clips)
    more = tuple(clip for clip in earlier.clips if clip not in known)
    clips = sets.clips + more
    trained = np.pad(sets.trained, ((0, 0), (0, len(more))))
    trained[:, [_index_clips(clips)[clip] for clip in earlier.clips]] |= earlier.trained
    return sets._replace(clips=clips, trained=trained)


def make_rngs(members: Sequence[Member], seed: int) -> Array:
    """Returns a PRNG key for each of E members, [E], made from `seed` and `Member.number`."""
    numbers = jnp.array([member.number for member in members], jnp.uint32)
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers)


def choose_scoring_members(
    training_sets: TrainingSets, clips: Sequence[str]
) -> tuple[np.ndarray, bool]:
    """Decides which of E members score which of n clips, by the names of the clips.

    A member scores the clips that it was not trained on. There is an exception: if every member was
    trained on every training clip, and `clips` contains a training clip, all members score all
    clips.

    Returns:
      [E, n] bool, True if the member scores the clip. The second result is a bool, True if members
        score clips that they were trained on.
    """
    position = _index_clips(training_sets.clips)
    rows = np.array([position.get(name, -1) for name in clips], np.int64)
    use = ~training_sets.trained[:, np.maximum(rows, 0)] | (rows < 0)
    if training_sets.trained.all() and not use.all():
        return np.ones_like(use), True
    return use, False


@functools.lru_cache(maxsize=8)  # building this dict takes longer than scoring a single clip
def _index_clips(clips: tuple[str, ...]) -> Mapping[str, int]:
    return {name: i for i, name in enumerate(clips)}


def drop_chunk(features: Array, hidden_chunk: Array, num_chunks: int) -> Array:
    """Removes chunk number `hidden_chunk` from features [..., D].

    A chunk consists of D // num_chunks neighbouring features. Returns [..., D - D // num_chunks].

    Source: DeepMEF (3rd place 2019), ensemble over partitions of the feature space.
    """
    dim = features.shape[-1]
    kept = jnp.arange(dim - dim // num_chunks)
    index = kept + jnp.where(kept >= hidden_chunk * (dim // num_chunks), dim // num_chunks, 0)
    return jnp.take(features, index, axis=-1, mode="clip")


@jax.jit
def take(tree: Tree, member: Array | int) -> Tree:
    """Selects the arrays of a member from a tree of arrays [E, ...]."""
    # One compiled program serves all members.
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, member, keepdims=False), tree)


def split(tree: Tree, size: int) -> tuple[Tree, ...]:
    """Splits a tree of arrays [E, ...] into E / `size` trees of arrays [size, ...]."""
    num_members = len(jax.tree.leaves(tree)[0])
    if size == num_members:
        return (tree,)
    return tuple(
        jax.tree.map(lambda x, start=start: x[start : start + size], tree)
        for start in range(0, num_members, size)
    )


def merge(trees: Sequence[Tree]) -> Tree:
    """Concatenates trees of arrays [size, ...] along the first axis: the inverse of `split`."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *trees)
