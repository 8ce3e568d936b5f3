"""The metrics against oracles, the hand, and a library where the definitions agree."""

from fractions import Fraction

import numpy as np
import pytest

from tests.helpers import map_oracle
from vidjax.core import metrics
from vidjax.evaluation import ranking, topk

MANY = [f"p{i}.mp4" for i in range(150)]
JUNK = [f"x{i}.mp4" for i in range(100)]

BY_HAND = [
    ("1 a.mp4", "1 " + " ".join([*JUNK[:99], "a.mp4"]), (1, 100)),
    ("1 a.mp4", "1 x.mp4 y.mp4", (0, 1)),
    ("1 a.mp4 b.mp4", "1 a.mp4 x.mp4 b.mp4", (5, 6)),  # 1/1 and 2/3 of 2
    ("1 a.mp4 b.mp4", "1 a.mp4", (1, 2)),  # half the positives are not returned
    ("1 " + " ".join(MANY), "1 " + " ".join(MANY[:100]), (2, 3)),  # 150 positives, 100 hits
    ("1 a.mp4\n2 b.mp4", "1 a.mp4", (1, 2)),  # an identity is missing
    ("1 a.mp4\n2 b.mp4", "1 a.mp4\n2", (1, 2)),  # an identity without a name
    ("1 a.mp4", "1 a.mp4\n7 a.mp4", (1, 1)),  # an identity that is not in the ground truth
    ("1 a.mp4 b.mp4", "1 a.mp4 a.mp4 x.mp4 b.mp4", (5, 6)),  # a hit repeated
    ("1 a.mp4 b.mp4", "1 a b", (0, 1)),  # the suffix is in one file only
    ("a.mp4 1\nb.mp4 2\nc.mp4 1", "1 a.mp4 c.mp4\n2 c.mp4", (1, 2)),  # clip by clip
    ("\ufeff1 a.mp4 b.mp4 \r\n", "1 x.mp4 a.mp4\r\n", (1, 4)),  # BOM, CRLF, trailing blank
    ("1 a.mp4", "1 " + " ".join([*JUNK, "a.mp4"]), (0, 1)),  # the 101st name is the hit
    ("1 a.mp4", "1 a.mp4\n1 x.mp4 a.mp4", (1, 2)),  # the last of two lines counts
    ("1 a.mp4 b.mp4", " 1  x.mp4\ta.mp4   b.mp4\t", (7, 12)),  # odd blanks
    ("1 a.mp4", "", (0, 1)),
]

REFUSED = [
    ("1 a.mp4\n\n2 b.mp4", "line 2"),
    ("1 a.mp4\n2 b.mp4\n1 c.mp4", "line 3"),  # an identity twice
    ("1 a.mp4 b.mp4\n2", "line 2"),  # an identity without a positive
    ("1 a.mp4\n2 b.mp4 a.mp4", "line 2"),  # a clip of two identities
    ("a.mp4 1\nb.mp4 1\na.mp4 2", "line 3"),  # a clip with two labels
    ("a.mp4 1\nb.mp4 1 2", "line 2"),
    ("", "gt"),
]


def score_files(gt, path):
    return ranking.score(ranking.read_ground_truth(gt), ranking.read_submission(path).ranking)


def write(folder, gt, submission):
    paths = folder / "gt.txt", folder / "ranking.txt"
    for path, text in zip(paths, (gt, submission), strict=True):
        path.write_bytes(text.encode())
    return paths


def test_map_of_files_matches_hand_computed_values_and_bad_files_are_refused(tmp_path):
    for gt, submission, score in BY_HAND:
        paths = write(tmp_path, gt, submission)
        assert map_oracle.mean_average_precision(*paths) == Fraction(*score), submission
        assert score_files(*paths) == pytest.approx(float(Fraction(*score)), rel=0, abs=1e-15)
    for gt, where in REFUSED:
        paths = write(tmp_path, gt, "1 a.mp4")
        with pytest.raises(map_oracle.Refused):
            map_oracle.mean_average_precision(*paths)
        with pytest.raises(ValueError, match=where):
            score_files(*paths)


def test_map_of_arrays_equals_map_of_files_bit_for_bit(tmp_path):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 29, 400)  # the last identities have none
    index = np.stack([rng.permutation(400)[:100] for _ in range(30)]).astype(np.int32)
    index[3, 40:] = topk.NO_CLIP
    positives = np.bincount(labels, minlength=31)[1:]
    positives[5] += 2  # positives that no record holds
    score = metrics.mean_average_precision(index, labels, positives)

    names = {c: [f"c{i}.mp4" for i in np.flatnonzero(labels == c)] for c in range(1, 31)}
    names[6] += ["lost1.mp4", "lost2.mp4"]
    gt = "".join(f"{c} {' '.join(listed)}\n" for c, listed in names.items() if listed)
    gt_path, path = write(tmp_path, gt, "")
    top = topk.TopK(np.zeros(index.shape, np.float32), index)
    clips = [f"c{i}" for i in range(400)]
    ranking.write_ranking(path, [str(c) for c in range(1, 31)], clips, top)
    assert score_files(gt_path, path) == score
    assert abs(Fraction(score) - map_oracle.mean_average_precision(gt_path, path)) < 1e-12

    empty = np.zeros(0, int)
    nobody = metrics.mean_average_precision(np.full((2, 9), topk.NO_CLIP), empty, np.array([3, 0]))
    assert nobody == 0
    with pytest.raises(ValueError, match="no identity"):
        metrics.mean_average_precision(np.zeros((2, 3), int), np.zeros(4, int), np.zeros(2, int))
    with pytest.raises(ValueError, match="more hits"):
        metrics.average_precision(np.ones((1, 2), bool), np.array([1]))


def tied_scores(rng, count):
    """Scores with ties, -inf and a NaN."""
    scores = rng.integers(-5, 6, count).astype(np.float64) / 4 + rng.choice([0, 1e-9], count)
    scores[rng.random(count) < 0.1] = -np.inf
    scores[rng.random(count) < 0.02] = np.nan
    return scores


def test_auroc_is_the_share_of_correctly_ordered_pairs():
    rng = np.random.default_rng(3)
    for _ in range(30):
        scores = tied_scores(rng, 40)
        positive = rng.random(40) < rng.uniform(0.1, 0.9)
        positive[:2] = True, False
        ranked = np.where(np.isnan(scores), -np.inf, scores)
        above, below = ranked[positive][:, None], ranked[~positive]
        expected = np.mean((above > below) + 0.5 * (above == below))
        ours = metrics.auroc(scores, positive)
        assert type(ours) is float and ours == pytest.approx(expected, rel=0, abs=1e-15)
    assert metrics.auroc([1.0, 2.0], [True, True]) is metrics.auroc([], []) is None


def slow_errors(scores, correct, known, fpir, threshold):
    """FPIR and FNIR at a threshold, having checked that it is the lowest."""

    def allowed(threshold):
        alarms = np.sum(scores[~known] >= threshold)
        return (alarms + 1) / (np.sum(~known) + 1) <= fpir

    assert allowed(threshold)
    # Any lower threshold lets the best of the refused strangers pass, if there is one with a score.
    refused = scores[~known & (scores > -np.inf) & (scores < threshold)]
    if len(refused):
        assert not allowed(refused.max())
        assert np.nextafter(refused.max(), refused.max() + 1) == threshold
    passed = scores >= threshold
    return passed[~known].mean(), 1 - (passed & correct)[known].mean()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_identification_errors_match_a_direct_count(dtype):
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


def test_identification_errors_match_hand_computed_values():
    scores = np.array([4, 3, 2, 1, 3.5, 2, 0.5, -np.inf])
    known = np.arange(8) < 4
    correct = np.array([True, False, True, True, False, False, False, False])

    def errors(fpir, known=known):
        return metrics.identification_errors(scores, correct, known, fpir=fpir)

    assert errors(0.19) is None
    assert errors(0.2) == (np.nextafter(3.5, 4), 0, 0.75)  # only the first clip is identified
    assert errors(0.4) == (np.nextafter(2, 3), 0.25, 0.75)  # a tie is above as well: not passed
    assert errors(1) == (np.finfo(np.float64).min, 0.75, 0.25)  # -inf is never identified
    # 29 of 100 are .29 of them, though .29 * 100 is less than 29.
    assert metrics.count_allowed(99, 0.29) == 28
    assert errors(0.1, known=np.ones(8, bool)) is errors(0.1, known=np.zeros(8, bool)) is None
    for wrong in (-0.1, np.nan):
        with pytest.raises(ValueError, match=r"fpir must be from 0 to 1"):
            errors(wrong)
