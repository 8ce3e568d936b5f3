"""The house: what may import what, no unsafe loader, and a README whose words exist."""

import ast
import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vidjax import config as config_lib
from vidjax.run import workdir

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = sorted((ROOT / "vidjax").rglob("*.py"))


def imports(path):
    """Yields the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_tensorflow_is_known_to_the_data_room_alone():
    for path in MODULES:
        if path.parent.name != "records":
            found = [name for name in imports(path) if name.startswith("tensorflow")]
            assert not found, f"{path} imports {found}"


def test_everything_else_works_without_tensorflow():
    rooms = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in MODULES
        if "data" not in path.parts and path.name != "__init__.py"
    ]
    code = (
        "import importlib, sys\n"
        "for name in ('tensorflow', 'tensorflow_datasets'): sys.modules[name] = None\n"
        f"for room in {rooms}: importlib.import_module(room)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "room",
    ["models", "selection.py", "fusion.py", "augment.py", "losses.py", "metrics.py", "batch.py"],
)
def test_lower_rooms_know_no_configuration_and_no_loop(room):
    path = ROOT / "vidjax" / room
    for file in path.rglob("*.py") if path.is_dir() else [path]:
        above = (
            "vidjax.modes.train",
            "vidjax.modes.evaluate",
            "vidjax.steps.train_step",
            "vidjax.config",
            "vidjax.data",
        )
        found = [n for n in imports(file) if n.startswith((*above, "ml_collections"))]
        assert not found, f"{file} imports {found}"


CAGE = "vidjax/data/untrusted/unpickle.py"  # the one place that may unpickle
CONFIGS = "vidjax/config_files.py"  # runs the configuration that the user names: a program
# What turns data into code, and who may use it all the same.
UNSAFE_MODULES = ("cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "runpy", "shelve")
UNSAFE_MODULES += ("code", "codeop", "torch", "yaml")
UNSAFE_NAMES = {
    **dict.fromkeys(("__import__", "compile", "eval", "exec"), ()),
    **dict.fromkeys(("pickle.Unpickler", "pickle._Unpickler", "_pickle.Unpickler"), (CAGE,)),
    **dict.fromkeys(("pickle.load", "pickle.loads", "_pickle.load", "_pickle.loads"), (CAGE,)),
    **dict.fromkeys(("os.popen", "os.system"), ()),
    **dict.fromkeys(("subprocess.getoutput", "subprocess.getstatusoutput"), ()),
    **dict.fromkeys(
        ("importlib.import_module", "importlib.__import__", "pkgutil.resolve_name"), ()
    ),
    "importlib.util.spec_from_file_location": (CONFIGS,),
}
UNSAFE_KEYWORDS = ("allow_pickle", "shell")  # any value but False
GUARDED = ("pickle", "_pickle", "builtins")  # to be used by `module.name` alone, and never renamed


def origins(tree):
    """Returns what the names of a file stand for: name -> dotted origin, of its imports."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.split(".")[0]
                found[alias.asname or name] = name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def dotted(node, names):
    """Returns the dotted origin of an expression such as `p.loads`, None of any other."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else None
    return None


def unsafe(source, name="x.py"):
    """Returns what of a file turns data into code, or a string into a command: `line: what`."""
    tree = ast.parse(source)
    names, found = origins(tree), []
    used_by_attribute = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}

    def judge(node, origin):
        origin = origin.removeprefix("builtins.")
        if name not in UNSAFE_NAMES.get(origin, (name,)):
            found.append(f"{node.lineno}: {origin}")

    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            from_module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                judge(node, from_module + alias.name)
                root = (from_module + alias.name).split(".")[0]
                if root in UNSAFE_MODULES or alias.name == "*":
                    found.append(f"{node.lineno}: import of {from_module}{alias.name}")
        elif isinstance(node, (ast.Name, ast.Attribute)):
            origin = dotted(node, names) or ""
            if isinstance(node, ast.Attribute):
                judge(node, origin)
            else:
                if "." in origin or node.id == origin:
                    judge(node, origin)
                if origin in GUARDED and node.id in names and id(node) not in used_by_attribute:
                    found.append(f"{node.lineno}: {origin} handed on")
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                safe = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in UNSAFE_KEYWORDS and not safe:
                    found.append(f"{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
            more = len(node.args) > 1 or any(keyword.arg is None for keyword in node.keywords)
            if more and dotted(node.func, names) in ("numpy.load", "jax.numpy.load"):
                found.append(f"{node.lineno}: numpy.load with more than a file")
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(
    "path",
    [*MODULES, *sorted((ROOT / "configs").glob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_turns_data_into_code(path):
    assert not unsafe(path.read_text(), str(path.relative_to(ROOT)))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "import pickle\nx = pickle.loads",
        "import pickle as p\np.loads(x)",
        "import _pickle\n_pickle.loads(x)",
        "from pickle import loads",
        "from pickle import Unpickler as U",
        "from pickle import *",
        "import pickle\nclass U(pickle.Unpickler): pass",
        "import pickle\ngetattr(pickle, 'lo' + 'ads')(x)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, allow_pickle=yes)",
        "import numpy as np\nnp.load(f, None, True)",
        "import numpy as np\nnp.load(f, **options)",
        "from numpy import load\nload(f, None, True)",
        "eval('1')",
        "exec(text)",
        "x = eval",
        "import builtins\nbuiltins.eval(text)",
        "from builtins import exec as run",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module",
        "from importlib import util\nutil.spec_from_file_location('x', path)",
        "import yaml\nyaml.load(f)",
        "from yaml import safe_load",
        "import torch\ntorch.load(f)",
        "import marshal",
        "import shelve",
        "def f():\n    import dill",
        "import joblib\njoblib.load(f)",
        "import runpy\nrunpy.run_path(p)",
        "import os\nos.system('ls')",
        "from os import popen",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess as s\ns.Popen(words, shell=flag)",
        "import subprocess\nsubprocess.getoutput('ls')",
    ],
)
def test_that_would_be_seen(source):
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.dump(x, f)\nraise pickle.PickleError",
        "import re\nre.compile('x')",
        "import ast\nast.literal_eval(text)",
        "import json\njson.load(f)",
        "import numpy as np\nnp.load(f)\nnp.load(f, allow_pickle=False)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "model.eval()\nself.exec(x)\nfoo.compile()",
        "def load(f): return f.load()",
    ],
)
def test_the_harmless_is_not_taken_for_it(source):
    assert not unsafe(source)


FAULT_TESTS = sorted((ROOT / "tests" / "faults").glob("test_*.py"))


def patches(source):
    """Returns where a test replaces a function instead of causing a fault: `line: what`.

    Programs in its strings, for processes of its own, are looked at as well.
    """
    tree = ast.parse(source)
    names, found = origins(tree), []
    modules = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    bases = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        words: list[str] = []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            words = [module + alias.name for alias in node.names]
        elif isinstance(node, ast.arg):
            words = [node.arg]
        elif isinstance(node, ast.keyword):
            words = [node.arg or ""]
        elif isinstance(node, (ast.Name, ast.Attribute)):
            words = [dotted(node, names) or getattr(node, "attr", "")]
        for word in words:
            if re.search(r"mock|MonkeyPatch|interrupt_dispatch", word):
                found.append(f"{getattr(node, 'lineno', 0)}: {word}")
        if isinstance(node, ast.Attribute) and re.fullmatch("(set|del)(attr|item)", node.attr):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Name) and node.id == "monkeypatch" and id(node) not in bases:
            found.append(f"{node.lineno}: monkeypatch handed on")  # chdir and setenv are harmless
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and (base.id in modules or base.id in names):
                found.append(f"{node.lineno}: {ast.unparse(node)} replaced")
        if isinstance(node, ast.Call) and dotted(node.func, names) in ("setattr", "delattr"):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and "import" in node.value
        ):
            with contextlib.suppress(SyntaxError):  # it is prose
                found += [f"{node.lineno}, in a string, {what}" for what in patches(node.value)]
    return found


def helpers(path):
    """Returns the other files of the tests that a test imports."""
    names = {tuple(name.split(".")[1:3]) for name in imports(path) if name.startswith("tests.")}
    files = (
        (ROOT / "tests").joinpath(*name).with_suffix(".py")
        for name in names - {("helpers", "small_runs")}  # of other tests, too
    )
    return [file for file in files if file.exists()]


@pytest.mark.parametrize("path", FAULT_TESTS, ids=lambda path: path.name)
def test_fault_tests_cause_the_fault(path):
    for file in [path, *helpers(path)]:
        assert not patches(file.read_text()), file


@pytest.mark.parametrize(
    "source",
    [
        "def test(monkeypatch): monkeypatch.setattr(os, 'replace', broken)",
        "def test(monkeypatch): monkeypatch.setitem(table, 'save', broken)",
        "def test(monkeypatch): broken_save(monkeypatch)",
        "import pytest\nwith pytest.MonkeyPatch.context() as patch: pass",
        "from pytest import MonkeyPatch",
        "from unittest import mock",
        "import unittest.mock",
        "from unittest.mock import patch",
        "def test(mocker): mocker.patch('builtins.open')",
        "import os\nos.replace = broken",
        "import os.path\nos.path.exists = broken",
        "import builtins\nbuiltins.open = broken",
        "import signal as s\ns.signal = broken",
        "from vidjax.run import checkpoint\ncheckpoint.save = broken",
        "import os\nsetattr(os, 'replace', broken)",
        "from tests.helpers import small_runs\nsmall_runs.interrupt_dispatch(patch, 1, 2)",
        "run(['-c', 'import os\\nos.replace = None'])",
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


def fault_table():
    """Returns number of a fault -> the tests that the README's table names for it."""
    assert "\n## Faults\n" in README, "README.md has no section '## Faults'"
    section = README.split("\n## Faults\n")[1].split("\n## ")[0]
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells or not cells[0][:1].isdigit():
            continue
        assert len(cells) == 4, f"{line}: wanted | # | fault | behaviour | test |"
        for part in cells[0].split(","):
            first, _, last = part.strip().partition("-")
            for number in range(int(first), int(last or first) + 1):
                assert number not in found, f"fault {number} has two rows"
                found[number] = re.findall(r"`([^`]+)`", cells[3])
    return found


def test_readme_has_a_row_for_every_fault():
    assert sorted(fault_table()) == [*range(1, 40), 41, 42]


def test_the_tests_of_the_fault_table_exist():
    for number, tests in fault_table().items():
        assert tests, f"fault {number} names no test"
        for test in tests:
            name, _, function = test.partition("::")
            assert (ROOT / name).is_file(), f"fault {number}: no file {name}"
            tree = ast.parse((ROOT / name).read_text())
            there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert function in there, f"fault {number}: no test {test}"
            assert function.startswith("test_"), test


def table(heading):
    """Returns the first cells of the table under a heading of the README, without backticks."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row)]


def test_readme_lists_every_field_and_no_other():
    fields = {name for name, _ in config_lib.fields(config_lib.default())}
    assert {name.removeprefix("config.") for name in table("Fields")} == fields


def test_readme_lists_every_flag_and_no_other():
    source = (ROOT / "vidjax" / "command_line.py").read_text()
    flags = set(re.findall(r'add_argument\(\s*"(--[\w.]+)', source))
    named = [word for word in table("Flags") if word.startswith("--")]  # not the arguments
    assert {re.split(r"[=\[]", flag)[0] for flag in named} == flags


@pytest.mark.slow
def test_readme_lists_the_files_of_a_workdir(official_dir, cache_dir, tmp_path):
    from tests.helpers.small_runs import shrunk
    from vidjax.data.records import pipeline
    from vidjax.modes import train

    # Of all experiments, the one that leaves most.
    config = shrunk("--config.num_epochs=2", spec="configs/noise_classes.py:iqiyi_vid")
    data = pipeline.load("iqiyi_vid", directory=str(official_dir), cache_dir=str(cache_dir))
    with workdir.lock(tmp_path):
        train.train(config, tmp_path, data, num_devices=1, analyse=True)
    written = {re.sub(r"tfevents\..*", "tfevents.*", p.name) for p in tmp_path.iterdir()}
    named = {name.split("/")[0] for name in table("Files of a workdir")}
    assert written == {name for name in named if "_SPLIT" not in name}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configurations_show_their_command(path):
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python -m vidjax.main --config=configs/{path.name}" in doc
    assert f"configs/{path.name}" in README


def test_code_names_no_machine():
    for path in [*MODULES, *(ROOT / "configs").glob("*.py"), ROOT / "README.md"]:
        assert not re.search(r"/work/|/root/|/tmp/", path.read_text()), path
