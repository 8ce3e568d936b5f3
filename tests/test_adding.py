"""A new loss, fusion, metric and so on needs one function, and one line in one table.

`test_readme.py` trains a new model, loss and metric, the example of a page. Mistakes in the
function are reported before data are read.
"""

import pytest

from vidjax.core import augment, fusion, losses, metrics, optim
from vidjax.models import build_system
from vidjax.runs import config_io

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


# The next test has cases of the other tables.
@pytest.mark.parametrize("name", ["model", "loss", "margin", "fusion"])
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
