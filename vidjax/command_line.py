"""The words of a command: flags, overrides of fields, help, and what a misspelt word may mean."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vidjax import config as config_lib
from vidjax import config_io
from vidjax.cluster import share
from vidjax.config import ABBREVIATIONS, closest_field
from vidjax.errors import UserError, closest, suggest
from vidjax.messages import PROGRAM, Parser

if TYPE_CHECKING:
    from vidjax.run.parts import Shard

FLAGS = (
    "--config",
    "--workdir",
    "--mode",
    "--runs",
    "--shard",
    *share.FLAGS,
    "--input",
    "--out",
    "--quiet",
    "--json",
    "--debug",
    "--version",
    "--help",
)
# Flags of other programs -> the words that do the same here.
ELSEWHERE = {
    "dry_run": "--mode=check",
    "validate": "--mode=check",
    "print": "--mode=config",
    "print_config": "--mode=config",
    "show_config": "--mode=config",
    "cfg": "--mode=config",
    "eval": "--mode=evaluate",
    "evaluate_only": "--mode=evaluate",
    "test": "--mode=evaluate --config.eval.split=test",
    "predict": "--mode=rank",
    "inference": "--mode=rank",
    "identify": "vidjax gallery identify",
    "enrol": "vidjax gallery enrol",
    "gallery": "vidjax gallery COMMAND, before all flags",
    "export": "vidjax gallery export",
    "output": "--workdir",
    "output_dir": "--workdir",
    "out_dir": "--workdir",
    "logdir": "--workdir",
    "log_dir": "--workdir",
    "save_dir": "--workdir",
    "name": "--workdir",
    "verbose": "--debug",
    "silent": "--quiet",
    "q": "--quiet",
    "V": "--version",
    "gpu": "the variable CUDA_VISIBLE_DEVICES=0",
    "gpus": "the variable CUDA_VISIBLE_DEVICES=0",
    "device": "the variable JAX_PLATFORMS=cpu",
    "devices": "the variable CUDA_VISIBLE_DEVICES=0",
    "cpu": "the variable JAX_PLATFORMS=cpu",
    "no_cuda": "the variable JAX_PLATFORMS=cpu",
    "resume": "the same command again: a run goes on by itself",
    "force": "another --workdir: a run is never overwritten",
    "overwrite": "another --workdir: a run is never overwritten",
}

MODES = {
    "train": "trains a system, evaluates it, writes a report; needs --config",
    "evaluate": "ranks a split with a trained run, or with several joined",
    "merge": "joins the parts that evaluate --shard=k/n has scored",
    "rank": "ranks new clips with a trained run, into a file with scores",
    "compare": "says how far apart runs are, and how sure that is",
    "report": "writes report.html anew, from the files of a run",
    "check": "reads all, changes nothing: environment, data, run, gallery",
    "config": "prints all fields: values, defaults, and where each is from",
}
DESCRIPTION = (
    """\
Identify people in video: train a system on frame features, rank the clips of
every identity.

modes:
"""
    + "".join(f"  {mode:8}  {text}\n" for mode, text in MODES.items())
    + """
people: vidjax gallery --help; all places of a person: vidjax forget --help
"""
)
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
  rank a split in 3 parts, in any order or at once; then --mode=merge
    {program} --mode=evaluate --workdir=runs/mma --shard=1/3
  rank new clips: a folder of features, or a table
    {program} --mode=rank --workdir=runs/mma \\
        --input=PATH --out=ranking.tsv
  rank a split with two runs together
    {program} --mode=evaluate --workdir=runs/both \\
        --runs=runs/mma,runs/deepmef
  is the second run better than the first?
    {program} --mode=compare --workdir=runs/two \\
        --runs=runs/mma,runs/deepmef
  is everything in order in a run? (--config=... also: in data to train on)
    {program} --mode=check --workdir=runs/mma

Configurations, their arguments and all fields: configs/README.md.
"""


class Arguments(NamedTuple):
    """The words of a command, sorted by flag.

    Attributes:
      mode: `train` or another key of MODES.
      config: `FILE[:ARG,...]` of `--config`, None without the flag.
      workdir: the folder of `--workdir`, None without the flag.
      runs: the text of `--runs`, None without the flag.
      shard: the part that `--shard` names, None without the flag.
      place: the place of this process among several, None for one process.
      input: the folder or table of `--input`, None without the flag.
      out: the file of `--out`, None without the flag.
      quiet: True without messages and progress; the result, warnings and errors remain.
      json: True for the result as one JSON object.
      overrides: words that begin with `--config.`, each with its value.
      command: the whole command, which repeats the run.
    """

    mode: str
    config: str | None
    workdir: str | None
    runs: str | None
    shard: "Shard | None"
    place: share.Place | None
    input: str | None
    out: str | None
    quiet: bool
    json: bool
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
        hint = _hint_for_stray(strays[0], args.runs)
        if "=" in own:
            flag = own[max(own.index("=") - 1, 0)]
            hint = f": no blanks around =, {flag}={strays[0]}"
        raise UserError(f"stray word '{strays[0]}'{hint}")
    if args.mode not in MODES:
        hint = (
            f"use {ELSEWHERE[args.mode]}" if args.mode in ELSEWHERE else suggest(args.mode, MODES)
        )
        raise UserError(f"no mode '{args.mode}': {hint}")
    if args.workdir == "":
        raise UserError("--workdir= is empty: name a folder")
    for flag, value in {"--input": args.input, "--out": args.out}.items():
        if value is not None and args.mode != "rank":
            raise UserError(f"{flag} goes with --mode=rank, not --mode={args.mode}")
    if args.shard is not None and args.mode != "evaluate":
        raise UserError(f"--shard goes with --mode=evaluate, not --mode={args.mode}")
    command = shlex.join([*PROGRAM.split(), *_without_place(words)])
    return Arguments(
        mode=args.mode,
        config=args.config,
        workdir=args.workdir,
        runs=args.runs,
        shard=_shard(args.shard),
        place=_place(args),
        input=args.input,
        out=args.out,
        quiet=args.quiet,
        json=args.json,
        overrides=tuple(overrides),
        command=command,
    )


def _shard(text: str | None) -> "Shard | None":
    if text is None:
        return None
    from vidjax.run.parts import Shard

    return Shard.parse(text)


def _place(args: argparse.Namespace) -> share.Place | None:
    flags = (args.coordinator, args.num_processes, args.process_id)
    if flags == (None, None, None):
        return None
    if args.mode not in ("train", "evaluate") or args.shard or args.runs is not None:
        raise UserError(
            "--coordinator goes with --mode=train, and with --mode=evaluate of one whole run\n"
            "leave out --coordinator, --num_processes and --process_id"
        )
    return share.Place.parse(*flags)


def _without_place(words: Sequence[str]) -> list[str]:
    """Returns the words that repeat a run, in one process or in several."""
    kept, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word in share.FLAGS:
            rest[:1] = []
        elif word.partition("=")[0] not in share.FLAGS:
            kept.append(word)
    return kept


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


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags, which also prints the help."""
    program = "vidjax" if Path(sys.argv[0]).name == "vidjax" else PROGRAM
    indent = " " * len(f"usage: {program} ")
    parser = Parser(
        prog=program,
        usage=f"{program} [--mode=M] [--config=FILE[:ARG,...]] [--workdir=W]\n"
        f"{indent}[--runs=A,B] [--input=PATH --out=FILE] [--json]\n"
        f"{indent}[--config.FIELD=VALUE ...] [--shard=k/n] [--quiet]",
        description=DESCRIPTION,
        epilog=EXAMPLES.format(program=program),
    )
    parser.add_argument(
        "--mode", metavar="M", default="train", help="what to do, one of the above (default: train)"
    )
    parser.add_argument(
        "--config",
        metavar="FILE[:ARG,...]",
        help="an experiment, its name, or a run's config.json",
    )
    parser.add_argument(
        "--workdir", metavar="W", help="the run's folder (train: runs/NAME if absent)"
    )
    parser.add_argument("--runs", metavar="A,B", help="folders of runs, to join or to compare")
    parser.add_argument(
        "--shard", metavar="k/n", help="scores one of n parts (evaluate); k is from 1 to n"
    )
    parser.add_argument(
        "--coordinator",
        metavar="H:P",
        help="where several processes meet, see configs/README.md",
    )
    for flag in share.FLAGS[1:]:
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument(
        "--input", metavar="PATH", help="the clips to rank: a folder, or a .parquet table"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the new file: .csv, .tsv, .jsonl or .parquet"
    )
    # For the help alone: `split_overrides` takes these words.
    parser.add_argument(
        "--config.FIELD",
        metavar="VALUE",
        default=argparse.SUPPRESS,
        help="overrides a field, e.g. --config.seed=1",
    )
    parser.add_argument("--quiet", action="store_true", help="prints the result alone, no progress")
    parser.add_argument("--json", action="store_true", help="prints the result as a JSON object")
    parser.add_argument("--debug", action="store_true", help="shows tracebacks")
    parser.add_argument("--version", action="version", version=f"vidjax {_version()}")
    return parser


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("vidjax")


def _check_flag(flag: str) -> None:
    """Raises ValueError for a flag that does not exist."""
    if not flag.startswith("-") or flag in (*FLAGS, "-h"):
        return
    name = flag.lstrip("-").replace("-", "_")
    if name in ELSEWHERE:
        raise UserError(f"no flag {flag}: use {ELSEWHERE[name]}")
    # Every model has a name, and most have a rate of dropout.
    fields = [*config_lib.DEFAULTS, "model.name", "model.dropout_rate"]
    by_depth = sorted(fields, key=lambda field: -field.count("."))  # the shortest name comes last
    words = {field.rpartition(".")[2]: f"--config.{field}" for field in by_depth}
    words |= {own.lstrip("-"): own for own in FLAGS}
    if "." in name or name in ABBREVIATIONS:
        field = closest_field(name.removeprefix("config."), fields)
        match = f"--config.{field}" if field else None
    else:
        match = words.get(closest(name, words) or "")
    hint = f": did you mean {match}?" if match else "; --help lists them"
    raise UserError(f"no flag {flag}{hint}")


def _hint_for_stray(word: str, runs: str | None) -> str:
    if runs is not None:
        return f": no blanks between runs, --runs={runs.rstrip(',')},{word.lstrip(',')}"
    if word in MODES:
        return f": did you mean --mode={word}?"
    if word in ELSEWHERE:
        return f": use {ELSEWHERE[word]}"
    name = word.partition(":")[0]
    if name.endswith(".py") or (config_io.shipped_folder() / f"{name}.py").is_file():
        return f": did you mean --config={word}?"
    return "; --help lists the flags"
