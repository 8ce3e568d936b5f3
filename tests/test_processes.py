"""Several processes that train one run: the same bytes as one, and no hang where one is gone."""

import io
import itertools
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.campaigns import processes as campaign
from tests.campaigns.kills import Run
from tests.campaigns.processes import Group, free_port, lay_out
from vidjax import main
from vidjax.cluster import chatter, join, processes
from vidjax.commands import evaluate

SECONDS = 300


@pytest.fixture(scope="module")
def alone(official_dir, tmp_path_factory):
    """Returns a function that trains a kind of run in one process, once, and returns it."""
    folder, found = tmp_path_factory.mktemp("processes"), {}

    def train(case, mode):
        if (case, mode) not in found:
            found[case, mode] = lay_out(folder, official_dir, case, mode, None)
        return found[case, mode]

    return train


@pytest.fixture
def together(alone, official_dir):
    """Returns a function that lays out the same run once more, for several processes."""

    def make(case, mode):
        like = alone(case, mode)
        return lay_out(like.workdir.parent, official_dir, case, mode, like)

    return make


# The flags.


def place_of(*words):
    return main.parse(["evaluate", "--workdir=w", *words]).place


def test_the_place_of_a_process_is_three_flags_or_one_word():
    assert place_of() is None
    words = ("--coordinator=10.0.0.1:99", "--num_processes=4", "--process_id=3")
    assert place_of(*words) == processes.Place("10.0.0.1:99", 4, 3)
    assert place_of("--coordinator=auto") == processes.Place("auto", None, None)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--coordinator=h:9", "need all of"),
        ("--process_id=0", "need all of"),
        ("--coordinator=auto --num_processes=2 --process_id=0", "or --coordinator=auto alone"),
        ("--coordinator=h --num_processes=2 --process_id=0", "not HOST:PORT"),
        ("--coordinator=h:x --num_processes=2 --process_id=0", "not HOST:PORT"),
        ("--coordinator=h:70000 --num_processes=2 --process_id=0", "not HOST:PORT"),
        ("--coordinator=h:9 --num_processes=two --process_id=0", "--num_processes=two"),
        ("--coordinator=h:9 --num_processes=2 --process_id=-1", "--process_id=-1"),
        ("--coordinator=h:9 --num_processes=2 --process_id=2", "must be below"),
    ],
)
def test_mistakes_in_the_flags_are_told(words, part):
    with pytest.raises(ValueError, match=part) as error:
        place_of(*words.split())
    assert len(str(error.value).splitlines()) <= 3


def test_several_processes_evaluate_one_whole_run():
    args = main.parse(["evaluate", "--workdir=w", "--coordinator=auto", "--runs=a,b"])
    with pytest.raises(ValueError, match="one whole run"):
        evaluate.settings(args)


def test_the_command_that_repeats_a_run_names_no_processes():
    words = ["--config=mma", "--coordinator=h:9", "--num_processes", "2", "--process_id=1"]
    assert main.parse([*words, "--quiet"]).line.endswith("--config=mma --quiet")


# What C++ libraries print.


def test_noise_of_libraries_is_left_out(monkeypatch):
    lines = [
        "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peers : ",
        "E1122 16:39:40.515247   19199 coordination_service_agent.cc:289] Polled an error",
        "2 is connected to 3 peer ranks. Expected number of connected peer ranks is : 3",
        "vidjax: stopped",
        "F1122 16:37:04.679238   18895 client.h:80] " + chatter.LOST + ". This most likely",
        "*** Check failure stack trace: ***",
        "    @     0x7f15af040634  absl::lts_20260107::log_internal::LogMessage::SendToLog()",
        "RPC: /xla.coordination.CoordinationService/RegisterTask",
        "Fatal Python error: Segmentation fault",
    ]
    given = "\n".join(lines).encode() + b"\nno UTF-8: \xff\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), "ascii"))
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    monkeypatch.setattr(sys, "argv", ["chatter", join.LOST])
    chatter.main()
    kept = ["vidjax: stopped", *join.LOST.splitlines(), "Fatal Python error: Segmentation fault"]
    assert printed.getvalue().splitlines() == [*map(str.encode, kept), b"no UTF-8: \xff"]


def test_python_prints_as_before_while_libraries_are_diverted():
    code = (
        "import os, sys\nfrom vidjax.cluster import chatter\nchatter.divert('lost')\n"
        "print('of python')\nprint('an error', file=sys.stderr)\n"
        "os.write(1, b'[Gloo] Rank 0\\n')\nos.write(2, b'other\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "of python\n"
    assert sorted(done.stderr.splitlines()) == ["an error", "other"]


# Agreement and watch, with a table of their own.


class FakeTable:
    """The table of keys and values of several processes, which are threads here."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000)
            return self.values[key]

    def key_value_delete(self, key):
        with self.changed:
            del self.values[key]

    def key_value_dir_get(self, key):
        with self.changed:
            return [pair for pair in self.values.items() if pair[0].startswith(key)]


@pytest.fixture
def table(monkeypatch):
    found = FakeTable()
    monkeypatch.setattr(processes, "key_value_store", lambda: found)
    return found


def test_one_process_agrees_with_itself():
    assert (processes.process_count(), processes.process_index()) == (1, 0)
    assert processes.is_first()
    assert processes.allgather_json({"a": 1}) == [{"a": 1}]
    assert processes.run_on_first(lambda: 5) == 5
    assert processes.allgather_ints([7]) == [[7]]
    rounds = processes.Rounds()
    assert [rounds.exchange(step, [step]) for step in range(3)] == [[[0]], [[1]], [[2]]]
    processes.check_same({"a": 1}, "nothing")
    processes.barrier()


@pytest.mark.parametrize("resumed_at", [0, 1000, 200_000])
def test_a_resumed_run_has_a_round_within_a_second(monkeypatch, resumed_at):
    """Ten steps a second, after half a minute of compilation."""
    now = [0.0]
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "allgather_ints", lambda values: [values, values])
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    rounds, times = processes.Rounds(), []
    now[0] = 30.0
    for step in range(resumed_at, resumed_at + 300):
        if rounds.exchange(step, [5]):
            times.append(now[0])
        now[0] += 0.1
    apart = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 30 and max(apart) < 1.2
    assert min(apart[5:]) > 0.8


def test_processes_tell_each_other_values_and_find_what_differs(table, monkeypatch):
    seeds = [0, 0, 3]
    here = threading.local()
    monkeypatch.setattr(processes, "process_count", lambda: 3)
    monkeypatch.setattr(processes, "process_index", lambda: here.number)
    monkeypatch.setattr(processes, "next", lambda serial: next(here.serial), raising=False)
    found, errors = {}, {}

    def process(number):
        here.number, here.serial = number, iter(range(10))
        found[number] = (
            processes.allgather_json([number]),
            processes.run_on_first(lambda: f"of {number}"),
        )
        for _ in range(5):
            processes.barrier()
        try:
            processes.check_same({"config.seed": seeds[number], "same": [1]}, "start them alike")
        except ValueError as error:
            errors[number] = str(error)

    threads = [threading.Thread(target=process, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == dict.fromkeys(range(3), ([[0], [1], [2]], "of 0"))
    assert len(table.values) <= 6  # what all have read is removed
    assert errors == {
        0: "config.seed: 0 in process 0, 3 in process 2\nstart them alike",
        1: "config.seed: 0 in process 1, 3 in process 2\nstart them alike",
        2: "config.seed: 3 in process 2, 0 in process 0\nstart them alike",
    }


@pytest.fixture
def ended(monkeypatch):
    """Catches the end of the process by a watch, and shortens its times."""
    found = []

    def end(code):
        found.append(code)
        threading.Event().wait()  # the thread goes no further

    monkeypatch.setattr(join.os, "_exit", end)
    monkeypatch.setattr(join, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(join, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(join, "FAILED_SILENCE_SECONDS", 0.1)
    return found


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def beat(table, number, count, end=""):
    value = json.dumps([count, f"machine-{number}, process ID {number}", end])
    table.key_value_set(f"vidjax/alive/{number}", value, allow_overwrite=True)


def test_a_process_that_falls_silent_is_named(table, ended):
    said = []
    watched = join.Group(3, 0, said.append)
    for count in range(30):
        beat(table, 1, count)
        if count < 5:
            beat(table, 2, count)
        if ended:
            break
        time.sleep(0.05)
    wait_until(lambda: ended)
    watched.stop()
    assert set(ended) == {join.GONE}
    assert said[0].startswith("process 2 of 3 (machine-2, process ID 2) is gone")
    assert len(said[0].splitlines()) == 2


def test_the_error_that_ends_a_process_is_told_by_the_others(table, ended):
    said = []
    watched = join.Group(2, 0, said.append)
    beat(table, 1, 1, "no such file: 'x'\nname another one")
    wait_until(lambda: ended)
    watched.stop()
    assert said[0] == "process 1 ended: no such file: 'x'\nname another one"


def test_a_process_tells_why_it_ends(table, ended):
    watched = join.Group(2, 1, lambda text: None)
    watched.tell("the disk is full")
    assert json.loads(table.values["vidjax/alive/1"])[2] == "the disk is full"
    assert not ended


def test_a_heartbeat_under_way_does_not_take_the_reason_away(table, ended, monkeypatch):
    told, write = threading.Event(), table.key_value_set

    def write_late(key, value, allow_overwrite=False):
        if not json.loads(value)[2]:
            told.wait(0.5)
        write(key, value, allow_overwrite)

    monkeypatch.setattr(table, "key_value_set", write_late)
    monkeypatch.setattr(join, "BEAT_SECONDS", 2)
    watched = join.Group(2, 1, lambda text: None)
    time.sleep(0.1)  # a heartbeat is being written
    threading.Timer(0.1, told.set).start()
    watched.tell("the disk is full")
    time.sleep(0.2)
    assert json.loads(table.values["vidjax/alive/1"])[2] == "the disk is full"


def test_after_a_failed_collective_the_limit_is_shorter(table, ended, monkeypatch):
    monkeypatch.setattr(join, "SILENCE_SECONDS", 60)
    said = []
    watched = join.Group(2, 0, said.append)
    beat(table, 1, 1)
    watched.find_gone()
    wait_until(lambda: ended)
    watched.stop()
    assert "process 1 of 2" in said[0]


def test_only_errors_of_connections_are_waited_for():
    gloo = RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    try:
        raise OSError("cannot save") from gloo
    except OSError as error:
        assert join._is_of_connection(error)
    assert join._is_of_connection(gloo)
    assert not join._is_of_connection(ValueError("config.seed: must be a number"))
    assert not join._is_of_connection(RuntimeError("RESOURCE_EXHAUSTED: out of memory"))


# Real processes.


@pytest.mark.slow
def test_processes_train_and_go_on_as_any_number_of_others(together):
    """Four processes, then one, then two, each of them on four devices: the bytes of one alone."""
    run = together("ensemble", "resident")
    for count in (4, 1):
        group = Group(run, count)
        assert group.processes[0].wait_for("step"), group.said()
        group.processes[-1].send(signal.SIGTERM)
        assert group.wait(SECONDS) == [143] * count, group.said()
        assert len(set(re.findall(r"stopped at step (\d+);", group.said()))) == 1, group.said()
    group = Group(run, 2)
    assert group.wait(SECONDS) == [0, 0], group.said()
    assert not run.differences()
    assert group.processes[1].said() == ""


@pytest.mark.slow
def test_faults_of_a_process_end_the_others_and_leave_what_is_whole(together, fault_seed):
    """Streamed clips: each process reads those of its devices."""
    rng = random.Random(fault_seed)
    run = together("mma", "streaming")
    for fault, victim, moment in [("kill", 1, "step"), ("kill", 0, "save")]:
        group = Group(run, 2)
        assert not group.strike(fault, victim, moment, rng.uniform(0, 0.2)), group.said()
    group = Group(run, 2)
    assert group.wait(SECONDS) == [0, 0], group.said()
    assert not run.differences()


@pytest.mark.slow
def test_processes_that_do_not_fit_each_other_end_with_a_message(official_dir, tmp_path):
    run = Run(tmp_path, official_dir, "mma", "streaming", None)
    port = free_port()
    words = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", *run.words]

    def start(*more, name="output.txt", seconds=40):
        env, program = run.environment(), campaign.program(seconds)
        return campaign.Process(run, [*words, *more], env, program=program, output=name)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        process = start("--process_id=0")
        process.wait(SECONDS)
    assert (process.code, len(process.said().splitlines())) == (2, 2)
    assert f"cannot listen on port {port}: Address already in use" in process.said()

    pair = [
        start("--process_id=0", name="0.txt"),
        start("--process_id=1", "--config.seed=3", name="1.txt"),
    ]
    for process in pair:
        process.wait(SECONDS)
        assert process.code in (2, join.GONE), process.said()
        assert "config.seed: " in process.said()
        assert len(process.said().splitlines()) <= 3

    process = start("--process_id=1", seconds=3)  # nobody else starts
    process.wait(SECONDS)
    assert process.code == 2, process.said()
    assert "not all 2 processes have started" in process.said()
    assert not run.manifests()


@pytest.mark.slow
def test_a_campaign_of_faults(campaign, fault_seed, tmp_path):
    if not campaign:
        pytest.skip("an hour: with --campaign")
    assert campaign.campaign(tmp_path, 50, fault_seed) == 0, (
        tmp_path / "processes.txt"
    ).read_text()
