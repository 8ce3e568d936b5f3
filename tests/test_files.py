"""Files, folders, logs and checkpoints are written completely or not at all."""

import contextlib
import errno
import fcntl
import functools
import os
import pwd
import signal
import subprocess
import sys
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import limits
from tests.helpers.batches import assert_equal
from tests.helpers.seen import contents, refused
from tests.helpers.small_runs import ROOT, flat
from vidjax.core import devices
from vidjax.data.store import exclusive
from vidjax.runs import checkpoint, config as config_lib, signals
from vidjax.runs.results import Logs
from vidjax.utils import files
from vidjax.utils.errors import DiskError, UserError


def test_atomic_folder_replaces_no_folder_that_was_made_in_the_meantime(tmp_path):
    with pytest.raises(ValueError, match="has made"), files.atomic_folder(tmp_path / "x"):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "thesis.txt").write_text("mine")
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x" / "thesis.txt").read_text() == "mine"


def test_atomic_folder_removes_what_killed_calls_left(tmp_path):
    # Only the first of these names is the name of an unfinished folder x.
    for name in ("x.0123abcd.partial", "x.mine.partial", "y.0123abcd.partial"):
        (tmp_path / name).mkdir()
    with files.atomic_folder(tmp_path / "x") as unfinished:
        (unfinished / "clip").touch()
        with files.atomic_folder(tmp_path / "x"):  # another command at the same time
            assert (unfinished / "clip").exists()
        (tmp_path / "x").rmdir()  # the folder of the other command
    assert {*os.listdir(tmp_path)} == {"x", "x.mine.partial", "y.0123abcd.partial"}


@pytest.mark.parametrize("replace", [True, False])
def test_next_write_removes_what_killed_writes_of_the_same_file_left(tmp_path, replace):
    command = "import os, pathlib; from vidjax.utils import files\n"
    command += "with files.atomic_file(pathlib.Path('x.tsv')): os.kill(os.getpid(), 9)"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", command], cwd=tmp_path)
    mine = ["x.tsv.0123abcd.partial", ".x.tsv.partial", ".y.tsv.0123abcd.partial", "y.partial"]
    for name in mine:
        (tmp_path / name).touch()
    (tmp_path / ".x.tsv.01234567.partial").symlink_to("/dev/zero")
    with files.atomic_file(tmp_path / "x.tsv") as file:  # another command at the same time
        file.write(b"first")
        assert len(os.listdir(tmp_path)) == len(mine) + 2
        files.write_bytes(tmp_path / "x.tsv", b"second", replace=replace)
        if not replace:
            (tmp_path / "x.tsv").unlink()
    assert (tmp_path / "x.tsv").read_bytes() == b"first"
    assert {*os.listdir(tmp_path)} == {"x.tsv", ".x.tsv.01234567.partial", *mine}


def test_error_of_a_full_disk_names_the_file_of_the_user(tmp_path):
    too_large = f"cannot write '{tmp_path}/x.tsv': File too large"
    for before, replace in (({}, False), ({"x.tsv": b"old"}, True)):
        for name, content in before.items():
            files.write_bytes(tmp_path / name, content)
        with limits.file_limit(100), pytest.raises(DiskError, match=too_large):
            files.write_bytes(tmp_path / "x.tsv", bytes(9999), replace=replace)
        assert contents(tmp_path) == before


def test_folder_on_a_disk_without_permissions_is_complete(tmp_path, monkeypatch):
    error = PermissionError(errno.EPERM, "Operation not permitted")  # as on CIFS
    monkeypatch.setattr(os, "chmod", mock.Mock(side_effect=error))
    with files.atomic_folder(tmp_path / "x") as partial:
        (partial / "a.txt").write_text("a")
    assert (tmp_path / "x" / "a.txt").read_text() == "a"


def test_error_of_a_drive_without_locks_names_the_folder_and_where_to_choose_another(
    tmp_path, monkeypatch
):
    error = OSError(errno.ENOSYS, "Function not implemented")  # as on Lustre without `-o flock`
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=error))
    for remedy, lock in (
        ("VIDJAX_CACHE", exclusive(tmp_path / "folder")), ("--workdir=", files.lock(tmp_path)),
        ("--out=", files.lock(tmp_path, "out")), ("--out=", files.lock(tmp_path, "features")),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"'{tmp_path}.*without locks.*\n.*{remedy}"), lock:
            pass


def test_error_without_a_home_names_the_variable_of_the_cache(monkeypatch):
    for variable in ("HOME", "VIDJAX_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", mock.Mock(side_effect=KeyError))
    with pytest.raises(UserError, match="VIDJAX_CACHE"):
        files.cache_root()


@pytest.mark.parametrize(("name", "handler"), [
    ("SIGHUP", "signal.signal(signal.SIGHUP, exit_codes.stop_at_once)"),
    ("SIGUSR1", "signals.end_on_signals()"),  # a thread removes them while the program writes
    # In a run, SIGHUP may be repeated, and SIGTERM is the second signal that ends the process.
    ("SIGTERM", "signals.end_on_signals()\nrun = signals.catch_interruption()\nrun.__enter__()\n"
                "for _ in range(2): signal.raise_signal(signal.SIGHUP)"),
])  # fmt: skip
def test_signal_removes_unfinished_folders(tmp_path, name, handler):
    code = f"""
import os, pathlib, signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` and some machines of tests ignore it
from vidjax.runs import signals
from vidjax.utils import exit_codes, files
{handler}
with files.atomic_folder(pathlib.Path("new")) as new, files.scratch_folder():
    for number in range(500):
        (new / str(number)).touch()
    os.kill(os.getpid(), signal.{name})
    while True:
        (new / "features").touch()
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, timeout=60)
    assert done.returncode == 128 + signal.Signals[name] and os.listdir(tmp_path) == []


def test_reading_refuses_links_and_paths_out_of_a_folder(tmp_path):
    inner, outer = tmp_path / "run" / "inner", tmp_path / "outer"
    for folder in (inner, outer):
        folder.mkdir(parents=True)
        (folder / "x").write_bytes(b"1")
    (tmp_path / "run" / "within").symlink_to(inner)
    (tmp_path / "run" / "out").symlink_to(outer)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for run in (tmp_path / "run", tmp_path / "link"):
        for path in ("inner/x", "within/x"):
            assert files.read_bytes(run / path, limit=9, below=run) == b"1"
        for path in ("out/x", "inner/../../outer/x"):
            read = functools.partial(files.read_bytes, run / path, limit=9, below=run)
            refused(read, "by a copy of that folder")


def test_a_path_that_cannot_be_looked_at_is_not_missing(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for exists in (files.is_file, files.is_present):
        assert not any(exists(tmp_path / name) for name in ("link", "loop/a", "no\0", "file/a"))
        assert exists(tmp_path / "file") and exists(tmp_path) == (exists is files.is_present)
        with pytest.raises(OSError, match="too long"):
            exists(tmp_path / ("x" * 5000))


def test_urls_are_refused_as_folders_and_paths_are_normalised(tmp_path):
    for text in ("s3://bucket/ok", "gs://a", "s3:/bucket"):  # Path("s3://b") is s3:/b
        refused(functools.partial(files.local, text), "copy or mount the files")
        assert files.local(f"./{text}") == tmp_path.cwd() / text
    refused(lambda: files.local("d:/a"), "in WSL")
    for text in ("a:b", "s3", "a/s3://b", "/s3://b", "~/s3://b"):
        files.local(text)
    (tmp_path / "a").mkdir()
    assert files.absolute(tmp_path / "a" / ".." / "b") == tmp_path.resolve() / "b"


@pytest.mark.slow
def test_tensorboard_shows_groups_changed_fields_and_the_last_value_of_repeated_steps(tmp_path):
    """A run is killed after step 3, and resumes from the checkpoint of step 2."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    config = config_lib.default()
    config.update(seed=0, batch_size=7, modalities=("face", "head"))
    for first_step, loss in ((1, 0.5), (3, 9.0)):
        with contextlib.closing(Logs(tmp_path, step=first_step - 1, config=config)) as logs:
            for step in range(first_step, 4):
                logs.metrics(step, {"epoch": 1.0, "learning_rate": 0.1, "train_loss": loss})
            logs.metrics(4, {"epoch": 1.0, "split": "val", "map": 0.5, "test/map": 0.4})
    events = EventAccumulator(str(tmp_path)).Reload()
    values = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert values == [(1, 0.5), (2, 0.5), (3, 9)]
    names = "train/epoch train/learning_rate train/loss val/epoch val/map test/map"
    assert {*events.Tags()["scalars"]} == {*names.split()}
    (content,) = events.PluginTagToContent("hparams").values()
    kind = plugin_data_pb2.HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]
    fields = kind.FromString(content).session_start_info.hparams
    assert {*fields} == {"batch_size", "modalities", "seed"}
    assert fields["batch_size"].number_value == 7
    assert fields["modalities"].string_value == "face,head"


def test_run_that_starts_again_keeps_its_earlier_logs(tmp_path):
    for loss in (0.5, 0.25):
        with contextlib.closing(Logs(tmp_path, step=0)) as logs:
            logs.metrics(1, {"train_loss": loss})
    logged = [(tmp_path / name).read_text() for name in ("metrics.1.jsonl", "metrics.jsonl")]
    assert "0.5" in logged[0] and "0.25" in logged[1]


@pytest.fixture
def items():
    """The content of a checkpoint: name -> tree of arrays."""
    state = {"w": jnp.arange(12.0).reshape(3, 4), "rng": jax.random.key(3)}
    return {"params": {"a": jnp.ones((4, 2))}, "model_state": {}, "train": state}


def restore_latest(workdir, items):
    """Returns the arrays and the manifest of the latest checkpoint."""
    latest: Any = checkpoint.find(workdir)
    layout = devices.replicated_layout(devices.make_mesh())
    return checkpoint.load(latest, items, layout), latest.manifest


def test_restored_checkpoint_equals_the_saved_arrays_and_is_of_the_same_model(tmp_path, items):
    """If a step is saved again, its arrays stay the same, and new facts are added."""
    checkpoint.save(tmp_path, 5, items, {"seconds": 1.5})
    checkpoint.save(tmp_path, 5, {**items, "params": {"a": jnp.zeros((4, 2))}}, {"map": 0.5})
    restored, manifest = restore_latest(tmp_path, items)
    assert (manifest["step"], manifest["seconds"], manifest["map"]) == (5, 1.5, 0.5)
    assert_equal(flat(items), flat(restored))
    assert restored["params"]["a"].sharding.num_devices == 8  # all devices of this process
    for other in (jnp.ones((4, 3)), jnp.ones((4, 2), jnp.bfloat16)):
        with pytest.raises(checkpoint.CheckpointError, match=r"another model(.|\n)*float32\[4, 2"):
            restore_latest(tmp_path, {**items, "params": {"a": other}})


def test_ctrl_c_while_a_checkpoint_is_read_does_not_count_as_damage(tmp_path, items, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    error = KeyError("no handler")
    error.__cause__ = KeyboardInterrupt()  # as Orbax does
    checkpoint.save(tmp_path, 5, items, {})
    monkeypatch.setattr(ocp, "load_checkpointables", mock.Mock(side_effect=error))
    with pytest.raises(KeyboardInterrupt):
        restore_latest(tmp_path, items)


def test_second_ctrl_c_in_a_notebook_raises_keyboard_interrupt_and_keeps_the_process():
    notebook = signal.default_int_handler
    before = signal.signal(signal.SIGINT, notebook)  # tests in the background ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt), signals.catch_interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert interruption.signum == signal.SIGINT
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is notebook
    finally:
        signal.signal(signal.SIGINT, before)


def test_latest_last_evaluated_and_best_checkpoints_are_kept(tmp_path, items):
    evaluated = {"evaluated": True, "map": 0.5}
    for name, facts_of_steps, kept in (
        ("a", [{"map": 0.2}, {"map": 0.9}, {}, {"map": 0.1}], [2, 3, 4]),  # the latest: 3, 4
        ("b", [evaluated, evaluated, {}, {}], [2, 4]),  # the last evaluated, not the second latest
    ):
        for step, facts in enumerate(facts_of_steps, 1):
            checkpoint.save(tmp_path / name, step, items, facts)
        best = checkpoint.find_best(checkpoint.manifests(tmp_path / name))
        assert best == 2  # of equal MAPs, the last
        assert sorted(int(p.name) for p in (tmp_path / name / "checkpoints").iterdir()) == kept


def test_old_checkpoint_in_the_image_of_a_container_is_removed(tmp_path, items, monkeypatch):
    def refuse(old, new, rename=os.rename):
        if os.path.basename(old) == "1":  # OverlayFS cannot rename a folder of an image
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(old))
        rename(old, new)

    checkpoint.save(tmp_path, 1, items, {})
    monkeypatch.setattr(os, "rename", refuse)
    for step in (2, 3):
        checkpoint.save(tmp_path, step, items, {})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
