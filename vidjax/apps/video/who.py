"""Names people in films from a few photos of each person (`vidjax who`).

The results are these files:

    OUT/people/        features of the photos of people: NAME/PHOTO.jpg or NAME.jpg in --people
    OUT/features/      features of the films
    OUT/said.jsonl     the log of what users said: names, corrections and ignored faces
    OUT/gallery/       a gallery of the people, for the commands of `vidjax gallery` that only read
    OUT/*/thumbnails/  with --thumbnails: a small picture of each face
    OUT/names.tsv      a table with a row for each appearance of a person in a film
    OUT/names.jsonl    the same table for programs
    OUT/names.html     the same table as a page with timelines
    OUT/unknown.tsv    clips of unknown people
    OUT/unmatched.tsv  names and corrections of faces that are no longer found
    OUT/subtitles/     a .vtt and a .srt file for each video
    OUT/cuts/          an .otio file for programs that edit films, and a playlist, for each person

Each call replaces the gallery, the tables, the page, the subtitles and the timelines.

- If a photo was deleted, and --people still shows other known photos, the photo is forgotten.
- If --people shows no known photo, its drive may not be connected. So photos are forgotten only
  with --forget-missing. A call without --people forgets nobody.
- If a net was replaced or added, the next call reads the given films and photos again. Names and
  corrections are kept, because the log identifies faces by film, time and place.
"""

import csv
import itertools
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vidjax.apps.gallery import answers as answers_lib, card_notes
from vidjax.apps.gallery.backend import compare_equal
from vidjax.apps.gallery.changes import advise_other_films
from vidjax.apps.gallery.enrolment import make_state
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import NoGalleryError, State
from vidjax.apps.video import heirs, log, media, media_files, naming, photos, pipeline, results
from vidjax.apps.video.decide import Decision, Faces, Rule, decide, enrol, list_new_lines
from vidjax.apps.video.media import FEATURES, PEOPLE, ExtractionSettings
from vidjax.apps.video.names_page import format_appearance_time
from vidjax.apps.video.photos import FoundPhotos
from vidjax.apps.video.pipeline import FileOutcome
from vidjax.apps.video.results import PADDING_SECONDS, UNKNOWN
from vidjax.apps.video.said import Said, is_photo
from vidjax.data.checks import list_entries
from vidjax.utils import files, messages, tables
from vidjax.utils.errors import UserError
from vidjax.utils.groups import group_by_key
from vidjax.utils.messages import Note, Tell, ignore_note
from vidjax.utils.names import IGNORED, show

WAIT_SECONDS = 20.0  # the longest time for which a change of names waits for another program
OWN_NAME = re.compile(r"unknown (face )?\d+")  # in `unknown.tsv`, if no user has edited it
MOST_LETTERS = 100_000  # of a row of this table that are read


class WhoResults(NamedTuple):
    """The people that `vidjax who` has found in films, and the files that could not be used."""

    people: dict[str, int]  # name of a person -> number of enrolled clips
    decision: Decision  # the people in the films
    # Path of a file that could not be read or shows no usable face -> remedy for the user, or "" if
    # the remedy was already printed.
    failed: dict[str, str]
    missed: Sequence[str] = ()  # the people without a usable photo, who cannot be recognised
    notes: Sequence[Note] = ()  # also given to `tell` of `name_people`
    card: str = ""  # a text about all names, see `card_notes.describe`

    @property
    def lines(self) -> list[tuple[str, str, str]]:
        """The film, the time and the person of each appearance, as texts."""
        rows, films = [], {film.video: film for film in self.decision.films}
        for appearance in self.decision.appearances:
            name = (appearance.identity or IGNORED) + appearance.mark
            time = format_appearance_time(appearance, films[appearance.video])
            words = filter(None, (name, naming.format_certainty(appearance)))
            rows.append((appearance.video, time, ", ".join(words)))
        return rows


def name_people(
    films: str | Path | Sequence[str | Path],
    people: str | Path | None,
    out: str | Path,
    models: str | Path,
    settings: ExtractionSettings | None = None,
    *,
    workers: int = 1,
    thumbnails: bool | None = None,
    fpir: float | None = None,
    threshold: float | None = None,
    padding: float = PADDING_SECONDS,
    check: bool = False,
    prune: bool = False,
    forget_missing: bool = False,
    take_over: bool = False,
    done: Callable[[FileOutcome], None] = lambda outcome: None,
    tell: Tell = ignore_note,
) -> WhoResults:
    """Names the people in films, and writes the results into the folder `out`, see the module.

    The results contain these films and all films of earlier calls.

    Args:
      films: one or more videos, photos, or folders of videos and photos.
      people: a folder with photos of each person, as NAME/PHOTO.jpg or NAME.jpg. If a photo program
        stored names of faces in a photo, these names are used. If `people` is None, the photos of
        an earlier call are used.
      out: the folder for results. If it does not exist, it is created, readable only by its owner.
      thumbnails: True keeps a picture of each face. False deletes the pictures of earlier calls.
        None keeps the choice of the last call.
      fpir: the largest share of strangers that may get a name, see `Gallery.identify`.
      threshold: the probability that a name needs. If it is given, `fpir` must be None.
      padding: the seconds that are added before and after each appearance in timelines.
      prune: True deletes the results of a missing film if its folder still has other files.
      forget_missing: True forgets people whose photos are all missing. If `prune` is True, too, the
        results of all missing films are deleted.
      take_over: True takes corrections of films over to films that show the same, see `heirs`.
      models, settings, workers, check, done, tell: see `pipeline.extract_files`.

    Raises:
      UserError: there is no film, there is no usable photo, a net is missing, the folder for
        results contains a link, or an earlier version of vidjax wrote the results.
    """
    films = [files.local(film) for film in ([films] if isinstance(films, str | Path) else films)]
    out, models, rule = files.local(out), files.local(models), Rule(fpir, threshold)
    answers_lib.check_choice(fpir, threshold)
    if not 0 <= padding < math.inf:
        raise UserError(f"--padding={padding:g} is not a duration: give seconds, 0 or more")
    media_files.check_apart(media_files.list_files(films), out)
    notes = list[Note]()

    def note(given: Note) -> None:
        notes.append(given)
        tell(given)

    folder = None if people is None else files.local(people)
    paths_of = {} if folder is None else photos.list_photos(folder, out, note)
    with files.lock(files.make_folder(out, "out", mode=0o700), "out"):
        files.refuse_links(out)
        gallery, state = _open(out, models, note)
        options = {
            "models": models, "thumbnails": _choose_thumbnails(out, thumbnails), "check": check,
            "workers": workers,
        }  # fmt: skip
        said, found = Said(log.read(out)), FoundPhotos({}, [], {}, set())
        if folder is not None:
            photos.check_folder(folder, paths_of, out, said, forget_missing)
            outcomes = photos.extract(paths_of, out, note, options)
            known = {said.call(x.person) for x in said.list_photos() if x.person}
            found = photos.find_faces(folder, outcomes, known, note)
            _check_photos(folder, found, said, note)
        if state.index.names and not any(x.person == log.STRANGERS for x in found.faces):
            answers_lib.choose_rule(state, *rule)  # reports wrong flags before films are read
        read = pipeline.extract_files(
            films, out / FEATURES, settings=settings, done=done, tell=note,
            prune=prune, forget_missing=forget_missing, **options,
        )  # fmt: skip
        failed = found.failed | {str(x.path): x.remedy for x in read if x.error}
        with log.lock(out, WAIT_SECONDS):
            changed = {x.media.sha256 for of in found.outcomes.values() for x in of
                       if x.media and not (x.kept or x.error)}  # fmt: skip
            faces = results.load_faces(out, _drop_clips(state, changed))
            is_alike, forgotten = False, list[Note]()
            if folder is not None:
                faces, is_alike, missing, forgotten = _follow_photos(
                    folder, out, found, faces, forget_missing, note
                )
                failed |= {str(folder / name): "" for name in missing}
            decision = _decide(out, faces, rule, take_over, note)
            _keep_table(out, decision.unknown, note)
            _report(out, decision, prune, note)
            is_explained = is_alike and card_notes.compare(decision.state).problem == "closer"
            if not is_explained:
                card_notes.warn(decision.state)
            card = results.write(out, gallery, decision, padding, explained=is_explained)
            for about in forgotten:  # only now, no file contains the names
                note(about)
        shown = {name for name, clips in decision.people.items() if any(map(is_photo, clips))}
        missed = sorted(found.names - shown - {log.STRANGERS})
        return WhoResults(decision.count_clips(), decision, failed, missed, notes, card)


def _choose_thumbnails(out: Path, thumbnails: bool | None) -> bool:
    """Returns whether pictures of faces are kept in the folder of results `out`.

    `thumbnails` is as in `name_people`. If pictures are not kept, deletes the pictures of earlier
    calls.
    """
    if thumbnails is None:
        thumbnails = files.exists(out / FEATURES / media.THUMBNAILS)
    if not thumbnails:
        for folder in (out / FEATURES, out / PEOPLE):
            if files.exists(folder):
                media.remove_thumbnails(folder)
    return thumbnails


def _open(out: Path, models: Path, tell: Tell) -> tuple[Gallery, State]:
    """Opens or makes the folder of results `out`; returns the gallery, and its present content.

    If the nets in the folder `models` were replaced since the last call, features from the earlier
    nets are removed, and the content has no clips.
    """
    log.check_version(out)
    if not log.has_log(out):
        if foreign := list_entries(out):
            raise files.foreign_error(foreign[0])
        with log.lock(out, WAIT_SECONDS):
            log.append(out, [])
    log.read(out)  # refuses results of earlier versions
    path, (origin, backend) = out / results.GALLERY, card_notes.read_cards(models)
    try:
        gallery = Gallery(path)
    except NoGalleryError:  # also if an earlier call was killed while it made the gallery
        gallery = Gallery.of_models(path, models, results.COMMAND)
    state = gallery.state
    _change_nets(out, models, tell)
    if state.origin.cards != origin.cards or not compare_equal(state.index.backend, backend):
        state = make_state(state.version, origin, backend, {}, state.command)
    return gallery, state


def _change_nets(out: Path, models: Path, tell: Tell) -> None:
    """Removes features of earlier nets, if the nets in `models` were replaced or new ones added."""
    digests, changed = pipeline.read_digests(models), set[str]()
    for folder in (out / PEOPLE, out / FEATURES):
        before = media.read_extraction(folder)
        if before and before.models != digests and before.models.keys() <= digests.keys():
            pipeline.check_nets(models, before.settings)  # before features are removed
            changed |= {role for role, of in digests.items() if before.models.get(role) != of}
            media.set_aside(folder)
            before.models = digests
            media.write(folder / media.NAME, before)
    if not changed:
        return
    tell(Note(
        f"there are new nets ({', '.join(sorted(changed))}): the films and photos of this run are "
        "read again, and names are kept\nto read films of earlier runs of this command again, add "
        "these films", warning=False,
    ))  # fmt: skip


def _drop_clips(state: State, changed: set[str]) -> State:
    """Leaves out the clips of photos that were read again. `changed` are digests of photos."""
    stems = {*map(media.make_photo_stem, changed)}
    clips = {
        clip: x for clip, x in state.clips.items()
        if not is_photo(clip) or clip.split("/")[1].partition(".")[0] not in stems
    }  # fmt: skip
    if len(clips) == len(state.clips):
        return state
    return make_state(state.version, state.origin, state.index.backend, clips, state.command)


def _check_photos(people: Path, found: FoundPhotos, said: Said, tell: Tell) -> None:
    """Reports that nobody can be recognised. Raises UserError if there are no earlier results."""
    if found.faces or said.photos or any(said.names.values()):
        return
    problem = f"no photo in '{people}' can be used, so nobody can be recognised"
    problem += "\nadd photos that each show only one person"
    if not said.films:
        raise UserError(problem)
    tell(Note(problem))


def _decide(out: Path, faces: Faces, rule: Rule, take_over: bool, tell: Tell) -> Decision:
    """Decides the names, and adds new numbers of unknown people to the log.

    If a film shows the same as a corrected film, takes over the corrections, or says how to.
    """
    decision = decide(faces, log.read(out), rule)
    for heir in (offers := heirs.find_heirs(decision)):
        how = ": to take its corrections over, add --take-over"
        if take_over:
            log.append(out, heirs.take_over(decision, heir))
            how = ", and has its corrections now"
        tell(Note(heir.about + how, warning=False))
    if take_over and offers:
        decision = decide(faces, log.read(out), rule)
    log.append(out, list_new_lines(decision))
    return decision


def _follow_photos(
    people: Path, out: Path, found: FoundPhotos, faces: Faces, forget_missing: bool, tell: Tell
) -> tuple[Faces, bool, Sequence[str], list[Note]]:
    """Writes what the photos say into the log, and forgets people whose photos were deleted.

    Returns the faces, whether photos with different names seem to show the same person, the names
    of folders whose photos may be on another drive, and notes about people without photos. The
    caller must hold the lock of the log.
    """
    everything, lines = [*faces.films, *faces.photos], log.read(out)
    said = Said(lines, everything)
    stated = photos.assign(found.faces, said, out)
    gone, missing = photos.find_absent(people, found, faces.photos, said, forget_missing)
    first = photos.list_statements(found.faces, stated, stated.unused, said)
    enrolled = enrol(faces.state, faces, Said([*lines, *gone, *first], everything))
    enrolled = card_notes.judge(enrolled, found.list_mirrored())
    of_faces = [(x.clip, stated.person_of[x.clip, x.person], x) for x in found.faces]
    doubtful = photos.find_doubtful(enrolled, of_faces, people)
    unused = doubtful.unused | stated.unused
    new = [*gone, *photos.list_statements(found.faces, stated, unused, said)]
    log.append(out, new)
    for note in (*stated.notes, *map(Note, doubtful.notes)):
        tell(note)
    _report_missing(people, missing, said, tell)
    before, after = said, Said([*lines, *new], everything)
    notes = _forget(out, before, after, found, forget_missing)
    found.names.update(said.call(person) for person in missing)
    is_new = {x.clip for x in found.faces} - before.photos.keys()
    names = {x.identity for clip, x in enrolled.clips.items() if clip in is_new and x.identity}
    advise_other_films(enrolled, sorted(map(str, names)))
    _remove_photos(out, found, forget_missing or not missing)
    faces = faces._replace(state=faces.state._replace(origin=enrolled.origin))
    return faces, doubtful.is_alike, [*missing.values()], notes


def _report_missing(people: Path, missing: Mapping[str, str], said: Said, tell: Tell) -> None:
    if not missing:
        return
    names = sorted(show(said.call(person)) for person in missing)
    hint = "" if os.path.isdir(people) else messages.suggest_path(people)
    tell(Note(
        f"photos of {messages.list_some(names)} are missing in '{show(str(people))}': is the drive "
        "connected? These people stay known\n"
        f"to forget people whose photos are missing, add --forget-missing{hint}"
    ))  # fmt: skip


def _forget(
    out: Path, before: Said, after: Said, found: FoundPhotos, forget_missing: bool
) -> list[Note]:
    """Forgets people whose photos were all deleted; returns notes about them.

    `before` and `after` are what was said before and after this call. If `forget_missing` is False,
    a person stays known if the user has given the name of the person to a face.
    """
    had, has = (
        group_by_key((after.find_root(x.person), x.name) for x in said.list_photos() if x.person)
        for said in (before, after)
    )
    forgotten, notes = set[str](), list[Note]()
    for person in sorted(had.keys() - has.keys(), key=after.call):
        name, count = after.call(person), len(after.list_told(person))
        typed = f"name that you typed for {messages.count(count, 'face')}"
        if not name or found.names.intersection(had[person]):  # the folder has unusable photos
            continue
        if count and not forget_missing:
            command = ["vidjax", "forget", f"--identity={name}", "--delete", str(out)]
            text = f"{show(name)} no longer has photos, but is still a {typed}\n"
            text += f"to forget {show(name)}: {shlex.join(command)}"
            notes.append(Note(text, warning=False))
            continue
        text = f"{show(name)} no longer has photos and is forgotten"
        notes.append(Note(text + f", with the {typed}" * bool(count), warning=False))
        forgotten.add(person)
    if forgotten:
        # Page and tables contain their names, and this call may fail before it writes new ones.
        log.replace(out, after.write_anew(forgotten))
        results.remove_results(out)
    return notes


def _remove_photos(out: Path, found: FoundPhotos, all_others: bool) -> None:
    """Removes the features of photos that the log no longer mentions and no folder shows."""
    shown = {x.media.sha256 for of in found.outcomes.values() for x in of if x.media}
    said = {line.film for line in log.read(out) if line.says == "photo"}
    kept = {
        stem for stem, photo in media.describe_media_files(out / PEOPLE).items()
        if photo.sha256 in shown or (photo.sha256 in said and not all_others)
    }  # fmt: skip
    media.remove_leftovers(out / PEOPLE, kept)


def _keep_table(out: Path, unknown: Mapping[str, str], tell: Tell) -> None:
    """Keeps `unknown.tsv` as `unknown.tsv.mine` if a user has edited it, and says what to do.

    vidjax does not read names from this table. `unknown` is clip -> unknown person.
    """
    path, mine = out / UNKNOWN, out / f"{UNKNOWN}.mine"
    if not files.exists(path):
        return
    content = files.read_bytes(path, files.JSON_BYTES)
    code = "utf-16" if content.startswith(tables.BOMS) else "utf-8-sig"
    lines = [line[:MOST_LETTERS] for line in content.decode(code, "replace").splitlines()[1:]]
    rows = [row for line in lines for row in csv.reader([line], delimiter="\t")]
    edited = [row for row in rows if not (len(row) == 5 and OWN_NAME.fullmatch(row[1]))]
    if not edited:
        return
    if files.exists(mine):  # an earlier table, whose names may not have been given yet
        places = (out / f"{UNKNOWN}.mine{number}" for number in itertools.count(2))
        os.replace(mine, next(place for place in places if not files.exists(place)))
    os.replace(path, mine)
    names = dict[str, str]()  # unknown person -> name
    for clip, name, *_ in ([*row, "", ""] for row in edited):
        if clip in unknown and name and not OWN_NAME.fullmatch(name):
            names.setdefault(unknown[clip], name)
    flags = (f"--name={person}={name}" for person, name in names.items())
    command = shlex.join(["vidjax", "review", str(out), *flags])
    tell(Note(f"names in {path} are not read. Your table is kept as {mine.name}\n"
              f"to give these names: {command}"))  # fmt: skip


def _report(out: Path, decision: Decision, pruned: bool, tell: Tell) -> None:
    """Reports missing, dark, upside-down and unread films, and corrections without effect.

    If `pruned` is True (the flag `--prune` was given), missing films are not reported.
    """
    films, features = decision.films, out / FEATURES

    def say(text: str) -> None:
        tell(Note(text, warning=False))

    missing = [film.video for film in films if not film.source.is_valid]
    if missing and not pruned:
        count = f"{messages.count(len(missing), 'film')} cannot be found, such as {missing[0]}"
        say(f"{count}: to delete the results of missing films, add --prune")
    if dark := [film.video for film in films if film.is_dark]:
        tell(Note(
            f"films that are too dark to find faces: {len(dark):,}, such as {dark[0]}\n"
            "brighten the pictures, and call vidjax who again"
        ))  # fmt: skip
    if turned := [film.video for film in films if film.upside_down]:
        tell(Note(
            f"films that are upside down, so that faces are missed: {len(turned):,}, such as "
            f"{turned[0]}: turn them by 180 degrees, and call vidjax who again"
        ))  # fmt: skip
    for film in films:
        stem = film.tracks[0].clip.partition(".")[0] if film.tracks else None
        lacks = stem and media.lacks_pictures(features, stem)
        if lacks and os.path.exists(film.source.path):
            say(f"there are no thumbnails of {film.video}: call vidjax who with this film")
            break
    unread = media.find_unread(features)
    for film in [*unread.values()][:1]:
        tell(Note(
            f"films that were not read with the present nets: {len(unread):,}, such as "
            f"{film.video}. Names and corrections are kept, but the tables lack these films\n"
            "to read them, add them to the command"
        ))  # fmt: skip
    photos = media.find_unread(out / PEOPLE)
    for photo in [*photos.values()][:1]:
        tell(Note(
            f"photos of people that were not read with the present nets: {len(photos):,}, such as "
            f"{photo.video}\nto read the photos, add --people=FOLDER"
        ))  # fmt: skip
    if rows := results.list_unmatched(decision):
        tell(Note(
            f"corrections of faces that are no longer found: {len(rows):,}, see "
            f"{out / results.UNMATCHED}"
        ))  # fmt: skip
