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
from pathlib import Path
from typing import NoReturn

from vidjax.cli import shared_flags
from vidjax.utils import distributed, exit_codes, machine, messages, rendezvous, terminal
from vidjax.utils.errors import UserError, suggest
from vidjax.utils.messages import print_result
from vidjax.utils.parser import Parser, describe, split_overrides
from vidjax.utils.version import VERSION

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
    "score": "prints the MAP of a submission, like the iQIYI-VID script",
    "gallery": "enrols, identifies and deletes people without training",
    "extract": "extracts features of faces and voices from videos and photos",
    "convert": "makes a net for extract and who from a downloaded package or net",
    "measure-card": "measures on your photos how much people differ for a net",
    "who": "finds who appears when in videos, from a few photos of each person",
    "review": "opens the results of who as a page, on which you name and correct people",
    "serve": "identifies the people of clips for other programs, over HTTP",
    "export": "writes a run or a gallery in the format of another runtime",
    "import": "makes a run from the weights of an exported folder",
    "forget": "lists all places that contain a name, and deletes it from some of them",
}
# Commands whose files contain features or names of people. Only this user may read the files.
PRIVATE = ("rank", "embed", "gallery", "extract", "who", "review", "serve", "forget")
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
  find who appears in films, then name people on a page
    vidjax who FILM --people=PHOTOS --models=MODELS --out=names
    vidjax review names
  rank new clips: a folder of features, or a table
    vidjax rank --workdir=runs/mma --input=PATH --out=ranking.tsv

Configurations, their arguments and all fields: configs/README.md.
"""


def run() -> NoReturn:
    """Runs the command line of this process, and ends the process with its exit code."""
    machine.keep_freed_memory()
    exit_codes.run_main(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the words `argv` of a command line (default: `sys.argv[1:]`). Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        args = parse(words)
        with contextlib.ExitStack() as stack:
            if args.quiet:
                stack.enter_context(terminal.hide_progress())
            if args.parser.prog.split()[1] in PRIVATE:
                stack.callback(os.umask, os.umask(0o077))
            shared_flags.join_processes(args)
            with rendezvous.blame_lost_process():
                result = args.execute(args)
            if distributed.is_first():
                print_result(result, args.command, as_json=args.json)
            return result.code

    code = exit_codes.run_to_exit_code(command, words)
    rendezvous.leave(code)
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
    flags, overrides = split_overrides(_put_command_first(words))
    name = flags[0]
    if name == "--version" and "--json" in flags:
        messages.print_text(json.dumps({"mode": "version", "version": VERSION}))
        raise SystemExit(0)
    parser = Parser("vidjax", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"vidjax {VERSION}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for command in [name] if name in COMMANDS else COMMANDS:  # a parser takes time to make
        subparser = subparsers.add_parser(command, **describe(COMMANDS[command]))
        if command == name:
            load(command)(subparser)
    for word in flags:
        if re.fullmatch(r"(--[\w-]+=)?", word):
            remedy = "give a value"
            with contextlib.suppress(UserError):  # the command needs this word
                parser.parse_known_args([other for other in flags if other != word])
                remedy += ", or leave it out"
            raise UserError(f"{word or 'an argument'} has no value: {remedy}")
    args, strays = parser.parse_known_args(flags)
    group = args.parser.group
    strays += [word for word in overrides if group is None or not word[9:].startswith(group)]
    if strays:
        args.parser.refuse(strays[0], _list_fields() if group == "" else ())
    args.overrides = tuple(overrides)
    args.line = shlex.join(["vidjax", *words])
    return args


def _list_fields() -> list[str]:
    """Returns the fields of configurations, or [] if the packages for training are missing."""
    with contextlib.suppress(ModuleNotFoundError):
        from vidjax.runs import config

        return [f"config.{field}" for field in config.DEFAULTS]
    return []


def _put_command_first(words: Sequence[str]) -> list[str]:
    """Moves the command to the start of the words. `--mode=rank` becomes `rank`.

    Without a command, the first word of the result is `train`. Raises UserError for an unknown
    command.
    """
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
        from vidjax.apps.video import log  # it takes time to import

        if log.has_log(Path(names[0])):
            raise UserError(f"'{names[0]}' is a folder: use vidjax review {shlex.quote(names[0])}")
        raise UserError(
            f"there is no command '{names[0]}': {suggest(names[0].lower(), COMMANDS)}\n"
            "to name people in films: vidjax who --help, then vidjax review FOLDER\n"
            "to choose a configuration: --config=FILE"
        )
    if not words:
        return ["--help"]
    if not names and rest and rest[0] in ("-h", "--help", "--version"):
        return rest
    return [*(names[:1] or ["train"]), *rest]


def load(name: str) -> Callable[[Parser], None]:
    """Returns the function that adds the flags of the command `name` to a parser."""
    # Only one module is imported, because others may need packages that are not installed.
    match name:
        case "train" | "evaluate" | "report" | "config":
            from vidjax.cli import run_commands as commands
        case "rank" | "embed" | "compare" | "score":
            from vidjax.cli import ranking_commands as commands
        case "check":
            from vidjax.cli import check_command as commands
        case "gallery":
            from vidjax.cli import gallery_commands as commands
        case "extract" | "convert" | "measure-card" | "who" | "review":
            from vidjax.cli import film_commands as commands
        case "export" | "import" | "serve":
            from vidjax.cli import deployment_commands as commands
        case "forget":
            from vidjax.cli import forget_command as commands
        case _:
            raise AssertionError(f"no module for the command {name}")
    return getattr(commands, f"add_{name.replace('-', '_')}_flags")
