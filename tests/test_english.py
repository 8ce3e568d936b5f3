"""Prose is plain English: docstrings, comments, messages and pages avoid a list of words."""

import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("vidjax", "configs", "colab", ".github")
PAGES = [
    *(
        path
        for folder in FOLDERS
        for kind in ("*.py", "*.md", "*.j2", "*.ipynb")
        for path in sorted((ROOT / folder).rglob(kind))
    ),
    *(ROOT / name for name in ("README.md", "tests/README.md", "tests/benchmarks/README.md")),
]
# Words of sentences that leave out a noun, or that are translated word by word.
AVOIDED = re.compile(
    r"\b(alone|beside|once more|told|anew|somebody|whoever|hearsay|(that|those) of)\b"
    r"|[;,] else\b",
    re.IGNORECASE,
)
# Names that say nothing about the thing, and how often the library may still use them.
VAGUE = {"found": 50, "one": 50}


def read_prose(path):
    """Yields (line number, text) of the comments, strings and paragraphs of a file."""
    text = path.read_text()
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            comment = token.type == tokenize.COMMENT
            if comment or (token.type == tokenize.STRING and " " in token.string):
                yield token.start[0], token.string
    elif path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(text)["cells"]):
            yield number, "".join(cell["source"])
    else:
        for number, line in enumerate(text.splitlines(), 1):
            # Rows of CONTRIBUTING show the habit; rows of benchmarks are written by scripts.
            shown = path.match(".github/*") or path.match("benchmarks/*")
            if not line.startswith("| ") or not shown:
                yield number, re.sub(r"`[^`]*`|\"[^\"]*\"", "", line)  # names and quotations


@pytest.mark.parametrize("folder", [*FOLDERS, "README.md", "tests"])
def test_prose_avoids_vague_and_translated_words(folder):
    pages = [path for path in PAGES if path.is_relative_to(ROOT / folder)]
    assert pages
    assert not [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in pages
        for number, text in read_prose(path)
        if (match := AVOIDED.search(text))
    ]


def test_vague_words_are_rare():
    text = "\n".join(path.read_text() for path in (ROOT / "vidjax").rglob("*.py"))
    counts = {word: len(re.findall(rf"\b{word}\b", text)) for word in VAGUE}
    assert all(counts[word] <= VAGUE[word] for word in VAGUE), counts
