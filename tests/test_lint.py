"""What ruff has no rule for; its rules are in pyproject.toml and tests/faults/ruff.toml."""

import ast
import contextlib
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE_BUILTINS = ("__import__", "compile", "eval", "exec")  # ruff bans calls, not their names
FAULT_TESTS = sorted((ROOT / "tests" / "faults").glob("test_*.py"))


def unsafe(source):
    """Returns the lines that turn data into code in a way that ruff has no rule for."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in CODE_BUILTINS:
            lines.append(node.lineno)
        elif isinstance(node, ast.Call):
            load = ast.unparse(node.func) in ("np.load", "numpy.load", "jnp.load")
            if load and (len(node.args) > 1 or any(word.arg is None for word in node.keywords)):
                lines.append(node.lineno)
            for word in node.keywords:
                if word.arg == "allow_pickle" and ast.unparse(word.value) != "False":
                    lines.append(node.lineno)
    return lines


def test_nothing_turns_data_into_code():
    for path in (*(ROOT / "vidjax").rglob("*.py"), *(ROOT / "configs").glob("*.py")):
        assert not unsafe(path.read_text()), path


def test_that_would_be_seen():
    assert unsafe("np.load(f, allow_pickle=flag)") and unsafe("np.load(f, **options)")
    assert unsafe("run = eval") and not unsafe("np.load(f)\nre.compile('x')\nmodel.eval()")


@functools.cache
def patches(source):
    """Returns `line: code` where a test replaces a function instead of causing a fault.

    Programs in its strings, for processes of its own, are looked at as well: ruff cannot.
    """
    tree, lines = ast.parse(source), []
    modules = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    bases = {id(node.value) for node in attributes}
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""
        replaced = (
            re.search(r"mock|MonkeyPatch|interrupt_dispatch", text)
            or re.search(r"(^|\.)(set|del)(attr|item)$", text)
            or (isinstance(node, ast.arg) and node.arg == "mocker")
            # The fixture's chdir and setenv are harmless; handed on, it may do anything.
            or (text == "monkeypatch" and id(node) not in bases)
            or (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, (ast.Store, ast.Del))
                and text.split(".")[0] in modules
            )
        )
        if replaced:
            lines.append(f"{getattr(node, 'lineno', 0)}: {text}")
        if isinstance(node, ast.Constant) and "import" in str(node.value):
            with contextlib.suppress(SyntaxError):  # it is prose
                lines += patches(str(node.value))
    return lines


def with_helpers(path):
    """Returns a test and the modules of the tests that it imports."""
    names = set(re.findall(r"^from (tests\.\w+)(?:\.(\w+))? import (\w+)", path.read_text(), re.M))
    files = [ROOT / Path(*package.split("."), module or name) for package, module, name in names]
    files = [file.with_suffix(".py") for file in files if file.name != "small_runs"]
    return [path, *(file for file in files if file.exists())]


@pytest.mark.parametrize("path", FAULT_TESTS, ids=lambda path: path.name)
def test_fault_tests_cause_the_fault(path):
    for file in with_helpers(path):
        assert not patches(file.read_text()), file


def test_a_patched_fault_would_be_seen():
    assert patches("def test(monkeypatch): monkeypatch.setattr(os, 'replace', broken)")
    assert patches("import os\nos.replace = broken")
    assert patches("run(['-c', 'from unittest import mock\\nmock.patch(x)'])")
    assert not patches("import os\nos.kill(pid, 9)\nos.environ['X'] = '1'\nself.path = path\n")
