"""The cosine-margin net: its equations as float64 loops, its masks, its margin and its scale."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.made_models import (
    DIMS,
    eval_logits,
    eval_output,
    init_identifier,
    make_batch,
    make_model,
    randomised,
    train_logits,
    train_output,
)
from vidjax import config as config_lib
from vidjax import losses

SPEC = {"name": "cosine", "embed_dim": 7}


def unit(x):
    return x / np.linalg.norm(x)


def means(frames, clips):
    """The mean frame of every clip as float64, by modality; None where there is none."""
    found = {}
    for name, one in frames.items():
        mask = one.mask & clips.mask[:, None]
        rows = zip(np.asarray(one.features, np.float64), mask, strict=True)
        found[name] = [x[real].mean(axis=0) if real.any() else None for x, real in rows]
    return found


def oracle(params, stats, frames, clips):
    """Z and the logits clip by clip; BatchNorm by the batch if there are no statistics."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    parts = [[] for _ in clips.mask]
    for m, (name, vectors) in enumerate(means(frames, clips).items()):
        layer = params[f"{name}_map"]
        mapped = [
            None if x is None else 0.1 * x @ layer["dense"]["kernel"] + layer["dense"]["bias"]
            for x in vectors
        ]
        real = np.stack([x for x in mapped if x is not None])
        mean, var = real.mean(axis=0), real.var(axis=0)
        if stats:
            mean, var = stats[f"{name}_map"]["norm"]["mean"], stats[f"{name}_map"]["norm"]["var"]
        for b, x in enumerate(mapped):
            if x is None:
                parts[b].append(np.zeros(SPEC["embed_dim"]))
                continue
            x = (x - mean) / np.sqrt(var + 1e-5) * layer["norm"]["scale"] + layer["norm"]["bias"]
            parts[b].append(params["weights"][m] * unit(x))
    kernel = params["classifier"]["kernel"]
    directions = kernel / np.linalg.norm(kernel, axis=0)
    z = np.stack([np.concatenate(p) for p in parts])
    z = np.stack([unit(x) if x.any() else x for x in z])
    return z, params["scale"] * z @ directions


def objective(margin):
    spec = config_lib.default().loss.to_dict() | {"margin": margin, "margin_type": "cosine"}
    return losses.make_objective(spec, None, 10, logit_scale=16.0)


@pytest.fixture(scope="module")
def net():
    frames, clips = make_batch()
    model = make_model(SPEC)
    variables = init_identifier(model, frames, clips)
    return model, {**variables, "params": randomised(variables["params"])}, frames, clips


@pytest.mark.parametrize("train", [True, False])
def test_the_net_matches_its_equations(train):
    with jax.enable_x64(True):
        frames, clips = make_batch()
        model = make_model(SPEC, dtype="float64")
        variables = init_identifier(model, frames, clips)
        params, stats = randomised(variables["params"]), randomised(variables["batch_stats"])
        stats = jax.tree.map(np.abs, stats)
        variables = {"params": params, "batch_stats": stats}
        if train:
            output, _ = train_output(model, variables, frames, clips, jax.random.key(0))
        else:
            output = eval_output(model, variables, frames, clips)
        z, logits = oracle(params, None if train else stats, frames, clips)
        assert output.embedding.dtype == np.float64
        np.testing.assert_allclose(output.embedding, z, atol=1e-6)
        np.testing.assert_allclose(output.logits[:, 0], logits, atol=1e-5)
        np.testing.assert_array_equal(output.logit_scale, params["scale"][None])


def test_weights_start_at_halves_and_the_scale_as_it_is_given():
    frames, clips = make_batch()
    params = init_identifier(make_model(SPEC, logit_scale=9.0), frames, clips)["params"]
    np.testing.assert_array_equal(params["weights"], [1, 0.5, 0.25])
    assert params["scale"] == 9
    assert make_model(SPEC).logit_scale == 16


def test_lengths_that_a_unit_vector_takes_away_have_no_effect(net):
    """Of the weights together, of the directions of classes; in training, of a whole modality."""
    model, variables, frames, clips = net
    params = variables["params"]
    logits = eval_logits(model, variables, frames, clips)
    lengths = np.random.default_rng(0).uniform(0.2, 5, 5).astype(np.float32)
    for changed in (
        {"weights": 7 * params["weights"]},
        {"classifier": {"kernel": params["classifier"]["kernel"] * lengths}},
    ):
        other = {**variables, "params": {**params, **changed}}
        np.testing.assert_allclose(eval_logits(model, other, frames, clips), logits, atol=2e-5)
    assert np.all(np.abs(logits) <= params["scale"] * 1.0001)
    norms = np.linalg.norm(eval_output(model, variables, frames, clips).embedding, axis=1)
    seen = np.stack([one.mask.any(axis=1) for one in frames.values()]).any(axis=0) & clips.mask
    np.testing.assert_allclose(norms, seen, atol=1e-6)

    scales = (1e3, 3e3)  # far above BatchNorm's epsilon; a bias of the map is its own constant
    both = [make_model(SPEC, feature_scale=scale) for scale in scales]
    scaled, plain = (train_logits(model, variables, frames, clips)[0] for model in both)
    np.testing.assert_allclose(scaled, plain, atol=2e-4)


def test_gradients_are_finite_for_clips_without_any_modality(net):
    model, variables, frames, clips = net
    nothing = {name: one._replace(mask=np.zeros_like(one.mask)) for name, one in frames.items()}
    zeros = {
        name: one._replace(features=np.zeros_like(one.features)) for name, one in frames.items()
    }

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=1)
    def gradient(model, params, frames):
        learned = {**variables, "params": params}
        output, _ = train_output(model, learned, frames, clips, jax.random.key(5))
        return jnp.sum(objective(0.15)(output, clips.labels, clips.mask, jnp.int32(0)))

    dropping = make_model(SPEC, modality_dropout_rate=0.9, dropout_rate=0.5)
    for one, batch in ((model, frames), (dropping, frames), (model, nothing), (model, zeros)):
        for leaf in jax.tree.leaves(gradient(one, variables["params"], batch)):
            assert np.isfinite(leaf).all()
    learned = gradient(model, variables["params"], frames)
    assert np.all(np.asarray(learned["weights"]) != 0) and learned["scale"] != 0
    # Of nothing at all there is nothing to learn but that the margin costs.
    idle = gradient(model, variables["params"], nothing)
    idle = {name: leaves for name, leaves in idle.items() if name != "scale"}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(idle))


def test_a_dropped_modality_still_counts_in_the_statistics(net):
    """The batch statistics are of the clips that have a modality, whichever are dropped."""
    _, variables, frames, clips = net
    _, kept = train_logits(make_model(SPEC), variables, frames, clips)
    dropping = make_model(SPEC, modality_dropout_rate=0.9)
    _, dropped = train_logits(dropping, variables, frames, clips)
    jax.tree.map(np.testing.assert_array_equal, dropped, kept)


def test_dropout_acts_on_a_unit_vector_that_keeps_its_scale(net):
    """Each coordinate of z is 0 or doubled, and z is not made a unit vector again."""
    _, variables, frames, clips = net
    width = 7 * len(DIMS)
    axes = {"classifier": {"kernel": np.eye(width, dtype=np.float32)}}
    variables = {**variables, "params": {**variables["params"], **axes}}
    model = make_model(SPEC, dropout_rate=0.5, num_classes=width)
    output, _ = train_output(model, variables, frames, clips, jax.random.key(5))
    z, scale = np.asarray(output.embedding), variables["params"]["scale"]
    dropped = np.asarray(output.logits[:, 0]) / scale
    is_kept = dropped != 0
    assert 0.3 < is_kept[z != 0].mean() < 0.7
    np.testing.assert_allclose(dropped[is_kept], 2 * z[is_kept], rtol=1e-5)


def test_the_margin_lowers_the_logit_of_the_label_alone_and_by_the_learned_scale(net):
    """By s times m with the s that the model has now, not the one that it started with."""
    model, variables, frames, clips = net
    output, _ = train_output(model, variables, frames, clips, jax.random.key(5))
    logits, scale = np.asarray(output.logits[:, 0], np.float64), float(variables["params"]["scale"])
    assert abs(scale - 16) > 0.01
    lowered = logits.copy()
    lowered[np.arange(8), clips.labels] -= scale * 0.15
    expected = np.log(np.exp(lowered).sum(axis=1)) - lowered[np.arange(8), clips.labels]
    loss = objective(0.15)(output, clips.labels, clips.mask, jnp.int32(0))
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)

    # Evaluation never sees a label: the same logits with and without them.
    without = eval_logits(model, variables, frames, clips._replace(labels=None))
    np.testing.assert_array_equal(eval_logits(model, variables, frames, clips), without)


def test_the_scale_learns_through_the_margin():
    """The derivative by s of the loss of s (cosine - m at the label), by differences in float64."""
    rng, labels = np.random.default_rng(2), np.array([1, 3, 0, 2])
    with jax.enable_x64(True):
        cosines = jnp.asarray(rng.uniform(-1, 1, (4, 1, 5)))

        def loss(scale):
            output: Any = losses.ModelOutput(scale * cosines, cosines, logit_scale=scale[None])
            return jnp.sum(objective(0.15)(output, labels, np.ones(4, bool), jnp.int32(0)))

        shifted = np.asarray(cosines)[:, 0].copy()
        shifted[np.arange(4), labels] -= 0.15

        def by_hand(scale):
            z = scale * shifted
            return np.sum(np.log(np.exp(z).sum(axis=1)) - z[np.arange(4), labels])

        slope = (by_hand(12 + 1e-5) - by_hand(12 - 1e-5)) / 2e-5
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.asarray(12.0)), slope, rtol=1e-6)


def test_a_fallback_keeps_the_scale_that_each_model_learned(net):
    _, _, frames, clips = net
    dense = {"name": "dense", "layers": (), "head": "cosine", "logit_scale": 16.0}
    for main, other in ((SPEC, dense), (dense, SPEC)):
        spec = {"name": "fallback", "main": main, "other": other, "other_modalities": ("head",)}
        model = make_model(spec)
        variables = init_identifier(model, frames, clips)
        params = {
            part: {**leaves, **({"scale": np.float32(20 + i)} if "scale" in leaves else {})}
            for i, (part, leaves) in enumerate(variables["params"].items())
        }
        output = eval_output(model, {**variables, "params": params}, frames, clips)
        wanted = [params[part].get("scale", 16) for part in ("main", "other")]
        np.testing.assert_array_equal(output.logit_scale, wanted)
        labels = np.stack([clips.labels] * 2, axis=1)
        harder = losses.cosine_margin(output.logits, labels, margin=0.1, scale=output.logit_scale)
        lowered = np.take_along_axis(np.asarray(output.logits - harder), labels[..., None], 2)
        np.testing.assert_allclose(lowered[..., 0], 0.1 * np.array([wanted] * 8), rtol=1e-4)
    plain = {"name": "fallback", "main": dense, "other": dense, "other_modalities": ("head",)}
    model: Any = make_model(plain)
    init = functools.partial(model.init_with_output, jax.random.key(0), train=False)
    output, _ = jax.eval_shape(lambda: init(frames, clips))
    assert output.logit_scale is None
