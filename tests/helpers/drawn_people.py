"""Films and photos of drawn people, and nets that tell these by the colours of their faces."""

from fractions import Fraction

import numpy as np

from tests.helpers import made_nets

SIDE = made_nets.FACE
# A net that tells people apart by the colour of their faces.
EMBED = {
    "content": made_nets.embedder(weights=made_nets.colours()),
    "input": {"mean": [170.0] * 3},
}
COLOURS = {"Ada": (255, 255, 90), "Bob": (255, 90, 255), "Eve": (90, 255, 255)}


def picture(faces, brightness=20, size=(96, 128)):
    """Returns a dark, striped picture with a square of a colour for each (name, left, top)."""
    drawn = np.full((*size, 3), 20, np.uint8)
    drawn[:: 5 + brightness % 7] = brightness
    for name, left, top in faces:
        drawn[top : top + SIDE, left : left + SIDE] = COLOURS[name]
    return drawn


def write_photo(path, *faces, size=(96, 128), dim=False):
    """Writes a photo; the faces of a `dim` one hardly differ from what is around them."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    context = av.VideoCodecContext.create("png", "w")
    rgb = picture(faces, size=size)
    if dim:
        around = np.array(COLOURS[faces[0][0]]) // 3 * 2 * 0.9
        rgb = np.where(rgb.max(-1, keepdims=True) < 21, around, rgb // 3 * 2).astype(np.uint8)
    context.height, context.width, context.pix_fmt = *size, "rgb24"
    context.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
    path.write_bytes(b"".join(map(bytes, [*context.encode(frame), *context.encode(None)])))


def write_film(
    path, *shots, fps=10, codec=None, sound=None, start_s=0.0, broken=0.0, size=(96, 128)
):
    """Writes a film, .mkv without loss; each shot is (seconds, brightness, faces).

    `sound` are samples of 16 kHz from `start_s` on; `broken` is the part of its packets, from the
    first one on, that are no sound.
    """
    import av

    codec = codec or ("ffv1" if path.suffix == ".mkv" else "mpeg4")
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = size
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.bit_rate = 2_000_000
        packets = [] if sound is None else sound_packets(file, sound, start_s, broken)
        for seconds, brightness, faces in shots:
            for number in range(round(seconds * fps)):
                moved = [(name, left + number // 2, top) for name, left, top in faces]
                rgb = picture(moved, brightness, size)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        for packet in [*stream.encode(), *packets]:
            file.mux(packet)


def sound_packets(file, samples, start_s, broken):
    """Returns the packets of a new stream of sound, float [n] of 16 kHz."""
    import av

    stream = file.add_stream("alac", rate=16_000, layout="mono")
    packets = []
    for at in range(0, len(samples), 4096):
        whole = (np.clip(samples[None, at : at + 4096], -1, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(whole, "s16p", "mono")
        frame.rate, frame.pts = 16_000, round(start_s * 16_000) + at
        frame.time_base = Fraction(1, 16_000)
        packets += stream.encode(frame)
    packets += stream.encode(None)
    for number in range(round(broken * len(packets))):
        old = packets[number]
        bad = packets[number] = av.Packet(bytes(range(200)))
        bad.pts, bad.dts, bad.time_base, bad.stream = old.pts, old.dts, old.time_base, stream
    return packets


def tone(hertz, seconds):
    """Returns a tone of 16 kHz, which the drawn people's nets take for speech."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * 16_000)) / 16_000)


def write_models(folder):
    """Writes nets that find the drawn faces and tell them apart; returns the folder."""
    folder.mkdir()
    made_nets.write(folder, "find", "face_detector")
    back_end = {
        "centre": [0.0] * made_nets.WIDTH, "same": [0.95, 0.05], "different": [-0.4, 0.2],
        "pairs": [10, 10], "data": "drawn",
    }  # fmt: skip
    made_nets.write(folder, "embed", back_end=back_end, **EMBED)
    return folder


def write_voices(folder):
    """Adds nets that take loud sound for speech and tell tones apart; returns the folder."""
    made_nets.write(folder, "speech", "voice_activity", made_nets.loudness())
    back_end = {
        "centre": [0.0] * made_nets.WIDTH, "same": [0.95, 0.05], "different": [-0.1, 0.3],
        "pairs": [10, 10], "data": "tones",
    }  # fmt: skip
    made_nets.write(folder, "voice", "voice_embedder", back_end=back_end)
    return folder


def write_party(path):
    """Writes a film of three shots with four faces."""
    write_film(
        path,
        (2, 20, [("Ada", 20, 30)]),
        (2, 60, [("Eve", 80, 50)]),
        (2, 35, [("Bob", 10, 60), ("Ada", 90, 20)]),
    )
    return path
