"""Tracks: the detections of a person in the frames of a shot.

Boxes are (left, top, right, bottom) in pixels of the upright picture. A sighting lasts until the
next picture in which people are detected, or until the shot ends.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from vidjax.apps.video.cards import BackEnd

LEAST_OVERLAP = 0.3  # intersection over union
GAP_SECONDS = 1.0
PLACE_GAIN, SPEED_GAIN = 0.7, 0.35  # gains of the alpha-beta filter
# A main figure has so many times the area of any other, in so large a share of the shot's frames.
MAIN_FIGURE_RATIO, LEAST_SHARE = 3.0, 0.3
LEAST_SECONDS, MOST_SECONDS = 1.0, 30.0  # duration of a shot with a main figure
CROWDED_OVERLAP = 0.4  # of two tracks if either person may hide the other
HELD_SECONDS = 0.4  # a longer picture is held; then a single picture is enough for a track
# A track is split unless the odds for the same person are at least SAME_ODDS: faces of a shot are
# far more alike than the photos with which cards are measured. Each part lasts at least
# PART_SECONDS, because the faces in dissolves are unusable. Held pictures may each show another
# person.
PART_SECONDS, SAME_ODDS = 0.8, 50.0


@dataclasses.dataclass
class Track:
    """The detections of a person.

    Attributes:
      number: the number of the track in the film.
      shot: the number of the shot.
      times, ends: begins and ends of the sightings in seconds. The end of the last sighting may be
        missing.
    """

    number: int
    shot: int
    times: list[float] = dataclasses.field(default_factory=list)
    ends: list[float] = dataclasses.field(default_factory=list)

    def end_sighting(self, time_s: float) -> None:
        """Ends the last sighting, because there is another picture, or the shot ends."""
        if len(self.ends) < len(self.times):
            self.ends.append(time_s)

    def cut(self, time_s: float) -> None:
        """Ends the track with its shot. Later sightings, in a dissolve, are removed."""
        self.times = [begin_s for begin_s in self.times if begin_s < time_s]
        self.ends = [min(end_s, time_s) for end_s in self.ends[: len(self.times)]]
        self.end_sighting(time_s)

    @property
    def pace_s(self) -> float:
        """The median number of seconds between two of its pictures."""
        return float(np.median(np.subtract(self.ends, self.times)))

    def split(self, at: list[float]) -> "list[Track]":
        """Returns the parts before, between and after the times `at`; each part has a sighting."""
        places = [0, *np.searchsorted(self.times, at).tolist(), len(self.times)]
        return [
            Track(self.number, self.shot, self.times[low:high], self.ends[low:high])
            for low, high in itertools.pairwise(places)
        ]


class _Motion:
    """Predicts the box of a live track: a filter of its sides with constant speed.

    Source: the alpha-beta filter with fixed gains, Bar-Shalom et al. 2001, "Estimation with
    Applications to Tracking and Navigation", section 6.5.
    """

    def __init__(self, track: Track, time_s: float, box: np.ndarray):
        self.track, self.last = track, box
        self.time_s, self._box = time_s, box
        self._speed: np.ndarray | None = None  # pixels a second of each side

    def predict(self, time_s: float) -> np.ndarray:
        """Returns the predicted box [4] at a time."""
        if self._speed is None:
            return self._box
        return self._box + (time_s - self.time_s) * self._speed

    def add(self, time_s: float, box: np.ndarray) -> None:
        """Corrects the prediction by a detection."""
        self.last = box
        expected, step = self.predict(time_s), max(time_s - self.time_s, 1e-3)
        if self._speed is None:
            self._speed, self._box = (box - self._box) / step, box
        else:
            self._speed = self._speed + SPEED_GAIN * (box - expected) / step
            self._box = expected + PLACE_GAIN * (box - expected)
        self.time_s = time_s


class Tracker:
    """Joins the detections of a film to tracks, frame by frame, best pairs first.

    A detection is assigned to a track if its overlap with the track's predicted box, or else with
    its last box, is above LEAST_OVERLAP. After its first sighting, a track has no prediction yet:
    in the next picture both boxes are doubled in size. If a person hides another, the single
    detection is dropped: a lost detection is better than a switched identity. A track ends at a
    cut, or `gap_s` seconds after its last sighting, see `choose_gap_seconds`. A track with a single
    detection is dropped, unless its picture is held for more than `held_s` seconds.

    Source: greedy overlap, Bochinski et al. 2017, "High-speed tracking-by-detection without using
    image information"; larger boxes, Yang et al. 2023, "Hard to Track Objects with Irregular
    Motions and Similar Appearances?". Motion, gaps and crossings are additions of vidjax.
    """

    def __init__(self, gap_s: float = GAP_SECONDS, held_s: float = HELD_SECONDS):
        self._gap, self._held = gap_s, held_s
        self._cut_s: float | None = None  # begin of the shot until its first detections
        self._live: list[_Motion] = []
        self._ended: list[Track] = []
        self._time_s = 0.0  # of the last picture
        self._shot = 0
        self._tracks = 0

    def update(self, time_s: float, boxes: np.ndarray) -> np.ndarray:
        """Adds the detections of the next frame; returns the number of the track of each detection.

        Args:
          time_s: seconds, later than in the last call.
          boxes: [N, 4].

        Returns:
          [N] int; -1 if a detection was dropped because two people overlap.
        """
        for motion in self._live:
            motion.track.end_sighting(time_s)
        self._time_s = time_s
        self._end_if(lambda motion: time_s - motion.track.ends[-1] > self._gap)
        begin_s, self._cut_s = time_s if self._cut_s is None else self._cut_s, None
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        owners, dropped = self._match(time_s, boxes)
        numbers = np.full(len(boxes), -1)
        for n, box in enumerate(boxes):
            if n not in dropped:
                if motion := owners.get(n):
                    motion.add(time_s, box)
                else:
                    motion = _Motion(Track(self._tracks, self._shot), time_s, box)
                    self._live.append(motion)
                    self._tracks += 1
                motion.track.times.append(begin_s)
                numbers[n] = motion.track.number
        return numbers

    def cut(self, time_s: float) -> None:
        """Ends all tracks; the following detections are part of a shot that began at `time_s`.

        If the cut is a dissolve, `time_s` is its middle. People who appeared during the dissolve
        are assigned to the next shot.
        """
        last_s = 2 * time_s - self._time_s if time_s < self._time_s else time_s
        for motion in self._live:
            motion.track.cut(time_s)
        self._live = [x for x in self._live if x.track.times and x.track.times[0] < last_s]
        self._end_if(lambda motion: True)
        self._cut_s = time_s
        self._shot += 1

    @property
    def live(self) -> set[int]:
        """The numbers of the tracks that have not ended. They may still be dropped as too short."""
        return {motion.track.number for motion in self._live}

    def take_ended(self) -> list[Track]:
        """Returns the tracks that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _end_if(self, ends: Callable[[_Motion], bool]) -> None:
        over = [motion for motion in self._live if ends(motion)]
        self._ended += [
            motion.track for motion in over
            if len(motion.track.times) > 1 or motion.track.ends[0] - motion.time_s > self._held
        ]  # fmt: skip
        self._live = [motion for motion in self._live if not ends(motion)]

    def _match(self, time_s: float, boxes: np.ndarray) -> tuple[dict[int, _Motion], set[int]]:
        """Returns detection -> live track, and the detections that are dropped."""
        live = self._live
        expected = np.array([motion.predict(time_s) for motion in live]).reshape(-1, 4)
        last = np.array([motion.last for motion in live]).reshape(-1, 4)
        ahead = measure_overlaps(expected, boxes)
        seen_twice = np.array([len(motion.track.times) > 1 for motion in live], bool)
        hidden = _find_hidden(expected[seen_twice], ahead[seen_twice])
        pairs = _pair_greedily(np.where(hidden, 0.0, ahead))
        new = np.array([motion.track.ends == [time_s] for motion in live], bool)
        doubled = measure_overlaps(_double_boxes(last), _double_boxes(boxes))
        for rest in (measure_overlaps(last, boxes), doubled * new[:, None]):
            rest[list(pairs.values())] = 0.0
            rest[:, [*pairs, *np.flatnonzero(hidden)]] = 0.0
            pairs |= _pair_greedily(rest)
        return {n: live[m] for n, m in pairs.items()}, set(np.flatnonzero(hidden).tolist())


class MainFigures:
    """Follows a single person per shot: the main figure of its frames.

    A figure is the main figure of a frame if the frame has no other, or if its area is
    MAIN_FIGURE_RATIO times the area of any other. A shot counts if it lasts LEAST_SECONDS to
    MOST_SECONDS, and more than LEAST_SHARE of its frames have a main figure.

    Source: iQIYI-VID, sections 3.1 and 3.2, for heads. We interpret "larger" as the area.
    """

    def __init__(self) -> None:
        self._shot = self._frames = 0
        self._begin_s = 0.0
        self._track = Track(0, 0)
        self._ended: list[Track] = []

    def update(self, time_s: float, boxes: np.ndarray) -> np.ndarray:
        """Adds the detections of the next frame; returns the shot for the main figure, or -1."""
        self._frames += 1
        self._track.end_sighting(time_s)
        numbers = np.full(len(boxes), -1)
        if len(boxes):
            areas = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0).astype(np.float64).prod(1)
            main = int(areas.argmax())
            if areas[main] >= MAIN_FIGURE_RATIO * np.delete(areas, main).max(initial=0.0):
                # A figure in the first picture of a shot counts from the begin of the shot.
                self._track.times.append(self._begin_s if self._frames == 1 else time_s)
                numbers[main] = self._shot
        return numbers

    def cut(self, time_s: float) -> None:
        """Ends the shot at `time_s`, the begin of the next shot or the end of the film."""
        self._track.cut(time_s)
        valid = len(self._track.times) > LEAST_SHARE * self._frames
        # Tolerance for rounding errors of times.
        if valid and LEAST_SECONDS - 1e-6 <= time_s - self._begin_s <= MOST_SECONDS + 1e-6:
            self._ended.append(self._track)
        self._shot += 1
        self._begin_s, self._frames, self._track = time_s, 0, Track(self._shot, self._shot)

    @property
    def live(self) -> set[int]:
        """The number of the current shot."""
        return {self._shot}

    def take_ended(self) -> list[Track]:
        """Returns the shots with a main figure that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended


def choose_held_seconds(fps: float) -> float:
    """Returns the duration above which a picture is held; `fps` pictures per second are wanted."""
    return max(HELD_SECONDS, 1.5 / fps)


def choose_gap_seconds(rate: float) -> float:
    """Returns how many seconds after its last sighting a track ends.

    `rate` is the number of pictures per second. A person may be missed in a picture, so the gap
    is longer than GAP_SECONDS if there are few pictures.
    """
    return max(GAP_SECONDS, 2.5 / rate) - 1.0 / rate


def find_least_cosine(back_end: BackEnd, odds: float) -> float:
    """Returns the cosine at which one person is `odds` times as likely as two different people.

    The cosine of two faces is assumed to be normally distributed. Its mean and standard deviation
    are `same` for one person, and `different` for two. The result lies between the two means.
    """
    cosines = np.linspace(back_end.different[0], back_end.same[0], 1001)
    same, different = (
        -0.5 * ((cosines - mean) / deviation) ** 2 - np.log(deviation)
        for mean, deviation in (back_end.same, back_end.different)
    )
    return float(np.interp(np.log(odds), same - different, cosines))


def find_changes(
    vectors: np.ndarray, times: np.ndarray, held: bool, back_end: BackEnd | None
) -> list[int]:
    """Returns the places at which a track begins to show another person, in order.

    The track is split at the place where the mean vectors before and after are least alike, if
    their cosine is below `find_least_cosine`. Then both parts are searched.

    Args:
      vectors: [N, D], of its faces in order of time.
      times: [N], in seconds.
      held: whether its pictures are held, so that each may show another person.
      back_end: from the net's card; if it is None, the track is not split.
    """
    if back_end is None or len(vectors) < 2:
        return []
    least = 1 if held else max(2, round(PART_SECONDS / float(np.median(np.diff(times)))))
    centred = vectors.astype(np.float64) - back_end.centre
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    sums = np.concatenate([0 * centred[:1], (centred / np.maximum(lengths, 1e-9)).cumsum(0)])
    least_alike = find_least_cosine(back_end, 1.0 if held else SAME_ODDS)

    def find(low: int, high: int) -> list[int]:
        places = np.arange(low + 1, high)
        cosines = np.array(
            [min(compare(low, at, high, n) for n in (least, 4 * least)) for at in places.tolist()]
        )
        around = np.pad(cosines, 1, constant_values=1.0)
        # A minimum too close to an end is skipped: this part is too short, as in a dissolve.
        lowest = (cosines <= around[:-2]) & (cosines <= around[2:]) & (cosines < least_alike)
        lowest &= (places >= low + least) & (places <= high - least)
        if not lowest.any():
            return []
        at = int(places[np.where(lowest, cosines, 1.0).argmin()])
        return [*find(low, at), at, *find(at, high)]

    def compare(low: int, at: int, high: int, count: int) -> float:
        before = sums[at] - sums[max(low, at - count)]
        after = sums[min(high, at + count)] - sums[at]
        return float(before @ after / max(np.linalg.norm(before) * np.linalg.norm(after), 1e-9))

    return find(0, len(vectors))


def measure_overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of boxes [L, 4] and [N, 4]: [L, N], 0 to 1."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.maximum(high - low, 0.0).prod(-1)
    areas = [np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0).prod(-1) for boxes in (first, second)]
    return shared / np.maximum(areas[0][:, None] + areas[1] - shared, 1e-9)


def _double_boxes(boxes: np.ndarray) -> np.ndarray:
    """Returns boxes [N, 4] with the same centre and sides of twice the length."""
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    return boxes + np.concatenate([-half, half], 1)


def _pair_greedily(overlap: np.ndarray) -> dict[int, int]:
    """Returns detection -> track; the best pairs come first, and none is in two pairs."""
    remaining = overlap.copy()
    pairs: dict[int, int] = {}
    while remaining.size and remaining.max() > LEAST_OVERLAP:
        track, detection = np.unravel_index(remaining.argmax(), remaining.shape)
        pairs[int(detection)] = int(track)
        remaining[track], remaining[:, detection] = 0.0, 0.0
    return pairs


def _find_hidden(expected: np.ndarray, overlaps: np.ndarray) -> np.ndarray:
    """Returns whether a single detection is at a place where two people are expected: bool [N].

    `expected` [L, 4] are boxes of tracks, and `overlaps` [L, N] compare them with the detections.
    """
    crowded = measure_overlaps(expected, expected) > CROWDED_OVERLAP
    near = overlaps > LEAST_OVERLAP
    hidden = np.zeros(overlaps.shape[1], bool)
    for detection, claims in enumerate(near.T):
        together = claims & ((crowded & claims).sum(1) > 1)  # each track overlaps itself
        hidden[detection] = together.sum() > 1 and near[together].any(0).sum() < together.sum()
    return hidden
