"""Several devices share the clips: training, checkpoints and rankings do not depend on them."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.helpers.cases import quick_first
from tests.helpers.small_runs import run, shrunk, weights
from vidjax.core import devices
from vidjax.utils.errors import VidjaxWarning

# The rates of a run that goes on for more epochs are those of one that always had them.
CONSTANT = ("decay=constant", "warmup=0", "warmup_scale=0", "total_decay=0")
SGD = tuple(f"--config.optim.{word}" for word in ("name=sgd", "learning_rate=0.01", *CONSTANT))

OFTEN = ("--config.log_every_steps=1", "--config.eval.report=False")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "given"),
    quick_first(
        [
            ("quality_fusion", (*SGD, "--config.data.mode=streaming")),
            ("quality_fusion", (*SGD, "--config.ensemble.seeds=2", "--config.data.mode=resident")),
            ("plda", ()),
            ("cosine", SGD),
            ("mma", SGD),
            ("deepmef", SGD),
        ],
        mark=pytest.mark.nightly,
    ),
)
def test_training_does_not_depend_on_the_number_of_devices(data, tmp_path, spec, given):
    """A run resumed on 4 devices equals a run on 1 device."""

    def train(folder, num_devices, epochs):
        words = (f"--config.num_epochs={epochs}", *given, *OFTEN)
        config = shrunk(*words, spec=f"configs/{spec}.py:iqiyi_vid")
        return run(config, tmp_path / folder, data, num_devices=num_devices)

    def last_loss(folder):  # PLDA has none
        rows = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        return [row["train_loss"] for row in rows if "train_loss" in row][-1:]

    if spec != "plda":  # which reads the clips twice, and then has learned everything
        train("one", 1, 1)
        shutil.copytree(tmp_path / "one", tmp_path / "moved")
    moved, single = train("moved", 4, 2), train("one", 1, 2)
    assert abs(moved["map"] - single["map"]) < 0.02
    resumed, expected = weights(tmp_path / "moved"), weights(tmp_path / "one")
    assert resumed.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(resumed[path], x, rtol=0, atol=1e-5, err_msg=path)
    np.testing.assert_allclose(last_loss("moved"), last_loss("one"), rtol=0, atol=1e-5)


def test_an_impossible_number_of_devices_is_refused():
    for number in (0, 9):
        with pytest.raises(ValueError, match=f"num_devices={number}: this machine has 8"):
            devices.make_mesh(number)


def test_a_warning_reports_a_gpu_that_jax_does_not_use(tmp_path, monkeypatch):
    chosen = jax.config.values["jax_platforms"]
    try:
        for there, platforms in ((tmp_path, "cpu"), (tmp_path / "none", None)):  # cpu on purpose
            monkeypatch.setattr(devices, "NVIDIA", there)
            jax.config.update("jax_platforms", platforms)
            devices.make_mesh(1)
        monkeypatch.setattr(devices, "NVIDIA", tmp_path)
        with pytest.warns(VidjaxWarning, match=r"uses the CPU.*vidjax\[cuda13\].*\[cuda12\]"):
            devices.make_mesh(1)
    finally:
        jax.config.update("jax_platforms", chosen)
