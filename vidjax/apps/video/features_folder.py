"""The folder of features that `vidjax extract` writes, and its files.

    OUT/STEM.npz            the clips of a video or photo
    OUT/videos/STEM.json    the video or photo with the times of its tracks; written last
    OUT/extract.json        the nets and settings of all files
    OUT/thumbnails/STEM/    only on request: CLIP.png, the best face of each clip

A clip is the track of a person in a shot, `STEM.s003.t01`. With --unit=shot it is a whole shot,
`STEM.s003`. A photo with a single face is the clip `STEM`; a photo with several faces has the
clips `STEM.f01` and so on. `vidjax.data.arrays` reads the clips. If the extraction of a video was
interrupted, its `.json` file is missing, and the next call extracts it again. STEM is the name of
the file without its ending and without dots.
"""

import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from vidjax.apps.video.cards import EMBEDDER_ROLES
from vidjax.data.untrusted.names import check_name
from vidjax.runs import schemas
from vidjax.runs.schemas import Count, Sha256, Size, Text
from vidjax.utils import files
from vidjax.utils.errors import UserError

NAME = "extract.json"
NUMBERS = "unknown.json"  # marks a folder with results of `vidjax who`
VIDEOS = "videos"
THUMBNAILS = "thumbnails"
PROGRESS = "progress"  # contains the number of bytes read so far while a film is extracted
FILE_BYTES = 256 * files.MB
POOR_QUALITY = 0.01  # worse faces are often not recognised
MOST_STEM_BYTES = 120  # most file systems allow 255 bytes for the name of a file
REMEDY = "delete the folder, and extract the files again"
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Share = Annotated[float, Meta(ge=0, le=1)]
# Left, top, right, bottom as fractions of the sides of the upright picture.
Box = tuple[Share, Share, Share, Share]


class ExtractionSettings(Struct, kw_only=True, frozen=True):
    """The settings of an extraction.

    Attributes:
      fps: the number of frames per second in which faces are detected.
      size: for the detection, frames are shrunk until their longer side has `size` pixels.
      unit: the meaning of a clip: a "track" is a person in a shot; a "shot" is a shot with a single
        main figure, as in iQIYI-VID, see `tracks.MainFigures`.
    """

    fps: Annotated[float, Meta(gt=0, le=1000)] = 5.0
    size: Annotated[int, Meta(ge=32, le=8192)] = 640
    unit: Literal["track", "shot"] = "track"


class Extraction(Struct, kw_only=True):
    """`extract.json`: the digests of the nets' cards by role, and the settings."""

    format: Literal[3] = 3
    models: Annotated[dict[str, Sha256], Meta(max_length=100)]
    settings: ExtractionSettings


class FilmTrack(Struct, kw_only=True):
    """A person in a shot.

    Attributes:
      clip: the name of the clip.
      start_s, end_s: begin and end in seconds.
      seen: the number of frames in which the person was detected.
      quality: the quality of the best face.
      dark_eyes: whether this face seems to wear sunglasses, see `align.has_dark_eyes`.
      box: the face, or the head if there is no face, in the picture at `box_at_s` seconds.
      name: the name from a face tag in a photo, see `regions`.
    """

    clip: Text
    shot: Count
    start_s: Seconds
    end_s: Seconds
    seen: Size
    quality: Annotated[float, Meta(ge=0, le=1)] = 0.0
    dark_eyes: bool = False
    box: Box | None = None
    box_at_s: Seconds | None = None
    name: Text | None = None

    def __post_init__(self) -> None:
        _check_file_name(self.clip)
        if self.end_s < self.start_s:
            raise ValueError(f"the end, {self.end_s} s, is before the begin, {self.start_s} s")


class FileStamp(Struct, kw_only=True, frozen=True):
    """The file of a film, and the properties that change when the file is changed.

    If no property has changed, the file is not read again.

    Attributes:
      address: the absolute path; bytes other than plain letters are `%` and two hexadecimal digits.
      sidecars: size and time of the files with face tags next to a photo, if tags are read.
    """

    address: Annotated[str, Meta(pattern=r"^/[!-~]*$", max_length=20_000)]
    size: Annotated[int, Meta(ge=0, le=2**62)]
    mtime_ns: Annotated[int, Meta(ge=-(2**62), le=2**62)]
    inode: Annotated[int, Meta(ge=0)]
    sidecars: Annotated[tuple[tuple[int, int], ...], Meta(max_length=10)] = ()

    @classmethod
    def of(cls, path: Path, sidecars: Sequence[Path] = ()) -> "FileStamp":
        """Returns the current stamp of a file and its sidecars."""
        info, real = path.stat(), os.fsencode(os.path.realpath(path))
        stats = [sidecar.stat() for sidecar in sidecars]
        return cls(
            address=urllib.parse.quote(real),
            size=info.st_size,
            mtime_ns=info.st_mtime_ns,
            inode=info.st_ino,
            sidecars=tuple((stat.st_size, stat.st_mtime_ns) for stat in stats),
        )

    @property
    def path(self) -> Path:
        """The absolute path."""
        return Path(os.fsdecode(urllib.parse.unquote_to_bytes(self.address)))


class Film(Struct, kw_only=True):
    """The content of `videos/STEM.json`, which describes a video or a photo.

    Attributes:
      video: the name of the file. `read_films` adds folders if two files have the same name.
      shots: begin and end of each shot in seconds.
      corrupt, refused, repaired, damaged: see `decode.DecodeCounts`.
      rate: frames per second; None for a photo.
      others: the number of video streams that were not read.
      voices: the number of tracks with a voice.
      lost_sound: the number of frames and packets of sound that could not be decoded.
      lost_tags: names of face tags without a detected face.
      bad_tags: the problem with the face tags, or "".
    """

    format: Literal[3] = 3
    video: Text
    source: FileStamp
    sha256: Sha256
    photo: bool
    seconds: Seconds
    shots: Annotated[list[tuple[Seconds, Seconds]], Meta(max_length=files.MAX_ITEMS)]
    tracks: Annotated[list[FilmTrack], Meta(max_length=files.MAX_ITEMS)]
    frames: Count
    corrupt: Count = 0
    refused: Count = 0
    repaired: Count = 0
    damaged: bool = False
    rate: Annotated[float, Meta(gt=0, le=1000)] | None = None
    others: Count = 0
    voices: Count = 0
    lost_sound: Count = 0
    lost_tags: Annotated[list[Text], Meta(max_length=10_000)] = []
    bad_tags: Text = ""

    def __post_init__(self) -> None:
        _check_file_name(self.video)

    @property
    def tags(self) -> set[str]:
        """The people whom face tags name."""
        return {track.name for track in self.tracks if track.name}.union(self.lost_tags)


def _check_file_name(name: str) -> None:
    check_name(name, "name of a file")
    if "/" in name or len(name) > 255:
        raise ValueError(f"'{name[:100]}' is not the name of a file")


def make_stem(path: Path) -> str:
    """Returns the first part of the names of a file's clips: letters, digits, `_` and `-`."""
    word = re.sub(r"[^\w-]+", "_", path.stem).strip("_")
    return word.encode()[:MOST_STEM_BYTES].decode(errors="ignore") or "video"


def locate_features(folder: Path, clip: str) -> Path:
    """Returns the path of the file that contains a clip."""
    return folder / f"{clip.partition('.')[0]}.npz"


def cut_film_name(clip: str) -> str:
    """Returns the name of a clip without shot and track: it is equal for all clips of a film."""
    return re.sub(r"\.s\d{3,}(\.t\d{2,})?$", "", clip)


def make_printable(name: str) -> str:
    """Returns a name in which `_` replaces unprintable characters."""
    return "".join(letter if letter.isprintable() else "_" for letter in name)


def locate_thumbnail(folder: Path, clip: str) -> Path:
    """Returns the path of a clip's thumbnail; the file exists only if thumbnails were requested."""
    return folder / THUMBNAILS / clip.partition(".")[0] / f"{clip}.png"


def read_extraction(folder: Path) -> Extraction | None:
    """Returns the contents of a folder's `extract.json`; None if the file does not exist."""
    path = folder / NAME
    return schemas.read(path, Extraction, REMEDY, FILE_BYTES) if files.exists(path) else None


def read_film(path: Path) -> Film:
    """Returns the contents of a file of `videos/`."""
    return schemas.read(path, Film, REMEDY, FILE_BYTES)


def read_films(folder: Path) -> list[Film]:
    """Returns the finished films of a folder.

    If several files have the same name, `video` begins with as many of their folders as are needed
    to distinguish them.
    """
    films = [read_film(path) for path in sorted((folder / VIDEOS).glob("*.json"))]
    by_name: dict[str, list[Film]] = {}
    for film in films:
        by_name.setdefault(film.video, []).append(film)
    for twins in by_name.values():
        parts = [film.source.path.parts for film in twins]
        for depth in range(2, max(map(len, parts)) + 1):
            if len({film.video for film in twins}) == len(twins):
                break
            for film, part in zip(twins, parts, strict=True):
                film.video = "/".join(map(make_printable, part[-depth:]))
    return films


def check_photo(film: Film) -> tuple[str | None, str]:
    """Returns (clip, problem) of a photo.

    `clip` is None unless the photo shows exactly one face. `problem` is "" for a good face. A poor
    face has both a clip and a problem, because it can be used.
    """
    if len(film.tracks) != 1:
        count = f"{len(film.tracks)} faces" if film.tracks else "no face"
        return None, f"{count} in the photo: give a photo of only one person"
    return film.tracks[0].clip, check_face(film.tracks[0])


def check_face(track: FilmTrack) -> str:
    """Returns the problem of a face that can still be used; "" if there is none."""
    if track.quality < POOR_QUALITY:
        remedy = "add a larger, sharper photo from the front"
        return f"a poor face, quality {track.quality:.3f} of 1: {remedy}"
    return "sunglasses, or a shadow over the eyes: add a photo with visible eyes" * track.dark_eyes


def write(path: Path, value: Struct) -> None:
    """Writes a file of the folder atomically."""
    files.write_json(path, msgspec.to_builtins(value))


def check_models(path: Path, cards: Mapping[str, str]) -> None:
    """Refuses features of other models than a gallery's; `cards` are part -> digest.

    Features of other programs are accepted, because their models are unknown.
    """
    folder = path if path.is_dir() else path.parent
    extraction = next(filter(None, map(read_extraction, (folder, folder.parent))), None)
    for part, digest in cards.items():
        other = extraction and extraction.models.get(EMBEDDER_ROLES.get(part, part))
        if other and other != digest:
            raise UserError(
                f"{path}: its {part} vectors and the gallery's are of different models\n"
                "extract with the gallery's models, or create a gallery with these: --models=DIR"
            )
