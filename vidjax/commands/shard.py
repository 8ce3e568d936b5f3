"""`--mode=evaluate --shard=k/n`: scores a part of a split, for `--mode=merge` to join.

Processes may score parts at the same time, on machines that share the folder of the run or on
others: they only read what is not theirs. What starts them, and again where one was stopped, is
whatever batch system there is.
"""

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax import config as config_lib
from vidjax import config_io, devices, files
from vidjax.analysis import analysis
from vidjax.config import Config
from vidjax.data import subset
from vidjax.data.clips import TrainingData
from vidjax.evaluation.model_scorer import ModelScorer
from vidjax.evaluation.restore import FoundRun, find_run, fit_data, make_model
from vidjax.evaluation.scoring import Collected, Judge, check_block_size, collect, pool_of
from vidjax.run import parts as parts_lib
from vidjax.run import resume
from vidjax.run.parts import Part, Shard
from vidjax.run.terminal import say
from vidjax.steps import parts as tops_lib
from vidjax.steps.topk import TopK

# Fields that change no score. Data in another folder has to have the same digest.
_FREE = (*resume.MOVABLE, "resume.allow")
CLIPS, TOP, ATTENTION = "clips", "top", "attention/"


def member_file(number: int) -> str:
    """Returns the name of the file with the ranking by the member at a position."""
    return f"member-{number}"


class Made(NamedTuple):
    """The part that a command was to make.

    Attributes:
      part: the part.
      before: True if it was there before, and nothing was scored.
    """

    part: Part
    before: bool


def evaluate_part(
    config: Config,
    workdir: Path,
    data: TrainingData,
    shard: Shard,
    *,
    num_devices: int | None = None,
) -> Made:
    """Scores a part of a split with the weights of a run, and writes what a ranking needs of it.

    Args:
      config: the run's configuration, with the overrides of this evaluation.
      workdir: the run's folder; only the folder of the part is written, and locked.
      data: the clips.
      shard: which part.
      num_devices: devices to use; None for all. Scores do not depend on it.

    Raises:
      ValueError: the data does not fit the run, or another process makes the part.
      CheckpointError: there is no usable checkpoint.
    """
    began = time.monotonic()
    check_block_size(config.eval.block_size)
    run = find_run(config, workdir)
    data = fit_data(data, config, workdir, run)
    split = config.eval.split
    chosen = subset.choose(data, split, tuple(run.task.modalities), *shard)
    facts = describe(config, run, data)
    folder = files.make_folder(parts_lib.folder_of(workdir, split, shard), "--shard:")
    with files.lock(folder, "--shard:"):
        limit = parts_lib.most_bytes(len(run.identities), len(chosen))
        part = _there(folder, split, shard, facts, limit)
        if part and (part.manifest["observed"] or not config.eval.report):
            return Made(part, before=True)
        parts_lib.clear(folder)  # that of another evaluation is of no use any more
        archives, found = _score(config, workdir, run, data, chosen, num_devices)
        facts |= found | {
            "number": shard.number,
            "total": shard.total,
            "num_clips": len(chosen),
            "eval_seconds": time.monotonic() - began,
            "versions": devices.versions(),
        }
        return Made(parts_lib.write(folder, facts, archives), before=False)


def describe(config: Config, run: FoundRun, data: TrainingData) -> dict[str, Any]:
    """Returns the entries of a part's manifest in which all parts of a ranking agree."""
    manifest = run.manifest
    scored_by = {
        name: manifest[name] for name in ("files", "identities_sha256", "members_sha256")
    } | {"task": run.task._asdict()}
    return {
        "split": config.eval.split,
        "step": manifest["step"],
        "checkpoint": files.sha256_json(scored_by),
        "config": config.to_dict(),
        "data": data.report["data"],
    }


def disagreement(part: Part, facts: Mapping[str, Any]) -> str:
    """Returns in what a part differs from `facts`, the result of `describe`; empty for nothing."""
    own = part.manifest
    if own["checkpoint"] != facts["checkpoint"]:
        return f"it is of the checkpoint of step {own['step']}, not of this one of {facts['step']}"
    if own["data"]["digest"] != facts["data"]["digest"]:
        return f"it is of other data, sha256 {own['data']['digest'][:12]}"
    try:
        before, now = (config_io.from_json(files.to_json(one["config"])) for one in (own, facts))
    except ValueError as error:
        return f"its configuration is that of another version: {error}"
    changed = config_lib.differences(before, now)
    changed = {name: pair for name, pair in changed.items() if name not in _FREE}
    return f"it is of another configuration, {resume.describe(changed)}" if changed else ""


def _there(
    folder: Path, split: str, shard: Shard, facts: Mapping[str, Any], limit: int
) -> Part | None:
    """Returns the part in a folder if it can be joined; says why one has to be made again."""
    try:
        part = parts_lib.read(folder, split, shard)
        parts_lib.verify(part, limit)
    except FileNotFoundError:
        return None
    except ValueError as error:
        warnings.warn(f"made again: {str(error).splitlines()[0]}", stacklevel=3)
        return None
    if reason := disagreement(part, facts):
        say(f"made again: {reason}")
        return None
    return part


def _score(
    config: Config,
    workdir: Path,
    run: FoundRun,
    data: TrainingData,
    chosen: np.ndarray,
    num_devices: int | None,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Scores the clips `chosen` [n] int; returns arrays of the part and entries of its manifest."""
    mesh = devices.make_mesh(num_devices, config.mesh.model)
    model = make_model(config, workdir, run, data, mesh)
    split = config.eval.split
    judge = Judge.make(str(workdir), model.system, run.training_sets, data.split(split).clips)
    pool_of([judge], split)  # of the whole split, of which a part may rank nothing
    part = subset.Part(data, split, chosen)
    model = model._replace(data=part)
    observer = analysis.Observer([model], split, mesh) if config.eval.report else None
    collected = collect(
        [ModelScorer(model, part.split(split).clips, mesh)],
        part.split(split),
        mesh,
        block_size=config.eval.block_size,
        each_member=config.eval.members,
        observe=observer,
    )
    archives = _archives(collected, chosen, observer.seen if observer else None)
    (poor,) = collected.poor
    found = {"observed": observer is not None, "poor": poor, "seconds": collected.seconds}
    return archives, found


def _archives(
    collected: Collected, chosen: np.ndarray, seen: analysis.Seen | None
) -> dict[str, dict[str, np.ndarray]]:
    """Returns file -> name -> array of a part; clips are numbered as in the whole split."""
    clips = {
        "clip": chosen.astype(np.int32),
        "best": collected.clips.best,
        "right": collected.clips.right,
    }
    if seen:
        clips |= {"quality": seen.quality}
        clips |= {ATTENTION + name: units for name, units in seen.attention.items()}
    ((*members,),) = collected.member_tops
    tops = {TOP: collected.top} | {member_file(i): top for i, top in enumerate(members)}
    return {CLIPS: clips} | {name: _arrays(top, chosen) for name, top in tops.items()}


def _arrays(top: TopK, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Returns name -> array of the ranking of a part, [C, min(n, 100)]."""
    return {k: np.asarray(v) for k, v in tops_lib.renumber(top, chosen)._asdict().items()}
