"""Writes the pages of the site into a folder, from the Markdown files of the repository.

    python .ci/docs/pages.py FOLDER

Each Markdown file is a page. The sections `READERS` of README.md are pages of their own. A link to
a file that is no page becomes a link to GitHub.
"""

import ast
import posixpath
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("README.md", "configs/*.md", "tests/**/*.md", "vidjax/**/*.md", ".github/C*.md")
READERS = {
    "researchers.md": "A result in a minute",
    "engineers.md": "A new person",
    "films.md": "Who is in my films?",
}
PYTHON = ".ci/docs/python.md"  # the page of the public names
GITHUB = "https://github.com/vidjax/vidjax"
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def main(folder: Path) -> None:
    paths = [path for pattern in SOURCES for path in ROOT.glob(pattern)]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}
    texts["README.md"], readers = split_readme(texts["README.md"])
    texts |= {"python.md": read_python_page(), "modules.md": list_modules()} | readers
    moved = {anchor: page for page, text in readers.items() for anchor in find_anchors(text)}

    for page, text in texts.items():
        change = lambda found, page=page: change_link(page, found[0], texts.keys(), moved)  # noqa: E731
        text = edit_prose(r"(?<=\]\()[^)]+", change, text)
        # Without the blank line, Markdown adds the table or the code below a comment to it.
        text = edit_prose(r"^<!--.*-->$", lambda _: "", text)
        to = folder / page_path(page)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text)
    (folder / "colab").mkdir()
    for path in ROOT.glob("colab/*.png"):
        shutil.copy(path, folder / "colab")


def page_path(page: str) -> str:
    """Returns the path of a page in the folder of pages. Generators ignore hidden folders."""
    return page.removeprefix(".github/")


def change_link(page: str, link: str, pages: Iterable[str], moved: Mapping[str, str]) -> str:
    """Returns a link of a page of the repository, as it is in the folder of pages."""
    path, hash_sign, anchor = link.partition("#")
    to = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    if "://" in link or not (to in pages or (ROOT / to).exists()):
        return link  # if the target does not exist, the generator reports the link
    if to in ("README.md", *READERS):
        to = moved.get(anchor, to)
    if to not in pages and not to.endswith(".png"):
        kind = "tree" if (ROOT / to).is_dir() else "blob"
        return f"{GITHUB}/{kind}/main/{to}{hash_sign}{anchor}"
    start = posixpath.dirname(page_path(page))
    return f"{posixpath.relpath(page_path(to), start)}{hash_sign}{anchor}"


def edit_prose(pattern: str, change: Callable[[re.Match[str]], str], text: str) -> str:
    """Returns a text in which `change` has edited each place of `pattern`, except in code."""
    parts = CODE.split(text)
    parts[::2] = [re.sub(pattern, change, part, flags=re.MULTILINE) for part in parts[::2]]
    return "".join(parts)


def find_anchors(text: str) -> list[str]:
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", text), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def split_readme(text: str) -> tuple[str, dict[str, str]]:
    """Returns README without the sections of `READERS`, and page -> section."""
    first, *rest = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    sections = {section.partition("\n")[0].removeprefix("## "): section for section in rest}
    raised = lambda section: edit_prose(r"^#(#+ .*)$", lambda found: found[1], section)  # noqa: E731
    pages = {page: raised(sections.pop(heading)) for page, heading in READERS.items()}
    return first + "".join(sections.values()), pages


def read_python_page() -> str:
    """Returns the page of the public names. Each name of `vidjax.__all__` must be there once."""
    text = (ROOT / PYTHON).read_text()
    module = ast.parse((ROOT / "vidjax/__init__.py").read_text()).body
    assigned = {ast.unparse(x.targets[0]): x.value for x in module if isinstance(x, ast.Assign)}
    names, shown = (
        ast.literal_eval(assigned["__all__"]),
        re.findall(r"^::: vidjax\.(\w+)$", text, re.MULTILINE),
    )
    if sorted(shown) != sorted(names):
        raise SystemExit(f"{PYTHON}: {sorted({*shown} ^ {*names})} is not both there and public")
    return text


def list_modules() -> str:
    """Returns a page of the modules that CONTRIBUTING names in full."""
    contributing = (ROOT / ".github/CONTRIBUTING.md").read_text()
    section = contributing.partition("## Where things go")[2].partition("\n## ")[0]
    paths = dict.fromkeys(re.findall(r"`(vidjax/\S+)\.py`", section))
    modules = "".join(f"\n::: {path.replace('/', '.')}\n" for path in paths)
    return f"""# Modules to extend

A configuration file may import these modules, see [A system of your
own](configs/README.md#a-system-of-your-own). [Contributing](.github/CONTRIBUTING.md#where-things-go)
describes what is added to which module.
{modules}"""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
