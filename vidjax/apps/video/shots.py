"""Finds the shots of a film, frame by frame, in small pictures.

A cut is a change that is much larger than the motion before it. If pictures are far apart, as in a
slide show, any large change is a cut. Blank pictures between two shots, as in a fade, are a cut at
their end; blank pictures within a shot, as in a flash, are no cut. A dissolve is a cut in its
middle, which is detected at its end.
"""

import collections
import itertools

import numpy as np

from vidjax.apps.video.align import GREY

# The difference of two pictures is the mean absolute difference of their grey levels, 0 to 255.
# Their likeness is the correlation of their pixels, -1 to 1, which does not depend on brightness
# and contrast.
LEAST_DIFFERENCE = 3.0  # smaller differences are noise and compression
UNLIKE = 0.5  # a change with a smaller likeness is a cut if it stands out by CLEAR
LIKE = 0.9  # a change with a larger likeness is never a cut
LARGE_DIFFERENCE = 18.0  # a larger difference is a cut if it stands out by LIKELY
RECOLOURED_SHARE = 0.5  # so is a change of colour in a larger share of the pixels
# A change stands out if it exceeds the median of recent changes, and the last change, by these
# factors. The second factor avoids several cuts at the start of a fast pan. CLEAR applies to
# unlikeness, LIKELY to differences.
CLEAR = (2.0, 1.5)
LIKELY = (3.0, 2.0)
RECENT_CHANGES = 15
SLOW_SECONDS = 0.4  # if pictures are further apart, their motion is unknown
COMPARED_PICTURES = 3  # a picture is compared with the last ones, so that a flash is not a cut
BLANK, NOT_BLANK = 2.0, 3.5  # standard deviations of the grey levels of a picture
STILL_DIFFERENCE = 2.5  # the largest difference of pictures before and after a dissolve
DISSOLVE_SECONDS = 1.6  # the longest dissolve, including the still pictures at both ends
DISSOLVE_STEPS = 25  # pictures that are kept during this time
MOVED_LIKENESS = 0.8  # if two pictures are more alike after a shift, the camera moved
MOST_SHIFT = (5, 8)  # pixels down and across
MIXED_REST = 0.35  # largest rest of a sum of two pictures, in standard deviations


class _Picture:
    """A small picture uint8 [h, w, 3]; its grey levels float32 [h, w].

    `centred` are the grey levels minus their mean, [h w]; `deviation` is their standard deviation.
    """

    def __init__(self, small: np.ndarray):
        self.small, self.grey = small, small.astype(np.float32) @ GREY
        self.centred = _centre(self.grey)
        self.deviation = float(np.sqrt(self.centred @ self.centred / self.centred.size))


class ShotDetector:
    """Finds the cuts of a film in a single pass. Only the starts of shots need memory.

    Source: Lienhart 1999, "Comparison of automatic shot boundary detection algorithms", sections 2
    and 3: differences of histograms and pixels relative to the motion before, fades and dissolves.
    The thresholds were chosen by vidjax with artificial films.
    """

    def __init__(self) -> None:
        self.starts: list[float] = []
        self._before_blank: _Picture | None = None
        # The difference and the unlikeness (1 - likeness) of the last two frames.
        self._last = np.zeros(2)
        self._time_s = np.inf
        self._changes: collections.deque[np.ndarray] = collections.deque(maxlen=RECENT_CHANGES)
        self._pictures: collections.deque[_Picture] = collections.deque(maxlen=COMPARED_PICTURES)
        self._dissolve = _Dissolve()

    def update(self, time_s: float, small: np.ndarray) -> bool:
        """Adds the next frame, uint8 [h, w, 3]; returns whether it shows that a new shot has begun.

        The first frame of a film begins shot 0. `starts` are the begins of all shots. After a
        dissolve, the begin is earlier than the frame.
        """
        picture = _Picture(small)
        cut = not self._pictures or self._is_cut(time_s, picture)
        self._pictures.append(picture)
        if cut:
            self.starts.append(min(time_s, self._dissolve.middle_s))
            self._dissolve = _Dissolve()
        return cut

    def shots(self, end_s: float) -> list[tuple[float, float]]:
        """Returns begin and end in seconds of the shots so far; the last shot ends at `end_s`."""
        return [*itertools.pairwise([*self.starts, end_s])]

    def _is_cut(self, time_s: float, picture: _Picture) -> bool:
        difference = _measure_difference(picture, self._pictures[-1])
        change = np.array([difference, self._measure_unlikeness(picture, 1)])
        slow, self._time_s = time_s - self._time_s > SLOW_SECONDS, time_s
        if slow:
            sudden = change[0] >= LEAST_DIFFERENCE and change[1] > 1 - UNLIKE
        else:
            sudden = self._is_sudden(change, picture)
        self._last = change
        if not sudden:
            self._changes.append(change)
        deviation, before = picture.deviation, self._before_blank
        if before is not None:
            if deviation < NOT_BLANK:
                return False
            self._before_blank = None
            return _measure_likeness(picture, before) < UNLIKE
        if deviation < BLANK:
            self._before_blank = self._pictures[-1]
            return False  # the cut comes where the blank pictures end
        return sudden or self._dissolve.detect_end(time_s, picture, change[0])

    def _is_sudden(self, change: np.ndarray, picture: _Picture) -> bool:
        """Returns whether a picture differs from each of the last pictures."""
        if change[0] < LEAST_DIFFERENCE or not self._stands_out(change, *CLEAR)[1]:
            return False
        unlikeness = self._measure_unlikeness(picture, COMPARED_PICTURES)
        if unlikeness > 1 - UNLIKE:
            return True
        # With fewer changes, a motion may have begun just now.
        known = len(self._changes) >= COMPARED_PICTURES
        if unlikeness < 1 - LIKE or not known or not self._stands_out(change, *LIKELY)[0]:
            return False
        colours = [_count_colours(x.small) for x in (picture, self._pictures[-1])]
        recoloured = float(np.abs(colours[0] - colours[1]).sum()) / 2
        return change[0] > LARGE_DIFFERENCE or recoloured > RECOLOURED_SHARE

    def _measure_unlikeness(self, picture: _Picture, count: int) -> float:
        """Returns 1 minus the largest likeness to any of the last `count` pictures."""
        last = list(self._pictures)[-count:]
        return 1.0 - max(_measure_likeness(picture, other) for other in last)

    def _stands_out(self, change: np.ndarray, times_usual: float, times_last: float) -> np.ndarray:
        """Returns for the difference and the unlikeness whether each stands out: bool [2]."""
        usual = np.median(self._changes, axis=0) if self._changes else np.zeros(2)
        return change > np.maximum(times_usual * usual, times_last * self._last)


class _Dissolve:
    """Detects pictures that are sums of a still picture before and a still picture after them."""

    def __init__(self) -> None:
        self._kept: collections.deque[tuple[float, _Picture, float]] = collections.deque()
        self.middle_s = np.inf

    def detect_end(self, time_s: float, picture: _Picture, difference: float) -> bool:
        """Adds the next picture; returns True for the first still picture after a dissolve.

        Then `middle_s` is the time at which both pictures had the same share.
        """
        kept = self._kept
        if kept and time_s - kept[-1][0] < DISSOLVE_SECONDS / DISSOLVE_STEPS:
            return False
        kept.append((time_s, picture, difference))
        while time_s - kept[0][0] > DISSOLVE_SECONDS:
            kept.popleft()
        if difference > STILL_DIFFERENCE or kept[0][2] > STILL_DIFFERENCE or len(kept) < 4:
            return False
        _, start, _ = kept[0]
        middle = _find_middle(start, picture, [x for _, x, _ in kept])
        if middle is not None:
            self.middle_s = kept[middle][0]
        return middle is not None


def _find_middle(start: _Picture, end: _Picture, between: list[_Picture]) -> int | None:
    """Returns the index of the first picture in which `end` has a larger share than `start`.

    Returns None if start and end are alike, also after a shift, or if the pictures between them are
    not sums of both.
    """
    if min(start.deviation, end.deviation) < BLANK or _measure_likeness(start, end) > UNLIKE:
        return None
    if _measure_difference(start, end) < LEAST_DIFFERENCE:
        return None
    ends = np.stack([start.centred, end.centred], 1)
    middle = np.stack([picture.centred for picture in between], 1)
    parts = np.linalg.solve(ends.T @ ends, ends.T @ middle)  # never singular: the ends are unlike
    rest = (middle - ends @ parts).std(0) / np.maximum(middle.std(0), 1.0)
    mixed = (parts.min(0) > 0.15) & (rest < MIXED_REST)
    # Pictures that are alike after a shift show a camera that moves slowly.
    if mixed.sum() < 2 or _measure_shifted_likeness(start.grey, end.grey) > MOVED_LIKENESS:
        return None
    return int((parts[1] > parts[0]).argmax())


def _centre(picture: np.ndarray) -> np.ndarray:
    return (picture - picture.mean()).ravel()


def _measure_difference(first: _Picture, second: _Picture) -> float:
    return float(np.abs(first.grey - second.grey).mean())


def _measure_likeness(first: _Picture, second: _Picture) -> float:
    """Returns the correlation of two pictures; 0 if either has almost no contrast."""
    product = first.deviation * second.deviation
    size = first.centred.size
    return float(first.centred @ second.centred) / (product * size) if product > 1.0 else 0.0


def _measure_shifted_likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the largest likeness of the middle of a picture [h, w] and parts of another."""
    down, across = MOST_SHIFT
    middle = first[down:-down, across:-across]
    parts = np.lib.stride_tricks.sliding_window_view(second, middle.shape)
    parts = parts.reshape(-1, middle.size)
    parts = parts - parts.mean(1, keepdims=True)
    lengths = np.linalg.norm(parts, axis=1) * np.linalg.norm(_centre(middle))
    return float((parts @ _centre(middle) / np.maximum(lengths, middle.size)).max())


def _count_colours(small: np.ndarray) -> np.ndarray:
    """Returns the share of the pixels in each of 64 colours: float [64]."""
    red, green, blue = np.moveaxis(small >> 6, -1, 0).astype(np.intp)
    return np.bincount((red * 16 + green * 4 + blue).ravel(), minlength=64) / red.size
