"""limits: jobs in child processes that ask for too much, crash, or are refused."""

import sys
import threading
from pathlib import Path

import pytest

from tests.helpers import limited_job
from vidjax.data import processes
from vidjax.data.processes import Children
from vidjax.utils.errors import DiskError, UserError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
FILM = Path("film.mp4")


def run(wanted, cpu_seconds=20, children=None, **more):
    return processes.run_limited(
        limited_job.__name__, FILM, {"wanted": wanted, **more},
        memory_bytes=1 << 31, cpu_seconds=cpu_seconds, children=children,
    )  # fmt: skip


@LINUX
def test_a_limited_job_gets_arguments_but_no_sockets_or_programs():
    answer = run("echo", name="Zoë")
    assert answer["arguments"] == {"wanted": "echo", "name": "Zoë"}
    assert answer["refused"] == ["socket", "program"]


@pytest.mark.parametrize(
    ("wanted", "kind", "message"),
    [
        pytest.param("memory", UserError, r"film\.mp4.* 2,048 MB", marks=LINUX),
        ("time", UserError, r"film\.mp4: .* 1 s of CPU time"),
        ("crash", UserError, r"film\.mp4: damaged or hostile: .* SIGABRT"),
        ("bug", UserError, r"film\.mp4: .*KeyError(.|\n)*report it"),
        ("mistake", UserError, r"^film\.mp4: give another film$"),
        ("missing", DiskError, r"nowhere(.|\n)*is the path right"),
    ],
)
def test_failures_of_limited_jobs_report_film_and_cause(wanted, kind, message):
    with pytest.raises(kind, match=message) as caught:
        run(wanted, cpu_seconds=1 if wanted == "time" else 20)
    assert len(str(caught.value).splitlines()) <= 3


def test_stopping_children_kills_their_running_jobs():
    children = Children()
    threading.Timer(0.3, children.stop).start()
    with pytest.raises(UserError, match="killed its reader"):
        run("time", cpu_seconds=60, children=children)
