"""The command line: exit codes and messages; what people mistype is in campaigns/commands."""

import errno
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from vidjax.cli.program import main
from vidjax.evaluation import ranking
from vidjax.runs import config_io
from vidjax.runs.checkpoint import CheckpointError
from vidjax.runs.run_folder import RunFolder
from vidjax.runs.signals import Interrupted
from vidjax.utils import messages
from vidjax.utils.errors import DiskError, NoFileError, UserError

SHRUNK = (
    "--config.batch_size=32",
    "--config.num_epochs=2",
    "--config.model.embed_dim=16",
    "--config.model.num_clusters=2",
    "--config.eval.block_size=32",
)


def test_a_fault_of_a_configuration_shows_its_traceback_with_debug(command, tmp_path):
    (tmp_path / "mine.py").write_text("raise KeyError('x')")
    code, _, err = command(f"--config={tmp_path}/mine.py", "--debug")
    assert code == 2 and "Traceback" in err


def raising(error):
    def command():
        raise error

    return command


def test_a_recorded_configuration_starts_another_run(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    config = config_io.override(config_io.load_file("knn"), ["--config.seed=7"])
    RunFolder(tmp_path).write_config(config)
    done = command(f"--config={tmp_path}/config.json", "--mode=config", "--json")
    fields = json.loads(done.out)["fields"]
    assert fields["seed"]["value"] == 7 and fields["model.name"]["value"] == "knn"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("say which"), 2),
        (NoFileError("'x': no such file"), 2),
        (DiskError("cannot write 'x'"), 2),
        (CheckpointError("none"), 3),
        (Interrupted(15, 3), 143),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2),
        (MemoryError(), 2),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2),
        (jax.errors.JaxRuntimeError("INTERNAL: nobody knows"), 1),
        (ModuleNotFoundError("no", name="pyarrow"), 2),
        (ValueError("operands could not be broadcast together"), 1),
        (json.JSONDecodeError("Expecting value", "", 0), 1),
        (KeyError("face"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), 1),
        (OSError("what a library says"), 1),
        (ModuleNotFoundError("no", name="vidjax.nothing"), 1),
    ],
)
def test_an_error_is_the_user_s_or_a_fault_of_vidjax(capsys, error, code):
    assert messages.guarded(raising(error), ["--json"]) == code
    captured = capsys.readouterr()
    assert ("Traceback" in captured.err) == (code == 1)
    assert code == 1 or 1 <= len(captured.err.splitlines()) <= 3
    if messages.is_memory(error):
        for remedy in ("--config.batch_size", "--config.eval.block_size", "--config.data.mode"):
            assert remedy in captured.err
    assert json.loads(captured.out)["error"].strip()
    assert messages.guarded(raising(error), []) == code
    assert not capsys.readouterr().out


def test_an_error_of_the_system_names_the_path_and_a_remedy(capsys, tmp_path):
    messages.guarded((tmp_path / "gone").read_text, [])
    assert capsys.readouterr().err == (
        f"vidjax: '{tmp_path}/gone': No such file or directory\nis the path right?\n"
    )


def test_control_characters_are_shown_and_never_sent_to_the_terminal(capsys):
    hostile = "x\x1b]0;title\x07\x9b2J\u202egnp.\r\u2028y"
    messages.say(f"{hostile}\n\tAda علي")
    messages.complain(hostile)
    messages.guarded(raising(KeyError(hostile)), [])
    captured = capsys.readouterr()
    shown = r"x\x1b]0;title\x07\x9b2J\u202egnp.\r\u2028y"
    assert captured.out == f"{shown}\n\tAda علي\n"
    assert captured.err.startswith(f"vidjax: {shown}\n")
    assert captured.err.isprintable() or not set("\x1b\x07\x9b\u202e\r") & set(captured.err)


def test_a_warning_is_printed_from_any_thread_and_those_of_libraries_are_not():
    code = (
        "import warnings\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from vidjax.utils import errors, messages\n"
        "def main():\n"
        "    ThreadPoolExecutor().submit(errors.warn, 'two of three').result()\n"
        "    warnings.warn('for programmers')\n"
        "    return 0\n"
        "messages.run(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "vidjax: warning: two of three\n")


def test_closed_streams_end_no_command():
    def end(words):
        command = f"set -o pipefail; {sys.executable} -m vidjax.main {words}"
        words = ["/bin/bash", "-c", command]
        return subprocess.run(words, capture_output=True, text=True, timeout=100)

    closed = ("2>&-", ">&-", ">&- 2>&-", "<&-", "2>&1 | head -1")
    for mode, code in (("zzz", 2), ("config", 0)):
        with ThreadPoolExecutor(5) as pool:
            for done in pool.map(end, (f"--mode={mode} {stream}" for stream in closed)):
                assert done.returncode == code, done
                assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_official_journey(vidjax_command, official_dir, tmp_path, capsys):
    """Train on official files, come back to the finished run, rank a split without ground truth."""
    workdir = tmp_path / "run with a space"
    config = "--config=configs/mma.py:iqiyi_vid,face,head,audio"
    words = (config, f"--config.data.dir={official_dir}", f"--workdir={workdir}/", *SHRUNK)
    first = vidjax_command(*words)
    assert first.returncode == 0, first.stderr
    metrics = json.loads((workdir / "metrics.json").read_text())
    wanted = (
        "map map_kind top1 num_clips num_identities num_distractors num_params step seconds seed "
        "train_clips_per_second eval_clips_per_second versions best_map best_step"
    )
    assert {*wanted.split()} <= metrics.keys()
    assert metrics["map_kind"] == "val"
    assert metrics["num_clips"] == 60
    assert metrics["num_distractors"] == 20
    for name in ("ranking.txt", "data_report.json", "identities.json", "metrics.jsonl"):
        assert (workdir / name).stat().st_size > 0
    assert list(workdir.glob("events.out.tfevents.*"))

    again = vidjax_command(*words)
    assert again.returncode == 0, again.stderr
    assert f"{metrics['map']:.4f}" in again.stdout
    check = vidjax_command("--mode=check", f"--workdir={workdir}")
    assert check.returncode == 0, check.stdout
    assert check.stdout.endswith("all good\n")
    assert check.stdout.count(f"checkpoint {metrics['step']}") == 1
    assert main([*words, "--config.seed=5"]) == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err
    submission = ranking.read_submission(workdir / "ranking.txt")
    scored = ranking.score(
        ranking.read_ground_truth(official_dir / "val_gt.txt"), submission.ranking
    )
    assert scored == pytest.approx(metrics["map"], abs=1e-12)

    moved = tmp_path / "moved"
    official_dir.rename(moved)
    try:
        test = vidjax_command(
            "--mode=evaluate", f"--workdir={workdir}", "--config.eval.split=test",
            f"--config.data.dir={moved}",
        )  # fmt: skip
    finally:
        moved.rename(official_dir)
    assert test.returncode == 0, test.stderr
    lines = (workdir / "ranking_test.txt").read_text().splitlines()
    assert len(lines) == 12
    assert all(len(line.split()) == 41 for line in lines)  # 40 clips, none lost
    assert "map" not in json.loads((workdir / "metrics_test.json").read_text())
