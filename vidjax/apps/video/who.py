"""Names people in films from a few photos of each person: `vidjax who`.

    OUT/people/NAME/   features of the photos of a person, or of a photo with several face tags
    OUT/features/      features of the films
    OUT/gallery/       the gallery of the people, for the commands of `vidjax gallery`
    OUT/*/thumbnails/  with --thumbnails: a small picture of each face
    OUT/names.tsv      video, begin, end, person, probability, clips, evidence, box, path, date
    OUT/names.jsonl    the same table for programs
    OUT/names.html     the same table as a page with timelines
    OUT/unknown.tsv    clips of unknown people: write names into it and call the command again
    OUT/unknown.json   the numbers of unknown people, so that later calls use the same numbers
    OUT/subtitles/     a .vtt and a .srt file for each video
    OUT/cuts/          .edl files for each person, for programs that edit films

Each call replaces the tables, the page, the subtitles and the cut lists. If a person or a photo is
removed from `people`, the next call forgets it. A call without `people` keeps every person of the
gallery. Names that `vidjax gallery rename` or `relabel` changed are kept. If nets are added to the
models, all films and photos are read again, and the names stay.
"""

import functools
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.parse import quote

import msgspec
from msgspec import Meta, Struct

from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.gallery import store
from vidjax.apps.gallery.answers import NOBODY, Answer
from vidjax.apps.gallery.changes import check_person
from vidjax.apps.gallery.gallery import Gallery, Vectors
from vidjax.apps.video import appearances, cuts, doubts, features_folder, names_page, pipeline
from vidjax.apps.video.appearances import Appearance
from vidjax.apps.video.features_folder import THUMBNAILS, ExtractionSettings, Film
from vidjax.apps.video.pipeline import FileOutcome
from vidjax.data.clip_files import read_clips
from vidjax.data.memory import MemoryClips
from vidjax.data.processes import Children, map_children
from vidjax.data.untrusted.names import make_file_stems, normal_form, show
from vidjax.runs import schemas
from vidjax.runs.schemas import Sha256, Size, Text
from vidjax.runs.terminal import say
from vidjax.utils import files, messages, tables
from vidjax.utils.errors import UserError

T = TypeVar("T")
STRANGER_ODDS = 3.0  # prior: three of four faces in films show people who are not enrolled
PAGE, SUBTITLES, CUTS, PEOPLE, FEATURES = "names.html", "subtitles", "cuts", "people", "features"
PADDING_SECONDS = 1.0
TABLES = ("names.tsv", "names.jsonl")
UNKNOWN, NUMBERS = "unknown.tsv", features_folder.NUMBERS
NUMBERS_REMEDY = "delete it: the next call numbers unknown people again"
NUMBERS_BYTES = 256 * files.MB


class WhoResults(NamedTuple):
    """The results of a call.

    Attributes:
      people: person -> number of enrolled clips.
      decision: the decision that the results show.
      failed: path -> remedy, for files that could not be read or show no usable face. The remedy is
        "" if it was already printed.
      missed: people without a usable photo, who are not looked for.
    """

    people: dict[str, int]
    decision: "Decision"
    failed: dict[str, str]
    missed: Sequence[str] = ()

    @property
    def lines(self) -> list[tuple[str, str, str]]:
        """The film, the time and the person of each appearance."""
        rows = []
        for appearance in self.decision.appearances:
            name = appearance.identity or answers_lib.IGNORED
            time = appearances.format_span(appearance.start_s, appearance.end_s)
            words = filter(None, (name, appearances.format_certainty(appearance)))
            rows.append((appearance.video, time, ", ".join(words)))
        return rows


class UnknownNumbers(Struct, kw_only=True):
    """The contents of `unknown.json`: the numbers and corrections of unknown people.

    Films are identified by a digest of the file and its clips. A film that was replaced, or split
    into other clips, has a different digest.

    Attributes:
      films: digest of a film -> clip -> the number of the unknown person. Films without unknown
        people are included.
      denied: digest of a film -> clip -> people whom a user took off this clip.
      same: pairs (number, lower number) of the same person, as a user stated.
    """

    format: Literal[1] = 1
    films: Annotated[dict[Sha256, dict[Text, Size]], Meta(max_length=files.MAX_ITEMS)]
    denied: Annotated[dict[Sha256, dict[Text, list[Text]]], Meta(max_length=files.MAX_ITEMS)] = {}
    same: Annotated[list[tuple[Size, Size]], Meta(max_length=files.MAX_ITEMS)] = []

    def __post_init__(self) -> None:
        if any(low >= number for number, low in self.same):
            raise ValueError("`same`: the second number of a pair must be lower than the first")

    @property
    def highest(self) -> int:
        """The highest number of any clip; 0 if there are no clips."""
        return max((n for clips in self.films.values() for n in clips.values()), default=0)

    def resolve(self, group: str) -> str:
        """Returns the name of a group after the joins that users made."""
        number, lower = answers_lib.parse_group_number(group), dict(self.same)
        while number in lower:
            number = lower[number]
        return f"{answers_lib.UNKNOWN}{number}"

    def join(self, groups: Iterable[str]) -> "UnknownNumbers":
        """Returns numbers in which all groups are one person, with the lowest of their numbers."""
        numbers = sorted(answers_lib.parse_group_number(self.resolve(group)) for group in groups)
        new = [(number, numbers[0]) for number in numbers if number > numbers[0]]
        return msgspec.structs.replace(self, same=[*self.same, *new])

    def deny(self, films: Iterable[Film], clips: Collection[str], name: str) -> "UnknownNumbers":
        """Returns numbers in which the clips do not show the person `name`."""
        denied = {**self.denied}
        for film in films:
            denied_in_film = {**denied.get(_hash_film(film), {})}
            for clip in {track.clip for track in film.tracks}.intersection(clips):
                denied_in_film[clip] = sorted({*denied_in_film.get(clip, ()), name})
            if denied_in_film:
                denied[_hash_film(film)] = denied_in_film
        return msgspec.structs.replace(self, denied=denied)

    def keep(self, films: Iterable[Film], people: Collection[str]) -> "UnknownNumbers":
        """Returns numbers that contain only these films and people."""
        kept = sorted({_hash_film(film) for film in films} & self.films.keys())
        denied: dict[str, dict[str, list[str]]] = {}
        for digest in kept:
            for clip, names in self.denied.get(digest, {}).items():
                if remaining := [name for name in names if name in people]:
                    denied.setdefault(digest, {})[clip] = remaining
        films_kept = {digest: self.films[digest] for digest in kept}
        return UnknownNumbers(films=films_kept, denied=denied, same=self.same)

    def update(self, films: Iterable[Film], groups: Mapping[str, str]) -> "UnknownNumbers":
        """Adds the groups (clip -> `unknown N`) of all films; returns new numbers."""
        numbers = {**self.films}
        for film in films:
            clips = sorted({track.clip for track in film.tracks} & groups.keys())
            new = {clip: answers_lib.parse_group_number(groups[clip]) for clip in clips}
            numbers[_hash_film(film)] = numbers.get(_hash_film(film), {}) | new
        return msgspec.structs.replace(self, films=numbers)


class Decision(NamedTuple):
    """The people in all films of a folder.

    Attributes:
      films: all films.
      vectors: the vectors of all clips; None if there are no clips.
      vote_groups: clip -> its group. The clips of a group vote on their name.
      answers: clip -> answer.
      unknown: clip -> `unknown N`, for clips without a name.
      appearances: the appearances in order of time.
    """

    films: Sequence[Film]
    vectors: Vectors | None
    vote_groups: dict[str, str]
    answers: dict[str, Answer]
    unknown: dict[str, str]
    appearances: list[Appearance]


def _hash_film(film: Film) -> str:
    tracks = [[track.clip, track.start_s, track.end_s] for track in film.tracks]
    return files.sha256_json([film.sha256, tracks])


def _select(table: Mapping[str, Mapping[str, T]], films: Iterable[Film]) -> dict[str, T]:
    """Returns clip -> value for the clips of films; `table` is digest -> clip -> value."""
    selected: dict[str, T] = {}
    for film in films:
        selected |= table.get(_hash_film(film), {})
    return selected


def read_films(out: Path) -> list[Film]:
    """Returns all films of a folder of results."""
    return features_folder.read_films(out / FEATURES)


def read_numbers(out: Path) -> UnknownNumbers:
    """Returns the contents of `unknown.json`; without this file, empty numbers."""
    path = out / NUMBERS
    if not files.exists(path):
        return UnknownNumbers(films={})
    return schemas.read(path, UnknownNumbers, NUMBERS_REMEDY, NUMBERS_BYTES)


def name_people(
    films: Sequence[Path],
    people: Path | None,
    out: Path,
    models: Path,
    settings: ExtractionSettings | None = None,
    *,
    workers: int = 1,
    thumbnails: bool | None = None,
    fpir: float | None = None,
    threshold: float | None = None,
    padding: float = PADDING_SECONDS,
    check: bool = False,
    prune: bool = False,
    done: Callable[[FileOutcome], None] = lambda outcome: None,
) -> WhoResults:
    """Names the people in films, and writes the files listed at the top of this module.

    The results contain these films and all films of earlier calls.

    Args:
      films: videos, photos, or folders of them.
      people: a folder with photos of each person, as NAME/PHOTO.jpg or NAME.jpg. A face tag in a
        photo takes precedence over the name of its folder or file, see `regions`. If `people` is
        None, the gallery of an earlier call is used.
      out: the folder for results. It is created, and only its owner can read it.
      thumbnails: True keeps a picture of each face, False deletes the pictures of earlier calls,
        None keeps the choice of the last call.
      fpir, threshold: the rule by which a clip gets a name, see `Gallery.identify`.
      padding: seconds added before and after each appearance in cut lists.
      prune: removes films of earlier calls whose files no longer exist.
      models, settings, workers, check, done: see `pipeline.extract`.

    Raises:
      UserError: there is no film, there is no usable photo, a net is missing, or the folder for
        results contains a link.
    """
    answers_lib.check_choice(fpir, threshold)
    if not 0 <= padding < math.inf:
        raise UserError(f"--padding={padding:g}: give seconds, 0 or more")
    pipeline.check_apart(pipeline.list_files(films), out)
    photos = {} if people is None else _list_photos(people, out)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    with files.lock(files.make_folder(out, "out"), "out"):
        files.refuse_links(out)
        gallery = _open_gallery(out, models)
        if thumbnails is None:
            thumbnails = files.exists(out / FEATURES / THUMBNAILS)
        options = {"models": models, "thumbnails": thumbnails, "upgrade": True, "check": check}
        failed, names = dict[str, str](), set[str]()
        if people is not None:
            failed, names = _update_people(gallery, people, photos, out, workers, options)
        _enrol_named(gallery, out)
        if people is not None and not gallery.identities:
            raise UserError(
                f"no photo in '{people}' shows exactly one face: there is nobody to look for\n"
                "add photos that each show only one person"
            )
        if gallery.identities:
            # This reports a mistake in the flags before films are read, which takes long.
            gallery.rule(fpir=fpir, threshold=threshold)
        if not thumbnails:
            for folder in (out / PEOPLE).glob("*"):
                pipeline.remove_thumbnails(folder)
        before = read_numbers(out).keep(read_films(out), gallery.identities)
        outcomes = pipeline.extract(
            films, out / FEATURES, settings=settings, workers=workers,
            drop="missing" if prune else "nothing", done=done, **options,
        )  # fmt: skip
        failed |= {str(outcome.path): outcome.remedy for outcome in outcomes if not outcome.film}
        all_films = read_films(out)
        _report_missing(all_films, out)
        identify = functools.partial(gallery.identify, fpir=fpir, threshold=threshold)
        decision = decide(gallery, out, all_films, before, identify)
        write(out, gallery, decision, padding)
        missed = sorted(names - {photo.person for photo in _list_faces(gallery).values()})
        return WhoResults(gallery.identities, decision, failed, missed)


def _update_people(
    gallery: Gallery,
    people: Path,
    photos: Mapping[str, Sequence[Path]],
    out: Path,
    workers: int,
    options: Mapping[str, Any],
) -> tuple[dict[str, str], set[str]]:
    """Enrols the photos of a folder of people, and forgets people without photos.

    Returns path -> remedy of photos that are not used, and the names of the people in the folder.
    """
    _check_people(gallery, photos, people)
    outcomes_of = _read_photos(photos, out / PEOPLE, workers, options)
    gallery.refresh()  # another process may have changed the gallery in the meantime
    failed, names = _enrol_photos(gallery, outcomes_of, people)
    _forget(gallery, names, {*photos}, out)
    _warn_of_doubts(gallery, outcomes_of)
    return failed, names


def _read_photos(
    photos: Mapping[str, Sequence[Path]], out: Path, workers: int, options: Mapping[str, Any]
) -> dict[Path, list[FileOutcome]]:
    """Extracts the photos of all people; returns folder of a person -> outcomes."""
    groups: list[dict[Path, Sequence[Path]]] = [{}]
    for name, paths in photos.items():
        if sum(map(len, groups[-1].values())) >= pipeline.BATCH_PHOTOS:
            groups.append({})
        groups[-1][out / name] = paths

    def read(_: Children, group: Mapping[Path, Sequence[Path]]) -> dict[Path, list[FileOutcome]]:
        each = -(-workers // len(groups))
        return pipeline.extract_folders(group, workers=each, drop="others", tagged=True, **options)

    results = map_children(read, groups, workers)
    return {folder: outcomes for group in results for folder, outcomes in group.items()}


def _report_missing(films: Sequence[Film], out: Path) -> None:
    """Prints how many films are missing, and a film without pictures if other films have them."""
    missing = [film.video for film in films if not film.source.path.exists()]
    if missing:
        count = f"{len(missing):,} film{'' if len(missing) == 1 else 's'}"
        say(f"missing: {count}, such as {missing[0]}; --prune removes them from the results")
    for film in films:
        stem = film.tracks[0].clip.partition(".")[0] if film.tracks else None
        if stem and pipeline.lacks_pictures(out / FEATURES, stem):
            say(
                f"no pictures of {film.video}: add the film to the command to read it with pictures"
            )
            return


def _open_gallery(out: Path, models: Path) -> Gallery:
    """Returns the gallery of an earlier call, or a new gallery.

    Raises:
      UserError: there is no gallery, and the folder contains files of another program.
    """
    path = out / "gallery"
    if not files.exists(path) and (foreign := pipeline.find_foreign(out)):
        raise UserError(
            f"--out={out} contains '{show(foreign)}', which vidjax did not write\nname a new folder"
        )
    try:
        gallery = Gallery(path)
    except store.NoGalleryError:  # also if an earlier call was killed before it wrote the tables
        return Gallery.of_models(path, models, stranger_odds=STRANGER_ODDS)
    if roles := gallery.widen(models):
        say(
            f"nets were added ({', '.join(roles)}): films and photos are read again, names are kept"
        )
    return gallery


def _enrol_named(gallery: Gallery, out: Path) -> None:
    """Enrols the clips to which a user gave names in `unknown.tsv`."""
    path, features = out / UNKNOWN, out / FEATURES
    names = answers_lib.read_groups(path) if files.exists(path) else {}
    # If a call was interrupted, a replaced film has other clips with the same names.
    numbered = read_numbers(out).films
    films = [film for film in read_films(out) if _hash_film(film) in numbered]
    present = {track.clip for film in films for track in film.tracks}
    known = {clip: name for clip, name in names.items() if clip in present}
    if len(known) < len(names):
        example = show(min(names.keys() - present))
        say(
            f"{path}: {len(names) - len(known):,} clips no longer exist, such as {example}: "
            "their names are ignored"
        )
    if not known:
        return
    vectors = _embed(gallery, features, known)
    # If a film was replaced, its new clips have the names of the old, enrolled clips.
    if stale := {*vectors.names} & gallery.clips.keys() - gallery.complete(vectors):
        gallery.remove(clip=stale)
    try:
        gallery.enrol(vectors._replace(labels=tuple(known[clip] for clip in vectors.names)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    _drop_rows(path, known)
    for name, count in sorted(Counter(known.values()).items()):
        say(f"{show(name)}: named in {path.name}, {count:,} clip{'' if count == 1 else 's'}")


def _drop_rows(path: Path, named: Mapping[str, str | None]) -> None:
    """Removes rows from `unknown.tsv` that equal the rows `named`, clip -> name."""
    rows = answers_lib.read_groups(path, unknown=True) if files.exists(path) else {}
    remaining = {clip: name for clip, name in rows.items() if named.get(clip) != name}
    if len(remaining) < len(rows):
        text = tables.to_text([answers_lib.GROUP_COLUMNS, *remaining.items()], ".tsv")
        files.write_text(path, text)


def _list_photos(people: Path, out: Path) -> dict[str, list[Path]]:
    """Returns person -> photos, from folders PEOPLE/NAME/ and files PEOPLE/NAME.jpg.

    The dict may be empty only if an earlier call has enrolled people.
    """
    if not people.is_dir():
        hint = pipeline.suggest_path(people)
        raise UserError(
            f"'{people}' is not a folder: add {people}/NAME/PHOTO.jpg for each person{hint}"
        )
    if out.resolve().parent == people.resolve():
        raise UserError(
            f"--out={out} is inside '{people}', so it would be read as a person\n"
            "name another folder"
        )
    photos_of: dict[str, list[Path]] = {}
    pipeline.say_left_out([people])
    single = pipeline.split_files(people)[0]
    for path in sorted(people.iterdir()):
        if path.name.startswith(".") or (path.is_file() and path not in single):
            continue
        photos = [path]
        if path.is_dir():
            photos = [photo for folder in pipeline.walk(path) for photo in _list_stills(folder)]
        if not photos:
            say(
                f"{show(path.name)}: there is no photo in '{show(str(path))}': this person is not "
                "looked for"
            )
        else:
            name = check_person(path.name if path.is_dir() else path.stem)
            photos_of.setdefault(name, []).extend(photos)
    if not photos_of and not files.exists(out / "gallery"):
        raise UserError(f"'{people}' has no photos: add {people}/NAME/PHOTO.jpg for each person")
    return photos_of


def _check_people(gallery: Gallery, photos: Collection[str], people: Path) -> None:
    """Refuses a folder without any of the people of earlier calls: they would all be forgotten."""
    enrolled = _list_faces(gallery).values()
    before = {name for photo in enrolled for name in (photo.folder, photo.person)}
    if not photos or before & {*photos}:
        return
    is_person = normal_form(people.resolve().name) in before
    if len(before) < 2 and not is_person:
        return  # a user may replace a single person
    remedy = "call once with an empty folder to forget them, or name another --out"
    if is_person:
        above = shlex.quote(messages.relative_path(people.resolve().parent))
        remedy = f"it is the folder of a single person; name the folder above: --people={above}"
    names = ", ".join(map(show, sorted(before)[:5]))
    raise UserError(
        f"'{people}' contains none of the people of earlier calls ({names}): is it "
        f"the right folder?\n{remedy}"
    )


def _warn_of_numbers(names: Sequence[str], people: Path, only_files: bool) -> None:
    """Warns if photos such as Ada_1.jpg and Ada_2.jpg count as two people.

    If `only_files` is True, the folder of people has no subfolders, so it may be one person's
    folder.
    """
    if only_files and len(names) > 1:
        above = shlex.quote(messages.relative_path(people.resolve().parent))
        say(
            f"'{people}': each photo counts as a different person, such as {show(names[0])} and "
            f"{show(names[1])}. If all show the same person, name the "
            f"folder above: --people={above}"
        )
        return
    by_name: dict[str, list[str]] = {}
    for name in names:
        if number := re.fullmatch(r"(.*[^\W\d_])[\W_]*\d+\W*", name):
            by_name.setdefault(number[1], []).append(name)
    for name, twins in by_name.items():
        if len(twins) > 1:
            say(
                f"{show(twins[0])} and {show(twins[1])} count as two people. If they are the same "
                f"person, put the photos into '{people}/{show(name)}/'"
            )


def _list_stills(folder: Path) -> list[Path]:
    """Returns the photos and films of a folder, without the short films of Live Photos."""
    paths = pipeline.split_files(folder)[0]
    photos = {path for path in paths if path.suffix.lower() in pipeline.PHOTOS}
    stems = {path.stem for path in photos}
    return [path for path in paths if path in photos or path.stem not in stems]


def _enrol_photos(
    gallery: Gallery, outcomes_of: Mapping[Path, Sequence[FileOutcome]], people: Path
) -> tuple[dict[str, str], set[str]]:
    """Enrols the faces of photos; returns path -> remedy of unusable photos, and all people.

    A person is enrolled by all photos of the folder or file with this name, and by all face tags
    with this name. If a photo has face tags, only its tags count.

    Args:
      outcomes_of: folder of features -> outcomes of its photos.
    """
    failed, names = dict[str, str](), set[str]()
    usable: dict[Path, dict[str, str]] = {}
    single: list[str] = []  # people with a file in place of a folder
    enrolled = _list_faces(gallery).values()
    known = {photo.person for photo in enrolled}
    for folder, outcomes in outcomes_of.items():
        named = usable[folder] = {}
        tags = {name for outcome in outcomes if outcome.film for name in outcome.film.tags}
        for outcome in outcomes:
            people_of, clips = _check_photo(folder.name, outcome)
            names |= people_of
            named |= clips
            failed |= {} if clips else {str(outcome.path): outcome.remedy}
        # A folder of group photos is not a person.
        if tags and folder.name not in {*tags, *named.values(), *known}:
            names.discard(folder.name)
        if not all(outcome.film for outcome in outcomes):  # tags of unreadable photos are unknown
            names |= {photo.person for photo in enrolled if photo.folder == folder.name}
        if outcomes[0].path.parent == people:
            single.append(folder.name)
        _warn_of_tags(folder.name, outcomes, people)
    only_files = len(single) == len(outcomes_of) and not known
    _warn_of_numbers([name for name in single if name in names], people, only_files)
    labels = _choose_labels(gallery, names)
    for folder, named in usable.items():
        _enrol(gallery, folder, named, labels)
    for name in sorted(names.difference(*(named.values() for named in usable.values()))):
        say(f"no photo of {show(name)} shows exactly one face: {show(name)} is not looked for")
    return failed, names


def _check_photo(folder_name: str, outcome: FileOutcome) -> tuple[set[str], dict[str, str]]:
    """Returns the people of a photo, and clip -> person; prints the problems of the photo.

    `folder_name` is the name of the folder or file. It is used if the photo has no face tags.
    """
    film = outcome.film
    names, clips, problems = {folder_name}, dict[str, str](), [outcome.error]
    if film and film.tags:
        names, problems = film.tags, [film.bad_tags]
        problems += [f"there is no face at the tag of {show(tag)}" for tag in film.lost_tags]
        for track in film.tracks:
            if track.name:
                clips[track.clip] = track.name
                problem = features_folder.check_face(track)
                problems += [f"{show(track.name)}: {problem}"] if problem else []
    elif film:
        clip, problem = features_folder.check_photo(film)
        clips, problems = {clip: folder_name} if clip else {}, [film.bad_tags, problem]
    for problem in filter(None, problems):
        say(problem if str(outcome.path) in problem else f"{outcome.path}: {problem}")
    return names, clips


def _warn_of_tags(name: str, outcomes: Sequence[FileOutcome], people: Path) -> None:
    """Warns once if face tags of photos in a person's folder name only other people.

    A photo directly in the folder `people` belongs to no person's folder.
    """
    new = [
        (outcome.path, outcome.film.tags) for outcome in outcomes
        if outcome.film and not outcome.kept and outcome.path.parent != people
    ]  # fmt: skip
    if foreign := [(path, names) for path, names in new if names and name not in names]:
        path, names = foreign[0]
        tagged = ", ".join(map(show, sorted(names)[:3])) + ", ..." * (len(names) > 3)
        more = f"; {len(foreign) - 1:,} more such photos" if len(foreign) > 1 else ""
        say(f"{path}: its face tags name {tagged}, not {show(name)}; the tags are used{more}")


def _choose_labels(gallery: Gallery, names: Collection[str]) -> dict[str, str]:
    """Returns folder name -> the name that new photos of this folder get in the gallery.

    This is the folder name, if no photo of the folder was renamed in the gallery. It is the most
    frequent new name, if photos were renamed. A name that is also in `names` is chosen only if all
    photos of the folder were renamed to names in `names`.
    """
    before = {name: Counter[str]() for name in names}
    for clip, photo in _list_faces(gallery).items():
        if (label := gallery.clips[clip].identity) and photo.person in before:
            before[photo.person][label] += 1
    chosen = {}
    for name, labels in before.items():
        order = [(label != name and label in names, -labels[label], label) for label in labels]
        chosen[name] = min(order)[-1] if order else name
    return chosen


def _enrol(
    gallery: Gallery, folder: Path, usable: Mapping[str, str], labels: Mapping[str, str]
) -> None:
    """Enrols the clips `usable`, clip -> person, of a folder of photos.

    Removes enrolled clips whose photo is no longer in this folder.
    """
    old = {
        clip
        for clip, photo in _list_faces(gallery).items()
        if photo.folder == folder.name and photo.person in labels
    }
    if not usable:
        gallery.remove(clip=old)
        return
    vectors = _embed(gallery, folder, usable)
    photo_of = {clip: PhotoFace(folder.name, clip, usable[clip]) for clip in vectors.names}
    vectors = vectors._replace(names=tuple(str(photo_of[clip]) for clip in vectors.names))
    unchanged = gallery.complete(vectors)
    gallery.remove(clip=old - unchanged)
    new = vectors.only({*vectors.names} - unchanged)
    if new.names:
        people = {str(photo): labels[photo.person] for photo in photo_of.values()}
        gallery.enrol(new._replace(labels=tuple(people[clip] for clip in new.names)))


def _warn_of_doubts(gallery: Gallery, outcomes: Mapping[Path, Sequence[FileOutcome]]) -> None:
    """Warns of photos that may show another person, and of files that are given as two people.

    Args:
      outcomes: folder of a person -> outcomes of its photos.
    """
    given = {
        str(PhotoFace(folder.name, track.clip, track.name or folder.name)):
            (outcome.path, outcome.film)
        for folder, photos in outcomes.items()
        for outcome in photos if outcome.film
        for track in outcome.film.tracks
    }  # fmt: skip
    person_of = {clip: entry.identity for clip, entry in gallery.clips.items() if entry.identity}
    owners: dict[str, set[str]] = {}  # digest of a file -> people
    whole = {clip: film.sha256 for clip, (_, film) in given.items() if not film.tags}
    for clip in whole.keys() & person_of.keys():
        owners.setdefault(whole[clip], set()).add(person_of[clip])
    twins = {clip for clip, digest in whole.items() if len(owners.get(digest, ())) > 1}
    single = {clip: person_of[clip] for clip in person_of.keys() - twins}
    doubtful = doubts.find_doubtful_photos(gallery, single)
    for clip in sorted(given.keys() & (twins | doubtful.keys()) & person_of.keys()):
        (path, film), name = given[clip], show(person_of[clip])
        if clip in twins:
            others = ", ".join(map(show, sorted(owners[film.sha256] - {person_of[clip]})))
            say(f"{path}: the same file is also of {others}: delete the wrong copy")
        else:
            like = doubtful[clip]
            seems = f"looks like {show(like)}" if like else f"unlike the other photos of {name}"
            wrong = "correct its tag" if film.tags else "move it"
            say(f"{path}: given as {name}, but {seems}: {wrong} if it shows another person")


class PhotoFace(NamedTuple):
    """An enrolled face of a photo. Its clip in the gallery is `people/FOLDER/CLIP`.

    If a face tag names a person other than the folder, the clip is `people/FOLDER/CLIP/PERSON`.
    """

    folder: str
    clip: str
    person: str

    def __str__(self) -> str:
        tag = "" if self.person == self.folder else f"/{self.person}"
        return f"{PEOPLE}/{self.folder}/{self.clip}{tag}"

    @classmethod
    def of(cls, clip: str) -> "PhotoFace | None":
        """Returns the photo of a clip of the gallery; None if the clip is part of a film."""
        parts = clip.split("/", 3)
        if parts[0] != PEOPLE or len(parts) < 3:
            return None
        return cls(normal_form(parts[1]), parts[2], normal_form(parts[3 if len(parts) > 3 else 1]))


def _list_faces(gallery: Gallery) -> dict[str, PhotoFace]:
    """Returns clip -> enrolled face of a photo."""
    return {clip: photo for clip in gallery.clips if (photo := PhotoFace.of(clip))}


def _forget(gallery: Gallery, names: set[str], places: set[str], out: Path) -> None:
    """Removes people whose photos are gone, from the gallery and from disk.

    This includes the clips of films with which they were enrolled. It also removes the page and the
    tables of the earlier call, because these name the people, even if this call fails later.

    Args:
      names: the people who have photos now.
      places: the names of the folders of photos that exist now.
    """
    photos = _list_faces(gallery)
    label = {clip: gallery.clips[clip].identity for clip in photos}
    forgotten = {clip for clip, photo in photos.items() if photo.person not in names}
    gone = {clip for clip, photo in photos.items() if photo.folder not in places} | forgotten
    kept = {label[clip] for clip in photos.keys() - gone}
    people = {label[clip] for clip in forgotten} - kept - {None}
    for name in sorted(map(str, people)):
        say(f"{show(name)} has no photos any more and is forgotten")
    labelled = {
        clip: entry.identity for clip, entry in gallery.clips.items() if entry.identity in people
    }
    if labelled:
        _drop_rows(out / UNKNOWN, labelled)  # rows of an interrupted call would enrol them again
    gallery.remove(clip=gone | labelled.keys())
    for folder in (out / PEOPLE).iterdir():
        if folder.name not in places and normal_form(folder.name) in names:
            say(f"{show(folder.name)} has no photos any more, but face tags still name this person")
        if folder.name not in places and not pipeline.remove_features(folder):
            say(f"'{show(str(folder))}' contains files that vidjax did not write: they are kept")
    if gone:
        _remove_results(out)


def _embed(gallery: Gallery, features: Path, clips: Collection[str]) -> Vectors:
    paths = sorted({features_folder.locate_features(features, clip) for clip in clips})
    reads = gallery.backend.widths
    known = (
        clip._replace(modalities={part: x for part, x in clip.modalities.items() if part in reads})
        for clip in read_clips(paths) if clip.name in clips
    )  # fmt: skip
    return gallery.embed(MemoryClips.pack(known, reads, ()))


def decide(
    gallery: Gallery,
    out: Path,
    films: Sequence[Film],
    before: UnknownNumbers,
    identify: Callable[..., dict[str, Answer]],
    last: Decision | None = None,
) -> Decision:
    """Names the clips of all films, and numbers unknown people.

    The numbers are written to `unknown.json`. The clips of a group vote on their name. A group
    keeps the number that its clips had `before`. A new group gets a number above the highest. An
    enrolled clip shows the person of its label.

    Args:
      identify: `gallery.identify` with a rule.
      last: the last decision on the same films, whose vectors and groups are used again; or None.
    """
    vectors, votes = (last.vectors, last.vote_groups) if last else (None, dict[str, str]())
    answers, groups = dict[str, Answer](), dict[str, str]()
    clips = {track.clip for film in films for track in film.tracks}
    if clips:
        vectors = vectors or _embed(gallery, out / FEATURES, clips)
        enrolled = {clip: gallery.clips[clip].identity for clip in gallery.complete(vectors)}
        apart = appearances.pair_seen_together(films)
        votes = votes or gallery.group(vectors, apart, absorb=False)
        answers = dict.fromkeys(vectors.names, NOBODY)
        if gallery.identities:
            answers = identify(vectors, groups=votes)
        for clip, names in _select(before.denied, films).items():
            if (answer := answers.get(clip, NOBODY)).identity in names:
                best = tuple(pair for pair in answer.best if pair[0] not in names)
                answers[clip] = answer._replace(identity=None, best=best, evidence=())
        for clip, name in enrolled.items():
            known = Answer(name, 1.0, 0.0, ((str(name), 1.0),), (appearances.TOLD,))
            answers[clip] = NOBODY if name is None else known
        answers = appearances.settle_answers(answers, films)
        nameless = {clip for clip, answer in answers.items() if answer.identity is None}
        groups = gallery.group(vectors.only(nameless - enrolled.keys()), apart, begin=votes)
        groups = _keep_numbers(groups, _select(before.films, films), before.highest)
    numbers = msgspec.to_builtins(before.update(films, groups))
    # The clips of `unknown.tsv` are enrolled only if their films are in `unknown.json`.
    files.write_json(out / NUMBERS, numbers)
    groups = {clip: before.resolve(group) for clip, group in groups.items()}
    in_films = appearances.find_appearances(answers, films, groups)
    return Decision(films, vectors, votes, answers, groups, in_films)


def _keep_numbers(
    groups: Mapping[str, str], before: Mapping[str, int], highest: int
) -> dict[str, str]:
    """Returns clip -> `unknown N`, in which groups keep the numbers that their clips had.

    A group takes the number of most of its clips, unless another group has more clips with this
    number. Each other group gets a number above `highest`, larger groups first.

    Args:
      groups: clip -> name of its group, see `answers.name_groups`.
      before: clip -> number.
    """
    votes = Counter((group, before[clip]) for clip, group in groups.items() if clip in before)
    number: dict[str, int] = {}
    taken: set[int] = set()
    rank = answers_lib.parse_group_number
    for group, old in sorted(votes, key=lambda pair: (-votes[pair], pair[1], rank(pair[0]))):
        if group not in number and old not in taken:
            number[group] = old
            taken.add(old)
    new_groups = sorted({*groups.values()} - number.keys(), key=rank)
    number |= {group: new for new, group in enumerate(new_groups, highest + 1)}
    return {clip: f"{answers_lib.UNKNOWN}{number[group]}" for clip, group in groups.items()}


def write(
    out: Path, gallery: Gallery, decision: Decision, padding: float = PADDING_SECONDS
) -> None:
    """Writes the results: tables, subtitles, cut lists, and the page.

    `padding` is the number of seconds added before and after each appearance in cut lists.
    """
    _remove_results(out)
    (out / UNKNOWN).unlink(missing_ok=True)
    for name in TABLES:
        appearances.write(out / name, decision.appearances, decision.films)
    places_of = appearances.list_places(decision.films)
    answers_lib.write_groups(out / UNKNOWN, decision.unknown, places_of)
    by_video = appearances.group_by_video(decision.appearances)
    (out / SUBTITLES).mkdir(mode=0o700, exist_ok=True)
    films = [film for film in decision.films if not film.photo]
    names = {film.video: film.video.replace("/", " - ") for film in films}
    twins = Counter(Path(name).stem.lower() for name in names.values())
    stems = make_file_stems(
        Path(name).stem if twins[Path(name).stem.lower()] == 1 else name for name in names.values()
    )
    for video, stem in zip(names, stems, strict=True):
        for ending in appearances.SUBTITLES:
            text = appearances.to_subtitles(by_video.get(video, []), ending)
            files.write_text(out / SUBTITLES / f"{stem}{ending}", text)
    (out / CUTS).mkdir(mode=0o700, exist_ok=True)
    cuts.write(out / CUTS, decision.appearances, decision.films, padding)

    def address(film: Film, seconds: float) -> str:
        place = quote(os.fsencode(os.path.relpath(film.source.path, out.resolve())))
        return place if film.photo else f"{place}#t={seconds:.1f}"

    files.write_text(out / PAGE, render_page(out, gallery, decision, address))
    (out / PAGE).chmod(0o600)


def render_page(
    out: Path,
    gallery: Gallery,
    decision: Decision,
    address: Callable[[Film, float], str],
    forms: names_page.Forms | None = None,
) -> str:
    """Returns the page of a decision; for `address` and `forms`, see `names_page.render`."""
    people = {name: list[names_page.Picture]() for name in gallery.identities}
    for clip, photo in sorted(_list_faces(gallery).items()):
        name = gallery.clips[clip].identity
        picture = _locate_picture(out, out / PEOPLE / photo.folder, photo.clip)
        if picture and name in people:
            people[name].append((picture, name))
    locate = functools.partial(_locate_picture, out, out / FEATURES)
    films = sorted(decision.films, key=lambda film: film.video.casefold())
    return names_page.render(
        decision.appearances, films, people, locate, decision.answers, address, forms
    )


def _locate_picture(out: Path, features: Path, clip: str) -> str:
    """Returns the address of a clip's picture relative to the page; "" if there is no picture."""
    path = features_folder.locate_thumbnail(features, clip)
    return quote(os.fsencode(path.relative_to(out))) if path.exists() else ""


def _remove_results(out: Path) -> None:
    for name in (PAGE, *TABLES):
        (out / name).unlink(missing_ok=True)
    files.remove_ours(out / SUBTITLES, r".+\.(vtt|srt)")
    files.remove_ours(out / CUTS, r".+\.edl")
