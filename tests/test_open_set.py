"""Thresholds with intervals that hold in simulation, and calibration that looks at other people."""

import numpy as np
import pytest
from scipy import special, stats

from vidjax.core import metrics
from vidjax.evaluation.analysis import measures
from vidjax.evaluation.scoring import ClipScores


def some(function):
    """Returns a function whose result may not be None."""

    def call(*args, **kwargs):
        found = function(*args, **kwargs)
        assert found is not None
        return found

    return call


summary, calibrated = some(measures.open_set), some(measures.calibration)


def clip_scores(best, right):
    return ClipScores(np.ones(len(best), bool), np.asarray(best, np.float32), np.asarray(right))


def normal(rng, num_strange=150, num_known=200):
    """Clips whose scores are normal: strangers around 0, people of one clip each around 2."""
    labels = np.r_[np.zeros(num_strange, int), np.arange(1, num_known + 1)]
    best = rng.normal(size=len(labels)) + 2 * (labels > 0)
    return clip_scores(best, labels > 0), labels


def test_thresholds_are_those_of_the_metrics():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, 500) * (rng.random(500) < 0.6)
    clips = clip_scores(rng.normal(size=500).round(1), (labels > 0) & (rng.random(500) < 0.8))
    clips = clips._replace(pool=rng.random(500) < 0.9)
    found = summary(clips, labels, 8)
    pool = clips.pool
    assert found["num_known"] == np.sum(labels[pool] > 0)
    assert found["num_strange"] == np.sum(labels[pool] == 0)
    assert (found["num_people"], found["num_identities"]) == (8, 8)
    for row in found["rates"]:
        wanted = metrics.identification_errors(
            clips.best[pool], clips.right[pool], labels[pool] > 0, fpir=row["rate"]
        )
        assert (row["threshold"], row["fpir"], row["fnir"]) == wanted
        assert row["fpir_low"] < row["fpir_high"] and row["fnir_low"] <= row["fnir"]
        assert row["fnir"] <= row["fnir_high"]


@pytest.mark.parametrize(("num_strange", "shown"), [(8, 0), (9, 1), (98, 1), (99, 2)])
def test_few_strangers_show_no_rate(num_strange, shown):
    clips, labels = normal(np.random.default_rng(0), num_strange)
    rows = summary(clips, labels, 200)["rates"]
    assert [row["fewest"] for row in rows] == [99, 9]
    assert sum("threshold" in row for row in rows) == shown
    assert "threshold" not in rows[0] or num_strange >= 99


def test_without_strangers_or_known_people_there_is_no_threshold():
    clips, labels = normal(np.random.default_rng(0))
    assert measures.open_set(clips, np.maximum(labels, 1), 200) is None
    assert measures.open_set(clips, np.zeros_like(labels), 200) is None


@pytest.mark.slow
def test_intervals_hold_in_simulation(monkeypatch):
    """At 10 % the threshold of the population is the .9 quantile; it misses 24 % of the people."""
    monkeypatch.setattr(measures, "RESAMPLES", 400)
    rng = np.random.default_rng(0)
    truth = stats.norm.cdf(stats.norm.ppf(0.9) - 2)
    held = []
    for _ in range(400):
        clips, labels = normal(rng)
        row = summary(clips, labels, 200)["rates"][1]
        passing = stats.norm.sf(row["threshold"])  # of strangers that come later
        held.append(
            (row["fnir_low"] <= truth <= row["fnir_high"],
             row["fpir_low"] <= passing <= row["fpir_high"])
        )  # fmt: skip
    fnir, fpir = np.mean(held, axis=0)
    assert 0.92 < fnir < 0.98
    assert 0.92 < fpir < 0.98


def test_clips_of_one_person_count_together():
    """Copies of every clip of a person add nothing to what is known."""
    clips, labels = normal(np.random.default_rng(1))
    known = np.flatnonzero(labels)
    again = np.r_[np.arange(len(labels)), known, known, known]
    copies = clip_scores(clips.best[again], clips.right[again])
    row, wide = (
        summary(one, name, 200)["rates"][1]
        for one, name in ((clips, labels), (copies, labels[again]))
    )
    assert (row["fnir_low"], row["fnir_high"]) == (wide["fnir_low"], wide["fnir_high"])


def confident(seed, slope=1.0, offset=0.0, num=3000, strangers=0.3):
    """Clips whose true log-odds are slope * log-odds + offset, of 200 people and of strangers."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, 201, num) * (rng.random(num) >= strangers)
    odds = 2.5 * rng.normal(size=num)
    right = (labels > 0) & (rng.random(num) < special.expit(slope * odds + offset))
    return clip_scores(special.log_expit(odds), right), labels


def test_certain_and_wrong_clips_stay_finite():
    clips, labels = confident(2)
    best = clips.best.copy()
    best[:5], best[5:8] = 0.0, -np.inf
    bins, error = calibrated(clips._replace(best=best))
    assert np.isfinite(bins).all() and bins[:, 0].sum() == len(labels) - 3
    assert 0 < error < 1
