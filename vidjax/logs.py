"""What a run tells: metrics.jsonl, timing.jsonl, TensorBoard events, the progress bar."""

import io
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from vidjax import workdir as workdir_lib

# Protocol buffers make their classes at run time: type checkers do not see them.
Event: Any = event_pb2.Event  # type: ignore[attr-defined]
SessionLog: Any = event_pb2.SessionLog  # type: ignore[attr-defined]
Summary: Any = summary_pb2.Summary  # type: ignore[attr-defined]


def keep_until(path: Path, step: int, *, evaluated: bool = True) -> None:
    """Cuts a .jsonl file back to the lines of steps up to `step`: a resumed run repeats none.

    A last line that a kill left unfinished goes as well; any other that cannot be read goes with a
    warning.

    Args:
      path: the file; it may be absent.
      step: the last one to keep.
      evaluated: False to drop the evaluation of `step` itself, a line that has a `split`.
    """
    if not path.exists():
        return
    lines, bad = [], []
    given = path.read_bytes().splitlines()
    for number, line in enumerate(given, start=1):
        try:
            value = json.loads(line)
            again = value["step"] == step and "split" in value and not evaluated
            keep = value["step"] <= step and not again
        except (ValueError, TypeError, KeyError):
            bad.append(number)
            continue
        if keep:
            lines.append(line)
    bad = [number for number in bad if number < len(given)]
    if bad:
        warnings.warn(f"'{path}': damaged lines are left out: {bad[:5]}", stacklevel=2)
    content = b"".join(line + b"\n" for line in lines)
    if content != path.read_bytes():
        workdir_lib.write_bytes(path, content)


class Logs:
    """The open log files of a run.

    `metrics.jsonl` holds only functions of configuration, data and step: two runs of one
    configuration write the same bytes. What depends on the machine goes to `timing.jsonl`.
    """

    def __init__(self, workdir: Path, *, step: int, evaluated: bool = True):
        """Opens the files, cut back to where a run goes on (see `keep_until`; 0 for a new one)."""
        for name in ("metrics.jsonl", "timing.jsonl"):
            keep_until(workdir / name, step, evaluated=evaluated)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._metrics, self._timing, self._events = (
            open(workdir / file, "ab", buffering=0)  # noqa: SIM115
            for file in ("metrics.jsonl", "timing.jsonl", name)
        )
        self._event(Event(file_version="brain.Event:2"))
        # TensorBoard drops what an earlier process logged from this step on.
        self._event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of results of a step.

        Raises:
          OSError: it cannot be written, here as in `timing`; no half line is left.
        """
        _write_line(self._metrics, step, values)
        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if isinstance(value, (int, float))
        ]
        self._event(Event(step=step, summary=Summary(value=scalars)))

    def timing(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of measured times of a step."""
        _write_line(self._timing, step, values)

    def _event(self, event: Any) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        workdir_lib.append(self._events, record.getvalue())

    def close(self) -> None:
        """Closes the files."""
        for file in (self._metrics, self._timing, self._events):
            file.close()


def _write_line(file: io.FileIO, step: int, values: Mapping[str, Any]) -> None:
    workdir_lib.append(file, (json.dumps({"step": step, **values}) + "\n").encode())


class Progress:
    """A tqdm bar on a terminal, plain lines elsewhere."""

    def __init__(self, total: int, *, initial: int = 0, unit: str, label: str, leave: bool = True):
        self._bar = None
        self._label, self._total, self._unit = label, total, unit
        self._done, self._printed = initial, time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                unit=unit,
                unit_scale=True,
                desc=label,
                dynamic_ncols=True,
                leave=leave,
            )

    def advance(self, count: int, text: str = "") -> None:
        """Moves on by `count` and shows the latest values."""
        self._done = min(self._done + count, self._total)
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(min(count, self._total - self._bar.n))
        elif self._done == self._total or time.monotonic() - self._printed > 10:
            self._printed = time.monotonic()
            say(f"{self._label}: {self._done}/{self._total} {self._unit}s {text}".rstrip())

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


class CompileClock:
    """Counts the seconds that XLA compiles in this process, from entering to leaving."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "CompileClock":
        jax.monitoring.register_event_duration_secs_listener(self._add)
        return self

    def __exit__(self, *args: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._add)

    def _add(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration_secs


def say(text: str) -> None:
    """Prints one line for the person at the terminal, above a bar if there is one."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
