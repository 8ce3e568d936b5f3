"""Tracks: detections of one person in frame after frame of one shot.

Boxes are (left, top, right, bottom) in pixels of the upright picture.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

LEAST_OVERLAP = 0.3  # intersection over union
GAP_SECONDS = 1.0
PLACE_GAIN, SPEED_GAIN = 0.7, 0.35  # of what a detection differs from the expected box
KEPT = 0.7  # part of the old embedding after a detection
LARGER, LEAST_SHARE, LEAST_SECONDS, MOST_SECONDS = 3.0, 0.3, 1.0, 30.0  # of a shot's main figure
CROWDED = 0.4  # overlap of two tracks of which one may hide the other

# (embeddings [L, D] of tracks, [N, D] of detections) -> [L, N], above 0 for the same person.
Similar = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass
class Track:
    """Detections of one person, in order of time.

    `number`: from 0, in the film. `times`: [n] seconds. `boxes`: [n, 4] pixels. `scores`: [n], of
    the detector. `points`: [n, 5, 2] pixels. `detections`: [n], each one's number among all that
    the tracker got.
    """

    number: int
    shot: int
    times: list[float] = dataclasses.field(default_factory=list)
    boxes: list[np.ndarray] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    points: list[np.ndarray] = dataclasses.field(default_factory=list)
    detections: list[int] = dataclasses.field(default_factory=list)


class _Motion:
    """Where a live track is expected: a filter of its sides, which move at a constant speed.

    Source: the alpha-beta filter, as in Bar-Shalom et al. 2001, "Estimation with Applications to
    Tracking and Navigation", section 6.5, with fixed gains.
    """

    def __init__(self, track: Track, time_s: float, box: np.ndarray, embedding: np.ndarray | None):
        self.track = track
        self.embedding = embedding
        self._time, self._box = time_s, box
        self._speed: np.ndarray | None = None  # pixels a second of each side

    def box(self, time_s: float) -> np.ndarray:
        """Returns the box [4] that is expected at a time."""
        if self._speed is None:
            return self._box
        return self._box + (time_s - self._time) * self._speed

    def add(self, time_s: float, box: np.ndarray, embedding: np.ndarray | None) -> None:
        """Learns from a detection."""
        expected, step = self.box(time_s), max(time_s - self._time, 1e-3)
        if self._speed is None:
            self._speed, self._box = (box - self._box) / step, box
        else:
            self._speed = self._speed + SPEED_GAIN * (box - expected) / step
            self._box = expected + PLACE_GAIN * (box - expected)
        self._time = time_s
        if embedding is not None and self.embedding is not None:
            self.embedding = KEPT * self.embedding + (1 - KEPT) * embedding


class Tracker:
    """Joins the detections of a film to tracks, frame by frame, best pair first.

    A pair of a track and a detection needs an overlap above LEAST_OVERLAP with the box where the
    track's motion leads, else with its last box. While one person hides another, their single
    detection goes to neither, unless embeddings tell whose it is: it is lost, but no identity is
    switched. A track ends at a cut, and GAP_SECONDS after its last detection.

    Args:
      least: detections of a track; shorter ones are dropped. Give 1 for photos.
      similar: how alike embeddings are, about -1 to 1; it is added to the overlap, so below 0 it
        speaks against a pair.

    Source: Bochinski et al. 2017, "High-speed tracking-by-detection without using image
    information" (greedy overlap); the motion, the gap and crossings are ours.
    """

    def __init__(self, *, least: int = 2, similar: Similar | None = None):
        self._least = least
        self._similar = similar
        self._live: list[_Motion] = []
        self._ended: list[Track] = []
        self._shot = 0
        self._tracks = 0
        self._detections = 0

    def update(
        self,
        time_s: float,
        boxes: np.ndarray,
        scores: np.ndarray,
        points: np.ndarray,
        embeddings: np.ndarray | None = None,
    ) -> np.ndarray:
        """Takes the detections of the next frame and returns the number of each one's track.

        Args:
          time_s: seconds, later than the last call's.
          boxes, scores, points: [N, 4], [N], [N, 5, 2].
          embeddings: [N, D], for `similar`.

        Returns:
          [N] int, -1 for a detection that was dropped because two people overlap.
        """
        self._end_if(lambda motion: time_s - motion.track.times[-1] > GAP_SECONDS)
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        vectors = [None] * len(boxes) if embeddings is None else list(embeddings)
        owners, dropped = self._match(time_s, boxes, embeddings)
        numbers = np.full(len(boxes), -1)
        for n, (box, vector) in enumerate(zip(boxes, vectors, strict=True)):
            if n not in dropped:
                motion = owners.get(n)
                if motion is None:
                    motion = self._start(time_s, box, vector)
                else:
                    motion.add(time_s, box, vector)
                track = motion.track
                track.times.append(time_s)
                track.boxes.append(box)
                track.scores.append(float(scores[n]))
                track.points.append(np.asarray(points[n], np.float64))
                track.detections.append(self._detections + n)
                numbers[n] = track.number
        self._detections += len(boxes)
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

    def finish(self) -> list[Track]:
        """Ends all tracks at the end of the film and returns them as `take_ended` does."""
        self._end_if(lambda motion: True)
        return self.take_ended()

    def _start(self, time_s: float, box: np.ndarray, embedding: np.ndarray | None) -> _Motion:
        motion = _Motion(Track(self._tracks, self._shot), time_s, box, embedding)
        self._tracks += 1
        self._live.append(motion)
        return motion

    def _end_if(self, ends: Callable[[_Motion], bool]) -> None:
        self._ended += [
            motion.track
            for motion in self._live
            if ends(motion) and len(motion.track.times) >= self._least
        ]
        self._live = [motion for motion in self._live if not ends(motion)]

    def _match(
        self, time_s: float, boxes: np.ndarray, embeddings: np.ndarray | None
    ) -> tuple[dict[int, _Motion], set[int]]:
        """Returns detection -> live track, and the detections that belong to no track at all."""
        live = self._live
        expected = np.array([motion.box(time_s) for motion in live]).reshape(-1, 4)
        last = np.array([motion.track.boxes[-1] for motion in live]).reshape(-1, 4)
        ahead = overlaps(expected, boxes)
        bonus, hidden = np.zeros(ahead.shape), np.zeros(len(boxes), bool)
        if self._similar is not None and embeddings is not None:
            known = np.array([motion.embedding for motion in live])
            bonus = self._similar(known, embeddings) if live else bonus
        else:
            seen_twice = np.array([len(motion.track.times) > 1 for motion in live], bool)
            hidden = _hidden(expected[seen_twice], ahead[seen_twice])
        pairs = _best_pairs(np.where(hidden, 0.0, ahead), bonus)
        rest = overlaps(last, boxes)
        rest[list(pairs.values())] = 0.0
        rest[:, [*pairs, *np.flatnonzero(hidden)]] = 0.0
        pairs |= _best_pairs(rest, bonus)
        return {n: live[m] for n, m in pairs.items()}, set(np.flatnonzero(hidden).tolist())


class MainFigures:
    """Follows one person a shot, with the methods of Tracker: the main figure of its frames.

    That is the only one of a frame, or one with LARGER times the area of any other. A shot counts
    if it lasts LEAST_SECONDS to MOST_SECONDS and more than LEAST_SHARE of its frames have one.

    Source: iQIYI-VID, sections 3.1 and 3.2, which looks at heads; "larger" is read as the area.
    """

    def __init__(self) -> None:
        self._shot = 0
        self._times: list[float] = []
        self._track = Track(0, 0)
        self._ended: list[Track] = []

    def update(
        self, time_s: float, boxes: np.ndarray, scores: np.ndarray, points: np.ndarray
    ) -> np.ndarray:
        """Takes the detections of the next frame; returns the shot for the main one, else -1."""
        self._times.append(time_s)
        numbers = np.full(len(boxes), -1)
        if len(boxes):
            sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0).astype(np.float64)
            order = np.argsort(-sides.prod(1), kind="stable")
            areas = sides.prod(1)[order]
            if len(boxes) == 1 or areas[0] >= LARGER * areas[1]:
                main = order[0]
                self._track.times.append(time_s)
                self._track.boxes.append(boxes[main])
                self._track.scores.append(float(scores[main]))
                self._track.points.append(np.asarray(points[main], np.float64))
                numbers[main] = self._shot
        return numbers

    def cut(self) -> None:
        """Ends the shot."""
        valid = len(self._track.times) > LEAST_SHARE * len(self._times)
        if valid and LEAST_SECONDS <= self._times[-1] - self._times[0] <= MOST_SECONDS:
            self._ended.append(self._track)
        self._shot += 1
        self._times, self._track = [], Track(self._shot, self._shot)

    @property
    def live(self) -> set[int]:
        """The number of the shot that has not ended."""
        return {self._shot}

    def take_ended(self) -> list[Track]:
        """Returns, once, the shots that have ended since the last call and count."""
        ended, self._ended = self._ended, []
        return ended

    def finish(self) -> list[Track]:
        """Returns the last shot if it counts, at the end of a film."""
        self.cut()
        return self.take_ended()


def overlaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of boxes [L, 4] and [N, 4]: [L, N], 0 to 1."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.maximum(high - low, 0.0).prod(-1)
    areas = [np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0).prod(-1) for boxes in (one, other)]
    return shared / np.maximum(areas[0][:, None] + areas[1] - shared, 1e-9)


def _best_pairs(overlap: np.ndarray, bonus: np.ndarray) -> dict[int, int]:
    """Returns detection -> track, the best pair first, each in one pair at most."""
    affinity = np.where(overlap > LEAST_OVERLAP, overlap + bonus, 0.0)
    pairs: dict[int, int] = {}
    while affinity.size and affinity.max() > LEAST_OVERLAP:
        track, detection = np.unravel_index(affinity.argmax(), affinity.shape)
        pairs[int(detection)] = int(track)
        affinity[track], affinity[:, detection] = 0.0, 0.0
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
