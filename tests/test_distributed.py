"""A run does not depend on the number of devices and processes that share its clips."""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from threading import Thread

import jax
import numpy as np
import pytest

from tests.helpers.cases import nightly_after_first
from tests.helpers.limits import running
from tests.helpers.small_runs import LAYER, QUICK, ROOT, flat, run, saved, shrunk, weights
from vidjax.cli import program
from vidjax.core import devices
from vidjax.runs import checkpoint, results
from vidjax.utils import rendezvous
from vidjax.utils.errors import UserError, VidjaxWarning

SECONDS = 300
SPEC = "configs/quality_fusion.py:iqiyi_vid"
WORDS = (
    LAYER, "--config.batch_size=32", "--config.num_epochs=4", "--config.eval.every_epochs=0",
    "--config.log_every_steps=1", "--config.eval.block_size=16",
)  # fmt: skip
# SGD with a constant learning rate. So a step does not depend on the number of epochs.
SGD = (
    "--config.optim.name=sgd", "--config.optim.learning_rate=0.01", "--config.optim.decay=constant",
    "--config.optim.warmup=0", "--config.optim.warmup_scale=0", "--config.optim.total_decay=0",
)  # fmt: skip
# A process of three: its address and its index. Process 1 fails. Without JAX, it starts fast.
PROCESS = """
import sys, time
from vidjax.utils import exit_codes, rendezvous
from vidjax.utils.errors import Expected

class Damaged(Expected):
    exit_code = 3

def command():
    rendezvous.meet(sys.argv[1], 3, int(sys.argv[2]), 300)
    if sys.argv[2] == "1":
        raise Damaged("damaged")
    time.sleep(300)

code = exit_codes.run_to_exit_code(command)
rendezvous.leave(code)
sys.exit(code)
"""


def test_error_of_a_wrong_number_of_devices_names_the_number_of_devices():
    for number in (0, 9):  # `conftest` emulates 8 devices
        with pytest.raises(ValueError, match=f"num_devices={number}: this machine has 8"):
            devices.make_mesh(number)


def free_address():
    """Returns HOST:PORT, of a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def start(official_dir, cache_dir, tmp_path):
    """Returns a function: flags of both processes, and of the second process -> the processes."""
    processes = []

    def run(*words, second=()):
        place = f"--coordinator={free_address()}"
        env = {**os.environ, **QUICK, "VIDJAX_CACHE": str(cache_dir), "JAX_NUM_CPU_DEVICES": "1"}
        words = [*words, f"--workdir={tmp_path}/two", f"--config.data.dir={official_dir}", place]
        command = [sys.executable, "-m", "vidjax.main", *words, "--num_processes=2"]
        for number, more in enumerate(((), second)):
            flags = [f"--process_id={number}", *more]
            with (tmp_path / f"{number}.txt").open("w") as file:
                output = {"stdout": file, "stderr": subprocess.STDOUT}
                processes.append(subprocess.Popen([*command, *flags], cwd=ROOT, env=env, **output))
        return processes[-2:]

    yield run
    for process in processes:  # a process that waits for a dead process would never end
        process.kill()
        process.wait(SECONDS)


def wait(processes):
    """Returns the exit codes of processes, after they have ended."""
    return [process.wait(SECONDS) for process in processes]


def assert_close(left, right):
    """Asserts that parameters, moments, losses and results of two runs are close."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, flat(saved(left)), flat(saved(right)))
    logs = (results.read_lines(folder / "metrics.jsonl") for folder in (left, right))
    for mine, theirs in zip(*logs, strict=True):
        assert mine.pop("split", "") == theirs.pop("split", "")
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    maps = [json.loads((folder / "metrics.json").read_text())["map"] for folder in (left, right)]
    assert maps[0] == pytest.approx(maps[1], abs=1e-6)


@pytest.mark.slow
@nightly_after_first("mode", ["resident", "streaming"])
def test_two_processes_resume_after_a_kill_of_one(start, official_data, tmp_path, mode):
    """The result equals a run of one process.

    In the nightly case, SIGTERM to one process first stops both processes at a checkpoint. The run
    also writes a report, and two processes evaluate the run.
    """
    run(shrunk(*WORDS, spec=SPEC), tmp_path / "one", official_data, num_devices=2)
    two, nightly = tmp_path / "two", mode == "streaming"
    words = f"--config={SPEC}", *WORDS, f"--config.data.mode={mode}"
    words += ("--config.checkpoint_every_seconds=0.1", f"--config.eval.report={nightly}")
    for signum in (signal.SIGTERM, signal.SIGKILL) if nightly else (signal.SIGKILL,):
        pair = start(*words)
        before, end = checkpoint.manifests(two).keys(), time.monotonic() + SECONDS
        while checkpoint.manifests(two).keys() <= before:
            assert time.monotonic() < end and all(process.poll() is None for process in pair)
            time.sleep(0.01)
        pair[1].send_signal(signum)
        first, second = wait(pair)
        if signum == signal.SIGTERM:
            assert first == second == 128 + signal.SIGTERM
        else:  # the second process is killed, so the first process ends with an error
            assert first == 2
            lines = (tmp_path / "0.txt").read_text().splitlines()
            assert "process 1 of 2 has ended" in lines[-2] and "same command" in lines[-1]
    words += ("--config.checkpoint_every_seconds=60",)
    assert wait(start(*words)) == [0, 0], (tmp_path / "0.txt").read_text()
    assert_close(two, tmp_path / "one")
    assert "MAP" in (tmp_path / "0.txt").read_text()
    assert (two / "report.html").exists() == nightly
    if nightly:
        ranking = (two / "ranking.txt").read_bytes()
        assert wait(start("evaluate")) == [0, 0]
        assert (two / "ranking.txt").read_bytes() == ranking


@pytest.mark.parametrize(("index", "remedy"), [(0, "--process_id=1"), (1, "--process_id=0")])
def test_process_waits_for_missing_processes_and_names_them(capsys, index, remedy):
    address = free_address()
    place = f"--coordinator={address} --num_processes=2 --process_id={index}"
    code = program.main(f"train --config=mma {place} --coordinator_timeout=0.2".split())
    waiting, *error = capsys.readouterr().err.splitlines()
    wanted = ("waiting for 1 of 2 processes", "waiting for process 0 of 2")[index]
    wanted = f"vidjax: {wanted} at {address}{': Connection refused' * index}"
    assert code == 2 and waiting == wanted and len(error) == 2
    assert remedy in error[1] and "--coordinator_timeout=SECONDS" in error[1]


def test_each_process_connects_once_and_wrong_indices_are_refused(capsys):
    end, found, address = time.monotonic() + SECONDS, {}, free_address()
    thread = Thread(target=lambda: found.update(rendezvous._gather(address, 4, end)), daemon=True)
    thread.start()
    while "waiting for 3 of 4" not in capsys.readouterr().err:
        time.sleep(0.01)

    def connect(line):
        peer = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
        peer.sendall(line)
        return peer

    connect(b"1 of 4\n").close()  # this process dies, and is started again
    peers = [connect(line) for line in (b"1 of 4\n", b"GET / HTTP/1.1\r\n\r\n", b"3 of 4\n")]
    for index, count, remedy in ((3, 4, "another process has --process_id=3"),
                                 (2, 3, "process 0 has --num_processes=4")):  # fmt: skip
        with pytest.raises(UserError, match=remedy):
            rendezvous._reach(address, count, index, end)
    peers.append(connect(b"2 of 4\n"))
    thread.join(SECONDS)
    assert sorted(found) == [1, 2, 3]
    for peer in (*peers, *found.values()):
        peer.close()


@pytest.mark.slow
def test_process_that_fails_prints_only_its_error_and_the_others_name_it():
    command = [sys.executable, "-c", PROCESS, free_address()]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(running([*command, x], cwd=ROOT)) for x in "012"]
        for index, process in enumerate(processes):
            _, output = process.communicate(timeout=SECONDS)
            assert process.returncode == (3 if index == 1 else 2), output
            assert ("damaged" in output) == (index == 1)
            assert ("process 1 of 3 has ended" in output) == (index != 1), output


@pytest.mark.slow
def test_processes_with_different_configurations_are_refused(start, tmp_path):
    codes = wait(start(f"--config={SPEC}", *WORDS, second=("--config.seed=3",)))
    assert 2 in codes and 0 not in codes
    output = "".join((tmp_path / f"{number}.txt").read_text() for number in (0, 1))
    assert "configuration is not the same in all processes" in output
    assert not list((tmp_path / "two").glob("checkpoints/*"))


@pytest.mark.slow
@nightly_after_first("spec, given", [
    ("quality_fusion", (*SGD, "--config.data.mode=streaming")),
    ("quality_fusion", (*SGD, "--config.ensemble.seeds=2", "--config.data.mode=resident")),
    *(("noise_classes", (*SGD, f"--config.data.mode={x}")) for x in ("resident", "streaming")),
    ("plda", ()), *((name, SGD) for name in ("cosine", "mma", "deepmef")),
])  # fmt: skip
def test_training_does_not_depend_on_the_number_of_devices(data, tmp_path, spec, given):
    """A run that is resumed on 4 devices equals the same run, resumed on 1 device."""

    def train(folder, *, devices, epochs):
        words = (f"--config.num_epochs={epochs}", "--config.log_every_steps=1", *given)
        config = shrunk(*words, "--config.eval.report=False", spec=f"configs/{spec}.py:iqiyi_vid")
        return run(config, tmp_path / folder, data, num_devices=devices)

    if spec != "plda":  # PLDA needs exactly two epochs, so it is not resumed
        train("one", devices=1, epochs=1)
        shutil.copytree(tmp_path / "one", tmp_path / "moved")
    moved, single = train("moved", devices=4, epochs=2), train("one", devices=1, epochs=2)
    assert abs(moved["map"] - single["map"]) < 0.02  # rounding may swap clips in a ranking
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(close, weights(tmp_path / "moved"), weights(tmp_path / "one"))


def test_a_warning_reports_a_gpu_that_jax_does_not_use(tmp_path, monkeypatch, request):
    chosen = jax.config.values["jax_platforms"]
    request.addfinalizer(lambda: jax.config.update("jax_platforms", chosen))
    # No warning, which would be an error: first the user has chosen the CPU, then no GPU exists.
    for driver, platforms in ((tmp_path, "cpu"), (tmp_path / "none", None)):
        monkeypatch.setattr(devices, "NVIDIA", driver)
        jax.config.update("jax_platforms", platforms)
        devices.make_mesh(1)
    monkeypatch.setattr(devices, "NVIDIA", tmp_path)  # exists, so there is a GPU
    with pytest.warns(VidjaxWarning, match=r"(?s)uses the CPU.*vidjax\[cuda13\].*\[cuda12\]"):
        devices.make_mesh(1)
