"""Tracks: detections of one person in frame after frame of one shot.

Boxes are (left, top, right, bottom) in pixels of the upright picture.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

LEAST_OVERLAP = 0.3  # intersection over union
GAP_SECONDS = 1.0
PLACE_GAIN, SPEED_GAIN = 0.7, 0.35  # of what a detection differs from the expected box
LARGER, LEAST_SHARE, LEAST_SECONDS, MOST_SECONDS = 3.0, 0.3, 1.0, 30.0  # of a shot's main figure
CROWDED = 0.4  # overlap of two tracks of which one may hide the other


@dataclasses.dataclass
class Track:
    """Detections of one person: the `number` of the track in the film, and `times` in seconds."""

    number: int
    shot: int
    times: list[float] = dataclasses.field(default_factory=list)


class _Motion:
    """Where a live track is expected: a filter of its sides, which move at a constant speed.

    Source: the alpha-beta filter, as in Bar-Shalom et al. 2001, "Estimation with Applications to
    Tracking and Navigation", section 6.5, with fixed gains.
    """

    def __init__(self, track: Track, time_s: float, box: np.ndarray):
        self.track, self.last = track, box
        self._time, self._box = time_s, box
        self._speed: np.ndarray | None = None  # pixels a second of each side

    def box(self, time_s: float) -> np.ndarray:
        """Returns the box [4] that is expected at a time."""
        if self._speed is None:
            return self._box
        return self._box + (time_s - self._time) * self._speed

    def add(self, time_s: float, box: np.ndarray) -> None:
        """Learns from a detection."""
        self.last = box
        expected, step = self.box(time_s), max(time_s - self._time, 1e-3)
        if self._speed is None:
            self._speed, self._box = (box - self._box) / step, box
        else:
            self._speed = self._speed + SPEED_GAIN * (box - expected) / step
            self._box = expected + PLACE_GAIN * (box - expected)
        self._time = time_s


class Tracker:
    """Joins the detections of a film to tracks, frame by frame, best pair first.

    A pair of a track and a detection needs an overlap above LEAST_OVERLAP with the box where the
    track's motion leads, else with its last box. While one person hides another, their single
    detection goes to neither: it is lost, but no identity is switched. A track ends at a cut, and
    `gap_s` seconds after its last detection, see `gap_at`. A track of one detection is dropped.

    Source: Bochinski et al. 2017, "High-speed tracking-by-detection without using image
    information" (greedy overlap); the motion, the gap and crossings are ours.
    """

    def __init__(self, gap_s: float = GAP_SECONDS):
        self._gap = gap_s
        self._live: list[_Motion] = []
        self._ended: list[Track] = []
        self._shot = 0
        self._tracks = 0

    def update(self, time_s: float, boxes: np.ndarray) -> np.ndarray:
        """Takes the detections of the next frame and returns the number of each one's track.

        Args:
          time_s: seconds, later than the last call's.
          boxes: [N, 4].

        Returns:
          [N] int, -1 for a detection that was dropped because two people overlap.
        """
        self._end_if(lambda motion: time_s - motion.track.times[-1] > self._gap)
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        owners, dropped = self._match(time_s, boxes)
        numbers = np.full(len(boxes), -1)
        for n, box in enumerate(boxes):
            if n not in dropped:
                motion = owners.get(n)
                if motion is None:
                    motion = self._start(time_s, box)
                else:
                    motion.add(time_s, box)
                motion.track.times.append(time_s)
                numbers[n] = motion.track.number
        return numbers

    def cut(self) -> None:
        """Ends all tracks: the next detections are those of another shot."""
        self._end_if(lambda motion: True)
        self._shot += 1

    @property
    def live(self) -> set[int]:
        """The numbers of the tracks that have not ended; one that ends may be dropped as short."""
        return {motion.track.number for motion in self._live}

    def take_ended(self) -> list[Track]:
        """Returns, once, the tracks that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _start(self, time_s: float, box: np.ndarray) -> _Motion:
        motion = _Motion(Track(self._tracks, self._shot), time_s, box)
        self._tracks += 1
        self._live.append(motion)
        return motion

    def _end_if(self, ends: Callable[[_Motion], bool]) -> None:
        self._ended += [
            motion.track for motion in self._live if ends(motion) and len(motion.track.times) > 1
        ]
        self._live = [motion for motion in self._live if not ends(motion)]

    def _match(self, time_s: float, boxes: np.ndarray) -> tuple[dict[int, _Motion], set[int]]:
        """Returns detection -> live track, and the detections that belong to no track at all."""
        live = self._live
        expected = np.array([motion.box(time_s) for motion in live]).reshape(-1, 4)
        last = np.array([motion.last for motion in live]).reshape(-1, 4)
        ahead = overlaps(expected, boxes)
        seen_twice = np.array([len(motion.track.times) > 1 for motion in live], bool)
        hidden = _hidden(expected[seen_twice], ahead[seen_twice])
        pairs = _best_pairs(np.where(hidden, 0.0, ahead))
        rest = overlaps(last, boxes)
        rest[list(pairs.values())] = 0.0
        rest[:, [*pairs, *np.flatnonzero(hidden)]] = 0.0
        pairs |= _best_pairs(rest)
        return {n: live[m] for n, m in pairs.items()}, set(np.flatnonzero(hidden).tolist())


class MainFigures:
    """Follows one person a shot: the main figure of its frames.

    That is the only one of a frame, or one with LARGER times the area of any other. A shot counts
    if it lasts LEAST_SECONDS to MOST_SECONDS and more than LEAST_SHARE of its frames have one.

    Source: iQIYI-VID, sections 3.1 and 3.2, which looks at heads; "larger" is read as the area.
    """

    def __init__(self) -> None:
        self._shot = self._frames = 0
        self._begin_s = 0.0
        self._track = Track(0, 0)
        self._ended: list[Track] = []

    def update(self, time_s: float, boxes: np.ndarray) -> np.ndarray:
        """Takes the detections of the next frame; returns the shot for the main one, else -1."""
        self._frames += 1
        numbers = np.full(len(boxes), -1)
        if len(boxes):
            sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0).astype(np.float64)
            order = np.argsort(-sides.prod(1), kind="stable")
            areas = sides.prod(1)[order]
            if len(boxes) == 1 or areas[0] >= LARGER * areas[1]:
                main = order[0]
                self._track.times.append(time_s)
                numbers[main] = self._shot
        return numbers

    def cut(self, time_s: float) -> None:
        """Ends the shot at the time of the next one's first frame, or of the end of the film."""
        valid = len(self._track.times) > LEAST_SHARE * self._frames
        # Times that are equal in a file differ in the last digits.
        if valid and LEAST_SECONDS - 1e-6 <= time_s - self._begin_s <= MOST_SECONDS + 1e-6:
            self._ended.append(self._track)
        self._shot += 1
        self._begin_s, self._frames, self._track = time_s, 0, Track(self._shot, self._shot)

    @property
    def live(self) -> set[int]:
        """The number of the shot that has not ended."""
        return {self._shot}

    def take_ended(self) -> list[Track]:
        """Returns, once, the shots that have ended since the last call and count."""
        ended, self._ended = self._ended, []
        return ended


def gap_at(rate: float) -> float:
    """Returns the seconds after which a track ends, where `rate` frames a second are looked at.

    One of them may lack the person, so a track of slow frames waits longer than GAP_SECONDS.
    """
    return max(GAP_SECONDS, 2.5 / rate)


def overlaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of boxes [L, 4] and [N, 4]: [L, N], 0 to 1."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.maximum(high - low, 0.0).prod(-1)
    areas = [np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0).prod(-1) for boxes in (one, other)]
    return shared / np.maximum(areas[0][:, None] + areas[1] - shared, 1e-9)


def _best_pairs(overlap: np.ndarray) -> dict[int, int]:
    """Returns detection -> track, the best pair first, each in one pair at most."""
    left = overlap.copy()
    pairs: dict[int, int] = {}
    while left.size and left.max() > LEAST_OVERLAP:
        track, detection = np.unravel_index(left.argmax(), left.shape)
        pairs[int(detection)] = int(track)
        left[track], left[:, detection] = 0.0, 0.0
    return pairs


def _hidden(expected: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """Returns for each detection whether two people should be there and it is the only one.

    `expected`: [L, 4] boxes of tracks; `ahead`: [L, N] their overlaps with the detections.
    """
    crowded = overlaps(expected, expected) > CROWDED
    near = ahead > LEAST_OVERLAP
    hidden = np.zeros(ahead.shape[1], bool)
    for detection, claims in enumerate(near.T):
        together = claims & ((crowded & claims).sum(1) > 1)  # each is crowded with itself
        hidden[detection] = together.sum() > 1 and near[together].any(0).sum() < together.sum()
    return hidden
