"""Files whole or not at all, as large as they are read back; signals are noted."""

import concurrent.futures
import os
import signal
import time

import numpy as np
import pytest

from vidjax.core import ensemble
from vidjax.runs import results, signals
from vidjax.runs.results import truncate_log
from vidjax.utils import files, tables


def test_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(OSError):
        files.write_text(tmp_path / "absent" / "x.txt", "text")
    with pytest.raises(TypeError, match="no JSON form"):
        files.write_json(tmp_path / "x.json", object())
    with pytest.raises(KeyboardInterrupt), files.atomic_file(tmp_path / "x.txt") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_atomic_folder_keeps_a_folder_that_was_made_meanwhile(tmp_path):
    with pytest.raises(ValueError, match="made meanwhile"), files.atomic_folder(tmp_path / "x"):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "thesis.txt").write_text("mine")
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x" / "thesis.txt").read_text() == "mine"


def test_reading_refuses_links_out_of_a_folder(tmp_path):
    inner, outer = tmp_path / "run" / "inner", tmp_path / "outer"
    for folder in (inner, outer):
        folder.mkdir(parents=True)
        (folder / "x").write_bytes(b"1")
    (tmp_path / "run" / "within").symlink_to(inner)
    (tmp_path / "run" / "out").symlink_to(outer)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for run in (tmp_path / "run", tmp_path / "link"):
        for path in ("inner/x", "within/x"):
            assert files.read_bytes(run / path, 9, below=run) == b"1"
        for path in ("out/x", "inner/../../outer/x"):
            with pytest.raises(ValueError, match="link out of"):
                files.read_bytes(run / path, 9, below=run)


def test_concurrent_writers_do_not_mix_their_contents(tmp_path):
    """Temporary names must differ even for equal process IDs, as in containers."""

    def work(number):
        for turn in range(10):
            files.write_text(tmp_path / "x.txt", f"{number} " * 4000)
            tables.write_ranking(tmp_path / f"{number}-{turn}.tsv", {f"{number}": [("a", 1.0)]})
        return (tmp_path / "x.txt").read_text().split()

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        for words in threads.map(work, range(6)):
            assert len(words) == 4000 and len(set(words)) == 1
    for path in tmp_path.glob("*.tsv"):
        assert path.read_text().splitlines()[1].split("\t")[0] == path.name.partition("-")[0]


def test_signal_is_recorded_and_the_previous_handler_restored():
    before = signal.getsignal(signal.SIGTERM)
    with signals.catch_interruption() as interruption:
        assert interruption.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert interruption.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_log_of_20_megabytes_is_truncated_and_read_in_part(tmp_path, monkeypatch):
    log, pad = tmp_path / "metrics.jsonl", "x" * 100_000
    lines = [f'{{"step": {step}, "train_loss": 1.0, "pad": "{pad}"}}\n' for step in range(200)]
    log.write_text("".join(lines))  # 20 MB
    truncate_log(log, 198)
    assert log.stat().st_size == sum(map(len, lines[:-1]))
    monkeypatch.setattr(results, "MAX_LOG_LINES", 50)
    every_fourth = [*range(0, 199, 4)]
    assert [line["step"] for line in results.read_lines(log)] == every_fourth


def test_values_too_large_to_read_back_are_refused_before_training(tmp_path, monkeypatch):
    """The writer and the reader of a file have the same limits."""
    sets = ensemble.TrainingSets((ensemble.Member(),), ("a", "b", "c"), np.ones((1, 3), bool))
    ensemble.check_size(sets)
    ensemble.save(tmp_path, sets)
    names, path = [f"{'name' * 100}{number}" for number in range(50)], tmp_path / "names.json"
    results.check_identities(names)
    files.write_json(path, names)
    assert results.load_identities(path) == names
    monkeypatch.setattr(ensemble, "MAX_TRAINING_CLIPS", 2)
    monkeypatch.setattr(results, "MAX_IDENTITIES_BYTES", 1000)
    for use, limit in (
        (lambda: ensemble.check_size(sets), "2"),
        (lambda: ensemble.load(tmp_path), "2"),
        (lambda: results.check_identities(names), "1,000"),
        (lambda: results.load_identities(path), "1,000"),
    ):
        with pytest.raises(ValueError, match=limit):
            use()
