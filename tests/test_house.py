"""The layout of the package: what may import what, and what is installed."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "vidjax").rglob("*.py"))
    if path.name != "__init__.py"
}
PACKAGES = sorted(
    ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "vidjax").rglob("__init__.py")
)

# Files and folders of vidjax/, the highest first: each may import only what stands below it.
LAYERS = (
    "__main__", "main", "who", "forget", "commands", "export", "serve", "gallery",
    "extract", "api", "predict", "bulk", "comparison", "training", "analysis", "evaluation",
    "report", "significance", "ranking", "steps", "system", "models", "losses", "logit_ops",
    "optim", "metrics", "augment", "fusion", "ensemble", "tables", "run", "config_io", "config",
    "data", "devices", "distributed", "batch",
)  # fmt: skip
# What a folder may import of vidjax besides itself, where that is less than all below it.
MAY_IMPORT = {
    "extract": {"data", "errors", "files", "machine", "messages", "run"},  # no JAX
    # Plain arguments, no config objects.
    "models": {"batch", "devices", "ensemble", "errors", "fusion", "logit_ops", "machine"},
    "report": {"config", "config_io", "data", "errors", "files", "metrics", "run", "significance",
               "tables"},
    "run": {"config", "config_io", "distributed", "errors", "files"},  # no maths
    "data": {"batch", "devices", "errors", "files", "machine", "messages"},
    "data/records": {"batch", "data", "errors", "files", "machine", "messages"},
    "data/untrusted": {"errors"},
}  # fmt: skip
TENSORFLOW = {"tensorflow", "tensorflow_datasets"}
JAX = {"flax", "jax", "optax", "orbax"}
# Libraries that a folder may not import, neither itself nor by what it imports.
WITHOUT = {
    "vidjax.data.untrusted": {*JAX, *TENSORFLOW, "ml_collections", "sklearn"},
    "vidjax.extract": {*JAX, *TENSORFLOW, "torch"},
    "vidjax.gallery": {*JAX, *TENSORFLOW, "ml_collections", "pyarrow", "scipy"},
    "vidjax.models": {*TENSORFLOW, "ml_collections", "matplotlib", "orbax"},
    "vidjax.report": {*JAX, *TENSORFLOW},
}


@functools.cache
def imports(path):
    """Returns the modules that a file imports, in functions too, except for type checkers."""
    nodes, found = list(ast.parse(path.read_text()).body), set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
        else:
            nodes += ast.iter_child_nodes(node)
    return found


def folder(module):
    """Returns the first part below vidjax, with the second one where that is a package."""
    parts = module.split(".")[1:]
    return "/".join(parts[: 2 if len(parts) > 2 else 1])


def test_no_import_circle():
    graph = {
        module: {name for name in imports(path) if name in MODULES} - {module}
        for module, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


def test_imports_point_down():
    for module, path in MODULES.items():
        top = module.split(".")[1]
        level = LAYERS.index(top) if top in LAYERS else None
        for name in imports(path):
            if not name.startswith("vidjax.") or folder(name) == folder(module):
                continue
            below = name.split(".")[1]
            if level is not None and below in LAYERS and below != top:
                assert LAYERS.index(below) > level, f"{module} imports {name}"
            if folder(module) in MAY_IMPORT and below != top:
                assert below in MAY_IMPORT[folder(module)], f"{module} imports {name}"


def test_every_file_and_folder_has_a_layer():
    """What no layer names are helpers at the bottom, which import nothing that a layer names."""
    tops = {module.split(".")[1] for module in MODULES}
    assert set(LAYERS) <= tops
    for module, path in MODULES.items():
        if module.split(".")[1] not in LAYERS:
            names = [name for name in imports(path) if name.startswith("vidjax.")]
            assert not {name.split(".")[1] for name in names} & set(LAYERS), module


def test_only_the_records_know_tensorflow():
    for module, path in MODULES.items():
        if folder(module) != "data/records":
            assert not {name.split(".")[0] for name in imports(path)} & TENSORFLOW, module


def import_without(modules, libraries):
    """Imports modules in a process for which some libraries are not installed."""
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(libraries)}: sys.modules[name] = None\n"
        f"for name in {sorted(modules)}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_everything_but_the_data_works_without_tensorflow():
    import_without([name for name in MODULES if ".data." not in name], TENSORFLOW)


@pytest.mark.parametrize("package", WITHOUT)
def test_folders_import_without_the_libraries_they_may_not_know(package):
    import_without([name for name in MODULES if name.startswith(f"{package}.")], WITHOUT[package])


def test_every_package_is_installed():
    """pyproject.toml names the packages one by one; one that it forgets is missing in the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(project["packages"]) == sorted([*PACKAGES, "vidjax.configs"])
    assert project["package-dir"] == {"vidjax.configs": "configs"}


def test_contributing_names_what_exists():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", text.split("## Where things go")[1], re.M)
    assert len(rows) > 5
    for _, place, table in rows:
        paths = re.findall(r"`([\w/.]+/[\w.]*)`", f"{place} {table}")
        assert all((ROOT / path).exists() for path in paths), paths
        for name in re.findall(r"`([A-Z_]{4,})`", table):
            assert re.search(rf"^{name}\b.*=", (ROOT / paths[-1]).read_text(), re.M), name


def test_code_names_no_machine():
    for path in [*MODULES.values(), *(ROOT / "configs").glob("*.py"), ROOT / "README.md"]:
        assert not re.search(r"/work/|/root/|/tmp/", path.read_text()), path
