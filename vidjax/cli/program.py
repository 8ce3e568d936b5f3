"""Parses and runs the command line `vidjax COMMAND`.

The form `python -m vidjax.main --config=FILE [--mode=COMMAND]` is accepted, too.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from vidjax import __version__
from vidjax.cli import shared_flags
from vidjax.core import distributed
from vidjax.utils import machine, messages
from vidjax.utils.errors import UserError, closest
from vidjax.utils.messages import Parser

# Command -> description.
COMMANDS = {
    "train": "trains a system, evaluates it, writes a report",
    "evaluate": "ranks a split with a trained run, or with a blend of several runs",
    "rank": "ranks new clips with a trained run, and writes a file with scores",
    "embed": "computes an embedding of each new clip with a trained run",
    "compare": "measures how much the MAP of runs differs, with confidence intervals",
    "report": "writes report.html again, from the files of a run",
    "check": "checks that the installation works, and that data, a run or a gallery can be read",
    "config": "lists the fields of a configuration, with values, defaults and origins",
    "score": "prints the MAP of a submission, like the organisers' script",
    "gallery": "enrols, identifies and deletes people without training",
    "extract": "extracts features of faces and voices from videos and photos",
    "convert": "makes a net for extract and who from a downloaded package",
    "who": "finds who appears when in videos, from a few photos of each person",
    "serve": "identifies the people of clips for other programs, over HTTP",
    "export": "writes a run or a gallery in the format of another runtime",
    "import": "makes a run from the weights of an exported folder",
    "forget": "lists all places that contain a name, and deletes it from some of them",
}
# Words that users try as a command -> the command that they may mean.
SLIPS = {
    "predict": "vidjax rank, which ranks clips, or vidjax embed, which computes embeddings",
    "test": "vidjax evaluate --config.eval.split=test",
    "infer": "vidjax rank, which ranks clips, or vidjax embed, which computes embeddings",
    "help": "vidjax --help",
    "version": "vidjax --version",
}
# Flags that users try and that do not exist -> the remedy.
NO_FLAGS = {
    "resume": "a run always continues: leave the flag out",
    "gpus": "all GPUs are used; to use the first, put CUDA_VISIBLE_DEVICES=0 before the command",
    "device": "put JAX_PLATFORMS=cpu or JAX_PLATFORMS=cuda before the command",
    "verbose": "leave it out: all messages are printed; --debug prints tracebacks, too",
}
SWITCHES = ("--quiet", "--json", "--debug")  # flags that may stand before the command
DESCRIPTION = """\
Identify people in video: train a system on features of frames, and rank the
clips of every identity. The default command is train. --mode=COMMAND is the
same as COMMAND. vidjax COMMAND --help prints the flags, with an example.
"""
EXAMPLES = """\
examples:
  a result in a minute, on synthetic clips
    vidjax --config=mma
  train on the files of iQIYI-VID
    vidjax train --config=mma:iqiyi_vid --config.data.dir=PATH
  rank new clips: a folder of features, or a table
    vidjax rank --workdir=runs/mma --input=PATH --out=ranking.tsv

Configurations, their arguments and all fields: configs/README.md.
"""


def run() -> NoReturn:
    """Runs the command line of this process, and ends the process with its exit code."""
    machine.keep_freed_memory()
    messages.run_main(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the words `argv` of a command line (default: `sys.argv[1:]`). Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        args = parse(words)
        with messages.hide_progress() if args.quiet else contextlib.nullcontext():
            shared_flags.join_processes(args)
            result = args.execute(args)
            if distributed.is_first():
                messages.print_result(result, args.command, as_json=args.json)
            return result.code

    code = messages.run_to_exit_code(command, words)
    if code not in (0, 130, 143) and distributed.count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a normal exit would wait for the other processes
    return code


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses a command line. Raises UserError if a command, a flag or a value is wrong.

    The result has an attribute for each flag, and five more:
      command: the name of the command.
      execute: the function that runs the command.
      parser: the parser of the command's flags.
      overrides: the words `--config.FIELD=VALUE`.
      line: the command line as text.
    """
    flags, overrides = messages.split_overrides(_put_command_first(words))
    name = flags[0]
    if name == "--version" and "--json" in flags:
        messages.print_text(json.dumps({"mode": "version", "version": __version__}))
        raise SystemExit(0)
    if name == "gallery":
        from vidjax.cli.gallery_commands import check_command

        check_command(flags[1:])
    parser = Parser("vidjax", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"vidjax {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for command, about in COMMANDS.items():
        description = f"{about[0].upper()}{about[1:]}."
        subparser = subparsers.add_parser(command, help=about, description=description)
        if command == name:
            load(command)(subparser)
    args, strays = _parse_known(parser, subparsers.choices.get(name), flags)
    group = args.parser.group
    strays += [word for word in overrides if group is None or not word[9:].startswith(group)]
    for word in strays:
        flag = word.partition("=")[0]
        text = f"there is no flag {flag}" if word.startswith("-") else f"'{word}' has no flag"
        hint = _suggest_flag(flag, args) if word.startswith("-") else _explain(word, strays, args)
        args.parser.error(f"{text}: {hint}" if hint else text)
    names = [word.partition("=")[0] for word in flags]
    for action in args.parser._actions:
        is_single = type(action) is argparse._StoreAction  # the last value would win
        if is_single and sum(map(names.count, action.option_strings)) > 1:
            raise UserError(f"{action.option_strings[0]} is given twice: give one value")
        value = getattr(args, action.dest, None)
        if value == "" or (isinstance(value, list) and "" in value):
            if not action.option_strings:
                args.parser.error(f"{action.metavar} is empty")
            flag = action.option_strings[0]
            raise UserError(f"{flag}= has no value: give a value, or leave out the flag")
    args.overrides = tuple(overrides)
    args.line = shlex.join(["vidjax", *words])
    return args


def _parse_known(
    parser: Parser, subparser: Parser | None, words: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line. Returns the values of the flags, and the unknown words.

    If a required flag is missing, raises UserError. If there are unknown words, returns them
    instead, because one of them may be the required flag, misspelt.
    """
    try:
        return parser.parse_known_args(words)
    except UserError:
        if subparser is None:
            raise
        for action in (*subparser._actions, *subparser._mutually_exclusive_groups):
            if not isinstance(action, argparse._SubParsersAction):
                action.required = False
        args, strays = parser.parse_known_args(words)
        if strays:
            return args, strays
        raise


def _put_command_first(words: Sequence[str]) -> list[str]:
    """Moves the command to the start. `--mode=rank` becomes `rank`. The default is `train`."""
    count = len([*itertools.takewhile(SWITCHES.__contains__, words)])
    rest, names = [*words[count:], *words[:count]], list[str]()
    if rest and not rest[0].startswith("-"):
        names.append(rest.pop(0))
    for word in [*rest]:
        if word == "--mode" or word.startswith("--mode="):
            at = rest.index(word)
            names.append(word.partition("=")[2] or "".join(rest[at + 1 : at + 2]))
            del rest[at : at + 1 + (word == "--mode")]
    if len({*names}) > 1:
        raise UserError(f"{' and '.join(names)} are two commands: name only one")
    if names and names[0] not in COMMANDS:
        match = closest(names[0].lower(), COMMANDS, cutoff=0.7)
        # The hint contains the description, because some commands delete data.
        hint = SLIPS.get(names[0]) or (f"{match}, which {COMMANDS[match]}" if match else None)
        from vidjax.cli import gallery_commands

        if names[0] in gallery_commands.COMMANDS:
            hint = f"vidjax gallery {names[0]}"
        hint = f"did you mean {hint}?" if hint else f"choose from {', '.join(COMMANDS)}"
        raise UserError(
            f"vidjax has no command '{names[0]}': {hint}\nto name a configuration: --config=FILE"
        )
    if not names and rest and rest[0] in ("-h", "--help", "--version"):
        return rest
    return [*(names[:1] or ["train"]), *rest]


def load(name: str) -> Callable[[Parser], None]:
    """Returns the function that adds the flags of the command `name` to a parser."""
    # Only one module is imported, because others may need packages that are not installed.
    match name:
        case "train" | "evaluate" | "report":
            from vidjax.cli import run_commands as commands
        case "rank" | "embed" | "compare" | "score":
            from vidjax.cli import ranking_commands as commands
        case "check" | "config":
            from vidjax.cli import inspection_commands as commands
        case "gallery":
            from vidjax.cli import gallery_commands as commands
        case "extract" | "convert" | "who":
            from vidjax.cli import film_commands as commands
        case "export" | "import" | "serve":
            from vidjax.cli import deployment_commands as commands
        case "forget":
            from vidjax.cli import forget_command as commands
        case _:
            raise AssertionError(f"no module for the command {name}")
    return getattr(commands, f"add_{name}_flags")


def _suggest_flag(flag: str, args: argparse.Namespace) -> str | None:
    """Returns a hint for an unknown flag, or None if no flag or field has a similar name."""
    word = flag.lstrip("-").replace("-", "_")
    if word.startswith("config.") and args.parser.group:
        return f"this command takes only --config.{args.parser.group}FIELD=VALUE"
    if word in NO_FLAGS:
        return NO_FLAGS[word]
    usage = args.parser.format_usage()
    known = re.findall(r"--([\w-]+)[] ]", usage)
    if word in ("workdir", "run") and re.search(r"\bRUN\b", usage):
        return "give the folder of the run without a flag"
    if match := closest(word, known, cutoff=0.7):
        return f"did you mean --{match}?"
    if args.parser.group != "":
        return None
    from vidjax.runs import config

    # Fields of models have no defaults, so they are not listed. These two are common.
    fields = [*config.DEFAULTS, "model.name", "model.dropout_rate"]
    field = config.find_closest_field(word.removeprefix("config."), fields)
    return f"did you mean --config.{field}?" if field else None


def _explain(word: str, strays: Sequence[str], args: argparse.Namespace) -> str | None:
    """Returns a hint about the unknown `word`, or None. `strays` are all unknown words."""
    if word in COMMANDS:
        return f"write the command first: vidjax {word} --FLAG=VALUE"
    if getattr(args, "runs", None):
        return f"write no spaces between runs: --runs={args.runs.rstrip(',')},{word}"
    if args.command == "compare":
        return f"did you mean --runs={','.join(strays)}?"
    flags = ("workdir", "gallery", "input", "to", "config")
    if args.command in ("train", "config"):
        flags = ("config", "workdir")
    known = args.parser._option_string_actions  # the gallery of some commands has no flag
    free = (name for name in flags if f"--{name}" in known and not getattr(args, name, None))
    flag = next(free, None)
    return f"did you mean --{flag}={shlex.quote(word)}?" if flag else None
