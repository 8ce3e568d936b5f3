"""Files of rankings ("submissions") are written, read and scored."""

import numpy as np
import pytest

from tests.helpers import made_runs
from tests.helpers.seen import refused
from vidjax.data import labels
from vidjax.evaluation import ranking, topk


def top_of(*rows):
    """Returns lists of clip numbers. All scores are -inf; these clips are written nevertheless."""
    index = np.full((len(rows), 100), topk.NO_CLIP, np.int32)
    for row, places in zip(index, rows, strict=True):
        row[: len(places)] = places
    return topk.TopK(np.full(index.shape, -np.inf, np.float32), index)


def test_write_ranking_round_trips_and_refuses_repeated_names(tmp_path):
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
    assert [file.name for file in tmp_path.iterdir()] == ["ranking.txt"]
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("bad", ["", " ", "a\tb", "a\nb", "a\u2028b", "a\x1bb", "a\udc80b"])
def test_write_ranking_refuses_names_that_would_break_the_file(tmp_path, bad):
    path = tmp_path / "ranking.txt"
    path.write_text("before")
    # Clips may have the names "" and " ", because .mp4 is added to names of clips.
    bad_clip = bad if bad.strip() else "\n"
    for identities, clips in ((["1"], ["ok", bad_clip]), ([bad], ["ok", "fine"])):
        with pytest.raises(ValueError, match=r"rename it|is empty"):
            ranking.write_ranking(path, identities, clips, top_of([0]))
    assert path.read_text() == "before"


MANY = " ".join(f"x{i}.mp4" for i in range(101))  # only the first 100 clips of a line count


def write(folder, truth, submission):
    """Writes a ground truth and a submission; returns their paths."""
    paths = folder / "gt.txt", folder / "ranking.txt"
    for path, text in zip(paths, (truth, submission), strict=True):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return paths


def test_score_command_prints_the_score_on_the_last_line(tmp_path, command):
    paths = write(tmp_path, "1 a.mp4 b.mp4\n2 c.mp4\n3 d.mp4\n", "1 a.mp4 x.mp4 b.mp4\n3 d.mp4\n")
    # The APs of the three identities are (1/1 + 2/3) / 2, 0 and 1. Their mean is 11/18.
    for words in (paths, [*paths, "--strict"]):
        code, out, err = command("score", *words)
        assert (code, err) == (0, "")
        assert float(out.splitlines()[-1]) == pytest.approx(11 / 18, rel=0, abs=1e-15)
        assert "3 identities, 4 clips\n" in out
        assert "2 of them ranked, 1 missing, 0 identities unknown and ignored" in out
    out = command("score", *write(tmp_path, "1 a.mp4\n", "1 a.mp4\n2 b.mp4\n")).out
    assert "1 identity, 1 clip\n" in out and "0 missing, 1 identity unknown and ignored" in out


def test_score_of_0_without_any_match_prints_a_hint(tmp_path, command):
    for submission, hint in (("1 a b\n", "no clip"), ("id1 a.mp4\n", "no identity")):
        code, out, err = command("score", *write(tmp_path, "1 a.mp4\n", submission))
        assert (code, out.splitlines()[-1]) == (0, "0")
        assert hint in err


# Fault of a submission -> submission, score against "1 a.mp4", words of the warning.
FAULTS = {
    "repeated clip": ("1 x.mp4 x.mp4 a.mp4\n", "0.5", "line 1: 'x.mp4'"),
    "102 clips, hit first": (f"1 a.mp4 {MANY}\n", "1", "line 1: the line has 102 clips"),
    "102 clips, hit last": (f"1 {MANY} a.mp4\n", "0", "line 1: the line has 102 clips"),
    "unknown identity": ("1 a.mp4\n7 a.mp4\n", "1", "line 2: identity '7'"),
    "repeated identity": ("1 x.mp4 a.mp4\n1 a.mp4\n", "1", "line 2: identity '1'"),
    "long name": ("1 a.mp4" + 2 * (" " + 999 * "x") + "\n", "1", f"'{100 * 'x'}...' is repeated"),
    "empty line": ("\n1 a.mp4\n", "1", "line 1"),
    "tab": ("1\ta.mp4\n", "1", "line 1: fields"),
    "no-break space": ("1 x.mp4\u00a0a.mp4\n", "0.5", "line 1: fields"),
    "not UTF-8": ("1 x\udcff.mp4 a.mp4\n", "0.5", "line 1: the line is not UTF-8"),
    "empty file": ("", "0", "the file is empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_ranking_faults_warn_and_are_errors_with_strict(tmp_path, command, fault):
    submission, score, words = FAULTS[fault]
    paths = write(tmp_path, "1 a.mp4\n", submission)

    code, out, err = command("score", *paths)
    assert (code, out.splitlines()[-1]) == (0, score)
    warning = err.splitlines()[0]
    assert warning.startswith(f"vidjax: warning: {paths[1]}: ") and words in warning

    error = f"{warning.replace('warning', 'error', 1)}\n"
    assert command("score", *paths, "--strict") == (2, "", error)


def test_text_that_is_too_large_for_the_memory_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "gt.txt"
    path.write_text("a.mp4 1\n")  # 8 bytes, which may need 60 times as much memory
    for reader in (ranking.read_ground_truth, ranking.read_submission, labels.load_ground_truth):
        monkeypatch.setattr("vidjax.utils.files.reading.memory_bytes", lambda: 60 * 8)
        reader(path)
        monkeypatch.setattr("vidjax.utils.files.reading.memory_bytes", lambda: 60 * 8 - 1)
        refused(lambda reader=reader: reader(path), "gt.txt' is too large", "remove lines")
