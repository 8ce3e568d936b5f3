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

from tests.helpers.cases import quick_first
from tests.helpers.small_runs import LAYER, ROOT, run, saved, shrunk
from vidjax.cli import program
from vidjax.core import distributed
from vidjax.utils.errors import UserError

SECONDS = 300
SPEC = "configs/quality_fusion.py:iqiyi_vid"
WORDS = (
    LAYER, "--config.batch_size=32", "--config.num_epochs=6", "--config.eval.every_epochs=0",
    "--config.log_every_steps=4", "--config.eval.block_size=16",
)  # fmt: skip


def test_functions_for_many_processes_work_in_one_process():
    assert distributed.count() == 1 and distributed.is_first()
    assert distributed.max_over_processes(7, -3) == [7, -3]
    distributed.check_same({"configuration": {"a": 1}})
    with pytest.raises(UserError, match=r"missing; .*--coordinator=HOST:PORT"):
        distributed.join_processes(program.parse(["--config=mma", "--coordinator=h:9"]))


@pytest.fixture
def start(official_dir, cache_dir, tmp_path):
    """Yields a function that starts a command in two processes with a device each."""
    every = []

    def run(*words, own=((), ())):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
        env = os.environ | {
            "VIDJAX_CACHE": str(cache_dir), "JAX_NUM_CPU_DEVICES": "1",
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }  # fmt: skip
        words = [*words, f"--workdir={tmp_path}/two", f"--config.data.dir={official_dir}", place]
        for number in (0, 1):
            more = ["--num_processes=2", f"--process_id={number}", *own[number]]
            with (tmp_path / f"{number}.txt").open("w") as file:
                every.append(subprocess.Popen(
                    [sys.executable, "-m", "vidjax.main", *words, *more],
                    cwd=ROOT, env=env, stdout=file, stderr=file,
                ))  # fmt: skip
        return every[-2:]

    yield run
    for process in every:  # one that waits for another would wait for ever
        process.kill()
        process.wait(SECONDS)


def wait(processes):
    return [process.wait(SECONDS) for process in processes]


def wait_for_checkpoint(folder, processes):
    """Waits until a run has another checkpoint."""

    def steps():
        return {path.parent.name for path in folder.glob("checkpoints/*/manifest.json")}

    before, end = steps(), time.monotonic() + SECONDS
    while steps() <= before:
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", quick_first(["resident", "streaming"], mark=pytest.mark.nightly))
def test_two_processes_resume_after_a_kill_of_one(start, official_data, tmp_path, mode):
    """If one is killed, the other ends. The nightly case also stops both by a signal to one."""
    run(shrunk(*WORDS, spec=SPEC), tmp_path / "one", official_data, num_devices=2)
    two, report = tmp_path / "two", mode == "streaming"
    words = f"--config={SPEC}", *WORDS, f"--config.data.mode={mode}"
    words += ("--config.checkpoint_every_seconds=0.1", f"--config.eval.report={report}")
    for sent in (signal.SIGTERM, signal.SIGKILL) if report else (signal.SIGKILL,):
        pair = start(*words)
        wait_for_checkpoint(two, pair)
        pair[1].send_signal(sent)
        codes = wait(pair)
        if sent == signal.SIGTERM:
            assert codes == [143, 143]
        else:
            assert codes[0] not in (0, 143)

    assert wait(start(*words)) == [0, 0], (tmp_path / "0.txt").read_text()
    assert_close(two, tmp_path / "one")
    assert "MAP" in (tmp_path / "0.txt").read_text() and (two / "report.html").exists() == report
    if mode == "streaming":
        ranking = (two / "ranking.txt").read_bytes()
        assert wait(start("evaluate")) == [0, 0]
        assert (two / "ranking.txt").read_bytes() == ranking


@pytest.mark.slow
def test_processes_with_different_configurations_are_refused(start, tmp_path):
    codes = wait(start(f"--config={SPEC}", *WORDS, own=((), ("--config.seed=3",))))
    assert 2 in codes and 0 not in codes
    output = "".join((tmp_path / f"{number}.txt").read_text() for number in (0, 1))
    assert "configuration is not the same in all processes" in output
    assert not list((tmp_path / "two").glob("checkpoints/*"))
