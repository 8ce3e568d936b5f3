"""A new loss, model, dataset and so on needs one function, and one line in one table."""

import json
import re
import shutil

import pytest

from tests.conftest import ROOT, execute
from tests.helpers.small_runs import QUICK

COSFACE = """
def cosface(logits, labels, class_mask=None, *, logit_scale, margin):
    label = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return softmax_cross_entropy(logits - logit_scale * margin * label, labels, class_mask)
"""
MODEL = """
import flax.linen as nn
from vidjax.core import fusion
from vidjax.core.batch import ModelOutput
from vidjax.models.layers import CosineClassifier, real_frames

class Centroid(Identifier):
    modalities: Mapping[str, int]
    num_classes: int
    logit_scale: float = 16.0

    @nn.compact
    def __call__(self, frames, clips, *, train):
        frames, _ = real_frames(frames, self.modalities, clips.mask)
        x = fusion.mean_frame(next(iter(frames.values()))).features[:, 0]
        logits = CosineClassifier(self.num_classes, self.logit_scale, name="classifier")(x)
        return ModelOutput(logits[:, None], embedding=x)
"""
DATASET = """
import numpy as np

def open_blobs(data, digests):
    rng = np.random.default_rng(data["seed"])
    people = rng.normal(size=(6, 12))
    splits, labels = {}, {}
    for split, count in {"train": 48, "val": 24}.items():
        frames = [people[i % 6] + rng.normal(size=(1 + i % 4, 12)) for i in range(count)]
        splits[split] = {f"{split}_{i}": {"face": np.float32(x)} for i, x in enumerate(frames)}
        labels |= {f"{split}_{i}": f"person_{i % 6}" for i in range(count)}
    return FeatureDict(splits, labels)
"""
FUSION = """
def first_frame(frames):
    return jax.tree.map(lambda x: x[:, :1], frames._replace(features=read(frames.features)))
"""
TRANSFORM = """
def halve(rng, clips):
    keep = jax.random.bernoulli(rng, 0.5, clips.weight.shape)
    return clips._replace(weight=jnp.where(keep, clips.weight, clips.weight / 2))
"""
METRIC = """
def confident(clips, labels):
    return float(np.mean(clips.best[clips.pool] > np.log(0.5)))
"""
CONFIDENT = '"confident": Metric("confident clips", "above 0.5", confident, log=True)'
# Rows: file, table, new function, new line of the table.
ADDITIONS = (
    ("core/losses.py", "CLASSIFICATION", COSFACE, '"cosface": cosface'),
    ("models/identifier.py", "MODELS", MODEL, '"centroid": Centroid'),
    ("data/sources.py", "DATASETS", DATASET, '"blobs": open_blobs'),
    ("core/fusion.py", "FUSIONS", FUSION, '"first": first_frame'),
    ("core/augment.py", "TRANSFORMS", TRANSFORM, '"halve": Transform(halve)'),
    ("core/metrics.py", "CLIP_METRICS", METRIC, CONFIDENT),
)
EXPERIMENT = """
from vidjax.runs import config as config_lib

def get_config(args=""):
    config = config_lib.default()
    config.data.name = "blobs"
    config.model.update(name="centroid", logit_scale=16.0)
    config.fusion.face = {"train": {"name": "first"}, "evaluate": {"name": "mean"}}
    config.batch_size, config.num_epochs, config.log_every_steps = 16, 10.0, 4
    config.optim.learning_rate = 0.02
    config.transforms = ("halve",)
    config.loss.classification, config.loss.margin = "cosface", 0.2
    return config
"""


@pytest.mark.slow
def test_run_uses_added_loss_model_dataset_fusion_transform_and_metric(tmp_path):
    for name in ("vidjax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file, table, function, line in ADDITIONS:
        path = tmp_path / "vidjax" / file
        # The function comes before the table, and the line comes first in the table.
        start = rf"(?m)^{table}: .*\{{\n"
        source, count = re.subn(start, rf"{function}\n\g<0>    {line},\n", path.read_text())
        assert count == 1, f"{file} has no table {table}"
        path.write_text(source)
    (tmp_path / "configs" / "probe.py").write_text(EXPERIMENT)

    words = ("-m", "vidjax.main", "--config=configs/probe.py", "--workdir=run")
    copied = {"PYTHONPATH": str(tmp_path), "VIDJAX_CACHE": str(tmp_path / "cache")}
    done = execute(words, tmp_path, **QUICK, **copied)

    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run/metrics.json").read_text())
    assert 0 <= results["confident"] <= 1
    # EXPERIMENT uses the other additions. A random order of 6 people has a MAP of about 0.25.
    assert results["map"] > 0.5
    # The added metric is printed, logged and reported.
    assert "confident" in done.stdout
    assert '"confident"' in (tmp_path / "run/metrics.jsonl").read_text()
    assert "confident clips" in (tmp_path / "run/report.html").read_text()
