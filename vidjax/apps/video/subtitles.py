"""Writes appearances of people as tables and subtitles, and times as texts.

A .vtt (WebVTT) or .srt (SubRip) file contains the subtitles of one video. A .rttm file, the format
of speaker diarisation, contains the appearances in all videos. Each line has the video, the start
and the duration in seconds, and the person.
"""

import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vidjax.apps.video.media import MediaFile
from vidjax.apps.video.naming import Appearance
from vidjax.utils import files, tables
from vidjax.utils.errors import UserError
from vidjax.utils.messages import format_time
from vidjax.utils.names import IGNORED, escape

SUBTITLES = (".vtt", ".srt")

FORMATS = (*SUBTITLES, ".rttm")

# Characters that players read as markup. SubRip has no escapes, so similar characters replace them.
MARKUP = {
    ".vtt": {"&": "&amp;", "<": "&lt;", "-->": "--&gt;"},
    ".srt": {"<": "\u2039", ">": "\u203a", "{": "(", "}": ")"},
}

COLUMNS = {  # name of a column -> type in Apache Arrow
    "video": "string", "start": "float64", "end": "float64", "identity": "string",
    "probability": "float64", "clips": "string", "evidence": "string",
    "box": "string", "box_at": "float64", "path": "string", "date": "string",
}  # fmt: skip


def write(path: Path, appearances: Sequence[Appearance], films: Iterable[MediaFile]) -> None:
    """Writes appearances to a new file in the format of its ending, such as .tsv, .vtt or .rttm."""
    if path.suffix in FORMATS:
        is_rttm = path.suffix == ".rttm"
        text = to_rttm(appearances) if is_rttm else to_subtitles(appearances, path.suffix)
        files.write_bytes(path, text.encode(), replace=False)
    else:
        described = {film.video: _describe_file(film) for film in films}
        objects = [
            {name.removesuffix("_s"): value for name, value in x._asdict().items()}
            | {"start": round(x.start_s, 3), "end": round(x.end_s, 3)}
            | {"probability": x.probability and round(x.probability, 4), **described[x.video]}
            for x in appearances
        ]
        tables.write(path, COLUMNS, map(_make_row, objects), objects)


def _describe_file(film: MediaFile) -> dict[str, str]:
    """Returns the cells `path` and `date` of a film. The date is the last change (UTC)."""
    date = datetime.fromtimestamp(film.source.mtime_ns // 10**9, UTC)
    path = os.fsencode(film.path).decode(errors="replace")
    return {"path": path, "date": date.strftime("%Y-%m-%dT%H:%M:%SZ")}


def _make_row(values: Mapping[str, Any]) -> tuple[object, ...]:
    """Returns the cells of a row in the table of appearances, in the order of COLUMNS.

    `values` is name of a column -> value. If a value is a tuple, its items are joined by blanks.
    """
    cells = [{**values, "identity": values["identity"] or IGNORED}[name] for name in COLUMNS]
    return tuple(" ".join(map(str, x)) if isinstance(x, tuple) else x for x in cells)


def to_subtitles(appearances: Sequence[Appearance], ending: str) -> str:
    """Returns the text of a .vtt or .srt file with the names of the known people in a video.

    Each name is a line. Subtitles never overlap in time, because many players show only one.
    `ending` is ".vtt" or ".srt". Raises UserError if the appearances are in several videos.
    """
    if len(videos := {appearance.video for appearance in appearances}) > 1:
        raise UserError(
            f"subtitles can show only one video, not {len(videos)}: "
            f"{', '.join(sorted(videos)[:3])}\nchoose the features of one video, "
            "--input=FOLDER/VIDEO.npz, or write the times of all videos: --out=names.rttm"
        )
    blocks = ["WEBVTT\n"] if ending == ".vtt" else []
    for number, (start, end, names) in enumerate(_make_cues(appearances), 1):
        times = f"{format_time(start)} --> {format_time(end)}"
        lines = [times] if ending == ".vtt" else [str(number), times.replace(".", ",")]
        for name in names:
            for mark, replacement in MARKUP[ending].items():
                name = name.replace(mark, replacement)
            lines.append(name)
        blocks.append("".join(f"{line}\n" for line in lines))
    return "\n".join(blocks)


def _make_cues(appearances: Iterable[Appearance]) -> Iterator[tuple[float, float, list[str]]]:
    """Yields (start, end, sorted names) of each period in which the same known people appear."""
    changes: dict[float, list[tuple[str, int]]] = {}
    for appearance in appearances:
        if appearance.probability is not None:
            name = f"{appearance.identity}{appearance.mark}"
            for seconds, change in ((appearance.start_s, 1), (appearance.end_s, -1)):
                changes.setdefault(round(seconds, 3), []).append((name, change))
    seen = Counter[str]()
    for begin, end in itertools.pairwise(sorted(changes)):
        for name, change in changes[begin]:
            seen[name] += change
        seen = +seen  # drops people who are no longer seen
        if seen:
            yield begin, end, sorted(seen)


def to_rttm(appearances: Iterable[Appearance]) -> str:
    """Returns the text of a .rttm file with a line for each appearance of a person.

    Ignored people and photos are left out. Blanks in names become `_`. If two names would be
    equal with `_`, their blanks become `%20`. The text `%20` in a name becomes `%2520`.
    """
    appearances = [x for x in appearances if x.identity is not None and x.end_s > x.start_s]
    words = _make_words({text for x in appearances for text in (x.video, str(x.identity))})
    return "".join(
        f"SPEAKER {words[x.video]} 1 {x.start_s:.3f} {x.end_s - x.start_s:.3f} <NA> <NA> "
        f"{words[str(x.identity)]} <NA> <NA>\n"
        for x in appearances
    )


def _make_words(texts: Collection[str]) -> dict[str, str]:
    """Replaces blanks in texts for RTTM. Returns text -> word; different texts stay different."""
    words = {text: "_".join(map(escape, text.split())) for text in texts}
    count = Counter(words.values())
    return {text: word if count[word] == 1 else escape(text) for text, word in words.items()}


def format_span(begin: float, end: float) -> str:
    """Returns a period as text: 3:12–3:15, or if both ends are in one second, 3:12.1–3:12.4."""
    times = [format_time(seconds, short=True) for seconds in (begin, end)]
    if times[0] == times[1]:
        times = [format_tenths(seconds) for seconds in (begin, end)]
    return "\u2013".join(dict.fromkeys(times))


def format_tenths(seconds: float) -> str:
    """Returns a time as text with tenths of a second, such as 3:12.4."""
    count = round(10 * seconds)
    return f"{format_time(count // 10, short=True)}.{count % 10}"
