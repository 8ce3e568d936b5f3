"""Steps on some of the classes: which are drawn, what they change, and what they leave alone."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.made_steps import make, make_train_step
from tests.helpers.small_runs import (
    assert_equal_weights,
    interrupt_dispatch,
    run,
    saved,
    shrunk,
    weights,
)
from vidjax import config as config_lib
from vidjax import devices, losses
from vidjax.batch import ModelOutput
from vidjax.run import signals
from vidjax.steps import class_sharding, train_step
from vidjax.steps import state as state_lib
from vidjax.system import TaskSpec, make_system

MLP = "configs/quality_fusion.py:iqiyi_vid"
LINEAR = (
    "--config.model.layers=()",
    "--config.loss.schedule=((0.0,0.0),)",
    "--config.optim.decay=constant",
    "--config.optim.warmup=0",
)


def drawer(labels, mask, count, shape=(1, 1)):
    """Returns the function seed -> columns that are drawn."""
    mesh = devices.make_mesh(shape[0] * shape[1], shape[1])
    labels, mask = jnp.asarray(labels, jnp.int32), jnp.asarray(mask)

    @jax.jit
    def draw(seed):
        return class_sharding.draw(jax.random.key(seed), labels, mask, count, mesh)

    return lambda seed: np.asarray(draw(seed))


@pytest.mark.parametrize(
    "shape", [(1, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(1, 1), (2, 4)])]
)
def test_columns_of_labels_are_drawn_and_others_at_random(shape):
    mask, labels = np.arange(64) % 64 != 0, [5, 9, 9, 40, 63, 16]
    seen, draw = np.zeros(64), drawer(labels, mask, 10, shape)
    for seed in range(60):
        drawn = draw(seed)
        assert {*labels} <= {*drawn.tolist()}
        assert np.all(np.diff(drawn) > 0) and len(drawn) == 10 * shape[1]
        own = drawn.reshape(shape[1], -1) // (64 // shape[1])
        assert np.all(own == np.arange(shape[1])[:, None])  # each device draws its own
        seen[drawn] += 1
    others = np.delete(seen, [0, *labels])
    assert seen[0] == 0  # nothing learns of a class outside of the mask
    assert others.min() > 0 and others.max() < 60
    np.testing.assert_array_equal(draw(3), draw(3))


def test_a_label_outside_of_the_mask_is_drawn_too():
    assert drawer([0, 3], np.arange(8) > 0, 3)(0).tolist()[:1] == [0]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_step_changes_the_drawn_columns_as_a_smaller_classifier_would(name):
    words = (*LINEAR, "--config.loss.sampled_classes=0.2", f"--config.optim.name={name}")
    words += ("--config.optim.momentum=0",) if name == "sgd" else ()
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


def drawn_at(made, steps):
    """Returns the columns [n] that each of some steps of the only member draws."""
    labels, mask = made.state.labels[0], made.system.class_mask
    count = class_sharding.num_drawn(made.system, len(labels), made.mesh.shape["model"])

    @jax.jit
    def draw(step):
        *_, rng = train_step.member_keys(made.state.rng[0], step)
        return class_sharding.draw(rng, labels, mask, count, made.mesh)

    return [np.asarray(draw(step)) for step in range(steps)]


def adam_oracle(weights, x, labels, draws, rate):
    """Returns weights [D, K] and both moments after steps of softmax regression by Adam.

    Second moments of all columns fade in every step; first moments and weights wait for a draw.
    """
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step, drawn in enumerate(draws, start=1):
        scores = np.exp(x @ weights[:, drawn])
        error = scores / scores.sum(axis=1, keepdims=True) - (labels[:, None] == drawn)
        gradient = x.T @ error / len(x)
        first[:, drawn] = 0.9 * first[:, drawn] + 0.1 * gradient
        second *= 0.999
        second[:, drawn] += 0.001 * gradient**2
        mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
        weights[:, drawn] -= rate * mean[:, drawn] / (np.sqrt(square[:, drawn]) + 1e-8)
    return weights, first, second


def classifier_of(tree, count):
    """Returns kernel and bias of the only member as one matrix [D + 1, count]."""
    arrays = jax.device_get(tree["classifier"]["logits"])
    return np.concatenate([arrays["kernel"][0], arrays["bias"]])[:, :count]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2), (1, 1), (2, 1)])
def test_second_moments_fade_between_two_draws(shape):
    """Twelve steps in float64 by sums in numpy, on one device, and on two of either axis."""
    words = (*LINEAR, "--config.loss.sampled_classes=0.2", "--config.dtype=float64")
    with jax.enable_x64(True):
        made = make("quality_fusion", *words, num_identities=300, batch_size=24, shape=shape)
        fuse = made.system.fuse_eval  # it draws no frames, as that of training does
        made = made._replace(system=made.system._replace(fuse_train=fuse))
        frames = fuse["face"](jax.random.key(0), made.batch.frames["face"])
        x = np.pad(frames.features[:, 0], ((0, 0), (0, 1)), constant_values=1.0).astype(float)
        draws = drawn_at(made, 12)
        labels, rate = (
            np.asarray(made.state.labels[0]),
            float(np.asarray(made.system.lr_schedule(0))),
        )
        wanted = adam_oracle(classifier_of(made.state.params, 301), x, labels, draws, rate)
        (params, opt_state), _ = made.train(12)
    (adam,) = (part for part in opt_state if isinstance(part, optax.ScaleByAdamState))
    found = [classifier_of(tree, 301) for tree in (params, adam.mu, adam.nu)]
    last = np.full(301, -1)
    for step, drawn in enumerate(draws):
        last[drawn] = step
    assert len(set(last)) > 6  # some columns wait for several steps
    found[2] *= 0.999 ** (11 - last)  # they fade when they are drawn
    for ours, oracle in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-9, atol=1e-15)


def test_a_skipped_step_leaves_the_moments_and_their_steps_alone():
    words = (*LINEAR, "--config.loss.sampled_classes=0.2")
    made = make("quality_fusion", *words, num_identities=300, batch_size=24)
    step = make_train_step(made.system, made.mesh, made.axes)
    state, _ = step(made.state, made.tables, made.batch)
    face = made.batch.frames["face"]
    bad = made.batch._replace(frames={"face": face._replace(features=face.features * np.nan)})
    names = ("params", "opt_state", "updated")
    before = jax.device_get([getattr(state, name) for name in names])
    after, _ = step(state, made.tables, bad)
    assert int(after.bad_steps[0]) == 1
    found = jax.device_get([getattr(after, name) for name in names])
    jax.tree.map(np.testing.assert_array_equal, found, before)


def test_steps_on_all_classes_have_no_numbers_of_steps_in_their_state():
    all_of_them, few = (
        state_lib.as_items(make("quality_fusion", *LINEAR, *words).state)
        for words in ((), ("--config.loss.sampled_classes=0.2",))
    )
    assert all_of_them.pop("updated") is None
    assert few.pop("updated").shape == (1, 51)
    assert jax.tree.structure(all_of_them) == jax.tree.structure(few)


def test_a_step_that_draws_all_classes_is_one_on_all():
    words = ("--config.model.layers=((8,'swish',False,0.5),)", "--config.optim.warmup=0")
    few, all_of_them = (
        make("quality_fusion", *words, f"--config.loss.sampled_classes={rate}", num_identities=20)
        for rate in (0.1, 1.0)  # all: there are 32 labels
    )
    (found, losses), (wanted, other) = few.train(4), all_of_them.train(4)
    np.testing.assert_allclose(losses, other, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, wanted)


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
    found, wanted = (saved(tmp_path / name)["updated"] for name in ("stopped", "alone"))
    np.testing.assert_array_equal(found, wanted)
    assert 0 < len(np.unique(wanted)) < 1 + np.max(wanted)


def test_a_loss_of_embeddings_reads_class_columns():
    """Without distractors the first drawn column is an identity, whose clips are no distractors."""
    drawn, labels = jnp.array([3, 7, 9]), jnp.array([3, 3, 7, 7, 9, 9])
    embedding = jax.random.normal(jax.random.key(0), (6, 4))
    spec = config_lib.default().loss.to_dict() | {"embedding": "triplet"}
    output = ModelOutput(jnp.zeros((6, 1, 10)), embedding)
    mask, step = jnp.ones(6, bool), jnp.zeros((), jnp.int32)
    of_all = jax.jit(losses.make_objective(spec, None, 1.0, logit_scale=1.0))
    some = jax.jit(losses.make_objective(spec, None, 1.0, logit_scale=1.0, columns=drawn))
    places = jnp.searchsorted(drawn, labels)
    narrow = some(output._replace(logits=jnp.zeros((6, 1, 3))), places, mask, step)
    wide = of_all(output, labels, mask, step)
    np.testing.assert_allclose(narrow - np.log(3), wide - np.log(10), atol=1e-6)


def test_moments_that_would_not_fade_are_refused():
    words = (*LINEAR, "--config.loss.sampled_classes=0.5", "--config.optim.name=sgd")
    mesh = devices.make_mesh(1)
    for momentum in (0.0, 0.9):
        config = shrunk(*words, f"--config.optim.momentum={momentum}", spec=MLP)
        task = TaskSpec({"face": 8}, 20, None, 40, 10, train_other=False)
        system = make_system(config.to_dict(), task)
        if momentum:
            with pytest.raises(ValueError, match="only the moments of adam fade"):
                class_sharding.find_class_axes(system, task.modalities, mesh)
        else:
            class_sharding.find_class_axes(system, task.modalities, mesh)
