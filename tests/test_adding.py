"""A new loss, dataset, fact and so on needs one function, and one line in one table.

`test_readme.py` trains a new model, the example of a page.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidjax.core import augment, fusion, losses, metrics
from vidjax.data import sources
from vidjax.data.arrays import FeatureDict
from vidjax.runs import checkpoint, facts
from vidjax.training import resume


def cosface(logits, labels, class_mask=None, *, logit_scale, margin):
    harder = logits.at[jnp.arange(len(labels)), labels].add(-logit_scale * margin)
    return losses.softmax_cross_entropy(harder, labels, class_mask)


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


def top5(clips, labels):
    known = clips.pool & (labels > 0)
    return float(np.mean(clips.rank[known] < 5))


def precision_at_1(clips, labels):
    first = clips.ranking[:, 0]
    return float(np.mean(labels[first] == 1 + np.arange(len(first))))


def worst_recall(clips, labels):
    people = np.unique(labels[labels > 0])
    return float(min(np.mean(clips.identity[labels == person] == person) for person in people))


# Rows: table, name and value of the new line.
ADDITIONS = (
    (losses.CLASSIFICATION, "cosface", cosface),
    (sources.DATASETS, "blobs", open_blobs),
    (fusion.FUSIONS, "first", first_frame),
    (augment.TRANSFORMS, "halve", augment.Transform(halve)),
    (metrics.CLIP_METRICS, "top5", metrics.Metric("top-5", "", top5, log=True)),
    (metrics.CLIP_METRICS, "p1", metrics.Metric("precision at 1", "", precision_at_1)),
    (metrics.CLIP_METRICS, "worst", metrics.Metric("worst recall", "", worst_recall)),
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
    config.loss.classification, config.loss.margin = "cosface", 0.2
    return config
"""


@pytest.mark.slow
def test_run_uses_added_loss_dataset_fusion_transform_and_metric(tmp_path, monkeypatch, say):
    for table, name, value in ADDITIONS:
        monkeypatch.setitem(table, name, value)
    path, run = tmp_path / "probe.py", tmp_path / "run"
    path.write_text(EXPERIMENT)
    output = say(f"--config={path}", f"--workdir={run}")
    results = json.loads((run / "metrics.json").read_text())
    assert 0 <= results["worst"] <= results["top1"] <= results["top5"] <= 1
    assert results["map"] <= results["p1"] <= 1
    # EXPERIMENT uses the other additions. A random order of 6 people has a MAP of about 0.25.
    assert results["map"] > 0.5
    # The added metric is printed, logged and reported.
    assert "top-5" in output and '"top5"' in (run / "metrics.jsonl").read_text()
    assert "precision at 1" in (run / "report.html").read_text()


def test_added_fact_about_a_run_is_stored_kept_and_described(tmp_path, monkeypatch, say):
    """Only the tuple of facts and the function that computes the new fact change."""
    added = facts.Fact(
        key="sensor", kind=str, describe="a {} camera".format, label="camera",
        sentence="{run} has {text}.",
    )  # fmt: skip
    monkeypatch.setattr(facts, "FACTS", (*facts.FACTS, added))
    start = resume.start

    def start_with_fact(*args):
        begun = start(*args)
        begun.facts["sensor"] = "new"
        return begun

    monkeypatch.setattr(resume, "start", start_with_fact)
    run, other = tmp_path / "run", tmp_path / "other"
    summary = say("--config=configs/knn.py", f"--workdir={run}")
    shutil.copytree(run, other)
    (entries,) = checkpoint.manifests(run).values()
    assert entries["sensor"] == json.loads((run / "metrics.json").read_text())["sensor"] == "new"
    for text in (summary, say("evaluate", f"--workdir={run}")):  # an evaluation keeps the fact
        assert ["camera", "a new camera"] in [x.split(maxsplit=1) for x in text.splitlines()]
    assert "a new camera" in (run / "report.html").read_text()
    assert f"{run} has a new camera." in say("compare", f"--runs={run},{other}")
