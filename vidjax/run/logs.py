"""The logs of a run: `metrics.jsonl`, `timing.jsonl` and TensorBoard's events."""

import io
import itertools
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from vidjax import distributed, files
from vidjax.errors import warn


def keep_until(path: Path, step: int, *, evaluated: bool = True) -> None:
    """Cuts a .jsonl file back to a step, so that a resumed run repeats no line.

    An unfinished last line, left by a kill, is removed silently, and other damaged lines with a
    warning. Without `evaluated`, the evaluation of `step` itself (a line with a `split`) goes, too.
    """
    if not files.exists(path):
        return
    lines = list(files.each_line(path))
    kept = [_is_kept(line, step, evaluated) for line in lines]
    if all(kept) and all(line.endswith(b"\n") for line in lines):
        return
    if damaged := [number for number, one in enumerate(kept[:-1], start=1) if one is None]:
        warn(f"'{path}': damaged lines are left out: {damaged[:5]}")
    with files.atomic_file(path) as file:
        for line in itertools.compress(lines, kept):
            file.write(line.rstrip(b"\r\n") + b"\n")


def _is_kept(line: bytes, step: int, evaluated: bool) -> bool | None:
    """Returns whether a line of a log is kept, see `keep_until`; None where it is damaged."""
    try:
        value: Any = files.parse_line(line)
        repeated = value["step"] == step and "split" in value and not evaluated
        return bool(value["step"] <= step and not repeated)
    except (ValueError, TypeError, KeyError):
        return None


class Logs:
    """The open log files of a run, which the first of its processes writes.

    `metrics.jsonl` depends on configuration, data and step alone: two runs of one configuration
    write the same bytes. Measured times go to `timing.jsonl`.
    """

    def __init__(self, workdir: Path, *, step: int, evaluated: bool = True):
        self._lines: dict[str, io.FileIO] = {}
        self._events: EventFile | None = None
        if not distributed.is_first():
            return
        for name in ("metrics.jsonl", "timing.jsonl"):
            keep_until(workdir / name, step, evaluated=evaluated)
            self._lines[name] = files.open_log(workdir / name)
        self._events = EventFile(workdir, step=step)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of results of a step, and its numbers as events."""
        self._write("metrics.jsonl", step, values)
        if self._events:
            self._events.scalars(step, values)

    def timing(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of measured times of a step."""
        self._write("timing.jsonl", step, values)

    def _write(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        if name in self._lines:
            line = json.dumps({"step": step, **values}) + "\n"
            files.append(self._lines[name], line.encode())

    def close(self) -> None:
        """Closes the files."""
        for file in (*self._lines.values(), self._events):
            if file:
                file.close()


# Protocol buffers make their classes at run time: type checkers do not see them.
Event: Any = event_pb2.Event  # type: ignore[attr-defined]
SessionLog: Any = event_pb2.SessionLog  # type: ignore[attr-defined]
Summary: Any = summary_pb2.Summary  # type: ignore[attr-defined]


class EventFile:
    """A new file of TensorBoard events; from `step` on, it replaces those of earlier files."""

    def __init__(self, workdir: Path, *, step: int):
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = files.open_log(workdir / name)
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the numbers among the values of a step."""
        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if isinstance(value, (int, float))
        ]
        self._write(step=step, summary=Summary(value=scalars))

    def _write(self, **content: Any) -> None:
        record = io.BytesIO()  # so that a kill leaves no part of a record
        event = Event(wall_time=time.time(), **content)
        RecordWriter(record).write(event.SerializeToString())
        files.append(self._file, record.getvalue())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
