"""Searches the frames of a film for people, and saves time by searching most frames only in part.

The frames of a shot are divided into groups of at most five frames and less than a second. A group
is searched backwards: first its last frame, as a whole. Each earlier frame is searched only near
the people in two reference frames: the frame after it, and the last frame of the previous group. If
fewer people are detected than in one of the reference frames, the whole frame is searched.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vidjax.apps.video.nets import LEAST_SCORE, NO_FACES, Detector, Faces
from vidjax.apps.video.tracks import LEAST_OVERLAP, measure_overlaps

MOST_FRAMES = 5  # frames of a group
LEAST_SECONDS = 1.0  # a frame this long after the first frame of a group begins a new group


class SearchedFrame(NamedTuple):
    """A frame and the faces that were detected in it."""

    number: int  # the number of the frame in the film
    time_s: float
    rgb: np.ndarray  # uint8 [H, W, 3]
    faces: Faces


class FilmSearch:
    """Detects faces in the frames of a film. To save time, it searches most frames only in part.

    Frames are added one by one, but are searched and yielded in groups of up to five.
    """

    def __init__(self, detector: Detector):
        self._detector = detector
        self._group: list[SearchedFrame] = []
        self._before: Faces | None = None  # the detections in the last frame of the previous group

    def add(self, number: int, time_s: float, rgb: np.ndarray) -> Iterator[SearchedFrame]:
        """Adds a frame. If it begins a new group, yields the earlier group's frames with faces.

        `number` is the number of the frame in the film. `time_s` is its time in seconds. `rgb` is
        uint8 [H, W, 3]. A group is at most five frames, and less than a second long.
        """
        begin_s = self._group[0].time_s if self._group else time_s
        if len(self._group) == MOST_FRAMES or time_s - begin_s >= LEAST_SECONDS - 1e-3:
            yield from self._search()
        self._group.append(SearchedFrame(number, time_s, rgb, NO_FACES))

    def end_shot(self) -> Iterator[SearchedFrame]:
        """Ends a shot; searches and yields the frames that `add` has not yielded yet."""
        # The last frame of a short shot may be part of a fade, so the first frame is also searched.
        if self._group and self._before is None:
            first, *self._group = self._group
            self._before = self._detector.search(first.rgb)
            yield _keep_strong(first, self._before)
        if self._group:
            yield from self._search()
        self._before = None

    def _search(self) -> list[SearchedFrame]:
        """Empties the list `self._group`; returns its frames with detected faces, oldest first."""
        last = after = self._detector.search(self._group[-1].rgb)
        searched = [_keep_strong(self._group[-1], after)]
        before = NO_FACES if self._before is None else self._before
        for frame in self._group[-2::-1]:
            moved = measure_overlaps(after.boxes, before.boxes).max(0, initial=0) < LEAST_OVERLAP
            near = np.concatenate([after.boxes, before.boxes[moved]])
            found = self._detector.search(frame.rgb, near)
            counts = [(faces.scores > LEAST_SCORE).sum() for faces in (found, before, after)]
            after = found if counts[0] >= max(counts) else self._detector.search(frame.rgb)
            searched.append(_keep_strong(frame, after))
        self._group, self._before = [], last
        return searched[::-1]


def _keep_strong(frame: SearchedFrame, detections: Faces) -> SearchedFrame:
    return frame._replace(faces=detections.take_above(LEAST_SCORE))
