"""Names people in films from a few photos of each person (`vidjax who`).

The results are these files:

    OUT/people/NAME/   features of the photos of a person: NAME/PHOTO.jpg or NAME.jpg in --people
    OUT/features/      features of the films
    OUT/gallery/       the gallery of the people, for the commands of `vidjax gallery`
    OUT/*/thumbnails/  with --thumbnails: a small picture of each face
    OUT/names.tsv      a table with a row for each appearance of a person in a film
    OUT/names.jsonl    the same table for programs
    OUT/names.html     the same table as a page with timelines
    OUT/said.jsonl     the log of what users said: names, corrections and ignored faces
    OUT/unknown.tsv    clips of unknown people: write names into it and call the command again
    OUT/unknown.json   the numbers of unknown people, for later calls
    OUT/unmatched.tsv  names and corrections of faces that are no longer found
    OUT/subtitles/     a .vtt and a .srt file for each video
    OUT/cuts/          an .otio file for programs that edit films, and a playlist, for each person

Each call replaces the tables, the page, the subtitles and the timelines.

- If a photo was deleted from a folder that has other files, the next call forgets the photo.
- If a whole folder of photos is missing, its drive may not be connected. So the photos are
  forgotten only with --forget-missing. A call without --people forgets nobody.
- If a net was replaced or added, the next call reads the given films and photos again. Names and
  corrections are kept, because the log identifies faces by film, time and place.
"""

import functools
import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vidjax.apps import earlier_said, features_folder, said as said_lib
from vidjax.apps.features_folder import ExtractionSettings, MediaFile, PhotoFace, locate_people
from vidjax.apps.gallery import answers as answers_lib, card_notes, store
from vidjax.apps.gallery.answers import Answer
from vidjax.apps.gallery.changes import check_person
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.labelling import advise_other_films
from vidjax.apps.said import FEATURES, Line
from vidjax.apps.video import media_files, names_page, naming, people_photos, pipeline, results
from vidjax.apps.video.decision import Decision, decide, lock_changes, read_said
from vidjax.apps.video.faces import Lost, Said
from vidjax.apps.video.people_photos import Photos
from vidjax.apps.video.pipeline import FileOutcome
from vidjax.apps.video.results import PADDING_SECONDS, PAGE, UNKNOWN
from vidjax.apps.video.unknown_numbers import read_numbers
from vidjax.data.checks import list_entries
from vidjax.utils import files, messages, tables
from vidjax.utils.errors import UserError, prefix_errors
from vidjax.utils.messages import Note, Tell, ignore_note
from vidjax.utils.names import IGNORED, show

UNMATCHED = "unmatched.tsv"
UNMATCHED_COLUMNS = ("video", "time", "correction")


class WhoResults(NamedTuple):
    """The people that `vidjax who` has found in films, and the files that could not be used."""

    people: dict[str, int]  # name of a person -> number of enrolled clips
    decision: Decision  # the people in the films
    # Path of a file that could not be read or shows no usable face -> remedy for the user, or "" if
    # the remedy was already printed.
    failed: dict[str, str]
    missed: Sequence[str] = ()  # the people without a usable photo, who cannot be recognised
    notes: Sequence[Note] = ()  # also given to `tell` of `name_people`

    @property
    def lines(self) -> list[tuple[str, str, str]]:
        """The film, the time and the person of each appearance, as texts."""
        rows, films = [], {film.video: film for film in self.decision.films}
        for appearance in self.decision.appearances:
            name = appearance.identity or IGNORED
            time = names_page.format_appearance_time(appearance, films[appearance.video])
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
    done: Callable[[FileOutcome], None] = lambda outcome: None,
    tell: Tell = ignore_note,
) -> WhoResults:
    """Names the people in films, and writes the results into the folder `out`, see the module.

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
      padding: the seconds that are added before and after each appearance in timelines.
      prune: True deletes the results of a missing film if its folder still has other files.
      forget_missing: True forgets people whose photos are all missing. If `prune` is True, too, the
        results of all missing films are deleted.
      models, settings, workers, check, done, tell: see `pipeline.extract_folders`.

    Raises:
      UserError: there is no film, there is no usable photo, a net is missing, or the folder for
        results contains a link.
    """
    films = [files.local(film) for film in ([films] if isinstance(films, str | Path) else films)]
    people = None if people is None else files.local(people)
    out, models = files.local(out), files.local(models)
    answers_lib.check_choice(fpir, threshold)
    if not 0 <= padding < math.inf:
        raise UserError(f"--padding={padding:g} is not a duration: give seconds, 0 or more")
    media_files.check_apart(media_files.list_files(films), out)
    call = _Call(out, models, tell)
    photos = None if people is None else Photos(people, out, call.tell)
    with files.lock(files.make_folder(out, "out", mode=0o700), "out"):
        files.refuse_links(out)
        gallery = call.open_gallery()
        had_page = files.exists(out / PAGE)
        options = {
            "models": models, "thumbnails": _choose_thumbnails(out, thumbnails), "upgrade": True,
            "check": check, "workers": workers,
        }  # fmt: skip
        failed, names, is_explained, known = dict[str, str](), set[str](), False, ""
        with lock_changes(out):
            typed = call.read_typed_names()
        if photos:
            is_explained = call.update_people(photos, forget_missing, options)
            failed, names = photos.failed, photos.names
        is_known = not photos or photos.usable or gallery.identities
        is_known = is_known or people_photos.list_unread(out)
        if not is_known and not any(read_said(out, ()).names.values()):
            lost = had_page and not files.exists(out / PAGE)
            raise UserError(
                f"no photo in '{people}' can be used, so nobody can be recognised"
                + f"\n{PAGE} and the tables of names were deleted: nobody in them has photos" * lost
                + "\nadd photos that each show only one person"
            )
        if gallery.identities and not features_folder.find_unread(out / FEATURES):
            # Mistakes in the flags are reported here, because reading the films takes long.
            gallery.rule(fpir=fpir, threshold=threshold)
            if not is_explained and card_notes.compare(gallery.state).problem != "few":
                known = card_notes.warn(gallery.state)
        outcomes = pipeline.extract_folders(
            {call.features: films}, settings=settings, done=done, tell=call.tell,
            drop=pipeline.choose_drop(prune, forget_missing), **options,
        )[call.features]  # fmt: skip
        failed |= {str(outcome.path): outcome.remedy for outcome in outcomes if not outcome.media}
        identify = functools.partial(gallery.identify, fpir=fpir, threshold=threshold)
        with lock_changes(out):
            decision = call.name_films(identify, prune)
            advise_other_films(gallery.state, sorted(typed))
            if is_explained and card_notes.compare(gallery.state).problem == "closer":
                decision = decision._replace(card="")
            else:  # the films may have shown whether the net separates people
                card_notes.warn(gallery.state, known)
            results.write(out, decision, padding)
        enrolled = people_photos.list_faces(gallery).values()
        missed = sorted(names - {photo.person for photo in enrolled})
        return WhoResults(decision.count_clips(), decision, failed, missed, call.notes)


def _choose_thumbnails(out: Path, thumbnails: bool | None) -> bool:
    """Returns whether pictures of faces are kept in the folder of results `out`.

    `thumbnails` is as in `name_people`. If pictures are not kept, deletes the pictures of earlier
    calls.
    """
    if thumbnails is None:
        thumbnails = files.exists(out / FEATURES / features_folder.THUMBNAILS)
    if not thumbnails:
        for folder in (*out.glob(f"{FEATURES}/"), *(out / people_photos.PEOPLE).glob("*/")):
            features_folder.remove_thumbnails(folder)
    return thumbnails


class _Call:
    """A call of `vidjax who`: the steps that change the folder of results `out`."""

    def __init__(self, out: Path, models: Path, tell: Tell):
        self.out, self.models, self.features = out, models, out / FEATURES
        self.notes, self._tell = list[Note](), tell

    def tell(self, note: Note) -> None:
        """Adds a note to the results, and reports it to the caller of `name_people`."""
        self.notes.append(note)
        self._tell(note)

    def warn(self, text: str) -> None:
        self.tell(Note(text))

    def say(self, text: str) -> None:
        self.tell(Note(text, warning=False))

    def name_films(self, identify: Callable[..., dict[str, Answer]], prune: bool) -> Decision:
        """Returns who appears in the films of a folder of results, and reports problems of films.

        `identify` is the method `Gallery.identify` with fixed `fpir` and `threshold`. If `prune` is
        True, missing films are not reported.
        """
        films = features_folder.read_media_files(self.features)
        unread = features_folder.find_unread(self.features)
        self._report_films(films, prune)
        self._report_unread(unread)
        decision = decide(self.gallery, self.out, films, identify)
        self._write_unmatched(decision.said.list_lost({film.sha256 for film in unread.values()}))
        return decision

    def update_people(
        self, photos: Photos, forget_missing: bool, options: Mapping[str, Any]
    ) -> bool:
        """Enrols the photos of each person, and forgets people whose photos were deleted.

        Returns whether people look too much alike for the net, probably because one person has two
        names. `options` are arguments of `pipeline.extract_folders`.
        """
        gallery, out, people = self.gallery, self.out, photos.people
        photos.check_people(gallery, forget_missing)
        drop: pipeline.Drop = "all others" if forget_missing else "others"
        photos.extract(drop=drop, **options)
        with lock_changes(out):
            gallery.refresh()  # another process may have changed the gallery in the meantime
            unread = people_photos.list_unread(out)
            enrolled = people_photos.list_faces(gallery)
            known = unread | enrolled
            photos.check(known)
            missing = set[str]() if forget_missing else photos.find_missing(known)
            if missing:
                kept = {x.person for x in known.values() if x.folder in missing}
                photos.names.update(kept)
                photos.failed.update({str(people / folder): "" for folder in sorted(missing)})
                hint = "" if os.path.isdir(people) else messages.suggest_path(people)
                self.warn(
                    f"photos of {messages.list_some([*map(show, sorted(kept))])} are missing in "
                    f"'{show(str(people))}': is the drive connected? These people stay known\n"
                    f"to forget people whose photos are missing, add --forget-missing{hint}"
                )
            entries = photos.embed(gallery)
            moved = photos.find_renamed(gallery, enrolled, entries)
            unsure = {x.person for x in enrolled.values() if x.folder in missing}
            moved = {person: owners for person, owners in moved.items() if person not in unsure}
            renamed = self._follow_photos({x.person for x in enrolled.values()}, moved)
            said = read_said(out, ())
            for clip, entry in entries.items():
                face = photos.faces[clip].face
                entries[clip] = entry._replace(identity=said.label(face.key, face.person))
            checked = {clip for clip, x in enrolled.items()
                       if clip not in unread and x.folder not in missing}  # fmt: skip
            with gallery.change(log=False) as draft:
                for clip in draft.clips.keys() - entries.keys():
                    if name := renamed.get(draft.clips[clip].identity or ""):
                        draft.relabel(clip, name)
                new, _ = photos.enrol(draft, entries, checked)
            advise_other_films(
                gallery.state, sorted({x for clip in new if (x := entries[clip].identity)})
            )
            self._forget(known, photos.names, {*photos.paths_of, *missing}, forget_missing)
        card_notes.check_mirrored(gallery, photos.list_mirrored())
        is_doubtful = photos.report_doubts()
        return is_doubtful and card_notes.compare(gallery.state).problem == "closer"

    def _report_films(self, films: Sequence[MediaFile], pruned: bool) -> None:
        """Reports missing, dark and upside-down films, and films without thumbnails.

        If `pruned` is True (the flag `--prune` was given), missing films are not reported.
        """
        missing = [film.video for film in films if not os.path.exists(film.source.path)]
        if missing and not pruned:
            count = f"{messages.count(len(missing), 'film')} cannot be found, such as {missing[0]}"
            self.say(f"{count}: to delete the results of missing films, add --prune")
        if dark := [film.video for film in films if film.is_dark]:
            self.warn(
                f"films that are too dark to find faces: {len(dark):,}, such as {dark[0]}\n"
                "brighten the pictures, and call vidjax who again"
            )
        if turned := [film.video for film in films if film.upside_down]:
            self.warn(
                f"films that are upside down, so that faces are missed: {len(turned):,}, such as "
                f"{turned[0]}: turn them by 180 degrees, and call vidjax who again"
            )
        for film in films:
            stem = film.tracks[0].clip.partition(".")[0] if film.tracks else None
            lacks = stem and features_folder.lacks_pictures(self.features, stem)
            if lacks and os.path.exists(film.source.path):
                self.say(f"there are no thumbnails of {film.video}: call vidjax who with this film")
                return

    def open_gallery(self) -> Gallery:
        """Opens or creates the gallery. Raises UserError if `self.out` has files but no gallery."""
        out, path = self.out, self.out / "gallery"
        if not files.exists(path) and (foreign := list_entries(out)):
            if files.exists(out / FEATURES):
                raise UserError(
                    f"the gallery of earlier runs of this command is missing: '{path}'\n"
                    "copy it back, or name a new folder: --out=FOLDER"
                )
            raise files.foreign_error(foreign[0])
        try:
            self.gallery = Gallery(path)
        except store.NoGalleryError:  # also if an earlier call was killed while it made the gallery
            self.gallery = Gallery.of_models(path, self.models)
        with lock_changes(out):
            self._convert()
            self._change_nets()
        return self.gallery

    def _convert(self) -> None:
        """Creates the log of corrections, `said.jsonl`, if the folder of results has none.

        If version 0.1.0 of vidjax has written the results, converts them to the present format.
        """
        gallery, out = self.gallery, self.out
        if not said_lib.has_log(out):
            said_lib.append(out, earlier_said.list_lines(out, gallery.state))
        earlier_said.move_descriptions(out)
        # Clips that waited for other nets.
        if waiting := [clip for clip, x in gallery.clips.items() if not x.vector.any()]:
            present = features_folder.read_extraction(self.features)
            for folder in locate_people(out).values():
                if features_folder.read_extraction(folder) != present:
                    features_folder.set_aside(folder)
            with gallery.change(log=False) as draft:
                draft.remove(clip=waiting)

    def _change_nets(self) -> None:
        """Adopts the nets in the folder `models`, if one was replaced or added since the last call.

        Features from earlier nets are removed. The gallery then uses the new nets. `extract.json`
        is written last. So if the process is interrupted, the next call does all this again.
        """
        gallery, models, features = self.gallery, self.models, self.features
        before, digests = features_folder.read_extraction(features), pipeline.read_digests(models)
        if before is None or before.models == digests or before.models.keys() - digests.keys():
            card_notes.adopt(gallery, models)
            return
        pipeline.check_nets(models, before.settings)  # before features are removed
        changed = {role for role, digest in before.models.items() if digests[role] != digest}
        self.read_typed_names()  # the names of the clips may change
        for folder in (features, *locate_people(self.out).values()):
            features_folder.set_aside(folder)
        own = {track.clip for film in features_folder.describe_media_files(features).values()
               for track in film.tracks} | people_photos.list_faces(gallery).keys()  # fmt: skip
        clips = {name: x.identity for name, x in gallery.clips.items() if name not in own}
        parts = card_notes.adopt(gallery, models, replace=bool(changed))
        lost = sorted(clips.keys() - gallery.clips.keys())
        self._write_unmatched([Lost("", "", f"{x}: {clips[x] or IGNORED}") for x in lost])
        before.models = digests
        features_folder.write(features / features_folder.NAME, before)
        new = ", ".join(parts or sorted(changed))
        self.say(
            f"there are new nets ({new}): the films and photos of this run are read again, and "
            "names are kept\nto read films of earlier runs of this command again, add these films"
        )

    def _write_unmatched(self, lost: Sequence[Lost]) -> None:
        """Adds the corrections `lost` to the table `unmatched.tsv`; reports the new rows."""
        path = self.out / UNMATCHED
        table = [*tables.read_text(path)][1:] if files.exists(path) else []
        known = [tuple(cells) for _, cells in table]
        if new := sorted({*lost} - {*known}):
            files.write_text(path, tables.to_text([UNMATCHED_COLUMNS, *known, *new], ".tsv"))
            files.hide(path)
            self.warn(
                f"corrections of faces that are no longer found: {len(new):,}, see {path}\n"
                f"to repeat these corrections: vidjax review {messages.quote_path(self.out)}"
            )

    def _report_unread(self, films: Mapping[str, MediaFile]) -> None:
        """Warns of `films` and of photos of people, if any: the present nets have not read them."""
        for film in [*films.values()][:1]:
            self.warn(
                f"films that were not read with the present nets: {len(films):,}, such as "
                f"{film.video}. Names and corrections are kept, but the tables lack these films\n"
                "to read them, add them to the command"
            )
        faces = people_photos.list_unread(self.out)
        for face in sorted(faces.values())[:1]:
            self.warn(
                f"faces whose photos were not read with the present nets: {len(faces):,}, such as "
                f"{face.clip} of {show(face.person)}\nto read the photos, add --people=FOLDER"
            )

    def read_typed_names(self) -> set[str]:
        """Adds names that a user has typed into `unknown.tsv` to the log; returns these names."""
        out, path = self.out, self.out / UNKNOWN
        names = answers_lib.read_groups(path) if files.exists(path) else {}
        # After an interrupted call, a replaced film may have other clips with the same names.
        numbered = {*read_numbers(out).films}
        films = [  # if the files of a film are damaged, it is read again later
            film for stem, film in features_folder.describe_media_files(self.features).items()
            if features_folder.has_features(self.features, stem)
        ]  # fmt: skip
        found = {
            track.clip: film for film in films if film.digest in numbered
            for track in film.tracks if track.clip in names
        }  # fmt: skip
        if lost := names.keys() - found.keys():
            about = f"{messages.count(len(lost), 'name')}, such as the name of {show(min(lost))}"
            self.warn(f"names in {path} are ignored, because the faces no longer exist: {about}")
        lines, said = list[Line](), read_said(out, films)
        with prefix_errors(str(path)):
            for clip, film in found.items():
                name, old = check_person(names[clip]), said.names.get(clip)
                if old not in (None, name):
                    raise UserError(
                        f"face '{clip}' already has the name '{show(old)}', not '{show(name)}'\n"
                        f"correct the name with vidjax review, or delete the face from {path.name}"
                    )
                if old is None and (face := film.faces.get(clip)):
                    lines.append(said_lib.about(face, "is", of=name, video=film.video))
        if lines:
            said_lib.append(out, said_lib.stamp(lines))
        if found:
            path.unlink()  # the table is written again
        for name, count in sorted(Counter(map(names.get, found)).items()):
            faces = messages.count(count, "face")
            self.say(f"{faces} got the name {show(str(name))} from {path.name}")
        return {str(line.of) for line in lines}

    def _follow_photos(
        self, known: Collection[str], moved: Mapping[str, Collection[str]]
    ) -> dict[str, str]:
        """Renames a person in films if all photos of this person are now under another name.

        `moved` is old name -> the people who have the photos now. If one person has them, faces to
        which the user gave the old name get the new name. If several people have them, a warning
        says how to change the old name. `known` are the people who had photos before. Unless they
        are in `moved`, they do not get corrections `not NAME`. Returns old name -> new name.
        """
        films = features_folder.read_media_files(self.features) if moved else ()
        said = read_said(self.out, films) if moved else Said()
        lines, renamed = list[Line](), dict[str, str]()
        for person, owners in moved.items():
            label, owner = str(said.label("", person)), min(owners)
            named, wanted = said.list_named(label), str(said.label("", owner))
            count = messages.count(len(named), "face")
            if len(owners) > 1 and named:
                words = [str(self.gallery.folder), f"--identity={label}", "--to=NAME"]
                others = messages.list_some([*map(show, sorted(owners))])
                self.warn(
                    f"the photos of {show(person)} now belong to {others}. {count} that you "
                    f"named {show(label)} kept this name\n"
                    f"to change this name: vidjax gallery rename {shlex.join(words)}"
                )
            elif len(owners) == 1 and label != wanted:
                renamed[label] = wanted
                lines += said.repeat(named, "is", wanted)
                if (
                    owner not in known or owner in moved
                ):  # else the photos may have been wrong photos
                    lines += said.repeat(said.list_denied(label), "not", wanted)
                text = f"all photos of {show(person)} now belong to {show(owner)}"
                also = f". {count} that you named {show(label)} got the name {show(wanted)}"
                self.say(text + also * bool(named))
        if lines:
            said_lib.append(self.out, said_lib.stamp(lines))
        return renamed

    def _forget(
        self,
        before: Mapping[str, PhotoFace],
        names: Collection[str],
        places: Collection[str],
        forget_missing: bool,
    ) -> None:
        """Forgets people whose photos were all deleted, and deletes features of deleted folders.

        `before` is clip -> face in an earlier photo. `names` are the people with photos now. The
        features in `OUT/people/NAME` are deleted if NAME is not in `places`. If `forget_missing` is
        False, a person stays known if the user has given the name of the person to a face.
        """
        gallery, out = self.gallery, self.out
        said = read_said(out, features_folder.read_media_files(self.features))
        faces = people_photos.list_faces(gallery)
        kept = {gallery.clips[clip].identity for clip in faces}
        kept |= {said.label("", name) for name in names}
        gone = {
            said.label(x.key, x.person) for x in before.values() if x.person not in names
        } - kept
        forgotten = set[str]()
        for name in sorted(map(str, gone - {None})):
            count = len({*gallery.people.get(name, ()), *said.list_named(name)})
            typed = f"name that you typed for {messages.count(count, 'face')}"
            if count and not forget_missing:
                command = ["vidjax", "gallery", "remove", str(gallery.folder), f"--identity={name}"]
                self.say(f"{show(name)} no longer has photos, but is still a {typed}\n"
                         f"to forget {show(name)}: {shlex.join(command)}")  # fmt: skip
                continue
            text = f"{show(name)} no longer has photos and is forgotten"
            self.say(text + f", with the {typed}" * bool(count))
            forgotten.add(name)
        if forget_missing:
            for name in forgotten:
                said_lib.forget(out, name)
            clips = [clip for clip, x in gallery.clips.items() if x.identity in forgotten]
            with gallery.change(log=False) as draft:
                draft.remove(clip=clips)
        for name, folder in locate_people(out).items():
            if name not in places and name in names:
                self.say(f"{show(name)} no longer has a folder, but stays known: face tags still "
                         f"say {show(name)}")  # fmt: skip
            if name not in places and not features_folder.remove_features(folder):
                place = show(str(folder))
                self.say(f"'{place}' contains files that vidjax did not write: they are kept")
        # Page and tables contain their names, and this call may fail before it writes new ones.
        if forgotten:
            results.remove_results(out)
