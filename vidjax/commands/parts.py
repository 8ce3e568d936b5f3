"""`--mode=evaluate --shard=k/n`: scores a part of a split, for `--mode=merge` to join.

Processes may score parts at the same time, on machines that share the folder of the run or on
others: they only read what is not theirs. What starts them, and again where one was stopped, is
whatever batch system there is.
"""

import shlex
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidjax import config as config_lib
from vidjax import config_io, devices, files, messages
from vidjax.analysis import analysis
from vidjax.analysis.outputs import write_results
from vidjax.config import Config
from vidjax.data import subset
from vidjax.data.clips import Split, TrainingData
from vidjax.errors import UserError
from vidjax.evaluation.restore import FoundRun, find_run, fit_data, make_model
from vidjax.evaluation.scoring import (
    ClipScores,
    Collected,
    Evaluation,
    Judge,
    ModelScorer,
    check_block_size,
    collect,
    conclude,
    pool_of,
)
from vidjax.messages import PROGRAM
from vidjax.run import parts as parts_lib
from vidjax.run import results as results_lib
from vidjax.run import resume
from vidjax.run.parts import Part, Shard
from vidjax.run.terminal import say
from vidjax.steps import parts as tops_lib
from vidjax.steps.columns import ScoreColumns
from vidjax.steps.topk import MAX_NAMES, NO_CLIP, TopK
from vidjax.system import make_system

# Fields that change no score. Data in another folder has to have the same digest.
_FREE = (*config_lib.MOVABLE, "resume.allow")
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


class Joined(NamedTuple):
    """What the parts of a ranking hold of its clips.

    Attributes:
      clips: the best score of every clip; NaN where any of its scores is.
      owner: [N] int, the part that each clip is in.
      seen: what was seen while the clips were scored; None unless every part has it.
    """

    clips: ClipScores
    owner: np.ndarray
    seen: analysis.Seen | None


class Reader:
    """Reads the parts of a ranking of N clips and C identities, and checks what they hold."""

    def __init__(self, parts: Sequence[Part], num_clips: int, num_identities: int):
        """Takes all parts of a ranking."""
        self.parts = parts
        self._num_clips, self._num_identities = num_clips, num_identities
        self._limit = parts_lib.most_bytes(num_identities, num_clips)

    def read_clips(self, pool: np.ndarray) -> Joined:
        """Returns what the parts hold of their clips, of which those of `pool` [N] bool are ranked.

        Raises:
          ValueError: a file is damaged, or a clip is in two parts or in none.
        """
        best = np.full(self._num_clips, -np.inf, np.float32)
        right = np.zeros(self._num_clips, bool)
        owner = np.full(self._num_clips, -1)
        seen = analysis.Seen(np.zeros(self._num_clips, np.float32), {})
        for number, part in enumerate(self.parts):
            arrays = parts_lib.load(part, CLIPS, self._limit)
            self._check(part, CLIPS, self._fits(part, arrays, seen))
            clip = arrays["clip"]
            self._check(part, CLIPS, bool((owner[clip] < 0).all()))
            owner[clip], best[clip], right[clip] = number, arrays["best"], arrays["right"]
            if part.manifest["observed"]:
                seen.quality[clip] = arrays["quality"]
                for name, units in _attention(arrays).items():
                    seen.attention[name] = seen.attention.get(name, 0) + units
        if (owner < 0).any():
            raise UserError(
                f"{int((owner < 0).sum()):,} clips are in none of the parts in "
                f"'{self.parts[0].folder.parent}'\n{self.parts[0].shard.remedy}, then all others"
            )
        complete = all(part.manifest["observed"] for part in self.parts)
        return Joined(ClipScores(pool, best, right), owner, seen if complete else None)

    def _fits(self, part: Part, arrays: Mapping[str, np.ndarray], before: analysis.Seen) -> bool:
        """Returns whether the arrays of a part have types and shapes that fit each other."""
        kinds = {"clip": np.int32, "best": np.float32, "right": bool}
        if part.manifest["observed"]:
            kinds |= {"quality": np.float32}
        shape = (part.manifest["num_clips"],)
        if any(
            name not in arrays or arrays[name].dtype != kind or arrays[name].shape != shape
            for name, kind in kinds.items()
        ):
            return False
        clip, attention = arrays["clip"], _attention(arrays)
        earlier = before.attention or attention
        return bool(
            len(part.manifest["poor"]) == 2
            and (clip >= 0).all()
            and (clip < self._num_clips).all()
            and (np.diff(clip) > 0).all()
            and attention.keys() == earlier.keys()
            and all(
                units.dtype == np.int64 and units.shape == earlier[name].shape
                for name, units in attention.items()
            )
        )

    def read_tops(self, name: str, owner: np.ndarray) -> Iterator[TopK]:
        """Yields the lists of every part, by the clip indices of the whole split.

        Args:
          name: file of the ranking.
          owner: [N] int, the part that each clip is in.

        Raises:
          ValueError: a file is damaged.
        """
        for number, part in enumerate(self.parts):
            arrays = parts_lib.load(part, name, self._limit)
            self._check(part, name, arrays.keys() == {"scores", "index"})
            top = TopK(**arrays)
            shape = (self._num_identities, min(part.manifest["num_clips"], MAX_NAMES))
            kinds = (top.scores.dtype, top.index.dtype)
            self._check(part, name, kinds == (np.float32, np.int32))
            self._check(part, name, top.scores.shape == top.index.shape == shape)
            inside = (top.index >= 0) & (top.index < self._num_clips)
            own = inside & (owner[np.where(inside, top.index, 0)] == number)
            empty = (top.index == NO_CLIP) & (top.scores == -np.inf)
            self._check(part, name, bool((own | empty).all() and not np.isnan(top.scores).any()))
            yield top

    def join_tops(self, name: str, owner: np.ndarray) -> TopK:
        """Returns the sorted lists of all clips; the arguments are those of `read_tops`."""
        return tops_lib.join_tops(self.read_tops(name, owner), self._num_identities)

    @staticmethod
    def _check(part: Part, name: str, fits: bool) -> None:
        if not fits:
            path = part.folder / f"{name}.npz"
            raise UserError(
                f"'{path}' is damaged: its arrays do not fit each other\n{part.shard.remedy}"
            )


def _attention(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns name -> sums of attention, in the order of names."""
    start = ATTENTION
    return {k.removeprefix(start): arrays[k] for k in sorted(arrays) if k.startswith(start)}


def merge(
    config: Config,
    workdir: Path,
    data: TrainingData,
    *,
    overrides: Sequence[str] = (),
    num_devices: int | None = None,
) -> dict[str, Any]:
    """Joins the parts of an evaluation, and writes the results into the run's folder.

    Args:
      config: the run's configuration, with the overrides of the evaluation.
      workdir: the run's folder.
      data: the clips.
      overrides: the words of these overrides, for the commands that errors name.
      num_devices: devices that measure the sample of the report; None for all.

    Returns:
      The metrics of the evaluation. Its times are sums over the parts.

    Raises:
      ValueError: a part is missing, damaged, or of another evaluation.
      CheckpointError: there is no usable checkpoint.
    """
    began = time.monotonic()
    run = find_run(config, workdir)
    data = fit_data(data, config, workdir, run)
    parts = choose(workdir, describe(config, run, data), overrides)
    split = data.split(config.eval.split)
    reader = Reader(parts, len(split.clips), len(run.identities))
    evaluation, seen = _join(config, workdir, run, split, reader)
    observer = None
    if config.eval.report and seen is None:
        warnings.warn(
            "no report: some of the parts were made with --config.eval.report=False", stacklevel=2
        )
    elif config.eval.report and seen is not None:
        mesh = devices.make_mesh(num_devices, config.mesh.model)
        model = make_model(config, workdir, run, data, mesh)
        observer = analysis.Observer([model], split.name, mesh)
        block_size = min(config.eval.block_size, ScoreColumns.of(model.system, mesh).most_rows)
        observer.take(seen, block_size * mesh.shape["data"])
    before = sum(part.manifest["eval_seconds"] for part in parts)
    results = evaluation.results | {
        "data": data.report["data"],
        "step": run.manifest["step"],
        "eval_seconds": before + time.monotonic() - began,
        "eval_date": results_lib.now(),
    }
    trained = config_io.load_workdir(workdir)
    write_results(
        workdir, data, evaluation, results_lib.training_metrics(workdir) | results,
        split=split.name, own_split=trained.eval.split,
        trained=trained.data, observer=observer,
    )  # fmt: skip
    return results


def _join(
    config: Config, workdir: Path, run: FoundRun, split: Split, reader: Reader
) -> tuple[Evaluation, analysis.Seen | None]:
    """Returns the ranking of all clips, and what was seen while they were scored."""
    system = make_system(config.to_dict(), run.task)
    judge = Judge.make(str(workdir), system, run.training_sets, split.clips)
    clips, owner, seen = reader.read_clips(pool_of([judge], split.name))
    members = len(judge.use) if config.eval.members and len(judge.use) > 1 else 0
    manifests = [part.manifest for part in reader.parts]
    poor, of = (sum(manifest["poor"][i] for manifest in manifests) for i in (0, 1))
    collected = Collected(
        top=reader.join_tops(TOP, owner),
        model_tops=[],
        # One at a time: the lists of all members would fill the memory.
        member_tops=[(reader.join_tops(member_file(i), owner) for i in range(members))],
        clips=clips,
        poor=[(poor, of)],
        seconds=sum(manifest["seconds"] for manifest in manifests),
    )
    return conclude(collected, split, [judge]), seen


def choose(workdir: Path, facts: Mapping[str, Any], overrides: Sequence[str] = ()) -> list[Part]:
    """Returns the parts of a ranking: all n of some n.

    Args:
      workdir: the run's folder.
      facts: what the parts have to agree on, from `shard.describe`.
      overrides: words of the evaluation, for the commands that errors name.

    Raises:
      ValueError: no n has all its parts; the error tells of the n that lacks least, and how to make
        what is missing.
    """
    split = facts["split"]
    found = parts_lib.find(workdir, split)
    faults = {one: _fault(part, facts) for one, part in found.items()}
    good = {one: part for one, part in found.items() if isinstance(part, Part) and not faults[one]}
    lacking = {one.total: one.total for one in found}
    for one in good:
        lacking[one.total] -= 1
    if not lacking:
        raise UserError(
            f"no parts of {split} in '{workdir / parts_lib.FOLDER}': make all n of some n, by\n"
            f"{_command(workdir, overrides)} --shard=k/n"
        )
    total = min(sorted(lacking), key=lambda n: lacking[n])
    every = [Shard(i, total) for i in range(1, total + 1)]
    if not lacking[total]:
        parts = [good[one] for one in every]
        _tell_of_versions(parts)
        return parts
    first, *others = (one for one in every if one not in good)
    numbers = ", ".join(str(one.number) for one in (first, *others[:7]))
    numbers += ", ..." if others[7:] else ""
    fault = f"; part {first}: {faults[first]}" if faults.get(first) else ""
    raise UserError(
        f"{split}: missing, or not to be joined, of {total} parts: {numbers}{fault}\n"
        f"make them: {_command(workdir, overrides)} --shard={first}"
    )


def _fault(part: Part | ValueError, facts: Mapping[str, Any]) -> str:
    """Returns why a part cannot be joined, in one line; empty where it can."""
    damaged = isinstance(part, ValueError)
    return _plain(str(part).splitlines()[0] if damaged else disagreement(part, facts))


def _plain(text: str) -> str:
    """Returns a text that a stranger may have written, short and without control characters."""
    return "".join(filter(str.isprintable, text))[:400]


def _command(workdir: Path, overrides: Sequence[str]) -> str:
    words = [
        *PROGRAM.split(),
        "--mode=evaluate",
        f"--workdir={messages.shown(workdir)}",
        *overrides,
    ]
    return shlex.join(words)


def _tell_of_versions(parts: Sequence[Part]) -> None:
    """Says if parts were scored by other versions, whose scores may differ in their last digits."""
    kinds: dict[str, dict[str, None]] = {}
    for part in parts:
        for name, version in part.manifest["versions"].items():
            version = version.partition(" x ")[2] if name == "device" else version
            kinds.setdefault(name, {})[version] = None
    differ = [
        f"{name} {', '.join(versions)}" for name, versions in kinds.items() if len(versions) > 1
    ]
    if differ:
        warnings.warn(
            f"parts were scored by different versions: {_plain('; '.join(differ))}\n"
            "the last digits of their scores may differ from those of one process",
            stacklevel=3,
        )
