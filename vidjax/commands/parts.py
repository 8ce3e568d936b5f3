"""An evaluation in parts: `--mode=evaluate --shard=k/n` scores a part, `--mode=merge` joins all n.

Processes may score parts at the same time, on any machines: each writes its own part alone, and two
that make the same part write the same bytes.

To join the ranking, its metrics and those of the members, features and weights are not read. Only
the report reads them, to measure up to 2,000 changed clips, as at the end of any evaluation.
"""

import shlex
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vidjax import config as config_lib
from vidjax import config_io, devices, ensemble, files, messages
from vidjax.analysis import analysis
from vidjax.config import Config
from vidjax.data.clips import BUCKETS, Split, TrainingData, make_eval_plan
from vidjax.errors import UserError
from vidjax.evaluation.restore import FoundRun, find_run, fit_data, make_model
from vidjax.evaluation.scoring import ClipScores, Evaluation, ModelScores, pool_of
from vidjax.messages import PROGRAM
from vidjax.run import parts as parts_lib
from vidjax.run import resume
from vidjax.run.parts import ATTENTION, CLIPS, TOP, Part, Shard, member_group
from vidjax.run.terminal import say
from vidjax.steps.topk import MAX_NAMES, NO_CLIP, TopK, join_tops
from vidjax.system import make_system

# Fields that change no score. Data in another folder has to have the same digest.
_FREE = (*config_lib.MOVABLE, "resume.allow")


def evaluate_part(
    config: Config,
    workdir: Path,
    data: TrainingData,
    shard: Shard,
    run: FoundRun | None = None,
    *,
    num_devices: int | None = None,
) -> tuple[Part, bool]:
    """Scores a part of a split with the weights of a run, and writes what a ranking needs of it.

    Returns the part, and True if it was there already, so that nothing was scored now.
    """
    began = time.monotonic()
    run = run or find_run(config, workdir)
    data = fit_data(data, config, workdir, run)
    name = config.eval.split
    chosen = choose_clips(data, name, tuple(run.task.modalities), *shard)
    facts = describe(config, run, data)
    parts_lib.make_folder(workdir, name)
    limit = parts_lib.most_bytes(len(run.identities), len(chosen))
    part = _there(workdir, name, shard, facts, limit)
    if part and (part.facts.observed or not config.eval.report):
        return part, True

    mesh = devices.make_mesh(num_devices, config.mesh.model)
    model = make_model(config, workdir, run, data, mesh)
    only = np.isin(np.arange(len(data.split(name).clips)), chosen)
    scored, observer = analysis.score_observed(
        [model], config, mesh, analyse=config.eval.report, only=only
    )
    _, best, right = scored.clips
    clips = {"clip": chosen.astype(np.int32), "best": best[only], "right": right[only]}
    if observer:
        clips |= {"quality": observer.seen.quality[only]}
        clips |= {ATTENTION + name: units for name, units in observer.seen.attention.items()}
    (scores,) = scored.models
    tops = {TOP: scored.top}
    tops |= {member_group(i): top for i, top in enumerate(scores.member_tops)}
    width = min(len(chosen), MAX_NAMES)  # places behind it are empty for every identity
    groups = {
        name: {field: np.asarray(x)[:, :width] for field, x in top._asdict().items()}
        for name, top in tops.items()
    }
    made = facts | {
        "number": shard.number,
        "total": shard.total,
        "num_clips": len(chosen),
        "num_members": len(tops) - 1,
        "observed": observer is not None,
        "poor": scores.poor,
        "seconds": scored.seconds,
        "eval_seconds": time.monotonic() - began,
        "versions": devices.versions(),
    }
    made = msgspec.convert(made, parts_lib.Facts)
    return parts_lib.write(workdir, made, {CLIPS: clips, **groups}), False


def describe(config: Config, run: FoundRun, data: TrainingData) -> dict[str, Any]:
    """Returns the facts in which all parts of a ranking agree."""
    manifest = run.manifest
    names = ("files", "identities_sha256", "members_sha256")
    scored_by = {name: manifest[name] for name in names} | {"task": run.task._asdict()}
    return {
        "split": config.eval.split,
        "step": manifest["step"],
        "checkpoint": files.sha256_json(scored_by),
        "config": msgspec.json.decode(files.to_json(config.to_dict())),  # as a reader sees it
        "data": {"digest": data.report["data"]["digest"]},
    }


def disagreement(part: Part, facts: Mapping[str, Any]) -> str:
    """Says how a part differs from `facts`, the result of `describe`; "" if it does not."""
    own = part.facts
    if own.checkpoint != facts["checkpoint"]:
        return f"it is of the checkpoint of step {own.step}, not of this one of {facts['step']}"
    if own.data.digest != facts["data"]["digest"]:
        return f"it is of other data, sha256 {own.data.digest[:12]}"
    try:
        before, now = (config_io.from_json(files.to_json(x)) for x in (own.config, facts["config"]))
    except ValueError as error:
        return f"its configuration is that of another version: {error}"
    changed = config_lib.differences(before, now)
    changed = {name: pair for name, pair in changed.items() if name not in _FREE}
    return f"it is of another configuration, {resume.describe(changed)}" if changed else ""


def _there(
    workdir: Path, split: str, shard: Shard, facts: Mapping[str, Any], limit: int
) -> Part | None:
    """Returns the part in the folder if it can be joined; else None, and says why."""
    try:
        part = parts_lib.read(workdir, split, shard)
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


# Which clips a part has.


def bounds(costs: np.ndarray, count: int) -> np.ndarray:
    """Cuts `costs` into `count` ranges of about equal sums; range i is costs[b[i] : b[i + 1]].

    Returns b, [count + 1] int. Of at least `count` costs, above 0, no range is empty.
    """
    ends = np.cumsum(costs, dtype=np.int64)
    number = np.arange(count + 1)
    # In whole numbers, so that all processes find the same.
    wanted = [int(ends[-1]) * i // count for i in range(count + 1)]
    found = np.searchsorted(ends, wanted)
    found[-1] = len(costs)
    found = np.maximum.accumulate(found - number) + number
    return np.minimum(found, len(costs) - count + number)


def choose_clips(
    data: TrainingData, split: str, modalities: Sequence[str], number: int, count: int
) -> np.ndarray:
    """Returns [n] int32, the clips of part `number` of `count` of a split, in ascending order.

    A part is a range of the records, so that it shares at most two files with other parts; strided
    parts would each read all files. Ranges cost about the same. A clip costs the number of frames
    to which evaluation pads it, since every row of a block takes the time of the longest one.
    """
    num_clips = len(data.split(split).clips)
    if count > num_clips:
        raise UserError(
            f"--shard={number}/{count}: {split} has {num_clips:,} clips, and a part needs one\n"
            f"--shard=k/{num_clips} is the most"
        )
    plan, order = make_eval_plan(data.split(split), modalities), data.order(split)
    ends = bounds(np.array(BUCKETS)[plan.bucket[order]], count)
    return np.sort(order[ends[number - 1] : ends[number]])


# Joining.


def merge(
    config: Config,
    workdir: Path,
    data: TrainingData,
    run: FoundRun | None = None,
    *,
    overrides: Sequence[str] = (),
    num_devices: int | None = None,
) -> dict[str, Any]:
    """Joins the parts of an evaluation, writes the results into the run's folder, and returns them.

    `overrides` are repeated in the commands that errors suggest. Times are sums over the parts.
    """
    began = time.monotonic()
    run = run or find_run(config, workdir)
    data = fit_data(data, config, workdir, run)
    parts = choose_parts(workdir, describe(config, run, data), overrides)
    split, sets = data.split(config.eval.split), run.training_sets
    use, in_sample = ensemble.scoring_members(sets, split.clips)
    clips, owner, seen = join_clips(parts, split, pool_of([use], split.name))
    facts, sizes = [part.facts for part in parts], (len(run.identities), len(split.clips))
    model = ModelScores(
        name=str(workdir),
        weight=1.0,
        system=make_system(config.to_dict(), run.task),
        members=sets.members,
        use=use,
        in_sample=in_sample,
        poor=(sum(one.poor[0] for one in facts), sum(one.poor[1] for one in facts)),
        top=None,
        # One at a time: the lists of all members would fill the memory.
        member_tops=(
            join_tops(read_tops(parts, member_group(i), owner, *sizes), sizes[0])
            for i in range(facts[0].num_members)
        ),
    )
    top = join_tops(read_tops(parts, TOP, owner, *sizes), sizes[0])
    scored = Evaluation(split, top, clips, [model], sum(one.seconds for one in facts), {})
    observer = None
    if config.eval.report and seen is None:
        warnings.warn(
            "no report: some of the parts were made with --config.eval.report=False", stacklevel=2
        )
    elif config.eval.report and seen is not None:
        mesh = devices.make_mesh(num_devices, config.mesh.model)
        trained = make_model(config, workdir, run, data, mesh)
        observer = analysis.Observer([trained], split.name, mesh, config.eval.block_size)
        observer.take(seen)
    return analysis.write_evaluation(
        config, workdir, data.identities, scored, observer,
        described=data.report["data"], step=run.manifest["step"],
        began=began - sum(one.eval_seconds for one in facts),
    )  # fmt: skip


def join_clips(
    parts: Sequence[Part], split: Split, pool: np.ndarray
) -> tuple[ClipScores, np.ndarray, analysis.Seen | None]:
    """Joins the values per clip of the parts; the clips in `pool` [N] bool are ranked.

    Returns the best scores, NaN where any score is; the part that each clip is in, [N] int; and
    what an `Observer` saw while the clips were scored, None unless every part has it.
    """
    count = len(split.clips)
    best, right = np.full(count, -np.inf, np.float32), np.zeros(count, bool)
    owner = np.full(count, -1)
    seen = analysis.Seen(np.zeros(count, np.float32), {})
    for number, part in enumerate(parts):
        arrays = parts_lib.load(part, CLIPS, parts_lib.most_bytes(0, count))
        kinds = {"clip": np.int32, "best": np.float32, "right": bool}
        if part.facts.observed:
            kinds |= {"quality": np.float32}
        shape = (part.facts.num_clips,)
        _check(part, all(_is(arrays.get(name), kind, shape) for name, kind in kinds.items()))
        clip, found = arrays["clip"], sorted(k for k in arrays if k.startswith(ATTENTION))
        attention = {k.removeprefix(ATTENTION): arrays[k] for k in found}
        earlier = seen.attention or attention
        _check(part, clip[0] >= 0 and clip[-1] < count and (np.diff(clip) > 0).all())
        _check(part, (owner[clip] < 0).all() and attention.keys() == earlier.keys())
        _check(part, all(_is(x, np.int64, earlier[k].shape) for k, x in attention.items()))
        owner[clip], best[clip], right[clip] = number, arrays["best"], arrays["right"]
        if part.facts.observed:
            seen.quality[clip] = arrays["quality"]
            for name, units in attention.items():
                seen.attention[name] = seen.attention.get(name, 0) + units
    if (owner < 0).any():
        raise UserError(
            f"{int((owner < 0).sum()):,} clips are in none of the parts in "
            f"'{parts[0].path.parent}'\n{parts[0].shard.remedy}, then all others"
        )
    complete = all(part.facts.observed for part in parts)
    return ClipScores(pool, best, right), owner, seen if complete else None


def read_tops(
    parts: Sequence[Part], group: str, owner: np.ndarray, num_identities: int, num_clips: int
) -> Iterator[TopK]:
    """Yields the ranking `group` of every part, by the clip indices of the whole split.

    `owner` [N] int is the part of each clip: a ranking that lists another part's clip is refused.
    """
    limit = parts_lib.most_bytes(num_identities, num_clips)
    for number, part in enumerate(parts):
        arrays = parts_lib.load(part, group, limit)
        shape = (num_identities, min(part.facts.num_clips, MAX_NAMES))
        _check(part, arrays.keys() == {"scores", "index"})
        scores, index = arrays["scores"], arrays["index"]
        _check(part, _is(scores, np.float32, shape) and _is(index, np.int32, shape))
        inside = (index >= 0) & (index < num_clips)
        own = inside & (owner[np.where(inside, index, 0)] == number)
        empty = (index == NO_CLIP) & (scores == -np.inf)
        _check(part, (own | empty).all() and not np.isnan(scores).any())
        yield TopK(scores, index)


def _is(array: np.ndarray | None, kind: type, shape: tuple[int, ...]) -> bool:
    return array is not None and array.dtype == kind and array.shape == shape


def _check(part: Part, fits: object) -> None:
    if not fits:
        raise UserError(
            f"'{part.path}' is damaged: its arrays do not fit each other\n{part.shard.remedy}"
        )


def choose_parts(
    workdir: Path, facts: Mapping[str, Any], overrides: Sequence[str] = ()
) -> list[Part]:
    """Returns all n parts of a ranking, for an n for which all are there and agree with `facts`.

    The error is about the n that lacks the fewest parts, with the command that makes the first.
    """
    split = facts["split"]
    found = parts_lib.find(workdir, split)
    good, faults, lacking = {}, {}, {one.total: one.total for one in found}
    for one, part in found.items():
        is_part = isinstance(part, Part)
        faults[one] = disagreement(part, facts) if is_part else str(part).splitlines()[0]
        if is_part and not faults[one]:
            good[one] = part
            lacking[one.total] -= 1
    command = ["--mode=evaluate", f"--workdir={messages.shown(workdir)}", *overrides]
    command = shlex.join([*PROGRAM.split(), *command])
    if not lacking:
        raise UserError(
            f"no parts of {split} in '{workdir / parts_lib.FOLDER}': choose a number n, and score "
            f"the parts k = 1 to n:\n{command} --shard=k/n"
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
    fault = f"; part {first}: {_plain(faults[first])}" if faults.get(first) else ""
    raise UserError(
        f"{split}: missing, or not to be joined, of {total} parts: {numbers}{fault}\n"
        f"make them: {command} --shard={first}"
    )


def _plain(text: str) -> str:
    """Returns an untrusted text, cut to 400 letters and without control characters."""
    return "".join(filter(str.isprintable, text))[:400]


def _tell_of_versions(parts: Sequence[Part]) -> None:
    """Warns if parts were scored by different versions: last digits of scores may differ."""
    kinds: dict[str, dict[str, None]] = {}
    for part in parts:
        for name, version in part.facts.versions.items():
            version = version.partition(" x ")[2] if name == "device" else version
            kinds.setdefault(name, {})[version] = None
    differ = [f"{name} {', '.join(found)}" for name, found in kinds.items() if len(found) > 1]
    if differ:
        warnings.warn(
            f"parts were scored by different versions: {_plain('; '.join(differ))}\n"
            "the last digits of their scores may differ from those of one process",
            stacklevel=3,
        )
