"""Finds the photos of people, checks them, and turns folders and face tags into statements.

A statement says that a face in a photo shows a person, see `photo` and `gone` in `log`. A photo is
what it shows: the digest of its picture, not its path, identifies it.
"""

import contextlib
import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vidjax.apps.gallery import card_notes
from vidjax.apps.gallery.changes import advise_other_films, check_person, shows_same
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import State, StoredClip
from vidjax.apps.gallery.vectors import select_usable_clips
from vidjax.apps.video import clip_inputs, digests, doubts, log, media, media_files
from vidjax.apps.video.log import STRANGERS, Line
from vidjax.apps.video.media import PEOPLE, FaceTrack, MediaFile
from vidjax.apps.video.pipeline import FileOutcome, extract_files
from vidjax.apps.video.said import Said, is_photo
from vidjax.data.checks import list_entries
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key
from vidjax.utils.messages import Note, Tell
from vidjax.utils.names import normal_form, show
from vidjax.utils.terminal import Progress

# The flags of `vidjax who` and of other commands that name the folder of photos.
WHO_FLAG, PHOTOS_FLAG = "--people", "--photos"


class FoundFace(NamedTuple):
    """A face in a photo of a person."""

    clip: str  # such as `people/0123456789abcdef.f02`
    person: str  # the name in the face tag, or the name of the folder
    folder: str  # the name of the folder, or of a photo outside of folders
    path: Path  # of the photo
    photo: MediaFile
    track: FaceTrack


class FoundPhotos(NamedTuple):
    """The photos of people in a folder, after all problems of photos were reported."""

    outcomes: Mapping[str, Sequence[FileOutcome]]  # name of a folder -> photos
    faces: Sequence[FoundFace]  # the usable faces
    failed: dict[str, str]  # path of each unusable photo -> remedy
    names: set[str]  # all people

    def list_mirrored(self) -> list[float]:
        """Returns the cosine similarity of each usable face and its mirror image.

        This is the cosine of their embeddings. Faces whose cosine is not known are left out.
        """
        cosines = (face.track.mirrored for face in self.faces)
        return [cosine for cosine in cosines if cosine is not None]


def _list_stills(folder: Path) -> list[Path]:
    """Returns the photos and films in a folder, without short films that phones save with photos.

    Such a film has the name of its photo: `IMG_1.mov` and `IMG_1.heic`. The result contains links
    to photos that are missing, for example on another drive.
    """
    paths = media_files.split_files(folder)[0]
    photos = {path for path in paths if path.suffix.lower() in media_files.PHOTOS}
    stems = {path.stem for path in photos}
    links = (path for path in list_entries(folder) if path.suffix.lower() in media_files.PHOTOS)
    lost = [path for path in links if not os.path.exists(path)]
    return [path for path in paths if path in photos or path.stem not in stems] + lost


def list_photos(people: Path, out: Path, tell: Tell, flag: str = WHO_FLAG) -> dict[str, list[Path]]:
    """Returns the photos of each person, from folders PEOPLE/NAME/ and files PEOPLE/NAME.jpg.

    `out` is the folder of results. `flag` is the flag for the folder of photos, for messages. A
    folder whose name cannot be the name of a person raises UserError. So does a folder without
    photos, if `out` has no earlier results.
    """
    is_known = log.has_log(out)
    if not os.path.isdir(people):
        if not os.path.exists(people) and is_known:
            return {}
        raise refuse(people, flag)
    if out.resolve().parent == people.resolve():
        raise UserError(
            f"--out={out} is inside {flag}={people}, where each folder is a person\n"
            f"choose a folder outside '{people}' for --out, or another folder for {flag}"
        )
    photos_of: dict[str, list[Path]] = {}
    media_files.search_folder(people, tell)
    single = _list_stills(people)
    for path in list_entries(people):
        inside = itertools.chain(*map(_list_stills, media_files.list_folders(path)))
        photos = [path] if path in single else [*inside]
        if not photos:
            if not files.is_file(path) and path.name != STRANGERS:
                text = f"there is no photo in '{show(str(path))}'"
                tell(Note(f"{show(path.name)} cannot be recognised: {text}"))
            continue
        try:
            name = check_person(path.name if path.is_dir() else path.stem)
        except UserError as error:
            problem = str(error).partition("\n")[0]
            kind = "folder" if path.is_dir() else "photo"
            raise UserError(f"'{show(str(path))}': {problem}\nrename the {kind}") from None
        photos_of.setdefault(name, []).extend(photos)
    if not photos_of and not is_known:
        raise UserError(
            f"'{people}' contains no photos\nadd photos {people}/NAME/PHOTO.jpg of each person"
        )
    return photos_of


def refuse(people: Path, flag: str = WHO_FLAG) -> UserError:
    """Returns the error for a folder of photos that is missing or is a file."""
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


def check_folder(
    people: Path, photos: Mapping[str, Sequence[Path]], out: Path, said: Said, forget_missing: bool
) -> None:
    """Raises UserError if the folder of photos seems to be a wrong folder.

    It seems wrong if it has photos, but neither the name nor a photo of a known person. If
    `forget_missing` is True, it seems wrong only if it is missing, or is the folder of one person,
    such as `people/Ada`.
    """
    statements = said.list_photos()
    before = {str(x.name) for x in statements}
    before |= {said.call(x.person) for x in statements if x.person}
    before -= {"", STRANGERS}
    if not os.path.isdir(people) and (forget_missing or not before):
        raise refuse(people)
    if not photos or before & {*photos}:
        return
    is_person = normal_form(people.resolve().name) in before
    # If a single person is missing, the person is kept or replaced.
    if not is_person and (forget_missing or len(before) < 2):
        return
    known = {x.sha256 for x in media.describe_media_files(out / PEOPLE).values()}
    paths = filter(os.path.exists, itertools.chain(*photos.values()))
    if not is_person and any(digests.digest_photo(path) in known for path in paths):
        return
    remedy = "to forget them, add --forget-missing; to keep them, name another --out"
    if is_person:
        above = shlex.quote(messages.relative_path(people.resolve().parent))
        remedy = f"it is the folder of one person: name the folder above, --people={above}"
    names = messages.list_some([*map(show, sorted(before))])
    raise UserError(
        f"nothing in '{people}' has the name of a person from earlier runs ({names})\n{remedy}"
    )


def extract(
    photos: Mapping[str, Sequence[Path]], out: Path, tell: Tell, options: Mapping[str, Any]
) -> dict[str, list[FileOutcome]]:
    """Extracts features of photos into `OUT/people`; returns name of a folder -> outcomes.

    `options` are arguments of `extract_files`.
    """
    if not photos:
        return {}
    paths = [*itertools.chain(*photos.values())]
    outcomes = extract_files(paths, out / PEOPLE, tagged=True, tell=tell, **options)
    outcome_of = {os.path.realpath(x.path): x for x in outcomes}
    return {
        name: [outcome_of[os.path.realpath(path)]._replace(path=path) for path in of]
        for name, of in photos.items()
    }  # fmt: skip


def find_faces(
    people: Path,
    outcomes: Mapping[str, Sequence[FileOutcome]],
    known: Collection[str],
    tell: Tell,
    flag: str = WHO_FLAG,
) -> FoundPhotos:
    """Finds the usable faces in photos, and reports problems of photos.

    If a photo program has tagged faces in a photo, each face gets the name of its tag. If a photo
    has no tags, its face gets the name of the folder. `known` are the people of earlier photos.
    """
    found, faces, notes = FoundPhotos(outcomes, [], {}, set()), list[FoundFace](), list[str]()
    for folder, of in outcomes.items():
        for outcome in of:
            usable, problems = _check_photo(folder, outcome)
            faces += usable
            place = str(outcome.path)
            notes += [x if place in x else f"{place}: {x}" for x in problems if x]
            if outcome.error or not usable:
                found.failed[place] = outcome.remedy
        tags = [outcome.media.tags if outcome.media else set[str]() for outcome in of]
        found.names.update(*tags)
        # A folder of photos in which other people are tagged is not a person.
        people_known = {*known, *(face.person for face in faces)}
        if not any(tags) or (not all(tags) and folder in people_known):
            found.names.add(folder)
        notes += _describe_foreign_tags(people, folder, of)
    faces, poor = _leave_out_poor(faces)
    found = found._replace(faces=faces)
    for text in (*notes, *poor, *_describe_numbers(people, flag, found, known)):
        tell(Note(text))
    return found


def _check_photo(folder: str, outcome: FileOutcome) -> tuple[list[FoundFace], list[str]]:
    """Returns the usable faces in a photo, and problems of the photo.

    With face tags, these are the faces at the tags. Without face tags, it is the only face, which
    gets the name of the folder.
    """
    photo, tracks = outcome.media, list[FaceTrack]()
    if photo is None:
        return [], [outcome.error]
    problems = [outcome.error, photo.bad_tags]
    if photo.misfit:
        problems.append(f"{photo.misfit}: this photo is not used. Tag its faces again")
    elif photo.tags:
        tracks = [track for track in photo.tracks if track.name]
        problems += [f"there is no face at the tag of {show(tag)}" for tag in photo.lost_tags]
    elif len(photo.tracks) == 1:
        tracks = photo.tracks
    else:
        count = f"{len(photo.tracks)} faces" if photo.tracks else "no face"
        kind = "photo" if photo.photo else "film"
        problems.append(f"the {kind} shows {count}: give a photo of only one person")
    faces = [
        FoundFace(f"{PEOPLE}/{x.clip}", x.name or folder, folder, outcome.path, photo, x)
        for x in tracks
    ]
    return faces, problems


def _leave_out_poor(faces: Sequence[FoundFace]) -> tuple[list[FoundFace], list[str]]:
    """Leaves out faces with sunglasses if the person has a better photo.

    Returns the other faces, and a warning for each face with sunglasses or low quality.
    """
    problem_of = {x.clip: text for x in faces if (text := media.check_face(x.track))}
    good = {x.person for x in faces if x.clip not in problem_of}
    kept, texts = list[FoundFace](), list[str]()
    for x in sorted(faces):
        problem = problem_of.get(x.clip, "")
        text = f"{x.path}: {show(x.person)}: {problem}" if x.track.name else f"{x.path}: {problem}"
        if x.track.dark_eyes and x.person in good and problem:
            text += f"; it is left out, because {show(x.person)} has better photos"
        else:
            kept.append(x)
        texts += [text] * bool(problem)
    return kept, texts


def _describe_foreign_tags(
    people: Path, name: str, outcomes: Sequence[FileOutcome]
) -> Iterator[str]:
    """Yields a warning if new photos in the folder of `name` have tags, but none of `name`."""
    foreign = [
        (x.path, x.media.tags) for x in outcomes
        if x.media and x.media.tags and name not in x.media.tags
        and not (x.error or x.kept or x.media.misfit or x.path.parent == people)
    ]  # fmt: skip
    if foreign:
        path, names = foreign[0]
        tagged = messages.list_some([*map(show, sorted(names))], 3)
        more = f"; {messages.count(len(foreign) - 1, 'more such photo')}" if foreign[1:] else ""
        yield f"the face tags in {path} name {tagged}, not {show(name)}: the tags are used{more}"


def _describe_numbers(
    people: Path, flag: str, found: FoundPhotos, known: Collection[str]
) -> Iterator[str]:
    """Yields a warning if photos such as Ada_1.jpg and Ada_2.jpg may show one person.

    Only photos outside of folders count. Without folders and people of earlier photos, all photos
    may show one person.
    """
    single = [name for name, of in found.outcomes.items() if of[0].path.parent == people]
    names = [name for name in single if name in found.names]
    has_only_files = len(names) == len(found.outcomes) and not known
    if has_only_files and (len(names) > 1 or re.search(r"\d", "".join(names))):
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


# ---- statements about photos


class Statements(NamedTuple):
    """What the folders and face tags of photos say, compared with the log."""

    lines: list[Line]  # new lines about people
    person_of: dict[tuple[str, str], str | None]  # (clip, name of folder or tag) -> person
    unused: set[str]  # clips in folders with photos of two people
    notes: list[Note]


def assign(faces: Sequence[FoundFace], said: Said, out: Path) -> Statements:
    """Finds the person of each photo, from the name of its folder or face tag.

    A new photo in a folder belongs to the person of the other photos in this folder; else to the
    person to whom it belonged before it was deleted from this folder, if this person still has a
    name; else to the person who has this name now; else to a new person. If a folder was renamed,
    its person gets the new name. If the photos of a folder have two people, they name nobody.
    """
    found = Statements([], {}, set(), [])
    before = {  # clip -> name of an earlier folder or tag -> person
        x.clip: {
            name: old.person and said.find_root(old.person)
            for name, old in said.photos.get(x.clip, {}).items()
        }
        for x in faces
    }
    kept = {x.person for x in faces if x.person in before[x.clip]}
    faces_of = group_by_key((x.person, x) for x in faces)
    # Name of a folder -> people of its photos, and people whose photos came from a folder that is
    # gone.
    here_of, came_of = dict[str, list[str | None]](), dict[str, list[str]]()
    for name, of in faces_of.items():
        pairs = [pair for x in of for pair in before[x.clip].items()]
        here_of[name] = [*dict.fromkeys(person for old, person in pairs if old == name)]
        came_of[name] = [*dict.fromkeys(x for old, x in pairs if x and old not in kept)]
    moves = Counter(itertools.chain(*came_of.values()))
    renamed = {
        came[0]: name for name, came in came_of.items()
        if len(came) == 1 and moves[came[0]] == 1 and not here_of[name] and name != STRANGERS
    }  # fmt: skip
    for name, of in faces_of.items():
        people = [None] if name == STRANGERS else here_of[name]
        if not people and (len(came_of[name]) > 1 or name in renamed.values()):
            people = [*came_of[name]]
        if not people:
            person, is_new = _find_person(name, of, renamed, said)
            people = [person]
            found.lines.extend([Line(says="person", person=person, name=name)] * is_new)
        found.person_of.update({(x.clip, name): people[0] for x in of})
        if len(people) > 1:
            own = {(x.clip, name): y for x in of for y in before[x.clip].values() if y}
            _leave_out_folder(found, name, own, said)
            found.unused.update(x.clip for x in of)
    for person, name in renamed.items():
        others = [x for x in said.find_people(name) if x not in renamed]
        # If another person has this name now, the photos show this person.
        found.lines.extend(Line(says="merge", person=person, other=other) for other in others[:1])
        # The line is needed also for an equal name: a user may undo the step that gave this name.
        found.lines.append(Line(says="person", person=person, name=name))
    found.notes.extend(_describe_moves(came_of, renamed, said, out))
    return found


def _find_person(
    name: str, faces: Sequence[FoundFace], renamed: Collection[str], said: Said
) -> tuple[str, bool]:
    """Returns the person of a folder without known photos, and whether the person is new.

    For the rules, see `assign`. `faces` are in the folder. `renamed` are people who get other
    names.
    """
    past = {said.find_root(said.photo_of.get((x.photo.sha256, name), "")) for x in faces}
    past = {*filter(said.call, past)}
    people = [*(past if len(past) == 1 else ()), *said.find_people(name)]
    people = [x for x in people if x not in renamed]
    return (people[0], False) if people else (log.make_key(), True)


def _leave_out_folder(
    found: Statements, name: str, own: Mapping[tuple[str, str], str], said: Said
) -> None:
    """Notes that the photos in a folder name nobody, because they belong to several people.

    `own` are keys of `found.person_of` -> the person to whom the photo belonged before.
    """
    found.person_of.update(own)
    people = messages.list_some([*map(show, dict.fromkeys(map(said.call, own.values())))])
    found.notes.append(Note(
        f"the photos in the folder {show(name)} were photos of {people}, so they are not used\n"
        "move the photos of each person into a folder of this person"
    ))  # fmt: skip


def _describe_moves(
    came_of: Mapping[str, Sequence[str]], renamed: Mapping[str, str], said: Said, out: Path
) -> Iterator[Note]:
    """Yields notes about people whose photos are in other folders now.

    `came_of` is name of a folder -> people whose photos came into it. If photos went to the folders
    of several people, typed names stay as they are.
    """
    pairs = ((person, name) for name, came in came_of.items() for person in came)
    for person, folders in group_by_key(pairs).items():
        old, names = said.call(person), messages.list_some([*map(show, sorted(folders))])
        count = len(said.list_named(old))
        typed = f". {messages.count(count, 'face')} that you named {show(old)}" if count else ""
        if renamed.get(person, old) != old:
            typed += f" got the name {names}" * bool(count)
            yield Note(f"all photos of {show(old)} now belong to {names}{typed}", warning=False)
        elif len(folders) > 1 and count:
            yield Note(
                f"the photos of {show(old)} now belong to {names}{typed} kept this name\n"
                f"to change this name: vidjax review {shlex.quote(str(out))}"
            )


def list_statements(
    faces: Sequence[FoundFace], found: Statements, unused: Collection[str], said: Said
) -> list[Line]:
    """Returns the new lines of the log about photos. `unused` are clips of doubtful photos."""
    lines, keys = [*found.lines], dict[tuple[str, str], str]()
    # People who were joined may be divided again. So a photo keeps its own key of the person, and
    # a new photo gets the key of the other photos in its folder.
    for x in faces:
        for old in said.photos.get(x.clip, {}).values():
            for place in (x.clip, x.person) if old.person else ():
                keys.setdefault((place, said.find_root(str(old.person))), str(old.person))
    for x in faces:
        person, old = found.person_of[x.clip, x.person], said.photos.get(x.clip, {}).get(x.person)
        face, is_unused = x.photo.faces.get(x.track.clip), x.clip in unused
        before = (old.person and said.find_root(old.person), old.unused) if old else None
        if face and before != (person, is_unused):
            own = (keys.get((place, str(person))) for place in (x.clip, x.person))
            key = next(filter(None, own), person)
            values = {"person": key, "name": x.person, "unused": is_unused}
            lines.append(log.about(face, "photo", video=x.photo.video, **values))
    return lines


def find_absent(
    people: Path, found: FoundPhotos, photos: Iterable[MediaFile], said: Said, forget_missing: bool
) -> tuple[list[Line], dict[str, str]]:
    """Finds photos that were deleted or moved, and photos that may be on another drive.

    Returns lines that take back the statements about the former, and person with missing photos ->
    name of the folder or face tag.

    A photo was deleted if the folder of photos still shows another file that vidjax knows, or if
    another photo is at its place. If `forget_missing` is True, all photos that cannot be found were
    deleted. `photos` are the descriptions of all photos of people.
    """
    statements = said.list_photos()
    outcomes = [(folder, x) for folder, of in found.outcomes.items() for x in of]
    stated = {x.film for x in statements}
    is_shown = any(x.media and (x.kept or x.media.sha256 in stated) for _, x in outcomes)
    seen = {
        (x.media.sha256, name) for folder, x in outcomes if x.media
        for name in (x.media.tags or {folder})
    }  # fmt: skip
    # Statements of photos whose tags cannot be read, and of folders with unknown files, stay.
    unsure = {x.media.sha256 for _, x in outcomes if x.media and x.media.bad_tags}
    unread = {folder for folder, x in outcomes if not x.media and not os.path.exists(x.path)}
    entries = list_entries(people) if os.path.isdir(people) else []
    unread |= {path.name for path in entries if not os.path.exists(path)}  # broken links
    places = {os.path.realpath(x.path) for _, x in outcomes if not x.error}
    source_of = {x.sha256: x.source.path for x in photos}
    gone, missing = dict[Line, None](), dict[str, str]()
    for x in statements:
        film = str(x.film)
        if (film, x.name) in seen or film in unsure:
            continue
        path = source_of.get(film)
        is_replaced = path is not None and str(path) in places
        # The photo may be elsewhere, for example only in the cloud.
        may_exist = path and not (media_files.is_missing(path) or os.path.exists(path))
        waits = x.name in unread or may_exist
        if forget_missing or is_replaced or (is_shown and not waits):
            gone[Line(says="gone", film=film, name=x.name)] = None
        elif x.person:
            missing[said.find_root(x.person)] = str(x.name)
    return [*gone], missing


# ---- doubtful photos


class Doubtful(NamedTuple):
    """Photos that may show a wrong person."""

    unused: set[str]  # clips of photos that must not be used
    notes: list[str]
    is_alike: bool  # whether photos with different names seem to show the same person


def find_doubtful(
    state: State, faces: Sequence[tuple[str, str | None, FoundFace]], people: Path
) -> Doubtful:
    """Finds photos that may show a wrong person, and photos in the folders of two people.

    `state` is a gallery in which the photos are enrolled. `faces` are the clip in this gallery, the
    person and the face. All photos of a person are left out if some seem to show another person,
    but it is unclear which photos.
    """
    path_of = {clip: x.path for clip, _, x in faces}
    people_of = group_by_key((x.clip, person) for _, person, x in faces)
    names_of = group_by_key((x.clip, x.person) for _, _, x in faces)
    twins = {clip for clip, _, x in faces if len({*people_of[x.clip]}) > 1}
    doubtful, unused, texts = doubts.find_doubtful_photos(state, twins), {*twins}, list[str]()

    def locate(clip: str) -> str:
        return show(str(path_of[clip].relative_to(people)) if clip in path_of else clip)

    for clip, _, x in sorted(faces, key=lambda of_face: of_face[-1].path):
        if clip in twins:
            others = ", ".join(map(show, sorted({*names_of[x.clip]} - {x.person})))
            about = f"{x.path} is also a photo of {others}, so it is not used"
            texts.append(f"{about}: delete the wrong copy")
        elif clip in doubtful.photos:
            name, like = show(str(state.clips[clip].identity)), doubtful.photos[clip]
            seems = f"looks like {show(like)}" if like else f"differs from {name}'s other photos"
            wrong = "correct its tag" if x.photo.tags else "move it"
            about = f"{x.path} counts as a photo of {name}, but {seems}"
            texts.append(f"{about}: {wrong} if it shows another person")
    for name, sides in doubtful.mixed.items():
        # Other sides have only clips of films, to which a user gave this name.
        own = [side for side in sides if not path_of.keys().isdisjoint(side.photos)]
        if len(own) < 2:
            continue
        unused |= {x for side in own for x in side.photos} & path_of.keys()
        number = "two" if len(own) == 2 else f"{len(own):,}"
        parts = [
            messages.list_some(sorted(map(locate, side.photos)), 3)
            + (f" (like {show(side.like)})" if side.like else "")
            for side in own[:3]
        ] + ["..."] * (len(own) > 3)
        texts.append(
            f"the photos of {show(name)} show {number} people: {' / '.join(parts)}\n"
            f"these photos are not used: move the photos that do not show {show(name)}"
        )
    missing = {*filter(is_photo, state.clips)} - path_of.keys()
    alike = [sorted(pair, key=locate) for pair in doubtful.alike if missing.isdisjoint(pair)]
    for first, second in alike:
        names = " and ".join(show(str(state.clips[clip].identity)) for clip in (first, second))
        texts.append(
            f"{locate(first)} and {locate(second)} count as photos of {names}, but seem to "
            "show one person: move the wrong photo"
        )
    likes = [*doubtful.photos.values()]
    likes += [side.like for sides in doubtful.mixed.values() for side in sides]
    return Doubtful(unused, texts, bool(twins or alike or any(likes)))


# ---- photos for other galleries


def read_folder(people: Path, out: Path, models: Path, workers: int, tell: Tell) -> FoundPhotos:
    """Finds the faces in `people/NAME/PHOTO.jpg`, and writes their features to `out/people`.

    `models` is the folder of nets, and `workers` the number of processes. `tell` is called with
    each problem of a photo.
    """
    photos = list_photos(people, out, tell, PHOTOS_FLAG)
    total = sum(map(len, photos.values()))
    bar = Progress(total, unit="photo", label="photos", leave=False)
    with contextlib.closing(bar):
        options = {"models": models, "workers": workers, "done": lambda _: bar.advance(1)}
        outcomes = extract(photos, out, tell, options)
    return find_faces(people, outcomes, (), tell, PHOTOS_FLAG)


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
        found = read_folder(people, out, models, workers, tell)
        clips = [x.track.clip for x in found.faces]
        vectors = clip_inputs.embed_clips(gallery.backend, out / PEOPLE, clips)
        vector_of = {clip: x.vector for clip, x in select_usable_clips(vectors).items()}
    named = _name_clips(found.faces).items()
    faces = {clip: x for clip, x in named if x.track.clip in vector_of}
    with gallery.change() as draft:
        before = group_by_key(
            (x.person, label) for clip, x in faces.items()
            if (label := clip in draft.clips and draft.clips[clip].identity)
        )  # fmt: skip
        labels = {x: _choose_label(x, before.get(x, ()), found.names) for x in found.names}
        entries = {
            clip: StoredClip(labels[x.person], vector_of[x.track.clip]) for clip, x in faces.items()
        }
        unchanged = {
            clip for clip, x in entries.items()
            if clip in draft.clips and shows_same(draft.backend, draft.clips[clip], x)
        }  # fmt: skip
        new = set[str]()
        for clip in sorted(entries.keys() - unchanged):
            try:
                draft.add({clip: entries[clip]})
                new.add(clip)
            except UserError as error:
                path = faces[clip].path
                problem, _, found.failed[str(path)] = str(error).partition("\n")
                tell(Note(f"{path}: {problem}"))
        state = card_notes.judge(draft.finish()[0], found.list_mirrored())
        doubtful = find_doubtful(state, [(clip, x.person, x) for clip, x in faces.items()], people)
        draft.remove(clip=doubtful.unused & draft.clips.keys())
        new, unchanged = new - doubtful.unused, unchanged - doubtful.unused
        if draft.clips.keys() <= entries.keys():  # no photo of another call is missing
            draft.origin = card_notes.judge(draft.finish()[0], found.list_mirrored()).origin
    for x in map(show, sorted(x for x in found.names if labels[x] not in gallery)):
        tell(Note(f"{x} cannot be recognised: no photo of {x} can be used"))
    advise_other_films(gallery.state, sorted({str(entries[clip].identity) for clip in new}))
    for text in doubtful.notes:
        tell(Note(text))
    return PhotoEnrolment(len(new), len(unchanged), found.failed)


def _name_clips(faces: Iterable[FoundFace]) -> dict[str, FoundFace]:
    """Returns name of the clip in a gallery, such as `Ada/IMG_1.f02`, -> face.

    Of copies of a photo of a person, only the first is named.
    """
    named = dict[str, FoundFace]()
    for x, *_ in group_by_key(((x.clip, x.person), x) for x in faces).values():
        _, dot, number = x.track.clip.partition(".")
        stem = f"{x.folder}/{media.make_stem(x.path)}"
        if f"{stem}{dot}{number}" in named:
            stem = f"{stem}~{x.photo.sha256[:8]}"
        named[f"{stem}{dot}{number}"] = x
    return named


def _choose_label(name: str, labels: Collection[str], names: Collection[str]) -> str:
    """Returns the name under which new photos of the person `name` are enrolled.

    `labels` has a name for each enrolled photo of the person. It differs from `name` if a user has
    renamed the person. Returns the most frequent label, or `name` if `labels` is empty. A label of
    another person in `names` is returned only if there is no other label.
    """
    count = Counter(labels)
    order = [(label != name and label in names, -count[label], label) for label in count]
    return min(order)[-1] if order else name
