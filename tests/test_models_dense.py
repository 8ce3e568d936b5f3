"""Fully connected systems against loops over clips, layers and columns."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.made_models import (
    DIMS,
    check_gradients,
    eval_logits,
    init,
    init_identifier,
    make_batch,
    make_model,
    randomised,
)
from vidjax.models.dense import MLP, ResidualDenseNet
from vidjax.models.layers import CosineClassifier

FLOAT64 = jnp.dtype("float64")
ACTIVATIONS = {
    "linear": lambda z, slope: z,
    "relu": lambda z, slope: max(z, 0.0),
    "sigmoid": lambda z, slope: 1 / (1 + math.exp(-z)),
    "swish": lambda z, slope: z / (1 + math.exp(-z)),
    "prelu": lambda z, slope: z if z > 0 else slope * z,
}


def norm_oracle(params, rows, mask):
    """BatchNorm by the statistics of the real rows."""
    out = [[0.0] * len(row) for row in rows]
    for d in range(len(rows[0])):
        real = [row[d] for row, flag in zip(rows, mask, strict=True) if flag]
        mean = sum(real) / len(real)
        var = sum((value - mean) ** 2 for value in real) / len(real)
        for b, row in enumerate(rows):
            z = (row[d] - mean) / math.sqrt(var + 1e-5)
            out[b][d] = z * params["scale"][d] + params["bias"][d]
    return out


def layer_oracle(params, rows, mask, activation, batch_norm, norm_first=False):
    """Product, activation, BatchNorm (or BatchNorm, activation), row by row."""
    kernel, bias = np.asarray(params["dense"]["kernel"]), np.asarray(params["dense"]["bias"])
    slope = float(params.get("slope", 0))
    out = [
        [
            sum(x * k for x, k in zip(row, column, strict=True)) + b
            for column, b in zip(kernel.T, bias, strict=True)
        ]
        for row in rows
    ]
    if batch_norm and norm_first:
        out = norm_oracle(params["norm"], out, mask)
    out = [[ACTIVATIONS[activation](z, slope) for z in row] for row in out]
    if batch_norm and not norm_first:
        out = norm_oracle(params["norm"], out, mask)
    return out


def train_forward(model, variables, mask):
    """Returns the function of (params, x) that training computes, in float64."""

    @jax.jit
    def forward(params, x):
        collections = {**variables, "params": params}
        return model.apply(collections, x, mask, train=True, mutable=["batch_stats"])[0]

    return forward


@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mlp_matches_a_loop(gradients):
    layers = tuple((4 + i, name, i != 1, 0.0) for i, name in enumerate(ACTIVATIONS))
    mask = np.array([True, True, False, True, True])
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((5, 3))
        model = MLP(layers, FLOAT64)
        variables = init(model, x, mask, train=False)
        params = randomised(variables["params"])
        forward = train_forward(model, variables, mask)
        expected = x.tolist()
        for i, (_, activation, batch_norm, _) in enumerate(layers):
            expected = layer_oracle(params[f"layer_{i}"], expected, mask, activation, batch_norm)
        np.testing.assert_allclose(forward(params, x), expected, atol=1e-6)
        if gradients:
            check_gradients(forward, params, x, modes=("rev",))


def test_a_gate_multiplies_the_output_of_its_layer():
    """The layer times its sigmoid branch, written out; a shortcut adds what came before."""
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    mask = np.ones(3, bool)
    plain, gated = (ResidualDenseNet(4, 2, "relu", 0.0, gate=gate) for gate in (False, True))
    variables = init(gated, x, mask, train=False)
    params = randomised(variables["params"])
    expected, norms = x, variables["batch_stats"]
    for i in range(2):
        one = ResidualDenseNet(4, 1, "relu", 0.0)
        layer = {"params": {"layer_0": params[f"layer_{i}"]}}
        layer["batch_stats"] = {"layer_0": norms[f"layer_{i}"]}
        y = np.asarray(one.apply(layer, expected, mask, train=False))
        branch = params[f"gate_{i}"]
        y = y / (1 + np.exp(-(y @ np.asarray(branch["kernel"]) + np.asarray(branch["bias"]))))
        expected = y + expected if i else y
    found = gated.apply({**variables, "params": params}, x, mask, train=False)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-6)
    names = set(init(plain, x, mask, train=False)["params"])
    assert names == {"layer_0", "layer_1"}  # as without the option


SHORTCUTS = ("add", "concat", "none")


@pytest.mark.parametrize(
    ("shortcut", "gradients"),
    [("add", False), *(pytest.param(name, True, marks=pytest.mark.slow) for name in SHORTCUTS)],
)
def test_residual_dense_net_matches_a_loop(shortcut, gradients):
    mask = np.arange(8) != 2
    with jax.enable_x64(True):
        x = np.random.default_rng(1).standard_normal((8, 3))
        model = ResidualDenseNet(5, 4, "swish", 0.0, shortcut, dtype=FLOAT64)
        variables = init(model, x, mask, train=False)
        params = randomised(variables["params"])
        forward = train_forward(model, variables, mask)

        def layer(i, rows):
            return np.array(layer_oracle(params[f"layer_{i - 1}"], rows, mask, "swish", True))

        h1 = layer(1, x)
        if shortcut == "add":
            h2 = h1 + layer(2, h1)
            h3 = h2 + layer(3, h2)
        elif shortcut == "concat":
            h2 = layer(2, np.hstack([x, h1]))
            h3 = layer(3, np.hstack([x, h1, h2]))
        else:
            h2 = layer(2, h1)
            h3 = layer(3, h2)
        np.testing.assert_allclose(forward(params, x), layer(4, h3), atol=1e-6)
        if gradients:
            check_gradients(forward, params, x, modes=("rev",), eps=1e-5)


def test_cosine_classifier_matches_a_loop():
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        x = rng.standard_normal((4, 5))
        model = CosineClassifier(num_classes=3, scale=30.0)
        params = randomised(init(model, x)["params"])
        forward = jax.jit(lambda params, x: model.apply({"params": params}, x))
        kernel = np.asarray(params["kernel"])
        expected = np.zeros((4, 3))
        for b in range(4):
            for c in range(3):
                product = sum(x[b, d] * kernel[d, c] for d in range(5))
                lengths = math.sqrt(sum(v * v for v in x[b]) * sum(v * v for v in kernel[:, c]))
                expected[b, c] = 30 * product / lengths
        np.testing.assert_allclose(forward(params, x), expected, atol=1e-6)
        np.testing.assert_allclose(forward(params, 1e3 * x), expected, atol=1e-6)
        check_gradients(forward, params, x)


def test_cosine_of_nothing_is_zero_with_a_gradient_of_zero():
    x = np.zeros((2, 5), np.float32)
    x[1] = 1e18
    model = CosineClassifier(num_classes=3, scale=64.0)
    kernel = np.random.default_rng(5).standard_normal((5, 3)).astype(np.float32)
    kernel[:, 0] = 0
    params = {"kernel": kernel}

    @jax.jit
    def forward(params, x):
        return model.apply({"params": params}, x)

    logits = np.asarray(forward(params, x))
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits[0], 0)
    np.testing.assert_array_equal(logits[:, 0], 0)
    assert 0 < np.abs(logits[1, 1:]).max() <= 64.001
    gradient = jax.grad(lambda p, x: jnp.sum((1 + forward(p, x)) ** 2), (0, 1))
    by_params, by_x = jax.jit(gradient)(params, x)
    np.testing.assert_array_equal(by_x[0], 0)
    np.testing.assert_array_equal(by_params["kernel"][:, 0], 0)
    assert np.isfinite(by_params["kernel"]).all() and np.isfinite(by_x).all()


def test_net_sees_scaled_mean_frames_and_zeros_where_there_are_none():
    frames, clips = make_batch()
    model = make_model({"name": "dense", "layers": (), "feature_scale": 0.5})
    variables = init_identifier(model, frames, clips)
    classifier = jax.tree.map(np.asarray, variables["params"]["classifier"]["logits"])
    np.testing.assert_array_equal(classifier["bias"], 0)
    limit = math.sqrt(6 / sum(classifier["kernel"].shape))  # Xavier's uniform
    assert 0.8 * limit < np.abs(classifier["kernel"]).max() <= limit
    logits = eval_logits(model, variables, frames, clips)
    for b in range(8):
        x = []
        for name, dim in DIMS.items():
            real = [
                vector.astype(np.float64)
                for vector, flag in zip(frames[name].features[b], frames[name].mask[b], strict=True)
                if flag and clips.mask[b]
            ]
            x.extend(0.5 * np.mean(real, axis=0) if real else np.zeros(dim))
        np.testing.assert_allclose(logits[b], x @ classifier["kernel"], atol=1e-5)


def test_a_cosine_of_features_is_the_same_in_bfloat16():
    """No layer before it: nothing is left that may be rounded."""
    frames, clips = make_batch()
    bare = {"name": "dense", "layers": (), "head": "cosine", "logit_scale": 64.0}
    variables = init_identifier(make_model(bare), frames, clips)
    both = [
        eval_logits(make_model(bare, dtype=d), variables, frames, clips)
        for d in ("float32", "bfloat16")
    ]
    np.testing.assert_array_equal(*both)
