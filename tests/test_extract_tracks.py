"""tracks: heads that walk, cross, hide and leave."""

import os
from pathlib import Path

import numpy as np
import pytest

from vidjax.apps.video import cards, tracks
from vidjax.apps.video.cards import BackEnd

# Numbers of the faces of 234 tracks, of real films; the folder lies beside VIDJAX_REAL_DATA.
TRACKS = Path(os.environ.get("VIDJAX_REAL_DATA", "/nowhere")).parent / "tracks" / "tracks.npz"


class Walk:
    """Boxes of one head: where it is at a time."""

    def __init__(self, start, speed, size=60):
        self.start, self.speed, self.size = np.array(start, float), np.array(speed, float), size

    def box(self, time_s):
        middle = self.start + time_s * self.speed
        half = np.array([self.size * 0.4, self.size * 0.5])
        return np.concatenate([middle - half, middle + half])


def one_of_each(boxes):
    """Returns the boxes that overlap no box before them by half, as every detector ends."""
    kept: list[int] = []
    for n in range(len(boxes)):
        if not kept or tracks.measure_overlaps(boxes[[n]], boxes[kept]).max() < 0.5:
            kept.append(n)
    return kept


def follow(people, seconds, *, fps=5, noise=1.0, unseen=lambda person, time_s: False, seed=0):
    """Returns the tracks, and of each track the people whose detections it holds."""
    rng = np.random.default_rng(seed)
    tracker = tracks.Tracker()
    owners: dict[int, set[int]] = {}
    for time_s in np.arange(0, seconds, 1 / fps):
        here = [n for n in rng.permutation(len(people)) if not unseen(n, time_s)]
        boxes = np.array([people[n].box(time_s) for n in here]).reshape(-1, 4)
        boxes += rng.normal(0, noise, boxes.shape)
        kept = one_of_each(boxes)
        here, boxes = [here[n] for n in kept], boxes[kept]
        for number, n in zip(tracker.update(time_s, boxes).tolist(), here, strict=True):
            owners.setdefault(number, set()).add(int(n))
    tracker.cut(seconds)
    found = tracker.take_ended()
    return found, [sorted(owners[track.number]) for track in found]


def test_one_head_is_one_track():
    found, people = follow([Walk((100, 100), (80, 10))], 5)
    assert people == [[0]] and len(found[0].times) == 25
    np.testing.assert_allclose(found[0].times, np.arange(25) / 5)


@pytest.mark.parametrize("fps", [2, 5, 10])
@pytest.mark.parametrize("below", [0, 10, 25])
def test_two_heads_that_cross_keep_their_tracks(fps, below):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        speed = rng.uniform(15, 25) * fps / 5 + 10
        people = [Walk((100, 100), (speed, 0)), Walk((100 + 6 * speed, 100 + below), (-speed, 0))]
        found, owners = follow(people, 6, fps=fps, seed=seed)
        assert sorted(owners) == [[0], [1]], (seed, owners)
        assert all(len(track.times) >= 5 * fps for track in found)


@pytest.mark.parametrize("fps", [5, 10])
def test_a_head_that_passes_behind_another_is_not_switched(fps):
    for seed in range(10):
        people = [Walk((100, 100), (40, 0)), Walk((300, 105), (-40, 0))]
        hidden = lambda n, t: n == 1 and abs(t - 2.5) < 0.45  # noqa: E731
        _, owners = follow(people, 5, fps=fps, unseen=hidden, seed=seed)
        assert all(len(one) == 1 for one in owners), (seed, owners)
        assert len(owners) <= 4


@pytest.mark.parametrize("people", [1, 3])
def test_a_fast_pan_keeps_its_tracks(people):
    """Faces of 48 pixels that move by 45 in a picture, 110 from each other."""
    found, owners = follow([Walk((100 + 110 * n, 100), (225, 0)) for n in range(people)], 3)
    assert sorted(owners) == [[n] for n in range(people)]
    assert [len(track.times) for track in found] == [15] * people


def test_a_short_gap_is_bridged_and_a_long_one_is_not():
    person = [Walk((100, 100), (20, 0))]
    short, _ = follow(person, 6, unseen=lambda n, t: 2 < t < 2.7)
    long, _ = follow(person, 6, unseen=lambda n, t: 2 < t < 3.9)
    assert len(short) == 1 and len(long) == 2
    assert [track.number for track in long] == [0, 1]


def test_no_track_goes_over_a_cut():
    tracker = tracks.Tracker()
    box = np.array([[10, 10, 60, 70]])
    for n in range(20):
        if n == 10:
            tracker.cut(1.9)
            assert [len(track.times) for track in tracker.take_ended()] == [10]
            assert tracker.take_ended() == []
        numbers = tracker.update(n / 5, box)
        assert numbers.tolist() == [n // 10]
    tracker.cut(3.9)
    (last,) = tracker.take_ended()
    assert (last.shot, last.number, len(last.times)) == (1, 1, 10)
    assert last.times[0] == 1.9, "where the shot begins"
    assert last.ends == [*last.times[1:], 3.9]


def test_people_change_in_the_middle_of_a_dissolve():
    """It lasts from 1 to 2 s: the first one is seen until 1.8, the second one from 1.2 on."""
    tracker, main = tracks.Tracker(), tracks.MainFigures()
    one, other = np.array([[10, 10, 60, 70]]), np.array([[200, 10, 260, 70]])
    for n in range(20):
        if n == 10:
            for each in (tracker, main):
                each.cut(1.5)
        boxes = one if n < 6 else other if n > 8 else np.concatenate([one, other])
        tracker.update(n / 5, boxes)
        main.update(n / 5, one)
    for each in (tracker, main):
        each.cut(3.9)
        first, last = each.take_ended()
        assert (first.shot, first.times[0], first.times[-1], first.ends[-1]) == (0, 0.0, 1.4, 1.5)
        assert len(first.times) == len(first.ends) == 8
        assert (last.shot, last.times[:2], last.ends[-1]) == (1, [1.5, 2.2], 3.9)


def test_single_detections_and_frames_without_any_are_no_tracks():
    tracker = tracks.Tracker()
    tracker.update(0.0, np.array([[10, 10, 60, 70]]))
    for n in range(1, 5):
        assert tracker.update(n / 5, np.zeros((0, 4))).shape == (0,)
    tracker.cut(1.0)
    assert tracker.take_ended() == []


@pytest.mark.parametrize("held_s", [0.5, 4.0])
def test_a_picture_that_is_held_makes_a_track(held_s):
    tracker = tracks.Tracker()
    tracker.update(1.0, np.array([[10, 10, 60, 70]]))
    tracker.update(1.0 + held_s, np.zeros((0, 4)))
    tracker.cut(6.0)
    (found,) = tracker.take_ended()
    assert (found.times, found.ends) == ([1.0], [1.0 + held_s])


@pytest.mark.parametrize("rate", [0.1, 0.5, 24_000 / 24_024, 5.0])
def test_a_track_of_slow_frames_may_lack_one_of_them(rate):
    tracker = tracks.Tracker(gap_s=tracks.choose_gap_seconds(rate))
    for n in (0, 2, 3):
        assert tracker.update(n / rate, np.array([[10, 10, 60, 70]])).tolist() == [0]
    tracker.cut(4 / rate)
    assert [len(track.times) for track in tracker.take_ended()] == [3]


def test_a_crowd_keeps_its_tracks():
    rng = np.random.default_rng(0)
    people = [
        Walk((100 + 90 * n, 100 + 150 * row), (float(rng.uniform(-3, 3)), 0.0))
        for row in range(3)
        for n in range(8)
    ]
    _, owners = follow(people, 8, noise=2)
    assert sorted(owners) == [[n] for n in range(24)]


def test_overlap_is_intersection_over_union():
    rng = np.random.default_rng(1)
    corners = rng.integers(0, 12, (2, 9, 2, 2))
    boxes = np.concatenate([corners.min(2), corners.max(2) + 1], -1).astype(float)
    pixels = np.zeros((2, 9, 13, 13), bool)
    for side in range(2):
        for n, (left, top, right, bottom) in enumerate(boxes[side].astype(int)):
            pixels[side, n, top:bottom, left:right] = True
    both = (pixels[0][:, None] & pixels[1]).sum((2, 3))
    either = (pixels[0][:, None] | pixels[1]).sum((2, 3))
    np.testing.assert_allclose(tracks.measure_overlaps(boxes[0], boxes[1]), both / either)


def test_the_main_figure_by_its_definition():
    """Against the paper, section 3.2: alone, or three times larger; in more than 30 % of frames."""

    def boxes(*sides):
        return np.array([[0, 0, side, 1] for side in sides], np.float32).reshape(-1, 4)

    def seen(frames, fps=5):
        shots = tracks.MainFigures()
        for number, sides in enumerate(frames):
            shots.update(number / fps, boxes(*sides))
        shots.cut(len(frames) / fps)
        return [len(track.times) for track in shots.take_ended()]

    assert seen([[3, 1]] * 10) == [10] and seen([[2.9, 1]] * 10) == []
    assert seen([[1]] * 3 + [[]] * 7) == [] and seen([[1]] * 4 + [[]] * 6) == [4]
    assert seen([[1]] * 4) == [] and seen([[1]] * 5) == [5]
    assert seen([[1]] * 150) == [150] and seen([[1]] * 151) == []


def test_a_main_figure_begins_with_its_shot():
    """The second shot begins 0.1 s before its first picture that is looked at."""
    shots, box = tracks.MainFigures(), np.array([[0, 0, 9, 9]], np.float32)
    shots.cut(1.1)
    for number in range(6, 12):
        shots.update(number / 5, box)
    shots.cut(2.3)
    (track,) = shots.take_ended()
    assert (track.times[:2], track.ends[-1]) == ([1.1, 1.4], 2.3)


def dlib(width=128):
    """Returns what the card of dlib's net says of pairs of vectors."""
    card = cards.PUBLISHED["dlib"]["back_end"]
    return BackEnd(**{**card, "centre": [0.0] * width})


def people(count, cosine, width=128, seed=0):
    """Returns unit vectors [count, width], any two of which have this cosine."""
    axes = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, count + 1)))[0].T
    return np.sqrt(cosine) * axes[0] + np.sqrt(1 - cosine) * axes[1:]


def faces(order, cosine=0.83, alike=0.98, seed=0):
    """Returns vectors [N, 128] of faces, of a person each; two of one person have `alike`."""
    noise = np.random.default_rng(seed).normal(size=(len(order), 128)) / np.sqrt(128)
    return people(max(order) + 1, cosine / alike)[order] + np.sqrt(1 / alike - 1) * noise


@pytest.mark.parametrize(
    ("order", "places"),
    [
        ([0] * 40, []),
        ([0] * 20 + [1] * 20, [20]),
        ([0] * 10 + [1] * 10 + [0] * 10, [10, 20]),
        ([0] * 20 + [1] * 20 + [0] * 20 + [2] * 20, [20, 40, 60]),
        ([0] * 20 + [1] * 5, [20]),
        ([0] * 20 + [1] * 2, []),  # of a dissolve
        ([0] * 3, []),
        ([0], []),
    ],
)
def test_a_track_is_split_where_it_shows_somebody_else(order, places):
    for seed in range(5):
        vectors, times = 1.5 * faces(order, seed=seed), np.arange(len(order)) / 5
        assert tracks.find_changes(vectors, times, False, dlib()) == places
        assert tracks.find_changes(vectors, times, False, None) == []


def test_pictures_far_apart_may_each_show_somebody_else():
    for order in ([0, 1, 0, 1], [0, 0, 1, 2, 2, 2, 0], [0] * 5, [0]):
        vectors, times = faces(order, alike=0.95), 4.0 * np.arange(len(order))
        places = [n for n in range(1, len(order)) if order[n] != order[n - 1]]
        assert tracks.find_changes(vectors, times, True, dlib()) == places


def test_the_threshold_follows_from_the_card():
    card = dlib()
    for odds in (1.0, 50.0):
        cosine = tracks.find_least_cosine(card, odds)
        same, different = (
            np.exp(-(((cosine - mean) / spread) ** 2) / 2) / spread
            for mean, spread in (card.same, card.different)
        )
        np.testing.assert_allclose(same / different, odds, rtol=0.02)
    np.testing.assert_allclose(tracks.find_least_cosine(card, 50.0), 0.938, atol=0.001)


def test_parts_of_a_track_have_its_sightings():
    track = tracks.Track(3, 7, times=[0.1, 0.4, 0.8, 1.6], ends=[0.4, 0.6, 1.2, 2.0])
    parts = track.split([0.6, 1.2])
    assert [part.times for part in parts] == [[0.1, 0.4], [0.8], [1.6]]
    assert [part.ends for part in parts] == [[0.4, 0.6], [1.2], [2.0]]
    assert {(part.number, part.shot) for part in parts} == {(3, 7)}
    assert track.split([])[0] == track


@pytest.mark.skipif(not TRACKS.exists(), reason="no tracks beside VIDJAX_REAL_DATA")
def test_real_tracks_of_two_people_are_split_and_no_other_is():
    """More than a fifth of the faces of 13 tracks is of somebody else; fewer are of dissolves."""
    with np.load(TRACKS) as file:
        arrays = dict(file)
    split = {True: [], False: []}
    for low, high in zip(arrays["track_begin"][:-1], arrays["track_begin"][1:], strict=True):
        person = arrays["person"][low:high]
        count = np.unique(person, return_counts=True)[1].max()
        vectors, times = arrays["vector"][low:high], arrays["time_s"][low:high]
        found = tracks.find_changes(vectors, times, False, dlib())
        split[bool(count < 0.8 * len(person))].append(bool(found))
    assert len(split[True]) == 13 and sum(split[True]) >= 12
    assert len(split[False]) == 221 and not any(split[False])
