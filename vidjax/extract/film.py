"""The faces of one video or photo: found, followed within a shot, aligned and made vectors."""

import heapq
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vidjax import files
from vidjax.extract import align, decode, folder
from vidjax.extract.models import Detector, Embedder, Faces
from vidjax.extract.shots import Cuts
from vidjax.extract.tracks import Track, Tracker


class Nets(NamedTuple):
    """The nets that find faces and make vectors of them."""

    detect: Detector
    embed: Embedder


class Sighting(NamedTuple):
    """A face in a frame: `quality`, then its number among all, which makes the order total."""

    quality: float
    number: int
    frame: int
    detection: float
    box: np.ndarray
    crop: np.ndarray


class Clips:
    """Writes a clip of each track that ends; keeps the best faces of those that have not."""

    def __init__(self, nets: Nets, out: Path, stem: str, most_frames: int):
        self._nets, self._out, self._stem, self._most = nets, out, stem, most_frames
        self._best: dict[int, list[Sighting]] = {}
        self._numbers = itertools.count()
        self._of_shot: dict[int, Iterator[int]] = {}
        self.tracks: list[folder.Track] = []

    def add(self, frame: int, owners: np.ndarray, faces: Faces, rgb: np.ndarray) -> None:
        """Takes the faces of a frame; `owners` [F] are their tracks, -1 for none."""
        chosen = np.flatnonzero(owners >= 0)
        if not len(chosen):
            return
        template = np.array(self._nets.embed.card.template)
        (side, _) = self._nets.embed.card.input.size or (0, 0)
        points = faces.points[chosen]
        crops = align.warp(rgb, align.similarity(points, template), side)
        quality = align.quality(faces.scores[chosen], points, crops)
        for place, face in enumerate(chosen.tolist()):
            seen = Sighting(
                float(quality[place]), next(self._numbers), frame, float(faces.scores[face]),
                faces.boxes[face], crops[place],
            )  # fmt: skip
            best = self._best.setdefault(int(owners[face]), [])
            keep = heapq.heappush if len(best) < self._most else heapq.heappushpop
            keep(best, seen)

    def end(self, track: Track, name: str | None = None) -> None:
        """Writes the clip of a track that has ended, `name` instead of STEM.sNNN.tNN."""
        best = sorted(self._best.pop(track.number), key=lambda seen: (seen.frame, seen.number))
        number = next(self._of_shot.setdefault(track.shot, itertools.count()))
        name = name or f"{self._stem}.s{track.shot:03}.t{number:02}"
        arrays = {
            "face": self._nets.embed(np.stack([seen.crop for seen in best])),
            "face_quality": np.array([seen.quality for seen in best], np.float32),
            "face_detection": np.array([seen.detection for seen in best], np.float32),
            "face_number": np.array([seen.frame for seen in best], np.int32),
            "face_box": np.stack([seen.box for seen in best]).astype(np.float32),
        }
        with files.atomic_file(self._out / f"{name}.npz") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        times = track.times
        self.tracks.append(
            folder.Track(
                clip=name, shot=track.shot, start_s=times[0], end_s=times[-1], seen=len(times)
            )
        )

    def forget(self, live: set[int]) -> None:
        """Drops the faces of tracks that ended too short to be clips."""
        self._best = {number: best for number, best in self._best.items() if number in live}


def extract(
    path: Path, out: Path, stem: str, nets: Nets, settings: folder.Settings, sha256: str
) -> folder.Film:
    """Writes the clips of a video or photo into the folder `out`; returns what was found.

    A photo has a clip for each face. Memory does not grow with the length of the video, but for the
    list of its tracks.
    """
    name = folder.video_name(path, stem)
    with decode.open_video(path) as video:
        if video.info.photo:
            return _photo(video, out, stem, nets, name, sha256)
        clips, cuts, tracker = Clips(nets, out, stem, settings.most_frames), Cuts(), Tracker()
        for number, frame in enumerate(video.frames(settings.fps)):
            if cuts.update(frame.time_s, frame.small) and number:
                tracker.cut()
                _end(tracker, clips)
            if frame.rgb is not None:
                faces = nets.detect(frame.rgb)
                owners = tracker.update(frame.time_s, faces.boxes, faces.scores, faces.points)
                clips.add(number, owners, faces, frame.rgb)
                _end(tracker, clips)
        for track in tracker.finish():
            clips.end(track)
        found = video.found
        shots = [(shot.start_s, shot.end_s) for shot in cuts.shots(found.seconds)]
        return _film(name, sha256, clips, found, shots, photo=False)


def _end(tracker: Tracker, clips: Clips) -> None:
    for track in tracker.take_ended():
        clips.end(track)
    clips.forget(tracker.live)


def _photo(
    video: decode.Video, out: Path, stem: str, nets: Nets, name: str, sha256: str
) -> folder.Film:
    clips, tracker = Clips(nets, out, stem, 1), Tracker(least=1)
    frame = next(video.frames(1.0))
    assert frame.rgb is not None
    faces = nets.detect(frame.rgb)
    owners = tracker.update(0.0, faces.boxes, faces.scores, faces.points)
    clips.add(0, owners, faces, frame.rgb)
    tracks = tracker.finish()
    for place, track in enumerate(tracks):
        clips.end(track, stem if len(tracks) == 1 else f"{stem}.f{place + 1:02}")
    return _film(name, sha256, clips, video.found, [(0.0, 0.0)], photo=True)


def _film(
    name: str,
    sha256: str,
    clips: Clips,
    found: decode.Found,
    shots: list[tuple[float, float]],
    *,
    photo: bool,
) -> folder.Film:
    return folder.Film(
        video=name,
        sha256=sha256,
        photo=photo,
        seconds=found.seconds,
        shots=shots,
        tracks=sorted(clips.tracks, key=lambda track: (track.start_s, track.clip)),
        frames=found.frames,
        corrupt=found.corrupt,
        refused=found.refused,
        repaired=found.repaired,
        damaged=found.damaged,
    )
