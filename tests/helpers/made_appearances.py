"""Films as `vidjax extract` describes them, and appearances of people in films."""

from urllib.parse import quote

from vidjax.apps.video.media import FaceTrack, FileStamp, MediaFile
from vidjax.apps.video.naming import Appearance


def film(name="a.mp4", *, seconds=100.0, rate: float | None = None, photo=False, **times):
    """Returns a film with a track for each argument CLIP=(begin, end), in seconds."""
    tracks = [FaceTrack(clip=x, shot=0, start_s=a, end_s=b, seen=2) for x, (a, b) in times.items()]
    source = FileStamp(address=f"/films/{quote(name)}", size=1, mtime_ns=0, inode=1)
    facts = {"photo": photo, "seconds": seconds, "rate": rate, "sha256": "0" * 64, "frames": 9}
    return MediaFile(video=name, source=source, shots=[], tracks=tracks, **facts)


def appearance(
    begin, end, name: str | None = "Ada", probability: float | None = 0.9, *, video="a.mp4",
    clip="c",
):  # fmt: skip
    """Returns an appearance of a person from `begin` to `end` seconds."""
    return Appearance(video, begin, end, name, probability, (clip,))
