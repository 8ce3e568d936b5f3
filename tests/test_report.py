"""The report of a run: its numbers, sections, tags and links; hostile names; missing files."""

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.helpers import made_runs
from tests.helpers.pages import Page, check_numbers, section, values
from tests.helpers.small_runs import shrunk
from vidjax.evaluation import analysis
from vidjax.evaluation.report import run_page
from vidjax.runs import schemas
from vidjax.runs.run_folder import RunFolder
from vidjax.training import loop
from vidjax.utils.errors import VidjaxWarning

SECTIONS = ["summary", "reading", "learning", "identities", "mistakes", "strata", "open_set"]
EVIL = (
    "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>{} --></style></title>]]>"
    '<meta http-equiv="refresh" content="0; url=//x"><form action="//x"><input name=y autofocus '
    "onfocus=alert(3)></form><a href='javascript:alert(4)'>\\</svg>$\ud800\u4e2d^"
)
TAGS = """
html head meta link title style body header h1 nav ul li a main footer section h2 h3 p strong span
code pre dl dt dd div table caption thead tbody tr th td data br figure figcaption
bdi svg desc defs g path use clippath rect text"""


def check_page(text):
    """Asserts properties of every report; returns the parsed page."""
    page = Page(text)
    assert page.open == [] and len(text.encode()) < 5e6

    # Sections are in this order. Links lead to the sections, to other reports and to the top.
    sections = [attrs["id"] for attrs in page.all("section")]
    assert sections == [name for name in SECTIONS if name in sections]
    links = [attrs["href"] for attrs in page.all("a")]
    assert links[: len(sections)] == [f"#{name}" for name in sections]
    assert links.pop() == "#top"
    pages = re.compile(r"report_[\w%.-]+\.html")
    assert all(pages.fullmatch(address) for address in links[len(sections) :])

    # Nothing is loaded from elsewhere, and no script runs.
    assert {tag for tag, _, _ in page.tags} <= set(TAGS.split())
    assert len(page.all("meta")) == 4 and "http" not in text.replace("http-equiv", "")
    for _, attrs, _ in page.tags:
        for name in ("src", "href", "data", "action"):
            address = attrs.get(name, "#")
            assert address.startswith(("#", "data:")) or address in links, attrs
        assert not any(name.startswith("on") for name in attrs)

    # Figures have titles and descriptions.
    for attrs in page.all("svg"):
        title, description = attrs["aria-labelledby"].split()
        assert attrs["role"] == "img" and re.search(rf'<title id="{title}">[^<]+</title>', text)
        assert re.search(rf'<desc id="{description}">[^<]+</desc>', text)
    return page


@pytest.mark.slow
def test_report_of_a_trained_net_shows_its_results(data, tmp_path):
    config = shrunk("--config.num_epochs=1", spec="configs/quality_fusion.py:iqiyi_vid")
    results = loop.train(config, tmp_path, data, num_devices=1, analyse=True, command="a & b")
    text = (tmp_path / "report.html").read_text()
    # Loss, scores and learning rate; histograms, error rates and calibration.
    assert len(check_page(text).all("figure")) == 6
    summary = section(text, "summary")
    numbers = values(summary)
    for name in ("map", "top1", "auroc", "num_clips", "seed", "num_params", "step"):
        assert results[name] in numbers, name
    _, people, low, high = numbers[:4]  # MAP, number of identities, and the interval of MAP
    assert low < results["map"] < high
    assert people == results["num_map_identities"]
    assert "top-1: 95 % interval" in text and "AUROC: 95 % interval" in text
    assert "<span>a</span> <span>&amp;</span> <span>b</span>" in summary
    check_numbers(tmp_path, text)

    run_page.write(RunFolder(tmp_path))
    assert (tmp_path / "report.html").read_text() == text  # the same files give the same page


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
    enough = {"rate": 0.1, "fewest": 10, "threshold": -1.5, "fpir": 0.1, "fnir": 0.375}
    enough |= {"fpir_low": 0.03125, "fpir_high": 0.25, "fnir_low": 0.25, "fnir_high": 0.5}
    facts["open_set"]["rates"] = [{"rate": 0.01, "fewest": 100}, enough]
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
    text = section(run_page.render(run_page.load(RunFolder(tmp_path))), "identities")
    share_perfect, count, median, quantile = values(text)[:4]
    assert (share_perfect, count) == (0.95, 20)
    assert (median, quantile) == (1, 1) and "below" not in text


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
    text = run_page.render(full._replace(analysis=analysis))
    assert "<table" not in section(text, "open_set")


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
    assert f"evaluated on val; {full.metrics.eval_date}" in page
    check_numbers(full.folder, page)


def test_report_explains_missing_results(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    text = run_page.write(RunFolder(tmp_path)).read_text()
    check_page(text)
    assert "The run has no results yet" in section(text, "summary")
    (tmp_path / "metrics.json").write_text('{"num_clips": 3}')
    text = run_page.write(RunFolder(tmp_path)).read_text()
    assert "and there is no MAP" in section(text, "summary")


def test_warning_about_a_failed_report_names_the_command_for_its_split(tmp_path):
    wanted = r"ValueError: no axis\n.*\n.* --config.eval.split=test$"
    with pytest.warns(VidjaxWarning, match=wanted), analysis.describe_faults(tmp_path, "test"):
        raise ValueError("no axis")
