"""`vidjax who`: finds who appears in videos, and when, from a few photos of each person."""

import argparse
from pathlib import Path

from vidjax.apps.video import who
from vidjax.cli import extract_command
from vidjax.cli.gallery_commands import add_rule
from vidjax.utils import messages
from vidjax.utils.errors import require_packages
from vidjax.utils.messages import Parser, Result


def name_people(args: argparse.Namespace) -> Result:
    """Names the people in films. If a file cannot be read, the exit code is 1."""
    if args.review:
        require_packages("--review", "starlette", "uvicorn", "prometheus_client", extra="serve")
    films = [Path(name).expanduser() for name in args.files]
    out = Path(args.out).expanduser()
    workers = extract_command.count_workers(args)
    done = who.name_people(
        films, Path(args.people).expanduser() if args.people else None, out,
        Path(args.models).expanduser(), extract_command.read_settings(args, out / who.FEATURES),
        workers=workers, thumbnails=args.thumbnails, fpir=args.fpir, threshold=args.threshold,
        padding=args.padding, check=args.check, prune=args.prune,
        done=extract_command.print_outcome,
    )  # fmt: skip
    if args.review:
        from vidjax.apps.video import review  # it needs starlette

        reviewed = review.serve_review(
            out, done.decision, fpir=args.fpir, threshold=args.threshold, padding=args.padding
        )
        done = reviewed._replace(failed=done.failed, missed=done.missed)
    appearances = done.decision.appearances
    named = [row.identity for row in appearances if row.probability is not None]
    num_unknown = len({*done.decision.unknown.values()})
    content = {
        "out": str(out), "people": done.people, "named": len(named), "groups": num_unknown,
        "failed": [*done.failed], "missed": [*done.missed],
    }  # fmt: skip
    people = messages.list_some(sorted(done.people))
    rows = {
        "people": f"{len(done.people):,}: {people}" if people else "none",
        "found": f"{len({*named}):,} of them, {messages.count(len(named), 'appearance')}",
        "page": str(out / who.PAGE),
        "table": str(out / who.TABLES[0]),
    }
    if done.missed:
        rows["no usable photo"] = messages.list_some(done.missed)
    if done.failed:
        rows["not used"] = f"{len(done.failed):,}: {', '.join(sorted(done.failed)[:3])}"
        rows |= extract_command.list_remedies(done.failed.values())
    if num_unknown:
        count = f"{messages.count(num_unknown, 'person')} without a name"
        rows["unknown"] = f"{count}: to name them, add --review --thumbnails to the command"
    lines = [[messages.shorten(cell) for cell in line] for line in done.lines]
    text = "\n".join(f"  {line}" for line in messages.align_columns(lines))
    return Result(content, rows, text, code=1 if done.failed else 0)


def add_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax who`."""
    extract_command.add_shared_flags(parser)
    about = "the folder of photos of the people: DIR/NAME/PHOTO.jpg or DIR/NAME.jpg"
    parser.add_argument("--people", metavar="DIR", help=about)
    add_rule(parser)
    about = (
        "stores pictures of faces, and shows them on the page; --no-thumbnails deletes them "
        "(default: as in the last call)"
    )
    parser.add_argument("--thumbnails", action=argparse.BooleanOptionalAction, help=about)
    about = "seconds added before and after each appearance in cut lists (default: 1)"
    parser.add_argument(
        "--padding", metavar="SECONDS", type=float, default=who.PADDING_SECONDS, help=about
    )
    about = "at the end, serves a page in the browser on which you can name people"
    parser.add_argument("--review", action="store_true", help=about)
    example = "holiday.mp4 --people=friends --models=models --out=names"
    parser.command(name_people, example, f"{example} --review")
