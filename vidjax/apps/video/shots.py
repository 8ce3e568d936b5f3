"""Finds the cuts between the shots of a film, from frames that were reduced to small pictures.

A cut is a change that is much larger than the motion before it. If pictures are far apart in time,
as in a slide show, every large change is a cut. If blank pictures separate two shots, as in a fade,
the cut is at the end of the blank pictures. Blank pictures within a shot, as in a flash, are not a
cut. The cut of a dissolve is in the middle of the dissolve, but is detected only at the end.
"""

import collections
import itertools

import numpy as np

from vidjax.apps.video.align import GREY

# The difference of two pictures is the mean absolute difference of their grey levels, 0 to 255. The
# likeness of two pictures is the correlation of their pixels, -1 to 1. It does not depend on
# brightness and contrast.
LEAST_DIFFERENCE = 3.0  # smaller differences come from noise and compression
UNLIKE = 0.5  # a change with a smaller likeness is a cut if it stands out by CLEAR
LIKE = 0.9  # a change with a larger likeness is never a cut
# A change that stands out by LIKELY is a cut if one of these two limits is exceeded.
LARGE_DIFFERENCE = 18.0  # the difference of the two pictures
RECOLOURED_SHARE = 0.5  # the share of the pixels whose colour changes
# A change stands out if it exceeds the first factor times the median of recent changes, and the
# second factor times the last change. The second factor avoids several cuts when a fast pan starts.
CLEAR = (2.0, 1.5)  # factors for 1 - likeness
LIKELY = (3.0, 2.0)  # factors for differences
RECENT_CHANGES = 15
SLOW_SECONDS = 0.4  # if pictures are further apart, their motion is unknown
COMPARED_PICTURES = 3  # a picture is compared with the last three, so that a flash is not a cut
# Blank pictures begin with a standard deviation of the grey levels below BLANK, and end with a
# standard deviation above NOT_BLANK.
BLANK, NOT_BLANK = 2.0, 3.5
STILL_DIFFERENCE = 2.5  # the largest difference of two pictures before, or after, a dissolve
DISSOLVE_SECONDS = 1.6  # the longest dissolve, including a still picture at both ends
DISSOLVE_STEPS = 25  # pictures that are kept during this time
MOVED_LIKENESS = 0.8  # if two pictures are more alike after a shift, the camera moved
MOST_SHIFT = (5, 8)  # pixels down and across
LEAST_WEIGHT = 0.15  # the least weight of each still picture in a picture of a dissolve
MIXED_REST = 0.35  # the largest error of the weighted sum, in standard deviations of the picture


class _Picture:
    """A small picture, uint8 [h, w, 3], and its grey levels [h, w].

    `centred` [h * w] are the grey levels minus their mean. `deviation` is the standard deviation.
    """

    def __init__(self, small: np.ndarray):
        self.small, self.grey = small, small.astype(np.float32) @ GREY
        self.centred = _centre(self.grey)
        self.deviation = float(np.sqrt(self.centred @ self.centred / self.centred.size))


class ShotDetector:
    """Finds the cuts of a film in a single pass. Stores only a few recent pictures.

    `starts` are the starts of all shots in seconds.

    Source: Lienhart 1999, "Comparison of automatic shot boundary detection algorithms", sections 2
    and 3. Unlike in the paper, the difference of two pictures is compared with earlier differences.
    We chose the thresholds with artificial films.
    """

    def __init__(self) -> None:
        self.starts: list[float] = []
        self._greys, self._count = 0.0, 0
        self._before_blank: _Picture | None = None
        self._last = np.zeros(2)  # the last change: the difference and 1 - likeness
        self._time_s = np.inf
        self._changes: collections.deque[np.ndarray] = collections.deque(maxlen=RECENT_CHANGES)
        self._pictures: collections.deque[_Picture] = collections.deque(maxlen=COMPARED_PICTURES)
        self._dissolve = _Dissolve()

    def update(self, time_s: float, small: np.ndarray, jumps: bool = False) -> bool:
        """Adds the next frame of the film; returns whether a new shot has begun.

        `small` is the frame in reduced size, uint8 [h, w, 3]. `jumps` is True if there is a gap in
        time before the frame. The first frame, and a frame after a gap, begin a shot. A dissolve is
        reported at its end, but `self.starts` gets the time of its middle.
        """
        picture = _Picture(small)
        if jumps:
            self._pictures.clear()
            self._before_blank, self._dissolve, self._time_s = None, _Dissolve(), time_s
        self._greys, self._count = self._greys + float(picture.grey.mean()), self._count + 1
        cut = not self._pictures or self._is_cut(time_s, picture)
        self._pictures.append(picture)
        if cut:
            self.starts.append(min(time_s, self._dissolve.middle_s))
            self._dissolve = _Dissolve()
        return cut

    @property
    def brightness(self) -> float:
        """The mean brightness of all pictures so far, 0 to 1."""
        return self._greys / max(255 * self._count, 1)

    def shots(self, end_s: float) -> list[tuple[float, float]]:
        """Returns the start and end of all shots in seconds. The last shot ends at `end_s`."""
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
            return False  # a cut is reported only where the blank pictures end
        return sudden or self._dissolve.detect_end(time_s, picture, change[0])

    def _is_sudden(self, change: np.ndarray, picture: _Picture) -> bool:
        """Returns whether the change to `picture` from the picture before it is a cut.

        `change` [2] is the difference of the two pictures, and 1 minus their correlation. At a cut,
        `picture` must differ from each of the three pictures before it.
        """
        if change[0] < LEAST_DIFFERENCE or not self._stands_out(change, *CLEAR)[1]:
            return False
        unlikeness = self._measure_unlikeness(picture, COMPARED_PICTURES)
        if unlikeness > 1 - UNLIKE:
            return True
        # At the start of a film, the change may also be the start of a motion.
        known = len(self._changes) >= COMPARED_PICTURES
        if unlikeness < 1 - LIKE or not known or not self._stands_out(change, *LIKELY)[0]:
            return False
        colours = [_count_colours(x.small) for x in (picture, self._pictures[-1])]
        recoloured = float(np.abs(colours[0] - colours[1]).sum()) / 2
        return change[0] > LARGE_DIFFERENCE or recoloured > RECOLOURED_SHARE

    def _measure_unlikeness(self, picture: _Picture, count: int) -> float:
        """Returns 1 minus the largest correlation of `picture` with the last `count` pictures."""
        last = list(self._pictures)[-count:]
        return 1.0 - max(_measure_likeness(picture, other) for other in last)

    def _stands_out(self, change: np.ndarray, times_usual: float, times_last: float) -> np.ndarray:
        """Returns bool [2]: whether each element of `change` stands out from earlier changes.

        `change` is [difference of two pictures, 1 - their correlation]. An element stands out above
        `times_usual` x its median in recent changes, and above `times_last` x its previous value.
        """
        usual = np.median(self._changes, axis=0) if self._changes else np.zeros(2)
        return change > np.maximum(times_usual * usual, times_last * self._last)


class _Dissolve:
    """Detects dissolves, in which each picture is a weighted sum of two still pictures."""

    def __init__(self) -> None:
        self._kept: collections.deque[tuple[float, _Picture, float]] = collections.deque()
        self.middle_s = np.inf

    def detect_end(self, time_s: float, picture: _Picture, difference: float) -> bool:
        """Adds the picture at `time_s` seconds; returns whether a dissolve ends with this picture.

        If a dissolve ends, `middle_s` becomes the time of its middle. `difference` is the
        difference of `picture` from the previous picture.
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
    """Returns the index in `between` of the picture in the middle of a dissolve.

    In a dissolve, the pictures `between` are weighted sums of `start` and `end`. From the middle
    on, `end` has the larger weight. For other changes, the result is None, for example if `start`
    and `end` are alike, if a shift makes them alike, or if one is the negative of the other.
    """
    likeness = _measure_likeness(start, end)
    if min(start.deviation, end.deviation) < BLANK or not -LIKE < likeness <= UNLIKE:
        return None
    if _measure_difference(start, end) < LEAST_DIFFERENCE:
        return None
    ends = np.stack([start.centred, end.centred], 1)
    middle = np.stack([picture.centred for picture in between], 1)
    parts = np.linalg.solve(ends.T @ ends, ends.T @ middle)
    rest = (middle - ends @ parts).std(0) / np.maximum(middle.std(0), 1.0)
    mixed = (parts.min(0) > LEAST_WEIGHT) & (rest < MIXED_REST)
    # If pictures are alike after a shift, the camera moves slowly.
    if mixed.sum() < 2 or _measure_shifted_likeness(start.grey, end.grey) > MOVED_LIKENESS:
        return None
    return int((parts[1] > parts[0]).argmax())


def _centre(picture: np.ndarray) -> np.ndarray:
    return (picture - picture.mean()).ravel()


def _measure_difference(first: _Picture, second: _Picture) -> float:
    return float(np.abs(first.grey - second.grey).mean())


def _measure_likeness(first: _Picture, second: _Picture) -> float:
    """Returns the correlation of two pictures, or 0 if one of them has almost no contrast."""
    product = first.deviation * second.deviation
    size = first.centred.size
    return float(first.centred @ second.centred) / (product * size) if product > 1.0 else 0.0


def _measure_shifted_likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the largest correlation of the middle of `first` with any part of `second`.

    Both pictures are grey levels [h, w]. The middle lacks 5 rows and 8 columns at each side. If
    there is almost no contrast, the result is near 0.
    """
    down, across = MOST_SHIFT
    middle = first[down:-down, across:-across]
    parts = np.lib.stride_tricks.sliding_window_view(second, middle.shape)
    parts = parts.reshape(-1, middle.size)
    parts, middle = parts - parts.mean(1, keepdims=True), _centre(middle)
    lengths = np.linalg.norm(parts, axis=1) * np.linalg.norm(middle)
    return float((parts @ middle / np.maximum(lengths, middle.size)).max())


def _count_colours(small: np.ndarray) -> np.ndarray:
    """Returns the share of pixels in each of 64 colours, float [64]. `small` is uint8 [h, w, 3]."""
    red, green, blue = np.moveaxis(small >> 6, -1, 0).astype(np.intp)
    return np.bincount((red * 16 + green * 4 + blue).ravel(), minlength=64) / red.size
