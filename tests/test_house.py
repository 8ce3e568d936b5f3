"""The layout of the package: what may import what, and what is installed."""

import ast
import functools
import graphlib
import re
import tomllib
from pathlib import Path

import pytest

from tests.helpers.cases import quick_first

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "vidjax").rglob("*.py"))
    if path.name != "__init__.py"
}
PACKAGES = sorted(
    ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "vidjax").rglob("__init__.py")
)

# The folders of vidjax/, from low to high. Imports point down.
FOLDERS = ("utils", "core", "data", "runs", "models", "evaluation", "training", "apps", "cli")
TENSORFLOW = {"tensorflow", "tensorflow_datasets"}
JAX = {"flax", "jax", "optax", "orbax"}
# Libraries that a folder may not import, neither itself nor by what it imports.
WITHOUT = {
    "vidjax.data.untrusted": {*JAX, *TENSORFLOW, "ml_collections", "sklearn"},
    "vidjax.apps.video": {*JAX, *TENSORFLOW, "torch"},
    "vidjax.apps.gallery": {*JAX, *TENSORFLOW, "ml_collections", "pyarrow", "scipy"},
    "vidjax.models": {*TENSORFLOW, "matplotlib", "orbax"},
    "vidjax.evaluation.report": {*JAX, *TENSORFLOW},
}


@functools.cache
def nodes_of(path):
    return [*ast.walk(ast.parse(path.read_text()))]


@functools.cache
def imports(path):
    """Returns the modules that a file imports, in functions too, except for type checkers."""
    modules, ignored = set(), set()
    for node in nodes_of(path):  # an `if` comes before what it contains
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            ignored |= {*node.body}
        elif isinstance(node, ast.Import) and node not in ignored:
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node not in ignored:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES else str(node.module) for name in names}
    return modules


def test_folders_import_only_lower_folders_without_cycles():
    for module, path in MODULES.items():
        _, folder, *rest = module.split(".")
        if not rest:
            assert folder in ("main", "__main__"), module
            continue
        names = imports(path)
        if not module.startswith("vidjax.data.records."):
            assert not {name.split(".")[0] for name in names} & TENSORFLOW, module
        for name in names:
            if name.startswith("vidjax."):
                below = name.split(".")[1]
                assert FOLDERS.index(below) <= FOLDERS.index(folder), f"{module} imports {name}"
                # Models get plain arguments. Only `system` reads a configuration.
                assert below != "runs" or folder != "models" or rest == ["system"], module
    graph = {module: imports(path) & {*MODULES} - {module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows a circle


@pytest.mark.parametrize("package", quick_first([*WITHOUT, "vidjax"], mark=pytest.mark.nightly))
def test_folders_import_without_their_forbidden_libraries(python, package):
    """All folders except `data` work without TensorFlow."""
    modules = [name for name in MODULES if name.startswith(f"{package}.")]
    if package == "vidjax":
        modules = [name for name in modules if ".data." not in name]
    python(
        "import importlib, sys\n"
        f"for name in {sorted(WITHOUT.get(package, TENSORFLOW))}: sys.modules[name] = None\n"
        f"for name in {modules}: importlib.import_module(name)\n"
    )


def test_every_package_is_installed():
    """pyproject.toml names the packages one by one; one that it forgets is missing in the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(project["packages"]) == sorted([*PACKAGES, "vidjax.configs"])
    assert project["package-dir"] == {"vidjax.configs": "configs"}


def unsafe(nodes):
    """Returns the lines that turn data into code."""
    lines = []
    for node in nodes:
        if isinstance(node, ast.Name) and node.id in ("__import__", "compile", "eval", "exec"):
            lines.append(node.lineno)
        elif isinstance(node, ast.Call):
            pickled = [word for word in node.keywords if word.arg == "allow_pickle"]
            lines += [word.lineno for word in pickled if ast.unparse(word.value) != "False"]
            if getattr(node.func, "attr", "") == "load":
                load = ast.unparse(node.func) in ("np.load", "numpy.load", "jnp.load")
                if load and (len(node.args) > 1 or any(word.arg is None for word in node.keywords)):
                    lines.append(node.lineno)
    return lines


def test_no_module_executes_data_as_code():
    """No module contains a path of its author's machine."""
    for path in (*MODULES.values(), *(ROOT / "configs").glob("*.py")):
        assert not unsafe(nodes_of(path)), path
        assert not re.search(r"/work/|/root/|/tmp/", path.read_text()), path
    for text in ("np.load(f, allow_pickle=flag)", "np.load(f, **options)", "run = eval"):
        assert unsafe(ast.walk(ast.parse(text)))
    assert not unsafe(ast.walk(ast.parse("np.load(f)\nre.compile('x')\nmodel.eval()")))


def test_fault_tests_use_no_mocks():
    """monkeypatch.chdir and setenv are allowed. Programs in strings are checked, too."""
    for path in (ROOT / "tests" / "faults").glob("test_*.py"):
        assert not re.search(r"mock|\.(set|del)(attr|item)\(|^(?!.*def ).*\(monkeypatch[,)]",
                             path.read_text(), re.M), path  # fmt: skip
