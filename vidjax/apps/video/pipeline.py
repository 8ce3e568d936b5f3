"""Extracts features from many videos and photos in parallel.

A file is not read again if neither what it shows nor the nets nor the settings have changed. The
class `media_files.MediaFolder` knows which film is where.
"""

import contextlib
import errno
import itertools
import os
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from vidjax.apps import cards as cards_lib
from vidjax.apps.video import digests, film as film_lib, media, media_files, regions
from vidjax.apps.video.media import THUMBNAILS, VIDEOS, ExtractionSettings, FileStamp, MediaFile
from vidjax.apps.video.media_files import PHOTOS, MediaFolder, is_deleted, is_missing
from vidjax.data.checks import list_entries
from vidjax.data.clip_files import read_clips
from vidjax.utils import files, messages
from vidjax.utils.errors import NetError, UserError, describe_system_error
from vidjax.utils.messages import Note, Tell, ignore_note
from vidjax.utils.processes import Children, doubt, map_children, run_limited, run_limited_each
from vidjax.utils.terminal import Progress, say

ROLES: tuple[cards_lib.Role, ...] = ("face_detector", "face_embedder")
MEMORY_BYTES = 4 << 30  # address space of a process; libraries reserve half of it without using it
PROGRESS_SECONDS, PROGRESS_BYTES = 1.0, 20  # between two updates of the progress bar; of its file
BATCH_PHOTOS = 50  # the largest number of photos that a process reads
# The CPU time for a photo, and for a film: 600 seconds, and one more for each 20,000 bytes.
PHOTO_SECONDS, FILM_SECONDS, FILM_BYTES_PER_SECOND = 60, 600, 20_000
FORGET_REMEDY = "to delete the results of such files, too, add --forget-missing"
# After these errors, no other file is read, because every other file would fail, too.
FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileOutcome(NamedTuple):
    """What was found in a film or photo, or why the file could not be read."""

    path: Path
    # The description of the film or photo; after an error, of an earlier call, or None.
    media: MediaFile | None
    error: str = ""  # "" if there was no error
    kept: bool = False  # whether the features of an earlier call were kept
    copy: bool = False  # whether the file is a copy; then `media` describes the original, too
    remedy: str = ""  # what a user can do about the error
    label: str = ""  # the name of the file, or the path if several files have this name


class _Job(NamedTuple):
    """A film or photo, and how its features are to be extracted."""

    path: Path
    address: str  # of the path, see `FileStamp`
    folder: MediaFolder  # the folder of features
    models: Path  # the folder of nets
    check: bool  # see `extract_files`
    tell: Tell
    stem: str  # of the file if it shows a new film, see `film.choose_stem`

    @property
    def has_photo_name(self) -> bool:
        """Whether the ending of the name is that of a photo."""
        return self.path.suffix.lower() in PHOTOS


def extract_files(
    paths: Sequence[Path],
    out: Path,
    models: Path,
    settings: ExtractionSettings | None = None,
    *,
    workers: int = 1,
    prune: bool = False,
    forget_missing: bool = False,
    thumbnails: bool = False,
    check: bool = False,
    tagged: bool = False,
    done: Callable[[FileOutcome], None] = lambda outcome: None,
    tell: Tell = ignore_note,
) -> list[FileOutcome]:
    """Extracts faces and voices from videos and photos; returns the outcomes.

    If a call is interrupted, the next call continues. If a file cannot be read, its outcome is an
    error, and the other files are still read. The folder `out` is locked until the call ends.

    Files that show the same are one film or photo. It has the stem and the name of the first file,
    and the others are copies. A copy becomes the first file when the first file is missing. Only
    what a file shows counts, see `media.Content`, so a film keeps its features when its
    file is moved, renamed, or gets another title. If another film is at its place, the earlier film
    keeps its features, and the new film gets another stem.

    Args:
      paths: videos, photos, or folders of videos and photos.
      out: the folder of features. If it does not exist, it is created, readable only by its owner.
      models: the folder of nets. Voices need a net that detects speech, and a net that computes
        embeddings of voices.
      settings: the settings of the folder. If None, the folder keeps its settings, and a new folder
        gets the default settings.
      workers: the number of processes.
      prune: True removes the features of missing files in folders that contain other files, and of
        files that were replaced by other films or photos. A drive that is not connected looks like
        a missing or empty folder.
      forget_missing: True removes the features of all missing files if `prune` is True, too.
      thumbnails: True keeps a picture of the best face of each clip. False removes all pictures.
      check: how changes of files are detected. True compares what each file shows. False compares
        only the path, the size, the time of the last change, and the inode.
      tagged: whether names that photo programs stored for faces are read, see `regions`. The names
        of clips then begin with digests, so that they contain no names of files or people.
      done: is called with each outcome, in any order.
      tell: is called with each message about the files.

    Raises:
      UserError: a net is missing, the folder contains a link, or the folder contains features of
        other nets or settings.
      DiskError: the disk is full.
    """
    known = cards_lib.load(models)
    voices = cards_lib.VOICE_ROLES if known.keys() & {*cards_lib.VOICE_ROLES} else ()
    for role in ROLES + voices:
        cards_lib.require(known, role, models)
    listed = media_files.list_files(paths, tell)
    media_files.check_apart(listed, out)
    with files.lock(files.make_folder(out, "out", mode=0o700), "features"):
        files.refuse_links(out)
        used = _check_extraction(out, {role: x.digest for role, x in known.items()}, settings)
        folder = _prepare_folder(out, used, tagged, thumbnails, tell)
        addresses = [media.make_address(path) for path in listed]
        jobs = [
            _Job(path, address, folder, models, check, tell, folder.choose_stem(path, address))
            for path, address in zip(listed, addresses, strict=True)
        ]
        outcome_of = _process_jobs(jobs, workers, done)
        folder.follow_copies()
        lost = _drop_films(folder, {*addresses}, forget_missing, tell) if prune else []
        for outcome in lost:
            done(outcome)
        return [*(_renew(folder, outcome_of[job]) for job in jobs), *lost]


def read_digests(models: Path) -> dict[str, str]:
    """Returns a dict: role of each net in `models` -> sha256 of the net's card, a JSON file.

    If the digests have changed, features must be computed again.
    """
    return {role: card.digest for role, card in cards_lib.read_all(models).items()}


def check_nets(models: Path, settings: ExtractionSettings) -> None:
    """Loads all nets in a folder and tests them. Raises UserError if a net cannot be used."""
    run_limited(
        film_lib.__name__, models, {"models": str(models), "size": settings.size}, type(None),
        reads=cards_lib.list_files(models), memory_bytes=MEMORY_BYTES, cpu_seconds=PHOTO_SECONDS,
    )  # fmt: skip


def _process_jobs(
    jobs: Sequence[_Job], workers: int, done: Callable[[FileOutcome], None]
) -> dict[_Job, FileOutcome]:
    """Extracts features from files in up to `workers` child processes.

    Returns the outcomes. `done` is called with each outcome.
    """
    twins = Counter(job.path.name for job in jobs)
    label = {job: job.path.name if twins[job.path.name] == 1 else str(job.path) for job in jobs}
    left = {job: job.path.stat().st_size if job.path.exists() else 0 for job in jobs}
    films, numbers = sum(not job.has_photo_name for job in jobs), itertools.count(1)
    outcome_of = dict[_Job, FileOutcome]()

    def read(children: Children, batch: Sequence[_Job]) -> None:
        is_film = not batch[0].has_photo_name
        title = f"{next(numbers):,} of {films:,}: {label[batch[0]]}" if is_film else ""
        for job, outcome in _extract_batch(children, batch, title).items():
            left.pop(job)
            outcome_of[job] = outcome
            done(outcome._replace(label=label[job]))

    is_shown = films and sys.stderr.isatty()
    with _show_progress(jobs[0].folder.out, left) if is_shown else contextlib.nullcontext():
        # Files of equal size are probably copies. All except the first are read at the end.
        firsts = {*{size: job for job, size in reversed(left.items())}.values()}
        for waiting in ([x for x in jobs if x in firsts], [x for x in jobs if x not in firsts]):
            photos = [job for job in waiting if job.has_photo_name]
            # A process reads a single film, or up to 50 photos.
            size = max(1, min(BATCH_PHOTOS, -(-len(photos) // workers)))
            batches = [[job] for job in waiting if not job.has_photo_name]
            batches += [photos[n : n + size] for n in range(0, len(photos), size)]
            map_children(read, batches, workers)
    return outcome_of


@contextlib.contextmanager
def _show_progress(out: Path, left: Mapping[_Job, int]) -> Iterator[None]:
    """Shows a progress bar in a `with` block that reads files into the folder of features `out`.

    `left` is file -> size in bytes, for the files that are not finished. The block removes each
    finished file from `left`.
    """
    total, ended = sum(left.values()), threading.Event()
    bar = Progress(total, unit="byte", label="films", leave=False)

    def watch(last: int = 0) -> None:
        while not ended.wait(PROGRESS_SECONDS):
            paths = [*out.glob(f".extract-*/{media.PROGRESS}")]
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
    out: Path, settings: ExtractionSettings, tagged: bool, pictures: bool, tell: Tell
) -> MediaFolder:
    """Removes what interrupted calls left in the folder of features `out`; returns its films.

    `settings` are the settings of its features. `tagged` and `pictures` are the arguments `tagged`
    and `thumbnails` of `extract_files`.
    """
    (out / VIDEOS).mkdir(exist_ok=True)
    if pictures:
        (out / THUMBNAILS).mkdir(mode=0o700, exist_ok=True)
    elif not media.remove_thumbnails(out):
        raise files.foreign_error(out / THUMBNAILS)
    media.remove_leftovers(out, None)
    folder = MediaFolder(out, settings, tagged=tagged)
    for path in (out / VIDEOS).glob("*.json"):
        if path.stem not in folder.films:
            about = "it is removed, and the film is read again if you name it"
            tell(Note(f"{path} is damaged: {about}", warning=False))
            folder.remove(path.stem)
    return folder


def _drop_films(
    folder: MediaFolder, listed: set[str], forget_missing: bool, tell: Tell
) -> list[FileOutcome]:
    """Removes films and photos of earlier calls that were deleted, see `prune` of `extract_files`.

    `listed` are the addresses of the files of this call. Returns outcomes with an error, if files
    of earlier calls cannot be found and their features are kept.
    """
    unsure = list[Path]()
    for stem in sorted(folder.films.keys() - folder.used):
        film = folder.films[stem]
        path, missing = film.source.path, is_missing(film.source.path)
        deleted = all(
            x.address in listed or is_deleted(x.path) or (forget_missing and is_missing(x.path))
            for x in film.stamps
        )
        if deleted:
            gone = "no longer exists" if missing else "was replaced by another film or photo"
            tell(Note(f"{path} {gone}: its results are deleted", warning=False))
        else:
            folder.used.add(stem)
            unsure += [path] * missing
    media.remove_leftovers(folder.out, folder.used)
    if not unsure:
        return []
    path, rest = unsure[0], messages.count(len(unsure) - 1, "more file")
    more = f" (and of {rest})" if unsure[1:] else ""
    error = f"the folder of {path}{more} is missing or empty: is the drive connected?"
    return [FileOutcome(path, None, f"{error} The results are kept", remedy=FORGET_REMEDY)]


def _renew(folder: MediaFolder, outcome: FileOutcome) -> FileOutcome:
    """Returns an outcome with the last description of its film, which a copy may have changed."""
    media = outcome.media
    return outcome._replace(media=media and folder.films.get(folder.stem_of[media.sha256], media))


def _check_extraction(
    out: Path, digests: dict[str, str], settings: ExtractionSettings | None
) -> ExtractionSettings:
    """Checks that features can be added to the folder `out`. Returns the settings of its features.

    `digests` is role of a net -> sha256 of the net's card, a JSON file. If `settings` is None, uses
    the settings of earlier features, or the defaults. Raises UserError if `out` has features of
    other nets or settings, or files of another program.
    """
    before = media.read_extraction(out)
    if before is None:
        if foreign := list_entries(out):
            raise files.foreign_error(foreign[0])
        settings = settings or ExtractionSettings()
        media.write(out / media.NAME, media.Extraction(models=digests, settings=settings))
        return settings
    for role in sorted(before.models.keys() | digests.keys()):
        if before.models.get(role) != digests.get(role):
            raise UserError(
                f"the features in '{out}' were computed with another net for the role {role}\n"
                "use a new folder for the features, or the earlier folder of nets"
            )
    if settings and settings != before.settings:
        old, new = map(msgspec.structs.asdict, (before.settings, settings))
        changed = [f"{name}: {old[name]}, not {x}" for name, x in new.items() if old[name] != x]
        log = out.parent / media.RESULTS
        keep = f". To keep all names, first copy '{log}' into the new folder"
        raise UserError(
            f"the features in '{out}' have other settings ({'; '.join(changed)})\n"
            "name a new folder, or use the same settings" + keep * files.exists(log)
        )
    return before.settings


def _extract_batch(children: Children, jobs: Sequence[_Job], title: str) -> dict[_Job, FileOutcome]:
    """Extracts features from the new and changed files of a batch in one child process.

    `title` is printed, such as "3 of 10: a.mp4", or "" for photos. Returns job -> outcome.
    """
    outcomes: dict[_Job, FileOutcome] = {}
    pending: dict[_Job, film_lib.Task] = {}
    with contextlib.ExitStack() as folders:
        for job in jobs:
            with _catch_failure(job, outcomes):
                found = _compare(job, folders)
                if isinstance(found, FileOutcome):
                    outcomes[job] = found
                else:
                    pending[job] = found
        if pending:
            photos = messages.count(len(pending), "photo")
            say(f"{media.make_printable(title) or photos} ...")
        answers = _read(children, pending) if pending else []
        for (job, task), answer in zip(pending.items(), answers, strict=True):
            if isinstance(answer, NetError):
                check_nets(job.models, task.settings)  # raises the error, unless a file made it up
            with _catch_failure(job, outcomes), job.folder.lock:
                if isinstance(answer, UserError):
                    raise answer
                outcomes[job] = _merge(job, task, answer)
    return outcomes


def _read(
    children: Children, pending: Mapping[_Job, film_lib.Task]
) -> list[film_lib.Answer | UserError]:
    """Calls `film.work` for each file in a child process.

    Returns an answer or an error for each file, in order.
    """
    tagged = (job.path for job in pending if job.folder.tagged)
    sidecars = [x for path in tagged for x in regions.list_sidecars(path) if not x.is_symlink()]
    size = sum(task.source.size for task in pending.values())
    photos = all(job.has_photo_name for job in pending)
    return run_limited_each(
        film_lib.__name__,
        [(job.path, msgspec.to_builtins(task)) for job, task in pending.items()],
        film_lib.Answer,
        memory_bytes=MEMORY_BYTES,
        cpu_seconds=PHOTO_SECONDS if photos else FILM_SECONDS + size // FILM_BYTES_PER_SECOND,
        reads=[*cards_lib.list_files(min(job.models for job in pending)), *sidecars],
        writes=[Path(task.out) for task in pending.values()],
        children=children,
    )


def _compare(job: _Job, folders: contextlib.ExitStack) -> FileOutcome | film_lib.Task:
    """Decides whether a file must be opened.

    If the file has not changed, returns the outcome. Otherwise, returns a task for `film.work`,
    which extracts the features into a temporary folder, unless the file shows a known film. When
    `folders` is closed, this folder is deleted.
    """
    folder = job.folder
    source = FileStamp.of(job.path, regions.list_sidecars(job.path) if folder.tagged else ())
    if not job.check:
        with folder.lock:
            if stem := folder.recognise(source):
                return _keep(job, stem, source)
    sha256 = digests.digest_photo(job.path) or ""
    with folder.lock:
        stems, current = folder.list_known(sha256)
    partial = folder.out / f".extract-{secrets.token_hex(4)}"
    folders.enter_context(files.scratch_folder(partial))
    if (folder.out / THUMBNAILS).exists():
        (partial / THUMBNAILS).mkdir(mode=0o700)
    return film_lib.Task(
        models=str(job.models.absolute()), settings=folder.settings, path=str(job.path.absolute()),
        out=str(partial.absolute()), stem=job.stem, stems=stems, current=current, source=source,
        sha256=sha256, tagged=folder.tagged,
    )  # fmt: skip


def _keep(job: _Job, stem: str, source: FileStamp, *, turned: bool = False) -> FileOutcome:
    """Notes that a file shows the known film `stem`; returns the outcome.

    `source` are the properties of the file. If `turned`, the file is a copy that is turned
    otherwise. It could not take the place of the film without being read, so its place is not
    noted. The caller holds the lock of the folder.
    """
    film = job.folder.films[stem]
    is_new = source.address not in {stamp.address for stamp in film.stamps}
    is_copy = turned or job.folder.place(stem, source, job.path.name)
    job.folder.used.add(stem)
    if is_copy and is_new and not job.folder.tagged:
        job.tell(Note(f"{job.path} is a copy of {film.source.path} and is left out", warning=False))
    return FileOutcome(job.path, film, kept=True, copy=is_copy)


def _merge(job: _Job, task: film_lib.Task, answer: film_lib.Answer) -> FileOutcome:
    """Adds the results of `film.work` to the folder, unless the file is a copy of a known film.

    Returns the outcome. The caller holds the lock of the folder.
    """
    folder, source, sha256 = job.folder, task.source, answer.content.sha256
    stem = film_lib.choose_stem(task, sha256)
    with doubt(job.path):
        if task.sha256 not in ("", sha256) or not (answer.film or answer.content in task.current):
            raise ValueError("the child process gave a wrong digest")
    # Another process may have read a copy in the meantime.
    known = folder.stem_of.get(sha256, "")
    before = folder.films.get(known)
    if before and answer.film is None:
        return _keep(job, known, source)
    film = _check_results(job, task, answer, stem)
    if before and known in folder.complete and _is_copy(before, film, known == stem):
        return _keep(job, known, source, turned=before.orientation != film.orientation)
    _check_tags(job, before or folder.find_at(source.address), film)
    if before:
        film.copies = folder.list_others(before, source.address)
    folder.remove(stem)
    try:
        _move_features(Path(task.out), folder.out, stem, film)
        folder.add(stem, film)
    except OSError:
        folder.remove(stem)  # incomplete files
        raise
    folder.used.add(stem)
    return FileOutcome(job.path, film)


def _move_features(made: Path, out: Path, stem: str, film: MediaFile) -> None:
    """Moves the features and thumbnails of a film from the folder `made` to `out`."""
    os.replace(made / f"{stem}.npz", out / f"{stem}.npz")
    if (made / THUMBNAILS).exists():
        (out / THUMBNAILS / stem).mkdir(mode=0o700, exist_ok=True)
        for picture in (made / THUMBNAILS / f"{track.clip}.png" for track in film.tracks):
            files.hide(picture)
            os.replace(picture, out / THUMBNAILS / stem / picture.name)


def _is_copy(before: MediaFile, film: MediaFile, is_expected: bool) -> bool:
    """Returns whether a file that was read is only a copy of `before`, a film with features.

    `film` describes the file. If `is_expected` is False, `before` became known while the file was
    read. Of equal photos, the first with face tags is the original.
    """
    if film.source.address == before.source.address or not before.source.is_valid:
        return not is_expected
    return bool(before.tags) or not film.tags


def _check_tags(job: _Job, before: MediaFile | None, film: MediaFile) -> None:
    """Raises UserError if the face tags of a photo are missing now, but were found earlier.

    `before` and `film` are the descriptions by an earlier call and by this call.
    """
    if before and before.tags and not film.tags:
        if film.bad_tags:
            raise UserError(film.bad_tags)
        fewer = len(film.source.sidecars) < len(before.source.sidecars)
        if before.sha256 == film.sha256 and fewer:
            raise UserError(
                f"{job.path}: the sidecar file with the face tags is missing: copy it back, or "
                "delete the photo"
            )


def _check_results(job: _Job, task: film_lib.Task, answer: film_lib.Answer, stem: str) -> MediaFile:
    """Checks the results of a child process; returns the description of the file `job.path`.

    A malicious file may take over the child process. So its name and properties are taken from
    `job` and `task`. Raises UserError if the results have clips of other films than `stem`, or lack
    clips or pictures.
    """
    out = Path(task.out)
    with doubt(job.path):
        film = answer.film
        assert film and film.content == answer.content
        film.video = media.make_printable(job.path.name)
        film.source, film.copies = task.source, []
        files.refuse_links(out)
        clips = sorted(clip.name for clip in read_clips([out / f"{stem}.npz"]))
        shown = clips if (out / THUMBNAILS).exists() else ()
        lacks = not all(files.is_file(out / THUMBNAILS / f"{clip}.png") for clip in shown)
        others = {clip.partition(".")[0] for clip in clips} - {stem}
        if lacks or others or clips != sorted(track.clip for track in film.tracks):
            raise ValueError("the child process lost clips or pictures, or added other clips")
    return film


@contextlib.contextmanager
def _catch_failure(job: _Job, outcomes: dict[_Job, FileOutcome]) -> Iterator[None]:
    """Adds an outcome if a file cannot be read in a `with` block. If the disk is full, raises.

    The results of an earlier call are kept: the file may be on a drive that fails, or a placeholder
    for a file in a cloud.
    """
    try:
        yield
    except (UserError, OSError) as error:
        folder, earlier = job.folder, job.folder.find_at(job.address)
        if earlier:
            stem = folder.stem_of[earlier.sha256]
            folder.used.add(stem)
            if not media.has_features(folder.out, stem):
                earlier = None
        elif job.stem and not job.stem.endswith("~"):
            folder.remove(job.stem)  # a killed call may have left incomplete files
        if isinstance(error, OSError) and error.errno in FULL_DISK_ERRORS:
            raise
        text, _, remedy = (describe_system_error(error) or str(error)).partition("\n")
        text = text if str(job.path) in text else f"'{job.path}': {text}"
        if earlier:
            text += ". The results of an earlier call are kept"
        outcomes[job] = FileOutcome(job.path, earlier, text, remedy=remedy)
