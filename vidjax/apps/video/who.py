"""Names people in films from a few photos of each person (`vidjax who`).

The results are these files:

    OUT/people/NAME/   features of the photos of a person, or of a photo with several face tags
    OUT/features/      features of the films
    OUT/gallery/       the gallery of the people, for the commands of `vidjax gallery`
    OUT/*/thumbnails/  with --thumbnails: a small picture of each face
    OUT/names.tsv      a table with a row for each appearance of a person in a film
    OUT/names.jsonl    the same table for programs
    OUT/names.html     the same table as a page with timelines
    OUT/unknown.tsv    clips of unknown people: write names into it and call the command again
    OUT/unknown.json   the numbers of unknown people, for later calls
    OUT/unmatched.tsv  corrections of clips that other nets have not found again
    OUT/subtitles/     a .vtt and a .srt file for each video
    OUT/cuts/          .edl files for each person, for programs that edit films

Each call replaces the tables, the page, the subtitles and the cut lists. If a photo is removed from
a folder that has other files, the next call forgets it. If a whole folder of photos is missing, the
photos stay enrolled unless the call has --forget-missing: a drive may not be connected. A call
without a folder of people keeps every person of the gallery. Names that `vidjax gallery rename` or
`relabel` changed are kept. If the models have other or more nets than before, the films and photos
of the call are read again, and names and corrections are kept, see `other_nets`.
"""

import contextlib
import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec

from vidjax.apps.gallery import answers as answers_lib, card_notes, store
from vidjax.apps.gallery.answers import Answer
from vidjax.apps.gallery.changes import check_person
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.labelling import advise_other_films
from vidjax.apps.gallery.vectors import Vectors, select_usable_clips
from vidjax.apps.video import (
    appearances,
    cuts,
    features_folder,
    media_files,
    names_page,
    other_nets,
    people_photos,
    pipeline,
)
from vidjax.apps.video.appearances import Appearance
from vidjax.apps.video.features_folder import (
    THUMBNAILS,
    ExtractionSettings,
    MediaFile,
    hash_film,
    select_films,
)
from vidjax.apps.video.pipeline import FileOutcome
from vidjax.apps.video.unknown_numbers import (
    UnknownNumbers,
    number_people,
    read_numbers,
    write_numbers,
)
from vidjax.data.checks import list_entries
from vidjax.runs.terminal import say
from vidjax.utils import files, messages, tables
from vidjax.utils.errors import UserError, prefix_errors
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import IGNORED, fold, make_file_stems, read_folder_name, show

PAGE, SUBTITLES, CUTS, FEATURES = "names.html", "subtitles", "cuts", "features"
PADDING_SECONDS = 1.0  # before and after each appearance in cut lists
TABLES = ("names.tsv", "names.jsonl")
WAIT_SECONDS = 20.0  # the longest time for which a change of names waits for another program
UNKNOWN = "unknown.tsv"


class WhoResults(NamedTuple):
    """The results of a call of `vidjax who`."""

    people: dict[str, int]  # name of a person -> number of enrolled clips
    decision: "Decision"  # the people in the films
    # Path of a file that could not be read or shows no usable face -> remedy for the user, or "" if
    # the remedy was already printed.
    failed: dict[str, str]
    missed: Sequence[str] = ()  # the people without a usable photo, who cannot be recognised

    @property
    def lines(self) -> list[tuple[str, str, str]]:
        """The film, the time and the person of each appearance, as texts."""
        rows, films = [], {film.video: film for film in self.decision.films}
        for appearance in self.decision.appearances:
            name = appearance.identity or IGNORED
            time = names_page.format_appearance_time(appearance, films[appearance.video])
            words = filter(None, (name, appearances.format_certainty(appearance)))
            rows.append((appearance.video, time, ", ".join(words)))
        return rows


class Decision(NamedTuple):
    """The people in all films of a folder of results."""

    digest: str  # of the gallery
    people: Mapping[str, Collection[str]]  # name of each enrolled or named person -> enrolled clips
    films: Sequence[MediaFile]  # also photos
    vectors: Vectors | None  # the embeddings of all clips; None if there are no clips
    votes: dict[str, str] | None  # clip -> group. The clips of a group vote on one name
    answers: dict[str, Answer]  # clip -> answer of the gallery
    # Clip without a name -> unknown person, such as `unknown 3`, or an unclear face, such as
    # `unknown face 4`. Ignored people are left out.
    unknown: dict[str, str]
    appearances: list[Appearance]  # by video, and in order of time
    numbers: UnknownNumbers = UnknownNumbers(films={})
    twins: Mapping[str, str] = MappingProxyType({})  # see `appearances.NamedTracks`
    # `State.rows`, and clip -> answer of the gallery before corrections.
    raw: tuple[int, Mapping[str, Answer]] = (0, MappingProxyType({}))
    card: str = ""  # see `card_notes.describe`

    def count_clips(self) -> dict[str, int]:
        """Returns the number of enrolled clips of each person."""
        return {name: len(clips) for name, clips in self.people.items()}


def lock_changes(out: Path, wait: float = WAIT_SECONDS) -> contextlib.AbstractContextManager[None]:
    """Locks the names in a folder of results, while they are changed or written.

    `name_people` also locks the folder itself, so that there is only one call at a time. The page
    of corrections needs only this lock, so that names can be corrected while films are read.
    """
    return files.lock(out, "out", ".changes.lock", wait=wait)


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
    done: Callable[[FileOutcome], None] = lambda outcome: None,
) -> WhoResults:
    """Names the people in films, and writes tables, a page, subtitles and cut lists into `out`.

    The results contain these films and all films of earlier calls.

    Args:
      films: one or more videos, photos, or folders of videos and photos.
      people: a folder with photos of each person, as NAME/PHOTO.jpg or NAME.jpg. If a photo program
        stored names of faces in a photo, these names are used. If `people` is None, the gallery of
        an earlier call is used.
      out: the folder for results. If it does not exist, it is created, readable only by its owner.
      thumbnails: True keeps a picture of each face. False deletes the pictures of earlier calls.
        None keeps the choice of the last call.
      fpir: the largest share of strangers that may get a name, see `Gallery.identify`.
      threshold: the probability that a name needs. If it is given, `fpir` must be None.
      padding: the seconds that are added before and after each appearance in cut lists.
      prune: whether films of earlier calls are removed if their files were deleted.
      forget_missing: whether people are forgotten if all their photos are missing. With `prune`,
        films whose whole folder is missing or empty are removed, too.
      models, settings, workers, check, done: see `pipeline.extract_folders`.

    Raises:
      UserError: there is no film, there is no usable photo, a net is missing, or the folder for
        results contains a link.
    """
    films = [Path(film) for film in ([films] if isinstance(films, str | Path) else films)]
    people = None if people is None else Path(people)
    out, models = Path(out), Path(models)
    answers_lib.check_choice(fpir, threshold)
    if not 0 <= padding < math.inf:
        raise UserError(f"--padding={padding:g} is not a duration: give seconds, 0 or more")
    media_files.check_apart(media_files.list_files(films), out)
    photos = {} if people is None else people_photos.list_photos(people, out)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    with files.lock(files.make_folder(out, "out"), "out"):
        files.refuse_links(out)
        gallery = _open_gallery(out, models)
        had_page = files.exists(out / PAGE)
        options = {
            "models": models, "thumbnails": _choose_thumbnails(out, thumbnails), "upgrade": True,
            "check": check, "workers": workers,
        }  # fmt: skip
        failed, names, is_explained = dict[str, str](), set[str](), False
        if people is not None:
            failed, names, is_explained = _update_people(
                gallery, people, photos, out, forget_missing, options
            )
        earlier = features_folder.find_media_files(out / FEATURES).values()
        with lock_changes(out):
            _enrol_named(gallery, out, earlier)
        if people is not None and not gallery.identities:
            lost = had_page and not files.exists(out / PAGE)
            raise UserError(
                f"no photo in '{people}' can be used, so nobody can be recognised\n"
                "add photos that each show only one person"
                + f"\n{PAGE} and the tables are deleted, because they name forgotten people"
                * lost
            )
        if gallery.identities and not features_folder.find_earlier(out / FEATURES):
            # Mistakes in the flags are reported here, because reading the films takes long.
            gallery.rule(fpir=fpir, threshold=threshold)
            if not is_explained:
                card_notes.warn(gallery.state)
        outcomes = pipeline.extract(
            films, out / FEATURES, settings=settings, done=done,
            drop=pipeline.choose_drop(prune, forget_missing), **options,
        )  # fmt: skip
        failed |= {str(outcome.path): outcome.remedy for outcome in outcomes if not outcome.media}
        identify = functools.partial(gallery.identify, fpir=fpir, threshold=threshold)
        with lock_changes(out):
            decision = _name_films(gallery, out, identify, prune)
            if is_explained:
                decision = decision._replace(card="")
            write(out, decision, padding)
        enrolled = people_photos.list_faces(gallery).values()
        missed = sorted(names - {photo.person for photo in enrolled})
        return WhoResults(decision.count_clips(), decision, failed, missed)


def _choose_thumbnails(out: Path, thumbnails: bool | None) -> bool:
    """Returns whether pictures of faces are kept. If not, deletes the pictures of earlier calls."""
    if thumbnails is None:
        thumbnails = files.exists(out / FEATURES / THUMBNAILS)
    if not thumbnails:
        for folder in (*out.glob(f"{FEATURES}/"), *(out / people_photos.PEOPLE).glob("*/")):
            features_folder.remove_thumbnails(folder)
    return thumbnails


def _name_films(
    gallery: Gallery, out: Path, identify: Callable[..., dict[str, Answer]], prune: bool
) -> Decision:
    """Names the people in all films of a folder of results, and prints problems of the films.

    Corrections of films that were removed are forgotten. For `identify`, see `decide`.
    """
    _move_films(gallery, out)
    films = features_folder.read_media_files(out / FEATURES)
    _report_missing(films, out, prune)
    waiting = features_folder.find_earlier(out / FEATURES).values()
    _report_waiting(gallery, [*waiting])
    kept = {film.digest for film in films} | {hash_film(film, earlier=True) for film in waiting}
    with gallery.change() as draft:
        gone = draft.denied.keys() - kept
        draft.deny({film: dict.fromkeys(draft.denied[film], ()) for film in gone})
    return decide(gallery, out, films, read_numbers(out).keep(kept), identify)


def _update_people(
    gallery: Gallery,
    people: Path,
    photos: Mapping[str, Sequence[Path]],
    out: Path,
    forget_missing: bool,
    options: Mapping[str, Any],
) -> tuple[dict[str, str], set[str], bool]:
    """Enrols the photos of each person, and forgets people whose photos were deleted.

    Returns path of each unusable photo -> remedy, the names of all people with photos, and whether
    people look alike because two names may be one person. This was printed.
    `options` are arguments of `pipeline.extract_folders`.
    """
    people_photos.check_people(gallery, photos, people, out, forget_missing)
    drop: pipeline.Drop = "all others" if forget_missing else "others"
    outcomes_of = people_photos.extract_photos(photos, out, drop=drop, **options)
    with lock_changes(out):
        gallery.refresh()  # another process may have changed the gallery in the meantime
        labels = people_photos.count_labels(gallery)  # before faces are removed
        _write_unmatched(out, other_nets.move_photos(gallery, outcomes_of))
        enrolled = people_photos.list_faces(gallery)
        found = people_photos.check_photos(enrolled, outcomes_of, people)
        failed, names = found.failed, found.names
        missing = set[str]() if forget_missing else people_photos.find_missing(enrolled, found, out)
        if missing:
            kept = {photo.person for photo in enrolled.values() if photo.folder in missing}
            names |= kept
            failed |= {str(people / folder): "" for folder in sorted(missing)}
            _report_missing_photos(kept, people)
        # After a change of nets, a photo that cannot be read has no features any more.
        unread = {
            (read_folder_name(folder.name), stem)
            for folder in outcomes_of for stem in features_folder.find_earlier(folder)
        }  # fmt: skip
        checked = {
            clip: photo for clip, photo in enrolled.items()
            if (photo.folder, photo.clip.partition(".")[0]) not in unread
        }  # fmt: skip
        people_photos.enrol_photos(gallery, checked, found.usable, names, labels)
        _forget(gallery, names, {*photos, *missing}, out)
    gallery.check_mirrored(found.list_mirrored())
    doubted = people_photos.warn_of_doubts(gallery, found)
    return failed, names, doubted and card_notes.compare(gallery.state).problem == "closer"


def _report_missing_photos(kept: Collection[str], people: Path) -> None:
    """Prints that `kept` people stay enrolled although their photos are missing, with remedies."""
    hint = "" if os.path.isdir(people) else messages.suggest_path(people)
    say(
        f"photos of {messages.list_some([*map(show, sorted(kept))])} are missing in "
        f"'{show(str(people))}': is the drive connected? These people stay enrolled\n"
        f"to forget people whose photos are missing, add --forget-missing{hint}",
        warning=True,
    )


def _report_missing(films: Sequence[MediaFile], out: Path, pruned: bool) -> None:
    """Prints how many films are missing or too dark, and a film without thumbnails, with remedies.

    If `pruned` is True, `--prune` is given, and missing films are not printed.
    """
    missing = [film.video for film in films if not os.path.exists(film.source.path)]
    if missing and not pruned:
        say(
            f"{messages.count(len(missing), 'film')} cannot be found, such as {missing[0]}: "
            "to delete the results of missing films, add --prune"
        )
    dark = [film.video for film in films if film.is_dark]
    if dark:
        say(
            f"{messages.count(len(dark), 'film')} too dark to find faces, such as {dark[0]}: "
            "brighten the pictures, and call vidjax who again",
            warning=True,
        )
    for film in films:
        stem = film.tracks[0].clip.partition(".")[0] if film.tracks else None
        lacks = stem and features_folder.lacks_pictures(out / FEATURES, stem)
        if lacks and os.path.exists(film.source.path):
            say(f"there are no thumbnails of {film.video}: add this film to the command")
            return


def _open_gallery(out: Path, models: Path) -> Gallery:
    """Opens or creates the gallery in `out`; raises UserError if another program wrote `out`."""
    path = out / "gallery"
    if not files.exists(path) and (foreign := list_entries(out)):
        if files.exists(out / FEATURES):
            raise UserError(
                f"'{path}' is missing, the gallery of earlier calls\n"
                "copy it back, or name a new folder: --out=FOLDER"
            )
        raise UserError(
            f"--out={out} contains '{show(foreign[0].name)}', which `vidjax who` did not write\n"
            "name a new folder"
        )
    try:
        gallery = Gallery(path)
    except store.NoGalleryError:  # also if an earlier call was killed while it made the gallery
        return Gallery.of_models(path, models)
    with lock_changes(out):
        _change_nets(gallery, out, models)
    return gallery


def _change_nets(gallery: Gallery, out: Path, models: Path) -> None:
    """If `models` has other or more nets than before, prepares the results for these nets.

    If this is interrupted, the next call repeats it, because `extract.json` is written last.
    """
    features = out / FEATURES
    before, digests = features_folder.read_extraction(features), pipeline.read_digests(models)
    if before is None or before.models == digests or before.models.keys() - digests.keys():
        gallery.widen(models)
        return
    pipeline.check_nets(models, before.settings)  # before features are removed
    changed = {role for role, digest in before.models.items() if digests[role] != digest}
    films = features_folder.find_media_files(features).values()
    _enrol_named(gallery, out, films)
    (out / UNKNOWN).unlink(missing_ok=True)  # the names of the clips may change
    known = [*films, *features_folder.find_earlier(features).values()]
    waiting = other_nets.choose_waiting_names(gallery, known) if changed else {}
    features_folder.set_aside(features)
    held = [
        film for stem, film in features_folder.find_earlier(features).items()
        if not features_folder.find_media_file(features, stem)
    ]  # fmt: skip
    with gallery.change() as draft:
        draft.denied = other_nets.hold_keys(draft.denied, held)
    numbers = read_numbers(out)
    write_numbers(
        out, msgspec.structs.replace(numbers, films=other_nets.hold_keys(numbers.films, held))
    )
    parts = gallery.widen(models, waiting)
    before.models = digests
    features_folder.write(features / features_folder.NAME, before)
    say(
        f"there are new nets ({', '.join(parts or sorted(changed))}): the films and photos of this "
        "call are read again, and names are kept\n"
        "to read other films again, repeat the command with them"
    )


def _move_films(gallery: Gallery, out: Path) -> None:
    """Moves corrections to the clips of films that were read again with other nets."""
    numbers = read_numbers(out)
    plan = other_nets.plan_films(gallery, out / FEATURES, numbers.films, {*numbers.fixed})
    _write_unmatched(out, plan.rows)  # first, so that a killed call loses nothing
    other_nets.move_films(gallery, plan)
    if plan.moved:
        films = other_nets.move_keys(numbers.films, plan.moved)
        highest = numbers.highest
        write_numbers(out, msgspec.structs.replace(numbers, films=films, removed=highest))
        features_folder.forget_earlier(out / FEATURES, [film.stem for film in plan.moved])


def _write_unmatched(out: Path, rows: Sequence[tuple[str, ...]]) -> None:
    """Lists corrections that could not be moved in `unmatched.tsv`, and prints their number."""
    if count := other_nets.write_unmatched(out, rows):
        say(
            f"corrections whose faces are not found again: {count:,}, see "
            f"{out / other_nets.UNMATCHED}\nto repeat them: vidjax who ... --review",
            warning=True,
        )


def _report_waiting(gallery: Gallery, films: Sequence[MediaFile]) -> None:
    """Prints how many films and photos have not been read since the nets were changed."""
    if films:
        say(
            f"films that were not read with the new nets: {len(films):,}, such as "
            f"{films[0].video}. Names and corrections are kept, but the tables lack these films\n"
            "to read them, add them to the command",
            warning=True,
        )
    if faces := other_nets.list_waiting_faces(gallery):
        example = min(faces.values())
        say(
            f"photos that were not read with the new nets: {len(faces):,}, such as "
            f"{example.clip} of {show(example.person)}. They stay enrolled, but identify nobody "
            "until --people contains them again",
            warning=True,
        )


def _enrol_named(gallery: Gallery, out: Path, films: Iterable[MediaFile]) -> None:
    """Enrols the clips of `films` to which a user gave names in `unknown.tsv`."""
    path, features = out / UNKNOWN, out / FEATURES
    names = answers_lib.read_groups(path) if files.exists(path) else {}
    # If the last call was interrupted, a replaced film may have other clips with the same names.
    numbered = read_numbers(out).films
    present = {x.clip for film in films if film.digest in numbered for x in film.tracks}
    known = {clip: name for clip, name in names.items() if clip in present}
    if len(known) < len(names):
        example = show(min(names.keys() - present))
        say(
            f"names of clips in {path} that no longer exist, such as {example}, are ignored: "
            f"{len(names) - len(known):,}",
            warning=True,
        )
    if not known:
        return
    vectors = people_photos.embed_clips(gallery, features, known)
    with prefix_errors(str(path)):
        labels = tuple(check_person(known[clip]) for clip in vectors.names)
        clips = select_usable_clips(vectors._replace(labels=labels))
        with gallery.change() as draft:  # a single change: denied names of the person are kept
            same = draft.complete({clip: entry.vector for clip, entry in clips.items()})
            # If a film was replaced, its clips may have the names of old clips that are enrolled.
            draft.remove(clip={*vectors.names} & draft.clips.keys() - same)
            draft.add(clips)
    advise_other_films(gallery.state, sorted({*labels}))
    _drop_rows(path, known)
    for name, count in sorted(Counter(known.values()).items()):
        clips = messages.count(count, "clip")
        say(f"{show(name)} is enrolled with {clips} from {path.name}")


def _drop_rows(path: Path, named: Mapping[str, str | None]) -> None:
    """Removes rows (clip, person) that are in `named`, clip -> person, from `unknown.tsv`."""
    rows = answers_lib.read_groups(path, unknown=True) if files.exists(path) else {}
    remaining = {clip: name for clip, name in rows.items() if named.get(clip) != name}
    if len(remaining) < len(rows):
        text = tables.to_text([answers_lib.GROUP_COLUMNS, *remaining.items()], ".tsv")
        files.write_text(path, text)
        files.hide(path)


def _forget(gallery: Gallery, names: set[str], places: set[str], out: Path) -> None:
    """Forgets people who are not in `names`, and deletes features of photos outside of `places`."""
    photos = people_photos.list_faces(gallery)
    label = {clip: gallery.clips[clip].identity for clip in photos}
    forgotten = {clip for clip, photo in photos.items() if photo.person not in names}
    gone = {clip for clip, photo in photos.items() if photo.folder not in places} | forgotten
    kept = {label[clip] for clip in photos.keys() - gone}
    people = {label[clip] for clip in forgotten} - kept - {None}
    for name in sorted(map(str, people)):
        say(f"{show(name)} no longer has photos and is forgotten")
    labelled = {
        clip: entry.identity for clip, entry in gallery.clips.items() if entry.identity in people
    }
    if labelled:
        _drop_rows(out / UNKNOWN, labelled)  # otherwise these rows would enrol them again
    gallery.remove(clip=gone | labelled.keys())
    for name, folder in people_photos.locate_people(out, ()).items():
        if name not in places and name in names:
            say(f"{show(name)} no longer has a folder, but is still named by face tags")
        if name not in places and not features_folder.remove_features(folder):
            say(f"'{show(str(folder))}' contains files that vidjax did not write: they are kept")
    # Page and tables contain their names, and this call may fail before it writes new ones.
    if people:
        _remove_results(out)


def decide(
    gallery: Gallery,
    out: Path,
    films: Sequence[MediaFile],
    before: UnknownNumbers,
    identify: Callable[..., dict[str, Answer]],
    last: Decision | None = None,
) -> Decision:
    """Names the people in the clips of all films, see `name_tracks`, and numbers unknown people.

    A group of clips without a name is an unknown person, who keeps the number of the last call or
    gets a new number. An unclear face without a name is in no group. The numbers are written to
    `unknown.json`, so the caller must hold `lock_changes`.

    Args:
      out: the folder of results.
      before: the numbers of the last call.
      identify: the method `gallery.identify`, with fixed arguments `fpir` and `threshold`.
      last: an earlier decision on the same films, after which `unknown.json` was not changed. Its
        embeddings and groups are used to save time.
    """
    vectors, votes = (last.vectors, last.votes) if last else (None, None)
    answers = dict[str, Answer]()
    if not last and (clips := {track.clip for film in films for track in film.tracks}):
        vectors = people_photos.embed_clips(gallery, out / FEATURES, clips)
        gallery.complete(vectors)
    # Another program may change the gallery at any time. A change after this line is shown later.
    digest, people, rows = gallery.digest, gallery.people, gallery.state.rows
    raw = last.raw[1] if last and last.raw[0] == rows else {}

    def answer(clips: Vectors, *, groups: Mapping[str, str] | None) -> Mapping[str, Answer]:
        nonlocal raw
        raw = raw or identify(clips, groups=groups)
        return raw

    numbers, twins = dict[str, int](), dict[str, str]()
    highest, old = (last.numbers if last else before).highest, None
    # Names depend on numbers of people who differ. So names are decided until numbers stay the
    # same, because the next call must find the same names.
    while vectors is not None and before != old:
        known = select_films(before.films, films)
        named = appearances.name_tracks(gallery, vectors, films, answer, votes, known, before.apart)
        answers, votes, twins = named.answers, named.votes, named.twins
        nameless = {clip for clip, answer in answers.items() if answer.identity is None}
        nameless -= named.enrolled.keys()
        numbers = number_people(gallery, vectors.only(nameless), films, before, highest)
        old, before = before, before.update(films, numbers)
        if not before.apart:
            break
        highest = before.highest
    if vectors is None:
        before = before.update(films, {})
    groups = {clip: f"{answers_lib.UNKNOWN}{number}" for clip, number in numbers.items()}
    groups = appearances.mark_unclear(groups, films)
    # The clips of `unknown.tsv` are enrolled only if their films are in `unknown.json`.
    if not last or before != last.numbers:
        write_numbers(out, before)
    in_films = appearances.find_appearances(answers, films, groups)
    people |= {x.identity: () for x in answers.values() if x.identity and x.identity not in people}
    card = card_notes.describe(gallery.state)
    return Decision(
        digest, people, films, vectors, votes, answers, groups, in_films, before, twins,
        (rows, raw), card,
    )  # fmt: skip


def write(out: Path, decision: Decision, padding: float = PADDING_SECONDS) -> None:
    """Writes the tables, page, subtitles and cut lists. `padding` in seconds is for cut lists."""
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
    _remove_results(out, page=False)
    (out / UNKNOWN).unlink(missing_ok=True)
    for name in TABLES:
        appearances.write(out / name, decision.appearances, decision.films)
    places_of = appearances.list_places(decision.films)
    answers_lib.write_groups(out / UNKNOWN, decision.unknown, places_of)
    for name in (UNKNOWN, *TABLES):
        files.hide(out / name)
    by_video = appearances.group_by_video(decision.appearances)
    films = [film for film in decision.films if not film.photo]
    for film, place in zip(films, _place_subtitles(films), strict=True):
        for folder in reversed(place.parents):
            (out / SUBTITLES / folder).mkdir(mode=0o700, exist_ok=True)
        for ending in appearances.SUBTITLES:
            text = appearances.to_subtitles(by_video.get(film.video, []), ending)
            path = out / SUBTITLES / f"{place}{ending}"
            files.write_bytes(path, text.encode(), sync=False)
    (out / CUTS).mkdir(mode=0o700, exist_ok=True)
    cuts.write(out / CUTS, decision.appearances, decision.films, padding)


def _place_subtitles(films: Sequence[MediaFile]) -> list[PurePath]:
    """Returns the path of each film's subtitles in their folder, without the ending.

    Players look for the name of the film. If several films have this name, their subtitles are in
    folders with the names of the films' folders, such as `2019/IMG_0001`. If these films are in one
    folder, the names of the subtitles contain the endings of the films.
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
    decision: Decision,
    address: Callable[[MediaFile, float], str],
    forms: names_page.Forms | None = None,
) -> str:
    """Returns an HTML page that shows who appears when in each film.

    `decision` has the people of all films. `address(film, seconds)` returns the URL of a film at a
    time. If `forms` is given, the page has forms with which a user corrects names.
    """
    people: dict[str, list[names_page.Picture]] = {}
    places = people_photos.locate_people(out, ())
    for name, clips in sorted(decision.people.items()):
        faces = filter(None, map(people_photos.PhotoFace.of, sorted(clips)))
        pictures = (
            _locate_picture(out, places[x.folder], x.clip) for x in faces if x.folder in places
        )
        people[name] = [(picture, name, picture, "") for picture in pictures if picture]
    locate = functools.partial(_locate_picture, out, out / FEATURES)
    films = sorted(decision.films, key=lambda film: film.video.casefold())
    return names_page.render(
        decision.appearances, films, people, locate, decision.answers, address, forms,
        decision.card, decision.twins,
    )  # fmt: skip


def _locate_picture(out: Path, features: Path, clip: str) -> str:
    """Returns the URL of a clip's picture, relative to the page, or "" if there is no picture."""
    path = features_folder.locate_thumbnail(features, clip)
    return quote(os.fsencode(path.relative_to(out))) if path.exists() else ""


def _remove_results(out: Path, *, page: bool = True) -> None:
    for name in (*TABLES, *[PAGE] * page):
        (out / name).unlink(missing_ok=True)
    for folder, _, _ in os.walk(out / SUBTITLES, topdown=False):
        files.remove_ours(Path(folder), r".+\.(vtt|srt)")
    files.remove_ours(out / CUTS, r".+\.edl")
