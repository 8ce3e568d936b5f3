"""`vidjax check`: what it says of good and damaged data, runs and galleries."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import clip_files
from tests.helpers.datasets import prepare
from vidjax.core import ensemble
from vidjax.evaluation import restore
from vidjax.models.system import TaskSpec
from vidjax.runs import checkpoint, config_io
from vidjax.runs.run_folder import RunFolder
from vidjax.training import api
from vidjax.utils import files

ROOT = Path(__file__).parent.parent
SPEC = f"{ROOT}/configs/mma.py:iqiyi_vid,face,head,audio"
OLDER, NEWER = (f"run/checkpoints/{step}/state/**/*" for step in (10, 20))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with official files, the cache of their records, and a run of two steps."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "official").mkdir()
    clip_files.write_learnable(folder / "official", num_clips={"train": 24, "val": 16})
    prepare(folder / "official", folder / "cache")
    words = [f"--config.data.dir={folder}/official", f"--config.data.cache_dir={folder}/cache"]
    config = config_io.override(config_io.load_file(SPEC), words)
    workdir = folder / "run"
    workdir.mkdir()
    RunFolder(workdir).write_config(config)
    data = api.load_data(config)
    files.write_json(workdir / "identities.json", list(data.identities))
    training_sets = ensemble.TrainingSets((ensemble.Member(),), ("a", "b"), np.ones((1, 2), bool))
    ensemble.save(workdir, training_sets)
    widths = {name: data.modalities[name].dim for name in config.modalities}
    task = TaskSpec(widths, len(data.identities), None, 2, 20, train_other=True)
    for step in (10, 20):
        items = {"params": {"kernel": np.full((64, 64), step, np.float32)}}
        info = {
            **task._asdict(),
            **restore.companion_digests(data.identities, training_sets),
            "data": restore.data_digests(config, data),
            "config": config.to_dict(),
        }
        checkpoint.save(workdir, step, items, info)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy, to damage; the data stay where they are."""
    return Path(shutil.copytree(made, tmp_path / "made"))


@pytest.fixture
def check(command):
    """Runs a check; returns its exit code and its lines."""

    def run(*words):
        code, out, err = command("check", *words)
        assert err == ""
        return code, out.splitlines()

    return run


@pytest.fixture
def check_run(folder, check):
    """Checks the run of the copy."""
    return lambda *words: check(
        f"--workdir={folder}/run", f"--config.data.cache_dir={folder}/cache", *words
    )


def damage(folder, pattern):
    """Changes a byte of the largest file that a pattern names."""
    paths = [path for path in folder.glob(pattern) if path.is_file()]
    path = max(paths, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[100 if path.suffix == ".npz" else len(content) // 2] ^= 1  # in an array
    path.write_bytes(content)


def test_a_good_run(check_run):
    code, lines = check_run()
    assert (code, lines[-1]) == (0, "all good"), lines
    for words in ("python 3.", "jax ", "8 x cpu", "checkpoint 10: ", "checkpoint 20: ",
                  "step 20 and its data", "train 24 clips, val 16 clips"):  # fmt: skip
        assert words in "\n".join(lines), lines
    assert check_run("--quiet") == (0, ["all good"])
    (line,) = check_run("--json")[1]
    assert json.loads(line)["verdict"] == "all good"


@pytest.mark.parametrize(
    ("pattern", "code", "words"),
    [
        (NEWER, 3, "FAULT  checkpoint 20: "),
        ("run/checkpoints/20/manifest.json", 3, "FAULT  checkpoint 20: "),
        ("run/identities.json", 3, "identities.json"),
        ("run/members.npz", 3, "members.npz"),
        ("cache/**/index.npz", 2, "FAULT  run: "),
    ],
)
def test_damage_is_found(folder, check_run, pattern, code, words):
    damage(folder, pattern)
    found, lines = check_run()
    assert found == code and lines[-1].startswith("FAULT: ")
    assert any(words in line for line in lines), lines


def test_a_fault_hides_no_other(folder, check_run):
    for pattern in (OLDER, NEWER):
        damage(folder, pattern)
    code, lines = check_run()
    assert (code, lines[-1]) == (3, "FAULT: checkpoint 10, checkpoint 20, run"), lines


def test_other_data_than_those_of_the_run(folder, check_run):
    truth = folder / "official" / "train_gt.txt"
    truth.write_text("".join(truth.read_text().splitlines(keepends=True)[1:]))
    prepare(folder / "official", folder / "cache")
    words = f"--config.data.dir={folder}/official", "--config.eval.split=train"
    code, lines = check_run(*words)
    assert code == 2 and "train has other labels" in lines[-2]


def test_data_of_a_configuration(made, check, tmp_path):
    (tmp_path / "file").touch()
    words = (f"--config={SPEC}", f"--config.data.cache_dir={made}/cache")
    official = f"--config.data.dir={made}/official"
    assert check(*words, official)[1][-1] == "all good"
    for message, *given in (
        ("nowhere", f"--config.data.dir={tmp_path}/nowhere"),
        ("no feature pickles", f"--config.data.dir={tmp_path}"),
        ("config.data.dir",),
        ("'head'", official, "--config.modalities=haed"),
        ("file'", official, f"--config.data.cache_dir={tmp_path}/file"),
        ("embed_dim", official, "--config.model.embed_dim=0"),
    ):
        code, lines = check(*words, *given)
        assert code == 2 and message in lines[-2], lines


def test_a_joined_folder_names_its_runs_and_no_folder_is_needed(tmp_path, command, check):
    config = api.load_config("knn")
    config.join.runs = ("a", "b")
    RunFolder(tmp_path).write_config(config)
    assert command("check", f"--workdir={tmp_path}").refused("joins other runs: check a and b")
    code, lines = check()
    assert (code, lines[-1]) == (0, "all good") and len(lines) == 2
