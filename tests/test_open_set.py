"""Thresholds with intervals that hold in simulation, and calibration that looks at other people."""

from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from vidjax.core import metrics
from vidjax.evaluation.analysis import measures
from vidjax.evaluation.scoring import ClipScores

summary: Any = measures.open_set


def clip_scores(best, right):
    return ClipScores(np.ones(len(best), bool), np.asarray(best, np.float32), np.asarray(right))


def normal(rng, num_strange=150, num_known=200):
    """Clips whose scores are normal: strangers around 0, people of one clip each around 2."""
    labels = np.r_[np.zeros(num_strange, int), np.arange(1, num_known + 1)]
    best = rng.normal(size=len(labels)) + 2 * (labels > 0)
    return clip_scores(best, labels > 0), labels


def test_open_set_summary_equals_identification_errors():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, 500) * (rng.random(500) < 0.6)
    clips = clip_scores(rng.normal(size=500).round(1), (labels > 0) & (rng.random(500) < 0.8))
    clips = clips._replace(pool=rng.random(500) < 0.9)
    result = summary(clips, labels, 8)
    pool = clips.pool
    assert result["num_known"] == np.sum(labels[pool] > 0)
    assert (result["num_people"], result["num_identities"]) == (8, 8)
    given = (clips.best[pool], clips.right[pool], labels[pool] > 0)
    for row in result["rates"]:
        wanted = metrics.identification_errors(*given, fpir=row["rate"])
        assert (row["threshold"], row["fpir"], row["fnir"]) == wanted
        assert row["fpir_low"] < row["fpir_high"] and row["fnir_low"] <= row["fnir"]
        assert row["fnir"] <= row["fnir_high"]


def test_rates_have_no_threshold_if_strangers_are_too_few():
    for num_strange, reported in ((8, []), (9, [9]), (98, [9]), (99, [99, 9])):
        clips, labels = normal(np.random.default_rng(0), num_strange)
        rows = summary(clips, labels, 200)["rates"]
        assert [row["fewest"] for row in rows] == [99, 9]
        assert [row["fewest"] for row in rows if "threshold" in row] == reported
    for everybody in (np.maximum(labels, 1), np.zeros_like(labels)):  # known, or strange
        assert summary(clips, everybody, 200) is None


@pytest.mark.nightly
def test_intervals_of_95_percent_cover_the_true_rates_in_simulation(monkeypatch):
    """At an FPIR of 10 %, the true threshold is the .9 quantile and misses 24 % of the people."""
    monkeypatch.setattr(measures, "RESAMPLES", 400)
    rng = np.random.default_rng(0)
    truth, covered = stats.norm.cdf(stats.norm.ppf(0.9) - 2), []
    for _ in range(400):
        clips, labels = normal(rng)
        row = summary(clips, labels, 200)["rates"][1]  # an FPIR of 10 %
        passing = stats.norm.sf(row["threshold"])  # of strangers that come later
        pairs = (("fnir", truth), ("fpir", passing))
        covered.append([row[f"{x}_low"] <= rate <= row[f"{x}_high"] for x, rate in pairs])
    assert (np.mean(covered, axis=0) > 0.92).all() and (np.mean(covered, axis=0) < 0.98).all()


def test_intervals_treat_clips_of_one_person_as_dependent():
    """Copies of clips do not narrow the interval."""
    clips, labels = normal(np.random.default_rng(1))
    known = np.flatnonzero(labels)
    again = np.r_[np.arange(len(labels)), known, known, known]
    copies = clip_scores(clips.best[again], clips.right[again])
    single, copied = (
        [summary(x, name, 200)["rates"][1][end] for end in ("fnir_low", "fnir_high")]
        for x, name in ((clips, labels), (copies, labels[again]))
    )
    assert single == copied


def test_calibration_stays_finite_for_certain_but_wrong_clips():
    rng, num = np.random.default_rng(2), 3000
    labels = rng.integers(1, 201, num) * (rng.random(num) >= 0.3)
    odds = 2.5 * rng.normal(size=num)
    right = (labels > 0) & (rng.random(num) < special.expit(odds))
    best = special.log_expit(odds)
    best[:5], best[5:8] = 0.0, -np.inf
    result = measures.measure_calibration(clip_scores(best, right))
    assert result is not None
    bins, error = result
    assert np.isfinite(bins).all() and bins[:, 0].sum() == num - 3
    assert 0 < error < 1
