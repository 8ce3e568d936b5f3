"""Two processes train and evaluate a run as one process with two devices does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.small_runs import LAYER, ROOT, saved
from vidjax.cli import program
from vidjax.core import distributed
from vidjax.utils.errors import UserError

SECONDS = 300
WORDS = (
    "--config=configs/quality_fusion.py:iqiyi_vid", LAYER, "--config.batch_size=32",
    "--config.num_epochs=12", "--config.eval.every_epochs=6", "--config.log_every_steps=4",
    "--config.eval.block_size=16",
)  # fmt: skip


def test_one_process_agrees_with_itself():
    assert distributed.count() == 1 and distributed.is_first()
    assert distributed.max_over_processes(7, -3) == [7, -3]
    distributed.barrier()
    distributed.check_same({"configuration": {"a": 1}})


@pytest.mark.parametrize("words", ["--coordinator=h:9", "--process_id=0 --num_processes=2"])
def test_a_flag_that_is_missing_is_told(words):
    with pytest.raises(UserError, match=r"missing; .*--coordinator=HOST:PORT"):
        distributed.join_processes(program.parse(["--config=mma", *words.split()]))


@pytest.fixture
def start(official_dir, tmp_path):
    """Yields a function that starts a command in `count` processes, with two devices in all."""
    every = []

    def run(name, *words, count=2, own=((), ())):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"VIDJAX_CACHE": str(tmp_path / "cache"), "JAX_NUM_CPU_DEVICES": str(2 // count)}
        env = {**os.environ, **env, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        words = [*words, f"--workdir={tmp_path / name}", f"--config.data.dir={official_dir}"]
        places = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
        started = []
        for number in range(count):
            more = [*places, f"--process_id={number}", *own[number]] if count > 1 else []
            with (tmp_path / f"{name}-{number}.txt").open("w") as file:
                started.append(subprocess.Popen(
                    [sys.executable, "-m", "vidjax.main", *words, *more],
                    cwd=ROOT, env=env, stdout=file, stderr=file,
                ))  # fmt: skip
        every.extend(started)
        return started

    yield run
    for process in every:  # one that waits for another would wait for ever
        process.kill()
        process.wait(SECONDS)


def wait(processes):
    return [process.wait(SECONDS) for process in processes]


def wait_for_step(log, processes):
    """Waits until the log of a run has another line."""

    def count():
        return len(log.read_text().splitlines()) if log.exists() else 0

    before, end = count(), time.monotonic() + SECONDS
    while count() <= before:
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.01)


def assert_close(left, right):
    """Compares two runs: parameters, moments, losses and results."""
    leaves = [jax.tree_util.tree_leaves_with_path(saved(folder)) for folder in (left, right)]
    for (name, x), (other, y) in zip(*leaves, strict=True):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=str(name))
        assert name == other
    texts = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (left, right)]
    for mine, theirs in zip(*(map(json.loads, lines) for lines in texts), strict=True):
        assert mine.pop("split", "") == theirs.pop("split", "")
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    maps = [json.loads((folder / "metrics.json").read_text())["map"] for folder in (left, right)]
    assert maps[0] == pytest.approx(maps[1], abs=1e-6)
    assert (left / "report.html").exists()


@pytest.mark.slow
def test_two_processes_that_end_go_on_with_the_same_command(start, tmp_path):
    """A signal stops both. If one is killed, the other ends."""
    words = (*WORDS, "--config.data.mode=streaming")
    assert wait(start("one", *words, count=1)) == [0]
    two, often, codes = tmp_path / "two", "--config.checkpoint_every_seconds=0.1", []
    for end in (lambda one: one.send_signal(signal.SIGTERM), lambda one: one.kill()):
        pair = start("two", *words, often)
        wait_for_step(two / "timing.jsonl", pair)
        end(pair[1])
        codes.append(wait(pair))
    assert codes[0] == [143, 143] and codes[1][0] not in (0, 143), codes

    assert wait(start("two", *words, often)) == [0, 0], (tmp_path / "two-0.txt").read_text()
    assert_close(two, tmp_path / "one")
    assert "MAP" in (tmp_path / "two-0.txt").read_text()
    ranking = (two / "ranking.txt").read_bytes()
    assert wait(start("two", "evaluate")) == [0, 0]
    assert (two / "ranking.txt").read_bytes() == ranking


@pytest.mark.slow
def test_processes_with_other_fields_are_refused(start, tmp_path):
    codes = wait(start("two", *WORDS, own=((), ("--config.seed=3",))))
    assert 2 in codes and 0 not in codes
    said = "".join((tmp_path / f"two-{number}.txt").read_text() for number in (0, 1))
    assert "configuration is not the same in all processes" in said
    assert not list((tmp_path / "two").glob("checkpoints/*"))
