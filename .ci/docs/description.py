"""Writes the description of vidjax on the package index, which is made from README.md.

    python .ci/docs/description.py FILE

The index shows the description without the repository, and never changes the description of a
published version. So the commands install vidjax from the index, and all links are absolute. They
lead to the files of this version.
"""

import re
import sys
from pathlib import Path

import pages


def main(file: Path) -> None:
    """Writes the description to a file."""
    source = (pages.ROOT / "vidjax/utils/version.py").read_text()
    [version] = re.findall(r'^VERSION = "(.*)"$', source, re.MULTILINE)
    tag = "main" if "dev" in version else f"v{version}"
    text = pages.edit_prose(r"^<!--.*-->\n", lambda _: "", pages.read_readme())
    change = lambda found: make_absolute(found[0], tag)  # noqa: E731
    file.write_text(pages.edit_prose(r"(?<=\]\()[^)]+", change, text))


def make_absolute(link: str, tag: str) -> str:
    """Returns the address of a link of README in the repository, at a tag."""
    if "://" in link:
        return link
    path, hash_sign, anchor = link.partition("#")
    if not (pages.ROOT / path).exists():
        raise SystemExit(f"README.md has a link to {path}, which does not exist")
    return f"{pages.github_address(path or 'README.md', tag)}{hash_sign}{anchor}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
