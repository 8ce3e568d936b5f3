"""The remedy of an error works as it is printed. Runs and galleries refuse wrong arguments."""

import copy
import json
import pickle
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import vidjax
from tests.helpers import clip_files, servers
from tests.helpers.seen import refused
from vidjax.apps.gallery.changes import NotEnrolledError
from vidjax.apps.gallery.gallery import Gallery
from vidjax.runs.signals import Interrupted
from vidjax.utils.errors import DiskError

# A wrong command, a pattern that finds the remedy in its error, and a command with the remedy.
COMMANDS = [
    ("gallery g list", r"comes first: (vidjax .*)", "{}"),
    ("gallery identify g --input='my own'", r"(--input=.*)", "gallery identify g {}"),
    ("config --config=knn --config.loss.gama=1", r"did you mean (--config\S+)\?",
     "config --config=knn {}=1"),
    ("check 'my run'", r"did you mean (--workdir=.*)\?", "check {}"),
    ("rank --workdir=run --input=official --out=b.tsv", r"embed, add (--config\S+)",
     "rank --workdir=run --input=official {} --out=b.tsv"),
    ("gallery identify g --input=official", r"--input by (--split.*)", "gallery identify g {}"),
    ("gallery list 'my run'", r"from it: (vidjax .*)", "{}"),
    ("check --config=knn:face,face", r"'(face)' comes twice", "config --config=knn:{}"),
]  # fmt: skip


@pytest.mark.slow
def test_suggested_command_of_an_error_runs(
    tmp_path, nearest_run, official_dir, data, say, monkeypatch
):
    # The current folder has a run, its gallery, official files, and own features of two splits.
    monkeypatch.chdir(tmp_path)
    for name in ("run", "my run"):
        Path(name).symlink_to(nearest_run)
    Gallery.create("g", nearest_run, data)
    Path("official").symlink_to(official_dir)
    clips = {"a b": {"face": np.random.default_rng(0).normal(size=(2, 24)).astype(np.float16)}}
    clip_files.write_npz(Path("my own"), {"train": clips, "test": clips})

    for typed, pattern, corrected in COMMANDS:
        match = re.search(pattern, say(*shlex.split(typed), code=2))
        assert match, typed
        words = corrected.format(match[1]).removeprefix("vidjax ")
        assert say(*shlex.split(words)), typed


def test_errors_pass_from_one_process_to_another():
    """An error that cannot be unpickled would end a pool of processes, or let it wait forever."""
    for error in (NotEnrolledError("clip", "clp", {"clip"}), Interrupted(15, 7), DiskError("full")):
        for received in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(received) is type(error) and str(received) == str(error)
            assert received.exit_code == error.exit_code


def test_gallery_refuses_wrong_arguments_and_names_the_remedy(nearest_run, tmp_path):
    new, clips = tmp_path / "new", {"c": {"face": np.ones((1, 8), np.float32)}}
    people, create = servers.make_gallery(tmp_path / "people"), Gallery.create
    for call, *words in (
        (lambda: create(nearest_run, new), f"vidjax gallery create NEW_FOLDER --run={nearest_run}"),
        (lambda: create(None, nearest_run), "folder must be the path"),  # pyright: ignore
        (lambda: create(new, 5), "run must be a run, or the path"),  # pyright: ignore
        (lambda: create(new, nearest_run, {}), "data must be the result"),  # pyright: ignore
        (lambda: Gallery.of_models(new, None), "models must be the path"),  # pyright: ignore
        (lambda: people.enrol(clips, {"d": "Ada"}), "no clip is called 'd'", "clip is 'c'"),
    ):
        refused(call, *words)
    assert not new.exists()


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

    refused(lambda: train(8), "--workdir=FOLDER")  # the run now has a checkpoint
