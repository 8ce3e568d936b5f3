"""`vidjax forget`: lists all places that contain a name, and deletes the name from some of them."""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from vidjax.apps.forget import Place, commands, forget
from vidjax.data.untrusted.names import clean_name, normal_form, show
from vidjax.utils import files
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Parser, Result

HELP = """\
Lists the places that contain names of people or clips: galleries, caches,
runs, results of `vidjax who`, and the names and contents of all other files.

A PLACE is a folder. It is searched with all folders below it. The default is
the current folder and the cache. Without --delete, nothing is changed.

With --delete, clips are deleted from galleries, and the parameters of these
galleries are fitted again. Converted datasets that contain a clip are deleted
from the cache: the next run converts the remaining files again.

Runs are only listed: their weights depend on the training clips, so a run must
be trained again. Other files are only listed, because they are yours.
Compressed files are not searched: the last lines of the output are commands
that search them. In galleries, caches, runs and results of `vidjax who`, only
equal names match. In other files, a name also matches inside a text. In files
above 64 MB, names are searched only in UTF-8.

The exit code is 0 if no place is left. It is 1 if a place still contains a
name, or could not be searched.
"""
MAX_PRINTED_NAMES = MAX_PRINTED_PLACES = 20  # names in a command, and places of each kind


def add_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax forget`."""
    parser.description = HELP
    parser.add_argument("places", nargs="*", metavar="PLACE", help="a folder")
    for flag, what in {"identity": "person", "clip": "clip"}.items():
        about = f"the name of a {what}; may be repeated"
        parser.add_argument(f"--{flag}", metavar="NAME", action="append", default=[], help=about)
    about = "deletes the clips from galleries, and deletes converted datasets"
    parser.add_argument("--delete", action="store_true", help=about)
    parser.command(forget_names, "--identity=Ada", "--identity=Ada --delete")


def forget_names(args: argparse.Namespace) -> Result:
    """Lists the places that contain a name. If a place is left, the exit code is 1."""
    if not args.identity and not args.clip:
        raise UserError("no name is given: add --identity=NAME or --clip=NAME")
    cache = files.cache_root()
    roots = [*map(Path, args.places)] or [Path(), *([cache] if cache.exists() else [])]
    places, names, similar = forget(args.identity, args.clip, roots, delete=args.delete)
    roots = [root.expanduser().absolute() for root in roots]
    left = sum(place.left for place in places)
    unread = sum(place.kind == "unread" for place in places)
    content = {
        "places": [place._asdict() | {"path": str(place.path)} for place in places],
        "left": left,
        "unread": unread,
        "deleted": len(places) - left - unread,
        "similar": similar,
        "commands": commands(names, places, roots),
    }
    given = {normal_form(clean_name(name)) for name in (*args.identity, *args.clip)}
    lines = [*_describe_places(places)]
    printed = sorted(names, key=lambda name: (name not in given, name))[:MAX_PRINTED_NAMES]
    if searches := commands(printed, places, roots):
        note = f" (for {MAX_PRINTED_NAMES} of {len(names):,} names; --json lists all)"
        lines.append(f"to search compressed files{note if len(names) > MAX_PRINTED_NAMES else ''}:")
        lines += [f"  {search}" for search in searches]
    lines += [
        f"'{show(other)}' looks similar to '{show(name)}', but is another name: it is not deleted"
        for name, other in similar.items()
    ]
    deleted = f", {content['deleted']:,} of them deleted" if args.delete else ""
    rows = {"places": f"{len(places) - unread:,}{deleted}", "not read": f"{unread:,}"}
    return Result(content, rows, "\n".join(lines), code=int(left + unread > 0))


def _describe_places(places: Iterable[Place]) -> Iterator[str]:
    """Yields lines of text with the kind, the path, the content and the remedy of each place."""
    for kind, group in itertools.groupby(places, lambda place: place.kind):
        group = [*group]
        for place in group[:MAX_PRINTED_PLACES]:
            yield f"  {kind:8} {show(str(place.path))}: {place.about}\n           {place.remedy}"
        if len(group) > MAX_PRINTED_PLACES:
            yield f"  {kind:8} and {len(group) - MAX_PRINTED_PLACES:,} more; --json lists all"
