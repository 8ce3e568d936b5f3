"""Comparison: intervals that cover, corrected p, the same clips only, files that agree."""

import json
import re
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

import vidjax
from tests.helpers import made_runs
from tests.helpers.pages import Page
from vidjax.evaluation import comparison, significance

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


@pytest.mark.parametrize("num", [50, pytest.param(400, marks=pytest.mark.nightly)])
def test_the_interval_covers_the_true_difference(num):
    gaps, true = simulate(np.random.default_rng(num), 400, num)
    low, high, p = np.transpose([significance.gap_interval(row, draws=1000) for row in gaps])
    assert np.mean((low <= true) & (true <= high)) >= 0.93
    assert np.array_equal((low > 0) | (high < 0), p < 0.05)


def t_interval(values):
    """Returns the bounds of the t interval of a mean."""
    error = np.std(values, ddof=1) / len(values) ** 0.5
    half = stats.t.ppf(0.975, len(values) - 1) * error
    return np.mean(values) - half, np.mean(values) + half


ONES = np.array([0.0] + [1.0] * 36)
NEAR_ONES = np.where(np.arange(37) > 34, 0.997, ONES)


@pytest.mark.parametrize("values", [ONES, NEAR_ONES, np.where(np.arange(37) > 34, 0.97, ONES)])
def test_where_most_precisions_are_1_the_interval_of_map_stays_sensible(values):
    low, high = significance.map_interval(values)
    t_low, t_high = t_interval(values)
    assert 0.8 < low < np.mean(values) < high <= 1
    assert high - low < 1.5 * (min(t_high, 1) - t_low)
    assert (low, high) == pytest.approx(significance.map_interval(ONES), abs=0.002)


def test_of_zeros_and_ones_the_interval_is_that_of_a_share():
    for num, hits in ((37, 36), (20, 7), (300, 150)):
        found = significance.map_interval(np.arange(num) < hits)
        expected = stats.beta.ppf([0.025, 0.975], hits + 0.5, num - hits + 0.5)
        assert found == pytest.approx(expected.tolist(), abs=0.006)
    assert significance.map_interval(np.ones(40))[1] == 1.0
    assert significance.map_interval(np.zeros(40))[0] == 0.0


def test_one_large_difference_among_tiny_ones_keeps_the_interval_of_the_difference_narrow():
    gaps = np.concatenate([[0.5], np.full(10, 0.001), np.full(9, -0.001), np.zeros(80)])
    low, high, p = significance.gap_interval(gaps)
    t_low, t_high = t_interval(gaps)
    assert low < np.mean(gaps) < high and p > 0.05
    assert high - low < 2.5 * (t_high - t_low)


def test_equal_runs_do_not_differ_and_an_improvement_of_every_identity_is_seen():
    low, high, p = significance.gap_interval(np.zeros(50))
    assert -0.04 < low < 0 < high < 0.04 and p > 0.9
    low, high, p = significance.gap_interval(np.full(100, 0.1))
    assert 0.05 < low < high < 0.13 and p < 0.001


def test_holm_by_hand():
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([]) == []


def words_of(page):
    return "".join(text for text, _ in page.texts)


@pytest.fixture
def compared(command, tmp_path):
    """Compares runs in a folder by the command: one a letter, several of a group as "a1+a2"."""

    def run(*words, runs: Sequence[str] = "ab"):
        groups = ("+".join(f"{tmp_path}/{one}" for one in name.split("+")) for name in runs)
        return command("compare", f"--workdir={tmp_path}/out", f"--runs={','.join(groups)}", *words)

    return run


def test_the_command_writes_three_files_that_agree(tmp_path, compared):
    rng = np.random.default_rng(0)
    first = averages(rng)
    better = {name: value + 0.1 * (1 - value) for name, value in first.items()}
    better[NAMES[0]] = first[NAMES[0]]
    worse = dict(reversed({name: 0.5 * value for name, value in first.items()}.items()))
    for name, values in {"a": first, "b<i>": better, "c": worse}.items():
        made_runs.write(tmp_path / name, values)
    out, said = tmp_path / "out", compared(runs=("a", "b<i>", "c")).out
    gaps = [np.mean(list(values.values())) - np.mean(list(first.values())) for values in
            (better, worse)]  # fmt: skip
    lines = said.splitlines()
    assert [line.split()[-3:] for line in lines[3:5]] == [["39", "0", "1"], ["0", "40", "0"]]
    page = (out / "comparison.html").read_text()
    for gap in gaps:
        for shown in (said, page):
            assert f"{gap:+.4f}" in shown
    assert "Holm" in said and "Holm" in page
    found = Page(page)
    assert len(found.all("svg")) == len(found.all("desc")) == 1
    links = [attrs[name] for _, attrs, _ in found.tags for name in ("src", "href") if name in attrs]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "prefers-color-scheme: dark" in page
    assert "b<i>" in words_of(found)  # escaped
    compared(runs=("a", "b<i>", "c"))
    assert (out / "comparison.html").read_text() == page


def test_a_program_gets_the_numbers(tmp_path, compared):
    rng = np.random.default_rng(4)
    found = {name: averages(rng) for name in "abc"}
    for name, values in found.items():
        made_runs.write(tmp_path / name, values)
    runs = [str(tmp_path / name) for name in "abc"]
    told = json.loads(compared("--json", runs="abc").out)
    assert (told["split"], told["num_identities"], told["num_clips"]) == ("val", len(NAMES), 50)
    assert [row["run"] for row in told["runs"]] == runs
    first = told["runs"][0]
    assert first["map"] == pytest.approx(np.mean(list(found["a"].values())))
    for name, row in zip("bc", told["runs"][1:], strict=True):
        gaps = np.array(list(found[name].values())) - list(found["a"].values())
        low, high, p = significance.gap_interval(gaps)
        assert row["difference"] == pytest.approx(gaps.mean())
        assert (row["low"], row["high"], row["p"]) == pytest.approx((low, high, p))
        assert row["p"] <= row["p_holm"] <= 1
        counts = [np.sum(gaps > 1e-9), np.sum(gaps < -1e-9), np.sum(np.abs(gaps) <= 1e-9)]
        assert [row["better"], row["worse"], row["equal"]] == counts


def groups_of(tmp_path, rng):
    """Writes three seeds of two systems; returns group -> their average precisions [3, C]."""
    people = rng.beta(4, 1, len(NAMES))
    found = {}
    for group, shift in (("a", -0.1), ("b", 0.0)):
        seeds = np.clip(people + shift + 0.02 * rng.normal(size=(3, len(NAMES))), 0, 1)
        found[group] = seeds
        for number, ap in enumerate(seeds, 1):
            values = dict(zip(NAMES, ap, strict=True))
            made_runs.write(tmp_path / f"{group}{number}", values, f"--config.seed={number}")
    return found


def test_groups_of_seeds_have_an_interval_of_seeds_and_identities(tmp_path, compared):
    found = groups_of(tmp_path, np.random.default_rng(8))
    runs = "a1+a2+a3", "b1+b2+b3"
    told = json.loads(compared("--json", runs=runs).out)
    gaps = found["b"] - found["a"]
    over_identities = np.mean(gaps, axis=0).var(ddof=1) / len(NAMES)
    over_seeds = gaps.mean(axis=1).var(ddof=1) / 3
    error = (over_identities + over_seeds) ** 0.5
    freedom = error**4 / (over_identities**2 / (len(NAMES) - 1) + over_seeds**2 / 2)
    half = stats.t.ppf(0.975, freedom) * error
    first, second = told["runs"]
    assert [one["map"] for one in first["seeds"]] == pytest.approx(found["a"].mean(axis=1))
    assert second["map"] == pytest.approx(found["b"].mean())
    assert second["difference"] == pytest.approx(gaps.mean())
    assert second["error"] == pytest.approx(error)
    bounds = [gaps.mean() - half, gaps.mean() + half]
    assert [second["low"], second["high"]] == pytest.approx(bounds)
    assert second["p"] is None and "seeds" in told["method"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"] == told["runs"]
    said = compared(runs=runs).out
    page = (tmp_path / "out" / "comparison.html").read_text()
    for text in (said, page):
        assert f"{gaps.mean():+.4f}" in text and "Holm" not in text
    assert "mean of 3 seeds" in page

    assert compared(runs=(runs[0], "b1")).refused("--runs=A1+A2+A3,B1+B2+B3")
    assert compared(runs=(runs[0], "a1+b2+b3")).refused("named twice")


def test_a_group_is_of_one_system_and_of_several_seeds(tmp_path, compared):
    rng = np.random.default_rng(8)
    for name, field in (("a1", "seed=1"), ("a2", "seed=2"), ("b1", "seed=1"), ("b2", "seed=1"),
                        ("c2", "num_epochs=7")):  # fmt: skip
        made_runs.write(tmp_path / name, averages(rng), f"--config.{field}")
    for group, words in {"b1+b2": "the same seed", "b1+c2": "differ in num_epochs"}.items():
        assert compared(runs=("a1+a2", group)).refused(words)


@pytest.mark.parametrize(("num", "least"), [(2, 0.88), (3, 0.93), (5, 0.93)])
def test_the_interval_of_groups_holds_the_truth_where_seeds_vary_most(num, least):
    """Two standard errors do in 70, 81 and 89 %; of two seeds, too, the spread is a guess."""
    rng, true, held = np.random.default_rng(num), 0.05, []
    for _ in range(500):
        base = rng.uniform(0.3, 0.6, (num, 50))
        gaps = true + rng.normal(0, 0.05, (num, 1)) + rng.normal(0, 0.02, (num, 50))
        (found,) = significance.differences_of_seeds([list(base), list(base + gaps)])
        held.append(found.low <= true <= found.high)
    assert np.mean(held) >= least
    equal = list(rng.uniform(0.3, 0.6, (num, 50)))
    (same,) = significance.differences_of_seeds([equal, equal])
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_python_compares_runs_and_groups_as_the_command_does(tmp_path):
    found = groups_of(tmp_path, np.random.default_rng(9))
    pair = vidjax.compare([tmp_path / "a1", str(tmp_path / "b1")])
    low, high, p = significance.gap_interval(found["b"][0] - found["a"][0])
    assert pair.to_dict()["runs"][1]["p"] == p
    assert (pair.differences[0].low, pair.differences[0].high) == (low, high)
    assert str(pair) == pair.text()
    groups = [[tmp_path / f"{group}{n}" for n in (1, 2, 3)] for group in "ab"]
    seeds = vidjax.compare(groups, out=tmp_path / "out")
    assert seeds.differences[0].mean == pytest.approx((found["b"] - found["a"]).mean())
    assert (tmp_path / "out" / "comparison.tex").read_text() == seeds.to_latex()
    for runs in ([tmp_path / "a1"], [[], [tmp_path / "a1"]]):
        with pytest.raises(ValueError, match="two or more runs"):
            vidjax.compare(runs)
    with pytest.raises(TypeError, match="a list of folders"):
        vidjax.compare(str(tmp_path / "a1"))  # pyright: ignore[reportArgumentType]


def test_a_table_for_latex_escapes_names(tmp_path):
    rng = np.random.default_rng(10)
    for name in ("a_1", "50% & {more}"):
        made_runs.write(tmp_path / name, averages(rng))
    table = vidjax.compare([tmp_path / "a_1", tmp_path / "50% & {more}"]).to_latex()
    lines = [line for line in table.splitlines() if not line.startswith("%")]
    assert lines[0] == r"\begin{tabular}{lrrrrrrr}" and lines[-1] == r"\end{tabular}"
    assert r"50\% \& \{more\}" in table and r"a\_1 & 0." in table
    assert lines[2].startswith("run & MAP@100 & difference") and lines[2].endswith(r" \\")
    rows = [line for line in lines if " & " in line]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {7}
    assert re.search(r"& \$[+-]0\.\d{4}\$ & \$[+-]0\.\d{4}\$ to \$[+-]0\.\d{4}\$ &", table)


def test_it_says_in_words_whether_runs_were_trained_on_the_clips(tmp_path):
    rng = np.random.default_rng(5)
    kinds = {"a": "val", "b": "out_of_fold", "c": "in_sample"}
    for name, kind in kinds.items():
        made_runs.write(tmp_path / name, averages(rng), results={"map_kind": kind})
    made_runs.write(tmp_path / "d", averages(rng))
    (tmp_path / "out").mkdir()

    def page(*names):
        folders = [str(tmp_path / name) for name in names]
        found = comparison.compare([[name] for name in folders])
        found.write(tmp_path / "out")
        return words_of(Page((tmp_path / "out" / "comparison.html").read_text()))

    assert "No run was trained on these clips." in page("a", "d")
    mixed = page("a", "b", "c")
    assert "No run was trained" not in mixed and "MAP:" not in mixed
    assert f"Out of fold: {tmp_path / 'b'} scores every clip by members that" in mixed
    assert f"In sample: {tmp_path / 'c'} was trained on these clips" in mixed


def test_a_difference_that_rounds_to_0_has_no_minus_and_a_pair_no_correction(tmp_path, compared):
    values = averages(np.random.default_rng(6))
    made_runs.write(tmp_path / "a", values)
    made_runs.write(tmp_path / "b", {name: max(x - 1e-6, 0) for name, x in values.items()})
    said = compared().out
    for text in (said, (tmp_path / "out" / "comparison.html").read_text()):
        assert "+0.0000" in text and "Holm" not in text
        assert "-0.0000" not in text and "-0.000 " not in text and "-0.000." not in text


def test_another_split_that_both_have_ranked(tmp_path, compared):
    rng = np.random.default_rng(2)
    for name in "ab":
        made_runs.write(tmp_path / name, averages(rng))
        made_runs.write(tmp_path / name, averages(rng), split="test", suffix="_test")
    said = compared("--config.eval.split=test").out
    value = json.loads((tmp_path / "b" / "metrics_test.json").read_text())["map"]
    assert "of test" in said and f"{value:.4f}" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "--config.eval.split=val"),
        ({"positives": 4}, "3 and 4 of 'person_0'"),
        ({"num_clips": 49}, "50 and 49 clips"),
        ({"averages": {"nobody": 0.5}}, "such as 'nobody'"),
        ({"results": {"data": {"name": "synthetic", "size": "small"}}}, "synthetic, size small"),
        ({"results": {"map": 0.123}}, "0.1230 in metrics.json"),
        ({"truth": False}, "has no ground truth"),
    ],
)
def test_only_runs_on_the_same_clips_are_compared(tmp_path, compared, change, message):
    rng = np.random.default_rng(3)
    values = averages(rng)
    made_runs.write(tmp_path / "a", values)
    more = change.pop("averages", {})
    made_runs.write(tmp_path / "b", values | more, **change)
    assert compared().refused(message)
    assert not (tmp_path / "out").exists()


def test_clips_and_labels_are_told_apart_by_their_digests(tmp_path, compared):
    """As many clips may be others; other features of the same clips are no other clips."""
    values = averages(np.random.default_rng(11))
    own = {"clips": 50, "names": "a", "features": "a", "labels": "a"}
    for name, more in {"a": {}, "b": {"features": "b"}, "names": {"names": "b"}, "labels":
                       {"labels": "b"}}.items():  # fmt: skip
        trained_on = {"splits": {"train": own | {"names": name}, "val": own | more}}
        made_runs.write(tmp_path / name, values, results={"trained_on": trained_on})
    made_runs.write(tmp_path / "old", values)
    for other in ("b", "old"):
        assert compared(runs=("a", other)).code == 0
    for other in ("names", "labels"):
        done = compared(runs=("a", other))
        assert done.refused(f"50 and 50 clips, with other {other}\n")


def test_a_run_without_an_analysis_is_refused(tmp_path, compared):
    for name in "ab":
        made_runs.write(tmp_path / name, averages(np.random.default_rng(0)))
    (tmp_path / "b" / "analysis.npz").unlink()
    assert compared().refused(f"vidjax evaluate --workdir={tmp_path / 'b'}")
