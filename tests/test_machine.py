"""What a process may use of its container, for every form that containers have."""

import os

import pytest

from vidjax.utils import machine

GB = 1 << 30
V1 = "9:name=systemd:/\n4:memory:/pod/one\n3:cpu,cpuacct:/pod/one\n0::/\n"
V2 = "0::/pod/one\n"


@pytest.mark.parametrize(
    ("groups", "files", "most", "free", "cores"),
    [
        (None, {}, None, None, None),  # no Linux
        (V2, {
            "memory.max": "max\n",
            "pod/one/memory.max": f"{GB >> 6}\n",
            "pod/one/memory.current": f"{GB >> 7}\n",
            "pod/one/memory.stat": f"anon 5\ninactive_file {GB >> 8}\n",
            "pod/one/cpu.max": "max 100000\n",
            "pod/cpu.max": "80000 100000\n",
        }, GB >> 6, (GB >> 7) + (GB >> 8), 1),
        (V2, {"memory.max": f"{GB >> 6}\n"}, GB >> 6, GB >> 6, None),  # seen as top
        (V1, {
            "memory/pod/one/memory.limit_in_bytes": f"{1 << 63}\n",
            "memory/pod/memory.limit_in_bytes": f"{GB >> 6}\n",
            "memory/pod/memory.usage_in_bytes": f"{GB >> 7}\n",
            "cpu/pod/one/cpu.cfs_quota_us": "50000\n",
            "cpu/pod/one/cpu.cfs_period_us": "100000\n",
        }, GB >> 6, GB >> 7, 1),
    ],
)  # fmt: skip
def test_memory_and_cores_are_read_from_the_cgroups_of_a_container(
    tmp_path, groups, files, most, free, cores
):
    texts = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    texts |= {"proc/self/cgroup": groups} if groups else {}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.memory_bytes(tmp_path) == (most or physical)
    assert machine.free_bytes(tmp_path) == (free or 0)
    assert machine.num_cores(tmp_path) == (cores or len(os.sched_getaffinity(0)))
