"""`vidjax extract`: from videos and photos to features."""

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from vidjax import messages
from vidjax.data.untrusted.names import show
from vidjax.errors import UserError
from vidjax.extract import folder, pipeline
from vidjax.machine import num_cores
from vidjax.messages import Command, Parser, Result
from vidjax.run.terminal import say

MOST = 10_000  # of a flag that is a whole number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vidjax extract` with `argv`, by default `sys.argv[1:]`; returns the exit code."""
    return run_one("extract", COMMAND, argv)


def run_one(name: str, command: Command, argv: Sequence[str] | None) -> int:
    """Runs a command of files, and returns the exit code."""
    commands = {name: command}

    def parse(words: Sequence[str]) -> argparse.Namespace:
        args = messages.parse("vidjax", commands, name, words)
        if not args.files:
            raise UserError(f"{name} needs videos: vidjax {name} FILE ... --out=DIR --models=DIR")
        args.files = [Path(word).expanduser() for word in args.files]
        return args

    return messages.run_command(argv, parse, commands)


def whole(text: str | None, flag: str, default: int) -> int:
    """Returns the number of a flag, which is 1 or more."""
    if text is None:
        return default
    if not text.isdecimal() or not 1 <= int(text[:10]) < MOST:
        raise UserError(f"--{flag}={text[:20]}: wants a whole number, 1 or more, below {MOST:,}")
    return int(text)


def workers_of(args: argparse.Namespace) -> int:
    """Returns the number of processes, at most four a core: each has nets in memory."""
    return min(whole(args.workers, "workers", num_cores()), 4 * num_cores())


def settings_of(args: argparse.Namespace) -> folder.Settings | None:
    """Returns the settings that flags name; None if they name none."""
    given: dict[str, float | str] = {}
    if args.fps is not None:
        try:
            given["fps"] = float(args.fps)
        except ValueError:
            raise UserError(f"--fps={args.fps[:20]}: wants a number of frames a second") from None
        if not 0 < float(args.fps) <= 1000:
            raise UserError(f"--fps={args.fps[:20]}: must be above 0, at most 1000")
    if args.size is not None:
        given["size"] = size = whole(args.size, "size", 0)
        if not 32 <= size <= 8192:
            raise UserError(f"--size={args.size}: must be from 32 to 8192 pixels")
    if (unit := getattr(args, "unit", None)) is not None:
        if unit not in ("track", "shot"):
            raise UserError(f"--unit={show(unit)}: must be track or shot")
        given["unit"] = unit
    return folder.Settings(**given) if given else None  # pyright: ignore[reportArgumentType]


def tell(outcome: pipeline.Outcome) -> None:
    """Prints a line of a file that is done, and what was found wrong with it."""
    film = outcome.film
    if film is None:
        say(outcome.error)
        return
    count = len(film.tracks)
    faces = f"{count:,} face{'' if count == 1 else 's'}"
    about = "photo" if film.photo else f"{film.seconds:.1f} s, {len(film.shots):,} shots"
    before = ", as before" if outcome.kept else ""
    if outcome.replaced:
        before = ", in place of another file of this name"
    heard = f", {film.voices:,} with a voice" if film.voices else ""
    say(f"{folder.video_name(outcome.path, '')}: {about}, {faces}{heard}{before}")
    wrong = {
        "frames were damaged, and are left out": film.corrupt,
        "packets could not be decoded": film.refused,
        "time stamps were wrong, and are estimated": film.repaired,
        "pieces of sound could not be decoded": film.lost_sound,
    }
    for what, count in wrong.items():
        if count:
            say(f"  {count:,} {what}")
    if film.damaged:
        say(f"  it ends at {film.seconds:.1f} s, before the end that it declares: is it cut off?")


def to_mend(remedies: Iterable[str]) -> dict[str, str]:
    """Returns the row that tells each remedy of files that failed, once; none without any."""
    told = [*dict.fromkeys(filter(None, remedies))]
    return {"to mend": "; ".join(told[:3])} if told else {}


def run_extract(args: argparse.Namespace) -> Result:
    """Extracts files; the exit code is 1 if one of them could not be read."""
    began = time.monotonic()
    workers = workers_of(args)
    outcomes = pipeline.extract(
        args.files, Path(args.out).expanduser(), Path(args.models).expanduser(),
        settings_of(args), workers=workers, done=tell,
    )  # fmt: skip
    films = [outcome.film for outcome in outcomes if outcome.film]
    failed = {str(outcome.path): outcome.remedy for outcome in outcomes if not outcome.film}
    minutes = sum(o.film.seconds for o in outcomes if o.film and not o.kept) / 60
    rate = minutes / max((time.monotonic() - began) / 60, 1e-9)
    content = {
        "out": args.out,
        "files": len(films),
        "failed": [*failed],
        "clips": sum(len(film.tracks) for film in films),
    }
    rows = {
        "features": str(args.out),
        "files": f"{len(films):,}" + (f", {len(failed):,} could not be read" if failed else ""),
        "clips": f"{content['clips']:,}",
        **to_mend(failed.values()),
    }
    if minutes:
        rows["speed"] = f"{rate:.3g} minutes of film a minute"
    return Result(content, rows, code=1 if failed else 0)


def add_flags(parser: Parser) -> None:
    """Adds the files, and the flags that `vidjax extract` and `vidjax who` share."""
    about = "videos and photos, or folders of them"
    parser.add_argument("files", nargs="*", metavar="FILE", help=about)
    parser.flag("--out", "DIR", "the folder for results", needed=True)
    parser.flag("--models", "DIR", "the folder of nets with cards", needed=True)
    parser.flag("--fps", "N", "frames of a second in which faces are looked for (default: 5)")
    parser.flag("--size", "N", "longer side in pixels, to which they are shrunk (default: 640)")
    parser.flag("--workers", "N", "processes at once (default: one a core)")


def add_extract_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax extract`."""
    add_flags(parser)
    parser.flag("--unit", "U", "what a clip is: a track, or a shot with one main figure")


COMMAND = Command(
    "makes features of the faces and voices in videos and photos", add_extract_flags, run_extract,
    ("holiday.mp4 party.mkv --out=features --models=models",),
)  # fmt: skip
