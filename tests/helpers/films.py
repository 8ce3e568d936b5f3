"""Functions that write films and photos of given pictures and sound with PyAV."""

import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from vidjax.apps.video import pictures

RATE = 16_000
FORMATS = {"ffv1": "bgr0", "png": "rgb24", "mjpeg": "yuvj420p"}  # of pixels; others are yuv420p
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
# Name -> content of files that are neither films nor photos. Some refer to other files.
NO_FILMS = {
    "empty.mp4": b"", "noise.mp4": np.random.default_rng(0).bytes(5000), "zeros.mp4": b"\0" * 5000,
    "concat.mp4": b"ffconcat version 1.0\nfile secret.mkv\n",
    "list.mp4": PLAYLIST.format("secret.mkv").encode(), "text.txt": b"notes\n",
    # An object of 2^62 bytes.
    "far.wmv": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + b"\x7f" * 40,
    "layers.psd": b"8BPS\0\1" + bytes(30),
    "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='secret.mkv'/></svg>",
}  # fmt: skip


def scene(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    """Returns a random picture of 6 x 8 one-coloured patches, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.uniform(0, 255, (2, 3)), axis=0)
    coarse = rng.uniform(low, high, (6, 8, 3)).repeat(-(-height // 6), 0).repeat(-(-width // 8), 1)
    return coarse[:height, :width].astype(np.uint8)


def write(
    path: Path, frames: Iterable[np.ndarray], codec: str = "libx264", fps: float = 25, *,
    stamps: Sequence[int] | None = None, rotation: int = 0, aspect: float = 1.0, held_ms: int = 0,
    sound: np.ndarray | None = None, rate: int = RATE, start_s: float = 0.0, broken: float = 0.0,
) -> None:  # fmt: skip
    """Writes pictures uint8 [H, W, 3] as a film. Without pictures, the film has only sound.

    `stamps` are the times of the pictures in milliseconds, by default from `fps`. `aspect` is the
    width of a pixel divided by its height. `held_ms` is the duration of the last picture. `sound`
    are samples [n], which begin at `start_s`. The first packets of sound, a share of `broken`, are
    damaged.
    """
    pictures = iter(frames)
    first, stream = next(pictures, None), None
    with av.open(str(path), "w") as container:
        if first is not None:
            stream = container.add_stream(codec, rate=Fraction(fps))
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width = first.shape[:2]
            stream.pix_fmt = FORMATS.get(codec, "yuv420p")
            if codec == "mpeg4":
                stream.bit_rate = 2_000_000
            if codec != "mpeg1video":  # which allows only a few rates
                stream.codec_context.time_base = Fraction(1, 1000)
            stream.time_base = Fraction(1, 1000)
            if aspect != 1:
                stream.codec_context.sample_aspect_ratio = Fraction(aspect)
            if rotation:
                stream.set_display_rotation(rotation)
        heard = [] if sound is None else _sound(container, path, sound, rate, start_s, broken)
        packets = []
        for number, picture in enumerate(() if first is None else chain([first], pictures)):
            container.mux(packets)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = stamps[number] if stamps else round(number * 1000 / fps)
            frame.time_base = Fraction(1, 1000)
            packets = stream.encode(frame) if stream else []
        packets += stream.encode(None) if stream else []
        if held_ms:
            packets[-1].duration = held_ms
        container.mux([*packets, *heard])


def remux(
    path: Path, made: Path, *, title: str = "", rotation: int | None = None, faststart: bool = False
) -> None:
    """Copies the compressed pictures of the film `path` into the new film `made`."""
    options = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path)) as film, av.open(str(made), "w", options=options) as copy:
        stream = copy.add_stream_from_template(film.streams.video[0])
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if title:
            copy.metadata["title"] = title
        for packet in film.demux(video=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)


def double(path: Path, made: Path, *, cover: bool) -> None:
    """Writes the pictures of the film `path` twice, as two streams, into the film `made`."""
    with av.open(str(path)) as one, av.open(str(path)) as other, av.open(str(made), "w") as both:
        sources = (one, other)
        streams = [both.add_stream_from_template(source.streams.video[0]) for source in sources]
        if cover:
            still = both.add_stream("mjpeg")  # a cover picture
            assert isinstance(still, av.VideoStream)
            still.width, still.height, still.pix_fmt = 160, 120, FORMATS["mjpeg"]
            still.disposition = Disposition.attached_pic
            packet = av.Packet(photo(scene(0), "mjpeg"))
            packet.stream = still
            both.mux(packet)
        for source, stream in zip(sources, streams, strict=True):
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    both.mux(packet)


def _sound(container, path, samples, rate, start_s, broken):
    lossless = path.suffix in (".mkv", ".mp4")
    stream = container.add_stream("alac" if lossless else "aac", rate=rate, layout="mono")
    stream.time_base = Fraction(1, rate)
    packets = []
    whole = (np.clip(samples, -1, 1) * 32767).astype(np.int16)
    for start in range(0, len(whole), 1024):
        frame = av.AudioFrame.from_ndarray(whole[None, start : start + 1024], "s16p", "mono")
        frame.rate, frame.pts = rate, round(start_s * rate) + start
        frame.time_base = Fraction(1, rate)
        packets += stream.encode(frame)
    packets += stream.encode(None)
    for number, old in enumerate(packets[: round(broken * len(packets))]):
        bad = packets[number] = av.Packet(bytes(range(200)))
        bad.pts, bad.dts, bad.time_base, bad.stream = old.pts, old.dts, old.time_base, stream
    return packets


def photo(picture: np.ndarray, codec: str, orientation: int = 1) -> bytes:
    """Returns the bytes of a photo. The EXIF `orientation` is only written into JPEG (mjpeg)."""
    context = av.VideoCodecContext.create(codec, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.height, context.width = picture.shape[:2]
    formats = {"mjpeg": "yuvj444p", "bmp": "bgr24", "libwebp": "yuv420p"}
    context.pix_fmt = formats.get(codec, "rgb24")
    context.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    colours = "JPEG" if codec == "mjpeg" else None
    frame = frame.reformat(format=context.pix_fmt, dst_color_range=colours)
    data = b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
    if codec != "mjpeg":
        return data
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"
    exif += struct.pack(">HHI", orientation, 0, 0)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


def read_photo(path: Path) -> np.ndarray:
    """Returns the picture of a photo, uint8 [H, W, 3], as `vidjax who` reads it."""
    rgb = pictures.read_photo(path)
    assert rgb is not None
    return rgb
