"""`CONFIG:published` against the numbers of its publication and of its code.

Code of DeepMEF, third place of 2019: github.com/LegenDong/IQIYI_VID_FACE_2019 at 258ff92; of noise
classes, fifth place of 2018: github.com/luckycallor/IQIYI_VID_5th at 72a2368. Quality fusion: lines
of the article; training.py and inference.py at 60f5127.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.test_util import check_grads
from scipy import special

from tests.helpers.made_frames import make_frames
from tests.helpers.made_models import init, randomised
from vidjax.core import augment, ensemble, losses
from vidjax.core.batch import Frames, ModelOutput
from vidjax.models.build_system import System, TaskSpec, make_system
from vidjax.models.deepmef import ChannelAttention
from vidjax.models.layers import ResidualBlock
from vidjax.runs.config_io import load_file
from vidjax.training import train_step

pytestmark = pytest.mark.slow
CLIPS = 57_820  # of train
DEEPMEF = "deepmef:iqiyi_vid,face,scene,published"
NOISE = "noise_classes:iqiyi_vid,published"
QUALITY_FUSION = "quality_fusion:iqiyi_vid,published"
RESIDUAL_DENSE = "residual_dense:iqiyi_vid,published"


@functools.cache
def official(spec: str) -> tuple[Any, System]:
    """Returns a configuration, and its system with the sizes of the official data."""
    config = load_file(spec)
    widths = {name: 2048 if name == "scene" else 512 for name in config.modalities}
    clusters = 3691 if config.data.distractors == "noise" else None
    steps = math.ceil(config.num_epochs * CLIPS / config.batch_size)
    task = TaskSpec(widths, 10_034, clusters, CLIPS, steps, train_other=True)
    return config, make_system(config.to_dict(), task)


def shapes(spec: str) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of the parameters of one member."""
    _, system = official(spec)
    labels, rngs = jnp.zeros((1, CLIPS), jnp.int32), ensemble.make_rngs((ensemble.Member(),), 0)
    params = jax.eval_shape(lambda: train_step.init_state(system, rngs, labels)).params
    flat: Any = flatten_dict(params, sep="/")
    return {name: x.shape[1:] for name, x in flat.items()}


# The rate of an epoch such as 8.9 is the rate of the first step after it.
@pytest.mark.parametrize(("spec", "epochs", "published"), [
    (RESIDUAL_DENSE, range(8), 0.01 * 0.7 ** np.arange(8)),  # line 34 of the article
    (QUALITY_FUSION, (0, 8.9, 9, 58.9, 59, 109, 159, 199),  # training.py:314-331
     [2e-5, 2e-5, 1.5e-4, 1.5e-4, 7.5e-5, 3.75e-5, 1.875e-5, 1.875e-5]),
    # CosineAnnealingLR over 100 epochs, stepped once per epoch, ends near 0.
    (DEEPMEF, (0, 0.9, 1, 1.9, 2, 10, 50, 99),
     0.05 + 0.05 * np.cos(np.pi * np.array([0, 0, 1, 1, 2, 10, 50, 99]) / 100)),
    (NOISE, (0, 10, 20, 100, 199), [1e-3] * 5),
], ids=["residual_dense", "quality_fusion", "deepmef", "noise_classes"])  # fmt: skip
def test_learning_rates_equal_the_published_rates(spec, epochs, published):
    config, system = official(spec)
    steps = np.ceil(np.asarray(epochs) * CLIPS / config.batch_size).astype(np.int32)
    rates: list[Any] = [system.lr_schedule(step) for step in steps]
    np.testing.assert_allclose(rates, published, rtol=1e-5)


@pytest.mark.parametrize(("spec", "settings"), [
    (f"{RESIDUAL_DENSE},trainval", {  # lines of the article
        "num_epochs": 8, "optim.name": "adam",  # line 34
        "optim.total_decay": 0, "optim.weight_decay": 0, "mixup": 0,
        "loss.classification": "softmax", "loss.label_smoothing": 0,
        "ensemble.folds": 10,  # line 22
        "fusion.face.train.name": "windows",  # line 32: all frames, and merged frames
        "fusion.face.train.max_frames": 5,  # line 32: a frame is merged with 1 to 4 others
        "fusion.face.evaluate.name": "windows", "fusion.face.evaluate.kept_share": 0.7,  # line 36
        # Line 32: three nets learn from all frames, from frames > 20, and from frames > 40.
        "ensemble.min_quality": (-1000, 20 + 2**-19, 40 + 2**-18), "ensemble.poor_clips": "drop",
        "transforms": ("by_example",),  # line 32: long clips have more frames
        "eval.top_classes": 100, "after_fusion": "examples", "eval.reduce": "mean",  # line 36
    }),
    (f"{QUALITY_FUSION},trainval", {  # lines of training.py
        "batch_size": 512, "optim.name": "adam", "ensemble.folds": 5,  # 215, 314, 112
        "data.train_splits": ("train", "val"), "data.max_frames": 4096,  # 70; 84, 144: all faces
        "fusion.face.train.min_quality": 25, "fusion.face.train.min_detection": 0.7,  # 94, 98
        "fusion.face.train.poor_clips": "drop",  # 98
        "fusion.face.train.probs": (0.25, 0, 0.65, 0, 0.1),  # of 1 to 5 faces, 162-167
        "fusion.face.evaluate.weighting": "graded",  # inference.py:95-104
        "eval.scores": "log_sigmoid",  # inference.py:169
    }),
    ("mma:published,iqiyi_vid,ensemble", {  # lines of the iQIYI-VID paper
        "data.crop": "quality",  # the best faces of the clip, not of a window
        "fusion.face.train.name": "top", "fusion.face.evaluate.name": "top",  # line 142
        "fusion.face.train.num_frames": 32, "fusion.face.evaluate.num_frames": 32,
        "fusion.face.evaluate.repeats": "random",
        "model.gamma": 0.05,  # line 215
        "model.netvlad_batch_norm": True,  # line 159
        "model.gram_scale": 1,  # equation 2 (line 176)
        "model.netvlad_reduce": "sum",  # "a weighted sum" (line 153)
        # Three models "trained on different partition of the training set" (line 252).
        "ensemble.folds": 3, "ensemble.only": (0, 1, 2),
    }),
    # demo_train_face_scene_multi_view.py: the default arguments, optimiser and loss.
    (f"{DEEPMEF},trainval", {
        "batch_size": 4096, "num_epochs": 100, "data.train_splits": ("train", "val"),
        "optim.name": "sgd", "optim.momentum": 0.9, "optim.clip_norm": 0,
        "optim.weight_decay": 1e-5, "optim.decay_all": True, "optim.total_decay": 0,
        "loss.margin": 0.5, "loss.gamma": 2, "data.distractors": "leave_out",
        "mixup": 0, "transforms": (), "model.main.modality_dropout_rate": 0,
        # np.random.choice(frames, 40, replace=len(frames) < 40), also in the evaluation
        **{f"fusion.face.{part}.{name}": value for part in ("train", "evaluate") for name, value in
           {"name": "sample", "num_frames": 40, "order": "random", "replacement": True}.items()},
        # demo_test_face_scene_multi_view.py: Softmax of the net's output, without its factor.
        "eval.temperature": 30, "model.main.logit_scale": 30, "model.other.logit_scale": 30,
        # sep_cat_qds_face_scene_transforms: the feature, quality / 100, detection.
        "model.main.rms_norm": False, "model.main.num_frames": 40,
        "model.main.channel_attention": "channels", "model.main.channel_norm": True,
        "model.main.layer_form": "published",
    }),
    # parse_args and the main program of fn_weightedMean_v2_multiModel_refuse_v4.py.
    (NOISE, {
        "batch_size": 10_240, "num_epochs": 200, "ensemble.folds": 8, "optim.name": "adam",
        "optim.weight_decay": 0, "optim.total_decay": 0, "noise.relabel_every_epochs": 1,
        "loss.margin": 0.5, "model.logit_scale": 64,
        "loss.mean_over": "clips",  # reduce_mean(cross-entropy x weight)
        # feat_weighted_mean: weights are the squared quality; frames below 0 are left out.
        "fusion.face.train.name": "mean", "fusion.face.train.weighting": "squared",
        "fusion.face.train.min_quality": 0, "fusion.face.train.min_detection": 0,
        # load_data in ..._predict_v2.py: a cut takes one frame or more, and leaves one or more.
        "fusion.face.evaluate.name": "crops", "fusion.face.evaluate.weighting": "squared",
        "fusion.face.evaluate.always_shorter": True,
    }),
], ids=["residual_dense", "quality_fusion", "mma", "deepmef", "noise_classes"])  # fmt: skip
def test_settings_equal_the_published_settings(spec, settings):
    found = flatten_dict(load_file(spec).to_dict(), sep=".")
    assert {name: found[name] for name in settings} == settings


@pytest.mark.parametrize(("spec", "wanted"), [
    (f"{RESIDUAL_DENSE},face", {
        "backbone/layer_0/dense/kernel": (512, 8192), "backbone/layer_0/norm/scale": (8192,),
        "backbone/layer_1/dense/kernel": (8192, 8192), "backbone/layer_1/norm/scale": (8192,),
        "backbone/layer_2/dense/kernel": (8192, 8192), "backbone/layer_2/norm/scale": (8192,),
        "classifier/logits/kernel": (8192, 10_035),  # line 14: 10,034 people, strangers
    }),
    ("mma:published,iqiyi_vid", {  # lines of the iQIYI-VID paper
        # "a Batch-normalization (BN) layer after the Fully-connected (FC) layer" (line 159)
        "face_netvlad/assignment/kernel": (512, 3), "face_netvlad/norm/scale": (3,),
        # "did not apply NetVLAD to the other modal" (line 254)
        "face_map/kernel": (3 * 512, 3 * 512), "head_map/kernel": (512, 512),
        "body_map/kernel": (512, 512), "audio_map/kernel": (512, 512),
        "attention_map/w_f/kernel": (512, 64),  # line 215: "D is set to 512 ... 64"
        # "3 of the 6 features come from face" (line 170), "squeezed into a vector" (line 184)
        "classifier/logits/kernel": (6 * 512, 10_035),
    }),
    # models/models.py, ArcFaceSceneModel and ArcSceneFeatModel; channel_attention_layer.py.
    # A net sees 15 of 16 chunks: 480 of 512 numbers of a face, 1920 of 2048 of a scene. 482 is a
    # face with two scores. 602 adds 120 of the scene's branch. Hidden widths: 2 x 482, 2 x 1920.
    (f"{DEEPMEF},views", {
        **{f"main/channel_attention/{name}/kernel": (40, 20) for name in ("theta", "phi", "g")},
        "main/channel_attention/out/kernel": (20, 40), "main/aggregation/query": (482,),
        "main/scene_0/dense/kernel": (1920, 480), "main/scene_1/dense/kernel": (480, 120),
        "main/block/hidden/dense/kernel": (602, 964), "main/block/back/dense/kernel": (964, 602),
        "main/classifier/kernel": (602, 10_035),
        "other/backbone/hidden/dense/kernel": (1920, 3840),
        "other/backbone/back/dense/kernel": (3840, 1920), "other/classifier/kernel": (1920, 10_035),
    }),
    (NOISE, {  # C identities, K clusters: 1 + 2C + K classes
        "backbone/layer_0/dense/kernel": (512, 512),
        "classifier/kernel": (512, 1 + 2 * 10_034 + 3691),
    }),
], ids=["residual_dense", "mma", "deepmef", "noise_classes"])  # fmt: skip
def test_parameters_have_the_published_shapes(spec, wanted):
    sizes = shapes(spec)
    assert {name: sizes[name] for name in wanted} == wanted
    assert not {name for name in sizes if name.endswith("kernel")} - wanted.keys()


def test_quality_fusion_reweights_its_losses_after_24_and_99_epochs():
    config, _ = official(QUALITY_FUSION)
    logits, label = np.array([[2.0, -1.0, 0.5]]), 1
    softmax = np.log(np.exp(logits).sum()) - logits[0, label]
    # Sigmoids: probabilities that class 1 is right, and that classes 0 and 2 are not.
    right = special.expit(np.array([-1, 1, -1]) * logits[0])
    focal = np.sum((1 - right) ** 2 * -np.log(right))  # training.py:267-282, gamma 2
    epoch_steps = CLIPS / config.batch_size
    sizes = {"class_mask": None, "steps_per_epoch": epoch_steps}
    objective = losses.make_objective(config.loss.to_dict(), **sizes, logit_scale=1.0)
    output = ModelOutput(jnp.asarray(logits, jnp.float32)[:, None], embedding=jnp.zeros((1, 4)))
    for epoch, share in ((0, 0.75), (23.9, 0.75), (24.1, 1), (98.9, 1), (99.1, 0.98), (199, 0.98)):
        step = jnp.int32(round(epoch * epoch_steps))
        loss = objective(output, jnp.array([label]), jnp.ones(1, bool), step)
        wanted = share * focal + (1 - share) * softmax  # training.py:295, 308, 327-333
        np.testing.assert_allclose(loss, [wanted], rtol=1e-4, err_msg=str(epoch))


def test_quality_fusion_nets_have_the_layer_sizes_of_the_code():
    hidden = {"mlp1": (), "mlp2": (512,), "mlp3": (), "mlp4": (768,), "mlp5": (1024,)}
    for net, widths in hidden.items():
        sizes = shapes(f"{QUALITY_FUSION},{net}")  # inference.py:200-256
        kernels = [shape for name, shape in sorted(sizes.items()) if name.endswith("dense/kernel")]
        assert kernels == list(itertools.pairwise((512, *widths, 1024)))
        assert sizes["classifier/logits/kernel"] == (1024, 10_035)  # line 22 of the article
        assert any("norm" in name for name in sizes) == (net not in ("mlp4", "mlp5"))


def test_deepmef_views_hide_the_same_feature_chunks_as_the_code():
    """View v hides chunk v of 16, or of 32 for only the scene (scripts/main.sh, get_mask_index)."""
    config, system = official(f"{DEEPMEF},views")
    members = ensemble.make_members(config.ensemble.to_dict())
    assert [member.view for member in members] == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 15]
    # Features count from 0, so that the features of a view show which of 16 chunks is hidden.
    ones, widths = jnp.ones((1, 1)), {"face": 512, "scene": 2048}
    frames = {
        name: Frames(jnp.arange(width)[None, None] * 1.0, ones, ones, ones.astype(int), ones == 1)
        for name, width in widths.items()
    }
    for view in (0, 15):
        seen = system.fuse(None, frames, jnp.int32(view))
        for name, width in widths.items():
            hidden = np.s_[width // 16 * view : width // 16 * (view + 1)]
            assert {*seen[name].features[0, 0].tolist()} == {*np.delete(range(width), hidden)}
    only_scene = load_file("deepmef:scene,published,views").ensemble.to_dict()
    views = [member.view for member in ensemble.make_members(only_scene)]
    assert views == [1, 2, 3, 4, 6, 8, 10, 11, 12, 14, 15]


def test_residual_block_starts_with_kaiming_normal_weights():
    """nn.init.kaiming_normal_. A truncated normal would end at 2.3 standard deviations."""
    draw = jax.jit(functools.partial(ResidualBlock(1024).init, train=False))
    params = draw(jax.random.key(0), np.ones((2, 512), np.float32), np.ones(2, bool))
    for name, inputs in (("hidden", 512), ("back", 1024)):
        weights = np.asarray(params["params"][name]["dense"]["kernel"]) / np.sqrt(2 / inputs)
        assert weights.std() == pytest.approx(1, rel=0.01)
        assert np.abs(weights).max() > 4


def test_deepmef_channel_attention_equals_the_attention_of_its_code():
    """Maps over 4 frames have no bias. BatchNorm follows theta, phi and out."""
    frames = make_frames([4, 4, 0, 4], max_frames=4, dtype="float32")
    layer: Any = ChannelAttention("channels", num_frames=4, norm=True)
    variables = init(layer, frames.features, frames.mask)
    for name in ("theta", "phi", "out"):  # all start at 0, so theta and phi never learn
        np.testing.assert_array_equal(variables["params"][name]["kernel"], 0)
    params = randomised(variables["params"])
    assert all({*params[name]} == {"kernel"} for name in ("theta", "phi", "g", "out"))  # no bias
    apply = jax.jit(functools.partial(layer.apply, train=True, mutable=["batch_stats"]))
    out, new = apply({**variables, "params": params}, frames.features, frames.mask)
    real = np.array([0, 1, 3])  # the clips with frames
    rows = np.swapaxes(frames.features[real], 1, 2).astype(np.float64)  # [B, D, T]

    def mapped(name, x):
        y, norm = x @ np.asarray(params[name]["kernel"], np.float64), params[f"{name}_norm"]
        unit = (y - y.mean((0, 1))) / np.sqrt(y.var((0, 1)) + 1e-5)  # BatchNorm per channel
        return unit * norm["scale"] + norm["bias"]

    theta, phi, g = mapped("theta", rows), mapped("phi", rows), rows @ params["g"]["kernel"]
    affinity = special.softmax(np.einsum("bdi,bdj->bij", theta, phi), axis=-1)
    added = mapped("out", np.einsum("bij,bdj->bdi", affinity, g))
    wanted = frames.features[real] + np.swapaxes(added, 1, 2)
    np.testing.assert_allclose(out[real], wanted, atol=1e-4)
    np.testing.assert_array_equal(out[2], 0)
    wanted = 0.1 * (rows @ params["theta"]["kernel"]).mean((0, 1))  # moves by 0.1, as in torch
    np.testing.assert_allclose(new["batch_stats"]["theta_norm"]["mean"], wanted, atol=1e-5)


def test_deepmef_focal_factor_uses_the_mean_loss_of_the_batch():
    """models/losses.py of the code: the mean cross-entropy of a batch x (1 - exp(-mean))**2."""
    draw, labels = np.random.default_rng(1).uniform, np.array([1, 2, 3, 4, 1, 2], np.int32)
    cosines = draw(0.3, 0.6, (6, 2, 5))  # [clips, branches, classes]
    cosines[np.arange(6), :, labels] = draw(0.85, 0.95, (6, 2))  # so mean losses are about 1
    mask, sees = np.arange(6) < 5, np.ones((6, 2), np.float32)  # row 5 is padding
    sees[2, 0] = 0  # branch 0 does not learn from clip 2, so it is not in the batch of branch 0
    sizes = {"class_mask": None, "steps_per_epoch": 14.125}
    objective = losses.make_objective(load_file(DEEPMEF).loss.to_dict(), **sizes, logit_scale=30.0)

    @jax.jit
    def total(cosines):
        output = ModelOutput(30 * cosines, jnp.zeros((6, 1)), loss_weight=jnp.asarray(sees))
        per_clip = jnp.where(mask, objective(output, labels, mask, jnp.int32(0)), 0)
        return jnp.sum(per_clip) / mask.sum()

    def by_hand(cosines):
        loss = 0.0
        for branch in range(2):
            rows = np.flatnonzero(mask & (sees[:, branch] > 0))
            cosine, at_label = cosines[rows, branch], (np.arange(len(rows)), labels[rows])
            cosine[at_label] = np.cos(np.arccos(cosine[at_label]) + 0.5)  # the margin of ArcFace
            mean = np.mean(np.log(np.exp(30 * cosine).sum(axis=1)) - 30 * cosine[at_label])
            loss += (1 - np.exp(-mean)) ** 2 * mean
        return loss

    with jax.enable_x64(True):
        np.testing.assert_allclose(total(jnp.asarray(cosines)), by_hand(cosines), rtol=1e-6)
        check_grads(total, (jnp.asarray(cosines),), order=1, modes=("rev",), rtol=1e-4)


def test_weight_of_mirror_classes_rises_every_20_epochs():
    """noise_weight = [0.1, 0.15, ..., 0.5, 0.6], each for a tenth of 200 epochs."""
    config, system = official(NOISE)
    mirror = jnp.array([10_034 + 3691 + 1])  # the first class after "other", people and clusters
    epochs = (0, 19.9, 20.1, 45, 99.9, 100.1, 179.9, 180.1, 199)
    steps = jnp.float32(CLIPS / config.batch_size) * jnp.array(epochs)
    weights = [float(system.column_weight(mirror, step)[0]) for step in steps]
    assert weights == pytest.approx([0.1, 0.1, 0.15, 0.2, 0.3, 0.35, 0.5, 0.6, 0.6])


def test_long_noise_clips_are_cut_to_pieces_of_random_length():
    """random_split draws a start from 0 to n - 1, then an end from start + 1 to n."""
    frames = make_frames([60, 60, 3], max_frames=60)
    # Clip 0 is long and chosen, as a noise clip. Clip 1 is long, and clip 2 is short.
    options = {"chosen": np.array([True, False, False]), "short": np.array([False, False, True])}
    cut = functools.partial(augment.concat_clips, frames=frames, pieces="random", **options)
    draw = jax.jit(jax.vmap(lambda key: cut(key).mask))
    masks = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert masks[:, 1].sum(axis=1).tolist() == [60] * 4000  # clip 1 is not chosen
    # Joined clips have 120 places. Clip 0 has 60 frames.
    first, last = masks[:, 0].argmax(axis=1), 119 - masks[:, 0, ::-1].argmax(axis=1)
    np.testing.assert_array_equal(masks[:, 0].sum(axis=1), last - first + 1)  # without gaps
    assert (first.min(), first.max(), last.max()) == (0, 59, 59)
    assert first.mean() == pytest.approx(29.5, abs=1.2)
    late = (last - first)[first == 50]  # 1 to 10 frames are left, so this is 0 to 9
    assert set(late.tolist()) <= set(range(10)) and len(set(late.tolist())) > 6
