"""Decodes a video with FFmpeg. The video may be malicious.

Call this module only in a child process with limits, see `vidjax.utils.processes`. FFmpeg reads the
bytes of an open regular file, and cannot open playlists, other files, or network connections. Times
are in seconds since the first picture or sound of the file, as in video players.
"""

import collections
import contextlib
import errno
import hashlib
import io
import itertools
import re
import types
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vidjax.apps.video import align, media_files
from vidjax.apps.video.media import DecodeCounts, Jump
from vidjax.utils import files
from vidjax.utils.errors import UserError, require_packages

if TYPE_CHECKING:
    from av import AudioFrame, AudioStream, VideoCodecContext, VideoFrame, VideoStream
    from av.container import InputContainer
    from av.video.reformatter import VideoReformatter

VIDEO_FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "asf", "flv")
# The first bytes of MP4, Matroska, AVI or WebP, JPEG and PNG.
KNOWN_BEGIN = re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF|\xff\xd8\xff|\x89PNG", re.DOTALL)
MOST_PIXELS = 50_000_000  # in a picture; 8K video has 33 million
SMALL_SHAPE = (36, 64)  # rows and columns of the small pictures in which cuts are detected
LEAST_ASPECT = 0.25  # a pixel aspect ratio below 0.25 or above 4 is ignored as a mistake
SOUND_RATE = 16_000  # samples per second
USUAL_RATE = 25.0  # frames per second, if a file declares no rate
READ_BYTES = 1 << 18
FIRST_PACKETS = 100  # one of them should contain a picture that can be decoded
ROUNDING_SECONDS = 0.02  # the largest rounding error of time stamps of sound
BACK_SECONDS = 1.0  # the longest step back of time stamps of sound
# A video counts as damaged if it is shorter than declared by more than 0.5 s and by more than 5 %.
MISSING_SECONDS = 0.5
MISSING_FRACTION = 0.05
# The clock jumps at a step of more than JUMP_SECONDS that is more than JUMP_STEPS times as long as
# each of the NEAR_STEPS steps before and after it. So the pictures of a slide show are no jumps.
JUMP_SECONDS, JUMP_STEPS, NEAR_STEPS = 10.0, 50, 3
KEY_SECONDS = 10.0  # the longest time between two key frames of a broadcast
BROADCASTS = ("mpegts", "mpeg")  # formats whose clock may begin anew, for example in joined files

# (a, b, c, d) for each rotation in degrees, counter-clockwise: the pixel at (x, y) moves to
# (a x + c y, b x + d y).
TURNS = {0: (1, 0, 0, 1), 90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}


class Info(NamedTuple):
    """The properties that a video declares. The file may be wrong about any of them."""

    aspect: float  # the width of a pixel divided by the height of a pixel
    seconds: float | None  # the duration; None if the file declares none
    rate: float  # the average number of frames per second
    # The first time stamp of a picture or sound. It is subtracted from all time stamps.
    start_s: float
    sound: bool  # whether the file contains sound that can be decoded
    others: int  # number of further video streams, such as other programmes, which are not read
    stream: int  # the place of the stream that is read among all video streams, from 0


class Frame(NamedTuple):
    """A picture of a video at `time_s` seconds."""

    time_s: float
    small: np.ndarray  # uint8 [36, 64, 3], the stored picture, for the detection of cuts
    rgb: np.ndarray | None  # uint8 [H, W, 3], the upright picture; None if it is not sampled
    gap_s: float  # the end of the previous picture if the time jumps to `time_s`; else `time_s`


class Clock:
    """Turns the time stamps of frames into strictly increasing times of at least 0 seconds.

    A time stamp is bad if it is missing, not above the previous one, or more than 10 seconds beyond
    the declared end of the film. A frame with a bad time stamp follows one step after the previous
    frame.

    `step_s` is the step, the average duration of a frame in seconds. `latest_s` is the declared end
    in seconds, or None. Repaired time stamps and jumps are counted in `counts`. If `resets` is
    True, jumps of the time stamps, see `find_jumps`, are removed from the times.
    """

    def __init__(
        self, counts: DecodeCounts, step_s: float, latest_s: float | None, *, resets: bool = False
    ):
        self._counts, self.step, self._resets = counts, step_s, resets
        self.gap_s = 0.0  # see `Frame`
        self._latest = np.inf if latest_s is None else latest_s + 10.0
        self._shift = 0.0
        self._last: float | None = None

    def time(self, stamp_s: float | None, usual_s: float | None = None) -> float:
        """Returns the time of the next frame in seconds.

        `stamp_s` is the time stamp of the frame, or None. `usual_s` is the second value that
        `find_jumps` yields for the frame.
        """
        after = 0.0 if self._last is None else self._last + (usual_s or self.step)
        self.step = min(self.step, usual_s or self.step)
        time = after if stamp_s is None else stamp_s + self._shift
        bad = stamp_s is None or (self._last is not None and time <= self._last)
        if bad or time > self._latest:
            self._counts.repaired += 1
            self._shift += 0.0 if stamp_s is None else after - time
            time = after
        elif usual_s is not None:
            self._counts.jumps.append((after, time - after))
            if self._resets:
                self._shift += after - time
                time = after
        self.gap_s = time if usual_s is None else min(after, time)
        if self._last is None:  # the start that is subtracted from time stamps is rounded
            time = max(time, 0.0)
        self._last = time
        return time


def find_jumps(frames: "Iterable[VideoFrame]") -> "Iterator[tuple[VideoFrame, float | None]]":
    """Yields (frame, None), or (frame, seconds) if the time stamps jump before the frame.

    A jump is a step that is much longer than the 3 steps before and the 3 steps after it, see
    JUMP_SECONDS. `seconds` is the longest of these 6 steps.
    """
    steps = collections.deque([np.nan] * (2 * NEAR_STEPS + 1), 2 * NEAR_STEPS + 1)
    waiting, last_s = collections.deque[Any](), None
    for frame in itertools.chain(frames, [None] * NEAR_STEPS):
        stamp_s = frame and frame.time
        steps.append(np.nan if stamp_s is None or last_s is None else stamp_s - last_s)
        last_s = stamp_s
        waiting.append(frame)
        if len(waiting) > NEAR_STEPS:
            before, (step, *after) = [*steps][:NEAR_STEPS], [*steps][NEAR_STEPS:]
            near = [x for x in (*before, *after) if x > 0]
            usual = max(near, default=np.inf)
            jumps = step > max(JUMP_SECONDS, JUMP_STEPS * usual) and len(near) >= NEAR_STEPS
            yield waiting.popleft(), usual if jumps else None


class Video:
    """An open video, see `open_video`.

    It allows one call in all: `identify`, `frames`, `still` or `sound`.

    `counts` are the numbers of frames and errors. They are complete when all frames have been read.
    `tell()` returns the present position in the file in bytes, at any time.
    """

    def __init__(self, path: Path, file: io.FileIO, container: "InputContainer"):
        from av.video.reformatter import VideoReformatter

        self._path, self._container = path, container
        self.tell = file.tell
        self._stream = _find_video_stream(path, container)
        self._stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        self.info = _read_info(container, self._stream)
        _check_size(path, self._stream.codec_context, self.info.aspect)
        self.counts = DecodeCounts(frames=0, seconds=0.0)
        self._resets = container.format.name in BROADCASTS
        # Two reformatters, because each caches its conversion for a single size and format.
        self._shrinks, self._converts = VideoReformatter(), VideoReformatter()

    def identify(self) -> tuple[str, int]:
        """Returns the sha256 of the compressed pictures, and the EXIF orientation of the pictures.

        The packets of the video stream are digested one after another, and not decoded. So the
        sha256 stays equal if only the title, the sound or the container changes. The orientation
        turns the pictures upright. It is 1 if no picture can be decoded. Raises UserError if the
        file cannot be read to its end.
        """
        from av.error import FFmpegError

        sha256, frames, count = hashlib.sha256(), list[Any](), 0
        try:
            for packet in self._container.demux(self._stream):
                sha256.update(packet)
                count += packet.size > 0
                if not frames and count <= FIRST_PACKETS:
                    with contextlib.suppress(FFmpegError):
                        frames = packet.decode()
        except FFmpegError as error:
            raise UserError(f"'{self._path}' is damaged") from error
        if not count:
            raise UserError(f"'{self._path}' contains no pictures")
        return sha256.hexdigest(), _read_orientation(frames[0]) if frames else 1

    def frames(self, fps: float) -> Iterator[Frame]:
        """Yields all frames in order. Corrupt frames are skipped.

        The first frame at or after each multiple of 1 / `fps` seconds contains the picture in full
        size, `Frame.rgb`. All other frames contain only a small picture. Raises UserError if no
        frame can be decoded.
        """
        from av.error import FFmpegError

        counts, sample = self.counts, 0
        clock = Clock(counts, 1.0 / self.info.rate, self.info.seconds, resets=self._resets)
        for decoded, usual_s in find_jumps(self._decode(self._stream)):
            stamp = decoded.time
            time_s = clock.time(None if stamp is None else stamp - self.info.start_s, usual_s)
            # The tolerance is needed because time stamps are rounded to milliseconds.
            sampled = time_s * fps >= sample - 1e-3
            try:
                small = _resize(self._shrinks, decoded, SMALL_SHAPE[1], SMALL_SHAPE[0])
                rgb = self._convert(decoded) if sampled else None
            except (FFmpegError, ValueError):  # a pixel format that cannot be converted
                counts.refused += 1
                continue
            if rgb is not None:
                sample = int(time_s * fps + 1e-3) + 1
            counts.frames += 1
            # A frame lasts at least the usual step. Its declared end may be beyond the film.
            duration_s = (decoded.duration or 0) * float(decoded.time_base or 0)
            declared_s = min(time_s + duration_s, self.info.seconds or 0.0)
            counts.seconds = max(time_s + clock.step, declared_s)
            yield Frame(time_s, small, rgb, clock.gap_s)
        if not counts.frames:
            problem = f"'{self._path}' is damaged: no picture in it can be decoded"
            raise UserError(f"{problem}\ncopy the file again, or leave it out")
        if counts.jumps:  # the average rate contains the jumps
            self.info = self.info._replace(rate=1.0 / clock.step)
        declared = (self.info.seconds or 0.0) - self._resets * sum(by for _, by in counts.jumps)
        # Some programs write the time stamp of the end into Matroska files, not the duration.
        from_zero = self.info.start_s if "matroska" in self._container.format.name else 0.0
        missing = declared - counts.seconds - from_zero
        counts.damaged |= missing > max(MISSING_SECONDS, MISSING_FRACTION * declared)

    def still(self, seconds: float, jumps: Iterable[Jump] = ()) -> np.ndarray | None:
        """Returns the upright picture at `seconds`, uint8 [H, W, 3], or None if there is none.

        `jumps` are the jumps of the film's time stamps, see `MediaFile.jumps`. They are used only
        for MPEG-TS and MPEG files.
        """
        from av.error import FFmpegError

        wanted, last = seconds + self.info.start_s + 1e-3, None
        wanted += self._resets * sum(by for at, by in jumps if at <= seconds)
        # In a broadcast, FFmpeg finds a place near the time, but not the key frame before it.
        with contextlib.suppress(FFmpegError):  # a format without a seek is read from the start
            self._container.seek(max(0, int(1e6 * (wanted - self._resets * KEY_SECONDS))))
        for frame in self._decode(self._stream):
            if last is not None and frame.time is not None and frame.time > wanted:
                break
            last = frame
        return None if last is None else self._convert(last)

    def _convert(self, frame: "VideoFrame") -> np.ndarray:
        """Returns the picture of a frame, uint8 [H, W, 3] RGB, upright and with square pixels."""
        width = max(1, round(frame.width * self.info.aspect))
        picture = _resize(self._converts, frame, width, frame.height)
        return align.turn_picture(picture, _read_orientation(frame))

    def sound(self, jumps: Iterable[Jump] = ()) -> Iterator[tuple[float, np.ndarray]]:
        """Yields blocks (seconds, samples) of the first sound track.

        `seconds` is the time of the first sample. `samples` are float32 [n] at 16 kHz, clipped to
        -1 to 1. They are a weighted sum of all channels: 0.71 x (left + right) for stereo. There
        may be gaps between blocks. If a block begins more than a second before the end of the
        previous block, the rest of the sound is dropped. For `jumps`, see `still`.
        """
        for stream in _list_sound_streams(self._container)[:1]:
            stream.codec_context.thread_count = 1
            time_s, removed, left = 0.0, 0.0, [*jumps] if self._resets else []
            for block in self._resample(self._decode(stream)):
                # Small differences are ignored, because some formats round time stamps.
                if block.time is not None:
                    stamp_s = block.time - self.info.start_s - removed
                    while left and stamp_s > left[0][0] + left[0][1] / 2:
                        removed += left[0][1]
                        stamp_s -= left.pop(0)[1]
                    if stamp_s < time_s - BACK_SECONDS:  # later times are unknown
                        self.counts.damaged = True
                        return
                    time_s = stamp_s if abs(stamp_s - time_s) > ROUNDING_SECONDS else time_s
                samples = np.clip(np.nan_to_num(block.to_ndarray()[0]), -1, 1)
                yield time_s, samples
                time_s += len(samples) / SOUND_RATE

    def _resample(self, frames: "Iterable[AudioFrame]") -> "Iterator[AudioFrame]":
        """Yields sound with one channel of float32 samples at 16 kHz.

        Frames whose format cannot be converted are left out, and counted in `counts.refused`.
        """
        from av.audio.resampler import AudioResampler
        from av.error import FFmpegError

        # Broadcasts change the format between programmes.
        formats = itertools.groupby(
            frames, lambda frame: (frame.format.name, frame.layout.name, frame.sample_rate)
        )
        for _, group in formats:
            resampler = AudioResampler("flt", "mono", SOUND_RATE)
            for frame in itertools.chain(group, (None,)):
                try:
                    # For None, the resampler returns the last samples, and None if it keeps none.
                    yield from filter(None, resampler.resample(frame))
                except (FFmpegError, ValueError):  # a sound format that cannot be converted
                    self.counts.refused += 1

    def _decode(self, stream: "VideoStream | AudioStream") -> Iterator[Any]:
        """Yields the frames of a stream of pictures or sound.

        Frames that the decoder marks as corrupt are left out. If the file cannot be read any
        further, the iteration ends. `counts` counts the errors.
        """
        from av.error import FFmpegError

        packets = self._container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except FFmpegError:
                self.counts.damaged = True
                return
            try:
                frames: list[Any] = packet.decode()
            except MemoryError:
                raise
            except FFmpegError:
                self.counts.refused += 1
                continue
            for frame in frames:
                self.counts.corrupt += frame.is_corrupt
                if not frame.is_corrupt:
                    yield frame


def _read_orientation(frame: "VideoFrame") -> int:
    """Returns the EXIF orientation, 1 to 8, that turns a frame upright, by the film's metadata.

    An angle is rounded to a multiple of 90 degrees.
    """
    a, b, c, d = TURNS[round(frame.rotation / 90) * 90 % 360]
    # PyAV raises ValueError if it does not know the type of any entry, such as EXIF.
    with contextlib.suppress(ValueError):
        if (entry := frame.side_data.get("DISPLAYMATRIX")) is None:
            return 1
        a, b, _, c, d = np.frombuffer(bytes(entry), np.int32)[:5].tolist()
    swaps = abs(b) > abs(a)
    across, down = (c, b) if swaps else (a, d)
    return 1 + 4 * swaps + ((0, 1), (3, 2))[down < 0][across < 0]


@contextlib.contextmanager
def open_video(path: Path) -> Iterator[Video]:
    """Opens a video in a `with` block.

    Videos may be MP4, QuickTime, Matroska, WebM, AVI, MPEG, WMV or FLV.

    Raises:
      UserError: `path` is not a regular file, has an unknown format, contains no picture, or
        contains a picture that is too large; or a package is not installed.
    """
    with files.open_input(path) as file, _open_container(path, file) as container:
        yield Video(path, file, container)


def _open_container(path: Path, file: io.FileIO) -> "InputContainer":
    require_packages(f"'{path}', a video,", "av", extra="video")
    import av
    from av.error import FFmpegError

    # FFmpeg decodes some pictures while it opens a file, so the limit of pixels is set here, too.
    options = {"max_pixels": str(MOST_PIXELS)}
    lists = {"format_whitelist": ",".join(VIDEO_FORMATS), "protocol_whitelist": "none"}

    def seek(offset: int, whence: int) -> int:
        try:
            return file.seek(offset, whence)
        except (OSError, ValueError):  # a damaged file may name a place of 2^62 bytes
            return -errno.EINVAL  # an error of FFmpeg, not of the system

    # The name of the file is hidden, so that FFmpeg cannot guess the format from the name.
    nameless = types.SimpleNamespace(read=file.read, seek=seek, tell=file.tell)
    try:
        return av.open(
            nameless, "r", options=options, container_options=lists, buffer_size=READ_BYTES
        )
    except (FFmpegError, UnicodeDecodeError) as error:
        if not file.seek(0, io.SEEK_END):
            raise UserError(f"'{path}' is an empty file\ncopy the file again") from error
        reason = str(getattr(error, "strerror", None) or error or type(error).__name__)
        problem = f"'{path}' is damaged or has an unknown format: {reason[:100]}"
        file.seek(0)
        endings = media_files.FILMS | media_files.PHOTOS
        if path.suffix.lower() in endings or KNOWN_BEGIN.match(file.read(12)):
            raise UserError(
                f"{problem}\ncopy the file again. If it still cannot be read, convert it to MP4: "
                "ffmpeg -i FILE FILE.mp4"
            ) from error
        raise UserError(
            f"{problem}\n"
            "use MP4, MKV, WebM, MOV, AVI, MPEG, WMV, FLV, JPEG, PNG, WebP, BMP, TIFF, GIF, HEIC "
            "or AVIF\nconvert other formats to MP4: ffmpeg -i FILE FILE.mp4"
        ) from error


def _find_video_stream(path: Path, container: "InputContainer") -> "VideoStream":
    stream = next(iter(_list_video_streams(container)), None)
    if stream is None:
        raise UserError(f"'{path}' contains no pictures\ngive a video or a photo")
    if stream.codec_context is None:
        raise UserError(f"the video in '{path}' has an unknown encoding\nconvert it to H.264")
    stream.codec_context.thread_count = 1  # the cores are used by parallel processes
    return stream


def _list_video_streams(container: "InputContainer") -> "list[VideoStream]":
    """Returns the video streams, without streams that contain cover art or thumbnails.

    A stream that players show by default comes first.
    """
    from av.stream import Disposition

    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = (stream for stream in container.streams.video if not stream.disposition & covers)
    return sorted(streams, key=lambda stream: not stream.disposition & Disposition.default)


def _list_sound_streams(container: "InputContainer") -> "list[AudioStream]":
    """Returns the sound streams that can be decoded."""
    return [stream for stream in container.streams.audio if stream.codec_context is not None]


def _read_info(container: "InputContainer", stream: "VideoStream") -> Info:
    import av

    rate = float(stream.average_rate or stream.guessed_rate or 0)
    base = stream.time_base or Fraction(0)
    aspect = float(stream.sample_aspect_ratio or 1)
    seconds = (
        (float(stream.duration * base) if stream.duration else None)
        or _parse_duration(stream.metadata.get("DURATION", ""))
        or (container.duration or 0) / av.time_base
    )
    streams = _list_video_streams(container)
    return Info(
        aspect=aspect if LEAST_ASPECT <= aspect <= 1 / LEAST_ASPECT else 1.0,
        seconds=seconds if seconds > 0 else None,
        rate=rate if 0.01 < rate < 1000 else USUAL_RATE,
        start_s=(container.start_time or 0) / av.time_base,
        sound=bool(_list_sound_streams(container)),
        others=len(streams) - 1,
        stream=sum(other.index < stream.index for other in streams),
    )


def _parse_duration(text: str) -> float | None:
    """Returns the seconds of a text such as `00:01:02.500`, or None if the format is different."""
    match = re.fullmatch(r"(\d{1,4}):(\d\d):(\d\d(?:\.\d{1,9})?)", text)
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else None


def _check_size(path: Path, context: "VideoCodecContext", aspect: float) -> None:
    """Checks the size of the stored picture, before it is turned upright."""
    if context.width < 1 or context.height < 1:
        # FFmpeg reports no size above the limit, or if it cannot decode the first picture.
        raise UserError(
            f"'{path}' is damaged, or has more than {MOST_PIXELS:,} pixels\n"
            "copy the file again, or convert it to MP4 with fewer pixels"
        )
    check_pixels(path, round(context.width * max(1.0, aspect)), context.height)


def check_pixels(path: Path, width: int, height: int) -> None:
    """Raises UserError if a picture of `width` x `height` pixels is above the limit MOST_PIXELS."""
    if width * height > MOST_PIXELS:
        raise UserError(
            f"'{path}' has pictures of {width} x {height} pixels, more than the limit of "
            f"{MOST_PIXELS:,}\nconvert it to a smaller size"
        )


def _resize(
    reformatter: "VideoReformatter", frame: "VideoFrame", width: int, height: int
) -> np.ndarray:
    """Returns a frame in another size, as RGB uint8 [height, width, 3]."""
    from av.video.reformatter import Interpolation

    area = Interpolation.AREA
    # By default, PyAV starts up to 16 threads, but parallel processes use the cores.
    resized = reformatter.reformat(frame, width, height, "rgb24", interpolation=area, threads=1)
    return resized.to_ndarray()
