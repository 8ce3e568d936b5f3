"""TensorBoard: files of events in a run's folder.

A run is a session of the HPARAMS tab: fields of `config.json` are hyperparameters, scalars are
metrics. No file describes an experiment: TensorBoard makes one of all sessions that it finds, so
that runs of different configurations stand in one table.
"""

import io
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from vidjax import files

# Protocol buffers make their classes at run time: type checkers do not see them.
Event: Any = event_pb2.Event  # type: ignore[attr-defined]
SessionLog: Any = event_pb2.SessionLog  # type: ignore[attr-defined]
Summary: Any = summary_pb2.Summary  # type: ignore[attr-defined]
HParams: Any = plugin_data_pb2.HParamsPluginData  # type: ignore[attr-defined]
SUCCESS = 1  # STATUS_SUCCESS in tensorboard.plugins.hparams.api_pb2, an import of 0.5 seconds
VERSION = "brain.Event:2"  # of the format, the first event of every file


class Image(NamedTuple):
    """A picture for TensorBoard, a PNG file."""

    tag: str
    png: bytes
    width: int
    height: int


class EventFile:
    """The events of a training run; TensorBoard drops later steps of earlier files."""

    def __init__(self, workdir: Path, *, step: int):
        self._file = files.open_log(workdir / _file_name())
        self._write(Event(file_version=VERSION))
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        if (workdir / "config.json").exists():
            self._write(Event(step=step, summary=Summary(value=[_session_start(workdir)])))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the numbers among some values of a step; other values are left out."""
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
    """Writes a file of events of one evaluation; a session may start here, and end."""
    values = [_session_start(workdir)] if start else []
    values += _scalars(scalars)
    if end:
        session = HParams()
        session.session_end_info.status = SUCCESS
        session.session_end_info.end_time_secs = time.time()
        values.append(_hparams("session_end_info", session))
    for image in images:
        picture = Summary.Image(
            height=image.height, width=image.width, colorspace=4, encoded_image_string=image.png
        )
        values.append(Summary.Value(tag=image.tag, image=picture))
    if values:
        events = [Event(file_version=VERSION), Event(step=step, summary=Summary(value=values))]
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
