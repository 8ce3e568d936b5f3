"""`vidjax gallery COMMAND`: enrols, identifies and deletes people."""

import argparse
import contextlib
import functools
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from vidjax.apps import bulk
from vidjax.apps.gallery import answers as answers_lib, card_notes, verification
from vidjax.apps.gallery.changes import check_person
from vidjax.apps.gallery.enrolment import stack_vectors
from vidjax.apps.video import faces, naming, subtitles
from vidjax.cli import enrol_inputs
from vidjax.runs import terminal
from vidjax.utils import files, messages, tables
from vidjax.utils.errors import UserError, prefix_errors, warn
from vidjax.utils.machine import num_cores
from vidjax.utils.messages import Result
from vidjax.utils.names import normal_form, show, strip_ending
from vidjax.utils.parser import Parser, whole_number

if TYPE_CHECKING:
    from vidjax.apps.features_folder import MediaFile
    from vidjax.apps.gallery.gallery import Gallery
    from vidjax.apps.gallery.labelling import Enrolment
    from vidjax.apps.gallery.vectors import Vectors
    from vidjax.data.dataset import Dataset
    from vidjax.data.memory import MemoryClips

MOST_RIVALS = 3  # clips that seem to show another person, with a warning each
LARGE_BYTES = 10 << 20  # of a table whose name is printed before it is read

HELP = """\
A gallery stores people. Enrolling, identifying and deleting need no training.

--input=PATH reads clips without labels from a folder, a table or a .npz file.
--split=S reads the clips of a split, such as val, of the dataset of the run.
To read another dataset, add --config.data.name=N and --config.data.dir=D. A
clip shows a single person. `enrol G --input=PATH` without a name expects a
folder for each person, PATH/NAME/CLIP.npz, or a table with the column identity.

vidjax gallery COMMAND --help prints the flags of a command, with an example.
The guide is vidjax/apps/gallery/README.md.
"""


def add_gallery_flags(parser: Parser) -> None:
    """Adds the commands of `vidjax gallery` and their flags."""
    parser.description = HELP
    parser.example = "vidjax gallery identify G --input=PATH"
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True
    )
    for name, (about, add) in COMMANDS.items():
        description = f"{about[0].upper()}{about[1:]}."
        command = commands.add_parser(name, help=about, description=description)
        command.add_argument("gallery", metavar="G", help="the folder of the gallery")
        add(command)


def _add_create(parser: Parser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", metavar="W", help="the folder of a run")
    about = "instead of --run: the folder of the nets with which vidjax extract makes features"
    model.add_argument("--models", metavar="DIR", help=about)
    about = "leaves out the people of the run and their clips, but stores strangers"
    parser.add_argument("--empty", action="store_true", help=about)
    about = (
        "the split whose unlabelled clips are stored as strangers (default: the split that the "
        "run evaluates)"
    )
    parser.add_argument("--strangers", metavar="S", help=about)
    parser.fields("data.", example="data.dir=PATH")
    parser.command(_create, "G --run=runs/plda", "G --models=models")


def _add_clips(parser: Parser, *, several: bool = False) -> "argparse._MutuallyExclusiveGroup":
    """Adds the flags that name clips; returns their group. `several` lets --input be repeated."""
    clips = parser.add_mutually_exclusive_group(required=True)
    about = "clips: a folder, a .parquet table or a .npz file"
    about += "; may be repeated" if several else ""
    action = "append" if several else "store"
    clips.add_argument("--input", metavar="PATH", help=about, action=action)
    about = "instead of --input: a split of the dataset, such as val"
    clips.add_argument("--split", metavar="S", help=about)
    about = "the folder of the gallery's run, if the run was moved"
    parser.add_argument("--run", metavar="W", help=about)
    parser.fields("data.", example="data.dir=PATH")
    return clips


def add_rule(parser: Parser) -> None:
    """Adds the flags `--fpir` and `--threshold`, which decide when a clip gets a name."""
    rule = parser.add_mutually_exclusive_group()
    about = "the share of strangers who may wrongly get a name, e.g. 0.01"
    rule.add_argument("--fpir", metavar="R", type=_number, help=about)
    about = "instead of --fpir: the lowest probability at which a clip gets a name, e.g. 0.9"
    rule.add_argument("--threshold", metavar="P", type=_number, help=about)


def _number(text: str) -> float:
    hint = ""
    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(ValueError):
        hint = f": write {float(text.removesuffix('%')) / 100:g}"
    raise argparse.ArgumentTypeError(f"'{text}' is not a number{hint}")


def _add_enrol(parser: Parser) -> None:
    clips = _add_clips(parser, several=True)
    about = (
        "instead of --input: the folder of photos of the people, DIR/NAME/PHOTO.jpg or DIR/NAME.jpg"
    )
    clips.add_argument("--photos", metavar="DIR", help=about)
    about = "with --photos: the folder of nets (default: the folder that made the gallery)"
    parser.add_argument("--models", metavar="DIR", help=about)
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--identity", metavar="NAME", help="the person whom all clips show")
    about = "enrols only this clip of the input"
    parser.add_argument("--clip", metavar="CLIP", help=about)
    about = (
        "a table with the columns clip and identity: .csv, .tsv, .jsonl or .parquet, such as "
        "labels.csv of a dataset, the answers of identify, or the table of group"
    )
    who.add_argument("--labels", metavar="FILE", help=about)
    about = "enrols the clips as examples of people who must not get a name"
    who.add_argument("--strangers", action="store_true", help=about)
    parser.command(
        _enrol, "G --input=PATH --identity=Ada", "G --input=PATH --clip=CLIP --identity=Ada",
        "G --input=people.parquet --labels=labels.csv", "G --photos=friends --models=models",
    )  # fmt: skip


def _add_identify(parser: Parser) -> None:
    _add_clips(parser)
    add_rule(parser)
    most = answers_lib.NUM_TABLE_PEOPLE
    about = f"possible people per clip (default: %(default)s); the printed table has up to {most}"
    parser.add_argument("--k", metavar="K", type=whole_number(1, 1_000_000), default=5, help=about)
    about = (
        "the new file: .jsonl, .csv, .tsv or .parquet; for features of vidjax extract also .vtt, "
        ".srt or .rttm; if the input is a folder of tables: a folder"
    )
    parser.add_argument("--out", metavar="FILE", help=about)
    examples = ("G --input=PATH --fpir=0.01", "G --split=val --threshold=0.5 --out=answers.csv")
    parser.command(_identify, *examples)


def _add_verify(parser: Parser) -> None:
    _add_clips(parser)
    person = parser.add_mutually_exclusive_group()
    person.add_argument("--identity", metavar="NAME", help="the person whom the clips may show")
    about = (
        "instead of --identity: clips that may show the same person as the clips of --input; "
        "without both flags, the clips of --input are compared with each other"
    )
    person.add_argument("--with", metavar="PATH", dest="others", help=about)
    about = (
        "the share of other people's clips that may be accepted (default: "
        f"{verification.DEFAULT_FMR})"
    )
    parser.add_argument("--fmr", metavar="R", type=_number, help=about)
    about = "the new file: .jsonl, .csv, .tsv or .parquet"
    parser.add_argument("--out", metavar="FILE", help=about)
    parser.command(_verify, "G --identity=Ada --input=PATH", "G --input=a.npz --with=b.npz")


def _add_group(parser: Parser) -> None:
    _add_clips(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="the new file: .tsv")
    parser.command(_group, "G --input=features --out=groups.tsv")


def _add_rank(parser: Parser) -> None:
    _add_clips(parser)
    add_rule(parser)
    about = (
        "the new file: .txt, .jsonl, .csv, .tsv or .parquet; if the input is a folder of tables: "
        "a folder"
    )
    parser.add_argument("--out", metavar="FILE", required=True, help=about)
    parser.command(_rank, "G --split=val --out=ranking.txt")


def _add_list(parser: Parser) -> None:
    parser.add_argument("--clips", action="store_true", help="lists the clips of each person")
    parser.add_argument("--identity", metavar="NAME", help="lists only this person")
    parser.command(_list, "G", "G --clips --identity=Ada")


def _add_rename(parser: Parser) -> None:
    parser.add_argument("--identity", metavar="NAME", required=True, help="the present name")
    parser.add_argument("--to", metavar="NAME", required=True, help="the new name")
    about = "if another person already has the new name, merges the two"
    parser.add_argument("--merge", action="store_true", help=about)
    parser.command(_rename, "G --identity=Adda --to=Ada")


def _add_relabel(parser: Parser) -> None:
    parser.add_argument("--clip", metavar="NAME", required=True, help="the clip")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--identity", metavar="NAME", help="the person whom the clip shows")
    about = "the clip shows a stranger, who must not get a name"
    who.add_argument("--strangers", action="store_true", help=about)
    parser.command(_relabel, "G --clip=NAME --identity=Ada", "G --clip=NAME --strangers")


def _add_remove(parser: Parser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--identity", metavar="NAME", help="deletes this person and all their clips")
    what.add_argument("--clip", metavar="NAME", help="deletes only this clip")
    parser.command(_remove, "G --identity=Ada")


def _add_threshold(parser: Parser) -> None:
    about = "the share of strangers who may wrongly get a name (default: %(default)s)"
    default = answers_lib.DEFAULT_FPIR
    parser.add_argument("--fpir", metavar="R", type=_number, default=default, help=about)
    parser.command(_threshold, "G --fpir=0.01")


def _add_export(parser: Parser) -> None:
    parser.add_argument("--out", metavar="FILE", required=True, help="the new file: .parquet")
    parser.command(_export, "G --out=people.parquet")


def _add_migrate(parser: Parser) -> None:
    about = (
        "a gallery that was created with other nets, --models, or with another --run and --empty"
    )
    parser.add_argument("new", metavar="NEW", help=about)
    about = "features of the clips of G for NEW: a folder, a .parquet table or a .npz file"
    parser.add_argument("--input", metavar="PATH", required=True, help=about)
    parser.command(_migrate, "G NEW --input=features")


# Command -> its description, and the function that adds its flags.
COMMANDS: Mapping[str, tuple[str, Callable[[Parser], None]]] = {
    "create": (
        "makes a gallery of the people of a run, or an empty one for features of vidjax extract",
        _add_create,
    ),
    "enrol": ("enrols clips of new people, or more clips of enrolled people", _add_enrol),
    "identify": ("names the person in each clip, or answers unknown", _add_identify),
    "verify": (
        "decides if clips show a given person, or if two clips show the same person",
        _add_verify,
    ),
    "group": ("groups the clips of unknown people, so that you can name them", _add_group),
    "rank": (
        "ranks the clips for every person; with --fpir or --threshold, leaves out clips that get "
        "no name",
        _add_rank,
    ),
    "list": ("lists the people, with their numbers of clips", _add_list),
    "rename": ("gives a person another name", _add_rename),
    "relabel": ("moves an enrolled clip to another person, or to the strangers", _add_relabel),
    "migrate": ("enrols the people of a gallery in a gallery of other nets", _add_migrate),
    "remove": ("deletes a person or a clip; this cannot be undone", _add_remove),
    "threshold": (
        "prints the probability at which a given share of strangers would get a name",
        _add_threshold,
    ),
    "export": ("writes a parquet table of the enrolled clips: names, people, vectors", _add_export),
}


def _summarise(
    gallery: "Gallery",
    changes: Mapping[str, str] = MappingProxyType({}),
    content: Mapping[str, object] = MappingProxyType({}),
) -> Result:
    sizes = {
        "people": len(gallery.identities),
        "clips": sum(gallery.identities.values()),
        "strangers": len(gallery.strangers),
        "version": gallery.version,
    }
    rows = {**changes, "gallery": str(gallery.folder)} | {k: f"{n:,}" for k, n in sizes.items()}
    return Result({**content, "gallery": str(gallery.folder), **sizes}, rows)


def _create(args: argparse.Namespace) -> Result:
    from vidjax.apps.gallery.creation import check_new
    from vidjax.apps.gallery.gallery import Gallery

    check_new(Path(args.gallery))
    if args.models:
        if ignored := ["--strangers"] if args.strangers else args.overrides:
            raise UserError(f"{ignored[0]} has no effect with --models: leave it out")
        return _summarise(Gallery.of_models(args.gallery, args.models))
    from vidjax.evaluation import predict  # loads JAX, which only galleries of runs need
    from vidjax.runs import config_io
    from vidjax.training.public import load_data, open_run

    open_run(args.run)  # if it is no run, the error gives a remedy
    run = predict.restore_run(args.run)
    config = config_io.override(run.config, args.overrides)
    data = None if config == run.config else load_data(config)
    gallery = Gallery.create(args.gallery, run, data, strangers=args.strangers, empty=args.empty)
    return _summarise(gallery)


def _open(args: argparse.Namespace) -> "Gallery":
    """Opens the gallery of a command. Raises UserError if `--input` or `--split` is wrong."""
    from vidjax.apps import features_folder
    from vidjax.apps.gallery.gallery import Gallery
    from vidjax.data.clips import SPLITS
    from vidjax.data.memory import check_path, find_files

    given = getattr(args, "input", None) or []  # a list for enrol
    paths = [Path(x).expanduser() for x in ([given] if isinstance(given, str) else given)]
    if paths and args.overrides:
        raise UserError(f"{args.overrides[0]} has no effect with --input: leave it out")
    people = args.command == "enrol" and not (args.identity or args.labels or args.strangers)
    for path in paths:
        if people or bulk.list_tables(path):
            check_path(path)
        else:
            root, found = find_files(path)
            is_flat = isinstance(found, Mapping) or all(file.parent == root for file in found)
            if args.command == "enrol" and args.identity and not is_flat:
                raise UserError(
                    f"'{path}' contains folders of clips, which may show several people\n"
                    "leave out --identity if a folder is a person, or name each folder: --input=DIR"
                )
    if (split := getattr(args, "split", None)) and split not in SPLITS:
        raise UserError(f"--split={split}: choose from {', '.join(SPLITS)}")
    gallery = Gallery(args.gallery, run=getattr(args, "run", None))
    for path in paths if gallery.origin.cards else ():
        features_folder.check_models(path, gallery.origin.cards)
    return gallery


def _load_clips(args: argparse.Namespace, gallery: "Gallery") -> "MemoryClips | Dataset":
    if args.input:
        return gallery.load(args.input)
    from vidjax.runs import config_io
    from vidjax.training.public import load_data

    return load_data(config_io.override(gallery.run.config, args.overrides))


def _show_progress(label: str, total: int) -> contextlib.closing[terminal.Progress]:
    return contextlib.closing(terminal.Progress(total, unit="clip", label=label, leave=False))


def _embed(args: argparse.Namespace, gallery: "Gallery") -> tuple[float, "Vectors"]:
    """Returns the time when the clips were loaded, and the embeddings of the clips."""
    clips = _load_clips(args, gallery)
    return time.monotonic(), _embed_clips(args, gallery, clips)


def _embed_clips(
    args: argparse.Namespace, gallery: "Gallery", clips: "MemoryClips | Dataset"
) -> "Vectors":
    with _show_progress("vectors", len(clips.split(args.split or "clips").clips)) as bar:
        return gallery.embed(clips, args.split, advance=bar.advance)


def _enrol(args: argparse.Namespace) -> Result:
    from vidjax.apps.gallery.labelling import check_given

    if args.photos:
        return _enrol_photos(args)
    if args.models:
        raise UserError("--models has no effect without --photos: leave it out")
    if args.identity:  # a mistake is reported before clips are read
        check_person(args.identity)
    labels = enrol_inputs.read_labels(Path(args.labels).expanduser()) if args.labels else None
    inputs = enrol_inputs.list_inputs(args.input or ())
    args.input = [*map(str, inputs)]
    several = len(inputs) > 1
    if args.clip and several:
        raise UserError(f"--clip={args.clip} is a clip of one input: give --input once")
    with enrol_inputs.hint_at_photos(inputs):
        gallery, names, done = _open(args), set[str](), []
    for number, path in enumerate(inputs or [None], 1):
        place = f"{number:,} of {len(inputs):,}: " if several else ""
        if path and (place or path.stat().st_size > LARGE_BYTES):
            terminal.say(f"{place}{show(str(path))} ...")
        with enrol_inputs.hint_at_photos([path] if path else []):
            vectors, identity = _embed_people(args, gallery, path, labels, several=several)
        names |= {*vectors.names}
        if identity != {} or not several:
            waiting = [vectors]
            del vectors  # so that `enrol` can free the memory of a large table
            done.append(_enrol_vectors(args, gallery, waiting, identity))
    if labels and several:
        check_given(labels, names, args.labels)
    if not done:
        raise UserError(
            f"no clip in {args.input[0]} and the other inputs has a person\n"
            "add a column identity to the tables, or --labels=FILE"
        )
    return _describe_enrolment(args, gallery, done)


def _enrol_vectors(
    args: argparse.Namespace,
    gallery: "Gallery",
    waiting: "list[Vectors]",
    identity: str | Mapping[str, str] | None,
) -> "Enrolment":
    """Takes vectors out of the list `waiting`, and enrols them for a person or for clip -> person.

    If `identity` is None, the vectors contain the people.
    """
    errors = prefix_errors(args.labels) if args.labels else contextlib.nullcontext()
    with _show_progress("enrol", len(waiting[0].names)) as bar, errors:
        return gallery.enrol(
            waiting.pop(), identity, strangers=args.strangers,
            source=args.labels or "identities", advance=bar.advance,
        )  # fmt: skip


def _embed_people(
    args: argparse.Namespace,
    gallery: "Gallery",
    path: Path | None,
    labels: Mapping[str, str] | None,
    *,
    several: bool,
) -> "tuple[Vectors, str | Mapping[str, str] | None]":
    """Returns the vectors of an input or a split, and the person of all clips or of each clip.

    If there are `several` inputs, only the labels of this input are returned, and may be {}.
    """
    identity: str | Mapping[str, str] | None = labels or args.identity
    if path is None:
        clips = _load_clips(args, gallery)
    elif identity is None and not args.strangers:
        clips, identity = enrol_inputs.load_people(path, gallery, required=not several)
    else:
        clips = gallery.load(path)
    vectors = _embed_clips(args, gallery, clips)
    del clips
    if args.clip:
        clip = strip_ending(args.clip)
        vectors = vectors.only({name for name in vectors.names if strip_ending(name) == clip})
        if not vectors.names:
            raise UserError(f"--clip={args.clip}: no clip has this name: name a clip of the input")
    if isinstance(identity, Mapping) and (args.clip or several):
        known = {*map(strip_ending, vectors.names)}
        identity = {name: who for name, who in identity.items() if strip_ending(name) in known}
    if path and identity and not args.clip:
        enrol_inputs.check_seen_together(_read_films(path), identity, vectors.names)
    return vectors, identity


def _describe_enrolment(
    args: argparse.Namespace, gallery: "Gallery", done: "Sequence[Enrolment]"
) -> Result:
    refused = [clip for part in done for clip in part.refused]
    if refused:
        count, names = messages.count(len(refused), "clip"), messages.list_some(refused, 3)
        warn(f"not enrolled: {count} without a usable frame, {names}")
    card_notes.warn(gallery.state)
    enrolled, unchanged = sum(x.enrolled for x in done), sum(x.unchanged for x in done)
    similar = {name: other for part in done for name, other in part.similar.items()}
    rivals = {clip: person for part in done for clip, person in part.rivals.items()}
    for clip, other in [*rivals.items()][:MOST_RIVALS]:
        terminal.say(
            f"'{show(clip)}' seems to show '{show(other)}', but was enrolled as another person\n"
            "if the clip is wrong: vidjax gallery relabel; if the two are one person: vidjax "
            "gallery rename --merge",
            warning=True,
        )
    if len(rivals) > MOST_RIVALS:
        text = f"{len(rivals):,} clips seem to show another enrolled person: --json lists them"
        terminal.say(text, warning=True)
    rows = {"inputs": f"{len(args.input):,}"} if len(args.input) > 1 else {}
    rows["enrolled"] = f"{messages.count(enrolled, 'clip')}, {unchanged:,} enrolled before"
    content = {"enrolled": enrolled, "unchanged": unchanged, "refused": refused}
    return _summarise(gallery, rows, content | {"similar": similar, "rivals": rivals})


def _enrol_photos(args: argparse.Namespace) -> Result:
    """Enrols the photos of a folder. If a photo is not enrolled, the exit code is 1."""
    from vidjax.apps.video import people_photos

    for flag in ("clip", "identity", "labels", "strangers", "run"):
        if getattr(args, flag):
            raise UserError(
                f"--{flag} has no effect with --photos: leave it out. The names of people are the "
                "names of folders and photos: FOLDER/NAME/PHOTO.jpg or FOLDER/NAME.jpg"
            )
    if args.overrides:
        raise UserError(f"{args.overrides[0]} has no effect with --photos: leave it out")
    args.input, people = [], Path(args.photos).expanduser()
    gallery = _open(args)
    models = enrol_inputs.check_models(gallery, args.models)
    done = people_photos.enrol_folder(gallery, people, models, num_cores())
    card_notes.warn(gallery.state)
    count = messages.count(done.enrolled, "face")
    rows = {"enrolled": f"{count}, {done.unchanged:,} enrolled before"}
    if done.failed:
        rows["not used"] = f"{len(done.failed):,}: {messages.list_some(sorted(done.failed), 3)}"
    rows |= messages.list_remedies(done.failed)
    content = done._asdict() | {"failed": [*done.failed]}
    return _summarise(gallery, rows, content)._replace(code=1 if done.failed else 0)


def _group(args: argparse.Namespace) -> Result:
    out = Path(args.out).expanduser()
    tables.check_new(out, (".tsv",))
    gallery = _open(args)
    films = _read_films(args.input)
    _, vectors = _embed(args, gallery)
    num_clips, answers, enrolled = len(vectors.names), {}, set[str]()
    if films:
        said = faces.read_for(gallery, films)
        tracks = naming.name_tracks(gallery, vectors, films, gallery.identify, said=said)
        answers, known = tracks.answers, tracks.told
        enrolled = {*known}
    elif gallery.identities:
        answers = gallery.identify(vectors)
    named = {name for name, answer in answers.items() if answer.identity is not None}
    vectors = vectors.only({*vectors.names} - named - enrolled)
    if films and gallery.origin.cards:
        groups = naming.group_unknown(gallery, vectors, films)
        groups = naming.mark_unclear(groups, films)
    else:
        groups = gallery.group(vectors)
    answers_lib.write_groups(out, groups)
    people, num_faces, text = answers_lib.count_unknown(groups.values())
    rows = {
        "clips": f"{num_clips:,}",
        "unknown": f"{text} in {messages.count(len(groups), 'clip')}",
        "groups": f"{out}: write names into it, then enrol --labels={shlex.quote(str(out))}",
    }
    content = {"groups": str(out), "clips": num_clips}
    content |= {"people": people, "unclear": num_faces, "unknown": len(groups)}
    return Result(content, rows)


def _read_films(path: str | Path | None) -> "list[MediaFile]":
    """Reads the descriptions of films in the input `path`; returns [] for other clips."""
    from vidjax.apps import features_folder

    folder = Path(path or "").expanduser()
    if folder.suffix == ".npz":  # the features of one film
        folder = folder.parent
    is_extracted = path and (folder / features_folder.NAME).exists()
    return features_folder.read_media_files(folder) if is_extracted else []


def _identify(args: argparse.Namespace) -> Result:
    if args.input and (inputs := bulk.list_tables(args.input)):
        return _process_tables(args, inputs, answers_lib.Identify, k=args.k)
    out, films = Path(args.out).expanduser() if args.out else None, _read_films(args.input)
    has_times = out is not None and out.suffix in subtitles.FORMATS
    if out:
        tables.check_new(out, (*tables.ENDINGS, *subtitles.FORMATS))
    if has_times and not films:
        raise UserError(
            f"--out={out} is a file with times, and only features of vidjax extract have times\n"
            "to write a table without times: --out=answers.tsv"
        )
    gallery = _open(args)
    chosen = {"fpir": args.fpir, "threshold": args.threshold}
    rule = gallery.rule(**chosen)  # a mistake is reported before vectors are made
    began, vectors = _embed(args, gallery)
    with _show_progress("identify", len(vectors.names)) as bar:
        identify = functools.partial(gallery.identify, k=args.k, advance=bar.advance, **chosen)
        if films:  # as `vidjax who` names them
            said = faces.read_for(gallery, films)
            named = naming.name_tracks(gallery, vectors, films, identify, said=said)
            answers = named.answers
        else:
            answers = identify(vectors)
    timed = terminal.measure_rate(began, len(answers))
    named = sum(answer.identity is not None for answer in answers.values())
    rows = {"clips": f"{len(answers):,}", "named": f"{named:,}"}
    rows |= {"unknown": f"{len(answers) - named:,}", **answers_lib.describe_rule(rule)}
    rows |= answers_lib.describe_doubtful(rule, answers_lib.count_doubtful(answers))
    rows |= _describe_card(gallery) | timed[0]
    content = {"clips": len(answers), "named": named}
    content |= _describe_rule(rule) | timed[1]
    if out:
        if has_times:
            subtitles.write(out, naming.find_appearances(answers, films), films)
        else:
            answers_lib.write(out, answers)
        return Result(content | {"answers": str(out)}, rows | {"answers": str(out)})
    listed = [answers_lib.as_json(*pair) for pair in answers.items()] if args.json else []
    return Result(content | {"answers": listed}, rows, "\n".join(answers_lib.table(answers)))


def _verify(args: argparse.Namespace) -> Result:
    out = Path(args.out).expanduser() if args.out else None
    if out:
        tables.check_new(out, tables.ENDINGS)
    gallery = _open(args)
    rule = gallery.match_rule(args.identity, fmr=args.fmr)  # a mistake is reported early
    others = None if args.others is None else gallery.embed(gallery.load(args.others))
    _, vectors = _embed(args, gallery)
    content: dict[str, object] = {}
    rows, misfits, identity = dict[str, str](), dict[str, float](), ""
    if args.identity is not None:
        identity = normal_form(args.identity)
        matches, rule, misfits = gallery.verify_person(vectors, identity, fmr=args.fmr)
        content, rows = {"identity": identity, "misfits": misfits}, {"person": show(identity)}
    else:
        matches = gallery.compare(vectors, others, fmr=args.fmr)
    accepted = sum(match.accepted for match in matches.values())
    rows |= {"compared": f"{len(matches):,}", "accepted": f"{accepted:,}", **rule.describe()}
    if none := sum(not match.evidence for match in matches.values()):
        rows["not compared"] = (
            f"{none:,}, without a usable frame of a modality that both sides have: give other clips"
        )
    if misfits:
        rows["does not fit"] = (
            f"{messages.list_some([*misfits], 3)}: unlike most other clips of the person. To move "
            "or delete a clip: vidjax gallery relabel, vidjax gallery remove"
        )
    rows |= _describe_card(gallery)
    content |= {"comparisons": len(matches), "accepted": accepted, "rule": rule.to_dict()}
    if out:
        verification.write(out, matches, identity)
        return Result(content | {"answers": str(out)}, rows | {"answers": str(out)})
    pairs = matches.items() if args.json else ()
    listed = [verification.as_json(*pair, identity) for pair in pairs]
    text = "\n".join(verification.table(matches))
    return Result(content | {"answers": listed}, rows, text)


def _describe_card(gallery: "Gallery") -> dict[str, str]:
    note = card_notes.describe(gallery.state)
    return {"card": "; ".join(note.splitlines())} if note else {}


def _describe_rule(rule: answers_lib.NamingRule) -> dict[str, object]:
    threshold = rule.threshold.to_dict() if rule.threshold else None
    return {"rule": answers_lib.convert_rule_to_json(rule), "threshold": threshold}


def _process_tables(
    args: argparse.Namespace, inputs: Sequence[Path], work: type[bulk.TableTask], **options: int
) -> Result:
    bulk.check_out(args.out, inputs, work)
    gallery, chosen = _open(args), {"fpir": args.fpir, "threshold": args.threshold}
    rule = gallery.rule(**chosen)  # a mistake is reported before tables are read
    task = work(lambda: gallery, **options, **chosen)
    done = bulk.process_tables(inputs, args.out, task)
    if rule.default and work is bulk.Rank:
        return done
    doubtful = task.num_doubtful if isinstance(task, answers_lib.Identify) else 0
    rows = {**answers_lib.describe_rule(rule), **answers_lib.describe_doubtful(rule, doubtful)}
    rows |= {**done.rows, **_describe_card(gallery)}
    return done._replace(content={**done.content, **_describe_rule(rule)}, rows=rows)


def _rank(args: argparse.Namespace) -> Result:
    from vidjax.evaluation import ranking, topk

    if args.input and (inputs := bulk.list_tables(args.input)):
        return _process_tables(args, inputs, bulk.Rank)
    out = Path(args.out).expanduser()
    tables.check_new(out, (".txt", *tables.ENDINGS))
    gallery = _open(args)
    chosen = {"fpir": args.fpir, "threshold": args.threshold}
    rule = gallery.rule(**chosen)  # a mistake is reported before vectors are made
    began, vectors = _embed(args, gallery)
    with _show_progress("rank", len(vectors.names)) as bar:
        ranked = gallery.rank(vectors, advance=bar.advance, **chosen)
    timed = terminal.measure_rate(began, len(vectors.names))
    if out.suffix == ".txt":
        clip_index = {clip: number for number, clip in enumerate(vectors.names)}
        index = np.full((len(ranked), topk.MAX_NAMES), topk.NO_CLIP)
        for row, clips in zip(index, ranked.values(), strict=True):
            row[: len(clips)] = [clip_index[clip] for clip, _ in clips]
        text = ranking.to_text(out, [*ranked], vectors.names, topk.TopK(index, index))
        tables.write_new(out, text.encode())
    else:
        tables.write_ranking(out, ranked)
    rows = {
        "gallery": str(gallery.folder),
        "people": f"{len(gallery.identities):,}",
        "clips": f"{len(vectors.names):,}",
        **({} if rule.default else answers_lib.describe_rule(rule)),
        **timed[0],
        "ranking": str(out),
    }
    content = {"ranking": str(out), "clips": len(vectors.names), **timed[1]}
    content |= {"people": len(gallery.identities), "rule": None, "threshold": None}
    return Result(content if rule.default else content | _describe_rule(rule), rows)


def _remove(args: argparse.Namespace) -> Result:
    gallery = _open(args)
    count = gallery.remove(identity=args.identity, clip=args.clip)
    return _summarise(gallery, {"removed": messages.count(count, "clip")}, {"removed": count})


def _rename(args: argparse.Namespace) -> Result:
    gallery = _open(args)
    count = gallery.rename(args.identity, args.to, merge=args.merge)
    clips = messages.count(gallery.identities[normal_form(args.to)], "clip")
    text = f"{args.identity} is {args.to}, with {clips}"
    return _summarise(gallery, {"renamed": text}, {"renamed": count})


def _relabel(args: argparse.Namespace) -> Result:
    gallery, identity = _open(args), args.identity
    new = identity is not None and identity not in gallery
    before = gallery.relabel(args.clip, identity)
    gone = before is not None and before not in gallery
    text = f"{args.clip} showed {before or 'a stranger'}{', of whom no clip is left' * gone}"
    text += f"; it shows {identity or 'a stranger'}{', who is new' * new}"
    return _summarise(gallery, {"relabelled": text}, {"clip": args.clip, "before": before})


def _migrate(args: argparse.Namespace) -> Result:
    """Copies the people of a gallery. If a person has no clip left, the exit code is 1."""
    from vidjax.apps import features_folder
    from vidjax.apps.gallery.gallery import Gallery
    from vidjax.apps.gallery.migration import migrate
    from vidjax.data.clips import SPLITS
    from vidjax.data.memory import load_people

    old, new = Gallery(args.gallery), Gallery(args.new)
    path, (widths, quality) = Path(args.input).expanduser(), new.source.reads
    features_folder.check_models(path, new.origin.cards)
    inside = {x.parent.name for x in path.glob("[!.]*/*.npz")}
    if inside - {*SPLITS} and not any(path.glob("[!.]*.npz")):
        clips = load_people(path, widths, quality=quality, nets=new.origin.cards)[0]
    else:
        clips = new.load(path)
    done = migrate(old, new, clips)
    # `gallery migrate` knows no times and boxes, so it cannot match faces as `vidjax who` does.
    tracks = {track.clip for film in _read_films(args.input) for track in film.tracks}
    numbered = sorted(x for x in tracks & old.clips.keys() if re.search(r"\.[tf]\d+$", x))
    if numbered:
        terminal.say(
            f"clips with the number of a face: {len(numbered):,}, such as {show(numbered[0])}. "
            "Another detector may have given this number to another person's face\n"
            "if the detector has changed, create NEW again with features by the old detector",
            warning=True,
        )
    rows = {"moved": f"{messages.count(done.moved, 'clip')}, {done.unchanged:,} moved before"}
    if done.relabelled:
        name, person = min(done.relabelled.items())
        rows["another person"] = (
            f"{messages.count(len(done.relabelled), 'clip')}, such as {show(name)}: G replaces "
            f"{show(person)}"
        )
    if done.missing:
        rows["no features"] = f"{messages.count(len(done.missing), 'clip')}: "
        rows["no features"] += messages.list_some(done.missing, 3)
    if done.lost:
        rows["no clip left"] = f"{len(done.lost):,}: {messages.list_some(done.lost)}"
    return _summarise(new, rows, done._asdict())._replace(code=1 if done.lost else 0)


def _list(args: argparse.Namespace) -> Result:
    from vidjax.apps.gallery.changes import find_enrolled

    gallery = _open(args)
    result = _summarise(gallery)
    listed = gallery.identities
    if args.identity is not None:
        name = normal_form(args.identity)
        listed = {name: find_enrolled("identity", name, listed)}
    content = {**result.content, "identities": listed}
    lines = [(name, f"{count:,}") for name, count in listed.items()]
    if args.clips:
        clips_of: dict[str, list[str]] = {name: [] for name in listed}
        for name, clip in sorted(gallery.clips.items()):
            if clip.identity in clips_of:
                clips_of[clip.identity].append(name)
        content |= {"clips": clips_of}
        lines = [(name, clip) for name, clips in clips_of.items() for clip in clips]
    text = "\n".join(f"  {line}" for line in messages.align_columns(lines))
    return result._replace(content=content, text=text)


def _threshold(args: argparse.Namespace) -> Result:
    threshold = _open(args).threshold(args.fpir)
    return Result(threshold.to_dict(), answers_lib.describe(threshold))


def _export(args: argparse.Namespace) -> Result:
    """Writes a table of the enrolled clips: name, identity, and a unit vector per modality.

    The vector of a missing modality is 0. If a run without PLDA made the gallery, a clip has only
    one vector.
    """
    out = Path(args.out).expanduser()
    tables.check_new(out, (".parquet",))
    gallery = _open(args)
    names = sorted(name for name, clip in gallery.clips.items() if clip.identity is not None)
    vectors = stack_vectors(names, gallery.clips, sum(gallery.backend.widths.values()))
    columns: dict[str, tuple[str, Sequence[object] | np.ndarray]] = {
        "clip": ("string", names),
        "identity": ("string", [gallery.clips[name].identity for name in names]),
    }
    whitened = gallery.backend.whiten(gallery.backend.split(vectors))
    for part, z in zip(gallery.backend.widths, whitened, strict=True):
        if part in columns:
            raise UserError(
                f"'{gallery.folder}' has vectors named '{part}', like a column of the table\n"
                "export the gallery in another format: vidjax export G --format=numpy --to=DIR"
            )
        unit = z / np.linalg.norm(z, axis=1, keepdims=True)
        columns[part] = ("float32", np.nan_to_num(unit).astype(np.float32))
    with files.atomic_file(out) as file:
        files.hide(Path(file.name))
        file.write(tables.to_parquet(tables.to_arrow(columns)))
    rows = {"clips": f"{len(names):,}", "table": str(out)}
    return Result({"table": str(out), "clips": len(names)}, rows)
