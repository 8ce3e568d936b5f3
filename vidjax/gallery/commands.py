"""The commands of a gallery.

    python -m vidjax.gallery create G --run=W [--strangers=S] [--empty]
    python -m vidjax.gallery enrol G CLIPS [--identity=NAME | --strangers]
    python -m vidjax.gallery identify G CLIPS [--fpir=0.01 | --threshold=0.5] [--k=5] [--out=FILE]
    python -m vidjax.gallery rank G CLIPS --out=FILE [--fpir=0.01 | --threshold=0.5]
    python -m vidjax.gallery list G [--clips] [--identity=NAME]
    python -m vidjax.gallery rename G --identity=NAME --to=NAME [--merge]
    python -m vidjax.gallery relabel G --clip=NAME --identity=NAME
    python -m vidjax.gallery remove G --identity=NAME | --clip=NAME [--later]
    python -m vidjax.gallery threshold G [--fpir=0.01]
    python -m vidjax.gallery refit G
    python -m vidjax.gallery export G --qdrant=PLACE --collection=NAME

CLIPS are `--input=PATH`, a folder or table without labels, or one .npz; or a split of a dataset,
`--split=S` with `--config.data.name=N --config.data.dir=D`, which are those of the run where they
are left out. A clip shows one person. `enrol G --input=PATH` without a name takes a folder for each
person, PATH/NAME/CLIP.npz. All changes wait until the disk has them.

`identify --help` tells the flags of that command; vidjax/gallery/README.md, the whole way.
"""

import argparse
import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vidjax import messages
from vidjax.errors import UserError

if TYPE_CHECKING:
    from vidjax.config import Config
    from vidjax.data.clips import ClipSource, TrainingData
    from vidjax.data.memory import MemoryClips
    from vidjax.gallery.gallery import Gallery

Words = Sequence[str]  # --config.data.FIELD=VALUE

CLIPS = ("run", "split", "input")
RULE = ("fpir", "threshold")
# Flag -> the word for its value (None: it has none), its help.
FLAGS: Mapping[str, tuple[str | None, str]] = {
    "run": ("W", "the folder of the run (default: the gallery's own)"),
    "split": ("S", "the split of the dataset with the clips"),
    "input": ("PATH", "instead: a folder, .parquet table or .npz of clips without labels"),
    "strangers": ("S", "create: the split whose clips without a label are strangers; "
                       "enrol: adds such clips"),
    "identity": ("NAME", "the person"),
    "clip": ("NAME", "the clip"),
    "to": ("NAME", "the new name"),
    "merge": (None, "two people are the same: makes one of them"),
    "clips": (None, "names the clips, too"),
    "later": (None, "leaves the back end to refit; until then the gallery holds what was removed"),
    "empty": (None, "enrols nobody: keeps coordinates and strangers alone"),
    "fpir": ("R", "share of strangers who may get a name, e.g. 0.01"),
    "threshold": ("P", "instead: the lowest probability of a name, e.g. 0.5"),
    "k": ("K", "names per clip in a file (default: 5)"),
    "out": ("FILE", "the new file: .jsonl, .csv, .tsv, .parquet; rank: also .txt"),
    "qdrant": ("PLACE", "an address, a folder, or :memory:"),
    "collection": ("NAME", "the new collection"),
    "quiet": (None, "the result alone"),
    "json": (None, "the result as JSON"),
    "debug": (None, "shows tracebacks"),
}  # fmt: skip
ALWAYS = ("quiet", "json", "debug")
# Words of other programs -> the command that does the same.
ELSEWHERE = {
    **dict.fromkeys(("add", "enroll", "register", "insert", "import", "learn"), "enrol"),
    **dict.fromkeys(("new", "init", "make", "build", "train"), "create"),
    **dict.fromkeys(("find", "search", "who", "query", "match", "recognise", "recognize",
                     "predict", "classify"), "identify"),
    **dict.fromkeys(("show", "ls", "people", "info", "status", "report", "count", "clips"), "list"),
    **dict.fromkeys(("merge", "join", "mv", "move"), "rename"),
    **dict.fromkeys(("correct", "change", "label", "reassign"), "relabel"),
    **dict.fromkeys(("delete", "del", "rm", "forget", "drop", "erase"), "remove"),
    **dict.fromkeys(("calibrate",), "threshold"),
    **dict.fromkeys(("fit", "update", "rebuild"), "refit"),
}  # fmt: skip
ELSEWHERE_FLAGS = {
    **dict.fromkeys(("name", "person", "label", "who", "as"), "identity"),
    **dict.fromkeys(("workdir", "model", "gallery"), "run"),
    **dict.fromkeys(("folder", "dir", "data", "path", "file", "photos"), "input"),
    **dict.fromkeys(("min_probability", "probability", "min_score", "confidence", "limit"),
                    "threshold"),
    **dict.fromkeys(("far", "fpr", "rate"), "fpir"),
    **dict.fromkeys(("top", "topk", "top_k", "n"), "k"),
    **dict.fromkeys(("output", "save"), "out"),
}  # fmt: skip


class Command(NamedTuple):
    """A command.

    Attributes:
      about: what it does, after its name.
      run: does it.
      flags: those that it reads.
      needs: those of them that must be given.
    """

    about: str
    run: Callable[[argparse.Namespace, Words], None]
    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code, see `messages.guarded`.

    Args:
      argv: the words after the program's name; None for those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        args, overrides = parse(words)
        with messages.quietly() if args.quiet else contextlib.nullcontext():
            COMMANDS[args.command].run(args, overrides)
        return 0

    return messages.guarded(command, words)


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags of a command, and its words `--config.data.FIELD=VALUE`.

    Raises:
      ValueError: an unknown command or flag, one that is missing, or a value that cannot be.
    """
    from vidjax.command_line import split_overrides

    own, overrides = split_overrides(words)
    name = next((word for word in own if not word.startswith("-")), None)
    if name is None:
        make_parser().parse_known_args(own)  # may print the help
        raise UserError(f"name a command: {', '.join(COMMANDS)}\n--help tells what they do")
    if name not in COMMANDS:
        raise UserError(f"no command '{name}': {_meant(name)}")
    own.remove(name)
    args, strays = make_parser(name).parse_known_args(own)
    args.command = name
    if strays:
        raise UserError(_about_stray(name, strays[0]))
    if not args.gallery:
        raise UserError(f"{name} needs the folder of a gallery: {name} FOLDER")
    _check_flags(args, overrides)
    _check_values(args)
    return args, overrides


def make_parser(name: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of a command; None for the one that helps to choose a command."""
    program = "vidjax gallery" if Path(sys.argv[0]).name == "vidjax" else "python -m vidjax.gallery"
    if name is None:
        about = f"{__doc__}\ncommands:\n"
        about += "".join(f"  {one:10} {command.about}\n" for one, command in COMMANDS.items())
        return messages.Parser(program, about, f"{program} COMMAND G [--FLAG=VALUE ...]")
    parser = messages.Parser(f"{program} {name}", f"{name} {COMMANDS[name].about}")
    parser.add_argument("gallery", nargs="?", metavar="G", help="the folder of the gallery")
    for flag, (value, text) in FLAGS.items():
        # Flags of other commands are known, so that an error can say which commands read them.
        own = flag in (*COMMANDS[name].flags, *ALWAYS)
        text = text if own else argparse.SUPPRESS
        if flag == "strangers":
            parser.add_argument("--strangers", nargs="?", const="", metavar=value, help=text)
        elif value is None:
            parser.add_argument(f"--{flag}", action="store_true", help=text)
        else:
            parser.add_argument(f"--{flag}", metavar=value, help=text)
    return parser


def _meant(word: str) -> str:
    """Returns which command a word means, with what that does: some commands delete."""
    from vidjax.errors import closest

    match = ELSEWHERE.get(word.lower()) or closest(word.lower(), COMMANDS, cutoff=0.7)
    if match is None:
        return f"choose from {', '.join(COMMANDS)}"
    return f"did you mean '{match}'?\n{match} {COMMANDS[match].about}"


def _about_stray(command: str, stray: str) -> str:
    """Returns what to say of a word that is no flag of a command."""
    from vidjax.errors import suggest

    flags = COMMANDS[command].flags
    if not stray.startswith("-"):
        takes = [f"--{f}={stray}" for f in ("input", "run", "identity", "clip") if f in flags]
        hint = " or ".join(takes[:1] if "input" in flags or "run" in flags else takes)
        return f"stray word '{stray}'" + (f": did you mean {hint}?" if hint else "; --help tells")
    name = stray.partition("=")[0].lstrip("-").replace("-", "_")
    if (meant := ELSEWHERE_FLAGS.get(name.lower())) in flags:
        return f"no flag '{stray}': did you mean '--{meant}'?"
    known = [f"--{flag}" for flag in (*flags, *ALWAYS)]
    return f"no flag '{stray}': {suggest(stray.partition('=')[0], known)}"


def _check_flags(args: argparse.Namespace, overrides: Words) -> None:
    """Raises ValueError where a command lacks a flag, or has one that it does not read."""
    name, command = args.command, COMMANDS[args.command]
    for flag in FLAGS:
        if getattr(args, flag) not in (None, False) and flag not in (*command.flags, *ALWAYS):
            others = ", ".join(one for one, other in COMMANDS.items() if flag in other.flags)
            raise UserError(f"{name} does not read --{flag}; {others} do")
    if overrides and "split" not in command.flags and name != "create":
        raise UserError(f"{name} reads no clips: leave {overrides[0].partition('=')[0]} out")
    for word in overrides:
        if not word.startswith("--config.data."):
            raise UserError(f"{word}: a gallery takes fields of config.data alone")
    for flag in command.needs:
        if not getattr(args, flag):
            raise UserError(f"{name} needs --{flag}={FLAGS[flag][0]}: {FLAGS[flag][1]}")
    if "input" in command.flags and bool(args.split) == bool(args.input):
        both = " and not both" if args.split else ""
        raise UserError(
            f"{name} needs clips{both}: --input=PATH, a folder, .parquet table or .npz,\n"
            "or --split=S of the dataset that --config.data.name and --config.data.dir name"
        )
    if name == "enrol" and args.identity and args.strangers is not None:
        raise UserError("enrol adds a person, --identity=NAME, or --strangers: leave one out")
    if name == "remove" and bool(args.identity) == bool(args.clip):
        raise UserError("remove needs one of --identity=NAME and --clip=NAME")
    if args.fpir is not None and args.threshold is not None:
        raise UserError(
            "choose one of --fpir, a share of strangers, and --threshold, a probability"
        )


def _check_values(args: argparse.Namespace) -> None:
    """Turns numbers into numbers and looks at paths, before anything that takes seconds."""
    from vidjax.gallery import calibration

    if args.fpir is not None:
        args.fpir = _number(args.fpir, "fpir")
        calibration.check_rate(args.fpir)
    if args.threshold is not None:
        args.threshold = _number(args.threshold, "threshold")
        calibration.check_probability(args.threshold)
    if args.k is not None:
        if not args.k.isdecimal() or int(args.k) < 1:
            raise UserError(f"--k={args.k}: name 1 identity or more, a whole number")
        args.k = int(args.k)
    if args.input:
        from vidjax.data.memory import check_path

        path = Path(args.input).expanduser()
        check_path(path)
        nobody = args.command == "enrol" and not args.identity and args.strangers is None
        if nobody and (path.is_file() or any(path.glob("*.npz"))):
            raise UserError(
                "enrol --input=PATH needs --identity=NAME: say who all these clips show\n"
                "or give a folder with a folder for each person: PATH/NAME/CLIP.npz"
            )


def _number(text: str, flag: str) -> float:
    try:
        return float(text)
    except ValueError:
        hint = ""
        with contextlib.suppress(ValueError):
            hint = f": write --{flag}={float(text.removesuffix('%')) / 100:g}"
        raise UserError(f"--{flag}={text}: not a number{hint}") from None


def _tell(args: argparse.Namespace, rows: Sequence[tuple[str, str]], content: object) -> None:
    """Prints rows below the command's name, or with `--json` the content."""
    if args.json:
        messages.say(json.dumps(content, ensure_ascii=False))
    else:
        lines = [args.command, *(f"  {name:10}  {value}" for name, value in rows)]
        messages.say("\n".join(lines))


def _of(count: int, noun: str) -> str:
    """Returns a number of things, such as `1 clip`, `2 clips`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _counts(gallery: "Gallery") -> tuple[list[tuple[str, str]], dict[str, str | int]]:
    """Returns the size of a gallery, as rows and for JSON."""
    clips = sum(gallery.identities.values())
    rows = [
        ("gallery", str(gallery.folder)),
        ("people", f"{len(gallery.identities):,}"),
        ("clips", f"{clips:,}"),
        ("strangers", f"{len(gallery.strangers):,}"),
        ("version", f"{gallery.version:,}"),
    ]
    if gallery.still_held:
        held = _of(gallery.still_held, "removed clip")
        rows.append(("still held", f"{held}, by the back end: refit ends it"))
    return rows, {
        "gallery": str(gallery.folder),
        "people": len(gallery.identities),
        "clips": clips,
        "strangers": len(gallery.strangers),
        "version": gallery.version,
        "still_held": gallery.still_held,
    }


def _config_of(config: "Config", overrides: Words) -> "Config":
    from vidjax import config_io

    return config_io.override(config, overrides)


def _create(args: argparse.Namespace, overrides: Words) -> None:
    from vidjax import predict
    from vidjax.api import load_data, run_config
    from vidjax.gallery.gallery import Gallery

    run_config(Path(args.run).expanduser())  # says where there is none
    run = predict.restore(args.run)
    config = _config_of(run.config, overrides)
    data = None if config == run.config else load_data(config)
    made = Gallery.create(
        args.gallery, run, data, strangers=args.strangers or None, empty=args.empty, sync=True
    )
    _tell(args, *_counts(made))


def _opened(args: argparse.Namespace) -> "Gallery":
    from vidjax.gallery.gallery import Gallery

    return Gallery(args.gallery, run=getattr(args, "run", None), sync=True)


def _clips(
    args: argparse.Namespace, overrides: Words, gallery: "Gallery"
) -> "MemoryClips | TrainingData":
    """Returns the clips of a command."""
    from vidjax.api import load_data
    from vidjax.data.memory import load_clips

    run = gallery.run
    if args.input:
        return load_clips(args.input, run.modalities, (), quality=run.config.data.quality)
    return load_data(_config_of(run.config, overrides))


@contextlib.contextmanager
def _progress(
    label: str, clips: "ClipSource", split: str | None
) -> Iterator[Callable[[int], None]]:
    """Shows how many clips are done; gives the function that counts them."""
    from vidjax.run import terminal

    total = len(clips.split(split or "clips").clips)
    bar = terminal.Progress(total, unit="clip", label=label, leave=False)
    try:
        yield bar.advance
    finally:
        bar.close()


def _enrol(args: argparse.Namespace, overrides: Words) -> None:
    from vidjax.data.memory import load_people

    gallery, strangers = _opened(args), args.strangers is not None
    if args.input and not args.identity and not strangers:
        quality = gallery.run.config.data.quality
        clips, identity = load_people(args.input, gallery.run.modalities, quality=quality)
    else:
        clips, identity = _clips(args, overrides, gallery), args.identity
    done = gallery.enrol(clips, identity, split=args.split, strangers=strangers)
    if done.refused:
        named = ", ".join(done.refused[:3]) + (" ..." if len(done.refused) > 3 else "")
        warnings.warn(
            f"{_of(len(done.refused), 'clip')} without a usable frame: not enrolled: {named}",
            stacklevel=2,
        )
    rows, content = _counts(gallery)
    rows = [("enrolled", f"{_of(done.enrolled, 'clip')}, {done.unchanged:,} were there"), *rows]
    _tell(args, rows, done._asdict() | content)


def _identify(args: argparse.Namespace, overrides: Words) -> None:
    from vidjax import tables
    from vidjax.gallery import answers as answers_lib
    from vidjax.run import terminal

    out = Path(args.out).expanduser() if args.out else None
    if out:
        tables.check_new(out)
    gallery = _opened(args)
    rule = gallery.rule(fpir=args.fpir, threshold=args.threshold)  # before clips are read
    clips = _clips(args, overrides, gallery)
    began, found = time.monotonic(), {}
    with _progress("vectors", clips, args.split) as advance:
        vectors = gallery.embed(clips, args.split, advance=advance)
    with _progress("identify", clips, args.split) as advance:
        answers = gallery.answers(list(vectors.parts.values()), args.k or 5, rule)
        for name, answer in zip(vectors.names, answers, strict=True):
            found[name] = answer
            advance(1)
    timed = terminal.timing(began, len(found))
    named = sum(answer.identity is not None for answer in found.values())
    rows = [("clips", f"{len(found):,}"), ("named", f"{named:,}"),
            ("unknown", f"{len(found) - named:,}")]  # fmt: skip
    rows += [*answers_lib.describe_rule(rule), *timed[0]]
    content = {"clips": len(found), "named": named, "rule": answers_lib.rule_as_json(rule)}
    content |= {"threshold": rule.found._asdict() if rule.found else None} | timed[1]
    if out:
        answers_lib.write(out, found)
        _tell(args, [*rows, ("answers", str(out))], content | {"answers": str(out)})
    elif args.json:
        listed = [answers_lib.as_json(*pair) for pair in found.items()]
        _tell(args, rows, content | {"answers": listed})
    else:
        messages.say("\n".join(answers_lib.table(found)))
        _tell(args, rows, content)


def _rank(args: argparse.Namespace, overrides: Words) -> None:
    from vidjax import ranking, tables
    from vidjax.gallery import answers as answers_lib
    from vidjax.run import terminal

    out = Path(args.out).expanduser()
    tables.check_new(out, (".txt", *tables.ENDINGS))
    gallery = _opened(args)
    chosen = args.fpir is not None or args.threshold is not None
    rule = gallery.rule(fpir=args.fpir, threshold=args.threshold) if chosen else None
    clips = _clips(args, overrides, gallery)
    began = time.monotonic()
    with _progress("vectors", clips, args.split) as advance:
        vectors = gallery.embed(clips, args.split, advance=advance)
    with _progress("rank", clips, args.split) as advance:
        ranked = gallery.top(vectors, rule, advance=advance)
    timed = terminal.timing(began, len(ranked.clips))
    if out.suffix == ".txt":
        text = ranking.to_text(out, ranked.identities, ranked.clips, ranked.top)
        tables.write_new(out, text.encode())
    else:
        tables.write_ranking(out, ranked.lists())
    rows = [*_counts(gallery)[0][:2], ("clips", f"{len(ranked.clips):,}")]
    rows += [*(answers_lib.describe_rule(rule) if rule else []), *timed[0]]
    content = {"ranking": str(out), "clips": len(ranked.clips), **timed[1]}
    content |= {"rule": answers_lib.rule_as_json(rule) if rule else None}
    _tell(args, [*rows, ("ranking", str(out))], content)


def _remove(args: argparse.Namespace, overrides: Words) -> None:
    del overrides
    gallery = _opened(args)
    count = gallery.remove(identity=args.identity, clip=args.clip, refit=not args.later)
    rows, content = _counts(gallery)
    _tell(args, [("removed", _of(count, "clip")), *rows], {"removed": count} | content)


def _rename(args: argparse.Namespace, overrides: Words) -> None:
    del overrides
    gallery = _opened(args)
    count = gallery.rename(args.identity, args.to, merge=args.merge)
    rows, content = _counts(gallery)
    told = f"{args.identity} is {args.to}, with {_of(gallery.identities[args.to], 'clip')}"
    _tell(args, [("renamed", told), *rows], {"renamed": count} | content)


def _relabel(args: argparse.Namespace, overrides: Words) -> None:
    del overrides
    gallery = _opened(args)
    new = args.identity not in gallery.identities
    before = gallery.relabel(args.clip, args.identity)
    gone = before is not None and before not in gallery.identities
    told = f"{args.clip} showed {'a stranger' if before is None else before}"
    told += f"{', of whom no clip is left' * gone}; it shows {args.identity}{', who is new' * new}"
    rows, content = _counts(gallery)
    _tell(args, [("relabelled", told), *rows], {"clip": args.clip, "before": before} | content)


def _refit(args: argparse.Namespace, overrides: Words) -> None:
    del overrides
    gallery = _opened(args)
    gallery.refit()
    _tell(args, *_counts(gallery))


def _list(args: argparse.Namespace, overrides: Words) -> None:
    del overrides
    from vidjax.gallery.gallery import unknown

    gallery = _opened(args)
    rows, content = _counts(gallery)
    listed = gallery.identities
    if args.identity is not None:
        if args.identity not in listed:
            raise unknown("identity", args.identity, listed)
        listed = {args.identity: listed[args.identity]}
    content |= {"identities": listed}
    width = max(map(len, listed), default=0)
    lines = [f"  {name:{width}}  {count:,}" for name, count in listed.items()]
    if args.clips:
        shown: dict[str, list[str]] = {name: [] for name in listed}
        for name, clip in sorted(gallery.clips.items()):
            if clip.identity in shown:
                shown[clip.identity].append(name)
        content |= {"clips": shown}
        lines = [f"  {name:{width}}  {clip}" for name, clips in shown.items() for clip in clips]
    if lines and not args.json:
        messages.say("\n".join(lines))
    _tell(args, rows, content)


def _threshold(args: argparse.Namespace, overrides: Words) -> None:
    del overrides
    from vidjax.gallery import answers as answers_lib
    from vidjax.gallery.calibration import DEFAULT_FPIR

    found = _opened(args).threshold(DEFAULT_FPIR if args.fpir is None else args.fpir)
    _tell(args, answers_lib.describe(found), found._asdict())


def _export(args: argparse.Namespace, overrides: Words) -> None:
    del overrides
    from vidjax.gallery import qdrant

    count = qdrant.export(_opened(args), args.qdrant, args.collection)
    rows = [("exported", f"{_of(count, 'clip')} to {args.collection}")]
    _tell(args, rows, {"exported": count})


COMMANDS: Mapping[str, Command] = {
    "create": Command(
        "makes a gallery of the training clips of a run",
        _create, ("run", "strangers", "empty"), ("run",),
    ),
    "enrol": Command(
        "adds clips of people who are there, or new", _enrol, (*CLIPS, "identity", "strangers")
    ),
    "identify": Command(
        "says whom clips show, or unknown", _identify, (*CLIPS, *RULE, "k", "out")
    ),
    "rank": Command(
        "ranks clips for every person, into a file", _rank, (*CLIPS, *RULE, "out"), ("out",)
    ),
    "list": Command(
        "names the people, with their numbers of clips", _list, ("clips", "identity")
    ),
    "rename": Command(
        "gives a person another name",
        _rename, ("identity", "to", "merge"), ("identity", "to"),
    ),
    "relabel": Command(
        "says that a clip shows somebody else",
        _relabel, ("clip", "identity"), ("clip", "identity"),
    ),
    "remove": Command(
        "deletes a person, or a clip, and cannot be undone", _remove, ("identity", "clip", "later")
    ),
    "threshold": Command(
        "says from which probability on a share of strangers gets a name", _threshold, ("fpir",)
    ),
    "refit": Command("fits the coordinates to the clips that are enrolled now", _refit),
    "export": Command(
        "copies vectors and names to a Qdrant database",
        _export, ("qdrant", "collection"), ("qdrant", "collection"),
    ),
}  # fmt: skip
