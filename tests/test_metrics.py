"""Metrics equal oracles and values by hand; analyses agree with metrics; open-set intervals."""

import functools
import json
import math
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special
from threadpoolctl import threadpool_limits

from tests.helpers import limits, made_runs, small_runs
from tests.helpers.cases import nightly_after_first
from tests.helpers.seen import refused
from vidjax.core import metrics
from vidjax.core.metrics import ClipScores
from vidjax.evaluation import measures, ranking, scores as scores_lib, scoring, significance, topk
from vidjax.runs import config_io, schemas
from vidjax.utils.errors import DiskError

open_set: Any = measures.open_set
MANY, HUNDRED = (" ".join(f"p{i}.mp4" for i in range(count)) for count in (150, 100))
# Each line of a file has an identity and its clips, at most 100.
# Name of a case -> ground truth, submission, score as a fraction: the mean AP of the identities.
BY_HAND = {
    "hit at place 100": ("1 a.mp4", "1 " + HUNDRED.replace("p99", "a"), (1, 100)),
    "no hit": ("1 a.mp4", "1 x.mp4 y.mp4", (0, 1)),
    "1/1 and 2/3 of 2": ("1 a.mp4 b.mp4", "1 a.mp4 x.mp4 b.mp4", (5, 6)),
    "one of two positives missing": ("1 a.mp4 b.mp4", "1 a.mp4", (1, 2)),
    "150 positives, 100 hits": (f"1 {MANY}", f"1 {HUNDRED}", (2, 3)),
    "identity without a clip: AP 1 and 0": ("1 a.mp4\n2 b.mp4", "1 a.mp4\n2", (1, 2)),
    "truth by clip; AP 1 and 0": ("a.mp4 1\nb.mp4 2\nc.mp4 1", "1 a.mp4 c.mp4\n2 c.mp4", (1, 2)),
    "odd blanks; 1/2 and 2/3 of 2": ("1 a.mp4 b.mp4", " 1  x.mp4\ta.mp4   b.mp4\t", (7, 12)),
}


def score_files(truth, submission):
    ranked = ranking.read_submission(submission).ranking
    return ranking.score(ranking.read_ground_truth(truth), ranked)


@pytest.mark.parametrize(("ground_truth", "submission", "score"), BY_HAND.values(), ids=BY_HAND)
def test_map_of_files_matches_hand_computed_values(tmp_path, ground_truth, submission, score):
    paths = made_runs.write_pair(tmp_path, ground_truth, submission)
    assert score_files(*paths) == pytest.approx(float(Fraction(*score)), rel=0, abs=1e-15)


def test_map_of_arrays_equals_map_of_files_bit_for_bit(tmp_path):
    """30 identities, 400 clips. One list is short, and two clips of an identity have no record."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 30, 400)  # identity 30 has no clip
    index = np.stack([rng.permutation(400)[:100] for _ in range(30)]).astype(np.int32)
    index[3, 40:] = topk.NO_CLIP  # the short list
    positives = np.bincount(labels, minlength=31)[1:]  # without label 0, a distractor
    positives[5] += 2  # two clips of identity 6 without a record
    names = {c: [f"c{i}.mp4" for i in np.flatnonzero(labels == c)] for c in range(1, 31)}
    names[6] += ["lost1.mp4", "lost2.mp4"]
    gt = "".join(f"{c} {' '.join(listed)}\n" for c, listed in names.items() if listed)
    gt_path, path = made_runs.write_pair(tmp_path, gt, "")
    top = topk.TopK(np.zeros(index.shape, np.float32), index)
    ranking.write_ranking(path, list(map(str, names)), [f"c{i}" for i in range(400)], top)
    assert score_files(gt_path, path) == metrics.mean_average_precision(index, labels, positives)


def test_map_is_0_without_ranked_clips_and_refused_without_identities_or_with_too_many_hits():
    ranked = np.full((2, 9), topk.NO_CLIP), np.zeros(0, int)  # no clips, no labels
    assert metrics.mean_average_precision(*ranked, positives=np.array([3, 0])) == 0
    no_clip, one_clip, two_hits = np.zeros(2, int), np.array([1]), np.ones((1, 2), bool)
    refused(lambda: metrics.mean_average_precision(*ranked, no_clip), "no identity")
    refused(lambda: metrics.average_precision(two_hits, one_clip), "more hits")


def tied_scores(rng, count):
    """Returns scores with many ties, some of -inf and some NaN."""
    scores = rng.integers(-5, 6, count).astype(np.float64) / 4 + rng.choice([0, 1e-9], count)
    scores[rng.random(count) < 0.1] = -np.inf
    scores[rng.random(count) < 0.02] = np.nan
    return scores


def test_auroc_is_the_share_of_correctly_ordered_pairs():
    rng = np.random.default_rng(3)
    for _ in range(30):
        scores, positive = tied_scores(rng, 40), rng.random(40) < rng.uniform(0.1, 0.9)
        positive[:2] = True, False
        ranked = np.where(np.isnan(scores), -np.inf, scores)  # NaN counts as the worst score
        above, below = ranked[positive][:, None], ranked[~positive]
        expected = np.mean((above > below) + 0.5 * (above == below))
        ours = metrics.auroc(scores, positive)
        assert type(ours) is float and ours == pytest.approx(expected, rel=0, abs=1e-15)
    assert metrics.auroc([1.0, 2.0], [True, True]) is None  # without a negative
    assert metrics.auroc([], []) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_identification_errors_match_a_direct_count(dtype):
    rng = np.random.default_rng(4)
    for _ in range(40):
        scores = tied_scores(rng, 60).astype(dtype)
        known, correct = rng.random((2, 60)) < 0.6  # `correct` of a stranger does not count
        num_strangers, fpir = np.sum(~known), float(rng.choice([0, 0.01, 0.1, 0.29, 0.5, 1]))
        errors = metrics.identification_errors(scores, correct, known, fpir=fpir)
        # The next stranger may pass, so with S strangers the lowest rate is 1 / (S + 1).
        assert (errors is None) == (1 / (num_strangers + 1) > fpir)
        if errors is None:
            continue
        assert dtype(errors.threshold) == errors.threshold  # no rounding in this type
        # The rates are counts of the clips whose scores reach the threshold.
        ranked = np.where(np.isnan(scores), -np.inf, scores).astype(dtype)
        passed = ranked >= dtype(errors.threshold)
        wanted = passed[~known].mean(), 1 - (passed & correct)[known].mean()
        assert (errors.fpir, errors.fnir) == pytest.approx(wanted, rel=0, abs=1e-15)
        # The rate is kept even if one more stranger comes and passes. It would be exceeded if the
        # best rejected strangers passed. The threshold is the next number above their score.
        num_passed = np.sum(passed[~known])
        assert (num_passed + 1) / (num_strangers + 1) <= fpir
        rejected = ranked[~known & (ranked > -np.inf) & ~passed]
        if len(rejected):
            would_pass = num_passed + np.sum(rejected == rejected.max())
            assert (would_pass + 1) / (num_strangers + 1) > fpir
            assert np.nextafter(rejected.max(), rejected.max() + 1) == dtype(errors.threshold)


def test_identification_errors_need_strangers_and_known_people_and_a_rate():
    scores, all_known = np.arange(8.0), np.ones(8, bool)
    for known in (all_known, ~all_known):
        assert metrics.identification_errors(scores, known, known, fpir=0.5) is None
    compute = functools.partial(metrics.identification_errors, scores, all_known, all_known)
    for wrong in (-0.1, np.nan):
        refused(lambda x=wrong: compute(fpir=x), "fpir must be from 0 to 1")
    # A new stranger may pass, too. So 28 of 99 strangers count as 29 of 100, a rate of 0.29. And 0
    # of 9 count as 1 of 10, a rate of 0.1. In floating point, 0.29 * 100 is below 29, and 1 - 0.9
    # is below 0.1. These errors must not change the counts.
    assert metrics.count_allowed(99, 0.29) == 28 and metrics.count_allowed(9, 1 - 0.9) == 0


@pytest.fixture(scope="module")
def workdir(no_figures, trained):
    return trained("configs/mma.py:iqiyi_vid", "--config.eval.report=True")


@pytest.mark.slow
def test_analysis_counts_every_clip_and_agrees_with_the_results(workdir, data):
    facts, arrays = made_runs.load_analysis(workdir / "analysis.npz")
    results = json.loads((workdir / "metrics.json").read_text())
    assert facts["vectors"] == ["face 1", "face 2", "face 3", "head", "audio"]
    np.testing.assert_allclose(arrays["attention"].sum(axis=0), 1, atol=1e-6)  # [old vectors, new]
    # 96 clips in train; in val 40 with a known person, and 20 distractors.
    assert (arrays["positives"].sum(), arrays["train_clips"].sum()) == (40, 96)
    # Histograms of scores and calibration count the clips that have frames.
    with_frames = np.any([*data.split("val").lengths.values()], axis=0).sum()
    assert arrays["score_known"].sum() + arrays["score_strange"].sum() == with_frames
    assert arrays["calibration"][:, 0].sum() == with_frames  # of each range of probabilities
    assert len(facts["strata"]) == 4  # by training clips, quality, frames and modalities
    for table in facts["strata"]:
        assert sum(row["clips"] for row in table["rows"]) == 40, table["by"]
    # `num_others` identities of the ground truth have no training clip. Their AP is 0.
    of_known = arrays["ap"][arrays["positives"] > 0]
    assert math.fsum(of_known) / (len(of_known) + facts["num_others"]) == results["map"]
    assert facts["open_set"]["num_known"] == 40
    assert facts["open_set"]["num_strange"] == results["num_distractors"] == 20
    too_few, at_10_percent = facts["open_set"]["rates"]
    assert too_few == {"rate": 0.01, "fewest": 99}  # 1 % needs 99 distractors
    assert at_10_percent["fnir"] == results["fnir_at_fpir_0.1"]
    assert at_10_percent["threshold"] == results["threshold_at_fpir_0.1"]
    # 1 of 20 strangers passes. With a new stranger, 2 of 21 is below 0.1, and 3 of 21 is above.
    assert at_10_percent["fpir"] == 1 / 20


@pytest.mark.slow
@nightly_after_first("failing", ["report.run_page.render", "analysis.measures.open_set"])
def test_failed_report_loses_no_metrics_or_ranking(workdir, data, tmp_path, monkeypatch, failing):
    def fail(*_args, **_kwargs):
        raise MemoryError("cannot allocate 9 GB")

    folder = Path(shutil.copytree(workdir, tmp_path / "run"))
    (folder / "ranking.txt").unlink()
    monkeypatch.setattr(f"vidjax.evaluation.{failing}", fail)
    with pytest.warns(UserWarning, match="cannot allocate 9 GB"):
        results = small_runs.evaluate(config_io.load_workdir(folder), folder, data, num_devices=1)
    assert json.loads((folder / "metrics.json").read_text())["map"] == results["map"]
    assert (folder / "ranking.txt").read_bytes() == (workdir / "ranking.txt").read_bytes()
    # If the analysis fails, the analysis of the earlier results is deleted.
    assert (folder / "analysis.npz").exists() == (failing == "report.run_page.render")


def test_average_precisions_among_a_subset_of_clips_equal_a_loop():
    rng = np.random.default_rng(0)
    labels, index = rng.integers(0, 5, 40), np.stack([rng.permutation(40)[:30] for _ in range(4)])
    positives = np.bincount(labels, minlength=5)[1:]  # label 0: no identity
    top = topk.TopK(np.zeros(index.shape, np.float32), index)
    scored = measures.ScoredSplit(
        top, np.zeros(40, np.float32), labels, ["c"] * 40, np.ones(40, bool), positives
    )
    chosen = (labels > 0) & (rng.random(40) < 0.6)
    # The clips of an identity that are not chosen are deleted from its list.
    averages = []
    for identity in range(1, 5):
        clips = [clip for clip in index[identity - 1] if labels[clip] != identity or chosen[clip]]
        ranks = [rank for rank, clip in enumerate(clips, 1) if labels[clip] == identity]
        wanted = np.sum(chosen & (labels == identity))
        averages.append(sum(n / rank for n, rank in enumerate(ranks, 1)) / wanted)
    precisions, num_clips = scored.averages_among(chosen)
    np.testing.assert_allclose(precisions, averages)
    assert num_clips == chosen.sum()
    of_all, _ = scored.averages_among(labels > 0)  # among all clips, the mean is MAP
    assert of_all.mean() == pytest.approx(metrics.mean_average_precision(index, labels, positives))


def test_clips_that_score_highest_for_the_right_person_are_no_mistakes():
    """A list has 100 places. List 1 has 97 clips of person 0, which score higher in list 0."""
    labels = np.repeat([1, 2], [150, 3])  # of persons 0 and 1
    scores = np.full((153, 2), [-1.0, -9.0], np.float32)
    # Clip 150 of person 1 is right. Clip 151 leads list 0, and clip 152 is too low for list 0.
    scores[150:] = [[-9, -1], [-0.5, -5], [-2, -5]]
    names, pool = [*map(str, range(153))], np.ones(153, bool)
    top = topk.rank([(scores, np.arange(153, dtype=np.int32), pool)], 2)
    best, positives = scores.max(axis=1), np.array([150, 3])
    scored = measures.ScoredSplit(top, best, labels, names, pool, positives)
    mistake = schemas.Mistake(clip="151", shows=1, identity=0, score=-0.5)
    assert measures.find_wrong_clips(scored) == schemas.WrongClips(distractors=[], known=[mistake])
    lost = {row.identity: row.lost_to for row in measures.find_worst_identities(scored)}
    # Pairs (wrong person for whom clips score highest, number of clips). -1: clips that are missing
    # in the list of their best person. List 0 has clip 151 and 99 clips of person 0, not clip 152.
    assert lost == {0: [(-1, 51)], 1: [(0, 1), (-1, 1)]}


def test_map_without_suspected_labels_equals_map_of_the_other_clips():
    """A label is suspected if another person is nearly certain, and 5 people are above it."""
    # Clips 0 to 7 get the label of the person after their person. Some keep a good rank.
    rng, people, num = np.random.default_rng(0), 10, 60
    shown = np.arange(num) % people
    scores, labels = rng.normal(size=(num, people)) + 8 * np.eye(people)[shown], shown + 1
    labels[:8] = (shown[:8] + 1) % people + 1
    scores[np.arange(4), labels[:4] - 1] = 6.0  # the label is the second best
    labels[50:] = 0  # distractors
    scores -= np.asarray(special.logsumexp(scores, axis=1, keepdims=True))
    pool = np.arange(num) < num - 1

    def rank(clips, labels):
        rows = (scores[clips].astype(np.float32), np.arange(len(clips), dtype=np.int32))
        top = topk.rank([(*rows, np.ones(len(clips), bool))], people)
        positives = np.bincount(labels[clips], minlength=people + 1)[1:]
        return top._replace(index=np.where(top.index == topk.NO_CLIP, num, top.index)), positives

    top, positives = rank(np.arange(num)[pool], labels)
    best, identity = scores.max(axis=1).astype(np.float32), scores.argmax(axis=1) + 1
    own = np.where(labels > 0, scores[np.arange(num), np.maximum(labels, 1) - 1], -np.inf)
    above = (scores > own[:, None]).sum(axis=1)
    clips = ClipScores(pool, best, identity == labels, None, identity, above)
    scored = measures.ScoredSplit(top, best, labels, [*map(str, range(num))], pool, positives)
    suspects = measures.measure_suspects(scored, clips)
    doubted = [i for i in range(4, 8) if above[i] >= 5 and best[i] > math.log(0.9)]
    assert 2 <= suspects.count == len(doubted) and suspects.low <= suspects.gain
    assert {row.clip for row in suspects.clips} == {*map(str, doubted)}
    kept = np.setdiff1d(np.arange(num)[pool], doubted)
    others, left = rank(kept, labels)
    after = metrics.mean_average_precision(others.index, labels[kept], left)
    gain = after - metrics.mean_average_precision(top.index, labels[pool], positives)
    assert suspects.gain == pytest.approx(gain) and gain > 0
    # A pair has the counts of both directions, and pairs with more clips come first.
    wrong = pool & (labels > 0) & (identity != labels)
    mixed = Counter(zip(labels[wrong] - 1, identity[wrong] - 1, strict=True))
    pairs = measures.find_confused_pairs(clips, labels)
    assert [sum(x.counts) for x in pairs] == sorted((sum(x.counts) for x in pairs), reverse=True)
    assert sum(sum(x.counts) for x in pairs) == wrong.sum()
    for row in pairs:
        assert row.counts == (mixed[row.first, row.second], mixed[row.second, row.first])


@pytest.mark.parametrize("share_right", [0.5, 0.9, 1.0])
def test_intervals_of_top1_auroc_and_fnir_equal_map_interval_with_one_clip_per_person(share_right):
    """The AP of a person with one clip is 1 if the clip is right, and otherwise 0."""
    labels = np.arange(1, 61)
    right = labels <= 60 * share_right
    expected = significance.map_interval(right.astype(float))
    intervals = measures.compute_clip_intervals(clip_scores(labels, right), labels)
    assert intervals.keys() == {"top1"}  # without distractors, there is no AUROC
    np.testing.assert_allclose(intervals["top1"], expected, atol=0.02)
    # Labels are scores: 60 clips are above 60 distractors, and FNIR is the share of wrong clips.
    labels = np.append(labels, np.zeros(60, int))
    clips = clip_scores(labels, np.append(right, np.zeros(60, bool)))
    _, row = open_set(clips, labels, num_identities=60).rates  # FPIR of 1 % and of 10 %
    np.testing.assert_allclose((1 - row.fnir_high, 1 - row.fnir_low), expected, atol=0.02)
    area = measures.compute_clip_intervals(clips, labels)["auroc"]  # the AUROC is 1
    np.testing.assert_allclose(area, significance.map_interval(np.ones(60)), atol=0.01)


def test_intervals_do_not_depend_on_the_number_of_cores(monkeypatch):
    monkeypatch.setattr(measures, "RESAMPLES", 50)
    rng, labels = np.random.default_rng(0), np.arange(30_000) % 7000  # OpenBLAS splits such sums
    clips = clip_scores(rng.normal(size=30_000), rng.random(30_000) < 0.5)
    with threadpool_limits(1, user_api="blas"):
        single = measures.compute_clip_intervals(clips, labels)
    with threadpool_limits(2, user_api="blas"):
        assert measures.compute_clip_intervals(clips, labels) == single


def clip_scores(best, right):
    """Returns the best score of each clip, and whether the best identity is right."""
    return ClipScores(np.ones(len(best), bool), np.asarray(best, np.float32), np.asarray(right))


def test_open_set_summary_equals_identification_errors():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, 500) * (rng.random(500) < 0.6)  # 8 people; 0 is a stranger
    clips = clip_scores(rng.normal(size=500).round(1), (labels > 0) & (rng.random(500) < 0.8))
    pool = rng.random(500) < 0.9  # only these clips count
    clips = clips._replace(pool=pool)
    result = open_set(clips, labels, num_identities=8)
    assert result.num_known == np.sum(labels[pool] > 0)
    assert (result.num_people, result.num_identities) == (8, 8)
    in_pool = (clips.best[pool], clips.right[pool], labels[pool] > 0)
    for row in result.rates:
        wanted = metrics.identification_errors(*in_pool, fpir=row.rate)
        assert (row.threshold, row.fpir, row.fnir) == wanted and row.fpir_low < row.fpir_high
        assert row.fnir_low <= row.fnir <= row.fnir_high


def test_intervals_treat_clips_of_one_person_as_dependent():
    """Three copies of each clip of a person add no information: the FNIR interval stays equal."""
    labels = np.r_[np.zeros(150, int), np.arange(1, 201)]  # 150 strangers, then a clip per person
    best, found = np.random.default_rng(1).normal(size=350) + 2 * (labels > 0), []
    for copies in (1, 4):
        rows = np.r_[np.arange(350), np.tile(np.arange(150, 350), copies - 1)]
        clips = clip_scores(best[rows], labels[rows] > 0)
        _, row = open_set(clips, labels[rows], num_identities=200).rates  # FPIR of 1 % and of 10 %
        found.append((row.fnir_low, row.fnir_high))
    assert found[0] == pytest.approx(found[1])


def test_calibration_stays_finite_for_certain_but_wrong_clips():
    rng = np.random.default_rng(2)
    log_p = special.log_expit(2.5 * rng.normal(size=3000))
    log_p[:5], log_p[5:8] = 0.0, -np.inf  # 5 certain clips, and 3 without a score
    measured: Any = measures.measure_calibration(clip_scores(log_p, rng.random(3000) < 0.4))
    bins, error = measured
    assert np.isfinite(bins).all() and 0 < error < 1
    assert bins[:, 0].sum() == 3000 - 3  # numbers of clips


@pytest.mark.parametrize("passing", [0, 1, 50, 98])
def test_fpir_interval_has_the_quantiles_of_the_beta_distribution(passing):
    wanted = special.betaincinv(passing + 1, 99 - passing, [0.025, 0.975])
    np.testing.assert_allclose(metrics.fpir_interval(passing, 99), wanted, rtol=1e-10)


def test_metric_of_a_user_becomes_a_number_of_python_or_is_refused(monkeypatch):
    clips = metrics.ClipScores(np.ones(2, bool), np.zeros(2, np.float32), np.ones(2, bool))

    def compute(returned):
        metric = metrics.Metric("mine", "mine", lambda *_: returned)
        monkeypatch.setitem(metrics.CLIP_METRICS, "mine", metric)
        return metrics.compute_clip_metrics(clips, np.array([0, 1]))["mine"]

    assert compute(None) is None and json.dumps(compute(np.float32(0.5))) == "0.5"
    for wrong in (np.zeros(2), "good"):
        refused(lambda wrong=wrong: compute(wrong), "metric 'mine'", "return a number, or None")


def test_metric_sees_the_best_identity_of_each_clip_and_the_rank_of_its_label():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, (40, 12)).astype(np.float32)  # with ties
    scores[3], scores[4, 5] = -np.inf, np.nan
    labels, names = rng.integers(0, 13, 40).astype(np.int32), tuple(map(str, range(40)))
    use = np.ones((1, 40), bool)
    described = scores_lib.Scores(scores, use, "val", True, True, names, names[:12])
    places, real = np.append(np.arange(40), 0).astype(np.int32), np.arange(41) < 40
    found: Any = scores_lib._make_clip_scores(described)
    block = scoring.ScoreBlock(np.vstack([scores, scores[:1]]), places, real)
    with limits.file_limit(99), pytest.raises(DiskError, match="has no space"):
        scores_lib.allocate(described)
    scores_lib._add_clips(found, labels, block)
    for clip, (row, label) in enumerate(zip(scores, labels, strict=True)):
        best = row.argmax() + 1 if np.isfinite(row).all() else 0
        assert found.identity[clip] == best and found.right[clip] == (0 < label == best)
        if label and best:
            wanted = np.sum(row > row[label - 1]), row[label - 1]
            assert (found.rank[clip], found.own[clip]) == wanted
    assert found.rank[3] == found.rank[4] == 12
