"""Rankings: files in each format, `vidjax rank`, and submissions, which are written and scored."""

import csv
import functools
import json
import os
import sys
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest

import vidjax
from tests.helpers import clip_files, made_runs
from tests.helpers.made_runs import write_pair
from tests.helpers.seen import refused
from vidjax.data import labels
from vidjax.data.memory import load_clips
from vidjax.evaluation import ranking, topk
from vidjax.utils import tables

# Parts of names that break programs: blanks, quotes, HTML, formulas, forms of Unicode.
FRAGMENTS = (
    " ", "  ", "\u00a0", "\u3000", "\ufb01", "\u0661", "é", "名前", "🎬", '"', "'", "`", ",", ";",
    "|", "\\", "/", "../", "#", "${HOME}", "**b**", "<img src=x onerror=alert(1)>", "&amp;",
    "</td>", "-->", "x" * 300, "=1+1", "+1", "-2+3", "@SUM(A1)", "%20", "%", "NaN", "null", "-inf",
    "1e5", "007",
)  # fmt: skip
# 101 names without outer blanks; some differ in only one character.
NAMES = [f"{part}Ada Byron".strip() for part in FRAGMENTS]
NAMES += [f"{text}Ada" for text in NAMES]
NAMES = [*dict.fromkeys([*NAMES, *filter(None, map(str.strip, FRAGMENTS))])]
DIM = 24
MANY = " ".join(f"x{i}.mp4" for i in range(101))  # a line may have at most 100 clips


def make_clips():
    """Returns random clips with the names NAMES: clip -> features."""
    faces = np.random.default_rng(0).normal(size=(len(NAMES), 2, DIM)).astype(np.float32)
    return {name: {"face": face} for name, face in zip(NAMES, faces, strict=True)}


def rows_of(ranked):
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


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet", "_without_links.tsv"])
def test_odd_names_and_scores_survive_every_ranking_format(tmp_path, monkeypatch, suffix):
    if "without_links" in suffix:  # a file system without hard links
        monkeypatch.setattr(os, "link", mock.Mock(side_effect=PermissionError("not permitted")))
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
    before = path.read_bytes()
    for write in (lambda: tables.check_new(path), lambda: tables.write_ranking(path, {})):
        refused(write, "name another file, or delete it")  # the file exists
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_check_new_refuses_paths_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "link.tsv").symlink_to(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, *remedies in (
        ("out.xls", ".csv, .tsv, .jsonl or .parquet"), ("link.tsv", "name another file"),
        ("no/out.tsv", "make it first"),
        ("out.parquet", "pip install 'vidjax[parquet]'", "-e '.[parquet]'", "or end the name in"),
    ):  # fmt: skip
        refused(functools.partial(tables.check_new, tmp_path / name), *remedies)
    error = refused(lambda: tables.check_new(tmp_path / "out.parquet", (".parquet",)), "[parquet]")
    assert "end the name" not in error  # no other ending is allowed


def test_load_clips_reads_every_layout_without_labels(official_dir, tmp_path, tables_here):
    clips, face = make_clips(), {"face": np.ones((1, DIM), np.float32)}
    table = clip_files.write_parquet(tmp_path / "test.parquet", clips)
    clip_files.write_npz(tmp_path, {"arrays": {"Ada Byron": face, "b.mp4": face}})
    load = functools.partial(load_clips, modalities={"face": DIM}, identities=("Ada",))
    assert {*load(table).names} == {*clips}
    assert {*load(tmp_path).names} == {*clips}, "in a folder with a table, only tables are read"
    assert {*load(tmp_path / "arrays").names} == {"Ada Byron", "b.mp4"}
    for path in (table, tmp_path, tmp_path / "arrays"):
        refused(functools.partial(load, path, split="val"), "has no split")
    refused(lambda: load(tmp_path / "none.parquet"), "does not exist")
    # Official files need a split and their modalities.
    load = functools.partial(load_clips, official_dir, identities=())
    two_of_three = {name: clip_files.WIDTHS[name] for name in ("face", "audio")}
    val = load(two_of_three, split="val")  # clips in memory have one split, of any name
    assert len(val.names) == len(val.split("any name").clips) == clip_files.CLIPS["val"]
    refused(lambda: load(two_of_three), "--config.eval.split=")
    refused(lambda: load(two_of_three, split="dev"), "no split 'dev'", "--config.eval.split=")
    refused(lambda: load({"voice": 3}, split="val"), "audio", "but the run reads voice")


@pytest.mark.slow
def test_rank_command_writes_the_ranking_of_predict(nearest_run, tmp_path, command):
    clips, out = make_clips(), tmp_path / "out.tsv"
    table = clip_files.write_parquet(tmp_path / "new.parquet", clips)
    before = made_runs.snapshot(nearest_run)
    words = ("rank", f"--workdir={nearest_run}", f"--input={table}")
    done = command(*words, f"--out={out}", "--json")
    facts = json.loads(done.out)
    assert facts["num_clips"] == len(clips) and min(facts["seconds"], facts["clips_per_second"]) > 0
    assert f"rank: {len(clips)} of {len(clips)} clips" in done.err
    wanted = rows_of(vidjax.restore(nearest_run).rank(clips))
    assert [(*row[:3], np.float32(row[3])) for row in read(out)] == wanted
    assert made_runs.snapshot(nearest_run) == before
    assert command(*words, f"--out={out}").refused("name another file, or delete it")
    # `vidjax rank` does not train, so it has no seed. The error names a field of `vidjax rank`.
    other = (f"--out={tmp_path}/b.tsv", "--config.seed=1")
    assert command(*words, *other).refused("--config.eval.split")


def top_of(*rows):
    """Returns lists of clip numbers. All scores are -inf; these clips are written nevertheless."""
    index = np.full((len(rows), 100), topk.NO_CLIP, np.int32)
    for row, places in zip(index, rows, strict=True):
        row[: len(places)] = places
    return topk.TopK(np.full(index.shape, -np.inf, np.float32), index)


def test_write_ranking_round_trips_and_refuses_repeated_or_invalid_names(tmp_path):
    path = tmp_path / "ranking.txt"
    clips = ["b", "a.mp4", "../up", "日本語", "x" * 300]
    ranking.write_ranking(path, ["195", "7"], clips, top_of([4, 0, 1], [2, 3]))
    text = f"195 {'x' * 300}.mp4 b.mp4 a.mp4\n7 ../up.mp4 日本語.mp4\n"
    assert path.read_text(encoding="utf-8") == text
    lists = {"195": ["x" * 300 + ".mp4", "b.mp4", "a.mp4"], "7": ["../up.mp4", "日本語.mp4"]}
    assert made_runs.lists(path) == lists
    for identities, names, rows, message in (
        (["1"], ["a", "a.mp4"], [[0]], r"clip 'a\.mp4' is repeated"),
        (["1", "1"], ["a"], [[0], [0]], "identity '1' is repeated"),
        (["1", "2"], ["a"], [[0]], "2 identities, but 1 ranked"),
    ):
        with pytest.raises(ValueError, match=message):
            ranking.write_ranking(path, identities, names, top_of(*rows))
    # Names that would break the file. Clips may be called "" and " ", because .mp4 is added.
    for bad in ("", " ", "a\tb", "a\nb", "a\u2028b", "a\x1bb", "a\udc80b"):
        bad_clip = bad if bad.strip() else "\n"
        for identities, clips in ((["1"], ["ok", bad_clip]), ([bad], ["ok", "fine"])):
            with pytest.raises(ValueError, match=r"rename it|is empty"):
                ranking.write_ranking(path, identities, clips, top_of([0]))
    assert {x.name: x.read_text("utf-8") for x in tmp_path.iterdir()} == {"ranking.txt": text}


def test_score_command_prints_the_score_on_the_last_line_and_hints(tmp_path, command):
    paths = write_pair(tmp_path, "1 a.mp4 b.mp4\n2 c.mp4\n3 d.mp4", "1 a.mp4 x.mp4 b.mp4\n3 d.mp4")
    # The APs of the three identities are (1/1 + 2/3) / 2, 0 and 1. Their mean is 11/18.
    for words in (paths, [*paths, "--strict"]):
        code, out, err = command("score", *words)
        assert (code, err) == (0, "")
        assert float(out.splitlines()[-1]) == pytest.approx(11 / 18, rel=0, abs=1e-15)
        assert "3 identities, 4 clips\n" in out
        assert "2 of them ranked, 1 missing, 0 identities unknown and ignored" in out
    out = command("score", *write_pair(tmp_path, "1 a.mp4\n", "1 a.mp4\n2 b.mp4\n")).out
    assert "1 identity, 1 clip\n" in out and "0 missing, 1 identity unknown and ignored" in out
    # A score of 0 without any match gets a hint.
    for submission, hint in (("1 a b\n", "no clip"), ("id1 a.mp4\n", "no identity")):
        code, out, err = command("score", *write_pair(tmp_path, "1 a.mp4\n", submission))
        assert (code, out.splitlines()[-1]) == (0, "0") and hint in err


# Fault of a submission -> submission, score against "1 a.mp4", words of the warning.
FAULTS = {
    "repeated clip": ("1 x.mp4 x.mp4 a.mp4\n", "0.5", "line 1: 'x.mp4'"),
    "byte order mark": ("\ufeff1 a.mp4\n", "0", "line 1: a byte order mark precedes identity '1'"),
    "line ends of old Macs": ("1 x.mp4 a.mp4\r", "0.5", "lines end as on old Macs"),
    "no ending": ("1 a x.mp4\n", "0", "line 1: the iQIYI-VID script does not find 'a'"),
    "another ending": ("1 x.mp4 a.MP4\n", "0", "the ground truth has 'a.mp4': write the same"),
    "unknown identity": ("1 a.mp4\n7 a.mp4\n", "1", "line 2: identity '7'"),
    "repeated identity": ("1 x.mp4 a.mp4\n1 a.mp4\n", "1", "line 2: identity '1'"),
    "long name": ("1 a.mp4" + 2 * (" " + 999 * "x") + "\n", "1", f"'{100 * 'x'}...' is repeated"),
    "empty line": ("\n1 a.mp4\n", "1", "line 1"),
    "tab": ("1\ta.mp4\n", "1", "line 1: fields"),
    "no-break space": ("1 x.mp4\u00a0a.mp4\n", "0.5", "line 1: fields"),
    "not UTF-8": ("1 x\udcff.mp4 a.mp4\n", "0.5", "line 1: the line is not UTF-8"),
    "empty file": ("", "0", "the file is empty"),
    # Macs write an accent as a letter of its own. The script compares exact strings.
    "another form": ("1 e\u0301.mp4\n", "0", "in another Unicode form: write the same name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_ranking_faults_warn_and_are_errors_with_strict(tmp_path, command, fault):
    submission, score, words = FAULTS[fault]
    truth = "1 \u00e9.mp4\n" if fault == "another form" else "1 a.mp4\n"
    paths = write_pair(tmp_path, truth, submission)
    code, out, err = command("score", *paths)
    assert (code, out.splitlines()[-1]) == (0, score)
    warning = err.splitlines()[0]
    assert warning.startswith(f"vidjax: warning: {paths[1]}: ") and words in warning
    error = f"{warning.replace('warning', 'error', 1)}\n"
    assert command("score", *paths, "--strict") == (2, "", error)


@pytest.mark.parametrize("suffix", tables.ENDINGS)
def test_score_refuses_the_tables_of_rank(tmp_path, command, suffix):
    truth, path = tmp_path / "gt.txt", tmp_path / f"out{suffix}"
    truth.write_text("1 a.mp4\n")
    tables.write_ranking(path, {"1": [("a.mp4", 0.5)]})
    assert command("score", truth, path).refused(f"{path}: this is a table", "ranking.txt")


@pytest.mark.parametrize("strict", [[], ["--strict"]])
def test_submission_that_the_script_refuses_is_refused(tmp_path, command, strict):
    paths = write_pair(tmp_path, "1 a.mp4\n", f"2 a.mp4\n1 a.mp4 {MANY}\n")
    answer = command("score", *paths, *strict)
    assert answer.refused("ranking.txt: line 2: the line has 102 clips", "name at most 100")
    # A clip that is repeated counts once.
    paths = write_pair(tmp_path, "1 x0.mp4\n", f"1 {MANY.replace('x100', 'x99')}\n")
    assert command("score", *paths).out.splitlines()[-1] == "1"


# Clip -> identity. Blanks are written %20. A % before two hexadecimal digits is written %25, but a
# user may have forgotten it, as in the second line of TRUTH for the clip `d%20e`.
CLIPS = {"a": "Ada", "b c": "Bo B", "d%20e": "Bo B", "f%2Fg": "x%2Fy", "100%": "7"}
TRUTH = {
    "train_gt.txt": "a.mp4 Ada\nd%20e.mp4 Bo%20B\nb%20c.mp4 Bo%20B\nf%2Fg.mp4 x%2Fy\n100%.mp4 7\n",
    "val_gt.txt": "Ada a.mp4\nBo%20B d%20e.mp4 b%20c.mp4\nx%2Fy f%2Fg.mp4\n7 100%.mp4\n",
}
FORMS = {
    "official": lambda text: text,
    "no endings": lambda text: text.replace(".mp4", ""),
    "an ending less": lambda text: text.replace("e.mp4", "e"),
    "two endings": lambda text: text.replace(".mp4", ".mp4.mp4"),
    "old Mac": lambda text: text.replace("\n", "\r"),
    "Windows": lambda text: "\ufeff" + text.replace("\n", "\r\n"),
    "empty lines": lambda text: "\n \n" + text.replace("\n", "\n\n"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TRUTH)
def test_perfect_ranking_scores_1_with_any_truth_that_training_reads(tmp_path, command, name, form):
    truth = tmp_path / name
    truth.write_bytes(FORMS[form](TRUTH[name]).encode())
    assert labels.load_label_table(truth, {"val": [*CLIPS]})["val"] == CLIPS
    people, clips, path = sorted({*CLIPS.values()}), [*CLIPS], tmp_path / "ranking.txt"
    rows = [[n for n, clip in enumerate(clips) if CLIPS[clip] == person] for person in people]
    ranking.write_ranking(path, people, clips, top_of(*rows))
    words = {"empty lines": "line 1: the line is empty", "Windows": "line 1: a byte order mark pre"}
    with pytest.warns(UserWarning, match=words[form]) if form in words else nullcontext():
        done = command("score", truth, path, "--strict")
    assert (done.code, done.out.splitlines()[-1], done.err) == (0, "1", "")


def test_ground_truth_whose_identity_is_0_is_refused_as_in_training(tmp_path, command):
    paths = write_pair(tmp_path, "a.mp4 0\nb.mp4 1\n", "1 b.mp4\n")
    assert command("score", *paths).refused("gt.txt: line 1: identity 0", "from 1")
    # Without .mp4, the lines decide, if the name of the file does not.
    for truth in ("1 a b\n2 c\n", "a 1\nb 1\n"):
        paths = write_pair(tmp_path, truth, "1 a.mp4 b.mp4\n2 c.mp4\n")
        assert command("score", *paths).out.splitlines()[-1] == "1"
    paths = write_pair(tmp_path, "1 a\n2 b\n", "1 a\n")
    assert command("score", *paths).refused("no name ends in .mp4")


def test_text_that_is_too_large_for_the_memory_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "gt.txt"
    path.write_text("a.mp4 1\n")  # 8 bytes, which may need 60 times as much memory
    for reader in (ranking.read_ground_truth, ranking.read_submission, labels.load_ground_truth):
        monkeypatch.setattr("vidjax.utils.files.reading.memory_bytes", lambda: 60 * 8)
        reader(path)
        monkeypatch.setattr("vidjax.utils.files.reading.memory_bytes", lambda: 60 * 8 - 1)
        refused(lambda reader=reader: reader(path), "gt.txt' is too large", "remove lines")
