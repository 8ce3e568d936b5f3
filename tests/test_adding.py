"""A new loss, dataset, fact and so on needs one function, and one line in one table.

`test_readme.py` trains a new model, loss and metric, the example of a page. Mistakes in the
function are reported before data are read.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.cases import quick_first
from vidjax.core import augment, fusion, losses, metrics, optim
from vidjax.data import sources
from vidjax.data.arrays import FeatureDict
from vidjax.models import build_system
from vidjax.runs import config_io


def open_blobs(data, cache_dir):
    """Returns a dataset of six people, who are random points."""
    rng = np.random.default_rng(data["seed"])
    people = rng.normal(size=(6, 12))
    splits, labels = {}, {}
    for split, count in {"train": 48, "val": 24}.items():
        frames = [people[i % 6] + rng.normal(size=(1 + i % 4, 12)) for i in range(count)]
        splits[split] = {f"{split}_{i}": {"face": np.float32(x)} for i, x in enumerate(frames)}
        labels |= {f"{split}_{i}": f"person_{i % 6}" for i in range(count)}
    return FeatureDict(splits, labels)


def first_frame(frames):
    return jax.tree.map(lambda x: x[:, :1], frames._replace(features=fusion.read(frames.features)))


def halve(rng, clips):
    keep = jax.random.bernoulli(rng, 0.5, clips.weight.shape)
    return clips._replace(weight=jnp.where(keep, clips.weight, clips.weight / 2))


def precision_at_1(clips, labels):
    first = clips.ranking[:, 0]
    return float(np.mean(labels[first] == 1 + np.arange(len(first))))


# Rows: table, name and value of the new line.
ADDITIONS = (
    (sources.DATASETS, "blobs", open_blobs),
    (fusion.FUSIONS, "first", first_frame),
    (augment.TRANSFORMS, "halve", augment.Transform(halve)),
    (metrics.CLIP_METRICS, "p1", metrics.Metric("precision at 1", "", precision_at_1)),
)
EXPERIMENT = """
from vidjax.runs import config as config_lib

def get_config(args=""):
    config = config_lib.default()
    config.data.name = "blobs"
    config.model.update(name="cosine", embed_dim=16, logit_scale=16.0)
    config.fusion.face = {"train": {"name": "first"}, "evaluate": {"name": "mean"}}
    config.batch_size, config.num_epochs, config.log_every_steps = 16, 10.0, 4
    config.optim.learning_rate = 0.02
    config.transforms = ("halve",)
    config.loss.margin = 0.2
    return config
"""


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_run_uses_added_dataset_fusion_transform_and_metric(tmp_path, monkeypatch, say):
    for table, name, value in ADDITIONS:
        monkeypatch.setitem(table, name, value)
    path, run = tmp_path / "probe.py", tmp_path / "run"
    path.write_text(EXPERIMENT)
    say(f"--config={path}", f"--workdir={run}")
    results = json.loads((run / "metrics.json").read_text())
    assert results["map"] <= results["p1"] <= 1
    # EXPERIMENT uses the other additions. A random order of 6 people has a MAP of about 0.25.
    assert results["map"] > 0.5
    assert "precision at 1" in (run / "report.html").read_text()


OWN = """from ml_collections import ConfigDict
import flax.linen as nn
import jax.numpy as jnp
import optax
from vidjax.core import augment, fusion, losses, metrics, optim
from vidjax.models import build_system
from vidjax.models.base import Identifier
from vidjax.runs import config_io
{function}
    return {wrong}
{table}["own"] = {value}
def get_config(args=""):
    config = config_io.load_file("cosine:face")
    {use}
    return config
"""
WRONG_LINE = 10
MODEL = """class Own(Identifier):
  num_classes: int
  logit_scale = 16.0
  @nn.compact
  def __call__(self, frames, clips, *, train):"""
OPTIMIZER = """def own():
  return optax.GradientTransformation(lambda params: (), update)
def update(updates, state, params=None):"""
DECAY = """def own(ramp):
  return schedule
def schedule(step):"""
# Rows: the table to which a file adds a function with a mistake; the function without its last
# line; the value in the table, and the line that chooses it.
MISTAKES = {
    "model": (build_system.MODELS, "build_system.MODELS", MODEL, "Own",
              "config.model = ConfigDict({'name': 'own'})"),
    "loss": (losses.CLASSIFICATION, "losses.CLASSIFICATION", "def own(logits, labels):", "own",
             "config.loss.classification = 'own'"),
    "margin": (losses.MARGINS, "losses.MARGINS", "def own(logits, labels, *, margin, scale):",
               "own", "config.loss.update(margin=0.5, margin_type='own')"),
    "fusion": (fusion.FUSIONS, "fusion.FUSIONS", "def own(frames):", "own",
               "config.fusion.face.train = ConfigDict({'name': 'own'})"),
    "metric": (metrics.CLIP_METRICS, "metrics.CLIP_METRICS", "def own(clips, labels):",
               "metrics.Metric('own', '', own)", "pass"),
    "transform": (augment.TRANSFORMS, "augment.TRANSFORMS", "def own(rng, clips):",
                  "augment.Transform(own)", "config.transforms = ('own',)"),
    "optimizer": (optim.OPTIMIZERS, "optim.OPTIMIZERS", OPTIMIZER, "own",
                  "config.optim.name = 'own'"),
    "decay": (optim.DECAYS, "optim.DECAYS", DECAY, "own", "config.optim.decay = 'own'"),
}  # fmt: skip


@pytest.fixture
def train_own(tmp_path, monkeypatch, command):
    """Returns a function that trains with one of MISTAKES, and returns the error and the file."""
    monkeypatch.setattr(config_io, "own_files", [])
    monkeypatch.setenv("VIDJAX_CACHE", str(tmp_path / "cache"))

    def train(name, wrong, **changes):
        table, *texts = MISTAKES[name]
        keys = dict(zip(("table", "function", "value", "use"), texts, strict=True))
        monkeypatch.setitem(table, "own", None)  # so that the line of the file is undone
        path = tmp_path / "own.py"
        path.write_text(OWN.format(wrong=wrong, **keys | changes))
        done = command(f"--config={path}", f"--workdir={tmp_path / 'run'}")
        assert done.refused(), done.err
        assert {x.name for x in tmp_path.iterdir()} == {"own.py"}  # no data were read or made
        return done.err, path

    return train


# The next test has quick cases of the other tables.
@pytest.mark.parametrize("name", quick_first(MISTAKES, 4))
def test_mistake_in_added_function_is_reported_with_its_line_before_data_are_read(train_own, name):
    error, path = train_own(name, "jnp.mistake")
    line = WRONG_LINE + MISTAKES[name][2].count("\n")
    assert f"'{path}' line {line}: AttributeError: module 'jax.numpy' has no attribute" in error


@pytest.mark.parametrize(("name", "wrong", "changes", "words"), [
    ("transform", "None", {}, "own.py': AttributeError: 'NoneType'"),
    ("transform", "clips", {"value": "own"}, "own.py': TypeError: cannot unpack"),
    ("optimizer", "None", {"function": "def own():"}, "own.py': "),
    ("decay", "0.1", {"function": "def own(ramp):"}, "own.py': "),
    ("metric", "'high'", {}, "the metric 'own' returns str: return a number"),
    ("metric", "1.0", {"value": "own"}, "own.py': AttributeError"),
    ("loss", "1.0", {}, "the loss 'own' returns float"),
    ("model", "frames", {}, "model Own returns <class 'dict'>"),
])  # fmt: skip
def test_wrong_result_of_a_function_is_reported_before_data(train_own, name, wrong, changes, words):
    assert words in train_own(name, wrong, **changes)[0]


def test_own_code_in_the_folder_of_the_shipped_files_is_traced(train_own, tmp_path, monkeypatch):
    monkeypatch.setattr(config_io, "shipped_folder", lambda: tmp_path)
    assert "own.py' line" in train_own("decay", "jnp.mistake")[0]
