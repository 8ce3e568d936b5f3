"""DeepMEF against loops over frames, how it starts, and where it has no dropout."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import made_models as made
from tests.helpers.cases import quick_first
from tests.helpers.made_frames import make_frames
from tests.test_models_dense import layer_oracle
from vidjax.models import identifier
from vidjax.models.deepmef import AttentionAggregation, ChannelAttention

SMALL = {"name": "deepmef", "hidden_dim": 8, "branch_dims": (6, 4), "dropout_rate": 0.0}


def softmax(values):
    values = np.exp(values - np.max(values, axis=-1, keepdims=True))
    return values / values.sum(axis=-1, keepdims=True)


def linear(params, name, x):
    return x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])


def frames_oracle(params, clip):
    """Affinity between the real frames of one clip [n, D]."""
    theta, phi, g = (linear(params, name, clip) for name in ("theta", "phi", "g"))
    affinity = softmax(theta @ phi.T / np.sqrt(phi.shape[1]))
    return clip + linear(params, "out", affinity @ g)


def channels_oracle(params, clip):
    """The published form: 1x1 maps over the frames of one clip [T, D], feature by feature."""
    theta, phi, g = (linear(params, name, clip.T).T for name in ("theta", "phi", "g"))  # [T/2, D]
    return clip + linear(params, "out", (softmax(theta @ phi.T) @ g).T).T


def danet_oracle(params, clip):
    """The channel attention of DANet's code, with the frames of one clip [n, D] for channels."""
    energy = clip @ clip.T
    affinity = softmax(energy.max(axis=1, keepdims=True) - energy)
    return clip + params["gamma"] * affinity @ clip


ORACLES = {"features": frames_oracle, "channels": channels_oracle, "danet": danet_oracle}


def deepmef_oracle(params, frames, batch_mask, *, form, rms_norm, published):
    """The whole system, a modality at a time; BatchNorm by the clips that have it."""
    num_clips = len(batch_mask)
    parts, seen = [], np.zeros(num_clips, bool)
    for name, (features, quality, detection, _, mask) in frames.items():
        exists = mask.any(axis=1) & batch_mask
        seen |= exists
        if name == "face":
            part = np.zeros((num_clips, features.shape[-1] + 2))
            for b in np.flatnonzero(exists):
                x = features[b, mask[b]]
                if rms_norm:
                    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True))
                beside = np.stack([quality[b] / 100, detection[b]], axis=1)[mask[b]]
                clip = ORACLES[form](params["channel_attention"], np.hstack([x, beside]))
                part[b] = softmax(clip @ params["aggregation"]["query"]) @ clip
        else:
            count = np.maximum(mask.sum(axis=1), 1)[:, None]
            part = (features * mask[..., None]).sum(axis=1) / count
            for i in range(2):
                part = layer_oracle(params[f"{name}_{i}"], part, exists, "prelu", True, published)
            part = part * exists[:, None]
        parts.append(part)
    x = np.concatenate(parts, axis=1)
    if published:  # Linear-BatchNorm-PReLU, twice
        hidden = layer_oracle(params["block"]["hidden"], x, seen, "prelu", True, True)
        x = x + layer_oracle(params["block"]["back"], hidden, seen, "prelu", True, True)
    else:
        hidden = layer_oracle(params["hidden"], x, seen, "prelu", True)
        x = x + linear(params, "back", hidden)
    kernel = np.asarray(params["classifier"]["kernel"])
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
    return np.where(seen[:, None], 30 * x @ kernel / lengths, 0)


@pytest.mark.parametrize(
    ("form", "rms_norm", "published"),
    quick_first(
        [("channels", True, True), ("features", True, False), ("danet", False, False)],
        mark=pytest.mark.nightly,
    ),
)
def test_deepmef_matches_a_loop(form, rms_norm, published):
    with jax.enable_x64(True):
        frames, clips = made.make_batch()
        frames = {
            name: value._replace(features=value.features.astype(np.float64))
            for name, value in frames.items()
        }
        size = frames["face"].mask.shape[1]
        if form == "channels":
            # Whole clips, as after drawing: padded frames would count in the maps over frames.
            lengths = size * frames["face"].mask.any(axis=1)
            frames["face"] = make_frames(lengths, max_frames=size, dtype="float64")
        options = {"channel_attention": form, "num_frames": size, "rms_norm": rms_norm}
        options["layer_form"] = "published" if published else "ours"
        model = made.make_model(SMALL, dtype="float64", **options)
        variables = made.init_identifier(model, frames, clips)
        params = made.randomised(variables["params"])

        @jax.jit
        def forward(params):
            collections = {**variables, "params": params}
            mutable = ["batch_stats"]
            output, _ = model.apply(collections, frames, clips, train=True, mutable=mutable)
            return output.logits[:, 0]

        options = {"form": form, "rms_norm": rms_norm, "published": published}
        expected = deepmef_oracle(params, frames, clips.mask, **options)
        np.testing.assert_allclose(forward(params), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", quick_first(["features", "danet", "aggregation"], mark=pytest.mark.nightly)
)
def test_attention_learns_from_its_start_and_stays_finite(form):
    """If theta and phi both started at 0, as published, neither would ever change."""
    frames = make_frames([4, 4, 0], max_frames=4, dtype="float32")
    model: Any = AttentionAggregation() if form == "aggregation" else ChannelAttention(form, 4)
    params = made.init(model, frames.features, frames.mask)["params"]

    @jax.jit
    @jax.grad
    def gradient(arguments):
        params, features = arguments
        out = model.apply({"params": params}, features, frames.mask)
        return jnp.mean((out - jnp.cos(jnp.arange(out.size).reshape(out.shape))) ** 2)

    first, _ = gradient((params, frames.features))
    params = jax.tree.map(np.subtract, params, first)
    second, _ = gradient((params, frames.features))
    leaves = jax.tree_util.tree_leaves_with_path(second)
    moved = {jax.tree_util.keystr(path): np.abs(leaf).max() > 1e-5 for path, leaf in leaves}
    assert all(moves for path, moves in moved.items() if "bias" not in path), moved
    for scale in (0, 1e4):
        for leaf in jax.tree.leaves(gradient((made.randomised(params), scale * frames.features))):
            assert np.isfinite(leaf).all()


@pytest.mark.slow
def test_only_the_last_published_layers_have_no_dropout():
    """With a dropout rate of 1, nothing passes through the other layers."""
    frames, clips = made.make_batch()
    options = {"layer_form": "published", "dropout_rate": 1.0, "branch_dims": (6,)}
    model = made.make_model({**SMALL, **options, "channel_attention": "none"})
    variables = made.init_identifier(model, frames, clips)
    output, new = made.train_output(model, variables, frames, clips, jax.random.key(0))
    exists = frames["head"].mask.any(axis=1) & clips.mask
    branch = np.asarray(output.embedding)[:, 8:14]  # of the head, a single layer
    assert (np.abs(branch[exists]).max(axis=1) > 0).all()
    seen = new["batch_stats"]["block"]["back"]["norm"]
    np.testing.assert_array_equal(seen["mean"], 0)  # what reaches the last layer is dropped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "gone"),
    quick_first(
        [
            (
                {"channel_attention": "none", "aggregation": "quality"},
                {"channel_attention", "aggregation"},
            ),
            ({"channel_attention": "channels", "num_frames": 4}, set()),
            ({"channel_attention": "danet", "aggregation": "mean"}, {"aggregation"}),
        ],
        mark=pytest.mark.nightly,
    ),
)
def test_ablations_start_as_the_cosine_of_the_mean_frame(options, gone):
    frames, clips = made.make_batch()
    face = {"face": frames["face"]}
    whole = {"hidden", "back", "classifier", "channel_attention", "aggregation"}
    model: Any = identifier.make_identifier(
        {**SMALL, **options}, modalities={"face": 6}, num_classes=5, num_clips=1
    )
    init = functools.partial(model.init_with_output, jax.random.key(0), train=False)
    output, variables = jax.jit(init)(face, clips)
    assert set(variables["params"]) == whole - gone
    x = frames["face"].features[0].astype(np.float64)
    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    beside = np.stack([frames["face"].quality[0] / 100, frames["face"].detection[0]], axis=1)
    weights = np.ones(len(x))
    if options.get("aggregation") == "quality":
        weights = frames["face"].quality[0] * frames["face"].detection[0]
    mean = np.average(np.concatenate([x, beside], axis=1), axis=0, weights=weights)
    kernel = np.asarray(variables["params"]["classifier"]["kernel"])
    cosines = mean @ kernel / np.linalg.norm(mean) / np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(output.logits[0, 0], 30 * cosines, atol=1e-4)
