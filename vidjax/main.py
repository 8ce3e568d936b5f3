"""The command line: `vidjax COMMAND`, and `--mode=COMMAND`, which is the same.

A command is a line of COMMANDS, and lives in `vidjax/commands/`.
"""

import argparse
import contextlib
import importlib.metadata
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vidjax import config as config_lib
from vidjax import config_io, machine, messages, rooms
from vidjax.cluster import processes
from vidjax.commands import check, compare, config, evaluate, rank, serve, train
from vidjax.errors import UserError
from vidjax.export import commands as export

COMMANDS = {
    "train": train.COMMAND,
    "evaluate": evaluate.COMMAND,
    "rank": rank.COMMAND,
    "embed": rank.EMBED,
    "compare": compare.COMMAND,
    "report": evaluate.REPORT,
    "check": check.COMMAND,
    "config": config.COMMAND,
    "serve": serve.COMMAND,
    **export.COMMANDS,
}
TOGETHER = {"train": train.settings, "evaluate": evaluate.settings}  # in several processes
SWITCHES = ("--quiet", "--json", "--debug")  # these may stand before the command
DESCRIPTION = """\
Identify people in video: train a system on frame features, rank the clips of
every identity.

commands:
{commands}
  gallery    people who are enrolled, found and deleted without training
  extract    makes features of the faces in videos and photos
  who        says who appears when in videos, by a few photos of people
  forget     names all places of a person, and deletes what may be deleted

Without a command vidjax trains, and --mode=COMMAND is the same as COMMAND.
Every command has a --help of its own, with its flags and an example.
"""
EXAMPLES = """\
examples:
  a result in a minute, on synthetic clips
    {prog} --config=configs/mma.py
  train on official files
    {prog} train --config=configs/mma.py:iqiyi_vid \\
        --config.data.dir=PATH
  rank new clips: a folder of features, or a table
    {prog} rank --workdir=runs/mma \\
        --input=PATH --out=ranking.tsv

Configurations, their arguments and all fields: configs/README.md.
"""


def run() -> NoReturn:
    """Runs the command line of this process and ends the process with its exit code."""
    machine.keep_freed_memory()
    messages.run(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `argv`, None for that of the process; returns the exit code of `messages.guarded`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if (code := rooms.run(words)) is not None:
        return code

    def command() -> int:
        args = parse(words)
        with messages.quietly() if args.quiet else contextlib.nullcontext():
            if not args.place:
                return _run(args)
            TOGETHER[args.command](args)  # mistakes are told before the others are waited for
            from vidjax.training import together

            return together.run(args.place, lambda: _run(args), words)

    return messages.guarded(command, words)


def _run(args: argparse.Namespace) -> int:
    result = COMMANDS[args.command].run(args)
    if args.place:
        from vidjax.cluster import processes

        if not processes.is_first():
            return result.code
    messages.show(result, args.command, as_json=args.json)
    return result.code


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the flags, `place` (None: a single process), and `line`, which repeats the run."""
    prog = "vidjax" if Path(sys.argv[0]).name == "vidjax" else messages.PROGRAM
    name, own = split_command(words)
    if "--version" in own or (name is None and {"-h", "--help"} & {*own}):
        _parse_no_command(prog, own)
    args = messages.parse(
        prog, COMMANDS, name or "train", own, _near_flag, lambda word: _about_stray(word, own)
    )
    args.place = None
    if args.command in TOGETHER:
        flags = (args.coordinator, args.num_processes, args.process_id)
        args.place = processes.Place.parse(*flags)
    args.line = shlex.join([*messages.PROGRAM.split(), *_without_place(words)])
    return args


def split_command(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the command that words name, None for none, and the other words."""
    names, own, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if word == "--mode":
            names.append(rest.pop(0) if rest else "")
        elif word.startswith("--mode="):
            names.append(word.partition("=")[2])
        elif word in COMMANDS and all(one in SWITCHES for one in own) and not names:
            names.append(word)
        else:
            own.append(word)
    if len({*names}) > 1:
        raise UserError(f"{' and '.join(names)}: name one command")
    if names and names[0] not in COMMANDS:
        raise messages.no_command(names[0], COMMANDS)
    return (names[0] if names else None), own


def _parse_no_command(prog: str, words: Sequence[str]) -> None:
    commands = "\n".join(f"  {name:9}  {one.about}" for name, one in COMMANDS.items())
    parser = messages.Parser(
        prog,
        DESCRIPTION.format(commands=commands),
        f"{prog} [COMMAND] [--FLAG=VALUE ...]",
        EXAMPLES.format(prog=prog),
    )
    version = f"vidjax {importlib.metadata.version('vidjax')}"
    parser.add_argument("--version", action="version", version=version)
    parser.parse_known_args(words)


def _without_place(words: Sequence[str]) -> list[str]:
    """Returns the words without `processes.FLAGS`, which differ between processes of a run."""
    kept, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word in processes.FLAGS:
            rest[:1] = []
        elif word.partition("=")[0] not in processes.FLAGS:
            kept.append(word)
    return kept


def _near_flag(word: str) -> str | None:
    if own := messages.closest(word, ("mode", "version"), cutoff=0.7):
        return f"--{own}"
    # Every model has a name, and most have a rate of dropout.
    fields = [*config_lib.DEFAULTS, "model.name", "model.dropout_rate"]
    field = config_lib.closest_field(word.removeprefix("config."), fields)
    return f"--config.{field}" if field else None


def _about_stray(word: str, words: Sequence[str]) -> str | None:
    at = words.index(word)
    before = words[max(at - 1, 0)]
    if before.startswith("--runs"):
        runs = before.partition("=")[2].rstrip(",")
        return f"no blanks between runs, --runs={runs},{word.lstrip(',')}"
    if before == "=" and at > 1:
        return f"no blanks around =, {words[at - 2]}={word}"
    if word in COMMANDS:
        return f"a command comes first, {word} --FLAG=VALUE"
    name = word.partition(":")[0]
    if name.endswith(".py") or (config_io.shipped_folder() / f"{name}.py").is_file():
        return f"did you mean --config={word}?"
    others = ("gallery", "forget")
    if match := messages.closest(word, [*COMMANDS, *others], cutoff=0.7):
        return f"did you mean the command {match}?"
    return None


if __name__ == "__main__":
    run()
