"""What a run tells: metrics.jsonl, timing.jsonl, TensorBoard events, the progress bar.

For TensorBoard a run's folder is a session of its HPARAMS tab: the fields of `config.json` are its
values, the scalars its metrics. There is no description of an experiment: TensorBoard makes one of
the sessions that it finds, so that runs of different configurations stand in one table.
"""

import io
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from vidjax.run import results as results_lib
from vidjax.run import workdir as workdir_lib

# Protocol buffers make their classes at run time: type checkers do not see them.
Event: Any = event_pb2.Event  # type: ignore[attr-defined]
SessionLog: Any = event_pb2.SessionLog  # type: ignore[attr-defined]
Summary: Any = summary_pb2.Summary  # type: ignore[attr-defined]
HParams: Any = plugin_data_pb2.HParamsPluginData  # type: ignore[attr-defined]
SUCCESS = 1  # of tensorboard.plugins.hparams.api_pb2, whose import takes half a second


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
        self._metrics, self._timing, self._events = (
            open(workdir / file, "ab", buffering=0)  # noqa: SIM115
            for file in ("metrics.jsonl", "timing.jsonl", _events_name())
        )
        self._event(Event(file_version="brain.Event:2"))
        # TensorBoard drops what an earlier process logged from this step on.
        self._event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        if (workdir / "config.json").exists():
            self._event(Event(step=step, summary=_session_start(workdir)))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of results of a step.

        Raises:
          OSError: it cannot be written, here as in `timing`; no half line is left.
        """
        _write_line(self._metrics, step, values)
        self._event(Event(step=step, summary=Summary(value=_scalars(values))))

    def timing(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of measured times of a step."""
        _write_line(self._timing, step, values)

    def _event(self, event: Any) -> None:
        workdir_lib.append(self._events, _record(event))

    def close(self) -> None:
        """Closes the files."""
        for file in (self._metrics, self._timing, self._events):
            file.close()


def _write_line(file: io.FileIO, step: int, values: Mapping[str, Any]) -> None:
    workdir_lib.append(file, (json.dumps({"step": step, **values}) + "\n").encode())


def log_results(workdir: Path, results: Mapping[str, Any], split: str) -> None:
    """Tells TensorBoard what an evaluation found: the end of the session, the attention matrix.

    It is a file of events of its own, written whole: the folder's other logs are closed by now.

    Args:
      workdir: the run's folder, or one that joins runs.
      results: of `metrics.json`, or of `metrics_<split>.json`.
      split: the one that was evaluated.

    Raises:
      ValueError: `config.json` or `analysis.npz` is damaged.
      OSError: it cannot be written.
    """
    config = workdir_lib.read_json(workdir / "config.json")
    own = split == config["eval"]["split"]
    values = []
    if own:
        if config["join"]["runs"]:  # there was no training, which says so
            values += _session_start(workdir).value
            values += _scalars({k: v for k, v in results.items() if k in ("map", "top1")})
        session = HParams()
        session.session_end_info.status = SUCCESS
        session.session_end_info.end_time_secs = time.time()
        values.append(_hparams("session_end_info", session))
    path = results_lib.paths(workdir, split, config["eval"]["split"]).analysis
    if path.exists():
        facts, arrays = results_lib.load_analysis(path)
        if "attention" in arrays:
            image = _image(arrays["attention"], facts["vectors"])
            values.append(Summary.Value(tag=f"attention on {split}", image=image))
    if values:
        events = [
            Event(file_version="brain.Event:2"),
            Event(step=results.get("step", 0), summary=Summary(value=values)),
        ]
        workdir_lib.write_bytes(workdir / _events_name(), b"".join(map(_record, events)))


def _events_name() -> str:
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
    """Returns a summary with the fields of a run's configuration."""
    session = HParams()
    # Without a name of its own group, a session is a group: no two runs are averaged.
    info = session.session_start_info
    info.start_time_secs = time.time()
    config = workdir_lib.read_json(workdir / "config.json")
    for name, value in _flat(config):
        if isinstance(value, bool):
            info.hparams[name].bool_value = value
        elif isinstance(value, (int, float)):
            info.hparams[name].number_value = value
        elif isinstance(value, str):
            info.hparams[name].string_value = value
    return Summary(value=[_hparams("session_start_info", session)])


def _hparams(tag: str, content: Any) -> Any:
    """Returns a value that holds nothing but data of TensorBoard's HPARAMS tab."""
    value = Summary.Value(tag=f"_hparams_/{tag}")
    value.tensor.dtype = 1  # float32
    value.tensor.tensor_shape.dim.add(size=0)
    value.metadata.plugin_data.plugin_name = "hparams"
    value.metadata.plugin_data.content = content.SerializeToString()
    return value


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the fields of a configuration, a list as one text."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        flat = all(isinstance(item, (str, int, float)) for item in value)
        yield name, ",".join(map(str, value)) if flat else json.dumps(value)
    else:
        yield name, value


def _image(matrix: np.ndarray, names: Sequence[str]) -> Any:
    """Returns a matrix as a PNG: column j says what vector j takes from every vector i."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    size, top = len(matrix), max(float(matrix.max()), 1e-9)
    colours = colormaps["Blues"]
    figure = Figure((0.8 * size + 2, 0.8 * size + 1.5), layout="constrained", dpi=100)
    axes = figure.add_subplot()
    axes.imshow(matrix, cmap=colours, vmin=0, vmax=top)
    texts = {"parse_math": False}
    axes.set_xticks(range(size), names, rotation=30, ha="right", **texts)
    axes.set_yticks(range(size), names, **texts)
    axes.set_xlabel("takes")
    axes.set_ylabel("is taken from")
    for i, j in np.ndindex(matrix.shape):
        shade = "white" if matrix[i, j] > 0.6 * top else "black"
        axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color=shade)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # names in other scripts
        figure.savefig(content, format="png")
    width, height = figure.canvas.get_width_height()
    return Summary.Image(
        height=height, width=width, colorspace=4, encoded_image_string=content.getvalue()
    )


class Progress:
    """A tqdm bar on a terminal, plain lines elsewhere."""

    def __init__(self, total: int, *, initial: int = 0, unit: str, label: str, leave: bool = True):
        self._bar = None
        self._label, self._total, self._unit = label, total, unit
        self._initial = self._done = initial
        self._began = self._printed = time.monotonic()
        self._kept = ""
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                unit=f" {unit}s",
                unit_scale=True,
                desc=label,
                bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}, {rate_fmt}"
                "{postfix}, {remaining} left",
                dynamic_ncols=True,
                leave=leave,
            )

    def keep(self, text: str) -> None:
        """Sets what is shown behind the latest values from now on, as a score that comes seldom."""
        self._kept = text

    def advance(self, count: int, text: str = "") -> None:
        """Moves on by `count` and shows the latest values."""
        self._done = min(self._done + count, self._total)
        text = ", ".join(part for part in (text, self._kept) if part)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(min(count, self._total - self._bar.n))
        elif self._done == self._total or time.monotonic() - self._printed > 10:
            self._printed = time.monotonic()
            say(f"{self._label}: {', '.join(self._words(text))}")

    def _words(self, text: str) -> Iterator[str]:
        """Yields what a line says: how far, how fast, the latest values, how long still."""
        yield f"{self._done:,} of {self._total:,} {self._unit}s"
        seconds = time.monotonic() - self._began
        rate = (self._done - self._initial) / max(seconds, 1e-3)
        yield f"{rate:,.0f} {self._unit}s/s"
        if text:
            yield text
        if rate and self._done < self._total:
            left = round((self._total - self._done) / rate)
            yield f"{left // 60}:{left % 60:02} left"

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
