"""Comparison: intervals that cover, corrected p, the same clips only, files that agree."""

import csv
import json
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.helpers import made_runs
from vidjax import ranking
from vidjax.data.load import load_dataset
from vidjax.main import main
from vidjax.modes import compare
from vidjax.report import significance
from vidjax.steps import topk

NAMES = [f"person {i}".replace(" ", "_") for i in range(40)]


def averages(rng, shift=0.0):
    return dict(zip(NAMES, np.clip(rng.beta(4, 1, len(NAMES)) + shift, 0, 1), strict=True))


def simulate(rng, repetitions, num):
    """Returns paired differences [repetitions, num] of average precisions, and their true mean.

    Of an identity of difficulty x ~ Beta(3, 1) one system reaches x, the other x ** power: better
    for some, worse for others, the same for a third: skewed, with many zeros.
    """
    x = rng.random((repetitions, num)) ** (1 / 3)
    powers, shares = np.array([1.0, 0.5, 1.2]), np.array([1 / 3, 1 / 6, 1 / 2])
    kind = rng.choice(3, (repetitions, num), p=shares)
    true = float(np.sum(shares * (3 / (3 + powers) - 3 / 4)))  # E[x ** g] = 3 / (3 + g)
    return x ** powers[kind] - x, true


@pytest.mark.parametrize("num", [50, 100, 400])
def test_the_interval_covers_the_true_difference(num):
    gaps, true = simulate(np.random.default_rng(num), 3000, num)
    low, high, p = significance.bootstrap(gaps, resamples=999)
    assert 0.93 <= np.mean((low <= true) & (true <= high)) <= 0.97
    # The same resamples decide on both: p is below 5 % where 0 lies outside.
    outside = (low > 0) | (high < 0)
    assert np.mean(outside == (p < 0.05)) > 0.995


def test_p_is_as_often_below_a_share_as_chance_has_it():
    rng = np.random.default_rng(5)
    gaps, true = simulate(rng, 3000, 100)
    _, _, p = significance.bootstrap(gaps - true, resamples=999)
    for share in (0.05, 0.2, 0.5):
        assert np.mean(p <= share) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("gaps", "interval", "p"),
    [
        (np.zeros(50), (0, 0), 1.0),
        (np.full(50, 0.1), (0.1, 0.1), 1 / (significance.RESAMPLES + 1)),
    ],
)
def test_differences_that_are_all_alike(gaps, interval, p):
    (low,), (high,), (found,) = significance.bootstrap(gaps)
    assert (low, high) == pytest.approx(interval)
    assert found == pytest.approx(p)


def test_one_identity_that_differs_proves_nothing():
    (low,), (high,), (p,) = significance.bootstrap(np.eye(60)[0])
    assert -1 < low < 0 < high < 1
    assert p > 0.05


def test_holm_by_hand():
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([]) == []


class Page(HTMLParser):
    """What a page refers to, its figures and its text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.figures, self.described, self.words = [], 0, 0, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.figures += tag == "svg"
        self.described += tag == "desc"

    def handle_data(self, data):
        self.words += data


def test_the_command_writes_three_files_that_agree(tmp_path, capsys):
    rng = np.random.default_rng(0)
    first = averages(rng)
    better = {name: value + 0.1 * (1 - value) for name, value in first.items()}
    better[NAMES[0]] = first[NAMES[0]]
    worse = dict(reversed({name: 0.5 * value for name, value in first.items()}.items()))
    for name, values in {"a": first, "b<i>": better, "c": worse}.items():
        made_runs.write(tmp_path / name, values)
    out = tmp_path / "out"
    runs = ",".join(str(tmp_path / name) for name in ("a", "b<i>", "c"))
    assert main(["--mode=compare", f"--workdir={out}", f"--runs={runs}"]) == 0
    said = capsys.readouterr().out
    gaps = [np.mean(list(values.values())) - np.mean(list(first.values())) for values in
            (better, worse)]  # fmt: skip
    lines = said.splitlines()
    assert [line.split()[-3:] for line in lines[3:5]] == [["39", "0", "1"], ["0", "40", "0"]]
    text, page = (out / "comparison.md").read_text(), (out / "comparison.html").read_text()
    for gap in gaps:
        for shown in (said, text, page):
            assert f"{gap:+.4f}" in shown
    assert "Holm" in said and "Holm" in text
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["identity"] for row in rows] == NAMES
    for name, values in {"a": first, "b<i>": better, "c": worse}.items():
        assert [float(row[name]) for row in rows] == list(map(values.get, NAMES))
    assert float(rows[3]["c - a"]) == worse[NAMES[3]] - first[NAMES[3]]
    found = Page(page)
    assert found.figures == found.described == 3
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert "prefers-color-scheme: dark" in page
    assert "b<i>" in found.words  # escaped
    before = page
    assert main(["--mode=compare", f"--workdir={out}", f"--runs={runs}"]) == 0
    assert (out / "comparison.html").read_text() == before


def test_a_pair_needs_no_correction(tmp_path, capsys):
    rng = np.random.default_rng(1)
    for name in "ab":
        made_runs.write(tmp_path / name, averages(rng))
    words = ["--mode=compare", f"--workdir={tmp_path}/out", f"--runs={tmp_path}/a,{tmp_path}/b"]
    assert main(words) == 0
    assert "Holm" not in capsys.readouterr().out
    assert "Holm" not in (tmp_path / "out" / "comparison.html").read_text()


def test_another_split_that_both_have_ranked(tmp_path):
    rng = np.random.default_rng(2)
    for name in "ab":
        made_runs.write(tmp_path / name, averages(rng))
        made_runs.write(tmp_path / name, averages(rng), split="test", suffix="_test")
    (tmp_path / "out").mkdir()
    folders = [str(tmp_path / name) for name in "ab"]
    said = compare.compare(folders, tmp_path / "out", lambda config: None, split="test")
    assert "of test" in said
    value = json.loads((tmp_path / "b" / "metrics_test.json").read_text())["map"]
    assert f"{value:.4f}" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "--config.eval.split=val"),
        ({"positives": 4}, "3 and 4 of 'person_0'"),
        ({"num_clips": 49}, "50 and 49 clips"),
        ({"averages": {"nobody": 0.5}}, "such as 'nobody'"),
        ({"overrides": ["--config.data.seed=1"]}, "synthetic, size small, seed 1"),
        ({"results": {"map": 0.123}}, "0.1230 in metrics.json"),
        ({"truth": False}, "has no ground truth"),
    ],
)
def test_only_runs_on_the_same_clips_are_compared(tmp_path, capsys, change, message):
    rng = np.random.default_rng(3)
    values = averages(rng)
    made_runs.write(tmp_path / "a", values)
    more = change.pop("averages", {})
    made_runs.write(tmp_path / "b", values | more, *change.pop("overrides", ()), **change)
    words = ["--mode=compare", f"--workdir={tmp_path}/out", f"--runs={tmp_path}/a,{tmp_path}/b"]
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) <= 3
    assert not (tmp_path / "out" / "comparison.md").exists()


def test_without_an_analysis_the_ranking_and_the_ground_truth_say_it(
    tmp_path, official_dir, cache_dir
):
    """The scorer of submissions is the oracle."""
    data = load_dataset("iqiyi_vid", directory=official_dir, cache_dir=cache_dir)
    split, rng = data.split("val"), np.random.default_rng(0)
    expected = {}
    for name in ("a", "b"):
        folder = tmp_path / name
        index = np.stack([rng.permutation(len(split.clips)) for _ in data.identities])
        top = topk.TopK(-index.astype(np.float32), index.astype(np.int32))
        made_runs.write(folder, dict.fromkeys(data.identities, 0.0), "--config.data.name=iqiyi_vid")
        ranking.write_ranking(folder / "ranking.txt", data.identities, split.clips, top)
        expected[name] = ranking.score_files(official_dir / "val_gt.txt", folder / "ranking.txt")
        (folder / "analysis.npz").unlink()
        results = {"map": expected[name], "map_kind": "val", "num_clips": len(split.clips)}
        (folder / "metrics.json").write_text(json.dumps(results))
    runs = [compare.read(str(tmp_path / name), lambda config: data) for name in ("a", "b")]
    assert [run.ap.mean() for run in runs] == pytest.approx(list(expected.values()), abs=1e-12)
    (found,) = significance.differences([run.ap for run in runs])
    assert found.mean == pytest.approx(expected["b"] - expected["a"], abs=1e-12)
    results["map_kind"] = "out_of_fold"
    (folder / "metrics.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="--mode=evaluate"):
        compare.read(str(folder), lambda config: data)
