"""Finds the faces that the log `said.jsonl` describes in films and photos.

A face is found again by its film, time and box. So it does not matter which nets have found the
faces, and which names the clips have.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vidjax.apps.video.align import turn_box
from vidjax.apps.video.media import Face, FaceTrack, MediaFile
from vidjax.apps.video.tracks import measure_overlaps
from vidjax.utils.groups import group_by_key

LEAST_OVERLAP = 0.1  # intersection over union of the boxes of a face by two nets
LEAST_SHARE = 0.5  # of the shorter track, for which both tracks last
NEAR_SECONDS = 1.0  # within this time, a face hardly moves


class FacePath(NamedTuple):
    """The boxes of a face at several times of a film, or the only box in a photo."""

    start_s: float
    end_s: float
    times: np.ndarray  # [N] seconds, increasing
    boxes: np.ndarray  # [N, 4]: left, top, right, bottom

    @classmethod
    def of_track(cls, track: FaceTrack) -> "FacePath":
        """Returns the times and boxes of the face in a track: one person in one shot of a film."""
        places = track.places
        if not places and track.box:
            places = [(track.start_s if track.box_at_s is None else track.box_at_s, track.box)]
        times, boxes = zip(*places, strict=True) if places else ((), ())
        array = np.array(boxes, float).reshape(len(times), 4)
        return cls(track.start_s, track.end_s, np.array(times, float), array)

    @classmethod
    def of_face(cls, face: Face, turn: int) -> "FacePath":
        """Returns the times and boxes of a face of the log, in pictures turned by `turn`.

        If only the orientation of a film was changed, the boxes turn with the pictures.
        """
        places = face.places or ((face.at, face.box),)
        times, areas = zip(*places, strict=True)
        boxes = np.array([turn_box(area, face.turn, turn) for area in areas], float)
        boxes[:, 2:] += boxes[:, :2]
        return cls(times[0], times[-1], np.array(times, float), boxes)


def match(faces: Iterable[Face], films: Iterable[MediaFile]) -> dict[Face, list[list[str]]]:
    """Finds the clips in `films` that show `faces`.

    Returns face -> for each file that shows the film or photo of the face, the names of the clips,
    the best first. A photo may have two files, as a photo of a person and as a photo in the tables.
    A face that no clip shows is left out. The clips in a file do not overlap in time.
    """
    asked = group_by_key((face.film, face) for face in dict.fromkeys(faces))
    found: dict[Face, list[list[str]]] = {}
    for film in films:
        present = {face: [clip] for clip, face in film.faces.items()}
        wanted = asked.get(film.sha256, ())
        others = [face for face in wanted if face not in present]
        others = match_paths(others, film.tracks, film.orientation) if others else {}
        for face in wanted:
            if clips := present.get(face) or others.get(face):
                found.setdefault(face, []).append(clips)
    return found


def match_paths(
    faces: Sequence[Face], tracks: Sequence[FaceTrack], turn: int
) -> dict[Face, list[str]]:
    """Compares times and boxes of faces and tracks; returns face -> clips of the face's tracks.

    `turn` is the orientation of the pictures of the tracks.
    """
    path_of = {face: FacePath.of_face(face, turn) for face in faces}
    paths = [FacePath.of_track(track) for track in tracks]
    pairs = [
        (measure_overlap(path_of[face], path), face, number)
        for face in faces for number, path in enumerate(paths)
        if path.start_s <= path_of[face].end_s and path_of[face].start_s <= path.end_s
    ]  # fmt: skip
    pairs = sorted((x for x in pairs if x[0]), key=lambda x: (-x[0], x[2]))
    owner, chosen = dict[int, Face](), dict[Face, list[int]]()

    def choose(face: Face, number: int) -> None:
        first = owner.setdefault(number, face)  # faces that overlap may have the same track
        if first == face or measure_overlap(path_of[face], path_of[first]):
            chosen.setdefault(face, []).append(number)

    for _, face, number in pairs:
        if face not in chosen:
            choose(face, number)
    for _, face, number in pairs:  # parts of a divided track are at different times
        known = [paths[x] for x in chosen.get(face, ())]
        path = paths[number]
        if known and all(x.end_s < path.start_s or path.end_s < x.start_s for x in known):
            choose(face, number)
    return {face: [tracks[x].clip for x in numbers] for face, numbers in chosen.items()}


def find_first(faces: Iterable[Face]) -> dict[Face, Face]:
    """Finds faces that are one face at one place of a film; returns face -> first such face.

    Two nets may describe a face differently, so the log may contain several descriptions.
    """
    first, paths = dict[Face, Face](), dict[str, list[tuple[Face, FacePath]]]()
    for face in dict.fromkeys(faces):
        path, known = FacePath.of_face(face, 1), paths.setdefault(face.film, [])
        same = (old for old, other in known if measure_overlap(other, path))
        first[face] = next(same, face)
        if first[face] is face:
            known.append((face, path))
    return first


def measure_overlap(old: FacePath, new: FacePath) -> float:
    """Returns how long and how closely two paths overlap, or 0 if they overlap too little.

    The result is the common time in seconds, multiplied by the mean intersection over union of the
    boxes.
    """
    seconds = min(old.end_s, new.end_s) - max(old.start_s, new.start_s)
    if seconds < LEAST_SHARE * min(old.end_s - old.start_s, new.end_s - new.start_s):
        return 0.0
    times, known = old.times, new.times
    if not len(times) or not len(known):
        return 0.0
    near = np.abs(times - times.clip(known[0], known[-1])) <= NEAR_SECONDS
    sides = [np.interp(times[near], known, side) for side in new.boxes.T]
    overlaps = measure_overlaps(old.boxes[near], np.stack(sides, axis=1)).diagonal()
    mean = float(overlaps.mean()) if near.any() else 0.0
    return (seconds + 1e-3) * mean * (mean >= LEAST_OVERLAP)  # photos have no duration
