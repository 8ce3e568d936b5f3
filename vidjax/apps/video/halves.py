"""Detects films that show each picture twice, in two halves, as most 3D films do."""

from collections import Counter
from typing import get_args

import numpy as np

from vidjax.apps.video.media import Layout
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
    """Finds out whether the pictures of a film consist of two equal halves, as in 3D films.

    Only pictures with faces are compared. Two halves are equal if they look alike, and if at least
    half of the faces have a similar face at the same place of the other half. Small differences, as
    in 3D films, are allowed.
    """

    def __init__(self) -> None:
        self._pictures, self._equal = 0, Counter[Layout]()  # `_equal`: pictures with equal halves

    def add(self, rgb: np.ndarray, boxes: np.ndarray) -> None:
        """Adds a frame of the film. The property `layout` depends on all added frames with faces.

        `rgb` is the frame, uint8 [H, W, 3]. `boxes` [N, 4] are the left, top, right and bottom of
        the faces, in pixels.
        """
        self._pictures += len(boxes) > 0
        ratio = rgb.shape[1] / rgb.shape[0]
        is_halved = ratio * 2 >= HALF_HEIGHT, ratio / 2 <= HALF_WIDTH
        axes = [axis for axis in (0, 1) if _has_twins(rgb, boxes, axis)]
        self._equal.update(get_args(Layout)[2 * axis + is_halved[axis]] for axis in axes)

    @property
    def layout(self) -> Layout | None:
        """Arguments of FFmpeg's `crop` that keep one half of a 3D film; None for other films."""
        least = max(LEAST_PICTURES, LEAST_SHARE * self._pictures)
        return next((layout for layout, count in self._equal.items() if count >= least), None)


def _has_twins(rgb: np.ndarray, boxes: np.ndarray, axis: int) -> bool:
    shift = rgb.shape[axis] / 2 * (np.arange(4) % 2 != axis)  # from one half to the other
    is_second = (boxes[:, :2] + boxes[:, 2:])[:, 1 - axis] >= rgb.shape[axis]
    faces, twins = boxes[~is_second], boxes[is_second]
    pairs = pair_greedily(measure_overlaps(faces, twins - shift))
    if not pairs or 4 * len(pairs) < len(boxes):
        return False
    half = np.array([0, 0, rgb.shape[1], rgb.shape[0]]) - shift * [0, 0, 1, 1]
    left, right = (_shrink(rgb, box, GRID) for box in (half, half + shift))
    contrast = np.abs(left - left.mean((0, 1))).mean()
    difference, mirrored = (np.abs(left - x).mean() for x in (right, right[:, ::-1]))
    if difference > min(MOST_DIFFERENT * contrast, MOST_OF_MIRRORED * mirrored):
        return False
    # The middle of a face shows less of the background.
    faces, twins = (0.8 * x + 0.2 * x[:, [2, 3, 0, 1]] for x in (faces, twins))
    both = [[_shrink(rgb, x, FACE_GRID) for x in (faces[r], twins[c])] for c, r in pairs.items()]
    return float(np.mean([np.abs(x - y).mean() for x, y in both])) <= MOST_FACE_DIFFERENCE


def _shrink(rgb: np.ndarray, box: np.ndarray, grid: int) -> np.ndarray:
    """Returns the mean colours of `grid` x `grid` parts of a box, float32 [grid, grid, 3].

    `rgb` is uint8 [H, W, 3]. `box` [4] is left, top, right and bottom in pixels.
    """
    from PIL import Image

    box = box.clip(0, np.tile(rgb.shape[1::-1], 2))
    small = Image.fromarray(rgb).resize((grid, grid), Image.Resampling.BOX, tuple(box))
    return np.asarray(small, np.float32)
