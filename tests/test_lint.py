"""What ruff refuses with the project's settings, and the little that it cannot express."""

import ast
import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted([*(ROOT / "vidjax").rglob("*.py"), *(ROOT / "configs").glob("*.py")])
FAULT_TESTS = sorted((ROOT / "tests" / "faults").glob("test_*.py"))


def refused(source, path):
    """Returns the codes of the rules by which ruff refuses a source at a path of the tree."""
    words = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"]
    done = subprocess.run(
        [*words, "--stdin-filename", str(ROOT / path), "-"],
        input=source,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    return set(re.findall(r" ([A-Z]+[0-9]+)(?= )", done.stdout))


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import pickle\npickle.load(f)", "S301"),
        ("import pickle\nx = pickle.loads", "TID251"),
        ("import pickle as p\np.loads(x)", "S301"),
        ("import _pickle", "TID251"),
        ("from pickle import loads", "TID251"),
        ("from pickle import Unpickler as U", "TID251"),
        ("from pickle import *", "F403"),
        ("import pickle\nclass U(pickle.Unpickler): pass", "TID251"),
        ("eval('1')", "S307"),
        ("exec(text)", "S102"),
        ("import builtins\nbuiltins.eval(text)", "TID251"),
        ("from builtins import exec as run", "TID251"),
        ("import importlib\nimportlib.import_module(name)", "TID251"),
        ("from importlib import import_module", "TID251"),
        ("from importlib import util\nutil.spec_from_file_location('x', path)", "TID251"),
        ("import yaml\nyaml.load(f)", "S506"),
        ("from yaml import safe_load", "TID251"),
        ("import torch\ntorch.load(f)", "TID251"),
        ("import marshal", "TID251"),
        ("import shelve", "TID251"),
        ("def f():\n    import dill", "TID251"),
        ("import joblib\njoblib.load(f)", "TID251"),
        ("import runpy\nrunpy.run_path(p)", "TID251"),
        ("import os\nos.system('ls')", "S605"),
        ("from os import popen", "TID251"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "S602"),
        ("import subprocess as s\ns.Popen(words, shell=flag)", "S603"),
        ("import subprocess\nsubprocess.getoutput('ls')", "S605"),
    ],
)
def test_ruff_refuses_what_turns_data_into_code(source, rule):
    assert rule in refused(source, "vidjax/x.py")


@pytest.mark.parametrize(
    "source",
    [
        "from unittest import mock",
        "import unittest.mock",
        "from unittest.mock import patch",
        "from pytest import MonkeyPatch",
        "import pytest\nwith pytest.MonkeyPatch.context() as patch: pass",
    ],
)
def test_ruff_refuses_mocks_in_tests_of_faults(source):
    assert "TID251" in refused(source, "tests/faults/test_x.py")


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("import pickle\n\npickle.dump(x, f)\n", "vidjax/x.py"),
        ("import json\n\njson.load(f)\n", "vidjax/x.py"),
        ("import pickle\n\npickle.load(f)\n", "tests/test_x.py"),
        ("import pickle\n\npickle.load(f)\n", "tests/faults/test_x.py"),
    ],
)
def test_ruff_lets_the_harmless_pass(source, path):
    assert not refused(source, path) & {"S301", "TID251"}


CODE_BUILTINS = ("__import__", "compile", "eval", "exec")  # ruff bans calls, not their names


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


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_turns_data_into_code(path):
    assert not unsafe(path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "np.load(f, None, True)",
        "np.load(f, **options)",
        "run = eval",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
    ],
)
def test_that_would_be_seen(source):
    assert unsafe(source)
    assert not unsafe("np.load(f)\nnp.load(f, allow_pickle=False)\nre.compile('x')\nmodel.eval()")


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


@pytest.mark.parametrize(
    "source",
    [
        "def test(monkeypatch): monkeypatch.setattr(os, 'replace', broken)",
        "def test(monkeypatch): monkeypatch.setitem(table, 'save', broken)",
        "def test(monkeypatch): broken_save(monkeypatch)",
        "def test(mocker): mocker.patch('builtins.open')",
        "import os\nos.replace = broken",
        "import os.path\nos.path.exists = broken",
        "import signal as s\ns.signal = broken",
        "from vidjax.run import checkpoint\ncheckpoint.save = broken",
        "import os\nsetattr(os, 'replace', broken)",
        "from tests.helpers import small_runs\nsmall_runs.interrupt_dispatch(patch, 1, 2)",
        "run(['-c', 'import os\\nos.replace = None'])",
        "run(['-c', 'from unittest import mock\\nmock.patch(x)'])",
    ],
)
def test_a_patched_fault_would_be_seen(source):
    assert patches(source)


def test_causing_a_fault_is_no_patch():
    source = (
        "import os, signal, resource\n"
        "os.kill(pid, signal.SIGKILL)\nos.environ['X'] = '1'\nself.path = path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "run(['-c', 'import sys; sys.stdin.read()', 'words of import'])\n"
        "def test(monkeypatch):\n    monkeypatch.chdir(path)\n"
    )
    assert not patches(source)
