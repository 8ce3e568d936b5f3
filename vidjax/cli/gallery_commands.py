"""The commands of a gallery, `vidjax gallery COMMAND`."""

import argparse
import contextlib
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from vidjax.apps import bulk
from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.gallery.changes import check_person, stack
from vidjax.apps.video import appearances
from vidjax.data.untrusted.names import normal_form
from vidjax.runs import terminal
from vidjax.utils import files, messages, tables
from vidjax.utils.errors import UserError, closest, named, warn
from vidjax.utils.messages import Parser, Result

if TYPE_CHECKING:
    from vidjax.apps.gallery.gallery import Gallery, Vectors
    from vidjax.apps.video.features_folder import Film
    from vidjax.data.clips import TrainingData
    from vidjax.data.memory import MemoryClips

HELP = """\
A gallery knows people who are enrolled, found and deleted without training.

Clips are --input=PATH, a folder or table without labels, or one .npz; or a
split of a dataset, --split=S with --config.data.name=N --config.data.dir=D,
which are those of the run where they are left out. A clip shows one person.
`enrol G --input=PATH` without a name takes a folder for each person,
PATH/NAME/CLIP.npz. All changes wait until the disk has them.

Every command has a --help of its own, with its flags and an example;
vidjax/apps/gallery/README.md tells the whole way.
"""


def add_flags(parser: Parser) -> None:
    """Adds the commands of `vidjax gallery`, each with its flags."""
    parser.description = HELP
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True
    )
    for name, (about, add) in COMMANDS.items():
        description = f"{about[0].upper()}{about[1:]}."
        one = commands.add_parser(name, help=about, description=description)
        one.add_argument("gallery", metavar="G", help="the folder of the gallery")
        add(one)


def _add_create(parser: Parser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", metavar="W", help="the folder of a run")
    about = "instead: a folder of models with cards, see vidjax extract"
    model.add_argument("--models", metavar="DIR", help=about)
    about = "enrols nobody: keeps coordinates and strangers"
    parser.add_argument("--empty", action="store_true", help=about)
    about = "the split whose clips without a label are strangers"
    parser.add_argument("--strangers", metavar="S", help=about)
    parser.fields("data.")
    parser.command(_create, "G --run=runs/plda", "G --models=models")


def _add_clips(parser: Parser) -> None:
    clips = parser.add_mutually_exclusive_group(required=True)
    about = "a folder, .parquet table or .npz of clips without labels"
    clips.add_argument("--input", metavar="PATH", help=about)
    about = "instead: the split of the dataset with the clips"
    clips.add_argument("--split", metavar="S", help=about)
    about = "the folder of the run (default: the gallery's own)"
    parser.add_argument("--run", metavar="W", help=about)
    parser.fields("data.")


def add_rule(parser: Parser) -> None:
    """Adds the flags that say when a clip gets a name."""
    rule = parser.add_mutually_exclusive_group()
    about = "share of strangers who may get a name, e.g. 0.01"
    rule.add_argument("--fpir", metavar="R", type=_number, help=about)
    about = "instead: the lowest probability of a name, e.g. 0.5"
    rule.add_argument("--threshold", metavar="P", type=_number, help=about)


def _number(text: str) -> float:
    hint = ""
    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(ValueError):
        hint = f": write {float(text.removesuffix('%')) / 100:g}"
    raise argparse.ArgumentTypeError(f"'{text}' is not a number{hint}")


def _add_enrol(parser: Parser) -> None:
    _add_clips(parser)
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--identity", metavar="NAME", help="the person")
    parser.add_argument("--clip", metavar="CLIP", help="only this one of the clips")
    about = "instead: a table of clip and identity, as `group` writes it"
    who.add_argument("--labels", metavar="FILE", help=about)
    about = "instead: the clips show strangers"
    who.add_argument("--strangers", action="store_true", help=about)
    parser.command(
        _enrol, "G --input=PATH --identity=Ada", "G --input=PATH --clip=CLIP --identity=Ada"
    )


def _add_identify(parser: Parser) -> None:
    _add_clips(parser)
    add_rule(parser)
    about = "names per clip in a file (default: %(default)s)"
    parser.add_argument(
        "--k", metavar="K", type=messages.whole(1, 1_000_000), default=5, help=about
    )
    about = (
        "the new file: .jsonl, .csv, .tsv, .parquet; .vtt, .srt and .rttm, by time; a folder for "
        "a folder of parquet tables"
    )
    parser.add_argument("--out", metavar="FILE", help=about)
    examples = ("G --input=PATH --fpir=0.01", "G --split=val --threshold=0.5 --out=answers.csv")
    parser.command(_identify, *examples)


def _add_group(parser: Parser) -> None:
    _add_clips(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="the new file: .tsv")
    parser.command(_group, "G --input=features --out=groups.tsv")


def _add_rank(parser: Parser) -> None:
    _add_clips(parser)
    add_rule(parser)
    about = "the new file: .txt, .jsonl, .csv, .tsv, .parquet; a folder for a folder of tables"
    parser.add_argument("--out", metavar="FILE", required=True, help=about)
    parser.command(_rank, "G --split=val --out=ranking.txt")


def _add_list(parser: Parser) -> None:
    parser.add_argument("--clips", action="store_true", help="names the clips, too")
    parser.add_argument("--identity", metavar="NAME", help="lists one person")
    parser.command(_list, "G", "G --clips --identity=Ada")


def _add_rename(parser: Parser) -> None:
    parser.add_argument("--identity", metavar="NAME", required=True, help="the person")
    parser.add_argument("--to", metavar="NAME", required=True, help="the new name")
    about = "two people are the same: makes one of them"
    parser.add_argument("--merge", action="store_true", help=about)
    parser.command(_rename, "G --identity=Adda --to=Ada")


def _add_relabel(parser: Parser) -> None:
    parser.add_argument("--clip", metavar="NAME", required=True, help="the clip")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--identity", metavar="NAME", help="the person")
    about = "instead: it shows nobody of the gallery"
    who.add_argument("--strangers", action="store_true", help=about)
    parser.command(_relabel, "G --clip=NAME --identity=Ada", "G --clip=NAME --strangers")


def _add_remove(parser: Parser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--identity", metavar="NAME", help="the person")
    what.add_argument("--clip", metavar="NAME", help="instead: the clip")
    parser.command(_remove, "G --identity=Ada")


def _add_threshold(parser: Parser) -> None:
    about = "share of strangers who may get a name (default: %(default)s)"
    default = answers_lib.DEFAULT_FPIR
    parser.add_argument("--fpir", metavar="R", type=_number, default=default, help=about)
    parser.command(_threshold, "G --fpir=0.01")


def _add_export(parser: Parser) -> None:
    parser.add_argument("--out", metavar="FILE", required=True, help="the new file: .parquet")
    parser.command(_export, "G --out=people.parquet")


# Command -> what it does, and a function that adds its flags.
COMMANDS: Mapping[str, tuple[str, Callable[[Parser], None]]] = {
    "create": ("makes a gallery of a run's training clips, or of models", _add_create),
    "enrol": ("adds clips of people who are there, or new", _add_enrol),
    "identify": ("says whom clips show, or unknown", _add_identify),
    "group": ("groups clips of people who are not enrolled, to be named", _add_group),
    "rank": ("ranks clips for every person, into a file", _add_rank),
    "list": ("names the people, with their numbers of clips", _add_list),
    "rename": ("gives a person another name", _add_rename),
    "relabel": ("says that a clip shows somebody else", _add_relabel),
    "remove": ("deletes a person, or a clip, and cannot be undone", _add_remove),
    "threshold": ("says which probability of a name a share of strangers passes", _add_threshold),
    "export": ("writes the enrolled clips to a parquet table: names, people, vectors", _add_export),
}


# Words that people try -> the command that they may mean.
SLIPS = {"add": "enrol", "delete": "remove", "forget": "remove", "show": "list", "new": "create"}


def check_command(words: Sequence[str]) -> None:
    """Raises UserError for a word that is no command of a gallery; the words follow `gallery`."""
    if not words or words[0].startswith("-") or words[0] in COMMANDS:
        return
    word, *rest = words
    meant = SLIPS.get(word) or closest(word, COMMANDS, cutoff=0.7)
    if rest and rest[0] in COMMANDS:
        hint = f"the command comes first: vidjax gallery {shlex.join([rest[0], word, *rest[1:]])}"
    elif meant:
        hint = f"did you mean vidjax gallery {shlex.join([meant, *rest])}?"
    else:
        hint = f"choose from {', '.join(COMMANDS)}"
    raise UserError(f"no command 'gallery {word}': {hint}")


def _of(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _counts(
    gallery: "Gallery",
    done: Mapping[str, str] = MappingProxyType({}),
    content: Mapping[str, object] = MappingProxyType({}),
) -> Result:
    sizes = {
        "people": len(gallery.identities),
        "clips": sum(gallery.identities.values()),
        "strangers": len(gallery.strangers),
        "version": gallery.version,
    }
    rows = {**done, "gallery": str(gallery.folder)} | {k: f"{n:,}" for k, n in sizes.items()}
    return Result({**content, "gallery": str(gallery.folder), **sizes}, rows)


def _create(args: argparse.Namespace) -> Result:
    from vidjax.apps.gallery.gallery import Gallery, check_new

    check_new(Path(args.gallery))
    if args.models:
        return _counts(Gallery.of_models(args.gallery, args.models))
    from vidjax.evaluation import predict  # JAX, for galleries of runs alone
    from vidjax.runs import config_io
    from vidjax.training.api import load_data, open_run

    open_run(args.run)  # says where there is none
    run = predict.restore(args.run)
    config = config_io.override(run.config, args.overrides)
    data = None if config == run.config else load_data(config)
    made = Gallery.create(
        args.gallery, run, data, strangers=args.strangers or None, empty=args.empty
    )
    return _counts(made)


def _opened(args: argparse.Namespace) -> "Gallery":
    """Returns the gallery; refuses clips that are not there, or of other models than its own."""
    from vidjax.apps.gallery.gallery import Gallery
    from vidjax.apps.video import features_folder
    from vidjax.data.clips import SPLITS
    from vidjax.data.memory import check_path, find_files

    path = Path(args.input).expanduser() if getattr(args, "input", None) else None
    people = args.command == "enrol" and not (args.identity or args.labels or args.strangers)
    if path and (people or bulk.tables_of(path)):
        check_path(path)
    elif path:
        find_files(path)
    if (split := getattr(args, "split", None)) and split not in SPLITS:
        raise UserError(f"--split={split}: choose from {', '.join(SPLITS)}")
    gallery = Gallery(args.gallery, run=getattr(args, "run", None))
    if path and gallery.origin.cards:
        features_folder.check_models(path, gallery.origin.cards)
    return gallery


def _clips(args: argparse.Namespace, gallery: "Gallery") -> "MemoryClips | TrainingData":
    if args.input:
        return gallery.load(args.input)
    from vidjax.runs import config_io
    from vidjax.training.api import load_data

    return load_data(config_io.override(gallery.run.config, args.overrides))


def _progress(label: str, total: int) -> contextlib.closing[terminal.Progress]:
    """Returns a progress bar over `total` clips, which closes at the end of a `with` block."""
    return contextlib.closing(terminal.Progress(total, unit="clip", label=label, leave=False))


def _embed(args: argparse.Namespace, gallery: "Gallery") -> tuple[float, "Vectors"]:
    """Returns the time just before embedding, in seconds, and the vectors of the flags' clips."""
    clips = _clips(args, gallery)
    began = time.monotonic()
    split = getattr(args, "split", None)
    with _progress("vectors", len(clips.split(split or "clips").clips)) as bar:
        return began, gallery.embed(clips, split, advance=bar.advance)


def _enrol(args: argparse.Namespace) -> Result:
    from vidjax.data.memory import MemoryClips, load_people

    if args.identity:  # a mistake is reported before clips are read
        check_person(args.identity)
    labels = _read_labels(Path(args.labels).expanduser()) if args.labels else {}
    gallery, strangers, split = _opened(args), args.strangers, args.split
    if args.labels:
        clips, identity = _clips(args, gallery), labels
    elif args.input and not args.identity and not strangers:
        path = Path(args.input).expanduser()
        if path.is_file() or any(path.glob("*.npz")):
            raise UserError(
                "enrol --input=PATH needs --identity=NAME: say who all these clips show\n"
                "or give a folder with a folder for each person: PATH/NAME/CLIP.npz"
            )
        widths, quality = gallery.reads
        clips, identity = load_people(path, widths, quality=quality)
    else:
        clips, identity = _clips(args, gallery), args.identity
    if args.clip:
        clips, split = gallery.embed(clips, split).only({args.clip}), None
        if not clips.names:
            raise UserError(f"--clip={args.clip}: no clip has this name")
    if isinstance(clips, MemoryClips) and not args.labels and not strangers:
        identity = _without_crowds(Path(args.input).expanduser(), clips.names, identity)
    with named(args.labels) if args.labels else contextlib.nullcontext():
        done = gallery.enrol(clips, identity, split=split, strangers=strangers)
    if refused := done.refused:
        shown = ", ".join(refused[:3]) + (" ..." if len(refused) > 3 else "")
        warn(f"{_of(len(refused), 'clip')} without a usable frame: not enrolled: {shown}")
    told = f"{_of(done.enrolled, 'clip')}, {done.unchanged:,} were there"
    return _counts(gallery, {"enrolled": told}, done._asdict())


def _without_crowds(
    path: Path, clips: Sequence[str], identity: str | Mapping[str, str]
) -> dict[str, str]:
    """Returns clip -> person, without photos of several people; warns of photos that do not help.

    Only `vidjax extract` tells photos from other clips. A clip named alone is taken as it is.
    """
    from vidjax.apps.video import features_folder

    people = dict.fromkeys(clips, identity) if isinstance(identity, str) else dict(identity)
    places = [path] if isinstance(identity, str) else sorted(path.iterdir())
    for place in (place for place in places if (place / features_folder.VIDEOS).is_dir()):
        prefix = "" if place == path else f"{place.name}/"
        for film in features_folder.read_films(place):
            film.tracks = [one for one in film.tracks if f"{prefix}{one.clip}" in people]
            alone, problem = features_folder.check_photo(film) if film.photo else ("", "")
            for track in film.tracks if alone is None else ():
                people.pop(f"{prefix}{track.clip}", None)
            if problem:
                warn(f"{place / film.video}: {problem}")
    return people


def _read_labels(path: Path) -> dict[str, str]:
    """Returns clip -> person of a table of groups; one that names nobody is a UserError."""
    if labels := answers_lib.read_groups(path):
        return labels
    raise UserError(
        f"{path} names nobody: replace '{answers_lib.UNKNOWN}1' and so on by names of people"
    )


def _group(args: argparse.Namespace) -> Result:
    out = Path(args.out).expanduser()
    tables.check_new(out, (".tsv",))
    gallery = _opened(args)
    _, vectors = _embed(args, gallery)
    nobody = set(vectors.names)
    if gallery.identities:
        answers = gallery.identify(vectors)
        nobody = {name for name, answer in answers.items() if answer.identity is None}
    groups = gallery.group(vectors.only(nobody))
    answers_lib.write_groups(out, groups)
    count = len({*groups.values()})
    told = {"clips": f"{len(vectors.names):,}, of which {len(nobody):,} show nobody known"}
    told |= {"people": f"{count:,} unknown", "groups": f"{out}: write names, then enrol --labels"}
    return Result({"groups": str(out), "people": count, "clips": len(groups)}, told)


def _films(args: argparse.Namespace) -> "list[Film]":
    from vidjax.apps.video import features_folder

    films = features_folder.read_films(Path(args.input).expanduser()) if args.input else []
    if not films:
        raise UserError(
            f"--out={args.out}: {args.command} needs times, which only features of vidjax extract "
            "have\nidentify writes a table of clips instead: --out=answers.tsv"
        )
    return films


def _identify(args: argparse.Namespace) -> Result:
    if found := bulk.tables_of(args.input or ""):
        return _by_table(args, found, answers_lib.Identify, k=args.k)
    out = Path(args.out).expanduser() if args.out else None
    films = None
    if out:
        tables.check_new(out, (*tables.ENDINGS, *appearances.FORMATS))
        films = _films(args) if out.suffix in appearances.FORMATS else None
    gallery = _opened(args)
    chosen = {"fpir": args.fpir, "threshold": args.threshold}
    gallery.rule(**chosen)  # a mistake is reported before vectors are made
    began, vectors = _embed(args, gallery)
    with _progress("identify", len(vectors.names)) as bar:
        found = gallery.identify(vectors, args.k, advance=bar.advance, **chosen)
    rule = gallery.rule(**chosen)
    timed = terminal.timing(began, len(found))
    named = sum(answer.identity is not None for answer in found.values())
    rows = {"clips": f"{len(found):,}", "named": f"{named:,}"}
    rows |= {"unknown": f"{len(found) - named:,}", **answers_lib.describe_rule(rule)}
    rows |= dict(timed[0])
    content = {"clips": len(found), "named": named, "rule": answers_lib.rule_as_json(rule)}
    content |= {"threshold": rule.found.to_dict() if rule.found else None} | timed[1]
    if out:
        if films:
            shown = appearances.find_appearances(appearances.settle_answers(found, films), films)
            appearances.write(out, shown, films)
        else:
            answers_lib.write(out, found)
        return Result(content | {"answers": str(out)}, rows | {"answers": str(out)})
    listed = [answers_lib.as_json(*pair) for pair in found.items()] if args.json else []
    return Result(content | {"answers": listed}, rows, "\n".join(answers_lib.table(found)))


def _by_table(
    args: argparse.Namespace, found: Sequence[Path], work: type[bulk.Work], **options: int
) -> Result:
    """Writes the results for every table of a folder into another folder."""
    bulk.check_out(args.out, found, work)
    gallery, rule = _opened(args), {"fpir": args.fpir, "threshold": args.threshold}
    gallery.rule(**rule)  # a mistake is reported before tables are read
    return bulk.run(found, args.out, work(lambda: gallery, **options, **rule))


def _rank(args: argparse.Namespace) -> Result:
    from vidjax.evaluation import ranking, topk

    if found := bulk.tables_of(args.input or ""):
        return _by_table(args, found, bulk.Rank)
    out = Path(args.out).expanduser()
    tables.check_new(out, (".txt", *tables.ENDINGS))
    gallery = _opened(args)
    chosen = {"fpir": args.fpir, "threshold": args.threshold}
    rule = gallery.rule(**chosen)  # a mistake is reported before vectors are made
    began, vectors = _embed(args, gallery)
    with _progress("rank", len(vectors.names)) as bar:
        ranked = gallery.rank(vectors, advance=bar.advance, **chosen)
    rule = None if rule.default else gallery.rule(**chosen)
    timed = terminal.timing(began, len(vectors.names))
    if out.suffix == ".txt":
        place = {clip: number for number, clip in enumerate(vectors.names)}
        index = np.full((len(ranked), topk.MAX_NAMES), topk.NO_CLIP)
        for row, clips in zip(index, ranked.values(), strict=True):
            row[: len(clips)] = [place[clip] for clip, _ in clips]
        text = ranking.to_text(out, [*ranked], vectors.names, topk.TopK(index, index))
        tables.write_new(out, text.encode())
    else:
        tables.write_ranking(out, ranked)
    rows = {
        "gallery": str(gallery.folder),
        "people": f"{len(gallery.identities):,}",
        "clips": f"{len(vectors.names):,}",
        **(answers_lib.describe_rule(rule) if rule else {}),
        **dict(timed[0]),
        "ranking": str(out),
    }
    content = {"ranking": str(out), "clips": len(vectors.names), **timed[1]}
    return Result(content | {"rule": answers_lib.rule_as_json(rule) if rule else None}, rows)


def _remove(args: argparse.Namespace) -> Result:
    gallery = _opened(args)
    count = gallery.remove(identity=args.identity, clip=args.clip)
    return _counts(gallery, {"removed": _of(count, "clip")}, {"removed": count})


def _rename(args: argparse.Namespace) -> Result:
    gallery = _opened(args)
    count = gallery.rename(args.identity, args.to, merge=args.merge)
    clips = _of(gallery.identities[normal_form(args.to)], "clip")
    told = f"{args.identity} is {args.to}, with {clips}"
    return _counts(gallery, {"renamed": told}, {"renamed": count})


def _relabel(args: argparse.Namespace) -> Result:
    gallery, identity = _opened(args), args.identity
    new = identity is not None and identity not in gallery
    before = gallery.relabel(args.clip, identity)
    gone = before is not None and before not in gallery
    told = f"{args.clip} showed {before or 'a stranger'}{', of whom no clip is left' * gone}"
    told += f"; it shows {identity or 'a stranger'}{', who is new' * new}"
    return _counts(gallery, {"relabelled": told}, {"clip": args.clip, "before": before})


def _list(args: argparse.Namespace) -> Result:
    from vidjax.apps.gallery.changes import known

    gallery = _opened(args)
    result = _counts(gallery)
    listed = gallery.identities
    if args.identity is not None:
        name = normal_form(args.identity)
        listed = {name: known("identity", name, listed)}
    content = {**result.content, "identities": listed}
    lines = [(name, f"{count:,}") for name, count in listed.items()]
    if args.clips:
        shown: dict[str, list[str]] = {name: [] for name in listed}
        for name, clip in sorted(gallery.clips.items()):
            if clip.identity in shown:
                shown[clip.identity].append(name)
        content |= {"clips": shown}
        lines = [(name, clip) for name, clips in shown.items() for clip in clips]
    text = "\n".join(f"  {line}" for line in messages.aligned(lines))
    return result._replace(content=content, text=text)


def _threshold(args: argparse.Namespace) -> Result:
    found = _opened(args).threshold(args.fpir)
    return Result(found.to_dict(), answers_lib.describe(found))


def _export(args: argparse.Namespace) -> Result:
    """Writes the enrolled clips to a table: clip, identity, and for each part a unit vector.

    The vectors are in the coordinates of the gallery, so a dot product is a cosine. The vector is 0
    if a clip lacks the part.
    """
    out = Path(args.out).expanduser()
    tables.check_new(out, (".parquet",))
    gallery = _opened(args)
    names = sorted(name for name, clip in gallery.clips.items() if clip.identity is not None)
    vectors = stack(names, gallery.clips, sum(gallery.backend.widths.values()))
    columns: dict[str, tuple[str, Sequence[object] | np.ndarray]] = {
        "clip": ("string", names),
        "identity": ("string", [gallery.clips[name].identity for name in names]),
    }
    whitened = gallery.backend.whiten(gallery.backend.split(vectors))
    for part, z in zip(gallery.backend.widths, whitened, strict=True):
        if part in columns:
            raise UserError(f"a part of the gallery is named '{part}', like a column of names")
        unit = z / np.linalg.norm(z, axis=1, keepdims=True)
        columns[part] = ("float32", np.nan_to_num(unit).astype(np.float32))
    with files.atomic_file(out) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(tables.to_parquet(tables.to_arrow(columns)))
    return Result(
        {"table": str(out), "clips": len(names)}, {"clips": f"{len(names):,}", "table": str(out)}
    )
