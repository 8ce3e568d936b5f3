"""Reads, writes and describes the results and the logs of a run.

`runs.schemas` defines the content of the files. `metrics.jsonl` contains no measured times, so
equal runs write equal bytes. `timing.jsonl` contains the measured times.
"""

import contextlib
import datetime
import io
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import msgspec
import numpy as np

from vidjax.core.metrics import CLIP_METRICS
from vidjax.runs import config as config_lib, config_io, facts, schemas
from vidjax.runs.config import Config
from vidjax.utils import distributed, files, json_files, messages
from vidjax.utils.errors import UserError, warn
from vidjax.utils.terminal import say

Arrays = dict[str, np.ndarray]
LogFunction = Callable[[dict[str, Any]], object]  # it gets a line of `metrics.jsonl`

MAX_LOG_LINES = 20_000  # lines of a log that are returned
MAX_IDENTITIES_BYTES = 256 * files.MB  # of `identities.json`
METRICS_LOG, TIMING_LOG = "metrics.jsonl", "timing.jsonl"
REMEDY = "delete it, and write the results again: vidjax evaluate --workdir=FOLDER"


def now() -> str:
    """Returns the date and the time in UTC, such as `2026-02-01 13:05:00 UTC`."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


class ResultPaths(NamedTuple):
    """The paths of the result files of a split of the data."""

    metrics: Path
    ranking: Path
    analysis: Path
    report: Path
    scores: Path


class Results(schemas.Metrics, kw_only=True):
    """The results of a run on a split. Entries of `metrics.json`, such as `map`, are attributes.

    Attributes:
      split: the name of the split.
      paths: the paths of the result files: `ranking`, `metrics`, `report`, `analysis`, `scores`.
      values: all entries, including metrics that a user has added.
    """

    split: str
    paths: ResultPaths
    values: dict[str, Any]

    @classmethod
    def from_values(cls, values: Mapping[str, Any], split: str, paths: ResultPaths) -> Self:
        """Makes Results from `values`, the content of `paths.metrics`."""
        plain = files.parse_json(files.to_json(values).encode())
        metrics = json_files.parse(paths.metrics, plain, schemas.Metrics, REMEDY)
        known = {name: getattr(metrics, name) for name in metrics.__struct_fields__}
        return cls(**known, split=split, paths=paths, values=cast(dict[str, Any], plain))

    def __repr__(self) -> str:
        names = ("split", "map", "map_kind", "step")
        return f"Results({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `metrics.json` as a dict of JSON values."""
        return dict(self.values)

    def average_precisions(self) -> dict[str, float]:
        """Returns identity -> average precision. Identities without a clip in the split are absent.

        Raises UserError if there is no `analysis.npz`, because `config.eval.report` was False.
        """
        names = load_identities(self.paths.metrics.with_name("identities.json"))
        arrays = load_analysis(self.paths.analysis)[1]
        if "ap" not in arrays:
            return {}
        rows = zip(names, arrays["ap"], arrays["positives"], strict=True)
        return {name: float(ap) for name, ap, positives in rows if positives}


def load_identities(path: Path) -> list[str]:
    """Returns the identities in `identities.json`. The first has class 1, as class 0 is "other"."""
    return json_files.read(path, list[str], REMEDY, MAX_IDENTITIES_BYTES)


def select_kept(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of `metrics.json` that a later evaluation of the run does not replace."""
    is_kept = dict.fromkeys(schemas.Training.__struct_fields__, True)
    is_kept |= {fact.key: fact.is_kept for fact in facts.FACTS}
    return {name: value for name, value in metrics.items() if is_kept.get(name)}


def describe_overrides(metrics: Mapping[str, Any]) -> str:
    """Returns the configuration fields that an evaluation changed, as `FIELD=VALUE, ...`, or "".

    `metrics` is the content of `metrics.json`.
    """
    changed = metrics.get("overrides") or {}
    return ", ".join(f"{name}={config_io.value_text(value)}" for name, value in changed.items())


def _describe_copies(metrics: Mapping[str, Any]) -> str:
    """Returns the number of ranked clips that are training clips, and the MAP of the others."""
    copies = metrics["copies"]
    score = f"; MAP@100 without them {copies['map']:.4f}" if "map" in copies else ""
    return f"{copies['count']:,} clips are training clips: {copies['example']}{score}"


def _describe_data(metrics: Mapping[str, Any]) -> str:
    data = metrics["data"]
    place = f" in {data['dir']}" if data.get("dir") else ""
    return f"{data.get('name')}{place}, sha256 {str(data.get('digest'))[:12]}"


def _describe_identities(metrics: Mapping[str, Any]) -> str:
    known = metrics.get("num_map_identities")
    mean = f"; MAP is the mean over the {known:,} that have clips" if known else ""
    return f"{metrics['num_identities']:,}{mean}"


def _describe_runs(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{run['name']} (weight {run.get('weight')})" for run in metrics["runs"])


def _describe_versions(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())


class Row(NamedTuple):
    """A row of the tables that show the results of an evaluation."""

    key: str  # of the entry of `metrics.json`
    label: str
    tables: str  # the names of the tables with this row, separated by a blank, see `list_rows`
    digits: int = 0  # of a number, after the decimal point
    # content of `metrics.json` -> text, or "" if there is nothing to say. It is called if there is
    # such an entry. None: the entry itself is shown.
    text: Callable[[Mapping[str, Any]], str] | None = None


# All rows except those of the metrics in `CLIP_METRICS`, in their order.
ROWS = (
    Row("data", "data digest", "run", text=lambda metrics: metrics["data"].get("digest") or ""),
    Row("train_splits", "trained on", "run"),  # of `config.json`
    Row("runs", "joined runs", "run", text=_describe_runs),
    Row("overrides", "scored with", "summary run", text=describe_overrides),
    *(Row(fact.key, fact.label, "summary run", text=fact.text) for fact in facts.FACTS),
    Row("copies", "copies", "summary run", text=_describe_copies),
    Row("best_map", "best", "summary", text="{best_map:.4f} at step {best_step:,}".format_map),
    Row("data", "data", "summary", text=_describe_data),
    Row("num_clips", "clips", "summary", text="{num_clips:,}".format_map),
    Row("num_identities", "identities", "summary", text=_describe_identities),
    Row("date", "finished", "run"),
    Row("eval_date", "evaluated", "run"),
    Row("versions", "versions", "run", text=_describe_versions),
    Row("seed", "seed", "run"),
    Row("step", "steps", "run"),
    Row("best_map", "best MAP@100 in training", "run", 4),
    Row("num_members", "members", "run"),
    Row("num_params", "parameters of a member", "run"),
    Row("num_clips", "ranked clips", "results"),
    Row("num_identities", "identities", "results"),
    Row("num_map_identities", "identities with clips; MAP is their mean", "results"),
    Row("num_distractors", "distractors", "results"),
    Row("num_ties", "ties: ranked clips with the score of the clip before them", "results"),
    Row("eval_clips_per_second", "clips per second of evaluation", "results"),
    Row("eval_seconds", "seconds of the evaluation", "results", 1),
    Row("train_clips_per_second", "clips per second of training steps (median)", "results"),
    Row("train_seconds", "seconds of training steps, without compilation", "results", 1),
    Row("seconds", "seconds in all: start, data, training, evaluations", "results", 1),
)


def list_rows(metrics: Mapping[str, Any], table: str) -> Iterator[tuple[Row, Any]]:
    """Yields (row, value) for each row of a table. Rows without a value are left out.

    `metrics` is the content of `metrics.json`. The tables are:

    - `scores`: the metrics that every evaluation prints, except MAP. All values are numbers.
    - `summary`: the other rows that a command prints. All values are texts.
    - `run` and `results`: the tables "The run" and "Results" of the report.
    """
    by_log = sorted(CLIP_METRICS.items(), key=lambda item: not item[1].log)
    scores = [Row(name, x.label, "scores", x.digits) for name, x in by_log if x.log]
    results = [Row(name, f"{x.label}: {x.about}", "results", x.digits) for name, x in by_log]
    for row in (*scores, *results, *ROWS):
        value = metrics.get(row.key)
        if table in row.tables.split() and (value or value == 0):
            shown = row.text(metrics) if row.text else value
            if shown != "":
                yield row, shown


def explain_unmeasured(config: Mapping[str, Any], workdir: Path) -> str:
    """Returns why a run has no MAP, and a remedy, if it was trained on all splits with labels.

    Otherwise, returns "". With `config.ensemble.folds`, each net can be measured on the training
    clips that it left out, so the result is "", too.
    """
    path = workdir / "data_report.json"
    report = schemas.DataReport()
    if files.exists(path):
        report = json_files.read(path, schemas.DataReport, REMEDY)
    labelled = {name for name, counts in report.splits.items() if counts.get("labelled")}
    trained = config.get("data", {}).get("train_splits", ())
    folds = any(config.get("ensemble", {}).get(name) for name in config_lib.HOLD_OUT_FIELDS)
    if folds or not labelled or not labelled <= set(trained):
        return ""
    problem = f"the run was trained on {' and '.join(trained)}, so no split is left; "
    counts = report.splits.get(trained[-1], {})
    if counts.get("labelled_clips", 0) <= counts.get("identities", 0):  # too few clips for folds
        return f"{problem}most people have one clip: add a split val with other clips of them"
    return f"{problem}to measure, use --config.ensemble.folds=5 --config.eval.split={trained[-1]}"


def find_last_saved(workdir: Path) -> int:
    """Returns the last step that the logs list as saved in a checkpoint, or 0 if there is none.

    Each step that `metrics.jsonl` lists as evaluated was also saved. `timing.jsonl` lists the other
    saved steps.
    """
    last = 0
    for path in (workdir / METRICS_LOG, workdir / TIMING_LOG):
        for line in files.iterate_lines(path) if files.exists(path) else ():
            with contextlib.suppress(ValueError):
                value = files.parse_line(line)
                step = json_files.parse(path, value, schemas.Line, REMEDY).step
                last = max(last, step if "split" in value or value.get("saved") else 0)
    return last


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl` or `timing.jsonl`. If there is no file, returns [].

    Damaged lines are skipped, because a run may still write the last line. If the file has more
    than 20,000 lines, only some lines are returned: at most 20,000 evenly spaced lines, and also
    the lines about the first 20,000 evaluations.
    """
    if not files.exists(path):
        return []
    step = max(1, -(-sum(1 for _ in files.iterate_lines(path)) // MAX_LOG_LINES))
    lines, evaluations = [], 0
    for number, line in enumerate(files.iterate_lines(path)):
        with contextlib.suppress(ValueError):
            value = files.parse_line(line)
            json_files.parse(path, value, schemas.Line, REMEDY)
            evaluations += "split" in value
            if number % step == 0 or ("split" in value and evaluations <= MAX_LOG_LINES):
                lines.append(value)
    return lines


def save_analysis(
    path: Path, values: schemas.Analysis | Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes the analysis of an evaluation, its JSON values and arrays, to an .npz file."""
    content = io.BytesIO()
    text = json.dumps(msgspec.to_builtins(values)).encode()
    parts: dict[str, Any] = {"facts": np.frombuffer(text, np.uint8), **arrays}
    np.savez_compressed(content, **parts)
    files.write_bytes(path, content.getvalue())


def load_analysis(path: str | Path) -> tuple[schemas.Analysis, Arrays]:
    """Reads the analysis of an evaluation, which `save_analysis` wrote. Returns values and arrays.

    `path` is the folder of a run, or a file: `analysis.npz`, or `analysis_<split>.npz` for another
    split than `eval.split` of the run. Raises UserError if the file is missing or damaged.
    """
    path = files.local(path)
    if path.is_dir():
        path /= "analysis.npz"
    if not files.exists(path):
        split = path.stem.partition("analysis_")[2]
        raise UserError(
            f"'{path}' is missing\nto write it, run vidjax evaluate --workdir=FOLDER "
            f"--config.eval.report=True{' --config.eval.split=' * bool(split)}{split}"
        )
    arrays = files.read_npz(path)
    text = arrays.pop("facts", np.zeros(0, np.uint8)).tobytes()
    try:
        values = files.parse_json(text)
    except ValueError as error:
        raise UserError(f"'{path}' is damaged: {error}\n{REMEDY}") from error
    analysis = json_files.parse(path, values, schemas.Analysis, REMEDY)
    ap, positives = (arrays[name].shape if name in arrays else None for name in ("ap", "positives"))
    if ap != positives or (ap and len(ap) > 1):
        raise UserError(
            f"'{path}' is damaged: its arrays ap and positives have the shapes {ap} and {positives}"
            f"\n{REMEDY}"
        )
    return analysis, arrays


def truncate_log(path: Path, step: int, *, evaluated: bool = True) -> None:
    """Removes the lines of a .jsonl file after `step`, because a resumed run writes them again.

    If `evaluated` is False, the evaluation of `step` is removed, too. Damaged lines are removed
    with a warning. A damaged last line, which a killed process may leave, causes no warning.
    """
    if not files.exists(path):
        return
    lines, kept, damaged = list(files.iterate_lines(path)), list[bytes](), list[int]()
    for number, line in enumerate(lines, start=1):
        try:
            value: Any = files.parse_line(line)
            if value["step"] + (not evaluated and "split" in value) <= step:
                kept.append(line.rstrip(b"\r\n") + b"\n")
        except (ValueError, TypeError, KeyError):
            damaged.append(number)
    if kept == lines:
        return
    if damaged := [number for number in damaged if number < len(lines)]:
        numbers = messages.list_some([*map(str, damaged)])
        warn(f"damaged lines are removed from '{path}': line {numbers}")
    with files.atomic_file(path) as file:
        file.writelines(kept)


def keep_earlier_logs(workdir: Path) -> None:
    """Renames the logs of a run that starts again, such as `metrics.jsonl` to `metrics.1.jsonl`."""
    paths = [workdir / name for name in (METRICS_LOG, TIMING_LOG)]
    old = [path for path in paths if files.exists(path) and path.stat().st_size]
    for number in itertools.count(1) if old else ():
        kept = [path.with_suffix(f".{number}.jsonl") for path in old]
        if not any(map(files.exists, kept)):
            for path, new in zip(old, kept, strict=True):
                path.rename(new)
            names = ", ".join(path.name for path in kept)
            say(f"no checkpoint: the run starts at step 0, and the earlier logs are kept: {names}")
            return


def _make_hparams(config: Config) -> object:
    """Returns the seed and the changed fields of `config` as hyperparameters for TensorBoard."""
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    changed = dict[str, Any]()
    for name, value in config_lib.fields(config):
        if name == "seed" or value != config_lib.DEFAULTS.get(name):
            is_number = isinstance(value, (int, float))
            changed[name] = value if is_number else config_io.value_text(value)
    return hparams_pb(changed)


class Logs:
    """Writes the logs of a run: `metrics.jsonl`, `timing.jsonl` and a file for TensorBoard.

    If several processes train the run, only the first process writes. The arguments are:
    - `step`: the last finished step of a resumed run. Later lines are removed, and TensorBoard
      hides later entries. If `step` is 0, the run begins, and earlier logs get other names.
    - `evaluated`: if False, the log line of an evaluation at `step` is removed, too.
    - `log`: a function that gets each line of `metrics.jsonl` as a dict, after it is written.
    - `config`: TensorBoard shows the fields that differ from their defaults.
    """

    def __init__(
        self, workdir: Path, *, step: int, evaluated: bool = True, log: LogFunction | None = None,
        config: Config | None = None,
    ):  # fmt: skip
        self._files: dict[str, io.FileIO] = {}
        self._log = log
        if not distributed.is_first():
            return
        if not step:
            keep_earlier_logs(workdir)
        for name in (METRICS_LOG, TIMING_LOG):
            truncate_log(workdir / name, step, evaluated=evaluated)
            self._files[name] = files.open_log(workdir / name)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._files["events"] = files.open_log(workdir / name)
        self._event(file_version="brain.Event:2")
        self._event(step=step + 1, session_log={"status": "START"})
        if config:
            self._event(summary=_make_hparams(config))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics of a step to `metrics.jsonl`, and the numbers to TensorBoard.

        In TensorBoard, metrics have names such as `train/loss` and `val/map`.
        """
        self._line(METRICS_LOG, step, values)
        group = values.get("split", "train")
        scalars = [
            {
                "tag": tag if "/" in tag else f"{group}/{tag.removeprefix('train_')}",
                "simple_value": x,
            }
            for tag, x in values.items()
            if isinstance(x, (int, float))
        ]
        self._event(step=step, summary={"value": scalars})
        if self._log and self._files:
            self._log({"step": step, **values})

    def timing(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a line of `timing.jsonl`: measured times, and whether the step was saved."""
        self._line(TIMING_LOG, step, values)

    def _line(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        if name in self._files:
            files.append(self._files[name], f"{json.dumps({'step': step, **values})}\n".encode())

    def _event(self, **content: object) -> None:
        if "events" in self._files:
            # Imported here because only training needs TensorBoard.
            from tensorboard.compat.proto import event_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter

            record = io.BytesIO()  # a complete record, so that a kill leaves no part of a record
            event = event_pb2.Event(wall_time=time.time(), **content)  # type: ignore[attr-defined]
            RecordWriter(record).write(event.SerializeToString())
            files.append(self._files["events"], record.getvalue())

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
