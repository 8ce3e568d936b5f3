"""The cosine-margin net: its equations as float64 loops, its masks, its margin and its scale."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import made_models as made
from tests.helpers.cases import quick_first
from tests.helpers.embeddings import unit
from vidjax.core import losses
from vidjax.runs import config as config_lib

SPEC = {"name": "cosine", "embed_dim": 7}


def oracle(params, stats, frames, clips, *, feature_scale):
    """Z and the logits clip by clip; BatchNorm by the batch if there are no statistics."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    parts = [[] for _ in clips.mask]
    for m, (name, part) in enumerate(frames.items()):
        layer, mapped = params[f"{name}_map"], []
        mask = part.mask & clips.mask[:, None]
        for x, real in zip(np.asarray(part.features, np.float64), mask, strict=True):
            x = feature_scale * x[real].mean(axis=0) if real.any() else None
            dense = layer["dense"]
            mapped.append(None if x is None else x @ dense["kernel"] + dense["bias"])
        seen = np.stack([x for x in mapped if x is not None])
        norm = stats[f"{name}_map"]["norm"] if stats else None
        mean, var = (norm["mean"], norm["var"]) if norm else (seen.mean(axis=0), seen.var(axis=0))
        for b, x in enumerate(mapped):
            if x is None:
                parts[b].append(np.zeros(SPEC["embed_dim"]))
                continue
            x = (x - mean) / np.sqrt(var + 1e-5) * layer["norm"]["scale"] + layer["norm"]["bias"]
            parts[b].append(params["weights"][m] * unit(x))
    kernel = params["classifier"]["kernel"]
    z = np.stack([np.concatenate(p) for p in parts])
    z = np.stack([unit(x) if x.any() else x for x in z])
    return z, params["scale"] * z @ (kernel / np.linalg.norm(kernel, axis=0))


@pytest.mark.parametrize(
    ("train", "feature_scale"),
    quick_first([(True, 0.3), (False, 0.1)], mark=pytest.mark.nightly),
)
def test_cosine_net_matches_its_float64_equations(train, feature_scale):
    with jax.enable_x64(True):
        frames, clips = made.make_batch()
        model = made.make_model(SPEC, dtype="float64", feature_scale=feature_scale, logit_scale=9.0)
        variables = made.init_identifier(model, frames, clips)
        np.testing.assert_array_equal(variables["params"]["weights"], [1, 0.5, 0.25])
        assert variables["params"]["scale"] == 9
        params = made.randomised(variables["params"])
        stats = jax.tree.map(np.abs, made.randomised(variables["batch_stats"]))
        variables = {"params": params, "batch_stats": stats}
        if train:
            output, _ = made.train_output(model, variables, frames, clips, jax.random.key(0))
        else:
            output = made.eval_output(model, variables, frames, clips)
        stats = None if train else stats
        z, logits = oracle(params, stats, frames, clips, feature_scale=feature_scale)
        assert output.embedding.dtype == np.float64
        np.testing.assert_allclose(output.embedding, z, atol=1e-6)
        np.testing.assert_allclose(output.logits[:, 0], logits, atol=1e-5)
        np.testing.assert_array_equal(output.logit_scale, params["scale"][None])


def test_margin_loss_and_its_gradient_use_the_learned_scale():
    """The oracle is the loss of s (cosine - m at the label) and its derivative by s, in float64."""
    rng, labels = np.random.default_rng(2), np.array([1, 3, 0, 2])
    spec = config_lib.default().loss.to_dict() | {"margin": 0.15, "margin_type": "cosine"}
    objective = losses.make_objective(spec, None, 10, logit_scale=16.0)
    cosines = rng.uniform(-1, 1, (4, 1, 5))
    shifted = cosines[:, 0] - 0.15 * (labels[:, None] == np.arange(5))

    def by_hand(scale):
        z = scale * shifted
        return np.sum(np.log(np.exp(z).sum(axis=1)) - z[np.arange(4), labels])

    @jax.jit
    @jax.value_and_grad
    def loss(scale):
        output: Any = losses.ModelOutput(scale * cosines, cosines, logit_scale=scale[None])
        return jnp.sum(objective(output, labels, np.ones(4, bool), jnp.int32(0)))

    with jax.enable_x64(True):
        value, gradient = loss(jnp.asarray(12.0))
    np.testing.assert_allclose(value, by_hand(12), rtol=1e-9)
    slope = (by_hand(12 + 1e-5) - by_hand(12 - 1e-5)) / 2e-5
    np.testing.assert_allclose(gradient, slope, rtol=1e-6)


@pytest.mark.slow
def test_fallback_keeps_the_learned_logit_scale_of_each_model():
    frames, clips = made.make_batch()
    dense = {"name": "dense", "layers": (), "head": "cosine", "logit_scale": 16.0}
    spec = {"name": "fallback", "main": dense, "other": SPEC, "other_modalities": ("head",)}
    model: Any = made.make_model(spec)
    variables = made.init_identifier(model, frames, clips)
    variables["params"]["other"]["scale"] = np.float32(21)
    output = made.eval_output(model, variables, frames, clips)
    np.testing.assert_array_equal(output.logit_scale, [16, 21])
