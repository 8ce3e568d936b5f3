"""The remedy of an error works as it is printed, and mistakes are refused before work begins."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest

import vidjax
from tests.helpers import clip_files, made_galleries, made_runs, servers
from tests.helpers.seen import refused
from vidjax.apps.gallery.gallery import Gallery
from vidjax.runs import config as config_lib


@pytest.fixture
def place(tmp_path, official_dir, monkeypatch):
    """The current folder, with a gallery, a run, and features of two splits."""
    made_galleries.make(tmp_path / "g")
    made_runs.write(tmp_path / "run", {"1": 0.5})
    (tmp_path / "official").symlink_to(official_dir)
    clips = {"a b": {"face": np.random.default_rng(0).normal(size=(2, 24)).astype(np.float16)}}
    clip_files.write_npz(tmp_path / "my own", {"train": clips, "test": clips})
    monkeypatch.chdir(tmp_path)
    return tmp_path


# A wrong command, a pattern that finds the remedy in its error, and a command with the remedy.
COMMANDS = [
    ("gallery g list", r"comes first: (vidjax .*)", "{}"),
    ("gallery identify g --input='my own'", r"(--input=.*)", "gallery identify g {}"),
    ("config --config=knn --config.loss.gama=1", r"did you mean (--config\S+)\?",
     "config --config=knn {}=1"),
    ("check run", r"did you mean (--workdir=\S+)\?", "check {}"),
    ("rank --workdir=run --input=official --out=b.tsv", r"embed, add (--config\S+)",
     "rank --workdir=run --input=official {} --out=b.tsv"),
    ("gallery identify g --input=official", r"--input by (--split.*)", "gallery identify g {}"),
    ("check --config=knn:face,face", r"'(face)' comes twice", "config --config=knn:{}"),
]  # fmt: skip


@pytest.mark.slow
def test_suggested_command_of_an_error_runs(place, nearest_run, data, say):
    # A real run and its gallery replace the made-up ones.
    for name in ("g", "run"):
        shutil.rmtree(place / name)
    (place / "run").symlink_to(nearest_run)
    Gallery.create(place / "g", nearest_run, data)

    for typed, pattern, corrected in COMMANDS:
        match = re.search(pattern, say(*shlex.split(typed), code=2))
        assert match, typed
        words = shlex.split(corrected.format(match[1]))
        assert say(*words[words[0] == "vidjax" :]), typed


def test_gallery_refuses_a_run_folder_and_labels_of_absent_clips(place):
    words = "is a run: Gallery.create(", str(place / "run")
    refused(lambda: Gallery.create(place / "run", "new"), *words)
    gallery = servers.make_gallery(place / "people")
    clips = {"c": {"face": np.ones((1, 8), np.float32)}}
    refused(lambda: gallery.enrol(clips, {"d": "Ada"}), "no clip is called 'd'", "clip is 'c'")


@pytest.mark.slow
def test_config_of_a_run_describes_the_data_passed_from_python(tmp_path, cache_dir):
    faces = np.arange(4)[:, None, None] + 0.1 * np.random.default_rng(0).normal(size=(2, 4, 2, 8))
    train, val = ({f"{i}{n}": {"face": x} for n, x in enumerate(faces[i])} for i in range(2))
    labels = {name: f"p{name[1]}" for name in (*train, *val)}

    # The fields of `data` in the configuration describe synthetic data, which are not used.
    data = vidjax.load_data({"train": train, "val": val}, labels, cache_dir=cache_dir)
    words = ("--config.data.size=standard", "--config.data.blur=2", "--config.eval.report=False")
    config = vidjax.load_config("knn:face", *words)
    wanted = vidjax.train(config, tmp_path / "run", data, num_devices=1).map

    written = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert (written["name"], written["dir"], written["size"]) == ("arrays", None, "small")
    assert written["blur"] == config_lib.DEFAULTS["data.blur"] and config.data.name == "synthetic"

    refused(lambda: vidjax.evaluate(tmp_path / "run"), "vidjax.evaluate(workdir, data)")
    assert vidjax.evaluate(tmp_path / "run", data).map == wanted


@pytest.mark.slow
def test_only_a_run_without_a_checkpoint_accepts_another_configuration(
    tmp_path, data, official_dir
):
    def train(seed):
        words = (f"--config.data.dir={official_dir}", "--config.eval.report=False")
        config = vidjax.load_config("knn:iqiyi_vid,face", *words, f"--config.seed={seed}")
        vidjax.train(config, tmp_path / "run", data, num_devices=1)

    # After a run that was stopped before its first checkpoint, another seed is accepted.
    train(7)
    for name in ("checkpoints", "metrics.json"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    train(0)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0

    refused(lambda: train(8), "--workdir=FOLDER")


def test_config_file_error_names_the_missing_field_and_line(tmp_path):
    path = tmp_path / "own.py"
    lines = ("made = config.default()", "made.fusion.face.train = 1", "return made")
    body = "".join(f"    {line}\n" for line in lines)
    path.write_text(f"from vidjax.runs import config\n\ndef get_config(args=''):\n{body}")
    refused(lambda: vidjax.load_config(path), "line 5: AttributeError: there is no field 'face'")
