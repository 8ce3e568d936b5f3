"""Tracks of people, crops of faces, detection of shots, and cut lists."""

import functools
import itertools
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import ndimage

from tests.helpers.cases import nightly_after_first
from tests.helpers.embeddings import CARD
from tests.helpers.made_appearances import appearance, film
from tests.helpers.seen import refused
from vidjax.apps import cards
from vidjax.apps.video import align, cuts, media_files, nets, shots, tracks, who

# Embeddings of the faces of 234 tracks of real films, and who they show.
TRACKS = Path(os.environ.get("VIDJAX_REAL_DATA", "/nowhere")).parent / "tracks" / "tracks.npz"
BOX = np.array([[10, 10, 60, 70]])
TEMPLATE = np.array([[47, 48], [103.5, 48], [73.7, 76.8], [50.6, 102.5], [97.5, 102.5]])
RATE = 25  # frames per second


def walk(start, speed):
    """Returns a function of time: the box of a head, 48 pixels wide."""
    half = np.array([-24, -30, 24, 30])
    return lambda time_s: np.tile(np.add(start, np.multiply(time_s, speed)), 2) + half


def follow(people, seconds, *, fps=5, noise=1.0, hidden=(0, 0.0, 0.0), seed=0):
    """Tracks people for some seconds. `people` are functions from a time to the box of a person.

    `hidden` is (number of a person, begin, end) of a gap without detections of the person. Returns
    the tracks, and for each track the numbers of the people in it.
    """
    rng, tracker, owners = np.random.default_rng(seed), tracks.Tracker(), defaultdict(set)
    hidden_person, begin_s, end_s = hidden
    for time_s in np.arange(0, seconds, 1 / fps):
        away = {hidden_person} if begin_s < time_s < end_s else set()
        visible = [n for n in rng.permutation(len(people)) if n not in away]
        boxes = np.array([people[n](time_s) for n in visible]).reshape(-1, 4)
        boxes += rng.normal(0, noise, boxes.shape)
        # Like a detector, keeps only one of two boxes that overlap by half.
        kept: list[int] = []
        for n in range(len(boxes)):
            if not kept or tracks.measure_overlaps(boxes[[n]], boxes[kept]).max() < 0.5:
                kept.append(n)
        for number, n in zip(tracker.update(time_s, boxes[kept]).tolist(), kept, strict=True):
            owners[number].add(int(visible[n]))
    tracker.cut(seconds)
    ended = tracker.take_ended()
    return ended, [sorted(owners[track.number]) for track in ended]


@pytest.mark.parametrize(("fps", "below"), [(2, 10), (5, 0), (10, 10)])
def test_two_heads_that_cross_keep_their_tracks(fps, below):
    for seed in range(5):
        speed = np.random.default_rng(seed).uniform(15, 25) * fps / 5 + 10  # pixels per second
        # They meet after 3 of 6 s. The second person is `below` pixels lower.
        people = [walk((100, 100), (speed, 0)), walk((100 + 6 * speed, 100 + below), (-speed, 0))]
        ended, people_of_tracks = follow(people, seconds=6, fps=fps, seed=seed)
        assert sorted(people_of_tracks) == [[0], [1]], (seed, people_of_tracks)
        assert all(len(track.times) >= 5 * fps for track in ended), "seen in 5 of 6 s or more"


@pytest.mark.parametrize(("turns", "speed", "below", "hidden"), [
    (False, 40, 5, (1, 2.05, 2.95)), (False, 10, 0, (1, 2.05, 3.15)),
    (True, 10, 5, (1, 2.25, 2.95)), (True, 10, 5, (0, 2.05, 3.15)),
])  # fmt: skip
def test_track_never_mixes_two_people_who_meet_while_one_is_hidden(turns, speed, below, hidden):
    """They meet after 2.5 s, and then go on, or turn back."""
    one, two = (200 - 2.5 * speed, 100), (200 + 2.5 * speed, 100 + below)
    ways = walk(one, (speed, 0)), walk(two, (-speed, 0))
    people = [lambda t, way=way: way(min(t, 5 - t) if turns else t) for way in ways]
    for seed in range(5):
        _, people_of_tracks = follow(people, seconds=5, hidden=hidden, seed=seed)
        assert all(len(each) == 1 for each in people_of_tracks), (seed, people_of_tracks)
        assert len(people_of_tracks) <= 4, "each of two tracks may end when the people meet"


def test_track_continues_after_a_short_gap_or_a_missed_frame_but_not_after_a_long_gap():
    # The gap begins at 2 s. After a gap of more than 1 s, the person gets a new track.
    for end_s, numbers in ((2.7, [0]), (3.9, [0, 1])):
        ended, _ = follow([walk((100, 100), (20, 0))], seconds=6, hidden=(0, 2.0, end_s))
        assert [track.number for track in ended] == numbers
    # Every 24th frame at 24_000 / 1001 Hz: 1.001 s apart, which is more than the usual gap of 1 s.
    for fps in (0.1, 24_000 / 24_024, 5.0):
        tracker = tracks.Tracker(gap_s=tracks.choose_gap_seconds(fps))
        frames = enumerate((BOX, BOX[:0], BOX, BOX))  # in frame 1, the face is missed
        numbers = [tracker.update(n / fps, boxes).tolist() for n, boxes in frames]
        assert numbers == [[0], [], [0], [0]]


def test_faces_keep_their_tracks_in_a_fast_pan_and_a_crowd():
    # With 5 frames per second, faces of 48 pixels move by 225 / 5 pixels from frame to frame.
    pan = [walk((100 + 110 * n, 100), (225, 0)) for n in range(3)]
    ended, people_of_tracks = follow(pan, seconds=3)
    assert sorted(people_of_tracks) == [[n] for n in range(3)]
    assert [len(track.times) for track in ended] == [3 * 5] * 3  # all frames
    speed = np.random.default_rng(0).uniform(-3, 3, 24)
    crowd = [walk((100 + 90 * (n % 8), 100 + 150 * (n // 8)), (speed[n], 0)) for n in range(24)]
    _, people_of_tracks = follow(crowd, seconds=8, noise=2)
    assert sorted(people_of_tracks) == [[n] for n in range(24)]


def test_tracks_change_in_the_middle_of_a_dissolve():
    """The dissolve lasts from 1 to 2 s. Both people are detected from 1.2 to 1.6 s.

    There is a frame every 0.2 s. Just before the frame of 2 s, the trackers learn that the middle
    was at 1.5 s. So the frame of 2 s is the first of the second shot, and its time becomes 1.5 s.
    The track of the second person that began at 1.2 s is dropped.
    """
    tracker, main = tracks.Tracker(), tracks.MainFigures()
    other = np.array([[200, 10, 260, 70]])
    for n, boxes in enumerate([BOX] * 6 + [np.concatenate([BOX, other])] * 3 + [other] * 11):
        if n == 10:
            tracker.cut(1.5)
            main.cut(1.5)
        tracker.update(n / 5, boxes)
        main.update(n / 5, BOX)
    for each in (tracker, main):
        each.cut(3.9)
        first, last = each.take_ended()
        # 8 frames, from 0 to 1.4 s, come before the middle.
        assert (first.shot, first.times[0], first.times[-1], len(first.times)) == (0, 0.0, 1.4, 8)
        assert first.ends == [*first.times[1:], 1.5]
        assert (last.shot, last.times[:2], last.ends[-1]) == (1, [1.5, 2.2], 3.9)
        assert each.take_ended() == []


def test_single_detection_is_a_track_if_its_picture_lasts_longer_than_400_ms():
    # Seconds until the next picture, and the begins and ends of each track.
    for held_s, wanted in ((0.2, []), (0.5, [([1.0], [1.5])]), (4.0, [([1.0], [5.0])])):
        tracker = tracks.Tracker()
        tracker.update(1.0, BOX)
        assert tracker.update(1.0 + held_s, np.zeros((0, 4))).shape == (0,)
        tracker.cut(6.0)
        assert [(track.times, track.ends) for track in tracker.take_ended()] == wanted


def test_overlap_is_intersection_over_union():
    """The oracle counts pixels."""
    corners = np.random.default_rng(1).integers(0, 12, (2, 9, 2, 2))
    boxes = np.concatenate([corners.min(2), corners.max(2) + 1], -1)
    pixels = np.zeros((2, 9, 13, 13), bool)
    for place in np.ndindex(2, 9):
        left, top, right, bottom = boxes[place]
        pixels[place][top:bottom, left:right] = True
    both = (pixels[0][:, None] & pixels[1]).sum((2, 3))
    either = (pixels[0][:, None] | pixels[1]).sum((2, 3))
    np.testing.assert_allclose(tracks.measure_overlaps(*boxes.astype(float)), both / either)


def test_main_figure_follows_the_definition_of_the_paper():
    """Section 3.2: in over 30 % of frames, it is the only figure, or three times the second one."""
    # The widths of the boxes of each frame, and the number of frames of each main figure.
    for frames, seen in (
        ([[3, 1]] * 10, [10]), ([[2.9, 1]] * 10, []),
        ([[1]] * 4 + [[]] * 6, [4]), ([[1]] * 3 + [[]] * 7, []),  # over 30 % of 10 frames
        # A shot has 5 to 150 frames.
        ([[1]] * 5, [5]), ([[1]] * 4, []), ([[1]] * 150, [150]), ([[1]] * 151, []),
    ):  # fmt: skip
        figures = tracks.MainFigures()
        for number, widths in enumerate(frames):
            boxes = np.array([[0, 0, width, 1] for width in widths], np.float32).reshape(-1, 4)
            figures.update(number / 5, boxes)
        figures.cut(len(frames) / 5)
        assert [len(track.times) for track in figures.take_ended()] == seen


def faces(order, alike=0.98, seed=0):
    """Returns a face vector for each number of a person in `order`, [N, 128].

    The cosine of two vectors is about `alike` for one person, and about 0.83 for two people.
    """
    rng, each = np.random.default_rng(seed), 0.83 / alike
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(128, max(order) + 2)))[0].T
    people = np.sqrt(each) * axes[0] + np.sqrt(1 - each) * axes[1:]
    noise = rng.normal(size=(len(order), 128)) / np.sqrt(128)
    return people[order] + np.sqrt(1 / alike - 1) * noise


def test_track_is_split_where_another_person_appears():
    for order, places in (
        ([0] * 10 + [1] * 10 + [0] * 10, [10, 20]), ([0] * 20 + [1] * 5, [20]),
        ([0] * 20 + [1] * 2, []),  # two faces are a dissolve
        ([0] * 40, []), ([0], []),
    ):  # fmt: skip
        for seed in range(3):
            # Only the direction of vectors counts, so the length may differ from 1.
            vectors, times = 1.5 * faces(order, seed=seed), np.arange(len(order)) / 5
            assert tracks.find_changes(vectors, times, held=False, back_end=CARD) == places
            # If the cosines of one person and of two people are not known, no track is split.
            assert tracks.find_changes(vectors, times, held=False, back_end=None) == []
    # Pictures that are held for 4 s may each show another person.
    for order in ([0, 1, 0, 1], [0, 0, 1, 2, 2, 2, 0], [0] * 5, [0]):
        vectors, times = faces(order, alike=0.95), 4.0 * np.arange(len(order))
        places = [n for n in range(1, len(order)) if order[n] != order[n - 1]]
        assert tracks.find_changes(vectors, times, held=True, back_end=CARD) == places


@pytest.mark.skipif(not TRACKS.exists(), reason="no tracks next to VIDJAX_REAL_DATA")
def test_real_tracks_are_split_only_if_they_show_two_people():
    """In 13 tracks, over a fifth of the faces show a second person. Fewer faces are a dissolve."""
    arrays = dict(np.load(TRACKS))
    split = {True: [], False: []}  # shows two people -> whether each track is split
    for low, high in itertools.pairwise(arrays["track_begin"]):
        person = arrays["person"][low:high]  # of each face
        num_main_person = np.unique(person, return_counts=True)[1].max()
        vectors, times = arrays["vector"][low:high], arrays["time_s"][low:high]
        places = tracks.find_changes(vectors, times, held=False, back_end=CARD)
        split[bool(num_main_person < 0.8 * len(person))].append(bool(places))
    assert len(split[True]) == 13 and sum(split[True]) >= 12
    assert len(split[False]) == 221 and not any(split[False])


def turn(angle, scale, x=0, y=0):
    """Returns the matrix [2, 3] that turns, scales, and then moves points by (x, y)."""
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[cosine, -sine, x], [sine, cosine, y]])


def test_similarity_transform_is_the_least_squares_solution():
    """The oracle solves u = a x - b y + x0, v = b x + a y + y0 for (a, b, x0, y0)."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        motion = turn(rng.uniform(-3, 3), rng.uniform(0.1, 5), *rng.uniform(-99, 99, 2))
        points = TEMPLATE @ motion[:, :2].T + motion[:, 2] + rng.normal(0, 3, (5, 2))
        rows = [row for x, y in points for row in ([x, -y, 1, 0], [y, x, 0, 1])]
        a, b, x0, y0 = np.linalg.lstsq(np.array(rows), TEMPLATE.ravel(), rcond=None)[0]
        transform = align.fit_similarity(points[None], TEMPLATE)[0]
        np.testing.assert_allclose(transform, [[a, -b, x0], [b, a, y0]], rtol=1e-9, atol=1e-9)
    assert align.fit_similarity(np.zeros((0, 5, 2)), TEMPLATE).shape == (0, 2, 3)
    # Five equal points are moved to the mean of the template.
    transform = align.fit_similarity(np.full((1, 5, 2), 7.0), TEMPLATE)[0]
    np.testing.assert_allclose(transform @ (7, 7, 1), TEMPLATE.mean(0))


@pytest.mark.parametrize("motion", [(0.3, 0.8, -9, 4), (2, 1.7, 20, -20)])
def test_warp_is_bilinear_interpolation(motion):
    rgb = np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)
    matrix, (v, u) = turn(*motion), np.indices((24, 24))
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    x, y, _ = np.moveaxis(np.stack([u, v, np.ones_like(u)], -1) @ inverse.T, -1, 0)
    channels = np.moveaxis(rgb.astype(float), -1, 0)
    bilinear = functools.partial(ndimage.map_coordinates, order=1, mode="grid-constant")
    expected = [bilinear(channel, (y, x)) for channel in channels]  # black outside of the picture
    crop = align.warp_faces(rgb, matrix[None], size=24)[0]
    # Colours are rounded down.
    assert crop.dtype == np.uint8 and np.abs(crop + 0.5 - np.stack(expected, -1)).max() <= 0.51
    # Three crops are black: the picture is moved to the right or the left, or shrinks to a point.
    outside = np.stack([turn(0, 1, x=500), turn(0, 0.1, x=-300), turn(0, scale=0)])
    assert not align.warp_faces(rgb, outside, size=16).any()


def test_reduced_crops_are_means_over_areas():
    board = np.indices((240, 320)).sum(0) % 2 * 255  # finer than any small crop can show
    noise = np.random.default_rng(2).integers(0, 256, board.shape)
    rgb = np.stack([board, noise, np.full_like(board, 80)], -1).astype(np.uint8)
    for scale in (0.3, 0.07):
        crop = align.warp_faces(rgb, turn(0.4, scale)[None], size=200)[0]
        inside = crop[crop[..., 2] == 80].astype(float)  # without the black border
        small_board, small_noise, _ = inside.T
        assert len(inside) > 100 and small_noise.std() < 30  # the deviation of `noise` is 74
        np.testing.assert_allclose(small_board, 127.5, atol=15)  # the mean of 0 and 255


@pytest.mark.parametrize(("angle", "scale"), [(0.1, 1), (0.5, 0.4), (-0.6, 5), (0.4, 12), (3.0, 1)])
def test_points_are_found_again_in_a_face_that_was_cut_out(angle, scale):
    """A point is a square of one colour. The detected points are wrong by a shift and a turn."""
    points = TEMPLATE @ turn(angle, scale)[:, :2].T
    points += 150 * scale - points.mean(0)
    picture = np.zeros((int(300 * scale), int(300 * scale), 3), np.uint8)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]])
    for (x, y), colour in zip(points, colours, strict=True):
        half = max(1.5, 4 * scale)
        picture[round(y - half) : round(y + half) + 1, round(x - half) : round(x + half) + 1] = (
            colour
        )

    def search(patch):
        near = (np.abs(patch[:, :, None].astype(int) - colours).sum(-1) < 200).reshape(-1, 5)
        rows, columns = np.indices(patch.shape[:2]).reshape(2, -1)
        seen = [[columns[of].mean(), rows[of].mean()] for of in near.T if of.any()]
        found = np.array(seen).reshape(-1, 5, 2)
        return nets.Faces(np.zeros((len(found), 4)), np.ones(len(found)), found)

    detector: Any = object.__new__(nets.Detector)
    detector.card, detector.search = SimpleNamespace(decoder="yunet"), search
    middle = points.mean(0)
    detected = middle + (points - middle) @ turn(0.08, 1.05, 0)[:, :2].T + 2 * scale
    face, moved = align.cut_face(picture, detected, TEMPLATE, 150)
    assert max(face.shape) <= 3 * 1.6 * 150 * 2**0.5 + 9
    known = align.fit_similarity(moved[None], detected)[0]
    new = detector.find_points(face, moved, TEMPLATE) @ known[:, :2].T + known[:, 2]
    expected = (points + detected) / 2 if abs(angle) < 0.2 else points
    np.testing.assert_allclose(new, expected, atol=1.5 * max(scale, 0.7))
    # Without a face in the part of the picture, and for other detectors, the points stay.
    detector.search = lambda patch: nets.NO_FACES
    assert detector.find_points(face, moved, TEMPLATE) is moved
    detector.card = SimpleNamespace(decoder="centerface")
    assert detector.find_points(face, moved, TEMPLATE) is moved


def test_size_grows_with_the_face_and_frontality_falls_with_the_turn_of_the_head():
    profile = TEMPLATE.copy()
    profile[2, 0] += 40  # moves the nose by more than half the distance between the eyes
    faces = np.stack([TEMPLATE, TEMPLATE * 0.1, TEMPLATE @ turn(1, scale=2)[:, :2].T, profile])
    # The eyes of the small face are 5.65 pixels apart; 40 pixels are full size.
    np.testing.assert_allclose(align.measure_size(faces)[:2], [1, 5.65 / 40])
    front, small, turned, side = align.measure_frontality(faces)
    assert 0.9 < front == pytest.approx(turned) == pytest.approx(small)
    assert side == 0
    none = np.zeros((1, 5, 2))  # five equal points
    for quality, clear, clarity in ((0.1, 0.4, 0.5), (0.5, 0.4, 1), (0, 0.4, 0), (0.1, None, 1)):
        assert align.measure_clarity(quality, clear) == pytest.approx(clarity)
    assert align.measure_size(none) == 0 and align.measure_frontality(none) <= 1  # not NaN


@pytest.mark.parametrize(("move", "angle", "scale"), [
    ((60, 80), 0.5, 1), ((0, -40), 0, 1), ((-60, 0), 0, 1), ((150, 120), 1.2, 2), ((0, 0), 0, 0.3),
])  # fmt: skip
def test_quality_falls_if_the_border_of_the_picture_cuts_off_a_face(move, angle, scale):
    picture = np.full((200, 260, 3), 255, np.uint8)
    faces = (TEMPLATE @ turn(angle, scale)[:, :2].T + move)[None]
    crop = align.warp_faces(picture, align.fit_similarity(faces, TEMPLATE), 150)
    inside = align.measure_inside(faces, TEMPLATE, 150, picture.shape)
    assert inside == pytest.approx(np.mean(crop > 127), abs=0.05)
    squares = 255 * (np.indices(crop.shape[1:3]) // 10).sum(0)[None, ..., None] % 510
    sharp = np.broadcast_to(squares, crop.shape).astype(np.uint8)
    whole, cut = (align.measure_quality(np.ones(1), faces, sharp, x) for x in (1.0, inside))
    assert (cut < 0.1 * whole) == (inside < 0.7) and (cut > 0.9 * whole) == (inside > 0.9)


def test_sharpness_separates_detail_from_film_grain():
    rng, fine = np.random.default_rng(0), np.full((128, 128), 128.0)
    for cells in (4, 8, 16, 32):  # adds squares of random grey levels, of 32 to 4 pixels a side
        fine += np.kron(rng.normal(0, 24, (cells, cells)), np.ones((128 // cells, 128 // cells)))
    blur = ndimage.uniform_filter(ndimage.uniform_filter(fine, 7, mode="wrap"), 7, mode="wrap")
    grain = rng.normal(0, 15, fine.shape)
    made = np.array([fine, fine + grain, blur, blur + grain, 0.2 * fine, 128 + grain, 0 * fine])
    crops = made.clip(0, 255).astype(np.uint8)[..., None].repeat(3, -1)
    sharp, grained, soft, soft_grained, dark, noise, black = align.measure_sharpness(crops)
    assert sharp < 1 and black == 0
    assert abs(grained - sharp) < 0.02 and abs(soft_grained - soft) < 0.02
    assert soft < 0.5 * sharp and noise < 0.05 * sharp
    # Sharpness is v / (v + 1200). Here the variance v falls from 4630 to 186: 0.79 becomes 0.13.
    assert dark < 0.2 * sharp


def test_dark_glasses_are_detected_and_shadows_are_not():
    y, x = np.mgrid[:150, :150]
    bare = np.full((150, 150), 150.0)
    for eye in TEMPLATE[:2]:
        distance = np.hypot((x - eye[0]) / 2, y - eye[1])
        bare[distance < 7] = 200  # the white
        bare[distance < 3] = 20  # the pupil
    lit = bare * np.where(x < 75, 0.3, 1.0)
    lens = np.hypot(x - TEMPLATE[0, 0], y - TEMPLATE[0, 1]) < 22
    glasses = np.where(lens | np.fliplr(lens), 30.0, bare)
    # Eyes in even light, in light from one side, and in dim light; glasses; one lens; black.
    pictures = [bare, lit, 0.2 * bare, glasses, np.where(lens, 30.0, bare), 0 * bare]
    crops = np.array(pictures).astype(np.uint8)[..., None].repeat(3, -1)
    assert align.has_dark_eyes(crops, TEMPLATE).tolist() == [False] * 3 + [True, False, False]


def landscape(rng, bright):
    """Returns a large picture with detail of every size, float [240, 480, 3]."""
    picture = np.zeros((240, 480, 3))
    for cells, strength in ((4, 1.0), (10, 0.6), (24, 0.4), (60, 0.25)):
        shape = cells, 2 * cells
        coarse = rng.normal(0, 1, (*shape, 1)) + rng.normal(0, 0.5, (*shape, 3))
        picture += strength * np.kron(coarse, np.ones((240 // cells, 240 // cells, 1)))
    picture *= rng.uniform(30, 60) / picture.std()
    return np.clip(picture + rng.uniform(60, 170, 3), 0, 255) * bright


def shot(rng, camera, frames, bright):
    """Returns a shot with a head that walks through it, float [frames, 36, 64, 3]."""
    background, colour = landscape(rng, bright), rng.uniform(0, 255, 3) * bright
    time = np.arange(frames)
    head = np.clip(rng.uniform(110, 370) + rng.uniform(-5, 5) * time, 30, 450).astype(int)
    # The camera sees the part of the picture around (x, y).
    x, y, zoom = (np.full(frames, value) for value in (240.0, 120.0, 0.85))
    if camera == "pan":
        x += 100 * np.sin(rng.uniform(-6, 6) * time / 100)
    elif camera == "hand":
        x += np.cumsum(rng.normal(0, 1.5, frames))
        y += np.cumsum(rng.normal(0, 1, frames))
    elif camera == "zoom":
        zoom *= np.cumprod(1 + 0.01 * np.sin(time / 10))
    pictures = []
    for n in range(frames):
        picture = background.copy()
        picture[95:145, head[n] - 18 : head[n] + 18] = colour
        rows = np.clip(y[n] + np.linspace(-70, 70, 72) * zoom[n], 0, 239).astype(int)
        columns = np.clip(x[n] + np.linspace(-125, 125, 128) * zoom[n], 0, 479).astype(int)
        pictures.append(picture[rows][:, columns].reshape(36, 2, 64, 2, 3).mean((1, 3)))
    return np.array(pictures)


def filmed(rng, *parts):
    """Returns the pictures of a film with the noise of a camera, uint8."""
    frames = np.concatenate(parts)
    noise = rng.standard_normal(frames.shape, np.float32) * 1.5
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def find_cuts(film):
    """Returns the numbers of the frames that begin a shot, without frame 0."""
    detector = shots.ShotDetector()
    return [n for n, small in enumerate(film) if detector.update(n / RATE, small)][1:]


def fade(start, steps):
    """Returns pictures that fade from the picture `start` to black."""
    return start * np.linspace(1, 0, steps)[:, None, None, None]


@nightly_after_first("count, dark, bright", [(8, 0.6, 1.0), (12, 0.08, 0.15), (12, 0.1, 1.0)])
def test_cuts_are_found_and_motion_is_not_taken_for_a_cut(count, dark, bright):
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, count)
    cameras = rng.choice(["still", "pan", "hand", "zoom"], count)
    lights = rng.uniform(dark, bright, count)
    parts = [shot(rng, *each) for each in zip(cameras, lengths, lights, strict=True)]
    assert find_cuts(filmed(rng, *parts)) == np.cumsum(lengths)[:-1].tolist()


@pytest.mark.parametrize("steps", [15, 6, 40])
def test_fade_through_black_is_one_cut_at_the_next_shot(steps):
    rng = np.random.default_rng(0)
    first, second = shot(rng, "still", 40, 0.8), shot(rng, "still", 40, 0.5)
    out, back = fade(first[-1:], steps), fade(second[:1], steps)[::-1]
    (cut_frame,) = find_cuts(filmed(rng, first, out, back, second))
    assert abs(cut_frame - len(first) - steps) <= 3 + steps / 3  # from the end of the fade out
    # Black frames at the end begin no shot. After black frames at the start, a shot begins.
    black = np.zeros((30, 36, 64, 3))
    assert find_cuts(filmed(rng, first, fade(first[-1:], 20), black)) == []
    assert find_cuts(filmed(rng, black, first)) == [len(black)]


@pytest.mark.parametrize("steps", [15, 8, 25])
def test_dissolve_is_one_cut_in_its_middle_reported_after_its_end(steps):
    rng, detector = np.random.default_rng(0), shots.ShotDetector()
    first, second = (shot(rng, "still", 1, bright) for bright in (0.8, 0.6))
    mixed = fade(first, steps) + second - fade(second, steps)  # first fades out, second fades in
    begin, end = 40, 40 + steps  # of the dissolve
    film = filmed(rng, first.repeat(begin, 0), mixed, second.repeat(60, 0))
    updates = [n for n, small in enumerate(film) if detector.update(n / RATE, small)]
    (reported,) = updates[1:]  # the first update reports the start of the film
    # The detector expects dissolves up to 1.6 s, so its report may be some frames late.
    assert begin < reported <= end + 15
    _, start_s = detector.starts
    assert start_s * RATE == pytest.approx((begin + end - 1) / 2, abs=RATE / 5)


@pytest.mark.nightly
def test_slow_pan_over_fine_detail_is_not_taken_for_a_dissolve():
    """As in a dissolve, each picture is nearly a mixture of an earlier and a later picture."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        fine = rng.uniform(60, 190, (36, 100, 1)).repeat(3, 2)
        pan = (ndimage.shift(fine, (0, -x, 0), order=1) for x in np.arange(0, 6, 0.025))
        assert find_cuts(filmed(rng, np.array([picture[:, :64] for picture in pan]))) == []


def test_flash_brighter_lamp_and_flicker_are_not_taken_for_cuts():
    rng = np.random.default_rng(1)
    film = shot(rng, "hand", 60, 0.5)
    flash, lamp = filmed(rng, film), film.copy()
    flash[30] = 250
    lamp[30:] *= 1.6
    assert find_cuts(flash) == find_cuts(filmed(rng, lamp)) == []
    light = (np.indices((36, 64)).sum(0) // 4 % 2 * 255)[..., None].repeat(3, 2).astype(np.uint8)
    dark = 255 - light
    # The first change is a cut. A later change of the flicker is neither a cut nor a dissolve.
    assert find_cuts([light, dark] * 15 + [light] * 3 + [dark] * 60) == [1]


def test_cuts_contain_each_appearance_with_a_margin(tmp_path):
    """A margin is 1 s, or less at the ends of a film. Overlapping stretches are joined.

    Photos and unknown people are left out. Times are whole frames at the rate of the film.
    """
    films = [
        film(rate=25), film("b.mov", rate=30000 / 1001, seconds=4000.0),
        film("c.jpg", photo=True, seconds=0), film("d.avi", rate=None),
        film("e.mkv", seconds=6.0059, rate=24000 / 1001),  # 144 pictures, 6.006 s
    ]  # fmt: skip
    appearances = [
        appearance(0.4, 3), appearance(4.9, 6), appearance(5.2, 5.5), appearance(98, 100),
        appearance(20, 30, "unknown 1", None), appearance(50, 51, "Bob"),
        appearance(3600.01, 3601, video="b.mov"), appearance(0, 0, video="c.jpg"),
        appearance(0, 1, video="d.avi"), appearance(5, 6.0059, video="e.mkv"),
    ]  # fmt: skip
    cuts.write(tmp_path, appearances, films, padding_s=1.0)
    assert {x.name for x in tmp_path.iterdir()} == {"Ada.otio", "Ada.m3u", "Bob.otio", "Bob.m3u"}
    assert (tmp_path / "Bob.m3u").read_text().splitlines() == [
        "#EXTM3U", "#EXTINF:3,a.mp4", "#EXTVLCOPT:start-time=49.000",
        "#EXTVLCOPT:stop-time=52.000", "file:///films/a.mp4",
    ]  # fmt: skip
    found = cuts.find_cuts(appearances, films, padding_s=1.0)["Ada"]
    assert [(x.film.video, x.begin, x.end) for x in found] == [
        ("a.mp4", 0, 175), ("a.mp4", 97 * 25, 2500), ("b.mov", 107862, 107952), ("d.avi", 0, 50),
        ("e.mkv", 96, 144),
    ]  # fmt: skip


@pytest.mark.parametrize("rate", [24000 / 1001, 14.7, 59.94])
def test_other_programs_read_the_rate_the_film_and_the_times_of_a_cut_list(tmp_path, rate):
    """OpenTimelineIO reads the timeline, and the converter of Kdenlive makes a project of it."""
    otio = pytest.importorskip("opentimelineio")
    kdenlive = pytest.importorskip("otio_kdenlive_adapter.adapters.kdenlive")
    films = [film("Sommer # 1 ä.mp4", rate=rate), film("b.mp4", rate=25)]
    appearances = [appearance(3, 5, video=x.video) for x in films] + [appearance(8, 9)]
    cuts.write(tmp_path, appearances, films, padding_s=0.5)
    timeline = otio.adapters.read_from_file(str(tmp_path / "Ada.otio"))
    assert timeline.name == "Ada" and [t.kind for t in timeline.tracks] == ["Video", "Audio"]
    for clip, made in (x for track in timeline.tracks for x in zip(track, films, strict=True)):
        times, url = clip.source_range, clip.media_reference.target_url
        assert unquote(urlsplit(url).path) == str(made.source.path)
        assert made.rate and times.start_time.rate == made.rate
        assert times.start_time.to_seconds() == pytest.approx(2.5, abs=0.51 / made.rate)
        assert times.duration.to_seconds() == pytest.approx(3, abs=1.01 / made.rate)
        assert clip.available_range().duration.to_seconds() == pytest.approx(100, abs=0.1)
    project = ElementTree.fromstring(kdenlive.write_to_string(timeline))  # noqa: S314
    resources = {x.text for x in project.iter("property") if x.get("name") == "resource"}
    assert {str(x.source.path) for x in films} <= resources


def test_errors_of_wrong_paths_of_films_and_people_name_the_remedy(tmp_path):
    path, typo = tmp_path / "holiday.mp4", tmp_path / "holidy.mp4"
    path.touch()
    list_files = media_files.list_files
    refused(lambda: list_files([typo]), f"'{typo}'\ndid you mean '{path}'")
    # A path with blanks is typed in quotes. The nets may be in another folder than the films.
    (tmp_path / "Summer 2019").mkdir()
    quoted = f"did you mean '{tmp_path}/Summer 2019'? Type it with the quotes"
    refused(lambda: list_files([tmp_path / "Summer"]), quoted)
    refused(lambda: cards.load(tmp_path / "sumer 2019"), quoted, "convert --help")
    refused(lambda: list_files([Path("x.mp4")]), f"folder is '{Path.cwd()}'", "cd FOLDER")
    words = "is a file, not a folder", f"--people={tmp_path}", "the folder above"
    refused(lambda: who.name_people([path], path, tmp_path / "out", tmp_path), *words)
