"""Reads the faces, and writes all results of `vidjax who`: gallery, tables, page, subtitles, cuts.

The gallery of the results is a result, too: it follows from the faces and the log.
"""

import base64
import functools
import hashlib
import itertools
import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from urllib.parse import quote, unquote_to_bytes

from vidjax.apps.gallery import answers as answers_lib, card_notes
from vidjax.apps.gallery.backend import compare_equal
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import State
from vidjax.apps.gallery.vectors import Vectors, select_usable_clips
from vidjax.apps.video import clip_inputs, cuts, media, names_page, naming, subtitles
from vidjax.apps.video.decide import Decision, Faces
from vidjax.apps.video.media import FEATURES, PEOPLE, MediaFile
from vidjax.apps.video.said import is_photo
from vidjax.utils import files, messages, tables
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import fold, make_file_stems
from vidjax.utils.version import VERSION

GALLERY = "gallery"
COMMAND = "vidjax review {}"  # changes the gallery of the results, see `Gallery.of_clips`
VOTES = "votes.json"  # groups of faces, in the folder of features
PAGE, SUBTITLES, CUTS = "names.html", "subtitles", "cuts"
PADDING_SECONDS = 1.0  # before and after each appearance in timelines
TABLES = ("names.tsv", "names.jsonl")
UNKNOWN, UNMATCHED = "unknown.tsv", "unmatched.tsv"
UNMATCHED_COLUMNS = ("video", "time", "correction")
MIN_RATE = 2  # frames per second below which a film gets a warning


def load_faces(out: Path, state: State) -> Faces:
    """Reads all faces in the folder of results `out`, of films and of photos of people.

    `state` has the comparison of vectors. The vectors of photos that it contains are not read.
    """
    backend = state.index.backend
    films = media.read_media_files(out / FEATURES)
    clips = {track.clip for film in films for track in film.tracks}
    vectors = clip_inputs.embed_clips(backend, out / FEATURES, clips) if clips else None
    photos = media.describe_media_files(out / PEOPLE)
    unread = {folder: media.find_unread(out / folder) for folder in (FEATURES, PEOPLE)}
    new = {
        track.clip for stem, photo in photos.items() if stem not in unread[PEOPLE]
        for track in photo.tracks if f"{PEOPLE}/{track.clip}" not in state.clips
    }  # fmt: skip
    read = select_usable_clips(clip_inputs.embed_clips(backend, out / PEOPLE, new))
    for photo in photos.values():
        for track in photo.tracks:
            track.clip = f"{PEOPLE}/{track.clip}"
    known = {clip: x.vector for clip, x in state.clips.items() if clip.startswith(f"{PEOPLE}/")}
    known |= {f"{PEOPLE}/{clip}": x.vector for clip, x in read.items()}
    digests = {film.sha256 for of in unread.values() for film in of.values()}
    usable = select_usable_clips(vectors) if vectors else {}
    votes = _read_votes(out, _digest_votes(films, vectors, state)) if vectors else None
    return Faces(films, [*photos.values()], vectors, usable, votes, known, digests, state)


def _digest_votes(films: Sequence[MediaFile], vectors: Vectors, state: State) -> str:
    """Returns a digest of everything on which `naming.group_votes` depends."""
    facts = [[film.photo, [[x.clip, x.start_s, x.end_s, x.clarity] for x in film.tracks]]
             for film in films]  # fmt: skip
    parts = {part: hashlib.sha256(x.tobytes()).hexdigest() for part, x in vectors.parts.items()}
    numbers = hashlib.sha256(state.index.backend.numbers().tobytes()).hexdigest()
    return files.sha256_json([VERSION, vectors.names, parts, facts, numbers])


def _read_votes(out: Path, digest: str) -> dict[str, str] | None:
    """Reads the groups of an earlier call, which take long to compute; None after changes."""
    try:
        content = files.read_json(out / FEATURES / VOTES, dict, media.FILE_BYTES)
    except (UserError, FileNotFoundError):
        return None
    same = content.get("digest") == digest and isinstance(content.get("votes"), dict)
    return content["votes"] if same else None


def write(
    out: Path,
    gallery: Gallery,
    decision: Decision,
    padding: float = PADDING_SECONDS,
    *,
    explained: bool = False,
) -> str:
    """Writes gallery, tables, page, subtitles and timelines into the folder of results `out`.

    `gallery` is the gallery of the results. In timelines, `padding` seconds are added before and
    after each appearance. Returns a text about all names, see `card_notes.describe`, or ""
    if `explained` is True.
    """
    write_gallery(gallery, decision.state)
    faces = decision.faces
    if faces.vectors and decision.votes and decision.votes is not faces.votes:
        digest = _digest_votes(faces.films, faces.vectors, faces.state)
        files.write_json(out / FEATURES / VOTES, {"digest": digest, "votes": decision.votes})
        files.hide(out / FEATURES / VOTES)
    about = "" if explained else card_notes.describe(decision.state)
    here = out.resolve()
    place_of = {
        film.video: quote(os.fsencode(os.path.relpath(film.path, here))) for film in decision.films
    }

    def address(film: MediaFile, seconds: float) -> str:
        return place_of[film.video] + ("" if film.photo else f"#t={seconds:.1f}")

    # The old page stays until the new page replaces it.
    files.write_text(out / PAGE, render_page(out, decision, address, about))
    files.hide(out / PAGE)
    remove_results(out, page=False)
    for name in (UNKNOWN, UNMATCHED):
        (out / name).unlink(missing_ok=True)
    for name in TABLES:
        subtitles.write(out / name, decision.appearances, decision.films)
    answers_lib.write_groups(out / UNKNOWN, decision.unknown, naming.list_places(decision.films))
    for name in (UNKNOWN, *TABLES):
        files.hide(out / name)
    if rows := list_unmatched(decision):
        tables.write(out / UNMATCHED, dict.fromkeys(UNMATCHED_COLUMNS, "string"), rows, ())
        files.hide(out / UNMATCHED)
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
    return about


def write_gallery(gallery: Gallery, state: State) -> None:
    """Writes `state` as the content of the gallery of the results, which the page changes."""
    before = gallery.state
    if before.clips is state.clips and (before.index, before.origin) == (state.index, state.origin):
        return
    with gallery.change(command=gallery.command) as draft:
        draft.origin = state.origin
        backend = state.index.backend
        if draft.backend.widths != backend.widths or not compare_equal(draft.backend, backend):
            draft.backend = backend
        draft.hold(state.clips)


def list_unmatched(decision: Decision) -> list[tuple[str, str, str]]:
    """Returns the names and corrections of faces that are no longer found, as rows of a table."""
    return sorted({*decision.said.list_lost(decision.faces.unread)})


def _place_subtitles(films: Sequence[MediaFile]) -> list[PurePath]:
    """Returns where the subtitles of each film are written: a relative path without .vtt or .srt.

    Players look for subtitles with the name of the film. If several films have the same name, their
    subtitles are in folders that are named after the folders of the films: `2019/IMG_0001`. If two
    films in a folder differ only in the extension, it is part of the result: `a.mp4` and `a.mkv`.
    """
    paths = [PurePath(media.make_printable(str(film.path))) for film in films]
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
    decision: Decision,
    address: Callable[[MediaFile, float], str],
    note: str,
    forms: names_page.Forms | None = None,
) -> str:
    """Returns an HTML page that shows who appears when in each film.

    `out` is the folder of results. `decision` has the people of all films. `address(film, seconds)`
    returns the URL of a film at a time. `note` is a text about all names. If `forms` is given, the
    page has forms with which a user corrects names.
    """
    people: dict[str, list[names_page.Picture]] = {}
    for name, clips in decision.people.items():
        photos = (clip.removeprefix(f"{PEOPLE}/") for clip in sorted(clips) if is_photo(clip))
        pictures = (_locate_picture(out, out / PEOPLE, clip) for clip in photos)
        people[name] = [(picture, name, picture, "") for picture in pictures if picture]
    locate = functools.partial(_locate_picture, out, out / FEATURES)
    films = sorted(decision.films, key=lambda film: film.video.casefold())
    return names_page.render(names_page.PageData(
        decision.appearances, films, people, locate, decision.answers, address, forms,
        note, decision.twins, functools.partial(_embed, out),
    ))  # fmt: skip


def _locate_picture(out: Path, features: Path, clip: str) -> str:
    """Returns the URL of a clip's thumbnail, relative to the page, or "" if there is none.

    `out` is the folder of the page. `features` is the folder of features that contains the clip.
    """
    path = media.locate_thumbnail(features, clip)
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
    files.remove_ours(out / CUTS, r".+\.(otio|m3u)")


def list_problems(film: MediaFile, path: Path) -> list[str]:
    """Returns what a user must know about a film: what was not read, and what is unusual in it.

    `path` is the path of the film. Some of the texts contain a command that converts this file.
    """
    problems = []
    if jumps := film.jumps:
        at, by = (messages.format_time(seconds, short=True) for seconds in jumps[0])
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
        other = int(not film.stream)
        problems.append(
            f"only number {film.stream + 1} of its {film.others + 1} video streams is used, as in "
            f"players; to use number {other + 1}, copy it: ffmpeg -i {shlex.quote(str(path))} "
            f"-map 0:V:{other} -map 0:a? -c copy other.mkv"
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
