"""`vidjax score`: prints the MAP@100 of a submission file."""

import argparse
from collections.abc import Mapping, Sequence

from vidjax.data.untrusted.names import show
from vidjax.utils import messages
from vidjax.utils.messages import Parser, Result


def add_flags(parser: Parser) -> None:
    """Adds the flags of `vidjax score`."""
    about = "the ground truth, with lines 'NAME.mp4 ID' or 'ID NAME.mp4 ...'"
    parser.add_argument("gt", metavar="GT", help=about)
    about = "the submission, with lines 'ID NAME.mp4 NAME.mp4 ...'"
    parser.add_argument("ranking", metavar="RANKING", help=about)
    about = "does not score a submission with faults"
    parser.add_argument("--strict", action="store_true", help=about)
    parser.command(score_files, "PATH/val_gt.txt runs/mma/ranking.txt")


def score_files(args: argparse.Namespace) -> Result:
    """Scores a submission file against a ground truth file. Prints the MAP@100 on the last line.

    Faults of the submission are printed as warnings. If `--strict` is given, they are errors.
    """
    from vidjax.evaluation import ranking

    positives = ranking.read_ground_truth(args.gt)
    submission = ranking.read_submission(args.ranking, identities=positives)
    for complaint in submission.complaints:
        messages.print_problem(f"{'error' if args.strict else 'warning'}: {complaint}")
    if args.strict and submission.complaints:
        return Result({"faults": submission.complaints}, code=2)
    _warn_if_nothing_matches(args.ranking, positives, submission.ranking)
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


def _warn_if_nothing_matches(
    path: str, positives: Mapping[str, Sequence[str]], ranking: Mapping[str, Sequence[str]]
) -> None:
    """Warns if the score is 0 because the submission has no identity or clip of the ground truth.

    `path` is the file of the submission. `positives` and `ranking` are identity -> clips.
    """
    if positives.keys().isdisjoint(ranking):
        messages.print_problem(
            f"warning: {path} lists no identity of the ground truth: compare the identities of both"
        )
    true_clips = {clip for clips in positives.values() for clip in clips}
    ranked_clips = {clip for clips in ranking.values() for clip in clips}
    if true_clips.isdisjoint(ranked_clips):
        messages.print_problem(
            f"warning: {path} lists no clip of the ground truth: compare the names of clips. The "
            f"ground truth has '{show(min(true_clips))}', the submission "
            f"'{show(min(ranked_clips, default='no clip'))}'"
        )
