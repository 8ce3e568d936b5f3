"""The notebooks of colab/: calls of vidjax and no logic, run from top to bottom, with outputs."""

import json
import re
import subprocess
import sys
import tomllib
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.helpers import notebooks as notebooks_lib

ROOT = Path(__file__).parent.parent
PATHS = {path.stem: path for path in sorted((ROOT / "colab").glob("*.ipynb"))}
# What a hosted image brings, at versions above our lower bounds.
HOSTED = {
    "absl-py": "2.3.1",
    "importlib_resources": "6.5.2",
    "jax": "0.99.0",
    "jaxlib": "0.99.0",
    "matplotlib": "3.10.8",
    "numpy": "2.2.6",
    "scikit-learn": "1.6.1",
    "tensorboard": "2.20.0",
    "tensorflow": "2.20.0",
    "tqdm": "4.67.1",
}

notebooks = pytest.mark.parametrize("name", PATHS)


def read(name):
    """Returns a notebook, which nbformat finds to be valid."""
    notebook: Any = nbformat.reads(PATHS[name].read_text(), as_version=4)
    nbformat.validate(notebook)
    return notebook


def setup_code(name="quickstart"):
    """Returns the code of the setup cell as Python: lines that only IPython knows become `pass`."""
    (cell,) = [cell for cell in read(name).cells if cell.id == "setup"]
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.MULTILINE)


def shown(cell):
    for output in cell.outputs:
        yield output.get("text", "")
        for kind, text in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield text if isinstance(text, str) else json.dumps(text)


@notebooks
def test_its_outputs_are_kept_and_tell_nothing_of_a_machine(name):
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) >= len(code) / 2
    places = {str(Path.home()), "/home/", "/root/", "/tmp/", "/usr/", "/opt/", "/var/", "/work/"}
    places |= {"site-packages", "Users/", "Traceback", "Warning"}
    for cell in code:
        assert not [o for o in cell.outputs if o.output_type == "error"]
        assert "execution" not in cell.metadata
        for text in shown(cell):
            assert not [place for place in places if place in text], f"{cell.id}: {text[:500]}"
    assert PATHS[name].stat().st_size < 1 << 20


@notebooks
def test_it_imports_what_exists(name):
    source = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "code")
    for line in re.findall(r"^from vidjax.*$", source, re.MULTILINE):
        exec(line, {})


@pytest.fixture
def asked(monkeypatch):
    """Runs the setup cell where some distributions are installed; returns what pip is asked for."""

    def run(*names, **versions):
        commands = []
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(
            metadata, "distributions", lambda: [types.SimpleNamespace(name=one) for one in names]
        )
        monkeypatch.setattr(metadata, "version", {**HOSTED, **versions}.__getitem__)
        monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words))
        exec(compile(setup_code(), "setup", "exec"), {})
        monkeypatch.undo()
        return commands

    return run


def test_a_tensorflow_of_whatever_name_is_not_joined_by_another(asked):
    assert asked("pip", "vidjax", "tensorflow") == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["rank"], *extras["train"]]
    needed.remove("vidjax[rank]")

    def names_of(words):
        return {re.split(r"[<>=;\[ ]", word)[0] for word in words}

    for name in ("tensorflow", "tf_nightly", None):
        ((python, *words),) = asked("jax", "jaxlib", "numpy", *filter(None, [name]))
        assert python == sys.executable and words[:4] == ["-m", "pip", "install", "-q"]
        kept = ["jax", "jaxlib", "numpy", *(["tensorflow"] if name == "tensorflow" else [])]
        given = sorted(word for word in words if "==" in word)
        assert given == sorted(f"{one}=={HOSTED[one]}" for one in kept)
        assert names_of(words[4:]) == names_of(needed) | {*kept}


def test_an_older_jax_is_upgraded_with_its_accelerator_and_a_restart(asked, capsys):
    ((_, *words),) = asked("jax", "jaxlib", "jax-cuda12-plugin", "numpy", jax="0.7.2")
    assert [word for word in words if "==" in word] == [f"numpy=={HOSTED['numpy']}"]
    assert "jax[cuda12]" in words and any(word.startswith("jax>=") for word in words)
    assert "['jax'] upgraded: choose Runtime, Restart session" in capsys.readouterr().out
    asked("jax", "jaxlib", "numpy")
    assert not capsys.readouterr().out


@pytest.mark.slow
@notebooks
def test_it_runs_from_top_to_bottom(name, cache_dir, tmp_path):
    kept, executed = read(name), notebooks_lib.run(PATHS[name], tmp_path, cache_dir)
    for cell, before in zip(executed.cells, kept.cells, strict=True):
        if cell.cell_type == "code":
            errors = [f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"]
            assert not errors, f"{cell.id}: {errors}"
            kinds = [
                [sorted(o.data) for o in one.outputs if o.output_type != "stream"]
                for one in (cell, before)
            ]
            assert kinds[0] == kinds[1], cell.id
            assert "main([" not in cell.source or "0" in shown(cell), cell.id
            assert "Warning" not in "".join(shown(cell)), "".join(shown(cell))
