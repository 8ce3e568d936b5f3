"""What the authors ran: their numbers, against what `CONFIG:published` computes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import made_steps
from tests.helpers.made_frames import make_frames
from tests.helpers.published import CLIPS, official, rates, shapes
from vidjax.core import ensemble, fusion, losses
from vidjax.core.augment import MemberClips
from vidjax.core.batch import ClipInfo, ModelOutput
from vidjax.training import train_step

pytestmark = pytest.mark.slow


def published(name, words=""):
    """Returns a configuration at the published size, and its system, with a class of others."""
    return official(f"{name}:iqiyi_vid,published,{words}", train_other=True)


def one_clip(quality, detection=0.9):
    """Returns a clip with frames of these qualities."""
    frames = make_frames([len(quality)], max_frames=len(quality), dtype="float32")
    return frames._replace(
        quality=np.array([quality], np.float32),
        detection=np.full((1, len(quality)), detection, "f4"),
    )


def trained_on(system, frames, min_quality=-1000.0):
    """Returns the fused training frames of clips and the weights of their losses."""
    ones = jnp.ones(len(frames.mask))
    clips = MemberClips({"face": frames}, ones, ones, jnp.float32(min_quality), ())
    for transform in system.clip_transforms:
        clips = transform(jax.random.key(0), clips)
    fused = system.fuse(jax.random.key(1), clips.frames, jnp.int32(-1))
    clips = clips._replace(frames=fused, weight=clips.weight * fusion.has_frames(fused))
    for transform in system.transforms:
        clips = transform(jax.random.key(2), clips)
    return clips.frames["face"], np.asarray(clips.weight)


# Residual Dense Net. L: line of the article.


def test_residual_dense_trains_eight_epochs_at_falling_rates():
    config, _ = published("residual_dense")
    assert config.num_epochs == 8 and config.optim.name == "adam"  # L34
    wanted = [0.01, 0.007, 0.0049, 0.00343, 0.002401, 0.0016807, 0.00117649, 0.000823543]
    np.testing.assert_allclose(
        rates("residual_dense:iqiyi_vid,published", *range(8)), wanted, rtol=1e-5
    )  # L34
    assert (config.optim.total_decay, config.optim.weight_decay, config.mixup) == (0, 0, 0)
    assert (config.loss.classification, config.loss.label_smoothing) == ("softmax", 0)


def test_residual_dense_has_three_subsets_above_their_bounds():
    config, system = published("residual_dense", "face,trainval")
    members = ensemble.make_members(config.ensemble.to_dict())
    assert [member.fold for member in members] == [0, 0, 0] and config.ensemble.folds == 10  # L22
    frames = one_clip([-5.0, 19.9, 20.0, 20.1, 40.0, 40.1])
    counts = [trained_on(system, frames, one.min_quality)[1][0] / 2 for one in members]
    assert counts == [6, 3, 1]  # L32: all, > 20, > 40
    assert trained_on(system, one_clip([20.0, 3.0]), members[1].min_quality)[1] == 0


def test_residual_dense_trains_on_all_frames_and_as_many_merged_ones():
    _, system = published("residual_dense", "face")
    frames = make_frames([9, 1, 4], max_frames=9, dtype="float32", dim=512)
    union, weight = trained_on(system, frames)
    np.testing.assert_array_equal(weight, [18, 2, 8])  # L32: frames of long clips are more
    np.testing.assert_array_equal(union.mask.sum(axis=1), weight)
    np.testing.assert_array_equal(union.features[:, :9], frames.features)  # L32: "combined with"
    clip = np.asarray(frames.features[0])
    used = np.linalg.lstsq(clip.T, np.asarray(union.features[0, 9:]).T, rcond=None)[0].T
    assert set(np.count_nonzero(used > 1e-3, axis=1)) <= {2, 3, 4, 5}  # L32: 1 to 4 others
    assert np.all(np.diag(used) > 0.19)  # and the frame itself
    np.testing.assert_allclose(used.sum(axis=1), 1, rtol=1e-4)


def test_each_example_of_a_batch_counts_alike():
    run = made_steps.make(
        "residual_dense:published,face,one",
        "--config.model.width=8",
        "--config.model.dropout_rate=0",
    )
    mask = np.asarray(run.batch.frames["face"].mask).copy()
    mask[::2, 1:] = False
    frames = run.batch.frames["face"]._replace(mask=mask)
    batch = run.batch._replace(frames={"face": frames})
    step = jax.jit(functools.partial(train_step.train_step, run.system))
    _, losses = step(run.state, run.tables, batch)
    clips = MemberClips(
        {"face": frames}, run.state.labels[0], jnp.ones(len(mask)), jnp.float32(-1e9), ()
    )
    rng = train_step.member_keys(run.state.rng[0], run.state.step)[0]
    fused = run.system.fuse(rng, clips.frames, jnp.int32(-1))
    examples, exists = run.system.to_examples(fused)
    labels = jnp.repeat(run.state.labels[0], exists.shape[1])
    info = ClipInfo(jnp.zeros_like(labels), exists.reshape(-1))
    variables = {"params": jax.tree.map(lambda x: x[0], run.state.params)}
    variables |= jax.tree.map(lambda x: x[0], run.state.model_state)
    output, _ = run.system.model.apply(
        variables, examples, info, train=True, rngs={"dropout": rng}, mutable=["batch_stats"]
    )
    of_each = run.system.objective(output, labels, exists.reshape(-1), jnp.int32(0))
    wanted = np.asarray(of_each)[np.asarray(exists).reshape(-1)].mean()
    np.testing.assert_allclose(losses[0], wanted, rtol=1e-5)


def test_residual_dense_ranks_the_best_seven_tenths_of_all_and_merged_frames():
    config, system = published("residual_dense", "face")
    fused = system.fuse(None, {"face": make_frames([10, 1], max_frames=10)}, jnp.int32(-1))["face"]
    np.testing.assert_array_equal(fused.mask.sum(axis=1), [14, 2])  # L36: 70 % of 20, of 2
    quality = np.asarray(fused.quality)
    assert quality[0][fused.mask[0]].min() >= quality[0][~fused.mask[0]].max()
    assert config.eval.top_classes == 100  # L36
    assert (config.after_fusion, config.eval.reduce) == ("examples", "mean")  # L36


def test_residual_dense_has_shortcuts_batch_norm_and_a_classifier_of_everybody():
    found = shapes("residual_dense:iqiyi_vid,published,face")
    layers = {f"backbone/layer_{i}/dense/kernel": (512 if i == 0 else 8192, 8192) for i in range(3)}
    norms = {f"backbone/layer_{i}/norm/scale": (8192,) for i in range(3)}
    kernels = (
        layers | norms | {"classifier/logits/kernel": (8192, 10_035)}
    )  # L14: 10,034, and nobody
    assert {name: found[name] for name in kernels} == kernels
    products = sum(2 * np.prod(shape) for name, shape in found.items() if "kernel" in name)
    assert 0.4e9 < products < 0.5e9  # L5: about 0.5 GFLOP


def test_merged_frames_vary_less_within_a_class():
    """L32: half of the variance at most, as the mean of two frames has."""
    rng = np.random.default_rng(0)
    frames = make_frames([20] * 8, max_frames=20, dtype="float32")
    people = rng.normal(size=(8, 1, 6))
    frames = frames._replace(features=(people + rng.normal(size=(8, 20, 6))).astype(np.float32))
    union = fusion.merged_windows(jax.random.key(0), frames)
    own, merged = (np.asarray(x) - people for x in np.split(union.features, 2, axis=1))
    assert np.mean(merged**2) < 0.5 * np.mean(own**2)


# Quality fusion. L: line of the article; training.py and inference.py at 60f5127.


def test_quality_fusion_holds_a_low_rate_jumps_and_halves():
    config, _ = published("quality_fusion")
    assert (config.batch_size, config.optim.name) == (512, "adam")  # training.py:215, 314
    epochs = [0, 4, 8.9, 9, 58.9, 59, 108.9, 109, 158.9, 159, 199]
    wanted = [2e-5] * 3 + [1.5e-4] * 2 + [7.5e-5] * 2 + [3.75e-5] * 2 + [1.875e-5] * 2
    np.testing.assert_allclose(
        rates("quality_fusion:iqiyi_vid,published", *epochs), wanted, rtol=1e-5
    )  # :314-331


def test_quality_fusion_changes_its_loss_after_24_and_99_epochs():
    config, _ = published("quality_fusion")
    logits = np.array([[2.0, -1.0, 0.5]], np.float32)
    p = np.exp(logits) / np.exp(logits).sum()
    softmax = -np.log(p[0, 1])
    s = 1 / (1 + np.exp(-logits[0].astype(np.float64)))
    right = np.array([1 - s[0], s[1], 1 - s[2]])
    focal = np.sum((1 - right) ** 2 * -np.log(right))  # training.py:267-282, gamma 2
    epoch_steps = CLIPS / config.batch_size
    objective = losses.make_objective(config.loss.to_dict(), None, epoch_steps, logit_scale=1.0)
    for epoch, share in ((0, 0.75), (23.9, 0.75), (24.1, 1), (98.9, 1), (99.1, 0.98), (199, 0.98)):
        step = jnp.int32(round(epoch * CLIPS / config.batch_size))
        output = ModelOutput(jnp.asarray(logits)[:, None], jnp.zeros((1, 4)))
        loss = objective(output, jnp.array([1]), jnp.ones(1, bool), step)
        wanted = share * focal + (1 - share) * softmax  # :295, 308, 327-333
        np.testing.assert_allclose(loss, [wanted], rtol=1e-4, err_msg=str(epoch))


def test_quality_fusion_drops_clips_without_a_good_face():
    config, system = published("quality_fusion")
    assert config.data.max_frames == 4096  # training.py:84, 144: of all faces of a clip
    quality = ([25.0, 24.9, 80.0], [24.9, 3.0, -1.0])
    weights = [trained_on(system, one_clip(own))[1][0] for own in quality]
    assert weights == [1, 0]  # training.py:94, 98
    assert trained_on(system, one_clip([80.0], detection=0.69))[1] == 0
    assert trained_on(system, one_clip([80.0], detection=0.7))[1] == 1
    shares = dict(enumerate(config.fusion.face.train.probs, 1))
    assert shares == {1: 0.25, 2: 0, 3: 0.65, 4: 0, 5: 0.1}  # training.py:162-167


def test_a_clip_without_a_good_face_changes_nothing():
    """Its features do not reach the weights, and it does not count in the mean."""
    run = made_steps.make("quality_fusion:published", batch_size=8)
    face = run.batch.frames["face"]
    quality = np.asarray(face.quality).copy()
    quality[3] = 10
    step = jax.jit(functools.partial(train_step.train_step, run.system))
    found = []
    for scale in (1, 7):
        features = np.asarray(face.features).copy()
        features[3] *= scale
        frames = face._replace(features=features, quality=quality)
        batch = run.batch._replace(frames={"face": frames})
        state, loss = step(run.state, run.tables, batch)
        found.append((jax.device_get(state.params), np.asarray(loss)))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_quality_fusion_weighs_the_faces_of_the_test():
    quality = np.array([-1, 0, 10, 20, 25, 30, 35, 40, 90], np.float32)
    wanted = 0.9 * quality * [0, 0.2, 0.2, 0.3, 0.3, 0.6, 0.6, 1, 1]  # inference.py:95-104
    found = fusion.frame_weights(one_clip(quality), "graded")[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("net", "widths", "norms"),
    [
        ("mlp1", (512, 1024), True),
        ("mlp2", (512, 512, 1024), True),
        ("mlp3", (512, 1024), True),
        ("mlp4", (512, 768, 1024), False),
        ("mlp5", (512, 1024, 1024), False),
    ],
)
def test_quality_fusion_has_the_nets_of_its_code(net, widths, norms):
    found = shapes(f"quality_fusion:iqiyi_vid,published,{net}")  # inference.py:200-256
    kernels = [shape for name, shape in sorted(found.items()) if name.endswith("dense/kernel")]
    assert kernels == list(itertools.pairwise(widths))
    assert found["classifier/logits/kernel"] == (1024, 10_035)  # L22
    assert any("norm" in name for name in found) == norms


def test_quality_fusion_joins_five_folds_by_sums_of_sigmoids():
    config, system = published("quality_fusion", "trainval")
    assert len(ensemble.make_members(config.ensemble.to_dict())) == 5  # training.py:112
    assert config.data.train_splits == ("train", "val")  # training.py:70
    scores = system.score_fn(jnp.array([0.0, 2.0]), jnp.ones(2, bool))
    np.testing.assert_allclose(np.exp(scores), [0.5, 0.880797], rtol=1e-5)  # inference.py:169
    assert system.scores_are_logs
