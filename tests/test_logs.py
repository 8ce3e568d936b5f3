"""Logs: lines of a resumed run, events that TensorBoard reads, progress on screen or in a file."""

import io
import json
import re
import sys
import time

import matplotlib.colors
import matplotlib.image
import numpy as np
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from tests.helpers import made_runs
from vidjax.analysis.analysis import log_results
from vidjax.run import terminal as terminal_lib
from vidjax.run.logs import Logs, keep_until
from vidjax.run.terminal import Progress

ListSessionGroupsRequest = api_pb2.ListSessionGroupsRequest  # type: ignore[attr-defined]
STATUS_SUCCESS, STATUS_UNKNOWN = 1, 0  # of api_pb2


def test_lines_after_the_step_and_half_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1}\n{"step": 2, "x": 2}\n{"step": 3, "x": 3}\n{"step": 4, "x')
    keep_until(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    keep_until(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_tensorboard_reads_the_events_and_forgets_repeated_steps(tmp_path):
    logs = Logs(tmp_path, step=0)
    for step in (1, 2, 3):
        logs.metrics(step, {"train_loss": 1.0 / step})
    logs.close()
    logs = Logs(tmp_path, step=2)
    logs.metrics(3, {"train_loss": 9.0})
    logs.timing(3, {"clips_per_second": 5.0})
    logs.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["train_loss"] == 9.0
    assert "clips_per_second" not in (tmp_path / "metrics.jsonl").read_text()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train_loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_a_run_is_a_session_of_the_hparams_tab(tmp_path):
    """TensorBoard's own back end lists the run and its hyperparameters."""
    for seed, name in enumerate(("one", "two")):
        folder = made_runs.write(
            tmp_path / name, {"1": 0.5}, f"--config.seed={seed}", "--config.modalities=face,head"
        )
        logs = Logs(folder, step=0)
        logs.metrics(7, {"map": 0.25 + seed / 2, "split": "val"})
        logs.close()
    log_results(tmp_path / "two", {"map": 0.75, "step": 7}, "val")

    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    provider = MultiplexerDataProvider(runs, str(tmp_path))
    context = backend_context.Context(TBContext(data_provider=provider, logdir=str(tmp_path)))
    told = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, told, [])
    assert [info.name for info in experiment.hparam_infos if info.differs] == ["seed"]
    names = {info.name for info in experiment.hparam_infos}
    assert names >= {"batch_size", "optim.learning_rate", "data.name", "modalities"}
    assert [info.name.tag for info in experiment.metric_infos] == ["map"]
    request = ListSessionGroupsRequest(
        start_index=0, slice_size=9, allowed_statuses=[STATUS_SUCCESS, STATUS_UNKNOWN]
    )
    request.include_metrics = True
    found = list_session_groups.Handler(RequestContext(), context, "", request).run()
    rows = {
        group.name: (
            group.hparams["seed"].number_value,
            group.hparams["modalities"].string_value,
            group.metric_values[0].value,
            group.sessions[0].status,
        )
        for group in found.session_groups
    }
    assert rows == {
        "one": (0.0, "face,head", 0.25, STATUS_UNKNOWN),  # it has not ended
        "two": (1.0, "face,head", 0.75, STATUS_SUCCESS),
    }


def test_the_attention_matrix_is_an_image(tmp_path):
    matrix = np.array([[0.9, 0.2], [0.1, 0.8]])
    made_runs.write(tmp_path, {"1": 0.5}, arrays={"attention": matrix})
    log_results(tmp_path, {"map": 0.5, "step": 7}, "val")
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("attention on val")
    assert event.step == 7
    picture = matplotlib.image.imread(io.BytesIO(event.encoded_image_string))
    assert picture.shape == (event.height, event.width, 4)
    colours = {tuple(colour) for colour in picture.reshape(-1, 4).round(2)}
    white, fill = np.ones(4), np.array(matplotlib.colors.to_rgba("#6ea8d8"))
    for value in matrix.ravel():
        wanted = white + value / 0.9 * (fill - white)
        assert min(np.abs(wanted - colour).max() for colour in colours) < 0.02
    made_runs.write(tmp_path, {"1": 0.5}, suffix="_test", arrays={"attention": matrix})
    log_results(tmp_path, {"map": 0.5, "step": 7}, "test")
    found = EventAccumulator(str(tmp_path)).Reload()
    assert set(found.Tags()["images"]) == {"attention on val", "attention on test"}


def test_joined_runs_are_a_session_without_training(tmp_path):
    made_runs.write(tmp_path, {"1": 0.5}, "--config.join.runs=a,b")
    log_results(tmp_path, {"map": 0.5, "map_kind": "val"}, "val")
    found = EventAccumulator(str(tmp_path)).Reload()
    assert found.Scalars("map")[0].value == 0.5
    assert "_hparams_/session_start_info" in found.Tags()["tensors"]


def test_progress_tells_a_file_now_and_then(capsys, monkeypatch):
    clock = iter(range(0, 600, 3))
    monkeypatch.setattr(terminal_lib.time, "monotonic", lambda: next(clock))
    progress = Progress(1000, initial=200, unit="clip", label="train")
    for step in range(8):
        progress.advance(100, f"loss {8 - step}")
        if step == 3:
            progress.keep("MAP 0.5000")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4  # not one a step
    assert lines[-1].startswith("train: 1,000 of 1,000 clips, ")
    assert lines[-1].endswith(" clips/s, loss 1, MAP 0.5000")
    assert lines[0].endswith(" left") and "MAP" not in lines[0]


def test_progress_on_a_terminal_shows_rate_values_and_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(1000, unit="clip", label="train")
    progress.keep("MAP 0.5000")
    time.sleep(0.2)
    progress.advance(500, "loss 2.5")
    progress.close()
    shown = terminal.getvalue().split("\r")[-1].strip()
    assert re.fullmatch(
        r"train  50% \|.*\| 500/1.00k, [\d.]+k? clips/s, loss 2.5, MAP 0.5000, [\d:]+ left", shown
    ), shown
