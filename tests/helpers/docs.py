"""The Markdown tables of configs/README.md, fields, names and arguments, and of the server's page.

`python -m tests.helpers.docs configs/README.md` and `python -m tests.helpers.docs
vidjax/apps/serve/README.md` write them into the page.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.small_runs import ROOT
from vidjax.apps.server_limits import LIMITS
from vidjax.core import augment, fusion, losses, optim
from vidjax.core.metrics import CLIP_METRICS
from vidjax.data import sources
from vidjax.models import build_system
from vidjax.runs import config_io
from vidjax.runs.config import FIELDS, TABLE, Field, Group
from vidjax.runs.config_io import value_text
from vidjax.runs.config_words import SCALE_WORDS

SERVER = ROOT / "vidjax/apps/serve/README.md"


def snippet(page: str, name: str) -> str:
    """Returns the block of code of a page below `<!-- NAME -->`."""
    pattern = rf"<!-- {re.escape(name)} -->\n```\w*\n(.*?)```\n"
    blocks = re.findall(pattern, (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) == 1, f"{page}: {len(blocks)} blocks of `<!-- {name} -->`"
    return blocks[0]


def update(page: str) -> str:
    """Returns a page with new tables between each `<!-- NAME -->` and `<!-- /NAME -->`."""
    tables = {"arguments": _argument_table(), "fields": _field_tables(), "names": _name_tables()}
    return _insert(page, tables)


def update_limits(page: str) -> str:
    """Returns the page of the server with a new table of limits."""
    rows = [(f"`{name}`", x.text, str(x.meta.description)) for name, x in LIMITS.items()]
    return _insert(page, {"limits": _table(("limit", "default", "meaning"), rows)})


def _insert(page: str, tables: Mapping[str, str]) -> str:
    for name, new in tables.items():
        before, start, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        assert start and end, f"no section '<!-- {name} -->' ... '<!-- /{name} -->'"
        page = f"{before}{start}\n{new}\n{end}{after}"
    return page


# Field or group -> each allowed name -> a function or class.
NAMED: dict[str, Mapping[str, Any]] = {
    "model": build_system.MODELS, "fusion": fusion.FUSIONS,
    "transforms": {name: one.function for name, one in augment.TRANSFORMS.items()},
    "loss.classification": losses.CLASSIFICATION, "loss.focal": losses.CLASSIFICATION,
    "loss.margin_type": losses.MARGINS, "optim.name": optim.OPTIMIZERS,
    "optim.decay": optim.DECAYS,
    "eval.scores": {name: function for name, (function, _) in build_system.SCORES.items()},
    "data.name": sources.DATASETS,
}  # fmt: skip


def _summary(function: Any) -> str:
    """Returns the first line of the docstring of a function or class."""
    doc = function.__doc__ or ""
    doc = "" if doc.startswith(f"{function.__name__}(") else doc  # the signature of a dataclass
    line = doc.strip().partition("\n")[0].rstrip(".").removeprefix("Returns ")
    return (line[:1].upper() + line[1:]).replace("|", "\\|")


def _argument_table() -> str:
    rows = [("all", f"`{word}`", meaning) for word, meaning in SCALE_WORDS.items()]
    for path in sorted(config_io.shipped_folder().glob("*.py")):
        words: Mapping[str, str] = getattr(config_io.load_module(path), "WORDS", {})
        own = (word for word in words if word not in SCALE_WORDS)
        rows += [(f"`{path.name}`", f"`{word}`", words[word]) for word in own]
    rows.append(("all", "names of modalities", "the modalities to use, e.g. `face,head`"))
    return _table(("configuration", "argument", "meaning"), rows)


def _field_tables() -> str:
    tables = []
    for group in (None, *(row for row in TABLE if isinstance(row, Group))):
        prefix = group.name if group else ""
        rows = [
            (f"`{name}`", _cell(field.default), _meaning(field))
            for name, field in FIELDS.items()
            if name.rpartition(".")[0] == prefix
        ]
        heading = f"**`{prefix}`**: {_meaning(group)}.\n\n" if group else ""
        tables.append(heading + (_table(("field", "default", "meaning"), rows) if rows else ""))
    return "\n".join(tables)


def _meaning(row: Field | Group) -> str:
    names = ", ".join(f"`{name}`" for name in NAMED.get(row.name, ()))
    return f"{row.doc}; choose from {names}" if names else row.doc


def _cell(value: object) -> str:
    return value_text(value) if value in (None, (), "") else f"`{value_text(value)}`"


def _name_tables() -> str:
    shared: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for field, table in NAMED.items():
        names = tuple((name, _summary(function)) for name, function in table.items())
        shared.setdefault(names, []).append(f"`{field}`")
    tables = {", ".join(fields): names for names, fields in shared.items()}
    tables["metric"] = tuple((name, f"{m.label}: {m.about}") for name, m in CLIP_METRICS.items())
    return "\n".join(
        _table((head, "meaning"), [(f"`{name}`", meaning) for name, meaning in names])
        for head, names in tables.items()
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([text[0], "|" + "---|" * len(head), *text[1:]]) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text((update_limits if path.samefile(SERVER) else update)(path.read_text()))
