"""Folders that a stranger has sent: links, pipes, enormous files and paths in them are errors."""

import json
import os
import shutil
import time
import warnings
from typing import Any

import jax
import numpy as np
import pytest

from tests.campaigns import mutations
from tests.helpers import limits, made_runs
from tests.helpers.cases import quick_first
from tests.helpers.clip_files import write_labels, write_npz
from tests.helpers.datasets import load_dataset
from tests.helpers.seen import contents, refused
from vidjax.cli import program, run_commands
from vidjax.core import devices
from vidjax.runs import checkpoint, config as config_lib, config_io, programs, results
from vidjax.runs.run_folder import RunFolder
from vidjax.training import public
from vidjax.utils import files

RESULTS = ("metrics.json", "metrics.jsonl", "identities.json", "analysis.npz")
# Mode -> the files that it reads in a folder without checkpoints.
READ = {
    "check": ("config.json",), "report": (*RESULTS, "config.json"),
    "compare": ("metrics.json", "identities.json", "analysis.npz", "config.json"),
    "evaluate": ("config.json", ".lock"),
}  # fmt: skip


@pytest.fixture
def stranger(tmp_path):
    """A folder that looks like the folder of a finished run."""
    folder = made_runs.write(tmp_path / "theirs", {"anna": 0.5, "ben": 0.7})
    (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0}\n')
    (folder / "data_report.json").write_text('{"splits": {}}')
    (folder / ".lock").write_text("process 1 on host")
    return folder


@pytest.fixture
def complaint(command):
    """Runs a mode on a folder, in less than 10 s, with a short error; returns code and output."""

    def run(mode, folder):
        words = [f"--mode={mode}", f"--workdir={folder}"]
        if mode == "compare":
            own = made_runs.write(folder.parent / "own", {"anna": 0.6, "ben": 0.6})
            words = ["--mode=compare", f"--workdir={folder.parent}/out", f"--runs={own},{folder}"]
        began = time.process_time()  # CPU time; the alarm ends a mode that waits for a file
        with mutations.alarm(), warnings.catch_warnings(action="ignore"):
            done = command(*words)
        assert time.process_time() - began < 10 * limits.slowness()
        assert len(done.err.strip().splitlines()) <= 3 and "Traceback" not in done.err
        return done.code, done.out + done.err

    return run


def test_locks_logs_and_results_overwrite_no_file_of_the_user(tmp_path):
    """The user's file has a name of vidjax, or vidjax's name is a link to the user's file."""
    lock, empty = tmp_path / ".lock", tmp_path / "empty"
    lock.write_text("my notes")
    with pytest.raises(ValueError, match=r"move the file elsewhere"), files.lock(tmp_path):
        pass
    assert lock.read_text() == "my notes"
    lock.unlink()
    empty.touch()
    os.link(empty, lock)  # a hard link: both names are the same file
    with files.lock(tmp_path):
        assert not empty.read_text()  # the lock is a new file
    victim = tmp_path / "mine.txt"
    victim.write_text("mine\n")
    for name in ("timing.jsonl", "metrics.json"):
        (tmp_path / name).symlink_to(victim)
    refused(lambda: files.open_log(tmp_path / "timing.jsonl"), "copy")  # appending would change it
    files.write_text(files.make_folder(tmp_path) / "metrics.json", "{}")  # replaces the link
    assert (tmp_path / "metrics.json").read_text() == "{}"
    os.link(victim, tmp_path / "metrics.jsonl")
    with files.open_log(tmp_path / "metrics.jsonl") as log:
        files.append(log, b"more\n")  # to a copy of the hard link's file
    assert victim.read_text() == "mine\n"
    assert (tmp_path / "metrics.jsonl").read_text() == "mine\nmore\n"


@pytest.mark.parametrize("mode", quick_first(READ, 2))
def test_every_mode_refuses_a_pipe_link_or_folder_in_place_of_a_file(stranger, complaint, mode):
    a_link = ("' is a link", "by a copy of its target")
    # Kind of `mutations.put` -> words of the error. "zero" is a link to /dev/zero.
    words = {"pipe": ["' is a pipe"], "link": a_link, "zero": a_link, "folder": []}
    for name in READ[mode]:
        path = stranger / name
        kept = path.rename(stranger / "kept")
        content = kept.read_bytes()
        for kind, expected in words.items():
            mutations.put(path, kind, target=kept)
            code, output = complaint(mode, stranger)
            assert code in (2, 3) and name in output, output  # 3: no usable checkpoint
            assert all(word in output for word in expected), output
        assert kept.read_bytes() == content
        path.rmdir()  # the last kind is a folder
        kept.rename(path)


@pytest.mark.parametrize("name", quick_first([
    "metrics.json", "config.json", "checkpoints/1/manifest.json", "data_report.json", *RESULTS[1:],
], 3))  # fmt: skip
def test_deeply_nested_json_and_json_of_30_gb_end_in_short_errors(stranger, complaint, name):
    """`complaint` checks the errors. A mode may succeed if it does not read the file."""
    path = stranger / name
    path.parent.mkdir(parents=True, exist_ok=True)
    modes = [mode for mode in READ if name in READ[mode]] or ["evaluate"]
    path.write_bytes(b"[" * 200_000 + b"]" * 200_000)
    for mode in modes:
        complaint(mode, stranger)
    if path.suffix != ".jsonl":
        mutations.put(path, "sparse", path)  # 30 GB of holes
        for mode in modes:
            complaint(mode, stranger)
        refused(lambda: files.read_bytes(path, 128 * files.MB), "too large")


@pytest.mark.slow
def test_analysis_that_unpacks_to_256_mb_is_refused_before_it_is_unpacked(stranger, complaint):
    np.savez_compressed(stranger / "analysis.npz", ap=np.zeros(1 << 25))  # 8 bytes each
    with limits.traced_memory() as peak:
        code, output = complaint("report", stranger)
    assert code == 2 and "analysis.npz" in output and peak[0] < 64 * files.MB


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe", b"[]", b'{"\\ud800": 1}', b'{"map": 1e999}', b'{"map": "high"}',
    b'{"threshold_at_fpir_0.01": NaN}',  # no score reaches NaN, so everybody would be unknown
])  # fmt: skip
def test_error_for_damaged_metrics_suggests_to_evaluate_again(stranger, complaint, content):
    (stranger / "metrics.json").write_bytes(content)
    for mode in ("report", "compare"):
        code, output = complaint(mode, stranger)
        assert code == 2 and "metrics.json' is damaged" in output and "vidjax evaluate" in output


def test_report_refuses_an_analysis_with_wrong_types_or_sizes(stranger, complaint):
    # An identity that does not exist. The run in `stranger` has 2 identities, 50 clips.
    worst = {"identity": 10**6, "ap": 0, "clips": 1, "lost_to": [], "mixed_with": []}
    cases: list[tuple[dict[str, Any], dict[str, np.ndarray]]] = [
        ({"worst": [worst]}, dict.fromkeys(("ap", "positives", "train_clips"), np.ones(2))),
        ({"worst": 5}, {}), ({}, dict.fromkeys(("ap", "positives"), np.ones((2, 1)))),
        ({}, {"ap": np.array([0.5])}),
    ]  # fmt: skip
    for values, arrays in cases:
        results.save_analysis(stranger / "analysis.npz", values, arrays)
        code, output = complaint("report", stranger)
        assert code == 2 and "vidjax evaluate" in output  # which writes the analysis again


def test_checkpoints_behind_a_link_are_neither_read_nor_deleted(tmp_path):
    outside, place = tmp_path / "outside", tmp_path / "run" / "checkpoints"
    (outside / "keep").mkdir(parents=True)
    place.mkdir(parents=True)
    # A save writes to `.partial`, and renames it at the end. Here, `.partial` is a link.
    for step in range(1, 3):
        (place / ".partial").symlink_to(outside, target_is_directory=True)
        save(place.parent, step)
    assert [path.name for path in outside.rglob("*")] == ["keep"]
    real, link = save(tmp_path / "other", 3), place / "3"  # the checkpoint of step 3 is a link
    before = contents(real)
    link.symlink_to(real)
    with pytest.raises(checkpoint.DamagedError, match="is a link"):
        checkpoint.verify(link)
    assert load_latest(place.parent) == 2
    checkpoint.save(place.parent, 3, ITEMS, {"map": 0.5})
    assert not link.is_symlink() and contents(real) == before
    place.rename(tmp_path / "moved")  # the folder of all checkpoints is a link
    place.symlink_to(tmp_path / "moved")
    with pytest.raises(checkpoint.CheckpointError, match="replace the link by a copy"):
        checkpoint.find(place.parent)


ITEMS = {"params": {"kernel": np.arange(3.0, dtype=np.float32)}}


def save(folder, *steps):
    """Saves checkpoints; returns the folder of the last checkpoint."""
    for step in steps:
        checkpoint.save(folder, step, ITEMS, {})
    return folder / "checkpoints" / str(steps[-1])


def load(saved):
    checkpoint.load(saved, ITEMS, devices.replicated_layout(devices.make_mesh(1)))


def load_latest(folder):
    """Loads the latest undamaged checkpoint; returns its step."""
    with mutations.alarm(), warnings.catch_warnings(action="ignore"):
        latest: Any = checkpoint.find(folder)
        load(latest)
        return latest.manifest["step"]


@pytest.mark.parametrize(
    "link", quick_first([pytest.param("state/sub", id="folder"), pytest.param("", id="checkpoint")])
)
def test_deleting_old_checkpoints_deletes_nothing_behind_a_link(tmp_path, link):
    """A stranger's checkpoint, or its folder `state/sub`, is a link to the user's folder."""
    outside, folder = tmp_path / "outside", tmp_path / "run"
    (outside / "sub").mkdir(parents=True)
    for name in ("thesis.tex", "sub/photo.jpg"):
        (outside / name).write_text("mine")
    theirs = save(folder, 1, 0)
    manifest = checkpoint.read_manifest(theirs)
    manifest["files"] = dict.fromkeys(("thesis.tex", "sub/thesis.tex", "sub/photo.jpg"), "0" * 64)
    files.write_manifest(theirs / "manifest.json", manifest)
    shutil.copy(theirs / "manifest.json", outside)  # lists files of the user as its own
    (outside / "state").symlink_to(outside)  # so that `outside` looks like a whole checkpoint
    shutil.rmtree(theirs / "state" if link else theirs)
    (theirs / link).parent.mkdir(exist_ok=True)
    (theirs / link).symlink_to(outside, target_is_directory=True)
    before = contents(outside)
    # A deletion moves a step to `.partial` first. A later save deletes what is left there.
    shutil.copytree(theirs, folder / "checkpoints" / ".partial" / "0", symlinks=True)
    save(folder, 2, 3, 4)  # each save deletes `.partial` and old steps
    assert load_latest(folder) == 4 and contents(outside) == before


def test_checkpoint_with_a_pipe_link_device_or_file_outside_is_damaged(tmp_path):
    """Orbax, which reads checkpoints, would wait forever for a pipe or the end of /dev/zero."""
    for number, (name, kind, words) in enumerate((
        ("new/.zarray", "zero", r"\.zarray"),  # not listed in the manifest
        ("new/.zarray", "link", r"\.zarray"), ("", "pipe", "a pipe"),  # the last is listed
        ("../../../mine.txt", "", "is missing"),  # the manifest lists an existing file outside
    )):  # fmt: skip
        folder = save(tmp_path / f"{number}/run", 1)
        manifest = checkpoint.read_manifest(folder)
        path = folder / "state" / (name or max(manifest["files"]))
        path.parent.mkdir(exist_ok=True)
        if kind:
            mutations.put(path, kind, tmp_path)
        else:
            path.write_text("mine")
            manifest["files"][name] = "0" * 64
            files.write_manifest(folder / "manifest.json", manifest)
        saved = checkpoint.Checkpoint(folder, manifest)
        for read in (lambda: checkpoint.verify(folder), lambda: load(saved)):  # noqa: B023
            with pytest.raises(checkpoint.DamagedError, match=words), mutations.alarm():
                read()


def read_train_clips(cache):
    """Converts a folder of clips to a cache, or opens the cache; reads the clips."""
    with mutations.alarm(), warnings.catch_warnings(action="ignore"):
        data = load_dataset("arrays", directory=cache.parent / "features", cache_dir=cache)
        list(data.packed("train", ("face",)))


@pytest.fixture
def cache(tmp_path):
    """A cache with made-up clips."""
    face = {"face": np.arange(8, dtype="f4").reshape(2, 4)}
    splits = {x: {f"{x}_{i}": face for i in range(3)} for x in ("train", "val")}
    folder = write_npz(tmp_path / "features", splits)
    write_labels(folder / "labels.csv", {"train_0": "p", "val_0": "p"})
    read_train_clips(tmp_path / "cache")
    return tmp_path / "cache"


def test_shared_cache_with_pipes_links_or_damaged_files_is_refused(tmp_path, cache):
    for name in ("manifest.json", "index.npz", "data_report.json", "train/face/features.bin"):
        (path,) = cache.rglob(name)
        kept = path.read_bytes()
        (tmp_path / "kept").write_bytes(kept)
        for kind in ("pipe", "zero", "link", "folder"):
            mutations.put(path, kind, tmp_path / "kept")
            refused(lambda: read_train_clips(cache), "delete")
            path.rmdir() if kind == "folder" else path.unlink()
        flipped = bytes([*kept[:-30], kept[-30] ^ 1, *kept[-29:]])  # one bit differs
        for damaged in (flipped, kept[:-30], kept + b"x", b"{}", b"[" * 100_000):
            path.write_bytes(damaged)
            refused(lambda: read_train_clips(cache), path.name, "delete")
        path.write_bytes(kept)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())  # of all conversions
    theirs = folder.rename(tmp_path / "theirs")
    folder.symlink_to(theirs)
    before = contents(theirs)
    refused(lambda: read_train_clips(cache), "is a link")
    assert contents(theirs) == before


def test_hostile_manifest_of_stored_clips_with_a_valid_checksum_is_refused(cache):
    (path,) = cache.rglob("manifest.json")
    content = path.read_text()
    for change in (
        lambda m, train, face: m["modalities"]["face"].update(dim=1 << 40),
        lambda m, train, face: train.update(modalities={"../../face": face}),
        lambda m, train, face: train.update(modalities=5),
        lambda m, train, face: face.update(dtype="object"),
        lambda m, train, face: face["files"]["features"].update(size=1 << 40),
        lambda m, train, face: m.update(files={}),
    ):
        values = json.loads(content)
        del values["sha256"]
        train = values["splits"]["train"]
        change(values, train, train["modalities"]["face"])
        files.write_manifest(path, values)  # with a new checksum
        refused(lambda: read_train_clips(cache), "to convert again")


def test_config_of_a_run_folder_with_a_value_of_a_wrong_type_is_refused(stranger, complaint):
    values = json.loads((stranger / "config.json").read_text())
    (stranger / "config.json").write_text(json.dumps(values | {"batch_size": None}))
    for mode in ("check", "evaluate"):
        code, output = complaint(mode, stranger)
        assert code == 2 and "configuration has config.batch_size=None, not a value such" in output


def test_cache_folder_in_the_configuration_of_a_run_folder_is_ignored(tmp_path, monkeypatch):
    """A cache contains compiled programs. If a stranger names it, the programs are hostile."""
    theirs, cache = tmp_path / "theirs", f"--config.data.cache_dir={tmp_path}/theirs/cache"
    config = config_io.override(config_lib.default(), [cache])
    theirs.mkdir()
    (theirs / "config.json").write_text(config_io.to_json(config))
    # Only a flag of the user decides.
    for flags, wanted in (([], None), ([cache], f"{tmp_path}/theirs/cache")):
        args = program.parse(["--mode=evaluate", f"--workdir={theirs}", *flags])
        read, _ = run_commands.read_evaluate_settings(args)
        assert read.data.cache_dir == wanted
    # A run of the user does not store the folder of the cache. Other paths become absolute.
    monkeypatch.chdir(theirs)
    words = ("--config.data.dir=features", "--config.data.weights=weights.txt")
    RunFolder(theirs).write_config(config_io.override(config, words))
    monkeypatch.chdir(tmp_path)
    data = config_io.load_workdir(theirs).data
    assert (data.dir, data.weights) == (f"{theirs}/features", f"{theirs}/weights.txt")
    assert "cache" not in str(data.cache_dir)


def test_compiled_programs_are_cached_only_where_other_users_cannot_write(tmp_path, request):
    cache, before = tmp_path / "cache", jax.config.values["jax_compilation_cache_dir"]
    request.addfinalizer(lambda: jax.config.update("jax_compilation_cache_dir", before))
    jax.config.update("jax_compilation_cache_dir", None)  # as at the start of a command
    (cache / "programs").mkdir(parents=True)
    cache.chmod(0o777)  # other users may add a program
    with pytest.warns(UserWarning, match=f"chmod go-w {cache}") as warned:
        programs.cache_programs(cache)
    assert jax.config.values["jax_compilation_cache_dir"] is None
    # In some containers, the folder `/` belongs to nobody, so every cache folder is refused. The
    # warning names the variable with which the user can choose a folder anyway.
    assert "JAX_COMPILATION_CACHE_DIR" in str(warned[0].message)
    cache.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(cache, 12345, 12345)  # the folder belongs to another user
        assert files.find_foreign_folder(cache / "programs") == cache
        os.chown(cache, 0, 0)
    words = [f"--config.data.cache_dir={cache}"]
    public.set_up_devices(config_io.override(config_lib.default(), words))
    assert f"{cache}/programs/" in str(jax.config.values["jax_compilation_cache_dir"])
