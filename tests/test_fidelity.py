"""The table of the publications' statements names what exists."""

import ast
import functools
import re
from pathlib import Path

from vidjax.runs import config as config_lib
from vidjax.runs import config_io

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "configs" / "fidelity.md"
ANSWERS = ("exact", "differs", "open", "not possible")
MODALITIES = ("face", "head", "body", "audio", "scene", "title")
MODES = ("train", "evaluate", "rank", "compare", "report", "check", "config")


def names():
    """Returns everything in backticks, each once."""
    return sorted(set(re.findall(r"`([^`]+)`", PAGE.read_text())) - {*ANSWERS, "published"})


@functools.cache
def members(path):
    """Returns the names that a module and its classes define, `Class.attribute` included."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        found |= defined(node)
        if isinstance(node, ast.ClassDef):
            inner = set().union(*map(defined, node.body))
            found |= {f"{node.name}.{name}" for name in inner}
    return frozenset(found)


def defined(node):
    """Returns the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@functools.cache
def fields():
    """Returns the names of all fields: those of every configuration, of models and of fusions."""
    known = {f"config.{name}" for name, _ in config_lib.fields(config_lib.default())}
    known |= {name.rsplit(".", 1)[0] for name in known if name.count(".") > 1}  # groups
    for path in (ROOT / "vidjax" / "models").glob("*.py"):
        attributes = {name.split(".")[1] for name in members(path) if "." in name}
        known |= {f"config.model.{name}" for name in attributes}
    for node in ast.parse((ROOT / "vidjax/core/fusion.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            known |= {f"config.fusion.{option.arg}" for option in node.args.kwonlyargs}
    return frozenset(known)


def has_field(name):
    """Returns whether `config.NAME` is a field; fusions are given per modality and phase."""
    name = re.sub(r"^config\.fusion\.\w+\.(train|evaluate)\.", "config.fusion.", name)
    return name in fields()


configuration = functools.cache(config_io.load_module)  # of a path


def is_command(file, words):
    """Returns whether a configuration takes these arguments together."""
    path = ROOT / "configs" / file
    if not path.is_file() or {*words.split(",")} - {"", *MODALITIES, *configuration(path).WORDS}:
        return False
    return bool(configuration(path).get_config(words))


def problem(name):
    """Returns why a name in backticks is wrong; empty if what it names exists."""
    wrong = []
    for part in name.split():
        if part.startswith("--mode="):
            wrong += [part] * (part.removeprefix("--mode=") not in MODES)
        elif part.startswith(("--config=configs/", "--runs=", "--workdir=")):
            continue
        elif part.startswith("--config."):
            wrong += [part] * (not has_field(part[2:].split("=")[0]))
        elif part.startswith("config."):
            wrong += [part] * (not has_field(part.split("=")[0]))
        elif match := re.fullmatch(r"(\w+\.py)(?::([\w,]+))?", part):
            wrong += [part] * (not is_command(match[1], match[2] or ""))
        elif "/" in part:
            wrong += [part] * (not (ROOT / part).exists())
        else:
            wrong += [part] * (not is_code(part))
    return ", ".join(wrong)


def is_code(name):
    """Returns whether `module.name` or `module.Class.attribute` stands below vidjax/."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        path = (ROOT / "vidjax").joinpath(*parts[:i]).with_suffix(".py")
        if path.is_file():
            return ".".join(parts[i:]) in members(path)
    return False


def test_what_the_rows_name_exists():
    problems = {name: found for name in names() if (found := problem(name))}
    assert not problems
