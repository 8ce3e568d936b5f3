"""Writes the tables, the page, the subtitles and the timelines of `vidjax who`."""

import base64
import functools
import itertools
import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_to_bytes

from vidjax.apps import features_folder
from vidjax.apps.features_folder import MediaFile
from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.said import FEATURES
from vidjax.apps.video import cuts, names_page, naming, subtitles
from vidjax.utils import files, messages
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import fold, make_file_stems

if TYPE_CHECKING:
    from vidjax.apps.video.decision import Decision

PAGE, SUBTITLES, CUTS = "names.html", "subtitles", "cuts"
PADDING_SECONDS = 1.0  # before and after each appearance in timelines
TABLES = ("names.tsv", "names.jsonl")
UNKNOWN = "unknown.tsv"
MIN_RATE = 2  # frames per second below which a film gets a warning


def write(out: Path, decision: "Decision", padding: float = PADDING_SECONDS) -> None:
    """Writes the tables, page, subtitles and timelines into the folder of results `out`.

    In timelines, `padding` seconds are added before and after each appearance.
    """
    here = out.resolve()
    place_of = {
        film.video: quote(os.fsencode(os.path.relpath(film.source.path, here)))
        for film in decision.films
    }  # fmt: skip

    def address(film: MediaFile, seconds: float) -> str:
        return place_of[film.video] + ("" if film.photo else f"#t={seconds:.1f}")

    # The old page stays until the new page replaces it.
    files.write_text(out / PAGE, render_page(out, decision, address))
    files.hide(out / PAGE)
    remove_results(out, page=False)
    (out / UNKNOWN).unlink(missing_ok=True)
    for name in TABLES:
        subtitles.write(out / name, decision.appearances, decision.films)
    places_of = naming.list_places(decision.films)
    answers_lib.write_groups(out / UNKNOWN, decision.unknown, places_of)
    for name in (UNKNOWN, *TABLES):
        files.hide(out / name)
    by_video = naming.group_by_video(decision.appearances)
    films = [film for film in decision.films if not film.photo]
    for film, place in zip(films, _place_subtitles(films), strict=True):
        for folder in reversed(place.parents):
            (out / SUBTITLES / folder).mkdir(mode=0o700, exist_ok=True)
        for ending in subtitles.SUBTITLES:
            text = subtitles.to_subtitles(by_video.get(film.video, []), ending)
            path = out / SUBTITLES / f"{place}{ending}"
            files.write_bytes(path, text.encode(), sync=False)
    (out / CUTS).mkdir(mode=0o700, exist_ok=True)
    cuts.write(out / CUTS, decision.appearances, decision.films, padding)


def _place_subtitles(films: Sequence[MediaFile]) -> list[PurePath]:
    """Returns where the subtitles of each film are written: a relative path without .vtt or .srt.

    Players look for subtitles with the name of the film. If several films have the same name, their
    subtitles are in folders that are named after the folders of the films: `2019/IMG_0001`. If two
    films in a folder differ only in the extension, it is part of the result: `a.mp4` and `a.mkv`.
    """
    paths = [PurePath(features_folder.make_printable(str(film.source.path))) for film in films]
    keys = [tuple(map(fold, path.with_suffix("").parts)) for path in paths]
    counts, namesakes = Counter(keys), group_by_key((key[-1], key) for key in {*keys})
    in_folder: dict[PurePath, dict[PurePath, str]] = {}
    for path, key in zip(paths, keys, strict=True):
        others = {*namesakes[key[-1]]} - {key}
        depth = next(n for n in itertools.count(1) if key[-n:] not in {x[-n:] for x in others})
        folder = PurePath(*(make_file_stems([part])[0] for part in path.parts[-depth:-1]))
        in_folder.setdefault(folder, {})[path] = path.name if counts[key] > 1 else path.stem
    places = {
        path: folder / stem
        for folder, stems in in_folder.items()
        for path, stem in zip(stems, make_file_stems(stems.values()), strict=True)
    }
    return [places[path] for path in paths]


def render_page(
    out: Path,
    decision: "Decision",
    address: Callable[[MediaFile, float], str],
    forms: names_page.Forms | None = None,
) -> str:
    """Returns an HTML page that shows who appears when in each film.

    `out` is the folder of results. `decision` has the people of all films. `address(film, seconds)`
    returns the URL of a film at a time. If `forms` is given, the page has forms with which a user
    corrects names.
    """
    people: dict[str, list[names_page.Picture]] = {}
    places = features_folder.locate_people(out)
    for name, clips in sorted(decision.people.items()):
        faces = filter(None, map(features_folder.PhotoFace.of, sorted(clips)))
        pictures = (
            _locate_picture(out, places[x.folder], x.clip) for x in faces if x.folder in places
        )
        people[name] = [(picture, name, picture, "") for picture in pictures if picture]
    locate = functools.partial(_locate_picture, out, out / FEATURES)
    films = sorted(decision.films, key=lambda film: film.video.casefold())
    return names_page.render(names_page.PageData(
        decision.appearances, films, people, locate, decision.answers, address, forms,
        decision.card, decision.twins, functools.partial(_embed, out),
    ))  # fmt: skip


def _locate_picture(out: Path, features: Path, clip: str) -> str:
    """Returns the URL of a clip's thumbnail, relative to the page, or "" if there is none.

    `out` is the folder of the page. `features` is the folder of features that contains the clip.
    """
    path = features_folder.locate_thumbnail(features, clip)
    return quote(os.fsencode(path.relative_to(out))) if path.exists() else ""


def _embed(out: Path, address: str) -> str:
    """Returns a `data:` URL that contains a thumbnail.

    `address` is the URL of the thumbnail, relative to the page in the folder `out`.
    """
    content = (out / os.fsdecode(unquote_to_bytes(address))).read_bytes()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def remove_results(out: Path, *, page: bool = True) -> None:
    """Removes the tables, subtitles and timelines that earlier calls of `vidjax who` have written.

    If `page` is True, also removes the page. Always removes unfinished files of killed calls.
    """
    for name in (*TABLES, *[PAGE] * page):
        (out / name).unlink(missing_ok=True)
    files.remove_partials(out, r"(names|unknown|unmatched)\..+|said\.jsonl")
    for folder, _, _ in os.walk(out / SUBTITLES, topdown=False):
        files.remove_ours(Path(folder), r".+\.(vtt|srt)")
    files.remove_ours(out / CUTS, r".+\.(otio|m3u|edl)")  # .edl: of version 0.1.0


def list_problems(film: MediaFile, path: Path) -> list[str]:
    """Returns what a user must know about a film: what was not read, and what is unusual in it.

    `path` is the path of the film. Some of the texts contain a command that converts this file.
    """
    problems = []
    if jumps := film.jumps:
        at, by = (subtitles.format_time(seconds, short=True) for seconds in jumps[0])
        more = f", and {messages.count(len(jumps) - 1, 'more time')}" if jumps[1:] else ""
        problems.append(f"the times of the pictures jump by {by} at {at}{more}")
    if (film.rate or 0) < MIN_RATE if jumps else film.frames < MIN_RATE * film.seconds:
        problems.append(f"it has fewer than {MIN_RATE} pictures a second, so people may be missed")
    if film.halves:
        layout = "side by side" if "iw/2" in film.halves else "one above the other"
        problems.append(
            f"it shows the same picture twice, {layout} (3D), so each face is found twice; to use "
            f"one half: ffmpeg -i {shlex.quote(str(path))} -vf crop={film.halves} -map 0:V:0 "
            "-map 0:a? half.mkv"
        )
    if film.others:
        problems.append(
            f"only the first of its {film.others + 1} video streams is used; to use the second, "
            f"copy it: ffmpeg -i {shlex.quote(str(path))} -map 0:V:1 -map 0:a? -c copy second.mkv"
        )
    counts = {
        "damaged pictures, which were left out": film.corrupt,
        "pieces of the film that could not be read": film.refused,
        "wrong time stamps, which were estimated": film.repaired,
        "pieces of sound that could not be read": film.lost_sound,
    }
    problems += [f"{problem}: {count:,}" for problem, count in counts.items() if count]
    if film.damaged:
        problems.append(
            f"it ends at {film.seconds:.1f} s, before its declared end: check that the file is "
            "complete"
        )
    return problems
