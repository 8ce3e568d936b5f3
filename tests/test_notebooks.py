"""Notebooks run, and have outputs; `python -m tests.test_notebooks quickstart` writes them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.helpers.cases import nightly_after_first
from tests.helpers.small_runs import QUICK, ROOT

PATHS = {path.stem: path for path in sorted((ROOT / "colab").glob("*.ipynb"))}
# Packages that are installed on a hosted machine, in versions above our lower bounds.
HOSTED = {"jax": "0.99.0", "jaxlib": "0.99.0", "numpy": "2.2.6", "tensorflow": "2.20.0"}


def read(name):
    notebook: Any = nbformat.reads(PATHS[name].read_text(), as_version=4)
    nbformat.validate(notebook)
    return notebook


def output_texts(cell):
    for output in cell.outputs:
        yield output.get("text", "")
        for kind, text in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield text if isinstance(text, str) else json.dumps(text)


@pytest.mark.parametrize("name", PATHS)
def test_notebook_outputs_are_stored_and_contain_no_local_paths(name):
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) >= len(code) / 2  # some cells print nothing
    forbidden = {str(Path.home()), "/home/", "/root/", "/tmp/", "/usr/", "/opt/", "/var/", "/work/"}
    forbidden |= {"site-packages", "Users/", "Traceback", "Warning"}
    for cell in code:
        assert not [o for o in cell.outputs if o.output_type == "error"]
        assert "execution" not in cell.metadata
        for text in output_texts(cell):
            assert not [word for word in forbidden if word in text], f"{cell.id}: {text[:500]}"
    if name in ("a_new_person", "who_is_in_my_films"):  # no data of the deleted person are left
        (gone,) = [cell for cell in code if "rglob" in cell.source]
        assert "True" not in str(gone.outputs)
    assert PATHS[name].stat().st_size < 1 << 20


def test_setup_cell_keeps_installed_packages_unless_they_are_too_old(monkeypatch, capsys):
    def commands_of_setup(*names, **versions):
        commands, installed = [], [types.SimpleNamespace(name=name) for name in names]
        (cell,) = [cell for cell in read("quickstart").cells if cell.id == "setup"]
        without_magic = re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.MULTILINE)
        with monkeypatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(metadata, "distributions", lambda: installed)
            patch.setattr(metadata, "version", {**HOSTED, **versions}.__getitem__)
            patch.setattr(subprocess, "run", lambda words, check: commands.append(words))
            exec(without_magic, {})
        return commands

    assert commands_of_setup("pip", "vidjax", "tensorflow") == []  # vidjax is already installed
    # The command names all needed packages. Installed packages keep their versions.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = {*project["dependencies"], *extras["rank"], *extras["train"]} - {"vidjax[rank]"}
    ((python, *words),) = commands_of_setup(*HOSTED)
    assert [python, *words[:4]] == [sys.executable, "-m", "pip", "install", "-q"]
    assert {*words[4:]} == needed | {f"{name}=={version}" for name, version in HOSTED.items()}
    assert not capsys.readouterr().out  # no warning
    # If jax is too old, it is upgraded together with its plugin for CUDA.
    ((_, *words),) = commands_of_setup("jax", "jaxlib", "jax-cuda12-plugin", "numpy", jax="0.7.2")
    assert [word for word in words if "==" in word] == [f"numpy=={HOSTED['numpy']}"]
    assert "jax[cuda12]" in words and any(word.startswith("jax>=") for word in words)
    assert "['jax'] upgraded: choose Runtime, Restart session" in capsys.readouterr().out


def run(notebook, folder, cache_dir, **more_env):
    """Runs a notebook in an empty folder; returns it with its outputs and the errors of cells."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    path = folder / "at" / "executed.ipynb"
    shutil.copytree(ROOT / "configs", path.parent / "configs")
    nbformat.write(notebook, path)
    env = os.environ | {"XLA_FLAGS": "", "VIDJAX_CACHE": str(cache_dir), "PYTHONPATH": str(ROOT)}
    env |= {"IPYTHONDIR": f"{folder}/ipython", "JUPYTER_DATA_DIR": f"{folder}/jupyter"}
    env |= {"JUPYTER_NO_CONFIG": "1", **more_env}  # not the kernels and settings of the user
    command = [sys.executable, "-c", "from nbclient.cli import main; main()", str(path)]
    command += ["--inplace", "--allow-errors", "--timeout=600", "--kernel_name=python3"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800)
    assert not ran.returncode, ran.stderr
    return nbformat.read(path, as_version=4)


@pytest.mark.slow
@nightly_after_first("name", ["quickstart", *sorted({*PATHS} - {"quickstart"})])
def test_notebook_runs_from_top_to_bottom(name, cache_dir, official_dir, tmp_path):
    """The quickstart trains a smaller net on fewer clips. Outputs must have the stored types."""
    small = ["num_epochs=1", "batch_size=32", "modalities=face", "model.embed_dim=16"]
    small += ["model.num_clusters=2", "data.name=iqiyi_vid", f"data.dir={official_dir}"]
    words = ["--config=configs/mma.py", "--workdir=runs/mma", *(f"--config.{x}" for x in small)]
    shorter = read(name)
    for cell in shorter.cells:
        cell.source = cell.source.replace('main(["--config=configs/mma.py"])', f"main({words})")
        # The small data have only the identities 1 to 12.
        cell.source = cell.source.replace('identity = "42"', 'identity = "5"')
    assert ("embed_dim=16" in str(shorter)) == (name == "quickstart")  # `main(...)` was replaced
    executed = run(shorter, tmp_path, cache_dir, **QUICK)
    for cell, before in zip(executed.cells, read(name).cells, strict=True):
        if cell.cell_type == "code":
            errors = [f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"]
            assert not errors, f"{cell.id}: {errors}"
            kinds, kinds_before = (
                [sorted(o.data) for o in one.outputs if o.output_type != "stream"]
                for one in (cell, before)
            )
            assert kinds == kinds_before, cell.id  # such as text/plain and image/png
            if "main([" in cell.source:
                assert "0" in output_texts(cell), cell.id  # the exit code
            assert "Warning" not in "".join(output_texts(cell)), "".join(output_texts(cell))


if __name__ == "__main__":
    for stem in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            made = run(read(stem), Path(place), Path(place) / "cache")
        for cell in made.cells:
            cell.metadata.pop("execution", None)
        nbformat.write(made, PATHS[stem])
