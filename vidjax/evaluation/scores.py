"""Scores clips for identities, stores the scores as an array, ranks clips, and computes metrics.

A ranking reads the scores in blocks of clips. The blocks come from a model while it scores clips,
or from a stored array. So a single run can be evaluated without a stored array.
"""

import dataclasses
import functools
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vidjax.core import devices, ensemble, metrics
from vidjax.core.batch import Array
from vidjax.core.metrics import ClipScores
from vidjax.data.clips import Split
from vidjax.evaluation import topk
from vidjax.evaluation.eval_step import collect_scores, mean_scores
from vidjax.evaluation.scoring import ALL, ScoreBlock, TrainedModel, score_blocks
from vidjax.evaluation.topk import TopK
from vidjax.utils import files
from vidjax.utils.errors import DiskError, UserError, warn
from vidjax.utils.terminal import say, show_clips

ROWS = 256  # clips of a block that is read from an array
LARGE = 10**9  # bytes of a scratch file from which its size is printed


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a split for C identities. The split has N clips, and n of them have scores.

    Attributes:
      array: [n, C] float32, memory-mapped, with a row for each clip that has scores.
      use: [E, N] bool, True where one of E members (nets of an ensemble) scored one of the N clips.
      kind: `in_sample` if members score their own training clips. `out_of_fold` if members trained
        in folds or on bootstrap samples leave their training clips out. Otherwise the split's name.
      logs: True if the scores are logarithms of probabilities.
      complete: True if clips keep the scores of all identities, False if only the highest scores.
      clips: the names of the N clips.
      identities: the names of the C identities.
    """

    array: np.ndarray
    use: np.ndarray
    kind: str
    logs: bool
    complete: bool
    clips: tuple[str, ...]
    identities: tuple[str, ...]

    @functools.cached_property
    def pool(self) -> np.ndarray:
        """True for the clips that have scores, [N] bool."""
        return np.asarray(self.use.any(axis=0))

    @functools.cached_property
    def row(self) -> np.ndarray:
        """The row of each clip in `array`, [N] int. It is arbitrary for clips without scores."""
        return np.cumsum(self.pool) - 1


class Evaluation(NamedTuple):
    """The result of an evaluation: the ranking of a split's clips, their scores, and metrics."""

    model: TrainedModel  # the model, or the first model of a blend
    split: Split
    top: TopK  # the best 100 clips of every identity, sorted
    clips: ClipScores  # the best score of every clip. It is -inf if a score of the clip is NaN.
    # Entries of `metrics.json`: counts of clips, the speed, and the MAP of each run or member.
    # If the split has a ground truth, the dict also has the MAP and the other metrics.
    results: dict[str, Any]
    joined: Scores | None = None  # the scores of a blend


def describe(model: TrainedModel, split_name: str) -> Scores:
    """Decides which members (nets of an ensemble) will score which clips of a split.

    Returns a `Scores` object whose array is still empty. A member scores only clips that it was not
    trained on. Exception: if all members were trained on all training clips, they score all clips.
    Raises UserError if no member can score any clip of the split.
    """
    clips, sets = model.data.split(split_name).clips, model.training_sets
    use, in_sample = ensemble.choose_scoring_members(sets, clips)
    if not use.any():
        raise UserError(
            f"'{model.name}': all members were trained on all clips of {split_name}, so none can "
            "score the clips\nchoose other clips, or another split with --config.eval.split"
        )
    # A member of a fold or of a bootstrap sample may skip clips.
    may_skip = np.array([max(member.fold, member.bootstrap) >= 0 for member in sets.members])
    return Scores(
        array=np.empty((0, len(model.data.identities)), np.float32),
        use=use,
        kind="in_sample" if in_sample else split_name if use[may_skip].all() else "out_of_fold",
        logs=model.system.scores_are_logs,
        complete=not model.system.top_classes,
        clips=clips,
        identities=tuple(model.data.identities),
    )


def write_scores(
    model: TrainedModel, split_name: str, folder: Path | None = None, only: np.ndarray | None = None
) -> Scores:
    """Scores the clips of a split with a model, and returns the scores in an array on the disk.

    `only` [N] bool is True for the clips to score, by default all. For `folder`, see `allocate`.
    """
    scores = describe(model, split_name)
    use = scores.use if only is None else scores.use & only
    scores = allocate(dataclasses.replace(scores, use=use), folder)
    with show_clips("score", len(scores.array)) as progress:
        for block in score_blocks(model, split_name, use):
            values, index = block.without_padding()
            scores.array[scores.row[index]] = values
            progress.advance(len(index))
    return scores


def allocate(scores: Scores, folder: Path | None = None) -> Scores:
    """Returns `scores` with a new array, whose values are not yet set.

    The array is mapped to a file in `folder`, by default in the folder of temporary files. The file
    disappears with the array. Raises DiskError if the disk has too little space.
    """
    place = folder or Path(tempfile.gettempdir())
    shape = int(scores.pool.sum()), len(scores.identities)
    if (size := 4 * math.prod(shape)) > LARGE:
        say(f"scores take {size / 1e9:,.1f} GB in '{place}' until the results are written")
    with tempfile.TemporaryFile(dir=place) as file:  # it has no name, so a kill leaves no file
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise DiskError(
                f"'{place}' has no space for {size / 1e9:,.1f} GB of scores: {error.strerror}\n"
                "free some space, or move the folder of the run to another disk"
            ) from error
        return dataclasses.replace(scores, array=np.memmap(file, np.float32, "r+", shape=shape))


def save(scores: Scores, path: Path) -> None:
    """Writes the array of scores to the .npy file `path`.

    The names of the rows (clips) and columns (identities) are written to a .json file next to it.
    """
    with files.atomic_file(path) as file:
        np.save(file, scores.array)
    clips = [*itertools.compress(scores.clips, scores.pool)]
    names = {"clips": clips, "identities": scores.identities}
    files.write_json(path.with_suffix(".json"), names)


def read_blocks(scores: Scores) -> Iterator[ScoreBlock]:
    """Yields all scores, in blocks of ROWS clips."""
    places = np.flatnonzero(scores.pool).astype(np.int32)
    for at in range(0, len(places), ROWS):
        index = places[at : at + ROWS]
        yield ScoreBlock(scores.array[at : at + ROWS], index, np.ones(len(index), bool))


def combine(
    runs: Sequence[Scores], join: Callable[[np.ndarray, np.ndarray], Array], folder: Path | None
) -> Scores:
    """Joins the scores of R runs to an array of joint scores, for the clips that all runs score.

    `join` is a function that computes joint scores [B, C] of B clips from the scores of the runs,
    [R, B, C], and the clip indices [B]. All scores are logarithms of probabilities. For `folder`,
    see `allocate`.
    """
    pool = np.all([run.pool for run in runs], axis=0)
    if not pool.any():
        raise UserError(
            "--runs: no clip is scored by all runs, because each leaves out different clips\n"
            "join runs with the same --config.ensemble.folds and --config.ensemble.only"
        )
    kinds = {run.kind for run in runs}
    worst = next((kind for kind in ("in_sample", "out_of_fold") if kind in kinds), runs[0].kind)
    joined = dataclasses.replace(
        runs[0],
        use=np.concatenate([run.use for run in runs]) & pool,
        kind=worst,
        complete=all(run.complete for run in runs),
    )
    joined = allocate(joined, folder)
    for block in read_blocks(joined):
        index = np.resize(block.clip_index, ROWS)  # so that all blocks use the same program
        logs = np.stack([run.array[run.row[index]] for run in runs])
        block.scores[:] = np.asarray(join(logs, index))[: len(block.scores)]
    return joined


@jax.jit
def mean_logs(logs: Array, weights: Array) -> Array:
    """Computes the logarithm of the weighted mean of the probabilities of R runs, [B, C].

    `logs` [R, B, C] are the logarithms of the probabilities, and `weights` [R] the weights.
    """
    of_clips = (jnp.full(logs.shape[1], weight) for weight in weights)
    return mean_scores(collect_scores(logs, of_clips, logs=True))


def score(
    model: TrainedModel,
    split_name: str,
    *,
    each_member: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Scores and ranks the clips of a split with a model, and computes the metrics.

    Args:
      each_member: True to compute also the MAP of each member (net) of an ensemble.
      check: called after each block of clips. It may raise an exception to end the evaluation.

    Raises UserError if a block of clips does not fit into memory, if `describe` finds no member
    that can score a clip, or if all clips have NaN scores.
    """
    scores, members = describe(model, split_name), model.training_sets.members
    members = members if each_member and len(members) > 1 else ()
    blocks = score_blocks(model, split_name, scores.use, each_member=bool(members))
    return evaluate(blocks, scores, model, split_name, members=members, check=check)


def evaluate(
    blocks: Iterable[ScoreBlock],
    scores: Scores,
    model: TrainedModel,
    split_name: str,
    *,
    top: TopK | None = None,
    members: Sequence[ensemble.Member] = (),
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Ranks the clips of a split by the scores in `blocks`, and computes the metrics.

    If clips have NaN scores, they are ranked last, with a warning.

    Args:
      blocks: the scores of the clips. If `members` are given, also the scores of each member.
      scores: the clips and identities of `blocks`. `scores.array` is not read.
      model: the model, or the first model of a blend. `model.data` contains the split.
      split_name: the split.
      top: a ranking of the clips that replaces the ranking by scores.
      members: the members of the ensemble whose MAP is computed, too.
      check: see `score`.
    """
    began, pool, split = time.monotonic(), scores.pool, model.data.split(split_name)
    ranked = [] if top else [ALL, *range(len(members))]
    tops = {number: topk.HostTopK(len(scores.identities)) for number in ranked}
    clips = _make_clip_scores(scores)
    with devices.compile_seconds() as compiling, show_clips("evaluate", int(pool.sum())) as bar:
        for block in blocks:
            if block.member in tops:
                tops[block.member].add(block.scores, block.clip_index, block.mask)
            if block.member == ALL:
                _add_clips(clips, split.labels, block)
                bar.advance(int(block.mask.sum()))
                check()
        top = top or tops[ALL].finish()
    seconds = time.monotonic() - began - sum(compiling)
    clips, num_nan = _replace_nan(split, clips)
    rows = [
        {**_describe_member(member), "map": compute_map(tops[i].finish(), split, scores.use[i])}
        for i, member in enumerate(members)
    ]
    results = {
        **_compute_metrics(top, clips, split, scores.kind),
        **num_nan,
        "num_ties": topk.count_ties(top),
        "eval_clips_per_second": int(pool.sum()) / max(seconds, 1e-9),
        **({"members": rows} if rows else {}),
    }
    return Evaluation(model, split, top, clips, results)


def count_positives(split: Split, pool: np.ndarray) -> tuple[np.ndarray, int]:
    """Counts clips and identities in the ground truth of a split with N clips.

    `pool` [N] bool is True for clips that were scored. The first result, [C] int, is the number of
    clips of each identity of the model, minus the clips that were not scored. The second result is
    the number of identities that the model does not have, or 0 if a clip was not scored.
    """
    outside = np.bincount(split.labels[~pool], minlength=len(split.positives) + 1)[1:]
    return split.positives - outside, split.num_others if pool.all() else 0


def compute_map(top: TopK, split: Split, pool: np.ndarray) -> float | None:
    """Returns the MAP of the ranking `top` on the clips where `pool` [N] bool is True.

    Returns None if the split has no ground truth, or no such clip shows an identity of the model.
    """
    positives, others = count_positives(split, pool)
    if not split.labelled or not positives.any():
        return None
    return metrics.mean_average_precision(top.index, split.labels, positives, others)


def _compute_metrics(top: TopK, clips: ClipScores, split: Split, kind: str) -> dict[str, Any]:
    """Returns entries of `metrics.json`: counts of clips and identities, and the metrics.

    Without a ground truth, there are no metrics. For `kind`, see `Scores`.
    """
    listed = np.where(top.index == topk.NO_CLIP, -1, top.index)
    pool, clips = clips.pool, clips._replace(ranking=listed)
    results: dict[str, Any] = {}
    value = compute_map(top, split, pool)
    if value is not None:
        positives, others = count_positives(split, pool)
        results |= {
            "map": value,
            "map_kind": kind,
            "num_map_identities": int(np.sum(positives > 0)) + others,
            **metrics.compute_clip_metrics(clips, split.labels),
        }
    return results | {
        "num_clips": int(np.sum(pool)),
        "num_identities": len(split.positives),
        "num_distractors": int(np.sum(split.labels[pool] == 0)) if split.labelled else None,
    }


def _make_clip_scores(scores: Scores) -> ClipScores:
    """Returns a ClipScores object without scores. `_add_clips` writes the scores into it."""
    count = len(scores.clips)
    lowest, zeros = np.full(count, -np.inf, np.float32), np.zeros(count, np.int32)
    # Without all scores as logarithms of probabilities, there is no loss.
    own = lowest.copy() if scores.logs and scores.complete else None
    last = np.full(count, len(scores.identities), np.int32)
    return ClipScores(scores.pool, lowest, zeros > 0, own, zeros, last)


def _add_clips(clips: ClipScores, labels: np.ndarray, block: ScoreBlock) -> None:
    """Writes the best score and the right identity's score of each clip into arrays of `clips`.

    `block` has the scores of some clips. `labels` [N] int are the right identities of all clips.
    """
    scores, index = block.without_padding()
    rows, label = np.arange(len(index)), labels[index]
    assert clips.identity is not None and clips.rank is not None
    first = np.argmax(scores, axis=1)  # NaN counts as the highest score
    clips.best[index] = best = scores[rows, first]
    clips.identity[index] = identity = np.where(best > -np.inf, first + 1, 0)  # 0 also for NaN
    clips.right[index] = (label > 0) & (identity == label)
    own = scores[rows, np.maximum(label - 1, 0)]
    higher = np.sum(scores > own[:, None], axis=1, dtype=np.int32)
    clips.rank[index] = np.where(identity > 0, higher, scores.shape[1])
    if clips.own is not None:
        clips.own[index] = np.where(label > 0, own, -np.inf)


def _replace_nan(split: Split, clips: ClipScores) -> tuple[ClipScores, dict[str, int]]:
    """Replaces NaN scores by -inf, with a warning.

    Returns the new scores, and {"num_nan_clips": number of clips with NaN}, or {} without NaN.
    """
    nan = np.isnan(clips.best) & clips.pool
    if not nan.any():
        return clips, {}
    count, total = int(nan.sum()), int(clips.pool.sum())
    first = [split.clips[clip] for clip in np.flatnonzero(nan)[:3]]
    message = (
        f"{count} of {total} clips of {split.name} have scores of NaN, such as {', '.join(first)}\n"
        "features of these clips or of training clips are too large for float32: divide all "
        "features by a constant, and train the run again"
    )
    if count == total:
        raise UserError(message)
    warn(f"{message}\nuntil you train again, the clips with scores of NaN are ranked last")
    best = np.where(nan, np.float32(-np.inf), clips.best)
    return clips._replace(best=best, right=clips.right & ~nan), {"num_nan_clips": count}


def _describe_member(member: ensemble.Member) -> dict[str, Any]:
    """Returns the number of a member of an ensemble, and its options that are not the defaults."""
    fields, defaults = member._asdict(), ensemble.Member._field_defaults
    number = {"member": fields.pop("number")}
    return number | {name: value for name, value in fields.items() if value != defaults[name]}
