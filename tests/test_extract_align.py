"""align: transforms of points, crops and their quality, against slow computations."""

import numpy as np
import pytest

from vidjax.apps.video import align

TEMPLATE = np.array([[47, 48], [103.5, 48], [73.7, 76.8], [50.6, 102.5], [97.5, 102.5]])


def points_of(rng, count):
    """Returns turned, scaled and shifted templates with noise, [count, 5, 2]."""
    angle, scale = rng.uniform(-3, 3, count), rng.uniform(0.1, 5, count)
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    turns = np.stack([cosine, -sine, sine, cosine], 1).reshape(-1, 2, 2)
    moved = np.einsum("nij,pj->npi", turns, TEMPLATE) + rng.uniform(-99, 99, (count, 1, 2))
    return moved + rng.normal(0, 3, moved.shape)


def slow_similarity(points):
    """Solves the linear equations of (a, b, x, y) in u = a x - b y + x0, v = b x + a y + y0."""
    rows, right = [], []
    for (x, y), (u, v) in zip(points, TEMPLATE, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        right += [u, v]
    a, b, x0, y0 = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0]
    return np.array([[a, -b, x0], [b, a, y0]])


def slow_warp(rgb, matrix, size):
    height, width = rgb.shape[:2]
    crop = np.zeros((size, size, 3))
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    for v in range(size):
        for u in range(size):
            x, y, _ = inverse @ (u, v, 1)
            for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                for row in (int(np.floor(y)), int(np.floor(y)) + 1):
                    if 0 <= column < width and 0 <= row < height:
                        weight = (1 - abs(x - column)) * (1 - abs(y - row))
                        crop[v, u] += weight * rgb[row, column]
    return crop


def turn(angle, scale, x, y):
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[cosine, -sine, x], [sine, cosine, y]])


def test_similarity_is_the_least_squares_solution():
    points = points_of(np.random.default_rng(0), 50)
    wanted = np.stack([slow_similarity(one) for one in points])
    np.testing.assert_allclose(align.fit_similarity(points, TEMPLATE), wanted, rtol=1e-9, atol=1e-9)


def test_similarity_of_no_faces_and_of_points_that_coincide():
    assert align.fit_similarity(np.zeros((0, 5, 2)), TEMPLATE).shape == (0, 2, 3)
    found = align.fit_similarity(np.full((1, 5, 2), 7.0), TEMPLATE)[0]
    np.testing.assert_allclose(found @ (7, 7, 1), TEMPLATE.mean(0))


@pytest.mark.parametrize(
    "place", [(0, 1, 0, 0), (0.3, 0.8, -9, 4), (2, 1.7, 20, -20), (1, 0.6, 0, 9)]
)
def test_warp_is_bilinear_interpolation(place):
    rgb = np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)
    matrix = turn(*place)
    found = align.warp_faces(rgb, matrix[None], 24)[0]
    assert found.dtype == np.uint8
    assert np.abs(found - slow_warp(rgb, matrix, 24)).max() <= 0.51


@pytest.mark.parametrize("scale", [0.3, 0.25, 0.07])
def test_crops_that_shrink_are_means_of_areas(scale):
    rng = np.random.default_rng(2)
    board = np.indices((240, 320)).sum(0) % 2 * 255  # finer than any small crop can show
    rgb = np.stack([board, rng.integers(0, 256, board.shape), np.full_like(board, 80)], -1)
    crop = align.warp_faces(rgb.astype(np.uint8), turn(0.4, scale, 0, 0)[None], 200)[0]
    inside = crop[(crop[..., 2] == 80)].astype(float)
    assert len(inside) > 100
    np.testing.assert_allclose(inside[:, 0], 127.5, atol=15)
    assert inside[:, 1].std() < 30


def test_a_crop_that_shrinks_keeps_its_place():
    y, x = np.indices((300, 400))
    rgb = np.stack([x // 2, y // 2, x * 0], -1).astype(np.uint8)
    crop = align.warp_faces(rgb, turn(0, 0.2, 0, 0)[None], 50)[0].astype(float)
    v, u = np.indices((50, 50))
    inner = slice(2, 48)
    np.testing.assert_allclose(crop[inner, inner, 0], (u / 0.4)[inner, inner], atol=1)
    np.testing.assert_allclose(crop[inner, inner, 1], (v / 0.4)[inner, inner], atol=1)


def test_crops_outside_of_the_picture_are_black():
    rgb = np.full((20, 20, 3), 200, np.uint8)
    places = np.stack([turn(0, 1, 500, 0), turn(0, 0.1, -300, 0), turn(0, 0, 0, 0)])
    assert not align.warp_faces(rgb, places, 16).any()
    assert align.warp_faces(rgb, places[:0], 16).shape == (0, 16, 16, 3)


def test_the_parts_of_quality_go_from_zero_to_one():
    small = TEMPLATE[None] * 0.1
    np.testing.assert_allclose(align.measure_size(TEMPLATE[None]), 1)
    np.testing.assert_allclose(align.measure_size(small), 2 * 5.65 / 80)
    turned = np.einsum("ij,pj->pi", turn(1, 2, 0, 0)[:, :2], TEMPLATE)[None]
    np.testing.assert_allclose(
        align.measure_frontality(turned), align.measure_frontality(TEMPLATE[None])
    )
    assert align.measure_frontality(TEMPLATE[None])[0] > 0.9
    profile = TEMPLATE.copy()
    profile[2, 0] += 40
    assert align.measure_frontality(profile[None])[0] == 0
    assert (
        align.measure_size(np.zeros((1, 5, 2)))[0] == 0
        and align.measure_frontality(np.zeros((1, 5, 2)))[0] <= 1
    )
    board = np.indices((32, 32)).sum(0)[None, ..., None] // 8 % 2 * np.uint8(255)
    sharp, flat = (align.measure_sharpness(crop.repeat(3, -1))[0] for crop in (board, 0 * board))
    assert 0.9 < sharp < 1 and flat == 0


@pytest.mark.parametrize("side", [112, 150])
def test_noise_does_not_count_as_sharp(side):
    """Patches of every size, then out of focus, in the dark, and with the grain of a film."""
    rng = np.random.default_rng(0)
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


def test_dark_glasses_and_no_shadow_on_one_side():
    """A head with bare eyes, lit from one side, and in a dark picture; then with glasses."""
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
