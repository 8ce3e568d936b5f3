"""Run folders of strangers: links, pipes, bombs and paths in them end in an error and no harm."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.campaigns import mutations
from tests.helpers import made_runs
from tests.helpers.small_runs import ROOT
from vidjax import command_line, devices, ensemble, files, main, ownership
from vidjax import config as config_lib
from vidjax.data.records import codec  # TensorFlow, whose import takes seconds
from vidjax.modes import arguments, check, evaluate, restore
from vidjax.run import checkpoint, results, resume, seal
from vidjax.run import workdir as workdir_lib

IMPORTED = (codec, check, evaluate)  # so that a test measures the reading alone
GB = 1 << 30
RESULTS = ("metrics.json", "metrics.jsonl", "identities.json", "data_report.json", "analysis.npz")
# The files that a mode reads of a folder without checkpoints.
READ = {
    "check": ("metrics.json", "metrics.jsonl", "data_report.json", "analysis.npz", "ranking.txt",
              "config.json", ".lock"),
    "report": (*RESULTS, "config.json"),
    "compare": ("metrics.json", "identities.json", "analysis.npz", "config.json"),
    "evaluate": ("config.json", ".lock"),
}  # fmt: skip
MEASURE = {"value": 0.5, "gap": 0.0}
NEWCOMER = {"shots": 1, "clips": 1.0, "map": MEASURE, "fnir": []}
NEWCOMERS = {
    **dict.fromkeys(("num_newcomers", "num_identities", "num_known", "num_strange"), 1),
    **dict.fromkeys(("resamples", "fewest_identities"), 1),
    "rows": [NEWCOMER], "trained": {"map": MEASURE, "fnir": []},
}  # fmt: skip
DEEP = b"[" * 200_000 + b"]" * 200_000
# Runs a command after its imports, and prints its code, seconds of processor time, and memory.
CHILD = """
import resource, sys, time
from vidjax import main
import jax, numpy, matplotlib.pyplot
from vidjax.modes import check, compare, evaluate, restore
from vidjax.report import run_page
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
code = main.main(sys.argv[1:])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"\\nended {code} {time.process_time() - began:.1f} {(after - before) * 1024}")
"""


@pytest.fixture
def stranger(tmp_path):
    """A folder that looks like that of a finished run."""
    folder = made_runs.write(tmp_path / "theirs", {"anna": 0.5, "ben": 0.7})
    (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0}\n')
    (folder / "ranking.txt").write_text("anna a.mp4\nben b.mp4\n")
    (folder / "data_report.json").write_text('{"splits": {}}')
    (folder / ".lock").write_text("process 1 on host")
    return folder


@pytest.fixture
def victim(tmp_path):
    """A file of the user's, outside of every run."""
    path = tmp_path / "mine.txt"
    path.write_text("mine\n")
    return path


def words_of(mode, folder):
    """Returns the command of a mode on a stranger's folder."""
    if mode != "compare":
        return [f"--mode={mode}", f"--workdir={folder}"]
    own = made_runs.write(folder.parent / "own", {"anna": 0.6, "ben": 0.6})
    return ["--mode=compare", f"--workdir={folder.parent}/out", f"--runs={own},{folder}"]


def run(*words):
    """Runs a command in a process of its own; returns its code, output and peak memory in bytes."""
    command = [sys.executable, "-c", CHILD, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "ended" in done.stdout, done.stderr
    code, seconds, memory = done.stdout.rsplit("ended", 1)[1].split()
    assert float(seconds) < 10, seconds
    assert float(memory) < GB, memory
    assert len(done.stderr.strip().splitlines()) <= 3, done.stderr
    assert "Traceback" not in done.stderr
    return int(code), done.stdout + done.stderr


def complaint(capsys, *words):
    """Runs a command in this process; returns its code and what it says."""
    began = time.process_time()  # the machine may be busy; the alarm ends what hangs
    with mutations.alarm(), warnings.catch_warnings(action="ignore"):
        code = main.main(list(map(str, words)))
    out, err = capsys.readouterr()
    assert time.process_time() - began < 10
    assert len(err.strip().splitlines()) <= 3, err
    assert "Traceback" not in err
    return code, out + err


@pytest.mark.parametrize("mode", ["check", "evaluate", "report", "compare"])
def test_a_lock_that_is_a_link_leaves_its_target_alone(stranger, victim, capsys, mode):
    (stranger / ".lock").unlink()
    (stranger / ".lock").symlink_to(victim)
    _, said = complaint(capsys, *words_of(mode, stranger))
    assert victim.read_text() == "mine\n"
    assert mode in ("report", "compare") or ("'" in said and ".lock" in said)


def test_no_file_is_locked_that_vidjax_did_not_write(tmp_path, victim):
    os.link(victim, tmp_path / ".lock")
    with pytest.raises(ValueError, match="hard links"), workdir_lib.lock(tmp_path):
        pass
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_text("my notes")
    with pytest.raises(ValueError, match=r"move the file elsewhere"), workdir_lib.lock(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "my notes" and victim.read_text() == "mine\n"


@pytest.mark.parametrize("mode", READ)
def test_a_pipe_or_a_link_in_place_of_a_file_is_refused(stranger, capsys, mode):
    words = words_of(mode, stranger)
    for name in READ[mode]:
        path = stranger / name
        kept = path.rename(stranger / "kept")
        os.mkfifo(path)
        code, said = complaint(capsys, *words)
        assert code in (2, 3) and f"{name}' is a pipe" in said, said
        for target in ("/dev/zero", stranger / "kept", stranger / "absent"):
            path.unlink()
            path.symlink_to(target)
            code, said = complaint(capsys, *words)
            assert code in (2, 3) and f"{name}' is a link" in said, said
            assert "put a copy of the file" in said
        path.unlink()
        kept.rename(path)


def test_companions_that_are_pipes_or_links_are_refused(tmp_path):
    """Those that a checkpoint depends on, and the record of changes."""
    for name, read in {
        "identities.json": lambda: restore.load_identities(tmp_path, {}),
        "members.npz": lambda: restore.load_training_sets(tmp_path, {}),
        "changes.jsonl": lambda: resume.record(tmp_path, 1, {"seed": (0, 1)}),
    }.items():
        for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
            make(tmp_path / name)
            with (
                warnings.catch_warnings(action="ignore"),
                pytest.raises((ValueError, checkpoint.CheckpointError), match=name),
            ):
                read()
            (tmp_path / name).unlink()


def test_a_number_that_overflows_a_float_is_one_error(stranger, capsys):
    path = stranger / "config.json"
    values = json.loads(path.read_text())
    values["optim"]["learning_rate"] = 10**400
    path.write_text(json.dumps(values))
    for mode in ("check", "report", "evaluate", "compare"):
        code, said = complaint(capsys, *words_of(mode, stranger))
        assert code in (2, 3) and "config.json" in said and "64 bits" in said, said


@pytest.mark.parametrize("name", ["config", "metrics", "identities", "data_report", "manifest"])
def test_json_nested_deeply_is_one_error(stranger, capsys, name):
    path = stranger / f"{name}.json"
    if name == "manifest":
        path = stranger / "checkpoints" / "1" / "manifest.json"
        path.parent.mkdir(parents=True)
    for content in (DEEP, b"[" * 900 + b"]" * 900, b'{"a":' * 200_000):
        path.write_bytes(content)
        for mode in ("check", "report", "evaluate", "compare"):
            code, said = complaint(capsys, *words_of(mode, stranger))
            if mode == "check" and name != "identities":
                assert code in (2, 3) and path.name in said
    (stranger / "metrics.jsonl").write_bytes(DEEP + b"\n")
    complaint(capsys, *words_of("check", stranger))


def test_a_file_of_endless_size_is_not_read(stranger, capsys):
    for name in (*RESULTS, "ranking.txt", "config.json"):
        path = stranger / name
        content = path.read_bytes()
        os.truncate(path, 30 * GB)
        for mode in ("check", "report", "compare", "evaluate"):
            complaint(capsys, *words_of(mode, stranger))
        with pytest.raises(ValueError, match="too large"):
            files.read_bytes(path, files.ARCHIVE_BYTES)
        path.write_bytes(content)


def bomb(path, gigabytes=8):
    """Writes an archive of a few megabytes that unpacks to gigabytes of zeros."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (gigabytes * GB // 8,)}
    )
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("ap.npy", "w", force_zip64=True) as entry,
    ):
        entry.write(header.getvalue())
        for _ in range(gigabytes * 64):
            entry.write(bytes(GB // 64))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["check", "report", "compare"])
def test_archives_that_unpack_to_gigabytes_are_refused_unread(stranger, mode):
    bomb(stranger / "analysis.npz", gigabytes=2)
    shutil.copy(stranger / "analysis.npz", stranger / "members.npz")
    code, said = run(*words_of(mode, stranger))
    assert code in (2, 3) and "analysis.npz" in said


def test_archives_that_lie_about_their_sizes_are_refused(tmp_path):
    path = tmp_path / "members.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)}
    )
    for content in (header.getvalue(), b"", b"\x93NUMPY\x09\x00"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("trained.npy", content)
        with pytest.raises(ValueError, match=r"members\.npz"):
            ensemble.load(tmp_path)
    np.savez(path, trained=np.array([{}], object))
    with pytest.raises(ValueError, match=r"members\.npz"):
        ensemble.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[]", b'{"map": "<b>"}', b'{"map": 1e999}', b'{"members": 5}'],
)
def test_damaged_metrics_are_named_with_a_remedy_before_data_is_read(stranger, capsys, content):
    (stranger / "metrics.json").write_bytes(content)
    for mode in ("check", "report", "compare"):
        code, said = complaint(capsys, *words_of(mode, stranger))
        assert code in (2, 3)
        assert "metrics.json' is damaged" in said and "--mode=evaluate" in said


def test_a_folder_in_place_of_a_file_is_named(stranger, capsys):
    for name in RESULTS:
        (stranger / name).unlink()
        (stranger / name).mkdir()
        code, said = complaint(capsys, *words_of("report", stranger))
        assert code == 2 and name in said
        (stranger / name).rmdir()


@pytest.mark.parametrize(
    ("values", "arrays"),
    [
        ({"worst": [{"identity": "<script>"}]}, {}),
        (
            {"worst": [{"identity": 10**6, "ap": 0, "clips": 1, "lost_to": [], "mixed_with": []}]},
            {},
        ),
        ({"strata": 5}, {}),
        ({"vectors": ["a"]}, {"attention": np.zeros((5000, 5000), np.float32)}),
        ({"vectors": []}, {"attention": np.zeros((2, 2))}),
        (
            {},
            {"score_edges": np.zeros(3), "score_known": np.zeros(9), "score_strange": np.zeros(2)},
        ),
        ({}, {"ap": np.array(["<b>"]), "positives": np.array([1])}),
        ({}, {"ap": np.array([0.5])}),
        ({"robustness": [{"change": "x", "map": "y"}]}, {}),
        ({"frames": [{"clip": "x"}]}, {}),
    ],
)
def test_an_analysis_of_other_types_and_sizes_is_one_error(stranger, capsys, values, arrays):
    results.save_analysis(stranger / "analysis.npz", {"runs": [], **values}, arrays)
    code, said = complaint(capsys, *words_of("report", stranger))
    assert code == 2 and "--mode=evaluate" in said


@pytest.mark.parametrize(
    "spoilt",
    [
        [1, 2],
        {"reason": "clips"},
        {"reason": ["labels"]},
        {"rows": [NEWCOMER]},
        NEWCOMERS | {"rows": [NEWCOMER | {"map": {"value": 7, "gap": 0}}]},
        NEWCOMERS | {"rows": [NEWCOMER | {"map": {"value": 0.5}}]},
        NEWCOMERS | {"rows": [NEWCOMER | {"shots": "<b>"}]},
        NEWCOMERS | {"rows": [NEWCOMER] * 101},
        NEWCOMERS | {"rows": [NEWCOMER | {"fnir": [MEASURE | {"rate": 0.1}]}]},
        NEWCOMERS | {"trained": {"map": MEASURE, "fnir": [MEASURE]}},
        NEWCOMERS | {"num_newcomers": -1},
    ],
)
def test_newcomers_of_other_types_and_sizes_are_one_error(stranger, capsys, spoilt):
    path, values = stranger / "analysis.npz", {"runs": [], "results": {}}
    results.save_analysis(path, {**values, "newcomers": NEWCOMERS}, {})
    code, said = complaint(capsys, *words_of("report", stranger))
    assert code == 0, said
    assert '<section id="newcomers"' in (stranger / "report.html").read_text()
    results.save_analysis(path, {**values, "newcomers": spoilt}, {})
    code, said = complaint(capsys, *words_of("report", stranger))
    assert code == 2 and "--mode=evaluate" in said, said


def test_logs_and_partial_files_are_not_written_through_links(tmp_path, victim):
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "noise.jsonl"):
        path = tmp_path / "run" / name
        path.symlink_to(victim)
        with pytest.raises(ValueError, match="copy"):
            workdir_lib.open_log(path)
    for name in (f".metrics.json.{os.getpid()}.partial", f".write-test-{os.getpid()}"):
        (tmp_path / "run" / name).symlink_to(victim)
    workdir_lib.write_text(workdir_lib.make_workdir(tmp_path / "run") / "metrics.json", "{}")
    assert victim.read_text() == "mine\n"
    assert (tmp_path / "run" / "metrics.json").read_text() == "{}"


def test_checkpoints_elsewhere_are_neither_read_nor_cleared(tmp_path):
    outside = tmp_path / "outside"
    (outside / "keep").mkdir(parents=True)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in (".partial", ".dropped"):
        (folder / "checkpoints" / name).symlink_to(outside, target_is_directory=True)
    for step in range(1, 6):
        checkpoint.save(folder, step, {"params": {"kernel": np.zeros(3)}}, {})
    assert [path.name for path in outside.rglob("*")] == ["keep"]
    (folder / "checkpoints").rename(tmp_path / "moved")
    (folder / "checkpoints").symlink_to(tmp_path / "moved")
    with pytest.raises(checkpoint.CheckpointError, match="put the folder"):
        checkpoint.find(folder)


def test_a_manifest_names_no_file_outside_and_none_that_is_endless(tmp_path, victim):
    checkpoint.save(tmp_path, 1, {"params": {"kernel": np.zeros(3)}}, {})
    folder = tmp_path / "checkpoints" / "1"
    manifest = checkpoint.read_manifest(folder)
    manifest["files"] = {f"../../../{victim.name}": "0" * 64}
    checkpoint._write_manifest(folder, manifest)
    with pytest.raises(checkpoint.DamagedError, match="outside"):
        checkpoint.verify(folder)
    shard = next(path for path in (folder / "state").rglob("*") if path.is_file())
    manifest["files"] = {str(shard.relative_to(folder / "state")): "0" * 64}
    checkpoint._write_manifest(folder, manifest)
    os.truncate(shard, 30 * GB)
    with pytest.raises(checkpoint.DamagedError, match="too large"):
        checkpoint.verify(folder)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(checkpoint.DamagedError, match="a pipe"):
        checkpoint.verify(folder)


def write_config(folder, *overrides, sealed):
    """Writes a run's `config.json`, by this user's program or by a stranger's."""
    config = config_lib.override(config_lib.default(), overrides)
    folder.mkdir(exist_ok=True)
    if sealed:
        seal.write_config(folder, config)
    else:
        (folder / "config.json").write_text(config_lib.to_json(config))
    return folder


def evaluated(folder, *overrides):
    """Returns the configuration that an evaluation of a folder would use."""
    words = ["--mode=evaluate", f"--workdir={folder}", *overrides]
    return arguments.for_evaluation(command_line.parse(words))[0]


def test_paths_of_a_stranger_need_the_users_word(tmp_path):
    """Those that this user's vidjax wrote need none, wherever the folder of the run is moved."""
    words = ("--config.data.name=arrays", f"--config.data.dir={tmp_path}/data")
    theirs = write_config(tmp_path / "theirs", *words, sealed=False)
    with pytest.raises(ValueError, match=rf"--config\.data\.dir={tmp_path}/data"):
        evaluated(theirs)
    assert evaluated(theirs, "--config.data.dir=other").data.dir == "other"
    own = write_config(tmp_path / "own", *words, sealed=True)
    assert evaluated(own).data.dir == f"{tmp_path}/data"
    assert evaluated(Path(shutil.move(own, tmp_path / "moved"))).data.dir == f"{tmp_path}/data"
    shutil.copy(tmp_path / "moved" / seal.FILE, theirs)  # a seal is of these paths alone
    write_config(theirs, "--config.data.name=arrays", "--config.data.dir=/etc", sealed=False)
    with pytest.raises(ValueError, match=r"--config\.data\.dir"):
        evaluated(theirs)
    joined = write_config(tmp_path / "joined", "--config.join.runs=a,b", sealed=False)
    with pytest.raises(ValueError, match=r"--runs=a,b"):
        evaluated(joined)
    assert evaluated(write_config(joined, "--config.join.runs=a,b", sealed=True)).join.runs


def test_a_foreign_cache_is_not_used(tmp_path):
    """Compiled programs of a stranger would run in this process."""
    words = (f"--config.data.cache_dir={tmp_path}/theirs/cache",)
    theirs = write_config(tmp_path / "theirs", *words, sealed=False)
    with pytest.warns(UserWarning, match=r"--config\.data\.cache_dir="):
        assert evaluated(theirs).data.cache_dir is None
    own = write_config(tmp_path / "own", *words, sealed=True)
    assert evaluated(own).data.cache_dir == f"{tmp_path}/theirs/cache"


@pytest.mark.slow
def test_programs_in_a_strangers_cache_are_not_run(vidjax_command, tmp_path):
    """The folder has a cache of compiled programs, which an evaluation leaves alone."""
    words = (f"--config={ROOT}/configs/knn.py", f"--workdir={tmp_path}/R")
    assert vidjax_command(*words).returncode == 0
    folder = tmp_path / "R"
    cache = folder / "cache"
    config = json.loads((folder / "config.json").read_text())
    config["data"]["cache_dir"] = str(cache)
    (folder / "config.json").write_text(json.dumps(config))
    (cache / "programs").mkdir(parents=True)
    done = vidjax_command("--mode=evaluate", f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    assert "--config.data.cache_dir" in done.stderr
    assert list(cache.rglob("*")) == [cache / "programs"]


@pytest.fixture
def no_programs():
    """No folder of compiled programs is chosen, as in a command that starts."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_where_nobody_else_may_write(tmp_path, no_programs):
    cache = tmp_path / "cache"
    (cache / "programs").mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.warns(UserWarning, match=f"chmod go-w {cache}"):
        devices.keep_programs(cache)
    assert jax.config.values["jax_compilation_cache_dir"] is None
    cache.chmod(0o755)
    (cache / "programs").chmod(0o1777)  # sticky: others may still add a program
    with pytest.warns(UserWarning, match="chmod go-w"):
        devices.keep_programs(cache)
    (cache / "programs").chmod(0o755)
    if os.geteuid() == 0:
        os.chown(cache, 12345, 12345)
        assert ownership.foreign_part(cache / "programs") == cache
        os.chown(cache, 0, 0)
    devices.keep_programs(cache)
    assert f"{cache}/programs/" in str(jax.config.values["jax_compilation_cache_dir"])


def test_a_key_that_others_may_know_seals_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDJAX_CACHE", str(tmp_path / "cache"))
    first = ownership.seal(b"content")
    assert first is not None and ownership.is_sealed(b"content", first)
    assert not ownership.is_sealed(b"other", first)
    key = next((tmp_path / "cache").iterdir())
    assert key.stat().st_mode & 0o777 == 0o600 and key.stat().st_size == 32
    key.chmod(0o644)
    assert not ownership.is_sealed(b"content", first)
    second = ownership.seal(b"content")
    assert second not in (None, first)
    assert next((tmp_path / "cache").iterdir()).stat().st_mode & 0o777 == 0o600


def test_a_relative_folder_is_the_same_from_everywhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = ("--config.data.name=arrays", "--config.data.dir=features")
    run = write_config(tmp_path / "run", *words, sealed=True)
    monkeypatch.chdir(tmp_path)
    assert evaluated(run).data.dir == f"{tmp_path}/here/features"


@pytest.mark.slow
def test_a_finished_run_gets_no_other_configuration(vidjax_command, official_dir, tmp_path):
    words = (
        f"--config={ROOT}/configs/quality_fusion.py:iqiyi_vid", f"--workdir={tmp_path}/run",
        f"--config.data.dir={official_dir}", "--config.num_epochs=1", "--config.batch_size=8",
        "--config.eval.report=False",
    )  # fmt: skip
    assert vidjax_command(*words).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*[!k]")}
    allow = ("--config.optim.learning_rate=0.5", "--config.resume.allow=optim.learning_rate")
    for changes in (allow, allow[:1]):
        done = vidjax_command(*words, *changes)
        assert done.returncode == 2 and "--workdir" in done.stderr
    assert "metrics.json" in {path.name for path in before}
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*[!k]")}


@pytest.mark.slow
def test_random_mutations_of_a_run_end_in_errors(fault_seed, campaign, tmp_path, monkeypatch):
    monkeypatch.setenv("VIDJAX_CACHE", str(tmp_path / "cache"))
    count = 2000 if campaign else 5
    wrong = [t for t in mutations.trials(tmp_path, count, fault_seed, mutations.MODES) if t.wrong]
    assert not wrong
