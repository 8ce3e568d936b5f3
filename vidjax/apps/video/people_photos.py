"""Finds the photos of people, checks them, and enrols their faces."""

import contextlib
import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax.apps import features_folder
from vidjax.apps.features_folder import FaceTrack, MediaFile, PhotoFace, locate_people
from vidjax.apps.gallery import card_notes
from vidjax.apps.gallery.changes import Draft, check_person
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.labelling import advise_other_films
from vidjax.apps.gallery.store import StoredClip
from vidjax.apps.gallery.vectors import select_usable_clips
from vidjax.apps.said import PEOPLE
from vidjax.apps.video import clip_inputs, doubts, media_files
from vidjax.apps.video.pipeline import FileOutcome, extract_folders
from vidjax.data.checks import list_entries
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key
from vidjax.utils.messages import Note, Tell
from vidjax.utils.names import normal_form, read_folder_name, show
from vidjax.utils.terminal import Progress

MOST_LOCKED = 200  # folders of people that are locked at once; each lock is an open file
# The flags of `vidjax who` and of other commands that name the folder of photos.
WHO_FLAG, PHOTOS_FLAG = "--people", "--photos"
EQUAL_SQUARES = 1e-5  # the largest squared distance of two vectors of the same picture
MISFIT_REMEDY = "this photo is not used. Tag its faces again"


class FoundFace(NamedTuple):
    """A face in a photo of a person."""

    face: PhotoFace
    path: Path  # of the photo
    photo: MediaFile
    track: FaceTrack
    features: Path  # the folder of features


def list_faces(gallery: Gallery) -> dict[str, PhotoFace]:
    """Returns clip -> face, for the clips of a gallery with names such as `people/Ada/IMG_1`."""
    return {clip: photo for clip in gallery.clips if (photo := PhotoFace.of(clip))}


def list_unread(out: Path) -> dict[str, PhotoFace]:
    """Returns clip -> face, for photos in `out` whose features were deleted for new nets."""
    faces = (
        PhotoFace(owner, track.clip, track.name or owner)
        for owner, folder in locate_people(out).items()
        for photo in features_folder.find_unread(folder).values() for track in photo.tracks
    )  # fmt: skip
    return {str(face): face for face in faces}


def list_photo_files(out: Path) -> list[MediaFile]:
    """Returns the `MediaFile` of each photo of a person in the folder of results `out`.

    A track is a face in the photo. Its `clip` is the name of the face, such as `people/Ada/IMG_1`.
    """
    photos = list[MediaFile]()
    for owner, folder in locate_people(out).items():
        for photo in features_folder.describe_media_files(folder).values():
            for track in photo.tracks:
                track.clip = PhotoFace(owner, track.clip, owner).key
            photos.append(photo)
    return photos


def _list_stills(folder: Path) -> list[Path]:
    """Returns the photos and films in a folder, without short films that phones save with photos.

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


def _is_equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Returns whether two embeddings are of one picture: they differ only by rounding errors."""
    return bool(np.square(first - second).sum() < EQUAL_SQUARES)


class Photos:
    """The photos of people in a folder, and the faces in them.

    `people` is the folder of photos. `out` is the folder of results; features of the photos are in
    `OUT/people`. `flag` is the flag for the folder of photos, such as "--people", for messages.
    `tell` is called with each problem of a photo.
    """

    def __init__(self, people: Path, out: Path, tell: Tell, flag: str = WHO_FLAG):
        """Lists the photos of each person.

        Raises UserError if there are no photos and no earlier gallery, or if `out` is inside
        `people`.
        """
        self.people, self.out, self.tell, self._flag = people, out, tell, flag
        self.paths_of = self._list()  # person -> photos
        # Folder of features -> outcomes of photos.
        self.outcomes_of: dict[Path, list[FileOutcome]] = {}
        self.failed: dict[str, str] = {}  # path of each unusable photo -> remedy
        self.names: set[str] = set()  # all people
        # Clip in the gallery -> face. `vidjax who` names clips as `people/Ada/IMG_1.f02`, see
        # `PhotoFace`, and other commands as `Ada/IMG_1.f02`.
        self.faces: dict[str, FoundFace] = {}
        self.usable: set[str] = set()  # the clips of usable faces
        # After `enrol`, the person of each clip, also of clips that `_withhold` left out.
        self._person_of: dict[str, str] = {}
        self._twins: set[str] = set()  # clips of photos that are in the folders of two people
        self._doubtful = doubts.Doubts({}, {}, [])
        # Person -> groups of photos that contradict each other. It is not clear which are right.
        self._mixed: dict[str, list[doubts.Side]] = {}

    def warn(self, texts: Iterable[str]) -> None:
        """Calls `tell` with each of `texts`, which are problems of photos."""
        for text in texts:
            self.tell(Note(text))

    def _list(self) -> dict[str, list[Path]]:
        """Returns the photos of each person, from folders PEOPLE/NAME/ and files PEOPLE/NAME.jpg.

        Raises UserError if there are neither photos nor a gallery of an earlier call.
        """
        people, out, flag = self.people, self.out, self._flag
        if not os.path.isdir(people):
            if not os.path.exists(people) and files.exists(out / "gallery"):
                return {}
            raise self._refuse()
        if out.resolve().parent == people.resolve():
            raise UserError(
                f"--out={out} is inside {flag}={people}, where each folder is a person\n"
                f"choose a folder outside '{people}' for --out, or another folder for {flag}"
            )
        photos_of: dict[str, list[Path]] = {}
        for note in media_files.describe_left_out([people]):
            self.tell(note)
        single, known = media_files.split_files(people)[0], locate_people(out)
        for path in list_entries(people):
            if (is_file := files.is_file(path)) and path not in single:
                continue
            photos = [path] if is_file or _is_lost_photo(path) else []
            if path.is_dir():
                photos = [*itertools.chain(*map(_list_stills, media_files.list_folders(path)))]
            if not photos and normal_form(path.name) not in known:
                place = show(str(path))
                self.warn(
                    [f"{show(path.name)} cannot be recognised: there is no photo in '{place}'"]
                )
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

    def _refuse(self) -> UserError:
        people, flag = self.people, self._flag
        hint = "" if os.path.exists(people) else messages.suggest_path(people)
        if files.is_file(people):
            one, all_ = (messages.relative_path(x) for x in (*people.resolve().parents,)[:2])
            return UserError(
                f"{flag}={people} is a file, not a folder: use its folder, {flag}={one}\n"
                f"if this is the folder of one person, use the folder above: {flag}={all_}"
            )
        return UserError(
            f"'{people}' is not a folder: add photos {people}/NAME/PHOTO.jpg of each person{hint}"
        )

    def extract(self, **options: Any) -> None:  # noqa: ANN401  (the arguments of `extract_folders`)
        """Extracts features of the photos. `options` are arguments of `extract_folders`."""
        place = self.out / PEOPLE
        place.mkdir(exist_ok=True)
        files.hide(place)  # the names of its folders are names of people
        places = locate_people(self.out, self.paths_of)
        folders = [(places[name], paths) for name, paths in self.paths_of.items()]
        for first in range(0, len(folders), MOST_LOCKED):
            group = dict(folders[first : first + MOST_LOCKED])
            self.outcomes_of |= extract_folders(group, tagged=True, tell=self.tell, **options)

    def check_people(self, gallery: Gallery, forget_missing: bool) -> None:
        """Raises UserError if the folder of photos seems to be a wrong folder.

        It seems wrong if it has photos, but of no enrolled person. If `forget_missing` is True, it
        seems wrong only if it is missing, or is the folder of one person, such as `people/Ada`.
        """
        people, photos = self.people, self.paths_of
        enrolled = (list_unread(self.out) | list_faces(gallery)).values()
        before = {name for photo in enrolled for name in (photo.folder, photo.person)}
        if not os.path.isdir(people) and (forget_missing or not before):
            raise self._refuse()
        if not photos or before & {*photos}:
            return
        is_person = normal_form(people.resolve().name) in before
        # If a single person is missing, the person is kept or replaced.
        if not is_person and (forget_missing or len(before) < 2 or self._were_renamed()):
            return
        remedy = "to forget them, add --forget-missing; to keep them, name another --out"
        if is_person:
            above = shlex.quote(messages.relative_path(people.resolve().parent))
            remedy = f"it is the folder of one person: name the folder above, --people={above}"
        names = messages.list_some([*map(show, sorted(before))])
        raise UserError(
            f"nothing in '{people}' has the name of a person from earlier runs ({names})\n{remedy}"
        )

    def _were_renamed(self) -> bool:
        """Returns whether a photo has the same content as a photo with results in `self.out`."""
        known = list_photo_files(self.out)
        sizes, digests = {photo.source.size for photo in known}, {photo.sha256 for photo in known}
        paths = filter(os.path.exists, itertools.chain(*self.paths_of.values()))
        return any(
            path.stat().st_size in sizes and files.sha256_file(path) in digests for path in paths
        )

    def check(self, enrolled: Mapping[str, PhotoFace]) -> None:
        """Finds the usable faces in photos, and reports problems of photos.

        If a photo program has tagged faces in a photo, each face gets the name of its tag. If a
        photo has no tags, its face gets the name of the folder. `enrolled` are the faces in the
        gallery, clip -> face.
        """
        single: list[str] = []  # people whose photo is a file in the folder of people
        known = {photo.person for photo in enrolled.values()}
        for folder, outcomes in self.outcomes_of.items():
            owner, found, shown = read_folder_name(folder.name), set[str](), set[str]()
            tags = {name for outcome in outcomes if outcome.known for name in outcome.known.tags}
            for outcome in outcomes:
                named, clips = self._check_photo(owner, outcome)
                found |= named
                if photo := outcome.known:
                    for track in photo.tracks:
                        face = PhotoFace(owner, track.clip, track.name or owner)
                        clip = str(face) if self._flag == WHO_FLAG else f"{owner}/{track.clip}"
                        self.faces[clip] = FoundFace(face, outcome.path, photo, track, folder)
                        # A user may have removed faces of a missing photo.
                        if track.clip in clips and (outcome.media or clip in enrolled):
                            self.usable.add(clip)
                            shown.add(face.person)
                if not (clips and outcome.media):
                    self.failed[str(outcome.path)] = outcome.remedy
            # A folder of photos in which other people are tagged is not a person.
            if tags and owner not in {*tags, *shown, *known}:
                found.discard(owner)
            self.names |= found
            # If a photo cannot be read, the people of its tags are not forgotten.
            if not all(outcome.media for outcome in outcomes):
                self.names |= {x.person for x in enrolled.values() if x.folder == owner}
            if outcomes[0].path.parent == self.people:
                single.append(owner)
            self.warn(self._describe_foreign_tags(owner, outcomes))
        self.warn(self._leave_out_poor())
        only_files = len(single) == len(self.outcomes_of) and not known
        single = [name for name in single if name in self.names]
        self.warn(self._describe_numbers(single, only_files))

    def _check_photo(self, owner: str, outcome: FileOutcome) -> tuple[set[str], set[str]]:
        """Reports problems of a photo; returns the names of its people, and its faces.

        A face is given as a clip, such as `IMG_1.f02`. With face tags, the result is all names in
        the tags, and the faces at the tags. Without face tags, it is `owner`, the name of the
        folder, and the face if there is only one.
        """
        photo, names, clips, problems = outcome.known, {owner}, set[str](), [outcome.error]
        if photo and photo.tags:
            names, clips = photo.tags, {str(track.clip) for track in photo.tracks if track.name}
            problems += [photo.bad_tags, photo.misfit and f"{photo.misfit}: {MISFIT_REMEDY}"]
            if not photo.misfit:
                problems += [
                    f"there is no face at the tag of {show(tag)}" for tag in photo.lost_tags
                ]
        elif photo:
            clip, problem = features_folder.check_photo(photo)
            clips |= {clip} if clip else set()
            problems += [photo.bad_tags, "" if clip else problem]
        place = str(outcome.path)
        self.warn(x if place in x else f"{place}: {x}" for x in problems if x)
        return names, clips

    def _leave_out_poor(self) -> Iterator[str]:
        """Leaves out faces with sunglasses if the person has a better photo.

        Yields a warning for each face with sunglasses or low quality.
        """
        usable = [(clip, self.faces[clip]) for clip in sorted(self.usable)]
        poor = {clip: text for clip, x in usable if (text := features_folder.check_face(x.track))}
        good = {x.face.person for clip, x in usable if clip not in poor}
        for clip, problem in poor.items():
            (_, _, person), path, _, track, _ = self.faces[clip]
            text = f"{path}: {show(person)}: {problem}" if track.name else f"{path}: {problem}"
            if track.dark_eyes and person in good:
                self.usable.remove(clip)
                text += f"; it is left out, because {show(person)} has better photos"
            yield text

    def _describe_foreign_tags(self, name: str, outcomes: Sequence[FileOutcome]) -> Iterator[str]:
        """Yields a warning if new photos in the folder of `name` have tags, but none of `name`."""
        new = [
            (outcome.path, outcome.media.tags) for outcome in outcomes
            if outcome.media and not (outcome.kept or outcome.media.misfit)
            and outcome.path.parent != self.people
        ]  # fmt: skip
        if foreign := [(path, names) for path, names in new if names and name not in names]:
            path, names = foreign[0]
            tagged = messages.list_some([*map(show, sorted(names))], 3)
            more = f"; {messages.count(len(foreign) - 1, 'more such photo')}" if foreign[1:] else ""
            used = f"not {show(name)}: the tags are used{more}"
            yield f"the face tags in {path} name {tagged}, {used}"

    def _describe_numbers(self, names: Sequence[str], only_files: bool) -> Iterator[str]:
        """Yields a warning if photos such as Ada_1.jpg and Ada_2.jpg may show one person.

        `names` are the names of people from files outside of folders, such as Ada_1. `only_files`
        is True if there are no folders, so that all files may show one person.
        """
        people, flag = self.people, self._flag
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
                    f"{show(twins[0])} and {show(twins[1])} count as two people. If they are the "
                    f"same person, put the photos into '{people}/{show(name)}/'"
                )

    def find_missing(self, enrolled: Mapping[str, PhotoFace]) -> set[str]:
        """Returns the folders in `OUT/people` whose photos may be on a drive that is not connected.

        `enrolled` is clip -> face in the gallery. A folder is left out if it is clear that a user
        deleted or moved the photos.
        """
        absent = {photo.folder for photo in enrolled.values()} - {
            read_folder_name(x.name) for x in self.outcomes_of
        }
        outcomes = itertools.chain(*self.outcomes_of.values())
        has_others = any(outcome.path.parent == self.people for outcome in outcomes)
        new = {self.faces[clip].photo.sha256 for clip in self.usable - enrolled.keys()}
        place, missing = Path(os.path.realpath(self.people)), set[str]()
        places = locate_people(self.out, absent)
        for folder in absent:
            known = features_folder.describe_media_files(places[folder]).values()
            paths = [photo.source.path for photo in known]
            deleted = has_others and all(
                x.parent == place and media_files.is_missing(x) for x in paths
            )
            # If a new photo has the content of a photo in `known`, the photo was moved.
            if not known or not (deleted or new & {photo.sha256 for photo in known}):
                missing.add(folder)
        return missing

    def embed(self, gallery: Gallery) -> dict[str, StoredClip]:
        """Computes the embedding of each usable face; returns the face's clip name -> clip."""
        entries: dict[str, StoredClip] = {}
        groups = group_by_key((self.faces[clip].features, clip) for clip in self.usable)
        for folder, clips in groups.items():
            clip_of = {self.faces[clip].track.clip: clip for clip in clips}
            embedded = select_usable_clips(clip_inputs.embed_clips(gallery, folder, clip_of))
            entries |= {clip_of[clip]: entry for clip, entry in embedded.items()}
        return entries

    def enrol(
        self, draft: Draft, entries: Mapping[str, StoredClip], before: Collection[str] = ()
    ) -> tuple[list[str], set[str]]:
        """Enrols the faces `entries` in `draft`; returns the added clips, and the unchanged clips.

        `entries` is clip -> vector and person. A clip is unchanged if `draft` has it with the same
        vector. Other clips in `before`, from earlier calls, are removed. If the gallery refuses a
        face, its photo is added to `self.failed`. For faces that are left out, see `_withhold`.
        """
        unchanged = draft.complete({clip: entry.vector for clip, entry in entries.items()})
        draft.remove(clip={*before} - unchanged)
        new = list[str]()
        for clip in sorted(entries.keys() - unchanged):
            try:
                draft.add({clip: entries[clip]})
                new.append(clip)
            except UserError as error:
                path = self.faces[clip].path
                problem, _, self.failed[str(path)] = str(error).partition("\n")
                self.warn([f"{path}: {problem}"])
        self._withhold(draft)
        return [clip for clip in new if clip in draft.clips], unchanged & draft.clips.keys()

    def _withhold(self, draft: Draft) -> None:
        """Removes photos from a gallery if it is not clear whom the photos show.

        A photo without face tags is removed if it is in the folders of two people. All photos of a
        person are removed if some seem to show another person, but it is unclear which photos.
        """
        state = card_notes.judge(draft.finish()[0], self.list_mirrored())
        named = {clip: x for clip, x in state.clips.items() if x.identity}
        self._person_of = {clip: str(x.identity) for clip, x in named.items()}
        faces = {clip: x.photo for clip, x in self.faces.items() if clip in named}
        whole = {clip: photo.sha256 for clip, photo in faces.items() if not photo.tags}
        # The people of a file, by its sha256.
        owners = group_by_key({(digest, self._person_of[clip]) for clip, digest in whole.items()})
        self._twins = {clip for clip, digest in whole.items() if len(owners[digest]) > 1}
        if card_notes.compare(state).problem != "blind":
            single = {clip: x for clip, x in named.items() if clip not in self._twins}
            self._doubtful = doubts.find_doubtful_photos(state.index.backend, single)
        for name, sides in self._doubtful.mixed.items():
            # Other sides have only clips of films, to which a user gave this name.
            own = [side for side in sides if not self.faces.keys().isdisjoint(side.photos)]
            self._mixed |= {name: own} if len(own) > 1 else {}
        photos = {x for sides in self._mixed.values() for side in sides for x in side.photos}
        draft.remove(clip=self._twins | (photos & faces.keys()))

    def find_renamed(
        self, gallery: Gallery, enrolled: Mapping[str, PhotoFace], entries: Mapping[str, StoredClip]
    ) -> dict[str, set[str]]:
        """Finds people whose folder was renamed, or whose photos were all moved to other people.

        `enrolled` is clip -> face in the gallery. `entries` is clip -> embedding and person, for
        the photos that are in the folder now. Equal embeddings are from the same photo. Returns
        person -> people who have the person's photos now.
        """
        person_of = {clip: self.faces[clip].face.person for clip in entries}
        new = {
            clip: x.vector for clip, x in entries.items()
            if not (old := gallery.clips.get(clip)) or not _is_equal(old.vector, x.vector)
        }  # fmt: skip
        kept = {person_of[clip] for clip in entries.keys() - new.keys()}
        gone = group_by_key(
            (face.person, gallery.clips[clip].vector) for clip, face in enrolled.items()
            if face.person not in kept
        )  # fmt: skip
        moved: dict[str, set[str]] = {}
        for person, vectors in gone.items() if new else ():
            owners = [
                {person_of[clip] for clip, x in new.items() if _is_equal(vector, x)} - {person}
                for vector in vectors
            ]
            if all(owners):
                moved[person] = set[str]().union(*owners)
        return moved

    def list_mirrored(self) -> list[float]:
        """Returns the cosine similarity of each usable face and its mirror image.

        This is the cosine of their embeddings. Faces whose cosine is not known are left out.
        """
        cosines = (self.faces[clip].track.mirrored for clip in self.usable)
        return [cosine for cosine in cosines if cosine is not None]

    def report_doubts(self) -> bool:
        """Reports photos that may show a wrong person. Call `enrol` first.

        Returns whether photos with different names seem to show the same person.
        """
        person_of, twins, doubtful = self._person_of, self._twins, self._doubtful
        people = group_by_key((self.faces[x].photo.sha256, person_of[x]) for x in sorted(twins))
        texts = list[str]()
        for clip in sorted(self.faces.keys() & (twins | doubtful.photos.keys()) & person_of.keys()):
            (_, path, photo, _, _), name = self.faces[clip], show(person_of[clip])
            if clip in twins:
                others = ", ".join(map(show, sorted({*people[photo.sha256]} - {person_of[clip]})))
                texts.append(
                    f"{path} is also a photo of {others}, so it is not used: delete the wrong copy"
                )
            else:
                like = doubtful.photos[clip]
                seems = (
                    f"looks like {show(like)}" if like else f"differs from {name}'s other photos"
                )
                wrong = "correct its tag" if photo.tags else "move it"
                about = f"{path} counts as a photo of {name}, but {seems}"
                texts.append(f"{about}: {wrong} if it shows another person")
        texts += self._describe_contradictions()
        self.warn(texts)
        likes = [*doubtful.photos.values()]
        likes += [side.like for sides in doubtful.mixed.values() for side in sides]
        return bool(twins or doubtful.alike or any(likes))

    def _describe_contradictions(self) -> Iterator[str]:
        """Yields a warning about each name whose photos show several people.

        Also yields a warning about two photos with different names that show one person.
        """

        def locate(clip: str) -> str:
            path = self.faces[clip].path if clip in self.faces else Path(clip)
            return show(
                str(path.relative_to(self.people) if path.is_relative_to(self.people) else path)
            )

        for name, sides in self._mixed.items():
            number = "two" if len(sides) == 2 else f"{len(sides):,}"
            texts = [
                messages.list_some([*map(locate, side.photos)], 3)
                + (f" (like {show(side.like)})" if side.like else "")
                for side in sides[:3]
            ] + ["..."] * (len(sides) > 3)
            yield (
                f"the photos of {show(name)} show {number} people: {' / '.join(texts)}\n"
                f"these photos are not used: move the photos that do not show {show(name)}"
            )
        for first, second in self._doubtful.alike:
            names = " and ".join(show(self._person_of[clip]) for clip in (first, second))
            yield (
                f"{locate(first)} and {locate(second)} count as photos of {names}, but seem to "
                "show one person: move the wrong photo"
            )


def find_faces(people: Path, out: Path, models: Path, workers: int, tell: Tell) -> Photos:
    """Finds the faces in `people/NAME/PHOTO.jpg`, and writes their features to the folder `out`.

    `models` is the folder of nets, and `workers` the number of processes. `tell` is called with
    each problem of a photo.
    """
    photos = Photos(people, out, tell, PHOTOS_FLAG)
    total = sum(map(len, photos.paths_of.values()))
    bar = Progress(total, unit="photo", label="photos", leave=False)
    with contextlib.closing(bar):
        photos.extract(models=models, workers=workers, done=lambda _: bar.advance(1))
    photos.check({})
    return photos


class PhotoEnrolment(NamedTuple):
    """How many faces `enrol_folder` has enrolled, and which photos it could not use."""

    enrolled: int  # the number of new faces
    unchanged: int  # the number of faces that were enrolled before
    failed: dict[str, str]  # path of a photo that is not enrolled -> remedy, or ""


def enrol_folder(
    gallery: Gallery, people: Path, models: Path, workers: int, tell: Tell
) -> PhotoEnrolment:
    """Enrols the photos `people/NAME/PHOTO.jpg` and `people/NAME.jpg` in a gallery.

    Faces that are already enrolled stay as they are, even if a user renamed their person. New
    photos of a renamed person get the new name. `models` is the folder of nets.
    """
    with files.scratch_folder() as out:
        found = find_faces(people, out, models, workers, tell)
        entries = found.embed(gallery)
    person_of = {clip: found.faces[clip].face.person for clip in entries}
    with gallery.change() as draft:
        before = group_by_key(
            (person, label) for clip, person in person_of.items()
            if (label := clip in draft.clips and draft.clips[clip].identity)
        )  # fmt: skip
        labels = {x: _choose_label(x, before.get(x, ()), found.names) for x in found.names}
        entries = {
            clip: x._replace(identity=labels[person_of[clip]]) for clip, x in entries.items()
        }
        new, unchanged = found.enrol(draft, entries)
    lost = map(show, sorted(x for x in found.names if labels[x] not in gallery))
    found.warn(f"{x} cannot be recognised: no photo of {x} can be used" for x in lost)
    if gallery.clips.keys() <= entries.keys():  # no photo of another call is missing
        card_notes.check_mirrored(gallery, found.list_mirrored())
    advise_other_films(gallery.state, sorted({str(entries[clip].identity) for clip in new}))
    found.report_doubts()
    return PhotoEnrolment(len(new), len(unchanged), found.failed)


def _choose_label(name: str, labels: Collection[str], names: Collection[str]) -> str:
    """Returns the name under which new photos of the person `name` are enrolled.

    `labels` has a name for each enrolled photo of the person. It differs from `name` if a user has
    renamed the person. Returns the most frequent label, or `name` if `labels` is empty. A label of
    another person in `names` is returned only if there is no other label.
    """
    count = Counter(labels)
    order = [(label != name and label in names, -count[label], label) for label in count]
    return min(order)[-1] if order else name
