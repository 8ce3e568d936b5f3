"""The house: what may import what, and a README whose words exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vidjax import config as config_lib
from vidjax import workdir as workdir_lib

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
        if path.parent.name != "data":
            found = [name for name in imports(path) if name.startswith("tensorflow")]
            assert not found, f"{path} imports {found}"


def test_everything_else_works_without_tensorflow():
    rooms = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in MODULES
        if path.parent.name != "data" and path.name != "__init__.py"
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
    ["models", "selection.py", "fusion.py", "examples.py", "losses.py", "metrics.py", "batch.py"],
)
def test_lower_rooms_know_no_configuration_and_no_loop(room):
    path = ROOT / "vidjax" / room
    for file in path.rglob("*.py") if path.is_dir() else [path]:
        above = ("vidjax.train", "vidjax.evaluate", "vidjax.steps", "vidjax.config", "vidjax.data")
        found = [n for n in imports(file) if n.startswith((*above, "ml_collections"))]
        assert not found, f"{file} imports {found}"


def table(heading):
    """Returns the first cells of the table under a heading of the README, without backticks."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row)]


def test_readme_lists_every_field_and_no_other():
    fields = {name for name, _ in config_lib.fields(config_lib.default())}
    assert {name.removeprefix("config.") for name in table("Fields")} == fields


def test_readme_lists_every_flag_and_no_other():
    source = (ROOT / "vidjax" / "main.py").read_text()
    flags = set(re.findall(r'add_argument\(\s*"(--[\w.]+)', source))
    named = [word for word in table("Flags") if word.startswith("--")]  # not the arguments
    assert {re.split(r"[=\[]", flag)[0] for flag in named} == flags


@pytest.mark.slow
def test_readme_lists_the_files_of_a_workdir(official_dir, cache_dir, tmp_path):
    from tests.small_runs import shrunk
    from vidjax import train
    from vidjax.data import pipeline

    # Of all experiments, the one that leaves most.
    config = shrunk("--config.num_epochs=2", spec="configs/noise_classes.py:iqiyi_vid")
    data = pipeline.load("iqiyi_vid", directory=str(official_dir), cache_dir=str(cache_dir))
    with workdir_lib.lock(tmp_path):
        train.train(config, tmp_path, data, num_devices=1)
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
