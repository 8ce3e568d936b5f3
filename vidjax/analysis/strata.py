"""MAP by kinds of identities and clips, and the mistakes: worst identities, wrong clips, lists."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vidjax import metrics
from vidjax.data.clips import Split
from vidjax.evaluation.scoring import Evaluation, TrainedModel
from vidjax.significance import FEWEST_IDENTITIES, map_interval
from vidjax.steps.topk import TopK

MOST_GROUPS = 8  # sets of modalities that are shown, the most frequent ones
DRAWS = 1000  # of the interval of a group, which has one from FEWEST_IDENTITIES on
QUANTILES = 5  # groups of clips by quality
COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # upper edges of the groups by a count

Groups = list[tuple[str, np.ndarray]]  # label, and bool: the clips or identities of the group


def strata(
    evaluation: Evaluation,
    split: Split,
    modalities: Sequence[str],
    quality: np.ndarray,
    train_clips: np.ndarray | None,
) -> list[dict[str, Any]]:
    """Computes MAP over groups of identities, and over groups of clips.

    Args:
      evaluation: the ranking.
      split: its clips.
      modalities: the inputs of the model, the primary one first.
      quality: [N] float, mean quality of each clip's frames of the primary modality.
      train_clips: [C] int, training clips per identity; None where they are not known.

    Returns:
      Tables {by: str, rows: list of {label: str, map: float, low, high: float |
      None, identities: int, clips: int}}. `low` and `high` bound the 95 % interval of `map`.
    """
    primary = modalities[0]
    columns = ranked_columns(evaluation.top, split.labels)
    ranked = evaluation.clips.pool & (split.labels > 0)

    def table(by: str, groups: Groups) -> dict[str, Any]:
        rows = []
        for label, chosen in groups:
            averages, clips = averages_among(evaluation.top, columns, split.labels, chosen & ranked)
            if len(averages):
                rows.append(_row(label, averages, clips))
        return {"by": by, "rows": rows}

    tables = []
    if train_clips is not None:
        tables.append(_by_train_clips(evaluation, columns, train_clips))
    lengths = split.lengths[primary]
    groups = by_quantile(quality, lengths > 0)
    if groups:
        absent = (f"no {primary}", lengths == 0)
        tables.append(table(f"mean quality of {primary}", [*groups, absent]))
    tables.append(table(f"frames of {primary}", by_count(lengths)))
    if len(modalities) > 1:
        groups = by_modalities(split, modalities, evaluation.clips.pool)
        tables.append(table("modalities that the clip has", groups))
    return tables


def _by_train_clips(
    evaluation: Evaluation, columns: np.ndarray, train_clips: np.ndarray
) -> dict[str, Any]:
    """Returns the table of identities grouped by the number of their training clips."""
    positives = evaluation.positives
    average = metrics.average_precision(hits(columns), positives)
    rows = []
    for label, chosen in by_count(train_clips):
        chosen = chosen & (positives > 0)
        if chosen.any():
            clips = int(positives[chosen].sum())
            rows.append(_row(label, average[chosen], clips))
    return {"by": "training clips of the identity", "rows": rows}


def _row(label: str, averages: np.ndarray, clips: int) -> dict[str, Any]:
    """Returns the row of a group, given the average precisions of its identities."""
    low = high = None
    if len(averages) >= FEWEST_IDENTITIES:
        low, high = map_interval(averages, draws=DRAWS)
    return {
        "label": label,
        "map": float(averages.mean()),
        "low": low,
        "high": high,
        "identities": len(averages),
        "clips": clips,
    }


def ranked_columns(top: TopK, labels: np.ndarray) -> np.ndarray:
    """Returns [C, k] int, the class column of every ranked clip; -1 at an empty place."""
    index = np.asarray(top.index)
    filled = index < len(labels)
    return np.where(filled, labels[np.where(filled, index, 0)], -1)


def hits(columns: np.ndarray) -> np.ndarray:
    """Returns [C, k] bool, True where a ranked clip shows the identity of its list.

    Args:
      columns: [C, k] int, from `ranked_columns`.
    """
    return columns == np.arange(1, len(columns) + 1)[:, None]


def averages_among(
    top: TopK, columns: np.ndarray, labels: np.ndarray, chosen: np.ndarray
) -> tuple[np.ndarray, int]:
    """Computes average precisions over some clips only.

    The other clips of an identity are skipped in its list.

    Args:
      top: the ranking.
      columns: [C, k] int, from `ranked_columns`.
      labels: [N] int, class columns.
      chosen: [N] bool, labelled clips.

    Returns:
      The average precisions [n] of the identities that have a chosen clip, and the number of chosen
      clips.
    """
    positives = np.bincount(labels[chosen], minlength=len(columns) + 1)[1:]
    index = np.asarray(top.index)
    own = hits(columns)
    wanted = own & chosen[np.where(columns >= 0, index, 0)]
    ranks = np.cumsum(wanted | ~own, axis=1)
    precision = np.where(wanted, np.cumsum(wanted, axis=1) / np.maximum(ranks, 1), 0.0)
    average = precision.sum(axis=1)[positives > 0] / positives[positives > 0]
    return average, int(positives.sum())


def by_count(counts: np.ndarray) -> Groups:
    """Groups by a count, with edges that double."""
    groups, low = [], 0
    for high in (*COUNTS, np.inf):
        if high == np.inf:
            label = f"over {low - 1}"
        else:
            label = str(high) if low == high else f"{low} to {high}"
        groups.append((label, (counts >= low) & (counts <= high)))
        low = high + 1
    return groups


def by_quantile(values: np.ndarray, chosen: np.ndarray) -> Groups:
    """Cuts the chosen entries into groups of equal size; no group where all values are equal."""
    if not chosen.any():
        return []
    edges = np.unique(np.quantile(values[chosen], np.linspace(0, 1, QUANTILES + 1)))
    groups = []
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        below = values <= high if i == len(edges) - 2 else values < high
        groups.append((f"{low:.4g} to {high:.4g}", chosen & (values >= low) & below))
    return groups


def by_modalities(split: Split, names: Sequence[str], pool: np.ndarray) -> Groups:
    """Groups clips by the modalities that they have; rare sets of modalities are one group."""
    present = np.stack([split.lengths[name] > 0 for name in names])  # [M, N]
    code = np.sum(present << np.arange(len(names))[:, None], axis=0)  # bit i: modality i
    common = [value for value, _ in Counter(code[pool].tolist()).most_common(MOST_GROUPS)]
    groups = []
    for value in sorted(common, reverse=True):
        shown = [name for i, name in enumerate(names) if value >> i & 1]
        label = "all" if len(shown) == len(names) else ", ".join(shown) or "none"
        groups.append((label, code == value))
    return [*groups, ("others", ~np.isin(code, common))]


def count_train_clips(model: TrainedModel, train_splits: Sequence[str]) -> np.ndarray | None:
    """Returns [C] int, the training clips per identity; None where no label is known.

    Args:
      model: the trained model; its data need not be what it was trained on.
      train_splits: splits whose ground truth is read. Those that the data lacks are skipped.
    """
    total = np.zeros(model.system.num_identities + 1, np.int64)
    for name in train_splits:
        try:
            split = model.data.split(name)
        except ValueError:
            continue
        trained = np.isin(split.clips, model.training_sets.clips)
        total += np.bincount(split.labels[trained], minlength=len(total))
    return total[1:] if total.any() else None


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
