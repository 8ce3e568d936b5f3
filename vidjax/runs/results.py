"""The results and the logs of a run: how files are read, written and described.

Their formats are in `run.formats`. `metrics.jsonl` depends only on configuration, data and step:
two runs of one configuration write the same bytes. Measured times go to `timing.jsonl`.
"""

import contextlib
import datetime
import io
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from vidjax.runs import config as config_lib
from vidjax.runs import config_io
from vidjax.core import distributed
from vidjax.utils import files
from vidjax.utils.errors import UserError, warn
from vidjax.runs import schemas

if TYPE_CHECKING:
    from vidjax.runs.run_folder import ResultPaths

Arrays = dict[str, np.ndarray]

MOST_LINES = 20_000  # of a log, in memory
IDENTITIES_BYTES = 256 * files.MB  # of `identities.json`
REMEDY = "delete it: vidjax evaluate of the run's folder writes its results again"
# Keys of `metrics.json` that describe the training. A later evaluation keeps them.
TRAINING_KEYS = (
    "best_step",
    "best_map",
    "num_params",
    "num_members",
    "train_clips_per_second",
    "train_seconds",
    "seconds",
    "date",
    "seed",
    "command",
    "finished",
    "trained_on",
    "versions",
)


def now() -> str:
    """Returns the date and the time of day as text, UTC, such as `2026-02-01 13:05:00 UTC`."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


class Results(schemas.Metrics, kw_only=True):
    """What a run reached on a split: `map`, `top1` and all others of `formats.Metrics`, and files.

    Attributes:
      split: the name of the split.
      paths: the files that tell more: `ranking`, `metrics`, `report` and `analysis`.
      values: what `to_dict` returns; it has metrics that you have added, too.
    """

    split: str
    paths: "ResultPaths"
    values: dict[str, Any]

    @classmethod
    def of(cls, values: Mapping[str, Any], split: str, found: "ResultPaths") -> Self:
        """Returns the results `values` of a split, as an evaluation in a run's folder made them."""
        plain = files.parse_json(files.to_json(values).encode())
        metrics = schemas.parse(found.metrics, plain, schemas.Metrics, REMEDY)
        known = {name: getattr(metrics, name) for name in metrics.__struct_fields__}
        return cls(**known, split=split, paths=found, values=cast(dict[str, Any], plain))

    def __repr__(self) -> str:
        shown = {"split": self.split, "map": self.map, "map_kind": self.map_kind, "step": self.step}
        return f"Results({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `metrics.json`, of plain values for JSON."""
        return dict(self.values)

    def average_precisions(self) -> dict[str, float]:
        """Returns identity -> average precision, of those with a clip in the split.

        UserError where no analysis was written: `config.eval.report` was off.
        """
        if not files.exists(self.paths.analysis):
            raise UserError(
                f"'{self.paths.analysis}' is not there: set --config.eval.report=True, and evaluate"
            )
        names = load_identities(self.paths.metrics.with_name("identities.json"))
        arrays = load_analysis(self.paths.analysis)[1]
        if "ap" not in arrays:
            return {}
        rows = zip(names, arrays["ap"], arrays["positives"], strict=True)
        return {name: float(ap) for name, ap, positives in rows if positives}


def load_metrics(path: Path) -> dict[str, Any]:
    """Returns a file, checked by `formats.Metrics`, as a dict; keys that users add stay in it."""
    return schemas.load(path, schemas.Metrics, REMEDY)[0]


def load_identities(path: Path) -> list[str]:
    """Returns the names of class columns 1..C, the content of `identities.json`."""
    kind = cast(type[list[str]], schemas.Identities)
    return schemas.read(path, kind, REMEDY, IDENTITIES_BYTES)


def check_identities(identities: Sequence[str]) -> None:
    """Raises ValueError for identities too many or too long for `load_identities`."""
    most, size = files.MAX_ITEMS, len(files.to_json(list(identities)))
    if len(identities) > most or size > IDENTITIES_BYTES:
        raise UserError(
            f"{len(identities):,} identities, with names of {size:,} bytes: the most are {most:,}, "
            f"and {IDENTITIES_BYTES:,} bytes\nleave some out of the ground truth"
        )


def describe_data(metrics: Mapping[str, Any]) -> str | None:
    """Returns name, folder and short digest of the data behind results; None if not known."""
    data = metrics.get("data")
    if not isinstance(data, dict):
        return None
    place = f" in {data['dir']}" if data.get("dir") else ""
    return f"{data.get('name')}{place}, sha256 {str(data.get('digest'))[:12]}"


def describe_overrides(metrics: Mapping[str, Any]) -> str:
    """Returns `FIELD=VALUE` of the settings of results that `config.json` lacks; "" if none."""
    changed = metrics.get("overrides") or {}
    return ", ".join(f"{name}={config_io.value_text(value)}" for name, value in changed.items())


def unmeasured(config: Mapping[str, Any], workdir: Path) -> str:
    """Returns why no split is left to measure a run on, and the remedy; "" if one is or may be.

    A split can measure a run if it has a ground truth, and the run was not trained on it, or its
    members leave clips of it out. `data_report.json` says which splits have a ground truth.
    """
    path = workdir / "data_report.json"
    report = schemas.DataReport()
    if files.exists(path):
        report = schemas.read(path, schemas.DataReport, REMEDY)
    labelled = {name for name, counts in report.splits.items() if counts.get("labelled")}
    trained = config.get("data", {}).get("train_splits", ())
    held_out = any(config.get("ensemble", {}).get(name) for name in config_lib.HOLD_OUT)
    if held_out or not labelled or not labelled <= set(trained):
        return ""
    problem = f"trained on {' and '.join(trained)}, so no split is left; "
    counts = report.splits.get(trained[-1], {})
    if counts.get("labelled_clips", 0) <= counts.get("identities", 0):  # folds would leave nobody
        return f"{problem}most people have one clip: add a split val with other clips of them"
    return f"{problem}to measure: --config.ensemble.folds=5 --config.eval.split={trained[-1]}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the readable lines of `metrics.jsonl` or `timing.jsonl`; none without the file.

    Damaged lines are skipped: a run may be writing the last one. Long logs are thinned out evenly
    to MOST_LINES, besides as many evaluations.
    """
    if not files.exists(path):
        return []
    step = max(1, -(-sum(1 for _ in files.each_line(path)) // MOST_LINES))
    found, evaluations = [], 0
    for number, line in enumerate(files.each_line(path)):
        with contextlib.suppress(ValueError):
            value = files.parse_line(line)
            schemas.parse(path, value, schemas.Line, REMEDY)
            evaluations += "split" in value
            if number % step == 0 or ("split" in value and evaluations <= MOST_LINES):
                found.append(value)
    return found


def save_analysis(path: Path, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `values` (`formats.Analysis`) and `arrays` to a file atomically."""
    content = io.BytesIO()
    text = json.dumps(values, default=np.ndarray.tolist).encode()
    parts: dict[str, Any] = {"facts": np.frombuffer(text, np.uint8), **arrays}
    np.savez_compressed(content, **parts)
    files.write_bytes(path, content.getvalue())


def load_analysis(path: Path) -> tuple[schemas.Analysis, Arrays]:
    """Returns the values and the arrays that `save_analysis` wrote."""
    arrays = files.read_npz(path)
    text = arrays.pop("facts", np.zeros(0, np.uint8)).tobytes()
    try:
        if len(text) > files.JSON_BYTES:
            raise UserError(f"more than {files.JSON_BYTES:,} bytes of text")
        values = files.parse_json(text)
    except ValueError as error:
        raise UserError(f"'{path}' is damaged: {error}\n{REMEDY}") from error
    analysis = schemas.parse(path, values, schemas.Analysis, REMEDY)
    schemas.check_arrays(path, arrays, REMEDY)
    return analysis, arrays


def keep_until(path: Path, step: int, *, evaluated: bool = True) -> None:
    """Cuts a .jsonl file back to a step, so that a resumed run repeats no line.

    An unfinished last line, left by a kill, is removed silently, and other damaged lines with a
    warning. Without `evaluated`, the evaluation of `step` itself (a line with a `split`) goes, too.
    """
    if not files.exists(path):
        return
    lines, kept, damaged = list(files.each_line(path)), list[bytes](), list[int]()
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
        warn(f"'{path}': damaged lines are left out: {damaged[:5]}")
    with files.atomic_file(path) as file:
        file.writelines(kept)


class Logs:
    """The open logs of a run, TensorBoard's events among them; process 0 writes them.

    From `step` on, the events replace those of earlier files. For `evaluated` see `keep_until`.
    """

    def __init__(self, workdir: Path, *, step: int, evaluated: bool = True):
        self._files: dict[str, io.FileIO] = {}
        if not distributed.is_first():
            return
        for name in ("metrics.jsonl", "timing.jsonl"):
            keep_until(workdir / name, step, evaluated=evaluated)
            self._files[name] = files.open_log(workdir / name)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._files["events"] = files.open_log(workdir / name)
        self._event(file_version="brain.Event:2")
        self._event(step=step + 1, session_log={"status": "START"})

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of results of a step, and its numbers as events."""
        self._line("metrics.jsonl", step, values)
        numbers = {name: x for name, x in values.items() if isinstance(x, (int, float))}
        scalars = [{"tag": name, "simple_value": x} for name, x in numbers.items()]
        self._event(step=step, summary={"value": scalars})

    def timing(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of measured times of a step."""
        self._line("timing.jsonl", step, values)

    def _line(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        if name in self._files:
            files.append(self._files[name], f"{json.dumps({'step': step, **values})}\n".encode())

    def _event(self, **content: object) -> None:
        if "events" in self._files:
            # Not at the top: only training needs it.
            from tensorboard.compat.proto import event_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter

            record = io.BytesIO()  # so that a kill leaves no part of a record
            event = event_pb2.Event(wall_time=time.time(), **content)  # type: ignore[attr-defined]
            RecordWriter(record).write(event.SerializeToString())
            files.append(self._files["events"], record.getvalue())

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
