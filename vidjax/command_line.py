"""The words of a command: flags, overrides of fields, help, and what a misspelt word may mean."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from vidjax import config as config_lib
from vidjax.suggest import closest, suggest

FLAGS = ("--config", "--workdir", "--mode", "--runs", "--input", "--out", "--debug", "--help")
PROGRAM = "python -m vidjax.main"

MODES = {
    "train": "trains a system, evaluates it, writes a report; needs --config",
    "evaluate": "ranks a split with a trained run, or with several joined",
    "rank": "ranks new clips with a trained run, into a file with scores",
    "compare": "says how far apart runs are, and how sure that is",
    "report": "writes report.html anew, from the files of a run",
    "check": "reads everything and changes nothing: environment, data, results",
}
DESCRIPTION = """\
Identify people in video: train a system on frame features, rank the clips of
every identity.

modes:
""" + "".join(f"  {mode:8}  {text}\n" for mode, text in MODES.items())
EXAMPLES = """\
examples:
  a result in a minute, on synthetic clips
    {program} --config=configs/mma.py
  train on official files
    {program} --config=configs/mma.py:iqiyi_vid \\
        --config.data.dir=PATH
  rank another split with a trained run
    {program} --mode=evaluate --workdir=runs/mma \\
        --config.eval.split=test
  rank new clips: a folder of features, or a table
    {program} --mode=rank --workdir=runs/mma \
        --input=PATH --out=ranking.tsv
  rank a split with two runs together
    {program} --mode=evaluate --workdir=runs/both \\
        --runs=runs/mma,runs/deepmef
  is the second run better than the first?
    {program} --mode=compare --workdir=runs/two \\
        --runs=runs/mma,runs/deepmef
  is everything in order, in a run or in data to train on?
    {program} --mode=check --workdir=runs/mma
    {program} --mode=check --config=configs/mma.py:iqiyi_vid \\
        --config.data.dir=PATH

Configurations, their arguments and all fields: configs/README.md.
"""


class Arguments(NamedTuple):
    """The words of a command, sorted by flag.

    Attributes:
      mode: `train` or another key of MODES.
      config: `FILE[:ARG,...]` of `--config`, None without the flag.
      workdir: the folder of `--workdir`, None without the flag.
      runs: the text of `--runs`, None without the flag.
      input: the folder or table of `--input`, None without the flag.
      out: the file of `--out`, None without the flag.
      overrides: words that begin with `--config.`, each with its value.
      command: the whole command, which repeats the run.
    """

    mode: str
    config: str | None
    workdir: str | None
    runs: str | None
    input: str | None
    out: str | None
    overrides: tuple[str, ...]
    command: str

    @property
    def folders(self) -> list[str]:
        """The folders that `--runs` names."""
        return [name.strip() for name in (self.runs or "").split(",") if name.strip()]


def parse(words: Sequence[str]) -> Arguments:
    """Returns the words of a command, sorted by flag.

    Raises:
      ValueError: an unknown flag or mode, a word without a flag, or a flag without its value.
    """
    own, overrides = split_overrides(words)
    for word in own:
        _check_flag(word.partition("=")[0])
    args, strays = make_parser().parse_known_args(own)
    if strays:
        raise ValueError(f"stray word '{strays[0]}'{_hint_for_stray(strays[0], args.runs)}")
    if args.mode not in MODES:
        raise ValueError(f"no mode '{args.mode}': {suggest(args.mode, MODES)}")
    if args.workdir == "":
        raise ValueError("--workdir= is empty: name a folder")
    for flag, value in {"--input": args.input, "--out": args.out}.items():
        if value is not None and args.mode != "rank":
            raise ValueError(f"{flag} goes with --mode=rank, not --mode={args.mode}")
    return Arguments(
        mode=args.mode,
        config=args.config,
        workdir=args.workdir,
        runs=args.runs,
        input=args.input,
        out=args.out,
        overrides=tuple(overrides),
        command=shlex.join([*PROGRAM.split(), *words]),
    )


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits words into those of the flags and those that override fields of the configuration.

    Args:
      words: the words of a command; a value may follow its field as a separate word.

    Returns:
      The words of the flags, and words such as `--config.seed=1`.
    """
    own, overrides = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--config."):
            own.append(word)
        elif "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(f"{word}={rest.pop(0)}")
        else:
            overrides.append(word)
    return own, overrides


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the usage and exit
        raise ValueError(message)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags, which also prints the help."""
    program = "vidjax" if Path(sys.argv[0]).name == "vidjax" else PROGRAM
    indent = " " * len(f"usage: {program} ")
    parser = _Parser(
        prog=program,
        usage=f"{program} [--mode=M] [--config=FILE[:ARG,...]] [--workdir=W]\n"
        f"{indent}[--runs=A,B] [--input=PATH --out=FILE]\n"
        f"{indent}[--config.FIELD=VALUE ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES.format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--mode", metavar="M", default="train", help="what to do, one of the above (default: train)"
    )
    parser.add_argument(
        "--config", metavar="FILE[:ARG,...]", help="an experiment of configs/, or its name"
    )
    parser.add_argument(
        "--workdir", metavar="W", help="the run's folder (default of train: runs/NAME)"
    )
    parser.add_argument("--runs", metavar="A,B", help="folders of runs, to join or to compare")
    parser.add_argument(
        "--input", metavar="PATH", help="the clips to rank: a folder, or a .parquet table"
    )
    parser.add_argument("--out", metavar="FILE", help="the new file: .tsv, .jsonl or .parquet")
    # For the help alone: `split_overrides` takes these words.
    parser.add_argument(
        "--config.FIELD",
        metavar="VALUE",
        default=argparse.SUPPRESS,
        help="overrides a field, e.g. --config.seed=1",
    )
    parser.add_argument("--debug", action="store_true", help="shows tracebacks")
    return parser


def _check_flag(flag: str) -> None:
    """Raises ValueError for a flag that does not exist."""
    if not flag.startswith("-") or flag in (*FLAGS, "-h"):
        return
    name = flag.lstrip("-")
    match = closest(f"--{name}", FLAGS)
    if not match and (field := closest(name, dict(config_lib.fields(config_lib.default())))):
        match = f"--config.{field}"
    hint = f": did you mean {match}?" if match else "; --help lists them"
    raise ValueError(f"no flag {flag}{hint}")


def _hint_for_stray(word: str, runs: str | None) -> str:
    if runs is not None and runs.endswith(","):
        return f": no blank after a comma, --runs={runs}{word}"
    if word in MODES:
        return f": did you mean --mode={word}?"
    if word.partition(":")[0].endswith(".py"):
        return f": did you mean --config={word}?"
    return "; --help lists the flags"
