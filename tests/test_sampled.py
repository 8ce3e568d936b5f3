"""Steps on some of the classes: which are drawn, what they change, and what they leave alone."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.made_steps import make
from tests.helpers.small_runs import (
    assert_equal_weights,
    interrupt_dispatch,
    run,
    shrunk,
    weights,
)
from vidjax import devices
from vidjax.data.load import load_dataset
from vidjax.run import signals
from vidjax.steps import sampled

LINEAR = (
    "--config.model.layers=()",
    "--config.loss.schedule=((0.0,0.0),)",
    "--config.optim.decay=constant",
    "--config.optim.warmup=0",
)


def draw(seed, labels, mask, count, shape=(1, 1)):
    mesh = devices.make_mesh(shape[0] * shape[1], shape[1])
    rng, labels = jax.random.key(seed), jnp.asarray(labels, jnp.int32)
    function = jax.jit(lambda rng: sampled.draw(rng, labels, jnp.asarray(mask), count, mesh))
    return np.asarray(function(rng))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 4)])
def test_columns_of_labels_are_drawn_and_others_at_random(shape):
    mask, labels = np.arange(64) % 64 != 0, [5, 9, 9, 40, 63, 16]
    seen = np.zeros(64)
    for seed in range(60):
        drawn = draw(seed, labels, mask, 10, shape)
        assert {*labels} <= {*drawn.tolist()}
        assert np.all(np.diff(drawn) > 0) and len(drawn) == 10 * shape[1]
        own = drawn.reshape(shape[1], -1) // (64 // shape[1])
        assert np.all(own == np.arange(shape[1])[:, None])  # each device draws its own
        seen[drawn] += 1
    others = np.delete(seen, [0, *labels])
    assert seen[0] == 0  # nothing learns of a class outside of the mask
    assert others.min() > 0 and others.max() < 60
    again = draw(3, labels, mask, 10, shape)
    np.testing.assert_array_equal(draw(3, labels, mask, 10, shape), again)


def test_a_label_outside_of_the_mask_is_drawn_too():
    assert draw(0, [0, 3], np.arange(8) > 0, 3).tolist()[:1] == [0]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_step_changes_the_drawn_columns_as_a_smaller_classifier_would(name):
    words = (*LINEAR, "--config.loss.sampled_classes=0.2", f"--config.optim.name={name}")
    made = make("quality_fusion", *words, num_identities=300, batch_size=24)
    before = jax.device_get((made.state.params, made.state.opt_state))
    labels = np.unique(np.asarray(made.state.labels))
    (params, opt_state), _ = made.train(1)
    old, new = before[0]["classifier"]["logits"], params["classifier"]["logits"]
    changed = np.flatnonzero(np.any(old["kernel"][0] != new["kernel"][0], axis=0))
    assert {*labels.tolist()} <= {*changed.tolist()} and len(changed) == 61

    moments = {key: x for key, x in zip(("old", "new"), (before[1], opt_state), strict=True)}
    for key in moments:
        leaves = [x for x in jax.tree.leaves(moments[key]) if np.shape(x)[-1:] == (301,)]
        for leaf in leaves:
            assert np.all(np.delete(leaf[0], changed, axis=-1) == 0)
    others = np.delete(new["kernel"][0], changed, axis=1)
    np.testing.assert_array_equal(others, np.delete(old["kernel"][0], changed, axis=1))


def test_a_step_that_draws_all_classes_is_one_on_all():
    words = ("--config.model.layers=((8,'swish',False,0.5),)", "--config.optim.warmup=0")
    few, all_of_them = (
        make("quality_fusion", *words, f"--config.loss.sampled_classes={rate}", num_identities=20)
        for rate in (0.1, 1.0)  # all: there are 32 labels
    )
    (found, losses), (wanted, other) = few.train(4), all_of_them.train(4)
    np.testing.assert_allclose(losses, other, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, wanted)


@pytest.fixture(scope="module")
def data(official_dir, cache_dir):
    return load_dataset("iqiyi_vid", directory=str(official_dir), cache_dir=str(cache_dir))


def test_a_model_without_a_classifier_is_one_error(data, tmp_path):
    config = shrunk("--config.loss.sampled_classes=0.5", spec="configs/knn.py:iqiyi_vid")
    with pytest.raises(ValueError, match=r"config\.loss\.sampled_classes=1") as caught:
        run(config, tmp_path, data)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.slow
def test_members_streaming_and_resumption_change_nothing(data, tmp_path):
    """With so few labels a step that half of the classes are left out."""
    words = ("--config.loss.sampled_classes=0.3", "--config.batch_size=4", "--config.num_epochs=2")
    spec = "configs/cosine.py:iqiyi_vid"
    both = shrunk(*words, "--config.ensemble.seeds=2", "--config.ensemble.mapping=map", spec=spec)
    run(both, tmp_path / "both", data)
    run(shrunk(*words, spec=spec), tmp_path / "alone", data)
    together, alone = weights(tmp_path / "both"), weights(tmp_path / "alone")
    for name, value in alone.items():
        np.testing.assert_array_equal(together[name][:1], value, err_msg=name)
    stopped = shrunk(*words, spec=spec)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_dispatch(patch, 1, signal.SIGTERM)
        with pytest.raises(signals.Interrupted):
            run(stopped, tmp_path / "stopped", data)
    run(stopped, tmp_path / "stopped", data)
    assert_equal_weights(tmp_path / "stopped", tmp_path / "alone")
