"""Logs: lines of a resumed run, and events that TensorBoard reads."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vidjax.logs import Logs, keep_until


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
