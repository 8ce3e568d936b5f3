"""Comparison of runs: intervals, corrected p, refused runs, and equal files."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import special

import vidjax
from tests.helpers import made_runs
from tests.helpers.pages import Page
from vidjax.evaluation import significance

NAMES = [f"person_{i}" for i in range(40)]


def averages(seed):
    """Returns identity -> a random average precision."""
    return dict(zip(NAMES, np.random.default_rng(seed).beta(4, 1, len(NAMES)), strict=True))


def test_interval_of_a_paired_difference_covers_the_true_difference():
    """One of two systems has the average precisions x ~ Beta(3, 1), and the other x ** power.

    So the other system is equal for a third of the identities, better for a sixth, and worse for
    a half.
    """
    rng = np.random.default_rng(50)
    x = rng.random((400, 50)) ** (1 / 3)  # 400 pairs of systems, 50 identities
    powers, shares = np.array([1.0, 0.5, 1.2]), np.array([1 / 3, 1 / 6, 1 / 2])
    gaps = x ** powers[rng.choice(3, x.shape, p=shares)] - x
    true = np.sum(shares * (3 / (3 + powers) - 3 / 4))  # the mean of x ** p is 3 / (3 + p)

    intervals = [significance.compute_gap_interval(row, draws=1000) for row in gaps]
    low, high, p = np.transpose(intervals)

    assert np.mean((low <= true) & (true <= high)) >= 0.93  # of 95 % intervals
    assert np.array_equal((low > 0) | (high < 0), p < 0.05)


def test_interval_of_equal_systems_or_groups_contains_zero():
    low, high, p = significance.compute_gap_interval(np.zeros(50))
    assert -0.04 < low < 0 < high < 0.04  # not exactly 0: the method adds an unseen identity
    assert p > 0.9
    # The interval of groups is a t interval, which has no width if all differences are equal.
    group = list(np.random.default_rng(2).uniform(0.3, 0.6, (2, 50)))
    (same,) = significance.differences_of_seeds([group, group])
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_holm_multiplies_p_by_the_number_of_hypotheses_that_are_left():
    # In the order of p, the products are 3 * 0.01, 2 * 0.03 and 1 * 0.04. The result never falls.
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([3 * 0.01, 2 * 0.03, 2 * 0.03])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]  # at most 1


def test_map_interval_of_zeros_and_ones_is_the_jeffreys_interval():
    for num, hits in ((37, 36), (20, 7), (300, 150)):
        interval = significance.map_interval(np.arange(num) < hits)
        expected = special.betaincinv(hits + 0.5, num - hits + 0.5, [0.025, 0.975])
        assert interval == pytest.approx(expected.tolist(), abs=0.006)
    # An interval contains MAP, even if MAP is 0 or 1.
    _, high = significance.map_interval(np.ones(40))
    low, _ = significance.map_interval(np.zeros(40))
    assert (low, high) == (0.0, 1.0)


def test_compare_prints_and_writes_the_same_differences_and_intervals(tmp_path, compared):
    names = ("a", "b<i>", "c")
    precisions = {name: averages(seed) for seed, name in enumerate(names)}
    for name, values in precisions.items():
        made_runs.write(tmp_path / name, values)

    text = compared(runs=names).out
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "Holm" in text and "Holm" in page and "b<i>" in Page(page).text()
    facts = json.loads(compared("--json", runs=names).out)
    assert (facts["split"], facts["num_identities"], facts["num_clips"]) == ("val", len(NAMES), 50)
    assert [row["run"] for row in facts["runs"]] == [str(tmp_path / name) for name in names]

    first = np.array(list(precisions["a"].values()))
    assert facts["runs"][0]["map"] == pytest.approx(first.mean())
    for name, row in zip(names[1:], facts["runs"][1:], strict=True):
        gaps = np.array(list(precisions[name].values())) - first
        interval = significance.compute_gap_interval(gaps)
        assert row["difference"] == pytest.approx(gaps.mean())
        assert f"{gaps.mean():+.4f}" in text and f"{gaps.mean():+.4f}" in page
        assert (row["low"], row["high"], row["p"]) == pytest.approx(interval)
        assert row["p"] <= row["p_holm"] <= 1
        counts = [np.sum(gaps > 1e-9), np.sum(gaps < -1e-9), np.sum(np.abs(gaps) <= 1e-9)]
        assert [row["better"], row["worse"], row["equal"]] == counts


def test_latex_table_escapes_names_and_prints_zero_without_minus(tmp_path):
    first, values = tmp_path / "a_1", averages(10)
    second = tmp_path / "50% & {more}"
    made_runs.write(first, values)
    # The difference is about -0.000001.
    made_runs.write(second, {name: max(x - 1e-6, 0) for name, x in values.items()})

    pair = vidjax.compare([first, second])

    assert "+0.0000" in pair.text() and "-0.0000" not in pair.text()
    rows = [line for line in pair.to_latex().splitlines() if line.endswith(r" \\")]
    assert r"a\_1 & 0." in rows[-2] and r"50\% \& \{more\}" in rows[-1]
    assert {row.replace(r"\&", "").count(" & ") for row in rows} == {7}  # between 8 columns


@pytest.fixture
def compared(command, tmp_path):
    """Returns a function that compares runs by the command. "a1+a2" is a group of two runs."""

    def run(*words, runs: Sequence[str] = "ab"):
        groups = ("+".join(f"{tmp_path}/{member}" for member in name.split("+")) for name in runs)
        return command("compare", f"--workdir={tmp_path}/out", f"--runs={','.join(groups)}", *words)

    return run


def write_groups(tmp_path):
    """Writes runs a1, a2, a3, b1, b2 and b3; returns group -> average precisions [3, C]."""
    rng = np.random.default_rng(8)
    people, precisions = rng.beta(4, 1, len(NAMES)), {}
    for group, shift in (("a", -0.1), ("b", 0.0)):
        precisions[group] = np.clip(people + shift + 0.02 * rng.normal(size=(3, len(NAMES))), 0, 1)
        for seed, values in enumerate(precisions[group], 1):
            by_name = dict(zip(NAMES, values, strict=True))
            made_runs.write(tmp_path / f"{group}{seed}", by_name, f"--config.seed={seed}")
    return precisions


def test_interval_of_groups_includes_variance_of_seeds_and_identities(tmp_path, compared):
    """The two variances are added, with degrees of freedom by Welch and Satterthwaite."""
    precisions, runs = write_groups(tmp_path), ("a1+a2+a3", "b1+b2+b3")
    facts = json.loads(compared("--json", runs=runs).out)

    gaps = precisions["b"] - precisions["a"]
    over_identities = np.mean(gaps, axis=0).var(ddof=1) / len(NAMES)
    over_seeds = gaps.mean(axis=1).var(ddof=1) / 3
    error = (over_identities + over_seeds) ** 0.5
    freedom = error**4 / (over_identities**2 / (len(NAMES) - 1) + over_seeds**2 / 2)
    half = special.stdtrit(freedom, 0.975) * error
    bounds = [gaps.mean() - half, gaps.mean() + half]

    first, second = facts["runs"]
    assert [seed["map"] for seed in first["seeds"]] == pytest.approx(precisions["a"].mean(axis=1))
    assert second["map"] == pytest.approx(precisions["b"].mean())
    assert second["difference"] == pytest.approx(gaps.mean())
    assert second["error"] == pytest.approx(error)
    assert [second["low"], second["high"]] == pytest.approx(bounds)
    # A comparison of groups has no p-value, so the text has no correction by Holm.
    assert second["p"] is None and "seeds" in facts["method"]
    text = compared(runs=runs).out
    assert f"{gaps.mean():+.4f}" in text and "Holm" not in text


def test_compare_refuses_groups_that_are_not_the_seeds_of_a_configuration(tmp_path, compared):
    write_groups(tmp_path)
    made_runs.write(tmp_path / "c1", averages(0), "--config.seed=1")  # the seed of b1
    made_runs.write(tmp_path / "c2", averages(0), "--config.num_epochs=7")

    # A single run, a run of the first group, two runs with one seed, runs with other epochs.
    for group, words in {
        "b1": "--runs=A1+A2+A3,B1+B2+B3", "a1+b2+b3": "named twice",
        "b1+c1": "the same seed", "b1+c2": "the seed: num_epochs",
    }.items():  # fmt: skip
        assert compared(runs=("a1+a2", group)).refused(words)


def test_blends_differ_only_in_their_runs_and_weights(tmp_path, compared):
    """Blends have no seed. The weights of a split are in its results, not in the configuration."""
    write_groups(tmp_path)
    for name in ("blend1", "blend2"):
        joined = f"--config.join.runs=('{name}',)", "--config.join.weights=(2,)"
        results = {"runs": [{"name": name, "weight": 3.0}]}
        made_runs.write(tmp_path / name, averages(0), *joined, results=results)

    assert compared(runs=("a1+a2", "blend1+blend2")).code == 0
    page = (tmp_path / "out" / "comparison.html").read_text()
    table = page.rpartition("configurations differ")[2].partition("</table>")[0]
    fields = re.findall(r'<tr><th scope="row"[^>]*>(.*?)</th>', table)
    assert [re.sub("<.*?>", "", field) for field in fields] == ["join.runs", "join.weights"]
    assert "(3.0,)" in table and "(2,)" not in table


def test_comparison_states_which_runs_were_trained_on_the_clips(tmp_path, compared):
    made_runs.write(tmp_path / "a", averages(0))  # not trained on the clips
    for kind, sentence in (
        ("val", "No run was trained on these clips."),
        ("out_of_fold", f"Out of fold: {tmp_path}/b"),
        ("in_sample", f"In sample: {tmp_path}/b was trained on"),
    ):
        made_runs.write(tmp_path / "b", averages(0), results={"map_kind": kind})
        compared()
        assert sentence in Page((tmp_path / "out" / "comparison.html").read_text()).text()


def trained_on(**changed):
    """Returns results with digests of the clips of val, in which `changed` replaces digests."""
    digests = {"clips": 50, "names": "a", "features": "a", "labels": "a"}
    return {"trained_on": {"splits": {"train": digests, "val": digests | changed}}}


# Part of the error -> how the second run differs.
DIFFERENCES: dict[str, Any] = {
    "--config.eval.split=val": {"split": "test"},
    "3 and 4 of 'person_0'": {"positives": 4},
    "50 and 49 clips": {"num_clips": 49},
    "synthetic, size small": {"results": {"data": {"name": "synthetic", "size": "small"}}},
    "0.1230 in metrics.json": {"results": {"map": 0.123}},
    "has no ground truth": {"truth": False},
    "50 and 50 clips; the names of the clips differ\n": {"results": trained_on(names="b")},
    "50 and 50 clips; the labels of the clips differ\n": {"results": trained_on(labels="b")},
    "'nobody' is missing in": {"averages": averages(3) | {"nobody": 0.5}},
}


@pytest.mark.parametrize(("message", "difference"), DIFFERENCES.items(), ids=DIFFERENCES)
def test_compare_refuses_other_clips_identities_or_labels(tmp_path, compared, message, difference):
    made_runs.write(tmp_path / "a", averages(3), results=trained_on())
    made_runs.write(tmp_path / "b", **{"averages": averages(3), **difference})
    assert compared().refused(message)
    assert not (tmp_path / "out").exists()


def test_compare_of_a_run_without_a_report_names_the_flags_that_write_a_report(tmp_path, compared):
    made_runs.write(tmp_path / "a", averages(3))
    made_runs.write(tmp_path / "b", averages(3), "--config.eval.report=False")
    (tmp_path / "b" / "analysis.npz").unlink()
    assert compared().refused("--config.eval.split=val --config.eval.report=True")


def test_runs_with_other_features_or_without_digests_are_compared(tmp_path, compared):
    for name, results in {"a": trained_on(), "b": trained_on(features="b"), "c": {}}.items():
        made_runs.write(tmp_path / name, averages(3), results=results)
    assert compared(runs="abc").code == 0
