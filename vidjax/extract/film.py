"""The people of one video or photo: found, followed within a shot, cut out and made vectors.

A voice goes with the one face that is seen alone meanwhile. It may be of somebody off screen. In a
shot with one main figure that is this figure's, and so it has no voice while others are seen, too.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vidjax import files
from vidjax.extract import align, decode, figures, folder
from vidjax.extract.figures import Figures, Nets
from vidjax.extract.models import Embedder
from vidjax.extract.shots import Cuts
from vidjax.extract.tracks import MainFigures, Track, Tracker, gap_at
from vidjax.extract.voices import RATE, Voice, alone, listen


class Sighting(NamedTuple):
    """A person in a frame: `quality`, then a number of its own, which makes the order total.

    `quality` is that of the face, and below 0 without one. `boxes` and `crops` are by part.
    """

    quality: float
    number: int
    frame: int
    detection: float
    boxes: dict[str, np.ndarray]
    crops: dict[str, np.ndarray]


class Clips:
    """Writes a clip of each track that ends; keeps the best pictures of those that have not."""

    def __init__(self, nets: Nets, out: Path, stem: str, settings: folder.Settings):
        self._nets, self._out, self._stem, self._settings = nets, out, stem, settings
        self._best: dict[int, list[Sighting]] = {}
        self._numbers = itertools.count()
        self._of_shot: dict[int, Iterator[int]] = {}
        self.tracks: list[folder.Track] = []

    def add(self, frame: int, owners: np.ndarray, found: Figures, rgb: np.ndarray) -> None:
        """Takes the people in a frame; `owners` [N] are their tracks, -1 for none."""
        chosen = np.flatnonzero(owners >= 0)
        if not len(chosen):
            return
        found = found.of(chosen)
        crops = {part: figures.crops(self._nets, part, found, rgb) for part in self._nets.embed}
        quality = found.scores - 1.0
        faces = {place: crop for place, crop in enumerate(crops["face"]) if crop is not None}
        if faces:
            at, cut = [*faces], np.stack([*faces.values()])
            quality[at] = align.quality(found.scores[at], found.points[at], cut)
        for place, track in enumerate(owners[chosen].tolist()):
            own = {part: crop for part, each in crops.items() if (crop := each[place]) is not None}
            seen = Sighting(
                float(quality[place]), next(self._numbers), frame, float(found.scores[place]),
                {part: found.parts[part][place] for part in own}, own,
            )  # fmt: skip
            best = self._best.setdefault(track, [])
            full = len(best) >= self._settings.most_frames
            (heapq.heappushpop if full else heapq.heappush)(best, seen)

    def end(self, track: Track, name: str | None = None) -> None:
        """Writes the clip of a track that has ended, `name` instead of STEM.sNNN.tNN."""
        best = sorted(self._best.pop(track.number), key=lambda seen: (seen.frame, seen.number))
        number = next(self._of_shot.setdefault(track.shot, itertools.count()))
        of_track = "" if self._settings.unit == "shot" else f".t{number:02}"
        name = name or f"{self.of_shot(track.shot)}{of_track}"
        arrays: dict[str, np.ndarray] = {}
        for part, embed in self._nets.embed.items():
            seen = [one for one in best if part in one.crops]
            # Without a face a clip tells so: a gallery of faces refuses clips of other modalities.
            arrays |= _arrays(part, seen, embed) if seen else {part: embed.nothing}
        self._write(name, arrays)
        faces = [seen for seen in best if "face" in seen.crops]
        if faces and (thumbnails := self._out / folder.THUMBNAILS).is_dir():
            crop = max(faces, key=lambda seen: (seen.quality, seen.number)).crops["face"]
            files.write_bytes(thumbnails / f"{name}.png", align.thumbnail(crop), sync=False)
        times = track.times
        self.tracks.append(
            folder.Track(
                clip=name, shot=track.shot, start_s=times[0], end_s=times[-1], seen=len(times)
            )
        )

    def of_shot(self, shot: int) -> str:
        """Returns the name of the clip of a whole shot."""
        return f"{self._stem}.s{shot:03}"

    def _write(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        with files.atomic_file(self._out / f"{name}.npz") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]

    def hear(self, sound: Iterable[tuple[float, np.ndarray]], seen: Sequence[folder.Track]) -> int:
        """Adds voices to the clips whose person is seen alone; returns the number of these clips.

        The best windows of a clip are kept; `audio_number` is the millisecond of their begin.
        `seen` are all people who are seen, with the clips that their voices go with.
        """
        assert self._nets.listen
        clips = {track.clip for track in self.tracks}
        heard: dict[str, list[Voice]] = {}
        for span, samples in listen(sound, (span for span in alone(seen) if span.clip in clips)):
            voice = self._nets.listen(samples)
            if len(voice.begin):
                voice = voice._replace(begin=span.start_s + voice.begin / RATE)
                heard.setdefault(span.clip, []).append(voice)
        for clip, voices in heard.items():
            self._add_voice(clip, Voice(*map(np.concatenate, zip(*voices, strict=True))))
        return len(heard)

    def _add_voice(self, clip: str, voice: Voice) -> None:
        """Adds windows of speech to a clip; `voice.begin` [n] are seconds of the film."""
        with np.load(self._out / f"{clip}.npz") as file:
            arrays = dict(file)
        order = np.argsort(-voice.quality, kind="stable")
        begin, vectors, quality = (x[np.sort(order[: self._settings.most_frames])] for x in voice)
        number = np.minimum(begin * 1000, np.iinfo(np.int32).max).astype(np.int32)
        new = {"audio": vectors, "audio_quality": quality, "audio_number": number}
        self._write(clip, arrays | new)

    def forget(self, live: set[int]) -> None:
        """Drops the people of tracks that ended too short to be clips."""
        self._best = {number: best for number, best in self._best.items() if number in live}


class Everybody:
    """Follows all who are seen in shots, each of which has a clip of its main figure alone."""

    def __init__(self, clips: Clips, gap_s: float):
        self.tracker, self._clips = Tracker(gap_s=gap_s), clips
        self._tracks: list[folder.Track] = []

    def update(self, time_s: float, people: Figures) -> None:
        """Takes the people of the next frame."""
        self.tracker.update(time_s, people.boxes)
        self._keep(self.tracker.take_ended())

    def finish(self, time_s: float) -> list[folder.Track]:
        """Returns when each of them is seen, with the clip of the shot."""
        self._keep(self.tracker.finish(time_s))
        return self._tracks

    def _keep(self, ended: Iterable[Track]) -> None:
        self._tracks += [
            folder.Track(
                clip=self._clips.of_shot(track.shot), shot=track.shot, start_s=track.times[0],
                end_s=track.times[-1], seen=len(track.times),
            )
            for track in ended
        ]  # fmt: skip


def extract(
    path: Path, out: Path, stem: str, nets: Nets, settings: folder.Settings, sha256: str
) -> folder.Film:
    """Writes the clips of a video or photo into the folder `out`; returns what was found.

    A photo has a clip for each face, and no voice. If `out` has a folder for thumbnails, these are
    written, too. Memory does not grow with the length of the video, but for the list of its tracks.
    """
    name = folder.video_name(path, stem)
    with decode.open_video(path) as video:
        if video.info.photo:
            return _photo(video, out, stem, nets, settings, name, sha256)
        clips, cuts = Clips(nets, out, stem, settings), Cuts()
        gap_s = gap_at(min(settings.fps, video.info.rate))
        tracker = MainFigures() if settings.unit == "shot" else Tracker(gap_s=gap_s)
        everybody = Everybody(clips, gap_s)  # whom a clip of a shot may leave out
        for number, frame in enumerate(video.frames(settings.fps)):
            if cuts.update(frame.time_s, frame.small) and number:
                tracker.cut(frame.time_s)
                everybody.tracker.cut(frame.time_s)
                _end(tracker, clips)
            if frame.rgb is not None:
                people = figures.find(nets, frame.rgb)
                owners = tracker.update(frame.time_s, people.boxes)
                clips.add(number, owners, people, frame.rgb)
                _end(tracker, clips)
                if settings.unit == "shot":
                    everybody.update(frame.time_s, people)
        found = video.found
        for track in tracker.finish(found.seconds):
            clips.end(track)
        shots = [(shot.start_s, shot.end_s) for shot in cuts.shots(found.seconds)]
    voices = lost_sound = 0
    if nets.listen and video.info.sound:
        seen = everybody.finish(found.seconds) if settings.unit == "shot" else [*clips.tracks]
        with decode.open_video(path) as video:
            voices = clips.hear(video.sound(RATE), seen)
            lost = video.found
            lost_sound = lost.corrupt + lost.refused + lost.damaged
    film = _film(name, sha256, clips, found, shots, photo=False)
    film.voices, film.lost_sound = voices, lost_sound
    return film


def _arrays(part: str, seen: list[Sighting], embed: Embedder) -> dict[str, np.ndarray]:
    """Returns the arrays of a clip for one part, in the order of frames."""
    arrays = {
        part: embed(np.stack([one.crops[part] for one in seen])),
        f"{part}_number": np.array([one.frame for one in seen], np.int32),
    }
    if part != "scene":
        arrays[f"{part}_detection"] = np.array([one.detection for one in seen], np.float32)
        arrays[f"{part}_box"] = np.stack([one.boxes[part] for one in seen]).astype(np.float32)
    if part == "face":
        arrays["face_quality"] = np.array([one.quality for one in seen], np.float32)
    return arrays


def _end(tracker: Tracker | MainFigures, clips: Clips) -> None:
    for track in tracker.take_ended():
        clips.end(track)
    clips.forget(tracker.live)


def _photo(
    video: decode.Video, out: Path, stem: str, nets: Nets, settings: folder.Settings, name: str,
    sha256: str,
) -> folder.Film:  # fmt: skip
    clips, tracker = Clips(nets, out, stem, settings), Tracker(least=1)
    frame = next(video.frames(1.0))
    assert frame.rgb is not None
    people = figures.find(nets, frame.rgb)
    people = people.of(~np.isnan(people.parts["face"][:, 0]))
    owners = tracker.update(0.0, people.boxes)
    clips.add(0, owners, people, frame.rgb)
    tracks = tracker.finish(0.0)
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
