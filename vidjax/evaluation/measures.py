"""Measures error rates, and MAP by group of identities or by group of clips. Lists mistakes.

A known clip shows one of the identities. A distractor shows none of them: it is a clip of a
stranger. FPIR is the share of distractors whose score reaches a threshold. FNIR is the share of
known clips that get a wrong identity, or whose score does not reach the threshold.
"""

import contextlib
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from threadpoolctl import threadpool_limits

from vidjax.core import metrics
from vidjax.core.metrics import ClipScores
from vidjax.data.clips import SPLITS, Split
from vidjax.evaluation.scoring import TrainedModel
from vidjax.evaluation.significance import FEWEST_IDENTITIES, compute_gap_interval, map_interval
from vidjax.evaluation.topk import TopK
from vidjax.runs import schemas

MOST_GROUPS = 8  # sets of modalities with separate groups; all other sets form one group
DRAWS = 1000  # for the interval of a group
QUANTILES = 5  # number of groups of clips by quality
COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # upper edges of groups by the number of clips or frames
NUM_WORST = 20  # identities
NUM_WRONG = 15  # clips of each kind of mistake
NUM_PAIRS = 15  # pairs of identities
# A label is suspected to be wrong if another identity has at least this probability,
SURE = 0.9
NUM_ABOVE = 5  # and at least this number of identities scores above the label.
SCORE_BINS, CONFIDENCE_BINS = 40, 10
RATES = (0.01, 0.1)  # FPIR of the thresholds in the report
RESAMPLES = 1000  # number of bootstrap samples

Groups = list[tuple[str, np.ndarray]]  # label, and [N] or [C] bool: the members of the group
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class ScoredSplit:
    """The ranking of N clips for C identities, and measures of the ranking."""

    top: TopK  # the best k clips of every identity as numpy arrays, best first
    best: np.ndarray  # [N] float32, the highest score of each clip for any identity
    labels: np.ndarray  # [N] int, the identity that each clip shows, 1..C; 0 for a distractor
    names: Sequence[str]  # of the N clips
    pool: np.ndarray  # [N] bool, True for clips that are ranked
    positives: np.ndarray  # [C] int, the number of clips of every identity

    @cached_property
    def columns(self) -> np.ndarray:
        """The labels of the k best clips of each identity, [C, k] int. -1 means no clip."""
        index = self.top.index
        filled = index < len(self.labels)
        return np.where(filled, self.labels[np.where(filled, index, 0)], -1)

    @cached_property
    def hits(self) -> np.ndarray:
        """Which of the k best clips of each identity show the identity, [C, k] bool."""
        return self.columns == np.arange(1, len(self.columns) + 1)[:, None]

    @cached_property
    def averages(self) -> np.ndarray:
        """The average precision of every identity, [C] float64."""
        return metrics.average_precision(self.hits, self.positives)

    def averages_among(self, chosen: np.ndarray) -> tuple[np.ndarray, int]:
        """Measures how well the clips of a group are ranked for the identities that they show.

        `chosen` [N] bool is True for the clips of the group. Returns the average precision of each
        identity with a clip in the group, and the number of clips in the group that show an
        identity. Clips outside of the group are removed from the rankings of their own identities.
        """
        positives = np.bincount(self.labels[chosen], minlength=len(self.hits) + 1)[1:]
        kept = ~self.hits | chosen[np.where(self.hits, self.top.index, 0)]
        return self._averages_of(kept, positives)[positives > 0], int(positives.sum())

    def averages_without(self, removed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the average precisions [C] without the clips `removed` [N] bool.

        The second result, [C], is the number of clips that show each identity and are not removed.
        A ranking of the k best clips becomes shorter: it is not filled up with lower clips.
        """
        gone = np.bincount(self.labels[removed & self.pool], minlength=len(self.hits) + 1)[1:]
        kept = ~np.append(removed, False)[np.minimum(self.top.index, len(removed))]
        positives = self.positives - gone
        return self._averages_of(kept, positives), positives

    def _averages_of(self, kept: np.ndarray, positives: np.ndarray) -> np.ndarray:
        """Returns the average precisions [C] of rankings from which some clips are removed.

        `kept` [C, k] bool is False where a clip is removed from the k best clips of an identity.
        `positives` [C] is the number of clips that show each identity.
        """
        wanted = self.hits & kept
        ranks = np.cumsum(kept, axis=1)
        precision = np.where(wanted, np.cumsum(wanted, axis=1) / np.maximum(ranks, 1), 0.0)
        return precision.sum(axis=1) / np.maximum(positives, 1)

    @cached_property
    def best_lists(self) -> tuple[np.ndarray, np.ndarray]:
        """The best identity of each clip, [N] int from 0, and the score for this identity, [N].

        A clip has -1 and -inf if no identity with the clip's highest score (`best`) has the clip
        among its k best clips. If several have, the first identity is the best.
        """
        real = (self.top.index < len(self.names)) & (self.top.scores > -np.inf)
        real[real] = self.top.scores[real] >= self.best[self.top.index[real]]
        index, scores, identity = self.top.index[real], self.top.scores[real], np.nonzero(real)[0]
        order = np.lexsort((identity, -scores))
        clips, first = np.unique(index[order], return_index=True)
        best, best_scores = np.full(len(self.names), -1), np.full(len(self.names), -np.inf)
        best[clips], best_scores[clips] = identity[order][first], scores[order][first]
        return best, best_scores


def measure_copies(scored: ScoredSplit, split: Split, model: TrainedModel) -> schemas.Copies | None:
    """Counts ranked clips that have the frames of a training clip, and measures MAP without them.

    If there is no such clip, returns None.
    """
    found: dict[int, tuple[Split, int]] = {}
    others = [x for x in find_training_clips(model) if x[0].name != split.name]
    for other, trained in others:
        for clip, place in split.find_copies(other).items():
            if scored.pool[clip] and trained[place]:
                found[clip] = other, place
    if not found:
        return None
    clip, (other, place) = next(iter(found.items()))
    example = f"'{split.clips[clip]}' equals '{other.clips[place]}' of {other.name}"
    averages, positives = scored.averages_without(np.isin(np.arange(len(scored.pool)), [*found]))
    known = averages[positives > 0]
    value = float(known.mean()) if split.labelled and len(known) else None
    return schemas.Copies(count=len(found), example=example, map=value)


def measure_strata(
    scored: ScoredSplit, split: Split, modalities: Sequence[str], train_clips: np.ndarray | None
) -> list[schemas.Strata]:
    """Returns tables of MAP by group of identities, and by group of clips.

    `train_clips` [C] is the number of training clips of each identity, or None if it is unknown.
    """
    primary, ranked = modalities[0], scored.pool & (scored.labels > 0)

    def table(by: str, groups: Groups) -> schemas.Strata:
        rows = [(label, *scored.averages_among(chosen & ranked)) for label, chosen in groups]
        return schemas.Strata(by=by, rows=[_make_row(*group) for group in rows if len(group[1])])

    tables = []
    if train_clips is not None:
        known = scored.positives > 0
        rows = [
            _make_row(label, scored.averages[chosen & known], int(scored.positives[chosen].sum()))
            for label, chosen in group_by_count(train_clips)
            if (chosen & known).any()
        ]
        tables.append(schemas.Strata(by="training clips of the identity", rows=rows))
    lengths = split.lengths[primary]
    groups = group_by_quantile(split.quality[primary], lengths > 0)
    if groups:
        absent = (f"no {primary}", lengths == 0)
        tables.append(table(f"mean quality of {primary}", [*groups, absent]))
    tables.append(table(f"frames of {primary}", group_by_count(lengths)))
    if len(modalities) > 1:
        groups = group_by_modalities(split, modalities, scored.pool)
        tables.append(table("modalities that the clip has", groups))
    return tables


def _make_row(label: str, averages: np.ndarray, clips: int) -> schemas.Stratum:
    enough = len(averages) >= FEWEST_IDENTITIES
    low, high = map_interval(averages, draws=DRAWS) if enough else (None, None)
    value, num = float(averages.mean()), len(averages)
    return schemas.Stratum(label=label, map=value, low=low, high=high, identities=num, clips=clips)


def group_by_count(counts: np.ndarray) -> Groups:
    """Groups clips or identities by their `counts` [N or C], in ranges such as 3 to 4.

    For example, `counts` are numbers of frames of clips.
    """
    groups, low = [], 0
    for high in COUNTS:
        label = str(high) if low == high else f"{low} to {high}"
        groups.append((label, (counts >= low) & (counts <= high)))
        low = high + 1
    return [*groups, (f"over {COUNTS[-1]}", counts >= low)]


def group_by_quantile(values: np.ndarray, chosen: np.ndarray) -> Groups:
    """Groups the clips `chosen` [N] bool by `values` [N], about equally many per group.

    If all values are equal, returns [].
    """
    if not chosen.any():
        return []
    edges = np.unique(np.quantile(values[chosen], np.linspace(0, 1, QUANTILES + 1)))
    groups = []
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        below = values <= high if i == len(edges) - 2 else values < high
        groups.append((f"{low:.4g} to {high:.4g}", chosen & (values >= low) & below))
    return groups


def group_by_modalities(split: Split, names: Sequence[str], pool: np.ndarray) -> Groups:
    """Groups clips by the set of modalities that they have, such as `face, audio`.

    `names` are the modalities. `pool` [N] bool is True for ranked clips. The sets that are most
    common in ranked clips, at most MOST_GROUPS, have a group each. All other clips form the group
    `others`.
    """
    present = np.stack([split.lengths[name] > 0 for name in names])  # [M, N]
    code = np.sum(present << np.arange(len(names))[:, None], axis=0)  # bit i: modality i
    common = [value for value, _ in Counter(code[pool].tolist()).most_common(MOST_GROUPS)]
    groups = []
    for value in sorted(common, reverse=True):
        shown = [name for i, name in enumerate(names) if value >> i & 1]
        label = "all" if len(shown) == len(names) else ", ".join(shown) or "none"
        groups.append((label, code == value))
    return [*groups, ("others", ~np.isin(code, common))]


def find_training_clips(model: TrainedModel) -> list[tuple[Split, np.ndarray]]:
    """Returns a pair for each split of `model.data`: the split, and [N] bool for its N clips.

    The bool is True for the training clips of the model.
    """
    splits = list[Split]()
    for name in SPLITS:
        with contextlib.suppress(ValueError):  # there is no such split
            splits.append(model.data.split(name))
    return [(split, np.isin(split.clips, model.training_sets.clips)) for split in splits]


def find_worst_identities(scored: ScoredSplit) -> list[schemas.WorstIdentity]:
    """Returns a row for each of the identities with the lowest average precision, worst first.

    Two fields have up to three pairs (index of another identity, number of clips):
    - `lost_to` counts clips that show the identity, but score highest for the other identity. If
      the best identity of a clip is unknown (see `best_lists`), the index is -1.
    - `mixed_with` counts clips of the other identity at the ranks 1 to n, if n clips show the
      identity. Distractors have the index -1.
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
        ap, clips = float(average[identity]), int(positives[identity])
        others = {"lost_to": lost.most_common(3), "mixed_with": wrong.most_common(3)}
        rows.append(schemas.WorstIdentity(identity=identity, ap=ap, clips=clips, **others))
    return rows


def find_wrong_clips(scored: ScoredSplit) -> schemas.WrongClips:
    """Returns rows about clips whose best identity is wrong, highest scores first.

    Distractors, for which every identity is wrong, are listed apart from known clips. Clips that
    are not in the ranking of the wrong identity (`scored.top`) are left out.
    """
    (identity, score), shows = scored.best_lists, scored.labels - 1
    wrong = scored.pool & (identity >= 0) & (identity != shows)
    return schemas.WrongClips(
        distractors=_list_mistakes(scored, wrong & (shows < 0), identity, score),
        known=_list_mistakes(scored, wrong & (shows >= 0), identity, score),
    )


def _list_mistakes(
    scored: ScoredSplit, wrong: np.ndarray, identity: np.ndarray, score: np.ndarray
) -> list[schemas.Mistake]:
    """Returns rows about the clips in the mask `wrong` [N] with the highest scores.

    `identity` [N] is the index of the best identity of each clip, and `score` [N] the score for it.
    """
    places = np.flatnonzero(wrong)
    worst = places[np.lexsort((places, -score[places]))][:NUM_WRONG]
    rows = zip(worst, scored.labels[worst], identity[worst], score[worst], strict=True)
    return [
        schemas.Mistake(
            clip=scored.names[int(i)], shows=int(label) - 1, identity=int(found), score=float(value)
        )
        for i, label, found, value in rows
    ]


def find_confused_pairs(clips: ClipScores, labels: np.ndarray) -> list[schemas.ConfusedPair]:
    """Returns the pairs of identities with the most confused clips, most clips first.

    A clip is confused if it shows one identity of the pair, and scores highest for the other.
    `labels` [N] int is 0 for a distractor.
    """
    best = clips.identity
    assert best is not None
    wrong = clips.pool & (labels > 0) & (best > 0) & (best != labels)
    lost = Counter(zip((labels[wrong] - 1).tolist(), (best[wrong] - 1).tolist(), strict=True))
    pairs = {(min(pair), max(pair)) for pair in lost}
    rows = [
        schemas.ConfusedPair(first=one, second=two, counts=(lost[one, two], lost[two, one]))
        for one, two in sorted(pairs)
    ]
    return sorted(rows, key=lambda row: -sum(row.counts))[:NUM_PAIRS]


def measure_suspects(scored: ScoredSplit, clips: ClipScores) -> schemas.Suspects:
    """Measures how MAP changes without the clips whose labels are suspected to be wrong.

    A label is suspected if two conditions hold. The best identity of the clip has a probability of
    SURE or more. NUM_ABOVE or more identities have higher scores than the label. MAP does not
    include identities without remaining clips.

    The scores in `clips` must be logarithms of probabilities, of a model that was not trained on
    these clips.
    """
    assert clips.identity is not None and clips.rank is not None
    doubted = clips.pool & (scored.labels > 0) & (clips.rank >= NUM_ABOVE)
    doubted &= clips.best >= math.log(SURE)
    averages, positives = scored.averages_without(doubted)
    known = positives > 0
    gaps = (averages - scored.averages)[known]
    low, high, _ = compute_gap_interval(gaps, draws=DRAWS) if known.any() else (0.0, 0.0, 1.0)
    return schemas.Suspects(
        sure=SURE, above=NUM_ABOVE, count=int(doubted.sum()),
        clips=_list_mistakes(scored, doubted, clips.identity - 1, clips.best),
        identities=int(known.sum()), gain=float(gaps.mean()) if known.any() else 0.0,
        low=low, high=high,
    )  # fmt: skip


# ---- known clips and distractors


def score_histograms(clips: ClipScores, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns two histograms of the clips' best scores, in SCORE_BINS bins.

    The result is a dict of arrays: `score_known` counts known clips, `score_strange` counts
    distractors (`labels` 0), and `score_edges` [SCORE_BINS + 1] are the edges of the bins. The
    first bin starts at the 0.5 % quantile of the scores, and includes all lower scores. If no clip
    has a score, returns {}.
    """
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


def compute_error_curve(clips: ClipScores, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the false positive (`fpir`) and negative (`fnir`) rates at n thresholds, [n] each.

    If there is no distractor (`labels` 0) or no known clip, returns {}.
    """
    best, right, known = (part[clips.pool] for part in (clips.best, clips.right, labels > 0))
    shares = np.unique([*np.geomspace(1e-3, 1, 40), 0.01, 0.1])
    tries = [metrics.identification_errors(best, right, known, fpir=share) for share in shares]
    errors = [error for error in tries if error]
    return {
        name: np.array([getattr(x, name) for x in errors]) for name in ("fpir", "fnir") if errors
    }


def open_set(clips: ClipScores, labels: np.ndarray, num_identities: int) -> schemas.OpenSet | None:
    """Measures FPIR and FNIR at two thresholds, for an FPIR of at most 1 % and 10 %.

    FPIR and FNIR are the false positive and false negative identification rates. If there is no
    distractor (`labels` 0) or no known clip, returns None. With fewer than 99 distractors, the
    threshold for 1 % is None. With fewer than 9, the threshold for 10 % is None, too.

    In simulations, the interval of FNIR (see `resample_fnir`) contains the true FNIR in 93 to 99 %
    of samples, or in at least 85 % if the FPIR allows fewer than four distractors to pass.
    """
    best, right, people = (part[clips.pool] for part in (clips.best, clips.right, labels))
    scores, known = best.astype(np.float64), people > 0
    num_strange = int(np.sum(~known))
    if not num_strange or not known.any():
        return None
    rows = []
    for rate in RATES:
        row = schemas.Rate(rate=rate, fewest=math.ceil(1 / rate) - 1)
        errors = metrics.identification_errors(best, right, known, fpir=rate)
        if errors:
            passed = round(errors.fpir * num_strange)
            row.threshold, row.fpir, row.fnir = errors.threshold, errors.fpir, errors.fnir
            row.fpir_low, row.fpir_high = metrics.fpir_interval(passed, num_strange)
            drawn = resample_fnir(scores[~known], scores[known], right[known], people[known], rate)
            bounds = [(1 - metrics.LEVEL) / 2, (1 + metrics.LEVEL) / 2]
            low, high = np.quantile(drawn, bounds).tolist()
            row.fnir_low, row.fnir_high = min(low, errors.fnir), max(high, errors.fnir)
        rows.append(row)
    return schemas.OpenSet(
        num_identities=num_identities, num_known=int(known.sum()),
        num_people=len(np.unique(people[known])), num_strange=num_strange,
        resamples=RESAMPLES, rates=rows,
    )  # fmt: skip


# BLAS threads would wait for each other for longer than they compute.
@threadpool_limits.wrap(limits=1, user_api="blas")
def resample_fnir(
    strange: np.ndarray, known: np.ndarray, right: np.ndarray, people: np.ndarray, rate: float
) -> np.ndarray:
    """Returns the FNIR of each bootstrap sample of people and distractors, [RESAMPLES] float64.

    FNIR is the share of the clips of known people whose best identity is wrong or scores below the
    threshold. In each sample, all clips of a person have the same random weight.

    Args:
      strange: [S] scores of the distractors.
      known: [n] the best score of each clip of a known person.
      right: [n] bool, True if the best score is that of the right identity.
      people: [n] the right identity of each clip.
      rate: the FPIR, the allowed share of distractors that reach the threshold, such as 0.01.
    """
    rng = np.random.default_rng(0)
    num = len(strange)
    names, person = np.unique(people, return_inverse=True)
    place = num - 1 - metrics.count_allowed(num, rate)  # of the last score below the threshold
    rates = []
    for _ in range(RESAMPLES):
        refused = np.partition(strange[rng.integers(0, num, num)], place)[place]
        weight = rng.standard_exponential(len(names))[person]
        # A made-up person, missed with the weight `half`: FNIR varies even if no clip is missed.
        half, other = rng.standard_gamma(0.5, 2) * len(person) / len(names)
        missed = ~(right & (known > refused))
        rates.append((weight @ missed + half) / (weight.sum() + half + other))
    return np.array(rates)


@threadpool_limits.wrap(limits=1, user_api="blas")
def compute_clip_intervals(clips: ClipScores, labels: np.ndarray) -> dict[str, tuple[float, float]]:
    """Returns metric -> its 95 % interval (low, high), for the metrics `top1` and `auroc`.

    The intervals are from a Bayesian bootstrap over people: all clips of a person get the same
    random weight. For `auroc`, each distractor gets a random weight, too. If no clip is a
    distractor (label 0), there is no `auroc`. The bootstrap adds a made-up person and a made-up
    distractor. Without them, the interval of a perfect metric would have width 0.
    """
    best, right, people = (part[clips.pool] for part in (clips.best, clips.right, labels))
    known, rng = people > 0, np.random.default_rng(0)
    names, person = np.unique(people[known], return_inverse=True)
    strange = np.sort(best[~known])
    lower, upper = (np.searchsorted(strange, best[known], side) for side in ("left", "right"))
    drawn: dict[str, list[float]] = {"top1": [], "auroc": []}
    for _ in range(RESAMPLES if len(names) else 0):
        weight = rng.standard_exponential(len(names))[person]
        # Clips of the unseen person: `half` are right and score above all distractors, and `other`
        # are wrong and score below all distractors. Each has half of a person's weight on average.
        half, other = rng.standard_gamma(0.5, 2) * len(person) / len(names)
        drawn["top1"].append((weight @ right[known] + half) / (weight.sum() + half + other))
        if len(strange):
            # The unseen person and the unseen distractor share the weight of one.
            below, above, half, other = rng.standard_gamma(0.25, 4)
            half, other = np.array([half, other]) * len(person) / len(names)
            mass = below + np.append(0.0, np.cumsum(rng.standard_exponential(len(strange))))
            share = (mass[lower] + mass[upper]) / 2 / (mass[-1] + above)
            drawn["auroc"].append((weight @ share + half) / (weight.sum() + half + other))
    intervals = {}
    for name, values in drawn.items():
        value = metrics.CLIP_METRICS[name].fn(clips, labels)
        if values and value is not None:
            low, high = np.quantile(values, [(1 - metrics.LEVEL) / 2, (1 + metrics.LEVEL) / 2])
            intervals[name] = min(float(low), value), max(float(high), value)
    return intervals


def measure_calibration(clips: ClipScores) -> tuple[np.ndarray, float] | None:
    """Compares the probability of each clip's best identity with how often this identity is right.

    Returns a table [bins, 3] float and the expected calibration error, 0..1. A row of the table has
    the number of clips in a range of probabilities, their mean probability, and the share of these
    clips whose best identity is right. If no clip has a score, returns None.

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
