"""Death at any moment: the command is killed, or told to stop, and goes on to the same bytes."""

import random
import signal
import time

import pytest

from tests.campaigns import kills
from tests.campaigns.kills import Run

SECONDS = 120  # limits of time are of the CPU's: other tests may run beside


@pytest.fixture(scope="module")
def disturbed(official_dir, tmp_path_factory):
    """Returns a function that lays out a run beside the same one without a break, made once."""
    folder, likes = tmp_path_factory.mktemp("kills"), {}

    def lay_out(case, mode):
        if (case, mode) not in likes:
            likes[case, mode] = Run(folder, official_dir, case, mode, None)
            likes[case, mode].finish()
        return Run(folder, official_dir, case, mode, likes[case, mode])

    return lay_out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "mode", "moments"),
    [
        ("mma", "streaming", ("compile", "step", "save", "evaluation")),
        ("noise_classes", "resident", ("save", "step", "evaluation")),
    ],
)
def test_killed_runs_end_with_the_same_bytes(disturbed, fault_seed, case, mode, moments):
    rng = random.Random(fault_seed)
    run = disturbed(case, mode)
    died = [kills.kill_once(run, moment, rng) for moment in moments]
    assert died.count(None) <= 1  # a run that was done before it was killed
    run.finish()
    assert not run.differences(), died


@pytest.mark.slow
def test_killed_evaluations_change_nothing(disturbed, fault_seed):
    run = disturbed("mma", "streaming")
    run.finish()
    assert not kills.kill_evaluations(run, 1, random.Random(fault_seed))


@pytest.mark.slow
def test_signals_end_the_command_as_they_should(disturbed):
    """Before the first step at once, then after a checkpoint, at once again with the second."""
    run = disturbed("mma", "streaming")
    before = [("start", signal.SIGINT), ("conversion", signal.SIGTERM), ("compile", signal.SIGTERM)]
    for moment, signum in before:
        process = run.start(compiling=moment == "compile")
        assert process.wait_for(moment), process.said()
        time.sleep(0.5 if moment != "conversion" else 0)
        process.send(signum)
        assert process.wait(SECONDS) < 2
        assert process.code == 128 + signum
        assert process.said().splitlines()[-1] == "vidjax: stopped"
        assert not run.manifests()

    for moment, signum in [("step", signal.SIGTERM), ("evaluation", signal.SIGINT)]:
        process = run.start()
        assert process.wait_for(moment), process.said()
        process.send(signum)
        assert process.wait(SECONDS) < 10
        assert process.code == 128 + signum
        assert len(process.said().splitlines()[-1]) < 100
        if moment == "step":
            logged = max(line["step"] for line in run.lines("metrics.jsonl"))
            assert f"stopped at step {logged}; run the same command" in process.said()
            assert max(run.manifests()) == logged

    process = run.start()
    assert process.wait_for("step"), process.said()
    process.send(signal.SIGINT)
    process.send(signal.SIGTERM)
    assert process.wait(SECONDS) < 2
    assert process.code in (130, 143)  # two that arrive together come in no order
    run.finish()
    assert not run.differences()
