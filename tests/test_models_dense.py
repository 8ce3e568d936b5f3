"""Fully connected systems against loops over clips, layers and columns."""

import math

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


def train_forward(model, variables, mask):
    """Returns the function of (params, x) that training computes, in float64."""

    @jax.jit
    def forward(params, x):
        collections = {**variables, "params": params}
        return model.apply(collections, x, mask, train=True, mutable=["batch_stats"])[0]

    return forward


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


@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mlp_matches_its_equations(gradients):
    layers = tuple((4 + i, name, i != 1, 0.0) for i, name in enumerate(ACTIVATIONS))
    mask = np.array([True, True, False, True, True])
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((5, 3))
        model = MLP(layers, FLOAT64)
        variables = made.init(model, x, mask, train=False)
        params = made.randomised(variables["params"])
        forward = train_forward(model, variables, mask)
        expected = x
        for i, (_, activation, batch_norm, _) in enumerate(layers):
            expected = layer_oracle(params[f"layer_{i}"], expected, mask, activation, batch_norm)
        np.testing.assert_allclose(forward(params, x), expected, atol=1e-6)
        if gradients:
            made.check_gradients(forward, params, x, modes=("rev",))


@pytest.mark.slow
@pytest.mark.parametrize(
    "shortcut", quick_first(["concat", "add", "none"], mark=pytest.mark.nightly)
)
def test_residual_dense_net_matches_its_equations(shortcut):
    """The layer, times its sigmoid branch; a shortcut adds or joins what came before."""
    mask = np.arange(8) != 2
    with jax.enable_x64(True):
        x = np.random.default_rng(1).standard_normal((8, 3))
        model = ResidualDenseNet(5, 4, "swish", 0.0, shortcut, gate=True, dtype=FLOAT64)
        variables = made.init(model, x, mask, train=False)
        params = made.randomised(variables["params"])

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
        found = train_forward(model, variables, mask)(params, x)
        np.testing.assert_allclose(found, layer(4, h3), atol=1e-6)
        plain = ResidualDenseNet(5, 4, "swish", 0.0, shortcut)
        names = made.init(plain, x, mask, train=False)["params"].keys()
        assert names == {f"layer_{i}" for i in range(4)}


def test_cosine_classifier_matches_its_equation():
    with jax.enable_x64(True):
        x = np.random.default_rng(3).standard_normal((4, 5))
        model = CosineClassifier(num_classes=3, scale=30.0)
        params = made.randomised(made.init(model, x)["params"])
        forward = jax.jit(lambda params, x: model.apply({"params": params}, x))
        kernel = np.asarray(params["kernel"])
        lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
        for scale in (1, 1e3):
            found = forward(params, scale * x)
            np.testing.assert_allclose(found, 30 * x @ kernel / lengths, atol=1e-6)
        made.check_gradients(forward, params, x)


@pytest.mark.slow
def test_net_sees_scaled_mean_frames_and_zeros_where_there_are_none():
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
