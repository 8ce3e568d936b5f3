"""The tables of scores: a script writes them, from the folders of runs."""

import json

import numpy as np
import pytest

from tests.benchmarks import scores
from tests.benchmarks.ladders import LADDERS, REAL, ROWS, SEEDS, SYNTHETIC
from tests.helpers import made_runs
from vidjax.evaluation import significance
from vidjax.runs import config_io


def test_readmes_show_what_was_collected():
    found = json.loads(scores.RESULTS.read_text())
    for name, table in scores.tables(found).items():
        text = scores.PAGES[name].read_text()
        assert scores.replace(text, name, table) == text, f"{name}: write it with scores.py"


def test_configurations_tell_what_was_collected():
    found = json.loads(scores.RESULTS.read_text())
    for key in scores.HEADERS:
        text = (scores.ROOT / "configs" / f"{ROWS[key].config}.py").read_text()
        lines = scores.header(ROWS[key], found)
        assert scores.replace_header(text, lines) == text, f"{key}: write it with scores.py"


def test_a_rung_compares_two_rows():
    for name, rungs in LADDERS.items():
        for rung in rungs:
            assert rung.key in ROWS and (not rung.base or rung.base in ROWS), rung
            assert rung.key != rung.base, rung
        pairs = [scores.pair_name(rung) for rung in rungs if rung.base]
        assert len(pairs) == len(set(pairs)), name
    for row in ROWS.values():
        for part in row.joined:
            assert list(ROWS).index(part) < list(ROWS).index(row.key)


@pytest.mark.slow
def test_every_run_is_a_command():
    names = [name for _, name, _ in scores.runs("real")]
    assert len(names) == len(set(names)) > 200
    known = set(names)
    for _, _, (first, *words) in scores.runs("real"):
        if first.startswith("--config="):
            config_io.override(config_io.load_file(first.removeprefix("--config=")), words)
        else:
            (joined,) = words
            folders = joined.removeprefix("--runs=").split(",")
            assert {folder.removeprefix("FOLDER/") for folder in folders} <= known


def made(folder, found):
    """Writes folders of runs: key of a row -> dataset -> for each seed the AP of every identity."""
    for key, by_dataset in found.items():
        for dataset, averages in by_dataset.items():
            for seed, own in zip(SEEDS, averages, strict=True):
                name = scores.folder_name(ROWS[key], dataset, seed)
                identities = {str(i): value for i, value in enumerate(own)}
                made_runs.write(folder / name, identities, results={"top1": 0.5})


def test_figures_are_those_of_the_folders(tmp_path):
    base = [[0.2, 0.4, 0.6]] * 3
    new = [[0.3, 0.5, 0.6 + 0.1 * seed] for seed in SEEDS]
    made(tmp_path, {"fusion_voting": {SYNTHETIC: base, REAL: base}})
    made(tmp_path, {"fusion": {SYNTHETIC: new, REAL: new}})
    old = {
        "rows": {"knn": {SYNTHETIC: {"map": [0.5] * 3, "top1": [0.5] * 3, "commits": ["a"]}}},
        "seconds": {"knn": 16.2},
    }
    found = scores.collect(tmp_path, old)
    assert found["rows"]["fusion"][REAL]["map"] == pytest.approx([0.4 + 0.2 / 3, 0.5, 1.6 / 3])
    assert found["rows"]["knn"] == old["rows"]["knn"]  # trained before
    gain = found["rungs"]["fusion against fusion_voting"]
    gaps = np.array([[0.1, 0.1, 0.1 * seed] for seed in SEEDS])
    assert gain[SYNTHETIC]["mean"] == pytest.approx(gaps.mean())
    of_seeds = gaps.mean(axis=1).var(ddof=1) / 3
    nested = sum(own.var(ddof=1) / 3 for own in gaps) / 9
    assert gain[SYNTHETIC]["error"] == pytest.approx((nested + of_seeds) ** 0.5)
    crossed = gaps.mean(axis=0).var(ddof=1) / 3
    assert gain[REAL]["error"] == pytest.approx((crossed + of_seeds) ** 0.5)

    tables = scores.tables(found)
    assert "| `knn.py` | 0.500 0.500 0.500 | 0.500 |  |  |" in tables["scores"]
    line = "| `knn.py` | nearest training clip, the baseline | 0.500 |  |  | 16 s |"
    assert line in tables["systems"].splitlines()
    (line,) = (text for text in tables["quality_fusion"].splitlines() if "one fused face" in text)
    cells = "+0.01 | 0.500 (+0.100 ± 0.050) | 0.500 (+0.100 ± 0.038) | yes, yes |"
    assert f"| `quality_fusion.py` | `quality_fusion.py:voting` | {cells}" in line


def test_an_error_holds_identities_and_seeds():
    rng = np.random.default_rng(0)
    identities = 0.1 * rng.normal(size=(2000, 1, 400))
    seeds = 0.02 * rng.normal(size=(2000, 3, 1))
    squared = [significance.squared_errors(list(gaps)) for gaps in identities + seeds]
    means = (identities + seeds).mean(axis=(1, 2))
    assert np.mean(np.sum(squared, axis=1)) == pytest.approx(means.var(), rel=0.1)


def test_a_verdict_looks_at_the_interval():
    for mean, wanted in ((0.03, "yes"), (-0.03, "no"), (0.01, "open"), (-0.01, "open")):
        assert scores.verdict({"mean": mean, "error": 0.01}) == wanted
    assert scores.verdict(None) == ""


def test_a_page_without_the_table_is_an_error():
    with pytest.raises(ValueError, match="table: scores"):
        scores.replace("# A page\n", "scores", "| a |\n")
