"""Defines the files that `vidjax extract` writes into a folder of features.

    OUT/STEM.npz            the features of the clips of a video or photo
    OUT/videos/STEM.json    the shots and tracks of the video or photo, with their times
    OUT/extract.json        the nets and settings, which are the same for all files
    OUT/thumbnails/STEM/    only on request: CLIP.png, the best face of each clip

STEM is the name of the video without its ending and without dots. If another video has this STEM,
`~` and 8 digits of the digest, `MediaFile.sha256`, are added. In a folder of photos of people, STEM
is the first 16 digits of the digest, so that names of clips contain no names of people. A video
keeps its STEM as long as it shows the same, even if its file is moved or renamed.

A shot is a part of a video between two cuts. A track is all faces of one person in a shot. Each
track is a clip: the clip `STEM.s003.t01` is track 1 of shot 3. With --unit=shot, a clip is the main
person of a shot, such as `STEM.s003`. A photo with a single face is the clip `STEM`. A photo with
several faces has the clips `STEM.f01`, `STEM.f02` and so on. `vidjax.data.arrays` reads the clips.

`videos/STEM.json` is written last. If it is missing, the extraction was interrupted, and the next
call extracts the video again. When the nets change, all files `STEM.npz` are deleted. Each stays
missing until its video is extracted again.
"""

import contextlib
import functools
import itertools
import operator
import os
import re
import urllib.parse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from vidjax.apps.cards import EMBEDDER_ROLES
from vidjax.data.clip_files import check_nets
from vidjax.models.card_backend import LEAST_CLARITY
from vidjax.utils import files, json_files, names as names_lib
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key
from vidjax.utils.json_files import Count, Sha256, Share, Size, Text
from vidjax.utils.names import check_name

NAME = "extract.json"
RESULTS = "said.jsonl"  # marks a folder with results of `vidjax who`
FEATURES, PEOPLE = "features", "people"  # folders in the results, with features
VIDEOS = "videos"
THUMBNAILS = "thumbnails"
PROGRESS = "progress"  # a file with the number of bytes that were read of a film so far
FORMAT = 4  # of all JSON files in the folder
FILE_BYTES = 256 * files.MB  # the largest JSON file that is read
MOST_COPIES = 100  # places of a film or photo that are remembered, besides its first place
# The mean brightness below which faces are not found. CenterFace found all faces in a film that was
# darkened to 0.06 of its brightness, and none at 0.03.
DARK = 0.02
POOR_QUALITY = 0.01  # faces of lower quality are often not recognised
MOST_PLACES = 5  # of a face in the log
MOST_STEM_BYTES = 120  # most file systems allow 255 bytes for the name of a file
REMEDY = "name another folder; or delete the folder if vidjax wrote it, and extract the files again"
OLD_REMEDY = "name a new folder, or delete this folder, and extract the files again"
# Left, top, right and bottom, as fractions of the width and height of the upright picture.
Box = tuple[Share, Share, Share, Share]
# The first of two halves, for the filter `crop` of ffmpeg. `scale` restores the width or height.
Layout = Literal[
    "iw:ih/2:0:0", "iw:ih/2:0:0,scale=iw:2*ih", "iw/2:ih:0:0", "iw/2:ih:0:0,scale=2*iw:ih"
]  # fmt: skip
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Orientation = Annotated[int, Meta(ge=1, le=8)]  # of EXIF
Jump = tuple[Seconds, Seconds]  # when the clock of a film jumps, and by how much
OptionalSha256 = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
Place = tuple[Seconds, Box]  # the time of a picture, and the box of a face in it
Area = tuple[Share, Share, Share, Share]  # left, top, width and height of a face


class Face(Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A face, in a form that does not depend on nets, file names and names of clips."""

    film: Sha256  # the digest of the film or photo, see `MediaFile.sha256`
    at: Seconds
    box: Area
    places: Annotated[tuple[tuple[Seconds, Area], ...], Meta(max_length=100)] = ()  # by time
    turn: Orientation = 1  # the orientation of the film or photo when the face was described


class ExtractionSettings(Struct, kw_only=True, frozen=True):
    """The settings with which features are extracted from films."""

    fps: Annotated[float, Meta(gt=0, le=1000)] = 5.0  # frames per second that are searched
    size: Annotated[int, Meta(ge=32, le=8192)] = 640  # longer side of frames for the detection
    # "track": each person in a shot becomes a clip. "shot": only the main person of each shot
    # becomes a clip, as in iQIYI-VID.
    unit: Literal["track", "shot"] = "track"


class Extraction(Struct, kw_only=True):
    """The contents of `extract.json`: the nets and settings with which features were computed."""

    format: Literal[4] = FORMAT
    models: Annotated[dict[str, Sha256], Meta(max_length=100)]  # role -> sha256 of the card
    settings: ExtractionSettings


class _Version(Struct):
    """The format of `extract.json`."""

    format: int = FORMAT


class FaceTrack(Struct, kw_only=True):
    """A clip: the face of one person in a shot of a film, or in a photo."""

    clip: Text
    shot: Count  # the number of the shot in the film
    start_s: Seconds
    end_s: Seconds
    seen: Size  # number of frames in which the person was detected
    quality: Share = 0.0  # of the best face, see `align.measure_quality`
    # Of the best face, see `align.measure_clarity`. It is 1 if the card of the net contains no
    # `clear_quality`.
    clarity: Share = 1.0
    # In photos, the cosine of the embeddings of the face and of its mirror image.
    mirrored: Annotated[float, Meta(ge=-1, le=1)] | None = None
    dark_eyes: bool = False  # whether the best face seems to wear sunglasses
    box: Box | None = None  # of the best face
    box_at_s: Seconds | None = None  # the time of the picture with the box
    # Of the faces of the clip, in order of time.
    places: Annotated[list[Place], Meta(max_length=1000)] = []
    name: Text | None = None  # the name that a photo program stored for this face, see `regions`

    def __post_init__(self) -> None:
        _check_file_name(self.clip)
        if self.end_s < self.start_s:
            raise ValueError(f"a clip ends at {self.end_s} s, before its start at {self.start_s} s")

    @property
    def unclear(self) -> bool:
        """True if the faces are so small or blurred that faces of different people look alike."""
        return self.clarity < LEAST_CLARITY


def make_face(film: str, track: FaceTrack, turn: int = 1) -> Face | None:
    """Returns the face in the clip `track`, or None if the box of the face is not known.

    `film` is the digest of the film or photo, and `turn` the orientation of its pictures.
    """
    if track.box is None:
        return None
    places = track.places
    if len(places) > MOST_PLACES:
        last = len(places) - 1
        places = [places[round(n * last / (MOST_PLACES - 1))] for n in range(MOST_PLACES)]
    at = track.start_s if track.box_at_s is None else track.box_at_s
    rest = tuple((seconds, _to_area(box)) for seconds, box in places)
    return Face(film=film, at=at, box=_to_area(track.box), places=rest, turn=turn)


def _to_area(box: Box) -> Area:
    left, top, right, bottom = box
    return left, top, round(max(right - left, 0.0), 6), round(max(bottom - top, 0.0), 6)


class FileStamp(Struct, kw_only=True, frozen=True):
    """The path, size, times and other properties that show whether a file has changed.

    A film or photo is read again only if one of its properties changes.
    """

    # The absolute path, with special characters quoted as in a URL (`%20`).
    address: Annotated[str, Meta(pattern=r"^/[!-~]*\Z", max_length=20_000)]
    size: Annotated[int, Meta(ge=0, le=2**62)]
    mtime_ns: Annotated[int, Meta(ge=-(2**62), le=2**62)]
    inode: Annotated[int, Meta(ge=0)]
    # Size and time of each sidecar file with the face tags of a photo; empty if tags are not read.
    sidecars: Annotated[tuple[tuple[int, int], ...], Meta(max_length=10)] = ()

    @classmethod
    def of(cls, path: Path, sidecars: Sequence[Path] = ()) -> "FileStamp":
        """Reads the properties of a file, and of `sidecars`, the files with a photo's face tags."""
        info, stats = path.stat(), [sidecar.stat() for sidecar in sidecars]
        return cls(
            address=make_address(path),
            size=info.st_size,
            mtime_ns=info.st_mtime_ns,
            inode=info.st_ino,
            sidecars=tuple((stat.st_size, stat.st_mtime_ns) for stat in stats),
        )

    @property
    def path(self) -> Path:
        """The absolute path of the file."""
        return Path(os.fsdecode(urllib.parse.unquote_to_bytes(self.address)))

    @property
    def is_valid(self) -> bool:
        """Whether the file is at its path and has not changed. Sidecar files do not count."""
        try:
            return FileStamp.of(self.path) == msgspec.structs.replace(self, sidecars=())
        except OSError:
            return False


class Content(Struct, frozen=True):
    """What a film or photo shows. While it stays equal, the file is not read again."""

    # The digest of a film is the sha256 of the compressed pictures that are read, see
    # `decode.Video.identify`. For photos, see `digests.digest_photo`. The digest stays equal if
    # only the title, the metadata or the container changes.
    sha256: Sha256
    # The EXIF orientation that turns the stored picture upright. Films store an angle: 0, 90, 180
    # and 270 degrees clockwise are 1, 6, 3 and 8.
    orientation: Orientation = 1
    # A digest of the face tags of a photo; "" if there are no tags, or if tags are not read.
    tags_sha256: OptionalSha256 = ""


class DecodeCounts(Struct, kw_only=True):
    """How a film was decoded: counts of the frames and errors, so far or in the whole film."""

    seconds: Seconds  # the end of the last frame: the length of the film
    frames: Count
    corrupt: Count = 0  # frames that the decoder marked as corrupt. They are skipped
    refused: Count = 0  # packets and frames that could not be decoded or converted
    repaired: Count = 0  # time stamps that `decode.Clock` replaced
    jumps: Annotated[list[Jump], Meta(max_length=files.MAX_ITEMS)] = []
    damaged: bool = False  # whether the last part of the pictures or the sound is missing


class MediaFile(DecodeCounts, kw_only=True, dict=True):
    """The contents of `videos/STEM.json`, which describes a video or a photo."""

    format: Literal[4] = FORMAT
    # The name of the file. If two names are equal, `read_media_files` adds their folders.
    video: Text
    # The place of the file when it was last seen. If the file is missing, or another file is at its
    # place, `source.is_valid` is False.
    source: FileStamp
    # The places of other files that show the same.
    copies: Annotated[list[FileStamp], Meta(max_length=MOST_COPIES)] = []
    # The next three fields are explained in `Content`.
    sha256: Sha256
    orientation: Orientation = 1
    tags_sha256: OptionalSha256 = ""
    photo: bool
    # The start and end of each shot.
    shots: Annotated[list[tuple[Seconds, Seconds]], Meta(max_length=files.MAX_ITEMS)]
    tracks: Annotated[list[FaceTrack], Meta(max_length=files.MAX_ITEMS)]
    rate: Annotated[float, Meta(gt=0, le=1000)] | None = None  # frames per second; None for photos
    brightness: Share | None = None  # the mean brightness of all pictures
    halves: Layout | None = None  # if two halves show the same picture
    upside_down: bool = False  # whether half of the faces in a video or more are upside down
    others: Count = 0  # number of further video streams, which were not read
    stream: Count = 0  # the place of the stream that was read among all video streams
    voices: Count = 0  # number of tracks with a voice
    lost_sound: Count = 0  # number of frames and packets of sound that could not be decoded
    # Names of face tags at which no face was detected.
    lost_tags: Annotated[list[Text], Meta(max_length=10_000)] = []
    bad_tags: Text = ""  # why face tags could not be read
    misfit: Text = ""  # why no face tag can be believed; all tags are then in `lost_tags`

    def __post_init__(self) -> None:
        _check_file_name(self.video)
        if any(names_lib.is_reserved(x) or names_lib.clean_identity(x) != x for x in self.tags):
            raise ValueError("`lost_tags` or a `name` in `tracks` is no valid name of a person")

    @property
    def content(self) -> Content:
        """What the film or photo shows."""
        return Content(self.sha256, self.orientation, self.tags_sha256)

    @property
    def path(self) -> Path:
        """The path of the file. If another film has taken the place, the name of the file differs.

        Then no file is at the path, so that nobody takes the other film for this film.
        """
        path, name = self.source.path, PurePath(self.video).name
        return path if make_printable(path.name) == name else path.with_name(name)

    @property
    def stamps(self) -> list[FileStamp]:
        """The places of the file and of its copies."""
        return [self.source, *self.copies]

    @property
    def is_dark(self) -> bool:
        """Whether the pictures are so dark that no face was found."""
        return not self.tracks and (self.brightness or 1.0) < DARK

    @functools.cached_property
    def digest(self) -> str:
        """A digest of the file, and of the names and times of its clips."""
        tracks = [[track.clip, track.start_s, track.end_s] for track in self.tracks]
        return files.sha256_json([self.sha256, tracks])

    @functools.cached_property
    def faces(self) -> dict[str, Face]:
        """Name of a clip -> the face in the clip. Clips without a known box are left out."""
        turn = self.orientation
        faces = ((track.clip, make_face(self.sha256, track, turn)) for track in self.tracks)
        return {clip: face for clip, face in faces if face}

    @property
    def tags(self) -> set[str]:
        """The names of people that a photo program has stored in a photo, as face tags."""
        return {track.name for track in self.tracks if track.name}.union(self.lost_tags)


def _check_file_name(name: str) -> None:
    check_name(name, "name of a file")
    if "/" in name or len(name) > 255:
        raise ValueError(f"the name of a file contains / or is too long: '{name[:100]}'")


def make_stem(path: Path) -> str:
    """Returns the stem of a film or photo, with which the names of its clips begin.

    The stem is the name of the file without its ending, cut after MOST_STEM_BYTES bytes. All
    characters except letters, digits, `_` and `-` are replaced by `_`.
    """
    word = re.sub(r"[^\w-]+", "_", path.stem).strip("_")
    return word.encode()[:MOST_STEM_BYTES].decode(errors="ignore") or "video"


def make_photo_stem(sha256: str) -> str:
    """Returns the stem of a photo of people, from its digest."""
    return sha256[:16]


def make_address(path: Path) -> str:
    """Returns `FileStamp.address` of a path, which need not exist."""
    return urllib.parse.quote(os.fsencode(os.path.realpath(path)))


def make_printable(name: str) -> str:
    """Replaces the unprintable characters of a name by `_`."""
    return "".join(letter if letter.isprintable() else "_" for letter in name)


def locate_thumbnail(folder: Path, clip: str) -> Path:
    """Returns the path of the picture of a clip. The file exists only with --thumbnails."""
    return folder / THUMBNAILS / clip.partition(".")[0] / f"{clip}.png"


def read_extraction(folder: Path) -> Extraction | None:
    """Reads `extract.json` in a folder of features. Returns None if the file does not exist.

    Raises UserError if the file is damaged, or if an earlier version of vidjax wrote it.
    """
    path = folder / NAME
    if not files.exists(path):
        return None
    if is_old(path):
        raise UserError(f"'{folder}' was written by an earlier version of vidjax: {OLD_REMEDY}")
    return json_files.read(path, Extraction, REMEDY, FILE_BYTES)


def is_old(path: Path) -> bool:
    """Returns whether an earlier version of vidjax wrote the file `extract.json` at `path`."""
    return json_files.read(path, _Version, REMEDY, FILE_BYTES).format < FORMAT


def choose_settings(folder: Path, **given: object) -> ExtractionSettings:
    """Returns settings for an extraction into `folder`.

    `given` are setting -> value. A value of None is replaced by the value stored in `folder`. If
    `folder` stores no settings, None is replaced by the default.
    """
    before = read_extraction(folder)
    settings = before.settings if before else ExtractionSettings()
    changed = {name: value for name, value in given.items() if value is not None}
    return msgspec.structs.replace(settings, **changed)


def read_media_file(path: Path) -> MediaFile:
    """Reads the file `videos/STEM.json`, the description of a video or a photo."""
    return json_files.read(path, MediaFile, REMEDY, FILE_BYTES)


def read_media_files(folder: Path) -> list[MediaFile]:
    """Reads the JSON files that describe films and photos, in a folder of features.

    A film or photo without features (`STEM.npz`) is left out. If several films have the same file
    name, `MediaFile.video` also contains a folder, such as `a/x.mp4` instead of `x.mp4`.
    """
    paths = sorted((folder / VIDEOS).glob("*.json"))
    films = [read_media_file(path) for path in paths if has_features(folder, path.stem)]
    for twins in group_by_key((film.video, film) for film in films).values():
        if len(twins) > 1:
            _distinguish(twins)
    return films


def _distinguish(twins: Sequence[MediaFile]) -> None:
    """Adds folders to the names of films with equal file names: `a/x.mp4` and `b/x.mp4`.

    As many folders are added as are needed to distinguish the films. If other films had the path of
    a film before it, their names are `x (earlier 1).mp4`, `x (earlier 2).mp4`, and so on.
    """
    at = group_by_key((film.source.path, film) for film in twins)
    parts = [[*map(make_printable, path.parts)] for path in at]
    # In this order, the paths with the longest common end are neighbours.
    neighbours = itertools.pairwise(sorted(part[::-1] for part in parts))
    equal = (map(operator.eq, *pair) for pair in neighbours)
    depth = 1 + max((sum(itertools.takewhile(bool, pair)) for pair in equal), default=0)
    for part, films in zip(parts, at.values(), strict=True):
        path = PurePath(*part[-depth:])
        films.sort(key=lambda film: (film.source.is_valid, film.source.mtime_ns), reverse=True)
        for number, film in enumerate(films):
            name = f"{path.stem} (earlier {number}){path.suffix}" if number else path.name
            film.video = str(path.with_name(name))


def describe_media_files(out: Path) -> dict[str, MediaFile]:
    """Reads the JSON files that describe all films and photos, in a folder of features.

    Returns stem -> description, where the stem is the name of the film or photo without its ending.
    Films and photos without features (`STEM.npz`) are included. Damaged JSON files are left out.
    """
    stems = [path.stem for path in sorted((out / VIDEOS).glob("*.json"))]
    return {stem: film for stem in stems if (film := describe_media_file(out, stem))}


def find_unread(out: Path) -> dict[str, MediaFile]:
    """Finds films and photos whose features were deleted when the nets changed.

    Returns STEM -> content of `OUT/videos/STEM.json`. For STEM, see `make_stem`.
    """
    stems = [path.stem for path in (out / VIDEOS).glob("*.json")]
    unread = (stem for stem in sorted(stems) if not has_features(out, stem))
    return {stem: film for stem in unread if (film := describe_media_file(out, stem))}


def describe_media_file(out: Path, stem: str) -> MediaFile | None:
    """Reads the JSON file that describes a film or photo; returns None if it is damaged or missing.

    `out` is the folder of features, and `stem` the name of the film or photo without its ending.
    """
    with contextlib.suppress(UserError, FileNotFoundError):
        return read_media_file(out / VIDEOS / f"{stem}.json")
    return None


def has_features(out: Path, stem: str) -> bool:
    """Returns whether the file with the features of a film or photo, `OUT/STEM.npz`, exists."""
    return files.exists(out / f"{stem}.npz")


def remove_tags(out: Path, stem: str, names: Collection[str]) -> None:
    """Removes face tags with the given names from the description of a photo.

    `out` is the folder of features, and `stem` the first part of the names of the photo's clips.
    """
    if photo := describe_media_file(out, stem):
        for track in photo.tracks:
            track.name = None if track.name in names else track.name
        photo.lost_tags = [name for name in photo.lost_tags if name not in names]
        write(out / VIDEOS / f"{stem}.json", photo)


def set_aside(out: Path) -> None:
    """Deletes the features and thumbnails in a folder, before other nets compute new features.

    Keeps the JSON files that describe films and photos.
    """
    for path in out.glob("*.npz"):
        _remove_pictures(out / THUMBNAILS / path.stem)
        path.unlink(missing_ok=True)


def lacks_pictures(out: Path, stem: str) -> bool:
    """Returns True if `out` contains thumbnails, but no thumbnails of the film `stem`."""
    thumbnails = out / THUMBNAILS
    return thumbnails.exists() and not (thumbnails / stem).exists()


def list_files_of(path: Path) -> list[Path]:
    """Returns all files and thumbnails of the film or photo to which the file `path` belongs.

    `path` is a file in a folder of features, such as STEM.npz. For other files, the result is [].
    """
    out = path.parent if path.suffix == ".npz" else path.parent.parent
    if not files.exists(out / NAME):
        return []
    stem = path.stem
    places = (out / f"{stem}.npz", out / VIDEOS / f"{stem}.json", out / THUMBNAILS / stem)
    return [place for place in places if files.exists(place)]


def remove_media_file(out: Path, stem: str) -> None:
    """Removes the features, the description and the thumbnails of a video or photo."""
    # The JSON file is removed first, because it marks the other files as complete.
    (out / VIDEOS / f"{stem}.json").unlink(missing_ok=True)
    _remove_pictures(out / THUMBNAILS / stem)
    (out / f"{stem}.npz").unlink(missing_ok=True)


def remove_thumbnails(out: Path) -> bool:
    """Removes all thumbnails from a folder of features. Returns False if other files remain."""
    remove_leftovers(out, None)  # temporary files may contain thumbnails
    if not files.exists(out / THUMBNAILS):
        return True
    for folder in (out / THUMBNAILS).iterdir():
        _remove_pictures(folder)
    return files.remove_ours(out / THUMBNAILS, "")


def _remove_pictures(folder: Path) -> None:
    # The name of the folder is the stem of the video.
    files.remove_ours(folder, rf"{re.escape(folder.name)}(\..+)?\.png")


def remove_leftovers(out: Path, stems: set[str] | None) -> None:
    """Deletes the temporary files that killed processes have left in a folder of features.

    If `stems` is not None, also deletes the features, the descriptions and the thumbnails of all
    films and photos whose stem is not in `stems`.
    """
    videos = out / VIDEOS
    files.remove_partials(out, rf"{re.escape(NAME)}|.+\.npz")
    files.remove_partials(videos, r".+\.json")
    for folder in [*out.glob(f".extract-{8 * '[0-9a-f]'}")]:  # of a call that was killed
        files.remove_tree(folder)
    if stems is not None:
        present = {path.stem for path in (*out.glob("*.npz"), *videos.glob("*.json"))}
        for stem in present - stems:
            if "." not in stem:
                remove_media_file(out, stem)


def check_face(track: FaceTrack) -> str:
    """Returns why a face is poor, with a remedy, or "" for a good face."""
    if track.quality < POOR_QUALITY:
        remedy = "add a larger, sharper photo from the front"
        return f"the face is poor, with quality {track.quality:.3f} of 1: {remedy}"
    return "sunglasses or a shadow hide the eyes: add a photo with visible eyes" * track.dark_eyes


def write(path: Path, value: Struct) -> None:
    """Writes a JSON file into a folder of features, atomically."""
    files.write_json(path, msgspec.to_builtins(value))


def check_models(path: Path, cards: Mapping[str, str]) -> None:
    """Raises UserError if the features in `path` were computed by other nets than a gallery's nets.

    `path` is a file or folder. `cards` is modality -> sha256 of the JSON file that describes the
    gallery's net. Features of other programs are accepted, because their nets are unknown.
    """
    folder = path if path.is_dir() else path.parent
    extraction = next(filter(None, map(read_extraction, (folder, folder.parent))), None)
    if extraction:
        made = {part: extraction.models.get(EMBEDDER_ROLES.get(part, part)) for part in cards}
        check_nets(path, {part: digest for part, digest in made.items() if digest}, cards)
