"""Fusion: which frames are kept or drawn, and how they are averaged."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest

from tests.helpers.cases import nightly_after_first
from tests.helpers.made_frames import make_frames, one_hot_frames, pad
from vidjax.core import augment, fusion

# Clips of 3, 1, 0, 3 and 40 frames, of which `top` chooses 32. Frame t has the number 10 t.
TOP = make_frames([3, 1, 0, 3, 40], max_frames=40)
SAMPLED = make_frames([12, 10, 2, 0], max_frames=12)
SAMPLED.mask[0, [0, 7]] = False  # 10 are left


def fuse(name, rng, frames, **options):
    """Returns the frames that the fusion `name` makes of the frames of each clip."""
    return jax.jit(fusion.make_fusion({"name": name, **options}))(rng, frames)


def draw(*, seed, quality, **options):
    """Returns the share of each frame of a clip in the frames of `random`, [num_draws, T]."""
    fused = fuse("random", jax.random.key(seed), one_hot_frames(quality), **options)
    shares = np.asarray(fused.features[0])
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-6)
    return shares


@pytest.mark.slow
def test_number_of_fused_frames_follows_probs():
    probs = (0.25, 0, 0.65, 0, 0.10)  # of fusing 1, 2, 3, 4 and 5 frames
    shares = draw(seed=2, quality=np.ones(300), num_draws=4_000, probs=probs)
    # The smallest share of n different frames is 1 / n. Of 300 frames, few are drawn twice.
    smallest = np.where(shares > 0, shares, 1).min(axis=1)
    counts = np.bincount(np.rint(1 / smallest).astype(int), minlength=6)[1:]  # of 1 to 5
    np.testing.assert_allclose(counts / 4_000, probs, atol=0.03)


@pytest.mark.slow
def test_drawn_frames_are_weighted_by_quality():
    quality = np.asarray([-1.0, -2.0, 1.0, 2.0, 4.0])
    options = {"num_draws": 500, "max_frames": 2, "probs": (0, 1)}  # a fused frame has 2 frames
    # `draw` returns the shares with equal weights. The same key draws the same frames.
    shares = draw(seed=3, quality=quality, **options)
    expected = shares * np.maximum(quality, 0)
    expected = np.where(expected.any(axis=1, keepdims=True), expected, shares)  # only negative
    expected /= expected.sum(axis=1, keepdims=True)
    frames = one_hot_frames(quality)
    weighted = fuse("random", jax.random.key(3), frames, weighting="quality", **options)
    np.testing.assert_allclose(weighted.features[0], expected, rtol=1e-6)
    np.testing.assert_allclose(weighted.quality[0], expected @ quality, rtol=1e-6)  # a mean


@pytest.mark.slow
def test_mixup_weights_are_drawn_from_a_flat_dirichlet_distribution():
    """Each of three weights has the mean 1/3, the variance 1/18, and the median 1 - 1/sqrt(2)."""
    # Each fused frame contains all three frames.
    options = {"num_draws": 20_000, "max_frames": 3, "probs": (0, 0, 1), "replacement": False}
    shares = draw(seed=8, quality=np.ones(3), weighting="mixup", **options)
    np.testing.assert_allclose(shares.mean(axis=0), 1 / 3, atol=0.01)
    np.testing.assert_allclose(shares.var(axis=0), 1 / 18, atol=0.003)
    np.testing.assert_allclose(np.median(shares, axis=0), 1 - 0.5**0.5, atol=0.01)


def test_weights_of_frames_equal_their_formulas():
    """Negative weights, and weights that are not finite, count as 0. But (-3) ** 2 is positive."""
    quality = np.array([-3, 0, 10, 20, 25, 30, 35, 40, 90, np.nan, np.inf], np.float32)
    graded = np.array([0, 0.2, 0.2, 0.3, 0.3, 0.6, 0.6, 1, 1, 0, 0])  # configs/fidelity.md, Q9
    positive = np.where(np.isfinite(quality) & (quality > 0), quality, 0)
    formulas = {"uniform": np.ones(11), "score": positive, "quality": 0.9 * positive}
    formulas |= {"squared": positive**2 + 9 * (quality == -3), "graded": 0.9 * positive * graded}
    frames = one_hot_frames(quality, detection=0.9)
    found = jax.jit(lambda: [fusion.frame_weights(frames, weighting) for weighting in formulas])()
    for weights, wanted in zip(found, formulas.values(), strict=True):
        np.testing.assert_allclose(weights[0, :11], wanted, rtol=1e-6)
        assert not weights[0, 11:].any()  # padding


def test_weights_that_are_all_0_count_as_equal():
    """Negative qualities count as 0."""
    frames = make_frames([3, 3, 2, 0], max_frames=3)
    frames.quality[:3] = [[-1, 10, 50], [-1, -2, np.nan], [0, 0, 0]]
    frames.detection[:] = 1
    weights = jax.jit(functools.partial(fusion.frame_weights, weighting="graded"))(frames)
    # `graded` multiplies a quality of 10 by 0.2, and a quality of 50 by 1.
    np.testing.assert_allclose(weights, [[0, 2, 50], [1, 1, 1], [1, 1, 0], [0, 0, 0]], rtol=1e-6)


@nightly_after_first("name, options", [
    ("random", {"num_draws": 2, "max_frames": 3, "replacement": False, "weighting": "mixup"}),
    ("random", {"num_draws": 3, "sampling": "quality", "weighting": "quality"}),
    ("mean", {"weighting": "graded"}),
    ("sample", {"num_frames": 4}),
    ("windows", {"min_quality": 20.0}),
])  # fmt: skip
def test_padding_and_bad_quality_do_not_change_fused_features(name, options):
    frames = make_frames([5, 0, 1, 3, 3], max_frames=5)  # clip 1 is empty
    frames.quality[3:, :3] = [[np.nan, np.inf, -1], [-1, -2, np.nan]]
    short = fuse(name, jax.random.key(5), frames, **options)
    long = fuse(name, jax.random.key(5), pad(frames, count=7), **options)
    np.testing.assert_array_equal(short.mask.sum(axis=1), long.mask.sum(axis=1))
    np.testing.assert_array_equal(short.mask.any(axis=1), [True, False, True, True, True])
    for field in ("features", "quality", "detection", "number"):
        left, right = getattr(short, field), getattr(long, field)
        np.testing.assert_array_equal(np.asarray(left)[short.mask], np.asarray(right)[long.mask])
    assert np.isfinite(short.features).all()
    assert np.any(short.features[short.mask], axis=1).all()  # no vector is 0


@pytest.mark.slow
def test_draws_without_replacement_repeat_no_frame_before_all_frames_are_drawn():
    """A second draw follows the qualities of the remaining frames."""
    options = {"num_draws": 400, "probs": (0, 0, 0, 0, 1), "replacement": False}
    # 5 frames are averaged, so 5 x share is the number of times that one of 3 frames is drawn.
    counts = np.rint(5 * draw(seed=6, quality=np.ones(3), **options))
    assert counts.min() == 1 and counts.max() == 2
    quality = np.array([1.0, 0.0, 2.0, 4.0, 3.0])
    options = {"num_draws": 20_000, "max_frames": 2, "probs": (0, 1), "replacement": False}
    drawn = draw(seed=7, quality=quality, sampling="quality", **options) > 0
    np.testing.assert_array_equal(drawn.sum(axis=1), 2)
    p = quality / quality.sum()
    # P(i is drawn) = P(i is first) + sum over j of P(j is first) P(i is second | j is first).
    expected = [x + sum(np.delete(p, i) * x / (1 - np.delete(p, i))) for i, x in enumerate(p)]
    np.testing.assert_allclose(drawn.mean(axis=0), expected, atol=0.015)


def real(frames, clip, field="features"):
    """Returns a field of the real frames of one clip."""
    return np.asarray(getattr(frames, field)[clip])[np.asarray(frames.mask[clip])]


def windows_oracle(frames, clip, max_frames):
    """Returns the frames of one clip, then means of each frame and the next frames of a ring."""
    own = real(frames, clip)
    # This hash of the index of a real frame orders the ring. Means have 2 to `max_frames` frames.
    ring = sorted(range(len(own)), key=lambda number: number * 2654435769 % 2**32)
    merged = []
    for number in range(len(own)):
        window = np.arange(min(2 + number % (max_frames - 1), len(own))) + ring.index(number)
        merged.append(own[np.array(ring)[window % len(ring)]].mean(axis=0))
    return np.concatenate([own, merged])


@pytest.mark.parametrize(("dtype", "x64"), [("float32", False), ("int8", False), ("float32", True)])
def test_fixed_windows_match_a_loop(dtype, x64):
    frames = make_frames([9, 1, 3, 0, 6], max_frames=9, dtype=dtype)
    frames.mask[0, 4] = frames.mask[4, 0] = False  # as if a filter had removed two frames
    with jax.enable_x64(x64):  # the hash is the same with 64-bit integers
        union = fuse("windows", None, frames, max_frames=4)
    assert union.features.dtype == dtype
    for clip in (0, 1, 2, 4):  # clip 3 has no frame
        expected = windows_oracle(frames, clip, max_frames=4)
        expected = np.round(expected) if dtype == "int8" else expected
        np.testing.assert_allclose(real(union, clip), expected, atol=1e-6)
    # Each frame occurs twice: as the frame itself, and as the first frame of a mean.
    np.testing.assert_array_equal(union.mask, np.tile(frames.mask, 2))
    np.testing.assert_array_equal(union.number, np.tile(frames.number, 2))


@pytest.mark.slow
def test_random_windows_average_their_frame_and_one_to_four_others():
    length = 12
    frames = one_hot_frames(np.ones(length), padding=2)
    merge = jax.vmap(lambda rng: fusion.merged_windows(rng, frames))
    union = jax.jit(merge)(jax.random.split(jax.random.key(9), 500))
    # First the frames themselves with their padding, then the averages of frames.
    own, means = np.split(np.asarray(union.features[:, 0], np.float32), 2, axis=1)
    np.testing.assert_array_equal(own[:, :length], [np.eye(length)] * 500)
    contains = means[:, :length] > 0  # [500 keys, 12 averages, 12 frames]
    assert contains[:, range(length), range(length)].all()
    # An average has 1 to 4 of the 11 other frames, equally often. The mean of 1 to 4 is 2.5.
    frequency = np.bincount(contains.sum(axis=2).ravel(), minlength=6) / (500 * length)
    np.testing.assert_allclose(frequency[2:], 0.25, atol=0.02)
    others = contains.mean(axis=0)[~np.eye(length, dtype=bool)]
    np.testing.assert_allclose(others, 2.5 / 11, atol=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("always_shorter", [False, True])
def test_crops_are_weighted_means_of_their_frames(always_shorter):
    """Thirds and sixths are rounded down: to 0, or (`always_shorter`) to 1 if a frame is left."""
    frames = make_frames([7, 12, 3, 2, 1, 0], max_frames=13)
    frames.mask[1, 3] = False  # 11 real frames are left
    crops = fuse("crops", None, frames, always_shorter=always_shorter)
    # Number of frames -> (begin, end) of each crop: all, without the first third, without the last
    # third, without both sixths.
    bounds = {
        7: [(0, 7), (2, 7), (0, 5), (1, 6)], 11: [(0, 11), (3, 11), (0, 8), (1, 10)],
        3: [(0, 3), (1, 3), (0, 2), (0, 3)], 2: [(0, 2)] * 4, 1: [(0, 1)] * 4,
    }  # fmt: skip
    if always_shorter:
        bounds |= {3: [(0, 3), (1, 3), (0, 2), (1, 2)], 2: [(0, 2), (1, 2), (0, 1), (0, 2)]}
    for clip in range(5):
        times = np.flatnonzero(frames.mask[clip])
        for crop, (start, stop) in enumerate(bounds[len(times)]):
            t = times[start:stop]
            weights = np.float64((frames.quality * frames.detection)[clip, t])
            expected = np.average(frames.features[clip, t], axis=0, weights=weights)
            np.testing.assert_allclose(crops.features[clip, crop], expected, atol=1e-6)
            assert crops.number[clip, crop] == frames.number[clip, t[0]]  # of its first frame
    np.testing.assert_array_equal(crops.mask, [[True] * 4] * 5 + [[False] * 4])


@pytest.mark.parametrize(("spec", "message"), [
    ({"name": "random_fusion"}, "did you mean 'random'?"),
    ({}, f"choose from {', '.join(sorted(fusion.FUSIONS))}"),
    ({"name": {}}, "choose from"), ("all", "'all' is not a dict such as {'name': 'all'}"),
    ({"name": "top", "frames": 3}, "no option frames; its options: kept_share, min_detection"),
    ({"name": "sample", "order": "quality"}, "order 'quality'; choose from random, time"),
    ({"name": "random"}, "needs num_draws"),
    ({"name": "random", "num_draws": 1, "max_frames": 2, "probs": (1, "a")}, "2 finite"),
    ({"name": "mean", "weighting": "norm"}, "from graded, quality, score, squared, uniform"),
    ({"name": "sample", "replacement": "no"}, "replacement='no': must be True or False"),
    ({"name": "mean", "top_share": 0.0}, "above 0 and at most 1"),
])  # fmt: skip
def test_invalid_fusion_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        fusion.make_fusion(spec)(jax.random.key(0), make_frames([2], max_frames=2))


def test_result_of_a_users_fusion_that_is_not_frames_with_a_mask_is_refused(monkeypatch):
    for own in (
        lambda frames: None,
        lambda frames: frames.features,
        lambda frames: frames._replace(mask=None),
        lambda frames: frames._replace(mask=frames.mask.astype(np.float32)),
        lambda frames: frames._replace(features=frames.features[:, :1]),
    ):
        monkeypatch.setitem(fusion.FUSIONS, "own", own)
        with pytest.raises(ValueError, match=r"fusion 'own' must return .* mask \[B, T\] bool\n"):
            fusion.make_fusion({"name": "own"})(None, make_frames([2], max_frames=2))


def filter_oracle(frames, clip, *, min_quality, min_detection, top_share):
    """Returns which frames of a clip are kept, bool [T].

    They are the best share of the frames that reach both minima. If no frame does, all are kept.
    A score that is not finite is the lowest score.
    """
    real, scores = frames.mask[clip], np.stack([frames.quality[clip], frames.detection[clip]])
    quality, detection = np.where(np.isfinite(scores), scores, np.finfo(np.float32).min)
    kept = real & (quality >= (-np.inf if min_quality is None else min_quality))
    kept &= detection >= (-np.inf if min_detection is None else min_detection)
    best = np.argsort(np.where(kept, -quality, np.inf), kind="stable")
    best = best[: math.ceil(round(top_share * kept.sum(), 9))]  # rounding errors add no frame
    return np.isin(np.arange(len(real)), best) if kept.any() else real


@pytest.mark.parametrize("limits", [
    {"min_quality": None, "min_detection": 0.8, "top_share": 0.7},
    {"min_quality": 30.0, "min_detection": 0.7, "top_share": 0.5},
    {"min_quality": -np.inf, "min_detection": None, "top_share": 0.1},
    {"min_quality": None, "min_detection": None, "top_share": 4e-5},  # a frame is left
    {"min_quality": -np.inf, "min_detection": -np.inf, "top_share": 1.0},
    {"min_quality": 20.0, "min_detection": None, "top_share": 1.0},
])  # fmt: skip
def test_frame_filters_match_a_loop(limits):
    frames = make_frames([30, 10, 1, 0, 9, 20], max_frames=30)
    frames.quality[1] = np.rint(frames.quality[1] / 30) * 30  # ties
    frames.quality[4] = 2  # below the limit of 30
    frames.mask[5, 3:9] = False  # a hole
    frames.quality[0, 1:4] = frames.detection[0, 3:6] = [np.nan, np.inf, -np.inf]
    kept = fuse("all", None, frames, **limits)
    expected = [filter_oracle(frames, clip, **limits) for clip in range(6)]
    np.testing.assert_array_equal(kept.mask, expected)  # only the mask changes
    jax.tree.map(np.testing.assert_array_equal, kept._replace(mask=frames.mask), frames)


def test_top_frames_are_the_best_frames_repeated_in_turn_in_short_clips():
    turns = fuse("top", None, TOP)
    best = np.sort(np.argsort(-TOP.quality[4], kind="stable")[:32])
    np.testing.assert_array_equal(turns.features[4], TOP.features[4, best], strict=True)
    # The three frames of clip 0 fill 32 places, the best frames first.
    counts = np.bincount(np.asarray(turns.number[0]) // 10)
    assert counts[np.argsort(-TOP.quality[0, :3])].tolist() == [11, 11, 10]
    np.testing.assert_array_equal(turns.mask.sum(axis=1), [32, 32, 0, 32, 32])


def test_randomly_repeated_top_frames_include_every_frame():
    """Without a key, the repeats are fixed, and do not depend on the other clips."""
    # Clip 0 has 3 frames with the numbers 0, 10 and 20. With a key, they fill 32 places at random.
    pick = jax.vmap(lambda rng: fusion.top_frames(rng, TOP).number[0])
    drawn = np.asarray(jax.jit(pick)(jax.random.split(jax.random.key(8), 200)))
    counts = np.stack([np.sum(drawn == 10 * t, axis=1) for t in range(3)])
    assert counts.min() >= 1 and counts.std() > 1  # not 11, 11 and 10, as in turn
    np.testing.assert_allclose(counts.mean(axis=1), 32 / 3, atol=0.7)
    fixed = fuse("top", None, TOP, repeats="random")
    counts = np.bincount(np.asarray(fixed.number[0]) // 10, minlength=3)
    assert counts.min() >= 1 and counts.max() > 11
    # Only clip 3, with less padding.
    one_clip = fuse("top", None, jax.tree.map(lambda x: x[3:4, :7], TOP), repeats="random")
    np.testing.assert_array_equal(one_clip.features[0], fixed.features[3])


def test_drawn_samples_are_different_frames_in_time_order():
    """Clip 2 has only frames 0 and 1, which repeat in its sample of 5 frames."""
    pick = jax.vmap(lambda rng: fusion.sample_frames(rng, SAMPLED, num_frames=5))
    drawn = jax.jit(pick)(jax.random.split(jax.random.key(1), 600))
    number = np.asarray(drawn.number) // 10  # [600 keys, 4 clips, 5 frames]
    assert np.all(np.diff(number[:, 0]) > 0) and np.all(np.diff(number[:, 2]) >= 0)
    share = np.bincount(number[:, 0].ravel(), minlength=12) / 600
    np.testing.assert_allclose(share, 0.5 * SAMPLED.mask[0], atol=0.08)  # 5 of 10 frames
    count = number[:, 2].sum(axis=1)  # of frame 1 of clip 2
    assert (count.min(), count.max()) == (1, 4)  # so each sample has both frames
    np.testing.assert_array_equal(drawn.mask[0], [[True] * 5] * 3 + [[False] * 5])
    np.testing.assert_array_equal(drawn.features[7, 0], SAMPLED.features[0, number[7, 0]])


def test_samples_with_replacement_are_in_random_order_and_repeat_frames_of_short_clips():
    """As by np.random.choice(frames, 5, replace=len(frames) < 5). Without a key, it is fixed."""
    options = {"num_frames": 5, "order": "random", "replacement": True}
    pick = jax.vmap(lambda rng: fusion.sample_frames(rng, SAMPLED, **options).number)
    drawn = np.asarray(jax.jit(pick)(jax.random.split(jax.random.key(2), 600))) // 10
    assert all(len({*sample}) == 5 for sample in drawn[:, 1])  # 5 of 10 frames
    assert 3.8 < drawn[:, 1].mean(axis=0).min() < drawn[:, 1].mean(axis=0).max() < 5.2  # not sorted
    count = drawn[:, 2].sum(axis=1)  # of frame 1 of the 2 frames of clip 2, which is binomial
    assert (count.min(), count.max()) == (0, 5) and abs(count.var() - 1.25) < 0.2
    fixed = [fuse("sample", None, SAMPLED, **options).number for _ in range(2)]
    np.testing.assert_array_equal(*fixed)


def test_samples_without_a_key_are_evenly_spaced():
    """A sample has the middle frames of five equal pieces of a clip. Clip 3 is empty."""
    even = fuse("sample", None, SAMPLED, num_frames=5)
    # The real frames of clip 0 are 1 to 6 and 8 to 11.
    expected = [[2, 4, 6, 9, 11], [1, 3, 5, 7, 9], [0, 0, 1, 1, 1]]
    np.testing.assert_array_equal(even.number[:3] // 10, expected)
    assert even.features.dtype == np.float16 and not even.mask[3].any()


def test_frames_are_drawn_in_proportion_to_quality():
    """A quality that is negative or not finite counts as 0. Qualities that are all 0 are equal."""
    quality = [[1, 0, 3, -5], [np.nan, 1, np.inf, 1], [0, -1, np.nan, 0], [1e-30, 3e-30, 0, 0]]
    expected = np.array([[0.25, 0, 0.75, 0], [0, 0.5, 0, 0.5], [0.25] * 4, [0.25, 0.75, 0, 0]])
    frames = jax.tree.map(lambda *clip: np.concatenate(clip), *map(one_hot_frames, quality))
    options = {"num_draws": 20_000, "max_frames": 1, "sampling": "quality"}
    fused = fuse("random", jax.random.key(1), frames, **options)
    drawn = np.asarray(fused.features)
    np.testing.assert_array_equal(drawn.max(axis=2), 1)  # a single frame is drawn
    np.testing.assert_array_equal(np.argmax(drawn, axis=2), fused.number)
    frequency = drawn.mean(axis=1)
    np.testing.assert_allclose(frequency, expected, atol=0.015)
    assert np.all(frequency[expected == 0] == 0)


# Clips to join, up to 6 frames. Clips 0, 1 and 3 are short, clip 2 is too long, clip 5 is empty.
# Clips 4 and 6 are not chosen.
JOINED = {
    "face": make_frames([5, 3, 9, 4, 2, 0, 8], max_frames=9),
    "audio": make_frames([1, 0, 7, 2, 1, 0, 1], max_frames=7, seed=4),
}
JOINED["face"].mask[2, 1] = False  # 8 real frames are left
JOINED["face"].features[..., 0] = np.arange(7)[:, None]  # the number of the clip


@jax.jit
def join_clips(rng, clips):
    """Joins clips in every modality. The number of faces decides which clips are short."""
    length = clips["face"].mask.sum(axis=1)
    short, chosen = (length > 0) & (length < 6), ~np.isin(np.arange(7), (4, 6))
    return {
        name: augment.concat_clips(rng, frames, chosen, short, max_frames=6)
        for name, frames in clips.items()
    }


@pytest.mark.slow
def test_short_clips_are_joined_long_clips_are_cut_and_other_clips_stay_as_they_are():
    """A short clip has the same partner in each modality: another short clip, or the clip itself.

    Padding does not change the partner.
    """
    padded = {name: pad(frames, count=4) for name, frames in JOINED.items()}
    face, pairs, starts = JOINED["face"], [], set()
    for seed in range(60):
        union, of_padded = (join_clips(jax.random.key(seed), clips) for clips in (JOINED, padded))
        for clip in (0, 1, 3):
            partner = int(real(union["face"], clip)[-1, 0])  # feature 0 of the last face
            pairs.append((clip, partner))
            for name, frames in JOINED.items():
                # If a clip is not joined, `partner` is the clip itself.
                parts = [real(frames, each) for each in dict.fromkeys((clip, partner))]
                for joined in (union, of_padded):
                    np.testing.assert_array_equal(real(joined[name], clip), np.concatenate(parts))
            assert np.all(np.diff(real(union["face"], clip, "number")) > 0)  # also of two clips
        for clip in (4, 5, 6):  # not chosen, or empty
            np.testing.assert_array_equal(real(union["face"], clip), real(face, clip))
        start = real(face, 2, "number").tolist().index(real(union["face"], 2, "number")[0])
        np.testing.assert_array_equal(real(union["face"], 2), real(face, 2)[start : start + 6])
        assert len(real(union["audio"], 2)) == 6  # of 7
        starts.add(start)
    assert set(pairs) == set(itertools.product((0, 1, 3), repeat=2))
    unchanged = [partner == clip for clip, partner in pairs]
    np.testing.assert_allclose(np.mean(unchanged), 0.5, atol=0.13)  # half are joined
    assert starts == {0, 1, 2}  # the first of the 6 faces that are left of 8
