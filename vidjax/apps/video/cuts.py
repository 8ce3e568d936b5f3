"""Writes timelines and playlists of people.

A timeline of OpenTimelineIO (.otio, JSON) is for programs that edit films. It plays all stretches
of films that show the person, one after the other. Each stretch has the frame rate of its film. A
playlist (.m3u) plays the same stretches in VLC. In other players, it plays the whole films.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vidjax.apps.video.media import MediaFile, make_printable
from vidjax.apps.video.naming import Appearance, group_by_video
from vidjax.utils import files
from vidjax.utils.names import make_file_stems

USUAL_RATE = 25.0  # if the frame rate of a film is unknown


class Cut(NamedTuple):
    """A piece of a film that a timeline plays, from frame `begin` to frame `end` (exclusive)."""

    film: MediaFile
    begin: int
    end: int


def find_cuts(
    appearances: Iterable[Appearance], films: Iterable[MediaFile], padding_s: float
) -> dict[str, list[Cut]]:
    """Returns person -> the stretches of films that show the person.

    Each stretch is extended by `padding_s` seconds at both ends, but not beyond the ends of the
    film. Stretches that then touch are joined. Photos and people without a name are skipped.
    """
    cuts: dict[str, list[Cut]] = {}
    of_video = group_by_video(appearances)
    for film in films:
        rate, length = _get_rate(film), _count_frames(film)
        for appearance in of_video.get(film.video, ()):
            begin = max(0, round((appearance.start_s - padding_s) * rate))
            end = min(length, round((appearance.end_s + padding_s) * rate))
            if film.photo or appearance.probability is None or begin >= end:
                continue
            stretches = cuts.setdefault(str(appearance.identity), [])
            if stretches and stretches[-1].film is film and begin <= stretches[-1].end:
                stretches[-1] = stretches[-1]._replace(end=max(end, stretches[-1].end))
            else:
                stretches.append(Cut(film, begin, end))
    return cuts


def _get_rate(film: MediaFile) -> float:
    return film.rate or USUAL_RATE


def _count_frames(film: MediaFile) -> int:
    return int(film.seconds * _get_rate(film) + 0.1)  # times in .mkv files are rounded to ms


def write(
    folder: Path, appearances: Iterable[Appearance], films: Iterable[MediaFile], padding_s: float
) -> None:
    """Writes a timeline NAME.otio and a playlist NAME.m3u for each person into a folder.

    At both ends of each appearance, `padding_s` seconds are added.
    """
    cuts = find_cuts(appearances, films, padding_s)
    for stem, (person, own) in zip(make_file_stems(cuts), cuts.items(), strict=True):
        files.write_text(folder / f"{stem}.otio", files.to_json(to_timeline(person, own)))
        files.write_text(folder / f"{stem}.m3u", to_playlist(own))


def to_timeline(person: str, cuts: Sequence[Cut]) -> dict[str, Any]:
    """Returns a timeline of OpenTimelineIO as a JSON object, with the name of the person.

    The timeline plays the stretches `cuts` one after the other. It has a track of pictures and a
    track of sound.
    """
    tracks = [
        {"OTIO_SCHEMA": "Track.1", "kind": kind, "name": kind, "children": [*map(_to_clip, cuts)]}
        for kind in ("Video", "Audio")
    ]
    stack = {"OTIO_SCHEMA": "Stack.1", "name": "tracks", "children": tracks}
    return {"OTIO_SCHEMA": "Timeline.1", "name": make_printable(person), "tracks": stack}


def _to_clip(cut: Cut) -> dict[str, Any]:
    film, rate = cut.film, _get_rate(cut.film)

    def make_range(begin: int, end: int) -> dict[str, Any]:
        return {"OTIO_SCHEMA": "TimeRange.1"} | {
            name: {"OTIO_SCHEMA": "RationalTime.1", "rate": rate, "value": float(frames)}
            for name, frames in (("start_time", begin), ("duration", end - begin))
        }

    media = {
        "OTIO_SCHEMA": "ExternalReference.1",
        "target_url": film.path.as_uri(),
        "available_range": make_range(0, _count_frames(film)),
    }
    return {
        "OTIO_SCHEMA": "Clip.2",
        "name": make_printable(film.path.name),
        "source_range": make_range(cut.begin, cut.end),
        "active_media_reference_key": "DEFAULT_MEDIA",
        "media_references": {"DEFAULT_MEDIA": media},
    }


def to_playlist(cuts: Sequence[Cut]) -> str:
    """Returns the text of an .m3u playlist that plays the stretches `cuts`.

    Only VLC reads the times of the stretches. Other players play the whole films.
    """
    lines = ["#EXTM3U"]
    for film, begin, end in cuts:
        rate = _get_rate(film)
        lines += [f"#EXTINF:{round((end - begin) / rate)},{make_printable(film.path.name)}"]
        lines += [f"#EXTVLCOPT:start-time={begin / rate:.3f}"]
        lines += [f"#EXTVLCOPT:stop-time={end / rate:.3f}", film.path.as_uri()]
    return "\n".join(lines) + "\n"
