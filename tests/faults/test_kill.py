"""Death at any moment: the command is killed, or told to stop, and goes on to the same bytes."""

import contextlib
import random
import signal
import subprocess
import time

import pytest

from tests.campaigns import kills
from tests.campaigns.kills import Run
from tests.helpers.cases import quick_first

pytestmark = pytest.mark.slow
SECONDS = 120  # limits of time are of the CPU's: other tests may run beside


@pytest.fixture(scope="module")
def disturbed(official_dir, tmp_path_factory):
    """Returns a function that lays out a run beside the same one without a break, made once."""
    folder, likes = tmp_path_factory.mktemp("kills"), {}

    def lay_out(case):
        if case not in likes:
            likes[case] = Run(folder, official_dir, case, None)
            likes[case].finish()
        return Run(folder, official_dir, case, likes[case])

    return lay_out


@pytest.mark.parametrize("case", quick_first(kills.CASES, mark=pytest.mark.nightly))
def test_killed_runs_end_with_the_same_bytes(disturbed, fault_seed, campaign, case):
    rng, run = random.Random(fault_seed), disturbed(case)
    moments = 20 * [*kills.SPANS] if campaign else ["step", "save", "evaluation"]
    died = [kills.kill_once(run, moment, rng) for moment in moments]
    assert campaign or died.count(False) <= 1  # a run that was done before it was killed
    run.finish()
    assert not run.differences(), died


def test_killed_evaluations_change_nothing(disturbed, fault_seed, campaign):
    run, rng = disturbed("quality_fusion").like, random.Random(fault_seed)
    words = ("--mode=evaluate", f"--workdir={run.workdir}", "--config.eval.split=test")

    def outcome():
        ranking = (run.workdir / "ranking_test.txt").read_bytes()
        return ranking, kills.results(run.workdir / "metrics_test.json")

    began = time.monotonic()
    run.finish(*words)
    seconds, before = time.monotonic() - began, outcome()
    for _ in range(50 if campaign else 2):
        process = run.start(*words)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.3, 1.0) * seconds)
        assert outcome() == before
    (run.workdir / "ranking_test.txt").unlink()
    run.finish(*words)
    assert outcome() == before
    for path in run.workdir.glob("*_test.*"):
        path.unlink()


def test_signals_end_the_command_as_they_should(disturbed):
    """Before the first step at once, then after a checkpoint, at once again with the second."""
    run = disturbed("quality_fusion")
    for moment, signum in [("conversion", signal.SIGTERM), ("compile", signal.SIGINT)]:
        process = run.start(compiling=moment == "compile")
        assert process.wait_for(moment), process.said()
        time.sleep(0.5 if moment == "compile" else 0)
        process.send(signum)
        assert process.wait(SECONDS) < 2
        assert process.code == 128 + signum
        assert process.said().splitlines()[-1] == "vidjax: stopped"
        assert not run.manifests()

    process = run.start()
    assert process.wait_for("step"), process.said()
    process.send(signal.SIGTERM)
    assert process.wait(SECONDS) < 10
    assert process.code == 128 + signal.SIGTERM
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
