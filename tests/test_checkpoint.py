"""Checkpoints: what is saved comes back, damage is found, latest and best are kept."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidjax.core import devices
from vidjax.runs import checkpoint


@pytest.fixture
def items():
    state = {"w": jnp.arange(12.0).reshape(3, 4), "rng": jax.random.key(3)}
    return {"params": {"a": jnp.ones((4, 2))}, "model_state": {}, "train": state}


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def restore_latest(workdir, items):
    latest = checkpoint.find(workdir)
    assert latest is not None
    restored = checkpoint.load(latest, items, devices.replicated_layout(devices.make_mesh()))
    checkpoint.set_aside_later(workdir, latest.manifest["step"])
    return restored, latest.manifest


def test_restored_checkpoint_equals_the_saved_arrays_and_facts(tmp_path, items):
    assert checkpoint.find(tmp_path) is None
    checkpoint.save(tmp_path, 5, items, {"seconds": 1.5})
    restored, manifest = restore_latest(tmp_path, items)
    assert_same(items, restored)
    assert (manifest["step"], manifest["seconds"]) == (5, 1.5)
    assert restored["params"]["a"].sharding.num_devices == 8  # all of this process
    # A saved step keeps its arrays and gains facts.
    checkpoint.save(tmp_path, 5, {**items, "params": {"a": jnp.zeros((4, 2))}}, {"map": 0.5})
    restored, manifest = restore_latest(tmp_path, items)
    assert (manifest["seconds"], manifest["map"]) == (1.5, 0.5)
    assert_same(items, restored)
    # Another model is refused.
    for other in (jnp.ones((4, 3)), jnp.ones((4, 2), jnp.bfloat16)):
        with pytest.raises(checkpoint.CheckpointError, match=r"another model(.|\n)*float32\[4, 2"):
            restore_latest(tmp_path, {**items, "params": {"a": other}})


def test_checkpoint_that_is_deleted_during_a_search_is_skipped(tmp_path, items, monkeypatch):
    for step in (2, 3):
        checkpoint.save(tmp_path, step, items, {})
    manifests = checkpoint.manifests

    def read_and_drop(workdir):
        listed = manifests(workdir)
        shutil.rmtree(workdir / "checkpoints" / "3")
        return listed

    monkeypatch.setattr(checkpoint, "manifests", read_and_drop)
    with pytest.warns(match="checkpoint 3 is not used"):
        latest = checkpoint.find(tmp_path)
    assert latest and latest.manifest["step"] == 2


def test_two_latest_and_the_best_checkpoint_are_kept(tmp_path, items):
    for step, score in [(1, 0.2), (2, 0.9), (3, 0.5), (4, None), (5, 0.1)]:
        checkpoint.save(tmp_path, step, items, {} if score is None else {"map": score})
    assert checkpoint.find_best(checkpoint.manifests(tmp_path)) == 2
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]
    for step in (1, 2, 3, 4):  # the one before is the last evaluated
        facts = {"evaluated": True, "map": 0.5} if step < 3 else {}
        checkpoint.save(tmp_path / "other", step, items, facts)
    assert list(checkpoint.manifests(tmp_path / "other")) == [2, 4]


def test_interrupted_save_or_deletion_leaves_no_checkpoint(tmp_path, items):
    folder = tmp_path / "checkpoints"
    checkpoint.save(tmp_path, 1, items, {})
    half = folder / ".partial" / "3" / "state"
    half.mkdir(parents=True)
    (half / "half").write_bytes(b"x")
    assert restore_latest(tmp_path, items)[1]["step"] == 1
    checkpoint.save(tmp_path, 2, items, {})
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
    (folder / ".partial").mkdir()
    (folder / "1").rename(folder / ".partial" / "1")
    files = (folder / ".partial" / "1" / "state").rglob("*")
    max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size).unlink()
    (folder / "2" / ".manifest.json.77.partial").write_text("{")  # a kill while facts were added
    for step in (3, 4):
        checkpoint.save(tmp_path, step, items, {})
    assert sorted(p.name for p in folder.iterdir()) == ["3", "4"]
