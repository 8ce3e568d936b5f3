"""The people of one video or photo: found, followed within a shot, cut out and made vectors.

The module runs in a child process with limits, see `work`: FFmpeg is large, and the file is of
unknown origin.

A voice goes with the one face that is seen alone meanwhile. It may be of somebody off screen. With
`--unit=shot` a clip has the voice that is heard while its main figure is the only face.

A head or body is what a detector of its role finds around the face. Without one it is a box around
the face, the card's `around`: left, top, right and bottom in sides of the face, whose box is
0, 0, 1, 1. Boxes are in pixels of the picture.
"""

import functools
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from vidjax.apps.video import align, cards, decode, features_folder, regions
from vidjax.apps.video.nets import Detector, Embedder, resize
from vidjax.apps.video.shots import Cuts
from vidjax.apps.video.tracks import MainFigures, Track, Tracker, changes, gap_at, held_at
from vidjax.apps.video.voices import RATE, Listener, Voice, alone, listen
from vidjax.data import processes
from vidjax.data.clip_files import write_npz
from vidjax.utils import files
from vidjax.utils.errors import UserError

MOST_FRAMES = 32  # of a clip, spread over its time; of its voice, the best ones
MOST_KEPT, KEPT_SECONDS = 96, 0.2  # of a track: the best picture of each span of time


class Nets(NamedTuple):
    """Part -> the net that finds it, part -> the net that makes vectors of it; `listen` hears."""

    detect: dict[str, Detector]
    embed: dict[str, Embedder]
    listen: Listener | None = None


class Figures(NamedTuple):
    """The people in a picture; boxes and points of what is not found are NaN.

    boxes: [N, 4] of heads that a net finds, or else of faces; scores: [N] of faces, or else of
    heads; points: [N, 5, 2] of faces; parts: part -> boxes [N, 4].
    """

    boxes: np.ndarray
    scores: np.ndarray
    points: np.ndarray
    parts: dict[str, np.ndarray]

    def of(self, index: np.ndarray) -> "Figures":
        """Returns some of them."""
        parts = {part: boxes[index] for part, boxes in self.parts.items()}
        return Figures(self.boxes[index], self.scores[index], self.points[index], parts)


def load_nets(known: Mapping[cards.Role, cards.Card], size: int) -> Nets:
    """Returns the nets of cards; `size` is the longer side that pictures are shrunk to.

    Raises:
      UserError: a head or body can be embedded, and not be found.
    """
    detect = {
        role.removesuffix("_detector"): Detector(card, size)
        for role, card in known.items() if card.decoder in cards.DETECTORS
    }  # fmt: skip
    embed = {part: Embedder(x) for part, x in cards.embedders(known).items() if part != "audio"}
    for part in [one for one in ("head", "body") if one in embed and one not in detect]:
        if embed[part].card.around is None:
            raise UserError(
                f"'{embed[part].card.path}' does not say where a {part} is\n"
                f'give it "around": [LEFT, TOP, RIGHT, BOTTOM] in sides of a face, '
                f"or add a {part}_detector"
            )
    return Nets(detect, embed, Listener(known) if known.keys() >= {*cards.VOICES} else None)


def find(nets: Nets, rgb: np.ndarray) -> Figures:
    """Returns the people in a picture uint8 [H, W, 3]: faces, the best first, then other heads."""
    faces = nets.detect["face"](rgb)
    boxes, scores, points = faces
    parts = {"face": boxes}
    if "head" in nets.detect:
        heads = nets.detect["head"](rgb)
        head = _pair(faces.boxes, heads.boxes)
        more = np.setdiff1d(np.arange(len(heads.boxes)), head)  # heads without a face
        face = np.append(np.arange(len(head)), np.full(len(more), -1))
        head = np.append(head, more)
        parts = {"face": _take(faces.boxes, face), "head": _take(heads.boxes, head)}
        boxes = np.where(head[:, None] < 0, parts["face"], parts["head"])
        scores, points = np.append(scores, heads.scores[more]), _take(points, face)
    for part, net in nets.embed.items():
        if part == "scene":
            parts[part] = np.tile([0.0, 0.0, rgb.shape[1], rgb.shape[0]], (len(boxes), 1))
        elif part == "body" and part in nets.detect:
            bodies = nets.detect[part](rgb).boxes
            parts[part] = _take(bodies, _pair(boxes, bodies))
        elif part not in parts:
            corner, sides = parts["face"][:, :2], parts["face"][:, 2:] - parts["face"][:, :2]
            parts[part] = np.tile(corner, 2) + np.tile(sides, 2) * np.array(net.card.around)
    return Figures(boxes, scores, points, parts)


def crops(card: cards.Card, part: str, figures: Figures, rgb: np.ndarray) -> dict[int, np.ndarray]:
    """Returns figure -> its crop of a part, uint8 [H, W, 3] as the card's net takes it."""
    height, width = card.input.size or (0, 0)
    has = np.flatnonzero(~np.isnan(figures.parts[part][:, 0]))
    if part == "face":
        turns = align.similarity(figures.points[has], np.array(card.template))
        return dict(zip(has.tolist(), align.warp(rgb, turns, height), strict=True))
    if part == "scene":
        return dict.fromkeys(has.tolist(), resize(rgb, height, width))  # one in memory for all
    boxes = figures.parts[part][has]
    edges = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], 1).clip(0).astype(int)
    found = [rgb[top:bottom, left:right] for left, top, right, bottom in edges]
    cut = zip(has.tolist(), found, strict=True)
    return {place: resize(crop, height, width) for place, crop in cut if crop.size}


def _take(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Returns values[index], NaN where the index is -1."""
    return np.append(values, np.full_like(values, np.nan, shape=(1, *values.shape[1:])), 0)[index]


def _pair(small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """Returns for each of the boxes [M, 4] one of [N, 4] that its centre is in; -1 for none.

    The smallest of the large boxes chooses first, the centre nearest to its middle line and top;
    each box is in one pair at most.
    """
    owner = np.full(len(small), -1)
    centres = (small[:, :2] + small[:, 2:]) / 2
    for place in np.argsort((large[:, 2:] - large[:, :2]).prod(1), kind="stable"):
        left, top, right, bottom = large[place]
        inside = (centres >= (left, top)) & (centres <= (right, bottom))
        free = np.flatnonzero((owner < 0) & inside.all(1))
        if len(free):
            distance = np.abs(centres[free] - ((left + right) / 2, top)).sum(1)
            owner[free[distance.argmin()]] = place
    return owner


class Sighting(NamedTuple):
    """A person in a frame: `quality`, then a number that no other has: it makes the order total.

    `quality` is of the face, and below 0 without one. `box` [4] is of the face or else of the head,
    as parts of the picture. `parts` are part -> box and crop.
    """

    quality: float
    number: int
    time_s: float
    frame: int
    detection: float
    box: np.ndarray
    parts: dict[str, tuple[np.ndarray, np.ndarray]]


class Kept:
    """The best picture of each span of a track's time, in order; the spans grow with the track."""

    def __init__(self) -> None:
        self._seconds = KEPT_SECONDS
        self._best: dict[int, Sighting] = {}

    def add(self, seen: Sighting) -> None:
        """Takes a picture later than all before."""
        span = int(seen.time_s / self._seconds + 1e-3)
        self._best[span] = max(seen, self._best.get(span, seen))
        if len(self._best) > MOST_KEPT:
            self._seconds, before, self._best = 2 * self._seconds, self._best, {}
            for one in before.values():
                self.add(one)

    def pictures(self) -> list[Sighting]:
        """Returns the pictures, MOST_KEPT at most."""
        return [*self._best.values()]


class Clips:
    """The clips of all tracks that have ended, and the best pictures of all others.

    Attributes:
      tracks: of the clips, in order of their end.
      arrays: clip -> its arrays, as in an `.npz` of a clip.
    """

    def __init__(self, nets: Nets, thumbnails: Path, held_s: float):
        self._nets, self._thumbnails, self._held = nets, thumbnails, held_s
        self._kept: dict[int, Kept] = {}
        self._numbers = itertools.count()
        self.tracks: list[features_folder.Track] = []
        self.arrays: dict[str, dict[str, np.ndarray]] = {}

    def add(
        self, time_s: float, frame: int, owners: np.ndarray, found: Figures, rgb: np.ndarray
    ) -> None:
        """Takes the people in a frame; `owners` [N] are their tracks, -1 for none."""
        chosen = np.flatnonzero(owners >= 0)
        if not len(chosen):
            return
        found = found.of(chosen)
        nets, faces = self._nets.embed.items(), found.parts["face"]
        boxes = np.where(np.isnan(faces), found.boxes, faces) / np.tile(rgb.shape[1::-1], 2)
        cut_out = {part: crops(net.card, part, found, rgb) for part, net in nets}
        quality = found.scores - 2
        if faces := [*cut_out["face"]]:
            cut = np.stack([*cut_out["face"].values()])
            quality[faces] = align.quality(found.scores[faces], found.points[faces], cut)
        for place, track in enumerate(owners[chosen].tolist()):
            parts = {
                part: (found.parts[part][place], each[place]) for part, each in cut_out.items()
                if place in each
            }  # fmt: skip
            detected = float(quality[place]), next(self._numbers), time_s, frame
            seen = Sighting(*detected, float(found.scores[place]), boxes[place], parts)
            self._kept.setdefault(track, Kept()).add(seen)

    def end(self, track: Track, names: Iterator[str], split: bool = True) -> None:
        """Makes the clip of a track that has ended, or more if it shows more than one person."""
        kept = self._kept.pop(track.number).pictures()
        seen = [one for one in kept if one.time_s < track.ends[-1]] or kept  # not in a dissolve
        embed, faces = self._nets.embed["face"], [one for one in seen if "face" in one.parts]
        vectors = embed(np.array([one.parts["face"][1] for one in faces]))
        times = np.array([one.time_s for one in faces])
        back_end = embed.card.back_end if split else None
        places = changes(vectors, times, track.pace_s > self._held, back_end)
        middles = [float(times[n - 1 : n + 1].mean()) for n in places]
        vector = {one.number: each for one, each in zip(faces, vectors, strict=True)}
        parts = np.searchsorted(middles, [one.time_s for one in seen])
        for number, part in enumerate(track.split(middles)):
            own = [one for one, n in zip(seen, parts, strict=True) if n == number]
            self._end(part, next(names), own, vector)

    def _end(
        self, track: Track, name: str, pictures: list[Sighting], faces: Mapping[int, np.ndarray]
    ) -> None:
        """Makes a clip of a track, or of a part of it, with the best of its pictures.

        `faces` are number of a sighting -> vector of its face.
        """
        spans: dict[int, Sighting] = {}
        for place, one in enumerate(pictures):
            span = place * MOST_FRAMES // len(pictures)
            spans[span] = max(one, spans.get(span, one))
        best, arrays = [*spans.values()], dict[str, np.ndarray]()
        for part, embed in self._nets.embed.items():
            seen = [one for one in best if part in one.parts]
            if part == "face" and seen:
                arrays[part] = np.stack([faces[one.number] for one in seen])
            else:  # empty without a face: a gallery of faces refuses clips of other modalities
                arrays[part] = embed(np.array([one.parts[part][1] for one in seen]))
            arrays[f"{part}_number"] = np.array([one.frame for one in seen], np.int32)
            if part != "scene":
                arrays[f"{part}_detection"] = np.array([one.detection for one in seen], np.float32)
                boxes = np.array([one.parts[part][0] for one in seen], np.float32)
                arrays[f"{part}_box"] = boxes.reshape(-1, 4)
            if part == "face":
                arrays["face_quality"] = np.array([one.quality for one in seen], np.float32)
        self.arrays[name] = arrays
        top = max(best, key=lambda seen: (seen.quality, seen.number))
        written = _times(track, name)
        written.box = msgspec.convert(top.box.clip(0, 1).round(4).tolist(), features_folder.Box)
        written.box_at_s = round(top.time_s, 3)
        if "face" in top.parts:
            crop, template = top.parts["face"][1], np.array(self._nets.embed["face"].card.template)
            written.quality = top.quality
            written.dark_eyes = bool(align.has_dark_eyes(crop[None], template)[0])
            if self._thumbnails.is_dir():
                picture = self._thumbnails / f"{name}.png"
                files.write_bytes(picture, align.thumbnail(crop), sync=False)
        self.tracks.append(written)

    def keep(self, live: set[int]) -> None:
        """Drops the people of all other tracks, which ended too short to be clips."""
        self._kept = {number: kept for number, kept in self._kept.items() if number in live}

    def hear(
        self, sound: Iterable[tuple[float, np.ndarray]], seen: Sequence[features_folder.Track]
    ) -> int:
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
        order = np.argsort(-voice.quality, kind="stable")
        begin, vectors, quality = (x[np.sort(order[:MOST_FRAMES])] for x in voice)
        number = np.minimum(begin * 1000, np.iinfo(np.int32).max).astype(np.int32)
        self.arrays[clip] |= {"audio": vectors, "audio_quality": quality, "audio_number": number}


def extract(
    path: Path,
    out: Path,
    stem: str,
    nets: Nets,
    settings: features_folder.Settings,
    source: features_folder.Source,
    sha256: str,
    tagged: bool = False,
) -> features_folder.Film:
    """Writes the clips of a video or photo to `out/STEM.npz`; returns what was found.

    A photo has a clip for each face, and no voice. If `out` has a folder for thumbnails, these are
    written, too. Memory grows only with the clips: 12 kB each, if vectors are 128 wide. With
    `tagged`, face tags in a photo name its faces, see `regions`.
    """
    clips = Clips(nets, out / features_folder.THUMBNAILS, held_at(settings.fps))
    tags, lost = regions.Tags([]), list[str]()
    with decode.open_video(path) as video:
        if video.info.photo:
            shots, seen = [(0.0, 0.0)], clips.tracks
            tags = regions.read(path) if tagged else tags
            lost = _find_in_photo(path, video, clips, nets, stem, tags)
        else:
            shots, seen = _follow(video, clips, nets, stem, out, settings)
        found = video.found
    film = features_folder.Film(
        video=features_folder.printable(path.name),
        source=source,
        sha256=sha256,
        photo=video.info.photo,
        seconds=found.seconds,
        shots=shots,
        tracks=sorted(clips.tracks, key=lambda track: (track.start_s, track.clip)),
        frames=found.frames,
        corrupt=found.corrupt,
        refused=found.refused,
        repaired=found.repaired,
        damaged=found.damaged,
        others=video.info.others,
        rate=None if video.info.photo else video.info.rate,
        lost_tags=lost,
        bad_tags=tags.problem,
    )
    if nets.listen and video.info.sound and not film.photo:
        with decode.open_video(path) as video:
            film.voices = clips.hear(video.sound(), seen)
            sound = video.found
            film.lost_sound = sound.corrupt + sound.refused + sound.damaged
    write_npz(out / f"{stem}.npz", clips.arrays)
    return film


def _follow(
    video: decode.Video,
    clips: Clips,
    nets: Nets,
    stem: str,
    out: Path,
    settings: features_folder.Settings,
) -> tuple[list[tuple[float, float]], list[features_folder.Track]]:
    """Makes the clips of a video; returns its shots, and all who are seen, as `hear` takes them.

    With `--unit=shot` a clip is of the main figure of a shot, and others are only seen.
    """
    fps, cuts = settings.fps, Cuts()
    tracker = Tracker(gap_at(min(fps, video.info.rate)), held_at(fps))
    main = MainFigures() if settings.unit == "shot" else None
    seen, numbers = [], defaultdict[int, Iterator[int]](itertools.count)

    def end_clips() -> None:
        for track in tracker.take_ended():
            shot = f"{stem}.s{track.shot:03}"
            if main is None:
                clips.end(track, (f"{shot}.t{number:02}" for number in numbers[track.shot]))
            else:
                seen.append(_times(track, shot))
        for track in main.take_ended() if main else ():
            clips.end(track, iter([f"{stem}.s{track.shot:03}"]), split=False)
        clips.keep((main or tracker).live)

    def cut(time_s: float) -> None:
        tracker.cut(time_s)
        if main:
            main.cut(time_s)
        end_clips()

    for number, frame in enumerate(video.frames(fps)):
        if cuts.update(frame.time_s, frame.small) and number:
            cut(cuts.starts[-1])
        if frame.rgb is not None:
            (out / features_folder.PROGRESS).write_text(str(video.tell()))
            people = find(nets, frame.rgb)
            owners = tracker.update(frame.time_s, people.boxes)
            if main:
                owners = main.update(frame.time_s, people.boxes)
            clips.add(frame.time_s, number, owners, people, frame.rgb)
            end_clips()
    cut(video.found.seconds)
    return cuts.shots(video.found.seconds), seen if main else clips.tracks


def _find_in_photo(
    path: Path, video: decode.Video, clips: Clips, nets: Nets, stem: str, tags: regions.Tags
) -> list[str]:
    """Makes a clip of each face in a photo, with the name of its tag; returns names of no face."""
    frame = next(video.frames(1.0))
    assert frame.rgb is not None
    people = find(nets, frame.rgb)
    people = people.of(~np.isnan(people.parts["face"][:, 0]))
    count = len(people.boxes)
    clips.add(0.0, 0, np.arange(count), people, frame.rgb)
    for number in range(count):
        name = stem if count == 1 else f"{stem}.f{number + 1:02}"
        clips.end(Track(number, shot=0, times=[0.0], ends=[0.0]), iter([name]))
    if not tags.tags:
        return []
    with files.open_input(path) as file:
        orientation = decode.exif_orientation(file)
    height, width = frame.rgb.shape[:2]
    faces = regions.match(tags, people.parts["face"], (width, height), orientation)
    for tag, face in zip(tags.tags, faces.tolist(), strict=True):
        if face >= 0:
            clips.tracks[face].name = tag.name
    return [tag.name for tag, face in zip(tags.tags, faces, strict=True) if face < 0]


def _times(track: Track, clip: str) -> features_folder.Track:
    """Returns when a track is seen, with the clip that it belongs to."""
    start_s, end_s, seen = track.times[0], track.ends[-1], len(track.times)
    return features_folder.Track(
        clip=clip, shot=track.shot, start_s=start_s, end_s=end_s, seen=seen
    )


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Calls `extract` with the values that `arguments` name, in a child of `run_limited`."""
    settings = msgspec.convert(arguments["settings"], features_folder.Settings)
    found = extract(
        Path(arguments["path"]), Path(arguments["out"]), arguments["stem"],
        _nets(arguments["models"], settings.size), settings,
        msgspec.convert(arguments["source"], features_folder.Source), arguments["sha256"],
        arguments["tagged"],
    )  # fmt: skip
    return msgspec.to_builtins(found)


@functools.lru_cache(1)
def _nets(models: str, size: int) -> Nets:
    return load_nets(cards.load(Path(models)), size)


if __name__ == "__main__":
    sys.exit(processes.serve(work))
