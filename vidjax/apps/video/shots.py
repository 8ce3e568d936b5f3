"""Shots of a film: where one camera's picture ends, found frame by frame in small pictures.

A cut is a change that stands out from the motion before it; between pictures far apart, as of a
show of photos, it is any large one. Blank pictures between two shots, as of a fade, make one cut,
at their end; between like pictures, as of a flash, none. A dissolve makes one, in its middle, which
is found when it is over.
"""

import collections
import itertools

import numpy as np

from vidjax.apps.video.align import GREY

# Differences are means over pixels of grey levels, 0 to 255. Likeness is the correlation of the
# pixels of two pictures, -1 to 1; a change of brightness or contrast leaves it as it is.
LEAST = 3.0  # difference; below are noise and compression
UNLIKE = 0.5  # likeness below which a change is a cut that stands out by CLEAR
LIKE = 0.9  # likeness above which no change is a cut
LARGE = 18.0  # difference that is a cut, if it stands out by LIKELY
COLOURS = 0.5  # part of the pixels of another colour that is one, too
# How a change stands out: times the median of the last ones, and times the last one, so that the
# begin of a fast pan is one cut at most. CLEAR is meant of likeness, LIKELY of differences.
CLEAR = (2.0, 1.5)
LIKELY = (3.0, 2.0)
REMEMBERED = 15  # changes
SLOW_SECONDS = 0.4  # pictures that are further apart tell no motion
COMPARED = 3  # pictures before, to one of which the end of a flash is alike
BLANK, NOT_BLANK = 2.0, 3.5  # standard deviations of the grey levels of a picture
STILL = 2.5  # difference of two pictures at both ends of a dissolve, at most
DISSOLVE_SECONDS = 1.6  # the longest, with the still pictures at its ends
DISSOLVE_STEPS = 25  # pictures kept of it
MOVED = 0.8  # likeness after a move, above which a slow pan is no dissolve
MOST_MOVED = (5, 8)  # pixels down and across
MIXED = 0.35  # rest of a picture that is not the sum of both ends, in standard deviations


class Cuts:
    """Finds the cuts of one film in a single pass; memory is constant, but for the starts of shots.

    Source: difference of histograms and of pixels against the motion before, as in Lienhart 1999,
    "Comparison of automatic shot boundary detection algorithms"; its sections 2 and 3 have fades
    and dissolves. The thresholds are ours, set on made films.
    """

    def __init__(self) -> None:
        self.starts: list[float] = []
        self._before_blank: np.ndarray | None = None
        # Of each frame, the difference and the unlikeness to the one before.
        self._last = np.zeros(2)
        self._time_s = np.inf
        self._changes: collections.deque[np.ndarray] = collections.deque(maxlen=REMEMBERED)
        self._pictures: collections.deque[np.ndarray] = collections.deque(maxlen=COMPARED)
        self._colours: np.ndarray | None = None
        self._dissolve = _Dissolve()

    def update(self, time_s: float, small: np.ndarray) -> bool:
        """Takes the next frame, uint8 [h, w, 3]; returns True if it shows that a shot has begun.

        The first frame of a film is the first of shot 0. `starts` say when a shot began: after a
        dissolve, earlier.
        """
        grey, colours = small.astype(np.float32) @ GREY, _histogram(small)
        first = not self._pictures
        cut = first or self._is_cut(time_s, grey, colours)
        self._colours = colours
        self._pictures.append(grey)
        if cut:
            self.starts.append(min(time_s, self._dissolve.middle_s))
            self._dissolve = _Dissolve()
        return cut

    def shots(self, end_s: float) -> list[tuple[float, float]]:
        """Returns begin and end of the shots until now in seconds; the last ends at `end_s`."""
        return [*itertools.pairwise([*self.starts, end_s])]

    def _is_cut(self, time_s: float, grey: np.ndarray, colours: np.ndarray) -> bool:
        change = np.array([_difference(grey, self._pictures[-1]), self._unlikeness(grey, 1)])
        slow, self._time_s = time_s - self._time_s > SLOW_SECONDS, time_s
        if slow:
            sudden = change[0] >= LEAST and change[1] > 1 - UNLIKE
        else:
            sudden = self._is_sudden(change, grey, colours)
        self._last = change
        if not sudden:
            self._changes.append(change)
        deviation, before = float(grey.std()), self._before_blank
        if before is not None:
            if deviation < NOT_BLANK:
                return False
            self._before_blank = None
            return _likeness(grey, before) < UNLIKE
        if deviation < BLANK:
            self._before_blank = self._pictures[-1]
            return False  # the cut comes where the blank pictures end
        return sudden or self._dissolve.ended(time_s, grey, change[0])

    def _is_sudden(self, change: np.ndarray, grey: np.ndarray, colours: np.ndarray) -> bool:
        """Returns whether a picture shows something else than each of the last ones."""
        if change[0] < LEAST or not self._stands_out(change, *CLEAR)[1]:
            return False
        unlikeness = self._unlikeness(grey, COMPARED)
        if unlikeness > 1 - UNLIKE:
            return True
        known = len(self._changes) >= COMPARED  # else the motion may have begun just now
        if unlikeness < 1 - LIKE or not known or not self._stands_out(change, *LIKELY)[0]:
            return False
        assert self._colours is not None
        recoloured = float(np.abs(colours - self._colours).sum()) / 2
        return change[0] > LARGE or recoloured > COLOURS

    def _unlikeness(self, grey: np.ndarray, count: int) -> float:
        """Returns 1 - likeness to the likest of the last `count` pictures."""
        return 1.0 - max(_likeness(grey, picture) for picture in list(self._pictures)[-count:])

    def _stands_out(self, change: np.ndarray, times_usual: float, times_last: float) -> np.ndarray:
        """Returns for difference and unlikeness whether each stands out: bool [2]."""
        usual = np.median(self._changes, axis=0) if self._changes else np.zeros(2)
        return change > np.maximum(times_usual * usual, times_last * self._last)


class _Dissolve:
    """Finds pictures that are sums of a still one before and a still one after them."""

    def __init__(self) -> None:
        self._kept: collections.deque[tuple[float, np.ndarray, float]] = collections.deque()
        self.middle_s = np.inf

    def ended(self, time_s: float, grey: np.ndarray, difference: float) -> bool:
        """Takes the next picture [h, w]; returns True for the first still one after a dissolve.

        Then `middle_s` is when there was as much of the one as of the other.
        """
        kept = self._kept
        if kept and time_s - kept[-1][0] < DISSOLVE_SECONDS / DISSOLVE_STEPS:
            return False
        kept.append((time_s, grey, difference))
        while time_s - kept[0][0] > DISSOLVE_SECONDS:
            kept.popleft()
        if difference > STILL or kept[0][2] > STILL or len(kept) < 4:
            return False
        _, start, _ = kept[0]
        middle = _middle(start, grey, [picture for _, picture, _ in kept])
        if middle is not None:
            self.middle_s = kept[middle][0]
        return middle is not None


def _middle(start: np.ndarray, end: np.ndarray, between: list[np.ndarray]) -> int | None:
    """Returns the place of the first picture that is more of the second than of the first of two.

    None if the two are alike, be it after a move, or pictures between them are not sums of both.
    """
    contrast = min(float(start.std()), float(end.std()))
    if contrast < BLANK or _difference(start, end) < LEAST or _likeness(start, end) > UNLIKE:
        return None
    ends = np.stack([_centred(start), _centred(end)], 1)
    middle = np.stack([_centred(picture) for picture in between], 1)
    parts = np.linalg.solve(ends.T @ ends, ends.T @ middle)  # they are unlike: not singular
    rest = (middle - ends @ parts).std(0) / np.maximum(middle.std(0), 1.0)
    mixed = (parts.min(0) > 0.15) & (rest < MIXED)
    if mixed.sum() < 2 or _likeness_moved(start, end) > MOVED:  # the camera moves slowly
        return None
    return int((parts[1] > parts[0]).argmax())


def _centred(picture: np.ndarray) -> np.ndarray:
    return (picture - picture.mean()).ravel()


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


def _likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the correlation of two pictures; 0 where one has hardly any contrast."""
    one, other = _centred(one), _centred(other)
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths > one.size else 0.0


def _likeness_moved(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the likeness of the middle of a picture [h, w] and the most alike part of another."""
    down, across = MOST_MOVED
    middle = one[down:-down, across:-across]
    parts = np.lib.stride_tricks.sliding_window_view(other, middle.shape)
    parts = parts.reshape(-1, middle.size)
    parts = parts - parts.mean(1, keepdims=True)
    lengths = np.linalg.norm(parts, axis=1) * np.linalg.norm(_centred(middle))
    return float((parts @ _centred(middle) / np.maximum(lengths, middle.size)).max())


def _histogram(small: np.ndarray) -> np.ndarray:
    """Returns the part of the pixels in each of 64 colours: float [64]."""
    red, green, blue = np.moveaxis(small >> 6, -1, 0).astype(np.intp)
    return np.bincount((red * 16 + green * 4 + blue).ravel(), minlength=64) / red.size
