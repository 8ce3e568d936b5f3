"""Faults of the surroundings: words, folders and packages, met by the whole command."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words, env=None, cwd=ROOT, command=(sys.executable, "-m", "vidjax.main")):
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run([*command, *words], cwd=cwd, env=env, capture_output=True, text=True)


def complaints(*commands, env):
    """Returns the error text of each of some commands, all in one process, and what they print."""
    code = (
        "import json, sys\nfrom vidjax.cli.program import main\n"
        "for words in json.loads(sys.argv[1]):\n    sys.stderr.write(f'exit {main(words)}\\n')\n"
    )
    done = run(json.dumps(commands), env=env, command=(sys.executable, "-c", code))
    *errors, end = done.stderr.split("exit 2\n")
    assert len(errors) == len(commands) and not end, done.stderr
    assert all(len(error.splitlines()) <= 3 and "Traceback" not in error for error in errors)
    return errors, done.stdout


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
def test_unusable_workdir_is_refused_before_compilation(without, tmp_path, mounted):
    """Row 31: the error also comes before the slow imports."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "closed").mkdir(mode=0o555)
    # Not even the administrator can write into /proc.
    closed = Path("/proc") if os.geteuid() == 0 else tmp_path / "closed"
    places = [tmp_path / "file/below", closed / "w", tmp_path / ("x" * 300)]
    if read_only := mounted("ro"):
        places.append(read_only)
    # A run imports these packages later. Converted data and compiled steps would be in the cache.
    env = without("tensorflow", "tensorflow_datasets", "orbax")
    env["VIDJAX_CACHE"] = str(tmp_path / "cache")
    errors, _ = complaints(
        *(["--config=configs/knn.py", f"--workdir={x}"] for x in places), env=env
    )
    assert all(str(place) in error for place, error in zip(places, errors, strict=True))
    assert (tmp_path / "file").read_text() == "mine"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.nightly
@pytest.mark.slow
def test_core_works_without_optional_packages(without, tmp_path):
    """Row 39: the packages of `bench` and `dev` are missing."""
    env = without("torch", "hypothesis", "pytest", "pytrec_eval", "xdist")
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "vidjax").rglob("*.py")]
    rooms = [".".join(path.parts) for path in paths]
    code = (
        f"import importlib, sys\nfor room in {rooms}: importlib.import_module(room)\n"
        "from vidjax.cli.program import main\nsys.exit(main(['--mode=check']))"
    )
    done = run(env=env, cwd=tmp_path, command=(sys.executable, "-c", code))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_error_for_a_conversion_without_tfds_names_the_extra(without, tmp_path, official_dir):
    env = without("tensorflow_datasets")
    data = ["--config=configs/knn.py:iqiyi_vid,face", f"--config.data.dir={official_dir}"]
    data.append(f"--config.data.cache_dir={tmp_path}/cache")  # records need none
    both = [*data, f"--workdir={tmp_path}/w"], [*data, "--mode=check"]
    (error, error_of_check), printed = complaints(*both, env=env)
    assert "the package 'tensorflow_datasets' is missing" in error and "pip install" in error
    assert "pip install 'vidjax[train]'" in printed and not error_of_check


@pytest.mark.slow
def test_error_for_a_gpu_without_its_extra_names_the_extra():
    """Row 39: jax is told to use a GPU, but the extra is not installed."""
    if any(d.name.startswith("jax-cuda") for d in importlib.metadata.distributions()):
        pytest.skip("the extra cuda is installed")
    done = run("--mode=check", env={"JAX_PLATFORMS": "cuda"})
    assert done.returncode == 2
    assert "needs 'vidjax[cuda13]'" in done.stdout and "'vidjax[cuda12]'" in done.stdout
