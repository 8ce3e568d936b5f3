"""Conversion by several processes, and limits of processes and machines."""

import functools
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import clip_files, limited_job
from tests.helpers.cases import nightly_after_first
from tests.helpers.datasets import record_digests
from tests.helpers.limits import traced_memory
from vidjax.data import arrays, iqiyi_vid, store
from vidjax.data.iqiyi_vid import OfficialFiles
from vidjax.data.store import convert
from vidjax.utils import files, machine, processes
from vidjax.utils.errors import DiskError, UserError

MB = 1 << 20
OUTPUT_BYTES = 8 * MB  # a job that floods its parent prints 64 MB
# Control groups (cgroups) of a process, versions 1 and 2.
V1 = "9:name=systemd:/\n4:memory:/pod/one\n3:cpu,cpuacct:/pod/one\n0::/\n"
V2 = "0::/pod/one\n"
FEW = {"train": 24, "val": 16, "test": 12}
SOME = {x: clip_files.as_arrays(clips) for x, clips, _ in clip_files.learnable_clips(6, FEW)}
for some in SOME.values():
    for field, every in (("features", 7), ("detection", 11), ("quality", 6)):
        for clip in [*some][2::every]:
            some[clip]["face"][field][:1] = np.nan


@pytest.mark.slow
@nightly_after_first("kind", ["npz", "pickles"])
def test_two_cores_convert_to_the_same_bytes_as_one(kind, tmp_path, monkeypatch):
    folder, reader = tmp_path / "source", arrays.FeatureFolder
    folder.mkdir()
    if kind == "npz":
        clip_files.write_npz(folder, SOME)
    else:
        clip_files.write_learnable(folder, num_clips=FEW)
        reader = OfficialFiles
    found = []
    for count in (1, 2):
        for module in (store, iqiyi_vid):
            monkeypatch.setattr(module, "num_cores", lambda count=count: count)
        found.append(record_digests(convert(reader(folder), tmp_path / str(count)).folder))
    assert found[0] == found[1]
    assert len(found[0]) > 10  # each of three splits has 4 files, and there are 3 other files


def test_digest_of_a_file_written_within_a_clock_tick_is_not_kept(tmp_path, monkeypatch):
    """Two writes within a tick of the clock change neither the inode nor the size and times."""
    path, sha256_file, tick = tmp_path / "a.npz", files.sha256_file, 10**8
    path.write_bytes(b"1")
    monkeypatch.setattr(store, "TICK_NS", tick)
    changed = time.time_ns()
    monkeypatch.setattr(store, "_read_file_state", lambda path: (1, 1, changed, changed))

    def slow_sha256_file(path):
        time.sleep(2 * tick / 10**9)  # the tick in which the file changed is over
        return sha256_file(path)

    monkeypatch.setattr(files, "sha256_file", slow_sha256_file)
    first = store.digest_files([path], tmp_path / "cache")
    path.write_bytes(b"2")
    assert store.digest_files([path], tmp_path / "cache") != first


def test_file_that_changes_during_the_conversion_is_refused(tmp_path):
    folder = clip_files.write_npz(tmp_path / "source", SOME)
    clip = max((folder / "val").iterdir())

    class ChangingFolder(arrays.FeatureFolder):
        def read(self, folder):
            features, stat = super().read(folder), clip.stat()
            clip.write_bytes(clip.read_bytes()[:-1] + b"\1")
            os.utime(clip, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the times stay the same
            return features

    with pytest.raises(ValueError, match="changed while they were converted"):
        convert(ChangingFolder(folder), tmp_path)


def test_failure_of_one_process_ends_the_other_processes():
    def work(children, item):
        if item == "fails":
            time.sleep(0.3)  # the process of "waits" has begun
            unread = bytes(1 << 20)  # the child ends before
            children.run("code", given=b"import os; os._exit(0)\n" + unread, timeout=9)
            raise ValueError("a file is damaged")
        children.run("code", given=b"import time; time.sleep(60)\n", timeout=60)

    began = time.monotonic()
    with pytest.raises(ValueError, match="a file is damaged"):
        processes.map_children(work, ["waits", "fails", "begins late"], 2)
    assert time.monotonic() - began < 10


# `tests/helpers/limited_job.py` does what is `wanted` in a process with limits.
run_each = functools.partial(
    processes.run_limited_each, limited_job.__name__, kind=dict, memory_bytes=1 << 31
)


def run(wanted, **more):
    limits: Any = {"memory_bytes": 1 << 31, "cpu_seconds": 20, "output_bytes": OUTPUT_BYTES}
    given = {"wanted": wanted, **more}
    return processes.run_limited(limited_job.__name__, Path("film.mp4"), given, dict, **limits)


def test_a_limited_job_gets_arguments_but_no_secret_variables(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("LC_MESSAGES", "C")
    answer = run("echo", name="Zoë")
    assert answer["arguments"] == {"wanted": "echo", "name": "Zoë"}
    variables = answer["environment"]
    assert "AWS_SECRET_ACCESS_KEY" not in variables
    assert variables["PATH"] == os.environ["PATH"] and variables["LC_MESSAGES"] == "C"


@pytest.mark.parametrize("results", [False, True], ids=["errors", "results"])
def test_output_of_a_job_cannot_fill_the_memory_of_the_parent(results):
    with traced_memory() as peak, pytest.raises(UserError, match=r"film\.mp4"):
        run("flood", results=results)
    assert peak[0] < (4 if results else 0.1) * OUTPUT_BYTES


def test_failures_of_limited_jobs_have_a_cause_and_do_not_affect_other_jobs(tmp_path):
    """After a crash, a new process does the next jobs."""
    failed = [  # what jobs of one call do, and their errors
        ("time", UserError, r"0' is refused.* 1 s of CPU time"), ("process", dict, ""),
        ("memory", UserError, "2' is refused.* 2,048 MB"),
        ("mistake", UserError, r"^film\.mp4: give another film$"),
        ("disk", UserError, "4' is refused.* file of more than 2,048 MB"),
        ("missing", DiskError, r"nowhere(.|\n)*correct the path"),
        ("crash", UserError, "6' is damaged or hostile: .* SIGABRT"),
        ("bug", UserError, r"7: .*KeyError(.|\n)*report it"), *[("process", dict, "")] * 2,
    ]  # fmt: skip
    jobs = ({"wanted": job, "file": str(tmp_path / "file")} for job, _, _ in failed)
    given = [(Path(f"{number}"), job) for number, job in enumerate(jobs)]
    answers = run_each(given, cpu_seconds=1, writes=[tmp_path])
    for answer, (_, kind, message) in zip(answers, failed, strict=True):
        assert isinstance(answer, kind), answer
        if not isinstance(answer, dict):
            assert re.search(message, text := str(answer)) and len(text.splitlines()) <= 3
    (first, *ids) = [answer["process"] for answer in answers if isinstance(answer, dict)]
    assert first not in ids and len({*ids}) == 1


@pytest.mark.slow
def test_cpu_time_is_limited_for_each_job():
    """The limit of the second job begins after the second of CPU time of the first job."""
    given = [(Path("film.mp4"), {"wanted": "work"})] * 2
    assert [*run_each(given, cpu_seconds=2)] == [{"limit": 2}, {"limit": 3}]


@pytest.mark.parametrize("text", ["no JSON", "[1]", "{}", '{"result": 1}', "[" * 200_000])
def test_job_that_prints_no_result_is_an_error(text, monkeypatch):
    if text != "no JSON":  # otherwise a child prints it
        ended = subprocess.CompletedProcess([], 0, f"{text}\n".encode(), b"")
        monkeypatch.setattr(processes.Children, "run", lambda *_, **__: ended)
    with pytest.raises(UserError, match=r"film\.mp4' is damaged or hostile: .* no usable result"):
        run("print")


@pytest.mark.parametrize(("groups", "files", "limit", "free", "cores"), [
    (None, {}, None, None, None),  # not Linux
    (V2, {
        "memory.max": "max", "pod/one/memory.max": 16 * MB, "pod/one/memory.current": 8 * MB,
        "pod/one/memory.stat": f"anon 5\ninactive_file {4 * MB}",
        "pod/one/cpu.max": "max 100000", "pod/cpu.max": "80000 100000",  # 0.8 cores
    }, 16 * MB, (16 - 8 + 4) * MB, 1),  # memory of inactive files is free
    (V2, {"memory.max": 16 * MB}, 16 * MB, 16 * MB, None),  # the container sees only its own group
    (V1, {
        "memory/pod/one/memory.limit_in_bytes": 1 << 63,  # no limit
        "memory/pod/memory.limit_in_bytes": 16 * MB, "memory/pod/memory.usage_in_bytes": 8 * MB,
        "cpu/pod/one/cpu.cfs_quota_us": 50000, "cpu/pod/one/cpu.cfs_period_us": 100000,
    }, 16 * MB, 8 * MB, 1),  # half a core is rounded up
])  # fmt: skip
def test_memory_and_cores_are_read_from_cgroups(tmp_path, groups, files, limit, free, cores):
    texts = {f"sys/fs/cgroup/{name}": f"{value}\n" for name, value in files.items()}
    if groups:
        texts["proc/self/cgroup"] = groups
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    # Without limits, the values of the machine count. Its free memory is not known, which gives 0.
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.memory_bytes(tmp_path) == (limit or physical)
    assert machine.free_bytes(tmp_path) == (free or 0)
    assert machine.num_cores(tmp_path) == (cores or len(os.sched_getaffinity(0)))
