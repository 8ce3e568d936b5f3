"""What is fit for use and what is damaged: environment, data, checkpoints and results of a run.

A check reads and reports. It deletes, converts and repairs nothing, and it takes no lock: a run may
go on meanwhile, and what that run drops or has not finished writing is no fault.
"""

import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vidjax import config as config_lib
from vidjax import devices, ranking
from vidjax.config import Config
from vidjax.data import resident
from vidjax.modes import restore
from vidjax.run import checkpoint, resume
from vidjax.run import workdir as workdir_lib

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
        except Exception as error:  # damaged files raise whatever those who read them raise
            expected = isinstance(error, (ValueError, OSError, checkpoint.CheckpointError))
            what = "" if expected else f"{type(error).__name__}: "
            yield Item(FAULT, room, _one_line(f"{what}{error}"))


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
    """Yields (room, what is found there), in parts that fail one by one."""
    yield "environment", _packages()
    yield "environment", _tensorflow()
    yield "environment", _devices()
    if config is not None:
        yield "environment", _cache(config)
    runs: dict[str, Config | None] = {}  # those that the folder joins
    if workdir:
        yield "run", _folder("workdir", workdir)
        yield from (("run", found) for found in _run(config, workdir))
        runs = {name: _config_of(name, config) for name in config.join.runs} if config else {}
        if not runs:
            yield "checkpoints", _checkpoints(config, workdir)
        for name, one in runs.items():
            yield "checkpoints", _checkpoints(one, Path(name), f"{name}: ")
    configs = runs.values() if runs else [config]
    for one in {repr(one.data): one for one in configs if one is not None}.values():
        yield "data", _data(one)


def _config_of(run: str, config: Config) -> Config | None:
    """Returns the configuration of a joined run, with data where the joining folder has them."""
    try:
        one = config_lib.load_workdir(Path(run))
    except ValueError:
        return None  # `_checkpoints` says so
    for field in ("dir", "cache_dir"):
        if config.data[field] is not None:
            one.data[field] = config.data[field]
    return one


def _packages() -> Found:
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


def _tensorflow() -> Found:
    try:
        from vidjax.data.records.codec import tf, tfds
    except Exception as error:  # a broken installation raises whatever its libraries raise
        yield FAULT, f"TensorFlow: no data can be read: {type(error).__name__}: {error}"
    else:
        yield OK, f"TensorFlow {tf.__version__} and TFDS {tfds.__version__} can be imported"


def _devices() -> Found:
    mesh = devices.make_mesh()
    kind = mesh.devices.flat[0].device_kind
    yield OK, f"devices: {mesh.size} x {kind}, {_bytes(resident.free_bytes(mesh))} free on each"


def _cache(config: Config) -> Found:
    from vidjax.data.records.manifest import default_cache_dir

    cache = Path(config.data.cache_dir or default_cache_dir()).expanduser()
    yield from _folder("cache", cache)
    for left in sorted(cache.glob("*/*.partial")):
        yield (
            WARNING,
            f"cache: '{left}': of a conversion cut short or under way; it will be cleared",
        )


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
    from vidjax.data import arrays, iqiyi_vid
    from vidjax.data.records.manifest import default_cache_dir
    from vidjax.data.untrusted import pickles

    cache = Path(config.data.cache_dir or default_cache_dir()).expanduser()
    if config.data.name == "synthetic":
        pattern = f"{config.data.size}-{config.data.seed}-*"
        made = [path for path in (cache / "synthetic").glob(pattern) if path.suffix != ".partial"]
        if not made:
            yield WARNING, "data: the synthetic dataset is not made yet: training makes it"
        for folder in sorted(made):
            yield from _converted(config, folder, pickles.find_pickles(folder), cache)
        return
    if config.data.name not in ("iqiyi_vid", "arrays"):
        raise ValueError(f"config.data.name='{config.data.name}': synthetic, iqiyi_vid or arrays")
    if not config.data.dir:
        files = "official files" if config.data.name == "iqiyi_vid" else "features"
        raise ValueError(f"config.data.dir is not set: name the directory of the {files}")
    folder = Path(config.data.dir).expanduser()
    if config.data.name == "arrays":
        source = arrays.of_folder(folder)
        yield OK, f"data: {source.title}"
        where = iqiyi_vid.folder_of(source.kind, source.facts(), cache)
        truth = functools.partial(arrays.load_truth, folder, None)
        yield from _records(config, where, truth, "training converts them")
        return
    sources = pickles.find_pickles(folder)
    if not sources:
        raise ValueError(f"no feature pickles such as face_train.pickle in '{folder}'")
    yield from _converted(config, folder, sources, cache)


def _converted(
    config: Config, folder: Path, sources: Mapping[tuple[str, str], Path], cache: Path
) -> Found:
    """Yields what some official files and their records are like."""
    from vidjax.data.iqiyi_vid import load_truth, records_folder

    size = sum(path.stat().st_size for path in sources.values())
    yield OK, f"data: '{folder}': {len(sources)} pickles, {_bytes(size)}"
    where = records_folder(sources, cache)
    hint = f"training converts them, or python -m vidjax.data.iqiyi_vid {folder}"
    yield from _records(config, where, lambda found: load_truth(folder, found.splits), hint)


def _records(config: Config, where: Path, truth: Callable[[Any], Any], hint: str) -> Found:
    """Yields what the records in a folder are like, and their labels."""
    from vidjax.data.iqiyi_vid import load_labels
    from vidjax.data.records import manifest as manifest_lib

    if not (where / "manifest.json").exists():
        yield WARNING, f"records: not converted yet, or the files have changed: {hint}"
        return
    found = manifest_lib.load_index(where)
    problems = [*manifest_lib.verify(found), *_sums(found.report), *_counts(found)]
    for problem in problems:
        yield FAULT, f"records: {problem}"
    shards = [shard for split in found.splits.values() for shard in split.shards]
    if not problems:
        size = sum(shard.size for shard in shards)
        yield OK, f"records: '{where}': {len(shards)} shards, {_bytes(size)}, every sha256 agrees"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, _, report = load_labels(truth(found), found)
    for warning in caught:
        yield WARNING, f"ground truth: {warning.message}"
    for split, facts in report["splits"].items():
        yield OK, f"{split}: {_described(facts)}"
    restore.select_modalities(config.modalities, found.modalities)


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
            for what in ("frames", "clips"):
                seen, loaded = one.get(f"{what}_seen"), one.get(what)
                skipped = sum(one[f"{what}_skipped"].values())
                if seen is not None and loaded + skipped != seen:
                    yield (
                        f"data_report.json: {name}_{split}: {seen} {what} seen, "
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


def _run(config: Config | None, workdir: Path) -> Iterator[Found]:
    """Yields, part by part, what the files beside the checkpoints are like."""
    yield _use(workdir)
    if config is None:
        yield _damaged_config(workdir)
    for path in sorted(workdir.glob("*.json")):
        if path.name not in ("config.json", "identities.json"):  # these go with the checkpoints
            yield _results(path)
    for path in sorted(workdir.glob("*.jsonl")):
        yield _log(path)
    if (workdir / "metrics.json").exists() and not (workdir / "ranking.txt").exists():
        yield iter([(FAULT, "ranking.txt: missing, though metrics.json is there")])
    for path in sorted(workdir.glob("ranking*.txt")):
        yield _ranking(path)


def _use(workdir: Path) -> Found:
    holder = _holder(workdir)
    if holder:
        yield WARNING, f"workdir: in use by {holder}: its newest files may be unfinished"
        return
    for path in sorted([*workdir.glob(".*.partial"), *workdir.glob(".write-test-*")]):
        yield WARNING, f"workdir: '{path}': left over from a write that was cut short"


def _damaged_config(workdir: Path) -> Found:
    config_lib.load_workdir(workdir)  # says what is wrong
    yield OK, "config.json: written while this was checked"


def _results(path: Path) -> Found:
    """Yields what a file of JSON says."""
    content = workdir_lib.read_json(path)
    if path.name == "data_report.json":
        problems = list(_sums(content))
        yield from ((FAULT, problem) for problem in problems)
        if not problems:
            yield OK, "data_report.json: loaded + skipped = seen throughout"
    elif path.name.startswith("metrics") and "map" in content:
        yield OK, f"{path.name}: MAP@100 {content['map']:.4f} ({content.get('map_kind')})"
    else:
        yield OK, f"{path.name}: can be read"


def _ranking(path: Path) -> Found:
    known = path.with_name("identities.json")
    identities = workdir_lib.read_json(known, list) if known.exists() else None
    ranked = ranking.load_ranking(path, identities=identities)
    if identities is not None and len(ranked) != len(identities):
        yield FAULT, f"{path.name}: {len(ranked)} lines for {len(identities)} identities"
    else:
        yield OK, f"{path.name}: valid, {len(ranked)} identities"


def _log(path: Path) -> Found:
    """Yields whether the lines of a log are whole and in the order of steps, none twice."""
    *lines, rest = path.read_bytes().split(b"\n")
    before = (-1, False, 0)
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            place = (int(value["step"]), "split" in value, value.get("member", 0))
        except (ValueError, LookupError, TypeError, AttributeError):
            yield FAULT, f"{path.name}: line {number} is damaged"
            return
        if place <= before and path.name != resume.FILE:
            yield FAULT, f"{path.name}: line {number}: step {place[0]} after step {before[0]}"
            return
        before = place
    if rest:
        yield WARNING, f"{path.name}: the last line is not finished; a resumed run cuts it off"
    else:
        yield OK, f"{path.name}: {len(lines)} lines to step {max(before[0], 0)}"


def _checkpoints(config: Config | None, workdir: Path, name: str = "") -> Found:
    """Yields what every saved step is like, and which one evaluation would use."""
    if name and config is None:
        config_lib.load_workdir(workdir)  # says what is wrong
    holder = _holder(workdir)
    for step in (steps := checkpoint.survey(workdir)):
        folder = workdir / "checkpoints" / str(step)
        try:
            manifest = checkpoint.verify(folder)
        except checkpoint.CheckpointError as error:
            if folder.exists():  # or it was dropped for a newer one meanwhile
                yield FAULT, f"{name}checkpoint {step}: {error}"
        else:
            scored = f", MAP {manifest['map']:.4f}" if "map" in manifest else ""
            count = len(manifest["files"])
            yield OK, f"{name}checkpoint {step}: {count} files, sha256 agrees{scored}"
    for path in sorted((workdir / "checkpoints").glob("*")):
        if path.name not in map(str, steps):
            doing = "being saved or dropped" if holder else "left over from a save cut short"
            what = doing if path.name.startswith(".") else "no checkpoint"
            yield WARNING, f"{name}'{path}': {what}; never used"
    prefer = config.eval.checkpoint if config is not None else "latest"
    with warnings.catch_warnings():  # of what was said above
        warnings.simplefilter("ignore")
        found = checkpoint.find(workdir, prefer)
    if found is None:
        trained = (workdir / "metrics.json").exists()
        said = "though metrics.json is there" if trained else "training would begin at step 0"
        yield FAULT if trained else WARNING, f"{name}no checkpoint: {said}"
        return
    step = found.manifest["step"]
    state = WARNING if prefer == "latest" and step < max(steps) else OK
    yield state, f"{name}evaluation would use checkpoint {step} ({prefer})"
    for companion in restore.check_companions(workdir, found.manifest):
        if companion.file == restore.CONFIG and config is None:
            continue  # its damage was named before
        state = FAULT if companion.fault else OK
        yield state, f"{name}{companion.file}: {companion.fault or companion.summary}"


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
