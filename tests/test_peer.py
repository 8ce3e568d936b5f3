"""The PyTorch peer of the benchmarks does the arithmetic of vidjax, on small sizes."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.made_frames import make_frames
from vidjax.core import fusion, losses, metrics
from vidjax.core.batch import ClipInfo
from vidjax.models import identifier
from vidjax.runs import config as config_lib

torch = pytest.importorskip("torch")
peer = pytest.importorskip("tests.benchmarks.peer")
pytestmark = pytest.mark.nightly  # what the benchmarks compare with
torch.set_num_threads(1)  # tiny sizes; threads of several processes wait for each other

CLASSES = 11
DIM = 12
MODALITIES = ("face", "head", "audio")
PLACES = (  # of parameters: in the flax tree, in the torch module
    (r"^backbone\.layer_(\d)\.", r"layers.\1."),
    (r"^classifier\.logits\.", "classifier."),
    (r"^face_netvlad\.", "netvlad."),
    (r"^(\w+)_map_norm\.", r"map_norms.\1."),
    (r"^attention_map\.", "attention."),
    (r"^(\w+)_map\.", r"maps.\1."),
    (r"(kernel|scale)$", "weight"),
    (r"(mean|var)$", r"running_\1"),
)
SPECS = {
    "mlp": {"name": "dense", "layers": ((16, "swish", False, 0.0), (8, "swish", False, 0.0))},
    "residual": {"name": "dense", "backbone": "residual", "width": 16, "dropout_rate": 0.0},
    "mma": {
        "name": "mma", "dropout_rate": 0.0, "modality_dropout_rate": 0.0, "map_norm": True,
        "netvlad_reduce": "mean", "num_clusters": 3, "embed_dim": 8, "gram_dim": 4,
        "feature_scale": 1.0,
    },
}  # fmt: skip


def to_torch(frames):
    arrays = (frames.features, frames.quality, frames.detection, frames.mask)
    return peer.Frames(*(torch.from_numpy(np.array(x)) for x in arrays))


def to_fused(frames):
    """Returns Frames that are fused already as the peer's nets take them."""
    features, mask = np.array(frames.features), np.array(frames.mask)
    return peer.Fused(torch.from_numpy(features), torch.from_numpy(mask))


def copy_variables(variables, net):
    """Gives a torch module the parameters and statistics of a flax tree, every one of them."""
    state = {}
    for tree in variables.values():
        for path, value in jax.tree_util.tree_leaves_with_path(tree):
            place = ".".join(key.key for key in path)
            for pattern, word in PLACES:
                place = re.sub(pattern, word, place)
            value = np.array(value)
            is_kernel = path[-1].key == "kernel"
            state[place] = torch.from_numpy(value.T.copy() if is_kernel else value)
    left = net.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in left.missing_keys)


def make_net(name):
    if name == "mlp":
        return peer.MLP(DIM, CLASSES, (16, 8), dropout_rate=0.0)
    if name == "residual":
        return peer.ResidualDense(DIM, CLASSES, 16, dropout_rate=0.0)
    sizes = {"num_clusters": 3, "embed_dim": 8, "gram_dim": 4}
    dims = dict.fromkeys(MODALITIES, DIM)
    return peer.MMA(dims, CLASSES, dropout_rate=0.0, modality_dropout_rate=0.0, **sizes)


def make_clips(name):
    """Returns modality -> Frames: fused vectors for the dense nets, several frames for the other.

    Every clip has a face; statistics of dense nets are the peer's over all clips.
    """
    face = make_frames([3, 6, 1, 8, 2, 5], max_frames=8, dim=DIM)
    if not name.startswith("mma"):
        return {"face": jax.tree.map(np.array, fusion.mean_frame(face, weighting="graded"))}
    return {
        "face": fusion.top_frames(None, face._replace(mask=face.mask & True), num_frames=4),
        "head": make_frames([1, 0, 4, 2, 0, 4], max_frames=4, dim=DIM, seed=1),
        "audio": make_frames([1, 1, 0, 1, 0, 1], max_frames=1, dim=DIM, seed=2),
    }


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_logits_are_those_of_vidjax(name, train):
    frames = make_clips(name)
    dims = dict.fromkeys(frames, DIM)
    model = identifier.make_identifier(
        SPECS[name], modalities=dims, num_classes=CLASSES, num_clips=1
    )
    count = len(frames["face"].mask)
    clips = ClipInfo(np.zeros(count, np.int32), np.ones(count, bool), np.zeros(count, np.int32))
    variables: Any = model.init(jax.random.key(0), frames, clips, train=False)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: x + 0.3 * rng.random(x.shape, np.float32), variables)
    apply = jax.jit(lambda v: model.apply(v, frames, clips, train=train, mutable=["batch_stats"]))
    output, new = apply(variables)
    expected = output.logits[:, 0]

    net = make_net(name).train(train)
    copy_variables(variables, net)
    fused = {key: to_fused(one) for key, one in frames.items() if key in ("face", "audio")}
    if "head" in frames:
        fused["head"] = peer.mean_frame(to_torch(frames["head"]))
    with torch.no_grad():
        found = net(fused)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale)
    if train and "batch_stats" in new:
        means = [x for p, x in jax.tree_util.tree_leaves_with_path(new) if p[-1].key == "mean"]
        running = [x for key, x in net.named_buffers() if key.endswith("running_mean")]
        for got, want in zip(running, means, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_losses_and_their_gradients_are_those_of_vidjax():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 8, (6, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, 6).astype(np.int32)
    for weight in (None, 0.0, 0.75, 1.0):
        schedule = ((0.0, weight or 0.0),)
        loss_fn = losses.make_loss(
            {**config_lib.default().loss.to_dict(), "schedule": schedule},
            None,
            1.0,
            logit_scale=1.0,
        )
        expected = loss_fn(logits, labels, jnp.int32(0))
        slope = jax.grad(lambda x, f=loss_fn: f(x, labels, jnp.int32(0)).sum())(logits)
        x = torch.tensor(logits, requires_grad=True)
        found = peer.mixed_loss(x, torch.from_numpy(labels).long(), weight)
        found.sum().backward()
        np.testing.assert_allclose(found.detach(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(x.grad, slope, rtol=1e-5, atol=1e-5)


def uneven_frames():
    """Returns clips of 0 to 8 frames, of qualities that all weightings treat apart."""
    frames = make_frames([3, 0, 8, 1, 5], max_frames=8, dim=DIM)
    quality = frames.quality - 30
    quality[3] = -5
    return frames._replace(quality=quality)


@pytest.mark.parametrize("weighting", ["uniform", "quality", "graded"])
def test_means_and_weights_are_those_of_vidjax(weighting):
    frames = uneven_frames()
    theirs = to_torch(frames)
    expected = fusion.frame_weights(frames, weighting)
    np.testing.assert_allclose(peer.frame_weights(theirs, weighting), expected, rtol=1e-6)
    mean, mask = peer.mean_frame(theirs, weighting)
    wanted = fusion.mean_frame(frames, weighting=weighting)
    np.testing.assert_allclose(mean, wanted.features, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mask, wanted.mask)


def test_filtered_frames_are_those_of_vidjax():
    frames = uneven_frames()
    options: Any = {"min_quality": 25.0, "min_detection": 0.7}
    kept = peer.filter_frames(to_torch(frames), **options)
    np.testing.assert_array_equal(kept.mask, fusion.filter_frames(frames, **options).mask)


@pytest.mark.parametrize("length", [0, 2, 4])
@pytest.mark.parametrize("options", [{}, {"weighting": "quality"}, {"replacement": False}], ids=str)
def test_random_fusion_has_the_distribution_of_vidjax(length, options):
    draws = 20_000
    probs = (0.25, 0.0, 0.65, 0.0, 0.1)
    frames = make_frames([length], max_frames=6)
    frames = frames._replace(features=np.eye(6, dtype=np.float16)[None])
    torch.manual_seed(0)
    fused, mask = peer.random_fusion(to_torch(frames), num_draws=draws, probs=probs, **options)
    wanted = fusion.random_fusion(
        jax.random.key(0), frames, num_draws=draws, max_frames=5, probs=probs, **options
    )
    np.testing.assert_array_equal(mask, wanted.mask)

    def shares(vectors):
        rows, counts = np.unique(np.round(vectors[0], 3), axis=0, return_counts=True)
        return {tuple(row): count / draws for row, count in zip(rows, counts, strict=True)}

    found, expected = shares(fused.numpy()), shares(np.array(wanted.features))
    for row in found.keys() | expected.keys():
        assert abs(found.get(row, 0.0) - expected.get(row, 0.0)) < 0.015, row


def test_ranking_is_a_full_sort():
    rng = np.random.default_rng(0)
    scores = rng.permutation(7 * 330).reshape(330, 7).astype(np.float32)
    scores[rng.random(330) < 0.1] = -np.inf
    blocks = np.split(scores, [64, 128, 130, 258])
    best, rows = (x.numpy() for x in peer.rank(torch.from_numpy, blocks))
    order = np.argsort(-scores, axis=0)[:100].T
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_array_equal(best, np.take_along_axis(scores.T, order, axis=1))
    labels = rng.integers(0, 8, 330)
    positives = np.bincount(labels, minlength=8)[1:]
    truth = {str(clip): label for clip, label in enumerate(labels.tolist()) if label}
    columns = {column: column for column in range(1, 8)}
    found = peer.mean_average_precision(rows, best, labels, truth, columns)
    clips = np.where(np.isfinite(best), rows, -1)
    assert found == pytest.approx(metrics.mean_average_precision(clips, labels, positives, 0))


@pytest.mark.parametrize("net", ["mlp", "residual", "mma"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_learn(net, dtype):
    rng = np.random.default_rng(0)
    names = peer.MMA_MODALITIES if net == "mma" else ("face",)
    frames = {}
    for name in names:
        one = make_frames(rng.integers(1, 9, 16), max_frames=8, dim=DIM)
        frames[name] = (one.features, one.quality, one.detection, one.mask)
    batch = peer.make_batch(frames, rng.integers(0, CLASSES, 16))
    dims = dict.fromkeys(names, DIM)
    torch.manual_seed(0)
    recipe = peer.make_recipe(net, num_classes=CLASSES, dims=dims, width=32)
    step = peer.Step(recipe, dtype=getattr(torch, dtype), learning_rate=1e-2)
    found = [float(step(batch)) for _ in range(60)]
    assert np.mean(found[-5:]) < 0.6 * np.mean(found[:5])


def test_a_whole_run(official_dir):
    result = peer.fit(official_dir, epochs=15, batch_size=16)
    assert result["map"] > 0.5 and result["steps"] > 60
