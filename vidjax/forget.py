"""Finds people and clips in galleries, caches, runs and folders of `vidjax who`.

It deletes what vidjax may delete. It is no command of the gallery: runs and caches hold names, too.
"""

import argparse
import io
import itertools
import os
import shlex
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vidjax import files, messages
from vidjax.data import cache
from vidjax.data.untrusted.names import escape, show
from vidjax.errors import UserError

HELP = """\
Finds people and clips in galleries, caches, runs and results of `vidjax who`.

A PLACE is a folder that is searched with all folders in it. The default is
the current folder and the cache. Without --delete, nothing is changed. With
--delete, clips are deleted from galleries, whose back ends are fitted again,
and conversions that hold such a clip are deleted from the cache: the next run
converts the files that are left. Runs are only listed: their weights remember
their training clips. The last lines are commands that find the names in all
other files, such as rankings, answers, exports and your own files. The exit
code is 1 if a folder could not be searched, or a deletion failed.
"""
INDEX_BYTES = 512 * files.MB  # of the names of a conversion, or of the training clips of a run
MOST_LINES = 10_000_000  # names in it
TABLE_BYTES = 64 * files.MB
MOST_SHOWN = 20  # names in the commands that are printed


class Found(NamedTuple):
    """A folder that holds a name.

    Its kind is `gallery`, `records`, `run`, `who`, or `unread` if it could not be searched.
    `remedy` says how to delete the name: `--delete` if vidjax can, `deleted...` if it did.
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
) -> tuple[list[Found], set[str]]:
    """Returns the folders that hold people, clips, or clips of the people, and all these names.

    With `delete` it deletes clips from galleries, and records that hold such clips.
    """
    found: list[Found] = []
    folders: dict[Path, str] = {}
    for root in (place.expanduser().absolute() for place in places):
        if not root.is_dir():
            raise UserError(f"'{root}': no such folder")
        folders |= _survey(root, found)
    of_kind = lambda kind: [path for path, own in sorted(folders.items()) if own == kind]  # noqa: E731
    names = {*identities, *clips}
    for folder in of_kind("gallery"):
        own, shown = _search_gallery(folder, identities, clips, delete=delete)
        found += own
        names |= shown
    for folder in of_kind("records"):
        found += _search_records(folder, names, delete=delete)
    for kind, names_of, remedy in (
        ("run", _names_of_run, "its weights remember its clips: delete it, train without them"),
        ("who", _names_of_who, "remove the photos and call `vidjax who` again: it writes all anew"),
    ):
        for folder in of_kind(kind):
            try:
                held = names.intersection(names_of(folder))
            except (UserError, OSError) as error:
                found.append(_unread(folder, error))
                continue
            if held:
                found.append(Found(kind, folder, f"{len(held):,} of the names", remedy))
    runs = {one.path for one in found if one.kind == "run"}
    return found + list(_galleries_of_runs(of_kind("gallery"), runs)), names


def _survey(root: Path, found: list[Found]) -> dict[Path, str]:
    """Returns folder -> kind below a root; follows no link. Adds closed folders to `found`."""
    from vidjax.gallery.store import NAME

    folders = {}
    tell = lambda error: found.append(_unread(error.filename or root, error))  # noqa: E731
    for place, inner, names in os.walk(root, onerror=tell):
        folder, there = Path(place), {*names, *inner}
        if NAME in there:
            folders[folder] = "gallery"
        elif {"index.npz", "manifest.json"} <= there:
            folders[folder] = "records"
            inner.clear()
        elif there & {"identities.json", "members.npz"}:
            folders[folder] = "run"
        elif {"names.tsv", "gallery"} <= there:
            folders[folder] = "who"
    return folders


def _unread(path: str | Path, error: Exception) -> Found:
    about = next(iter(str(error).splitlines()), type(error).__name__)
    return Found("unread", Path(path), about, "search it yourself")


def _search_gallery(
    folder: Path, identities: Collection[str], clips: Collection[str], *, delete: bool
) -> tuple[list[Found], set[str]]:
    """Searches a gallery for `clips` and clips of people; also returns their names; may delete."""
    from vidjax.gallery.gallery import Gallery

    try:
        gallery = Gallery(folder)
        shown = {
            name
            for name, clip in gallery.clips.items()
            if clip.identity in identities or name in clips
        }
    except UserError as error:
        return [_unread(folder, error)], set()
    if not shown:
        return [], shown
    about = f"{len(shown):,} of its clips"
    if not delete:
        return [Found("gallery", folder, about, "--delete")], shown
    try:
        gallery.remove(clip=shown)
    except UserError as error:
        why = str(error).splitlines()[0]
        return [Found("gallery", folder, f"{about}, not deleted: {why}", "--delete")], shown
    return [Found("gallery", folder, about, "deleted")], shown


def _search_records(folder: Path, clips: Collection[str], *, delete: bool) -> list[Found]:
    """Searches converted records for clips; with `delete` removes all of them if one is found."""
    path = folder / "index.npz"
    try:
        limit = min(INDEX_BYTES, files.most_unpacked(os.lstat(path).st_size))
        index = files.read_npz(path, limit)
        lists = [_lines(array.tobytes()) for key, array in index.items() if key.endswith("/clips")]
        held = set(clips).intersection(itertools.chain(*lists))
    except (UserError, OSError) as error:
        return [_unread(folder, error)]
    if not held:
        return []
    about, remedy = f"features of {len(held):,} clips", "--delete"
    if delete:
        from vidjax.data.records.manifest import remove

        with cache.exclusive(folder):
            remedy = "deleted: the next run converts your files anew"
            if not remove(folder):
                remedy = "deleted; other files in the folder stay"
    return [Found("records", folder, about, remedy)]


def _lines(content: bytes) -> Iterator[str]:
    """Yields the lines of a text; UserError if there are too many to be names."""
    if content.count(b"\n") > MOST_LINES:
        raise UserError(f"more than {MOST_LINES:,} names")
    for line in io.BytesIO(content):
        yield line.rstrip(b"\n").decode("utf-8", "replace")


def _names_of_run(folder: Path) -> Iterator[str]:
    """Yields the identities and training clips of a run or of an exported one."""
    if files.exists(folder / "identities.json"):
        yield from map(str, files.read_json(folder / "identities.json", list, INDEX_BYTES))
    if files.exists(folder / "members.npz"):
        arrays = files.read_npz(folder / "members.npz", INDEX_BYTES)
        yield from _lines(arrays["clips"].tobytes() if "clips" in arrays else b"")


def _names_of_who(folder: Path) -> Iterator[str]:
    """Yields the cells of the tables of `vidjax who`, and the people whose photos it read."""
    for table in ("names.tsv", "unknown.tsv"):
        if files.exists(folder / table):
            for line in _lines(files.read_bytes(folder / table, TABLE_BYTES)):
                yield from line.split("\t")
    if not (people := folder / "people").is_symlink():
        yield from (path.name for path in people.glob("*"))


def _galleries_of_runs(galleries: Iterable[Path], runs: Collection[Path]) -> Iterator[Found]:
    """Yields galleries whose vectors come from one of `runs`, the runs that hold a name."""
    from vidjax.gallery.gallery import Gallery

    for folder in galleries:
        try:
            run = Path(Gallery(folder).origin.workdir)
        except UserError:  # it was reported
            continue
        if run in runs:
            about = f"vectors by '{run}', which knows the name"
            yield Found("gallery", folder, about, "make it anew with the new run")


def commands(names: Collection[str], places: Iterable[Path]) -> list[str]:
    """Returns commands that find `names` in the content and in the names of other files."""
    # A ranking writes a blank as %20.
    spelled = sorted({form for name in names for form in (name, escape(name))})
    roots = shlex.join(map(str, places))
    patterns = " ".join(f"-e {shlex.quote(form)}" for form in spelled)
    return [f"grep -rlF {patterns} {roots}", f"find {roots} | grep -F {patterns}"]


def add_flags(parser: messages.Parser) -> None:
    """Adds the flags of `vidjax forget`."""
    parser.description = HELP
    parser.add_argument("places", nargs="*", metavar="PLACE", type=Path, help="a folder")
    for flag in ("identity", "clip"):
        parser.add_argument(
            f"--{flag}", metavar="NAME", action="append", default=[], help="may be repeated"
        )
    parser.add_argument("--delete", action="store_true", help="delete what vidjax may")
    parser.command(_run, "--identity=Ada", "--identity=Ada --delete")


def _run(args: argparse.Namespace) -> messages.Result:
    if not args.identity and not args.clip:
        raise UserError("name somebody: --identity=NAME, or --clip=NAME")
    cached = files.cache_root()
    places = args.places or [Path(), *([cached] if cached.exists() else [])]
    found, names = forget(args.identity, args.clip, places, delete=args.delete)
    failed = ("unread", "--delete") if args.delete else ("unread",)
    code = int(any(one.kind in failed or one.remedy in failed for one in found))
    content = {
        "places": [one._asdict() | {"path": str(one.path)} for one in found],
        "commands": commands(names, places),
    }
    lines = [
        f"  {one.kind:8} {show(str(one.path))}: {one.about}\n           {one.remedy}"
        for one in found
    ]
    shown = sorted(names, key=lambda name: (name not in {*args.identity, *args.clip}, name))
    more = f" (of {len(names):,} names; --json has all)" if len(names) > MOST_SHOWN else ""
    lines.append(f"other files that hold the names{more}:")
    lines += [f"  {command}" for command in commands(shown[:MOST_SHOWN], places)]
    left = sum(not one.remedy.startswith("deleted") for one in found)
    done = f", {len(found) - left:,} of them deleted" if args.delete else ""
    rows = {"places": f"{len(found):,}{done}"}
    return messages.Result(content, rows, "\n".join(lines), code=code)
