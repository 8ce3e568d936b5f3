"""A command in one of several processes, and the checks that all processes agree."""

import argparse
import contextlib
import hashlib
import importlib.metadata
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from vidjax import config as config_lib
from vidjax import files, messages
from vidjax.cluster import chatter, join, processes
from vidjax.cluster.processes import Place
from vidjax.config import Config
from vidjax.data.clips import TrainingData
from vidjax.run import signals
from vidjax.run.signals import Interrupted
from vidjax.training.plan import RunPlan


def run(place: Place, work: Callable[[], int], words: Sequence[str]) -> int:
    """Runs `work` in the process `place` of several, of which only the first prints; returns 0.

    If `work` fails, its process ends at once: jax would wait until the others end, too.
    """
    group: join.Group | None = None

    def tell_of_signal(signum: int) -> None:
        if group:
            group.tell_of_signal(signum)

    def joined() -> int:
        nonlocal group
        if "--debug" not in words:
            chatter.divert(join.LOST)
        group = join.join(place, messages.complain)
        try:
            with contextlib.ExitStack() as stack:
                if not processes.is_first():
                    stack.enter_context(messages.quietly())
                    stack.enter_context(warnings.catch_warnings(action="ignore"))
                code = work()
        except Interrupted:  # in all processes, at the same step
            group.end()
            raise
        except Exception as error:
            group.fail(error, messages.text_of(error))
            raise
        group.end()
        return code

    if signal.getsignal(signal.SIGTERM) is messages.stop_at_once:
        signals.end_on_signals(tell_of_signal)
    code = messages.guarded(joined, words)
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def check_command(args: argparse.Namespace, config: Config) -> None:
    """Refuses processes with different fields, flags or versions; folders of data may differ."""
    if not args.place:
        return
    facts = {f"config.{name}": value for name, value in config_lib.fields(config)}
    for name in ("dir", "cache_dir"):  # machines may keep the data in different places
        facts.pop(f"config.data.{name}")
    flags = {"--mode": args.command, "--num_processes": args.place.num_processes}
    facts |= {**flags, "the version of vidjax": importlib.metadata.version("vidjax")}
    processes.check_same(facts, "start all processes with the same command, but for --process_id")


def check_folder(workdir: Path) -> None:
    """Refuses processes that do not see the folder that the first one has locked."""
    if processes.process_count() == 1:
        return
    processes.barrier()  # the first process has the lock
    owner = "absent"
    if files.exists(workdir / ".lock"):
        with files.open_regular(workdir / ".lock") as file:
            owner = files.lock_owner(file)
    processes.check_same(
        {f"--workdir: the lock of '{workdir}'": owner},
        "name the same folder in every process, on a disk that their machines share",
    )


def check_data(data: TrainingData) -> None:
    """Refuses processes that have loaded different clips or labels."""
    facts = {"the digest of the data": data.report["data"]["digest"]}
    processes.check_same(facts, "give all processes the same files, see config.data.dir")


def check_plan(plan: RunPlan) -> None:
    """Refuses processes with different plans: two kinds of machine may cluster in two ways."""
    if processes.process_count() == 1:
        return
    sha256 = hashlib.sha256(repr(plan.task).encode())
    for array in jax.tree.leaves((plan.labels, plan.training_sets.trained, plan.tables)):
        sha256.update(np.ascontiguousarray(array).data)
    processes.check_same(
        {"the digest of folds, clusters and weights": sha256.hexdigest()},
        "give all processes the same versions of vidjax, numpy and jax, on processors of one kind",
    )
