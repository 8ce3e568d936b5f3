"""Pictures of a video or photo of unknown origin; to be called in a process with limits.

`vidjax.data.processes` starts such processes. FFmpeg gets the bytes of one open regular file
and can open nothing else: no playlist, no network. Times are seconds since the first moment of the
file, picture or sound, as players show them.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from vidjax.utils import files
from vidjax.utils.errors import UserError, need

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream

VIDEO_FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "asf", "flv")
PHOTO_FORMATS = ("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "j2k_pipe", "gif")
# The first bytes of photos in the container of MP4. FFmpeg shows their tiles as videos.
HEIF = re.compile(rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1|avi[fs])", re.DOTALL)
MOST_PIXELS = 50_000_000  # of a picture; 8K video has 33 million
SMALL = (36, 64)  # rows and columns of the pictures in which cuts are found
LEAST_ASPECT = 0.25  # of a pixel; beyond it a file does not tell the truth
SOUND_RATE = 16_000  # samples a second
USUAL_RATE = 25.0  # frames per second, where a file does not tell
READ_BYTES = 1 << 18
ROUNDED_SECONDS = 0.02  # how far a time stamp of sound may be off
BACK_SECONDS = 1.0  # how far one may go back
# A video is damaged that ends so much before its declared end, in seconds and as a part of it.
MISSING_SECONDS = 0.5
MISSING_PART = 0.05

Kind = TypeVar("Kind", "VideoFrame", "AudioFrame")
# (a, b, c, d): a pixel at (x, y) is shown at (a x + c y, b x + d y).
Turn = tuple[int, int, int, int]
# Degrees against the clock -> how a picture is turned.
TURNS: dict[int, Turn] = {
    0: (1, 0, 0, 1),
    90: (0, -1, 1, 0),
    180: (-1, 0, 0, -1),
    270: (0, 1, -1, 0),
}
MIRRORED = (2, 4, 5, 7)  # orientations of EXIF
TIFF = re.compile(rb"MM\0\*|II\*\0")  # the header of EXIF, with either order of bytes
# The tag 0x0112, a short number.
ORIENTATION = re.compile(rb"\x01\x12\0\x03\0\0\0\x01\0(.)|\x12\x01\x03\0\x01\0\0\0(.)\0", re.DOTALL)
EXIF_BYTES, PHOTO_BYTES = 1 << 16, 1 << 26


@dataclasses.dataclass(frozen=True)
class Info:
    """What a file declares of itself; any of it may be wrong.

    `width` and `height` are pixels as stored, before the picture is turned upright. `aspect`: width
    of a pixel by its height, as players show it; 1 for photos. `seconds`: declared duration, None
    if unknown. `rate`: frames per second on average. `start_s`: time stamp of the first moment,
    which all times leave out. `photo`: a file of a single picture. `others`: streams of pictures
    beside the first one, which are not read, such as those of other programmes.
    """

    width: int
    height: int
    aspect: float
    seconds: float | None
    rate: float
    start_s: float
    photo: bool
    sound: bool
    others: int


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture: `time_s` seconds, `small` uint8 [36, 64, 3] as stored, squeezed.

    `rgb`: uint8 [H, W, 3], upright; None for frames between two samples.
    """

    time_s: float
    small: np.ndarray
    rgb: np.ndarray | None


@dataclasses.dataclass
class Found:
    """What was found until now: counts of frames and packets, and seconds until the end.

    `corrupt`: frames that the decoder marked and that were skipped. `refused`: packets that it did
    not take. `repaired`: time stamps that were absent, equal, or went back. `damaged`: whether the
    video ended long before its declared end, or could not be read to its end.
    """

    frames: int = 0
    corrupt: int = 0
    refused: int = 0
    repaired: int = 0
    seconds: float = 0.0
    damaged: bool = False


class Clock:
    """Times that only grow, from time stamps that may be absent, equal, or go back.

    A bad stamp is put one average frame after the last one, and later stamps count from there.
    """

    def __init__(self, step_s: float, latest_s: float | None):
        self._step = step_s
        self._latest = np.inf if latest_s is None else latest_s + 10.0
        self._shift = 0.0
        self._last: float | None = None
        self.repaired = 0

    def time(self, stamp_s: float | None) -> float:
        """Returns the time of the next frame, in seconds, from its time stamp."""
        after = 0.0 if self._last is None else self._last + self._step
        time = after if stamp_s is None else stamp_s + self._shift
        bad = stamp_s is None or (self._last is not None and time <= self._last)
        if bad or time > self._latest:
            self.repaired += 1
            self._shift += 0.0 if stamp_s is None else after - time
            time = after
        self._last = time
        return time


class Video:
    """An open video or photo, see `open_video`; `info` tells what it declares.

    It is read once: call `frames` or `sound`. `found` is complete when that has ended. `tell` gives
    the bytes that are read.
    """

    def __init__(
        self,
        path: Path,
        file: io.FileIO | io.BytesIO,
        container: "InputContainer",
        most_pixels: int,
    ):
        self._path, self._file, self._container = path, file, container
        self.tell = file.tell
        self._stream = _video_stream(path, container)
        self._stream.codec_context.options = {"max_pixels": str(most_pixels)}
        self.info = _info(container, self._stream)
        _check_size(path, self.info, most_pixels)
        self.found = Found()

    def frames(self, fps: float) -> Iterator[Frame]:
        """Yields every frame that is not corrupt, `fps` of them a second with `rgb`.

        Sampled is the first frame at or after each multiple of 1 / `fps` seconds, so a video of
        fewer frames has all of them sampled.

        Raises:
          UserError: no frame can be decoded.
        """
        from av.error import FFmpegError
        from av.video.frame import VideoFrame
        from av.video.reformatter import VideoReformatter

        clock = Clock(1.0 / self.info.rate, self.info.seconds)
        # Each keeps the plan that FFmpeg makes for its sizes and formats.
        shrink, convert = VideoReformatter(), VideoReformatter()
        sample = 0
        for decoded in self._decoded(self._stream, VideoFrame):
            stamp = decoded.time
            time_s = clock.time(None if stamp is None else stamp - self.info.start_s)
            # A thousandth of a sample: stamps are rounded to milliseconds.
            sampled = time_s * fps >= sample - 1e-3
            try:
                small = _resized(shrink, decoded, SMALL[1], SMALL[0])
                width = max(1, round(decoded.width * self.info.aspect))
                rgb = _resized(convert, decoded, width, decoded.height) if sampled else None
            except (FFmpegError, ValueError):  # a format of pixels that cannot be converted
                self.found.refused += 1
                continue
            if rgb is not None:
                sample = int(time_s * fps + 1e-3) + 1
                rgb = self._upright(rgb, decoded)
            self.found.frames += 1
            self.found.repaired = clock.repaired
            self.found.seconds = self._end_of(time_s, decoded)
            yield Frame(time_s, small, rgb)
            if self.info.photo:  # of a moving GIF, the first picture
                break
        if not self.found.frames:
            raise UserError(
                f"'{self._path}': none of its frames can be decoded: it is damaged\n"
                "copy it again, or leave it out"
            )
        self.found.damaged |= ends_early(self.found.seconds, self.info)

    def _end_of(self, time_s: float, frame: "VideoFrame") -> float:
        """Returns when a frame ends: one that is held lasts longer than others."""
        end_s = time_s + 1.0 / self.info.rate
        held_s = float((frame.duration or 0) * (frame.time_base or 0))
        return max(end_s, min(time_s + held_s, self.info.seconds or 0.0))

    def sound(self) -> Iterator[tuple[float, np.ndarray]]:
        """Yields (seconds, samples) of the first sound track, none if there is none.

        The samples are float32 [n], -1 to 1, all channels as one, 16 kHz. Seconds are
        those of the first of them, on the same clock as frames; between blocks may be gaps. It
        ends where time stamps go back: nobody knows to which frames the rest belongs.
        """
        from av.audio.frame import AudioFrame
        from av.audio.resampler import AudioResampler
        from av.error import FFmpegError

        for stream in _sound_streams(self._container)[:1]:
            stream.codec_context.thread_count = 1
            resampler, source = AudioResampler("flt", "mono", SOUND_RATE), None
            time_s = 0.0
            for decoded in self._decoded(stream, AudioFrame):
                form = (decoded.format.name, decoded.layout.name, decoded.sample_rate)
                if form != source:  # a broadcast changes it where another programme begins
                    resampler, source = AudioResampler("flt", "mono", SOUND_RATE), form
                try:
                    resampled = resampler.resample(decoded)
                except (FFmpegError, ValueError):  # a format of sound that cannot be converted
                    self.found.refused += 1
                    continue
                for made in resampled:
                    # Stamps of some formats are rounded; blocks without a gap are to fit together.
                    if made.time is not None:
                        stamp_s = made.time - self.info.start_s
                        if stamp_s < time_s - BACK_SECONDS:
                            self.found.damaged = True
                            return
                        time_s = stamp_s if abs(stamp_s - time_s) > ROUNDED_SECONDS else time_s
                    samples = np.clip(np.nan_to_num(made.to_ndarray()[0]), -1, 1)
                    yield time_s, samples
                    time_s += len(samples) / SOUND_RATE

    def _decoded(self, stream: "VideoStream | AudioStream", kind: type[Kind]) -> Iterator[Kind]:
        """Yields what the decoder of a stream does not mark as corrupt."""
        from av.error import FFmpegError

        packets = self._container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except FFmpegError:
                self.found.damaged = True
                return
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except FFmpegError:
                self.found.refused += 1
                continue
            for frame in frames:
                assert isinstance(frame, kind)
                if frame.is_corrupt:
                    self.found.corrupt += 1
                else:
                    yield frame

    def _upright(self, rgb: np.ndarray, frame: "VideoFrame") -> np.ndarray:
        """Returns a picture as a player shows it."""
        if self.info.photo:  # PyAV crashes where it reads the colour profile of a PNG
            return turned(rgb, self._turn(frame.rotation))
        try:
            entry = frame.side_data.get("DISPLAYMATRIX")
        except ValueError:  # the library has no name for the type of another entry, as of EXIF
            return turned(rgb, self._turn(frame.rotation))
        if entry is None:
            return rgb
        a, b, _, c, d = np.frombuffer(bytes(entry), np.int32)[:5].tolist()
        return turned(rgb, (a, b, c, d))

    def _turn(self, degrees: int) -> Turn:
        """Returns the turn by these degrees; of a photo also mirrored, if its EXIF says so."""
        a, b, c, d = TURNS[round(degrees / 90) * 90 % 360]
        if self.info.photo and exif_orientation(self._file) in MIRRORED:
            return a, b, -c, -d
        return a, b, c, d


@contextlib.contextmanager
def open_video(path: Path, *, most_pixels: int = MOST_PIXELS) -> Iterator[Video]:
    """Opens a video, or a photo as a video of one frame, for a `with` block.

    Args:
      path: a regular file: MP4, QuickTime, Matroska, WebM, AVI, MPEG, WMV, FLV; PNG, JPEG, WebP,
        BMP, TIFF, JPEG 2000, GIF (its first picture), HEIC or AVIF.
      most_pixels: the largest picture that is decoded, width times height.

    Raises:
      UserError: no such file or format, no picture in it, too large, or the extra is missing.
    """
    with files.open_input(path) as opened:
        head = opened.read(12)
        opened.seek(0)
        file = _heif_as_bmp(path, opened, most_pixels) if HEIF.match(head) else opened
        with _open_container(path, file, most_pixels) as container:
            yield Video(path, file, container, most_pixels)


def _heif_as_bmp(path: Path, file: io.FileIO, most_pixels: int) -> io.BytesIO:
    """Returns a HEIC or AVIF photo, upright, as BMP."""
    need(f"'{path}', a photo in HEIC or AVIF,", "pillow_heif", extra="heif")
    import pillow_heif
    from PIL import Image, ImageOps

    pillow_heif.register_heif_opener()
    bmp = io.BytesIO()
    try:
        with Image.open(file, formats=["HEIF", "AVIF"]) as photo:
            _check_pixels(path, *photo.size, most_pixels)
            ImageOps.exif_transpose(photo).convert("RGB").save(bmp, "BMP")
    except (MemoryError, UserError):
        raise
    except Exception as error:  # its libraries raise what they like
        raise UserError(f"'{path}' is a damaged photo: {_reason(error)}\ncopy it again") from error
    bmp.seek(0)
    return bmp


def turned(rgb: np.ndarray, turn: Turn) -> np.ndarray:
    """Returns a picture [H, W, 3] turned to the nearest multiple of 90 degrees, and mirrored."""
    a, b, c, d = turn
    across, down = a, d
    if abs(b) > abs(a):
        rgb = rgb.swapaxes(0, 1)
        across, down = c, b
    return np.ascontiguousarray(rgb[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def exif_orientation(file: io.FileIO | io.BytesIO) -> int:
    """Returns the orientation that the EXIF of a photo tells, 1 to 8; 1 if it tells none."""
    place = file.tell()
    file.seek(0)
    content = file.read(PHOTO_BYTES)
    file.seek(place)
    header = TIFF.search(content)
    if header is None:
        return 1
    found = ORIENTATION.search(content, header.start(), header.start() + EXIF_BYTES)
    return (found[1] or found[2])[0] if found else 1


def ends_early(seconds: float, info: Info) -> bool:
    """Returns whether a video of this length ended long before the end that it declares."""
    if info.seconds is None or info.photo:
        return False
    return info.seconds - seconds > max(MISSING_SECONDS, MISSING_PART * info.seconds)


class _Bytes:
    """The bytes of an open file without its name, from which FFmpeg would guess a format."""

    def __init__(self, file: io.FileIO | io.BytesIO):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _open_container(path: Path, file: io.FileIO | io.BytesIO, most_pixels: int) -> "InputContainer":
    need(f"'{path}', a video or photo,", "av", extra="video")
    import av
    from av.error import FFmpegError

    # What FFmpeg decodes while it opens a file obeys the limit, too.
    options = {"max_pixels": str(most_pixels)}
    lists = {
        "format_whitelist": ",".join((*VIDEO_FORMATS, *PHOTO_FORMATS)),
        "protocol_whitelist": "none",
    }
    try:
        return av.open(
            _Bytes(file), mode="r", options=options, container_options=lists, buffer_size=READ_BYTES
        )
    except MemoryError:
        raise
    except (FFmpegError, UnicodeDecodeError) as error:
        if not file.seek(0, io.SEEK_END):
            raise UserError(f"'{path}' is an empty file") from error
        raise UserError(
            f"'{path}' is no video or photo of a format that is read, or damaged: "
            f"{_reason(error)}\n"
            "give MP4, MKV, WebM, MOV, AVI, MPEG, WMV, FLV, JPEG, PNG, WebP, BMP, TIFF, GIF, HEIC "
            "or AVIF\nothers become MP4 by: ffmpeg -i FILE FILE.mp4"
        ) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)[:100]


def _video_stream(path: Path, container: "InputContainer") -> "VideoStream":
    """Returns the first stream of pictures."""
    stream = next(iter(_video_streams(container)), None)
    if stream is None:
        raise UserError(
            f"'{path}' has no pictures, at most sound or a cover: give a video or a photo"
        )
    if stream.codec_context is None:
        raise UserError(f"'{path}': no decoder for its pictures: convert it to H.264")
    stream.codec_context.thread_count = 1  # one process a core
    return stream


def _video_streams(container: "InputContainer") -> "list[VideoStream]":
    """Returns the streams of pictures that are no covers."""
    from av.stream import Disposition

    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    return [stream for stream in container.streams.video if not stream.disposition & covers]


def _sound_streams(container: "InputContainer") -> "list[AudioStream]":
    """Returns the streams of sound that can be decoded."""
    return [stream for stream in container.streams.audio if stream.codec_context is not None]


def _info(container: "InputContainer", stream: "VideoStream") -> Info:
    import av

    context = stream.codec_context
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    base, photo = stream.time_base or Fraction(0), container.format.name in PHOTO_FORMATS
    aspect = float(stream.sample_aspect_ratio or 1)
    seconds = float(stream.duration * base) if stream.duration else None
    if seconds is None:
        seconds = _tagged_seconds(stream.metadata.get("DURATION", ""))
    if seconds is None and container.duration:
        seconds = container.duration / av.time_base
    return Info(
        width=context.width,
        height=context.height,
        aspect=aspect if LEAST_ASPECT <= aspect <= 1 / LEAST_ASPECT and not photo else 1.0,
        seconds=seconds if seconds and seconds > 0 else None,
        rate=rate if 0.01 < rate < 1000 else USUAL_RATE,
        start_s=(container.start_time or 0) / av.time_base,
        photo=photo,
        sound=bool(_sound_streams(container)),
        others=len(_video_streams(container)) - 1,
    )


def _tagged_seconds(text: str) -> float | None:
    """Returns the seconds of `00:01:02.500000000`, as Matroska tells the duration of a stream."""
    found = re.fullmatch(r"(\d{1,4}):(\d\d):(\d\d(?:\.\d{1,9})?)", text)
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]) if found else None


def _check_size(path: Path, info: Info, most_pixels: int) -> None:
    if info.width < 1 or info.height < 1:
        # FFmpeg tells no size that is above its limit.
        raise UserError(
            f"'{path}' does not tell the size of its pictures, or they have more than "
            f"{most_pixels:,} pixels\nmake it smaller, or raise the limit on pixels"
        )
    _check_pixels(path, round(info.width * max(1.0, info.aspect)), info.height, most_pixels)


def _check_pixels(path: Path, width: int, height: int, most_pixels: int) -> None:
    if width * height > most_pixels:
        raise UserError(
            f"'{path}': pictures of {width} x {height} pixels are more than the most, "
            f"{most_pixels:,}\nmake it smaller, or raise the limit on pixels"
        )


def _resized(
    reformatter: "VideoReformatter", frame: "VideoFrame", width: int, height: int
) -> np.ndarray:
    """Returns a frame as rgb of another size, uint8 [height, width, 3]."""
    from av.video.reformatter import Interpolation

    area = Interpolation.AREA
    made = reformatter.reformat(frame, width, height, "rgb24", interpolation=area)
    return made.to_ndarray()
