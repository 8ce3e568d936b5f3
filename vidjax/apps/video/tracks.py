"""Joins the detections of a person in the frames of a shot into a track.

Boxes are (left, top, right, bottom) in pixels of the upright picture. A track has a sighting for
each detection: the time from the detection to the next frame, or to the end of the shot.
"""

import dataclasses
import itertools

import numpy as np

from vidjax.apps.cards import BackEnd

LEAST_OVERLAP = 0.3  # two boxes with a larger intersection over union may show the same person
GAP_SECONDS = 1.0  # a track ends if the person is not detected for this time
PLACE_GAIN, SPEED_GAIN = 0.7, 0.35  # gains of the alpha-beta filter
# The main person of a frame has at least MAIN_FIGURE_RATIO times the area of any other person. A
# shot has a main person if more than LEAST_SHARE of its frames have a main person.
MAIN_FIGURE_RATIO, LEAST_SHARE = 3.0, 0.3
LEAST_SECONDS, MOST_SECONDS = 1.0, 30.0  # the duration of a shot with a main person
CROWDED_OVERLAP = 0.4  # if the boxes of two tracks overlap more, one person may hide the other
HELD_SECONDS = 0.4  # a sighting that lasts longer is a track, even without other sightings
# A track is split where the odds for the same person are below SAME_ODDS. These odds are high,
# because the faces in a shot are much more alike than the photos with which nets were measured.
# Each part lasts at least PART_SECONDS, because the faces in dissolves are unusable. The parts of a
# slide show may be shorter, because each picture may show another person.
PART_SECONDS, SAME_ODDS = 0.8, 50.0


@dataclasses.dataclass
class Track:
    """The sightings of a person in a shot. A sighting is a detection in a frame."""

    number: int
    shot: int
    # The starts and ends of the sightings in seconds. The last end may be missing.
    times: list[float] = dataclasses.field(default_factory=list)
    ends: list[float] = dataclasses.field(default_factory=list)

    def end_sighting(self, time_s: float) -> None:
        """Ends the last sighting at `time_s`, if it has not ended yet."""
        if len(self.ends) < len(self.times):
            self.ends.append(time_s)

    def cut(self, time_s: float) -> None:
        """Ends the track at `time_s`, where its shot ends. Removes later sightings."""
        self.times = [begin_s for begin_s in self.times if begin_s < time_s]
        self.ends = [min(end_s, time_s) for end_s in self.ends[: len(self.times)]]
        self.end_sighting(time_s)

    def split(self, at: list[float]) -> "list[Track]":
        """Splits the track at the times `at`, in seconds; returns the parts.

        Each part must contain a detection.
        """
        places = [0, *np.searchsorted(self.times, at).tolist(), len(self.times)]
        return [
            Track(self.number, self.shot, self.times[low:high], self.ends[low:high])
            for low, high in itertools.pairwise(places)
        ]


class _Motion:
    """Predicts the next box of a track: each side of the box moves at a constant speed.

    `last` [4] is the last detected box, at `time_s` seconds.

    Source: the alpha-beta filter with fixed gains, Bar-Shalom et al. 2001, "Estimation with
    Applications to Tracking and Navigation", section 6.5.
    """

    def __init__(self, track: Track, time_s: float, box: np.ndarray):
        self.track, self.last = track, box
        self.time_s, self._box = time_s, box
        self._speed: np.ndarray | None = None  # pixels a second of each side

    def predict(self, time_s: float) -> np.ndarray:
        """Returns the predicted box, float [4], at `time_s` seconds."""
        if self._speed is None:
            return self._box
        return self._box + (time_s - self.time_s) * self._speed

    def add(self, time_s: float, box: np.ndarray) -> None:
        """Adds a detection, `box` [4] at `time_s` seconds, and corrects the predicted motion."""
        self.last = box
        expected, step = self.predict(time_s), max(time_s - self.time_s, 1e-3)
        if self._speed is None:
            self._speed, self._box = (box - self._box) / step, box
        else:
            self._speed = self._speed + SPEED_GAIN * (box - expected) / step
            self._box = expected + PLACE_GAIN * (box - expected)
        self.time_s = time_s


class Tracker:
    """Joins the detections of a film into tracks, frame by frame.

    A detection is assigned to the track with the most similar box. The detection is compared first
    with the predicted box of each track, and then with the last detected box. If a track began in
    the previous frame, its box and the detection are doubled in size and compared again. If one
    person may hide another, the detection is dropped, because a lost detection is better than a
    switched identity.

    Source: Bochinski et al. 2017, "High-speed tracking-by-detection without using image
    information", assigns detections by their overlap. Yang et al. 2023, "Hard to Track Objects with
    Irregular Motions and Similar Appearances?", enlarges boxes. We added predicted boxes, gaps in
    tracks, and the rule for hidden people.
    """

    def __init__(self, gap_s: float = GAP_SECONDS, held_s: float = HELD_SECONDS):
        """Makes a tracker. A track ends after `gap_s` seconds without a detection, or at a cut.

        A track with one detection is kept only if its frame is visible for more than `held_s`
        seconds, as in a slide show.
        """
        self._gap, self._held = gap_s, held_s
        self._cut_s: float | None = None  # the start of a shot, until its first frame is added
        self._live: list[_Motion] = []
        self._ended: list[Track] = []
        self._time_s = 0.0  # the time of the last frame
        self._shot = 0
        self._tracks = 0

    def update(self, time_s: float, boxes: np.ndarray) -> np.ndarray:
        """Adds the detections `boxes` [N, 4] of the next frame, at `time_s` seconds.

        Returns int [N], the number of the track of each detection. -1 marks a dropped detection:
        tracks overlap there, and one person may hide another.
        """
        for motion in self._live:
            motion.track.end_sighting(time_s)
        self._time_s = time_s
        self._end([x for x in self._live if time_s - x.track.ends[-1] > self._gap])
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

    def cut(self, time_s: float, next_s: float | None = None) -> None:
        """Ends all tracks at `time_s`, where a shot ends. The next frame belongs to a new shot.

        If the film has a gap there, the new shot starts after the gap, at `next_s`. In a dissolve,
        `time_s` is the middle. Tracks that began during the dissolve are dropped.
        """
        # The people in tracks that began later belong to the next shot.
        last_s = 2 * time_s - self._time_s if time_s < self._time_s else time_s
        for motion in self._live:
            motion.track.cut(time_s)
        self._live = [x for x in self._live if x.track.times and x.track.times[0] < last_s]
        self._end(self._live)
        self._cut_s = time_s if next_s is None else next_s
        self._shot += 1

    @property
    def live(self) -> set[int]:
        """The numbers of the tracks that have not ended. Some of them may still be dropped."""
        return {motion.track.number for motion in self._live}

    def take_ended(self) -> list[Track]:
        """Returns the tracks that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _end(self, over: list[_Motion]) -> None:
        self._ended += [
            motion.track for motion in over
            if len(motion.track.times) > 1 or motion.track.ends[0] - motion.time_s > self._held
        ]  # fmt: skip
        self._live = [motion for motion in self._live if motion not in over]

    def _match(self, time_s: float, boxes: np.ndarray) -> tuple[dict[int, _Motion], set[int]]:
        """Assigns the detections `boxes` [N, 4] at `time_s` seconds to tracks.

        Returns a dict and a set. The dict is index of a detection -> motion of its track. The set
        has the indices of detections to drop. A detection that begins a new track is in neither.
        """
        live = self._live
        expected = np.array([motion.predict(time_s) for motion in live]).reshape(-1, 4)
        last = np.array([motion.last for motion in live]).reshape(-1, 4)
        ahead = measure_overlaps(expected, boxes)
        seen_twice = np.array([len(motion.track.times) > 1 for motion in live], bool)
        hidden = _find_hidden(expected[seen_twice], ahead[seen_twice])
        pairs = pair_greedily(np.where(hidden, 0.0, ahead))
        new = np.array([motion.track.ends == [time_s] for motion in live], bool)
        doubled = measure_overlaps(_double_boxes(last), _double_boxes(boxes))
        for rest in (measure_overlaps(last, boxes), doubled * new[:, None]):
            rest[list(pairs.values())] = 0.0
            rest[:, [*pairs, *np.flatnonzero(hidden)]] = 0.0
            pairs |= pair_greedily(rest)
        return {n: live[m] for n, m in pairs.items()}, set(np.flatnonzero(hidden).tolist())


class MainFigures:
    """Makes a track of the main person in each shot.

    The main person in a frame has a box with at least three times the area of any other box. Shots
    get a track if they last 1 to 30 seconds, and more than 30 % of their frames show a main person.

    Source: iQIYI-VID paper, sections 3.1 and 3.2, where the boxes are heads. The paper writes
    "larger" without a measure. We compare areas.
    """

    def __init__(self) -> None:
        self._frames, self._begin_s = 0, 0.0  # of the current shot
        self._track = Track(0, 0)
        self._ended: list[Track] = []

    def update(self, time_s: float, boxes: np.ndarray) -> np.ndarray:
        """Adds the boxes [N, 4] of the people in the next frame, at `time_s` seconds.

        Returns int [N]: the number of the shot for the main person, and -1 for all other people.
        """
        self._frames += 1
        self._track.end_sighting(time_s)
        numbers = np.full(len(boxes), -1)
        if len(boxes):
            areas = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0).astype(np.float64).prod(1)
            main = int(areas.argmax())
            if areas[main] >= MAIN_FIGURE_RATIO * np.delete(areas, main).max(initial=0.0):
                # A person in the first searched frame of a shot is visible from its start.
                self._track.times.append(self._begin_s if self._frames == 1 else time_s)
                numbers[main] = self._track.number
        return numbers

    def cut(self, time_s: float, next_s: float | None = None) -> None:
        """Ends the shot at `time_s`. The next shot starts at `next_s`, by default at `time_s`."""
        self._track.cut(time_s)
        valid = len(self._track.times) > LEAST_SHARE * self._frames
        # The tolerance is for rounding errors of times.
        if valid and LEAST_SECONDS - 1e-6 <= time_s - self._begin_s <= MOST_SECONDS + 1e-6:
            self._ended.append(self._track)
        shot = self._track.shot + 1
        self._frames, self._begin_s = 0, time_s if next_s is None else next_s
        self._track = Track(shot, shot)

    @property
    def live(self) -> set[int]:
        """The numbers of the tracks that have not ended: only the number of the current shot."""
        return {self._track.number}

    def take_ended(self) -> list[Track]:
        """Returns the tracks of main people in the shots that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended


def choose_held_seconds(fps: float) -> float:
    """Returns how many seconds a picture must be visible to count as part of a slide show.

    `fps` is the number of frames per second that are searched.
    """
    return max(HELD_SECONDS, 1.5 / fps)


def choose_gap_seconds(rate: float) -> float:
    """Returns how many seconds a person may be out of sight before the track of the person ends.

    `rate` is the number of searched frames per second. The result is at least the time of 1.5
    frames, because the detector may miss a person in one frame.
    """
    return max(GAP_SECONDS, 2.5 / rate) - 1.0 / rate


def find_least_cosine(back_end: BackEnd, odds: float) -> float:
    """Returns the cosine of two faces at which one person is `odds` times as likely as two people.

    `back_end` has the mean and the deviation of the cosine of two embeddings, for faces of one
    person and for faces of two people. Both distributions are assumed to be normal. The result lies
    between the two means.
    """
    cosines = np.linspace(back_end.different[0], back_end.same[0], 1001)
    same, different = (
        -0.5 * ((cosines - mean) / deviation) ** 2 - np.log(deviation)
        for mean, deviation in (back_end.same, back_end.different)
    )
    return float(np.interp(np.log(odds), same - different, cosines))


def may_change(vectors: np.ndarray, back_end: BackEnd | None) -> bool:
    """Returns whether a track may show several people in turn: its faces differ much.

    `vectors` [N, D] are the embeddings of some faces of the track, in order of time. `back_end` is
    as in `find_changes`.
    """
    if back_end is None:
        return False
    unit = _centre(vectors, back_end)
    return bool(((unit[1:] * unit[:-1]).sum(1) < back_end.same[0]).any())


def _centre(vectors: np.ndarray, back_end: BackEnd) -> np.ndarray:
    """Subtracts the centre of a net's vectors from `vectors` [N, D], and scales to length 1."""
    centred = vectors.astype(np.float64) - back_end.centre
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)


def find_changes(
    vectors: np.ndarray, times: np.ndarray, held: bool, back_end: BackEnd | None
) -> list[int]:
    """Returns the sorted indices at which the faces of a track change to another person.

    At each index, the mean embedding of the few faces before is compared with the mean embedding of
    the few faces after. The track is split at the index with the lowest cosine, if this cosine is
    too low for one person. Both parts are then split in the same way.

    Args:
      vectors: [N, D], the embeddings of the faces, in order of time.
      times: [N], the time of each face in seconds.
      held: whether the track is part of a slide show. Each picture may then show another person.
      back_end: the distributions of cosines. If it is None, the track is not split.
    """
    if back_end is None or len(vectors) < 2:
        return []
    least = 1 if held else max(2, round(PART_SECONDS / float(np.median(np.diff(times)))))
    unit = _centre(vectors, back_end)
    sums = np.concatenate([0 * unit[:1], unit.cumsum(0)])
    least_alike = find_least_cosine(back_end, 1.0 if held else SAME_ODDS)

    def find(low: int, high: int) -> list[int]:
        places = np.arange(low + 1, high)
        cosines = np.array(
            [min(compare(low, at, high, n) for n in (least, 4 * least)) for at in places.tolist()]
        )
        around = np.pad(cosines, 1, constant_values=1.0)
        # A minimum near an end is skipped, because it may be part of a dissolve.
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
    """Returns the intersection over union, [L, N], of boxes `first` [L, 4] and `second` [N, 4]."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = _multiply_sides(high - low)
    areas = [_multiply_sides(boxes[:, 2:] - boxes[:, :2]) for boxes in (first, second)]
    return shared / np.maximum(areas[0][:, None] + areas[1] - shared, 1e-9)


def _multiply_sides(sides: np.ndarray) -> np.ndarray:
    sides = np.maximum(sides, 0.0)
    return sides[..., 0] * sides[..., 1]  # for few boxes, `prod` takes longer


def _double_boxes(boxes: np.ndarray) -> np.ndarray:
    """Doubles the sides of boxes [N, 4] around their centres."""
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    return boxes + np.concatenate([-half, half], 1)


def pair_greedily(overlaps: np.ndarray, least: float = LEAST_OVERLAP) -> dict[int, int]:
    """Pairs L boxes with N other boxes by their overlaps [L, N]; returns column -> row.

    The pair with the largest overlap is chosen first. No box is in two pairs. The overlap of each
    pair is above `least`. `least` must be 0 or more.
    """
    remaining = overlaps.copy()
    pairs: dict[int, int] = {}
    while remaining.size and remaining.max() > least:
        row, column = np.unravel_index(remaining.argmax(), remaining.shape)
        pairs[int(column)] = int(row)
        remaining[row], remaining[:, column] = 0.0, 0.0
    return pairs


def _find_hidden(expected: np.ndarray, overlaps: np.ndarray) -> np.ndarray:
    """Returns bool [N], True for a detection where one person may hide another.

    `expected` [L, 4] are the predicted boxes of L tracks. `overlaps` [L, N] are their overlaps with
    the detections. For example, two tracks overlap, but only one detection overlaps the tracks.
    """
    crowded = measure_overlaps(expected, expected) > CROWDED_OVERLAP
    near = overlaps > LEAST_OVERLAP
    hidden = np.zeros(overlaps.shape[1], bool)
    for detection, claims in enumerate(near.T):
        together = claims & ((crowded & claims).sum(1) > 1)  # each track overlaps itself
        hidden[detection] = together.sum() > 1 and near[together].any(0).sum() < together.sum()
    return hidden
