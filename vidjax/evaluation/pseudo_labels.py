"""Pseudo-labels: PLDA also enrols the clips without a label whose identity is almost certain.

A blend scores the clips that have no label. If an identity of a clip has at least the probability
`config.join.pseudo_labels`, each PLDA model enrols the clip as a clip of this identity. Then the
blend scores the clips again.

A clip is never scored by a model that enrols the clip itself: the clips are in GROUPS groups, and
each group is scored by models that enrol the other groups. In an ensemble with folds, the clips
that a member was not trained on count as clips without a label. So results stay out of fold.

Source: Lee 2013, Pseudo-label. The groups are not published.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, ensemble
from vidjax.core.batch import Array, Batch
from vidjax.evaluation.scoring import Join, TrainedModel, score_clips
from vidjax.models.build_system import System
from vidjax.models.plda import PLDAIdentifier
from vidjax.runs.terminal import say

GROUPS = 5


class _Part(NamedTuple):
    """The members of a fold that enrol all groups of clips but one."""

    rows: list[int]  # positions of the members in the model
    group: int  # the group that is not enrolled
    sums: Any  # arrays [len(rows), ...], see `PLDAIdentifier`


def enrol(
    models: Sequence[TrainedModel],
    splits: Sequence[str],
    make_join: Callable[[str], Join],
    least: float,
    mesh: Mesh,
    block_size: int,
) -> list[TrainedModel]:
    """Returns the models of a blend after PLDA has enrolled almost certain clips of `splits`.

    A PLDA model with E members becomes a model with GROUPS x E members. Other models stay the same.

    Args:
      splits: names of splits. If a model was trained on all clips of a split, it is left out.
      make_join: returns how the scores of the clips of a split are joined.
      least: the lowest probability of a clip that is enrolled.
    """
    parts: dict[int, list[_Part]] = {
        i: [] for i, x in enumerate(models) if isinstance(x.system.model, PLDAIdentifier)
    }
    add = {i: jax.jit(functools.partial(_add, models[i].system)) for i in parts}
    sizes = [len(models[0].data.split(name).clips) for name in splits]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    for fold in sorted({member.fold for member in models[0].training_sets.members}):
        rows = [_find_rows(model, fold) for model in models]
        own = [_select(model, x) for model, x in zip(models, rows, strict=True)]
        added = {(i, group): own[i].model_state["sums"] for i in parts for group in range(GROUPS)}
        count = 0
        for name, start in zip(splits, starts, strict=True):
            join = make_join(name)
            for blocks, scores in score_clips(own, name, mesh, block_size):
                index, mask = blocks[0].clip_index, blocks[0].batch_mask
                column = _choose(join(scores, index), mask, least)
                count += int(jnp.sum(column > 0))
                for i, group in added:
                    labels = jnp.where((start + index) % GROUPS == group, 0, column)
                    added[i, group] = add[i](added[i, group], blocks[i], labels)
        for (i, group), sums in added.items():
            parts[i].append(_Part(rows[i], group, devices.fetch(sums)))
        say(f"pseudo-labels{f' of fold {fold}' if fold >= 0 else ''}: {count:,} clips")
    clips = [clip for name in splits for clip in models[0].data.split(name).clips]
    return [
        _replace(model, parts[i], clips, mesh) if i in parts else model
        for i, model in enumerate(models)
    ]


def _find_rows(model: TrainedModel, fold: int) -> list[int]:
    return [i for i, x in enumerate(model.training_sets.members) if x.fold == fold]


def _select(model: TrainedModel, rows: list[int]) -> TrainedModel:
    """Selects the members at the positions `rows`."""
    sets, index = model.training_sets, np.array(rows)
    params, state = jax.tree.map(lambda x: x[index], (model.params, model.model_state))
    members = tuple(sets.members[row] for row in rows)
    sets = sets._replace(members=members, trained=sets.trained[index])
    return model._replace(params=params, model_state=state, training_sets=sets)


@jax.jit
def _choose(scores: Array, mask: Array, least: float) -> Array:
    """Returns the most probable column of clips [B], or 0 if its probability is below `least`.

    `scores` are logarithms of probabilities, [B, C]. `mask` [B] is False for padding.
    """
    certain = mask & (jnp.max(scores, axis=1) >= jnp.log(least))
    return jnp.where(certain, 1 + jnp.argmax(scores, axis=1), 0)


def _add(system: System, sums: Mapping[str, Any], batch: Batch, labels: Array) -> dict[str, Any]:
    """Adds the clips of a batch to sums [E, ...]. Clips with the label 0 are left out."""
    assert isinstance(system.model, PLDAIdentifier)
    frames = system.fuse(None, batch.frames, jnp.int32(0))
    return jax.vmap(lambda own: system.model.add_clips(own, frames, labels))(sums)


def _replace(
    model: TrainedModel, parts: Sequence[_Part], clips: Sequence[str], mesh: Mesh
) -> TrainedModel:
    """Returns the model with the members of all parts. `clips` are the names of the clips."""
    assert isinstance(model.system.model, PLDAIdentifier)
    old = model.training_sets
    names = tuple(dict.fromkeys((*old.clips, *clips)))
    position = {name: i for i, name in enumerate(names)}
    place = np.array([position[name] for name in clips])
    trained = []
    for part in parts:
        row = np.zeros((len(part.rows), len(names)), bool)
        row[:, : len(old.clips)] = old.trained[part.rows]
        row[:, place[np.arange(len(clips)) % GROUPS != part.group]] = True
        trained.append(row)
    rows = [row for part in parts for row in part.rows]
    members = tuple(old.members[row]._replace(number=i) for i, row in enumerate(rows))
    sums = jax.tree.map(lambda *x: np.concatenate(x), *(part.sums for part in parts))
    state = model.system.model.solve(sums, [model.system.model.settings(row) for row in rows])
    return model._replace(
        model_state=devices.replicate(mesh, state),
        training_sets=ensemble.TrainingSets(members, names, np.concatenate(trained)),
    )
