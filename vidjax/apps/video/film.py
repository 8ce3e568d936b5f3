"""Finds the people in a video or photo, tracks them within shots, and computes their embeddings.

`work` runs in a child process with limits, because a malicious file may exploit errors in FFmpeg
or Pillow.

A clip is the track of a person in a shot. With `--unit=shot`, it is the track of the main person of
a shot. While no other person is in the picture, speech counts as the person's voice. But the
speaker may be off screen.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from vidjax.apps import cards
from vidjax.apps.video import align, decode, media, pictures, regions, tracks, voices
from vidjax.apps.video.halves import HalvesDetector
from vidjax.apps.video.media import Content, ExtractionSettings, FaceTrack, FileStamp, MediaFile
from vidjax.apps.video.nets import Detector, Embedder, Faces
from vidjax.apps.video.search import FilmSearch, SearchedFrame
from vidjax.apps.video.shots import ShotDetector
from vidjax.apps.video.tracks import MainFigures, Track, Tracker
from vidjax.apps.video.voices import Listener, Voice
from vidjax.data.clip_files import write_npz
from vidjax.utils import files, processes
from vidjax.utils.errors import UserError

# A clip has at most 32 faces, spread over its time, and at most 32 windows of sound with speech.
MOST_FRAMES = 32
MOST_KEPT, SPAN_SECONDS = 96, 0.2  # pictures of a track, and their distance, see `BestPictures`
LEAST_TURNED = 5  # a film with fewer faces upside down does not count as upside down


class Task(Struct, kw_only=True):
    """The arguments of `work`: a film or photo to read."""

    models: str  # the folder of nets
    settings: ExtractionSettings
    path: str
    out: str  # an existing folder
    source: FileStamp  # the properties of the file, for the description
    stem: str = ""  # see `choose_stem`
    stems: dict[str, str] = {}  # digest of a film of an earlier call -> its stem
    current: list[Content] = []  # contents of films and photos that need not be read again
    sha256: str = ""  # the digest of a photo, see `Content`; "" if the file may be a film
    tagged: bool = False  # whether names that photo programs stored for faces are read from a photo


class Answer(Struct, kw_only=True):
    """The result of `work`: what the file shows."""

    content: Content
    film: MediaFile | None = None  # None if the content is in `Task.current`


class Nets(NamedTuple):
    """The nets with which films and photos are read."""

    detect: Detector  # finds faces
    embed: Embedder  # computes embeddings of faces
    listen: Listener | None  # detects speech and embeds voices; None without these nets
    digests: Mapping[str, str]  # modality -> digest of the embedder's card


@functools.lru_cache(1)
def load_nets(models: str, size: int) -> Nets:
    """Loads the nets in the folder `models`.

    The detector shrinks pictures until their longer side has `size` pixels.
    """
    cards_of = cards.load(Path(models))
    listen = Listener(cards_of) if cards_of.keys() >= {*cards.VOICE_ROLES} else None
    detect = Detector(cards_of["face_detector"], size)
    digests = {part: card.digest for part, card in cards.list_embedders(cards_of).items()}
    return Nets(detect, Embedder(cards_of["face_embedder"]), listen, digests)


class Sighting(NamedTuple):
    """A face in a frame. Sightings are sorted by `quality`, and then by the sighting's `number`."""

    quality: float
    number: int  # a different number for each sighting
    time_s: float
    frame: int  # the number of the frame in the film
    detection: float  # the score of the detector
    place: np.ndarray  # [4], the box of the face, as fractions of the picture's width and height
    picture: np.ndarray  # uint8 [H, W, 3], the frame around the face, see `align.cut_face`
    points: np.ndarray  # [5, 2], the points of the face in `picture`


class Embedded(NamedTuple):
    """A face that a net has read."""

    crop: np.ndarray  # uint8 [H, W, 3], the aligned face
    vector: np.ndarray  # [D], its embedding


class BestPictures:
    """Keeps the best picture of a person in each interval of 0.2 seconds, at most 96 pictures.

    If there are too many pictures, the length of the intervals is doubled.
    """

    def __init__(self) -> None:
        self._seconds = SPAN_SECONDS
        self._best: dict[int, Sighting] = {}

    def add(self, new: Sighting) -> None:
        """Adds a picture, which must be later in the film than all pictures added before."""
        span = int(new.time_s / self._seconds + 1e-3)
        self._best[span] = max(new, self._best.get(span, new))
        if len(self._best) > MOST_KEPT:
            self._seconds, before, self._best = 2 * self._seconds, self._best, {}
            for sighting in before.values():
                self.add(sighting)

    def pictures(self) -> list[Sighting]:
        """Returns the kept pictures, at most 96, in order of time."""
        return [*self._best.values()]


def choose_best(pictures: Sequence[Sighting], count: int) -> list[Sighting]:
    """Divides pictures, in order of time, into `count` parts; returns the best one of each part.

    The parts have equal numbers of pictures. If there are at most `count` pictures, returns all.
    """
    parts = np.array_split(np.arange(len(pictures)), min(count, len(pictures)))
    return [max(pictures[index] for index in part) for part in parts]


class ClipBuilder:
    """Collects the best frames of each track, and makes a clip when the track has ended.

    A track is a person in a shot. If the folder `thumbnails` exists, a picture of the best face of
    each clip is written into this folder. If frames of a track stay visible for more than `held_s`
    seconds, as in a slide show, each frame may show another person.
    """

    def __init__(self, nets: Nets, thumbnails: Path, held_s: float):
        self._nets, self._thumbnails, self._held = nets, thumbnails, held_s
        self._kept = defaultdict[int, BestPictures](BestPictures)
        self._numbers = itertools.count()
        self.tracks: list[FaceTrack] = []  # of finished clips, in the order in which they ended
        self.arrays: dict[str, dict[str, np.ndarray]] = {}  # name of a clip -> arrays of the `.npz`
        self.mirrors = False  # whether `FaceTrack.mirrored` is computed
        self.seen = self.turned = 0  # numbers of detected faces, and of faces upside down

    def add(
        self, time_s: float, frame: int, owners: np.ndarray, faces: Faces, rgb: np.ndarray
    ) -> None:
        """Adds the N faces in a frame to their tracks.

        `frame` is the number of the frame, and `rgb` its pixels, uint8 [H, W, 3]. `owners` [N] int
        is the number of the track of each face, or -1 for a face that is not added.
        """
        chosen = np.flatnonzero(owners >= 0)
        if not len(chosen):
            return
        self.seen += len(owners)
        self.turned += int(align.find_upside_down(faces.points).sum())
        faces, card = faces.take(chosen), self._nets.embed.card
        template, (side, _) = np.array(card.template), card.input.size or (0, 0)
        crops = align.warp_faces(rgb, align.fit_similarity(faces.points, template), side)
        inside = align.measure_inside(faces.points, template, side, rgb.shape)
        quality = align.measure_quality(faces.scores, faces.points, crops, inside).tolist()
        places = faces.boxes / np.tile(rgb.shape[1::-1], 2)
        for row, track in enumerate(owners[chosen].tolist()):
            cut = align.cut_face(rgb, faces.points[row], template, side)
            sighting = Sighting(
                quality[row], next(self._numbers), time_s, frame, float(faces.scores[row]),
                places[row], *cut,
            )  # fmt: skip
            self._kept[track].add(sighting)

    def end(self, track: Track, names: Iterator[str], split: bool = True) -> None:
        """Makes the clip of a track that has ended. `names` yields names for clips.

        Embeds the best of each `pictures_per_vector` pictures, see the net's card, but at least two
        pictures. If these faces differ much, all kept pictures are embedded. If `split` is True,
        and the track shows several people in turn, makes a clip of each person.
        """
        kept = self._kept.pop(track.number).pictures()
        # Pictures after the end of the track are part of a dissolve.
        sightings = [x for x in kept if x.time_s < track.ends[-1]] or kept
        card, embedded = self._nets.embed.card, dict[int, Embedded]()
        count = max(2, round(len(sightings) / (card.pictures_per_vector or 1)))
        best = choose_best(sightings, count)
        vectors, back_end = self._embed(best, embedded), card.back_end if split else None
        if tracks.may_change(vectors, back_end):
            best, vectors = sightings, self._embed(sightings, embedded)
        times = np.array([x.time_s for x in best])
        sighting_s = float(np.median(np.subtract(track.ends, track.times)))
        places = tracks.find_changes(vectors, times, sighting_s > self._held, back_end)
        middles = [float(times[place - 1 : place + 1].mean()) for place in places]
        parts = np.searchsorted(middles, times)
        for number, part in enumerate(track.split(middles)):
            pictures = [x for x, n in zip(best, parts, strict=True) if n == number]
            self._end(part, next(names), pictures, embedded)

    def _embed(self, sightings: Sequence[Sighting], embedded: dict[int, Embedded]) -> np.ndarray:
        """Returns the embeddings of N sightings, [N, D].

        `embedded` is `Sighting.number` -> aligned face and embedding. Missing ones are added.
        """
        card = self._nets.embed.card
        new = [x for x in sightings if x.number not in embedded]
        template, (side, _) = np.array(card.template), card.input.size or (0, 0)
        crops = np.zeros((len(new), side, side, 3), np.uint8)
        for crop, x in zip(crops, new, strict=True):
            points = self._nets.detect.find_points(x.picture, x.points, template)
            matrices = align.fit_similarity(points[None], template)
            crop[:] = align.warp_faces(x.picture, matrices, side)[0]
        pairs = zip(crops, self._nets.embed(crops), strict=True)
        embedded.update(zip((x.number for x in new), map(Embedded._make, pairs), strict=True))
        return np.array([embedded[x.number].vector for x in sightings])

    def _end(
        self, track: Track, name: str, pictures: list[Sighting], embedded: Mapping[int, Embedded]
    ) -> None:
        """Makes the clip `name` of a track.

        `pictures` are the faces of the person, in order of time. `embedded` is `Sighting.number` ->
        aligned face and embedding.
        """
        best = choose_best(pictures, MOST_FRAMES)
        self.arrays[name] = {
            "face": np.stack([embedded[x.number].vector for x in best]),
            "face_number": np.array([x.frame for x in best], np.int32),
            "face_detection": np.array([x.detection for x in best], np.float32),
            "face_quality": np.array([x.quality for x in best], np.float32),
        }
        top, card = max(best), self._nets.embed.card
        crop = embedded[top.number].crop
        clear_quality = card.back_end.clear_quality if card.back_end else None
        written = _to_face_track(track, name)
        written.box = msgspec.convert(top.place.clip(0, 1).round(4).tolist(), media.Box)
        written.box_at_s = round(top.time_s, 3)
        places = [(round(x.time_s, 3), x.place.clip(0, 1).round(3).tolist()) for x in best]
        written.places = msgspec.convert(places, list[media.Place])
        written.quality = top.quality
        written.clarity = align.measure_clarity(top.quality, clear_quality)
        written.dark_eyes = bool(align.has_dark_eyes(crop[None], np.array(card.template))[0])
        if self.mirrors:
            pair = self._nets.embed(np.stack([crop, crop[:, ::-1]]))
            pair = pair - np.array(card.back_end.centre if card.back_end else 0.0)
            lengths = np.linalg.norm(pair, axis=1)
            cosine = float(pair[0] @ pair[1] / max(lengths.prod(), 1e-30))
            written.mirrored = round(min(max(cosine, -1.0), 1.0), 4)
        if self._thumbnails.is_dir():
            picture = self._thumbnails / f"{name}.png"
            files.write_bytes(picture, align.encode_thumbnail(crop), sync=False)
        self.tracks.append(written)

    def keep(self, live: set[int]) -> None:
        """Frees memory: deletes the pictures of all tracks whose numbers are not in `live`."""
        for number in self._kept.keys() - live:
            del self._kept[number]

    def hear(self, sound: Iterable[tuple[float, np.ndarray]], seen: Sequence[FaceTrack]) -> int:
        """Adds embeddings of voices to clips; returns the number of clips with a voice.

        Speech belongs to a clip while no other person is visible. A clip keeps the 32 windows of
        sound with the most speech. The array `audio_number` of a clip contains the start of each
        window in milliseconds.

        `sound` yields blocks (seconds, samples) at 16 kHz. `seen` are the tracks of all people.
        """
        assert self._nets.listen
        clips = {track.clip for track in self.tracks}
        spans = (span for span in voices.find_solo_spans(seen) if span.clip in clips)
        heard: dict[str, list[Voice]] = {}
        for span, samples in voices.cut_spans(sound, spans):
            voice = self._nets.listen(samples)
            if len(voice.begin):
                voice = voice._replace(begin=span.start_s + voice.begin / voices.RATE)
                heard.setdefault(span.clip, []).append(voice)
        for clip, parts in heard.items():
            voice = Voice(*map(np.concatenate, zip(*parts, strict=True)))
            best = np.argsort(-voice.quality, kind="stable")[:MOST_FRAMES]
            begin, vectors, quality = (x[np.sort(best)] for x in voice)
            number = np.minimum(begin * 1000, np.iinfo(np.int32).max).astype(np.int32)
            audio = {"audio": vectors, "audio_quality": quality, "audio_number": number}
            self.arrays[clip] |= audio
        return len(heard)


def choose_stem(task: Task, sha256: str) -> str:
    """Returns the first part of the names of the clips of a file. `sha256` is its digest.

    A known file keeps its stem. If another film has the stem of a new file, `task.stem` ends with
    `~`, and digits of the digest are added. If it is "", the stem is made of the digest.
    """
    if known := task.stems.get(sha256):
        return known
    if not task.stem:
        return media.make_photo_stem(sha256)
    return task.stem + sha256[:8] if task.stem.endswith("~") else task.stem


def identify(task: Task) -> tuple[Content, regions.Tags]:
    """Finds out what a film or photo shows, without finding faces; returns it and the face tags.

    The digest of a film that cannot be read to its end is the sha256 of the file.
    """
    path, sha256, is_photo, orientation = Path(task.path), task.sha256, bool(task.sha256), 1
    if not is_photo:
        try:
            with decode.open_video(path) as video:
                sha256, orientation = video.identify()
        except UserError:
            sha256, is_photo = files.sha256_file(path), True  # perhaps; else the orientation is 1
    if is_photo:
        orientation = pictures.read_orientation(path)
    tags = regions.read_tags(path) if task.tagged and is_photo else regions.Tags([])
    found = files.sha256_json(tags) if tags.tags or tags.problem else ""
    return Content(sha256, orientation, found), tags


def extract(task: Task, content: Content, tags: regions.Tags, nets: Nets) -> MediaFile:
    """Writes the features of a video or photo to `OUT/STEM.npz`; returns its description.

    `task` contains the file, the folder OUT, and STEM. `content` and `tags` are the results of
    `identify`. Each face of a photo is a clip. If OUT contains a folder for thumbnails, a picture
    of the best face of each clip is written into this folder. The memory grows with the number of
    clips, but not with the length of a video.

    Raises:
      UserError: the file cannot be decoded.
    """
    path, out, stem = Path(task.path), Path(task.out), choose_stem(task, content.sha256)
    held_s = tracks.choose_held_seconds(task.settings.fps)
    clips = ClipBuilder(nets, out / media.THUMBNAILS, held_s)
    photo = pictures.read_photo(path)
    if photo is not None:
        facts = _read_photo(photo, content.orientation, tags, clips, nets, stem)
    else:
        facts = _read_film(task, stem, clips, nets)
    write_npz(out / f"{stem}.npz", clips.arrays, nets.digests)
    return MediaFile(
        video=media.make_printable(path.name),
        source=task.source,
        **msgspec.structs.asdict(content),
        photo=photo is not None,
        tracks=sorted(clips.tracks, key=lambda track: (track.start_s, track.clip)),
        **facts,
    )


def _read_film(task: Task, stem: str, clips: ClipBuilder, nets: Nets) -> dict[str, Any]:
    """Makes the clips of a video; returns fields of the video's description, see `MediaFile`.

    `stem` is the first part of the names of the clips. `clips` collects the clips.
    """
    path = Path(task.path)
    with decode.open_video(path) as video:
        cuts, seen, layout = _make_clips(video, clips, nets, task, stem)
    facts = {"shots": cuts.shots(video.counts.seconds), "brightness": cuts.brightness}
    info = video.info
    facts |= {"others": info.others, "stream": info.stream, "rate": info.rate, "halves": layout}
    facts |= msgspec.structs.asdict(video.counts)
    facts["upside_down"] = clips.turned >= max(LEAST_TURNED, clips.seen / 2)
    if nets.listen and video.info.sound:
        with decode.open_video(path) as video:
            facts["voices"] = clips.hear(video.sound(facts["jumps"]), seen)
            sound = video.counts
        facts["lost_sound"] = sound.corrupt + sound.refused + sound.damaged
    return facts


def _make_clips(
    video: decode.Video, clips: ClipBuilder, nets: Nets, task: Task, stem: str
) -> tuple[ShotDetector, list[FaceTrack], media.Layout | None]:
    """Makes a clip of each track in a video, or with `--unit=shot`, of each shot's main person.

    `clips` collects the clips, whose names begin with `stem`. Returns the detector of the shots,
    the tracks of all people, and `HalvesDetector.layout`.
    """
    fps, cuts, search = task.settings.fps, ShotDetector(), FilmSearch(nets.detect)
    halves = HalvesDetector()
    tracker = Tracker(
        tracks.choose_gap_seconds(min(fps, video.info.rate)), tracks.choose_held_seconds(fps)
    )
    main = MainFigures() if task.settings.unit == "shot" else None
    trackers = [tracker, main] if main else [tracker]  # the last one makes the clips
    seen, numbers = [], defaultdict[int, Iterator[int]](itertools.count)

    def end_clips() -> None:
        for track in tracker.take_ended():
            shot = f"{stem}.s{track.shot:03}"
            if main is None:
                clips.end(track, (f"{shot}.t{number:02}" for number in numbers[track.shot]))
            else:
                seen.append(_to_face_track(track, shot))
        for track in main.take_ended() if main else ():
            clips.end(track, iter([f"{stem}.s{track.shot:03}"]), split=False)
        clips.keep(trackers[-1].live)

    def end_shot(time_s: float, next_s: float | None = None) -> None:
        for x in trackers:
            x.cut(time_s, next_s)
        end_clips()

    def take(frames: Iterable[SearchedFrame]) -> None:
        for frame in frames:
            owners = [x.update(frame.time_s, frame.faces.boxes) for x in trackers][-1]
            halves.add(frame.rgb, frame.faces.boxes)
            clips.add(frame.time_s, frame.number, owners, frame.faces, frame.rgb)
            end_clips()

    with (Path(task.out) / media.PROGRESS).open("wb", buffering=0) as progress:
        for number, frame in enumerate(video.frames(fps)):
            jumps = frame.gap_s < frame.time_s
            if cuts.update(frame.time_s, frame.small, jumps) and number:
                take(search.end_shot())
                end_shot(frame.gap_s if jumps else cuts.starts[-1], cuts.starts[-1])
            if frame.rgb is not None:
                progress.seek(0)  # the number only grows; opening the file again is slow
                progress.write(str(video.tell()).encode())
                take(search.add(number, frame.time_s, frame.rgb))
    take(search.end_shot())
    end_shot(video.counts.seconds)
    return cuts, seen if main else clips.tracks, halves.layout


def _read_photo(
    rgb: np.ndarray, turn: int, tags: regions.Tags, clips: ClipBuilder, nets: Nets, stem: str
) -> dict[str, Any]:
    """Makes a clip of each face in a photo; returns fields of the photo's `MediaFile`.

    `rgb` is the upright picture, and `turn` the EXIF orientation of the stored picture.
    `tags` are the names that photo programs stored for faces. `clips` collects the clips. `stem` is
    the first part of the names of the clips.
    """
    faces = nets.detect(rgb)
    count, lost, misfit = len(faces.boxes), list[str](), ""
    clips.mirrors = True
    clips.add(0.0, 0, np.arange(count), faces, rgb)
    for number in range(count):
        name = stem if count == 1 else f"{stem}.f{number + 1:02}"
        clips.end(Track(number, shot=0, times=[0.0], ends=[0.0]), iter([name]))
    if tags.tags:
        size = rgb.shape[1], rgb.shape[0]
        owners, misfit = regions.match_faces(tags, faces.boxes, size, turn)
        for tag, face in zip(tags.tags, owners.tolist(), strict=True):
            if face >= 0:
                clips.tracks[face].name = tag.name
            else:
                lost.append(tag.name)
    facts = {"seconds": 0.0, "shots": [(0.0, 0.0)], "frames": 1, "lost_tags": lost}
    facts["brightness"] = float(rgb.mean()) / 255
    return facts | {"bad_tags": tags.problem, "misfit": misfit}


def _to_face_track(track: Track, clip: str) -> FaceTrack:
    start_s, end_s, seen = track.times[0], track.ends[-1], len(track.times)
    return FaceTrack(clip=clip, shot=track.shot, start_s=start_s, end_s=end_s, seen=seen)


def work(arguments: dict[str, Any]) -> Answer | None:
    """Extracts the features of a file, see `extract`, if it is not known. Runs in a child process.

    `arguments` are the fields of a `Task` as JSON values. Nets are only loaded if the file is not
    known. If there are only the arguments of `load_nets`, loads the nets, and returns None. Raises
    NetError if a net cannot be used.
    """
    if "path" not in arguments:
        load_nets(**arguments)
        return None
    task = msgspec.convert(arguments, Task)
    content, tags = identify(task)
    if content in task.current:
        return Answer(content=content)
    nets = load_nets(task.models, task.settings.size)
    return Answer(content=content, film=extract(task, content, tags, nets))


if __name__ == "__main__":
    processes.serve(work)
