"""Cut lists: where films show a person, as programs for editing read it.

A list is a .edl file of the format CMX 3600: an event for each stretch of a film, picture and
sound. It has one rate of frames and MOST_EVENTS events, so a person may have several lists. Frames
of a film are counted from its begin, and none is dropped.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vidjax.apps.video.appearances import Appearance, by_video
from vidjax.apps.video.features_folder import Film, printable
from vidjax.data.untrusted.names import file_stems
from vidjax.utils import files

MOST_EVENTS = 999
RATES = (24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 48.0, 50.0, 60000 / 1001, 60.0)
USUAL_RATE = 25.0
FORBIDDEN = re.compile(r'[/\\:*?"<>|]|^\.|[. ]$')  # in names of files, by some system
TITLE_LETTERS = 60  # of a name


class Cut(NamedTuple):
    """A stretch of a film, from a frame to the frame `end` after its last one."""

    film: Film
    begin: int
    end: int


def find(
    found: Iterable[Appearance], films: Iterable[Film], padding_s: float
) -> dict[tuple[str, float], list[Cut]]:
    """Returns (person, frames a second) -> the stretches of films that show the person.

    They have `padding_s` more seconds at both ends, as far as the film goes. Of one film they do
    not touch. The rate is the one of RATES nearest to the film's. Photos have none.
    """
    cuts: dict[tuple[str, float], list[Cut]] = {}
    of_video = by_video(found)
    for film in films:
        rate = min(RATES, key=lambda known: abs(known - (film.rate or USUAL_RATE)))
        length = int(film.seconds * rate + 1e-3)
        for one in of_video.get(film.video, ()):
            begin = max(0, round((one.start_s - padding_s) * rate))
            end = min(length, round((one.end_s + padding_s) * rate))
            if film.photo or one.probability is None or begin >= end:
                continue
            own = cuts.setdefault((str(one.identity), rate), [])
            if own and own[-1].film is film and begin <= own[-1].end:
                own[-1] = own[-1]._replace(end=max(end, own[-1].end))
            else:
                own.append(Cut(film, begin, end))
    return cuts


def write(
    folder: Path, found: Iterable[Appearance], films: Iterable[Film], padding_s: float
) -> None:
    """Writes the lists of all people into a folder: NAME.edl.

    Titles tell the rate; names, too, of a person who has films of several rates.
    """
    lists = find(found, films, padding_s)
    rates = Counter(person for person, _ in lists)
    written: list[tuple[str, str]] = []
    for (person, rate), cuts in lists.items():
        of_rate = f" {rate:.5g} fps"
        title, name = person[:TITLE_LETTERS] + of_rate, person + of_rate * (rates[person] > 1)
        for part in range(0, len(cuts), MOST_EVENTS):
            label = f"{name} part {part // MOST_EVENTS + 1}" if part else name
            written.append((label, to_edl(title, rate, cuts[part : part + MOST_EVENTS])))
    stems = file_stems(FORBIDDEN.sub("_", label) for label, _ in written)
    for stem, (_, text) in zip(stems, written, strict=True):
        files.write_text(folder / f"{stem}.edl", text)


def to_edl(title: str, rate: float, cuts: Sequence[Cut]) -> str:
    """Returns a list of cuts, which follow one another without a gap."""
    lines, at = [f"TITLE: {title}", "FCM: NON-DROP FRAME"], 0
    for number, (film, begin, end) in enumerate(cuts, 1):
        frames = (begin, end, at, at + end - begin)
        times = " ".join(_timecode(frame, round(rate)) for frame in frames)
        path, at = film.source.path, frames[-1]
        lines += ["", f"{number:03}  AX       AA/V  C        {times}"]
        lines += [f"* FROM CLIP NAME: {printable(path.name)}"]
        lines += [f"* SOURCE FILE: {printable(str(path))}"]
    return "\n".join(lines) + "\n"


def _timecode(frame: int, base: int) -> str:
    """Returns the hours, minutes, seconds and frames of a frame, `base` of them a second."""
    seconds, frames = divmod(frame, base)
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:02}:{minute:02}:{second:02}:{frames:02}"
