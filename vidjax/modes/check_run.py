"""The files of a run's folder, as a check finds them: results, logs, checkpoints.

Nothing is changed and no lock is taken: a run may go on meanwhile, and a file that the run deletes
or has not finished writing is no fault.
"""

import fcntl
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vidjax import config as config_lib
from vidjax import files, ranking
from vidjax.config import Config
from vidjax.modes import restore
from vidjax.modes.findings import FAULT, OK, WARNING, Findings
from vidjax.run import checkpoint, parts, resume, schema
from vidjax.run import results as results_lib
from vidjax.run import workdir as workdir_lib


def check_run(config: Config | None, workdir: Path) -> Iterator[Findings]:
    """Yields the findings on each file beside the checkpoints.

    Args:
      config: the run's configuration, None where it is damaged.
      workdir: the run's folder.
    """
    yield _use(workdir)
    if config is None:
        yield _damaged_config(workdir)
    for path in sorted(workdir.glob("*.json")):
        if path.name not in ("config.json", "identities.json"):  # see `check_companions`
            yield _results(path)
    for path in sorted(workdir.glob("analysis*.npz")):
        yield _analysis(path)
    for path in sorted(workdir.glob("*.jsonl")):
        yield _log(path)
    if files.exists(workdir / "metrics.json") and not files.exists(workdir / "ranking.txt"):
        yield iter([(FAULT, "ranking.txt: missing, but metrics.json exists")])
    for path in sorted(workdir.glob("ranking*.txt")):
        yield _ranking(path)
    for path in sorted((workdir / parts.FOLDER).glob("*")):
        yield _parts(workdir, path.name)


def _use(workdir: Path) -> Findings:
    holder = _holder(workdir)
    if holder:
        yield WARNING, f"workdir: in use by {holder}: its newest files may be unfinished"
        return
    for path in sorted([*workdir.glob(".*.partial"), *workdir.glob(".write-test-*")]):
        yield WARNING, f"workdir: '{path}': left over from a write that was cut short"


def _damaged_config(workdir: Path) -> Findings:
    config_lib.load_workdir(workdir)  # raises the error that describes the damage
    yield OK, "config.json: written while this was checked"


def _results(path: Path) -> Findings:
    """Yields the finding on a file of results, in JSON."""
    if path.name == "data_report.json":
        content = results_lib.load_data_report(path)
        problems = list(wrong_sums(content))
        yield from ((FAULT, problem) for problem in problems)
        if not problems:
            yield OK, "data_report.json: loaded + skipped = seen throughout"
        return
    content: dict[str, Any] = {}
    if path.name.startswith("metrics"):
        content = results_lib.load_metrics(path)
    else:
        files.read_json(path, object)
    if content.get("map") is not None:
        yield OK, f"{path.name}: MAP@100 {content['map']:.4f} ({content.get('map_kind')})"
    elif content.get("num_clips") is not None:
        yield OK, f"{path.name}: {content['num_clips']:,} clips ranked, no MAP"
    else:
        yield OK, f"{path.name}: can be read"


def _analysis(path: Path) -> Findings:
    _, arrays = results_lib.load_analysis(path)
    yield OK, f"{path.name}: {len(arrays)} arrays can be read"


def _ranking(path: Path) -> Findings:
    known = path.with_name("identities.json")
    identities = results_lib.load_identities(known) if files.exists(known) else None
    if identities is None:  # of a blend; a run has the names of its identities
        identities = ranking.read_identities(path)
    count = sum(1 for _ in ranking.each_list(path, identities))
    if count != len(identities):
        yield FAULT, f"{path.name}: {count} lines for {len(identities)} identities"
    else:
        yield OK, f"{path.name}: valid, {count} identities"


def _parts(workdir: Path, split: str) -> Findings:
    """Yields the findings on the parts of an evaluation of a split."""
    name, counts, faults = f"{parts.FOLDER}/{split}", Counter[int](), list[ValueError]()
    for one, part in parts.find(workdir, split).items():
        try:
            if isinstance(part, ValueError):
                raise part
            limit = parts.most_bytes(schema.IDENTITIES.most, part.manifest["num_clips"])
            parts.verify(part, limit)
            counts[one.total] += 1
        except ValueError as error:
            faults.append(error)
    if faults:
        more = f"\n{len(faults) - 1} more cannot be used" if faults[1:] else ""
        yield FAULT, f"{name}: {faults[0]}{more}"
    for total, count in sorted(counts.items()):
        state = OK if count == total else WARNING
        yield state, f"{name}: {count} of {total} parts, sha256 agrees"


def _log(path: Path) -> Findings:
    """Yields one finding on a log: its first damaged, repeated or out-of-order line, or OK."""
    before, number, line = (-1, False, 0), 0, b"\n"
    for number, line in enumerate(files.each_line(path), 1):
        if not line.endswith(b"\n") and len(line) < files.LINE_BYTES:
            break
        try:
            value: Any = files.parse_line(line)
            place = (int(value["step"]), "split" in value, value.get("member", 0))
        except (ValueError, LookupError, TypeError, AttributeError):
            yield FAULT, f"{path.name}: line {number} is damaged"
            return
        if place <= before and path.name != resume.FILE:
            yield FAULT, f"{path.name}: line {number}: step {place[0]} after step {before[0]}"
            return
        before = place
    if not line.endswith(b"\n"):
        yield WARNING, f"{path.name}: the last line is not finished; a resumed run cuts it off"
    else:
        yield OK, f"{path.name}: {number} lines to step {max(before[0], 0)}"


def check_checkpoints(config: Config | None, workdir: Path, name: str = "") -> Findings:
    """Yields the findings on every saved step, and the step that evaluation would use.

    Args:
      config: the run's configuration, None where it is damaged.
      workdir: the run's folder.
      name: prefix of every text.
    """
    if name and config is None:
        config_lib.load_workdir(workdir)  # raises the error that describes the damage
    holder = _holder(workdir)
    for step in (steps := checkpoint.survey(workdir)):
        folder = workdir / "checkpoints" / str(step)
        try:
            manifest = checkpoint.verify(folder)
        except checkpoint.CheckpointError as error:
            if files.exists(folder):  # unless the run has deleted it meanwhile
                yield FAULT, f"{name}checkpoint {step}: {error}"
        else:
            scored = f", MAP {manifest['map']:.4f}" if "map" in manifest else ""
            count = len(manifest["files"])
            yield OK, f"{name}checkpoint {step}: {count} files, sha256 agrees{scored}"
    for path in sorted((workdir / "checkpoints").glob("*")):
        if path.name not in map(str, steps):
            kind = "no checkpoint"
            if path.name.startswith("."):
                kind = "being saved or dropped" if holder else "left over from a save cut short"
            yield WARNING, f"{name}'{path}': {kind}; never used"
    prefer = config.eval.checkpoint if config is not None else "latest"
    with warnings.catch_warnings():  # about damage that was reported above
        warnings.simplefilter("ignore")
        newest = checkpoint.find(workdir, prefer)
    if newest is None:
        trained = files.exists(workdir / "metrics.json")
        text = "but metrics.json exists" if trained else "training would begin at step 0"
        yield FAULT if trained else WARNING, f"{name}no checkpoint, {text}"
        return
    step = newest.manifest["step"]
    state = WARNING if prefer == "latest" and step < max(steps) else OK
    yield state, f"{name}evaluation would use checkpoint {step} ({prefer})"
    for companion in restore.check_companions(workdir, newest.manifest):
        if companion.file == restore.CONFIG and config is None:
            continue  # its damage was reported before
        state = FAULT if companion.fault else OK
        yield state, f"{name}{companion.file}: {companion.fault or companion.summary}"


def _holder(workdir: Path) -> str | None:
    """Returns a description of the process that holds a run's lock, None if none does."""
    try:
        with files.open_regular(workdir / ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released at once
            except BlockingIOError:
                return workdir_lib.lock_owner(file)
    except (FileNotFoundError, PermissionError):
        pass
    return None


def wrong_sums(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields a text for every count of a data report that is not the sum of its parts."""
    for split, modalities in ((s, part["modalities"]) for s, part in report["splits"].items()):
        for name, counts in modalities.items():
            for unit in ("frames", "clips"):
                seen, loaded = counts.get(f"{unit}_seen"), counts.get(unit)
                skipped = sum(counts[f"{unit}_skipped"].values())
                if seen is not None and loaded + skipped != seen:
                    yield (
                        f"data_report.json: {name}_{split}: {seen} {unit} seen, "
                        f"but {loaded} loaded + {skipped} skipped"
                    )
