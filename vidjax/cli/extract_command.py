"""`vidjax extract`: from videos and photos to features."""

import argparse
import contextlib
import shlex
import time
from collections.abc import Iterable
from pathlib import Path

from vidjax.apps.video import features_folder, pipeline
from vidjax.runs.terminal import say
from vidjax.utils import messages
from vidjax.utils.machine import num_cores
from vidjax.utils.messages import Parser, Result

SIZES = (32, 8192)  # pixels of the longer side
MOST = 10_000  # processes
SLOW = 2  # pictures a second


def workers_of(args: argparse.Namespace) -> int:
    """Returns the number of processes, at most four a core: each has nets in memory."""
    return min(args.workers or num_cores(), 4 * num_cores())


def settings_of(args: argparse.Namespace) -> features_folder.ExtractionSettings | None:
    """Returns the settings that flags name; None if they name none."""
    names = ("fps", "size", "unit")
    given = {name: x for name in names if (x := getattr(args, name, None)) is not None}
    return features_folder.ExtractionSettings(**given) if given else None  # pyright: ignore[reportArgumentType]


def tell(outcome: pipeline.FileOutcome) -> None:
    """Prints a line of a file that is done, and what was found wrong with it."""
    film = outcome.film
    if film is None:
        say(outcome.error)
        return
    count = len(film.tracks)
    faces = f"{count:,} face{'' if count == 1 else 's'}"
    shots = f"{len(film.shots):,} shot{'' if len(film.shots) == 1 else 's'}"
    about = "photo" if film.photo else f"{film.seconds:.1f} s, {shots}"
    before = ", as before" if outcome.kept else ""
    if outcome.replaced:
        before = ", in place of another file of this name"
    heard = f", {film.voices:,} with a voice" if film.voices else ""
    say(f"{features_folder.make_printable(outcome.label)}: {about}, {faces}{heard}{before}")
    if not film.photo and film.frames < SLOW * film.seconds:
        say(f"  it has fewer than {SLOW} pictures a second: what happens in between is not known")
    if film.others:
        path = shlex.quote(str(outcome.path))
        say(
            f"  only the first pictures of {film.others + 1} are looked at; the second become a "
            f"film by: ffmpeg -i {path} -map 0:V:1 -map 0:a? -c copy second.mkv"
        )
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
        [path.expanduser() for path in args.files], Path(args.out).expanduser(),
        Path(args.models).expanduser(), settings_of(args), workers=workers, done=tell,
        check=args.check, drop="missing" if args.prune else "nothing",
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
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path, help=about)
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder for results")
    about = "the folder of nets with cards"
    parser.add_argument("--models", metavar="DIR", required=True, help=about)
    about = "frames of a second in which faces are looked for (default: 5)"
    parser.add_argument("--fps", metavar="N", type=_rate, help=about)
    about = "longer side in pixels, to which they are shrunk (default: 640)"
    parser.add_argument("--size", metavar="N", type=messages.whole(*SIZES), help=about)
    about = "processes at once (default: one a core)"
    parser.add_argument("--workers", metavar="N", type=messages.whole(1, MOST), help=about)
    about = "compares the content of every file; without it, only size, time and inode"
    parser.add_argument("--check", action="store_true", help=about)
    about = "forgets films that are no longer at their place; deletes no film"
    parser.add_argument("--prune", action="store_true", help=about)


def add_extract_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax extract`."""
    add_flags(parser)
    about = "what a clip is: a track, or a shot with one main figure"
    parser.add_argument("--unit", choices=("track", "shot"), help=about)
    parser.command(run_extract, "holiday.mp4 party.mkv --out=features --models=models")


def _rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1000:
            return float(text)
    raise argparse.ArgumentTypeError(f"wants a number above 0, at most 1000, not '{text[:20]}'")
