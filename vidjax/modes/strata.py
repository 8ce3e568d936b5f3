"""MAP by kinds of identities and of clips: training clips, quality, frames, modalities."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vidjax import metrics
from vidjax.data.clips import Split
from vidjax.report.significance import FEWEST_IDENTITIES, map_interval
from vidjax.steps.conclusion import Evaluation
from vidjax.steps.model_scorer import TrainedModel
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
