"""Extracts features from many videos and photos in parallel.

A file is not read again if neither the file nor the nets nor the settings have changed.
"""

import contextlib
import errno
import os
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from vidjax.apps import cards as cards_lib, features_folder
from vidjax.apps.features_folder import THUMBNAILS, VIDEOS, ExtractionSettings, MediaFile
from vidjax.apps.video import film as film_lib, media_files, regions
from vidjax.apps.video.media_files import PHOTOS, has_files, is_missing
from vidjax.data.checks import list_entries
from vidjax.data.clip_files import read_clips
from vidjax.utils import files, messages
from vidjax.utils.errors import NetError, UserError, describe_system_error
from vidjax.utils.groups import group_by_key
from vidjax.utils.messages import Note, Tell, ignore_note
from vidjax.utils.processes import Children, doubt, map_children, run_limited, run_limited_each
from vidjax.utils.terminal import Progress, say

ROLES: tuple[cards_lib.Role, ...] = ("face_detector", "face_embedder")
MEMORY_BYTES = 4 << 30  # address space of a process; libraries reserve half of it without using it
PROGRESS_SECONDS, PROGRESS_BYTES = 1.0, 20  # between two updates of the progress bar; of its file
BATCH_PHOTOS = 50  # the largest number of photos that a process reads
# The CPU time for a photo, and for a film: 600 seconds, and one more for each 20,000 bytes.
PHOTO_SECONDS, FILM_SECONDS, FILM_BYTES_PER_SECOND = 60, 600, 20_000
Drop = Literal["nothing", "deleted", "missing", "others", "all others"]  # see `extract_folders`
FORGET_REMEDY = "to delete the results of such files, too, add --forget-missing"
# After these errors, no other file is read, because every other file would fail, too.
FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileOutcome(NamedTuple):
    """What was found in a film or photo, or why the file could not be read."""

    path: Path
    media: MediaFile | None  # the description of the film or photo; None after an error
    error: str = ""  # "" if there was no error
    kept: bool = False  # whether the features of an earlier call were kept
    replaced: bool = False  # whether features of another file with the same name were replaced
    remedy: str = ""  # what a user can do about the error
    label: str = ""  # the name of the file, or the path if several files have this name
    earlier: MediaFile | None = None  # after an error: the description by an earlier call

    @property
    def known(self) -> MediaFile | None:
        """The description of the film or photo.

        After an error, it is the description by an earlier call, or None if there is none.
        """
        return self.media or self.earlier


class _Job(NamedTuple):
    """A film or photo, and how its features are to be extracted."""

    path: Path
    stem: str  # the first part of the names of the file's clips
    out: Path  # the folder of features
    settings: ExtractionSettings
    models: Path  # the folder of nets
    tagged: bool  # whether names that photo programs stored for faces are read
    check: bool  # whether the content of the file is compared, see `extract_folders`


def extract_folders(
    paths: Mapping[Path, Sequence[Path]],
    models: Path,
    settings: ExtractionSettings | None = None,
    *,
    workers: int = 1,
    drop: Drop = "nothing",
    thumbnails: bool = False,
    upgrade: bool = False,
    check: bool = False,
    tagged: bool = False,
    done: Callable[[FileOutcome], None] = lambda outcome: None,
    tell: Tell = ignore_note,
) -> dict[Path, list[FileOutcome]]:
    """Extracts faces and voices from videos and photos; returns the outcomes for each folder.

    If a call is interrupted, the next call continues. If a file cannot be read, its outcome is an
    error, and the other files are still read. All folders are locked until the call ends.

    Args:
      paths: folder of features -> videos, photos, or folders of videos and photos. If a folder of
        features does not exist, it is created, readable only by its owner.
      models: the folder of nets. Voices need a net that detects speech, and a net that computes
        embeddings of voices.
      settings: the settings of the folders. If None, each folder keeps its settings, and a new
        folder gets the default settings.
      workers: the number of processes.
      drop: the files whose features are removed. A drive that is not connected looks like a missing
        or empty folder.
        "nothing": no files.
        "deleted": missing files in folders that contain other files.
        "missing": all missing files.
        "others": files not in `paths`, except missing files in missing or empty folders.
        "all others": all files not in `paths`.
      thumbnails: True keeps a picture of the best face of each clip. False removes all pictures.
      upgrade: what to do if nets in `models` were replaced or added. True deletes all features, and
        computes the features of the files in `paths` again. False raises an error.
      check: how changes of files are detected. True compares the content of each file. False
        compares only the path, the size, the time of the last change, and the inode.
      tagged: whether names that photo programs stored for faces are read, see `regions`.
      done: is called with each outcome, in any order.
      tell: is called with each message about a folder.

    Raises:
      UserError: a net is missing, a folder contains a link, or a folder contains features of other
        nets or settings.
      DiskError: the disk is full.
    """
    known = cards_lib.load(models)
    voices = cards_lib.VOICE_ROLES if known.keys() & {*cards_lib.VOICE_ROLES} else ()
    for role in ROLES + voices:
        cards_lib.require(known, role, models)
    digests = {role: card.digest for role, card in known.items()}
    with contextlib.ExitStack() as locked:
        jobs: list[_Job] = []
        unsure: dict[Path, list[FileOutcome]] = {}
        for out, inputs in paths.items():
            listed = media_files.list_files(inputs)
            for note in media_files.describe_left_out(inputs):
                tell(note)
            media_files.check_apart(listed, out)
            folder = files.make_folder(out, "out", mode=0o700)
            locked.enter_context(files.lock(folder, "features"))
            files.refuse_links(out)
            used = _check_extraction(out, digests, settings, upgrade)
            stems, unsure[out] = _prepare_folder(out, listed, drop, thumbnails, tell)
            jobs += [_Job(x, stem, out, used, models, tagged, check) for x, stem in stems.items()]

        outcomes_of = _process_jobs(jobs, workers, done)
        for out, outcomes in unsure.items():
            for outcome in outcomes:
                done(outcome)
            outcomes_of[out] += outcomes
        return outcomes_of


def read_digests(models: Path) -> dict[str, str]:
    """Returns a dict: role of each net in `models` -> sha256 of the net's card, a JSON file.

    If the digests have changed, features must be computed again.
    """
    return {role: card.digest for role, card in cards_lib.read_all(models).items()}


def check_nets(models: Path, settings: ExtractionSettings) -> None:
    """Loads all nets in a folder and tests them. Raises UserError if a net cannot be used."""
    task = film_lib.Task(models=str(models), settings=settings)
    run_limited(
        film_lib.__name__, models, msgspec.to_builtins(task), type(None),
        reads=cards_lib.list_files(models), memory_bytes=MEMORY_BYTES, cpu_seconds=PHOTO_SECONDS,
    )  # fmt: skip


def _process_jobs(
    jobs: Sequence[_Job], workers: int, done: Callable[[FileOutcome], None]
) -> dict[Path, list[FileOutcome]]:
    """Extracts features from files in up to `workers` child processes.

    Returns the outcomes by folder of features. `done` is called with each outcome.
    """
    twins = Counter(job.path.name for job in jobs)
    label = {job: job.path.name if twins[job.path.name] == 1 else str(job.path) for job in jobs}
    left = {job: job.path.stat().st_size if job.path.exists() else 0 for job in jobs}
    # A process reads a single film, or up to 50 photos.
    photos = [job for job in jobs if job.path.suffix.lower() in PHOTOS]
    films = [[job] for job in jobs if job.path.suffix.lower() not in PHOTOS]
    size = max(1, min(BATCH_PHOTOS, -(-len(photos) // workers)))
    batches = [*films, *(photos[n : n + size] for n in range(0, len(photos), size))]
    outcome_of = dict[_Job, FileOutcome]()

    def read(children: Children, numbered: tuple[int, Sequence[_Job]]) -> None:
        number, batch = numbered
        title = f"{number:,} of {len(films):,}: {label[batch[0]]}" if number <= len(films) else ""
        for job, outcome in _extract_batch(children, batch, title).items():
            left.pop(job)
            outcome_of[job] = outcome
            done(outcome._replace(label=label[job]))

    with _show_progress(left) if films and sys.stderr.isatty() else contextlib.nullcontext():
        map_children(read, [*enumerate(batches, 1)], workers)
    return group_by_key((job.out, outcome_of[job]) for job in jobs)


@contextlib.contextmanager
def _show_progress(left: Mapping[_Job, int]) -> Iterator[None]:
    """Shows a progress bar in a `with` block that reads files.

    `left` is file -> size in bytes, for the files that are not finished. The block removes each
    finished file from `left`.
    """
    total, places, ended = sum(left.values()), {job.out for job in left}, threading.Event()
    bar = Progress(total, unit="byte", label="films", leave=False)

    def watch(last: int = 0) -> None:
        while not ended.wait(PROGRESS_SECONDS):
            pattern = f".extract-*/{features_folder.PROGRESS}"
            paths = [path for out in places for path in out.glob(pattern)]
            # Another process may remove or write a file of progress at this moment.
            with contextlib.suppress(UserError, OSError, ValueError):
                parts = (int(files.read_bytes(path, PROGRESS_BYTES)) for path in paths)
                read = min(total, total - sum([*left.values()]) + sum(parts))
                bar.advance(max(0, read - last))
                last = max(read, last)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(watch)
        try:
            yield
        finally:
            ended.set()
    bar.close()


def _prepare_folder(
    out: Path, listed: Sequence[Path], drop: Drop, pictures: bool, tell: Tell
) -> tuple[dict[Path, str], list[FileOutcome]]:
    """Removes outdated files from the folder of features `out`; returns input file -> stem.

    The stem is the first part of the names of the file's clips. Also returns outcomes with an
    error, if files of earlier calls cannot be found and their features are kept. For `drop` and
    `pictures`, see `drop` and `thumbnails` of `extract_folders`.
    """
    (out / VIDEOS).mkdir(exist_ok=True)
    if pictures:
        (out / THUMBNAILS).mkdir(mode=0o700, exist_ok=True)
    elif not features_folder.remove_thumbnails(out):
        raise files.foreign_error(out / THUMBNAILS)
    known = features_folder.describe_media_files(out)
    for path in (out / VIDEOS).glob("*.json"):
        if path.stem not in known:
            about = "it is removed, and the film is read again if you name it"
            tell(Note(f"{path} is damaged: {about}", warning=False))
            features_folder.remove_media_file(out, path.stem)
    stems = _choose_stems(listed, known, tell)
    kept, unsure, lost = {*stems.values()}, list[Path](), list[FileOutcome]()
    others = drop in ("others", "all others")
    for stem in sorted(known.keys() - kept if drop != "nothing" else ()):
        path, missing = known[stem].source.path, is_missing(known[stem].source.path)
        deleted = missing and (drop in ("missing", "all others") or has_files(path.parent))
        if others and not deleted and not files.exists(path):
            kept.add(stem)
            error = f"{path} cannot be reached: is the drive connected?"
            remedy = FORGET_REMEDY if missing else ""
            earlier = known[stem] if features_folder.has_features(out, stem) else None
            lost.append(FileOutcome(path, None, error, remedy=remedy, earlier=earlier))
        elif deleted and not others:
            tell(Note(f"{path} no longer exists: its results are deleted", warning=False))
        elif not others:
            kept.add(stem)
            unsure += [path] * missing
    features_folder.remove_leftovers(out, None if drop == "nothing" else kept)
    if unsure:
        path, rest = unsure[0], messages.count(len(unsure) - 1, "more file")
        more = f" (and of {rest})" if unsure[1:] else ""
        error = f"the folder of {path}{more} is missing or empty: is the drive connected?"
        lost.append(FileOutcome(path, None, f"{error} The results are kept", remedy=FORGET_REMEDY))
    return stems, lost


def choose_drop(prune: bool, forget_missing: bool) -> Drop:
    """Returns the argument `drop` of `extract_folders`: which features of earlier calls to remove.

    `prune` and `forget_missing` are the flags --prune and --forget-missing of a command.
    """
    return ("missing" if forget_missing else "deleted") if prune else "nothing"


def _check_extraction(
    out: Path, digests: dict[str, str], settings: ExtractionSettings | None, upgrade: bool
) -> ExtractionSettings:
    """Checks that features can be added to the folder `out`. Returns the settings of its features.

    `digests` is role of a net -> sha256 of the net's card, a JSON file. If `settings` is None, uses
    the settings of earlier features, or the defaults. If `upgrade` is True, deletes features of
    other nets, unless `digests` lacks one of their roles. Raises UserError if `out` then has
    features of other nets or settings, or files of another program.
    """
    before = features_folder.read_extraction(out)
    if before is None:
        if foreign := list_entries(out):
            raise files.foreign_error(foreign[0])
        settings = settings or ExtractionSettings()
        extraction = features_folder.Extraction(models=digests, settings=settings)
        features_folder.write(out / features_folder.NAME, extraction)
        return settings
    if upgrade and before.models != digests and before.models.keys() <= digests.keys():
        features_folder.set_aside(out)
        before.models = digests
        features_folder.write(out / features_folder.NAME, before)
    for role in sorted(before.models.keys() | digests.keys()):
        if before.models.get(role) != digests.get(role):
            raise UserError(
                f"the features in '{out}' were computed with another net for the role {role}\n"
                "use a new folder for the features, or the earlier folder of nets"
            )
    if settings and settings != before.settings:
        old, new = map(msgspec.structs.asdict, (before.settings, settings))
        changed = [f"{name}: {old[name]}, not {x}" for name, x in new.items() if old[name] != x]
        raise UserError(
            f"the features in '{out}' have other settings ({'; '.join(changed)})\n"
            "name a new folder, or use the same settings"
        )
    return before.settings


def _choose_stems(
    paths: Sequence[Path], known: Mapping[str, MediaFile], tell: Tell
) -> dict[Path, str]:
    """Returns file -> stem, the first part of the names of the file's clips.

    `known` is stem -> film of an earlier call. These films keep their stems, even if they were
    moved. The stem of a new file is made from its name. If another file with other content has
    the same stem, `~` and 8 digits of the sha256 are added to the stem. If the content is the same,
    too, one of the two files is left out, and `tell` is called with a note.
    """
    of_path = {str(film.source.path): stem for stem, film in known.items()}
    moved = {film.sha256: stem for stem, film in known.items() if is_missing(film.source.path)}
    sizes = {known[stem].source.size for stem in moved.values()}
    owners = {stem.lower(): stem for stem in known}
    stems = {of_path[real]: path for path in paths if (real := os.path.realpath(path)) in of_path}
    for path in (path for path in paths if os.path.realpath(path) not in of_path):
        stem = features_folder.make_stem(path)
        owner = owners.get(stem.lower())
        if owner or (path.exists() and path.stat().st_size in sizes):
            sha256 = _sha256_or_of_name(path)
            if sha256 in moved:
                stem = moved[sha256]
            elif owner:
                film = known.get(owner)
                same = sha256 == (film.sha256 if film else _sha256_or_of_name(stems[owner]))
                # A link to a drive that is not connected.
                same |= film is not None and not path.exists() and is_missing(film.source.path)
                stem = owner if same else f"{stem}~{sha256[:8]}"
        owners.setdefault(stem.lower(), stem)
        if stems.setdefault(stem, path) != path and stem not in known:
            tell(Note(f"{path} is a copy of {stems[stem]} and is left out", warning=False))
    return {path: stem for stem, path in stems.items()}


def _sha256_or_of_name(path: Path) -> str:
    try:
        return files.sha256_file(path)
    except (UserError, OSError):  # `_compare` reads the file again, and reports the error
        return files.sha256_json(str(path.absolute()))


def _extract_batch(children: Children, jobs: Sequence[_Job], title: str) -> dict[_Job, FileOutcome]:
    """Extracts features from the new and changed files of a batch in one child process.

    `title` is printed, such as "3 of 10: a.mp4", or "" for photos. Returns job -> outcome.
    """
    outcomes: dict[_Job, FileOutcome] = {}
    pending: dict[_Job, film_lib.Task] = {}
    with contextlib.ExitStack() as folders:
        for job in jobs:
            try:
                outcome = _compare(job, folders)
            except (UserError, OSError) as error:
                outcome = _describe_failure(job, error)
            if isinstance(outcome, FileOutcome):
                outcomes[job] = outcome
            else:
                pending[job] = outcome
        if pending:
            photos = messages.count(len(pending), "photo")
            say(f"{features_folder.make_printable(title) or photos} ...")
        answers = _read(children, pending) if pending else []
        for (job, task), answer in zip(pending.items(), answers, strict=True):
            outcomes[job] = _take_results(job, task, answer)
    return outcomes


def _read(children: Children, pending: Mapping[_Job, film_lib.Task]) -> list[MediaFile | UserError]:
    """Calls `film.work` for each file in a child process.

    Returns a description or an error for each file, in order.
    """
    tagged = (job.path for job in pending if job.tagged)
    sidecars = [x for path in tagged for x in regions.list_sidecars(path) if not x.is_symlink()]
    size = sum(task.source.size for task in pending.values() if task.source)
    photos = all(job.path.suffix.lower() in PHOTOS for job in pending)
    return run_limited_each(
        film_lib.__name__,
        [(job.path, msgspec.to_builtins(task)) for job, task in pending.items()],
        MediaFile,
        memory_bytes=MEMORY_BYTES,
        cpu_seconds=PHOTO_SECONDS if photos else FILM_SECONDS + size // FILM_BYTES_PER_SECOND,
        reads=[*cards_lib.list_files(min(job.models for job in pending)), *sidecars],
        writes=[Path(task.out) for task in pending.values()],
        children=children,
    )


def _find_earlier(job: _Job) -> MediaFile | None:
    """Returns the stored description of the job's file; None if the file's features are missing."""
    known = features_folder.describe_media_file(job.out, job.stem)
    return known if features_folder.has_features(job.out, job.stem) else None


def _compare(job: _Job, folders: contextlib.ExitStack) -> FileOutcome | film_lib.Task:
    """Decides whether the features of a file must be extracted.

    If the features of an earlier call are up to date, returns the outcome. Otherwise, returns a
    task for `film.work`, which extracts the features into a temporary folder. When `folders` is
    closed, this folder is deleted.
    """
    before = _find_earlier(job)
    sidecars = regions.list_sidecars(job.path) if job.tagged else ()
    source = features_folder.FileStamp.of(job.path, sidecars)
    complete = before and not features_folder.lacks_pictures(job.out, job.stem)
    if before and complete and before.source == source and not job.check:
        return FileOutcome(job.path, before, kept=True)
    sha256 = files.sha256_file(job.path)
    is_same = before and before.sha256 == sha256 and before.source.sidecars == source.sidecars
    if before and complete and is_same:
        before.source, before.video = source, features_folder.make_printable(job.path.name)
        features_folder.write(job.out / VIDEOS / f"{job.stem}.json", before)
        return FileOutcome(job.path, before, kept=True)
    partial = folders.enter_context(
        files.scratch_folder(job.out / f".extract-{secrets.token_hex(4)}")
    )
    if (job.out / THUMBNAILS).exists():
        (partial / THUMBNAILS).mkdir(mode=0o700)
    return film_lib.Task(
        models=str(job.models.absolute()), settings=job.settings, path=str(job.path.absolute()),
        out=str(partial.absolute()), stem=job.stem, source=source, sha256=sha256, tagged=job.tagged,
    )  # fmt: skip


def _take_results(job: _Job, task: film_lib.Task, answer: MediaFile | UserError) -> FileOutcome:
    """Moves results of `film.work` from the folder `task.out` to `job.out`; returns the outcome.

    If the file could not be read, the results of an earlier call are kept: the file may be on a
    drive that fails, or a placeholder for a file in a cloud. If a net cannot be used, raises
    UserError, because no file can be read.
    """
    if isinstance(answer, NetError):
        check_nets(job.models, job.settings)  # raises the error, unless the file made it up
    try:
        if isinstance(answer, UserError):
            raise answer
        film, partial = _check_results(job, task, answer), Path(task.out)
        before = features_folder.describe_media_file(job.out, job.stem)
        if before and before.tags and not film.tags:
            if film.bad_tags:
                raise UserError(film.bad_tags)
            if before.sha256 == film.sha256 and len(before.source.sidecars) > len(
                film.source.sidecars
            ):
                raise UserError(
                    f"{job.path}: the sidecar file with the face tags is missing: copy it back, or "
                    "delete the photo"
                )
        had_features = features_folder.has_features(job.out, job.stem)
        features_folder.remove_media_file(job.out, job.stem)
        os.replace(partial / f"{job.stem}.npz", job.out / f"{job.stem}.npz")
        thumbnails = [folder / THUMBNAILS for folder in (partial, job.out)]
        if thumbnails[0].exists():
            (thumbnails[1] / job.stem).mkdir(mode=0o700, exist_ok=True)
            for picture in (thumbnails[0] / f"{track.clip}.png" for track in film.tracks):
                files.hide(picture)
                os.replace(picture, thumbnails[1] / job.stem / picture.name)
        features_folder.write(job.out / VIDEOS / f"{job.stem}.json", film)
    except (UserError, OSError) as error:
        return _describe_failure(job, error)
    is_other = had_features and before is not None and before.sha256 != film.sha256
    return FileOutcome(job.path, film, replaced=is_other)


def _check_results(job: _Job, task: film_lib.Task, film: MediaFile) -> MediaFile:
    """Checks the results of a child process; returns the description of the file `job.path`.

    A malicious file may take over the child process. So its name, properties and sha256 are taken
    from `job` and `task`. Raises UserError if the results have clips of other films, or lack clips
    or pictures.
    """
    assert task.source
    film.video = features_folder.make_printable(job.path.name)
    film.source, film.sha256, out = task.source, task.sha256, Path(task.out)
    with doubt(job.path):
        files.refuse_links(out)
        clips = sorted(clip.name for clip in read_clips([out / f"{job.stem}.npz"]))
        shown = clips if (out / THUMBNAILS).exists() else ()
        lacks = not all(files.is_file(out / THUMBNAILS / f"{clip}.png") for clip in shown)
        others = {clip.partition(".")[0] for clip in clips} - {job.stem}
        if lacks or others or clips != sorted(track.clip for track in film.tracks):
            raise ValueError("the child process lost clips or pictures, or added other clips")
    return film


def _describe_failure(job: _Job, error: UserError | OSError) -> FileOutcome:
    """Returns the outcome of a file that could not be read. If the disk is full, raises `error`."""
    earlier = _find_earlier(job)
    if not features_folder.describe_media_file(job.out, job.stem):
        features_folder.remove_media_file(job.out, job.stem)  # incomplete files
    if isinstance(error, OSError) and error.errno in FULL_DISK_ERRORS:
        raise error
    text, _, remedy = (describe_system_error(error) or str(error)).partition("\n")
    text = text if str(job.path) in text else f"'{job.path}': {text}"
    if earlier:
        text += ". The results of an earlier call are kept"
    return FileOutcome(job.path, None, text, remedy=remedy, earlier=earlier)
