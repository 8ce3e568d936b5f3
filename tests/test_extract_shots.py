"""shots: cuts in made films, by what the camera does."""

import numpy as np
import pytest

from tests.helpers.cases import quick_first
from vidjax.apps.video import shots

RATE = 25
CAMERAS = ["still", "pan", "hand", "zoom"]
nightly = pytest.mark.nightly


def landscape(rng, bright):
    """Returns a large picture with detail of every size, float32 [240, 420, 3]."""
    picture = np.zeros((240, 420, 3))
    for cells, strength in ((4, 1.0), (9, 0.6), (25, 0.4), (60, 0.25)):
        coarse = rng.normal(0, 1, (cells, 2 * cells, 1)) + rng.normal(0, 0.5, (cells, 2 * cells, 3))
        fine = coarse.repeat(-(-240 // cells), 0).repeat(-(-420 // (2 * cells)), 1)
        picture += strength * fine[:240, :420]
    picture *= rng.uniform(30, 60) / picture.std()
    return (np.clip(picture + rng.uniform(60, 170, 3), 0, 255) * bright).astype(np.float32)


def seen(picture, x, y, zoom):
    """Returns what a camera sees of it around (x, y), float [36, 64, 3]."""
    rows = np.clip(y + np.linspace(-70, 70, 72) * zoom, 0, 239).astype(int)
    columns = np.clip(x + np.linspace(-125, 125, 128) * zoom, 0, 419).astype(int)
    parts = [picture[rows[n // 2 :: 2]][:, columns[n % 2 :: 2]] for n in range(4)]
    return (parts[0] + parts[1] + parts[2] + parts[3]) / np.float32(4)


def shot(rng, camera, frames, bright):
    """Returns a shot with a head that walks through it, float [frames, 36, 64, 3]."""
    background, colour = landscape(rng, bright), rng.uniform(0, 255, 3) * bright
    x, y, zoom = 210.0, 120.0, 0.85
    head, walk = rng.uniform(80, 340), rng.uniform(-5, 5)
    step = rng.uniform(-6, 6, 2)
    made = []
    for n in range(frames):
        head = np.clip(head + walk, 30, 390)
        covered = np.s_[95:145, int(head) - 18 : int(head) + 18]
        behind = background[covered].copy()
        background[covered] = colour
        if camera == "pan":
            step[0] *= 1 if 100 < x + step[0] < 320 else -1
            x, y = x + step[0], y + 0.3 * step[1]
        elif camera == "hand":
            x, y = x + rng.normal(0, 1.5), y + rng.normal(0, 1)
        elif camera == "zoom":
            zoom *= 1 + 0.01 * np.sin(n / 10)
        made.append(seen(background, x, y, zoom))
        background[covered] = behind
    return np.array(made)


def filmed(rng, *parts):
    """Returns parts one after the other with noise, uint8."""
    frames = np.concatenate(parts)
    noise = rng.standard_normal(frames.shape, np.float32) * 1.5
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def cuts(film):
    """Returns the numbers of the frames that begin a shot, but the first."""
    detector = shots.ShotDetector()
    return [n for n, small in enumerate(film) if detector.update(n / RATE, small)][1:]


def fade(start, steps):
    return start * np.linspace(1, 0, steps)[:, None, None, None]


@pytest.mark.parametrize(
    ("dark", "bright"), quick_first([(0.6, 1.0), (0.08, 0.15), (0.1, 1.0)], mark=nightly)
)
def test_cuts_are_found_and_motion_is_not_taken_for_a_cut(dark, bright):
    right = wrong = count = 0
    for seed in range(2):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(20, 60, 10)
        parts = [
            shot(rng, rng.choice(CAMERAS), length, rng.uniform(dark, bright)) for length in lengths
        ]
        expected, reported = {*np.cumsum(lengths)[:-1].tolist()}, {*cuts(filmed(rng, *parts))}
        right, wrong = right + len(reported & expected), wrong + len(reported - expected)
        count += len(expected)
    assert right >= 0.98 * count and wrong <= 0.02 * count


@pytest.mark.parametrize("steps", quick_first([15, 6, 40], mark=nightly))
def test_fade_through_black_is_one_cut_at_the_next_shot(steps):
    for seed in range(2):
        rng = np.random.default_rng(seed)
        first, second = shot(rng, "still", 40, 0.8), shot(rng, "still", 40, 0.5)
        out, back = fade(first[-1:], steps), fade(second[:1], steps)[::-1]
        cut_frames = cuts(filmed(rng, first, out, back, second))
        assert len(cut_frames) == 1 and abs(cut_frames[0] - 40 - steps) <= 3 + steps / 3
        # A fade out at the end and black frames are no shots.
        black = np.zeros((30, 36, 64, 3))
        assert cuts(filmed(rng, first, fade(first[-1:], 20), black)) == []
        assert cuts(filmed(rng, black, first)) == [30]


@pytest.mark.parametrize("steps", quick_first([15, 8, 25], mark=nightly))
def test_dissolve_is_one_cut_in_its_middle_reported_after_its_end(steps):
    for seed in range(2):
        rng = np.random.default_rng(seed)
        first, second = shot(rng, "still", 40, 0.8), shot(rng, "still", 60, 0.6)
        mixed = fade(first[-1:], steps) + second[:1] - fade(second[:1], steps)
        film = filmed(rng, first[-1:].repeat(40, 0), mixed, second[:1].repeat(60, 0))
        detector = shots.ShotDetector()
        (reported,) = [n for n, small in enumerate(film) if detector.update(n / RATE, small)][1:]
        assert 40 < reported <= 40 + steps + 15
        assert detector.starts[1] * RATE == pytest.approx(40 + (steps - 1) / 2, abs=RATE / 5)


@nightly
def test_slow_pan_over_fine_detail_is_not_taken_for_a_dissolve():
    """Pictures a second apart differ, and the pictures between are nearly their mixtures."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        fine = rng.uniform(60, 190, (60, 100, 1)).repeat(3, 2)
        film = []
        for place in np.arange(0, 6, 0.025):
            whole, part = divmod(place, 1)
            left, right = (fine[10:46, n : n + 64] for n in (int(whole), int(whole) + 1))
            film.append((1 - part) * left + part * right)
        assert cuts(filmed(rng, np.array(film))) == []


def test_flash_and_brighter_lamp_are_not_taken_for_cuts():
    rng = np.random.default_rng(1)
    film = shot(rng, "hand", 60, 0.5)
    flash, lamp = filmed(rng, film), film.copy()
    flash[30] = 250
    lamp[30:] *= 1.6
    assert cuts(flash) == cuts(filmed(rng, lamp)) == []


def test_shot_detector_returns_shot_times_and_keeps_few_pictures():
    rng = np.random.default_rng(3)
    film = filmed(rng, shot(rng, "still", 30, 1.0), shot(rng, "still", 20, 0.4))
    detector = shots.ShotDetector()
    for n, small in enumerate([*film, *[film[-1]] * 450]):
        detector.update(n / RATE, small)
    assert detector.shots(20.0) == [(0.0, 1.2), (1.2, 20.0)]
    assert len(detector._changes) <= 15 and len(detector._dissolve._kept) < 30
    assert shots.ShotDetector().shots(0.0) == []
