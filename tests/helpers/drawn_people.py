"""Films and photos of drawn people: squares of a colour each, and nets that know them."""

import numpy as np

from tests.helpers import made_nets

SIDE = made_nets.FACE
# A net that tells people apart by the colour of their faces.
EMBED = {
    "content": made_nets.embedder(weights=made_nets.colours()),
    "input": {"mean": [170.0] * 3},
}
COLOURS = {"Ada": (255, 255, 90), "Bob": (255, 90, 255), "Eve": (90, 255, 255)}


def picture(faces, brightness=20):
    """Returns a dark, striped picture with a square of a colour for each (name, left, top)."""
    drawn = np.full((96, 128, 3), 20, np.uint8)
    drawn[:: 5 + brightness % 7] = brightness
    for name, left, top in faces:
        drawn[top : top + SIDE, left : left + SIDE] = COLOURS[name]
    return drawn


def write_photo(path, *faces):
    path.parent.mkdir(parents=True, exist_ok=True)
    import av

    with av.open(str(path), "w", format="image2") as file:
        stream = file.add_stream("png", rate=1)
        rgb = picture(faces)
        stream.height, stream.width, stream.pix_fmt = *rgb.shape[:2], "rgb24"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        file.mux(stream.encode())


def write_film(path, *shots, fps=10):
    """Writes a film, .mkv without loss; each shot is (seconds, brightness, faces)."""
    import av

    with av.open(str(path), "w") as file:
        lossless = path.suffix == ".mkv"
        stream = file.add_stream("ffv1" if lossless else "mpeg4", rate=fps)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "bgr0" if lossless else "yuv420p"
        stream.bit_rate = 2_000_000
        for seconds, brightness, faces in shots:
            for number in range(round(seconds * fps)):
                moved = [(name, left + number // 2, top) for name, left, top in faces]
                rgb = picture(moved, brightness)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        file.mux(stream.encode())


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
