"""Selection: which frames stay, come first, are drawn or joined, against loops."""

import math

import jax
import numpy as np
import pytest

from tests.test_fusion import fuse, make_frames, pad
from vidjax import selection


def filter_oracle(frames, clip, min_quality, min_detection, top_share):
    """Which frames of one clip pass, loop by loop."""
    real = [t for t in range(frames.mask.shape[1]) if frames.mask[clip, t]]
    kept = [
        t
        for t in real
        if (min_quality is None or frames.quality[clip, t] >= min_quality)
        and (min_detection is None or frames.detection[clip, t] >= min_detection)
    ]
    best = sorted(kept, key=lambda t: -frames.quality[clip, t])
    kept = best[: math.ceil(round(top_share * len(best), 9))] or real
    return [t in kept for t in range(frames.mask.shape[1])]


@pytest.mark.parametrize(
    ("min_quality", "min_detection", "top_share"),
    [
        (None, None, 0.7),
        (40.0, None, 1.0),
        (None, 0.8, 1.0),
        (30.0, 0.7, 0.5),
        (-np.inf, None, 0.1),
    ],
)
def test_filters_match_a_loop(min_quality, min_detection, top_share):
    frames = make_frames([30, 10, 1, 0, 9, 20], max_frames=30)
    frames.quality[1] = np.rint(frames.quality[1] / 30) * 30  # ties
    frames.quality[4] = 2
    frames.mask[5, 3:9] = False

    @jax.jit
    def narrow(frames, min_quality):
        options = {"min_detection": min_detection, "top_share": top_share}
        return selection.filter_frames(frames, min_quality=min_quality, **options)

    kept = narrow(frames, min_quality)
    expected = [
        filter_oracle(frames, clip, min_quality, min_detection, top_share) for clip in range(6)
    ]
    np.testing.assert_array_equal(kept.mask, expected)
    jax.tree.map(np.testing.assert_array_equal, kept._replace(mask=frames.mask), frames)


@pytest.mark.parametrize("share", [0.07, 0.1, 0.3, 0.7, 0.9])
def test_the_best_share_is_counted_exactly(share):
    frames = make_frames(range(1, 101), max_frames=100)
    kept = selection.filter_frames(frames, top_share=share).mask.sum(axis=1)
    percent = round(100 * share)
    np.testing.assert_array_equal(kept, [-(-percent * n // 100) for n in range(1, 101)])


def test_a_quality_that_is_no_number_is_the_lowest():
    frames = make_frames([4, 2], max_frames=4)
    frames.quality[:] = [[np.nan, 50, np.inf, 60], [np.nan, np.nan, 0, 0]]
    masks = {
        least: selection.filter_frames(frames, min_quality=least).mask for least in (-np.inf, 20.0)
    }
    np.testing.assert_array_equal(masks[-np.inf], frames.mask)
    np.testing.assert_array_equal(masks[20.0], [[False, True, False, True], frames.mask[1]])


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_impossible_shares_are_refused(share):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        selection.filter_frames(make_frames([2], max_frames=2), top_share=share)


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

    draw = jax.vmap(lambda rng: selection.top_frames(rng, frames, num_frames=32).number[0])
    drawn = jax.jit(draw)(jax.random.split(jax.random.key(8), 200))
    counts = np.stack([np.sum(np.asarray(drawn) == 10 * t, axis=1) for t in range(3)])
    assert counts.min() >= 1  # every frame is there once before any is drawn again
    np.testing.assert_allclose(counts.mean(axis=1), 32 / 3, atol=0.7)
    assert counts.std() > 1


def test_samples_are_different_frames_in_time_order():
    frames = make_frames([12, 5, 2, 0], max_frames=12)
    frames.mask[0, [0, 7]] = False
    draw = jax.vmap(lambda rng: selection.sample_frames(rng, frames, num_frames=5))
    drawn = jax.jit(draw)(jax.random.split(jax.random.key(1), 600))
    number = np.asarray(drawn.number) // 10  # (600, 4, 5)
    assert np.all(np.diff(number[:, 0]) > 0)
    share = np.bincount(number[:, 0].ravel(), minlength=12) / 600
    np.testing.assert_allclose(share, 0.5 * frames.mask[0], atol=0.08)
    np.testing.assert_array_equal(number[:, 1], [np.arange(5)] * 600)
    ones = number[:, 2].sum(axis=1)
    assert np.all(np.diff(number[:, 2]) >= 0)
    assert (ones.min(), ones.max()) == (1, 4)  # both frames are always there
    np.testing.assert_array_equal(drawn.mask[0], [[True] * 5] * 3 + [[False] * 5])
    assert drawn.features.dtype == np.float16
    clip, t = 0, number[7, 0]
    np.testing.assert_array_equal(drawn.features[7, clip], frames.features[clip, t])


@pytest.mark.slow
def test_samples_of_random_order_are_the_same_frames_in_another_order():
    frames = make_frames([12, 5, 2, 0], max_frames=12)
    options = {"num_frames": 5, "order": "random"}
    draw = jax.vmap(lambda rng: selection.sample_frames(rng, frames, **options))
    drawn = jax.jit(draw)(jax.random.split(jax.random.key(1), 600))
    number = np.asarray(drawn.number) // 10  # (600, 4, 5)
    np.testing.assert_array_equal(np.sort(number[:, 1]), [np.arange(5)] * 600)
    place = np.argsort(number[:, 1], axis=1)  # of each of the five frames
    np.testing.assert_allclose(place.mean(axis=0), 2, atol=0.2)
    np.testing.assert_array_equal(drawn.features[7, 0], frames.features[0, number[7, 0]])
    even, fixed = (
        fuse("sample", None, frames, **{**options, "order": o}) for o in ("time", "random")
    )
    np.testing.assert_array_equal(np.sort(fixed.number), even.number)
    assert (np.diff(fixed.number[0]) < 0).any()
    with pytest.raises(ValueError, match="unknown order 'quality'; choose from random, time"):
        selection.sample_frames(None, frames, order="quality")


def test_samples_without_a_key_are_evenly_spaced():
    frames = make_frames([12, 10, 2, 0], max_frames=12)
    frames.mask[0, [0, 7]] = False  # 10 are left
    even = fuse("sample", None, frames, num_frames=5)
    np.testing.assert_array_equal(even.number[1] // 10, [1, 3, 5, 7, 9])
    np.testing.assert_array_equal(even.number[0] // 10, [2, 4, 6, 9, 11])
    np.testing.assert_array_equal(even.number[2] // 10, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(even.mask.any(axis=1), [True, True, True, False])


def test_graded_weights_fall_back_to_uniform():
    frames = make_frames([3, 3, 0], max_frames=3)
    frames.quality[:2] = [[-1, 10, 50], [-1, -2, np.nan]]
    frames.detection[:] = 1
    weights = jax.jit(selection.frame_weights, static_argnums=1)(frames, "graded")
    np.testing.assert_allclose(weights, [[0, 2, 50], [1, 1, 1], [0, 0, 0]], rtol=1e-6)


@jax.jit
def join(rng, clips, chosen):
    """Joins every modality; the face decides which clips are short."""
    length = clips["face"].mask.sum(axis=1)
    short = (length > 0) & (length < 6)
    return {
        name: selection.concat_clips(rng, frames, chosen, short, max_frames=6)
        for name, frames in clips.items()
    }


def real(frames, clip):
    """The features of the real frames of one clip."""
    return np.asarray(frames.features[clip])[np.asarray(frames.mask[clip])]


def test_clips_are_joined_to_others_and_cut():
    lengths = [5, 3, 9, 4, 2, 0, 8]
    chosen = np.array([True, True, True, True, False, True, False])
    face = make_frames(lengths, max_frames=9)
    face.mask[2, 1] = False  # 8 real frames are left
    audio = make_frames([1, 0, 7, 2, 1, 0, 1], max_frames=7, seed=4)
    clips, partners, pieces = {"face": face, "audio": audio}, [], set()
    for seed in range(60):
        union = jax.tree.map(np.asarray, join(jax.random.key(seed), clips, chosen))
        assert union["face"].mask.shape == (7, 18)
        assert union["face"].features.dtype == np.float16
        for clip in (4, 5, 6):  # not chosen, or without a frame
            np.testing.assert_array_equal(real(union["face"], clip), real(face, clip))
        for clip in (0, 1, 3):
            found = []
            for name, frames in clips.items():
                followed = {p: [real(frames, clip), real(frames, p)] for p in {0, 1, 3} - {clip}}
                followed[clip] = [real(frames, clip)]  # by none
                expected = {p: np.concatenate(parts) for p, parts in followed.items()}
                result = real(union[name], clip)
                found.append([p for p, x in expected.items() if np.array_equal(result, x)])
            assert len(found[0]) == 1  # of the face, which every clip has
            assert found[0][0] in found[1]
            partners.append((clip, found[0][0]))
            number = union["face"].number[clip][union["face"].mask[clip]]
            assert np.all(np.diff(number) > 0)
        start = int(np.flatnonzero(union["face"].mask[2])[0])
        start = np.flatnonzero(face.mask[2]).tolist().index(start)
        np.testing.assert_array_equal(real(union["face"], 2), real(face, 2)[start : start + 6])
        assert len(real(union["audio"], 2)) == 6
        pieces.add(start)
    assert pieces == {0, 1, 2}
    pairs = {(clip, other) for clip, other in partners if other != clip}
    assert pairs == {(0, 1), (0, 3), (1, 0), (1, 3), (3, 0), (3, 1)}
    alone = [other == clip for clip, other in partners]
    np.testing.assert_allclose(np.mean(alone), 0.5, atol=0.13)


def test_a_clip_alone_is_joined_to_nothing():
    frames = {"face": make_frames([3, 2], max_frames=3)}
    for seed in range(5):
        union = join(jax.random.key(seed), frames, np.array([True, False]))["face"]
        np.testing.assert_array_equal(union.mask.sum(axis=1), [3, 2])


@pytest.mark.slow
def test_padding_changes_no_joint():
    frames = make_frames([5, 3, 9, 4], max_frames=9)
    longer, chosen = pad(frames, 4), np.ones(4, bool)
    for seed in range(3):
        first, second = (
            join(jax.random.key(seed), {"face": f}, chosen)["face"] for f in (frames, longer)
        )
        for clip in range(4):
            np.testing.assert_array_equal(real(first, clip), real(second, clip))
