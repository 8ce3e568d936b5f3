"""The streaming top k against a full sort, and the submission file in both directions."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidjax import devices, ranking

C, K = 7, 20


def full_sort(scores: np.ndarray, clip_index: np.ndarray, k: int) -> ranking.TopK:
    """The oracle: every score of every clip, sorted by two keys."""
    num_identities = scores.shape[1]
    best = np.full((num_identities, k), -np.inf, np.float32)
    index = np.full((num_identities, k), ranking.NO_CLIP, np.int32)
    for c in range(num_identities):
        order = np.lexsort((clip_index, -scores[:, c]))[:k]
        best[c, : len(order)] = scores[order, c]
        index[c, : len(order)] = clip_index[order]
    return ranking.TopK(best, index)


def blocks_of(scores, clip_index, rows, rng):
    """Blocks of `rows` with padded rows among them, which hold what would win."""
    taken = 0
    while taken < len(scores):
        real = np.zeros(rows, bool)
        real[rng.permutation(rows)[: rng.integers(1, rows + 1)]] = True
        real[np.flatnonzero(real)[len(scores) - taken :]] = False
        block = np.full((rows, scores.shape[1]), np.inf, np.float32)
        index = np.zeros(rows, np.int32)
        block[real] = scores[taken : taken + real.sum()]
        index[real] = clip_index[taken : taken + real.sum()]
        taken += real.sum()
        yield block, index, real


def assert_exact(top: ranking.TopK, expected: ranking.TopK):
    np.testing.assert_array_equal(top.index, expected.index)
    np.testing.assert_array_equal(top.scores, expected.scores)


def with_silent_clips(scores, rng):
    silent = rng.random(len(scores)) < 0.9  # fewer finite clips than places
    return np.where(silent[:, None], -np.inf, scores)


STREAMS = {
    "random": lambda s, rng: s,
    "ascending": lambda s, rng: np.sort(s, axis=0),
    "descending": lambda s, rng: -np.sort(-s, axis=0),
    "all equal": lambda s, rng: np.zeros_like(s),
    "two values": lambda s, rng: np.sign(s),
    "few values": lambda s, rng: np.round(2 * s),
    "silent clips": with_silent_clips,
    "nothing but silence": lambda s, rng: np.full_like(s, -np.inf),
    "one part in a thousand apart": lambda s, rng: np.round(s) * np.float32(1 + 1e-7),
    "infinite": lambda s, rng: np.where(s > 1, np.inf, s),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("num_clips", [1, 19, 150])
@pytest.mark.parametrize("order", ["as they are", "reversed", "shuffled"])
def test_equals_a_full_sort(name, num_clips, order):
    rng = np.random.default_rng(num_clips)
    scores = STREAMS[name](rng.standard_normal((num_clips, C), np.float32), rng)
    scores = scores.astype(np.float32)
    clip_index = np.sort(rng.choice(10**6, num_clips, replace=False)).astype(np.int32)
    expected = full_sort(scores, clip_index, K)
    steps = {"as they are": np.arange(num_clips), "reversed": np.arange(num_clips)[::-1]}
    order = steps.get(order, rng.permutation(num_clips))
    scores, clip_index = scores[order], clip_index[order]
    for rows, gathered in ((16, 16), (16, 48)):
        stream = blocks_of(scores, clip_index, rows, rng)
        assert_exact(ranking.rank(stream, C, K, rows=gathered), expected)


def test_equals_a_full_sort_when_identities_take_several_chunks(monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK", 3)  # 7 identities: the last chunk overlaps
    rng = np.random.default_rng(0)
    scores = np.round(4 * rng.standard_normal((90, C), np.float32))
    clip_index = rng.permutation(90).astype(np.int32)
    top = ranking.init_top(C, K)
    for block in blocks_of(scores, clip_index, 30, rng):
        top = jax.jit(ranking.update_top)(top, [block])
    assert_exact(ranking.finish_top(top), full_sort(scores, clip_index, K))


@pytest.mark.parametrize("name", STREAMS)
def test_equals_a_full_sort_where_few_rows_are_looked_into(name, monkeypatch):
    monkeypatch.setattr(ranking, "GROUP", 4)
    monkeypatch.setattr(ranking, "MOST_GROUPS", (1, 3))
    rng = np.random.default_rng(1)
    scores = STREAMS[name](rng.standard_normal((1500, C), np.float32), rng).astype(np.float32)
    clip_index = rng.permutation(1500).astype(np.int32)
    top, most = ranking.init_top(C, K), []
    update = jax.jit(lambda top, block: ranking.update_top(top, [block]))
    for block in blocks_of(scores, clip_index, 60, rng):  # 15 groups
        rows = np.where(block[2][:, None], block[0], -np.inf).reshape(15, 4, C).max(axis=1)
        least = np.min(top.scores, axis=1)
        most.append(np.max(np.sum(rows >= least, axis=0)))
        top = update(top, block)
    assert_exact(ranking.finish_top(top), full_sort(scores, clip_index, K))
    assert most[0] > 3
    if name in ("random", "descending"):
        assert min(most) <= 1, "rows were never left out"
    if name == "random":
        assert 2 in most or 3 in most


def test_a_tie_of_two_over_the_last_place():
    scores = np.array([[5], [4], [3], [3], [2]], np.float32)
    clips = np.array([7, 8, 6, 2, 0], np.int32)
    for order in ([0, 1, 2, 3, 4], [3, 4, 0, 1, 2], [2, 1, 4, 0, 3]):
        stream = [(scores[[i]], clips[[i]], np.ones(1, bool)) for i in order]
        for rows in (1, 3, 5):
            assert ranking.rank(stream, 1, 3, rows=rows).index.tolist() == [[7, 8, 2]]


def test_scores_split_over_devices():
    mesh = devices.make_mesh(8)
    rng = np.random.default_rng(0)
    scores = np.round(4 * rng.standard_normal((256, C), np.float32))
    clip_index = rng.permutation(256).astype(np.int32)
    blocks = list(blocks_of(scores, clip_index, 32, rng))
    split = [jax.device_put(block, devices.by_rows(mesh)) for block in blocks]
    expected = full_sort(scores, clip_index, K)
    assert_exact(ranking.rank(split, C, K, rows=64), expected)
    top = jax.jit(ranking.update_top)(devices.replicate(mesh, ranking.init_top(C, K)), split)
    assert_exact(jax.jit(ranking.finish_top)(top), expected)


def test_one_program_however_the_stream_ends():
    rng = np.random.default_rng(0)
    shape, before = (5, 12), ranking.update_top
    traces = []

    def counted(top, blocks):
        traces.append(len(blocks))
        return before(top, blocks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_update", jax.jit(counted))
        for count in (4, 5, 7):
            clips = np.arange(shape[0] * count, dtype=np.int32).reshape(count, -1)
            scores = rng.standard_normal((count, *shape), np.float32)
            blocks = zip(scores, clips, np.ones((count, shape[0]), bool), strict=True)
            ranking.rank(blocks, shape[1], 8, rows=10)
    assert traces == [2]


def test_scores_that_no_order_could_rely_on():
    tiny = np.float32(1e-40)  # flushed to 0 on some backends and not on others
    scores = np.array([[np.nan], [0.0], [-0.0], [tiny], [-tiny], [-np.inf], [-1.0]], np.float32)
    clips = np.array([0, 6, 5, 4, 3, 2, 1], np.int32)
    top = ranking.rank([(scores, clips, np.ones(7, bool))], 1, 7)
    assert top.index.tolist() == [[3, 4, 5, 6, 1, 0, 2]]
    assert top.scores.tolist() == [[0.0, 0.0, 0.0, 0.0, -1.0, -np.inf, -np.inf]]


def test_clip_indices_beyond_what_a_float32_holds():
    clips = np.array([2**24 + 1, 2**24, 2**30 + 1, 2**30, 2**31 - 2**25 - 1], np.int32)
    blocks = [(np.zeros((1, 3), np.float32), clip[None], np.ones(1, bool)) for clip in clips]
    for k in (1, 4):
        for stream in (blocks, blocks[::-1]):
            top = ranking.rank(stream, 3, k, rows=1)
            np.testing.assert_array_equal(top.index, np.tile(np.sort(clips)[:k], (3, 1)))


def test_no_block_is_an_empty_ranking():
    top = ranking.rank([], 3, 5)
    assert (top.index == ranking.NO_CLIP).all() and (top.scores == -np.inf).all()


def test_bfloat16_scores_are_ranked_as_they_are():
    scores = jnp.arange(8, dtype=jnp.bfloat16)[:, None]
    top = ranking.rank([(scores, np.arange(8, dtype=np.int32), np.ones(8, bool))], 1, 3)
    assert top.index.tolist() == [[7, 6, 5]] and top.scores.dtype == np.float32


def top_of(*rows):
    index = np.full((len(rows), 100), ranking.NO_CLIP, np.int32)
    for row, places in zip(index, rows, strict=True):
        row[: len(places)] = places
    return ranking.TopK(np.zeros(index.shape, np.float32), index)


def test_a_ranking_round_trips(tmp_path):
    path = tmp_path / "ranking.txt"
    clips = ["b", "a.mp4", "../up", "日本語", "x" * 300]
    ranking.write_ranking(path, ["195", "7"], clips, top_of([4, 0, 1], [2, 3]))
    text = f"195 {'x' * 300}.mp4 b.mp4 a.mp4\n7 ../up.mp4 日本語.mp4\n"
    assert path.read_text(encoding="utf-8") == text
    assert ranking.load_ranking(path, identities={"7", "195"}) == {
        "195": ["x" * 300 + ".mp4", "b.mp4", "a.mp4"],
        "7": ["../up.mp4", "日本語.mp4"],
    }
    assert [file.name for file in tmp_path.iterdir()] == ["ranking.txt"]


def test_a_silent_clip_is_listed_last_and_an_empty_place_never(tmp_path):
    scores = np.array([[-np.inf], [-3.0], [-np.inf], [5.0]], np.float32)
    block = (scores, np.array([2, 1, 0, 3], np.int32), np.array([True, True, True, False]))
    top = ranking.rank([block], 1)
    ranking.write_ranking(tmp_path / "r.txt", ["1"], ["a", "b", "c", "d"], top)
    assert (tmp_path / "r.txt").read_text() == "1 b.mp4 a.mp4 c.mp4\n"


@pytest.mark.parametrize("bad", ["", "a b", "a\tb", "a\nb", "a\u00a0b"])
def test_names_that_would_break_the_file_are_refused(tmp_path, bad):
    path = tmp_path / "ranking.txt"
    path.write_text("before")
    for identities, clips in ((["1"], ["ok", bad or " "]), ([bad], ["ok", "fine"])):
        with pytest.raises(ValueError, match="white space"):
            ranking.write_ranking(path, identities, clips, top_of([0]))
    assert path.read_text() == "before"


def test_repeated_names_and_wrong_counts_are_refused(tmp_path):
    path = tmp_path / "ranking.txt"
    with pytest.raises(ValueError, match=r"clip 'a\.mp4' is repeated"):
        ranking.write_ranking(path, ["1"], ["a", "a.mp4"], top_of([0]))
    with pytest.raises(ValueError, match="identity '1' is repeated"):
        ranking.write_ranking(path, ["1", "1"], ["a"], top_of([0], [0]))
    with pytest.raises(ValueError, match="2 identities, 1 ranked"):
        ranking.write_ranking(path, ["1", "2"], ["a"], top_of([0]))
    assert not path.exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ranking.txt"
    path.write_text("before")

    def full(descriptor):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        ranking.write_ranking(path, ["1"], ["a"], top_of([0]))
    assert [file.name for file in tmp_path.iterdir()] == ["ranking.txt"]
    assert path.read_text() == "before"


MANY = " ".join(f"x{i}.mp4" for i in range(101))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"1 a.mp4\n\n2 b.mp4\n", "line 2: the line is empty"),
        (b"1 a.mp4\n2 b.mp4 c.mp4 b.mp4\n", r"line 2: 'b\.mp4' is repeated"),
        (b"1 a.mp4\n2 b.mp4\n1 c.mp4\n", "line 3: identity '1' has a line already"),
        (b"1 a.mp4\n9 b.mp4\n", "line 2: identity '9' is unknown"),
        (f"1 {MANY}\n".encode(), "line 1: 101 names, at most 100"),
        (b"1\ta.mp4\n", "line 1: fields"),
        (b"1 a.mp4\n2 \xff.mp4\n", "line 2: not UTF-8"),
        (b"", "the file is empty"),
    ],
)
def test_faults_of_a_submission_are_named_by_line(tmp_path, text, message):
    path = tmp_path / "ranking.txt"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        ranking.load_ranking(path, identities={"1", "2"})


def test_many_faults_are_three_lines(tmp_path):
    path = tmp_path / "ranking.txt"
    path.write_text("".join(f"{i} a.mp4 a.mp4\n" for i in range(9)))
    with pytest.raises(ValueError, match=r"line 1:.*\n.*line 2:.*\nand 7 more$"):
        ranking.load_ranking(path)


@pytest.fixture
def files(tmp_path):
    """A function that writes a ground truth and a submission."""

    def write(gt, submission):
        paths = tmp_path / "gt.txt", tmp_path / "ranking.txt"
        for path, text in zip(paths, (gt, submission), strict=True):
            path.write_text(text, encoding="utf-8")
        return [str(path) for path in paths]

    return write


def test_main_prints_the_score_last(files, capsys):
    paths = files("1 a.mp4 b.mp4\n2 c.mp4\n3 d.mp4\n", "1 a.mp4 x.mp4 b.mp4\n3 d.mp4\n8 a.mp4\n")
    assert ranking.main(paths) == 0
    out, err = capsys.readouterr()
    assert float(out.splitlines()[-1]) == ranking.score_files(*paths)
    assert float(out.splitlines()[-1]) == pytest.approx(11 / 18, rel=0, abs=1e-15)
    assert "2 of them ranked, 1 missing, 1 others ignored" in out and err == ""


def test_main_scores_repeats_but_names_the_fault(files, capsys):
    paths = files("1 a.mp4\n", "1 x.mp4 x.mp4 a.mp4\n")
    assert ranking.main(paths) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "0.5" and "line 1" in err


@pytest.mark.parametrize(
    ("gt", "submission", "hint"),
    [("1 a.mp4\n", "1 a b\n", "suffix"), ("1 a.mp4\n", "id1 a.mp4\n", "no identity")],
)
def test_main_hints_when_nothing_matches(files, capsys, gt, submission, hint):
    assert ranking.main(files(gt, submission)) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "0" and hint in err and len(err.splitlines()) == 1


def test_main_refuses_in_a_line(files, capsys, tmp_path):
    gt, submission = files("1 a.mp4\n\n", "1 a.mp4\n")
    for arguments in ([gt, submission], [str(tmp_path / "none"), submission], [gt, str(tmp_path)]):
        assert ranking.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and str(tmp_path) in err
    for arguments in ([], [gt], [gt, submission, "more"], ["--fast", gt, submission]):
        with pytest.raises(SystemExit) as stop:
            ranking.main(arguments)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) <= 3


def test_the_command_needs_no_tensorflow(files):
    paths = files("1 a.mp4\n", "1 x.mp4 a.mp4\n")
    program = "import sys; sys.modules['tensorflow'] = None; import runpy; sys.argv[1:] = {}; "
    program += "runpy.run_module('vidjax.ranking', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program.format(paths)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, done.stdout.split()[-1]) == (0, "", "0.5")
