"""The folder of features that `vidjax extract` writes, and what its files say.

    OUT/STEM.npz            the clips of a video or photo
    OUT/videos/STEM.json    the video or photo, with the times of its tracks; written last
    OUT/extract.json        the nets and settings of all
    OUT/thumbnails/STEM/    only where asked for: the best face of each clip, CLIP.png

A clip is one track of a person, `STEM.s003.t01`. By --unit=shot it is a whole shot, `STEM.s003`. Of
a photo it is a face, `STEM`; of several faces `STEM.f01`. `vidjax.data.arrays` reads the clips. A
video without its `.json` was cut off, and is extracted anew. STEM is the name of the file without
its ending, and without dots.
"""

import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from vidjax.apps.video.cards import PARTS
from vidjax.data.untrusted.names import check_name
from vidjax.runs import schemas
from vidjax.runs.schemas import Count, Sha256, Size, Text
from vidjax.utils import files
from vidjax.utils.errors import UserError

NAME = "extract.json"
NUMBERS = "unknown.json"  # of results of `vidjax who`
VIDEOS = "videos"
THUMBNAILS = "thumbnails"
PROGRESS = "progress"  # the bytes of a film that are read, while it is extracted
FILE_BYTES = 256 * files.MB
POOR = 0.01  # quality of a face, that best tells whom it does not name: benchmark photo_quality
MOST_BYTES = 120  # of a stem; that of a name of a file is 255 on most systems
REMEDY = "delete the folder, and extract anew"
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Share = Annotated[float, Meta(ge=0, le=1)]
Box = tuple[Share, Share, Share, Share]  # left, top, right, bottom, as parts of the upright picture


class Settings(Struct, kw_only=True, frozen=True):
    """How features are extracted.

    Attributes:
      fps: frames of a second in which faces are looked for.
      size: the longer side, in pixels, to which they are shrunk for that.
      unit: what a clip is: a "track", one person in a shot; or a "shot" with one main figure, as in
        iQIYI-VID, see `tracks.MainFigures`.
    """

    fps: Annotated[float, Meta(gt=0, le=1000)] = 5.0
    size: Annotated[int, Meta(ge=32, le=8192)] = 640
    unit: Literal["track", "shot"] = "track"


class Extraction(Struct, kw_only=True):
    """`extract.json`: the digests of the cards by role, and the settings."""

    format: Literal[3] = 3
    models: Annotated[dict[str, Sha256], Meta(max_length=100)]
    settings: Settings


class Track(Struct, kw_only=True):
    """A person in one shot: the clip, seconds of begin and end, and the number of sightings.

    `quality` is of the best face. `dark_eyes` if that face seems to wear sunglasses, see
    `align.has_dark_eyes`. `box` is where the face is, or the head without a face, in the picture at
    `box_at_s` seconds. `name` is of a face tag in a photo, see `regions`.
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
            raise ValueError(f"it ends at {self.end_s} s, before its begin")


class Source(Struct, kw_only=True, frozen=True):
    """The file of a film: where it is, and what changes if the file changes.

    If none of these changes, the file is not read again. `address` is the absolute path, with `%`
    and two hexadecimal digits for each byte that is no plain letter. `sidecars` are size and
    time of files of face tags beside a photo, where tags are read.
    """

    address: Annotated[str, Meta(pattern=r"^/[!-~]*$", max_length=20_000)]
    size: Annotated[int, Meta(ge=0, le=2**62)]
    mtime_ns: Annotated[int, Meta(ge=-(2**62), le=2**62)]
    inode: Annotated[int, Meta(ge=0)]
    sidecars: Annotated[tuple[tuple[int, int], ...], Meta(max_length=10)] = ()

    @classmethod
    def of(cls, path: Path, sidecars: Sequence[Path] = ()) -> "Source":
        """Returns what the disk says of a file now, and of its sidecars."""
        info, real = path.stat(), os.fsencode(os.path.realpath(path))
        beside = [one.stat() for one in sidecars]
        return cls(
            address=urllib.parse.quote(real),
            size=info.st_size,
            mtime_ns=info.st_mtime_ns,
            inode=info.st_ino,
            sidecars=tuple((one.st_size, one.st_mtime_ns) for one in beside),
        )

    @property
    def path(self) -> Path:
        """The absolute path."""
        return Path(os.fsdecode(urllib.parse.unquote_to_bytes(self.address)))


class Film(Struct, kw_only=True):
    """`videos/STEM.json`: a video or a photo.

    `shots` are seconds of begin and end. `corrupt`, `refused` and `repaired` count frames, packets
    and time stamps, and `damaged` tells if it ended early; see `decode.Found`. `others` are streams
    of pictures that were not looked at. `rate`: frames of a second. `voices` are the tracks with a
    voice, and `lost_sound` counts frames and packets of sound that were not decoded. `lost_tags`
    are names of face tags where no face was found, and `bad_tags` says what is wrong with tags.
    """

    format: Literal[3] = 3
    video: Text  # the name of the file; of two files of one name, with folders: see `read_films`
    source: Source
    sha256: Sha256
    photo: bool
    seconds: Seconds
    shots: Annotated[list[tuple[Seconds, Seconds]], Meta(max_length=files.MAX_ITEMS)]
    tracks: Annotated[list[Track], Meta(max_length=files.MAX_ITEMS)]
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
        raise ValueError(f"'{name[:100]}' is no name of a file")


def stem_of(path: Path) -> str:
    """Returns the begin of the clips' names of a file: letters, digits, `_` and `-`."""
    word = re.sub(r"[^\w-]+", "_", path.stem).strip("_")
    return word.encode()[:MOST_BYTES].decode(errors="ignore") or "video"


def features(folder: Path, clip: str) -> Path:
    """Returns the path of the file that has a clip."""
    return folder / f"{clip.partition('.')[0]}.npz"


def film_of(clip: str) -> str:
    """Returns the name of a clip without shot and track, the same for all clips of a film."""
    return re.sub(r"\.s\d{3,}(\.t\d{2,})?$", "", clip)


def printable(name: str) -> str:
    """Returns the name by which people know a file."""
    return "".join(letter if letter.isprintable() else "_" for letter in name)


def thumbnail(folder: Path, clip: str) -> Path:
    """Returns the path of a clip's thumbnail, which exists if it was asked for."""
    return folder / THUMBNAILS / clip.partition(".")[0] / f"{clip}.png"


def read_extraction(folder: Path) -> Extraction | None:
    """Returns what `extract.json` of a folder says; None if there is none."""
    path = folder / NAME
    if not files.exists(path):
        return None
    return schemas.read(path, Extraction, REMEDY, FILE_BYTES)


def read_film(path: Path) -> Film:
    """Returns what a file of `videos/` says."""
    return schemas.read(path, Film, REMEDY, FILE_BYTES)


def read_films(folder: Path) -> list[Film]:
    """Returns what a folder says of its videos; those that are not finished are absent.

    If several files have one name, `video` begins with as many of their folders as they need to
    differ.
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
                film.video = "/".join(map(printable, part[-depth:]))
    return films


def judge_photo(film: Film) -> tuple[str | None, str]:
    """Returns the clip of the one face in a photo, None for none or several, and what is wrong.

    The clip of a poor face is usable, so that both may be there.
    """
    if len(film.tracks) != 1:
        found = f"{len(film.tracks)} faces are" if film.tracks else "no face is"
        return None, f"{found} found: give a photo of one person alone"
    return film.tracks[0].clip, judge_face(film.tracks[0])


def judge_face(track: Track) -> str:
    """Returns what is wrong with a face, though it is usable; "" for nothing."""
    if track.quality < POOR:
        return (
            f"a poor face, quality {track.quality:.3f} of 1: "
            "a larger or sharper one from the front helps"
        )
    return "sunglasses, or a shadow over the eyes: a photo without helps" * track.dark_eyes


def write(path: Path, value: Struct) -> None:
    """Writes a file of the folder; it appears whole."""
    files.write_json(path, msgspec.to_builtins(value))


def check_models(path: Path, cards: Mapping[str, str]) -> None:
    """Refuses features that other models made than a gallery's; `cards` are part -> digest.

    Features that do not tell their models are taken as they are, such as those of another program.
    """
    folder = path if path.is_dir() else path.parent
    found = next(filter(None, map(read_extraction, (folder, folder.parent))), None)
    for part, digest in cards.items():
        other = found and found.models.get(PARTS.get(part, part))
        if other and other != digest:
            raise UserError(
                f"{path}: its {part} vectors are of another model than the gallery's\n"
                "extract with the gallery's models, or create a gallery of these: --models=DIR"
            )
