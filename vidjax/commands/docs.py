"""The Markdown tables of configs/README.md: fields, names and arguments.

python -m vidjax.commands.docs                              # prints them
python -m vidjax.commands.docs --write=configs/README.md    # writes them into the page
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vidjax import augment, config_io, fusion, losses, messages, system
from vidjax.config import FIELDS, SCALE_WORDS, TABLE, Group, within
from vidjax.config_io import value_text
from vidjax.data import sources
from vidjax.errors import UserError
from vidjax.metrics import CLIP_METRICS
from vidjax.models import identifier


def known_names() -> Mapping[str, Mapping[str, str]]:
    """Reads the tables of the code: field or group -> name that it may take -> summary."""
    tables: dict[str, Mapping[str, Callable[..., Any]]] = {
        "model": identifier.MODELS,
        "fusion": {name: function for name, (function, _) in fusion.FUSIONS.items()},
        "transforms": augment.TRANSFORMS,
        "loss.classification": losses.CLASSIFICATION,
        "loss.focal": losses.CLASSIFICATION,
        "loss.margin_type": losses.MARGINS,
        "loss.embedding": losses.EMBEDDING,
        "eval.scores": {name: function for name, (function, _) in system.SCORES.items()},
        "data.name": {name: dataset.open for name, dataset in sources.DATASETS.items()},
    }
    return {
        field: {name: _summary(function) for name, function in table.items()}
        for field, table in tables.items()
    }


def _summary(function: Callable[..., Any]) -> str:
    """Returns the first line of a docstring as a cell of a table; empty if there is none."""
    doc = function.__doc__ or ""
    if doc.startswith(f"{function.__name__}("):  # the signature of a dataclass
        doc = ""
    line = doc.strip().partition("\n")[0].rstrip(".").removeprefix("Returns ")
    return (line[:1].upper() + line[1:]).replace("|", "\\|")


def name_tables(known: Mapping[str, Mapping[str, str]]) -> str:
    """Returns one Markdown table of names for each field that takes a name.

    Fields with the same names share a table. The metrics are the last table.

    Args:
      known: field or group -> name -> summary, as `known_names` returns it.
    """
    shared: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for field, names in known.items():
        shared.setdefault(tuple(names.items()), []).append(f"`{field}`")
    tables = {", ".join(fields): dict(names) for names, fields in shared.items()}
    tables["metric"] = {
        name: f"{metric.label}: {metric.about}" for name, metric in CLIP_METRICS.items()
    }
    lines = []
    for head, names in tables.items():
        lines += ["", f"| {head} | meaning |", "|---|---|"]
        lines += [f"| `{name}` | {meaning} |" for name, meaning in names.items()]
    return "\n".join(lines[1:]) + "\n"


def field_tables(known: Mapping[str, Iterable[str]]) -> str:
    """Returns one Markdown table of fields for each group of a configuration.

    Args:
      known: field or group -> the names that it may take, as far as these are listed.
    """
    head = ["| field | default | meaning |", "|---|---|---|"]
    lines = head.copy()
    for row in TABLE:
        names = ", ".join(f"`{name}`" for name in known.get(row.name, ()))
        meaning = f"{row.doc}; choose from {names}" if names else row.doc
        if isinstance(row, Group):
            has_fields = any(within(name, (row.name,)) for name in FIELDS)
            lines += ["", f"**`{row.name}`**: {meaning}.", "", *(head if has_fields else ())]
        else:
            lines.append(f"| `{row.name}` | {_cell(row.default)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return value_text(value) if value in (None, (), "") else f"`{value_text(value)}`"


def argument_table(shared: Mapping[str, str], experiments: Mapping[str, Mapping[str, str]]) -> str:
    """Returns the Markdown table of the arguments of all configurations.

    Args:
      shared: argument -> meaning, of the arguments that every configuration takes.
      experiments: name of a file in `configs/` -> argument -> meaning, the shared ones included.
    """
    lines = ["| configuration | argument | meaning |", "|---|---|---|"]
    lines += [f"| all | `{word}` | {meaning} |" for word, meaning in shared.items()]
    lines += [
        f"| `{name}` | `{word}` | {meaning} |"
        for name, words in experiments.items()
        for word, meaning in words.items()
        if word not in shared
    ]
    lines.append("| all | names of modalities | the modalities to use, e.g. `face,head` |")
    return "\n".join(lines) + "\n"


def replace_section(page: str, name: str, content: str) -> str:
    """Returns a page with new content between `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
      ValueError: the page has no such section, or more than one.
    """
    pattern = rf"(?s)(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    page, count = re.subn(pattern, lambda match: f"{match[1]}\n{content}\n{match[2]}", page)
    if count != 1:
        raise UserError(f"the page has {count} sections '<!-- {name} -->' ... '<!-- /{name} -->'")
    return page


def documentation() -> Mapping[str, str]:
    """Returns section of `configs/README.md` -> its Markdown: `arguments`, `fields` and `names`."""
    known = known_names()
    files = sorted(config_io.shipped_folder().glob("*.py"))
    words = {file.name: getattr(config_io.load_module(file), "WORDS", {}) for file in files}
    return {
        "arguments": argument_table(SCALE_WORDS, words),
        "fields": field_tables(known),
        "names": name_tables(known),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the fields and the arguments as Markdown tables, or writes them into a page."""
    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        parser = messages.Parser(prog="python -m vidjax.commands.docs", description=main.__doc__)
        parser.add_argument("--write", type=Path, metavar="PAGE", help="e.g. configs/README.md")
        path = parser.parse_args(words).write
        page = path.read_text(encoding="utf-8") if path else None
        for name, content in documentation().items():
            if page is None:
                messages.say(content)
            else:
                page = replace_section(page, name, content)
        if page is not None:
            path.write_text(page, encoding="utf-8")
        return 0

    return messages.guarded(command, words)


if __name__ == "__main__":
    messages.run(main)
