"""Settings of all tests, such as eight emulated devices, and fixtures that several files use."""

import os

# JAX and TensorFlow read these variables when they are imported. Eight devices on two cores may
# wait for each other longer than 40 seconds, after which XLA would abort the process. A device that
# waits may block a thread. XLA has `NPROC` threads; with few threads, a test hung.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_terminate_timeout_seconds=180"
)
os.environ |= {"NPROC": "64", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # each core has a process of pytest-xdist

import contextlib
import functools
import gc
import importlib
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
# Temporary files stay in memory if there is enough: thousands of small files wait for a disk.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
gc.set_threshold(1_000_000, 50, 50)  # rarely: JAX makes millions of objects that stay in use


def pytest_configure(config: pytest.Config) -> None:
    """Loads the fixtures that need JAX, but not in the process that only distributes tests."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", 0):
        config.pluginmanager.import_plugin("tests.helpers.compiling")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="hundreds of random faults")
    parser.addoption("--fault-seed", type=int, help="repeats the faults of a failed test")


# Files with few, long tests. If such a file started last, the other processes would be idle.
LONG_FILES = {
    "test_adding.py", "test_blend.py", "test_distributed.py", "test_run_data.py",
    "test_export.py", "test_fine_tuning.py", "test_gallery_commands.py", "test_gallery_of_a_run.py",
    "test_joint.py", "test_kill.py", "test_notebooks.py", "test_readme.py", "test_serve.py",
    "test_train.py",
}  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests with the mark `nightly` unless `-m` names it. Long files come first."""

    def is_wanted(item: pytest.Item) -> bool:
        return not item.get_closest_marker("nightly") or "nightly" in config.option.markexpr

    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = filter(is_wanted, items)
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG_FILES, -counts[item.path]))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Finds garbage once. Pytest and Python would look at millions of objects ten times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def campaign(pytestconfig: pytest.Config) -> bool:
    """Whether tests cause hundreds of random faults (`--campaign`) instead of a few."""
    return bool(pytestconfig.getoption("--campaign"))


@pytest.fixture
def fault_seed(request: pytest.FixtureRequest, campaign: bool) -> int:
    """The seed of random faults, which a failed test shows: 0, or a new seed in a campaign."""
    given = request.config.getoption("--fault-seed")
    seed = time.time_ns() % 10**9 * campaign if given is None else given
    sys.stdout.write(f"the same faults again: pytest {request.node.nodeid} --fault-seed={seed}\n")
    return seed


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of all tests, instead of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["VIDJAX_CACHE"] = str(folder)
    return folder


@pytest.fixture
def drawn(tmp_path: Path, command: Any) -> Any:
    """A `Drawn`: films of drawn people, and nets that identify the people."""
    for package in ("av", "onnxruntime", "onnx"):
        pytest.importorskip(package, reason="needs the extra [video]")
    from tests.helpers.drawn_people import Drawn

    return Drawn(tmp_path, command)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `drawn_people.restore`, which all tests of a file share."""
    return tmp_path_factory.mktemp("place")


def run_here(patch: pytest.MonkeyPatch) -> None:
    """Makes jobs of child processes run in this process, because a new process takes a second."""
    from vidjax.utils import processes

    last = list[Any]()

    def run(_: Any, module: str, *, given: bytes, **limits: Any) -> Any:
        lib, jobs = importlib.import_module(module), json.loads(given)
        nets = [(x, os.stat(x).st_mtime_ns) for x in jobs["reads"]]
        if not nets or nets != last:  # a new process remembers no results, but loads the same nets
            for function in vars(lib).values():
                getattr(function, "cache_clear", lambda: None)()
        last[:] = nets
        answers = [processes._answer(lib.work, path, words, "") for path, words in jobs["given"]]
        gc.enable()  # a job may disable it, because its process ends soon
        lines = b"".join(json.dumps(answer).encode() + b"\n" for answer in answers)
        return subprocess.CompletedProcess([], 0, lines, b"")

    patch.setattr(processes.Children, "run", run)


@pytest.fixture
def read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of child processes run in this process."""
    run_here(monkeypatch)


@pytest.fixture
def tables_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are read in this process, because a new child process takes half a second."""
    pytest.importorskip("pyarrow")
    from vidjax.utils import errors, processes

    def read(module: str, path: Path, words: Any, kind: Any, **limits: Any) -> Any:
        answer = processes._answer(sys.modules[module].work, str(path), words, "")
        found = processes._parse_answer(path, json.dumps(answer).encode(), kind)
        if isinstance(found, errors.UserError):
            raise found
        return found

    monkeypatch.setattr(processes, "run_limited", read)


@pytest.fixture(scope="module")
def no_figures() -> Iterator[None]:
    """Figures of reports are empty: to draw the figures of a report takes a second."""
    from vidjax.evaluation.report import html

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html.Plot, "_svg", lambda *_: "<svg></svg>")
        yield


@pytest.fixture(scope="session")
def official_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of official files: 12 identities, three splits, face, head and audio."""
    from tests.helpers import clip_files

    folder = tmp_path_factory.mktemp("official")
    clip_files.write_learnable(folder)
    return folder


@pytest.fixture(scope="session")
def official_data(official_dir: Path, cache_dir: Path) -> Any:
    from tests.helpers.datasets import load_dataset

    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        return load_dataset("iqiyi_vid", directory=str(official_dir), cache_dir=str(cache_dir))


@pytest.fixture(scope="session")
def data(official_data: Any) -> Any:
    """The dataset of `official_dir`. Some test files replace it by another dataset."""
    return official_data


@pytest.fixture(scope="session")
def trained(official_data: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function that trains a configuration for an epoch, and returns the run's folder.

    Equal calls return the same folder, so no test may change it.
    """
    from tests.helpers import small_runs

    @functools.cache
    def train(spec: str, *overrides: str) -> Path:
        config = small_runs.shrunk("--config.num_epochs=1", *overrides, spec=spec)
        folder = tmp_path_factory.mktemp("runs") / Path(spec).stem
        small_runs.run(config, folder, official_data)
        return folder

    return train


@pytest.fixture(scope="session")
def nearest_run(official_data: Any, official_dir: Path, tmp_path_factory: Any) -> Path:
    """The folder of a run of nearest neighbours without a report. No test may change it."""
    from tests.helpers import small_runs
    from vidjax.runs import config_io

    config = config_io.load_file(f"{ROOT}/configs/knn.py:iqiyi_vid,face")
    words = [f"--config.data.dir={official_dir}", "--config.eval.block_size=16"]
    words.append("--config.eval.report=False")
    folder = tmp_path_factory.mktemp("runs") / "knn"
    small_runs.run(config_io.override(config, words), folder, official_data)
    return folder


class Done(NamedTuple):
    """A command that has ended: its exit code and what it printed."""

    code: int
    out: str
    err: str

    def refused(self, *words: str) -> bool:
        """Returns whether the exit code is 2, and the error has 1 to 3 lines and these words."""
        lines = self.err.strip().splitlines()
        return self.code == 2 and 1 <= len(lines) <= 3 and all(word in self.err for word in words)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Returns a function that runs `vidjax WORDS`, or another main function, in this process."""
    from vidjax.cli.program import main

    def run(*words: str | Path, program: Callable[[list[str]], int] = main) -> Done:
        capsys.readouterr()
        code, said = program([*map(str, words)]), capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


@pytest.fixture
def say(command: Callable[..., Done]) -> Callable[..., Any]:
    """Returns a function that runs a command, and asserts that its exit code is `code`.

    The function returns the error if the code is 2, otherwise the output. It parses the output if
    the words include --json.
    """

    def run(*words: str | Path, code: int = 0, **options: Any) -> Any:
        done = command(*words, **options)
        assert done.code == code and (code != 2 or done.refused()), done.err
        if code == 2:
            return done.err
        return json.loads(done.out) if "--json" in words else done.out

    return run


def execute(words: Iterable[str | Path], cwd: Path, **env: str) -> Any:
    """Runs Python with the arguments `words` on one emulated device; returns the ended process."""
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="session")
def python(cache_dir: Path) -> Callable[..., str]:
    """Returns a function that runs Python code in a new process, and returns its output."""

    def run(program: str, *words: str | Path, cwd: Path = ROOT, **env: str) -> str:
        done = execute(("-c", program, *words), cwd, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def vidjax_command(cache_dir: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns a function that runs `python -m vidjax.main WORDS` as a user would."""
    return lambda *words: execute(("-m", "vidjax.main", *words), ROOT)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path | None]]:
    """Returns a function: options of `mount` -> folder of a new file system, or None if refused."""
    place, unmount = tmp_path / "mounted", []

    def mount(options: str) -> Path | None:
        place.mkdir()
        for sudo in ((), ("sudo", "-n")):
            words = [*sudo, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
            with contextlib.suppress(FileNotFoundError):
                if subprocess.run(words, capture_output=True).returncode == 0:
                    unmount.extend([*sudo, "umount", str(place)])
                    return place
        return None

    yield mount
    if unmount:
        subprocess.run(unmount, check=True)
