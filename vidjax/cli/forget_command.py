"""`vidjax forget`: finds the name of a person or clip in folders, and can delete the clips."""

import argparse

from vidjax.apps.forget import DELETE, DELETE_FILE, forget, list_roots
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Result, quote_path
from vidjax.utils.names import show
from vidjax.utils.parser import Parser

HELP = """\
Lists galleries, caches, runs, results and other files with names of people or
clips, or vectors of their clips. Names of your own files and folders, such as
films, do not count. A PLACE is a folder, by default the current folder. It is
searched with all folders below it. The cache is always searched, too.

With --delete, clips are deleted from galleries, people from results of `vidjax
who`, and from the cache all datasets with these clips. Unfinished files of
killed commands are deleted, too. Everything else is only listed: clips with
equal vectors that have another name, runs, whose weights depend on the training
clips, and files. An rm command deletes the files that vidjax wrote. Look at the
others. Of photos, films and other files that are not text, only the first
megabyte is searched. Search compressed files of other programs yourself.

The vectors are known only until they are deleted from the gallery. So delete
all listed files before you run the command again. The exit code is 1 if a place
still contains a name, could not be searched, or is empty: the drive may not be
connected.
"""


def add_forget_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax forget`."""
    parser.description = HELP
    parser.add_argument("places", nargs="*", metavar="PLACE", help="a folder")
    for flag, what in {"identity": "person", "clip": "clip"}.items():
        about = f"the name of a {what}; may be repeated"
        parser.flag(f"--{flag} NAME", about, action="append", default=[])
    parser.flag("--delete", "deletes people and clips from galleries, results and the cache")
    parser.command(forget_names, "--identity=Ada", "--identity=Ada --delete")


def forget_names(args: argparse.Namespace) -> Result:
    """Lists folders and files that contain the name of a person or clip.

    With `--delete`, the clips are deleted from galleries. Converted datasets with these clips are
    deleted from the cache. The exit code is 1 if a folder or file still contains a searched name or
    cannot be read, or if a searched folder is empty.
    """
    if not args.identity and not args.clip:
        raise UserError("no name is given: add --identity=NAME or --clip=NAME")
    places, similar = forget(args.identity, args.clip, list_roots(args.places), delete=args.delete)
    left = sum(place.left for place in places)
    unread = sum(place.kind == "unread" for place in places)
    ours = [quote_path(place.path) for place in places if place.remedy == DELETE_FILE]
    facts = {
        "places": [place._asdict() | {"path": str(place.path)} for place in places],
        "left": left,
        "unread": unread,
        "deleted": len(places) - left - unread,
        "similar": similar,
        "delete_files": " ".join(["rm -r --", *ours]) if ours else "",
    }
    lines = list[str]()
    for place in places:
        lines.append(f"  {place.kind:8} {show(str(place.path))}: {place.about}")
        if place.remedy != DELETE_FILE:
            remedy = "to delete: add --delete" if place.remedy == DELETE else place.remedy
            lines.append(f"           {remedy}")
    if ours:
        title = "to delete the files of vidjax, after you have looked at them:"
        lines += [title, f"  {facts['delete_files']}"]
    lines += [
        f"'{show(other)}' looks similar to '{show(name)}', but is another name: it is not deleted"
        for name, other in similar.items()
    ]
    deleted = f", {facts['deleted']:,} of them deleted" if args.delete else ""
    texts = {"places": f"{len(places) - unread:,}{deleted}", "not read": f"{unread:,}"}
    texts = dict.fromkeys(facts, "") | texts
    return Result(facts, texts, text="\n".join(lines), code=int(left + unread > 0))
