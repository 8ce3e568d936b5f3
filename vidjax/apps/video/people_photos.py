"""Finds the photos of people, checks them, and enrols their faces."""

import contextlib
import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.apps import features_folder
from vidjax.apps.features_folder import FaceTrack, MediaFile
from vidjax.apps.gallery import card_notes
from vidjax.apps.gallery.changes import check_person
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.labelling import advise_other_films
from vidjax.apps.gallery.store import StoredClip
from vidjax.apps.gallery.vectors import select_usable_clips
from vidjax.apps.said import PEOPLE
from vidjax.apps.video import doubts, media_files
from vidjax.apps.video.pipeline import FileOutcome, extract_folders
from vidjax.data.checks import list_entries
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import make_folder_name, normal_form, read_folder_name, show
from vidjax.utils.terminal import Progress, say

MOST_LOCKED = 200  # folders of people that are locked at once; each lock is an open file
# The flags of `vidjax who` and `vidjax gallery enrol` that name the folder of photos.
WHO_FLAG, ENROL_FLAG = "--people", "--photos"
EQUAL_SQUARES = 1e-5  # the largest squared distance of two vectors of the same picture
MISFIT_REMEDY = "nobody is enrolled from it. Tag its faces again"


class PhotoFace(NamedTuple):
    """An enrolled face of a photo.

    `str(face)` is the name of its clip in the gallery, such as `people/Ada/IMG_1.f02`. If a face
    tag names another person than the folder, the name ends with this person: `.../IMG_1.f02/Bob`.
    """

    folder: str  # the name of the folder in `OUT/people` that contains the features of the photo
    clip: str  # the name of the clip in these features
    person: str  # the name of the folder, or the name in the face tag

    def __str__(self) -> str:
        tag = "" if self.person == self.folder else f"/{self.person}"
        return f"{PEOPLE}/{self.folder}/{self.clip}{tag}"

    @property
    def plain(self) -> str:
        """The name of the clip in a gallery of `enrol_folder`, such as `Ada/IMG_1.f02`."""
        return f"{self.folder}/{self.clip}"

    @property
    def key(self) -> str:
        """The name of the clip without the person, see `list_photo_files`."""
        return f"{PEOPLE}/{self.plain}"

    @classmethod
    def of(cls, clip: str) -> "PhotoFace | None":
        """Parses the name of a clip in the gallery; returns None for a clip of a film."""
        parts = clip.split("/", 3)
        if parts[0] != PEOPLE or len(parts) < 3:
            return None
        return cls(normal_form(parts[1]), parts[2], normal_form(parts[3 if len(parts) > 3 else 1]))


class FoundFaces(NamedTuple):
    """The usable faces in photos of a folder of people, see `check_photos`."""

    people: Path  # the folder of photos
    outcomes_of: Mapping[Path, Sequence[FileOutcome]]  # folder of features -> outcomes of photos
    failed: dict[str, str]  # path of each unusable photo -> remedy
    names: set[str]  # all people
    usable: dict[PhotoFace, Path]  # usable face -> folder of features

    def list_tracks(self) -> Iterator[tuple[PhotoFace, Path, MediaFile, FaceTrack]]:
        """Yields each known face with the path and the description of its photo, and its track."""
        for folder, outcomes in self.outcomes_of.items():
            owner = read_folder_name(folder.name)
            for outcome in outcomes:
                if photo := outcome.known:
                    for track in photo.tracks:
                        face = PhotoFace(owner, track.clip, track.name or owner)
                        yield face, outcome.path, photo, track

    def list_mirrored(self) -> list[float]:
        """Returns `FaceTrack.mirrored` of each usable face."""
        return [
            track.mirrored for face, _, _, track in self.list_tracks()
            if face in self.usable and track.mirrored is not None
        ]  # fmt: skip


def locate_people(out: Path, names: Iterable[str]) -> dict[str, Path]:
    """Returns name of a person -> folder in `OUT/people`, for `names` and all existing folders.

    A new folder gets a name that all file systems allow, see `make_folder_name`.
    """
    known = {read_folder_name(path.name): path for path in sorted((out / PEOPLE).glob("[!.]*"))}
    taken = {path.name.casefold() for path in known.values()}
    for name in names:
        if name not in known:
            known[name] = out / PEOPLE / make_folder_name(name, taken)
            taken.add(known[name].name.casefold())
    return known


def list_faces(gallery: Gallery) -> dict[str, PhotoFace]:
    """Returns clip -> face for the enrolled faces of photos."""
    return {clip: photo for clip in gallery.clips if (photo := PhotoFace.of(clip))}


def list_unread(out: Path) -> dict[str, PhotoFace]:
    """Returns clip -> face in photos that are not yet read again after nets have changed."""
    faces = (
        PhotoFace(owner, track.clip, track.name or owner)
        for owner, folder in locate_people(out, ()).items()
        for photo in features_folder.find_unread(folder).values() for track in photo.tracks
    )  # fmt: skip
    return {str(face): face for face in faces}


def list_photo_files(out: Path) -> list[MediaFile]:
    """Returns the photos of people, in which the names of clips are those of `PhotoFace.key`."""
    photos = list[MediaFile]()
    for owner, folder in locate_people(out, ()).items():
        for photo in features_folder.describe_media_files(folder).values():
            for track in photo.tracks:
                track.clip = PhotoFace(owner, track.clip, owner).key
            photos.append(photo)
    return photos


def find_missing(enrolled: Mapping[str, PhotoFace], found: FoundFaces, out: Path) -> set[str]:
    """Returns the folders in `OUT/people` whose photos are missing, but were not deleted by a user.

    A user has deleted a photo if it was in a folder that has other photos. If new photos have the
    same content, a user has moved or renamed them. The folders of such photos are left out.

    `enrolled` is clip -> face in the gallery. `found` are the faces of this call. `out` is the
    folder of results.
    """
    absent = {photo.folder for photo in enrolled.values()} - {
        read_folder_name(x.name) for x in found.outcomes_of
    }
    if not absent:
        return absent
    outcomes = itertools.chain(*found.outcomes_of.values())
    has_others = any(outcome.path.parent == found.people for outcome in outcomes)
    new = {
        photo.sha256 for face, _, photo, _ in found.list_tracks()
        if face in found.usable and str(face) not in enrolled
    }  # fmt: skip
    place, missing = Path(os.path.realpath(found.people)), set[str]()
    places = locate_people(out, absent)
    for folder in absent:
        known = features_folder.describe_media_files(places[folder]).values()
        paths = [photo.source.path for photo in known]
        deleted = has_others and all(x.parent == place and media_files.is_missing(x) for x in paths)
        if not known or not (deleted or new & {photo.sha256 for photo in known}):
            missing.add(folder)
    return missing


def list_photos(people: Path, out: Path, flag: str = WHO_FLAG) -> dict[str, list[Path]]:
    """Returns the photos of each person, from folders PEOPLE/NAME/ and files PEOPLE/NAME.jpg.

    Messages name `flag`, the flag that names the folder `people`. Raises UserError if there are no
    photos, and there is no gallery of an earlier call.
    """
    if not os.path.isdir(people):
        if not os.path.exists(people) and files.exists(out / "gallery"):
            return {}
        raise _refuse_people(people, flag)
    if out.resolve().parent == people.resolve():
        raise UserError(
            f"--out={out} is inside {flag}={people}, where each folder is a person\n"
            f"name a folder of only people, {flag}=DIR, or another folder for --out"
        )
    photos_of: dict[str, list[Path]] = {}
    media_files.say_left_out([people])
    single, known = media_files.split_files(people)[0], locate_people(out, ())
    for path in list_entries(people):
        if (is_file := files.is_file(path)) and path not in single:
            continue
        photos = [path] if is_file or _is_lost_photo(path) else []
        if path.is_dir():
            photos = [*itertools.chain(*map(_list_stills, media_files.list_folders(path)))]
        if not photos and normal_form(path.name) not in known:
            place = show(str(path))
            _warn([f"{show(path.name)} cannot be recognised: there is no photo in '{place}'"])
        elif photos:
            try:
                name = check_person(path.name if path.is_dir() else path.stem)
            except UserError as error:
                problem = str(error).partition("\n")[0]
                kind = "folder" if path.is_dir() else "photo"
                raise UserError(f"'{show(str(path))}': {problem}\nrename the {kind}") from None
            photos_of.setdefault(name, []).extend(photos)
    if not photos_of and not files.exists(out / "gallery"):
        raise UserError(
            f"'{people}' contains no photos\nadd photos {people}/NAME/PHOTO.jpg of each person"
        )
    return photos_of


def _warn(texts: Iterable[str]) -> None:
    """Prints warnings."""
    for text in texts:
        say(text, warning=True)


def _refuse_people(people: Path, flag: str = WHO_FLAG) -> UserError:
    hint = "" if os.path.exists(people) else messages.suggest_path(people)
    if files.is_file(people):
        one, all_ = (messages.relative_path(x) for x in (*people.resolve().parents,)[:2])
        return UserError(
            f"{flag}={people} is a file, not a folder: name its folder, {flag}={one}\n"
            f"if this is the folder of one person, name the folder above: {flag}={all_}"
        )
    return UserError(
        f"'{people}' is not a folder: add photos {people}/NAME/PHOTO.jpg of each person{hint}"
    )


def extract_photos(
    photos: Mapping[str, Sequence[Path]],
    out: Path,
    **options: Any,  # noqa: ANN401  (the arguments of `extract_folders`)
) -> dict[Path, list[FileOutcome]]:
    """Extracts features of photos into folders of `out/people`; returns folder -> outcomes.

    `photos` are name of a person -> photos.
    """
    (out / PEOPLE).mkdir(exist_ok=True)
    files.hide(out / PEOPLE)  # the names of its folders are names of people
    places = locate_people(out, photos)
    folders = [(places[name], paths) for name, paths in photos.items()]
    outcomes_of: dict[Path, list[FileOutcome]] = {}
    for first in range(0, len(folders), MOST_LOCKED):
        group = dict(folders[first : first + MOST_LOCKED])
        outcomes_of |= extract_folders(group, tagged=True, **options)
    return outcomes_of


def embed_photos(
    gallery: Gallery,
    people: Path,
    out: Path,
    **options: Any,  # noqa: ANN401  (the arguments of `extract_folders`)
) -> Iterator[tuple[str, np.ndarray, FaceTrack, Path]]:
    """Yields person, vector, track and photo of each usable face in `people/NAME/PHOTO.jpg`.

    Features are written to `out`. `gallery` computes the vectors. Nobody is enrolled.
    """
    found = check_photos({}, extract_photos(list_photos(people, out), out, **options), people)
    found_at = {face: (track, path) for face, path, _, track in found.list_tracks()}
    for face, entry in embed_usable(gallery, found.usable).items():
        parts = zip(gallery.backend.widths, gallery.backend.split(entry.vector[None]), strict=True)
        yield face.person, dict(parts)["face"][0], *found_at[face]


def check_people(
    gallery: Gallery,
    photos: Mapping[str, Sequence[Path]],
    people: Path,
    out: Path,
    forget_missing: bool,
) -> None:
    """Raises UserError if the folder `people` seems wrong, because it has no enrolled person."""
    enrolled = (list_unread(out) | list_faces(gallery)).values()
    before = {name for photo in enrolled for name in (photo.folder, photo.person)}
    if not os.path.isdir(people) and (forget_missing or not before):
        raise _refuse_people(people)
    if not photos or before & {*photos}:
        return
    is_person = normal_form(people.resolve().name) in before
    # If a single person is missing, the person is kept or replaced.
    if not is_person and (forget_missing or len(before) < 2 or _were_renamed(photos, out)):
        return
    remedy = "to forget them, add --forget-missing; to keep them, name another --out"
    if is_person:
        above = shlex.quote(messages.relative_path(people.resolve().parent))
        remedy = f"it is the folder of one person: name the folder above, --people={above}"
    names = messages.list_some([*map(show, sorted(before))])
    raise UserError(f"'{people}' contains none of the people of earlier calls ({names})\n{remedy}")


def _were_renamed(photos: Mapping[str, Sequence[Path]], out: Path) -> bool:
    """Returns whether one of the photos has the same content as a photo of an earlier call."""
    folders = [folder for folder in (out / PEOPLE).glob("[!.]*") if folder.is_dir()]
    known_in = map(features_folder.describe_media_files, folders)
    known = [photo for in_folder in known_in for photo in in_folder.values()]
    sizes, digests = {photo.source.size for photo in known}, {photo.sha256 for photo in known}
    paths = (path for paths in photos.values() for path in paths if os.path.exists(path))
    return any(
        path.stat().st_size in sizes and files.sha256_file(path) in digests for path in paths
    )


def _describe_numbers(
    names: Sequence[str], people: Path, only_files: bool, flag: str
) -> Iterator[str]:
    """Yields a warning if photos such as Ada_1.jpg and Ada_2.jpg count as two people.

    `names` are the people whose photo is a file directly in the folder `people`. `only_files` is
    True if all people are such files, and nobody was enrolled before. Then two photos with any
    names, or a photo with a number in its name, cause a warning, because `people` may be the folder
    of one person.
    """
    if only_files and (len(names) > 1 or any(re.search(r"\d", name) for name in names)):
        above = shlex.quote(messages.relative_path(people.resolve().parent))
        examples = " and ".join(map(show, names[:2]))
        yield (
            f"photos lie directly in '{people}', so each counts as a different person, such as "
            f"{examples}. If all show the same person, name the folder above: {flag}={above}"
        )
        return
    numbered = (re.fullmatch(r"(.*[^\W\d_])[\W_]*\d+\W*", name) for name in names)
    for name, twins in group_by_key((x[1], x[0]) for x in numbered if x).items():
        if len(twins) > 1:
            yield (
                f"{show(twins[0])} and {show(twins[1])} count as two people. If they are the same "
                f"person, put the photos into '{people}/{show(name)}/'"
            )


def _list_stills(folder: Path) -> list[Path]:
    """Returns the photos and films in a folder, without the films that phones add to photos.

    Such a film has the name of its photo: `IMG_1.mov` and `IMG_1.heic`.
    """
    paths = media_files.split_files(folder)[0]
    photos = {path for path in paths if path.suffix.lower() in media_files.PHOTOS}
    stems = {path.stem for path in photos}
    lost = [path for path in list_entries(folder) if _is_lost_photo(path)]
    return [path for path in paths if path in photos or path.stem not in stems] + lost


def _is_lost_photo(path: Path) -> bool:
    """Returns whether a path is a link to a photo that is missing, for example on another drive."""
    return path.suffix.lower() in media_files.PHOTOS and not os.path.exists(path)


def check_photos(
    enrolled: Mapping[str, PhotoFace],
    outcomes_of: Mapping[Path, Sequence[FileOutcome]],
    people: Path,
    flag: str = WHO_FLAG,
) -> FoundFaces:
    """Finds the usable faces in photos, and prints problems of photos.

    If a photo program has tagged faces in a photo, each face gets the name of its tag. If a photo
    has no tags, its face gets the name of the folder. `outcomes_of` is folder of features -> the
    outcomes of its photos. `enrolled` is clip -> face in the gallery. For `flag`, see
    `list_photos`.
    """
    failed, names = dict[str, str](), set[str]()
    usable, poor = dict[PhotoFace, Path](), dict[PhotoFace, str]()
    single: list[str] = []  # people whose photo is a file in the folder of people
    known = {photo.person for photo in enrolled.values()}
    for folder, outcomes in outcomes_of.items():
        owner, found, shown = read_folder_name(folder.name), set[str](), set[str]()
        tags = {name for outcome in outcomes if outcome.known for name in outcome.known.tags}
        for outcome in outcomes:
            people_of, faces, bad = _check_photo(owner, outcome)
            if not outcome.media:  # a user may have removed faces of a missing photo
                faces = [face for face in faces if str(face) in enrolled]
            found |= people_of
            shown |= {face.person for face in faces}
            usable |= dict.fromkeys(faces, folder)
            poor |= {face: problem for face, problem in bad.items() if face in usable}
            failed |= {} if faces and outcome.media else {str(outcome.path): outcome.remedy}
        # A folder of photos in which other people are tagged is not a person.
        if tags and owner not in {*tags, *shown, *known}:
            found.discard(owner)
        names |= found
        # If a photo cannot be read, the people of its tags are not forgotten.
        if not all(outcome.media for outcome in outcomes):
            names |= {photo.person for photo in enrolled.values() if photo.folder == owner}
        if outcomes[0].path.parent == people:
            single.append(owner)
        _warn(_describe_foreign_tags(owner, outcomes, people))
    _warn(_leave_out_hidden(usable, poor))
    only_files = len(single) == len(outcomes_of) and not known
    single = [name for name in single if name in names]
    _warn(_describe_numbers(single, people, only_files, flag))
    return FoundFaces(people, outcomes_of, failed, names, usable)


def _leave_out_hidden(usable: dict[PhotoFace, Path], poor: Mapping[PhotoFace, str]) -> list[str]:
    """Leaves out usable faces with sunglasses if the person has a good face; returns warnings.

    `poor` is usable face with a problem -> the problem, or "" if it was printed before.
    """
    good, texts = {face.person for face in usable.keys() - poor.keys()}, list[str]()
    for face, problem in poor.items():
        if problem and face.person in good:
            del usable[face]
            problem += f"; it is left out, because {show(face.person)} has better photos"
        texts.append(problem)
    return [*filter(None, texts)]


def embed_usable(gallery: Gallery, usable: Mapping[PhotoFace, Path]) -> dict[PhotoFace, StoredClip]:
    """Computes the vectors of faces. `usable` is face -> folder of features."""
    found: dict[PhotoFace, StoredClip] = {}
    for folder, faces in group_by_key((folder, face) for face, folder in usable.items()).items():
        face_of = {face.clip: face for face in faces}
        clips = select_usable_clips(features_folder.embed_clips(gallery, folder, face_of))
        found |= {face_of[clip]: entry for clip, entry in clips.items()}
    return found


def enrol_photos(
    gallery: Gallery,
    enrolled: Collection[str],
    faces: Mapping[PhotoFace, StoredClip],
    label: Callable[[PhotoFace], str | None],
    renamed: Mapping[str, str],
) -> None:
    """Enrols faces of photos, and removes the other faces in `enrolled` from the gallery.

    `enrolled` are clips of the gallery. `label` returns the name of a face, or None for a stranger.
    `renamed` is old name -> new name of the other clips of people.
    """
    clips = {str(face): x._replace(identity=label(face)) for face, x in faces.items()}
    with gallery.change(log=False) as draft:
        unchanged = draft.complete({clip: entry.vector for clip, entry in clips.items()})
        draft.remove(clip={*enrolled} - unchanged)
        new = {clip: entry for clip, entry in clips.items() if clip not in unchanged}
        names = {x: renamed.get(draft.clips[x].identity or "") for x in draft.clips.keys() - clips}
        for clip, name in names.items():
            _ = name and draft.relabel(clip, name)
        draft.add(new)
    people = {entry.identity for entry in new.values()} - {None}
    advise_other_films(gallery.state, sorted(map(str, people)))


def find_renamed(
    gallery: Gallery, enrolled: Mapping[str, PhotoFace], faces: Mapping[PhotoFace, StoredClip]
) -> dict[str, set[str]]:
    """Finds people whose photos are all photos of other people now.

    `enrolled` is clip -> face in the gallery. `faces` are the faces of this call. Returns person ->
    people who have the photos now. A face is recognised by its vector.
    """
    new = {
        face: x.vector for face, x in faces.items()
        if not (old := gallery.clips.get(str(face)))
        or not _is_equal(old.vector, x.vector)
    }  # fmt: skip
    kept = {face.person for face in faces.keys() - new.keys()}
    gone = group_by_key(
        (face.person, gallery.clips[clip].vector) for clip, face in enrolled.items()
        if face.person not in kept
    )  # fmt: skip
    moved: dict[str, set[str]] = {}
    for person, vectors in gone.items() if new else ():
        owners = [
            {face.person for face, x in new.items() if _is_equal(vector, x)} - {person}
            for vector in vectors
        ]
        if all(owners):
            moved[person] = set[str]().union(*owners)
    return moved


def _is_equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Returns whether two vectors are of the same picture, up to rounding errors."""
    return bool(np.square(first - second).sum() < EQUAL_SQUARES)


class PhotoEnrolment(NamedTuple):
    """The result of `enrol_folder`."""

    enrolled: int  # the number of new faces
    unchanged: int  # the number of faces that were enrolled before
    failed: dict[str, str]  # path of a photo that is not enrolled -> remedy, or ""


def enrol_folder(gallery: Gallery, people: Path, models: Path, workers: int) -> PhotoEnrolment:
    """Enrols the photos `people/NAME/PHOTO.jpg` and `people/NAME.jpg` in a gallery of models.

    The faces that another call has enrolled stay as they are, even if they were renamed. New photos
    of a renamed person get the new name. The features of the photos are deleted at the end.
    """
    with files.scratch_folder() as out:
        photos_of = list_photos(people, out, ENROL_FLAG)
        total = sum(map(len, photos_of.values()))
        bar = Progress(total, unit="photo", label="photos", leave=False)
        with contextlib.closing(bar):
            outcomes_of = extract_photos(
                photos_of, out, models=models, workers=workers, done=lambda _: bar.advance(1)
            )
        found = check_photos({}, outcomes_of, people, ENROL_FLAG)
        entries = embed_usable(gallery, found.usable)
        faces = {face.plain: face for face in entries}
        clips = {face.plain: entry for face, entry in entries.items()}
    path_of = {face.plain: path for face, path, _, _ in found.list_tracks()}
    with gallery.change() as draft:
        before = group_by_key(
            (face.person, label) for clip, face in faces.items()
            if (label := clip in draft.clips and draft.clips[clip].identity)
        )  # fmt: skip
        labels = {x: _choose_label(x, before.get(x, ()), found.names) for x in found.names}
        unchanged = draft.complete({clip: entry.vector for clip, entry in clips.items()})
        new = dict[str, str]()
        for clip in sorted(clips.keys() - unchanged):
            try:
                new[clip] = labels[faces[clip].person]
                draft.add({clip: clips[clip]._replace(identity=new[clip])})
            except UserError as error:
                new.pop(clip)
                problem, _, found.failed[str(path_of[clip])] = str(error).partition("\n")
                _warn([f"{path_of[clip]}: {problem}"])
    lost = map(show, sorted(found.names - {face.person for face in faces.values()}))
    _warn(f"{name} cannot be recognised: no photo of {name} can be used" for name in lost)
    if gallery.clips.keys() <= clips.keys():  # no photo of another call is missing
        card_notes.check_mirrored(gallery, found.list_mirrored())
    advise_other_films(gallery.state, sorted({*new.values()}))
    warn_of_doubts(gallery, found, lambda face: face.plain)
    return PhotoEnrolment(len(new), len(unchanged), found.failed)


def _check_photo(
    owner: str, outcome: FileOutcome
) -> tuple[set[str], list[PhotoFace], dict[PhotoFace, str]]:
    """Prints problems of a photo, except sunglasses.

    Returns the people in it, the usable faces, and usable face with a problem -> the problem, or ""
    if the problem was printed. If the photo has no face tags, the only person is `owner`, the name
    of the folder.
    """
    photo, bad = outcome.known, dict[PhotoFace, str]()
    names, person_of, problems = {owner}, dict[str, str](), [outcome.error]
    if photo and photo.tags:
        names = photo.tags
        person_of = {track.clip: track.name for track in photo.tracks if track.name}
        problems += [photo.bad_tags, photo.misfit and f"{photo.misfit}: {MISFIT_REMEDY}"]
        if not photo.misfit:
            problems += [f"there is no face at the tag of {show(tag)}" for tag in photo.lost_tags]
    elif photo:
        clip, problem = features_folder.check_photo(photo)
        person_of = {clip: owner} if clip else {}
        problems += [photo.bad_tags, "" if clip else problem]
    faces = {clip: PhotoFace(owner, clip, name) for clip, name in person_of.items()}
    for track in photo.tracks if photo else ():
        if (face := faces.get(track.clip)) and (problem := features_folder.check_face(track)):
            problem = f"{show(face.person)}: {problem}" if track.name else problem
            bad[face] = f"{outcome.path}: {problem}" if track.dark_eyes else ""
            problems += [] if track.dark_eyes else [problem]
    place = str(outcome.path)
    _warn(x if place in x else f"{place}: {x}" for x in problems if x)
    return names, [*faces.values()], bad


def _describe_foreign_tags(
    name: str, outcomes: Sequence[FileOutcome], people: Path
) -> Iterator[str]:
    """Yields one warning if new photos in the folder of the person `name` tag only other people.

    Photos whose tags do not fit are left out, because their tags are not used.
    """
    new = [
        (outcome.path, outcome.media.tags) for outcome in outcomes
        if outcome.media and not (outcome.kept or outcome.media.misfit)
        and outcome.path.parent != people
    ]  # fmt: skip
    if foreign := [(path, names) for path, names in new if names and name not in names]:
        path, names = foreign[0]
        tagged = messages.list_some([*map(show, sorted(names))], 3)
        more = f"; {messages.count(len(foreign) - 1, 'more such photo')}" if foreign[1:] else ""
        yield f"the face tags in {path} name {tagged}, not {show(name)}: the tags are used{more}"


def _choose_label(name: str, labels: Collection[str], names: Collection[str]) -> str:
    """Returns the name in the gallery for the new photos of the person `name`.

    It differs from `name` if a user has renamed the person in the gallery. It is the most frequent
    of `labels`, the names of the person's enrolled photos. Labels of other people in `names` come
    last.
    """
    count = Counter(labels)
    order = [(label != name and label in names, -count[label], label) for label in count]
    return min(order)[-1] if order else name


def warn_of_doubts(
    gallery: Gallery, found: FoundFaces, name_clip: Callable[[PhotoFace], str] = str
) -> bool:
    """Prints warnings of photos that may show another person or are enrolled for two people.

    `name_clip` returns the name of a face's clip in the gallery. If the net does not separate
    people, photos are not compared. Returns whether two names may be one person.
    """
    given = {name_clip(face): (path, photo) for face, path, photo, _ in found.list_tracks()}
    person_of = {clip: entry.identity for clip, entry in gallery.clips.items() if entry.identity}
    whole = {clip: photo.sha256 for clip, (_, photo) in given.items() if not photo.tags}
    # The people of a file, by its sha256.
    owners = group_by_key(
        {(whole[clip], person_of[clip]) for clip in whole.keys() & person_of.keys()}
    )
    twins = {clip for clip, digest in whole.items() if len(owners.get(digest, ())) > 1}
    single = {clip: person_of[clip] for clip in person_of.keys() - twins}
    is_blind = card_notes.compare(gallery.state).problem == "blind"
    doubtful = doubts.find_doubtful_photos(gallery, {} if is_blind else single)
    for clip in sorted(given.keys() & (twins | doubtful.photos.keys()) & person_of.keys()):
        (path, photo), name = given[clip], show(person_of[clip])
        if clip in twins:
            others = ", ".join(map(show, sorted({*owners[photo.sha256]} - {person_of[clip]})))
            _warn([f"{path} is also a photo of {others}: delete the wrong copy"])
        else:
            like = doubtful.photos[clip]
            seems = f"looks like {show(like)}" if like else f"differs from {name}'s other photos"
            wrong = "correct its tag" if photo.tags else "move it"
            about = f"{path} is enrolled as {name}, but {seems}"
            _warn([f"{about}: {wrong} if it shows another person"])
    path_of = {clip: path for clip, (path, _) in given.items()}
    _warn(_describe_contradictions(doubtful, person_of, path_of, found.people))
    likes = [*doubtful.photos.values()]
    likes += [side.like for sides in doubtful.mixed.values() for side in sides]
    return bool(twins or doubtful.alike or any(likes))


def _describe_contradictions(
    doubtful: doubts.Doubts, person_of: Mapping[str, str], path_of: Mapping[str, Path], people: Path
) -> Iterator[str]:
    """Yields warnings of photos that contradict each other, if it is not clear which are wrong.

    `person_of` is clip -> person, and `path_of` is clip -> photo, for the photos of this call.
    """

    def locate(clip: str) -> str:
        path = path_of.get(clip, Path(clip))
        return show(str(path.relative_to(people) if path.is_relative_to(people) else path))

    for name, all_sides in doubtful.mixed.items():
        sides = [side for side in all_sides if not path_of.keys().isdisjoint(side.photos)]
        if len(sides) < 2:
            continue  # the other side has only clips of films, to which a user gave this name
        number = "two" if len(sides) == 2 else f"{len(sides):,}"
        texts = [
            messages.list_some([*map(locate, side.photos)], 3)
            + (f" (like {show(side.like)})" if side.like else "")
            for side in sides[:3]
        ] + ["..."] * (len(sides) > 3)
        yield (
            f"the photos of {show(name)} show {number} people: {' / '.join(texts)}\n"
            f"move the photos that do not show {show(name)}"
        )
    for first, second in doubtful.alike:
        names = " and ".join(show(person_of[clip]) for clip in (first, second))
        yield (
            f"{locate(first)} and {locate(second)} are enrolled as {names}, but seem to show one "
            "person: move the wrong photo"
        )
