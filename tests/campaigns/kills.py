"""Kills the command at random moments, which its folder shows; no program is patched."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import common
from tests.campaigns.same_bytes import digests
from tests.helpers.small_runs import ROOT, flat, saved

# How long after a moment began the kill may come, in seconds: about as long as it lasts.
SPANS = {"conversion": 1.0, "compile": 3.0, "step": 0.05, "save": 0.25, "evaluation": 0.4}
SAME_FILES = ("config.json", "identities.json", "members.npz")  # beside those of `digests`
# Of metrics.json: what no two runs share.
MEASURED = re.compile("seconds|per_second|^command$|date$")

SMALL = (
    "--config.batch_size=32",
    "--config.num_epochs=8",
    "--config.eval.every_epochs=4",
    "--config.model.layers=((8,'linear',False,0.0),)",
    "--config.eval.block_size=16",
    "--config.checkpoint_every_seconds=0.5",
    "--config.eval.report=False",
)
CASES = {
    "quality_fusion": ("--config.data.mode=resident", "--config.log_every_steps=1"),
    "noise_classes": (
        "--config.ensemble.folds=2",
        "--config.noise.eps=1.1",
        "--config.data.mode=streaming",
        "--config.log_every_steps=4",
    ),
}


class Run:
    """A run's folder, its records and the command that makes it."""

    def __init__(self, folder: Path, official: Path, case: str, like: "Run | None"):
        """Lays out a run below `folder`, where the compiled programs are, too.

        `case` is of CASES; `like` is None for the run that nobody disturbs.
        """
        name = case + ("-killed" if like else "")
        self.workdir, self.cache = folder / name, folder / f"{name}-cache"
        self.like = like
        words = (f"--config=configs/{case}.py:iqiyi_vid,face", f"--config.data.dir={official}")
        self.words: tuple[str, ...] = (f"--workdir={self.workdir}", *words, *CASES[case], *SMALL)
        for old in (self.workdir, self.cache):
            shutil.rmtree(old, ignore_errors=True)
        (folder / "programs").mkdir(parents=True, exist_ok=True)
        self.cache.mkdir()
        (self.cache / "programs").symlink_to(folder / "programs")

    def start(self, *words: str, compiling: bool = False) -> "Process":
        """Starts the command, or another one; `compiling` hides what was compiled before."""
        env = {**os.environ, "VIDJAX_CACHE": str(self.cache), "XLA_FLAGS": ""}
        if compiling:
            empty = self.cache / "no-programs"
            shutil.rmtree(empty, ignore_errors=True)
            env["JAX_COMPILATION_CACHE_DIR"] = str(empty)
        return Process(self, words or self.words, env)

    def finish(self, *words: str) -> None:
        """Runs the command, or another one, to its end."""
        process = self.start(*words)
        process.wait(600)
        assert process.code == 0, process.said()

    def manifests(self) -> dict[int, dict[str, Any]]:
        """Returns step -> manifest of every committed checkpoint."""
        found = {}
        for path in self.workdir.glob("checkpoints/*/manifest.json"):
            with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
                found[int(path.parent.name)] = json.loads(path.read_text())
        return found

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Returns the whole lines of a log."""
        path = self.workdir / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def outcome(self) -> dict[str, Any]:
        """Returns what kills may not change: files, results, and all arrays of checkpoints."""
        paths = (self.workdir / name for name in SAME_FILES)
        found: dict[str, Any] = {x.name: x.read_bytes() for x in paths if x.exists()}
        for step in self.manifests():
            arrays = flat(saved(self.workdir, step))
            assert any("opt_state" in name for name in arrays)
            for name, x in arrays.items():
                found[f"step {step}: {name}"] = (x.dtype, x.shape, x.tobytes())
        return found | digests(self.workdir) | results(self.workdir / "metrics.json")

    def differences(self) -> list[str]:
        """Returns the files and values whose bytes differ from the undisturbed run."""
        assert self.like is not None
        left, right = self.like.outcome(), self.outcome()
        return [name for name in {*left, *right} if left.get(name) != right.get(name)]


def results(path: Path) -> dict[str, Any]:
    """Returns what two runs share of their metrics."""
    found = json.loads(path.read_text())
    return {name: value for name, value in found.items() if not MEASURED.search(name)}


class Process:
    """One process of the command, and what its folder shows of it."""

    def __init__(self, run: Run, words: Sequence[str], env: Mapping[str, str]):
        """Starts it; what it says goes to a file in the run's cache."""
        self._run, self._output = run, run.cache / "output.txt"
        self._left_over = {moment: self._signs(moment) for moment in SPANS}
        command = [sys.executable, "-m", "vidjax.main", *words]
        with self._output.open("wb") as file:
            self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)

    @property
    def code(self) -> int | None:
        """Its exit status as a shell would tell it; None while it runs."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def said(self) -> str:
        """Returns its output so far."""
        return self._output.read_text()

    def wait(self, seconds: float) -> float:
        """Waits for its end and returns the CPU seconds until then; kills it if it takes longer."""
        if self._process.poll() is not None:
            return 0.0
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        ticks = map(int, stat.rpartition(")")[2].split()[11:15])
        before = sum(ticks) / os.sysconf("SC_CLK_TCK")
        reaped = common.children_seconds()
        try:
            self._process.wait(seconds)
        finally:
            self.kill()
        return common.children_seconds() - reaped - before

    def send(self, signum: int) -> None:
        """Sends it a signal."""
        self._process.send_signal(signum)

    def kill(self) -> None:
        """Kills it, unless it has ended, and waits until it is dead."""
        self.send(signal.SIGKILL)
        self._process.wait()

    def wait_for(self, moment: str, seconds: float = 300) -> bool:
        """Waits until a moment of SPANS has begun; False where the process ends before."""
        end = time.monotonic() + seconds
        while self._process.poll() is None:
            if self._signs(moment) - self._left_over[moment]:
                return True
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"no {moment} within {seconds} s: {self.said()}")
            time.sleep(0.005)
        return False

    def _signs(self, moment: str) -> set[Any]:
        """Returns what the folder has of a moment; there is more when it begins again."""
        run = self._run
        if moment == "step":
            return {line["step"] for line in run.lines("timing.jsonl")}
        if moment == "evaluation":
            steps = {
                line["step"] for line in (run.like or run).lines("metrics.jsonl") if "split" in line
            }
            return {
                n for n, one in run.manifests().items() if n in steps and "evaluated" not in one
            }
        pattern = {
            "conversion": "iqiyi_vid/*.partial",
            "compile": "events.out.tfevents.*",
            "save": "checkpoints/**/*partial*",
        }[moment]
        found = set()
        for path in (run.cache if moment == "conversion" else run.workdir).glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                found.add((path.name, path.stat().st_ctime_ns if moment == "save" else 0))
        return found


def kill_once(run: Run, moment: str, rng: random.Random) -> bool:
    """Kills a run's command some time after a moment began; False where it was done before."""
    # Which may differ from process to process: steps are short beside what saves them.
    seldom = ("--config.checkpoint_every_seconds=60",) if moment == "step" else ()
    process = run.start(*run.words, *seldom, compiling=moment == "compile" and rng.random() < 0.5)
    if process.wait_for(moment):
        time.sleep(rng.uniform(0, SPANS[moment]))
    process.kill()
    assert process.code in (0, 128 + signal.SIGKILL), process.said()
    return process.code != 0
