"""Moves names and corrections to the clips that other nets find in the same films and photos.

If the nets of `vidjax who` change, the descriptions of films and photos are set aside in a folder
`earlier`, see `features_folder.set_aside`. Enrolled clips get a vector of zeros, which resembles
nobody, and clips of films also get another name, such as `earlier/party.s000.t01`. They wait until
their files are read again, in this call or in a later call. Then each clip is matched by the
content of its file, by time and by the place of the face. Each step may be repeated, because a call
may be killed at any time.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from vidjax.apps.gallery.answers import UNKNOWN
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import StoredClip
from vidjax.apps.gallery.vectors import select_usable_clips
from vidjax.apps.video import features_folder
from vidjax.apps.video.appearances import format_time
from vidjax.apps.video.features_folder import EARLIER, FaceTrack, MediaFile, hash_film
from vidjax.apps.video.people_photos import PhotoFace, embed_clips, list_faces
from vidjax.apps.video.tracks import measure_overlaps
from vidjax.utils import files, tables
from vidjax.utils.names import IGNORED, read_folder_name

T = TypeVar("T")
UNMATCHED = "unmatched.tsv"
COLUMNS = ("video", "start", "end", "clip", "correction")
LEAST_OVERLAP = 0.1  # intersection over union of the boxes of a face by two nets
LEAST_SHARE = 0.5  # of the shorter track, for which both tracks last
NEAR_SECONDS = 1.0  # within this time, a face hardly moves


class Moved(NamedTuple):
    """A film or photo that was read again with other nets."""

    stem: str
    old: MediaFile
    new: MediaFile
    clips: dict[str, str]  # old clip -> new clip of the same face
    parts: dict[str, list[str]]  # old clip -> all new clips, if the track was divided


def find_moved(folder: Path) -> list[Moved]:
    """Returns the films and photos of a folder of features that were read again."""
    return [
        Moved(stem, old, new, match_tracks(old, new), match_parts(old, new))
        for stem, old in features_folder.find_earlier(folder).items()
        if (new := features_folder.find_media_file(folder, stem))
    ]


def match_tracks(old: MediaFile, new: MediaFile) -> dict[str, str]:
    """Matches the tracks that two nets found in a film or photo; returns old clip -> new clip.

    The pair with the longest and closest overlap is chosen first. No track is in two pairs. If the
    content of the file has changed, nothing is matched.
    """
    matched: dict[str, str] = {}
    taken = set[str]()
    for clip, other in _rank_pairs(old, new):
        if clip not in matched and other not in taken:
            matched[clip] = other
            taken.add(other)
    return matched


def match_parts(old: MediaFile, new: MediaFile) -> dict[str, list[str]]:
    """Returns old clip -> new clips, first the clip of `match_tracks`.

    Other clips are parts into which the other nets have divided a track. They are at other times.
    """
    parts = {clip: [other] for clip, other in match_tracks(old, new).items()}
    track_of, taken = {x.clip: x for x in new.tracks}, {x for (x,) in parts.values()}
    for clip, other in _rank_pairs(old, new):
        if other in taken:
            continue
        track, known = track_of[other], [track_of[x] for x in parts[clip]]
        if all(x.end_s < track.start_s or track.end_s < x.start_s for x in known):
            parts[clip].append(other)
            taken.add(other)
    return parts


def _rank_pairs(old: MediaFile, new: MediaFile) -> list[tuple[str, str]]:
    """Returns pairs of an old and a new clip that may show the same face, the best pair first."""
    if old.sha256 != new.sha256:
        return []
    pairs = list[tuple[float, str, str]]()
    coming, live = sorted(new.tracks, key=lambda track: -track.start_s), list[FaceTrack]()
    for track in sorted(old.tracks, key=lambda track: track.start_s):
        while coming and coming[-1].start_s <= track.end_s:
            live.append(coming.pop())
        live = [other for other in live if other.end_s >= track.start_s]
        pairs += [(_measure_overlap(track, other), track.clip, other.clip) for other in live]
    ranked = sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))
    return [(clip, other) for overlap, clip, other in ranked if overlap]


def _measure_overlap(old: FaceTrack, new: FaceTrack) -> float:
    """Returns the common time of two tracks times the overlap of their boxes; 0 for two faces."""
    seconds = min(old.end_s, new.end_s) - max(old.start_s, new.start_s)
    if seconds < LEAST_SHARE * min(old.end_s - old.start_s, new.end_s - new.start_s):
        return 0.0
    (times, boxes), (known, path) = map(_list_places, (old, new))
    if not len(times) or not len(known):
        return 0.0
    near = np.abs(times - times.clip(known[0], known[-1])) <= NEAR_SECONDS
    sides = [np.interp(times[near], known, side) for side in path.T]
    overlaps = measure_overlaps(boxes[near], np.stack(sides, axis=1)).diagonal()
    mean = float(overlaps.mean()) if near.any() else 0.0
    return (seconds + 1e-3) * mean * (mean >= LEAST_OVERLAP)  # photos have no duration


def _list_places(track: FaceTrack) -> tuple[np.ndarray, np.ndarray]:
    """Returns the times [N] and boxes [N, 4] of a face. Older versions stored only one box."""
    places = track.places
    if not places and track.box and track.box_at_s is not None:
        places = [(track.box_at_s, track.box)]
    times, boxes = zip(*places, strict=True) if places else ((), ())
    return np.array(times, float), np.array(boxes, float).reshape(len(times), 4)


def choose_waiting_names(gallery: Gallery, films: Iterable[MediaFile]) -> dict[str, str]:
    """Returns enrolled clip -> its name until its film or photo is read again, see `Gallery.widen`.

    `films` are the films that the gallery knows.
    """
    clips = {track.clip for film in films for track in film.tracks} & gallery.clips.keys()
    names = {clip: f"{EARLIER}/{clip}" for clip in clips}
    free = {clip: name for clip, name in names.items() if name not in gallery.clips}
    return free | {clip: clip for clip in list_faces(gallery)}


def move_keys(
    table: Mapping[str, Mapping[str, T]], moved: Iterable[Moved]
) -> dict[str, Mapping[str, T]]:
    """Moves values of waiting clips. `table` is digest of a film -> clip -> value."""
    table = dict(table)
    for film in moved:
        of = table.pop(hash_film(film.old, earlier=True), {})
        values = {new: x for clip, x in of.items() for new in film.parts.get(clip, ())}
        key = hash_film(film.new)
        if of:
            table[key] = {**table.get(key, {}), **values}
    return table


def hold_keys(
    table: Mapping[str, Mapping[str, T]], films: Iterable[MediaFile]
) -> dict[str, Mapping[str, T]]:
    """Renames the keys of films that are not read again yet. `table` is as in `move_keys`."""
    new = {hash_film(film): hash_film(film, earlier=True) for film in films}
    return {new.get(key, key): of for key, of in table.items()}


def move_photos(gallery: Gallery, folders: Iterable[Path]) -> list[tuple[str, ...]]:
    """Gives the enrolled faces of photos that were read again their new vectors.

    The labels of the faces stay. `folders` are folders of features, each of a person. Returns rows
    of `unmatched.tsv`: faces that were not found again, and whose label is not their person.
    """
    rows, faces = list[tuple[str, ...]](), list_waiting_faces(gallery)
    for folder in folders:
        owner, moved = read_folder_name(folder.name), {x.stem: x for x in find_moved(folder)}
        if not moved:
            continue
        new_of = {old: new for photo in moved.values() for old, new in photo.clips.items()}
        usable = _embed_usable(gallery, folder, new_of.values())
        of_folder = {
            clip: face for clip, face in faces.items()
            if face.folder == owner and face.clip.partition(".")[0] in moved
        }  # fmt: skip
        found, lost = dict[str, tuple[str, np.ndarray]](), list[str]()
        for clip, face in of_folder.items():
            if entry := usable.get(new_of.get(face.clip, "")):
                found[clip] = str(face._replace(clip=new_of[face.clip])), entry.vector
            else:
                lost.append(clip)
                if (label := gallery.clips[clip].identity) != face.person:
                    photo = moved[face.clip.partition(".")[0]].new.video
                    rows.append((photo, "", "", clip, label or IGNORED))
        with gallery.change() as draft:
            draft.remove(clip=lost)
            draft.move(found)
        features_folder.forget_earlier(folder, moved)
    return rows


def list_waiting_faces(gallery: Gallery) -> dict[str, PhotoFace]:
    """Returns clip -> face for the enrolled faces of photos that are not read again yet."""
    return {c: face for c, face in list_faces(gallery).items() if not gallery.clips[c].vector.any()}


class Plan(NamedTuple):
    """What changes in a gallery after films were read again with other nets."""

    moved: list[Moved]
    found: dict[str, tuple[str, np.ndarray]]  # waiting clip -> its new name and vector
    lost: list[str]  # waiting clips that are removed
    rows: list[tuple[str, ...]]  # of `unmatched.tsv`: corrections whose clips were not found again


def plan_films(
    gallery: Gallery, features: Path, numbers: Mapping[str, Mapping[str, int]], joined: set[int]
) -> Plan:
    """Finds the new clips of enrolled clips, and the corrections that have no new clip.

    Args:
      features: the folder of features.
      numbers: digest of a film -> clip -> number of the unknown person.
      joined: the numbers of unknown people whom a user has joined.
    """
    plan = Plan(find_moved(features), {}, [], [])
    new_of = {f"{EARLIER}/{old}": new for film in plan.moved for old, new in film.clips.items()}
    usable = _embed_usable(gallery, features, new_of.values())
    film_of = {track.clip: (film.old, track) for film in plan.moved for track in film.old.tracks}
    held = {
        f"{EARLIER}/{track.clip}"
        for film in features_folder.find_earlier(features).values()
        for track in film.tracks if track.clip not in film_of
    }  # fmt: skip

    def report(clip: str, correction: str) -> None:
        video, times = "", ("", "")
        if clip in film_of:
            film, track = film_of[clip]
            video, times = film.video, (format_time(track.start_s), format_time(track.end_s))
        plan.rows.append((video, *times, clip, correction))

    for clip, entry in gallery.clips.items():
        if entry.vector.any() or clip in held or PhotoFace.of(clip):
            continue
        if new := usable.get(new_of.get(clip, "")):
            plan.found[clip] = new_of[clip], new.vector
        else:  # clips of other features stay enrolled, so that they can be enrolled again
            plan.lost.extend([clip] * clip.startswith(f"{EARLIER}/"))
            report(clip.removeprefix(f"{EARLIER}/"), entry.identity or IGNORED)
    for film in plan.moved:
        key = hash_film(film.old, earlier=True)
        for clip, names in gallery.denied.get(key, {}).items():
            for name in names if clip not in film.clips else ():
                report(clip, f"not {name}")
        for clip, number in numbers.get(key, {}).items():
            if clip not in film.clips and number in joined:
                report(clip, f"{UNKNOWN}{number}")
    return plan


def move_films(gallery: Gallery, plan: Plan) -> None:
    """Moves the names of enrolled clips, and denied names, to the new clips of films."""
    with gallery.change() as draft:
        draft.denied = move_keys(draft.denied, plan.moved)
        draft.remove(clip=plan.lost)
        draft.move(plan.found)


def _embed_usable(gallery: Gallery, folder: Path, clips: Iterable[str]) -> dict[str, StoredClip]:
    wanted = {*clips}
    return select_usable_clips(embed_clips(gallery, folder, wanted)) if wanted else {}


def write_unmatched(out: Path, rows: Sequence[tuple[str, ...]]) -> int:
    """Adds rows to `OUT/unmatched.tsv`; returns how many of them are new."""
    path = out / UNMATCHED
    known = [tuple(cells) for _, cells in tables.read_text(path)][1:] if files.exists(path) else []
    new = sorted({*rows} - {*known})
    if new:
        files.write_text(path, tables.to_text([COLUMNS, *known, *new], ".tsv"))
        files.hide(path)
    return len(new)
