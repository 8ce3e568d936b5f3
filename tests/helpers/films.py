"""Made films: pictures of noise, heads and what they do, written by PyAV as files of every kind."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vidjax.extract import decode


def scene(seed: int, height: int = 120, width: int = 160, bright: float = 1.0) -> np.ndarray:
    """Returns a picture of soft patches in the colours of a room, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.uniform(0, 255, (2, 3)), axis=0)
    coarse = rng.uniform(low, high, (6, 8, 3)).repeat(-(-height // 6), 0).repeat(-(-width // 8), 1)
    return (coarse[:height, :width] * bright).astype(np.uint8)


def write(
    path: Path | io.BytesIO,
    frames: Sequence[np.ndarray],
    codec: str = "libx264",
    fps: float = 25,
    *,
    stamps: Sequence[int] | None = None,
    rotation: int = 0,
    aspect: float = 1.0,
    held_ms: int = 0,
    kind: str | None = None,
    options: dict[str, str] | None = None,
) -> None:
    """Writes pictures uint8 [H, W, 3] as a film; `stamps` are times in milliseconds.

    `aspect` is the width of a pixel by its height; the last picture lasts `held_ms` if above 0.
    """
    target = str(path) if isinstance(path, Path) else path
    with av.open(target, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = {"ffv1": "bgr0", "png": "rgb24", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        if codec != "mpeg1video":  # which knows a few rates alone
            stream.codec_context.time_base = Fraction(1, 1000)
        stream.time_base = Fraction(1, 1000)
        if aspect != 1:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if rotation:
            stream.set_display_rotation(rotation)
        packets = []
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = stamps[number] if stamps else round(number * 1000 / fps)
            frame.time_base = Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if held_ms:
            packets[-1].duration = held_ms
        container.mux(packets)


def write_sound(
    path: Path,
    samples: np.ndarray,
    *,
    rate: int = 16_000,
    start_s: float = 0.0,
    pictures: Sequence[np.ndarray] = (),
) -> None:
    """Writes sound, float32 [n], that begins at `start_s`, beside pictures or alone."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=rate)
        assert isinstance(sound, av.AudioStream)
        sound.layout = "mono"
        sound.time_base = Fraction(1, rate)
        packets = []
        if len(pictures):
            stream = container.add_stream("libx264", rate=25)
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width = pictures[0].shape[:2]
            frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures]
            packets += [packet for frame in [*frames, None] for packet in stream.encode(frame)]
        whole = (np.clip(samples, -1, 1) * 32767).astype(np.int16)
        for start in range(0, len(whole), 1024):
            frame = av.AudioFrame.from_ndarray(whole[None, start : start + 1024], "s16", "mono")
            frame.rate, frame.pts = rate, round(start_s * rate) + start
            frame.time_base = Fraction(1, rate)
            packets += sound.encode(frame)
        for packet in [*packets, *sound.encode(None)]:
            container.mux(packet)


def photo(picture: np.ndarray, codec: str, orientation: int = 1) -> bytes:
    """Returns a picture as the bytes of a photo; JPEG gets the orientation as EXIF."""
    context = av.VideoCodecContext.create(codec, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.height, context.width = picture.shape[:2]
    context.pix_fmt = {"mjpeg": "yuvj444p", "bmp": "bgr24", "libwebp": "yuv420p"}.get(
        codec, "rgb24"
    )
    context.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    frame = frame.reformat(
        format=context.pix_fmt, dst_color_range="JPEG" if codec == "mjpeg" else None
    )
    data = b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
    if codec != "mjpeg":
        return data
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(
        ">HHI", orientation, 0, 0
    )
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


def read_photo(path: Path) -> np.ndarray:
    """Returns the picture of a photo, upright, uint8 [H, W, 3]."""
    with decode.open_video(path) as video:
        (frame,) = video.frames(1.0)
    assert video.info.photo and frame.rgb is not None
    return frame.rgb


def resized(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    """Returns a picture uint8 [H, W, 3] as [height, width, 3]; each pixel is a mean of an area."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    return frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray()
