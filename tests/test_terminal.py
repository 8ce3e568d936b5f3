"""The terminal: help at 80 columns, a quiet first run, and a remedy for every mistake."""

import io
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.helpers import made_runs
from vidjax import config as config_lib
from vidjax.command_line import MODES
from vidjax.main import main

ROOT = Path(__file__).parent.parent
MMA = "--config=configs/mma.py"
FILES = f"{MMA}:iqiyi_vid,face,head"  # with --workdir and --config.data.dir of the test's own
COMPARE = "--mode=compare --workdir={tmp}/out --runs="

# name -> (words of the command, part of the remedy)
MISTAKES = {
    "nothing typed": ("", "--config=configs/mma.py"),
    "misspelt path": ("--config=configs/mmaa.py", "'configs/mma.py'"),
    "no .py": ("--config=configs/mma", "'configs/mma.py'"),
    "misspelt name": ("--config=mmaa:face", "'mma'"),
    "a folder as configuration": ("--config=configs", "'configs/mma.py'"),
    "blanks around =": ("--config = configs/mma.py", "--config=configs/mma.py"),
    "flag forgotten": ("configs/mma.py", "--config=configs/mma.py"),
    "misspelt flag": (f"{MMA} --workdri=w", "--workdir?"),
    "a field as flag": (f"{MMA} --batch_size=32", "--config.batch_size"),
    "another program's flag": (f"{MMA} --epochs=3", "--config.num_epochs"),
    "misspelt field": (f"{MMA} --config.bacth_size=3", "--config.batch_size"),
    "a field without its group": (
        f"{MMA} --config.learning_rate=1",
        "--config.optim.learning_rate",
    ),
    "a field without value": (f"{MMA} --config.seed", "--config.seed=..."),
    "misspelt argument": (f"{MMA}:publishd", "'published'"),
    "unknown mode": ("--mode=trian", "'train'"),
    "a mode without flag": ("evaluate --workdir=w", "--mode=evaluate"),
    "evaluate what": ("--mode=evaluate", "--workdir=FOLDER"),
    "evaluate before training": (
        "--mode=evaluate --workdir={tmp}/none",
        "python -m vidjax.main --config=FILE --workdir={tmp}/none",
    ),
    "the folder of the runs": ("--mode=report --workdir={tmp}", "{tmp}/a"),
    "configuration of a trained run": (
        f"--mode=evaluate --workdir={{tmp}}/a {MMA}",
        "--config.FIELD=VALUE",
    ),
    "report of nothing": (
        "--mode=report --workdir={tmp}/empty",
        "python -m vidjax.main --config=FILE",
    ),
    "workdir of another run": (f"{MMA} --workdir={{tmp}}/a", "another workdir"),
    "workdir is a file": (f"{MMA} --workdir={{tmp}}/file", "{tmp}/file"),
    "runs while training": (f"{MMA} --runs=a,b", "--mode=evaluate"),
    "joined into a run": (
        "--mode=evaluate --workdir={tmp}/a --runs={tmp}/b,{tmp}/a",
        "another folder",
    ),
    "compare one run": (f"{COMPARE}{{tmp}}/a", "--runs=A,B"),
    "compare with itself": (f"{COMPARE}{{tmp}}/a,{{tmp}}/a", "a run is named twice"),
    "compare with a blank": (
        f"{COMPARE}{{tmp}}/a, {{tmp}}/b",
        "--runs={tmp}/a,{tmp}/b",
    ),
    "compare into nowhere": ("--mode=compare --runs={tmp}/a,{tmp}/b", "--workdir=FOLDER"),
    "compare what is none": (
        f"{COMPARE}{{tmp}}/a,{{tmp}}/empty",
        "name folders of trained runs",
    ),
    "compare two splits": (
        f"{COMPARE}{{tmp}}/a,{{tmp}}/of_test",
        "--config.eval.split=val",
    ),
    "compare what is not ranked": (
        f"{COMPARE}{{tmp}}/a,{{tmp}}/b --config.eval.split=test",
        "--mode=evaluate --workdir={tmp}/a --config.eval.split=test",
    ),
    "compare without ground truth": (
        f"{COMPARE}{{tmp}}/blind,{{tmp}}/a",
        "--config.eval.split=val",
    ),
    "compare two datasets": (
        f"{COMPARE}{{tmp}}/a,{{tmp}}/other",
        "compare runs that were evaluated on the same clips",
    ),
    "data nowhere": (FILES, "config.data.dir"),
    "data not downloaded": (
        f"{FILES} --config.data.dir={{tmp}}/empty",
        "such as face_train.pickle",
    ),
    "archive not unpacked": (f"{FILES} --config.data.dir={{tmp}}/zip", "such as face_train.pickle"),
    "pointer of Git LFS": (
        f"{FILES} --config.data.dir={{tmp}}/lfs",
        "Git LFS",
    ),
    "ground truth of another suffix": (
        f"{FILES} --config.data.dir={{tmp}}/csv",
        "train_gt.txt",
    ),
    "misspelt modality": (
        f"{FILES} --config.data.dir={{official}} --config.modalities=face,haed",
        "'head'",
    ),
    "misspelt split": (
        f"{FILES} --config.data.dir={{official}} --config.eval.split=vall",
        "test, train, val",
    ),
    "evaluated on what was trained": (
        f"{FILES} --config.data.dir={{official}} --config.data.train_splits=train,val",
        "--config.ensemble.folds=5",
    ),
    "one fold": (
        f"{FILES} --config.data.dir={{official}} --config.ensemble.folds=1",
        "config.ensemble.folds",
    ),
    "a value that nothing reads": (f"{MMA} --config.loss.gamma=3", "--config.loss.schedule="),
    "unknown dataset": (f"{MMA} --config.data.name=imagenet", "synthetic, iqiyi_vid"),
    "unknown model": (f"{MMA} --config.model.name=resnet", "deepmef, dense"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, official_dir, cache_dir):
    """Folders that the mistaken commands name."""
    del cache_dir
    tmp = tmp_path_factory.mktemp("mistakes")
    values = {"1": 0.5, "2": 0.75}
    made_runs.write(tmp / "a", values, "--config.seed=3")
    made_runs.write(tmp / "b", values)
    made_runs.write(tmp / "of_test", values, split="test")
    made_runs.write(tmp / "blind", values, split="test", truth=False)
    made_runs.write(tmp / "other", values, "--config.data.seed=1")
    for name in ("empty", "zip"):
        (tmp / name).mkdir()
    (tmp / "zip" / "face_train.zip").write_bytes(b"PK\x03\x04" + bytes(60))
    (tmp / "file").write_text("")
    for name in ("lfs", "csv"):
        shutil.copytree(official_dir, tmp / name)
    (tmp / "csv" / "train_gt.txt").rename(tmp / "csv" / "train_gt.csv")
    (tmp / "lfs" / "face_train.pickle").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    )
    return {"tmp": tmp, "official": official_dir}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_there_are_twenty_mistakes_and_more():
    assert len(MISTAKES) >= 20
    assert len({typed for typed, _ in MISTAKES.values()}) == len(MISTAKES)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_a_remedy(name, places, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    typed, remedy = (text.format(**places) for text in MISTAKES[name])
    words = typed.split()
    if "--workdir" not in typed and typed.startswith((FILES, f"{MMA} --config.data", "--config=")):
        words.append(f"--workdir={places['tmp']}/w")
    if "--config.model.name" in typed:  # it needs data before the model
        words.append(f"--config.data.dir={places['official']}")
        words[0] = FILES
    before = contents(places["tmp"] / "a")
    code = main(words)
    said, complaint = capsys.readouterr()
    lines = [line for line in complaint.splitlines() if not line.startswith("converting ")]
    lines = [line for line in lines if not line.startswith(("read: ", "pack: "))]
    assert code == 2, complaint
    assert not said
    assert 1 <= len(lines) <= 3, complaint
    assert lines[0].startswith("vidjax: ")
    assert remedy in complaint
    assert "Traceback" not in complaint
    assert contents(places["tmp"] / "a") == before


def test_help_fits_eighty_columns_and_describes_the_modes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert len(said.splitlines()) <= 60
    for mode in MODES:
        assert re.search(rf"^  {mode}  +\w+", said, re.MULTILINE), mode
    known = dict(config_lib.fields(config_lib.default()))
    for field in re.findall(r"--config\.([a-z_.]+)=", said):
        assert field in known
    for path in re.findall(r"configs/\w+\.py", said):
        assert (ROOT / path).is_file()


# The only lines that a training command may print.
SEEN = [
    r"making the synthetic dataset in .*",
    r"converting \d+ files of .*",
    r"(read|pack|write|convert)\w* +\d+% \|.*",
    r"(read|pack|write|convert)\w*: .*",
    r"train:? compiling",
    r"clips stay on the device: [\d,]+ MB, read in [\d.]+ s",
    r"(train|evaluate) +\d+% \|.*\| [\d.]+k?/[\d.]+k?, .*",
    r"(train|evaluate): [\d,]+ of [\d,]+ clips, .*",
    r"step \d+ of \d+: map \d\.\d{4}, top1 \d\.\d{4}",
    r"train",
    r"  (workdir|MAP@100|best|data|clips|identities|time|ranking|report) +\S.*",
    r"",
]
TINY = (
    FILES, "--config.num_epochs=4", "--config.batch_size=32", "--config.model.embed_dim=16",
    "--config.model.num_clusters=2", "--config.eval.report=False",
)  # fmt: skip


def unknown(text):
    """Returns the lines that are not in SEEN, with every state of an overwritten line."""
    states = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    return [line for line in states if not any(re.fullmatch(seen, line.rstrip()) for seen in SEEN)]


def environment(cache):
    names = ("TF_CPP_MIN_LOG_LEVEL", "JAX_PLATFORMS", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in names}
    return {**env, "VIDJAX_CACHE": str(cache), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}


@pytest.mark.slow
def test_a_run_shows_nothing_but_its_own_lines(tmp_path, official_dir, cache_dir):
    """On a terminal, as in a notebook's shell; then with both streams in files."""
    command = [sys.executable, "-m", "vidjax.main", *TINY, f"--config.data.dir={official_dir}"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (40, 100))
    child = subprocess.Popen(
        [*command, f"--workdir={tmp_path}/a"], cwd=ROOT, env=environment(cache_dir),
        stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs)
    content = io.BytesIO()
    while True:
        try:
            content.write(os.read(ours, 65536))
        except OSError:  # the other end was closed
            break
    os.close(ours)
    assert child.wait() == 0
    text = content.getvalue().decode()
    assert unknown(text) == []
    bar = re.search(r"train +\d+% \|[^\r]*clips/s, loss [\d.]+[^\r]*, [\d:]+ left", text)
    assert bar, text
    assert len(re.findall(r"step \d+ of \d+: map", text)) == 1
    assert_summary(text.replace("\r", ""), tmp_path / "a")

    done = subprocess.run(
        [*command, f"--workdir={tmp_path}/b"], cwd=ROOT, env=environment(cache_dir),
        capture_output=True, check=True,
    )  # fmt: skip
    said, told = done.stdout.decode(), done.stderr.decode()
    assert unknown(told) == []
    assert "\r" not in told + said and "\x1b" not in told + said
    assert len(told.splitlines()) < 40
    assert len(re.findall(r"^step \d+ of \d+: map", told, re.MULTILINE)) == 1
    assert said.startswith("train\n")
    assert_summary(said, tmp_path / "b")


def assert_summary(text, workdir):
    """Asserts that a summary ends the text: short and aligned."""
    lines = text.splitlines()
    lines = lines[max(i for i, line in enumerate(lines) if line == "train") :]
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in lines[1:])
    names = ["workdir", "MAP@100", "best", "data", "clips", "identities", "time", "ranking"]
    assert list(rows) == names
    assert rows["workdir"] == str(workdir)
    assert re.fullmatch(r"[01]\.\d{4} on val; top-1 [01]\.\d{4}", rows["MAP@100"])
    assert re.fullmatch(r"[01]\.\d{4} at step \d+", rows["best"])
    assert re.fullmatch(r"iqiyi_vid in \S+, sha256 [0-9a-f]{12}", rows["data"])
    assert {len(re.sub(r"(  \S+ +).*", r"\1", line)) for line in lines[1:]} == {14}
