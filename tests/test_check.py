"""`--mode=check`: what it says of good and damaged data and runs, and that it changes nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import clip_files
from tests.helpers.datasets import prepare
from tests.helpers.made_runs import snapshot
from vidjax import api, config_io, ensemble, files, ranking
from vidjax import config as config_lib
from vidjax.commands import findings
from vidjax.evaluation import restore
from vidjax.main import main
from vidjax.run import checkpoint, resume
from vidjax.steps import topk

ROOT = Path(__file__).parent.parent
SPEC = "configs/mma.py:iqiyi_vid,face,head,audio"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of official files and the cache of its records, of this file's tests alone."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "official").mkdir()
    clip_files.write_learnable(folder / "official", num_clips={"train": 24, "val": 16})
    prepare(folder / "official", folder / "cache")
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A folder as a finished run leaves it, of two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "a run"
    workdir.mkdir()
    config = config_io.override(
        config_io.load_file(f"{ROOT}/{SPEC}"),
        [f"--config.data.dir={data}/official", f"--config.data.cache_dir={data}/cache"],
    )
    resume.write_config(workdir, config)
    identities, clips = ["1", "2", "3"], ["a", "b", "c", "d"]
    files.write_json(workdir / "identities.json", identities)
    member = (ensemble.Member(),)
    training_sets = ensemble.TrainingSets(member, tuple(clips), np.ones((1, 4), bool))
    ensemble.save(workdir, training_sets)
    for step in (10, 20):
        items = {"params": {"kernel": np.full((64, 64), step, np.float32)}}
        info = {
            "map": step / 100,
            **restore.companion_digests(identities, training_sets),
            "data": restore.data_digests(config, api.load_data(config)),
            "config": config.to_dict(),
        }
        checkpoint.save(workdir, step, items, info)
    lines = [{"step": 10}, {"step": 20}, {"step": 20, "split": "val"}]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)
    top = topk.TopK(np.zeros((3, 2), np.float32), np.array([[0, 1], [1, 2], [3, 0]]))
    ranking.write_ranking(workdir / "ranking.txt", identities, clips, top)
    files.write_json(workdir / "metrics.json", {"map": 0.2, "map_kind": "val"})
    report = {"frames_seen": 9, "frames": 7, "frames_skipped": {"non_finite": 2}}
    report |= {"clips_seen": 5, "clips": 4, "clips_skipped": {"no_frames": 1}}
    splits = {"train": {"modalities": {"face": report}}}
    files.write_json(workdir / "data_report.json", {"splits": splits})
    return workdir


@pytest.fixture
def run(finished, data, tmp_path):
    """A copy of the run and of its records, to damage."""
    shutil.copytree(data / "cache", tmp_path / "cache")
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def checked(capsys):
    """Runs a check; returns its exit code and its lines."""

    def check(run, *words):
        words = [f"--workdir={run}", f"--config.data.cache_dir={run.parent}/cache", *words]
        code = main(["--mode=check", *words])
        out, err = capsys.readouterr()
        assert err == ""
        return code, out.splitlines()

    return check


def states(lines, state):
    """Returns the texts of the lines in a state."""
    return [line[11:] for line in lines if line.startswith(f"  {state:7}  ")]


def biggest(run, pattern):
    """Returns the largest file that a pattern names, below the folder that holds the run."""
    found = sorted(path for path in run.parent.glob(pattern) if path.is_file())
    return max(found, key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[100 if path.suffix == ".npz" else len(content) // 2] ^= 1  # of an archive, in an array
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def lose(path):
    path.unlink()


def lose_the_last_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def lose_checkpoints(path):
    shutil.rmtree(path.parent / "checkpoints")


def confuse(path):
    """Puts another shard of its split in the place of a shard."""
    others = (other for other in path.parent.glob(f"{path.name[:12]}*") if other != path)
    shutil.copy(next(others), path)


def change(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


def append(text):
    return lambda path: path.write_text(path.read_text() + text)


OLDER, NEWER = (f"run/checkpoints/{step}/state/**/*" for step in (10, 20))
MANIFEST = "run/checkpoints/20/manifest.json"
SHARD = "cache/**/*.tfrecord*"
# (file, what is done to it, exit code, what is said)
DAMAGE = [
    (NEWER, flip, 3, "checkpoint 20.*sha256 differs"),
    (NEWER, lose, 3, "checkpoint 20.*file missing"),
    (OLDER, cut, 3, "checkpoint 10.*sha256 differs"),
    (MANIFEST, change('"map": 0.2', '"map": 0.3'), 3, "checkpoint 20.*manifest.json.*sha256"),
    (MANIFEST, lose, 3, "checkpoint 20.*manifest.json"),
    ("run/identities.json", lambda path: path.write_text('["1", "3", "2"]'), 3,
     "identities.json.*delete it and metrics.json"),
    ("run/identities.json", change("]", ""), 3, "identities.json' is damaged"),
    ("run/members.npz", flip, 3, "members.npz"),
    ("run/config.json", change('"embed_dim": ', '"embed_dim": 1'), 3, "config.json.*embed_dim"),
    ("run/metrics.json", lose_checkpoints, 3, "no checkpoint.*metrics.json exists"),
    (SHARD, flip, 2, ".tfrecord.*records, found.*is damaged"),
    (SHARD, lose, 2, "no such file"),
    (SHARD, empty, 2, "expected 3 records, found 0"),
    (SHARD, confuse, 2, "sha256"),
    ("cache/**/index.npz", flip, 2, "index.npz"),
    ("cache/**/manifest.json", cut, 2, "damaged records"),
    ("run/data_report.json", change('"frames": 7', '"frames": 8'), 2,
     r"face_train: 9 frames seen, but 8 loaded \+ 2 skipped"),
    ("cache/**/data_report.json", change('"frames_skipped": {', '"frames_skipped": {"x": 3, '), 2,
     "data_report.json does not match its sha256"),
    ("run/data_report.json", empty, 2, "data_report.json' is damaged"),
    ("run/metrics.json", cut, 2, "metrics.json' is damaged"),
    ("run/metrics.jsonl", change("{", "\0\0\n{"), 2, "metrics.jsonl: line 1 is damaged"),
    ("run/metrics.jsonl", append('{"step": 20}\n'), 2, "line 4: step 20 after step 20"),
    ("run/ranking.txt", lose_the_last_line, 2, "ranking.txt: 2 lines for 3 identities"),
    ("run/ranking.txt", append("4 a.mp4\n"), 2, "line 4.*'4' is unknown"),
    ("run/ranking.txt", lose, 2, "ranking.txt: missing"),
    ("run/config.json", cut, 2, "config.json' is damaged"),
]  # fmt: skip


def test_a_good_run(run, checked):
    before = snapshot(run.parent)
    code, lines = checked(run)
    assert (code, lines[-1]) == (0, "all good"), lines
    assert snapshot(run.parent) == before
    said = "\n".join(lines)
    for words in (
        "python 3.",
        "jax ",
        "TFDS ",
        "8 x cpu",
        " free",
        "checkpoint 10: ",
        "checkpoint 20: ",
        "evaluation would use checkpoint 20 (latest)",
        "metrics.jsonl: 3 lines to step 20",
        "ranking.txt: valid, 3 identities",
        "identities.json: 3 identities",
        "1 members, 4 clips",
        "every sha256 agrees",
    ):
        assert words in said, said
    found = re.findall(r"(\d+) frames seen = (\d+) loaded \+ (\d+) skipped", said)
    assert [int(a) - int(b) - int(c) for a, b, c in found] == [0, 0]
    assert checked(run, "--config.eval.checkpoint=best")[0] == 0


@pytest.mark.parametrize(("pattern", "damage", "code", "words"), DAMAGE)
def test_damage_is_found_and_left_as_it_is(run, checked, pattern, damage, code, words):
    damage(biggest(run, pattern))
    before = snapshot(run.parent)
    found, lines = checked(run)
    assert found == code, lines
    assert "FAULT" in lines[-1]
    said = states(lines, "FAULT")
    assert any(re.search(words, line) for line in said), said
    assert snapshot(run.parent) == before


def test_without_a_good_checkpoint_there_is_nothing_to_evaluate(run, checked):
    for pattern in (OLDER, NEWER):
        flip(biggest(run, pattern))
    assert "no good checkpoint" in "".join(states(checked(run)[1], "FAULT"))


def test_a_fault_hides_no_other(run, checked):
    for pattern in (NEWER, SHARD, "run/ranking.txt", "run/metrics.json"):
        damage = lose_the_last_line if pattern == "run/ranking.txt" else cut
        damage(biggest(run, pattern))
    append('{"step": 20}\n')(run / "metrics.jsonl")
    code, lines = checked(run)
    assert code == 3
    assert len(states(lines, "FAULT")) == 5, lines
    assert lines[-1] == "5 FAULTS: run, checkpoints, data"


def test_which_checkpoint_evaluation_would_use(run, checked):
    flip(biggest(run, NEWER))
    for prefer in ("latest", "best"):
        _, lines = checked(run, f"--config.eval.checkpoint={prefer}")
        assert f"evaluation would use checkpoint 10 ({prefer})" in "\n".join(lines)
    assert any("would use checkpoint 10" in line for line in states(checked(run)[1], "warning"))


def test_left_overs_are_named(run, checked):
    """An unfinished save, write and conversion are left over, beside a folder of the user's."""
    left = [run / "checkpoints" / ".30.partial", run / "checkpoints" / "mine"]
    left += [run / ".metrics.json.123.partial", run.parent / "cache" / "iqiyi_vid" / "ab.partial"]
    for path in left:
        path.mkdir()
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + '{"ste')
    code, lines = checked(run)
    assert (code, lines[-1]) == (0, "all good, 5 to note")
    said = states(lines, "warning")
    for path in left:
        assert any(f"'{path}'" in line for line in said), said
    assert any("last line is not finished" in line for line in said)


def test_a_run_in_use_is_read_and_left_alone(run, checked):
    code = (
        "import pathlib, sys\nfrom vidjax import files\n"
        "with files.lock(pathlib.Path(sys.argv[1])):\n print('held', flush=True)\n input()\n"
        "with files.lock(pathlib.Path(sys.argv[1])): pass\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        code, lines = checked(run)
        assert code == 0
        said = states(lines, "warning")
        assert [line for line in said if f"in use by process {child.pid} on" in line], said
        child.communicate("go on\n")
        assert child.returncode == 0
    finally:
        child.kill()
        child.communicate()
    assert checked(run)[1][-1] == "all good"


def test_data_alone(data, checked, capsys, tmp_path):
    words = ("--mode=check", f"--config={SPEC}", f"--config.data.dir={data}/official")
    assert main([*words, f"--config.data.cache_dir={data}/cache"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "all good"
    assert "checkpoint 2" not in said

    cache = tmp_path / "elsewhere"
    before = snapshot(tmp_path)
    assert main([*words, f"--config.data.cache_dir={cache}"]) == 0
    said = capsys.readouterr().out
    assert "not converted yet" in said
    assert said.splitlines()[-1] == "all good, 1 to note"
    assert snapshot(tmp_path) == before


def test_other_data_than_the_runs_are_told(run, data, checked, tmp_path):
    code, lines = checked(run)
    assert code == 0 and "data: those of the run" in "\n".join(lines)
    official = Path(shutil.copytree(data / "official", tmp_path / "official"))
    truth = official / "train_gt.txt"
    first, *rest = truth.read_text().splitlines(keepends=True)
    truth.write_text("".join(rest))
    prepare(official, tmp_path / "cache")
    code, lines = checked(run, f"--config.data.dir={official}")
    assert code == 2
    assert "train has other labels" in "".join(states(lines, "FAULT")), first


def test_data_that_are_not_there(data, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    official = f"--config.data.dir={data}/official"
    for words, message in (
        ([f"--config.data.dir={tmp_path}/nowhere"], "nowhere"),
        ([f"--config.data.dir={tmp_path}"], "no feature pickles"),
        ([], "config.data.dir"),
        (["--config.data.name=iqiyi"], "config.data.name='iqiyi'"),
        ([official, "--config.modalities=haed"], "'head'"),
        ([official, f"--config.data.cache_dir={tmp_path}/file"], "is a file"),
    ):
        cache = f"--config.data.cache_dir={data}/cache"
        assert main(["--mode=check", f"--config={SPEC}", cache, *words]) == 2
        lines = capsys.readouterr().out.splitlines()
        assert any(message in line for line in states(lines, "FAULT")), lines


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (None, "labels.csv"),
        (lambda folder: (folder / "val/clip_3.npz").write_bytes(b"not a zip"), "clip_3.npz"),
        (lambda folder: np.savez(folder / "val/clip_3.npz", face=np.ones((2, 3))), "clip_3"),
    ],
)
def test_own_features_are_opened_before_they_are_called_good(capsys, tmp_path, spoil, message):
    folder, names = tmp_path / "own", [f"clip_{i}" for i in range(4)]
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for name in names:
            np.savez(folder / split / f"{split}_{name}.npz", face=np.ones((2, 8), np.float32))
    words = ["--config=mma:face", "--config.data.name=arrays", f"--config.data.dir={folder}",
             f"--config.data.cache_dir={tmp_path}/cache", "--mode=check"]  # fmt: skip
    if spoil:
        rows = "".join(f"{s}_{name},{i % 2}\n" for s in ("train", "val")
                       for i, name in enumerate(names))  # fmt: skip
        (folder / "labels.csv").write_text(f"clip,identity\n{rows}")
        assert main(words) == 0
        spoil(folder)
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert main(words) == 2
    faults = states(capsys.readouterr().out.splitlines(), "FAULT")
    assert any(message in line for line in faults), faults
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_the_core_alone_checks_a_run(run):
    """Without TFDS new clips can be ranked: to note, and no fault; training needs it."""
    absent = ("tensorflow", "tensorflow_datasets", "tensorboard", "matplotlib", "sklearn")
    code = (
        f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
        "from vidjax.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    for words, status in ((f"--workdir={run}", 0), ("--config=configs/mma.py", 2)):
        command = [sys.executable, "-c", code, "--mode=check", words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == status, done.stdout
        assert "pip install 'vidjax[train]'" in done.stdout


def test_streaming_needs_tensorflow(monkeypatch):
    config = api.load_config("mma", "--config.data.mode=streaming")
    ((state, text),) = findings._readers(config, needed=True)
    assert (state, text[:10]) == ("ok", "TensorFlow") and "TFDS " in text
    monkeypatch.delitem(sys.modules, "vidjax.data.records.tensors")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    for needed, wanted in ((True, "FAULT"), (False, "warning")):
        ((state, text),) = findings._readers(config, needed=needed)
        assert state == wanted and "pip install 'vidjax[tensorflow]'" in text


def test_a_label_that_does_not_fit(data, capsys, tmp_path):
    shutil.copytree(data / "official", tmp_path / "official")
    cache = f"--config.data.cache_dir={tmp_path}/cache"
    prepare(tmp_path / "official", tmp_path / "cache")
    truth = tmp_path / "official" / "train_gt.txt"
    truth.write_text(truth.read_text() + truth.read_text().splitlines()[0].split()[0] + " 99\n")
    words = [f"--config={SPEC}", f"--config.data.dir={tmp_path}/official", cache]
    assert main(["--mode=check", *words]) == 2
    assert "train_gt.txt" in "".join(states(capsys.readouterr().out.splitlines(), "FAULT"))


def test_a_joined_folder_stands_for_its_runs(run, data, capsys, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    both = tmp_path / "both"
    both.mkdir()
    config = config_lib.default()
    config.join.runs = (str(run), str(other))
    resume.write_config(both, config)
    words = ["--mode=check", f"--workdir={both}", f"--config.data.cache_dir={run.parent}/cache"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"{other}: checkpoint 20" in said
    assert said.count("every sha256 agrees") == 1  # of data that both share

    flip(biggest(other, f"{other.name}/checkpoints/10/state/**/*"))
    assert main(words) == 3
    shutil.rmtree(other)
    assert main(words) == 3
    assert f"no run in '{other}'" in capsys.readouterr().out


def test_the_environment_alone(capsys):
    assert main(["--mode=check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "check: the environment"
    assert lines[-1] == "all good"
