"""Fusion: what is drawn, how it is averaged, and that padding and devices change nothing."""

import jax
import numpy as np
import pytest

from vidjax import fusion
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
    # Of 300 frames hardly ever all that are drawn are the same.
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
    {"name": "top", "num_frames": 4},
    {"name": "mean", "weighting": "quality"},
]


@pytest.mark.parametrize("spec", SPECS)
def test_padding_and_bad_quality_reach_no_feature(spec):
    frames = make_frames([5, 0, 1, 3, 3], max_frames=5)
    frames.quality[3:, :3] = [[np.nan, np.inf, -1], [-1, -2, np.nan]]
    short = fuse(rng=jax.random.key(5), frames=frames, **spec)
    long = fuse(rng=jax.random.key(5), frames=pad(frames, 7), **spec)
    np.testing.assert_array_equal(short.mask, long.mask)
    np.testing.assert_array_equal(short.mask.any(axis=1), [True, False, True, True, True])
    keep = np.asarray(short.mask)
    for name in ("features", "quality", "detection", "number"):
        np.testing.assert_array_equal(getattr(short, name)[keep], getattr(long, name)[keep])
    assert np.isfinite(short.features).all()
    assert np.abs(np.asarray(short.features)[keep]).max(axis=1).min() > 0


@pytest.mark.parametrize("spec", SPECS)
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
        assert f"f32[{16 // count},7,6]" not in program  # never the whole in float32
        fused.append(compiled(jax.device_put(jax.random.key(7), everywhere), frames))
    jax.tree.map(np.testing.assert_array_equal, *fused)


def test_top_frames_keeps_the_best_in_time_order():
    frames = make_frames([9, 9], max_frames=9)
    top = fuse("top", None, frames, num_frames=4)
    for clip in range(2):
        best = np.sort(np.argsort(-frames.quality[clip], kind="stable")[:4])
        np.testing.assert_array_equal(top.number[clip], frames.number[clip, best])
        np.testing.assert_array_equal(top.features[clip], frames.features[clip, best])
    assert top.features.dtype == np.float16


def test_top_frames_repeats_what_there_is():
    frames = make_frames([3, 1, 0], max_frames=3)
    turns = fuse("top", None, frames, num_frames=32)
    best, middle, worst = np.argsort(-frames.quality[0])
    counts = np.bincount(np.asarray(turns.number[0]) // 10, minlength=3)
    assert (counts[best], counts[middle], counts[worst]) == (11, 11, 10)
    np.testing.assert_array_equal(turns.number[1], np.zeros(32))
    assert np.array_equal(turns.mask.sum(axis=1), [32, 32, 0])

    draw = jax.vmap(lambda rng: fusion.top_frames(rng, frames, num_frames=32).number[0])
    drawn = jax.jit(draw)(jax.random.split(jax.random.key(8), 200))
    counts = np.stack([np.sum(np.asarray(drawn) == 10 * t, axis=1) for t in range(3)])
    assert counts.min() >= 1  # every frame is there once before any is drawn again
    np.testing.assert_allclose(counts.mean(axis=1), 32 / 3, atol=0.7)
    assert counts.std() > 1


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
        ({"name": "random_fusion"}, "known are all, mean, random, top"),
        ({}, "known are all, mean, random, top"),
        ({"name": "top", "frames": 3}, "no option frames; known are num_frames"),
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
        ({"num_draws": 1, "probs": (1, 2)}, "5 numbers"),
        ({"num_draws": 1, "max_frames": 2, "probs": (1, -1)}, "2 numbers"),
        ({"num_draws": 1, "weighting": "norm"}, "known are quality, uniform"),
    ],
)
def test_impossible_values_are_refused(options, message):
    frames = make_frames([2], max_frames=2)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(fusion.make_fusion({"name": "random", **options}), jax.random.key(0), frames)
