"""tracks: heads that walk, cross, hide and leave."""

import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from vidjax.apps.video import cards, tracks
from vidjax.apps.video.cards import BackEnd

# Faces of 234 tracks of real films, in the folder next to VIDJAX_REAL_DATA.
TRACKS = Path(os.environ.get("VIDJAX_REAL_DATA", "/nowhere")).parent / "tracks" / "tracks.npz"


def walk(start, speed):
    """Returns a function of time: the box of one head."""
    half = np.array([-24, -30, 24, 30])
    return lambda time_s: np.tile(np.add(start, np.multiply(time_s, speed)), 2) + half


def follow(people, seconds, *, fps=5, noise=1.0, unseen=lambda person, time_s: False, seed=0):
    """Returns the tracks, and of each track the people whose detections it holds."""
    rng, tracker, owners = np.random.default_rng(seed), tracks.Tracker(), defaultdict(set)
    for time_s in np.arange(0, seconds, 1 / fps):
        here = [n for n in rng.permutation(len(people)) if not unseen(n, time_s)]
        boxes = np.array([people[n](time_s) for n in here]).reshape(-1, 4)
        boxes += rng.normal(0, noise, boxes.shape)
        kept: list[int] = []  # no two overlap by half, as every detector ends
        for n in range(len(boxes)):
            if not kept or tracks.measure_overlaps(boxes[[n]], boxes[kept]).max() < 0.5:
                kept.append(n)
        numbers = tracker.update(time_s, boxes[kept]).tolist()
        for number, n in zip(numbers, kept, strict=True):
            owners[number].add(int(here[n]))
    tracker.cut(seconds)
    ended = tracker.take_ended()
    return ended, [sorted(owners[track.number]) for track in ended]


@pytest.mark.parametrize(("fps", "below"), [(2, 10), (5, 0), (10, 10)])
def test_two_heads_that_cross_keep_their_tracks(fps, below):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        speed = rng.uniform(15, 25) * fps / 5 + 10
        people = [walk((100, 100), (speed, 0)), walk((100 + 6 * speed, 100 + below), (-speed, 0))]
        ended, owners = follow(people, 6, fps=fps, seed=seed)
        assert sorted(owners) == [[0], [1]], (seed, owners)
        assert all(len(track.times) >= 5 * fps for track in ended)


def test_tracks_of_a_hidden_head_never_mix_two_people():
    for seed in range(5):
        people = [walk((100, 100), (40, 0)), walk((300, 105), (-40, 0))]
        hidden = lambda n, t: n == 1 and abs(t - 2.5) < 0.45  # noqa: E731
        _, owners = follow(people, 5, unseen=hidden, seed=seed)
        assert all(len(who) == 1 for who in owners) and len(owners) <= 4, (seed, owners)


def test_faces_keep_their_tracks_in_a_fast_pan_and_a_crowd():
    """Three faces of 48 pixels move by 45 pixels per frame; then 24 people move slowly."""
    ended, owners = follow([walk((100 + 110 * n, 100), (225, 0)) for n in range(3)], 3)
    assert sorted(owners) == [[n] for n in range(3)]
    for track in ended:
        np.testing.assert_allclose(track.times, np.arange(15) / 5)
    speed = np.random.default_rng(0).uniform(-3, 3, 24)
    people = [walk((100 + 90 * (n % 8), 100 + 150 * (n // 8)), (speed[n], 0)) for n in range(24)]
    _, owners = follow(people, 8, noise=2)
    assert sorted(owners) == [[n] for n in range(24)]


def test_track_continues_after_a_short_gap_but_not_after_a_long_gap():
    person = [walk((100, 100), (20, 0))]
    for end, numbers in ((2.7, [0]), (3.9, [0, 1])):
        ended, _ = follow(person, 6, unseen=lambda n, t, end=end: 2 < t < end)
        assert [track.number for track in ended] == numbers


BOX = np.array([[10, 10, 60, 70]])


def test_cut_ends_every_track():
    tracker = tracks.Tracker()
    for n in range(20):
        if n == 10:
            tracker.cut(1.9)
            assert [len(track.times) for track in tracker.take_ended()] == [10]
            assert tracker.take_ended() == []
        assert tracker.update(n / 5, BOX).tolist() == [n // 10]
    tracker.cut(3.9)
    (last,) = tracker.take_ended()
    assert (last.shot, last.number, len(last.times)) == (1, 1, 10)
    assert last.times[0] == 1.9, "where the shot begins"
    assert last.ends == [*last.times[1:], 3.9]


def test_tracks_change_in_the_middle_of_a_dissolve():
    """The dissolve lasts from 1 to 2 s; for some frames, both people are detected."""
    tracker, main = tracks.Tracker(), tracks.MainFigures()
    other = np.array([[200, 10, 260, 70]])
    for n in range(20):
        if n == 10:
            for each in (tracker, main):
                each.cut(1.5)
        tracker.update(n / 5, BOX if n < 6 else other if n > 8 else np.concatenate([BOX, other]))
        main.update(n / 5, BOX)
    for each in (tracker, main):
        each.cut(3.9)
        first, last = each.take_ended()
        assert (first.shot, first.times[0], first.times[-1], first.ends[-1]) == (0, 0.0, 1.4, 1.5)
        assert len(first.times) == len(first.ends) == 8
        assert (last.shot, last.times[:2], last.ends[-1]) == (1, [1.5, 2.2], 3.9)


def test_split_of_a_track_divides_its_sightings_by_time():
    track = tracks.Track(3, 7, times=[0.1, 0.4, 0.8, 1.6], ends=[0.4, 0.6, 1.2, 2.0])
    parts = track.split([0.6, 1.2])
    assert [part.times for part in parts] == [[0.1, 0.4], [0.8], [1.6]]
    assert [part.ends for part in parts] == [[0.4, 0.6], [1.2], [2.0]]
    assert {(part.number, part.shot) for part in parts} == {(3, 7)}


def test_single_detection_is_a_track_if_its_picture_lasts_long():
    for held_s, wanted in ((0.2, []), (0.5, [([1.0], [1.5])]), (4.0, [([1.0], [5.0])])):
        tracker = tracks.Tracker()
        tracker.update(1.0, BOX)
        assert tracker.update(1.0 + held_s, np.zeros((0, 4))).shape == (0,)
        tracker.cut(6.0)
        assert [(track.times, track.ends) for track in tracker.take_ended()] == wanted
    # A track of slow frames may lack one of them.
    for rate in (0.1, 24_000 / 24_024, 5.0):
        tracker = tracks.Tracker(gap_s=tracks.choose_gap_seconds(rate))
        assert [tracker.update(n / rate, BOX).tolist() for n in (0, 2, 3)] == [[0]] * 3


def test_overlap_is_intersection_over_union():
    corners = np.random.default_rng(1).integers(0, 12, (2, 9, 2, 2))
    boxes = np.concatenate([corners.min(2), corners.max(2) + 1], -1)
    pixels = np.zeros((2, 9, 13, 13), bool)
    for place in np.ndindex(2, 9):
        left, top, right, bottom = boxes[place]
        pixels[place][top:bottom, left:right] = True
    both = (pixels[0][:, None] & pixels[1]).sum((2, 3))
    either = (pixels[0][:, None] | pixels[1]).sum((2, 3))
    overlaps = tracks.measure_overlaps(*boxes.astype(float))
    np.testing.assert_allclose(overlaps, both / either)


def test_main_figure_follows_the_definition_of_the_paper():
    """Section 3.2: alone or three times larger than others in more than 30 % of the frames."""

    def seen(frames, fps=5):
        shots = tracks.MainFigures()
        for number, sides in enumerate(frames):
            boxes = np.array([[0, 0, side, 1] for side in sides], np.float32).reshape(-1, 4)
            shots.update(number / fps, boxes)
        shots.cut(len(frames) / fps)
        return [len(track.times) for track in shots.take_ended()]

    assert seen([[3, 1]] * 10) == [10] and seen([[2.9, 1]] * 10) == []
    assert seen([[1]] * 3 + [[]] * 7) == [] and seen([[1]] * 4 + [[]] * 6) == [4]
    assert seen([[1]] * 4) == [] and seen([[1]] * 5) == [5]
    assert seen([[1]] * 150) == [150] and seen([[1]] * 151) == []


# What the card of dlib's net says of pairs of vectors.
DLIB = BackEnd(**{**cards.PUBLISHED["dlib"]["back_end"], "centre": [0.0] * 128})


def faces(order, alike=0.98, seed=0):
    """Returns vectors [N, 128] of faces, of a person each; two of one person have `alike`."""
    rng, each = np.random.default_rng(seed), 0.83 / alike  # of two people's middles
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(128, max(order) + 2)))[0].T
    people = np.sqrt(each) * axes[0] + np.sqrt(1 - each) * axes[1:]
    noise = rng.normal(size=(len(order), 128)) / np.sqrt(128)
    return people[order] + np.sqrt(1 / alike - 1) * noise


def test_track_is_split_where_another_person_appears():
    for order, places in (
        ([0] * 10 + [1] * 10 + [0] * 10, [10, 20]),
        ([0] * 20 + [1] * 5, [20]),
        ([0] * 20 + [1] * 2, []),  # of a dissolve
        ([0] * 40, []),
        ([0], []),
    ):
        for seed in range(3):
            vectors, times = 1.5 * faces(order, seed=seed), np.arange(len(order)) / 5
            assert tracks.find_changes(vectors, times, False, DLIB) == places
            assert tracks.find_changes(vectors, times, False, None) == []
    # Pictures far apart may each show somebody else.
    for order in ([0, 1, 0, 1], [0, 0, 1, 2, 2, 2, 0], [0] * 5, [0]):
        vectors, times = faces(order, alike=0.95), 4.0 * np.arange(len(order))
        places = [n for n in range(1, len(order)) if order[n] != order[n - 1]]
        assert tracks.find_changes(vectors, times, True, DLIB) == places


@pytest.mark.skipif(not TRACKS.exists(), reason="no tracks beside VIDJAX_REAL_DATA")
def test_real_tracks_are_split_only_if_they_show_two_people():
    """In 13 tracks, over a fifth of the faces show another person; fewer faces are a dissolve."""
    with np.load(TRACKS) as file:
        arrays = dict(file)
    split = {True: [], False: []}
    for low, high in zip(arrays["track_begin"][:-1], arrays["track_begin"][1:], strict=True):
        person = arrays["person"][low:high]
        count = np.unique(person, return_counts=True)[1].max()
        vectors, times = arrays["vector"][low:high], arrays["time_s"][low:high]
        places = tracks.find_changes(vectors, times, False, DLIB)
        split[bool(count < 0.8 * len(person))].append(bool(places))
    assert len(split[True]) == 13 and sum(split[True]) >= 12
    assert len(split[False]) == 221 and not any(split[False])
