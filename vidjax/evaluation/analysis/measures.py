"""What an analysis measures: MAP by kinds of identities and clips, mistakes, and the open set."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from vidjax.core import metrics
from vidjax.core.metrics import ClipScores
from vidjax.data.clips import Split
from vidjax.evaluation.scoring import TrainedModel
from vidjax.evaluation.significance import FEWEST_IDENTITIES, map_interval
from vidjax.evaluation.topk import TopK

MOST_GROUPS = 8  # sets of modalities that are shown, the most frequent ones
DRAWS = 1000  # of the interval of a group, which has one from FEWEST_IDENTITIES on
QUANTILES = 5  # groups of clips by quality
COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # upper edges of the groups by a count
NUM_WORST = 20  # identities
NUM_WRONG = 15  # clips of each kind of mistake
SCORE_BINS, CONFIDENCE_BINS = 40, 10
RATES = (0.01, 0.1)  # FPIR of the thresholds that are shown
RESAMPLES = 1000  # of the bootstrap

Groups = list[tuple[str, np.ndarray]]  # label, and bool: the clips or identities of the group
Row = dict[str, Any]  # of a table in `run.formats.Analysis`
Values = dict[str, Any]  # of `run.formats.Analysis`
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class ScoredSplit:
    """The ranking of a split, and values that several parts of its analysis use.

    Attributes:
      top: the best clips of every identity as numpy arrays, best first.
      labels: [N] int, class columns.
      pool: [N] bool, the clips that are ranked.
      positives: [C] int, clips of every identity.
    """

    top: TopK
    labels: np.ndarray
    names: Sequence[str]
    pool: np.ndarray
    positives: np.ndarray

    @cached_property
    def columns(self) -> np.ndarray:
        """[C, k] int, the class column of every ranked clip; -1 at an empty place."""
        index = self.top.index
        filled = index < len(self.labels)
        return np.where(filled, self.labels[np.where(filled, index, 0)], -1)

    @cached_property
    def hits(self) -> np.ndarray:
        """[C, k] bool, True where a ranked clip shows the identity of its list."""
        return self.columns == np.arange(1, len(self.columns) + 1)[:, None]

    @cached_property
    def averages(self) -> np.ndarray:
        """[C] float64, average precision."""
        return metrics.average_precision(self.hits, self.positives)

    def averages_among(self, chosen: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns the average precisions [n] that count only `chosen`, and the number of these.

        `chosen` [N] bool are labelled clips. In each list, the identity's other clips are skipped.
        The n identities are those with a chosen clip.
        """
        positives = np.bincount(self.labels[chosen], minlength=len(self.hits) + 1)[1:]
        wanted = self.hits & chosen[np.where(self.hits, self.top.index, 0)]
        ranks = np.cumsum(wanted | ~self.hits, axis=1)
        precision = np.where(wanted, np.cumsum(wanted, axis=1) / np.maximum(ranks, 1), 0.0)
        average = precision.sum(axis=1)[positives > 0] / positives[positives > 0]
        return average, int(positives.sum())

    @cached_property
    def best_lists(self) -> tuple[np.ndarray, np.ndarray]:
        """The identity [N] in whose list each clip scores highest, and that score [N].

        Of equal scores, the first identity wins. A clip in no list has -1 and -inf.
        """
        real = (self.top.index < len(self.names)) & (self.top.scores > -np.inf)
        index, scores, identity = self.top.index[real], self.top.scores[real], np.nonzero(real)[0]
        order = np.lexsort((identity, -scores))
        clips, first = np.unique(index[order], return_index=True)
        best, best_scores = np.full(len(self.names), -1), np.full(len(self.names), -np.inf)
        best[clips], best_scores[clips] = identity[order][first], scores[order][first]
        return best, best_scores


def strata(
    scored: ScoredSplit,
    split: Split,
    modalities: Sequence[str],
    quality: np.ndarray,
    train_clips: np.ndarray | None,
) -> list[Row]:
    """Returns tables of MAP over groups of identities, and over groups of clips.

    Args:
      modalities: the inputs of the model, the primary one first.
      quality: [N] float, mean quality of each clip's frames of the primary modality.
      train_clips: [C] int, training clips per identity; None where they are not known.
    """
    primary, ranked = modalities[0], scored.pool & (scored.labels > 0)

    def table(by: str, groups: Groups) -> Row:
        found = [(label, *scored.averages_among(chosen & ranked)) for label, chosen in groups]
        return {"by": by, "rows": [_row(*group) for group in found if len(group[1])]}

    tables = []
    if train_clips is not None:
        known = scored.positives > 0
        rows = [
            _row(label, scored.averages[chosen & known], int(scored.positives[chosen].sum()))
            for label, chosen in by_count(train_clips)
            if (chosen & known).any()
        ]
        tables.append({"by": "training clips of the identity", "rows": rows})
    lengths = split.lengths[primary]
    groups = by_quantile(quality, lengths > 0)
    if groups:
        absent = (f"no {primary}", lengths == 0)
        tables.append(table(f"mean quality of {primary}", [*groups, absent]))
    tables.append(table(f"frames of {primary}", by_count(lengths)))
    if len(modalities) > 1:
        groups = by_modalities(split, modalities, scored.pool)
        tables.append(table("modalities that the clip has", groups))
    return tables


def _row(label: str, averages: np.ndarray, clips: int) -> Row:
    enough = len(averages) >= FEWEST_IDENTITIES
    low, high = map_interval(averages, draws=DRAWS) if enough else (None, None)
    return {
        "label": label,
        "map": float(averages.mean()),
        "low": low,
        "high": high,
        "identities": len(averages),
        "clips": clips,
    }


def by_count(counts: np.ndarray) -> Groups:
    """Groups clips or identities by `counts`, into the ranges that end at COUNTS."""
    groups, low = [], 0
    for high in COUNTS:
        label = str(high) if low == high else f"{low} to {high}"
        groups.append((label, (counts >= low) & (counts <= high)))
        low = high + 1
    return [*groups, (f"over {COUNTS[-1]}", counts >= low)]


def by_quantile(values: np.ndarray, chosen: np.ndarray) -> Groups:
    """Cuts the chosen clips into groups of equal size by value; none where all are equal."""
    if not chosen.any():
        return []
    edges = np.unique(np.quantile(values[chosen], np.linspace(0, 1, QUANTILES + 1)))
    groups = []
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        below = values <= high if i == len(edges) - 2 else values < high
        groups.append((f"{low:.4g} to {high:.4g}", chosen & (values >= low) & below))
    return groups


def by_modalities(split: Split, names: Sequence[str], pool: np.ndarray) -> Groups:
    """Groups clips by the set of modalities that they have; rare sets are one group, `others`."""
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

    The model's data need not be those of its training; `train_splits` that they lack are skipped.
    """
    total = np.zeros(model.system.task.num_identities + 1, np.int64)
    for name in train_splits:
        try:
            split = model.data.split(name)
        except ValueError:
            continue
        trained = np.isin(split.clips, model.training_sets.clips)
        total += np.bincount(split.labels[trained], minlength=len(total))
    return total[1:] if total.any() else None


def worst_identities(scored: ScoredSplit) -> list[Row]:
    """Lists the identities of least average precision, worst first.

    `lost_to` and `mixed_with` are up to three pairs of an identity and a count of clips:
    - `lost_to`: other identities in whose lists its clips score highest; -1 for clips in no list.
    - `mixed_with`: other identities with clips among the first n of its list, where n is the number
      of its own clips; -1 for distractors.
    """
    positives, average = scored.positives, scored.averages
    known = np.flatnonzero(positives > 0)
    order = known[np.lexsort((known, -positives[known], average[known]))][:NUM_WORST]
    best_list, _ = scored.best_lists
    rows = []
    for identity in map(int, order):
        own = np.flatnonzero((scored.labels == identity + 1) & scored.pool)
        lost = Counter(best_list[own[best_list[own] != identity]].tolist())
        places = scored.columns[identity, : positives[identity]]
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


def wrong_clips(scored: ScoredSplit) -> dict[str, list[Row]]:
    """Lists the clips whose best identity is wrong, those with the highest scores first.

    `shows` is the identity in the clip, -1 for a distractor; `identity` is the one in whose list
    the clip scores highest. Clips in no list are left out.
    """
    (identity, score), shows = scored.best_lists, scored.labels - 1
    wrong = scored.pool & (identity >= 0) & (identity != shows)
    rows: dict[str, list[Row]] = {}
    for kind, chosen in {"distractors": shows < 0, "known": shows >= 0}.items():
        places = np.flatnonzero(wrong & chosen)
        rows[kind] = [
            {
                "clip": scored.names[i],
                "shows": int(shows[i]),
                "identity": int(identity[i]),
                "score": float(score[i]),
            }
            for i in places[np.lexsort((places, -score[places]))][:NUM_WRONG]
        ]
    return rows


# Known clips against distractors.


def measure_open_set(
    clips: ClipScores, labels: np.ndarray, num_identities: int, *, logs: bool
) -> tuple[Values, Arrays]:
    """Returns values and arrays of the analysis; `labels` [N] int are class columns.

    `logs` is True for scores that are logarithms of probabilities: calibration needs them.
    """
    arrays = score_histograms(clips, labels) | error_curve(clips, labels)
    values: Values = {"open_set": open_set(clips, labels, num_identities)}
    if logs and (calibrated := calibration(clips)):
        arrays["calibration"], values["calibration_error"] = calibrated
    return values, arrays


def score_histograms(clips: ClipScores, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns histograms of best scores; the first bin has all below the 0.5 % quantile."""
    scored = clips.pool & (clips.best > -np.inf)
    if not scored.any():
        return {}
    values = clips.best.astype(np.float64)
    low, high = np.quantile(values[scored], [0.005, 1.0])
    edges = np.linspace(low, max(high, low + 1e-6), SCORE_BINS + 1)
    inside = np.clip(values, low, edges[-1])
    return {
        "score_edges": edges,
        "score_known": np.histogram(inside[scored & (labels > 0)], edges)[0],
        "score_strange": np.histogram(inside[scored & (labels == 0)], edges)[0],
    }


def error_curve(clips: ClipScores, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns `fpir` and `fnir` [n] at n thresholds; {} without distractors or known clips."""
    best, right, known = (part[clips.pool] for part in (clips.best, clips.right, labels > 0))
    shares = np.unique([*np.geomspace(1e-3, 1, 40), 0.01, 0.1])
    found = [metrics.identification_errors(best, right, known, fpir=share) for share in shares]
    errors = [error for error in found if error]
    return {
        name: np.array([getattr(x, name) for x in errors]) for name in ("fpir", "fnir") if errors
    }


def open_set(clips: ClipScores, labels: np.ndarray, num_identities: int) -> dict[str, Any] | None:
    """Returns thresholds at RATES and their errors; None without a distractor or a known clip.

    The interval of FNIR is a bootstrap over people, with all their clips, and over distractors;
    each resample sets the threshold anew. In simulation the interval holds the true FNIR in 94 to
    95 % of samples if four or more distractors may pass, in 87 % if one or two may. A rate below
    1 / (S + 1), for S distractors, gets no threshold and no errors.
    """
    best, right, people = (part[clips.pool] for part in (clips.best, clips.right, labels))
    scores, known = best.astype(np.float64), people > 0
    num_strange = int(np.sum(~known))
    if not num_strange or not known.any():
        return None
    rows = []
    for rate in RATES:
        row: dict[str, Any] = {"rate": rate, "fewest": math.ceil(1 / rate) - 1}
        errors = metrics.identification_errors(best, right, known, fpir=rate)
        if errors:
            passed = round(errors.fpir * num_strange)
            row |= {"threshold": errors.threshold, "fpir": errors.fpir, "fnir": errors.fnir}
            row["fpir_low"], row["fpir_high"] = metrics.fpir_interval(passed, num_strange)
            drawn = resampled_fnir(scores[~known], scores[known], right[known], people[known], rate)
            bounds = [(1 - metrics.LEVEL) / 2, (1 + metrics.LEVEL) / 2]
            row["fnir_low"], row["fnir_high"] = np.quantile(drawn, bounds).tolist()
        rows.append(row)
    return {
        "num_identities": num_identities,
        "num_known": int(known.sum()),
        "num_people": len(np.unique(people[known])),
        "num_strange": num_strange,
        "resamples": RESAMPLES,
        "rates": rows,
    }


def resampled_fnir(
    strange: np.ndarray, known: np.ndarray, right: np.ndarray, people: np.ndarray, rate: float
) -> np.ndarray:
    """Returns [RESAMPLES] FNIR, each at the threshold that `metrics.threshold_of` sets for `rate`.

    `strange` [S] and `known` [n] are float64 scores of distractors and of known clips. Known clips
    have `right` [n] bool, True for a right best identity, and `people` [n] int, identities.
    """
    rng = np.random.default_rng(0)
    num = len(strange)
    names, person = np.unique(people, return_inverse=True)
    place = num - 1 - metrics.num_allowed(num, rate)  # of the best one refused
    found = []
    for _ in range(RESAMPLES):
        refused = np.partition(strange[rng.integers(0, num, num)], place)[place]
        weight = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))[person]
        found.append(1 - (right & (known > refused)) @ weight / weight.sum())
    return np.array(found)


def clip_intervals(clips: ClipScores, labels: np.ndarray) -> dict[str, tuple[float, float]]:
    """Returns the 95 % intervals of `top1` and, with distractors, of `auroc`.

    Both are Bayesian bootstraps over people, with all their clips, and an unseen person, as that of
    MAP; half of the unseen person's clips are right and score above all others, half score below.
    For `auroc` also over distractors and an unseen one.
    """
    best, right, people = (part[clips.pool] for part in (clips.best, clips.right, labels))
    known, rng = people > 0, np.random.default_rng(0)
    names, person = np.unique(people[known], return_inverse=True)
    strange = np.sort(best[~known])
    lower, upper = (np.searchsorted(strange, best[known], side) for side in ("left", "right"))
    drawn: dict[str, list[float]] = {"top1": [], "auroc": []}
    for _ in range(RESAMPLES if len(names) else 0):
        weight = rng.standard_exponential(len(names))[person]
        half, other = rng.standard_gamma(0.5, 2) * len(person) / len(names)
        total = weight.sum() + half + other
        drawn["top1"].append((weight @ right[known] + half) / total)
        if len(strange):
            below, above = rng.standard_gamma(0.5, 2)
            mass = below + np.append(0.0, np.cumsum(rng.standard_exponential(len(strange))))
            share = (mass[lower] + mass[upper]) / 2 / (mass[-1] + above)
            drawn["auroc"].append((weight @ share + half) / total)
    found = {}
    for name, values in drawn.items():
        value = metrics.CLIP_METRICS[name].fn(clips, labels)
        if values and value is not None:
            low, high = np.quantile(values, [(1 - metrics.LEVEL) / 2, (1 + metrics.LEVEL) / 2])
            found[name] = min(float(low), value), max(float(high), value)
    return found


def calibration(clips: ClipScores) -> tuple[np.ndarray, float] | None:
    """Compares the probabilities of the best identities with the share that is right.

    Returns [bins, 3] float: clips, mean probability and share that is right, per bin of
    probability; and the expected calibration error, 0..1. None where no clip has a score.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3.
    """
    scored = clips.pool & (clips.best > -np.inf)
    if not scored.any():
        return None
    confidence = np.minimum(np.exp(clips.best[scored].astype(np.float64)), 1.0)
    place = np.minimum((confidence * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    count = np.bincount(place, minlength=CONFIDENCE_BINS)
    means = [
        np.bincount(place, weight, CONFIDENCE_BINS) / np.maximum(count, 1)
        for weight in (confidence, clips.right[scored])
    ]
    error = np.sum(count * np.abs(means[0] - means[1])) / count.sum()
    return np.stack([count, *means], axis=1), float(error)
