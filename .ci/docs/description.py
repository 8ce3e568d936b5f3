"""Prints the description of vidjax on the package index, which is made from README.md.

    python .ci/docs/description.py > DESCRIPTION.md

The index shows the description without the repository, and never changes the description of a
published version. So the commands install vidjax from the index, and all links are absolute. They
lead to the files of this version.
"""

import re

import pages


def main() -> None:
    """Prints the description."""
    source = (pages.ROOT / "vidjax/utils/version.py").read_text()
    [version] = re.findall(r'^VERSION = "(.*)"$', source, re.MULTILINE)
    tag = "main" if "dev" in version else f"v{version}"
    text = pages.edit_prose(r"^<!--.*-->\n", lambda _: "", pages.read_readme())
    print(pages.edit_prose(r"(?<=\]\()[^)]+", lambda x: make_absolute(x[0], tag), text), end="")


def make_absolute(link: str, tag: str) -> str:
    """Returns the address of a link of README in the repository, at a tag."""
    if "://" in link:
        return link
    path, hash_sign, anchor = link.partition("#")
    if not (pages.ROOT / path).exists():
        raise SystemExit(f"README.md has a link to {path}, which does not exist")
    return f"{pages.github_address(path or 'README.md', tag)}{hash_sign}{anchor}"


if __name__ == "__main__":
    main()
