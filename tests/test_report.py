"""Reports of runs and comparisons of runs: numbers, intervals, pages, and refused runs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import scipy
from markupsafe import Markup

import vidjax
from tests.helpers import made_runs
from tests.helpers.pages import Page, check_numbers, section, values
from vidjax.evaluation import analysis, comparison, significance
from vidjax.evaluation.report import run_page
from vidjax.runs import schemas
from vidjax.runs.run_folder import RunFolder
from vidjax.utils.errors import VidjaxWarning

NAMES = [f"person_{i}" for i in range(40)]
GAPS = (0.3, 0.25, 0.2, 0, 0), (0.1,) * 5 + (0.1 + 1e-12, 0.3), (0,) * 14 + (0.3, 0.2, 0.1) * 2
SECTIONS = [make.__name__ for make in run_page.SECTIONS]
EVIL = (
    "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>{} --></style></title>]]>"
    '<meta http-equiv="refresh" content="0; url=//x"><form action="//x"><input name=y autofocus '
    "onfocus=alert(3)></form><a href='javascript:alert(4)'>\\</svg>$\ud800\u4e2d^"
)


def check_page(text):
    """Asserts properties of every report; returns the parsed page."""
    page = Page(text)
    assert page.open == [] and len(text.encode()) < 5e6
    # Links lead to the sections, which are in this order, to other reports and to the top.
    sections = [name for name in SECTIONS if f'<section id="{name}"' in text]
    links = [attrs["href"] for attrs in page.all("a")]
    others = [address for address in links if re.fullmatch(r"report_[\w%.-]+\.html", address)]
    assert links == [*(f"#{name}" for name in sections), *others, "#top"]
    # Nothing is loaded from elsewhere, and no script runs.
    loading = {"script", "img", "form", "input", "iframe", "object", "embed", "base"}
    assert not loading & {tag for tag, _, _ in page.tags}
    assert len(page.all("meta")) == 4 and "http" not in text.replace("http-equiv", "")
    for _, attrs, _ in page.tags:
        for name in ("src", "href", "data", "action"):
            address = attrs.get(name, "#")
            assert address.startswith(("#", "data:")) or address in links, attrs
        assert not any(name.startswith("on") for name in attrs)
    for attrs in page.all("svg"):
        assert attrs["role"] == "img"
        for name, label in zip(("title", "desc"), attrs["aria-labelledby"].split(), strict=True):
            assert re.search(rf'<{name} id="{label}">[^<]+</{name}>', text)
    return page


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A made-up run with all sections of the report and all values in its files."""
    rng, name = np.random.default_rng(0), "identity {}"
    ap = rng.beta(4, 1, 12)
    ap[:3] = 1.0
    positives, known = rng.integers(1, 9, 12), rng.integers(0, 60, 40)
    facts = made_runs.example(schemas.Analysis, {"clip": "clip {}", "label": name, "vectors": name})
    # A group without an interval; -1 is a distractor.
    facts["strata"][0]["rows"][0] |= {"low": None, "high": None}
    facts["worst"][0] |= {"lost_to": [[-1, 1]], "mixed_with": [[2, 1], [-1, 1]]}
    facts["wrong_clips"]["distractors"][0]["shows"] = -1
    facts["open_set"]["rates"][:2] = [{"rate": 0.01, "fewest": 100}]  # without error rates
    facts |= {"split": "val", "lead": "face", "modalities": ["face", "head"], "num_others": 0}
    arrays = {
        "positives": positives, "train_clips": positives,
        "score_edges": np.linspace(-5, 0, 41), "score_known": known, "score_strange": known[::-1],
        "fpir": np.geomspace(1e-3, 1, 40), "fnir": np.linspace(1, 0, 40),
        "calibration": np.stack([np.full(10, 6), *[np.linspace(0.05, 0.95, 10)] * 2], axis=1),
    }  # fmt: skip
    results = made_runs.example(schemas.Metrics, {"command": "vidjax --config={}"})
    results |= {"map": float(ap.mean()), "map_kind": "val", "num_clips": 60}
    averages = {name.format(i): float(precision) for i, precision in enumerate(ap)}
    folder = tmp_path_factory.mktemp("full")
    made_runs.write(folder, averages, results=results, arrays=arrays, analysis=facts)
    lines = [
        {"step": n, "epoch": n / 9, "learning_rate": 1e-3, "train_loss": 1 / n, "train_accuracy": 1}
        for n in range(1, 500)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "metrics_test.json").write_text('{"num_clips": 4}')
    return run_page.load(RunFolder(folder))


@pytest.fixture(scope="module")
def page(full):
    return run_page.render(full)


def spoilt(value):
    """Returns a value with `EVIL` in all its strings. Keys occur with and without `EVIL`."""
    if isinstance(value, msgspec.Struct):
        fields = value.__struct_fields__
        return type(value)(**{name: spoilt(getattr(value, name)) for name in fields})
    if isinstance(value, dict):
        items = {key: spoilt(item) for key, item in value.items()}
        return items | {EVIL + key: item for key, item in items.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(spoilt, value))
    return EVIL + value if isinstance(value, str) else value


def test_report_says_of_no_identity_that_it_is_below_a_quantile_of_1(tmp_path):
    made_runs.write(tmp_path, {f"p{i}": float(i > 0) for i in range(20)})  # 19 of 20 are perfect
    text = str(run_page.identities(run_page.load(RunFolder(tmp_path))))
    # The share of perfect identities, their number, the median and the quantile.
    assert values(text)[:4] == [0.95, 20, 1, 1] and "below" not in text
    assert "var(--first)" in text[text.index("<svg") :]  # the colour of the bars


def test_report_omits_error_rates_that_the_sample_cannot_measure(full, page):
    text, open_set = section(page, "open_set"), full.analysis.open_set
    few, enough = open_set.rates  # `few` has no error rates
    table = text[text.index("<table") : text.index("</table>")]
    assert table.count("<tr>") == 2  # the head and one rate
    for name in ("threshold", "fpir", "fnir", "fnir_low", "fnir_high", "fpir_low", "fpir_high"):
        assert getattr(enough, name) in values(table), name
    # A sentence explains `few`: its rate, and the fewest distractors for this rate.
    before, after = text.split("are too few for a threshold")
    assert values(before)[-1] == open_set.num_strange
    assert values(after)[:2] == [few.rate, few.fewest]
    analysis = msgspec.structs.replace(full.analysis, open_set=None)
    arrays = {name: full.arrays[name] for name in ("score_edges", "score_known", "score_strange")}
    text = str(run_page.open_set(full._replace(analysis=analysis, arrays=arrays)))
    assert "<table" not in text and "no distractor" in text and "no calibration" in text


def test_report_escapes_hostile_text_of_run_files(full):
    names = ("identities", "metrics", "analysis", "config")
    evil = {name: spoilt(getattr(full, name)) for name in names}
    evil["lines"] = [line | {"split": EVIL} for line in full.lines]
    evil["values"] = full.values | {"map_kind": EVIL, "data": {"name": EVIL, "dir": EVIL}}
    evil["other_metrics"] = {EVIL: {"map": 0.5, "map_kind": EVIL}}
    run = full._replace(folder=Path(EVIL), split=EVIL, analysed=(EVIL,), **evil)
    page = check_page(run_page.render(run))
    assert [attrs["id"] for attrs in page.all("section")] == SECTIONS
    assert page.text().count("onerror=alert(2)") > 50  # EVIL is shown as text, in many places


def test_report_isolates_names_written_from_right_to_left(page):
    """A name is in a `bdi` element, or in a title or a figure, where no `bdi` is allowed."""
    named = re.compile(r"(identity|clip) \d")
    tags_of_names = [tags for text, tags in Page(page).texts if named.search(text)]
    assert len(tags_of_names) > 9
    assert all({"bdi", "title", "svg"} & set(tags) for tags in tags_of_names)


def test_date_and_every_number_in_the_report_come_from_a_run_file(full, page):
    check_page(page)
    check_numbers(full.folder, page)
    assert f"evaluated on val; {full.metrics.eval_date}" in page
    assert "<figcaption>Identities by average precision</figcaption>" in page
    shown, _, hidden = section(page, "summary").partition("<details>")
    assert {full.metrics.map, full.metrics.auroc} <= {*values(shown)} and "95 % interval" in shown
    assert full.metrics.num_clips in values(hidden)


def test_report_lists_pairs_with_at_least_two_confused_clips_unless_the_run_is_old(full, page):
    shown = values(section(page, "errors"))
    suspects, pair = full.analysis.suspects, full.analysis.pairs[0]
    trained = full.arrays["train_clips"]
    assert [*pair.counts, trained[pair.first], trained[pair.second]] == [*shown[:2], *shown[4:6]]
    assert {suspects.count, suspects.gain, suspects.low, suspects.high} <= {*shown}
    few = [msgspec.structs.replace(x, counts=(0, 1)) for x in full.analysis.pairs]
    for pairs, is_shown in (few, False), ([*few, pair], True):
        analysis = msgspec.structs.replace(full.analysis, pairs=pairs)
        text = str(run_page.errors(full._replace(analysis=analysis)))
        assert ("Pairs of identities" in text) == is_shown != ("No person has two clips" in text)
    old = msgspec.structs.replace(full.analysis, pairs=None, suspects=None)
    assert run_page.errors(full._replace(analysis=old)) is None


@pytest.mark.parametrize(("command", "title"), {
    "--config=configs/mine.py:poly,face --config.seed=1 --config.log_every_steps=9 --workdir=a-1":
        "a-1: mine, poly, face, seed=1",
    "--config=a:1 '--config.optim.freeze=^a b'": "a-1: optim.freeze=^a",
    "--config=a": "a-1", "": "a-1",
}.items())  # fmt: skip
def test_title_of_a_report_is_the_folder_and_what_the_command_changed(tmp_path, command, title):
    results = {"command": f"vidjax {command}", "data": {"name": "synthetic", "seed": 3}}
    folder = made_runs.write(tmp_path / "a-1", {}, "--config.seed=1", results=results, truth=False)
    text = run_page.render(run_page.load(RunFolder(folder)))
    assert f"<title>{title}</title>" in text and f"<h1>{title}</h1>" in text
    assert "data seed 3" in text
    rows = re.findall("<tr>.*?</tr>", text.partition("differ from")[2], re.DOTALL)
    assert "seed01" in [Page(row).text().strip() for row in rows]


def test_report_explains_missing_results(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    text = run_page.write(RunFolder(tmp_path)).read_text()
    check_page(text)
    assert "The run has no results yet" in section(text, "summary")
    (tmp_path / "metrics.json").write_text('{"num_clips": 3}')
    text = run_page.write(RunFolder(tmp_path)).read_text()
    assert "and there is no MAP" in section(text, "summary")


def test_summary_has_the_scores_of_each_split(tmp_path):
    for split, suffix, seed in (("val", "", 0), ("test", "_test", 1)):
        words = "--config.eval.splits=test"
        made_runs.write(tmp_path, averages(seed), words, split=split, suffix=suffix)
    folder = RunFolder(tmp_path)
    rows = folder.describe(folder.config, folder.metrics())
    scores = [np.mean(list(averages(seed).values())) for seed in (0, 1)]
    assert rows["MAP@100"].startswith(f"{scores[0]:.4f} on val")
    assert rows["on test"].startswith(f"{scores[1]:.4f}")


def test_warning_about_a_failed_report_names_the_command_for_its_split(tmp_path):
    wanted = r"ValueError: no axis\n.*\n.* --config.eval.split=test$"
    with pytest.warns(VidjaxWarning, match=wanted), analysis.describe_faults(tmp_path, "test"):
        raise ValueError("no axis")


def averages(seed):
    return dict(zip(NAMES, np.random.default_rng(seed).beta(4, 1, len(NAMES)), strict=True))


def test_interval_excludes_0_if_p_is_below_5_percent_and_is_not_narrower_than_a_t_interval():
    samples = np.random.default_rng(0).normal(0.05, 0.1, (40, 20))
    low, high, p = np.transpose([significance.compute_gap_interval(x, draws=1000) for x in samples])
    assert np.array_equal((low > 0) | (high < 0), p < 0.05) and 0.1 < np.mean(p < 0.05) < 0.9
    oracle: Any = scipy.stats.ttest_1samp(samples, 0, axis=1)
    assert np.all(p >= oracle.pvalue * (1 - 1e-9))


@pytest.mark.parametrize("gaps", GAPS)
def test_interval_of_a_difference_is_the_wider_of_t_and_a_bootstrap_with_an_unseen_identity(gaps):
    gaps, num = np.array(gaps), len(gaps)
    # From the share of pairs with equal gaps.
    rare = {5: (1 / 10) ** 2, 7: (15 / 21) ** 2, 20: 1.5 * 94 / 190 - 0.5}[num]
    low_end, high_end = (gaps.mean() + gaps.min()) / 2, (gaps.mean() + gaps.max()) / 2
    weights = np.random.default_rng(1).dirichlet(np.ones(num + 1), 200_000)
    lows = weights @ [*gaps, low_end + rare * (-1 - low_end)]
    highs = weights @ [*gaps, high_end + rare * (1 - high_end)]
    bootstrap = np.quantile(lows, 0.025), np.quantile(highs, 0.975), 2 * np.mean(lows <= 0)
    t = scipy.stats.ttest_1samp(gaps, 0)
    bounds = [*t.confidence_interval(), t[1]]
    assert (bootstrap[0] < bounds[0]) == (bootstrap[1] > bounds[1]) == (num != 5)
    low, high, p = significance.compute_gap_interval(gaps)
    assert (low, high, p) == pytest.approx(bootstrap if num != 5 else bounds, abs=0.006)
    # Exchanged runs have the negative interval.
    assert significance.compute_gap_interval(-gaps) == (-high, -low, p)


def test_interval_of_equal_gaps_is_the_exact_interval_of_a_share_of_which_none_was_seen():
    for num in (1, 20, 50):
        low, high, p = significance.compute_gap_interval(np.zeros(num))
        exact = 1 - 0.025 ** (1 / num)  # the interval of Clopper and Pearson
        assert (low, high) == pytest.approx((-exact, exact), abs=0.006) and p == 1
    # The interval of groups is at least as wide.
    group = list(np.random.default_rng(2).uniform(0.3, 0.6, (2, 50)))
    (same,) = significance.differences_of_seeds([group, group])
    assert (same.mean, same.low, same.high) == (0, low, high)


def test_holm_multiplies_p_by_the_number_of_hypotheses_that_are_left():
    # In the order of p, the products are 3 * 0.01, 2 * 0.03 and 1 * 0.04. The result never falls.
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([3 * 0.01, 2 * 0.03, 2 * 0.03])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]  # at most 1


def test_map_interval_of_zeros_and_ones_is_the_jeffreys_interval():
    for num, hits in ((37, 36), (20, 7), (300, 150)):
        interval = significance.map_interval(np.arange(num) < hits)
        expected = scipy.special.betaincinv(hits + 0.5, num - hits + 0.5, [0.025, 0.975])
        assert interval == pytest.approx(expected.tolist(), abs=0.006)
    # An interval contains MAP, even if MAP is 0 or 1.
    assert significance.map_interval(np.ones(40))[1] == 1.0
    assert significance.map_interval(np.zeros(40))[0] == 0.0


def test_compare_prints_and_writes_the_same_differences_and_intervals(tmp_path, compared):
    names = ("a", "b<i>", "c")
    precisions = {name: averages(seed) for seed, name in enumerate(names)}
    for name, by_name in precisions.items():
        made_runs.write(tmp_path / name, by_name)
    text = compared(runs=names, draws=True).out
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "Holm" in text and "Holm" in page and "b<i>" in Page(page).text()
    facts = json.loads(compared("--json", runs=names).out)
    assert (facts["split"], facts["num_identities"], facts["num_clips"]) == ("val", len(NAMES), 50)
    assert [row["run"] for row in facts["runs"]] == [str(tmp_path / name) for name in names]
    first, *others = (np.array(list(precisions[name].values())) for name in names)
    assert facts["runs"][0]["map"] == pytest.approx(first.mean())
    for other, row in zip(others, facts["runs"][1:], strict=True):
        gaps = other - first
        assert f"{gaps.mean():+.4f}" in text and f"{gaps.mean():+.4f}" in page
        wanted = gaps.mean(), *significance.compute_gap_interval(gaps)
        assert [row[key] for key in ("difference", "low", "high", "p")] == pytest.approx(wanted)
        assert row["p"] <= row["p_holm"] <= 1
        counts = [np.sum(gaps > 1e-9), np.sum(gaps < -1e-9), np.sum(np.abs(gaps) <= 1e-9)]
        assert [row["better"], row["worse"], row["equal"]] == counts


def test_latex_table_escapes_names_and_prints_zero_without_minus(tmp_path):
    lower = {name: max(x - 1e-6, 0) for name, x in averages(10).items()}
    first = made_runs.write(tmp_path / "a_1", averages(10))
    pair = vidjax.compare([first, made_runs.write(tmp_path / "50% & {more}", lower)])
    assert "+0.0000" in pair.text() and "-0.0000" not in pair.text()
    rows = [line for line in pair.to_latex().splitlines() if line.endswith(r" \\")]
    assert r"a\_1 & 0." in rows[-2] and r"50\% \& \{more\}" in rows[-1]
    assert {row.replace(r"\&", "").count(" & ") for row in rows} == {7}  # between 8 columns


@pytest.fixture
def compared(command, tmp_path, monkeypatch):
    """Returns a function that compares runs by the command. "a1+a2" is a group of two runs."""

    def run(*words, runs: Sequence[str] = "ab", draws=False):
        groups = ("+".join(f"{tmp_path}/{member}" for member in name.split("+")) for name in runs)
        words = f"--workdir={tmp_path}/out", f"--runs={','.join(groups)}", *words
        with monkeypatch.context() as patch:
            if not draws:  # the figure takes time
                patch.setattr(comparison, "_draw_intervals", lambda *_: Markup())
            return command("compare", *words)

    return run


def write_groups(tmp_path):
    """Writes runs a1, a2, a3, b1, b2 and b3; returns group -> average precisions [3, C]."""
    rng = np.random.default_rng(8)
    people, precisions = rng.beta(4, 1, len(NAMES)), {}
    for group, shift in (("a", -0.1), ("b", 0.0)):
        precisions[group] = np.clip(people + shift + 0.02 * rng.normal(size=(3, len(NAMES))), 0, 1)
        for seed, precision in enumerate(precisions[group], 1):
            by_name = dict(zip(NAMES, precision, strict=True))
            made_runs.write(tmp_path / f"{group}{seed}", by_name, f"--config.seed={seed}")
    return precisions


def test_interval_of_groups_includes_variance_of_seeds_and_identities(tmp_path, compared):
    """The two variances are added, with the t quantile of Cochran and Cox."""
    precisions, runs = write_groups(tmp_path), ("a1+a2+a3", "b1+b2+b3")
    facts, gaps = json.loads(compared("--json", runs=runs).out), precisions["b"] - precisions["a"]
    variances = [np.mean(gaps, axis=0).var(ddof=1) / len(NAMES), gaps.mean(axis=1).var(ddof=1) / 3]
    error = sum(variances) ** 0.5
    half = np.average(scipy.stats.t.ppf(0.975, [len(NAMES) - 1, 2]), weights=variances) * error
    first, second = facts["runs"]
    assert [seed["map"] for seed in first["seeds"]] == pytest.approx(precisions["a"].mean(axis=1))
    wanted = precisions["b"].mean(), gaps.mean(), error, gaps.mean() - half, gaps.mean() + half
    found = [second[key] for key in ("map", "difference", "error", "low", "high")]
    assert found == pytest.approx(wanted)
    # A comparison of groups has no p-value, so the text has no correction by Holm.
    assert second["p"] is None and "seeds" in facts["method"]
    assert facts["num_clips"] == 50 and isinstance(facts["num_clips"], int)
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


def test_compare_marks_extended_runs_and_other_checkpoints(tmp_path, compared):
    write_groups(tmp_path)
    extended = {"extended": [[0, 5.0], [15, 8.0]]}
    made_runs.write(tmp_path / "c1", averages(0), "--config.seed=1", results=extended)
    best = {"overrides": {"eval.checkpoint": "best"}}
    made_runs.write(tmp_path / "c2", averages(0), "--config.seed=2", results=best)
    facts = json.loads(compared("--json", runs=("a1", "c1", "c2")).out)
    assert [row.get("extended") for row in facts["runs"]] == [None, extended["extended"], None]
    marks = ("Extended:", "5, 8 from step 15", "c2 with eval.checkpoint=best")
    page = Page((tmp_path / "out" / "comparison.html").read_text()).text()
    for text in (facts["table"], page, (tmp_path / "out" / "comparison.tex").read_text()):
        assert all(mark in text for mark in marks)
    plain = compared(runs=("a1", "a2")).out
    assert "Extended" not in plain and "settings" not in plain
    # An extended run is no other seed of a run that was not extended.
    assert compared(runs=("a1+a2", "b2+c1")).refused("the seed: num_epochs")
    assert compared(runs=("a1+a2", "b1+c2")).refused("the seed: eval.checkpoint")
    # How a run was logged and scored in blocks is no difference.
    words = ("log_every_steps=3", "eval.block_size=8", "data.mode=streaming", "eval.report=False")
    made_runs.write(tmp_path / "d", averages(0), *(f"--config.{x}" for x in ("seed=9", *words)))
    assert compared(runs=("a1+a2", "b1+d")).code == 0


def test_compare_prints_the_difference_that_few_identities_or_equal_gaps_hide(tmp_path, compared):
    rng, line = np.random.default_rng(4), "No difference in MAP below about"
    cases = (20, 0, " 0.169 can"), (20, 0.1, " 0.0"), (60, 0, " 0.0"), (60, 0.1, None)
    for num, deviation, shown in cases:
        first = rng.uniform(0.3, 0.6, num)
        for name, ap in (("a", first), ("b", first + rng.normal(0, deviation, num))):
            made_runs.write(tmp_path / name, {f"person_{i}": x for i, x in enumerate(ap)})
        text = vidjax.compare([tmp_path / "a", tmp_path / "b"]).text()
        assert (f"{line}{shown}" in text) == (line in text) == (shown is not None)
        if deviation:  # a page takes time
            compared()
            page = Page((tmp_path / "out" / "comparison.html").read_text()).text()
            assert (line in page) == (shown is not None)


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
    assert compared().refused(message) and not (tmp_path / "out").exists()


def test_runs_with_other_features_but_not_without_reports_are_compared(tmp_path, compared):
    for name, results in {"a": trained_on(), "b": trained_on(features="b"), "c": {}}.items():
        made_runs.write(tmp_path / name, averages(3), "--config.eval.report=False", results=results)
    assert compared(runs="abc").code == 0
    (tmp_path / "b" / "analysis.npz").unlink()  # the remedy turns on the report, which writes it
    assert compared().refused("--config.eval.split=val --config.eval.report=True")
