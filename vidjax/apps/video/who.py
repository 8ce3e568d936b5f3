"""Who appears when in videos, by a few photos of people: extract, enrol, identify, group, a page.

    OUT/people/NAME/   features of the photos of a person, or of a photo of several with face tags
    OUT/features/      features of the videos
    OUT/gallery/       the people, as a gallery: `vidjax gallery` goes on from here
    OUT/*/thumbnails/  from --thumbnails on: a small picture of each face
    OUT/names.tsv      video, begin, end, person, probability, clips, evidence, box, path, date
    OUT/names.jsonl    the same for programs
    OUT/names.html     shows it
    OUT/unknown.tsv    clips of people without a name: write names in it, and call again
    OUT/unknown.json   the numbers of unknown people, which they keep while their films stay
    OUT/subtitles/     a .vtt and a .srt for each video
    OUT/cuts/          a .edl for each person, for programs that edit films

Everything but features, numbers and the gallery is written anew by each call. People and photos
that `people` no longer has are forgotten; a call without `people` keeps all whom the gallery knows.
Names that `vidjax gallery rename` and `relabel` changed stay as they are, also where nets are added
to the models, for which all films and photos are read once more.
"""

import functools
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
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
from vidjax.apps.video.pipeline import Outcome
from vidjax.data.clip_files import read_clips
from vidjax.data.memory import MemoryClips
from vidjax.data.processes import Children, map_children
from vidjax.data.untrusted.names import file_stems, normal_form, show
from vidjax.runs import schemas
from vidjax.runs.schemas import Sha256, Size, Text
from vidjax.runs.terminal import say
from vidjax.utils import files, messages, tables
from vidjax.utils.errors import UserError

STRANGER_ODDS = 3.0  # of the faces of films, three of four show nobody enrolled
TOLD = "told"  # the evidence of a clip that was itself enrolled
PAGE, SUBTITLES, CUTS, PEOPLE, FEATURES = "names.html", "subtitles", "cuts", "people", "features"
PADDING = 1.0  # seconds
TABLES = ("names.tsv", "names.jsonl")
UNKNOWN, NUMBERS = "unknown.tsv", features_folder.NUMBERS
NUMBERS_REMEDY = "delete it: unknown people are numbered anew"
NUMBERS_BYTES = 256 * files.MB


class Done(NamedTuple):
    """People -> number of their clips, all appearances in films, and the number of unknown people.

    `failed` are files that could not be read or do not help, each with a remedy that was not told
    yet, or "". `missed` are people of whom no photo shows one face.
    """

    people: dict[str, int]
    found: list[Appearance]
    groups: int
    failed: dict[str, str]
    decision: "Decision"
    missed: Sequence[str] = ()

    @classmethod
    def of(cls, gallery: Gallery, decision: "Decision", failed: dict[str, str]) -> "Done":
        """Returns what a decision says."""
        groups = len({*decision.groups.values()})
        return cls(gallery.identities, decision.found, groups, failed, decision)

    @property
    def lines(self) -> list[tuple[str, str, str]]:
        """The film, the time, and the person of each appearance."""
        rows = []
        for one in self.found:
            sure = "" if one.probability is None else f", {appearances.percent(one.probability)}"
            time = appearances.span(one.start_s, one.end_s)
            rows.append((one.video, time, f"{one.identity or answers_lib.IGNORED}{sure}"))
        return rows


class Numbers(Struct, kw_only=True):
    """What is known of unknown people, `unknown.json`.

    A film that was replaced, or cut in other clips, has another digest: what is known goes with
    films.

    Attributes:
      films: digest of a film's clips -> clip -> the number of its group when it was last unknown. A
        film without unknown people is there, too.
      denied: the same digests -> clip -> the people whom somebody said that it does not show.
      same: pairs of a number and a lower number, of the same person as somebody said.
    """

    format: Literal[1] = 1
    films: Annotated[dict[Sha256, dict[Text, Size]], Meta(max_length=files.MAX_ITEMS)]
    denied: Annotated[dict[Sha256, dict[Text, list[Text]]], Meta(max_length=files.MAX_ITEMS)] = {}
    same: Annotated[list[tuple[Size, Size]], Meta(max_length=files.MAX_ITEMS)] = []

    def __post_init__(self) -> None:
        if any(low >= number for number, low in self.same):
            raise ValueError("`same` leads to a number that is not lower")

    def of(self, films: Iterable[features_folder.Film]) -> dict[str, int]:
        """Returns clip -> number, of films."""
        return {c: n for film in films for c, n in self.films.get(_digest(film), {}).items()}

    def denied_of(self, films: Iterable[features_folder.Film]) -> dict[str, list[str]]:
        """Returns clip -> people whom it does not show, of films."""
        return {c: n for film in films for c, n in self.denied.get(_digest(film), {}).items()}

    def clips(self, films: Iterable[features_folder.Film]) -> set[str]:
        """Returns all clips of those films that are here."""
        return {one.clip for film in films if _digest(film) in self.films for one in film.tracks}

    @property
    def highest(self) -> int:
        """The highest number that a clip has; 0 without any."""
        return max((n for clips in self.films.values() for n in clips.values()), default=0)

    def joined(self, group: str) -> str:
        """Returns the name of the group that a group belongs to, as somebody said."""
        number, lower = answers_lib.number_of(group), dict(self.same)
        while number in lower:
            number = lower[number]
        return f"{answers_lib.UNKNOWN}{number}"

    def join(self, groups: Iterable[str]) -> "Numbers":
        """Returns these numbers, where all groups are the one of the lowest number."""
        numbers = sorted(answers_lib.number_of(self.joined(group)) for group in groups)
        new = [(number, numbers[0]) for number in numbers if number > numbers[0]]
        return msgspec.structs.replace(self, same=[*self.same, *new])

    def deny(
        self, films: Iterable[features_folder.Film], clips: Collection[str], name: str
    ) -> "Numbers":
        """Returns these numbers, where clips of films do not show a person."""
        denied = {**self.denied}
        for film in films:
            own = {**denied.get(_digest(film), {})}
            for clip in {track.clip for track in film.tracks}.intersection(clips):
                own[clip] = sorted({*own.get(clip, ()), name})
            if own:
                denied[_digest(film)] = own
        return msgspec.structs.replace(self, denied=denied)

    def only(self, films: Iterable[features_folder.Film], people: Collection[str]) -> "Numbers":
        """Returns what is known of films and people, without all others."""
        kept = sorted({_digest(film) for film in films} & self.films.keys())
        denied = {
            digest: own
            for digest in kept
            if (own := {
                clip: known for clip, names in self.denied.get(digest, {}).items()
                if (known := [name for name in names if name in people])
            })
        }  # fmt: skip
        films_kept = {digest: self.films[digest] for digest in kept}
        return Numbers(films=films_kept, denied=denied, same=self.same)

    def updated(
        self, films: Iterable[features_folder.Film], groups: Mapping[str, str]
    ) -> "Numbers":
        """Returns these numbers, and those of groups, clip -> `unknown N`, of clips of films."""
        found = {**self.films}
        for film in films:
            clips = {one.clip for one in film.tracks} & groups.keys()
            new = {clip: answers_lib.number_of(groups[clip]) for clip in sorted(clips)}
            found[_digest(film)] = found.get(_digest(film), {}) | new
        return msgspec.structs.replace(self, films=found)


class Decision(NamedTuple):
    """Who is in the films of a folder.

    Attributes:
      films: all films.
      vectors: of all clips; None without clips.
      votes: clip -> the group with which it votes on its name.
      answers: clip -> answer.
      groups: clip -> `unknown N`, of clips without a name.
      found: the appearances, in order of time.
    """

    films: Sequence[features_folder.Film]
    vectors: Vectors | None
    votes: dict[str, str]
    answers: dict[str, Answer]
    groups: dict[str, str]
    found: list[Appearance]


def _digest(film: features_folder.Film) -> str:
    tracks = [[track.clip, track.start_s, track.end_s] for track in film.tracks]
    return files.sha256_json([film.sha256, tracks])


def read_films(out: Path) -> list[features_folder.Film]:
    """Returns all films of a folder of results."""
    return features_folder.read_films(out / FEATURES)


def read_numbers(out: Path) -> Numbers:
    """Returns what a folder of results knows of unknown people."""
    path = out / NUMBERS
    if not files.exists(path):
        return Numbers(films={})
    return schemas.read(path, Numbers, NUMBERS_REMEDY, NUMBERS_BYTES)


def who(
    films: Sequence[Path],
    people: Path | None,
    out: Path,
    models: Path,
    settings: features_folder.Settings | None = None,
    *,
    workers: int = 1,
    thumbnails: bool | None = None,
    fpir: float | None = None,
    threshold: float | None = None,
    padding: float = PADDING,
    check: bool = False,
    prune: bool = False,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> Done:
    """Names the people in films, and writes the files of the module's docstring.

    The results show these films, and all films of earlier calls.

    Args:
      films: videos, or folders of them; photos, too.
      people: a folder with a folder of photos for each person, or with photos NAME.jpg; None to
        name nobody who is not in the gallery of an earlier call. Face tags in a photo count more
        than the name of its folder or file, see `extract.regions`.
      out: the folder for results; it is made, and readable by its owner alone.
      thumbnails: shows the face beside each name; False deletes pictures of earlier calls, None
        does as the call before.
      fpir, threshold: when a clip gets a name, see `Gallery.identify`.
      padding: seconds that cut lists show before and after each appearance.
      prune: removes films of earlier calls that are no longer at their place.
      models, settings, workers, check, done: as of `pipeline.extract`.

    Raises:
      UserError: there is no film or no usable photo of anybody, a net is missing, or there is a
        link in the folder for results.
    """
    answers_lib.check_choice(fpir, threshold)
    if not 0 <= padding < math.inf:
        raise UserError(f"--padding={padding:g}: give seconds, 0 or more")
    pipeline.check_apart(pipeline.list_files(films), out)
    photos = {} if people is None else _photos(people)
    if people and not photos and not files.exists(out / "gallery"):
        raise UserError(f"'{people}' has no photos: wanted {people}/NAME/PHOTO.jpg for each person")
    if people and out.resolve().parent == people.resolve():
        raise UserError(f"--out={out} would pass for a person of '{people}': name another folder")
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    with files.lock(files.make_folder(out, "out"), "out"):
        files.refuse_links(out)
        gallery = _gallery(out, models)
        if thumbnails is None:
            thumbnails = files.exists(out / FEATURES / features_folder.THUMBNAILS)
        how = {"models": models, "thumbnails": thumbnails, "anew": True, "check": check}
        failed, names = dict[str, str](), set[str]()
        if people is not None:
            read = _read_photos(photos, out / PEOPLE, workers, how)
            gallery.refresh()  # others may have changed it meanwhile
            failed, names = _enrol_photos(gallery, read, people)
            _forget(gallery, names, {*photos}, out)
            _say_doubts(gallery, read)
        _enrol_named(gallery, out)
        if people is not None and not gallery.identities:
            raise UserError(f"no photo in '{people}' shows one face: there is nobody to look for")
        if gallery.identities:
            # A mistake is reported before films are read.
            gallery.rule(fpir=fpir, threshold=threshold)
        if not thumbnails:
            for one in (out / PEOPLE).glob("*"):
                pipeline.remove_thumbnails(one)
        films_before = read_films(out)
        before = read_numbers(out).only(films_before, gallery.identities)
        drop = "missing" if prune else "nothing"
        outcomes = pipeline.extract(
            films, out / FEATURES, settings=settings, workers=workers, drop=drop, done=done, **how
        )
        identify = functools.partial(gallery.identify, fpir=fpir, threshold=threshold)
        found = _look(gallery, failed, outcomes, before, out, identify, padding)
        looked_for = {photo.person for clip in gallery.clips if (photo := Photo.of(clip))}
        return found._replace(missed=sorted(names - looked_for))


def _read_photos(
    photos: Mapping[str, Sequence[Path]], out: Path, workers: int, how: Mapping[str, Any]
) -> dict[Path, list[Outcome]]:
    """Extracts the photos of all people; returns folder of a person -> outcomes."""
    groups: list[dict[Path, Sequence[Path]]] = [{}]
    for name, own in photos.items():
        if sum(map(len, groups[-1].values())) >= pipeline.BATCH:
            groups.append({})
        groups[-1][out / name] = own

    def read(_: Children, group: Mapping[Path, Sequence[Path]]) -> dict[Path, list[Outcome]]:
        share = -(-workers // len(groups))
        return pipeline.extract_folders(group, workers=share, drop="others", tagged=True, **how)

    found = map_children(read, groups, workers)
    return {place: outcomes for group in found for place, outcomes in group.items()}


def _look(
    gallery: Gallery,
    failed: dict[str, str],
    outcomes: Sequence[Outcome],
    before: Numbers,
    out: Path,
    identify: Callable[..., dict[str, Answer]],
    padding: float,
) -> Done:
    """Finds the people of the gallery in films, and writes the results."""
    failed |= {str(outcome.path): outcome.remedy for outcome in outcomes if outcome.film is None}
    films = read_films(out)
    missing = [film.video for film in films if not film.source.path.exists()]
    if missing:
        count = f"{len(missing):,} film{'' if len(missing) == 1 else 's'}"
        say(f"not at their place any more: {count}, such as {missing[0]}; --prune forgets them")
    decision = decide(gallery, out, films, before, identify)
    write(out, gallery, decision, padding)
    return Done.of(gallery, decision, failed)


def _gallery(out: Path, models: Path) -> Gallery:
    """Returns the gallery of an earlier call, or a new one; refuses a folder with other things."""
    path = out / "gallery"
    if not files.exists(path) and (
        foreign := next((one.name for one in out.iterdir() if one.name[0] != "."), None)
    ):
        raise UserError(
            f"--out={out}: it holds '{show(foreign)}', which no earlier call wrote\n"
            "name a new folder"
        )
    try:
        gallery = Gallery(path)
    except store.NoGalleryError:  # or a killed call has left one without tables
        return Gallery.of_models(path, models, stranger_odds=STRANGER_ODDS)
    if new := gallery.widen(models):
        say(f"new in the models: {', '.join(new)}: names stay, films and photos are read once more")
    return gallery


def _enrol_named(gallery: Gallery, out: Path) -> None:
    """Enrols the clips of films to which somebody wrote names in the table of the unknown."""
    path, features = out / UNKNOWN, out / FEATURES
    names = answers_lib.read_groups(path) if files.exists(path) else {}
    if not names:
        return
    # A film that was replaced in a call that was cut off has other clips of the same names.
    there = read_numbers(out).clips(features_folder.read_films(features))
    known = {clip: name for clip, name in names.items() if clip in there}
    if len(known) < len(names):
        away = show(min(names.keys() - there))
        say(f"{path}: {len(names) - len(known):,} clips are not there any more, such as {away}")
    if not known:
        return
    vectors = _embed(gallery, features, known)
    # Clips of films that were replaced since: the new ones bear their names.
    if stale := {*vectors.names} & gallery.clips.keys() - gallery.complete(vectors):
        gallery.remove(clip=stale)
    try:
        gallery.enrol(vectors._replace(labels=tuple(known[n] for n in vectors.names)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    _take_out(path, known)
    for name, count in sorted(Counter(known.values()).items()):
        say(f"{show(name)}: named in {path.name}, {count:,} clip{'' if count == 1 else 's'}")


def _take_out(path: Path, shown: Mapping[str, str | None]) -> None:
    """Takes rows that are in `shown`, clip -> name, out of the table of the unknown."""
    rows = answers_lib.read_groups(path, unknown=True) if files.exists(path) else {}
    left = {clip: name for clip, name in rows.items() if shown.get(clip) != name}
    if len(left) < len(rows):
        files.write_text(path, tables.to_text([answers_lib.GROUPS, *left.items()], ".tsv"))


def _photos(people: Path) -> dict[str, list[Path]]:
    """Returns person -> photos, of folders PEOPLE/NAME/ and files PEOPLE/NAME.jpg."""
    if not people.is_dir():
        raise UserError(f"'{people}' is no folder: wanted {people}/NAME/PHOTO.jpg for each person")
    found: dict[str, list[Path]] = {}
    pipeline.say_left_out([people])
    single = pipeline.split_files(people)[0]
    for one in sorted(people.iterdir()):
        if one.name.startswith(".") or (one.is_file() and one not in single):
            continue
        photos = [one]
        if one.is_dir():
            photos = [photo for place in pipeline.walk(one) for photo in _stills(place)]
        if not photos:
            say(f"{show(one.name)}: no photo in '{show(str(one))}': not looked for")
        else:
            name = check_person(one.name if one.is_dir() else one.stem)
            found.setdefault(name, []).extend(photos)
    return found


def _say_numbered(names: Sequence[str], people: Path, alone: bool) -> None:
    """Says that photos such as Ada_1.jpg and Ada_2.jpg are two people here; if `alone`, all are."""
    if alone and len(names) > 1:
        above = shlex.quote(messages.shown(people.resolve().parent))
        say(
            f"'{people}': each photo is another person here, such as {show(names[0])} and "
            f"{show(names[1])}. If all show one person, name the folder above: --people={above}"
        )
        return
    by_name: dict[str, list[str]] = {}
    for name in names:
        if number := re.fullmatch(r"(.*[^\W\d_])[\W_]*\d+\W*", name):
            by_name.setdefault(number[1], []).append(name)
    for name, twins in by_name.items():
        if len(twins) > 1:
            say(
                f"{show(twins[0])} and {show(twins[1])} are two people here. If they are one, "
                f"put the photos into '{people}/{show(name)}/'"
            )


def _stills(place: Path) -> list[Path]:
    """Returns the photos and films of a folder, without the short films of Live Photos."""
    there = pipeline.split_files(place)[0]
    photos = {one.stem for one in there if one.suffix.lower() in pipeline.PHOTOS}
    return [one for one in there if one.suffix.lower() in pipeline.PHOTOS or one.stem not in photos]


def _enrol_photos(
    gallery: Gallery, read: Mapping[Path, Sequence[Outcome]], people: Path
) -> tuple[dict[str, str], set[str]]:
    """Enrols the faces of photos; returns photos that did not help, and all who have photos.

    `read` are folder of features -> outcomes. A person is looked for by all photos of the folder
    or file of this name, and by all face tags. A photo with tags shows those whom they name.
    """
    failed, names = dict[str, str](), set[str]()
    usable: dict[Path, dict[str, str]] = {}
    known = {photo.person for clip in gallery.clips if (photo := Photo.of(clip))}
    for place, outcomes in read.items():
        own = usable[place] = {}
        tags = {name for one in outcomes if one.film for name in one.film.tags}
        for outcome in outcomes:
            people_of, clips = _judge(place.name, outcome)
            names |= people_of
            own |= clips
            failed |= {} if clips else {str(outcome.path): outcome.remedy}
        if tags and place.name not in {*tags, *own.values(), *known}:  # a folder of group photos
            names.discard(place.name)
        if not all(one.film for one in outcomes):  # its tags are not known now
            there = map(Photo.of, gallery.clips)
            names |= {one.person for one in there if one and one.folder == place.name}
        _say_tagged(place.name, [one for one in outcomes if one.path.parent != people])
    flat = [place.name for place, some in read.items() if some[0].path.parent == people]
    alone = len(flat) == len(read) and not known
    _say_numbered([name for name in flat if name in names], people, alone)
    labels = _labels(gallery, names)
    for place, own in usable.items():
        _enrol(gallery, place, own, labels)
    for name in sorted(names.difference(*(own.values() for own in usable.values()))):
        say(f"no photo of {show(name)} shows one face: {show(name)} is not looked for")
    return failed, names


def _judge(name: str, outcome: Outcome) -> tuple[set[str], dict[str, str]]:
    """Returns who has a photo, and clip -> person; says what is wrong with it.

    `name` is of the folder or file, which counts for photos without face tags.
    """
    film = outcome.film
    names, clips, problems = {name}, dict[str, str](), [outcome.error]
    if film and film.tags:
        names, problems = film.tags, [film.bad_tags]
        problems += [f"no face is found where {show(tag)} is tagged" for tag in film.lost_tags]
        for track in film.tracks:
            if track.name:
                clips[track.clip] = track.name
                problem = features_folder.judge_face(track)
                problems += [f"{show(track.name)}: {problem}"] if problem else []
    elif film:
        clip, problem = features_folder.judge_photo(film)
        clips, problems = {clip: name} if clip else {}, [film.bad_tags, problem]
    for problem in filter(None, problems):
        say(problem if str(outcome.path) in problem else f"{outcome.path}: {problem}")
    return names, clips


def _say_tagged(name: str, outcomes: Sequence[Outcome]) -> None:
    """Says, once, if face tags in photos of a person's folder do not name this person."""
    new = (one for one in outcomes if not one.kept)
    tags = [(one.path, one.film.tags) for one in new if one.film and one.film.tags]
    if other := [(path, names) for path, names in tags if name not in names]:
        path, names = other[0]
        few = ", ".join(map(show, sorted(names)[:3])) + ", ..." * (len(names) > 3)
        more = f"; {len(other) - 1:,} more such photos" if len(other) > 1 else ""
        say(f"{path}: its face tags name {few}, not {show(name)}: the tags count{more}")


def _labels(gallery: Gallery, names: Collection[str]) -> dict[str, str]:
    """Returns person -> label of new photos: the name, or what the gallery has renamed it to.

    A photo that was renamed or relabelled in the gallery keeps that name. New photos get it, too,
    but a name of another one of `names` only if all photos have such names.
    """
    before = {name: Counter[str]() for name in names}
    for clip, one in gallery.clips.items():
        if one.identity and (photo := Photo.of(clip)) and photo.person in before:
            before[photo.person][one.identity] += 1
    found = {}
    for name, labels in before.items():
        order = [(one != name and one in names, -labels[one], one) for one in labels]
        found[name] = min(order)[-1] if order else name
    return found


def _enrol(
    gallery: Gallery, place: Path, usable: Mapping[str, str], labels: Mapping[str, str]
) -> None:
    """Enrols clips of the folder of features of some photos: clip -> person.

    Clips of people who have photos elsewhere, and here no more, are removed.
    """
    photos = [(clip, photo) for clip in gallery.clips if (photo := Photo.of(clip))]
    old = {clip for clip, one in photos if one.folder == place.name and one.person in labels}
    if not usable:
        gallery.remove(clip=old)
        return
    vectors = _embed(gallery, place, usable)
    photo = {clip: Photo(place.name, clip, usable[clip]) for clip in vectors.names}
    vectors = vectors._replace(names=tuple(str(photo[clip]) for clip in vectors.names))
    same = gallery.complete(vectors)
    gallery.remove(clip=old - same)
    new = vectors.only({*vectors.names} - same)
    if new.names:
        people = {str(one): labels[one.person] for one in photo.values()}
        gallery.enrol(new._replace(labels=tuple(people[clip] for clip in new.names)))


def _say_doubts(gallery: Gallery, outcomes: Mapping[Path, Sequence[Outcome]]) -> None:
    """Says which photos, place of a person -> photos, may show others, or are given twice."""
    given = {
        str(Photo(place.name, track.clip, track.name or place.name)): (outcome.path, outcome.film)
        for place, own in outcomes.items()
        for outcome in own if outcome.film
        for track in outcome.film.tracks
    }  # fmt: skip
    shown = {clip: one.identity for clip, one in gallery.clips.items() if one.identity}
    owners: dict[str, set[str]] = {}  # digest of a file -> people
    whole = {clip: film.sha256 for clip, (_, film) in given.items() if not film.tags}
    for clip in whole.keys() & shown.keys():
        owners.setdefault(whole[clip], set()).add(shown[clip])
    twins = {clip for clip, digest in whole.items() if len(owners.get(digest, ())) > 1}
    doubtful = doubts.among(gallery, {clip: shown[clip] for clip in shown.keys() - twins})
    for clip in sorted(given.keys() & (twins | doubtful.keys()) & shown.keys()):
        (path, film), name = given[clip], show(shown[clip])
        if clip in twins:
            others = ", ".join(map(show, sorted(owners[film.sha256] - {shown[clip]})))
            say(f"{path}: the same file is a photo of {others}: delete the wrong one")
        else:
            like = doubtful[clip]
            seems = f"looks like {show(like)}" if like else f"unlike the other photos of {name}"
            wrong = "mend its tag" if film.tags else "move it"
            say(f"{path}: given as {name}, and {seems}: {wrong} if it shows somebody else")


class Photo(NamedTuple):
    """A face of a photo by its clip in the gallery, `people/FOLDER/CLIP`.

    It is `people/FOLDER/CLIP/PERSON` where a face tag names a person other than the folder.
    """

    folder: str
    clip: str
    person: str

    def __str__(self) -> str:
        tag = "" if self.person == self.folder else f"/{self.person}"
        return f"{PEOPLE}/{self.folder}/{self.clip}{tag}"

    @classmethod
    def of(cls, clip: str) -> "Photo | None":
        """Returns the photo of a clip of the gallery; None for a clip of a film."""
        parts = clip.split("/", 3)
        if parts[0] != PEOPLE or len(parts) < 3:
            return None
        return cls(normal_form(parts[1]), parts[2], normal_form(parts[3 if len(parts) > 3 else 1]))


def _forget(gallery: Gallery, names: set[str], places: set[str], out: Path) -> None:
    """Removes whom earlier calls enrolled and `names` has no more: from gallery and disk.

    So are clips of films by which they were enrolled, and the page and tables of the earlier call,
    which name them, even if this call fails. `places` are the folders of photos that are there.
    """
    photos = {clip: photo for clip in gallery.clips if (photo := Photo.of(clip))}
    label = {clip: gallery.clips[clip].identity for clip in photos}
    forgotten = {clip for clip, photo in photos.items() if photo.person not in names}
    gone = {clip for clip, photo in photos.items() if photo.folder not in places} | forgotten
    kept = {label[clip] for clip in photos.keys() - gone}
    people = {label[clip] for clip in forgotten} - kept - {None}
    for name in sorted(map(str, people)):
        say(f"{show(name)} is no longer among the people: forgotten")
    own = {clip: one.identity for clip, one in gallery.clips.items() if one.identity in people}
    if own:
        _take_out(out / UNKNOWN, own)  # rows of a call that was cut off would enrol them again
    gallery.remove(clip=gone | own.keys())
    for one in (out / PEOPLE).iterdir():
        if one.name not in places and normal_form(one.name) in names:
            say(f"{show(one.name)} has no photos of their own any more: face tags still name them")
        if one.name not in places and not pipeline.remove_features(one):
            say(f"'{show(str(one))}' holds files that vidjax did not write: they stay")
    if gone:
        _remove_results(out)


def _embed(gallery: Gallery, features: Path, clips: Collection[str]) -> Vectors:
    paths, reads = (
        sorted({features_folder.features(features, clip) for clip in clips}),
        gallery.reads[0],
    )
    known = (
        clip._replace(modalities={part: x for part, x in clip.modalities.items() if part in reads})
        for clip in read_clips(paths) if clip.name in clips
    )  # fmt: skip
    return gallery.embed(MemoryClips.pack(known, reads, ()))


def decide(
    gallery: Gallery,
    out: Path,
    films: Sequence[features_folder.Film],
    before: Numbers,
    identify: Callable[..., dict[str, Answer]],
    last: Decision | None = None,
) -> Decision:
    """Names the clips of all films, and numbers unknown people, for this call and the next.

    Clips that form a group vote. Groups keep the numbers that their clips had `before`, and a new
    group gets a number above the highest. A clip that is enrolled shows whom its label says.

    Args:
      identify: `gallery.identify` with a rule.
      last: a decision on the same films, before people corrected names; None without.
    """
    vectors, votes = (last.vectors, last.votes) if last else (None, dict[str, str]())
    answers, groups = dict[str, Answer](), dict[str, str]()
    clips = {track.clip for film in films for track in film.tracks}
    if clips:
        vectors = vectors or _embed(gallery, out / FEATURES, clips)
        told = {clip: gallery.clips[clip].identity for clip in gallery.complete(vectors)}
        apart = appearances.seen_together(films)
        votes = votes or gallery.group(vectors, apart, absorb=False)
        answers = dict.fromkeys(vectors.names, NOBODY)
        if gallery.identities:
            answers = identify(vectors, groups=votes)
        for clip, names in before.denied_of(films).items():
            if (answer := answers.get(clip, NOBODY)).identity in names:
                best = tuple(pair for pair in answer.best if pair[0] not in names)
                answers[clip] = answer._replace(identity=None, best=best, evidence=())
        for clip, name in told.items():
            known = Answer(name, 1.0, 0.0, ((str(name), 1.0),), (TOLD,))
            answers[clip] = NOBODY if name is None else known
        answers = appearances.settle(answers, films)
        nobody = {n for n, x in answers.items() if x.identity is None and n not in told}
        groups = gallery.group(vectors.only(nobody), apart, begin=votes)
        groups = _keep_numbers(groups, before.of(films), before.highest)
    numbers = msgspec.to_builtins(before.updated(films, groups))
    files.write_json(out / NUMBERS, numbers)  # rows without are not read
    groups = {clip: before.joined(group) for clip, group in groups.items()}
    found = appearances.find(answers, films, groups)
    return Decision(films, vectors, votes, answers, groups, found)


def _keep_numbers(
    groups: Mapping[str, str], before: Mapping[str, int], highest: int
) -> dict[str, str]:
    """Returns clip -> `unknown N`, where groups keep the numbers that their clips had.

    A group takes the number that most of its clips had, if no other group has more clips of it.
    Others get numbers above the `highest`, larger groups lower ones.
    `groups` are clip -> name of its group, see `answers.name_groups`; `before` clip -> number.
    """
    votes = Counter((group, before[clip]) for clip, group in groups.items() if clip in before)
    number: dict[str, int] = {}
    taken: set[int] = set()
    order = sorted(votes, key=lambda pair: (-votes[pair], pair[1], answers_lib.number_of(pair[0])))
    for group, old in order:
        if group not in number and old not in taken:
            number[group] = old
            taken.add(old)
    new = highest
    for group in sorted({*groups.values()} - number.keys(), key=answers_lib.number_of):
        new += 1
        number[group] = new
    return {clip: f"{answers_lib.UNKNOWN}{number[group]}" for clip, group in groups.items()}


def write(out: Path, gallery: Gallery, decision: Decision, padding: float = PADDING) -> None:
    """Writes the results: tables, subtitles, cut lists, and the page; `padding` is as of `who`."""
    _remove_results(out)
    (out / UNKNOWN).unlink(missing_ok=True)
    for name in TABLES:
        appearances.write(out / name, decision.found, decision.films)
    answers_lib.write_groups(out / UNKNOWN, decision.groups, appearances.places(decision.films))
    by_video = appearances.by_video(decision.found)
    (out / SUBTITLES).mkdir(mode=0o700, exist_ok=True)
    films = [film for film in decision.films if not film.photo]
    names = {film.video: film.video.replace("/", " - ") for film in films}
    twins = Counter(Path(name).stem.lower() for name in names.values())
    stems = file_stems(
        Path(name).stem if twins[Path(name).stem.lower()] == 1 else name for name in names.values()
    )
    for video, stem in zip(names, stems, strict=True):
        for ending in appearances.SUBTITLES:
            text = appearances.to_subtitles(by_video.get(video, []), ending)
            files.write_text(out / SUBTITLES / f"{stem}{ending}", text)
    (out / CUTS).mkdir(mode=0o700, exist_ok=True)
    cuts.write(out / CUTS, decision.found, decision.films, padding)
    places = {
        film.video: quote(os.fsencode(os.path.relpath(film.source.path, out.resolve())))
        for film in decision.films
    }

    def address(film: features_folder.Film, seconds: float) -> str:
        return places[film.video] + ("" if film.photo else f"#t={seconds:.1f}")

    files.write_text(out / PAGE, render_page(out, gallery, decision, address))
    (out / PAGE).chmod(0o600)


def render_page(
    out: Path,
    gallery: Gallery,
    decision: Decision,
    address: Callable[[features_folder.Film, float], str],
    forms: names_page.Forms | None = None,
) -> str:
    """Returns the page of a decision; `address` and `forms` are those of `page.render`."""
    people = {name: list[names_page.Picture]() for name in gallery.identities}
    for clip, shown in sorted(gallery.clips.items()):
        if (photo := Photo.of(clip)) and shown.identity in people:
            picture = _picture(out, out / PEOPLE / photo.folder, photo.clip)
            people[shown.identity] += [(picture, shown.identity)] if picture else []
    shows = (out / FEATURES / features_folder.THUMBNAILS).exists()
    of_clip = functools.partial(_picture, out, out / FEATURES) if shows else lambda clip: ""
    films = sorted(decision.films, key=lambda film: film.video.casefold())
    return names_page.render(
        decision.found, films, people, of_clip, decision.answers, address, forms
    )


def _picture(out: Path, features: Path, clip: str) -> str:
    """Returns the address of the picture of a clip, from the page on; empty without."""
    path = features_folder.thumbnail(features, clip)
    return quote(os.fsencode(path.relative_to(out))) if path.exists() else ""


def _remove_results(out: Path) -> None:
    for name in (PAGE, *TABLES):
        (out / name).unlink(missing_ok=True)
    files.remove_ours(out / SUBTITLES, r".+\.(vtt|srt)")
    files.remove_ours(out / CUTS, r".+\.edl")
