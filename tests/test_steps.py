"""Steps against hand computation: examples, MixUp, branches, weights, and what is never held."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.cases import quick_first
from tests.helpers.made_frames import make_frames
from vidjax.core import augment, ensemble, losses
from vidjax.core.batch import Batch, ModelOutput
from vidjax.evaluation import eval_step as eval_step_lib
from vidjax.evaluation import scoring
from vidjax.models.base import Identifier
from vidjax.models.system import TaskSpec, make_system
from vidjax.runs import config as config_lib
from vidjax.training import train_step

log_probabilities = jax.jit(losses.log_softmax)
DIMS = {"face": 6, "audio": 4}
C = 37  # no other axis is as long
LINEAR = {"name": "dense", "layers": (), "feature_scale": 1.0}
NORMED = {"name": "dense", "layers": ((8, "swish", True, 0.3),)}
MMA = {"name": "mma", "embed_dim": 8, "gram_dim": 4, "num_clusters": 2, "netvlad": ("face",)}


def make(model=None, *, num_clips=5, **fields) -> Any:
    """Returns a tiny system; fields of the configuration are named `optim__name` and so on."""
    config = config_lib.default()
    config.modalities = tuple(DIMS)
    config.batch_size = num_clips
    config.optim.name = "sgd"
    config.optim.momentum = 0.0
    config.optim.warmup = 0.0
    config.optim.decay = "constant"
    config.optim.learning_rate = 0.1
    plain = config.to_dict()
    plain["model"] = LINEAR if model is None else model
    for name, value in fields.items():
        *path, leaf = name.split("__")
        inner = plain
        for key in path:
            inner = inner.setdefault(key, {})
        inner[leaf] = value
    return make_system(plain, TaskSpec(DIMS, C, None, num_clips, 100, train_other=True))


def make_batch(face=(7, 3, 0, 0, 1), audio=(1, 0, 1, 0, 1), *, max_frames=11, seed=0):
    """A batch of clips with so many frames of each modality."""
    frames = {
        "face": make_frames(face, max_frames=max_frames, dim=DIMS["face"], seed=seed),
        "audio": make_frames(audio, max_frames=1, dim=DIMS["audio"], seed=seed + 1),
    }
    frames = {k: v._replace(features=v.features.astype(np.float32)) for k, v in frames.items()}
    return Batch(frames, np.arange(len(face), dtype=np.int32), np.ones(len(face), bool))


def init(system, labels):
    rngs = ensemble.make_rngs((ensemble.Member(),), 3)
    labels = jnp.asarray(labels, jnp.int32)[None]
    state = jax.jit(lambda: train_step.init_state(system, rngs, labels))()
    return state.replace(params=_moved(state.params))


def _moved(params):
    """Returns parameters of which none is 0, and logits that differ enough to be told apart."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda p: p + rng.normal(0, 0.5, p.shape).astype(p.dtype), params)


def trainer(system):
    """Returns (state, batch, weights of its clips) -> the next state and the loss, compiled."""
    step = jax.jit(functools.partial(train_step.train_step, system))

    def train(state, batch, weight=None):
        weight = np.ones(state.labels.shape) if weight is None else np.asarray([weight])
        return step(state, train_step.make_tables((ensemble.Member(),), weight), batch)

    return train


def evaluate(system, state, batch):
    one = ensemble.take((state.params, state.model_state), 0)
    step = jax.jit(functools.partial(eval_step_lib.eval_step, system))
    return np.asarray(step(*one, jnp.int32(0), batch), np.float64)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def linear_logits(state, batch, frame):
    """The linear model by hand: logits [B, K] of one frame of the face beside the voice."""
    params = jax.tree.map(lambda x: np.asarray(x[0], np.float64), state.params)
    layer = params["classifier"]["logits"]
    face, audio = batch.frames["face"], batch.frames["audio"]
    x = [
        np.where(face.mask[:, frame, None], face.features[:, frame], 0),
        np.where(audio.mask[:, 0, None], audio.features[:, 0], 0),
    ]
    return np.concatenate(x, axis=1).astype(np.float64) @ layer["kernel"] + layer["bias"]


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def examples_of(batch, clip):
    """The frames of a clip that are examples of their own; a clip of the others alone is one."""
    found = np.flatnonzero(batch.frames["face"].mask[clip])
    return found if len(found) else np.flatnonzero(batch.frames["audio"].mask[clip])


EXAMPLES: Any = {"after_fusion": "examples"}


@pytest.mark.parametrize("reduce", quick_first(["mean", "max"]))
@pytest.mark.parametrize("scores", quick_first(["log_softmax", "log_sigmoid", "logits"]))
def test_voting_is_a_mean_or_a_maximum_over_frames(scores, reduce):
    system = make(**EXAMPLES, eval__scores=scores, eval__reduce=reduce)
    batch = make_batch()
    state = init(system, np.arange(5))
    found = evaluate(system, state, batch)
    for clip in range(5):
        voted = []
        for frame in examples_of(batch, clip):
            logits = linear_logits(state, batch, frame)[clip]
            sigmoid = 1 / (1 + np.exp(-logits))
            value = {"log_softmax": np.exp(log_softmax(logits)), "log_sigmoid": sigmoid}
            voted.append(value.get(scores, logits))
        if not voted:
            assert (found[clip] == -np.inf).all()
            continue
        wanted = np.mean(voted, axis=0) if reduce == "mean" else np.max(voted, axis=0)
        wanted = wanted if scores == "logits" else np.log(wanted)
        np.testing.assert_allclose(found[clip], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", [NORMED, LINEAR, MMA], ids=["normed", "linear", "mma"])
def test_one_example_a_clip_is_the_pool(model):
    mean = {"name": "mean", "weighting": "quality"}
    draw = {"name": "random", "num_draws": 1, "max_frames": 3}
    fusion = {"face": {"train": draw, "evaluate": mean}}
    batch, labels = make_batch(), np.array([3, 1, 4, 1, 5])
    found = []
    for after in ("pool", "examples"):
        system = make(model, fusion=fusion, after_fusion=after)
        state = init(system, labels)
        scores = evaluate(system, state, batch)
        found.append((scores, *trainer(system)(state, batch)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    for left, right in zip(*(jax.tree.leaves(one[1:]) for one in found), strict=True):
        if jnp.issubdtype(left.dtype, jnp.floating):
            np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6)


def test_the_loss_of_examples_is_the_mean_over_a_clips_frames():
    system = make(**EXAMPLES)
    batch, labels = make_batch(), np.array([3, 1, 4, 1, 5])
    weight = np.array([1.0, 0.5, 2.0, 7.0, 0.0])  # of the one without a frame, too
    state = init(system, labels)
    _, loss = trainer(system)(state, batch, weight)
    per_clip = np.zeros(5)
    for clip, label in enumerate(labels):
        losses = [
            -log_softmax(linear_logits(state, batch, frame))[clip, label]
            for frame in examples_of(batch, clip)
        ]
        per_clip[clip] = np.mean(losses) if losses else 0
    weight[3] = 0
    assert float(loss[0]) == pytest.approx(per_clip @ weight / weight.sum(), rel=1e-5)


def test_modalities_of_different_numbers_of_frames_are_no_examples():
    four = {"train": {"name": "sample", "num_frames": 4}, "evaluate": {"name": "all"}}
    two = {"train": {"name": "sample", "num_frames": 2}, "evaluate": {"name": "all"}}
    with pytest.raises(ValueError, match=r"after_fusion='examples': .* \[2, 4\]"):
        init(make(**EXAMPLES, fusion={"face": four, "audio": two}), np.arange(5))


MEAN = {"face": {"train": {"name": "mean"}, "evaluate": {"name": "mean"}}}


@pytest.mark.slow
def test_mixup_of_almost_nothing_is_the_plain_loss():
    batch, labels = make_batch(), np.array([3, 1, 4, 1, 5])
    state = init(make(fusion=MEAN), labels)
    plain = trainer(make(fusion=MEAN))(state, batch)
    tiny = trainer(make(fusion=MEAN, mixup=1e-4))(state, batch)
    np.testing.assert_allclose(plain[1], tiny[1], rtol=1e-5)
    mixed = trainer(make(fusion=MEAN, mixup=1.0))(state, batch)
    assert abs(float(mixed[1][0] - plain[1][0])) > 1e-3


@pytest.mark.slow
def test_mixup_never_takes_from_a_clip_of_no_weight():
    batch, labels = make_batch((7, 3, 5, 2, 1), (1, 1, 1, 1, 1)), np.array([3, 1, 4, 1, 5])
    weight = np.array([1.0, 0.0, 2.0, 0.0, 1.0])
    hidden = weight == 0

    def spoil(one):
        spoilt = np.where(hidden[:, None, None], 99, one.features).astype(np.float32)
        return one._replace(features=spoilt, quality=np.where(hidden[:, None], 1, one.quality))

    other = batch._replace(frames={name: spoil(one) for name, one in batch.frames.items()})
    for model in (LINEAR, NORMED):
        system = make(model, fusion=MEAN, mixup=1.0)
        state = init(system, labels)
        spoilt_labels = state.replace(labels=jnp.where(hidden, 9, state.labels))
        train = trainer(system)
        for seed in range(3):  # other partners
            step = jnp.int32(seed)
            left, loss = train(state.replace(step=step), batch, weight)
            right, same = train(spoilt_labels.replace(step=step), other, weight)
            assert_same(
                (loss, left.params, left.model_state, left.sums),
                (same, right.params, right.model_state, right.sums),
            )


@pytest.mark.slow
def test_mixup_against_a_loop():
    batch = make_batch((7, 3, 0, 2, 1))
    weight = np.array([1.0, 1.0, 1.0, 0.0, 1.0], np.float32)
    labels = np.arange(5, dtype=np.int32)  # each clip its own, so that labels name the partners
    clips = augment.MemberClips(batch.frames, labels, weight, jnp.float32(0), ())
    clips = jax.jit(functools.partial(augment.mix_up, alpha=0.7))(jax.random.key(0), clips)
    mixed, ((own, share), (partner, rest)) = clips.frames, clips.targets
    share, partner = np.asarray(share), np.asarray(partner)
    np.testing.assert_array_equal(own, labels)
    np.testing.assert_array_equal(rest, 1 - share)
    assert sorted(partner) == list(range(5))
    assert (share >= 0.5).all() and (share[weight[partner] == 0] == 1).all() and (share < 1).any()
    for name, one in batch.frames.items():
        for clip, other in enumerate(partner):
            for frame, real in enumerate(one.mask[clip]):
                theirs = bool(one.mask[other, frame]) and share[clip] < 1
                assert mixed[name].mask[clip, frame] == (real or theirs)
                wanted = share[clip] * real * one.features[clip, frame]
                if theirs:
                    wanted = wanted + (1 - share[clip]) * one.features[other, frame]
                found = mixed[name].features[clip, frame]
                np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_clips_without_a_good_frame_are_kept_or_dropped():
    batch = make_batch((3, 3, 3, 0, 1), (1, 1, 1, 1, 0))
    face = batch.frames["face"]
    quality = np.where(face.mask, 10.0, 0.0).astype(np.float32)
    quality[0, 1], quality[2] = 40.0, np.nan
    frames = {**batch.frames, "face": face._replace(quality=quality)}
    weight = np.array([2.0, 1.0, 1.0, 1.0, 0.0], np.float32)
    clips = augment.MemberClips(frames, np.arange(5), weight, jnp.float32(40), ())
    for poor_clips, expected in (("keep", weight), ("drop", [2, 0, 0, 1, 0])):
        left = augment.keep_quality(jax.random.key(0), clips, poor_clips=poor_clips)
        np.testing.assert_array_equal(left.weight, expected)
        counts = np.sum(left.frames["face"].mask, axis=1)
        np.testing.assert_array_equal(counts, [1, 3, 3, 0, 1])  # without a good one all stay
    every = clips._replace(min_quality=jnp.float32(np.finfo(np.float32).min))
    left = augment.keep_quality(jax.random.key(0), every, poor_clips="drop")
    np.testing.assert_array_equal(left.weight, weight)


def test_only_the_best_classes_of_a_clip_keep_their_scores():
    scores = jnp.array([[3.0, 1.0, 2.0, -jnp.inf], [0.0, 0.0, 5.0, -1.0]])
    inf = jnp.inf
    best = scoring.keep_best(scores, 2)
    np.testing.assert_array_equal(best, [[3, -inf, 2, -inf], [0, 0, 5, -inf]])


class TwoBranches(Identifier):
    """Two linear layers of the voice and the weights that a test wants."""

    train_weight: tuple
    eval_weight: tuple
    logit_scale: float = 1.0

    @nn.compact
    def __call__(self, frames, clips, *, train):
        x = frames["audio"].features[:, 0]
        num = len(self.train_weight[0])
        logits = [nn.Dense(1 + C, name=f"branch_{i}")(x) for i in range(num)]
        return ModelOutput(
            logits=jnp.stack(logits, axis=1),
            embedding=x,
            train_weight=jnp.asarray(self.train_weight, jnp.float32),
            eval_weight=jnp.asarray(self.eval_weight, jnp.float32),
        )


def branch_logits(state, batch, branch):
    layer = jax.tree.map(lambda x: np.asarray(x[0], np.float64), state.params)[f"branch_{branch}"]
    return batch.frames["audio"].features[:, 0] @ layer["kernel"] + layer["bias"]


@pytest.mark.parametrize("num_branches", quick_first([1, 2]))
@pytest.mark.parametrize("scores", quick_first(["log_softmax", "logits"]))
def test_branches_are_weighted(scores, num_branches):
    learn = np.array([[1, 1], [1, 0], [0, 1], [0.5, 2], [0, 0]])[:, :num_branches]
    answer = np.array([[0.2, 0.8], [1, 0], [0, 0.95], [1, 0], [0.5, 0.25]])[:, :num_branches]
    of_two: Any = TwoBranches
    model = of_two(tuple(map(tuple, learn)), tuple(map(tuple, answer)))
    system = make(eval__scores=scores)._replace(model=model)
    batch = make_batch(audio=(1, 1, 1, 1, 1))
    labels, weight = np.array([3, 1, 4, 1, 5]), np.array([1.0, 2.0, 1.0, 0.5, 3.0])
    state = init(system, labels)
    logits = [branch_logits(state, batch, i) for i in range(num_branches)]

    _, loss = trainer(system)(state, batch, weight)
    losses = [-log_softmax(one)[np.arange(5), labels] for one in logits]
    wanted = sum(learn[:, i] * one for i, one in enumerate(losses)) @ weight / weight.sum()
    assert float(loss[0]) == pytest.approx(wanted, rel=1e-5)

    found = evaluate(system, state, batch)
    with np.errstate(divide="ignore"):
        if scores == "logits":
            wanted = sum(answer[:, i, None] * one for i, one in enumerate(logits))
        else:
            parts = (np.exp(log_softmax(one)) for one in logits)
            wanted = np.log(sum(answer[:, i, None] * one for i, one in enumerate(parts)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "after"),
    [
        (NORMED, "pool"),
        pytest.param(NORMED, "examples", marks=pytest.mark.nightly),
        pytest.param(MMA, "examples", marks=pytest.mark.slow),
        pytest.param(MMA, "pool", marks=pytest.mark.nightly),
    ],
    ids=["normed-pool", "normed-examples", "mma-examples", "mma-pool"],
)
def test_a_clip_without_a_frame_teaches_nothing(model, after):
    """Nor does a padded row, whatever lies in either."""
    draw = {"name": "random", "num_draws": 2, "max_frames": 3}
    system = make(model, fusion={"face": {"train": draw, "evaluate": {"name": "all"}}})
    system = system._replace(frame_is_example=after == "examples")
    batch = make_batch((7, 3, 0, 5, 1), (1, 0, 0, 1, 1))
    batch = batch._replace(batch_mask=np.array([True, True, True, False, True]))
    idle = np.array([False, False, True, True, False])
    state = init(system, np.array([3, 1, 4, 1, 5]))
    train = trainer(system)
    left, loss = train(state, batch)

    def spoil(one):
        return one._replace(
            features=np.where(idle[:, None, None], 1e4, one.features).astype(np.float32),
            quality=np.where(idle[:, None], 3, one.quality).astype(np.float32),
        )

    other = batch._replace(frames={name: spoil(one) for name, one in batch.frames.items()})
    labels = jnp.where(idle, 9, state.labels)
    right, same = train(state.replace(labels=labels), other)
    assert_same(
        (loss, left.params, left.model_state, left.sums),
        (same, right.params, right.model_state, right.sums),
    )
    assert float(left.sums["weight"][0]) == 3
    with pytest.raises(AssertionError):
        assert_same(left.params, state.params)


def shapes_in(jaxpr):
    """Yields the shape of every value that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        for value in equation.outvars:
            yield tuple(value.aval.shape)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


B, T = 5, 11  # and C: all different, and no width of a layer


@pytest.mark.parametrize("reduce", quick_first(["mean", "max"]))
def test_scores_of_all_examples_never_exist_at_once(reduce):
    system = make(MMA, **EXAMPLES, eval__reduce=reduce)
    state = jax.eval_shape(lambda: init(system, np.arange(B)))
    batch = make_batch()
    one = jax.eval_shape(lambda: ensemble.take((state.params, state.model_state), 0))
    step = functools.partial(eval_step_lib.eval_step, system)
    shapes = set(shapes_in(jax.make_jaxpr(step)(*one, jnp.int32(0), batch).jaxpr))
    assert (B, 1 + C) in shapes
    for shape in shapes:
        assert not {1 + C, C} & set(shape) or not {T, B * T} & set(shape), shape


@pytest.mark.slow
@pytest.mark.parametrize("reduce", quick_first(["mean", "max"], mark=pytest.mark.nightly))
def test_an_exported_step_judges_examples_in_blocks(reduce):
    """Of two clips it takes 128 examples at once; the last of three blocks is cut off."""
    system = make(NORMED, **EXAMPLES, eval__reduce=reduce)
    state = init(system, np.arange(5))
    params, model_state = ensemble.take((state.params, state.model_state), 0)
    batch = make_batch((300, 11), (1, 0), max_frames=301)
    sizes = jax.export.symbolic_shape("B, T")

    def symbolic(x):
        dims = [size if size == 1 else sizes[axis] for axis, size in enumerate(x.shape[:2])]
        return jax.ShapeDtypeStruct((*dims, *x.shape[2:]), x.dtype)

    def step(frames):
        rows = jnp.zeros(frames["face"].mask.shape[:1], jnp.int32)
        whole = Batch(frames, rows, rows == 0)
        return eval_step_lib.eval_step(system, params, model_state, jnp.int32(0), whole)

    leaves, tree = jax.tree.flatten(batch.frames)  # an exported function takes no Frames
    compiled = jax.jit(lambda leaves: step(tree.unflatten(leaves)))
    exported = jax.export.export(compiled)([symbolic(leaf) for leaf in leaves])
    assert (2, 128, 1 + C) not in shapes_in(jax.make_jaxpr(compiled)(leaves).jaxpr)
    np.testing.assert_allclose(exported.call(leaves), compiled(leaves), rtol=1e-5, atol=1e-6)


def test_is_best_is_argmax():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (500, 6)).astype(np.float32)  # ties
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    column = rng.integers(0, 6, 500).astype(np.int32)
    scores[0] = -np.inf
    found = jax.jit(losses.is_best)(scores, column)
    np.testing.assert_array_equal(found, np.argmax(scores, axis=1) == column)
    assert 0 < np.sum(found) < 500
    assert not losses.is_best(jnp.full((1, 6), jnp.nan), jnp.zeros(1, jnp.int32))[0]


def test_logarithms_of_probabilities_near_one_keep_their_order():
    """The best column against the others, in float64; column 2 is one that training never saw."""
    leads = np.array([0.1, 3.0, 18.0, 60.0, 86.0])
    logits = np.tile([0.0, 0.0, 99.0, -1.0], (2, 5, 1))
    logits[1, :, 2] = -99
    logits[:, :, 0] = leads, leads + 0.01
    seen = np.array([True, True, False, True])
    found = np.asarray(log_probabilities(jnp.asarray(logits, jnp.float32), jnp.asarray(seen)))
    others = 1 + np.exp(-1.0)
    wanted = -np.log1p(others * np.exp(-logits[..., 0]))
    np.testing.assert_allclose(found[..., 0], wanted, rtol=2e-5)
    assert (found[0, :, 0] < found[1, :, 0]).all() and (found[1, :, 0] <= 0).all()
    total = np.logaddexp(logits[..., 0], np.log(others))
    np.testing.assert_allclose(found[..., 1], -total, rtol=1e-5)


def test_a_single_column_has_probability_one_and_nan_stays():
    found = log_probabilities(jnp.array([[5.0, 1.0]]), jnp.array([False, True]))
    assert found[0, 1] == 0.0
    found = log_probabilities(jnp.array([[jnp.nan, 1.0]]), jnp.array([True, True]))
    assert np.isnan(found).all()
