"""`vidjax rank`, `embed`, `score` and `compare`: rank new clips, and score rankings."""

import argparse
import time
from functools import partial
from pathlib import Path

from vidjax.apps import bulk
from vidjax.cli import shared_flags
from vidjax.utils import files, messages, tables, terminal
from vidjax.utils.errors import UserError
from vidjax.utils.messages import Result
from vidjax.utils.parser import Parser

READ_FIELDS = ("eval.split", "eval.checkpoint")


def add_rank_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax rank`."""
    _add_flags(parser, "the new file: .csv, .tsv, .jsonl or .parquet")
    parser.command(
        partial(_process, work=bulk.Rank),
        "--workdir=runs/mma --input=PATH --out=ranking.tsv",
        "--workdir=runs/mma --input=FOLDER --out=ranked",
    )


def add_embed_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax embed`."""
    _add_flags(parser, "the new file: .parquet, with the columns clip and vector")
    parser.command(
        partial(_process, work=bulk.Embed),
        "--workdir=runs/mma --input=PATH --out=vectors.parquet",
        "--workdir=runs/mma --input=FOLDER --out=vectors",
    )


def _add_flags(parser: Parser, out: str) -> None:
    shared_flags.add_workdir(parser)
    shared_flags.add_definitions(parser)
    about = "the clips: a folder, a .parquet table, a .npz file, or a folder of such tables"
    parser.flag("--input PATH", about, required=True)
    parser.flag("--out PATH", f"{out}; if the input is a folder of tables: a folder", required=True)
    parser.fields(example="eval.checkpoint=best")


def _process(args: argparse.Namespace, work: type[bulk.Rank | bulk.Embed]) -> Result:
    """Runs `vidjax rank` or `vidjax embed`: writes a ranking or vectors.

    `work` is `bulk.Rank` or `bulk.Embed`, a class that computes the results for a table of clips.
    """
    from vidjax.runs import config_io
    from vidjax.training import public

    if not files.is_present(args.input):
        raise UserError(f"--input={args.input} does not exist: name a file or a folder")
    overridden = config_io.check_overridden(args.overrides, READ_FIELDS, args.command)
    inputs, out = bulk.list_tables(args.input), Path()
    if "eval.split" in overridden and inputs:
        raise UserError(
            f"--config.eval.split has no effect, because --input={args.input} has no splits, only "
            "tables\nleave out --config.eval.split"
        )
    if inputs:
        bulk.check_out(args.out, inputs, work)
    else:
        out = tables.check_new(args.out, tables.ENDINGS if work is bulk.Rank else (".parquet",))
    settings = config_io.override(public.open_run(args.workdir).config, args.overrides).eval
    shared_flags.load_definitions(args)
    from vidjax.evaluation import predict

    trained = predict.restore(args.workdir, step=settings.checkpoint)
    if inputs:
        return Result(bulk.process_tables(inputs, args.out, work(lambda: trained)))
    clips = trained.load(args.input, settings.split if "eval.split" in overridden else None)
    began, size = time.monotonic(), len(clips.names)
    progress = terminal.Progress(size, unit="clip", label=args.command, leave=False, compiles=True)
    facts: dict[str, object] = {"workdir": str(trained.workdir), "num_clips": size}
    if work is bulk.Rank:
        facts |= {"num_identities": len(trained.identities), "ranking": str(out.absolute())}
        tables.write_ranking(out, trained.rank(clips, advance=progress.advance))
    else:
        vectors = trained.embed(clips, advance=progress.advance)
        facts |= {"width": vectors.shape[1], "vectors": str(out.absolute())}
        columns = {"clip": ("string", clips.names), "vector": ("float32", vectors)}
        files.write_bytes(out, tables.to_parquet(tables.to_arrow(columns)), replace=False)
    progress.close()
    return Result(facts | terminal.measure_rate(began, size))


def add_score_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax score`."""
    about = "the ground truth, with lines 'NAME.mp4 ID' or 'ID NAME.mp4 ...'"
    parser.add_argument("gt", metavar="GT", help=about)
    about = "the submission, with lines 'ID NAME.mp4 NAME.mp4 ...'"
    parser.add_argument("ranking", metavar="RANKING", help=about)
    parser.flag("--strict", "does not score a submission with faults")
    parser.command(score_files, "PATH/val_gt.txt runs/mma/ranking.txt")


def score_files(args: argparse.Namespace) -> Result:
    """Scores a submission file against a ground truth file. Prints the MAP@100 on the last line.

    If the scoring script of the iQIYI-VID challenge refuses a submission, so does this command.
    Other faults of the submission are printed as warnings. If `--strict` is given, they are errors.
    """
    from vidjax.evaluation import ranking

    positives = ranking.read_ground_truth(args.gt)
    submission = ranking.read_submission(args.ranking, positives=positives)
    for complaint in submission.complaints:
        messages.print_problem(f"{'error' if args.strict else 'warning'}: {complaint}")
    if args.strict and submission.complaints:
        return Result({"faults": submission.complaints}, code=2)
    for problem in ranking.list_mismatches(args.ranking, positives, submission.ranking):
        messages.print_problem(f"warning: {problem}")
    common = len(positives.keys() & submission.ranking.keys())
    value = ranking.score(positives, submission.ranking)
    clips = messages.count(sum(map(len, positives.values())), "clip")
    unknown = messages.count(len(submission.ranking) - common, "identity")
    text = (
        f"{args.gt}: {messages.count(len(positives), 'identity')}, {clips}\n"
        f"{args.ranking}: {common:,} of them ranked, {len(positives) - common:,} missing, "
        f"{unknown} unknown and ignored\n"
        f"MAP@{ranking.MAX_NAMES}\n{value:.17g}"
    )
    return Result({"map": value, "faults": submission.complaints}, text=text)


def add_compare_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax compare`."""
    about = "folders of runs; each is compared with the first. Folders that do not fit are left out"
    parser.add_argument("folders", metavar="RUN", nargs="*", help=about)
    about = (
        "the same as RUN, but an unsuitable folder is an error. A1+A2,B1+B2 compares means of "
        "several runs, e.g. with different seeds"
    )
    parser.flag("--runs A,B", about)
    parser.flag("--workdir FOLDER", "a folder for comparison.html, .json and .tex")
    parser.fields(example="eval.split=test")
    parser.command(
        compare_runs,
        "runs/*",
        "--workdir=runs/two --runs=runs/mma,runs/deepmef",
        "--workdir=runs/seeds --runs=runs/a1+runs/a2,runs/b1+runs/b2",
    )


def compare_runs(args: argparse.Namespace) -> Result:
    """Compares the MAP (mean average precision) of each run with the MAP of the first run."""
    from vidjax.evaluation import comparison
    from vidjax.runs import config as config_lib, config_io
    from vidjax.training import public

    overridden = config_io.check_overridden(args.overrides, ("eval.split",), args.command)
    config = config_io.override(config_lib.default(), args.overrides)
    split = config.eval.split if overridden else None
    if bool(args.folders) == bool(args.runs):
        args.parser.error("compare needs folders of runs: either RUN RUN ... or --runs=A,B")
    groups = comparison.split_groups(args.runs or "")
    groups += [[name] for name in comparison.select_comparable([*map(str, args.folders)], split)]
    result = public.compare(groups, out=args.workdir, split=split)
    width = messages.measure_width()
    lines, facts = [result.text(width)], {"table": result.text(), **result.to_dict()}
    if args.workdir:
        page = f"{messages.relative_path(args.workdir)}/comparison.html"
        facts = {"comparison": page, **facts}
        lines.append(f"comparison: {page}, .json, .tex")
    else:
        lines += result.config_lines(width)
    return Result(facts, text="\n".join(lines))
