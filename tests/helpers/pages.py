"""Pages of HTML, taken apart: their elements, their texts, and where their numbers come from."""

import ast
import html.parser
import json
import re
from pathlib import Path

import numpy as np

from tests.helpers import made_runs
from vidjax.core import metrics
from vidjax.evaluation import significance
from vidjax.runs import config as config_lib
from vidjax.runs import config_io
from vidjax.runs import results as results_lib
from vidjax.runs.run_folder import RunFolder

REPORT = Path(__file__).parents[2] / "vidjax/evaluation/report"
VOID = ("meta", "link", "br", "img", "input")
NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")


class Page(html.parser.HTMLParser):
    """The elements and the texts of a page, as a browser would see them.

    Attributes:
      tags: (tag, attributes, tags around it) of every element.
      open: tags that were opened and not closed.
      texts: (text, tags around it) of every text.
      data: (value, shown text) of every number that `html.number` wrote.
    """

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts, self.data = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))
        if tag == "data":
            self.data.append((dict(attrs)["value"], ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((data, tuple(self.open)))
        if "data" in self.open:
            value, shown = self.data[-1]
            self.data[-1] = (value, shown + data)

    def all(self, name):
        """Returns the attributes of all elements of a kind."""
        return [attrs for tag, attrs, _ in self.tags if tag == name]


def section(text, name):
    """Returns a section of a page, without its figures."""
    found = re.search(rf'<section id="{name}".*?</section>', text, re.DOTALL)
    assert found, name
    return re.sub(r"<svg.*?</svg>", "", found[0], flags=re.DOTALL)


def values(text):
    """Returns the numbers of a part of a page with all their digits."""
    return [float(value) for value in re.findall(r'<data value="([^"]+)">', text)]


def check_numbers(folder, text, split=None):
    """Asserts that every number of a report is in a file of the run, or follows from one.

    Numbers with all digits must be equal; numbers within words are compared after rounding. Ticks
    of figures are no values. `derived` lists what may follow from a file.

    Args:
      folder: the folder of the run.
      text: the page.
      split: the split that the page is of; None for the split of the run.
    """
    page = Page(text)
    kept = file_numbers(folder)
    exact = kept | derived(folder, split)
    assert len(page.data) > 5
    wrong = [pair for pair in page.data if float(pair[0]) not in exact]
    assert not wrong, wrong
    for value, shown in page.data:
        assert rounded(shown, float(value)), (value, shown)
    commit = RunFolder(folder).metrics().get("versions", {}).get("commit", "")
    words = page_words() | {commit.partition("-")[0]}  # a hash such as 037e946 looks like a number
    sorted_values = np.array(sorted(exact))
    missing = []
    for content, around in page.texts:
        ticks = "svg" in around and not {"title", "desc"} & set(around)
        if ticks or {"style", "data", "pre"} & set(around):
            continue
        missing += [
            (token, content)
            for token in NUMBER.findall(content)
            if token not in words and not near(token, sorted_values)
        ]
    assert not missing, missing


def rounded(shown, value):
    """Returns whether a text is a value, rounded to the digits that the text has."""
    number = shown.replace(",", "").removesuffix(" %")
    value = 100 * value if shown.endswith(" %") else value
    mantissa, _, exponent = number.partition("e")
    digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return abs(float(number) - value) <= 0.5001 * 10.0**-digits


def near(token, exact):
    """Returns whether any of the sorted values, or of their hundredfold, rounds to a text."""
    for scale in (1, 100):
        guess = float(token.replace(",", "").replace("\u2212", "-")) / scale
        for sign in (1, -1):
            place = np.searchsorted(exact, sign * guess)
            for value in exact[max(place - 1, 0) : place + 2]:
                if rounded(token, sign * scale * float(value)):
                    return True
    return False


def file_numbers(folder):
    """Returns all numbers of the files of a run: JSON, arrays, and numbers within their texts."""
    found = set()
    for path in folder.glob("*.json"):
        collect(json.loads(path.read_text()), found)
    collect(results_lib.read_lines(folder / "metrics.jsonl"), found)
    for path in folder.glob("analysis*.npz"):
        values, arrays = made_runs.load_analysis(path)
        collect(values, found)
        for array in arrays.values():
            found |= set(map(float, array.ravel()))
    collect(folder.name, found)
    return found


def collect(value, found):
    """Adds to a set the numbers of a JSON value, those within its texts, and lengths of lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            collect(key, found)
            collect(item, found)
    elif isinstance(value, list):
        found.add(float(len(value)))
        for item in value:
            collect(item, found)
    elif isinstance(value, str):
        # A line may write a number of a text in another form, such as `seed 3` of `seed3`.
        found |= {float(number) for number in re.findall(r"\d+(?:\.\d+)?", value)}
    elif value is not None and not isinstance(value, bool):
        found.add(float(value))


def derived(folder, split):
    """Returns what a report computes from the files: intervals, shares, differences, defaults."""
    found = set()
    collect(json.loads(config_io.to_json(config_lib.default())), found)  # the column of defaults
    path = RunFolder(folder).paths(split or None).analysis
    if not path.exists():
        return found
    values, arrays = results_lib.load_analysis(path)
    if "ap" in arrays:
        ap = arrays["ap"][arrays["positives"] > 0]
        ap = np.concatenate([ap, np.zeros(values.num_others or 0)])
        found |= set(significance.map_interval(ap))
        found |= {*np.quantile(ap, [0.1, 0.5]).tolist(), float(np.mean(ap == 1)), float(len(ap))}
    for name in ("score_known", "score_strange"):
        counts = arrays.get(name, np.zeros(1))
        if counts.sum():
            found |= {float(counts.sum()), float(counts.max() / counts.sum())}
    lines = results_lib.read_lines(folder / "metrics.jsonl")
    found.add(float(sum("map" in line for line in lines)))
    found.add(float(sum(line.get("bad_steps", 0) for line in lines)))
    return found


def page_words():
    """Returns the numbers within the words of the program, such as the 100 of MAP@100."""
    texts = [f"{metric.label} {metric.about}" for metric in metrics.CLIP_METRICS.values()]
    texts.append(significance.METHOD)
    texts += [path.read_text() for path in REPORT.glob("*.j2")]
    for path in REPORT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return {number for text in texts for number in NUMBER.findall(text)}
