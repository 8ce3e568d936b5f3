"""The layout of the package, and what is installed."""

import ast
import functools
import graphlib
import re
import tomllib

from tests.conftest import ROOT
from tests.helpers.cases import nightly_after_first
from vidjax.runs.config import FIELDS

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted((ROOT / "vidjax").rglob("*.py"))
    if path.name != "__init__.py"
}

# The folders of vidjax/, from low to high. Imports point down.
FOLDERS = ("utils", "core", "data", "runs", "models", "evaluation", "training", "apps", "cli")
# The same for vidjax/apps/.
APPS = (
    "bulk", "cards", "server_limits", "web", "gallery", "video", "forget", "serve",
)  # fmt: skip
TENSORFLOW = {"tensorflow", "tensorflow_datasets"}
JAX = {"flax", "jax", "optax", "orbax"}
# Folder -> libraries that neither the folder nor a module that it imports may import.
WITHOUT = {
    "vidjax.data.untrusted": {*JAX, *TENSORFLOW, "ml_collections", "sklearn"},
    "vidjax.apps.video": {*JAX, *TENSORFLOW, "torch"},
    "vidjax.apps.gallery": {*JAX, *TENSORFLOW, "ml_collections", "pyarrow", "scipy"},
    "vidjax.models": {*TENSORFLOW, "matplotlib", "orbax"},
    "vidjax.evaluation.report": {*JAX, *TENSORFLOW},
}


@functools.cache
def nodes(path):
    return [*ast.walk(ast.parse(path.read_text()))]


@functools.cache
def imports(path):
    """Returns the modules that a file imports, also in functions and for type checkers."""
    modules = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES else str(node.module) for name in names}
    return modules


def test_folders_import_only_lower_folders_without_cycles():
    for module, path in MODULES.items():
        _, folder, *rest = module.split(".")
        if module in ("vidjax.main", "vidjax.__main__"):
            continue
        names = imports(path)
        if not module.startswith("vidjax.data.tfds"):
            assert not {name.split(".")[0] for name in names} & TENSORFLOW, module
        for name in names:
            # `vidjax` imports everything. `utils.version` has the version.
            assert name != "vidjax", module
            if name.startswith("vidjax."):
                below = name.split(".")[1]
                assert FOLDERS.index(below) <= FOLDERS.index(folder), f"{module} imports {name}"
                # Models get plain arguments. Only `build_system` reads a configuration.
                assert below != "runs" or folder != "models" or rest == ["build_system"], module
                # An application knows runs only as the source of vectors of a gallery.
                of_runs = below in ("runs", "training") and folder == "apps"
                assert not of_runs or rest == ["gallery", "run_vectors"], f"{module} imports {name}"
            if folder == "apps" and name.startswith("vidjax.apps."):
                below = name.split(".")[2]
                assert APPS.index(below) <= APPS.index(rest[0]), f"{module} imports {name}"
    graph = {module: imports(path) & {*MODULES} - {module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@nightly_after_first("package", [*WITHOUT, "vidjax"])
def test_folders_import_without_their_forbidden_libraries(python, package):
    """Only vidjax.data may import TensorFlow. The table WITHOUT forbids more."""
    modules = [name for name in MODULES if name.startswith(f"{package}.")]
    if package == "vidjax":
        modules = [name for name in modules if not name.startswith("vidjax.data.")]
    forbidden = sorted(WITHOUT.get(package, TENSORFLOW))
    python(
        "import importlib, sys\n"
        f"for name in {forbidden}: sys.modules[name] = None\n"  # an import then raises ImportError
        f"for name in {modules}: importlib.import_module(name)\n"
    )


def test_naming_films_loads_neither_jax_nor_readers_of_pickles(python):
    loaded = {*python("import sys, vidjax.apps.video.who\nprint(*sys.modules)").split()}
    pickles = {name for name in MODULES if name.startswith("vidjax.data.untrusted.")}
    assert not loaded & {"vidjax.data.iqiyi_vid", *pickles, *JAX, *TENSORFLOW}


def test_every_package_is_installed():
    folders = (path.parent.relative_to(ROOT) for path in (ROOT / "vidjax").rglob("__init__.py"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    configs = {"vidjax.configs", "vidjax.configs.published"}
    assert {*project["packages"]} == {*(".".join(x.parts) for x in folders), *configs}
    assert project["package-dir"] == {"vidjax.configs": "configs"}


def is_unsafe(node):
    if isinstance(node, ast.Name):
        return node.id in ("__import__", "compile", "eval", "exec")
    if isinstance(node, ast.keyword):
        return node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    is_load = isinstance(node, ast.Attribute) and node.attr == "load"
    return is_load and getattr(node.value, "id", "") in ("np", "numpy")


def test_no_module_executes_data_as_code():
    for path in (*MODULES.values(), *(ROOT / "configs").rglob("*.py")):
        assert not any(map(is_unsafe, nodes(path))), path
        # No path of a developer is in a file.
        assert not re.search(r"/work/|/root/|/tmp/", path.read_text()), path


def test_every_field_of_a_configuration_is_read_outside_of_the_table_of_fields():
    """Its name is an attribute, an argument or a text in another module of the package."""
    used = {
        getattr(node, kind, None)
        for path in MODULES.values() if path.name != "config.py"
        for node in nodes(path) for kind in ("attr", "arg", "value")
    }  # fmt: skip
    assert not {name for name in FIELDS if name.rpartition(".")[2] not in used}


def test_workflows_pin_their_actions_and_ask_for_few_rights():
    folder = ROOT / ".github/workflows"
    for path in folder.glob("*.yml"):
        text = path.read_text()
        actions = re.findall(r"uses: (?!\./)(.*)", text)
        assert not [x for x in actions if not re.fullmatch(r"\S+@[0-9a-f]{40} # v[\d.]+", x)], path
        assert re.search(r"(?m)^permissions: { contents: read }$", text), path
    before, _, publish = (folder / "release.yml").read_text().partition("  publish:")
    assert "write" not in before
    assert "run:" not in publish  # this job may publish, so it runs no code of the repository
