"""Prose is plain English: docstrings, comments, messages and pages avoid a list of words."""

import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Words of sentences that leave out a noun, or that are translated word by word.
AVOIDED = re.compile(
    r"\b(alone|beside|once more|told|anew|somebody|whoever|hearsay|(that|those) of)\b|[;,] else\b",
    re.IGNORECASE,
)


def read_prose(path):
    """Yields the comments and strings of a program, or the lines of a page without quotations."""
    text = path.read_text()
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT or (
                token.type == tokenize.STRING and " " in token.string
            ):
                yield token.string
    else:
        # Rows of CONTRIBUTING show the habit; rows of benchmarks are written by scripts.
        rows = path.match(".github/*") or path.match("benchmarks/*")
        for line in text.splitlines():
            if not (rows and line.startswith("| ")):
                yield re.sub(r"`[^`]*`|\"[^\"]*\"", "", line)


def test_prose_avoids_vague_and_translated_words():
    pages = [ROOT / name for name in ("README.md", "tests/README.md", "tests/benchmarks/README.md")]
    for folder in ("vidjax", "configs", "colab", ".github"):
        for kind in ("*.py", "*.md", "*.j2"):
            pages += (ROOT / folder).rglob(kind)
    prose = [(path, text) for path in pages for text in read_prose(path)]
    assert not [(str(path), text) for path, text in prose if AVOIDED.search(text)]
