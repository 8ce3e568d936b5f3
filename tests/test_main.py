"""The command line: exit codes and messages; what people mistype is in campaigns/commands."""

import errno
import json
import subprocess
import sys

import jax
import pytest

from vidjax.runs.checkpoint import CheckpointError
from vidjax.runs.signals import Interrupted
from vidjax.utils import messages
from vidjax.utils.errors import DiskError


def test_debug_shows_the_traceback_of_a_faulty_configuration(command, tmp_path):
    (tmp_path / "mine.py").write_text("raise KeyError('x')")
    code, _, err = command(f"--config={tmp_path}/mine.py", "--debug")
    assert code == 2 and "Traceback" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DiskError("cannot write 'x'"), 2),
        (CheckpointError("none"), 3),
        (Interrupted(15, 3), 143),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (MemoryError(), 2),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2),
        (jax.errors.JaxRuntimeError("INTERNAL: nobody knows"), 1),
        (ModuleNotFoundError("no", name="pyarrow"), 2),
        (ValueError("operands could not be broadcast together"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), 1),
        (ModuleNotFoundError("no", name="vidjax.nothing"), 1),
    ],
)
def test_exit_codes_separate_user_errors_from_faults_of_vidjax(capsys, error, code):
    def command():
        raise error

    assert messages.run_to_exit_code(command, ["--json"]) == code
    captured = capsys.readouterr()
    assert ("Traceback" in captured.err) == (code == 1)
    assert code == 1 or 1 <= len(captured.err.splitlines()) <= 3
    if messages.is_out_of_memory(error):
        for remedy in ("--config.batch_size", "--config.eval.block_size", "--config.data.mode"):
            assert remedy in captured.err
    assert json.loads(captured.out)["error"].strip()


def test_control_characters_are_escaped_before_they_reach_the_terminal(capsys, tmp_path):
    hostile = "x\x1b]0;title\x07\x9b2J\u202egnp.\r\u2028y"
    escaped = r"x\x1b]0;title\x07\x9b2J\u202egnp.\r\u2028y"
    messages.print_text(f"{hostile}\n\tAda علي")
    messages.print_problem(hostile)
    messages.run_to_exit_code(lambda: {}[hostile], [])
    captured = capsys.readouterr()
    assert captured.out == f"{escaped}\n\tAda علي\n"
    assert captured.err.startswith(f"vidjax: {escaped}\n")
    assert not set("\x1b\x07\x9b\u202e\r") & set(captured.err)
    messages.run_to_exit_code((tmp_path / "gone").read_text, [])
    assert f"'{tmp_path}/gone': No such file" in capsys.readouterr().err


def test_vidjax_warnings_of_all_threads_are_printed_but_not_library_warnings():
    code = (
        "import warnings\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from vidjax.utils import errors, messages\n"
        "def main():\n"
        "    ThreadPoolExecutor().submit(errors.warn, 'two of three').result()\n"
        "    warnings.warn('for programmers')\n"
        "    return 0\n"
        "messages.run_main(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "vidjax: warning: two of three\n")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "code"), [("zzz", 2), ("config", 0)])
def test_commands_survive_closed_standard_streams(mode, code):
    for stream in ("2>&-", ">&- 2>&-", "<&-", "2>&1 | head -1"):
        command = f"set -o pipefail; {sys.executable} -m vidjax.main --mode={mode} {stream}"
        words = ["/bin/bash", "-c", command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=100)
        assert done.returncode == code, done
        assert "Traceback" not in done.stdout + done.stderr
