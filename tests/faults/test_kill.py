"""Commands that are killed, get a signal or run in an odd environment end with the same bytes.

A signal is sent a short time after the folder shows that a phase of the run has begun.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.small_runs import QUICK, ROOT, RUN_FILES, flat, saved
from vidjax.runs import checkpoint

pytestmark = pytest.mark.slow
# Phase of a run -> pattern of the files that it writes first, and the longest delay (s) of a kill.
PHASES = {
    "conversion": ("cache/iqiyi_vid/*.partial", 1.0),
    "compile": ("run/events.out.tfevents.*", 3.0),
    "step": ("run/timing.jsonl", 0.05),
    "save": ("run/checkpoints/.partial/*", 0.25),
    "evaluation": ("run/metrics.jsonl", 0.4),
}
SMALL = (
    "--config.batch_size=32", "--config.num_epochs=4", "--config.eval.every_epochs=2",
    "--config.eval.block_size=16", "--config.eval.report=False", "--config.log_every_steps=1",
    "--config.checkpoint_every_seconds=0.5", "--config.model.layers=((8,'linear',False,0.0),)",
    "--config.data.mode=resident",
)  # fmt: skip


class Run:
    """A folder with a run and its cache, and the command that trains the run."""

    def __init__(self, folder, official):
        self.folder, self.workdir = folder, folder / "run"
        self.words = (
            f"--config={ROOT}/configs/quality_fusion.py:iqiyi_vid,face", *SMALL,
            f"--config.data.dir={official}", f"--workdir={self.workdir}",
        )  # fmt: skip
        (folder / "cache").mkdir(parents=True)

    def start(self, *prefix, cwd=ROOT, stdio=None, **env):
        """Starts the command that trains the run; `prefix` is a program that starts it."""
        self.before = {phase: self.signs(phase) for phase in PHASES}
        places = {
            "VIDJAX_CACHE": str(self.folder / "cache"), "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder.parent / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        command = [*prefix, sys.executable, "-m", "vidjax", *self.words]
        env = {**os.environ, **places, **QUICK, **env}
        with (self.folder / "output").open("w") as file:
            out = stdio or file
            return subprocess.Popen(command, cwd=cwd, env=env, stdin=stdio, stdout=out, stderr=out)

    def output(self):
        return (self.folder / "output").read_text()

    def finish(self, *prefix, **options):
        assert self.start(*prefix, **options).wait(600) == 0, self.output()

    def signs(self, phase):
        """Returns (name, time of change) of the files that show that a phase has begun."""
        times = set()
        for path in self.folder.glob(PHASES[phase][0]):
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                times.add((path.name, path.stat().st_ctime_ns))
        return times

    def wait_for(self, phase, process):
        while process.poll() is None and not self.signs(phase) - self.before[phase]:
            time.sleep(0.005)

    def kill(self, phase, rng):
        """Starts the command, and kills it soon after a phase has begun; False if it had ended."""
        process = self.start()
        self.wait_for(phase, process)
        time.sleep(rng.uniform(0, PHASES[phase][1]))
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL), self.output()
        return process.returncode != 0

    def outcome(self):
        """Returns what a kill must not change: files, and arrays of checkpoints."""
        names = (*RUN_FILES, "members.npz")
        contents = {name: (self.workdir / name).read_bytes() for name in names}
        for step in checkpoint.manifests(self.workdir):
            for name, x in flat(saved(self.workdir, step)).items():
                contents[f"step {step}: {name}"] = (x.dtype, x.shape, x.tobytes())
        return contents


@pytest.fixture(scope="module")
def wanted(official_dir, place):
    """The outcome of an undisturbed run."""
    whole = Run(place / "whole", official_dir)
    whole.finish()
    return whole.outcome()


@pytest.fixture
def run(official_dir, place):
    """A run to disturb, which finds the compiled programs of the undisturbed run."""
    shutil.rmtree(place / "disturbed", ignore_errors=True)
    return Run(place / "disturbed", official_dir)


def test_killed_run_resumes_to_the_same_bytes(run, wanted, fault_seed, campaign):
    rng = random.Random(fault_seed)
    assert any("opt_state" in name for name in wanted)  # the outcome includes the optimiser
    died = [run.kill(phase, rng) for phase in (20 * [*PHASES] if campaign else ["save"])]
    run.finish()
    assert any(died), "every kill came too late"
    assert run.outcome() == wanted, died


# A folder with files of these names must not hide the modules of these names.
SHADOWS = ("json", "numpy", "typing", "argparse", "jax", "tensorflow", "yaml", "vidjax_config")
ODD = {"LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "1", "COLUMNS": "20",
       "PYTHONWARNINGS": "error"}  # fmt: skip


def test_results_do_not_depend_on_the_environment_of_the_process(wanted, official_dir, tmp_path):
    """The process has one core, no network, an empty cache, and files with names of modules."""
    here, home = tmp_path / "here", tmp_path / "home"
    for folder in (here, home, tmp_path / "tmp", tmp_path / "data"):
        folder.mkdir()
    for path in sorted(official_dir.iterdir(), reverse=True):  # so that listings have another order
        shutil.copy(path, tmp_path / "data")
    for name in SHADOWS:
        (here / f"{name}.py").write_text(f"open({str(home / name)!r}, 'w')\n")
    prefix, offline = ["taskset", "-c", "0"], ["unshare", "-rn"]
    if not subprocess.run([*offline, "true"]).returncode:  # allowed
        prefix = [*offline, *prefix]
    odd = Run(tmp_path / "odd", tmp_path / "data")
    places = {"HOME": str(home), **dict.fromkeys(("TMPDIR", "MPLCONFIGDIR"), str(tmp_path / "tmp"))}
    odd.finish(*prefix, cwd=here, **ODD, **places)
    assert not [*home.rglob("*")]  # no file of SHADOWS was imported
    assert {path.stem for path in here.iterdir()} == {*SHADOWS}  # there is no new file
    # config.json differs, because it contains the folder of the data.
    assert odd.outcome() | {"config.json": wanted["config.json"]} == wanted


def test_run_is_saved_if_its_terminal_is_closed_or_a_cluster_ends_it(run, wanted):
    """A second SIGTERM or SIGINT stops it at once. Under nohup, SIGHUP is ignored."""

    def end(phase, *signals, prefix=(), **env):
        """Sends signals to a new command, which must end."""
        process = run.start(*prefix, **env)
        run.wait_for(phase, process)
        time.sleep(0.1 if phase == "compile" else 0)  # a run compiles shortly after the first file
        for signum in signals:
            process.send_signal(signum)
        assert process.wait(120) - 128 in signals[-2:], run.output()

    # Before the first step, a signal stops the command at once, without a checkpoint.
    empty = str(run.folder / "no programs")
    for phase, signum in (("conversion", signal.SIGTERM), ("compile", signal.SIGINT)):
        end(phase, signum, JAX_COMPILATION_CACHE_DIR=empty)
        assert run.output().splitlines()[-1] == "vidjax: stopped"
    assert not checkpoint.manifests(run.workdir)
    terminal, inside = os.openpty()
    os.set_blocking(terminal, False)
    process = run.start("setsid", "--ctty", "env", "--default-signal=HUP", stdio=inside)
    os.close(inside)
    while process.poll() is None and not run.signs("save"):  # then a step has been taken
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 1 << 16)  # a full terminal would stop the run
        time.sleep(0.005)
    os.close(terminal)
    for _ in range(5):
        process.send_signal(signal.SIGHUP)  # as a shell does, in addition to the system
    assert process.wait(120) == 128 + signal.SIGHUP
    assert checkpoint.manifests(run.workdir)
    # A cluster sends the signal to the process and to its parents.
    end("save", signal.SIGHUP, *5 * [signal.SIGUSR1], prefix=["nohup"])
    lines = (run.workdir / "metrics.jsonl").read_text().splitlines()
    logged = json.loads(lines[-1])["step"]
    assert f"stopped at step {logged}\nto resume, run the same command" in run.output()
    assert max(checkpoint.manifests(run.workdir)) == logged
    end("step", signal.SIGINT, signal.SIGTERM)  # two signals stop it at once
    run.finish()
    assert run.outcome() == wanted
