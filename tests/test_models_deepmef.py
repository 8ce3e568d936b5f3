"""DeepMEF against loops over frames, how it starts, and where it has no dropout."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import made_models as made
from tests.helpers.cases import quick_first
from tests.helpers.made_frames import make_frames
from tests.test_models_dense import layer_oracle
from vidjax.models.deepmef import ChannelAttention

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


ORACLES = {
    "features": frames_oracle,
    "channels": channels_oracle,
    "danet": danet_oracle,
    "none": lambda params, clip: clip,
}


def weights_oracle(params, clip, scores, aggregation):
    """Weights of the frames of one clip [n, D], whose scores are quality x detection [n]."""
    if aggregation == "attention":
        return softmax(clip @ params["aggregation"]["query"])
    weights = scores if aggregation == "quality" else np.ones(len(clip))
    return weights / weights.sum()


def deepmef_oracle(params, frames, batch_mask, form, rms_norm, published, aggregation):
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
                clip = ORACLES[form](params.get("channel_attention"), np.hstack([x, beside]))
                scores = (quality[b] * detection[b])[mask[b]]
                part[b] = weights_oracle(params, clip, scores, aggregation) @ clip
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
    ("form", "rms_norm", "published", "aggregation"),
    quick_first(
        [
            ("channels", True, True, "attention"),
            ("features", True, False, "attention"),
            ("danet", False, False, "mean"),
            ("none", True, False, "quality"),
        ],
        mark=pytest.mark.nightly,
    ),
)
def test_deepmef_matches_a_float64_loop_over_frames(form, rms_norm, published, aggregation):
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
        options |= {"layer_form": "published" if published else "ours", "aggregation": aggregation}
        model = made.make_model(SMALL, dtype="float64", **options)
        variables = made.init_identifier(model, frames, clips)
        params = made.randomised(variables["params"])
        case = (form, rms_norm, published, aggregation)
        expected = deepmef_oracle(params, frames, clips.mask, *case)
        logits, _ = made.train_logits(model, {**variables, "params": params}, frames, clips)
        np.testing.assert_allclose(logits, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", quick_first(["features", "danet"], mark=pytest.mark.nightly))
def test_channel_attention_leaves_its_initial_values_and_stays_finite(form):
    """If theta and phi both started at 0, as published, neither would ever change."""
    frames = make_frames([4, 4, 0], max_frames=4, dtype="float32")
    model: Any = ChannelAttention(form, 4)
    params = made.init(model, frames.features, frames.mask)["params"]

    @jax.jit
    @jax.grad
    def gradient(params, features):
        out = model.apply({"params": params}, features, frames.mask)
        return jnp.mean((out - jnp.cos(jnp.arange(out.size).reshape(out.shape))) ** 2)

    params = jax.tree.map(np.subtract, params, gradient(params, frames.features))
    second = jax.tree_util.tree_leaves_with_path(gradient(params, frames.features))
    moved = {jax.tree_util.keystr(path): np.abs(leaf).max() > 1e-5 for path, leaf in second}
    assert all(moves for path, moves in moved.items() if "bias" not in path), moved
    for scale in (0, 1e4):
        for leaf in jax.tree.leaves(gradient(made.randomised(params), scale * frames.features)):
            assert np.isfinite(leaf).all()
