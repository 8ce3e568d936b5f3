"""What several processes of a run must have alike: command, folder and data."""

import hashlib
import importlib.metadata
from pathlib import Path

import jax
import numpy as np

from vidjax import config as config_lib
from vidjax import files
from vidjax.cluster import processes
from vidjax.command_line import Arguments
from vidjax.config import Config
from vidjax.data.clips import TrainingData
from vidjax.training.plan import RunPlan


def check_command(args: Arguments, config: Config) -> None:
    """Checks that the processes were started with the same command.

    Raises:
      ValueError: another process has another value of a field or a flag, or another version.
    """
    if not args.place:
        return
    facts = {f"config.{name}": value for name, value in config_lib.fields(config)}
    for name in ("dir", "cache_dir"):  # machines may keep the data in different places
        facts.pop(f"config.data.{name}")
    flags = {"--mode": args.mode, "--num_processes": args.place.num_processes}
    facts |= {**flags, "the version of vidjax": importlib.metadata.version("vidjax")}
    processes.check_same(facts, "start all processes with the same command, but for --process_id")


def check_folder(workdir: Path) -> None:
    """Checks that all processes see the folder that the first one has locked.

    Raises:
      ValueError: another process has another folder.
    """
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
    """Checks that all processes have loaded the same clips and labels.

    Raises:
      ValueError: another process has other data.
    """
    facts = {"the digest of the data": data.report["data"]["digest"]}
    processes.check_same(facts, "give all processes the same files, see config.data.dir")


def check_plan(plan: RunPlan) -> None:
    """Checks that all processes have planned the same run: clusters and draws of unlike machines.

    Raises:
      ValueError: another process has another plan.
    """
    if processes.process_count() == 1:
        return
    sha256 = hashlib.sha256(repr(plan.task).encode())
    for array in jax.tree.leaves((plan.labels, plan.training_sets.trained, plan.tables)):
        sha256.update(np.ascontiguousarray(array).data)
    processes.check_same(
        {"the digest of folds, clusters and weights": sha256.hexdigest()},
        "give all processes the same versions of vidjax, numpy and jax, on processors of one kind",
    )
