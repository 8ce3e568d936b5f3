"""Logs: lines of a resumed run, events that TensorBoard reads, progress in a file."""

import json

import pytest

from vidjax.runs import terminal as terminal_lib
from vidjax.runs.results import Logs
from vidjax.runs.terminal import Progress


@pytest.mark.slow
def test_tensorboard_shows_the_last_value_of_steps_that_a_run_repeats(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = Logs(tmp_path, step=0)
    for step in (1, 2, 3):
        logs.metrics(step, {"train_loss": 1.0 / step})
    logs.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x')  # what a kill may leave
    logs = Logs(tmp_path, step=2)
    logs.metrics(3, {"train_loss": 9.0})
    logs.timing(3, {"clips_per_second": 5.0})
    logs.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["train_loss"] == 9.0 and "clips_per_second" not in lines[-1]
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train_loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_progress_writes_only_a_few_lines_to_a_file(capsys, monkeypatch):
    clock = iter(range(0, 600, 3))
    monkeypatch.setattr(terminal_lib.time, "monotonic", lambda: next(clock))
    progress = Progress(1000, initial=200, unit="clip", label="train")
    for step in range(8):
        progress.advance(100, f"loss {8 - step}")
        if step == 3:
            progress.keep_text("MAP 0.5000")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4  # not one a step
    assert lines[-1].startswith("train: 1,000 of 1,000 clips, ")
    assert lines[-1].endswith(" clips/s, loss 1, MAP 0.5000")
    assert lines[0].endswith(" left") and "MAP" not in lines[0]
