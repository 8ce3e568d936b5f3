"""Finds the files that hold the name of a person or clip, and deletes those that vidjax may delete.

It is no command of the gallery, since runs and caches hold names as well.
"""

import argparse
import contextlib
import html
import json
import os
import re
import shutil
import urllib.parse
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from vidjax import files, messages
from vidjax.data import cache
from vidjax.data.untrusted.names import show
from vidjax.errors import UserError, need
from vidjax.files import cache_root

HELP = """\
Every place of a person or a clip, and the deletion of what vidjax may delete.

A PLACE is a folder, or a file, that is searched with all below it; without
one, the current folder and the cache. Without --delete nothing is changed.
With it, clips go from galleries, whose back ends are fitted anew, and records
go from the cache, which the next run converts from what is left. Runs,
rankings, answers, exports and your own files are named with what is to be
done: the weights of a run remember its training clips, and what is yours is
not vidjax's to delete. A name of a few letters or of digits alone is found by
chance, too. The exit code is 1 if a place could not be searched, or deleted.
"""
PIECE = 16 * files.MB  # of a file that is searched
INDEX_BYTES = 1024 * files.MB  # of the names of a conversion
UNPACKED_BYTES = 8192 * files.MB  # of an archive that is searched
PICTURES = (".png", ".jpg", ".jpeg", ".mp4", ".mkv", ".avi", ".mov", ".onnx")
# SQLite, its journals, text arrays of numpy, pickles and Arrow: no blank stands between two texts.
PACKED = re.compile(
    rb"SQLite format 3|\xd9\xd5\x05\xf9|\x93NUMPY[^}]*'[<>|=][SU]\d|\x80[\2-\5]|ARROW1"
)
PICKLES = (".pickle", ".pkl")  # those of old protocols begin with any letter


class Found(NamedTuple):
    """A file or folder that holds a name.

    Its kind is `gallery`, `records` of the cache, `run`, `file`, `folder` if its own name is one,
    or `unread` if it could not be searched. `remedy` tells how to delete it: `--delete` if vidjax
    can; `deleted...` if it did.
    """

    kind: str
    path: Path
    about: str
    remedy: str


def forget(
    identities: Collection[str],
    clips: Collection[str],
    places: Iterable[Path],
    *,
    delete: bool = False,
) -> list[Found]:
    """Finds the names of people and clips, and of the people's clips, in or below `places`.

    With `delete` it deletes what vidjax may delete: clips of galleries, and records of the cache.
    """
    roots = [place.expanduser().absolute() for place in places]
    for root in roots:
        if not root.exists():
            raise UserError(f"'{root}': no such file or folder")
    folders, others, found = _survey(roots)
    names = set(clips)
    galleries = [folder for folder, kind in folders.items() if kind == "gallery"]
    for folder in galleries:
        some, shown = _from_gallery(folder, identities, clips, delete=delete)
        found += some
        names |= shown
    for folder in (folder for folder, kind in folders.items() if kind == "records"):
        found += _from_records(folder, names, delete=delete)
    named = list(_from_files(others, {*identities, *names}, folders))
    return found + named + list(_of_runs(galleries, {one.path for one in named}))


def _survey(roots: Sequence[Path]) -> tuple[dict[Path, str], dict[Path, Path], list[Found]]:
    """Returns folders, what to search, and what may not be listed; follows no link.

    Folders are folder -> `gallery`, `records` or `run`. What to search is file or folder -> its
    path below the root.
    """
    from vidjax.gallery.store import NAME

    folders: dict[Path, str] = {}
    others: dict[Path, Path] = {}
    closed: list[Found] = []
    for root in sorted(roots, reverse=True):  # of two paths, that from the outer root counts
        if root.is_file():
            others[root] = Path(root.name)
            continue
        tell = lambda error, root=root: closed.append(_unread(error.filename or root, error))  # noqa: E731
        for at, inner, names in os.walk(root, onerror=tell):
            folder, there = Path(at), {*names, *inner}
            below = folder.relative_to(root)
            if NAME in there:
                folders[folder] = "gallery"
                names = {*names} - {NAME, f"{NAME}-journal"}
            elif {"index.npz", "manifest.json"} <= there:
                folders[folder] = "records"
                inner.clear()  # shards hold the clips that index.npz names
                continue
            elif "config.json" in there and there & {"checkpoints", "identities.json"}:
                folders[folder] = "run"
            others |= {folder / name: below / name for name in (*inner, *names)}
    return folders, dict(sorted(others.items())), closed


def _unread(path: str | Path, error: Exception) -> Found:
    about = next(iter(str(error).splitlines()), type(error).__name__)
    return Found("unread", Path(path), about, "search it yourself")


def _from_gallery(
    folder: Path, identities: Collection[str], clips: Collection[str], *, delete: bool
) -> tuple[list[Found], set[str]]:
    """Searches a gallery for `clips` and clips of people; also returns their names; may delete."""
    from vidjax.gallery.gallery import Gallery

    try:
        gallery = Gallery(folder, sync=True)
        enrolled = gallery.identities
        known = [name for name in identities if name in enrolled]
        shown = {n for n, clip in gallery.clips.items() if clip.identity in known or n in clips}
        held = gallery.still_held
        if not shown and not held:
            return [], shown
        about = (
            f"{len(shown):,} of its clips" if shown else f"{held:,} removed clips, by its centre"
        )
    except UserError as error:
        return [_unread(folder, error)], set()
    if not delete:
        return [Found("gallery", folder, about, "--delete")], shown
    try:
        if shown:
            gallery.remove(clip=shown)
        else:
            gallery.refit()
    except UserError as error:
        why = str(error).splitlines()[0]
        return [Found("gallery", folder, f"{about}, not deleted: {why}", "--delete")], shown
    return [Found("gallery", folder, about, "deleted")], shown


def _from_records(folder: Path, clips: Collection[str], *, delete: bool) -> list[Found]:
    """Searches converted records for clips; with `delete` removes all of them if one is found."""
    try:
        index = files.read_npz(folder / "index.npz", INDEX_BYTES)
        lists = [x.tobytes().decode("utf-8", "replace") for n, x in index.items()
                 if n.endswith("/clips")]  # fmt: skip
    except (UserError, OSError) as error:
        return [_unread(folder, error)]
    held = set(clips).intersection(name for text in lists for name in text.split("\n"))
    if not held:
        return []
    if delete:
        with cache.exclusive(folder):
            shutil.rmtree(folder)
    about = f"features of {len(held):,} clips"
    remedy = "deleted: the next run converts your files anew" if delete else "--delete"
    return [Found("records", folder, about, remedy)]


def _from_files(
    paths: Mapping[Path, Path], names: Collection[str], folders: dict[Path, str]
) -> Iterator[Found]:
    """Yields runs, and files and folders outside of runs, with a name in their content or path."""
    patterns = _patterns(names)
    runs: dict[Path, list[str]] = {}
    for path, below in paths.items():
        own = _ends_in(below, patterns.words)
        is_folder = path in folders or (path.is_dir() and not path.is_symlink())
        try:
            passed = is_folder or path.suffix.lower() in PICTURES
            held = own or (not passed and _holds(path, patterns))
        except Exception as error:  # whatever a damaged or locked archive leads to
            yield _unread(path, error)
            continue
        if not held:
            continue
        run = next((one for one in path.parents if folders.get(one) == "run"), None)
        if run is None:
            kind = "folder" if is_folder else "file"
            about = f"a {kind} of this name" if own else "the name"
            yield Found(kind, path, about, "delete it, or make it anew without the name")
        else:
            runs.setdefault(run, []).append(str(path.relative_to(run)))
    for run, held in runs.items():
        some = ", ".join(held[:4]) + (" ..." if len(held) > 4 else "")
        remedy = "its weights remember its training clips: delete it, train without them"
        yield Found("run", run, f"the name, in {some}", remedy)


def _of_runs(galleries: Iterable[Path], runs: Collection[Path]) -> Iterator[Found]:
    """Yields galleries whose vectors come from one of `runs`, the runs that hold a name."""
    from vidjax.gallery.gallery import Gallery

    for folder in galleries:
        with contextlib.suppress(UserError):
            run = Path(Gallery(folder).origin.workdir)
            if run in runs:
                about = f"vectors by '{run}', which knows the name"
                yield Found("gallery", folder, about, "make it anew with the new run")


def _ends_in(path: Path, pattern: re.Pattern[bytes]) -> bool:
    """Returns True if a match ends in the last part of a path, as that of a clip `people/Ada/1`."""
    text = os.fsencode(path)
    last = len(text) - len(os.fsencode(path.name))
    return any(match.end() > last for match in pattern.finditer(text))


class _Patterns(NamedTuple):
    """The names in text, where words end, and in files that pack one text next to another."""

    words: re.Pattern[bytes]
    packed: re.Pattern[bytes]


def _patterns(names: Collection[str]) -> _Patterns:
    """Returns patterns of names as vidjax writes them: plain, in JSON, HTML, rankings and numpy."""
    written = {
        form.encode()
        for name in names
        for form in (
            name,
            json.dumps(name)[1:-1],
            html.escape(name),
            urllib.parse.quote(name),
            re.sub(r"\s", lambda blank: urllib.parse.quote(blank[0]), name),
        )
    }
    numpy = {name.encode(f"utf-32-{order}") for name in names for order in ("le", "be")}
    words, packed = (
        b"|".join(sorted(map(re.escape, forms), key=len, reverse=True))
        for forms in (written, written | numpy)
    )
    return _Patterns(re.compile(rb"(?<![\w-])(?:" + words + rb")(?![\w-])"), re.compile(packed))


def _holds(path: Path, patterns: _Patterns) -> bool:
    """Returns True if a name is in a file; zip is unpacked, parquet is read as a table."""
    if path.suffix == ".parquet":
        return _in_table(path, patterns.words)
    with files.open_regular(path) as file:
        if file.read(4) != b"PK\3\4":
            file.seek(0)
            return _in_stream(file, patterns, packed=path.suffix.lower() in PICKLES)
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > UNPACKED_BYTES:
                raise UserError(f"'{path}' unpacks to more than {UNPACKED_BYTES:,} bytes")
            for entry in archive.infolist():
                if patterns.words.search(os.fsencode(entry.filename)):
                    return True
                with archive.open(entry) as unpacked:
                    if _in_stream(unpacked, patterns):
                        return True
    return False


def _in_stream(file: IO[bytes], patterns: _Patterns, *, packed: bool = False) -> bool:
    """Returns True if a name is in a file, also across pieces of PIECE bytes."""
    kept, pattern = b"", patterns.packed if packed else None
    while piece := file.read(PIECE):
        pattern = pattern or (patterns.packed if PACKED.match(piece) else patterns.words)
        if pattern.search(kept + piece):
            return True
        kept = piece[-len(pattern.pattern) :]
    return False


def _in_table(path: Path, pattern: re.Pattern[bytes]) -> bool:
    """Returns True if a pattern matches in text, also in lists, or in a name of a column."""
    need(f"'{path}'", "pyarrow", extra="parquet")
    import pyarrow
    from pyarrow import parquet

    files.open_regular(path).close()
    try:
        with parquet.ParquetFile(path) as table:
            if pattern.search(table.schema_arrow.serialize()):
                return True
            with_text = re.compile("string|binary")
            columns = [f.name for f in table.schema_arrow if with_text.search(str(f.type))]
            for batch in table.iter_batches(columns=columns):
                for column in batch.columns:
                    cells = filter(None, column.to_pylist())
                    texts = (x if isinstance(x, bytes) else str(x).encode() for x in cells)
                    if pattern.search(b"\n".join(texts)):
                        return True
    except pyarrow.ArrowException as error:
        raise UserError(f"'{path}' is damaged: {str(error).splitlines()[0]}") from error
    return False


def add_flags(parser: messages.Parser) -> None:
    """Adds the flags of `vidjax forget`."""
    parser.description = HELP
    parser.add_argument("places", nargs="*", metavar="PLACE", type=Path, help="a folder or a file")
    for flag in ("identity", "clip"):
        parser.add_argument(
            f"--{flag}", metavar="NAME", action="append", default=[], help="may be repeated"
        )
    parser.add_argument("--delete", action="store_true", help="delete what vidjax may")
    parser.command(_run, "--identity=Ada", "--identity=Ada --delete")


def _run(args: argparse.Namespace) -> messages.Result:
    if not args.identity and not args.clip:
        raise UserError("name somebody: --identity=NAME, or --clip=NAME")
    cached = cache_root()
    usual = [Path(), *([cached] if cached.exists() else [])]
    found = forget(args.identity, args.clip, args.places or usual, delete=args.delete)
    # What could not be searched, or was to be deleted and is there.
    there = ("unread", "--delete" if args.delete else "unread")
    code = int(any(one.kind in there or one.remedy in there for one in found))
    content = {"places": [one._asdict() | {"path": str(one.path)} for one in found]}
    lines = [
        f"  {one.kind:8} {show(str(one.path))}: {one.about}\n           {one.remedy}"
        for one in found
    ]
    left = sum(not one.remedy.startswith("deleted") for one in found)
    done = f", {len(found) - left:,} of them deleted" if args.delete else ""
    rows = {"places": f"{len(found):,}{done}"}
    return messages.Result(content, rows, "\n".join(lines), code=code)
