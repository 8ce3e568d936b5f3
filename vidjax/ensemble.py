"""The axis E: an ensemble's members, what each of them trains on, and how their scores combine.

Every published ensemble (folds, partitions, quality subsets, views of the feature space, seeds) is
one net trained on several slices of the same batches. A member is therefore a row of tables and a
slice of every parameter; one program trains and evaluates all on one pass over the data.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.batch import Array
from vidjax.run import workdir

FILE = "members.npz"
_NO_QUALITY = float(np.finfo(np.float32).min)


class Member(NamedTuple):
    """What sets one member apart.

    Attributes:
      number: its place among all members of the ensemble; its random keys follow from it.
      fold: the fold it never trains on, or -1.
      bootstrap: the number of its bootstrap sample, or -1.
      view: the chunk of every feature vector that it never sees, or -1.
      min_quality: it trains on frames of at least this quality; the lowest float32 for all.
    """

    number: int = 0
    fold: int = -1
    bootstrap: int = -1
    view: int = -1
    min_quality: float = _NO_QUALITY


class TrainingSets(NamedTuple):
    """Which clips each member was trained on: what makes a score honest.

    Attributes:
      members: [E] what each is.
      clips: [N] names of the training clips.
      trained: [E, N] bool, False where the member's fold or bootstrap sample leaves the clip out.
    """

    members: tuple[Member, ...]
    clips: tuple[str, ...]
    trained: np.ndarray


def make_members(spec: Mapping[str, Any]) -> tuple[Member, ...]:
    """Returns the members of a specification: the product of everything that varies.

    Args:
      spec: `folds` and `bootstraps` (0: none; not both), `views` (how many chunks are left out in
        turn; 0: none) of `chunks`, `min_quality` (a value a member; empty: all frames), `seeds` and
        `only` (numbers of the members that are trained here; empty: all). Members are numbered
        with seeds running fastest, then qualities, views, and folds slowest.

    Raises:
      ValueError: numbers that make no sense.
    """
    for name, least in {"folds": 0, "bootstraps": 0, "views": 0, "chunks": 2, "seeds": 1}.items():
        if spec[name] < least:
            raise ValueError(f"config.ensemble.{name}={spec[name]}: must be {least} or more")
    if spec["folds"] == 1:
        raise ValueError("config.ensemble.folds=1: use 0 for none, or 2 or more")
    if spec["folds"] and spec["bootstraps"]:
        raise ValueError("config.ensemble: folds and bootstraps exclude each other")
    if spec["views"] > spec["chunks"]:
        raise ValueError(
            f"config.ensemble.views={spec['views']}: there are {spec['chunks']} chunks"
        )
    if not all(isinstance(quality, (int, float)) for quality in spec["min_quality"]):
        raise ValueError(f"config.ensemble.min_quality={spec['min_quality']}: wants numbers")
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
            raise ValueError(f"config.ensemble.only: no member {number} of {len(members)}")
    return tuple(members[number] for number in spec["only"]) or tuple(members)


def stratified_folds(labels: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Returns [N] int32, the fold of every clip.

    The clips of an identity are dealt out in random order, each identity beginning where the one
    before it ended: folds differ by at most one clip, in total and within an identity. Column 0
    is dealt out like an identity.

    Args:
      labels: [N] int, class columns.
      num_folds: 2 or more.
      seed: of the order.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(len(labels), np.int32)
    folds[order] = np.arange(len(labels)) % num_folds
    return folds


def bootstrap_counts(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Returns [N] int32, how often a bootstrap sample holds every clip.

    Every identity is resampled by itself, so that none is lost: many have only a clip or two.

    Args:
      labels: [N] int, class columns.
      number: of the sample.
      seed: of all samples.
    """
    rng = np.random.default_rng((seed, number))
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    first, size = np.repeat(starts, sizes), np.repeat(sizes, sizes)
    drawn = order[first + (rng.random(len(labels)) * size).astype(np.int64)]
    return np.bincount(drawn, minlength=len(labels)).astype(np.int32)


def partition(members: Sequence[Member], labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Returns [E, N] float32, how often a member sees every clip in an epoch; 0 where it may not.

    Args:
      members: [E].
      labels: [N] int, class columns.
      folds: how many; 0 for none.
      seed: of folds and samples.

    Raises:
      ValueError: more folds than clips.
    """
    if folds > len(labels):
        raise ValueError(f"config.ensemble.folds={folds}: only {len(labels)} clips to train on")
    fold = stratified_folds(labels, folds, seed) if folds else np.zeros(len(labels), np.int32)
    rows = [
        bootstrap_counts(labels, member.bootstrap, seed)
        if member.bootstrap >= 0
        else fold != member.fold
        for member in members
    ]
    return np.stack(rows).astype(np.float32)


def make_rngs(members: Sequence[Member], seed: int) -> Array:
    """Returns [E] typed keys; that of a member does not depend on which others there are."""
    numbers = jnp.array([member.number for member in members], jnp.uint32)
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers)


def digest(training_sets: TrainingSets) -> str:
    """Returns the sha256 of a training_sets."""
    parts = (json.dumps(training_sets.members), "\n".join(training_sets.clips))
    sha256 = hashlib.sha256(training_sets.trained.tobytes())
    for part in parts:
        sha256.update(part.encode())
    return sha256.hexdigest()


def save(folder: Path, training_sets: TrainingSets) -> None:
    """Writes `members.npz` into a run's folder."""
    content = io.BytesIO()
    np.savez_compressed(
        content,
        members=np.frombuffer(json.dumps(training_sets.members).encode(), np.uint8),
        clips=np.frombuffer("\n".join(training_sets.clips).encode(), np.uint8),
        trained=training_sets.trained,
    )
    workdir.write_bytes(folder / FILE, content.getvalue())


def load(folder: Path) -> TrainingSets:
    """Returns what `save` wrote.

    Raises:
      ValueError: it is absent or damaged.
    """
    path = folder / FILE
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            members = tuple(Member(*row) for row in json.loads(file["members"].tobytes()))
            clips = tuple(file["clips"].tobytes().decode().split("\n"))
            training_sets = TrainingSets(members, clips, file["trained"])
    except Exception as error:  # a damaged archive raises whatever zlib, zipfile or numpy raise
        raise ValueError(f"cannot read '{path}': {type(error).__name__}: {error}") from error
    if training_sets.trained.shape != (len(members), len(clips)):
        raise ValueError(f"'{path}' is damaged: its parts do not fit together")
    return training_sets


def held_out(training_sets: TrainingSets, clips: Sequence[str]) -> np.ndarray:
    """Returns [E, n] bool, which members may score each of some clips: those not trained on it.

    Args:
      training_sets: of a run.
      clips: [n] names; matched by name, so it does not matter which split they now stand in.
    """
    position = {name: i for i, name in enumerate(training_sets.clips)}
    found = np.array([position.get(name, -1) for name in clips], np.int64)
    return ~training_sets.trained[:, np.maximum(found, 0)] | (found < 0)


def drop_chunk(features: Array, view: Array, num_chunks: int) -> Array:
    """Returns features without their `view`-th chunk.

    Args:
      features: [..., D].
      view: [] int, which of the `num_chunks` contiguous chunks of D // num_chunks is dropped.
      num_chunks: 2 or more.

    Source: DeepMEF (3rd place 2019), ensemble over partitions of the feature space.
    """
    dim = features.shape[-1]
    kept = jnp.arange(dim - dim // num_chunks)
    index = kept + jnp.where(kept >= view * (dim // num_chunks), dim // num_chunks, 0)
    return jnp.take(features, index, axis=-1, mode="clip")  # [..., D - D // num_chunks]


def take(tree: Any, member: Array | int) -> Any:
    """Returns one member's slice of a tree of arrays [E, ...]."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, member, axis=0, keepdims=False), tree
    )


def apply_each(
    fn: Callable[[Any, Any], tuple[Any, Any]], state: Any, inputs: Any
) -> tuple[Any, Any]:
    """Returns what `fn` makes of every member's state and input, all members at once, stacked.

    Args:
      fn: (state of one member, input of one member) -> (its new state, an output).
      state: tree of [E, ...].
      inputs: tree of [E, ...].
    """
    if len(jax.tree.leaves(inputs)[0]) > 1:
        return jax.vmap(fn)(state, inputs)
    new, output = fn(*jax.tree.map(lambda x: x[0], (state, inputs)))
    return jax.tree.map(lambda x: x[None], (new, output))


def split(tree: Any, size: int) -> tuple[Any, ...]:
    """Returns a tree of arrays [E, ...] as trees of [size, ...], one after another."""
    num_members = len(jax.tree.leaves(tree)[0])
    if size == num_members:
        return (tree,)
    return tuple(
        jax.tree.map(lambda x, start=start: x[start : start + size], tree)
        for start in range(0, num_members, size)
    )


def merge(trees: Sequence[Any]) -> Any:
    """Returns the tree that `split` was given."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *trees)


def add_scores(total: Array, scores: Array, weight: Array, *, logs: bool) -> Array:
    """Returns a running weighted sum of scores with one more in it.

    Args:
      total: [B, C] so far; -inf (logs) or 0 at the start.
      scores: [B, C] to add.
      weight: [B] float, 0 or more; with 0 nothing is added, whatever the scores.
      logs: True where scores are logarithms and what they are logarithms of is summed.
    """
    weight = weight[:, None]
    if logs:
        return jnp.logaddexp(total, jnp.where(weight > 0, scores + jnp.log(weight), -jnp.inf))
    return total + jnp.where(weight > 0, scores * weight, 0.0)


def mean_scores(total: Array, weight: Array, *, logs: bool) -> Array:
    """Returns the mean that `add_scores` summed up; -inf for a clip of weight 0.

    Args:
      total: [B, C].
      weight: [B] float, the sum of the weights.
      logs: as in `add_scores`.
    """
    weight = weight[:, None]
    safe = jnp.where(weight > 0, weight, 1.0)
    return jnp.where(weight > 0, total - jnp.log(safe) if logs else total / safe, -jnp.inf)
