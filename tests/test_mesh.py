"""Several devices share the clips: training, checkpoints and rankings do not depend on them."""

import json

import jax
import numpy as np
import pytest

from tests.helpers.cases import quick_first
from tests.helpers.small_runs import run, saved, shrunk
from vidjax.core import devices
from vidjax.utils.errors import VidjaxWarning

SGD = ("--config.optim.name=sgd", "--config.optim.learning_rate=0.01")


def learned(workdir):
    """Returns path -> saved parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(saved(workdir).get("params", {}))
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "words"),
    quick_first(
        [
            ("quality_fusion", (*SGD, "--config.ensemble.seeds=2", "--config.data.mode=streaming")),
            ("plda", ()),
            ("cosine", SGD),
            ("mma", SGD),
            ("deepmef", SGD),
        ],
        mark=pytest.mark.nightly,
    ),
)
def test_training_does_not_depend_on_the_number_of_devices(data, tmp_path, spec, words):
    found = []
    for number in (1, 4):
        folder = tmp_path / str(number)
        config = configured(spec, "--config.num_epochs=3.3", *words)  # 10 steps
        results = run(config, folder, data, num_devices=number)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses = [row["train_loss"] for row in map(json.loads, lines) if "train_loss" in row]
        found.append((learned(folder), losses, results["map"]))
    (weights, losses, score), (other_weights, other_losses, other_score) = found
    assert weights.keys() == other_weights.keys()
    for path, x in weights.items():
        np.testing.assert_allclose(other_weights[path], x, rtol=0, atol=1e-5, err_msg=path)
    np.testing.assert_allclose(other_losses, losses, rtol=0, atol=1e-5)
    assert abs(other_score - score) < 0.02


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_devices(data, tmp_path):
    words = (*SGD, "--config.optim.decay=constant", "--config.optim.warmup=0")
    words = (*words, "--config.optim.warmup_scale=0")
    words = (*words, "--config.optim.total_decay=0", "--config.data.mode=resident")
    for number, epochs in [(8, 1), (1, 2), (2, 3)]:
        config = configured("quality_fusion", f"--config.num_epochs={epochs}", *words)
        run(config, tmp_path / "moved", data, num_devices=number)
    run(configured("quality_fusion", "--config.num_epochs=3", *words), tmp_path / "still", data)
    moved, still = learned(tmp_path / "moved"), learned(tmp_path / "still")
    for path, x in still.items():
        np.testing.assert_allclose(moved[path], x, rtol=0, atol=1e-5, err_msg=path)


def test_more_devices_than_there_are_are_one_error():
    for number in (0, 9):
        with pytest.raises(ValueError, match=f"num_devices={number}: this machine has 8"):
            devices.make_mesh(number)


def test_a_gpu_that_jax_does_not_use_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "NVIDIA", tmp_path)
    chosen = jax.config.values["jax_platforms"]
    try:
        jax.config.update("jax_platforms", "cpu")  # on purpose
        devices.make_mesh(1)
        jax.config.update("jax_platforms", None)
        wanted = r"uses the CPU.*vidjax\[cuda13\].*\[cuda12\]"
        with pytest.warns(VidjaxWarning, match=wanted) as told:
            devices.make_mesh(1)
    finally:
        jax.config.update("jax_platforms", chosen)
    assert "\n" not in str(told[0].message)
    monkeypatch.setattr(devices, "NVIDIA", tmp_path / "none")
    devices.make_mesh(1)


def configured(spec, *words):
    """Returns a small configuration of a shipped experiment."""
    return shrunk(*words, spec=f"configs/{spec}.py:iqiyi_vid")
