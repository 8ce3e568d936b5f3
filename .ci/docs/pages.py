"""Writes the pages of the site into a new folder, from the Markdown files of the repository.

    python .ci/docs/pages.py FOLDER

Each Markdown file is a page. The sections `READERS` of README.md are pages of their own. The
commands of README install vidjax from the index, not from a checkout. A link to a file that is no
page becomes a link to GitHub. Any generator that reads mkdocs.yml can make the site from these
pages: this program imports no generator.
"""

import ast
import posixpath
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("README.md", "configs/*.md", "tests/**/*.md", "vidjax/**/*.md", ".github/[A-Z]*.md")
READERS = {  # page -> section
    "researchers.md": "For vision researchers",
    "engineers.md": "For engineers",
    "films.md": "Who is in my films?",
}
CHECKOUT = "Where things are"  # the section of README that only people with a checkout need
# Commands of README in a checkout -> the same commands after an installation from the index.
INSTALLED = {
    r"git clone \S+ && cd vidjax": "mkdir vidjax && cd vidjax",
    r"(pip install )-e ('\.\[)": r"\1\2",
    r"'\.\[": "'vidjax[",
    r"python -m vidjax\.main ": "vidjax ",
    r"--config=configs/(\w+)\.py": r"--config=\1",
    "--config=configs/": "--config=",
    r"`(\w+)\.py(?=[:`])": r"`\1",  # names of configurations
}
PYTHON = ".ci/docs/python.md"  # the page of the public names
GITHUB = "https://github.com/vidjax/vidjax"
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
MODULES = """# Modules to extend

A configuration file may import these modules, see [Your own
experiments](configs/experiments.md). A table in
[Contributing](.github/CONTRIBUTING.md#where-things-go) lists what is added to which module.
"""


def main(folder: Path) -> None:
    """Writes the pages, and the pictures that they contain."""
    paths = [path for pattern in SOURCES for path in ROOT.glob(pattern)]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}
    texts["README.md"], readers = split_readme(read_readme())
    texts |= readers
    texts["python.md"] = read_python_page()
    texts["modules.md"] = list_modules(texts[".github/CONTRIBUTING.md"])
    moved = {anchor: page for page, text in readers.items() for anchor in find_anchors(text)}

    for page, text in texts.items():
        change = lambda found, page=page: change_link(page, found[0], texts, moved)  # noqa: E731
        text = edit_prose(r"(?<=\]\()[^)]+", change, text)
        # Markdown would add a table or code to the comment above it.
        text = edit_prose(r"^<!--.*-->$", lambda _: "", text)
        to = folder / page_path(page)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text)
    for path in ROOT.glob("colab/*.png"):
        to = folder / path.relative_to(ROOT)
        to.parent.mkdir(exist_ok=True)
        shutil.copy(path, to)


def page_path(page: str) -> str:
    """Returns the path of a page in the folder of pages. Generators ignore hidden folders."""
    return page.removeprefix(".github/")


def edit_prose(pattern: str, change: Callable[[re.Match[str]], str], text: str) -> str:
    """Replaces each match of `pattern` by the result of `change`, except in blocks of code."""
    parts = CODE.split(text)
    parts[::2] = [re.sub(pattern, change, part, flags=re.MULTILINE) for part in parts[::2]]
    return "".join(parts)


def find_anchors(text: str) -> list[str]:
    """Returns the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", text), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def change_link(page: str, link: str, pages: Iterable[str], moved: Mapping[str, str]) -> str:
    """Returns a link of a page of the repository, as it is in the folder of pages."""
    path, hash_sign, anchor = link.partition("#")
    to = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    if "://" in link or not (to in pages or (ROOT / to).exists()):
        return link  # if there is no such file, the generator reports the link
    if to == "README.md" or to in READERS:
        to = moved.get(anchor, "README.md")
    if to not in pages and not to.endswith(".png"):
        return f"{github_address(to, 'main')}{hash_sign}{anchor}"
    start = posixpath.dirname(page_path(page))
    return f"{posixpath.relpath(page_path(to), start)}{hash_sign}{anchor}"


def github_address(path: str, version: str) -> str:
    """Returns the address of a file or folder of the repository, in a branch or a tag."""
    kind = "tree" if (ROOT / path).is_dir() else "raw" if path.endswith(".png") else "blob"
    return f"{GITHUB}/{kind}/{version}/{path}"


def read_readme() -> str:
    """Returns README for readers who install vidjax from the index and have no checkout."""
    text = (ROOT / "README.md").read_text()
    text, found = re.subn(rf"^## {CHECKOUT}\n.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)
    if found != 1:
        raise SystemExit(f"README.md has no section '## {CHECKOUT}'")
    for command, installed in INSTALLED.items():
        text, found = re.subn(command, installed, text)
        if not found:
            raise SystemExit(f"README.md contains no command like {command}")
    return text


def split_readme(text: str) -> tuple[str, dict[str, str]]:
    """Returns README without the sections of `READERS`, and page -> section."""
    first, *rest = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    sections = {section.partition("\n")[0].removeprefix("## "): section for section in rest}
    pages = {page: sections.pop(heading) for page, heading in READERS.items()}
    pages = {page: edit_prose("^#(?=#)", lambda _: "", text) for page, text in pages.items()}
    return first + "".join(sections.values()), pages


def read_python_page() -> str:
    """Returns the page of the public names. It must contain each name of `vidjax.__all__` once."""
    text = (ROOT / PYTHON).read_text()
    module = ast.parse((ROOT / "vidjax/__init__.py").read_text()).body
    values = {ast.unparse(x.targets[0]): x.value for x in module if isinstance(x, ast.Assign)}
    names = ast.literal_eval(values["__all__"])
    shown = re.findall(r"^::: vidjax\.(\w+)$", text, re.MULTILINE)
    if sorted(shown) != sorted(names):
        raise SystemExit(f"{PYTHON} has {sorted(shown)}\nvidjax.__all__ has {sorted(names)}")
    return text


def list_modules(contributing: str) -> str:
    """Returns a page of the modules that CONTRIBUTING names in full."""
    section = contributing.partition("## Where things go")[2].partition("\n## ")[0]
    paths = dict.fromkeys(re.findall(r"`(vidjax/\S+)\.py`", section))
    options = "    options: { heading_level: 2 }"
    return MODULES + "".join(f"\n::: {x.replace('/', '.')}\n{options}\n" for x in paths)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
