"""Fully connected systems against loops over clips, layers and columns."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import made_models as made
from tests.helpers.cases import quick_first
from vidjax.models.dense import MLP, ResidualDenseNet
from vidjax.models.layers import CosineClassifier

FLOAT64 = jnp.dtype("float64")
ACTIVATIONS = {
    "linear": lambda z, slope: z,
    "relu": lambda z, slope: np.maximum(z, 0),
    "sigmoid": lambda z, slope: 1 / (1 + np.exp(-z)),
    "swish": lambda z, slope: z / (1 + np.exp(-z)),
    "prelu": lambda z, slope: np.where(z > 0, z, slope * z),
}


def layer_oracle(params, rows, mask, activation, batch_norm, norm_first=False):
    """Product, activation, BatchNorm by the real rows (or BatchNorm, activation), in float64."""

    def norm(x):
        real = x[np.asarray(mask)]
        x = (x - real.mean(axis=0)) / np.sqrt(real.var(axis=0) + 1e-5)
        return x * params["norm"]["scale"] + params["norm"]["bias"]

    out = np.array(rows) @ params["dense"]["kernel"] + params["dense"]["bias"]
    out = norm(out) if batch_norm and norm_first else out
    out = ACTIVATIONS[activation](out, params.get("slope", 0))
    return norm(out) if batch_norm and not norm_first else out


def randomised(model, x, mask):
    """Returns the collections of a net whose parameters are all at random."""
    variables = made.init(model, x, mask, train=False)
    return {**variables, "params": made.randomised(variables["params"])}


@functools.partial(jax.jit, static_argnums=0)
def train(model, variables, x, mask):
    return model.apply(variables, x, mask, train=True, mutable=["batch_stats"])[0]


def test_cosine_of_a_zero_vector_is_zero_with_a_gradient_of_zero():
    x = np.zeros((2, 5), np.float32)
    x[1] = 1e18
    model = CosineClassifier(num_classes=3, scale=64.0)
    kernel = np.random.default_rng(5).standard_normal((5, 3)).astype(np.float32)
    kernel[:, 0] = 0

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradient(kernel, x):
        logits: Any = model.apply({"params": {"kernel": kernel}}, x)
        return jnp.sum((1 + logits) ** 2), logits

    (by_kernel, by_x), logits = gradient(kernel, x)
    assert logits.dtype == np.float32
    for nothing in (logits[0], logits[:, 0], by_x[0], by_kernel[:, 0]):
        np.testing.assert_array_equal(nothing, 0)
    assert 0 < np.abs(logits[1, 1:]).max() <= 64.001
    assert np.isfinite(by_kernel).all() and np.isfinite(by_x).all()


def test_mlp_matches_its_equations():
    layers = tuple((4 + i, name, i != 1, 0.0) for i, name in enumerate(ACTIVATIONS))
    mask = np.array([True, True, False, True, True])
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((5, 3))
        model = MLP(layers, FLOAT64)
        variables, expected = randomised(model, x, mask), x
        for i, (_, activation, batch_norm, _) in enumerate(layers):
            layer = variables["params"][f"layer_{i}"]
            expected = layer_oracle(layer, expected, mask, activation, batch_norm)
        np.testing.assert_allclose(train(model, variables, x, mask), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shortcut", quick_first(["concat", "add", "none"], mark=pytest.mark.nightly)
)
def test_residual_dense_net_matches_its_equations(shortcut):
    """Layers are multiplied by a sigmoid gate. Shortcuts add or concatenate earlier layers."""
    mask = np.arange(8) != 2
    with jax.enable_x64(True):
        x = np.random.default_rng(1).standard_normal((8, 3))
        model = ResidualDenseNet(5, 4, "swish", 0.0, shortcut, gate=True, dtype=FLOAT64)
        variables = randomised(model, x, mask)
        params = variables["params"]

        def layer(i, rows):
            branch = params[f"gate_{i - 1}"]
            y = layer_oracle(params[f"layer_{i - 1}"], rows, mask, "swish", True)
            return y / (1 + np.exp(-(y @ branch["kernel"] + branch["bias"])))

        h1 = layer(1, x)
        if shortcut == "concat":
            h2 = layer(2, np.hstack([x, h1]))
            h3 = layer(3, np.hstack([x, h1, h2]))
        else:
            h2 = layer(2, h1) + h1 * (shortcut == "add")
            h3 = layer(3, h2) + h2 * (shortcut == "add")
        np.testing.assert_allclose(train(model, variables, x, mask), layer(4, h3), atol=1e-6)


def test_cosine_classifier_matches_its_equation():
    with jax.enable_x64(True):
        x = np.random.default_rng(3).standard_normal((4, 5))
        model = CosineClassifier(num_classes=3, scale=30.0)
        params = made.randomised(made.init(model, x)["params"])
        kernel = np.asarray(params["kernel"])
        lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
        logits: Any = model.apply({"params": params}, 1e3 * x)
        np.testing.assert_allclose(logits, 30 * x @ kernel / lengths, atol=1e-6)


@pytest.mark.slow
def test_dense_net_input_is_the_scaled_mean_frame_or_zeros_if_missing():
    frames, clips = made.make_batch()
    model = made.make_model({"name": "dense", "layers": (), "feature_scale": 0.5})
    variables = made.init_identifier(model, frames, clips)
    classifier = jax.tree.map(np.asarray, variables["params"]["classifier"]["logits"])
    np.testing.assert_array_equal(classifier["bias"], 0)
    limit = math.sqrt(6 / sum(classifier["kernel"].shape))  # Xavier's uniform
    assert 0.8 * limit < np.abs(classifier["kernel"]).max() <= limit
    logits = made.eval_logits(model, variables, frames, clips)
    for b in range(8):
        x = []
        for name, dim in made.DIMS.items():
            real = frames[name].mask[b] & clips.mask[b]
            features = frames[name].features[b][real].astype(np.float64)
            x.extend(0.5 * features.mean(axis=0) if real.any() else np.zeros(dim))
        np.testing.assert_allclose(logits[b], x @ classifier["kernel"], atol=1e-5)
