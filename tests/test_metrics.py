"""The metrics against oracles, the hand, and a library where the definitions agree."""

from fractions import Fraction
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import pytrec_eval
from sklearn.metrics import roc_auc_score

from tests.helpers import map_oracle
from vidjax.core import metrics
from vidjax.evaluation import ranking, topk

F = Fraction
MANY = [f"p{i}.mp4" for i in range(150)]
JUNK = [f"x{i}.mp4" for i in range(100)]

# (name, ground truth, ranking, score by hand)
BY_HAND = [
    ("one hit, first", "1 a.mp4", "1 a.mp4", F(1)),
    ("one hit, second", "1 a.mp4", "1 x.mp4 a.mp4", F(1, 2)),
    ("one hit, last of 100", "1 a.mp4", "1 " + " ".join([*JUNK[:99], "a.mp4"]), F(1, 100)),
    ("no hit", "1 a.mp4", "1 x.mp4 y.mp4", F(0)),
    ("both found", "1 a.mp4 b.mp4", "1 b.mp4 a.mp4", F(1)),
    ("1/1 and 2/3 of 2", "1 a.mp4 b.mp4", "1 a.mp4 x.mp4 b.mp4", F(5, 6)),
    ("1/2 and 2/4 of 2", "1 a.mp4 b.mp4", "1 x.mp4 a.mp4 y.mp4 b.mp4", F(1, 2)),
    ("half the positives not returned", "1 a.mp4 b.mp4", "1 a.mp4", F(1, 2)),
    ("150 positives, 100 hits", "1 " + " ".join(MANY), "1 " + " ".join(MANY[:100]), F(2, 3)),
    ("identity missing from the submission", "1 a.mp4\n2 b.mp4", "1 a.mp4", F(1, 2)),
    ("identity without a name", "1 a.mp4\n2 b.mp4", "1 a.mp4\n2", F(1, 2)),
    ("identity not in the ground truth", "1 a.mp4", "1 a.mp4\n7 a.mp4", F(1)),
    ("the names of the other identity", "1 a.mp4\n2 b.mp4", "1 b.mp4\n2 a.mp4", F(0)),
    ("a repeat before the hit", "1 a.mp4", "1 x.mp4 x.mp4 a.mp4", F(1, 2)),
    ("a hit repeated", "1 a.mp4 b.mp4", "1 a.mp4 a.mp4 x.mp4 b.mp4", F(5, 6)),
    (
        "100 names and a repeat",
        "1 a.mp4",
        "1 " + " ".join(["x0.mp4", *JUNK[:99], "a.mp4"]),
        F(1, 100),
    ),
    ("suffix in one file only", "1 a.mp4 b.mp4", "1 a b", F(0)),
    ("ground truth clip by clip", "a.mp4 1\nb.mp4 2\nc.mp4 1", "1 a.mp4 c.mp4\n2 c.mp4", F(1, 2)),
    ("CRLF, BOM, trailing blank", "\ufeff1 a.mp4 b.mp4 \r\n", "1 x.mp4 a.mp4\r\n", F(1, 4)),
    ("101 names", "1 a.mp4 b.mp4", "1 a.mp4 " + " ".join([*JUNK[:98], "b.mp4", "y"]), F(51, 100)),
    ("the 101st name is the hit", "1 a.mp4", "1 " + " ".join([*JUNK, "a.mp4"]), F(0)),
    ("blank lines in the submission", "1 a.mp4\n2 b.mp4", "1 a.mp4\n \n\n2 b.mp4", F(1)),
    ("the last of two lines counts", "1 a.mp4", "1 a.mp4\n1 x.mp4 a.mp4", F(1, 2)),
    ("odd blanks", "1 a.mp4 b.mp4", " 1  x.mp4\ta.mp4   b.mp4\t", F(7, 12)),
    ("empty submission", "1 a.mp4", "", F(0)),
    ("5/6 of 3 and 1", "1 a.mp4 b.mp4 c.mp4\n2 d.mp4", "2 d.mp4\n1 x y a.mp4 b.mp4", F(23, 36)),
]  # fmt: skip

REFUSED = [
    ("blank line in the ground truth", "1 a.mp4\n\n2 b.mp4", "1 a.mp4", "line 2"),
    ("blank line at its end", "1 a.mp4\n\n", "1 a.mp4", "line 2"),
    ("identity twice in the ground truth", "1 a.mp4\n2 b.mp4\n1 c.mp4", "1 a.mp4", "line 3"),
    ("identity without a positive", "1 a.mp4 b.mp4\n2", "1 a.mp4", "line 2"),
    ("clip of two identities", "1 a.mp4\n2 b.mp4 a.mp4", "1 a.mp4", "line 2"),
    ("clip twice in a line", "1 a.mp4 a.mp4", "1 a.mp4", "line 1"),
    ("clip with two labels", "a.mp4 1\nb.mp4 1\na.mp4 2", "1 a.mp4", "line 3"),
    ("two labels in a line", "a.mp4 1\nb.mp4 1 2", "1 a.mp4", "line 2"),
    ("empty ground truth", "", "1 a.mp4", "gt"),
]


def score_files(gt, path):
    return ranking.score(ranking.read_ground_truth(gt), ranking.read_submission(path).ranking)


def write(folder: Path, gt: str, submission: str) -> tuple[Path, Path]:
    paths = folder / "gt.txt", folder / "ranking.txt"
    for path, text in zip(paths, (gt, submission), strict=True):
        path.write_bytes(text.encode())
    return paths


@pytest.mark.parametrize(("gt", "submission", "score"), [c[1:] for c in BY_HAND])
def test_by_hand(tmp_path, gt, submission, score):
    paths = write(tmp_path, gt, submission)
    assert map_oracle.mean_average_precision(*paths) == score
    assert score_files(*paths) == pytest.approx(float(score), rel=0, abs=1e-15)


@pytest.mark.parametrize(("gt", "submission", "where"), [c[1:] for c in REFUSED])
def test_a_ground_truth_refused_by_both_with_the_line(tmp_path, gt, submission, where):
    paths = write(tmp_path, gt, submission)
    with pytest.raises(map_oracle.Refused):
        map_oracle.mean_average_precision(*paths)
    with pytest.raises(ValueError, match=where):
        score_files(*paths)


def random_files(rng: np.random.Generator) -> tuple[str, str]:
    """A ground truth and a submission with every known quirk; some of the former are refused."""
    suffix = "" if rng.random() < 0.1 else ".mp4"
    clips = [f"IQIYI_VID_VAL_{i:07d}{suffix}" for i in rng.permutation(260)]
    identities = rng.permutation(40)[: rng.integers(1, 12)].tolist()
    positives, left = {}, clips[: rng.integers(170, 220)]
    for identity in identities:
        most = max(1, min(150, len(left) - 20) if rng.random() < 0.1 else 6)
        count = int(rng.integers(1, most + 1))
        positives[identity], left = left[:count], left[count:]
    if rng.random() < 0.3:
        rows = [f"{clip} {identity}" for identity, names in positives.items() for clip in names]
        rng.shuffle(rows)
    else:
        rows = [" ".join((str(i), *names)) for i, names in positives.items()]
    lines = []
    for identity in [*identities, *range(40, 43)]:
        if rng.random() < 0.1:
            continue
        own = positives.get(identity, [])
        pool = own + clips[len(clips) - int(rng.integers(0, 90)) :]
        names = rng.permutation(list(dict.fromkeys(pool)))[:100].tolist()
        while names and rng.random() < 0.3:  # a repeat
            names.insert(int(rng.integers(len(names) + 1)), names[int(rng.integers(len(names)))])
        lines.append(" ".join((str(identity), *names)))
    lines = rng.permutation(lines).tolist() or ["1"]
    for text in (rows, lines):  # refused in the ground truth, borne in the submission
        if rng.random() < 0.05:
            text.insert(int(rng.integers(len(text))), "")
        if rng.random() < 0.05:
            text.append(text[int(rng.integers(len(text)))])
    if rng.random() < 0.05:
        rows.append("39x")
    if rng.random() < 0.05:
        lines.append("44 " + " ".join(clips[:101]))
    if rng.random() < 0.05:
        lines[0] = "\t" + lines[0].replace(" ", "  ", 2)
    ends = [("\r\n" if rng.random() < 0.2 else "\n") for _ in range(2)]
    trail = " " if rng.random() < 0.3 else ""
    bom = "\ufeff" if rng.random() < 0.2 else ""
    gt, submission = (
        (trail + end).join(text) + (end if rng.random() < 0.8 else "")
        for text, end in zip((rows, lines), ends, strict=True)
    )
    return bom + gt, submission


@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.nightly)])
def test_random_files_against_the_oracle(tmp_path, number):
    rng = np.random.default_rng(0)
    scored, refused, partial = 0, 0, 0
    for case in range(number):
        gt, submission = random_files(rng)
        paths = write(tmp_path, gt, submission)
        try:
            expected = map_oracle.mean_average_precision(*paths)
        except map_oracle.Refused:
            refused += 1
            with pytest.raises(ValueError, match=r"gt\.txt: line \d+"):
                score_files(*paths)
            continue
        scored += 1
        partial += 0 < expected < 1
        assert abs(Fraction(score_files(*paths)) - expected) < Fraction(1, 10**12), case
    assert scored > 0.7 * number and refused > 0.1 * number and partial > 0.6 * number


def test_arrays_and_files_give_the_same_bits(tmp_path):
    rng = np.random.default_rng(1)
    num_identities, num_clips = 30, 400
    labels = rng.integers(0, num_identities - 1, num_clips)  # the last identities have none
    index = np.stack([rng.permutation(num_clips)[:100] for _ in range(num_identities)])
    index[3, 40:] = topk.NO_CLIP
    positives = np.bincount(labels, minlength=num_identities + 1)[1:]
    positives[5] += 2  # positives that no record holds
    score = metrics.mean_average_precision(index, labels, positives)

    clips = [f"c{i}" for i in range(num_clips)]
    identities = [str(c) for c in range(1, num_identities + 1)]
    names = {c: [f"c{i}.mp4" for i in np.flatnonzero(labels == c)] for c in range(1, 31)}
    names[6] += ["lost1.mp4", "lost2.mp4"]
    gt = "".join(f"{c} {' '.join(listed)}\n" for c, listed in names.items() if listed)
    gt_path, path = write(tmp_path, gt, "")
    top = topk.TopK(np.zeros(index.shape, np.float32), index.astype(np.int32))
    ranking.write_ranking(path, identities, clips, top)
    assert score_files(gt_path, path) == score
    assert abs(Fraction(score) - map_oracle.mean_average_precision(gt_path, path)) < 1e-12

    order = rng.permutation(num_identities)
    columns = np.append(0, np.argsort(order) + 1)
    shuffled = metrics.mean_average_precision(index[order], columns[labels], positives[order])
    assert shuffled == score


def test_equals_trec_eval_where_the_definitions_agree():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 6, 300)
    index = np.stack([rng.permutation(300)[:100] for _ in range(5)])
    positives = np.bincount(labels, minlength=6)[1:]
    qrels = {str(c): {str(i): int(labels[i] == c) for i in range(300)} for c in range(1, 6)}
    run = {str(c): {str(i): -float(r) for r, i in enumerate(index[c - 1])} for c in range(1, 6)}
    expected = pytrec_eval.RelevanceEvaluator(qrels, {"map"}).evaluate(run)
    hits = labels[index] == np.arange(1, 6)[:, None]
    ours = metrics.average_precision(hits, positives)
    np.testing.assert_allclose(ours, [expected[str(c)]["map"] for c in range(1, 6)], atol=1e-12)


def test_nothing_to_average_is_refused():
    with pytest.raises(ValueError, match="no identity"):
        metrics.mean_average_precision(np.zeros((2, 3), int), np.zeros(4, int), np.zeros(2, int))
    with pytest.raises(ValueError, match="more hits"):
        metrics.average_precision(np.ones((1, 2), bool), np.array([1]))


def test_no_clips_score_nothing():
    index = np.full((2, 100), topk.NO_CLIP)
    empty = np.zeros(0, int)
    assert metrics.mean_average_precision(index, empty, np.array([3, 0])) == 0.0
    assert metrics.mean_average_precision(np.zeros((1, 0), int), empty, np.array([3])) == 0.0


def tied_scores(rng: np.random.Generator, count: int) -> np.ndarray:
    """Scores with ties, -inf and a NaN."""
    scores = rng.integers(-5, 6, count).astype(np.float64) / 4 + rng.choice([0, 1e-9], count)
    scores[rng.random(count) < 0.1] = -np.inf
    scores[rng.random(count) < 0.02] = np.nan
    return scores


def slow_auroc(scores, positive):
    wins, pairs = F(0), 0
    scores = [-np.inf if np.isnan(score) else score for score in scores]
    for a in (s for s, p in zip(scores, positive, strict=True) if p):
        for b in (s for s, p in zip(scores, positive, strict=True) if not p):
            wins += F(1) if a > b else F(1, 2) if a == b else F(0)
            pairs += 1
    return wins / pairs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auroc_against_a_loop_and_a_library(dtype):
    rng = np.random.default_rng(3)
    for _ in range(30):
        scores = tied_scores(rng, 40).astype(dtype)
        positive = rng.random(40) < rng.uniform(0.1, 0.9)
        positive[:2] = True, False
        ours = metrics.auroc(scores, positive)
        assert type(ours) is float
        assert ours == pytest.approx(float(slow_auroc(scores, positive)), rel=0, abs=1e-15)
        finite = np.nan_to_num(scores, nan=-9, neginf=-9)
        assert ours == pytest.approx(roc_auc_score(positive, finite), rel=0, abs=1e-12)
        order = rng.permutation(40)
        assert metrics.auroc(scores[order], positive[order]) == ours
        assert metrics.auroc(-finite, positive) == pytest.approx(1 - ours, abs=1e-12)


def test_auroc_by_hand():
    assert metrics.auroc([1.0, 2.0, 3.0], [False, False, True]) == 1.0
    assert metrics.auroc([1, 2, 3], [True, False, False]) == 0.0
    assert metrics.auroc([-np.inf, -np.inf], [True, False]) == 0.5
    assert metrics.auroc(jnp.asarray([1.0, 1.0, 2.0]), jnp.asarray([True, False, False])) == 0.25
    assert metrics.auroc([1.0, 2.0], [True, True]) is None
    assert metrics.auroc([1.0, 2.0], [False, False]) is None
    assert metrics.auroc([], []) is None


def slow_errors(scores, correct, known, fpir, threshold):
    """FNIR at a threshold, having checked that it is the lowest: one clip at a time."""

    def false_alarms(passes):
        strangers = [passes(score) for score, is_known in zip(scores, known, strict=True)]
        return [alarm for alarm, is_known in zip(strangers, known, strict=True) if not is_known]

    alarms = false_alarms(lambda score: score >= threshold)
    assert (sum(alarms) + 1) / (len(alarms) + 1) <= fpir
    # Any lower threshold lets the best of the refused strangers pass, if there is one with a score.
    refused = [s for s, k in zip(scores, known, strict=True) if not k and -np.inf < s < threshold]
    if refused:
        more = false_alarms(lambda score: score >= max(refused))
        assert (sum(more) + 1) / (len(more) + 1) > fpir
        assert np.nextafter(max(refused), max(refused) + 1) == threshold
    missed, total = 0, 0
    for score, right, is_known in zip(scores, correct, known, strict=True):
        if is_known:
            total += 1
            missed += not (right and score >= threshold)
    return sum(alarms) / len(alarms), missed / total


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_identification_errors_against_a_loop(dtype):
    rng = np.random.default_rng(4)
    for _ in range(40):
        scores = tied_scores(rng, 60).astype(dtype)
        known, correct = rng.random((2, 60)) < 0.6
        fpir = float(rng.choice([0, 0.01, 0.1, 0.29, 0.5, 1]))
        got = metrics.identification_errors(scores, correct, known, fpir=fpir)
        assert (got is None) == (1 / (np.sum(~known) + 1) > fpir)
        if got is None:
            continue
        assert np.isfinite(got).all() and all(type(value) is float for value in got)
        assert dtype(got.threshold) == got.threshold
        scores = np.where(np.isnan(scores), -np.inf, scores).astype(dtype)
        expected = slow_errors(scores, correct, known, fpir, dtype(got.threshold))
        assert (got.fpir, got.fnir) == pytest.approx(expected, rel=0, abs=1e-15)


def test_identification_errors_by_hand():
    scores = np.array([4, 3, 2, 1, 3.5, 2, 0.5, -np.inf])
    known = np.array([True, True, True, True, False, False, False, False])
    correct = np.array([True, False, True, True, False, False, False, False])

    def errors(fpir, scores=scores, known=known):
        return metrics.identification_errors(scores, correct, known, fpir=fpir)

    assert errors(0) is None and errors(0.19) is None
    assert errors(0.2) == (np.nextafter(3.5, 4), 0, 0.75)  # only the first clip is identified
    assert errors(0.4) == (np.nextafter(2, 3), 0.25, 0.75)  # a tie is above as well: not passed
    assert errors(0.59) == errors(0.4)
    assert errors(0.6) == (np.nextafter(0.5, 1), 0.5, 0.25)  # the second stays wrong for ever
    assert errors(1) == (np.finfo(np.float64).min, 0.75, 0.25)  # -inf is never identified
    nobody = errors(1, scores=np.full(8, -np.inf))
    assert nobody is not None and (nobody.fpir, nobody.fnir) == (0, 1)
    # 29 of 100 are .29 of them, though .29 * 100 is less than 29.
    assert metrics.num_allowed(99, 0.29) == 28
    assert errors(0.1, known=np.ones(8, bool)) is None
    assert errors(0.1, known=np.zeros(8, bool)) is None
    for wrong in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"fpir must be from 0 to 1"):
            errors(wrong)
