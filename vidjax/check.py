"""What is fit for use and what is damaged: environment, data, checkpoints and results of a run.

A check reads and reports. It deletes, converts and repairs nothing, and it takes no lock: a run may
go on meanwhile, and what that run drops or has not finished writing is no fault.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vidjax import checkpoint, members, ranking, resident
from vidjax import config as config_lib
from vidjax import mesh as mesh_lib
from vidjax.config import Config
from vidjax.evaluate import digest, select_modalities

OK, WARNING, FAULT = "ok", "warning", "FAULT"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections")
LITTLE_SPACE = 1e9  # bytes; a warning below


class Item(NamedTuple):
    """One line of a check.

    Attributes:
      state: OK, WARNING or FAULT.
      room: `environment`, `data`, `checkpoints` or `run`.
      text: what was looked at and what was found, in one line.
    """

    state: str
    room: str
    text: str


def check(config: Config | None, workdir: Path | None) -> Iterator[Item]:
    """Yields what is found, one item after another.

    Args:
      config: of the run, or of the data alone; None for neither, or where that of the run is
        damaged.
      workdir: the run's folder; None for none.
    """
    for room, items in _rooms(config, workdir):
        try:
            yield from (Item(state, room, _one_line(text)) for state, text in items)
        except (ValueError, OSError, checkpoint.CheckpointError) as error:
            yield Item(FAULT, room, _one_line(f"{room}: {error}"))


def exit_code(items: Iterable[Item]) -> int:
    """Returns 0 without a fault, 3 with one among the checkpoints, 2 with others alone."""
    rooms = {item.room for item in items if item.state == FAULT}
    return 3 if "checkpoints" in rooms else 2 if rooms else 0


def verdict(items: Sequence[Item]) -> str:
    """Returns the last line: how many faults and warnings there are."""
    faults, warned = (sum(item.state == state for item in items) for state in (FAULT, WARNING))
    if not faults:
        return f"all good, {warned} to note" if warned else "all good"
    rooms = dict.fromkeys(item.room for item in items if item.state == FAULT)
    return f"{faults} FAULT{'S' if faults > 1 else ''}: {', '.join(rooms)}"


Found = Iterator[tuple[str, str]]  # (state, text)


def _rooms(config: Config | None, workdir: Path | None) -> Iterator[tuple[str, Found]]:
    """Yields (room, what is found there)."""
    yield "environment", _environment()
    if config is not None:
        yield "environment", _cache(config)
    joined = tuple(config.join.runs) if config is not None and workdir else ()
    if workdir:
        yield "run", _folder("workdir", workdir)
        yield "run", _run(config, workdir)
        if not joined:
            yield "checkpoints", _checkpoints(config, workdir)
    for name in joined:
        yield "checkpoints", _checkpoints(_config_of(name), Path(name), f"{name}: ")
    if config is not None and not joined:
        yield "data", _data(config)
    datasets = set()
    for name in joined:
        one = _config_of(name)
        if one is not None:
            for field in ("dir", "cache_dir"):
                if config is not None and config.data[field] is not None:
                    one.data[field] = config.data[field]
            if repr(one.data) not in datasets:
                datasets.add(repr(one.data))
                yield "data", _data(one)


def _config_of(run: str) -> Config | None:
    try:
        return config_lib.load_workdir(Path(run))
    except ValueError:
        return None  # `_checkpoints` says so


def _environment() -> Found:
    yield OK, f"python {platform.python_version()} on {platform.platform()}"
    found, absent = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    yield OK, f"packages: {', '.join(found)}"
    if absent:
        yield FAULT, f"packages: {', '.join(absent)} not installed"
    try:
        from vidjax.data.features import tf, tfds

        yield OK, f"TensorFlow {tf.__version__} and TFDS {tfds.__version__} can be imported"
    except Exception as error:  # a broken installation raises whatever its libraries raise
        yield FAULT, f"TensorFlow: no data can be read: {type(error).__name__}: {error}"
    mesh = mesh_lib.make_mesh()
    kind = mesh.devices.flat[0].device_kind
    yield OK, f"devices: {mesh.size} x {kind}, {_bytes(resident.free_bytes(mesh))} free on each"


def _cache(config: Config) -> Found:
    from vidjax.data.records import default_cache_dir

    cache = Path(config.data.cache_dir or default_cache_dir()).expanduser()
    yield from _folder("cache", cache)
    for left in sorted(cache.glob("*/*.partial")):
        yield WARNING, f"cache: '{left}': of a conversion cut short or under way; it will be cleared"


def _folder(name: str, folder: Path) -> Found:
    """Yields whether a folder, which need not exist yet, can be written and has room."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        yield FAULT, f"{name}: '{there}' is a file, not a folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield FAULT, f"{name}: cannot write in '{there}'"
    else:
        free = shutil.disk_usage(there).free
        state = WARNING if free < LITTLE_SPACE else OK
        made = "" if there == folder else ", to be made"
        yield state, f"{name}: '{folder}'{made}: can be written, {_bytes(free)} free"


def _data(config: Config) -> Found:
    from vidjax.data import pickles
    from vidjax.data.records import default_cache_dir

    cache = Path(config.data.cache_dir or default_cache_dir()).expanduser()
    if config.data.name == "synthetic":
        pattern = f"{config.data.size}-{config.data.seed}-*"
        made = [path for path in (cache / "synthetic").glob(pattern) if path.suffix != ".partial"]
        if not made:
            yield WARNING, "data: the synthetic dataset is not made yet: training makes it"
        for folder in sorted(made):
            yield from _converted(config, folder, pickles.find_pickles(folder), cache)
        return
    if config.data.name != "iqiyi_vid":
        raise ValueError(f"config.data.name='{config.data.name}': synthetic or iqiyi_vid")
    if not config.data.dir:
        raise ValueError("config.data.dir is not set: name the directory of the official files")
    folder = Path(config.data.dir).expanduser()
    sources = pickles.find_pickles(folder)
    if not sources:
        raise ValueError(f"no feature pickles such as face_train.pickle in '{folder}'")
    yield from _converted(config, folder, sources, cache)


def _converted(
    config: Config, folder: Path, sources: Mapping[tuple[str, str], Path], cache: Path
) -> Found:
    """Yields what the records of some official files are like."""
    from vidjax.data import iqiyi_vid, records

    size = sum(path.stat().st_size for path in sources.values())
    yield OK, f"data: '{folder}': {len(sources)} pickles, {_bytes(size)}"
    where = iqiyi_vid.records_folder(sources, cache)
    if not (where / "manifest.json").exists():
        yield WARNING, (
            f"records: not converted yet, or the files have changed: training converts them, "
            f"or python -m vidjax.data.iqiyi_vid {folder}"
        )
        return
    found = records.load_index(where)
    problems = [*records.verify(found), *_sums(found.report), *_counts(found)]
    for problem in problems:
        yield FAULT, f"records: {problem}"
    shards = [shard for split in found.splits.values() for shard in split.shards]
    if not problems:
        size = sum(shard.size for shard in shards)
        yield OK, f"records: '{where}': {len(shards)} shards, {_bytes(size)}, every sha256 agrees"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, _, report = iqiyi_vid.load_labels(folder, found)
    for warning in caught:
        yield WARNING, f"ground truth: {warning.message}"
    for split, facts in report["splits"].items():
        yield OK, f"{split}: {_described(facts)}"
    select_modalities(config.modalities, found)


def _described(facts: Mapping[str, Any]) -> str:
    labels = "no ground truth"
    if facts["labelled"]:
        labels = f"{facts['labelled_clips']} of {facts['identities']} identities"
    modalities = facts["modalities"].values()
    seen = sum(one["frames_seen"] for one in modalities)
    skipped = sum(sum(one["frames_skipped"].values()) for one in modalities)
    return (
        f"{facts['clips']} clips ({labels}); {seen} frames seen = "
        f"{seen - skipped} loaded + {skipped} skipped"
    )


def _sums(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields where the counts of a data report do not add up."""
    for split, facts in report["splits"].items():
        for name, one in facts["modalities"].items():
            loaded, skipped = one["frames"], sum(one["frames_skipped"].values())
            if loaded + skipped != one["frames_seen"]:
                yield (
                    f"data_report.json: {name}_{split}: {one['frames_seen']} frames seen, "
                    f"but {loaded} loaded + {skipped} skipped"
                )


def _counts(found: Any) -> Iterator[str]:
    """Yields where index, manifest and report of a conversion tell different numbers."""
    for split, facts in found.splits.items():
        report = found.report["splits"][split]
        counts = {
            "the index": len(facts.clips),
            "the shards": sum(shard.records for shard in facts.shards),
            "data_report.json": report["clips"],
        }
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{count} in {name}" for name, count in counts.items())
            yield f"{split}: clips: {told}"
        for name, lengths in facts.lengths.items():
            loaded = report["modalities"][name]["frames"]
            if loaded != lengths.sum():
                yield f"{name}_{split}: {loaded} frames in data_report.json, {lengths.sum()} kept"


def _run(config: Config | None, workdir: Path) -> Found:
    """Yields what the files beside the checkpoints are like."""
    holder = _holder(workdir)
    if holder:
        yield WARNING, f"workdir: in use by {holder}: its newest files may be unfinished"
    if config is None:
        try:
            config_lib.load_workdir(workdir)
        except ValueError as error:
            yield FAULT, f"config.json: {error}"
    for path in sorted([*workdir.glob(".*.partial"), *workdir.glob(".write-test-*")]):
        if not holder:
            yield WARNING, f"workdir: '{path}': left over from a write that was cut short"
    results = {}
    for path in sorted(workdir.glob("*.json")):
        try:
            results[path.name] = json.loads(path.read_text())
        except ValueError as error:
            if path.name != "config.json":
                yield FAULT, f"{path.name}: damaged: {error}"
    if "data_report.json" in results:
        problems = list(_sums(results["data_report.json"]))
        yield from ((FAULT, problem) for problem in problems)
        if not problems:
            yield OK, "data_report.json: loaded + skipped = seen throughout"
    for name in ("metrics.jsonl", "timing.jsonl", "noise.jsonl"):
        if (workdir / name).exists():
            yield _log(workdir / name)
    identities = results.get("identities.json")
    for path in sorted(workdir.glob("ranking*.txt")):
        ranked = ranking.load_ranking(path, identities=identities)
        if identities is not None and len(ranked) != len(identities):
            yield FAULT, f"{path.name}: {len(ranked)} of {len(identities)} identities"
        else:
            yield OK, f"{path.name}: valid, {len(ranked)} identities"
    of_run = results.get("metrics.json")
    if of_run is not None and not (workdir / "ranking.txt").exists():
        yield FAULT, "ranking.txt: missing, though metrics.json is there"
    if of_run is not None and "map" in of_run:
        yield OK, f"metrics.json: MAP@100 {of_run['map']:.4f} ({of_run.get('map_kind')})"


def _log(path: Path) -> tuple[str, str]:
    """Returns whether the lines of a log are whole and in the order of steps, none twice."""
    *lines, rest = path.read_bytes().split(b"\n")
    before = (-1, False, 0)
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            place = (int(value["step"]), "split" in value, value.get("member", 0))
        except (ValueError, KeyError, TypeError, AttributeError):
            return FAULT, f"{path.name}: line {number} is damaged"
        if place <= before:
            return FAULT, f"{path.name}: line {number}: step {place[0]} after step {before[0]}"
        before = place
    if rest:
        return WARNING, f"{path.name}: the last line is not finished; a resumed run cuts it off"
    return OK, f"{path.name}: {len(lines)} lines to step {max(before[0], 0)}"


def _checkpoints(config: Config | None, workdir: Path, name: str = "") -> Found:
    """Yields what every saved step is like, and which one evaluation would use."""
    if name and config is None:
        config_lib.load_workdir(workdir)  # says what is wrong
    holder, good, damaged = _holder(workdir), {}, []
    folders = [path for path in (workdir / "checkpoints").glob("*") if path.is_dir()]
    for folder in sorted(folders, key=lambda path: (len(path.name), path.name)):
        if not folder.name.isdigit() or not (folder / "manifest.json").exists():
            what = "being saved" if holder else "left over from a save that was cut short"
            yield WARNING, f"{name}'{folder}': {what}; never used"
            continue
        try:
            checkpoint.verify(folder)
            manifest = json.loads((folder / "manifest.json").read_text())
            good[int(folder.name)] = manifest
            scored = f", MAP {manifest['map']:.4f}" if "map" in manifest else ""
            count = len(manifest["files"])
            yield OK, f"{name}checkpoint {folder.name}: {count} files, sha256 agrees{scored}"
        except (checkpoint.CheckpointError, ValueError, LookupError, TypeError, OSError) as error:
            if (folder / "manifest.json").exists():  # or it was dropped for a newer one meanwhile
                damaged.append(int(folder.name))
                yield FAULT, f"{name}checkpoint {folder.name}: {error}"
    if not good:
        trained = damaged or (workdir / "metrics.json").exists()
        yield (
            (FAULT, f"{name}no usable checkpoint: evaluation would end with exit code 3")
            if trained
            else (WARNING, f"{name}no checkpoint yet: training would begin at step 0")
        )
        return
    yield from _companions(workdir, good[max(good)], name)
    step, wanted = max(good), config.eval.checkpoint if config is not None else "latest"
    if wanted == "best":
        scored = [(manifest["map"], step) for step, manifest in good.items() if "map" in manifest]
        step = max(scored)[1] if scored else step
    state = WARNING if any(other > step for other in damaged) else OK
    yield state, f"{name}evaluation would use checkpoint {step} ({wanted})"


def _companions(workdir: Path, manifest: Mapping[str, Any], name: str) -> Found:
    """Yields whether the files that give a checkpoint its meaning are those it was saved with."""
    path = workdir / "identities.json"
    try:
        identities = json.loads(path.read_text())
        agrees = digest(identities) == manifest.get("identities_sha256")
        state, said = (OK, f"{len(identities)} identities") if agrees else (FAULT, "another list")
        yield state, f"{name}identities.json: {said}"
    except (ValueError, TypeError, OSError) as error:
        yield FAULT, f"{name}cannot read '{path}': {error}"
    try:
        membership = members.load(workdir)
        agrees = members.digest(membership) == manifest.get("members_sha256")
        said = f"{len(membership.members)} members, {len(membership.clips)} clips"
        state, said = (OK, said) if agrees else (FAULT, "not what the run was trained with")
        yield state, f"{name}{members.FILE}: {said}"
    except ValueError as error:
        yield FAULT, f"{name}{error}"


def _holder(workdir: Path) -> str | None:
    """Returns who works on a run's folder at the moment, None if nobody does."""
    try:
        with open(workdir / ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go of at once
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        pass
    return None


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
