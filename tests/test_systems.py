"""The shipped experiments at their real size, by the commands that a user types. Minutes long."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import published
from tests.helpers.cases import quick_first
from tests.helpers.made_steps import make_train_step
from vidjax.core import devices, ensemble
from vidjax.core.batch import Batch, Frames
from vidjax.core.devices import compile_seconds
from vidjax.training import train_step

pytestmark = pytest.mark.slow
REAL_DATA = os.environ.get("VIDJAX_REAL_DATA")
NO_REPORT = "--config.eval.report=False"


def results(vidjax_command, workdir, *words):
    done = vidjax_command(*words, NO_REPORT, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return json.loads((workdir / "metrics.json").read_text())


@pytest.mark.parametrize("seed", quick_first([0, 1], mark=pytest.mark.nightly))
def test_all_modalities_beat_each_alone_and_neighbours(vidjax_command, tmp_path, cache_dir, seed):
    """The first command of the README, with another seed of everything."""
    seeds = (f"--config.seed={seed}", f"--config.data.seed={seed}")

    def score(spec):
        name = spec.replace("/", "-").replace(":", "-")
        return results(vidjax_command, tmp_path / name, f"--config={spec}", *seeds)["map"]

    whole = score("configs/mma.py")
    others = {spec: score(spec) for spec in ("configs/knn.py", "configs/mma.py:face")}
    if seed:  # the weak ones are far below
        others |= {spec: score(spec) for spec in ("configs/mma.py:head", "configs/mma.py:audio")}
    assert whole > max(others.values()), (whole, others)
    assert list((cache_dir / "programs").glob("*/jit_loop-*")), "no compiled program was kept"


@pytest.mark.skipif(not REAL_DATA, reason="needs the folder VIDJAX_REAL_DATA")
def test_real_clips(vidjax_command, tmp_path):
    """Five nets of the README, .912 there: another processor rounds otherwise."""
    spec = "configs/mma.py:iqiyi_vid,few,face,head,audio"
    words = (f"--config={spec}", f"--config.data.dir={REAL_DATA}", "--config.ensemble.seeds=5")
    metrics = results(vidjax_command, tmp_path, *words)
    counts = [metrics[key] for key in ("num_clips", "num_distractors", "num_identities")]
    assert metrics["map_kind"] == "val" and counts == [1232, 373, 413]
    assert metrics["map"] >= 0.905
    scored = vidjax_command("score", f"{REAL_DATA}/val_gt.txt", tmp_path / "ranking.txt")
    assert float(scored.stdout.split()[-1]) == metrics["map"]


def made_up_batch(rng, config, rows):
    def frames(name):
        length = 1 if name == "audio" else config.data.max_frames
        width = 2048 if name == "scene" else 512
        features = rng.normal(size=(rows, length, width)).astype(np.float16)
        flat = np.ones((rows, length), np.float32)
        mask = np.arange(length) < rng.integers(1, length + 1, (rows, 1))
        return Frames(features, 80 * flat, flat, np.zeros_like(flat, np.int32), mask)

    index = rng.choice(published.CLIPS, rows, replace=False).astype(np.int32)
    return Batch({name: frames(name) for name in config.modalities}, index, np.ones(rows, bool))


@pytest.mark.parametrize(
    "name",
    quick_first(
        [
            "noise_classes:iqiyi_vid",
            "mma:iqiyi_vid",
            "mma:iqiyi_vid,published",
            "deepmef:iqiyi_vid,face,scene,published",
        ],
        mark=pytest.mark.nightly,
    ),
)
def test_published_size(name):
    """A few steps of 8 clips at 10,035 classes and more."""
    config, system = published.official(name)
    rng = np.random.default_rng(0)
    labels = jnp.asarray(rng.integers(1, 10_035, (1, published.CLIPS)), jnp.int32)
    mesh = devices.make_mesh(1)
    replicated = devices.replicated(mesh)
    state = jax.jit(lambda: published.init(system, labels), out_shardings=replicated)()
    batch = devices.shard_batch(mesh, made_up_batch(rng, config, 8))
    tables = train_step.make_tables((ensemble.Member(),), np.ones((1, published.CLIPS)))
    tables = devices.replicate(mesh, tables)
    step = make_train_step(system, mesh)
    state, loss = step(state, tables, batch)
    with compile_seconds() as clock:
        state, other = step(state, tables, batch)
    assert not clock  # one compilation
    if config.model.get("map_norm"):  # without, logits are as large as the features
        assert float(loss[0]) == pytest.approx(np.log(10_034), rel=0.2)
    assert np.isfinite(loss).all() and np.isfinite(other).all()
