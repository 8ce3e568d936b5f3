"""The analysis of an evaluation: its parts add up to MAP."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from tests.helpers import made_runs, small_runs
from tests.helpers.cases import quick_first
from tests.helpers.small_runs import assert_equal_weights, shrunk
from vidjax.core import devices, metrics
from vidjax.evaluation import significance, topk
from vidjax.evaluation.analysis import analysis, measures
from vidjax.evaluation.report import run_page
from vidjax.runs import config_io
from vidjax.training import loop

SPEC = "configs/mma.py:iqiyi_vid"


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):
    """An analysed run of a net, which takes a training."""
    folder = tmp_path_factory.mktemp("analysed") / "run"
    folder.mkdir()
    config = shrunk("--config.num_epochs=1", spec=SPEC)
    loop.train(config, folder, data, num_devices=1, analyse=True)
    return folder


def evaluate(folder, data, *overrides):
    """Evaluates a run with overrides and an analysis; returns the metrics."""
    config = config_io.override(config_io.load_workdir(folder), overrides)
    return small_runs.evaluate(config, folder, data, num_devices=1, report=True)


@pytest.mark.slow
def test_average_precisions_of_an_analysis_add_up_to_map(workdir, data, trained):
    assert_equal_weights(trained(SPEC), workdir)  # an analysis leaves the run as it is
    facts, arrays = made_runs.load_analysis(workdir / "analysis.npz")
    results = json.loads((workdir / "metrics.json").read_text())
    known = arrays["ap"][arrays["positives"] > 0]
    assert math.fsum(known) / (len(known) + facts["num_others"]) == results["map"]
    assert arrays["positives"].sum() == 40  # clips of val that show a person
    assert arrays["train_clips"].sum() == 96  # of train
    lengths = data.split("val").lengths
    seen = np.any([lengths[name] > 0 for name in ("face", "head", "audio")], axis=0).sum()
    assert arrays["score_known"].sum() + arrays["score_strange"].sum() == seen
    assert arrays["calibration"][:, 0].sum() == seen
    assert facts["open_set"]["num_known"] == 40
    assert facts["open_set"]["num_strange"] == results["num_distractors"] == 20
    assert facts["vectors"] == ["face 1", "face 2", "face 3", "head", "audio"]
    np.testing.assert_allclose(arrays["attention"].sum(axis=0), 1, atol=1e-6)
    few, row = facts["open_set"]["rates"]
    assert few == {"rate": 0.01, "fewest": 99}
    assert row["fnir"] == results["fnir_at_fpir_0.1"]
    assert row["threshold"] == results["threshold_at_fpir_0.1"]
    assert row["fpir"] == 0.05  # 2 of 21 is less than .1, 3 of 21 more


@pytest.mark.slow
def test_groups_contain_all_clips_and_worst_identities_have_lowest_precision(workdir):
    facts, arrays = made_runs.load_analysis(workdir / "analysis.npz")
    assert len(facts["strata"]) == 4
    for table in facts["strata"]:
        assert sum(row["clips"] for row in table["rows"]) == 40, table["by"]
        assert all(0 <= row["map"] <= 1 for row in table["rows"])
    worst = [row["ap"] for row in facts["worst"]]
    assert worst == sorted(worst) == sorted(arrays["ap"])[: len(worst)]
    for kind, clips in facts["wrong_clips"].items():
        assert all((clip["shows"] < 0) == (kind == "distractors") for clip in clips)
        assert all(clip["shows"] != clip["identity"] for clip in clips)


@pytest.mark.slow
@pytest.mark.parametrize("module", quick_first([run_page, measures], mark=pytest.mark.nightly))
def test_error_in_the_report_loses_neither_metrics_nor_ranking(
    workdir, data, tmp_path, monkeypatch, module
):
    def fail(*_args, **_kwargs):
        raise MemoryError("cannot allocate 9 GB")

    folder = Path(shutil.copytree(workdir, tmp_path / "run"))
    (folder / "ranking.txt").unlink()
    monkeypatch.setattr(module, "open_set" if module is measures else "render", fail)
    with pytest.warns(UserWarning, match="cannot allocate 9 GB"):
        results = evaluate(folder, data)
    assert json.loads((folder / "metrics.json").read_text())["map"] == results["map"]
    assert (folder / "ranking.txt").read_bytes() == (workdir / "ranking.txt").read_bytes()
    assert (folder / "analysis.npz").exists() == (module is run_page)  # none of other results


def test_quality_of_a_clip_is_the_mean_over_its_frames(nearest_run, data):
    model, mesh = small_runs.restored(nearest_run, data), devices.make_mesh(1)
    quality, attention = analysis.measure_quality_and_attention(
        model, "val", mesh, 16, attention=False
    )
    assert attention is None
    for clips, packed in data.packed("val", ("face",)):
        face = packed["face"]
        for clip, start, length in zip(clips, face.start, face.length, strict=True):
            own = face.quality[start : start + length]
            assert quality[clip] == pytest.approx(own.mean() if length else 0.0, rel=1e-6)


def test_average_precisions_among_a_subset_of_clips_equal_a_loop():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 40)
    index = np.stack([rng.permutation(40)[:30] for _ in range(4)])
    top, everyone = topk.TopK(np.zeros(index.shape, np.float32), index), np.ones(40, bool)
    positives = np.bincount(labels, minlength=5)[1:]
    scored = measures.ScoredSplit(top, labels, list("c" * 40), everyone, positives)
    chosen = (labels > 0) & (rng.random(40) < 0.6)
    averages = []
    for identity in range(1, 5):
        wanted = set(np.flatnonzero(chosen & (labels == identity)))
        clips = [clip for clip in index[identity - 1] if labels[clip] != identity or chosen[clip]]
        at = [rank for rank, clip in enumerate(clips, 1) if clip in wanted]
        averages.append(sum(n / rank for n, rank in enumerate(at, 1)) / len(wanted))
    precisions, clips = scored.averages_among(chosen)
    np.testing.assert_allclose(precisions, averages)
    assert clips == chosen.sum()
    everything, _ = scored.averages_among(labels > 0)
    assert everything.mean() == pytest.approx(
        metrics.mean_average_precision(index, labels, positives)
    )


def test_best_list_of_a_clip_contains_its_highest_score():
    scores = np.array([[0.9, 0.5, -np.inf], [0.9, 0.7, 0.1]], np.float32)
    index = np.array([[2, 0, topk.NO_CLIP], [2, 1, 0]])
    top, everyone = topk.TopK(scores, index), np.ones(4, bool)
    scored = measures.ScoredSplit(top, np.zeros(4, int), list("abcd"), everyone, np.zeros(2, int))
    best, highest = scored.best_lists
    np.testing.assert_array_equal(highest, np.array([0.5, 0.7, 0.9, -np.inf], np.float32))
    assert best.tolist() == [0, 1, 0, -1]  # clip 2 scores alike in both: the first identity


def test_groups_by_count_and_quantile_contain_each_identity_once():
    counts = np.arange(200)
    groups = measures.group_by_count(counts)
    assert np.sum([chosen for _, chosen in groups], axis=0).tolist() == [1] * 200
    assert [label for label, _ in groups][:5] == ["0", "1", "2", "3 to 4", "5 to 8"]
    assert groups[-1][0] == "over 128"
    values = np.r_[np.zeros(5), np.arange(95.0)]
    groups = measures.group_by_quantile(values, np.ones(100, bool))
    assert np.sum([chosen for _, chosen in groups], axis=0).tolist() == [1] * 100
    assert measures.group_by_quantile(np.zeros(9), np.ones(9, bool)) == []


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_top1_interval_equals_map_interval_with_one_clip_per_person(share):
    labels = np.arange(1, 61)
    right = labels <= 60 * share
    clips = metrics.ClipScores(np.ones(60, bool), labels / 60, right)
    intervals = measures.compute_clip_intervals(clips, labels)
    expected = significance.map_interval(right.astype(float))
    assert intervals.keys() == {"top1"}  # no distractor
    np.testing.assert_allclose(intervals["top1"], expected, atol=0.02)


@pytest.mark.nightly
def test_intervals_of_top1_and_auroc_cover_the_true_values():
    """Some people are always identified, the other people half of the time."""
    rng, covered = np.random.default_rng(0), {"top1": 0, "auroc": 0}
    for _ in range(60):
        skill = np.repeat(rng.choice([0.5, 1.0], 40), 5)
        labels = np.concatenate([np.repeat(np.arange(1, 41), 5), np.zeros(50, int)])
        best = np.concatenate([rng.normal(2 * skill), rng.normal(size=50)])
        right = np.append(rng.random(200) < skill, np.zeros(50, bool))
        clips = metrics.ClipScores(np.ones(250, bool), best, right)
        intervals = measures.compute_clip_intervals(clips, labels)
        truth = {"top1": 0.75, "auroc": (special.ndtr(0.5**0.5) + special.ndtr(2**0.5)) / 2}
        for name, (low, high) in intervals.items():
            covered[name] += low <= truth[name] <= high
    assert min(covered.values()) >= 52  # 57 of 60 are expected
