"""The logs of a run: `metrics.jsonl`, `timing.jsonl` and TensorBoard's events."""

import io
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from vidjax import files
from vidjax.cluster import processes


def keep_until(path: Path, step: int, *, evaluated: bool = True) -> None:
    """Cuts a .jsonl file back to a step, so that a resumed run repeats no line.

    An unfinished last line, left by a kill, is removed silently, and other damaged lines with a
    warning. Without `evaluated`, the evaluation of `step` itself (a line with a `split`) goes, too.
    """
    if not files.exists(path):
        return
    number, damaged, changed = 0, [], False
    for number, line in enumerate(files.each_line(path), start=1):
        kept = _is_kept(line, step, evaluated)
        changed |= not (kept and line.endswith(b"\n"))
        if kept is None:
            damaged.append(number)
    if not changed:
        return
    damaged = [place for place in damaged if place < number]
    if damaged:
        warnings.warn(f"'{path}': damaged lines are left out: {damaged[:5]}", stacklevel=2)
    with files.atomic_file(path) as file:
        for line in files.each_line(path):
            if _is_kept(line, step, evaluated):
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
        if not processes.is_first():
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
HParams: Any = plugin_data_pb2.HParamsPluginData  # type: ignore[attr-defined]
STATUS_SUCCESS = 1  # of tensorboard.plugins.hparams.api_pb2, an import of 0.5 seconds
EVENT_VERSION = "brain.Event:2"  # of the format, the first event of every file


class Image(NamedTuple):
    """A picture for TensorBoard, a PNG file."""

    tag: str
    png: bytes
    width: int
    height: int


class EventFile:
    """A new file of TensorBoard events; from `step` on, it replaces those of earlier files."""

    def __init__(self, workdir: Path, *, step: int):
        self._file = files.open_log(workdir / _file_name())
        self._write(Event(file_version=EVENT_VERSION))
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        if (workdir / "config.json").exists():
            self._write(Event(step=step, summary=Summary(value=[_session_start(workdir)])))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes those of a step's values that are numbers, and leaves out others."""
        self._write(Event(step=step, summary=Summary(value=_scalars(values))))

    def _write(self, event: Any) -> None:
        files.append(self._file, _record(event))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def write_results(
    workdir: Path,
    step: int,
    *,
    scalars: Mapping[str, Any],
    images: Sequence[Image] = (),
    start: bool = False,
    end: bool = False,
) -> None:
    """Writes events of one evaluation; `start` and `end` begin and end a session for HPARAMS."""
    values = [_session_start(workdir)] if start else []
    values += _scalars(scalars)
    if end:
        session = HParams()
        session.session_end_info.status = STATUS_SUCCESS
        session.session_end_info.end_time_secs = time.time()
        values.append(_hparams("session_end_info", session))
    for image in images:
        picture = Summary.Image(
            height=image.height, width=image.width, colorspace=4, encoded_image_string=image.png
        )
        values.append(Summary.Value(tag=image.tag, image=picture))
    if values:
        events = [
            Event(file_version=EVENT_VERSION),
            Event(step=step, summary=Summary(value=values)),
        ]
        files.write_bytes(workdir / _file_name(), b"".join(map(_record, events)))


def _file_name() -> str:
    return f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"


def _record(event: Any) -> bytes:
    event.wall_time = time.time()
    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()


def _scalars(values: Mapping[str, Any]) -> list[Any]:
    return [
        Summary.Value(tag=name, simple_value=value)
        for name, value in values.items()
        if isinstance(value, (int, float))
    ]


def _session_start(workdir: Path) -> Any:
    session = HParams()
    # Without a name of its own group, a session is a group: no two runs are averaged.
    info = session.session_start_info
    info.start_time_secs = time.time()
    for name, value in _flat(files.read_json(workdir / "config.json", limit=files.CONFIG_BYTES)):
        if isinstance(value, bool):
            info.hparams[name].bool_value = value
        elif isinstance(value, (int, float)):
            info.hparams[name].number_value = value
        elif isinstance(value, str):
            info.hparams[name].string_value = value
    return _hparams("session_start_info", session)


def _hparams(tag: str, content: Any) -> Any:
    """Returns an event value that holds nothing but data for the HPARAMS tab."""
    value = Summary.Value(tag=f"_hparams_/{tag}")
    value.tensor.dtype = 1  # float32
    value.tensor.tensor_shape.dim.add(size=0)
    value.metadata.plugin_data.plugin_name = "hparams"
    value.metadata.plugin_data.content = content.SerializeToString()
    return value


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of the fields of a configuration, a list as one text."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        flat = all(isinstance(item, (str, int, float)) for item in value)
        yield name, ",".join(map(str, value)) if flat else json.dumps(value)
    else:
        yield name, value
