"""Evaluation: scores of every clip of a split by trained models, and the metrics of the ranking.

`collect` scores clips and keeps what a ranking needs, `conclusion.conclude` makes the ranking of
it, and `score` does both. In between, what several processes have collected can be joined.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jax.sharding import Mesh

from vidjax import devices
from vidjax.batch import Array, Batch
from vidjax.data.clips import Split
from vidjax.errors import UserError
from vidjax.run.terminal import Progress
from vidjax.steps.conclusion import Collected, Evaluation, Judge, conclude, pool_of
from vidjax.steps.model_scorer import ModelScorer, TrainedModel
from vidjax.steps.pooling import blend
from vidjax.steps.poor_clips import PoorClips
from vidjax.steps.sinks import WINDOW_ROWS, ClipScoreBuffer, TopKMetric
from vidjax.steps.windows import windows


class ScoreObserver(Protocol):
    """A function that gets all scores of an evaluation, one window at a time."""

    def __call__(self, blocks: Sequence[Batch], scores: Sequence[Sequence[Array]]) -> None:
        """Observes one window.

        Args:
          blocks: blocks of clips from the data of the first model, on the devices.
          scores: for each model the scores [B, C] of every block.
        """
        ...


def score(
    models: Sequence[TrainedModel],
    split_name: str,
    mesh: Mesh,
    *,
    block_size: int,
    each_member: bool = True,
    check: Callable[[], None] = lambda: None,
    observe: ScoreObserver | None = None,
    logarithms: bool = False,
) -> Evaluation:
    """Ranks all clips of a split by the scores of one model, or by a blend of several.

    Every clip is read once. `ModelScorer` selects the members that score it. Clips that no member
    may score are not ranked.

    Args:
      models: one model, or several whose scores are logarithms, on the same clips.
      split_name: the split.
      mesh: the devices.
      block_size: number of clips that a device scores at a time.
      each_member: True to also rank by every single member of an ensemble.
      check: function to call after every window; its exceptions end the evaluation.
      observe: function to call with the scores of every window; None for none.
      logarithms: True to join several models by the mean of their logarithms.

    Raises:
      ValueError: The models differ in clips or identities, or no clip can be scored.
    """
    check_block_size(block_size)
    for other in models[1:]:
        _check_same_clips(models[0], other, split_name)
    split = models[0].data.split(split_name)
    scorers = [ModelScorer(model, split.clips, mesh) for model in models]
    judges = [Judge.of(scorer) for scorer in scorers]
    pool_of(judges, split_name)  # before anything is scored
    collected = collect(
        scorers,
        split,
        mesh,
        block_size=block_size,
        each_member=each_member,
        check=check,
        observe=observe,
        logarithms=logarithms,
    )
    return conclude(collected, split, judges)


def check_block_size(block_size: int) -> None:
    """Raises ValueError if a block would hold no clip."""
    if block_size < 1:
        raise UserError(f"config.eval.block_size={block_size}: must be 1 or more")


def collect(
    scorers: Sequence[ModelScorer],
    split: Split,
    mesh: Mesh,
    *,
    block_size: int,
    each_member: bool,
    check: Callable[[], None] = lambda: None,
    observe: ScoreObserver | None = None,
    logarithms: bool = False,
) -> Collected:
    """Scores all clips of a split, and keeps what a ranking of them needs.

    Args:
      scorers: one for each model, of all clips of the split.
      split: the clips, which may be those of a part; none of them needs to be ranked.
      mesh: the devices.
      block_size, each_member, check, observe, logarithms: as `score` takes them.
    """
    models = [scorer.model for scorer in scorers]
    pool = np.all([scorer.use.any(axis=0) for scorer in scorers], axis=0)
    rankers = [
        _ModelRanker(scorer, split, pool, by_itself=len(scorers) > 1, each_member=each_member)
        for scorer in scorers
    ]
    columns, single = scorers[0].columns, len(scorers) == scorers[0].num_members == 1
    ranking = TopKMetric(pool, columns)
    clips = ClipScoreBuffer(split, pool, columns)
    voices = [(model.weight, model.knows_strangers) for model in models]
    # A window is one block if there is only one member.
    rows = 1 if single else min(WINDOW_ROWS, columns.most_waiting)
    block_size = min(block_size, columns.most_rows)

    began = time.monotonic()
    with devices.CompileClock() as compiling:
        progress = Progress(len(split.clips), unit="clip", label="evaluate", leave=False)
        for window in windows(models, split.name, block_size, mesh, rows):
            blocks = window[0]
            scores = [
                ranker.score(model_blocks)
                for ranker, model_blocks in zip(rankers, window, strict=True)
            ]
            if observe:
                observe(blocks, scores)
            for block, block_scores in zip(
                blocks, blend(scores, voices, logarithms=logarithms), strict=True
            ):
                for sink in (ranking, clips):
                    sink.add(block_scores, block)
            clips.flush(keep=len(blocks))  # a window behind, so that the devices never wait
            progress.advance(sum(int(np.sum(devices.fetch(block.batch_mask))) for block in blocks))
            check()
        progress.close()
        top = ranking.finish()
    seconds = time.monotonic() - began - compiling.seconds
    clips.flush()
    return Collected(
        top,
        [ranker.metric.finish() for ranker in rankers if ranker.metric],
        [[member.finish() for member in ranker.members] for ranker in rankers],
        clips.clips,
        [ranker.poor.counts() for ranker in rankers],
        seconds,
    )


class _ModelRanker:
    """A model with the metrics of its own ranking and of the rankings of its members.

    Attributes:
      scorer: scorer of the model.
      metric: metric of the model alone; None if it is the only model.
      members: one metric per member; [] for a single member, or if `each_member` is False.
      poor: counter of the poor clips.
    """

    def __init__(
        self,
        scorer: ModelScorer,
        split: Split,
        pool: np.ndarray,
        *,
        by_itself: bool,
        each_member: bool,
    ):
        self.scorer = scorer
        self.metric = TopKMetric(pool, scorer.columns) if by_itself else None
        self.poor = PoorClips(scorer.model.system)
        self.members: list[TopKMetric] = []
        if each_member and scorer.num_members > 1:
            self.members = [TopKMetric(used & pool, scorer.columns) for used in scorer.use]

    def score(self, blocks: Sequence[Batch]) -> list[Array]:
        """Returns the scores [B, C] of every block, and adds them to the metrics."""
        self.poor.add(blocks)
        scores = self.scorer.score(blocks, member_metrics=self.members)
        if self.metric:
            for block, block_scores in zip(blocks, scores, strict=True):
                self.metric.add(block_scores, block)
            self.metric.flush()
        return scores


def _check_same_clips(first: TrainedModel, other: TrainedModel, split_name: str) -> None:
    """Raises ValueError if two models cannot be blended."""
    clips, other_clips = (model.data.split(split_name).clips for model in (first, other))
    if clips != other_clips:
        examples = sorted({*clips} ^ {*other_clips})[:3]
        raise UserError(
            f"--runs: {first.name} and {other.name} have different clips in {split_name}\n"
            f"such as {', '.join(examples)}"
        )
    if tuple(first.data.identities) != tuple(other.data.identities):
        raise UserError(
            f"--runs: {first.name} and {other.name} were trained on different lists of identities\n"
            "blend runs that were trained on the same ground truth"
        )
    for model in (first, other):
        if not model.system.logs:
            raise UserError(
                f"--runs: {model.name} ranks by raw logits, which cannot be blended with others\n"
                "use --config.eval.scores=log_softmax"
            )
