"""Fusion: what is drawn, how it is averaged, and that padding and devices change nothing."""

import jax
import numpy as np
import pytest

from vidjax import fusion, selection
from vidjax.batch import Frames


def make_frames(lengths, *, max_frames, dim=6, seed=0, dtype="float16"):
    rng = np.random.default_rng(seed)
    shape = (len(lengths), max_frames)
    mask = np.arange(max_frames) < np.asarray(lengths)[:, None]
    return Frames(
        features=(rng.standard_normal((*shape, dim)) * mask[..., None]).astype(dtype),
        quality=np.where(mask, rng.uniform(1, 100, shape), 0).astype(np.float32),
        detection=np.where(mask, rng.uniform(0.5, 1, shape), 1).astype(np.float32),
        number=np.where(mask, 10 * np.arange(max_frames), 0).astype(np.int32),
        mask=mask,
    )


def one_hot_frames(weights, *, padding=3):
    """One clip whose frame t is the t-th unit vector: a fused frame shows what was drawn."""
    length = len(weights)
    total = length + padding
    pad = np.zeros(padding, np.float32)
    return Frames(
        features=np.eye(total, length, dtype=np.float16)[None],
        quality=np.concatenate([np.asarray(weights, np.float32), pad])[None],
        detection=np.ones((1, total), np.float32),
        number=np.arange(total, dtype=np.int32)[None],
        mask=np.arange(total)[None] < length,
    )


def pad(frames, count):
    """Adds frames of garbage that are not real."""
    clips, dim = len(frames.mask), frames.features.shape[-1]
    garbage = make_frames([count] * clips, max_frames=count, dim=dim, seed=9)
    garbage = garbage._replace(mask=np.zeros_like(garbage.mask))
    return jax.tree.map(lambda a, b: np.concatenate([a, b.astype(a.dtype)], 1), frames, garbage)


def fuse(name, rng, frames, **options):
    return jax.jit(fusion.make_fusion({"name": name, **options}))(rng, frames)


WEIGHTS = np.array(
    [[1, 0, 3, -5], [np.nan, 1, np.inf, 1], [0, -1, np.nan, 0], [1e-30, 3e-30, 0, 0]], np.float32
)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ("uniform", [[0.25] * 4] * 4),
        ("quality", [[0.25, 0, 0.75, 0], [0, 0.5, 0, 0.5], [0.25] * 4, [0.25, 0.75, 0, 0]]),
    ],
)
def test_frames_are_drawn_by_weight(sampling, expected):
    draws = 20_000
    clips = [one_hot_frames(weights) for weights in WEIGHTS]
    frames = jax.tree.map(lambda *clip: np.concatenate(clip), *clips)
    options = {"num_draws": draws, "max_frames": 1, "sampling": sampling}
    fused = fuse("random", jax.random.key(1), frames, **options)
    drawn = np.asarray(fused.features)
    np.testing.assert_array_equal(drawn.max(axis=2), 1)
    np.testing.assert_array_equal(np.argmax(drawn, axis=2), fused.number)
    frequency = drawn.mean(axis=1)
    np.testing.assert_allclose(frequency, expected, atol=0.015)
    assert np.all(frequency[np.asarray(expected) == 0] == 0)


@pytest.mark.parametrize("probs", [None, (0.25, 0, 0.65, 0, 0.10)])
def test_number_of_fused_frames_follows_probs(probs):
    draws = 4_000
    fused = fuse(
        "random", jax.random.key(2), one_hot_frames(np.ones(300)), num_draws=draws, probs=probs
    )
    drawn = np.asarray(fused.features[0])
    np.testing.assert_allclose(drawn.sum(axis=1), 1, rtol=1e-6)
    # The frames drawn from 300 are hardly ever all the same.
    smallest = np.where(drawn > 0, drawn, 1).min(axis=1)
    counts = np.bincount(np.rint(1 / smallest).astype(int), minlength=6)[1:] / draws
    np.testing.assert_allclose(counts, [0.2] * 5 if probs is None else probs, atol=0.03)


def test_quality_weighting_is_the_weighted_mean_of_the_drawn_frames():
    weights = np.asarray([1.0, 2.0, 4.0])
    options = {"num_draws": 500, "max_frames": 2, "probs": (0, 1)}
    frames = one_hot_frames(weights)
    uniform = fuse("random", jax.random.key(3), frames, **options)
    weighted = fuse("random", jax.random.key(3), frames, weighting="quality", **options)
    expected = np.asarray(uniform.features[0]) * weights  # the draws are the same
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weighted.features[0], expected, rtol=1e-6)
    np.testing.assert_allclose(weighted.quality[0], expected @ weights, rtol=1e-6)
    np.testing.assert_allclose(weighted.detection[0], 1, rtol=1e-6)


def test_drawn_frames_that_weigh_nothing_are_averaged_uniformly():
    fused = fuse(
        "random", jax.random.key(4), one_hot_frames([-1, -1, 5]), num_draws=200, weighting="quality"
    )
    assert np.isfinite(fused.features).all()
    np.testing.assert_allclose(np.asarray(fused.features).sum(axis=-1), 1, rtol=1e-6)


SPECS = [
    {"name": "random", "num_draws": 3, "sampling": "quality", "weighting": "quality"},
    {
        "name": "random",
        "num_draws": 2,
        "max_frames": 3,
        "replacement": False,
        "weighting": "mixup",
    },
    {"name": "top", "num_frames": 4, "top_share": 0.7},
    {"name": "mean", "weighting": "graded"},
    {"name": "sample", "num_frames": 4},
    {"name": "windows", "weighting": "quality", "min_quality": 20.0},
    {"name": "crops"},
]
# Each spec is a program that takes seconds to compile, so the quick tests have one that draws.
EACH_SPEC = [
    SPECS[1],
    *(pytest.param(spec, marks=pytest.mark.slow) for spec in SPECS[:1] + SPECS[2:]),
]


@pytest.mark.parametrize("spec", EACH_SPEC)
def test_padding_and_bad_quality_reach_no_feature(spec):
    frames = make_frames([5, 0, 1, 3, 3], max_frames=5)
    frames.quality[3:, :3] = [[np.nan, np.inf, -1], [-1, -2, np.nan]]
    short = fuse(rng=jax.random.key(5), frames=frames, **spec)
    long = fuse(rng=jax.random.key(5), frames=pad(frames, 7), **spec)
    np.testing.assert_array_equal(short.mask.sum(axis=1), long.mask.sum(axis=1))
    np.testing.assert_array_equal(short.mask.any(axis=1), [True, False, True, True, True])
    for name in ("features", "quality", "detection", "number"):
        real = np.asarray(getattr(short, name))[short.mask]
        np.testing.assert_array_equal(real, np.asarray(getattr(long, name))[long.mask])
    features = np.asarray(short.features)
    assert np.isfinite(features).all()
    assert np.abs(features[short.mask]).max(axis=1).min() > 0


@pytest.mark.parametrize("spec", EACH_SPEC)
def test_one_and_eight_devices_draw_the_same(spec):
    frames = make_frames([5, 0, 1, 3, 7, 7, 2, 4] * 2, max_frames=7)
    fused = []
    for count in (1, 8):
        mesh = jax.make_mesh(
            (count,),
            ("data",),
            axis_types=(jax.sharding.AxisType.Auto,),
            devices=jax.devices()[:count],
        )
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        jitted = jax.jit(fusion.make_fusion(spec), in_shardings=(everywhere, rows))
        compiled = jitted.lower(jax.random.key(7), frames).compile()
        program = compiled.as_text()
        assert program and "all-gather" not in program
        if spec["name"] != "windows":  # which has a mean for every frame
            assert f"f32[{16 // count},7,6]" not in program  # never the whole in float32
        fused.append(compiled(jax.device_put(jax.random.key(7), everywhere), frames))
    jax.tree.map(np.testing.assert_array_equal, *fused)


def test_without_replacement_frames_repeat_only_when_all_were_drawn():
    lengths = [1, 3, 5, 8]
    clips = [one_hot_frames(np.ones(length), padding=9 - length) for length in lengths]
    wide = [c._replace(features=np.eye(9, 9, dtype=np.float16)[None]) for c in clips]
    frames = jax.tree.map(lambda *clip: np.concatenate(clip), *wide)
    options = {"num_draws": 400, "probs": (0, 0, 0, 0, 1), "replacement": False}
    fused = np.asarray(fuse("random", jax.random.key(6), frames, **options).features)
    for length, clip in zip(lengths, fused, strict=True):
        counts = np.rint(5 * clip[:, :length])
        np.testing.assert_allclose(clip[:, :length], counts / 5, atol=1e-6)
        np.testing.assert_array_equal(counts.sum(axis=1), 5)
        assert np.ptp(counts, axis=1).max() <= 1
        np.testing.assert_allclose(counts.mean(axis=0), 5 / length, atol=0.15)


def test_without_replacement_frames_are_drawn_by_what_is_left():
    weights = np.array([1.0, 0.0, 2.0, 4.0, 3.0])
    options = {"num_draws": 20_000, "max_frames": 2, "probs": (0, 1), "replacement": False}
    fused = fuse(
        "random", jax.random.key(7), one_hot_frames(weights), sampling="quality", **options
    )
    drawn = np.asarray(fused.features[0]) > 0
    np.testing.assert_array_equal(drawn.sum(axis=1), 2)
    probs = weights / weights.sum()
    expected = [
        p + sum(q * p / (1 - q) for j, q in enumerate(probs) if j != i) for i, p in enumerate(probs)
    ]
    np.testing.assert_allclose(drawn.mean(axis=0), expected, atol=0.015)


def test_mixup_is_a_convex_combination_at_random():
    options = {"num_draws": 20_000, "max_frames": 3, "probs": (0, 0, 1), "replacement": False}
    frames = one_hot_frames([1.0, 1.0, 1.0])
    fused = fuse("random", jax.random.key(8), frames, weighting="mixup", **options)
    shares = np.asarray(fused.features[0])
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-6)
    # Dirichlet with parameters 1 over three frames: mean 1/3, variance 1/18, median 1 - 1/sqrt(2).
    np.testing.assert_allclose(shares.mean(axis=0), 1 / 3, atol=0.01)
    np.testing.assert_allclose(shares.var(axis=0), 1 / 18, atol=0.003)
    np.testing.assert_allclose(np.median(shares, axis=0), 1 - 0.5**0.5, atol=0.01)


def graded_oracle(quality, detection):
    """W(x) of quality fusion, frame by frame."""
    out = []
    for q, d in zip(quality, detection, strict=True):
        g = 0 if q < 0 else 0.2 if q < 20 else 0.3 if q < 30 else 0.6 if q < 40 else 1
        out.append(float(q) * float(d) * g)
    return np.asarray(out)


def test_graded_mean_is_w_of_x():
    quality = [-5, 0, 5, 20, 25, 30, 39.5, 40, 90]
    frames = one_hot_frames(quality)
    frames.detection[0] = np.linspace(0.5, 1, len(frames.detection[0]))
    expected = graded_oracle(quality, frames.detection[0][:9])
    mean = fuse("mean", None, frames, weighting="graded")
    np.testing.assert_allclose(mean.features[0, 0], expected / expected.sum(), rtol=1e-5)
    # Where the weights are all 0, theirs is 0 / 0.
    for worthless in ([-5, -1], [0, 0], [np.nan, -1]):
        mean = fuse("mean", None, one_hot_frames(worthless, padding=9), weighting="graded")
        np.testing.assert_allclose(mean.features[0, 0], [0.5, 0.5], rtol=1e-6)


def windows_oracle(frames, clip, max_frames, weights):
    """The fixed windows of one clip, loop by loop: the originals, then the merged."""
    real = np.flatnonzero(frames.mask[clip])
    ring = sorted(range(len(real)), key=lambda rank: rank * 2654435769 % 2**32)
    originals, merged = [], []
    for rank, t in enumerate(real):
        count = min(2 + rank % (max_frames - 1), len(real))
        place = ring.index(rank)
        window = [real[ring[(place + slot) % len(ring)]] for slot in range(count)]
        total = sum(weights[clip, u] for u in window)
        originals.append(frames.features[clip, t])
        merged.append(sum(weights[clip, u] / total * frames.features[clip, u] for u in window))
    return np.asarray(originals + merged)


@pytest.mark.parametrize("weighting", ["uniform", "quality"])
def test_fixed_windows_match_a_loop(weighting):
    frames = make_frames([9, 1, 3, 0, 6], max_frames=9, dtype="float32")
    frames.mask[0, 4] = frames.mask[4, 0] = False  # filters leave holes
    weights = np.ones((5, 9)) if weighting == "uniform" else frames.quality * frames.detection
    union = fuse("windows", None, frames, max_frames=4, weighting=weighting)
    for clip in (0, 1, 2, 4):
        expected = windows_oracle(frames, clip, 4, weights)
        real = np.asarray(union.mask[clip])
        assert real.sum() == 2 * frames.mask[clip].sum()
        np.testing.assert_allclose(union.features[clip, real], expected, atol=1e-6)
    np.testing.assert_array_equal(union.mask, np.concatenate([frames.mask] * 2, axis=1))
    np.testing.assert_array_equal(union.number, np.concatenate([frames.number] * 2, axis=1))


def test_random_windows_hold_their_frame_and_one_to_four_others():
    length = 12
    frames = one_hot_frames(np.ones(length), padding=2)
    draw = jax.vmap(lambda rng: fusion.merged_windows(rng, frames))
    union = jax.jit(draw)(jax.random.split(jax.random.key(9), 500))
    assert union.features.dtype == np.float16
    np.testing.assert_array_equal(union.features[:, 0, :length], [np.eye(length)] * 500)
    merged = np.asarray(union.features[:, 0, length + 2 : -2], np.float32) > 0  # (500, 12, 12)
    assert merged[:, range(length), range(length)].all()
    counts = merged.sum(axis=2)
    np.testing.assert_allclose(np.bincount(counts.ravel(), minlength=6)[2:] / 6000, 0.25, atol=0.02)
    others = merged.mean(axis=0)[~np.eye(length, dtype=bool)]
    np.testing.assert_allclose(others, 2.5 / 11, atol=0.08)


def test_crops_are_the_means_of_their_frames():
    frames = make_frames([7, 12, 2, 1, 0], max_frames=13)
    frames.mask[1, 3] = False  # 11 real frames are left
    crops = fuse("crops", None, frames)
    bounds = {7: [(0, 7), (2, 7), (0, 5), (1, 6)], 11: [(0, 11), (3, 11), (0, 8), (1, 10)]}
    bounds |= {n: [(0, n)] * 4 for n in (1, 2)}
    for clip in range(4):
        real = np.flatnonzero(frames.mask[clip])
        for crop, (start, stop) in enumerate(bounds[len(real)]):
            t = real[start:stop]
            weights = (frames.quality * frames.detection)[clip, t].astype(float)
            expected = weights @ frames.features[clip, t].astype(float) / weights.sum()
            np.testing.assert_allclose(crops.features[clip, crop], expected, atol=1e-6)
            assert crops.number[clip, crop] == frames.number[clip, t[0]]
    np.testing.assert_array_equal(crops.mask, [[True] * 4] * 4 + [[False] * 4])
    np.testing.assert_array_equal(crops.features[4], 0)


def test_every_fusion_filters_first():
    frames = make_frames([9, 4, 0], max_frames=9)
    narrow = selection.filter_frames(frames, min_quality=40.0, min_detection=0.6, top_share=0.7)
    assert 1 < narrow.mask[0].sum() < 6
    filters = {"min_quality": 40.0, "min_detection": 0.6, "top_share": 0.7}
    for name in ("mean", "top"):
        filtered = fuse(name, None, frames, **filters)
        expected = fuse(name, None, narrow)
        jax.tree.map(np.testing.assert_array_equal, filtered, expected)


def test_the_kept_share_is_of_the_fused_frames():
    """The article's order of the test: merge, then keep the best of frames and merged ones."""
    frames = make_frames([9, 4, 0], max_frames=9)
    every = fuse("windows", None, frames)
    kept = fuse("windows", None, frames, kept_share=0.7)
    for clip, count in enumerate([13, 6, 0]):  # of 18 and 8, rounded up
        best = np.argsort(-np.where(every.mask, every.quality, -np.inf)[clip])[:count]
        np.testing.assert_array_equal(np.flatnonzero(kept.mask[clip]), np.sort(best))
    np.testing.assert_array_equal(kept.features, every.features)


def test_mean_frame_is_the_weighted_mean():
    frames = make_frames([4, 2, 0], max_frames=4)
    for weighting in ("uniform", "quality"):
        mean = fuse("mean", None, frames, weighting=weighting)
        for clip, length in enumerate([4, 2]):
            weights = np.ones(length)
            if weighting == "quality":
                weights = (frames.quality * frames.detection)[clip, :length].astype(float)
            expected = weights @ frames.features[clip, :length].astype(float) / weights.sum()
            np.testing.assert_allclose(mean.features[clip, 0], expected, rtol=1e-5, atol=1e-6)
        assert mean.features.dtype == np.float32
        np.testing.assert_array_equal(mean.features[2], 0)
        np.testing.assert_array_equal(mean.mask[:, 0], [True, True, False])


def test_all_frames_is_the_identity():
    frames = make_frames([2, 0], max_frames=3)
    same = fusion.make_fusion({"name": "all"})(None, frames)
    jax.tree.map(np.testing.assert_array_equal, same, frames)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "random_fusion"}, "did you mean 'random'?"),
        ({"name": "blur"}, f"choose from {', '.join(sorted(fusion.FUSIONS))}"),
        ({}, f"choose from {', '.join(sorted(fusion.FUSIONS))}"),
        ({"name": "top", "frames": 3}, "no option frames; choose from num_frames, and for every"),
        ({"name": "random"}, "needs num_draws"),
    ],
)
def test_unknown_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        fusion.make_fusion(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 0}, "1 or more"),
        ({"num_draws": 1, "probs": (1, 2)}, "probs must be 5 finite"),
        ({"num_draws": 1, "max_frames": 2, "probs": (1, -1)}, "probs must be 2 finite"),
        ({"num_draws": 1, "weighting": "norm"}, "choose from graded, quality, uniform"),
    ],
)
def test_impossible_values_are_refused(options, message):
    frames = make_frames([2], max_frames=2)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(fusion.make_fusion({"name": "random", **options}), jax.random.key(0), frames)
