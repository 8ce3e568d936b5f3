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


def run(wanted, memory_bytes=1 << 31, cpu_seconds=20, **more):
    return processes.run_limited(
        limited_job.__name__,
        FILM,
        {"wanted": wanted, **more},
        memory_bytes=memory_bytes,
        cpu_seconds=cpu_seconds,
    )


def test_a_job_gets_arguments_and_returns_its_answer():
    assert run("echo", name="Zoë") == {"arguments": {"wanted": "echo", "name": "Zoë"}}


@LINUX
def test_memory_is_limited():
    with pytest.raises(UserError, match=r"film\.mp4.* 1,024 MB"):
        run("memory", memory_bytes=1 << 30)


def test_time_is_limited():
    with pytest.raises(UserError, match=r"film\.mp4: .* 1 s of CPU time"):
        run("time", cpu_seconds=1)


@LINUX
def test_no_connection_and_no_program_is_opened():
    assert run("connections") == {"socket": True, "program": True}


@pytest.mark.parametrize(
    ("wanted", "kind", "told"),
    [
        ("crash", UserError, r"film\.mp4: damaged or hostile: .* SIGABRT"),
        ("bug", UserError, r"film\.mp4: .*KeyError(.|\n)*report it"),
        ("mistake", UserError, r"^film\.mp4: give another film$"),
        ("missing", DiskError, r"nowhere(.|\n)*is the path right"),
    ],
)
def test_errors_are_told(wanted, kind, told):
    with pytest.raises(kind, match=told) as caught:
        run(wanted, path="nowhere")
    assert len(str(caught.value).splitlines()) <= 3


def test_a_killed_group_ends_its_jobs():
    children = Children()
    threading.Timer(1.0, children.stop).start()
    with pytest.raises(UserError, match="killed its reader"):
        processes.run_limited(
            limited_job.__name__,
            FILM,
            {"wanted": "time"},
            memory_bytes=1 << 31,
            cpu_seconds=60,
            children=children,
        )


def test_the_reader_of_films_imports_no_jax(python):
    code = (
        "import sys, vidjax.data.processes, vidjax.apps.video.align, vidjax.apps.video.decode, "
        "vidjax.apps.video.shots, vidjax.apps.video.tracks; "
        "print({'av', 'jax', 'tensorflow', 'torch'} & set(sys.modules))"
    )
    assert python(code) == "set()\n"
