"""The command line: `vidjax COMMAND`, and `python -m vidjax.main --config=FILE [--mode=COMMAND]`.

A command is a line of COMMANDS. Its module has a function that adds the flags of the command.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from vidjax.core import distributed
from vidjax.utils import machine, messages
from vidjax.utils.errors import UserError, closest
from vidjax.utils.messages import Parser

# Command -> what it does.
COMMANDS = {
    "train": "trains a system, evaluates it, writes a report",
    "evaluate": "ranks a split with a trained run, or with several joined",
    "rank": "ranks new clips with a trained run, into a file with scores",
    "embed": "makes a vector of each new clip with a trained run",
    "compare": "says how far apart runs are, and how sure that is",
    "report": "writes report.html anew, from the files of a run",
    "check": "says whether environment, data, a run or a gallery is sound",
    "config": "prints all fields: values, defaults, and where each is from",
    "score": "prints the MAP of a submission, as the organisers' script does",
    "gallery": "enrols, finds and deletes people without training",
    "extract": "makes features of the faces and voices in videos and photos",
    "convert": "makes a net and its card of a package, for extract and who",
    "who": "says who appears when in videos, by a few photos of people",
    "serve": "answers other programs over HTTP: who clips show",
    "export": "writes a run or a gallery in the format of another runtime",
    "import": "makes a run of an exported folder, by its weights",
    "forget": "names all places of a person, and deletes what may be deleted",
}
# Words that people try -> what they may mean.
SLIPS = {
    "predict": "vidjax rank, which ranks clips, or vidjax embed, which makes vectors",
    "test": "vidjax evaluate --config.eval.split=test",
    "infer": "vidjax rank, which ranks clips, or vidjax embed, which makes vectors",
    "help": "vidjax --help",
    "version": "vidjax --version",
}
# Flags that people try -> what to do.
NO_FLAGS = {
    "resume": "a run goes on by itself: leave it out",
    "gpus": "all are used: CUDA_VISIBLE_DEVICES=0 before the command chooses one",
    "device": "JAX_PLATFORMS=cpu or JAX_PLATFORMS=cuda before the command chooses one",
    "verbose": "all is printed without it: leave it out, and --debug shows tracebacks",
}
SWITCHES = ("--quiet", "--json", "--debug")  # these may stand before the command
DESCRIPTION = """\
Identify people in video: train a system on frame features, rank the clips of
every identity. Without a command vidjax trains; --mode=COMMAND is the same as
COMMAND. Every command has a --help with its flags and an example.
"""
EXAMPLES = """\
examples:
  a result in a minute, on synthetic clips
    vidjax --config=mma
  train on official files
    vidjax train --config=mma:iqiyi_vid --config.data.dir=PATH
  rank new clips: a folder of features, or a table
    vidjax rank --workdir=runs/mma --input=PATH --out=ranking.tsv

Configurations, their arguments and all fields: configs/README.md.
"""


def run() -> NoReturn:
    """Runs the command line of this process and ends the process with its exit code."""
    machine.keep_freed_memory()
    messages.run_main(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `argv`, None for that of the process; returns the exit code of `messages.guarded`."""
    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        args = parse(words)
        with messages.quietly() if args.quiet else contextlib.nullcontext():
            distributed.join(args)
            return _run(args)

    code = messages.guarded(command, words)
    if code not in (0, 130, 143) and distributed.count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # at the usual end of a program, JAX would wait for the other processes
    return code


def _run(args: argparse.Namespace) -> int:
    result = args.execute(args)
    if distributed.is_first():
        messages.show(result, args.command, as_json=args.json)
    return result.code


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the flags of a command line.

    In addition to the flags: `command` is the name of the command, `execute` its function, `parser`
    its parser, `overrides` the words `--config.FIELD=VALUE`, and `line` repeats the command.
    """
    own, overrides = messages.split_overrides(_command_first(words))
    if own[0] == "--version" and "--json" in own:
        messages.say(
            json.dumps({"mode": "version", "version": importlib.metadata.version("vidjax")})
        )
        raise SystemExit(0)
    if own[0] == "gallery":
        from vidjax.cli.gallery_commands import check_command

        check_command(own[1:])
    parser = Parser("vidjax", description=DESCRIPTION, epilog=EXAMPLES)
    version = f"vidjax {importlib.metadata.version('vidjax')}"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, about in COMMANDS.items():
        about_it = f"{about[0].upper()}{about[1:]}."
        one = subparsers.add_parser(name, help=about, description=about_it)
        if name == own[0]:
            load(name)(one)
    args, strays = _parse_known(parser, subparsers.choices.get(own[0]), own)
    group = args.parser.group
    strays += [one for one in overrides if group is None or not one[9:].startswith(group)]
    for word in strays:
        flag = word.partition("=")[0]
        text = f"no flag {flag}" if word.startswith("-") else f"stray word '{word}'"
        hint = _hint(flag, args) if word.startswith("-") else _hint_of_word(word, strays, args)
        args.parser.error(f"{text}: {hint}" if hint else text)
    for name, value in vars(args).items():
        if value == "":
            raise UserError(f"--{name}= is empty: give it a value, or leave it out")
    args.overrides = tuple(overrides)
    args.line = shlex.join(["vidjax", *words])
    return args


def _parse_known(
    parser: Parser, own: Parser | None, words: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and the words that are none; if there are such, flags may be missing."""
    try:
        return parser.parse_known_args(words)
    except UserError:
        if own is None:
            raise
        for one in (*own._actions, *own._mutually_exclusive_groups):
            if not isinstance(one, argparse._SubParsersAction):
                one.required = False
        args, strays = parser.parse_known_args(words)
        if strays:
            return args, strays
        raise


def _command_first(words: Sequence[str]) -> list[str]:
    """Returns words that begin with a command: of `--mode=M`, or `train` if no word names one."""
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
        raise UserError(f"{' and '.join(names)}: name one command")
    if names and names[0] not in COMMANDS:
        match = closest(names[0].lower(), COMMANDS, cutoff=0.7)
        # It says what the command does: some delete data.
        hint = SLIPS.get(names[0]) or (f"{match}, which {COMMANDS[match]}" if match else None)
        from vidjax.cli import gallery_commands

        if names[0] in gallery_commands.COMMANDS:
            hint = f"vidjax gallery {names[0]}"
        hint = f"did you mean {hint}?" if hint else f"choose from {', '.join(COMMANDS)}"
        raise UserError(
            f"no command '{names[0]}': {hint}\na configuration is named by --config=FILE"
        )
    if not names and rest and rest[0] in ("-h", "--help", "--version"):
        return rest
    return [*(names[:1] or ["train"]), *rest]


def load(name: str) -> Callable[[Parser], None]:
    """Returns the function that adds the flags of a command.

    The modules of the commands are imported here, so that `vidjax --version` imports none of them.
    None of them imports JAX or TensorFlow before the command runs.
    """
    from vidjax.cli import (
        check_command,
        compare_command,
        config_command,
        convert_command,
        export_commands,
        extract_command,
        forget_command,
        gallery_commands,
        rank_command,
        run_commands,
        score_command,
        serve_command,
        who_command,
    )

    return {
        "train": run_commands.add_train_flags,
        "evaluate": run_commands.add_evaluate_flags,
        "rank": rank_command.add_flags,
        "embed": rank_command.add_embed_flags,
        "compare": compare_command.add_flags,
        "report": run_commands.add_report_flags,
        "check": check_command.add_flags,
        "config": config_command.add_flags,
        "score": score_command.add_flags,
        "gallery": gallery_commands.add_flags,
        "extract": extract_command.add_extract_flags,
        "convert": convert_command.add_flags,
        "who": who_command.add_flags,
        "serve": serve_command.add_flags,
        "export": export_commands.add_export_flags,
        "import": export_commands.add_import_flags,
        "forget": forget_command.add_flags,
    }[name]


def _hint(flag: str, args: argparse.Namespace) -> str | None:
    """Returns the flag or field that a wrong flag may mean, as a question; None if none is near."""
    word = flag.lstrip("-").replace("-", "_")
    if word.startswith("config.") and args.parser.group:
        return f"it takes --config.{args.parser.group}FIELD=VALUE"
    if word in NO_FLAGS:
        return NO_FLAGS[word]
    usage = args.parser.format_usage()
    known = re.findall(r"--([\w-]+)[] ]", usage)
    if word in ("workdir", "run") and re.search(r"\bRUN\b", usage):
        return "the folder of the run comes without a flag"
    if match := closest(word, known, cutoff=0.7):
        return f"did you mean --{match}?"
    if args.parser.group != "":
        return None
    from vidjax.runs import config

    # Every model has a name, and most have a rate of dropout.
    fields = [*config.DEFAULTS, "model.name", "model.dropout_rate"]
    field = config.closest_field(word.removeprefix("config."), fields)
    return f"did you mean --config.{field}?" if field else None


def _hint_of_word(word: str, strays: Sequence[str], args: argparse.Namespace) -> str | None:
    if word in COMMANDS:
        return f"a command comes first, vidjax {word} --FLAG=VALUE"
    if getattr(args, "runs", None):
        return f"no blanks between runs, --runs={args.runs.rstrip(',')},{word}"
    if args.command == "compare":
        return f"did you mean --runs={','.join(strays)}?"
    flags = ("workdir", "gallery", "input", "config")
    flag = next((name for name in flags if name in vars(args)), None)
    return f"did you mean --{flag}={word}?" if flag else None
