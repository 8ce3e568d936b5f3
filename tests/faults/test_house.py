"""Faults of the surroundings: words, folders and packages, met by the whole command."""

import importlib.metadata
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "vidjax.main")


def run(*words, env=None, cwd=ROOT, command=COMMAND):
    """Runs a command as a user would; returns the finished process."""
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run([*command, *words], cwd=cwd, env=env, capture_output=True, text=True)


def complaint(done, code=2):
    """Returns the error text of a command that failed, at most three lines."""
    said = done.stderr.strip()
    assert done.returncode == code, said
    assert 1 <= len(said.splitlines()) <= 3, said
    assert "Traceback" not in said
    return said


def cpu_seconds():
    """Returns the processor time of finished child processes: others may be at work here."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def closed_folder(tmp_path):
    """Returns a folder in which nobody can write, the administrator included."""
    return Path("/proc") if os.geteuid() == 0 else Path(tmp_path, "closed")


@pytest.mark.parametrize("place", ["file", "file/below", "closed/w"])
def test_a_workdir_that_cannot_be(tmp_path, place):
    """Row 31: before anything is compiled, and before what takes seconds to import."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "closed").mkdir(mode=0o555)
    workdir = tmp_path / place
    if place.startswith("closed"):
        workdir = closed_folder(tmp_path) / "w"
    before = cpu_seconds()
    done = run("--config=configs/mma.py", f"--workdir={workdir}")
    assert str(workdir) in complaint(done)
    assert cpu_seconds() - before < 3.0
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def without(tmp_path):
    """Returns the environment of a process for which some packages are not installed."""

    def hide(*names):
        folder = tmp_path / "hidden"
        folder.mkdir()
        for name in names:
            error = f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n"
            (folder / f"{name}.py").write_text(error)
        return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}

    return hide


@pytest.mark.slow
def test_the_core_without_what_is_optional(without, tmp_path):
    """Row 39: the packages of the extras `bench` and `dev`."""
    env = without("torch", "hypothesis", "pytest", "pytrec_eval", "xdist")
    rooms = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "vidjax").rglob("*.py")
    ]
    code = (
        f"import importlib, sys\nfor room in {rooms}: importlib.import_module(room)\n"
        "from vidjax.main import main\nsys.exit(main(['--mode=check']))"
    )
    done = run(env=env, cwd=tmp_path, command=(sys.executable, "-c", code))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["tensorflow", pytest.param("tensorboard", marks=pytest.mark.slow)]
)
def test_a_package_of_the_core_is_missing(without, tmp_path, name):
    env = without(name)
    words = ("--config=configs/mma.py", f"--workdir={tmp_path}/w")
    said = complaint(run(*words, env=env))
    assert f"the package '{name}' is missing" in said
    assert "pip install" in said


def test_a_check_without_tensorflow(without):
    done = run("--mode=check", "--config=configs/mma.py", env=without("tensorflow"))
    assert done.returncode == 2
    assert "pip install 'vidjax[train]'" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_an_accelerator_without_its_extra():
    """Row 39: jax is told to use a GPU, and the extra `cuda` is not installed."""
    if any(d.name.startswith("jax-cuda") for d in importlib.metadata.distributions()):
        pytest.skip("the extra cuda is installed")
    said = run("--mode=check", env={"JAX_PLATFORMS": "cuda"})
    assert said.returncode == 2
    assert "pip install 'vidjax[cuda]'" in said.stdout
