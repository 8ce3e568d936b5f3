"""Parses the words of a command line."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vidjax.utils import files
from vidjax.utils.errors import UserError, closest
from vidjax.utils.messages import Result

# The values of all arguments with these metavars are paths, see `files.local`.
PATHS = {
    "C", "DIR", "F", "FILE", "FOLDER", "G", "GT", "MODELS", "NEW", "NEW_RUN", "OUT_DIR", "PATH",
    "PLACE", "RANKING", "RUN", "W",
}  # fmt: skip


class _StoreOnce(argparse.Action):
    """Stores the value of a flag. If the flag is given twice, raises UserError."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if option_string and getattr(namespace, self.dest) is not self.default:
            raise UserError(f"{option_string} is given twice: give one value")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser that accepts no abbreviated flags and raises UserError for a mistake."""

    def __init__(self, prog: str, **options: Any):  # noqa: ANN401 (the options of argparse)
        # Newer Pythons pass more options to the parsers of commands, such as `color` (3.14).
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, formatter_class=layout, allow_abbrev=False, **options)
        self.register("action", None, _StoreOnce)
        self.example = ""
        self.words: Sequence[str] = ()  # of the command line, without the words before the command
        # The command may override fields that begin with this text, or no field if it is None.
        self.group: str | None = None
        self.programs: argparse._ArgumentGroup | None = None  # has --quiet, --json and --debug
        # Adds the flags before the first use, because flags of unused commands would take time.
        self.later: Callable[[Parser], None] | None = None

    def flag(
        self,
        usage: str,
        about: str,
        *,
        of: "argparse._ArgumentGroup | None" = None,
        **options: Any,  # noqa: ANN401 (the options of `add_argument`)
    ) -> None:
        """Adds a flag, such as `--check`, or a flag with a value, such as `--workdir FOLDER`.

        `usage` is the flag, and the name of its value if there is one. `about` is the help text.
        `of` is a group of flags, such as flags that exclude each other.
        """
        name, _, metavar = usage.partition(" ")
        options |= {"metavar": metavar} if metavar else {"action": "store_true"}
        (of or self).add_argument(name, help=about, **options)

    def fields(self, group: str = "", *, example: str) -> None:
        """Lets users override configuration fields that begin with `group`, by default all fields.

        If `example` is `seed=1`, `--help` shows the example `--config.seed=1`.
        """
        usage = f"--config.{group}FIELD VALUE"  # for --help: `split_overrides` removes such words
        about = f"overrides a field, e.g. --config.{example}"
        self.flag(usage, about, default=argparse.SUPPRESS)
        self.group = group

    def command(self, run: Callable[[argparse.Namespace], Result], *examples: str) -> None:
        """Sets `run`, the function of the command, and adds the flags --quiet, --json and --debug.

        An example is a text of flags and arguments. `--help` shows it after the command's name.
        """
        self.example = f"{self.prog} {examples[0]}"
        lines = []
        for flags in examples:
            line = f"  {self.prog} {flags}"
            if len(line) > 80:
                first, _, others = flags.partition(" --")
                line = f"  {self.prog} {first} \\\n      --{others}"
            lines.append(line)
        self.epilog = "\n".join([f"example{'s' * (len(examples) > 1)}:", *lines])
        self.flag("--quiet", "prints only the result", of=self.programs)
        self.flag("--json", "prints the result as JSON", of=self.programs)
        self.flag("--debug", "shows tracebacks", of=self.programs)
        self.set_defaults(execute=run, parser=self)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  (it has overloads)
        self,
        args: Sequence[str] | None = None,
        namespace: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Parses words as argparse does. The values of flags for paths become `Path` objects.

        The words are also stored, because messages of `error` contain them.
        """
        self.words = args or ()
        later, self.later = self.later, None
        if later:
            later(self)
        parsed, others = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            if action.metavar in PATHS and value:
                paths = [files.local(x) for x in (value if isinstance(value, list) else [value])]
                setattr(parsed, action.dest, paths if isinstance(value, list) else paths[0])
        return parsed, others

    def suggest_flag(self, flag: str, more: Sequence[str] = ()) -> str:
        """Returns the known flag that is most similar to the misspelt `flag`, or "" if none is.

        `more` are names of flags, without `--`, in addition to the flags of this parser.
        """
        known = [*re.findall(r"--([\w-]+)", self.format_usage()), *more]
        match = closest(flag.lstrip("-").replace("-", "_"), known, cutoff=0.7)
        return f"--{match}" if match else ""

    def refuse(self, word: str, fields: Sequence[str]) -> NoReturn:
        """Raises UserError for a word of the command line that is no known flag or value.

        The message suggests a similar flag. `fields` are the names of the configuration fields,
        such as `config.seed`.
        """
        flag, equals, value = word.partition("=")
        text = f"there is no flag {flag}"
        similar = self.suggest_flag(flag, fields)
        if flag.startswith("--config.") and self.group:
            text += f": this command takes only --config.{self.group}FIELD=VALUE"
        elif not flag.startswith("-"):
            field = next((f"--{x}" for x in (flag, f"config.{flag}") if x in fields), "")
            named = equals and (field or self.suggest_flag(flag))
            text = f"'{word}' has no flag" + (f": write {named}={value}" if named else "")
        elif flag == "--gallery" and "--workdir" in self.format_usage():
            text += f": write --workdir={value or 'FOLDER'}"
        elif similar:
            text += f": did you mean {similar}?"
        self.error(text)

    def error(self, message: str) -> NoReturn:
        """Raises UserError for a mistake that argparse describes in `message`.

        The message is reworded, and an example of the command is added. If a required flag is
        missing because the user has misspelt it, the message names the misspelt flag.
        """
        for word in self.words if "required" in message else ():
            flag, equals, _ = word.partition("=")
            similar = self.suggest_flag(flag) if flag.startswith("--") or equals else ""
            if similar not in ("", flag):
                message = f"there is no flag {flag}: did you mean {similar}?"
        needs = f"{self.prog.removeprefix('vidjax ')} needs"
        message = message.replace("the following arguments are required:", needs)
        message = message.replace("one of the arguments", f"{needs} one of")
        message = message.removeprefix("argument ").removesuffix(" is required")
        if pair := re.fullmatch(r"(\S+): not allowed with argument (\S+)", message):
            message = f"{pair[1]} and {pair[2]} cannot be used together: leave one of them out"
        if choices := re.fullmatch(
            r"(?s).*invalid choice: '?([^']*?)'? \(choose from (.*)\)", message
        ):
            word, known = choices[1], re.findall(r"[^', ]+", choices[2])
            if similar := closest(word, known):
                message = f"there is no '{word}': did you mean '{similar}'?"
        example = f"example: {self.example}" if self.example else ""
        remedy = example or f"to see all arguments: {self.prog} --help"
        raise UserError(f"{message}\n{remedy}")


def describe(about: str) -> dict[str, Any]:
    """Returns the arguments `help` and `description` for the parser of a command.

    `about` says what the command does, as in "ranks clips".
    """
    return {"help": about, "description": f"{about[0].upper()}{about[1:]}."}


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Returns a `type` for `add_argument` that reads a whole number from `low` to `high`."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text[:20]) <= high):
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high:,}, not '{text[:20]}'"
            )
        return int(text)

    return read


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the words of a command line into overrides of configuration fields and other words.

    Returns two lists: the other words, and the overrides, such as `--config.seed=1`. The two words
    `--config.seed 1` become the single word `--config.seed=1`.
    """
    flags, overrides = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--config."):
            flags.append(word)
        elif "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(f"{word}={rest.pop(0)}")
        else:
            overrides.append(word)
    return flags, overrides
