"""The tables of scores: a script writes them, from the folders of runs."""

import json
import re

import pytest

from tests.benchmarks import scores
from tests.helpers import made_runs
from vidjax import config as config_lib


def test_readmes_show_what_was_collected():
    found = json.loads(scores.RESULTS.read_text())
    for name, table in scores.tables(found).items():
        text = scores.PAGES[name].read_text()
        assert scores.replace(text, name, table) == text, f"{name}: write it with scores.py"


@pytest.mark.slow
def test_every_run_is_a_command():
    names = [name for _, name, _ in scores.runs("real")]
    assert len(names) == len(set(names)) > 60
    for _, _, (spec, *overrides) in scores.runs("real"):
        config = config_lib.load_file(spec.removeprefix("--config="))
        config_lib.override(config, overrides)
    keys = {row.key for row in scores.ROWS}
    assert len(keys) == len(scores.ROWS)
    assert {key for one in scores.CLAIMS for key in (*one.synthetic, *one.real)} <= keys


def made(folder, found):
    """Writes folders of runs: key -> average precision of every identity."""
    for name, averages in found.items():
        identities = {str(i): value for i, value in enumerate(averages)}
        results = {"members": [{"map": 0.25}, {"map": 0.75}]}
        made_runs.write(folder / name, identities, results=results)


def test_figures_are_those_of_the_folders(tmp_path):
    base = [0.2, 0.4, 0.6]
    runs = {f"face-{seed}": base for seed in scores.SEEDS}
    runs |= {f"head-{seed}": [0.3, 0.5, 0.6 + 0.1 * seed] for seed in scores.SEEDS}
    made(tmp_path, runs | {"head-real": base, "seeds-real": base})
    old = {"scores": {"body": {"synthetic": [0.5, 0.5, 0.5]}}}
    found = scores.collect(tmp_path, old, pytest.fail)
    assert found["scores"]["face"] == {"synthetic": pytest.approx([0.4] * 3)}
    assert found["scores"]["head"]["real"] == [0.5]  # the mean of members
    assert found["scores"]["seeds"]["real"] == pytest.approx([0.4])  # all of them together
    assert found["scores"]["body"] == old["scores"]["body"]  # trained before
    gaps = [0.1, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2]
    mean = sum(gaps) / 9
    error = (sum((gap - mean) ** 2 for gap in gaps) / 8 / 9) ** 0.5
    difference = found["claims"]["head helps face"]
    assert difference == {"synthetic": pytest.approx([mean, error])}

    table = scores.tables(found)["scores"]
    assert "| `mma.py:face` | 0.400 0.400 0.400 | 0.400 |  |" in table
    assert re.search(r"and audio \| 0.500 0.500 0.500 \| 0.500 \| no body \|", table)
    assert "| head helps face | +0.100 ± 0.017 |  | yes |" in scores.tables(found)["claims"]


def test_a_page_without_the_table_is_an_error():
    with pytest.raises(ValueError, match="table: scores"):
        scores.replace("# A page\n", "scores", "| a |\n")
