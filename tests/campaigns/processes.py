"""Faults of one of several processes that train a run together.

    python -m tests.campaigns.processes FOLDER [--faults=50] [--seed=0]

A process is killed, stopped or told to stop at a random moment of a run of 2 or 4 processes. The
others must end within a limit, each with a message of at most three lines, and leave no checkpoint
that is incomplete. Then the same command goes on, on another number of processes. What is left must
be the same bytes as those of one process with as many devices that nobody disturbed.
`FOLDER/processes.txt` has a line a fault and a line a run.
"""

import argparse
import random
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.campaigns.kills import SPANS, Process, Run, official_files
from vidjax.run import checkpoint

NUM_DEVICES = 4  # of all processes together
SILENCE = 12  # seconds; the limit of a user is longer
FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
WORDS = {"mma": (), "ensemble": ()}
MOMENTS = ("start", "compile", "step", "save", "evaluation")


def program(start: int = 40) -> tuple[str, str]:
    """Returns the words that run `python -m vidjax.main`; all must start within `start` seconds."""
    code = f"""
from vidjax.cluster import join
join.SILENCE_SECONDS, join.FAILED_SILENCE_SECONDS, join.START_SECONDS = {SILENCE}, 5, {start}
from vidjax.main import run
run()
"""
    return "-c", code


def free_port() -> int:
    """Returns a port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Group:
    """Several processes of one run, with NUM_DEVICES devices together."""

    def __init__(self, run: Run, count: int):
        """Starts `count` processes of the run's command."""
        env, port = run.environment(NUM_DEVICES // count), free_port()
        self._run = run
        self.processes = []
        for number in range(count):
            place = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}")
            own, output = (*place, f"--process_id={number}", *run.words), f"output-{number}.txt"
            self.processes.append(Process(run, own, env, program=program(), output=output))

    def wait(self, seconds: float = 300) -> list[int | None]:
        """Waits for the end of all and returns their exit codes; kills what takes longer."""
        end = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.wait(max(0.1, end - time.monotonic()))
        finally:
            self.kill()
        return [process.code for process in self.processes]

    def kill(self) -> None:
        """Kills all of them that have not ended."""
        for process in self.processes:
            process.kill()

    def said(self) -> str:
        """Returns the output of all of them."""
        return "\n".join(process.said() for process in self.processes)

    def strike(self, fault: str, victim: int, moment: str, delay: float) -> list[str]:
        """Disturbs a process some seconds after a moment began; says what is wrong with others."""
        if not self.processes[0].wait_for(moment):
            return [] if self.wait() == [0] * len(self.processes) else [self.said()]
        time.sleep(delay)
        struck = self.processes[victim]
        struck.send(FAULTS[fault])
        others = [one for one in self.processes if fault == "term" or one is not struck]
        wrong = []
        end = time.monotonic() + 3 * SILENCE + 40  # 40: not all had started
        while any(process.code is None for process in others) and time.monotonic() < end:
            time.sleep(0.05)
        for process in others:
            if process.code is None:
                wrong.append(f"a process hangs: {process.said()[-300:]}")
            elif process.code not in (0, 2, 4, 134, 143):
                wrong.append(f"exit code {process.code}: {process.said()[-300:]}")
            elif process is struck:
                pass  # a signal in its first moments ends it without a word
            elif process.code and not _is_message(process.said()):
                wrong.append(f"no message: {process.said()[-500:]}")
        self.kill()
        return wrong + _damaged(self._run)


def _is_message(said: str) -> bool:
    """Returns True if an output ends with one message, of at most three lines."""
    last = said.rpartition("vidjax: ")[2].strip().splitlines()
    return "Traceback" not in said and "vidjax: " in said and 1 <= len(last) <= 3


def _damaged(run: Run) -> list[str]:
    """Returns the checkpoints that would be used and are not what was saved."""
    wrong = []
    for step in run.manifests():
        try:
            checkpoint.verify(run.workdir / "checkpoints" / str(step))
        except checkpoint.CheckpointError as error:
            wrong.append(str(error))
    return wrong


def lay_out(folder: Path, official: Path, case: str, mode: str, like: Run | None) -> Run:
    """Lays out a run; that without `like` is trained to its end by one process."""
    run = Run(folder, official, case, mode, like)
    run.words += WORDS[case]
    if like:
        return run
    if case == "mma":
        # More than two numbers are added up in another order between processes than in one. A
        # process that joins no other adds them up as several do.
        group = Group(run, 1)
        assert group.wait(600) == [0], group.said()
    else:
        process = Process(run, run.words, run.environment(NUM_DEVICES))
        process.wait(600)
        assert process.code == 0, process.said()
    return run


def campaign(folder: Path, faults: int, seed: int) -> int:
    """Runs a campaign and returns the number of faults and runs that were not as they should."""
    rng = random.Random(seed)
    official = official_files(folder)
    began, wrong, done, likes = time.monotonic(), 0, 0, {}
    with open(folder / "processes.txt", "a") as file:

        def tell(text: str) -> None:
            file.write(f"{time.monotonic() - began:7.0f} s  {text}\n")
            file.flush()

        while done < faults:
            case, mode = rng.choice(list(WORDS)), rng.choice(["streaming", "resident"])
            if (case, mode) not in likes:
                likes[case, mode] = lay_out(folder, official, case, mode, None)
            run = lay_out(folder, official, case, mode, likes[case, mode])
            for _ in range(min(5, faults - done)):
                count = rng.choice([2, 2, 4])
                fault, victim = rng.choice(list(FAULTS)), rng.randrange(count)
                moment = rng.choice(MOMENTS)
                group = Group(run, count)
                found = group.strike(fault, victim, moment, rng.uniform(0, SPANS[moment]))
                done += 1
                wrong += bool(found)
                codes = [process.code for process in group.processes]
                tell(
                    f"{done}: {case} {mode}, {fault} of process {victim} of {count}, {moment}: "
                    f"codes {codes}; {'; '.join(found) or 'as it should'}"
                )
                if run.finished():
                    break
            group = Group(run, rng.choice([2, 4]))
            codes = group.wait()
            differences = run.differences() if set(codes) == {0} else [group.said()[-1000:]]
            wrong += bool(differences)
            tell(f"{case} {mode}: {', '.join(differences)[:1000] or 'the same bytes'}")
        tell(f"{done} faults, {wrong} not as they should")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    return campaign(args.folder.absolute(), args.faults, args.seed)


if __name__ == "__main__":
    sys.exit(main())
