"""The checks of `vidjax check`: is the environment, configuration, data, run or gallery damaged?

A check repairs nothing and takes no lock: a run may go on meanwhile, and a file that it deletes or
has not finished writing is no fault. Data without records are converted into a temporary folder.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vidjax import config as config_lib
from vidjax import config_io, devices, files, messages, ranking
from vidjax.config import Config
from vidjax.data import resident, sources
from vidjax.data.checks import misspelt, unusable
from vidjax.data.clips import select_modalities
from vidjax.data.frame_fields import RecordSource
from vidjax.evaluation import restore
from vidjax.gallery.gallery import Gallery
from vidjax.run import checkpoint, formats, resume
from vidjax.run import results as results_lib
from vidjax.training import dry_run, plan

if TYPE_CHECKING:
    from vidjax.data.records.manifest import Records

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections")
LITTLE_SPACE = 1e9  # bytes; less free space than this is a warning
OK, WARNING, FAULT = "ok", "warning", "FAULT"
Findings = Iterator[tuple[str, str]]  # (state, text)


class Item(NamedTuple):
    """One line of a check; `state` is OK, WARNING or FAULT, `subject` such as `checkpoints`."""

    state: str
    subject: str
    text: str


def exit_code(items: Iterable[Item]) -> int:
    """Returns 3 if a checkpoint is faulty, else 2 if anything is, else 0."""
    subjects = {item.subject for item in items if item.state == FAULT}
    return 3 if "checkpoints" in subjects else 2 if subjects else 0


def verdict(items: Sequence[Item]) -> str:
    """Returns the last line of a check: the numbers of faults and warnings."""
    faults, warned = (sum(item.state == state for item in items) for state in (FAULT, WARNING))
    if not faults:
        return f"all good, {warned} to note" if warned else "all good"
    subjects = dict.fromkeys(item.subject for item in items if item.state == FAULT)
    return f"{faults} FAULT{'S' if faults > 1 else ''}: {', '.join(subjects)}"


def one_line(text: str) -> str:
    """Returns a text with its lines joined by semicolons."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def size_text(count: float) -> str:
    """Returns a number of bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def check_run(config: Config | None, workdir: Path) -> Iterator[Findings]:
    """Yields the findings on each file of a run but the checkpoints."""
    yield _use(workdir)
    if config is None:
        yield _damaged_config(workdir)
    for pattern, check_file in {
        "*.json": _results,
        "analysis*.npz": _analysis,
        "*.jsonl": _log,
        "ranking*.txt": _ranking,
    }.items():
        for path in sorted(workdir.glob(pattern)):
            if path.name not in ("config.json", "identities.json"):  # see `check_companions`
                yield check_file(path)
    if files.exists(workdir / "metrics.json") and not files.exists(workdir / "ranking.txt"):
        yield iter([(FAULT, "ranking.txt: missing, but metrics.json exists")])


def _use(workdir: Path) -> Findings:
    holder = files.lock_holder(workdir)
    if holder:
        yield WARNING, f"workdir: in use by {holder}: its newest files may be unfinished"
        return
    for path in sorted([*workdir.glob(".*.partial"), *workdir.glob(".write-test-*")]):
        yield WARNING, f"workdir: '{path}': left over from a write that was cut short"


def _damaged_config(workdir: Path) -> Findings:
    config_io.load_workdir(workdir)  # raises the error that describes the damage
    yield OK, "config.json: written while this was checked"


def _results(path: Path) -> Findings:
    if path.name == "data_report.json":
        problems = list(wrong_sums(results_lib.load_data_report(path)))
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
    """Yields findings, after `name`, on every saved step and on the one evaluation would use."""
    if name and config is None:
        config_io.load_workdir(workdir)  # raises the error that describes the damage
    holder = files.lock_holder(workdir)
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
    for file, content, fault in restore.check_companions(workdir, newest.manifest):
        if file == restore.CONFIG and config is None:
            continue  # its damage was reported before
        yield FAULT if fault else OK, f"{name}{file}: {fault or content}"


def wrong_sums(report: formats.DataReport) -> Iterator[str]:
    """Yields a text for every count of a data report that is not the sum of its parts."""
    for split, part in (report.splits or {}).items():
        for name, counts in part.modalities.items():
            for unit, seen, loaded, reasons in (
                ("frames", counts.frames_seen, counts.frames, counts.frames_skipped),
                ("clips", counts.clips_seen, counts.clips, counts.clips_skipped),
            ):
                skipped = sum(reasons.values())
                if seen is not None and loaded + skipped != seen:
                    text = f"{seen} {unit} seen, but {loaded} loaded + {skipped} skipped"
                    yield f"data_report.json: {name}_{split}: {text}"


def check(
    config: Config | None, workdir: Path | None, gallery: Path | None = None
) -> Iterator[Item]:
    """Yields the findings on a run, on data to train with, or on a gallery.

    `config` is None if there is none, or if it is damaged.
    """
    for subject, findings in _parts(config, workdir, gallery):
        try:
            yield from (Item(state, subject, one_line(text)) for state, text in findings)
        except Exception as error:  # damaged files raise whatever their readers raise
            kind = "" if messages.exit_code(error) else f"{type(error).__name__}: "
            yield Item(FAULT, subject, one_line(f"{kind}{messages.text_of(error)}"))


def _parts(
    config: Config | None, workdir: Path | None, gallery: Path | None
) -> Iterator[tuple[str, Findings]]:
    """Yields (subject, findings): one pair per check, so that one that raises ends no other."""
    yield "environment", _packages()
    yield "environment", _readers(config, needed=config is not None and not workdir)
    yield "environment", _devices()
    if gallery:
        yield "gallery", _gallery_people(gallery)
        yield "gallery", _gallery_run(gallery)
        return
    if config is not None:
        yield "environment", _cache(config)
    if config is not None and not workdir:
        yield "config", _values(config)
    joined: dict[str, Config | None] = {}  # configurations of the joined runs, by folder
    if workdir:
        yield "run", _folder("workdir", workdir)
        yield from (("run", findings) for findings in check_run(config, workdir))
        if config is not None:
            joined = {name: _config_of(name, config) for name in config.join.runs}
        if not joined:
            yield "checkpoints", check_checkpoints(config, workdir)
        for name, run_config in joined.items():
            yield "checkpoints", check_checkpoints(run_config, Path(name), f"{name}: ")
    configs = joined or {str(workdir or ""): config}
    runs_of: dict[str, list[str]] = {}
    for name, own in configs.items():
        if own is not None:
            runs_of.setdefault(repr(own.data), []).append(name)
    for names in runs_of.values():
        if (own := configs[names[0]]) is not None:
            yield "data", _data(own, [name for name in names if name])


def _config_of(run: str, config: Config) -> Config | None:
    """Returns the configuration of a joined run, with the data folders of the blend."""
    try:
        run_config = config_io.load_workdir(Path(run))
    except ValueError:
        return None  # `check_checkpoints` reports it
    for field in ("dir", "cache_dir"):
        if config.data[field] is not None:
            run_config.data[field] = config.data[field]
    return run_config


def _values(config: Config) -> Findings:
    if problems := list(config_lib.problems(config)):
        yield from ((FAULT, problem) for problem in problems)
        return
    dry_run.trace_model(config, dict.fromkeys(config.modalities, dry_run.WIDTH))
    yield OK, "config: every value is in its range and has an effect"


def _packages() -> Findings:
    yield OK, f"python {platform.python_version()} on {platform.platform()}"
    installed, absent = [], []
    for name in PACKAGES:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    yield OK, f"packages: {', '.join(installed)}"
    if absent:
        yield FAULT, f"packages: {', '.join(absent)} not installed"


def _readers(config: Config | None, *, needed: bool) -> Findings:
    """Yields whether clips can be converted, as `needed` to train, and streamed where they are."""
    try:
        from vidjax.data.records.codec import tfds

        found = f"TFDS {tfds.__version__}"
        if config is not None and config.data.mode == "streaming":
            from vidjax.data.records.tensors import tf  # its import takes seconds

            found = f"TensorFlow {tf.__version__} and {found}"
    except ModuleNotFoundError as error:
        lacking = (
            "to stream clips into training: pip install 'vidjax[tensorflow]'"
            if error.name == "tensorflow"
            else "new clips can be ranked and identified; to train and to evaluate: "
            "pip install 'vidjax[train]'"
        )
        yield FAULT if needed else WARNING, f"'{error.name}' is not installed: {lacking}"
    except Exception as error:  # a broken installation raises whatever its libraries raise
        yield FAULT, f"no data can be read: {type(error).__name__}: {error}"
    else:
        yield OK, f"{found} can be imported"


def _devices() -> Findings:
    mesh = devices.make_mesh()
    kind, free = mesh.devices.flat[0].device_kind, size_text(resident.free_bytes(mesh))
    yield OK, f"devices: {mesh.size} x {kind}, {free} free on each"


def _cache(config: Config) -> Findings:
    cache = files.cache_root(config.data.cache_dir)
    yield from _folder("cache", cache)
    for partial in sorted(cache.glob("*/*.partial")):
        text = "conversion cut short or under way; the next conversion deletes it"
        yield WARNING, f"cache: '{partial}': {text}"


def _folder(name: str, folder: Path) -> Findings:
    """Yields whether a folder, which need not exist yet, can be written and has free space."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield FAULT, f"{name}: '{existing}' is a file, not a folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield FAULT, f"{name}: cannot write in '{existing}'"
    else:
        free = shutil.disk_usage(existing).free
        state = WARNING if free < LITTLE_SPACE else OK
        absent = "" if existing == folder else ", does not exist yet"
        yield state, f"{name}: '{folder}'{absent}: can be written, {size_text(free)} free"


def _data(config: Config, runs: Sequence[str] = ()) -> Findings:
    """Yields findings on the data, its records and labels, and if `runs` were trained on them."""
    try:
        source = sources.open_source(config.data, generate=False)
    except sources.NotGenerated as error:
        yield WARNING, f"data: {error}"
        return
    yield OK, f"data: {source.title}"
    from vidjax.data.records.convert import convert, records_folder

    # On the disk on which a training would need the space, too.
    cache = files.cache_root(config.data.cache_dir)
    folder = records_folder(source, cache)
    if (folder / "manifest.json").exists():
        yield from _records(config, source, folder, runs)
        return
    yield WARNING, "records: not converted yet, or the files have changed: training converts them"
    if importlib.util.find_spec("tensorflow_datasets") is None:
        yield WARNING, "data: not read: without TFDS only converted records are"
        return
    writable = cache.is_dir() and os.access(cache, os.W_OK | os.X_OK)
    with tempfile.TemporaryDirectory(dir=cache if writable else None) as scratch:
        with messages.quietly():
            records = convert(source, scratch, non_finite=config.data.non_finite)
        yield from _records(config, source, records.folder, runs)


def _records(config: Config, source: RecordSource, folder: Path, runs: Sequence[str]) -> Findings:
    """Yields findings on the records in `folder` and the labels of `source`; see `_data`."""
    from vidjax.data.records import manifest as manifest_lib
    from vidjax.data.records.report import label_records

    records = manifest_lib.load_index(folder)
    report = formats.parse(folder / "data_report.json", records.report, formats.DataReport, "")
    problems = [*manifest_lib.verify(records), *wrong_sums(report), *_counts(records)]
    for problem in problems:
        yield FAULT, f"records: {problem}"
    shards = [shard for split in records.splits.values() for shard in split.shards]
    if not problems:
        size = size_text(sum(shard.size for shard in shards))
        yield OK, f"records: '{folder}': {len(shards)} shards, {size}, every sha256 agrees"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, _, report = label_records(records, source.truth(records.clips))
    for warning in caught:
        yield WARNING, f"ground truth: {warning.message}"
    for split, report_of_split in report["splits"].items():
        yield OK, f"{split}: {_counts_text(report_of_split)}"
    modalities = select_modalities(config.modalities, records.modalities)
    for problem in misspelt({name: split.lengths for name, split in records.splits.items()}):
        yield WARNING, problem
    splits = [name for name in config.data.train_splits if name in report["splits"]]
    for problem in unusable(report, splits, tuple(modalities)):
        yield FAULT, problem
    if splits and not any(report["splits"][name].get("labelled_clips") for name in splits):
        yield FAULT, plan.nobody_is_named(config)
    for run in runs:
        yield from _own_data(run, report)


def _own_data(run: str, report: Mapping[str, Any]) -> Findings:
    manifests = checkpoint.manifests(Path(run))
    if not manifests:
        return
    if different := restore.data_differences(manifests[max(manifests)]["data"], report):
        yield FAULT, f"data: not those of '{run}', which was trained on others: now {different}"
    else:
        yield OK, "data: those of the run"


def _counts_text(split_report: Mapping[str, Any]) -> str:
    labels = "no ground truth"
    if split_report["labelled"]:
        known, identities = split_report["labelled_clips"], split_report["identities"]
        labels = f"{known} labelled, {identities} identities"
    modalities = split_report["modalities"].values()
    seen = sum(modality["frames_seen"] for modality in modalities)
    skipped = sum(sum(modality["frames_skipped"].values()) for modality in modalities)
    frames = f"{seen} frames seen = {seen - skipped} loaded + {skipped} skipped"
    return f"{split_report['clips']} clips ({labels}); {frames}"


def _counts(records: "Records") -> Iterator[str]:
    """Yields a text for each number on which index, manifest and report disagree."""
    for name, split in records.splits.items():
        report = records.report["splits"][name]
        counts = {
            "the index": len(split.clips),
            "the shards": sum(shard.records for shard in split.shards),
            "data_report.json": report["clips"],
        }
        if len(set(counts.values())) > 1:
            numbers = ", ".join(f"{count} in {file}" for file, count in counts.items())
            yield f"{name}: clips: {numbers}"
        for modality, lengths in split.lengths.items():
            loaded, kept = report["modalities"][modality]["frames"], lengths.sum()
            if loaded != kept:
                yield f"{modality}_{name}: {loaded} frames in data_report.json, {kept} in the index"


def _gallery_people(folder: Path) -> Findings:
    gallery = Gallery(folder)  # every row matches its sha256
    people, strangers = gallery.identities, len(gallery.strangers)
    told = f"{len(people):,} people by {sum(people.values()):,} clips, {strangers:,} strangers"
    yield OK if people else WARNING, f"gallery: {told}, every sha256 agrees"
    if not os.access(folder, os.W_OK | os.X_OK):
        yield WARNING, f"gallery: nobody can be enrolled or removed: cannot write in '{folder}'"


def _gallery_run(folder: Path) -> Findings:
    gallery = Gallery(folder)
    if gallery.origin.cards:
        parts = ", ".join(gallery.origin.cards)
        yield OK, f"gallery: {parts} by models of '{gallery.origin.workdir}'"
        return
    run = gallery.run
    yield OK, f"gallery: '{run.workdir}', step {run.step}, is the run that it was made with"
