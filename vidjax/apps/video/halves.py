"""Detects films that show each picture twice, in two halves, as most 3D films do."""

from collections import Counter

import numpy as np

from vidjax.apps.features_folder import Layout
from vidjax.apps.video.tracks import measure_overlaps, pair_greedily

# The width divided by the height of a half whose width, or height, was halved for the film.
HALF_WIDTH, HALF_HEIGHT = 1.2, 2.6
LEAST_PICTURES, LEAST_SHARE = 3, 0.5  # of the pictures with faces, which must have equal halves
GRID, FACE_GRID = 24, 8  # the numbers of rows and columns to which halves and faces are shrunk
# The largest mean difference of two halves, relative to the contrast of a half, and to the
# difference if one half is mirrored.
MOST_DIFFERENT, MOST_OF_MIRRORED = 0.4, 0.7
MOST_FACE_DIFFERENCE = 16.0  # levels, 0 to 255; the faces of two people differ more


class HalvesDetector:
    """Compares the halves of the pictures of a film that have faces.

    Two halves are equal if at least half of the faces have a twin at the same place of the other
    half, and both the faces and the halves look alike. The halves of a 3D film differ a little.
    """

    def __init__(self) -> None:
        self._pictures = 0
        self._equal = Counter[Layout]()  # number of pictures with equal halves

    def add(self, rgb: np.ndarray, boxes: np.ndarray) -> None:
        """Adds a picture, uint8 [H, W, 3], and the boxes [N, 4] of its faces, in pixels."""
        self._pictures += len(boxes) > 0
        ratio = rgb.shape[1] / rgb.shape[0]
        wide: Layout = "side by side" if ratio / 2 > HALF_WIDTH else "half width"
        high: Layout = "one above the other" if ratio * 2 < HALF_HEIGHT else "half height"
        self._equal.update(x for axis, x in enumerate((high, wide)) if _has_twins(rgb, boxes, axis))

    @property
    def layout(self) -> Layout | None:
        """The arrangement of the two equal halves of the film. None if they are not equal."""
        least = max(LEAST_PICTURES, LEAST_SHARE * self._pictures)
        return next((layout for layout, count in self._equal.items() if count >= least), None)


def _has_twins(rgb: np.ndarray, boxes: np.ndarray, axis: int) -> bool:
    half = rgb.shape[axis] // 2
    first, second = (rgb.take(range(at, at + half), axis) for at in (0, half))
    sides = [1 - axis, 3 - axis]  # left and right, or top and bottom
    is_second = boxes[:, sides].mean(1) >= half
    moved = boxes[is_second] - half * np.isin(np.arange(4), sides)
    owners = pair_greedily(measure_overlaps(boxes[~is_second], moved))
    pairs = [(boxes[~is_second][row], moved[column]) for column, row in owners.items()]
    if not pairs or 4 * len(pairs) < len(boxes):
        return False
    left, right = _shrink(first, GRID), _shrink(second, GRID)
    contrast = np.abs(left - left.mean((0, 1))).mean()
    difference, mirrored = (np.abs(left - x).mean() for x in (right, right[:, ::-1]))
    if difference > min(MOST_DIFFERENT * contrast, MOST_OF_MIRRORED * mirrored):
        return False
    faces = [(_crop(first, box), _crop(second, twin)) for box, twin in pairs]
    return float(np.mean([np.abs(x - y).mean() for x, y in faces])) <= MOST_FACE_DIFFERENCE


def _crop(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Returns the middle of a face in a small size, [8, 8, 3]."""
    middle = 0.8 * box + 0.2 * box[[2, 3, 0, 1]]
    left, top, right, bottom = np.round(middle).clip(0).astype(int).tolist()
    return _shrink(picture[top : max(bottom, top + 1), left : max(right, left + 1)], FACE_GRID)


def _shrink(picture: np.ndarray, grid: int) -> np.ndarray:
    """Returns the means of `grid` x `grid` parts of a picture, [grid, grid, 3]."""
    parts = picture.astype(np.float32)
    for axis in (0, 1):
        size = parts.shape[axis]
        starts = np.arange(grid) * size // grid
        lengths = np.diff([*starts, size]).clip(1).reshape((-1, 1) if axis else (-1, 1, 1))
        parts = np.add.reduceat(parts, starts, axis) / lengths
    return parts
