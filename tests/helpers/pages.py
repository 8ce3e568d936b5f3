"""A parser of HTML pages, and checks that the numbers of a report come from files of the run."""

import html.parser
import json
import re

import numpy as np

from tests.helpers import made_runs
from vidjax.evaluation import significance
from vidjax.runs import config as config_lib, config_io, results as results_lib
from vidjax.runs.run_folder import RunFolder

VOID = ("meta", "link", "br", "img", "input")


class Page(html.parser.HTMLParser):
    """The elements and the texts of a page, as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags = []  # (tag, attributes, tags that contain the tag)
        self.open = []  # tags that are open
        self.texts = []  # (text, tags that contain the text)
        self.data = []  # (value, shown text) of each element <data>, which is a number
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))
        if tag == "data":
            self.data.append((dict(attrs)["value"], ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((data, tuple(self.open)))
        if "data" in self.open:
            value, shown = self.data[-1]
            self.data[-1] = (value, shown + data)

    def all(self, name):
        return [attrs for tag, attrs, _ in self.tags if tag == name]

    def text(self):
        return "".join(text for text, _ in self.texts)


def section(text, name):
    """Returns the HTML of a section of a page, without its figures (<svg>)."""
    found = re.search(rf'<section id="{name}".*?</section>', text, re.DOTALL)
    assert found, name
    return re.sub(r"<svg.*?</svg>", "", found[0], flags=re.DOTALL)


def values(text):
    return [float(value) for value in re.findall(r'<data value="([^"]+)">', text)]


def check_numbers(folder, text):
    """Asserts that the numbers of a report are in files of the run, or are derived from them.

    The shown text of a number must be its value, rounded.
    """
    exact, data = {*file_numbers(folder), *derived(folder)}, Page(text).data
    assert len(data) > 5
    assert [pair for pair in data if float(pair[0]) not in exact] == []
    for value, shown in data:
        number = shown.replace(",", "").removesuffix(" %")
        scaled = float(value) * (100 if shown.endswith(" %") else 1)
        mantissa, _, exponent = number.partition("e")
        digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
        assert abs(float(number) - scaled) <= 0.5001 * 10.0**-digits, (value, shown)


def file_numbers(folder):
    """Yields all numbers in the JSON files and in the analysis of a run."""
    for path in folder.glob("*.json"):
        yield from numbers_in(json.loads(path.read_text()))
    yield from numbers_in(results_lib.read_lines(folder / "metrics.jsonl"))
    for path in folder.glob("analysis*.npz"):
        facts, arrays = made_runs.load_analysis(path)
        yield from numbers_in(facts)
        for array in arrays.values():
            yield from map(float, array.ravel())


def numbers_in(value):
    """Yields the numbers in a JSON value, and the lengths of its lists."""
    if isinstance(value, list):
        yield float(len(value))
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def derived(folder):
    """Yields numbers that a report computes from files: intervals, shares and so on."""
    yield from numbers_in(json.loads(config_io.to_json(config_lib.default())))
    lines = results_lib.read_lines(folder / "metrics.jsonl")
    yield float(sum("map" in line for line in lines))
    yield float(sum(line.get("bad_steps", 0) for line in lines))
    path = RunFolder(folder).paths().analysis
    if not path.exists():
        return
    facts, arrays = results_lib.load_analysis(path)
    if "ap" in arrays:
        ap = arrays["ap"][arrays["positives"] > 0]
        ap = np.concatenate([ap, np.zeros(facts.num_others or 0)])
        yield from significance.map_interval(ap)
        yield from (*np.quantile(ap, [0.1, 0.5]).tolist(), float(np.mean(ap == 1)), float(len(ap)))
    for name in ("score_known", "score_strange"):
        if (counts := arrays.get(name, np.zeros(1))).sum():
            yield from (float(counts.sum()), float(counts.max() / counts.sum()))
