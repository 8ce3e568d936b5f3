"""The commands of a gallery.

    python -m vidjax.gallery create G --run=W [--strangers=S] [--empty]
    python -m vidjax.gallery enrol G CLIPS [--identity=NAME] [--strangers]
    python -m vidjax.gallery identify G CLIPS [--fpir=0.01] [--k=5] [--out=FILE]
    python -m vidjax.gallery rank G CLIPS --out=FILE
    python -m vidjax.gallery remove G --identity=NAME | --clip=NAME
    python -m vidjax.gallery refit G
    python -m vidjax.gallery list G
    python -m vidjax.gallery threshold G --fpir=0.01
    python -m vidjax.gallery export G --qdrant=PLACE --collection=NAME

CLIPS are a split of a dataset, `--split=S` with `--config.data.name=N --config.data.dir=D`, which
are those of the run where they are left out; or `--input=PATH`, a folder or table without labels.
All changes wait until the disk has them.
"""

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vidjax import messages

if TYPE_CHECKING:
    from vidjax.config import Config
    from vidjax.gallery.gallery import Gallery
    from vidjax.gallery.people import People
    from vidjax.gallery.vectors import AnyClips

COMMANDS = {
    "create": "makes a gallery of the training clips of a run",
    "enrol": "adds clips of people who are there, or new",
    "identify": "says whom clips show, or unknown",
    "rank": "ranks clips for every person, into a file",
    "remove": "deletes a person, or a clip",
    "refit": "fits the coordinates to the clips that are enrolled now",
    "list": "names the people, with their numbers of clips",
    "threshold": "says from which probability on a clip gets a name",
    "export": "copies vectors and names to a Qdrant database",
}
CLIPS = ("enrol", "identify", "rank")
# Flag -> the commands that take it, the word for its value, its help.
FLAGS: Mapping[str, tuple[tuple[str, ...], str | None, str]] = {
    "run": (("create", *CLIPS), "W", "the folder of the run (default: the gallery's own)"),
    "split": (CLIPS, "S", "the split of the dataset with the clips"),
    "input": (CLIPS, "PATH", "instead: a folder or .parquet table of clips without labels"),
    "identity": (("enrol", "remove"), "NAME", "the person"),
    "clip": (("remove",), "NAME", "the clip"),
    "empty": (("create",), None, "enrols nobody: keeps coordinates and strangers alone"),
    "fpir": (("identify", "threshold"), "R", "share of strangers who may get a name, e.g. 0.01"),
    "k": (("identify",), "K", "names per clip in a file (default: 5)"),
    "out": (("identify", "rank"), "FILE", "the new file: .jsonl, .tsv, .parquet; rank: also .txt"),
    "qdrant": (("export",), "PLACE", "an address, a folder, or :memory:"),
    "collection": (("export",), "NAME", "the new collection"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code, see `messages.guarded`.

    Args:
      argv: the words after the program's name; None for those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        args, overrides = parse(words)
        with messages.quietly() if args.quiet else contextlib.nullcontext():
            {
                "create": _create,
                "enrol": _enrol,
                "identify": _identify,
                "rank": _rank,
                "remove": _remove,
                "refit": _refit,
                "list": _list,
                "threshold": _threshold,
                "export": _export,
            }[args.command](args, overrides)
        return 0

    return messages.guarded(command, words)


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags of a command, and its words `--config.data.FIELD=VALUE`.

    Raises:
      ValueError: an unknown command or flag, or one that is missing.
    """
    from vidjax.command_line import Parser, split_overrides
    from vidjax.suggest import suggest

    own, overrides = split_overrides(words)
    parser = Parser(
        prog="python -m vidjax.gallery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("gallery", nargs="?", metavar="G", help="the folder of the gallery")
    for flag, (_, value, text) in FLAGS.items():
        if value is None:
            parser.add_argument(f"--{flag}", action="store_true", help=text)
        else:
            parser.add_argument(f"--{flag}", metavar=value, help=text)
    parser.add_argument(
        "--strangers", nargs="?", const="", metavar="S",
        help="create: the split whose clips without a label are strangers; enrol: adds such clips",
    )  # fmt: skip
    for flag, text in {"quiet": "the result alone", "json": "the result as JSON",
                       "debug": "shows tracebacks"}.items():  # fmt: skip
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    args, strays = parser.parse_known_args(own)
    if not args.command:
        raise ValueError(f"name a command: {', '.join(COMMANDS)}\n--help tells what they do")
    if args.command not in COMMANDS:
        raise ValueError(f"no command '{args.command}': {suggest(args.command, COMMANDS)}")
    if strays:
        known = [f"--{name}" for name in (*FLAGS, "strangers", "quiet", "json")]
        raise ValueError(f"no flag '{strays[0]}': {suggest(strays[0].partition('=')[0], known)}")
    if not args.gallery:
        raise ValueError(f"{args.command} needs the folder of a gallery: {args.command} G")
    _check_flags(args, overrides)
    return args, overrides


def _check_flags(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Raises ValueError where a command lacks a flag, or has one that it does not read."""
    command = args.command
    for flag, (commands, _, _) in FLAGS.items():
        if getattr(args, flag) and command not in commands:
            raise ValueError(f"{command} does not read --{flag}; {', '.join(commands)} do")
    if args.strangers is not None and command not in ("create", "enrol"):
        raise ValueError(f"{command} does not read --strangers; create and enrol do")
    if overrides and command not in ("create", *CLIPS):
        raise ValueError(f"{command} reads no clips: leave {overrides[0].partition('=')[0]} out")
    for word in overrides:
        if not word.startswith("--config.data."):
            raise ValueError(f"{word}: a gallery takes fields of config.data alone")
    needed = {"create": ["run"], "rank": ["out"], "threshold": ["fpir"],
              "export": ["qdrant", "collection"]}.get(command, [])  # fmt: skip
    for flag in needed:
        if not getattr(args, flag):
            raise ValueError(f"{command} needs --{flag}={FLAGS[flag][1]}: {FLAGS[flag][2]}")
    if command in CLIPS and bool(args.split) == bool(args.input):
        raise ValueError(
            f"{command} needs clips: --split=S of the dataset that --config.data.name and "
            "--config.data.dir name,\nor --input=PATH, a folder or .parquet table"
        )
    if command == "enrol" and args.input and not args.identity and args.strangers is None:
        raise ValueError("enrol --input=PATH needs --identity=NAME: say who all these clips show")
    if command == "remove" and bool(args.identity) == bool(args.clip):
        raise ValueError("remove needs one of --identity=NAME and --clip=NAME")


def _number(text: str, flag: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--{flag}={text}: not a number") from None


def _tell(args: argparse.Namespace, rows: Sequence[tuple[str, str]], content: object) -> None:
    """Prints rows below the command's name, or with `--json` the content."""
    if args.json:
        messages.say(json.dumps(content, ensure_ascii=False))
    else:
        lines = [args.command, *(f"  {name:10}  {value}" for name, value in rows)]
        messages.say("\n".join(lines))


def _counts(people: "People") -> tuple[list[tuple[str, str]], dict[str, str | int]]:
    """Returns the size of a gallery, as rows and for JSON."""
    clips = sum(people.identities.values())
    rows = [
        ("gallery", str(people.folder)),
        ("people", f"{len(people.identities):,}"),
        ("clips", f"{clips:,}"),
        ("strangers", f"{len(people.strangers):,}"),
        ("version", f"{people.version:,}"),
    ]
    return rows, {
        "gallery": str(people.folder),
        "people": len(people.identities),
        "clips": clips,
        "strangers": len(people.strangers),
        "version": people.version,
    }


def _config_of(config: "Config", overrides: Sequence[str]) -> "Config":
    from vidjax import config as config_lib

    return config_lib.override(config, overrides)


def _create(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from vidjax import predict
    from vidjax.gallery.gallery import Gallery
    from vidjax.modes.arguments import load_data, run_config

    run_config(Path(args.run).expanduser())  # says where there is none
    run = predict.restore(args.run)
    data = load_data(_config_of(run.config, overrides))
    made = Gallery.create(
        args.gallery, run, data, strangers=args.strangers or None, empty=args.empty, sync=True
    )
    _tell(args, *_counts(made.people))


def _opened(args: argparse.Namespace) -> "Gallery":
    from vidjax.gallery.gallery import Gallery

    return Gallery(args.gallery, run=args.run, sync=True)


def _clips(args: argparse.Namespace, overrides: Sequence[str], gallery: "Gallery") -> "AnyClips":
    """Returns the clips of a command."""
    from vidjax.data.unlabelled import load_clips
    from vidjax.modes.arguments import load_data

    run = gallery.run
    if args.input:
        return load_clips(args.input, run.modalities, (), quality=run.config.data.quality)
    return load_data(_config_of(run.config, overrides))


def _enrol(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    gallery = _opened(args)
    clips = _clips(args, overrides, gallery)
    done = gallery.enrol(
        clips, args.identity, split=args.split, strangers=args.strangers is not None
    )
    if done.refused:
        named = ", ".join(done.refused[:3]) + (" ..." if len(done.refused) > 3 else "")
        warnings.warn(
            f"{len(done.refused):,} clips without a usable frame are not enrolled: {named}",
            stacklevel=2,
        )
    rows, content = _counts(gallery.people)
    rows = [("enrolled", f"{done.enrolled:,} clips, {done.unchanged:,} were there"), *rows]
    _tell(args, rows, done._asdict() | content)


def _identify(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from vidjax.gallery import answers as answers_lib
    from vidjax.modes import rank

    out = Path(args.out).expanduser() if args.out else None
    if out:
        rank.check_out(out, tuple(answers_lib.FORMATS))
    fpir = None if args.fpir is None else _number(args.fpir, "fpir")
    k = int(_number(args.k or "5", "k"))
    gallery = _opened(args)
    threshold = None if fpir is None else gallery.threshold(fpir)  # before clips are read
    clips = _clips(args, overrides, gallery)
    found = gallery.identify(clips, k, fpir=fpir, split=args.split)
    named = sum(answer.identity is not None for answer in found.values())
    rows = [("clips", f"{len(found):,}"), ("named", f"{named:,}"),
            ("unknown", f"{len(found) - named:,}")]  # fmt: skip
    rows += answers_lib.describe(threshold) if threshold else []
    content = {"clips": len(found), "named": named}
    content |= {"threshold": threshold._asdict() if threshold else None}
    if out:
        rank.write_new(out, answers_lib.FORMATS[out.suffix](found))
        _tell(args, [*rows, ("answers", str(out))], content | {"answers": str(out)})
    elif args.json:
        listed = [answers_lib.as_json(*pair) for pair in found.items()]
        _tell(args, rows, content | {"answers": listed})
    else:
        messages.say("\n".join(answers_lib.table(found)))
        _tell(args, rows, content)


def _rank(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    from vidjax import ranking
    from vidjax.modes import rank

    out = Path(args.out).expanduser()
    rank.check_out(out, (".txt", *rank.FORMATS))
    gallery = _opened(args)
    clips = _clips(args, overrides, gallery)
    if out.suffix == ".txt":
        ranked = gallery.top(gallery.embed(clips, args.split))
        text = ranking.to_text(out, ranked.identities, ranked.clips, ranked.top)
        rank.write_new(out, text.encode())
    else:
        rank.write(out, gallery.rank(clips, split=args.split))
    _tell(args, [*_counts(gallery.people)[0][:2], ("ranking", str(out))], {"ranking": str(out)})


def _people(args: argparse.Namespace) -> "People":
    from vidjax.gallery.people import People

    return People(args.gallery, sync=True)


def _remove(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    del overrides
    people = _people(args)
    identities, clips = [args.identity] * bool(args.identity), [args.clip] * bool(args.clip)
    count = people.remove(identities=identities, clips=clips)
    rows, content = _counts(people)
    _tell(args, [("removed", f"{count:,} clips"), *rows], {"removed": count} | content)


def _refit(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    del overrides
    people = _people(args)
    people.refit()
    _tell(args, *_counts(people))


def _list(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    del overrides
    people = _people(args)
    rows, content = _counts(people)
    listed = people.identities
    if not args.json:
        width = max(map(len, listed), default=0)
        messages.say("\n".join(f"  {name:{width}}  {count:,}" for name, count in listed.items()))
    _tell(args, rows, content | {"identities": listed})


def _threshold(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    del overrides
    from vidjax.gallery import answers as answers_lib

    found = _people(args).threshold(_number(args.fpir, "fpir"))
    _tell(args, answers_lib.describe(found), found._asdict())


def _export(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    del overrides
    from vidjax.gallery import qdrant

    count = qdrant.export(_people(args), args.qdrant, args.collection)
    _tell(args, [("exported", f"{count:,} clips to {args.collection}")], {"exported": count})
