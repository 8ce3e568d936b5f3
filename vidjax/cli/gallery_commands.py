"""`vidjax gallery COMMAND`: enrols, identifies and deletes people."""

import argparse
import contextlib
import functools
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vidjax.apps import bulk
from vidjax.apps.gallery import answers as answers_lib, card_notes, verification
from vidjax.apps.gallery.answers import Rule
from vidjax.apps.gallery.changes import find_person
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import Store
from vidjax.apps.gallery.vectors import Vectors
from vidjax.apps.video import clip_inputs, naming, subtitles
from vidjax.data.clips import SPLITS
from vidjax.data.dataset import Dataset
from vidjax.utils import messages, tables, terminal
from vidjax.utils.errors import UserError, warn
from vidjax.utils.machine import num_cores
from vidjax.utils.messages import Result
from vidjax.utils.names import normal_form, show
from vidjax.utils.parser import Parser, describe, whole_number

MOST_RIVALS = 3  # clips that seem to show another person and are named in a warning
Facts = Mapping[str, object]  # of a result, as in `Result`
EMPTY: Facts = {}
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
        command = commands.add_parser(name, **describe(about))
        command.add_argument("gallery", metavar="G", help="the folder of the gallery")
        command.later = add


def _add_create(parser: Parser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    parser.flag("--run W", "the folder of a run", of=model)
    about = "instead of --run: the folder of the nets with which vidjax extract makes features"
    parser.flag("--models DIR", about, of=model)
    parser.flag("--empty", "leaves out the people of the run and their clips, but stores strangers")
    about = "the split whose unlabelled clips become strangers (default: the evaluated split)"
    parser.flag("--strangers S", about)
    parser.fields("data.", example="data.dir=PATH")
    parser.command(_create, "G --run=runs/plda", "G --models=models")


def _add_clips(parser: Parser, **options: Any) -> "argparse._MutuallyExclusiveGroup":  # noqa: ANN401
    """Adds the flags that name clips, such as `--input`; returns the group of these flags.

    The flags of the group exclude each other. `options` are options of the flag `--input`.
    """
    clips = parser.add_mutually_exclusive_group(required=True)
    about = "clips: a folder, a .parquet table or a .npz file"
    parser.flag("--input PATH", about + "; may be repeated" * bool(options), of=clips, **options)
    about = "instead of --input: a split of the dataset, such as val"
    parser.flag("--split S", about, of=clips, choices=SPLITS)
    parser.flag("--run W", "the folder of the gallery's run, if the run was moved")
    parser.fields("data.", example="data.dir=PATH")
    return clips


def add_rule(parser: Parser) -> None:
    """Adds the flags `--fpir` and `--threshold`, which decide when a clip gets a name."""
    rule = (parser.programs or parser).add_mutually_exclusive_group()
    about = "the share of strangers who may wrongly get a name, e.g. 0.01"
    parser.flag("--fpir R", about, of=rule, type=_number)
    about = "instead of --fpir: the lowest probability of a name, e.g. 0.9"
    parser.flag("--threshold P", about, of=rule, type=_number)


def _number(text: str) -> float:
    hint = ""
    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(ValueError):
        hint = f": write {float(text.removesuffix('%')) / 100:g}"
    raise argparse.ArgumentTypeError(f"'{text}' is not a number{hint}")


def _add_enrol(parser: Parser) -> None:
    clips = _add_clips(parser, action="append")
    about = "instead of --input: photos of the people, DIR/NAME/PHOTO.jpg or DIR/NAME.jpg"
    parser.flag("--photos DIR", about, of=clips)
    about = "with --photos: the folder of nets (default: the folder that made the gallery)"
    parser.flag("--models DIR", about)
    who = parser.add_mutually_exclusive_group()
    parser.flag("--identity NAME", "the person whom all clips show", of=who)
    parser.flag("--clip CLIP", "enrols only this clip of the input")
    about = (
        "a table with the columns clip and identity: .csv, .tsv, .jsonl or .parquet, such as "
        "labels.csv of a dataset, the answers of identify, or the table of group"
    )
    parser.flag("--labels FILE", about, of=who)
    about = "enrols the clips as examples of people who must not get a name"
    parser.flag("--strangers", about, of=who)
    parser.command(
        _enrol, "G --input=PATH --identity=Ada", "G --input=PATH --clip=CLIP --identity=Ada",
        "G --input=people.parquet --labels=labels.csv", "G --photos=friends --models=models",
    )  # fmt: skip


def _add_identify(parser: Parser) -> None:
    _add_clips(parser)
    add_rule(parser)
    most = answers_lib.NUM_TABLE_PEOPLE
    about = f"possible people per clip (default: %(default)s); the printed table has up to {most}"
    parser.flag("--k K", about, type=whole_number(1, 1_000_000), default=5)
    about = (
        "the new file: .jsonl, .csv, .tsv or .parquet; for features of vidjax extract also .vtt, "
        ".srt or .rttm; if the input is a folder of tables: a folder"
    )
    parser.flag("--out FILE", about)
    examples = ("G --input=PATH --fpir=0.01", "G --split=val --threshold=0.5 --out=answers.csv")
    parser.command(_identify, *examples)


def _add_verify(parser: Parser) -> None:
    _add_clips(parser)
    person = parser.add_mutually_exclusive_group()
    parser.flag("--identity NAME", "the person whom the clips may show", of=person)
    about = (
        "instead of --identity: clips that may show the same person as the clips of --input; "
        "without both flags, the clips of --input are compared with each other"
    )
    parser.flag("--with PATH", about, of=person, dest="others")
    about = "the share of other people's clips that may be accepted (default: "
    parser.flag("--fmr R", f"{about}{verification.DEFAULT_FMR})", type=_number)
    parser.flag("--out FILE", "the new file: .jsonl, .csv, .tsv or .parquet")
    parser.command(_verify, "G --identity=Ada --input=PATH", "G --input=a.npz --with=b.npz")


def _add_group(parser: Parser) -> None:
    _add_clips(parser)
    parser.flag("--out FILE", "the new file: .tsv", required=True)
    parser.command(_group, "G --input=features --out=groups.tsv")


def _add_rank(parser: Parser) -> None:
    _add_clips(parser)
    add_rule(parser)
    about = "the new file: .txt, .jsonl, .csv, .tsv or .parquet; if the input is a folder of "
    parser.flag("--out FILE", f"{about}tables: a folder", required=True)
    parser.command(_rank, "G --split=val --out=ranking.txt")


def _add_list(parser: Parser) -> None:
    parser.flag("--clips", "lists the clips of each person")
    parser.flag("--identity NAME", "lists only this person")
    parser.command(_list, "G", "G --clips --identity=Ada")


def _add_rename(parser: Parser) -> None:
    parser.flag("--identity NAME", "the present name", required=True)
    parser.flag("--to NAME", "the new name", required=True)
    parser.flag("--merge", "if another person already has the new name, merges the two")
    parser.command(_rename, "G --identity=Adda --to=Ada")


def _add_relabel(parser: Parser) -> None:
    parser.flag("--clip NAME", "the clip", required=True)
    who = parser.add_mutually_exclusive_group(required=True)
    parser.flag("--identity NAME", "the person whom the clip shows", of=who)
    parser.flag("--strangers", "the clip shows a stranger, who must not get a name", of=who)
    parser.command(_relabel, "G --clip=NAME --identity=Ada", "G --clip=NAME --strangers")


def _add_remove(parser: Parser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    parser.flag("--identity NAME", "deletes this person and all their clips", of=what)
    parser.flag("--clip NAME", "deletes only this clip", of=what)
    parser.command(_remove, "G --identity=Ada")


def _add_threshold(parser: Parser) -> None:
    about = "the share of strangers who may wrongly get a name (default: %(default)s)"
    parser.flag("--fpir R", about, type=_number, default=answers_lib.DEFAULT_FPIR)
    parser.command(_threshold, "G --fpir=0.01")


# Command -> its description, and the function that adds its flags.
COMMANDS: Mapping[str, tuple[str, Callable[[Parser], None]]] = {
    "create": ("makes a gallery of the people of a run, or an empty one for nets", _add_create),
    "enrol": ("enrols clips of new people, or more clips of enrolled people", _add_enrol),
    "identify": ("names the person in each clip, or answers unknown", _add_identify),
    "verify": ("decides if clips show a person, or if two clips show one person", _add_verify),
    "group": ("groups the clips of unknown people, so that you can name them", _add_group),
    "rank": (
        "ranks the clips for every person; with --fpir or --threshold, leaves out clips that get "
        "no name",
        _add_rank,
    ),
    "list": ("lists the people, with their numbers of clips", _add_list),
    "rename": ("gives a person another name", _add_rename),
    "relabel": ("moves an enrolled clip to another person, or to the strangers", _add_relabel),
    "remove": ("deletes a person or a clip; this cannot be undone", _add_remove),
    "threshold": ("prints the threshold that few strangers reach", _add_threshold),
}


def _summarise(gallery: Gallery, facts: Facts = EMPTY, texts: Facts = EMPTY) -> Result:
    now = {
        "gallery": str(gallery.folder),
        "people": len(gallery.identities),
        "clips": sum(gallery.identities.values()),
        "strangers": len(gallery.strangers),
        "version": gallery.version,
    }
    return Result({**facts, **now}, texts)


def _create(args: argparse.Namespace) -> Result:
    Store(args.gallery).check_new()
    if args.models:
        _refuse(args, "with --models", "strangers", "overrides")
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


def _refuse(args: argparse.Namespace, why: str, *names: str, remedy: str = "leave it out") -> None:
    """Raises UserError if one of the flags `names` is given, because it has no effect.

    `why` says in which case, such as "with --models". `remedy` is what the user should do. The name
    `overrides` stands for the flags --config.FIELD.
    """
    for name in names:
        if given := getattr(args, name):
            flag = given[0] if name == "overrides" else f"--{name}"
            raise UserError(f"{flag} has no effect {why}: {remedy}")


def _open(args: argparse.Namespace) -> Gallery:
    """Opens the gallery of a command. Raises UserError if the clips of `--input` cannot be used."""
    given = getattr(args, "input", None)
    if given:
        _refuse(args, "with --input", "overrides")
    gallery = Gallery(args.gallery, run=getattr(args, "run", None))
    if isinstance(given, Path):  # for enrol, it is a list, and the inputs are checked later
        clip_inputs.check_input(gallery, given)
    return gallery


def _load_split(args: argparse.Namespace, gallery: Gallery) -> Dataset:
    from vidjax.runs import config_io
    from vidjax.training.public import load_data

    return load_data(config_io.override(gallery.run.config, args.overrides))


def _embed(args: argparse.Namespace, gallery: Gallery) -> tuple[float, Vectors]:
    """Loads the clips of a command, and computes their embeddings.

    Returns the value of `time.monotonic()` after loading, and the embeddings.
    """
    clips = gallery.load(args.input) if args.input else _load_split(args, gallery)
    return time.monotonic(), clip_inputs.embed(gallery, clips, args.split)


def _open_for_names(args: argparse.Namespace) -> tuple[Gallery, dict[str, Any], Rule]:
    """Opens the gallery of a command, and reads `--fpir` and `--threshold`.

    Returns the gallery, the values of the two flags, and the rule by which a clip gets a name. A
    mistake in a flag is reported here, before clips are read.
    """
    gallery, chosen = _open(args), {"fpir": args.fpir, "threshold": args.threshold}
    return gallery, chosen, gallery.rule(**chosen)


def _enrol(args: argparse.Namespace) -> Result:
    if args.photos:
        return _enrol_photos(args)
    _refuse(args, "without --photos", "models")
    labels = clip_inputs.read_labels(args.labels) if args.labels else None
    # A folder of tables is replaced by its tables.
    inputs = [x for path in args.input or () for x in bulk.list_tables(path) or [path]]
    gallery = _open(args)

    def begin(number: int, given: object) -> None:
        place = f"{number:,} of {len(inputs):,}: " if len(inputs) > 1 else ""
        if isinstance(given, Path) and (place or given.stat().st_size > LARGE_BYTES):
            terminal.say(f"{place}{show(str(given))} ...")

    done = clip_inputs.enrol(
        gallery, inputs or [_load_split(args, gallery)], labels or args.identity,
        split=args.split, clip=args.clip, strangers=args.strangers, source=str(args.labels or ""),
        begin=begin,
    )  # fmt: skip
    if done.refused:
        count = messages.count(len(done.refused), "clip")
        names = messages.list_some(done.refused, 3)
        warn(f"{count} not enrolled, because no frame is usable: {names}")
    rivals = [f"'{show(clip)}' seems to show '{show(x)}'" for clip, x in done.rivals.items()]
    if rivals:
        more = "; ..., see --json" * (len(rivals) > MOST_RIVALS)
        terminal.say(
            f"clips that may have a wrong name: {'; '.join(rivals[:MOST_RIVALS])}{more}\n"
            "if the name is wrong: vidjax gallery relabel; if one person has two names: vidjax "
            "gallery rename --merge",
            warning=True,
        )
    inputs_read = {"inputs": len(inputs)} if len(inputs) > 1 else {}
    return _show_enrolled(gallery, msgspec.structs.asdict(done), "clip", inputs_read)


def _show_enrolled(gallery: Gallery, done: Mapping[str, Any], noun: str, texts: Facts) -> Result:
    """Returns what an enrolment prints. May warn of a problem, see `card_notes.warn`.

    `done` are values for JSON. `noun` is the word for the enrolled things, such as "face". `texts`
    are further lines of the summary.
    """
    card_notes.warn(gallery.state)
    enrolled = f"{messages.count(done['enrolled'], noun)}, {done['unchanged']:,} enrolled before"
    return _summarise(gallery, done, {"enrolled": enrolled, "unchanged": "", **texts})


def _enrol_photos(args: argparse.Namespace) -> Result:
    """Enrols the photos of a folder. The exit code is 1 if a photo is not enrolled."""
    from vidjax.apps.video import photos

    remedy = (
        "leave it out. The names of people are the names of folders and photos: "
        "FOLDER/NAME/PHOTO.jpg or FOLDER/NAME.jpg"
    )
    _refuse(args, "with --photos", "overrides", "run")
    _refuse(args, "with --photos", "clip", "identity", "labels", "strangers", remedy=remedy)
    gallery = _open(args)
    models = clip_inputs.find_models(gallery, args.models)
    workers, tell = num_cores(), terminal.print_note
    done = photos.enrol_folder(gallery, args.photos, models, workers, tell)
    facts, texts = done._asdict(), messages.describe_failed(done.failed)
    facts["failed"] = [*done.failed]
    return _show_enrolled(gallery, facts, "face", texts)._replace(code=1 if done.failed else 0)


def _group(args: argparse.Namespace) -> Result:
    out = tables.check_new(args.out, (".tsv",))
    gallery = _open(args)
    films = clip_inputs.read_films(args.input)
    _, vectors = _embed(args, gallery)
    groups = clip_inputs.group_unknown(gallery, vectors, films)
    answers_lib.write_groups(out, groups)
    people, num_faces, text = answers_lib.count_unknown(groups.values())
    facts = {"clips": len(vectors.names), "groups": str(out), "unknown": len(groups)}
    texts = {
        "unknown": f"{text} in {messages.count(len(groups), 'clip')}",
        "groups": f"{out}: write names into it, then enrol --labels={shlex.quote(str(out))}",
    }
    hidden = {"people": people, "unclear": num_faces}
    return Result(facts | hidden, texts | dict.fromkeys(hidden, ""))


def _identify(args: argparse.Namespace) -> Result:
    if done := _process_tables(args, answers_lib.Identify, k=args.k):
        return done
    films = clip_inputs.read_films(args.input)
    out = args.out and tables.check_new(args.out, (*tables.ENDINGS, *subtitles.FORMATS))
    has_times = bool(out) and out.suffix in subtitles.FORMATS
    if has_times and not films:
        raise UserError(
            f"--out={out} needs the times of clips: only features of vidjax extract have times\n"
            "to write a table without times: --out=answers.tsv"
        )
    gallery, chosen, rule = _open_for_names(args)
    began, vectors = _embed(args, gallery)
    with terminal.show_clips("identify", len(vectors.names)) as bar:
        identify = functools.partial(gallery.identify, k=args.k, advance=bar.advance, **chosen)
        answers = clip_inputs.name_clips(gallery, vectors, films, identify).answers
    timed = terminal.measure_rate(began, len(answers))
    named = sum(answer.identity is not None for answer in answers.values())
    facts = {"clips": len(answers), "named": named, "unknown": len(answers) - named}
    rule = gallery.rule(**chosen)  # films may show that the net separates people
    facts |= rule.to_entries() | timed
    texts = rule.describe(answers_lib.count_doubtful(answers))
    texts["card"] = card_notes.describe(gallery.state)
    if out and has_times:
        subtitles.write(out, naming.find_appearances(answers, films), films)
    elif out:
        answers_lib.write(out, answers)
    listed = map(answers_lib.as_json, answers, answers.values())
    rows = () if out else answers_lib.table(answers)
    return Result({**facts, "answers": out or listed}, texts, rows)


def _verify(args: argparse.Namespace) -> Result:
    out = args.out and tables.check_new(args.out)
    gallery = _open(args)
    rule = gallery.match_rule(args.identity, fmr=args.fmr)  # a mistake is reported early
    others = None if args.others is None else gallery.embed(gallery.load(args.others))
    _, vectors = _embed(args, gallery)
    facts, misfits, identity = dict[str, object](), dict[str, float](), ""
    if args.identity is not None:
        identity = normal_form(args.identity)
        matches, rule, misfits = gallery.verify_person(vectors, identity, fmr=args.fmr)
        facts = {"identity": identity, "misfits": misfits}
    else:
        matches = gallery.compare(vectors, others, fmr=args.fmr)
    accepted = sum(match.accepted for match in matches.values())
    facts |= {"comparisons": len(matches), "accepted": accepted, "rule": rule.to_dict()}
    texts = {"identity": show(identity), **rule.describe()}
    if none := sum(not match.evidence for match in matches.values()):
        texts["not compared"] = f"{none:,}, without a usable modality in common: give others"
    if misfits:
        texts["does not fit"] = (
            f"{messages.list_some([*misfits], 3)}: unlike the other clips of the person. To move "
            "or delete a clip: vidjax gallery relabel, vidjax gallery remove"
        )
    texts["card"] = card_notes.describe(gallery.state)
    if out:
        verification.write(out, matches, identity)
    listed = (verification.as_json(*pair, identity) for pair in matches.items())
    rows = () if out else verification.table(matches)
    return Result({**facts, "answers": out or listed}, texts, rows)


def _process_tables(
    args: argparse.Namespace, work: type[bulk.TableTask], **options: int
) -> Result | None:
    """Ranks or identifies the clips of each parquet table in the folder `--input`.

    Returns None if `--input` is no folder of tables. `work` is the class that makes the results of
    a table. `options` are arguments of `work`, in addition to `--fpir` and `--threshold`.
    """
    inputs = bulk.list_tables(args.input) if args.input else []
    if not inputs:
        return None
    bulk.check_out(args.out, inputs, work)
    gallery, chosen, rule = _open_for_names(args)
    task = work(lambda: gallery, **options, **chosen)
    done = bulk.process_tables(inputs, args.out, task)
    if rule.default and work is bulk.Rank:
        return Result(done)
    texts = rule.describe(getattr(task, "num_doubtful", 0))
    return Result(done | rule.to_entries(), texts | {"card": card_notes.describe(gallery.state)})


def _rank(args: argparse.Namespace) -> Result:
    if done := _process_tables(args, bulk.Rank):
        return done
    out = tables.check_new(args.out, (".txt", *tables.ENDINGS))
    gallery, chosen, rule = _open_for_names(args)
    began, vectors = _embed(args, gallery)
    with terminal.show_clips("rank", len(vectors.names)) as bar:
        ranked = gallery.rank(vectors, advance=bar.advance, **chosen)
    timed = terminal.measure_rate(began, len(vectors.names))
    if out.suffix == ".txt":
        from vidjax.evaluation import ranking

        ranking.write_lists(out, ranked)
    else:
        tables.write_ranking(out, ranked)
    facts = {"ranking": str(out), "people": len(gallery.identities), "clips": len(vectors.names)}
    if rule.default:
        return Result(facts | timed | {"rule": None, "threshold": None})
    return Result(facts | timed | rule.to_entries(), rule.describe())


def _remove(args: argparse.Namespace) -> Result:
    gallery = _open(args)
    count = gallery.remove(identity=args.identity, clip=args.clip)
    return _summarise(gallery, {"removed": count}, {"removed": messages.count(count, "clip")})


def _rename(args: argparse.Namespace) -> Result:
    gallery = _open(args)
    count = gallery.rename(args.identity, args.to, merge=args.merge)
    clips = messages.count(gallery.identities[normal_form(args.to)], "clip")
    text = f"{args.identity} is {args.to}, with {clips}"
    return _summarise(gallery, {"renamed": count}, {"renamed": text})


def _relabel(args: argparse.Namespace) -> Result:
    gallery, identity = _open(args), args.identity
    new = identity is not None and identity not in gallery
    before = gallery.relabel(args.clip, identity)
    gone = before is not None and before not in gallery
    text = f"{args.clip} showed {before or 'a stranger'}{', of whom no clip is left' * gone}"
    text += f"; it shows {identity or 'a stranger'}{', who is new' * new}"
    texts = {"clip": text, "before": ""}
    return _summarise(gallery, {"clip": args.clip, "before": before}, texts)


def _list(args: argparse.Namespace) -> Result:
    gallery = _open(args)
    people = gallery.people
    if args.identity is not None:
        people = {normal_form(args.identity): find_person(args.identity, people)}
    result = _summarise(gallery, {"identities": {name: len(x) for name, x in people.items()}})
    if args.clips:
        rows = [(name, clip) for name, clips in people.items() for clip in clips]
        return result._replace(facts={**result.facts, "clips": people}, rows=rows)
    return result._replace(rows=[(name, f"{len(clips):,}") for name, clips in people.items()])


def _threshold(args: argparse.Namespace) -> Result:
    threshold = _open(args).threshold(args.fpir)
    facts = threshold.to_dict()
    return Result(facts, dict.fromkeys(facts, "") | threshold.describe())
