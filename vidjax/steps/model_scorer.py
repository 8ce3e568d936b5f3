"""Scores of one trained model: the mean over the members that were not trained on a clip."""

import functools
from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vidjax import devices, ensemble
from vidjax.batch import Array, Batch
from vidjax.data.clips import ClipSource
from vidjax.models.base import ModelState, Params
from vidjax.steps import eval_step as eval_step_lib
from vidjax.steps import mean_scores
from vidjax.steps.columns import ScoreColumns
from vidjax.steps.sinks import TopKMetric
from vidjax.system import System


class TrainedModel(NamedTuple):
    """A system with its weights, and the clips to evaluate.

    Attributes:
      name: name of the run, for messages.
      system: the system.
      eval_step: compiled evaluation step of the system; other weights of it can reuse the step.
      params: parameters, a tree of arrays [E, ...].
      model_state: other collections of the model, a tree of arrays [E, ...].
      training_sets: the clips that each member was trained on.
      data: clips, labelled with the class columns of this model.
      weight: weight of this model in a blend.
    """

    name: str
    system: System
    eval_step: eval_step_lib.EvalStep
    params: Params
    model_state: ModelState
    training_sets: ensemble.TrainingSets
    data: ClipSource
    weight: float = 1.0

    @classmethod
    def from_params(
        cls,
        name: str,
        system: System,
        mesh: Mesh,
        params: Params,
        model_state: ModelState,
        training_sets: ensemble.TrainingSets,
        data: ClipSource,
    ) -> Self:
        """Compiles the evaluation step for a mesh; for the other arguments see the attributes."""
        step = eval_step_lib.make_eval_step(system, mesh)
        return cls(name, system, step, params, model_state, training_sets, data)

    @property
    def knows_strangers(self) -> bool:
        """True if the scores of a clip leave a probability to somebody new."""
        return bool(self.system.class_mask[0])

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities that the system reads."""
        return tuple(self.system.fuse_eval)


class ModelScorer:
    """Scores blocks of clips with one trained model.

    `ensemble.scoring_members` says which members score a clip.

    Attributes:
      model: the trained model.
      columns: the columns of the scores.
      use: [E, N] bool, True for members that score a clip.
      in_sample: True if members score clips that they were trained on.
    """

    def __init__(self, model: TrainedModel, clips: Sequence[str], mesh: Mesh):
        """Matches the clips of a split with the training clips of the members.

        Args:
          model: the trained model.
          clips: [N] names, in the order of clip_index.
          mesh: the devices.
        """
        self.model = model
        self.columns = ScoreColumns.of(model.system, mesh)
        self.use, self.in_sample = ensemble.scoring_members(model.training_sets, clips)
        self._use = devices.replicate(mesh, jnp.asarray(self.use, jnp.float32))
        self._weights = (model.params, model.model_state)
        self._single: tuple[Params, ModelState] | None = None
        if len(self.use) == 1:
            self._single = _take(self._weights, 0)

    @property
    def num_members(self) -> int:
        """Number of members, E."""
        return len(self.use)

    def score(
        self,
        blocks: Sequence[Batch],
        *,
        without: int | None = None,
        member_metrics: Sequence[TopKMetric] = (),
    ) -> list[Array]:
        """Returns the scores of every block, averaged over the members that may score it.

        Args:
          blocks: blocks of clips, on the devices.
          without: position of a member to leave out; None to use all.
          member_metrics: one metric per member, to which its own scores are added; () for none.

        Returns:
          [B, total] of every block, with the columns of `columns`; [B, C] if classes are not split.
        """
        if self._single:
            params, model_state = self._single
            view = jnp.int32(self.model.training_sets.members[0].view)
            return [
                self._best(self.model.eval_step(params, model_state, view, block))
                for block in blocks
            ]
        logs = self.model.system.logs
        totals: list[mean_scores.MeanScores | None] = [None] * len(blocks)
        for number, member in enumerate(self.model.training_sets.members):
            if number == without:
                continue
            params, model_state = _take(self._weights, number)
            for i, block in enumerate(blocks):
                scores = self.model.eval_step(params, model_state, jnp.int32(member.view), block)
                if member_metrics:
                    member_metrics[number].add(scores, block)
                use = _rows(self._use, number, block.clip_index)
                totals[i] = _add(totals[i], scores, use, logs=logs)
            if member_metrics:
                member_metrics[number].flush()  # frees the scores of this member
        return [self._best(_mean(total)) for total in totals if total is not None]

    def _best(self, scores: Array) -> Array:
        """Returns scores of which only those of `eval.top_classes` are kept."""
        count = self.model.system.top_classes
        if not 0 < count < scores.shape[1]:
            return scores
        # XLA sorts columns that lie on several devices wrongly on some of them.
        return keep_best(devices.put(scores, devices.by_rows(self.columns.mesh)), count)


@functools.partial(jax.jit, static_argnums=1)
def keep_best(scores: Array, count: int) -> Array:
    """Returns scores [B, C] with -inf for all but the `count` highest of every clip.

    Identities that tie with the last of them are kept, too.

    Source: Residual Dense Net (2nd place 2019): the best 100 classes of every clip are submitted.
    """
    least = jax.lax.top_k(scores, count)[0][:, -1:]
    return jnp.where(scores >= least, scores, -jnp.inf)


_take = jax.jit(ensemble.take)
_mean = jax.jit(mean_scores.mean_scores)


@jax.jit
def _rows(table: Array, member: Array | int, clip_index: Array) -> Array:
    return table[member, clip_index]


@functools.partial(jax.jit, static_argnames="logs")
def _add(
    total: mean_scores.MeanScores | None, scores: Array, weight: Array, *, logs: bool
) -> mean_scores.MeanScores:
    """Adds scores [B, C] of weight [B] to a running mean; None for a new one."""
    total = mean_scores.no_scores(scores, logs=logs) if total is None else total
    return mean_scores.add_scores(total, scores, weight)
