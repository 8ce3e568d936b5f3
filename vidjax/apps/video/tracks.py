"""Tracks: detections of one person in frame after frame of one shot.

Boxes are (left, top, right, bottom) in pixels of the upright picture. A sighting lasts until the
next picture that is looked at, or until the shot ends.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from vidjax.apps.video.cards import BackEnd

LEAST_OVERLAP = 0.3  # intersection over union
GAP_SECONDS = 1.0
PLACE_GAIN, SPEED_GAIN = 0.7, 0.35  # of what a detection differs from the expected box
LARGER, LEAST_SHARE, LEAST_SECONDS, MOST_SECONDS = 3.0, 0.3, 1.0, 30.0  # of a shot's main figure
CROWDED = 0.4  # overlap of two tracks of which one may hide the other
HELD_SECONDS = 0.4  # a picture that lasts longer is held: one is enough for a track
# A track is split where the card's densities do not favour one person by ODDS: faces of one shot
# are far more alike than the photos that cards are measured on. Each part lasts PART_SECONDS, since
# dissolves show nobody; but where pictures are held, each may show somebody else.
PART_SECONDS, ODDS = 0.8, 50.0


@dataclasses.dataclass
class Track:
    """Detections of one person: the `number` of the track in the film, and its sightings.

    `times` and `ends` are seconds of their begins and ends; the last one may go on.
    """

    number: int
    shot: int
    times: list[float] = dataclasses.field(default_factory=list)
    ends: list[float] = dataclasses.field(default_factory=list)

    def look(self, time_s: float) -> None:
        """Ends the last sighting, if it goes on: there is another picture, or the shot ends."""
        if len(self.ends) < len(self.times):
            self.ends.append(time_s)

    def cut(self, time_s: float) -> None:
        """Ends the track with its shot; what was seen later, in a dissolve, does not count."""
        self.times = [begin_s for begin_s in self.times if begin_s < time_s]
        self.ends = [min(end_s, time_s) for end_s in self.ends[: len(self.times)]]
        self.look(time_s)

    @property
    def pace_s(self) -> float:
        """Seconds from one of its pictures to the next, at the median."""
        return float(np.median(np.subtract(self.ends, self.times)))

    def split(self, at: list[float]) -> "list[Track]":
        """Returns the parts before, between and after some times, each with a sighting or more."""
        places = [0, *np.searchsorted(self.times, at).tolist(), len(self.times)]
        return [
            Track(self.number, self.shot, self.times[low:high], self.ends[low:high])
            for low, high in itertools.pairwise(places)
        ]


class _Motion:
    """Where a live track is expected: a filter of its sides, which move at a constant speed.

    Source: the alpha-beta filter, as in Bar-Shalom et al. 2001, "Estimation with Applications to
    Tracking and Navigation", section 6.5, with fixed gains.
    """

    def __init__(self, track: Track, time_s: float, box: np.ndarray):
        self.track, self.last = track, box
        self.time_s, self._box = time_s, box
        self._speed: np.ndarray | None = None  # pixels a second of each side

    def box(self, time_s: float) -> np.ndarray:
        """Returns the box [4] that is expected at a time."""
        if self._speed is None:
            return self._box
        return self._box + (time_s - self.time_s) * self._speed

    def add(self, time_s: float, box: np.ndarray) -> None:
        """Learns from a detection."""
        self.last = box
        expected, step = self.box(time_s), max(time_s - self.time_s, 1e-3)
        if self._speed is None:
            self._speed, self._box = (box - self._box) / step, box
        else:
            self._speed = self._speed + SPEED_GAIN * (box - expected) / step
            self._box = expected + PLACE_GAIN * (box - expected)
        self.time_s = time_s


class Tracker:
    """Joins the detections of a film to tracks, frame by frame, best pair first.

    A pair of a track and a detection needs an overlap above LEAST_OVERLAP with the box where the
    track's motion leads, else with its last box. The motion of a track with one sighting is not
    known: in the next picture both boxes count with twice their sides. While one person hides
    another, their single detection goes to neither: it is lost, but no identity is switched. A
    track ends at a cut, and `gap_s` seconds after its last sighting, see `gap_at`. A track of one
    detection is dropped, unless its picture is held for more than `held_s` seconds.

    Source: Bochinski et al. 2017, "High-speed tracking-by-detection without using image
    information" (greedy overlap); Yang et al. 2023, "Hard to Track Objects with Irregular Motions
    and Similar Appearances?" (larger boxes); the motion, the gap and crossings are ours.
    """

    def __init__(self, gap_s: float = GAP_SECONDS, held_s: float = HELD_SECONDS):
        self._gap, self._held = gap_s, held_s
        self._cut_s: float | None = None  # begin of a shot of which no picture was looked at
        self._live: list[_Motion] = []
        self._ended: list[Track] = []
        self._time_s = 0.0  # of the last picture
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
        self._look(time_s)
        self._time_s = time_s
        self._end_if(lambda motion: time_s - motion.track.ends[-1] > self._gap)
        begin_s, self._cut_s = time_s if self._cut_s is None else self._cut_s, None
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
                motion.track.times.append(begin_s)
                numbers[n] = motion.track.number
        return numbers

    def cut(self, time_s: float) -> None:
        """Ends all tracks: the next detections are those of another shot, which began then.

        Whoever came in a dissolve, of which `time_s` is the middle, comes with the next shot.
        """
        came_s = 2 * time_s - self._time_s if time_s < self._time_s else time_s
        for motion in self._live:
            motion.track.cut(time_s)
        self._live = [one for one in self._live if one.track.times and one.track.times[0] < came_s]
        self._end_if(lambda motion: True)
        self._cut_s = time_s
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

    def _look(self, time_s: float) -> None:
        for motion in self._live:
            motion.track.look(time_s)

    def _end_if(self, ends: Callable[[_Motion], bool]) -> None:
        over = [motion for motion in self._live if ends(motion)]
        self._ended += [
            motion.track for motion in over
            if len(motion.track.times) > 1 or motion.track.ends[0] - motion.time_s > self._held
        ]  # fmt: skip
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
        new = np.array([motion.track.ends == [time_s] for motion in live], bool)
        for rest in (
            overlaps(last, boxes),
            overlaps(_doubled(last), _doubled(boxes)) * new[:, None],
        ):
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
        self._track.look(time_s)
        numbers = np.full(len(boxes), -1)
        if len(boxes):
            sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0).astype(np.float64)
            order = np.argsort(-sides.prod(1), kind="stable")
            areas = sides.prod(1)[order]
            if len(boxes) == 1 or areas[0] >= LARGER * areas[1]:
                main = order[0]
                # In the first picture of a shot, the figure is there from the begin of the shot.
                self._track.times.append(self._begin_s if self._frames == 1 else time_s)
                numbers[main] = self._shot
        return numbers

    def cut(self, time_s: float) -> None:
        """Ends the shot at the time of the next one's begin, or of the end of the film."""
        self._track.cut(time_s)
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


def held_at(fps: float) -> float:
    """Returns the seconds from which on a picture is held, where `fps` of a second are wanted."""
    return max(HELD_SECONDS, 1.5 / fps)


def gap_at(rate: float) -> float:
    """Returns how many seconds after its last sighting a track ends.

    `rate` is the number of pictures looked at in a second. One of them may lack the person, so a
    track of slow pictures waits longer than GAP_SECONDS.
    """
    return max(GAP_SECONDS, 2.5 / rate) - 1.0 / rate


def least_cosine(back_end: BackEnd, odds: float) -> float:
    """Returns the cosine at which a pair is `odds` times as likely by `same` as by `different`.

    Both are taken for normal distributions; the cosine lies between their means.
    """
    cosines = np.linspace(back_end.different[0], back_end.same[0], 1001)
    same, different = (
        -0.5 * ((cosines - mean) / deviation) ** 2 - np.log(deviation)
        for mean, deviation in (back_end.same, back_end.different)
    )
    return float(np.interp(np.log(odds), same - different, cosines))


def changes(
    vectors: np.ndarray, times: np.ndarray, held: bool, back_end: BackEnd | None
) -> list[int]:
    """Returns the places in a track from which on it shows somebody else, in order.

    Args:
      vectors: [N, D] of its faces in order of time.
      times: [N], their seconds.
      held: whether its pictures are held, so that each may show somebody else.
      back_end: of the net's card; a track of a net without one is not split.

    A track is split where the mean vectors of the faces before and after are least alike, if their
    cosine is below `least_cosine`. Then both parts are looked at.
    """
    if back_end is None or len(vectors) < 2:
        return []
    least = 1 if held else max(2, round(PART_SECONDS / float(np.median(np.diff(times)))))
    centred = vectors.astype(np.float64) - back_end.centre
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    sums = np.concatenate([0 * centred[:1], (centred / np.maximum(lengths, 1e-9)).cumsum(0)])
    least_alike = least_cosine(back_end, 1.0 if held else ODDS)

    def find(low: int, high: int) -> list[int]:
        places = np.arange(low + 1, high)
        cosines = np.array(
            [min(alike(low, at, high, n) for n in (least, 4 * least)) for at in places.tolist()]
        )
        around = np.pad(cosines, 1, constant_values=1.0)
        # Where a place nearer to an end is less alike, the part is too short, as of a dissolve.
        lowest = (cosines <= around[:-2]) & (cosines <= around[2:]) & (cosines < least_alike)
        lowest &= (places >= low + least) & (places <= high - least)
        if not lowest.any():
            return []
        at = int(places[np.where(lowest, cosines, 1.0).argmin()])
        return [*find(low, at), at, *find(at, high)]

    def alike(low: int, at: int, high: int, count: int) -> float:
        before = sums[at] - sums[max(low, at - count)]
        after = sums[min(high, at + count)] - sums[at]
        return float(before @ after / max(np.linalg.norm(before) * np.linalg.norm(after), 1e-9))

    return find(0, len(vectors))


def overlaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of boxes [L, 4] and [N, 4]: [L, N], 0 to 1."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.maximum(high - low, 0.0).prod(-1)
    areas = [np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0).prod(-1) for boxes in (one, other)]
    return shared / np.maximum(areas[0][:, None] + areas[1] - shared, 1e-9)


def _doubled(boxes: np.ndarray) -> np.ndarray:
    """Returns boxes [N, 4] with the same middle and sides of twice the length."""
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    return boxes + np.concatenate([-half, half], 1)


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
