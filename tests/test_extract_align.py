"""align: transforms of points, crops and their quality, against slow computations."""

import numpy as np
import pytest

from vidjax.apps.video import align

TEMPLATE = np.array([[47, 48], [103.5, 48], [73.7, 76.8], [50.6, 102.5], [97.5, 102.5]])


def turn(angle, scale, x=0, y=0):
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[cosine, -sine, x], [sine, cosine, y]])


def test_similarity_transform_is_the_least_squares_solution():
    """Solves for (a, b, x0, y0) in u = a x - b y + x0, v = b x + a y + y0."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        place = turn(rng.uniform(-3, 3), rng.uniform(0.1, 5), *rng.uniform(-99, 99, 2))
        points = TEMPLATE @ place[:, :2].T + place[:, 2] + rng.normal(0, 3, (5, 2))
        rows = [row for x, y in points for row in ([x, -y, 1, 0], [y, x, 0, 1])]
        a, b, x0, y0 = np.linalg.lstsq(np.array(rows), TEMPLATE.ravel(), rcond=None)[0]
        transform = align.fit_similarity(points[None], TEMPLATE)[0]
        np.testing.assert_allclose(transform, [[a, -b, x0], [b, a, y0]], rtol=1e-9, atol=1e-9)
    assert align.fit_similarity(np.zeros((0, 5, 2)), TEMPLATE).shape == (0, 2, 3)
    transform = align.fit_similarity(np.full((1, 5, 2), 7.0), TEMPLATE)[0]
    np.testing.assert_allclose(transform @ (7, 7, 1), TEMPLATE.mean(0))


@pytest.mark.parametrize("place", [(0.3, 0.8, -9, 4), (2, 1.7, 20, -20)])
def test_warp_is_bilinear_interpolation(place):
    rgb = np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)
    matrix, expected = turn(*place), np.zeros((24, 24, 3))
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    for v, u in np.ndindex(24, 24):
        x, y, _ = inverse @ (u, v, 1)
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            for row in (int(np.floor(y)), int(np.floor(y)) + 1):
                if 0 <= column < 40 and 0 <= row < 30:
                    weight = (1 - abs(x - column)) * (1 - abs(y - row))
                    expected[v, u] += weight * rgb[row, column]
    crop = align.warp_faces(rgb, matrix[None], 24)[0]
    assert crop.dtype == np.uint8 and np.abs(crop - expected).max() <= 0.51
    outside = np.stack([turn(0, 1, 500), turn(0, 0.1, -300), turn(0, 0)])
    assert not align.warp_faces(rgb, outside, 16).any()


def test_reduced_crops_are_means_over_areas():
    board = np.indices((240, 320)).sum(0) % 2 * 255  # finer than any small crop can show
    random = np.random.default_rng(2).integers(0, 256, board.shape)
    rgb = np.stack([board, random, np.full_like(board, 80)], -1).astype(np.uint8)
    for scale in (0.3, 0.07):
        crop = align.warp_faces(rgb, turn(0.4, scale)[None], 200)[0]
        inside = crop[crop[..., 2] == 80].astype(float)
        assert len(inside) > 100 and inside[:, 1].std() < 30
        np.testing.assert_allclose(inside[:, 0], 127.5, atol=15)


def test_size_frontality_and_sharpness_are_between_0_and_1():
    profile = TEMPLATE.copy()
    profile[2, 0] += 40
    faces = np.stack([TEMPLATE, TEMPLATE * 0.1, TEMPLATE @ turn(1, 2)[:, :2].T, profile])
    np.testing.assert_allclose(align.measure_size(faces)[:2], [1, 2 * 5.65 / 80])
    front, small, turned, side = align.measure_frontality(faces)
    assert 0.9 < front == pytest.approx(turned) == pytest.approx(small) and side == 0
    none = np.zeros((1, 5, 2))
    assert align.measure_size(none) == 0 and align.measure_frontality(none) <= 1
    board = np.indices((32, 32)).sum(0)[None, ..., None] // 8 % 2 * np.uint8(255)
    sharp, flat = (align.measure_sharpness(crop.repeat(3, -1))[0] for crop in (board, 0 * board))
    assert 0.9 < sharp < 1 and flat == 0


def test_noise_does_not_raise_sharpness():
    """Compares sharp, unfocused and dark pictures with and without film grain."""
    rng, side = np.random.default_rng(0), 112
    sharp = np.full((side, side), 128.0)
    for cells in (4, 8, 16, 32):
        patch = -(-side // cells)
        coarse = rng.normal(0, 24, (cells, cells)).repeat(patch, 0).repeat(patch, 1)
        sharp += coarse[:side, :side]
    soft = sharp
    for axis in (0, 1, 0, 1):
        soft = sum(np.roll(soft, shift, axis) for shift in range(-3, 4)) / 7
    grain = rng.normal(0, 15, sharp.shape)
    made = np.array([sharp, sharp + grain, soft, soft + grain, 0.2 * sharp, 128 + grain])
    crops = made.clip(0, 255).astype(np.uint8)[..., None].repeat(3, -1)
    sharp, grained, soft, soft_grained, dark, noise = align.measure_sharpness(crops)
    assert abs(grained - sharp) < 0.02 and abs(soft_grained - soft) < 0.02
    assert soft < 0.5 * sharp and dark < 0.2 * sharp and noise < 0.05 * sharp


def test_dark_glasses_are_detected_and_shadows_are_not():
    """Draws bare eyes, lit from one side and in the dark, then dark glasses and one dark lens."""
    y, x = np.mgrid[:150, :150]
    bare = np.full((150, 150), 150.0)
    for eye in TEMPLATE[:2]:
        away = np.hypot((x - eye[0]) / 2, y - eye[1])
        bare[away < 7] = 200  # the white
        bare[away < 3] = 20
    lit = bare * np.where(x < 75, 0.3, 1.0)
    lens = np.hypot(x - TEMPLATE[0, 0], y - TEMPLATE[0, 1]) < 22
    glasses = np.where(lens | np.fliplr(lens), 30.0, bare)
    pictures = [bare, lit, 0.2 * bare, glasses, np.where(lens, 30.0, bare), 0 * bare]
    crops = np.array(pictures).astype(np.uint8)[..., None].repeat(3, -1)
    assert align.has_dark_eyes(crops, TEMPLATE).tolist() == [False] * 3 + [True, False, False]
