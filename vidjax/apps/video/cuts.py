"""Writes cut lists (edit decision lists) of people, for programs that edit films.

A cut list is a .edl file in the format CMX 3600. Each event of the list is a stretch of a film that
shows the person, with picture and sound. A person may have several lists, because a list has a
single frame rate and at most 999 events. Time codes count all frames from the start of the film
(non-drop-frame).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vidjax.apps.features_folder import MediaFile, make_printable
from vidjax.apps.video.naming import Appearance, group_by_video
from vidjax.utils import files
from vidjax.utils.names import make_file_stems

MOST_EVENTS = 999
RATES = (24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 48.0, 50.0, 60000 / 1001, 60.0)
USUAL_RATE = 25.0  # if the frame rate of a film is unknown
TITLE_LETTERS = 60  # the largest number of letters of a person's name in a title


class Cut(NamedTuple):
    """A stretch of a film from frame `begin` to frame `end` (exclusive)."""

    film: MediaFile
    begin: int
    end: int


def find_cuts(
    appearances: Iterable[Appearance], films: Iterable[MediaFile], padding_s: float
) -> dict[tuple[str, float], list[Cut]]:
    """Returns (person, frame rate) -> the stretches of films that show the person.

    Each stretch is extended by `padding_s` seconds at both ends, but not beyond the ends of the
    film. Stretches that then touch are joined. Frame rates are rounded to the nearest usual rate,
    such as 25 or 29.97. Photos and people without a name are skipped.
    """
    cuts: dict[tuple[str, float], list[Cut]] = {}
    of_video = group_by_video(appearances)
    for film in films:
        rate = min(RATES, key=lambda rate: abs(rate - (film.rate or USUAL_RATE)))
        length = int(film.seconds * rate + 1e-3)
        for appearance in of_video.get(film.video, ()):
            begin = max(0, round((appearance.start_s - padding_s) * rate))
            end = min(length, round((appearance.end_s + padding_s) * rate))
            if film.photo or appearance.probability is None or begin >= end:
                continue
            stretches = cuts.setdefault((str(appearance.identity), rate), [])
            if stretches and stretches[-1].film is film and begin <= stretches[-1].end:
                stretches[-1] = stretches[-1]._replace(end=max(end, stretches[-1].end))
            else:
                stretches.append(Cut(film, begin, end))
    return cuts


def write(
    folder: Path, appearances: Iterable[Appearance], films: Iterable[MediaFile], padding_s: float
) -> None:
    """Writes the cut lists of all people into a folder, as NAME.edl.

    A list contains the cuts of `find_cuts` for one frame rate. If the films of a person have
    several rates, the names of the files also contain the rate.
    """
    lists = find_cuts(appearances, films, padding_s)
    rates = Counter(person for person, _ in lists)
    written: list[tuple[str, str]] = []
    for (person, rate), cuts in lists.items():
        of_rate = f" {rate:.5g} fps"
        title, name = person[:TITLE_LETTERS] + of_rate, person + of_rate * (rates[person] > 1)
        for part in range(0, len(cuts), MOST_EVENTS):
            label = f"{name} part {part // MOST_EVENTS + 1}" if part else name
            written.append((label, to_edl(title, rate, cuts[part : part + MOST_EVENTS])))
    stems = make_file_stems(label for label, _ in written)
    for stem, (_, text) in zip(stems, written, strict=True):
        files.write_text(folder / f"{stem}.edl", text)


def to_edl(title: str, rate: float, cuts: Sequence[Cut]) -> str:
    """Returns the text of an .edl file that plays the cuts one after the other, without gaps."""
    lines, at = [f"TITLE: {title}", "FCM: NON-DROP FRAME"], 0
    for number, (film, begin, end) in enumerate(cuts, 1):
        frames = (begin, end, at, at + end - begin)
        times = " ".join(_format_timecode(frame, round(rate)) for frame in frames)
        path, at = film.source.path, frames[-1]
        lines += ["", f"{number:03}  AX       AA/V  C        {times}"]
        lines += [f"* FROM CLIP NAME: {make_printable(path.name)}"]
        lines += [f"* SOURCE FILE: {make_printable(str(path))}"]
    return "\n".join(lines) + "\n"


def _format_timecode(frame: int, base: int) -> str:
    """Returns the time code HH:MM:SS:FF of a frame number at `base` frames per second."""
    seconds, frames = divmod(frame, base)
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:02}:{minute:02}:{second:02}:{frames:02}"
