"""Extraction of many videos and photos, several at once; what is there already is kept."""

import contextlib
import errno
import os
import re
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from vidjax.apps.video import cards as cards_lib
from vidjax.apps.video import features_folder, regions
from vidjax.apps.video import film as film_lib
from vidjax.data.processes import Children, map_children, run_limited_each
from vidjax.data.untrusted.names import show
from vidjax.runs import schemas
from vidjax.runs.terminal import Progress, say
from vidjax.utils import files
from vidjax.utils.errors import UserError, of_the_system

ROLES: tuple[cards_lib.Role, ...] = ("face_detector", "face_embedder")
# What a killed call leaves in the folder, and in that of the videos.
PARTIAL = re.compile(r"\.extract-[0-9a-f]{8}|\..+\.[0-9a-f]{8}\.partial")
MEMORY_BYTES = 4 << 30  # of address space; libraries reserve half of it, and never use it
CPU_SECONDS = 600
SECONDS = 1.0  # after which progress is shown anew
BATCH = 50  # photos that a process reads
CPU_BYTES_PER_SECOND = 20_000  # a film of 160 kbit a second takes as long as it is
# Endings of films and photos in folders; a file that is named itself may have any.
FILMS = {
    ".3gp", ".avi", ".divx", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogm", ".ogv", ".ts", ".vob", ".webm", ".wmv",
}  # fmt: skip
PHOTOS = {
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".png",
    ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
OF_WINDOWS = ("thumbs.db", "desktop.ini")  # which it puts into folders
ARTWORK = ("banner", "cover", "fanart", "folder", "poster", "thumb")  # of programs for films
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk: every other file would fail, too


class Outcome(NamedTuple):
    """What became of a file: its `film`, or an `error` of one line and its `remedy`.

    `kept` if it had been extracted before, `replaced` if another file of its name had been. `label`
    is the name of the file, or the path if several have this name.
    """

    path: Path
    film: features_folder.Film | None
    error: str = ""
    kept: bool = False
    replaced: bool = False
    remedy: str = ""
    label: str = ""


class _Job(NamedTuple):
    """A file to extract, its stem, and the folder of features with its settings."""

    path: Path
    stem: str
    out: Path
    settings: features_folder.Settings
    tagged: bool


def extract(
    paths: Sequence[Path],
    out: Path,
    models: Path,
    settings: features_folder.Settings | None = None,
    *,
    workers: int = 1,
    drop: Literal["nothing", "missing", "others"] = "nothing",
    thumbnails: bool = False,
    anew: bool = False,
    check: bool = False,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Extracts the faces of videos and photos into the folder `out`, see `folder`; voices, too.

    A file that cannot be read costs its own outcome alone. A cut-off call goes on where it was: a
    video counts as done if its file, the nets and the settings are the same; see `folder.Source`.

    Args:
      paths: the videos and photos; folders stand for the files in them.
      out: the folder; it is made, and readable by its owner alone.
      models: the folder of nets with cards; voices need the two of `cards.VOICES`.
      settings: None for those of the folder, or else the defaults.
      workers: processes at once.
      drop: whose features go from the folder: those of files that are "missing" now, those of
        all "others" than `paths`, or "nothing".
      thumbnails: keeps a picture of the best face of each clip; False removes those of all.
      anew: where `models` has nets more than made the folder's features, these are removed, and
        those of `paths` made by all nets; False refuses such a folder.
      check: reads every file to compare its content; False compares size, time and inode.
      done: called with each outcome, in any order.

    Raises:
      UserError: a net is missing, or the folder has features of other nets or settings, or a link.
      DiskError: the disk is full.
    """
    found = extract_folders(
        {out: paths}, models, settings, workers=workers, drop=drop, thumbnails=thumbnails,
        anew=anew, check=check, done=done,
    )  # fmt: skip
    return found[out]


def extract_folders(
    paths: Mapping[Path, Sequence[Path]],
    models: Path,
    settings: features_folder.Settings | None = None,
    *,
    workers: int = 1,
    drop: Literal["nothing", "missing", "others"] = "nothing",
    thumbnails: bool = False,
    anew: bool = False,
    check: bool = False,
    tagged: bool = False,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> dict[Path, list[Outcome]]:
    """Extracts files into several folders, see `extract`: `paths` are folder -> its files.

    One process reads many photos, also of several folders. All folders are locked meanwhile. With
    `tagged`, face tags in photos name their faces, see `regions`.
    """
    known = cards_lib.load(models)
    voices = cards_lib.VOICES if known.keys() & {*cards_lib.VOICES} else ()
    for role in ROLES + voices:
        cards_lib.require(known, role, models)
    digests: dict[str, str] = {role: card.digest for role, card in known.items()}
    jobs: list[_Job] = []
    with contextlib.ExitStack() as locked:
        for out, own in paths.items():
            listed = list_files(own)
            say_left_out(own)
            check_apart(listed, out)
            out.mkdir(mode=0o700, parents=True, exist_ok=True)
            locked.enter_context(files.lock(files.make_folder(out, "out"), "features"))
            files.refuse_links(out)
            if anew:
                _remove_outgrown(out, digests)
            wanted = _same_extraction(out, digests, settings)
            stems = _make_ready(out, listed, drop, thumbnails)
            jobs += [_Job(path, stem, out, wanted, tagged) for path, stem in stems.items()]

        twins = Counter(job.path.name for job in jobs)
        label = {job: job.path.name if twins[job.path.name] == 1 else str(job.path) for job in jobs}
        left = {job: job.path.stat().st_size if job.path.exists() else 0 for job in jobs}
        batches = _batches(jobs, workers)
        films = sum(job.path.suffix.lower() not in PHOTOS for job in jobs)

        def read(children: Children, numbered: tuple[int, Sequence[_Job]]) -> list[Outcome]:
            number, batch = numbered  # those of films come first
            title = f"{number:,} of {films:,}: {label[batch[0]]}" if number <= films else ""
            outcomes = _extract(children, batch, models, check, title)
            for job, outcome in zip(batch, outcomes, strict=True):
                left.pop(job)
                done(outcome._replace(label=label[job]))
            return outcomes

        found: dict[Path, list[Outcome]] = {out: [] for out in paths}
        with _progress(left) if films and sys.stderr.isatty() else contextlib.nullcontext():
            several = map_children(read, [*enumerate(batches, 1)], workers)
        for batch, outcomes in zip(batches, several, strict=True):
            for job, outcome in zip(batch, outcomes, strict=True):
                found[job.out].append(outcome)
    return found


@contextlib.contextmanager
def _progress(left: Mapping[_Job, int]) -> Iterator[None]:
    """Shows on a terminal how much of files is read; `left`, with their bytes, shrinks."""
    total, places, ended = sum(left.values()), {job.out for job in left}, threading.Event()
    bar = Progress(total, unit="byte", label="films", leave=False)

    def watch(shown: int = 0) -> None:
        while not ended.wait(SECONDS):
            paths = [
                x for out in places for x in out.glob(f".extract-*/{features_folder.PROGRESS}")
            ]
            with contextlib.suppress(OSError, ValueError):  # of one that ends, or is written now
                now = total - sum([*left.values()]) + sum(int(x.read_text()) for x in paths)
                bar.advance(max(0, now - shown))
                shown = max(now, shown)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(watch)
        try:
            yield
        finally:
            ended.set()
    bar.close()


def _make_ready(
    out: Path, listed: Sequence[Path], drop: Literal["nothing", "missing", "others"], pictures: bool
) -> dict[Path, str]:
    """Makes and removes what a folder has too little or too much; returns path -> stem."""
    (out / features_folder.VIDEOS).mkdir(exist_ok=True)
    if pictures:
        (out / features_folder.THUMBNAILS).mkdir(mode=0o700, exist_ok=True)
    elif not remove_thumbnails(out):
        raise UserError(
            f"'{out / features_folder.THUMBNAILS}' holds files that vidjax did not write\n"
            "move them away, or name another folder"
        )
    names = [path.stem for path in (out / features_folder.VIDEOS).glob("*.json")]
    known = {stem: film for stem in names if (film := _film(out, stem))}
    stems = _stems(listed, known)
    kept = None if drop == "nothing" else {*stems.values()}
    if kept is not None and drop == "missing":
        kept |= {stem for stem, film in known.items() if film.source.path.exists()}
        for stem in sorted(known.keys() - kept):
            say(f"{known[stem].source.path}: not at its place any more: forgotten")
    _remove_leftovers(out, kept)
    return stems


def _batches(jobs: Sequence[_Job], workers: int) -> list[list[_Job]]:
    """Returns jobs, one film or many photos at a time.

    A process takes longer to start than to read a photo.
    """
    photos = [job for job in jobs if job.path.suffix.lower() in PHOTOS]
    films = [[job] for job in jobs if job.path.suffix.lower() not in PHOTOS]
    size = max(1, min(BATCH, -(-len(photos) // workers)))
    return [*films, *(photos[n : n + size] for n in range(0, len(photos), size))]


def list_files(paths: Sequence[Path]) -> list[Path]:
    """Returns the files that paths name, each once; of folders, see `walk`, films and photos."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not files.exists(path):
            raise UserError(f"'{path}': no such file or folder")
        inside = [path]
        if path.is_dir():
            inside = [one for place in walk(path) for one in split_files(place)[0]]
        for one in inside:
            found.setdefault(Path(os.path.realpath(one)), one)
    if not found:
        raise UserError(
            f"'{paths[0]}' holds no video and no photo\nname videos, photos, or folders of them"
        )
    return list(found.values())


def walk(path: Path) -> list[Path]:
    """Returns a folder and all folders in it, sorted.

    Links, hidden folders, and folders that vidjax wrote are left out.
    """
    found = []
    for place, inner, names in os.walk(path):
        if {features_folder.NAME, features_folder.NUMBERS}.intersection(names):
            inner.clear()
            continue
        inner[:] = [name for name in inner if name[0] != "."]
        found.append(Path(place))
    return sorted(found)


def split_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Returns the films and photos of a folder, by their endings, and the files that are neither.

    Hidden files are left out. Beside films, pictures that programs make of films are no photos.
    """
    there = sorted(one for one in path.iterdir() if one.is_file() and one.name[0] != ".")
    taken = {one for one in there if one.suffix.lower() in FILMS}
    artwork = ARTWORK if taken else ()
    photos = (one for one in there if one.suffix.lower() in PHOTOS)
    taken |= {one for one in photos if not one.stem.lower().endswith(artwork)}
    return [one for one in there if one in taken], [one for one in there if one not in taken]


def say_left_out(paths: Iterable[Path]) -> None:
    """Says in one line for each folder which of its files are no film and no photo."""
    for path in (place for named in paths for place in walk(named)):
        taken, left = split_files(path)
        beside = {one for photo in taken for one in regions.sidecars(photo)}
        if left := [x for x in left if x not in beside and x.name.lower() not in OF_WINDOWS]:
            more = f" and {len(left) - 1:,} more" if len(left) > 1 else ""
            say(f"{show(str(path))}: left out, no film or photo: {show(left[0].name)}{more}")


def check_apart(listed: Sequence[Path], out: Path) -> None:
    """Refuses a folder for results that holds files to be read: the next call would read both."""
    inner = next((one for one in listed if one.parent.resolve() == out.resolve()), None)
    if inner:
        raise UserError(
            f"--out={out}: it holds '{inner.name}', which is to be read\nname another folder"
        )


def _remove_outgrown(out: Path, digests: dict[str, str]) -> None:
    """Removes all features if nets have come to those that made them; settings stay."""
    before = features_folder.read_extraction(out)
    if before and before.models.items() < digests.items():
        for path in (out / features_folder.VIDEOS).glob("*.json"):
            _remove(out, path.stem)
        features_folder.write(
            out / features_folder.NAME,
            features_folder.Extraction(models=digests, settings=before.settings),
        )


def _same_extraction(
    out: Path, digests: dict[str, str], settings: features_folder.Settings | None
) -> features_folder.Settings:
    """Returns the settings of a folder, which it gets if it has none; refuses other ones."""
    before = features_folder.read_extraction(out)
    if before is None:
        if foreign := next((one.name for one in out.iterdir() if one.name[0] != "."), None):
            raise UserError(
                f"'{out}' is no folder of features: it holds '{show(foreign)}'\nname a new folder"
            )
        made = features_folder.Extraction(
            models=digests, settings=settings or features_folder.Settings()
        )
        features_folder.write(out / features_folder.NAME, made)
        return made.settings
    for role in sorted(before.models.keys() | digests.keys()):
        if before.models.get(role) != digests.get(role):
            raise UserError(
                f"'{out}' has features of another {role}\nname a new folder, or the same models"
            )
    if settings and settings != before.settings:
        changed = [
            f"{name}: {getattr(before.settings, name)}, not {getattr(settings, name)}"
            for name in settings.__struct_fields__
            if getattr(before.settings, name) != getattr(settings, name)
        ]
        raise UserError(
            f"'{out}' was extracted with other settings ({'; '.join(changed)})\nname a new folder"
        )
    return before.settings


def _stems(paths: Sequence[Path], known: Mapping[str, features_folder.Film]) -> dict[Path, str]:
    """Returns path -> stem, see `folder.stem_of`; a copy of another file of its name is left out.

    A file keeps the stem by which it is `known`, also if it was moved. If another file has
    the stem of a new file, the new one gets `~` and digits of its content.
    """
    of_path = {str(film.source.path): stem for stem, film in known.items()}
    moved = {
        film.sha256: (stem, film.source.size)
        for stem, film in known.items() if not film.source.path.exists()
    }  # fmt: skip
    sizes = {size for _, size in moved.values()}
    owners = {stem.lower(): stem for stem in known}
    stems = {of_path[real]: path for path in paths if (real := os.path.realpath(path)) in of_path}
    for path in (path for path in paths if os.path.realpath(path) not in of_path):
        stem = features_folder.stem_of(path)
        owner = owners.get(stem.lower())
        if owner or (path.exists() and path.stat().st_size in sizes):
            sha256 = _sha256_or_of_name(path)
            if sha256 in moved:
                stem = moved[sha256][0]
            elif owner:
                film = known.get(owner)
                same = sha256 == (film.sha256 if film else _sha256_or_of_name(stems[owner]))
                stem = owner if same else f"{stem}~{sha256[:8]}"
        owners.setdefault(stem.lower(), stem)
        if stems.setdefault(stem, path) != path and stem not in known:
            say(f"{path}: the same as {stems[stem]}: left out")
    return {path: stem for stem, path in stems.items()}


def _sha256_or_of_name(path: Path) -> str:
    try:
        return files.sha256_file(path)
    except (UserError, OSError):  # which `_one` will tell
        return files.sha256_json(str(path.absolute()))


def _film(out: Path, stem: str) -> features_folder.Film | None:
    """Returns what the folder says of a video; None if it is not finished, or damaged."""
    path = out / features_folder.VIDEOS / f"{stem}.json"
    if not files.exists(path):
        return None
    try:
        film = features_folder.read_film(path)
    except UserError:
        return None
    whole = files.exists(out / f"{stem}.npz")
    thumbnails = out / features_folder.THUMBNAILS
    whole &= not thumbnails.exists() or (thumbnails / stem).exists()
    return film if whole else None


def _extract(
    children: Children, jobs: Sequence[_Job], models: Path, check: bool, title: str
) -> list[Outcome]:
    """Extracts files by one process, except those that were extracted before; says what begins."""
    found: list[Outcome | None] = []
    given: dict[int, dict[str, Any]] = {}
    for number, job in enumerate(jobs):
        try:
            outcome = _compare(job, check)
            if isinstance(outcome, dict):
                given[number] = outcome | {"models": str(models.absolute())}
            found.append(None if isinstance(outcome, dict) else outcome)
        except (UserError, OSError) as error:
            found.append(_failed(job, error))
    if given:
        photos = f"{len(given):,} photo" + "s" * (len(given) > 1)
        say(f"{features_folder.printable(title) or photos} ...")
    try:
        answers = _read(children, [(jobs[n].path, arguments) for n, arguments in given.items()])
        for (number, arguments), answer in zip(given.items(), answers, strict=True):
            found[number] = _take(jobs[number], arguments, answer)
    finally:
        for arguments in given.values():
            files.remove_tree(Path(arguments["out"]))
    return [outcome for outcome in found if outcome]


def _compare(job: _Job, check: bool) -> Outcome | dict[str, Any]:
    """Returns the outcome of a file that was extracted before, or what `film.work` needs."""
    before = _film(job.out, job.stem)
    source = features_folder.Source.of(job.path, regions.sidecars(job.path) if job.tagged else ())
    if before and before.source == source and not check:
        return Outcome(job.path, before, kept=True)
    sha256 = files.sha256_file(job.path)
    if before and before.sha256 == sha256 and before.source.sidecars == source.sidecars:
        before.source, before.video = source, features_folder.printable(job.path.name)
        features_folder.write(job.out / features_folder.VIDEOS / f"{job.stem}.json", before)
        return Outcome(job.path, before, kept=True)
    _remove(job.out, job.stem)
    partial = job.out / f".extract-{secrets.token_hex(4)}"
    partial.mkdir(mode=0o700)
    if (job.out / features_folder.THUMBNAILS).exists():
        (partial / features_folder.THUMBNAILS).mkdir(mode=0o700)
    return {
        "path": str(job.path.absolute()),
        "out": str(partial.absolute()),
        "stem": job.stem,
        "settings": msgspec.to_builtins(job.settings),
        "tagged": job.tagged,
        "sha256": sha256,
        "source": msgspec.to_builtins(source),
        "replaced": before is not None,
    }


def _read(
    children: Children, given: Sequence[tuple[Path, dict[str, Any]]]
) -> list[dict[str, Any] | UserError]:
    """Returns what `film.work` finds in files, or its errors.

    If its process crashes at one of several files, both halves of them are read again.
    """
    if not given:
        return []
    size = sum(arguments["source"]["size"] for _, arguments in given)
    try:
        return run_limited_each(
            film_lib.__name__, given, memory_bytes=MEMORY_BYTES, children=children,
            cpu_seconds=CPU_SECONDS + size // CPU_BYTES_PER_SECOND,
        )  # fmt: skip
    except UserError as error:
        if len(given) == 1:
            return [error]
    half = len(given) // 2
    return _read(children, given[:half]) + _read(children, given[half:])


def _take(job: _Job, arguments: Mapping[str, Any], answer: dict[str, Any] | UserError) -> Outcome:
    """Takes what `film.work` has written into the folder of features."""
    try:
        if isinstance(answer, UserError):
            raise answer
        film = schemas.parse(job.path, answer, features_folder.Film, "leave it out")
        partial = Path(arguments["out"])
        os.replace(partial / f"{job.stem}.npz", job.out / f"{job.stem}.npz")
        thumbnails = [one / features_folder.THUMBNAILS for one in (partial, job.out)]
        if thumbnails[0].exists():
            (thumbnails[1] / job.stem).mkdir(mode=0o700, exist_ok=True)
            for picture in thumbnails[0].iterdir():
                picture.chmod(0o600)
                os.replace(picture, thumbnails[1] / job.stem / picture.name)
        features_folder.write(job.out / features_folder.VIDEOS / f"{job.stem}.json", film)
    except (UserError, OSError) as error:
        _remove(job.out, job.stem)
        return _failed(job, error)
    return Outcome(job.path, film, replaced=arguments["replaced"])


def _failed(job: _Job, error: UserError | OSError) -> Outcome:
    """Returns the outcome of a file that cannot be read; raises the error of a full disk."""
    if isinstance(error, OSError) and error.errno in FULL:
        raise error
    text, _, remedy = (of_the_system(error) or str(error)).partition("\n")
    text = text if str(job.path) in text else f"'{job.path}': {text}"
    return Outcome(job.path, None, text, remedy=remedy)


def _remove(out: Path, stem: str) -> None:
    """Removes a video and its clips; first what tells that they are whole."""
    (out / features_folder.VIDEOS / f"{stem}.json").unlink(missing_ok=True)
    _remove_pictures(out / features_folder.THUMBNAILS / stem)
    (out / f"{stem}.npz").unlink(missing_ok=True)


def remove_thumbnails(out: Path) -> bool:
    """Removes the pictures of all clips; returns False if other files lie among them."""
    if not files.exists(out / features_folder.THUMBNAILS):
        return True
    for inner in (out / features_folder.THUMBNAILS).iterdir():
        _remove_pictures(inner)
    return files.remove_ours(out / features_folder.THUMBNAILS, "")


def _remove_pictures(inner: Path) -> None:
    """Removes the pictures of the clips of a video from the folder that has its stem as name."""
    files.remove_ours(inner, rf"{re.escape(inner.name)}(\..+)?\.png")


def remove_features(out: Path) -> bool:
    """Removes a folder of features; returns False if other files lie in it, which stay."""
    if files.exists(out / features_folder.NAME):  # vidjax has written there
        remove_thumbnails(out)
        _remove_leftovers(out, set())
        files.remove_ours(out / features_folder.VIDEOS, "")
    return files.remove_ours(out, rf"\.lock|{re.escape(features_folder.NAME)}")


def _remove_leftovers(out: Path, stems: set[str] | None) -> None:
    """Removes what killed calls left; with `stems` also all videos but these."""
    videos = out / features_folder.VIDEOS
    for entry in [*out.iterdir(), *(videos.iterdir() if videos.is_dir() else ())]:
        if PARTIAL.fullmatch(entry.name):
            files.remove_tree(entry) if entry.is_dir() else entry.unlink()
    if stems is not None:
        there = {path.stem for path in (*out.glob("*.npz"), *videos.glob("*.json"))}
        for stem in there - stems:
            if "." not in stem:
                _remove(out, stem)
