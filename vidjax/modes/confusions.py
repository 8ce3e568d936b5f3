"""Names that a ranking gives, and its mistakes: the worst identities, wrong clips, lists."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vidjax import metrics
from vidjax.modes.strata import hits, ranked_columns
from vidjax.steps.conclusion import Evaluation
from vidjax.steps.topk import TopK

NUM_WORST = 20  # identities
NUM_WRONG = 15  # clips of each kind of mistake
NUM_LISTED = 10  # clips of a list
NUM_NAMED = 60  # clips of a split without ground truth


def worst_identities(evaluation: Evaluation, labels: np.ndarray) -> list[dict[str, Any]]:
    """Lists the identities of least average precision, worst first.

    Args:
      evaluation: the ranking.
      labels: [N] int, class columns.

    Returns:
      Rows {identity: int, ap: float, clips: int, lost_to, mixed_with}. The last two are up to three
      pairs of an identity and a count of clips, the most frequent first.
      - `lost_to`: the identities in whose lists its clips score highest; -1 for clips in no list.
      - `mixed_with`: the identities whose clips are at the top of its list, among as many places as
        it has clips; -1 for distractors.
    """
    columns = ranked_columns(evaluation.top, labels)
    positives = np.asarray(evaluation.positives)
    average = metrics.average_precision(hits(columns), evaluation.positives)
    known = np.flatnonzero(positives > 0)
    order = known[np.lexsort((known, -positives[known], average[known]))][:NUM_WORST]
    best_list, _ = best_lists(evaluation.top, len(labels))
    rows = []
    for identity in map(int, order):
        own = np.flatnonzero((labels == identity + 1) & evaluation.clips.pool)
        lost = Counter(best_list[own[best_list[own] != identity]].tolist())
        places = columns[identity, : positives[identity]]
        wrong = Counter((places[(places >= 0) & (places != identity + 1)] - 1).tolist())
        rows.append(
            {
                "identity": identity,
                "ap": float(average[identity]),
                "clips": int(positives[identity]),
                "lost_to": lost.most_common(3),
                "mixed_with": wrong.most_common(3),
            }
        )
    return rows


def wrong_clips(
    evaluation: Evaluation, labels: np.ndarray, clips: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Lists the clips that score highest for an identity that they do not show, best score first.

    Args:
      evaluation: the ranking.
      labels: [N] int, class columns.
      clips: [N] names.

    Returns:
      `distractors` and `known`, each rows {clip: str, shows: int, identity: int, score: float}.
      `shows` is the identity of the clip, -1 for a distractor; `identity` the one in whose list it
      scores highest. Clips in no list are left out.
    """
    identity, score = best_lists(evaluation.top, len(labels))
    shows = np.asarray(labels) - 1
    wrong = evaluation.clips.pool & (identity >= 0) & (identity != shows)
    rows = {}
    for kind, chosen in (("distractors", wrong & (shows < 0)), ("known", wrong & (shows >= 0))):
        places = np.flatnonzero(chosen)
        places = places[np.lexsort((places, -score[places]))][:NUM_WRONG]
        rows[kind] = [
            {
                "clip": clips[i],
                "shows": int(shows[i]),
                "identity": int(identity[i]),
                "score": float(score[i]),
            }
            for i in places
        ]
    return rows


def named_clips(evaluation: Evaluation, clips: Sequence[str]) -> dict[str, Any]:
    """Returns the best identity of the clips with the highest scores, best score first.

    Args:
      evaluation: the ranking.
      clips: [N] names.

    Returns:
      `rows`, up to `NUM_NAMED` of {clip: str, identity: int, score: float}, and `num`, the number
      of clips that are in a list.
    """
    identity, score = best_lists(evaluation.top, len(clips))
    listed = np.flatnonzero(identity >= 0)
    places = listed[np.lexsort((listed, -score[listed]))][:NUM_NAMED]
    rows = [
        {"clip": clips[i], "identity": int(identity[i]), "score": float(score[i])} for i in places
    ]
    return {"num": len(listed), "rows": rows}


def ranked_lists(
    evaluation: Evaluation, labels: np.ndarray, clips: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the first clips in the lists of the worst, the median and the best identity.

    Args:
      evaluation: the ranking.
      labels: [N] int, class columns.
      clips: [N] names.

    Returns:
      Rows {identity: int, ap: float, clips: int, rows}, lowest average precision first; `rows` are
      {clip: str, score: float, shows: int}, where `shows` is -1 for a distractor.
    """
    index, scores = np.asarray(evaluation.top.index), np.asarray(evaluation.top.scores)
    positives = np.asarray(evaluation.positives)
    average = metrics.average_precision(hits(ranked_columns(evaluation.top, labels)), positives)
    known = np.flatnonzero(positives > 0)
    order = known[np.lexsort((known, average[known]))]
    lists = []
    for identity in dict.fromkeys(int(order[i]) for i in (0, len(order) // 2, -1)):
        filled = (index[identity] < len(labels)) & (scores[identity] > -np.inf)
        places = np.flatnonzero(filled)[:NUM_LISTED]
        rows = [
            {
                "clip": clips[index[identity, i]],
                "score": float(scores[identity, i]),
                "shows": int(labels[index[identity, i]]) - 1,
            }
            for i in places
        ]
        clip_count = int(positives[identity])
        ap = float(average[identity])
        lists.append({"identity": identity, "ap": ap, "clips": clip_count, "rows": rows})
    return lists


def best_lists(top: TopK, num_clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the identity in whose list each clip scores highest, and that score.

    Where two scores are equal, the identity that comes first wins.

    Returns:
      The identities, [N] int, and the scores, [N] float; -1 and -inf for a clip in no list.
    """
    index, scores = np.asarray(top.index), np.asarray(top.scores)
    identity = np.repeat(np.arange(len(index)), index.shape[1])
    index, scores = index.reshape(-1), scores.reshape(-1)
    real = (index < num_clips) & (scores > -np.inf)
    index, scores, identity = index[real], scores[real], identity[real]
    order = np.lexsort((identity, -scores))
    clips, first = np.unique(index[order], return_index=True)
    best = np.full(num_clips, -1)
    best[clips] = identity[order][first]
    best_scores = np.full(num_clips, -np.inf)
    best_scores[clips] = scores[order][first]
    return best, best_scores
