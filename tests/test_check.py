"""`vidjax check`: output for good and damaged data, runs and galleries."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import clip_files, made_galleries
from tests.helpers.datasets import prepare
from vidjax.runs import checkpoint
from vidjax.utils import confinement


@pytest.fixture
def folder(nearest_run, official_dir, cache_dir, tmp_path):
    """A folder with copies of a run and of its data, which a test may damage."""
    records = prepare(official_dir, cache_dir).folder
    shutil.copytree(records, tmp_path / "cache" / records.parent.name / records.name)
    shutil.copytree(nearest_run, tmp_path / "run")
    return tmp_path


@pytest.fixture
def check(command):
    """Returns a function: words of `vidjax check` -> its exit code, and the printed lines."""

    def run(*words):
        code, out, err = command("check", *words)
        assert err == ""
        return code, out.splitlines()

    return run


@pytest.fixture
def check_run(folder, check):
    words = f"--workdir={folder}/run", f"--config.data.cache_dir={folder}/cache"
    return lambda *more: check(*words, *more)


def test_parts_that_are_not_installed_or_need_another_processor_are_no_faults(tmp_path, python):
    text = "This version of jaxlib was built using AVX instructions"
    (tmp_path / "jax.py").write_text(f"raise RuntimeError('{text}')")
    output = python(
        f"import importlib.util, sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'onnx' else find(name)\n"
        "from importlib import metadata\nversion = metadata.version\n"  # as with onnxruntime-gpu
        "metadata.version = lambda name: version(name.replace('onnxruntime', 'no package'))\n"
        "from vidjax.cli import program\nassert program.main(['check']) == 0\n"
    )  # fmt: skip
    states = [line.split(":")[0].split() for line in output.splitlines()]
    assert states == [
        ["ok", "environment"], ["none", "runs"], ["ok", "training"], ["ok", "films"],
        ["none", "nets"], ["ok", "server"], ["ok", "parquet"],
        ["none" if confinement.list_gaps() else "ok", "files", "of", "strangers"], ["all", "good"],
    ]  # fmt: skip
    assert "onnxruntime of another package" in output
    assert "instructions AVX" in output and "(onnx): pip install 'vidjax[convert]'" in output


def test_limits_that_the_system_cannot_enforce_are_listed(check, monkeypatch):
    monkeypatch.setattr(confinement, "_read_landlock_version", lambda: 0)
    monkeypatch.setattr(confinement, "MACHINES", {})
    code, lines = check()
    (line,) = [line for line in lines if "files of strangers" in line]
    assert code == 0 and line.split()[0] == "none" and lines[-1] == "all good"
    for words in ("delete other files", "memory", "connections", "processes", "5.13", "Landlock"):
        assert words in line


def test_packages_are_unknown_if_vidjax_was_not_installed(check, monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    code, lines = check()
    assert code == 0 and sum("none" in line and "pip install ." in line for line in lines) == 6


def test_mistakes_are_reported_without_the_packages_of_runs(tmp_path, python):
    output = python(
        "import sys\nsys.modules |= dict.fromkeys(('jax', 'ml_collections'))\n"
        "from vidjax.cli import program\n"
        f"assert program.main(['check', '--workdir={tmp_path}/none', '--json']) == 2\n"
    )
    assert f"'{tmp_path}/none' contains no gallery" in output and "is missing" not in output


def damage(folder, pattern):
    """Changes a byte of the largest file that matches a pattern."""
    path = max(filter(Path.is_file, folder.glob(pattern)), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    # Byte 100 of a .npz file is in its first array, so the checksum of the array is wrong.
    content[100 if path.suffix == ".npz" else len(content) // 2] ^= 1
    path.write_bytes(content)


def test_check_of_a_good_run_or_without_a_folder_reports_all_good(folder, check, check_run):
    code, (*_, verdict) = check()
    assert (code, verdict) == (0, "all good")
    code, lines = check("--config=knn", "--config.seed=-1")
    assert code == 2 and lines[-2].startswith("  FAULT  data: config.seed=-1")
    code, lines = check_run()
    assert (code, lines[-1]) == (0, "all good"), lines
    (step,) = checkpoint.manifests(folder / "run")
    # `conftest` emulates 8 devices. The clips are counted as in `clip_files.CLIPS`.
    wanted = "jax ", "8 x cpu", f"checkpoint {step}: ", "train 96 clips, val 60 clips"
    for words in (*wanted, "report.html and other results are not checked"):
        assert words in "\n".join(lines), lines
    assert check_run("--quiet") == (0, ["all good"])
    assert json.loads(*check_run("--json")[1])["verdict"] == "all good"  # a single line


def test_check_prints_warnings_about_labels_and_counts_them(tmp_path, command):
    clips = {f"c{number}": {"face": np.full((1, 2), number + 1.0)} for number in range(4)}
    folder = clip_files.write_npz(
        tmp_path / "own", {"train": clips, "val": {"v": {"face": np.full((1, 2), 9.0)}}}
    )
    labels = dict(zip([*clips, "v"], ["Ada", "nan", "nan", "1.23E+11", "Ada"], strict=True))
    clip_files.write_labels(folder / "labels.csv", labels)
    words = ("--config=knn:face", "--config.data.name=arrays", f"--config.data.dir={folder}")
    with pytest.warns(UserWarning, match="labels.csv: line 3: identity 'nan' looks like"):
        done = command("check", *words, f"--config.data.cache_dir={tmp_path}", "--json")
    answer = json.loads(done.out)
    (text,) = [row["text"] for row in answer["findings"] if row["state"] == "warning"]
    assert "'1.23E+11'" in text and answer["verdict"] == "no faults, 1 warning" and not done.code


# Exit code 3 is a damaged run, 2 damaged data.
@pytest.mark.parametrize(("pattern", "code", "words"), [
    ("run/checkpoints/*/state/**/*", 3, "FAULT: checkpoint {}, run"),
    ("run/checkpoints/*/manifest.json", 3, "FAULT: checkpoint {}, run"),
    ("cache/**/index.npz", 2, "FAULT  run: "),
])  # fmt: skip
def test_check_reports_every_damaged_file(folder, check_run, pattern, code, words):
    (step,) = (folder / "run" / "checkpoints").iterdir()
    damage(folder, pattern)
    exit_code, lines = check_run()
    assert exit_code == code and lines[-1].startswith("FAULT: ")
    assert words.format(step.name) in "\n".join(lines)


def test_check_reports_labels_that_differ_from_those_of_training(folder, check_run, official_dir):
    shutil.copytree(official_dir, folder / "official")
    truth = folder / "official" / "train_gt.txt"
    truth.write_text("".join(truth.read_text().splitlines(keepends=True)[1:]))  # one label less
    code, lines = check_run(f"--config.data.dir={folder}/official")
    assert code == 2 and "train has other labels" in lines[-2]  # the last line is the verdict


def test_check_of_a_configuration_reports_missing_data_and_wrong_fields(check, official_dir):
    words, folder = ["--config=knn:iqiyi_vid,face"], f"--config.data.dir={official_dir}"
    assert check(*words, folder)[1][-1] == "all good"
    no_width = ["--config=cosine:iqiyi_vid,face", folder, "--config.model.embed_dim=0"]
    for message, given in (("config.data.dir", words), ("embed_dim", no_width)):
        code, lines = check(*given)
        assert code == 2 and message in lines[-2], lines


def test_check_of_a_gallery_reports_its_people_and_damage(tmp_path, check):
    clips = {"a": made_galleries.make_clip(1, "Ada"), "b": made_galleries.make_clip(2, None)}
    made_galleries.make(tmp_path, clips)
    assert "gallery: 1 person with 1 clip, 1 stranger" in check(f"--workdir={tmp_path}")[1][1]
    os.truncate(tmp_path / "gallery.sqlite", 5000)
    code, lines = check(f"--workdir={tmp_path}")
    assert code == 2 and lines[-1].startswith("FAULT")
