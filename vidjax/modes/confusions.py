"""The identities of least average precision, and the identities that they are confused with."""

from collections import Counter
from typing import Any

import numpy as np

from vidjax import metrics
from vidjax.modes.strata import hits, ranked_columns
from vidjax.steps.scoring import Evaluation
from vidjax.steps.topk import TopK

NUM_WORST = 20  # identities


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
    best_list = best_lists(evaluation.top, len(labels))
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


def best_lists(top: TopK, num_clips: int) -> np.ndarray:
    """Returns [N] int, the identity in whose list each clip scores highest; -1 if in no list.

    Where two scores are equal, the identity that comes first wins.
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
    return best
