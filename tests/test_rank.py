"""`vidjax rank` writes the ranking of `vidjax.restore` in every format, with any names of clips."""

import csv
import functools
import itertools
import json
import os
import sys

import numpy as np
import pytest

import vidjax
from tests.helpers import clip_files, made_runs, small_runs
from tests.helpers.seen import refused
from vidjax.data.memory import load_clips
from vidjax.runs.run_folder import RunFolder
from vidjax.utils import tables

# Parts of names that break programs: blanks, quotes, HTML, formulas, forms of Unicode.
FRAGMENTS = (
    *(" ", "  ", "\u00a0", "\u3000", "\ufb01", "\u0661", "é", "名前", "🎬"),
    *('"', "'", "`", ",", ";", "|", "\\", "/", "../", "#", "${HOME}", "**b**"),
    *("<img src=x onerror=alert(1)>", "&amp;", "</td>", "-->", "x" * 300),
    *("=1+1", "+1", "-2+3", "@SUM(A1)", "%20", "%", "NaN", "null", "-inf", "1e5", "007"),
)
# 101 names without outer blanks; some differ in only one character.
NAMES = [f"{part}Ada Byron".strip() for part in FRAGMENTS]
NAMES += [f"{text}Ada" for text in NAMES]
NAMES = [*dict.fromkeys([*NAMES, *filter(None, map(str.strip, FRAGMENTS))])]
DIM = 24


def make_clips(split, seed):
    """Returns one clip of each person of NAMES: clip -> features."""
    rng = np.random.default_rng(seed)
    people = np.random.default_rng(0).normal(size=(len(NAMES), DIM))
    return {
        f"{name} {split}": {"face": (row + rng.normal(size=(2, DIM)) / 9).astype(np.float32)}
        for name, row in zip(NAMES, people, strict=True)
    }


def rows_of(ranked):
    """Returns the rows (identity, rank, clip, score) of identity -> [(clip, score), ...]."""
    return [
        (identity, place, clip, score)
        for identity, clips in ranked.items()
        for place, (clip, score) in enumerate(clips, 1)
    ]


def read(path):
    """Returns the rows (identity, rank, clip, score) of a file, as a user would read it."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return [tuple(row.values()) for row in parquet.read_table(path).to_pylist()]
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        scored = {line["identity"]: [tuple(x.values()) for x in line["clips"]] for line in lines}
        return [(*row, -np.inf if score is None else score) for *row, score in rows_of(scored)]
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file, "excel-tab" if path.suffix == ".tsv" else "excel")
    assert head == ["identity", "rank", "clip", "score"]
    # An apostrophe before a name hides formulas from spreadsheets.
    assert not any(row[n].startswith(("=", "+", "-", "@")) for row in rows for n in (0, 2))
    return [(a.removeprefix("'"), int(n), b.removeprefix("'"), float(s)) for a, n, b, s in rows]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run on clips of NAMES, and on 99 distractors, which a threshold needs."""
    folder = tmp_path_factory.mktemp("odd")
    splits = {split: make_clips(split, seed) for seed, split in enumerate(("train", "val"))}
    labels = dict(zip(itertools.chain(*splits.values()), NAMES * 2, strict=True))
    distractor = np.random.default_rng(7).normal(size=(1, DIM)).astype(np.float32)
    splits["val"] |= {f"nobody {i}": {"face": distractor + i} for i in range(99)}
    data = vidjax.load_data(splits, labels, cache_dir=folder / "cache")
    words = "--config.data.name=arrays", "--config.eval.report=False"
    config = small_runs.shrunk(*words, spec="configs/knn.py:iqiyi_vid")
    vidjax.train(config, folder / "run", data, num_devices=1)
    return folder / "run"


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_odd_names_and_scores_survive_every_ranking_format(tmp_path, suffix):
    scores = [float(np.float32(score)) for score in (-0.1, -1e-30, -np.inf)]
    ranked = {
        name: list(zip((clip, "b", "a.mp4"), scores, strict=True))
        for name, clip in zip(NAMES, reversed(NAMES), strict=True)
    }
    path = tmp_path / f"out{suffix}"
    tables.write_ranking(path, ranked)

    rows = read(path)
    assert [row[:3] for row in rows] == [row[:3] for row in rows_of(ranked)]
    assert [np.float32(row[3]) for row in rows] == scores * len(NAMES)

    # An existing file is not replaced.
    before = path.read_bytes()
    for write in (lambda: tables.check_new(path), lambda: tables.write_ranking(path, {})):
        refused(write, "name another file, or delete it")
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_rankings_are_written_on_file_systems_without_hard_links(tmp_path, monkeypatch):
    def link(*_):  # a hard link would not replace an existing file
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "out.tsv"
    tables.write_ranking(path, {"Ada": [("a", 1.0)]})
    refused(lambda: tables.write_ranking(path, {}), "name another file, or delete it")
    assert read(path) == [("Ada", 1, "a", 1.0)] and list(tmp_path.iterdir()) == [path]


def test_check_new_refuses_paths_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "link.tsv").symlink_to(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, *remedies in (
        ("out.xls", ".csv, .tsv, .jsonl or .parquet"), ("link.tsv", "name another file"),
        ("no/out.tsv", "make it first"),
        ("out.parquet", "pip install 'vidjax[parquet]'", "-e '.[parquet]'", "or end the name in"),
    ):  # fmt: skip
        refused(functools.partial(tables.check_new, tmp_path / name), *remedies)
    only = refused(lambda: tables.check_new(tmp_path / "out.parquet", (".parquet",)), "[parquet]")
    assert "end the name" not in only


# Modality -> width, of two of the three official modalities.
OFFICIAL = {name: clip_files.WIDTHS[name] for name in ("face", "audio")}


def test_load_clips_reads_every_layout_without_labels(official_dir, tmp_path):
    """A table, a folder with tables, a folder of `.npz` files, and official files."""
    clips, face = make_clips("new", 5), {"face": np.ones((1, DIM), np.float32)}
    table = clip_files.write_parquet(tmp_path / "test.parquet", clips)
    clip_files.write_npz(tmp_path, {"arrays": {"Ada Byron": face, "b.mp4": face}})
    load = functools.partial(load_clips, modalities={"face": DIM}, identities=NAMES)

    assert {*load(table).names} == {*clips}
    assert {*load(tmp_path).names} == {*clips}, "in a folder with a table, only tables are read"
    assert {*load(tmp_path / "arrays").names} == {"Ada Byron", "b.mp4"}
    for path in (table, tmp_path, tmp_path / "arrays"):
        refused(functools.partial(load, path, split="val"), "has no split")
    refused(lambda: load(tmp_path / "none.parquet"), "does not exist")

    val = load_clips(official_dir, OFFICIAL, identities=(), split="val")
    only_split = val.split("any name")  # clips in memory have one split
    assert len(val.names) == len(only_split.clips) == clip_files.CLIPS["val"]


def test_load_clips_of_official_files_needs_a_split_and_their_modalities(official_dir):
    load = functools.partial(load_clips, official_dir, identities=())
    refused(lambda: load(OFFICIAL), "--config.eval.split=")
    refused(lambda: load(OFFICIAL, split="dev"), "no split 'dev'", "--config.eval.split=")
    refused(lambda: load({"voice": 3}, split="val"), "audio", "but the run reads voice")


@pytest.mark.slow
def test_rank_command_writes_the_ranking_of_predict(run_dir, tmp_path, command):
    clips, out = make_clips("new", 5), tmp_path / "out.tsv"
    table = clip_files.write_parquet(tmp_path / "new.parquet", clips)
    before = made_runs.snapshot(run_dir)

    words = ("rank", f"--workdir={run_dir}", f"--input={table}")
    done = command(*words, f"--out={out}", "--json")

    facts = json.loads(done.out)
    assert facts["num_clips"] == len(clips)
    assert facts["seconds"] > 0 and facts["clips_per_second"] > 0
    assert f"rank: {len(clips)} of {len(clips)} clips" in done.err
    wanted = rows_of(vidjax.restore(run_dir).rank(clips))
    assert [(*row[:3], np.float32(row[3])) for row in read(out)] == wanted
    assert made_runs.snapshot(run_dir) == before

    assert command(*words, f"--out={out}").refused("name another file, or delete it")
    # `vidjax rank` does not train, so it has no seed. The error names a field of `vidjax rank`.
    other = (f"--out={tmp_path}/b.tsv", "--config.seed=1")
    assert command(*words, *other).refused("--config.eval.split")


@pytest.mark.slow
def test_identify_uses_the_threshold_that_evaluation_measured(run_dir):
    run, metrics = vidjax.restore(run_dir, num_devices=1), RunFolder(run_dir).metrics()
    limit = metrics["threshold_at_fpir_0.01"]
    assert limit is not None and run.threshold == limit
    known, new = make_clips("val", seed=1), {"stranger": {"face": -np.ones((1, DIM), np.float32)}}

    matches = run.identify(known | new)

    for (clip, answers), row in zip(matches.items(), run.scores(known | new), strict=True):
        best = int(np.argmax(row))
        assert answers == ([(run.identities[best], row[best])] if row[best] >= limit else []), clip
    # FNIR is the share of clips of known people with no name or a wrong name.
    named = [[name for name, _ in matches[clip]] for clip in known]
    missed = np.mean([given != [person] for given, person in zip(named, NAMES, strict=True)])
    assert missed == pytest.approx(metrics["fnir_at_fpir_0.01"], abs=1e-9)

    three = run.identify(new, k=3, threshold=float("-inf"))["stranger"]
    assert len(three) == 3 and three[0][1] >= three[1][1] >= three[2][1]
    refused(lambda: run.identify(new, k=0), "k=0: give 1 or more")
