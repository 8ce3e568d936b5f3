"""Training and evaluation steps equal computations by hand."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from tests.helpers.batches import assert_equal
from tests.helpers.cases import nightly_after_first
from tests.helpers.made_frames import make_frames
from tests.helpers.made_models import zero_draws
from tests.helpers.seen import refused
from vidjax.core import augment, devices, ensemble, losses
from vidjax.core.batch import Batch, ModelOutput
from vidjax.evaluation import eval_step as eval_step_lib, scoring
from vidjax.models.base import Identifier
from vidjax.models.build_system import TaskSpec, make_system
from vidjax.runs import config as config_lib
from vidjax.training import train_step

DIMS = {"face": 6, "audio": 4}
C = 37  # identities
LINEAR = {"name": "dense", "layers": (), "feature_scale": 1.0}
# Of two branches: a row for each clip, a column for each branch.
TRAIN_WEIGHT = np.array([[1, 1], [1, 0], [0, 1], [0.5, 2], [0, 0]], np.float32)
EVAL_WEIGHT = np.array([[0.2, 0.8], [1, 0], [0, 0.95], [1, 0], [0.5, 0.25]], np.float32)
log_softmax = functools.partial(special.log_softmax, axis=-1)


def make(model=LINEAR, clusters=None, **fields) -> Any:
    """Returns a tiny system; fields of the configuration are named `eval__scores` and so on."""
    plain = config_lib.default().to_dict() | {"model": model, "modalities": tuple(DIMS)}
    plain["optim"] |= {"name": "sgd", "momentum": 0.0, "warmup": 0.0, "decay": "constant"}
    for name, value in fields.items():
        section, _, leaf = name.rpartition("__")
        (plain[section] if section else plain)[leaf] = value
    task = TaskSpec(DIMS, C, clusters, num_clips=5, total_steps=100, train_other=True)
    return make_system(plain, task)


def make_batch(face=(7, 3, 0, 0, 1), audio=(1, 0, 1, 0, 1)):
    """Returns clips with these numbers of frames, and at most one frame of audio."""
    frames = {
        "face": make_frames(face, max_frames=11, dim=DIMS["face"], dtype="float32"),
        "audio": make_frames(audio, max_frames=1, dim=DIMS["audio"], seed=1, dtype="float32"),
    }
    return Batch(frames, np.arange(len(face), dtype=np.int32), np.ones(len(face), bool))


def init(system, labels):
    """Returns a state with no parameter at 0, whose logits differ clearly."""
    rngs = ensemble.make_rngs((ensemble.Member(),), 3)
    labels, rng = jnp.asarray(labels, jnp.int32)[None], np.random.default_rng(5)
    with zero_draws():
        state = jax.jit(lambda: train_step.init_state(system, rngs, labels))()
    moved = jax.tree.map(lambda p: p + rng.normal(0, 0.5, p.shape).astype(p.dtype), state.params)
    return state.replace(params=moved)


def train(system, weight, state, batch):
    """Returns the next state, and the loss."""
    constants = train_step.make_member_constants((ensemble.Member(),), weight[None])
    after, loss = jax.jit(functools.partial(train_step.train_step, system))(state, constants, batch)
    return after, float(loss[0])


def evaluate(system, state, batch):
    member = ensemble.take((state.params, state.model_state), 0)
    step = jax.jit(functools.partial(eval_step_lib.eval_step, system))
    return np.asarray(step(*member, jnp.int32(0), batch), np.float64)


def linear_logits(state, batch, frame):
    """Returns the logits [B, K] of the linear model for one frame of the faces, and the voice."""
    params = jax.tree.map(lambda x: np.asarray(x[0], np.float64), state.params)
    layer, (face, audio) = params["classifier"]["logits"], batch.frames.values()
    parts = ((face, frame), (audio, 0))
    x = [np.where(part.mask[:, t, None], part.features[:, t], 0) for part, t in parts]
    return np.concatenate(x, axis=1).astype(np.float64) @ layer["kernel"] + layer["bias"]


def examples_of(batch, clip):
    """Returns the frames of a clip that are examples: frames with faces, or else of the voice."""
    frames = np.flatnonzero(batch.frames["face"].mask[clip])
    return frames if len(frames) else np.flatnonzero(batch.frames["audio"].mask[clip])


@nightly_after_first("reduce", ["mean", "max"])
@nightly_after_first("scores", ["log_softmax", "log_sigmoid", "logits"])
def test_voting_takes_the_mean_or_maximum_over_frames(scores, reduce):
    system = make(
        after_fusion="examples", eval__scores=scores, eval__reduce=reduce, eval__temperature=1.5
    )  # every frame is an example, and votes
    batch, state = make_batch(), init(system, np.arange(5))
    scored = evaluate(system, state, batch)
    logits = np.stack([linear_logits(state, batch, frame) / 1.5 for frame in range(11)])
    shares = {"log_softmax": np.exp(log_softmax(logits)), "log_sigmoid": special.expit(logits)}
    votes = shares.get(scores, logits)  # [frames, clips, columns]
    for clip in (0, 1, 2, 4):
        wanted = getattr(np, reduce)(votes[examples_of(batch, clip), clip], axis=0)
        if scores != "logits":
            wanted = np.log(wanted)
        np.testing.assert_allclose(scored[clip], wanted, rtol=1e-5, atol=1e-5)
    assert (scored[3] == -np.inf).all()  # clip 3 has no frames


@pytest.mark.slow
@pytest.mark.parametrize("mean_over", ["weights", "clips"])
def test_loss_of_frame_examples_is_the_mean_over_the_frames_of_a_clip(mean_over):
    """The loss is divided by the sum of the weights of clips with frames, or by their number."""
    # Clip 3 has no frames, and row 4 is padding.
    batch, labels = make_batch()._replace(batch_mask=np.arange(5) < 4), np.array([3, 1, 4, 1, 5])
    weight = np.array([1.0, 0.5, 2.0, 7.0, 9.0])
    system = make(after_fusion="examples", loss__mean_over=mean_over)
    state = init(system, labels)
    _, loss = train(system, weight, state, batch)
    counted, total = np.array([1.0, 0.5, 2.0, 0.0, 0.0]), 0.0
    for clip in np.flatnonzero(counted):
        logits = [linear_logits(state, batch, frame)[clip] for frame in examples_of(batch, clip)]
        total += weight[clip] * np.mean([-log_softmax(x)[labels[clip]] for x in logits])
    divisor = np.sum(counted) if mean_over == "weights" else np.count_nonzero(counted)
    assert loss == pytest.approx(total / divisor, rel=1e-5)


def test_fusions_that_do_not_fit_the_use_of_frames_are_refused():
    """Otherwise the error would come after the training, or after its first epoch."""
    four, two = ({"name": "sample", "num_frames": count} for count in (4, 2))
    fusion = {"face": {"train": four, "evaluate": four}, "audio": {"train": two, "evaluate": two}}
    system = make(after_fusion="examples", fusion=fusion)
    refused(lambda: init(system, np.arange(5)), "after_fusion=examples", "[2, 4]")
    draw = {"name": "random", "num_draws": 1}
    refused(lambda: make(fusion={"face": {"evaluate": draw}}), "face.evaluate", "only for training")
    by_train: Any = {"noise__relabel_by": "train", "fusion": {"face": {"train": draw}}}
    refused(lambda: make(clusters=2, **by_train), "noise.relabel_by=train", "only for training")


@pytest.mark.slow
def test_mixup_equals_a_numpy_reference():
    """A mixed clip is `share` x clip + (1 - share) x partner. A clip of weight 0 is no partner."""
    batch, weight = make_batch((7, 3, 0, 2, 1)), np.array([1.0, 1.0, 1.0, 0.0, 1.0], np.float32)
    labels = np.arange(5, dtype=np.int32)  # the label of each clip is its number
    clips = augment.MemberClips(batch.frames, labels, weight, jnp.float32(0), ())
    clips = jax.jit(functools.partial(augment.mix_up, alpha=0.7))(jax.random.key(0), clips)
    (own, share), (partner, rest) = jax.tree.map(np.asarray, clips.targets)
    np.testing.assert_array_equal(own, labels)
    np.testing.assert_array_equal(rest, 1 - share)
    assert sorted(partner) == list(range(5))
    assert 0.5 <= share.min() < 1  # some clips are mixed
    assert (share[weight[partner] == 0] == 1).all()
    for name, before in batch.frames.items():
        mixed, has_partner = clips.frames[name], before.mask[partner] & (share < 1)[:, None]
        np.testing.assert_array_equal(mixed.mask, before.mask | has_partner)
        wanted = (share[:, None] * before.mask)[..., None] * before.features
        wanted += ((1 - share)[:, None] * has_partner)[..., None] * before.features[partner]
        np.testing.assert_allclose(mixed.features, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("poor_clips", "bound", "weight_after"), [
    ("keep", 40, [2, 1, 1, 1, 0]), ("drop", 40, [2, 0, 0, 1, 0]),
    ("drop", np.finfo(np.float32).min, [2, 1, 1, 1, 0]),
], ids=["keep", "drop", "drop without a bound"])  # fmt: skip
def test_clips_without_good_frames_are_kept_or_dropped(poor_clips, bound, weight_after):
    """Only clip 0 has a frame of quality 40. Clip 3 has no face and stays. Clip 4 has weight 0."""
    batch = make_batch((3, 3, 3, 0, 1), (1, 1, 1, 1, 0))
    face = batch.frames["face"]
    quality = np.where(face.mask, 10.0, 0.0).astype(np.float32)
    quality[0, 1], quality[2] = 40.0, np.nan
    frames = {**batch.frames, "face": face._replace(quality=quality)}
    weight = np.array([2.0, 1.0, 1.0, 1.0, 0.0], np.float32)
    clips = augment.MemberClips(frames, np.arange(5), weight, jnp.float32(bound), ())
    drop = functools.partial(augment.drop_poor_frames, poor_clips=poor_clips)
    after = jax.jit(lambda: drop(jax.random.key(0), clips))()  # an argument would be sorted by name
    np.testing.assert_array_equal(after.weight, weight_after)
    if bound == 40:  # a clip without a good frame keeps all its frames
        np.testing.assert_array_equal(after.frames["face"].mask.sum(axis=1), [1, 3, 3, 0, 1])


def test_only_short_clips_of_strangers_are_joined():
    """Identities are 1 to 3, so the labels 0 and 9 are of strangers. Clip 4 has the weight 0."""
    batch, labels = make_batch((3, 2, 1, 2, 3)), np.array([0, 2, 9, 3, 0])
    weight = np.array([1, 1, 1, 1, 0], np.float32)
    clips = augment.MemberClips(batch.frames, labels, weight, jnp.float32(0), ())
    join = jax.vmap(lambda rng: augment.concat_noise(rng, clips, num_identities=3).frames["face"])
    faces = jax.jit(join)(jax.random.split(jax.random.key(0), 20))
    counts = np.asarray(faces.mask).sum(axis=2)  # [keys, clips]
    assert [{*column} for column in counts.T.tolist()] == [{3, 4}, {2}, {1, 4}, {2}, {3}]


def test_keep_best_masks_all_but_the_best_classes_of_a_clip():
    inf = jnp.inf
    system: Any = SimpleNamespace(top_classes=2)
    best = scoring.keep_best(system, jnp.array([[3.0, 1.0, 2.0, -inf], [0.0, 0.0, 5.0, -1.0]]))
    np.testing.assert_array_equal(best, [[3, -inf, 2, -inf], [0, 0, 5, -inf]])  # 0 and 0 tie


def test_score_of_a_clip_is_the_mean_over_the_members_that_may_score_it(monkeypatch):
    use, scores = np.array([[1, 1, 0], [1, 0, 1]], bool), np.arange(12.0).reshape(2, 3, 2) ** 2
    blocks = [Batch({}, np.array(x), np.array([True, x[0] < 2])) for x in ([0, 1], [2, 0])]
    monkeypatch.setattr(scoring, "iterate_windows", lambda *_: [blocks])  # its last row is padding
    model: Any = SimpleNamespace(
        system=SimpleNamespace(top_classes=0, scores_are_logs=False), mesh=devices.make_mesh(1),
        member=lambda n: (n,), eval_step=lambda n, x: jnp.asarray(scores[n, x.clip_index]),
    )  # fmt: skip
    found = [x.without_padding()[0] for x in scoring.score_blocks(model, "val", use)]
    wanted = [scores[use[:, clip], clip].mean(axis=0) for clip in range(3)]
    np.testing.assert_allclose(np.concatenate(found), wanted)


class TwoBranches(Identifier):
    """Two linear layers on the voice, with the weights TRAIN_WEIGHT and EVAL_WEIGHT."""

    logit_scale: float = 1.0
    num_classes: int = 1 + C

    @nn.compact
    def __call__(self, frames, clips, *, train):
        x = frames["audio"].features[:, 0]
        logits = [nn.Dense(self.num_classes, name=f"branch_{i}")(x) for i in range(2)]
        weights = (jnp.asarray(weight)[: len(x)] for weight in (TRAIN_WEIGHT, EVAL_WEIGHT))
        return ModelOutput(jnp.stack(logits, axis=1), x, *weights)


class Changing(Identifier):
    """Returns a correct output that a function has changed."""

    change: Callable[[ModelOutput], Any]
    num_classes: int = 1 + C

    def __call__(self, frames, clips, *, train):
        rows = len(clips.mask)
        return self.change(ModelOutput(jnp.zeros((rows, 1, 1 + C)), jnp.zeros((rows, 3))))


def test_output_of_a_users_model_with_a_wrong_shape_is_refused_at_the_beginning():
    model: Any = Changing
    for change, word in (
        (lambda right: right.logits, "ModelOutput"),
        (lambda right: right._replace(logits=right.logits[:, 0]), "logits"),
        (lambda right: right._replace(logits=right.logits.transpose(1, 0, 2)), "logits"),
        (lambda right: right._replace(logits=right.logits[..., 1:]), "logits"),
        (lambda right: right._replace(embedding=right.embedding[0]), "embedding"),
        (lambda right: right._replace(loss_weight=right.logits[:, 0, 0]), "loss_weight"),
    ):
        system = make()._replace(model=model(change))
        refused(lambda system=system: init(system, np.arange(5)), "model Changing", word)


@pytest.mark.slow
@nightly_after_first("scores", ["log_softmax", "logits"])
def test_losses_and_scores_of_branches_are_weighted(scores):
    model: Any = TwoBranches
    system = make(eval__scores=scores)._replace(model=model())
    batch = make_batch(audio=(1, 1, 1, 1, 1))
    labels, weight = np.array([3, 1, 4, 1, 5]), np.array([1.0, 2.0, 1.0, 0.5, 3.0])
    state = init(system, labels)
    # x[0] belongs to the first and only member of the ensemble.
    params = jax.tree.map(lambda x: np.asarray(x[0], np.float64), state.params)
    layers, voice = (params["branch_0"], params["branch_1"]), batch.frames["audio"].features[:, 0]
    logits = [voice @ layer["kernel"] + layer["bias"] for layer in layers]
    _, loss = train(system, weight, state, batch)
    losses = np.stack([-log_softmax(branch)[np.arange(5), labels] for branch in logits], axis=1)
    counted = TRAIN_WEIGHT * weight[:, None]  # [clips, branches]
    assert loss == pytest.approx(np.sum(counted * losses) / weight.sum(), rel=1e-5)
    # Now the loss of each branch is divided by the sum of the weights of this branch.
    _, loss = train(make(loss__mean_over="branches")._replace(model=model()), weight, state, batch)
    wanted_loss = np.sum(np.sum(counted * losses, axis=0) / counted.sum(axis=0))
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    # The weights multiply probabilities, or logits.
    parts = logits if scores == "logits" else [np.exp(log_softmax(branch)) for branch in logits]
    wanted = sum(EVAL_WEIGHT[:, i, None] * branch for i, branch in enumerate(parts))
    if scores != "logits":
        wanted = np.log(wanted)
    np.testing.assert_allclose(evaluate(system, state, batch), wanted, rtol=1e-5, atol=1e-5)


def test_empty_clips_and_padded_rows_do_not_affect_training():
    """Spoilt features and labels of clip 2 (empty) and row 3 (padding) do not matter."""
    model = {"name": "dense", "layers": ((8, "swish", True, 0.3),)}  # BatchNorm and dropout
    system, unused = make(model), np.isin(np.arange(5), (2, 3))
    batch = make_batch((7, 3, 0, 5, 1), (1, 0, 0, 1, 1))._replace(batch_mask=np.arange(5) != 3)
    frames = {
        name: x._replace(features=np.where(unused[:, None, None], np.float32(1e4), x.features))
        for name, x in batch.frames.items()
    }
    state = init(system, np.array([3, 1, 4, 1, 5]))
    spoilt = state.replace(labels=jnp.where(unused, 9, state.labels))
    after, loss = train(system, np.ones(5), state, batch)
    found, same_loss = train(system, np.ones(5), spoilt, batch._replace(frames=frames))
    assert_equal((found.params, found.model_state), (after.params, after.model_state))
    assert same_loss == loss and float(after.sums["weight"][0]) == 3  # clips 0, 1 and 4
    # Neither of the two counts in a mean over clips. All other weights are 1.
    assert train(make(model, loss__mean_over="clips"), np.ones(5), state, batch)[1] == loss


def test_is_argmax_equals_numpy_argmax():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (500, 6)).astype(np.float32)  # ties
    scores[scores == 0] = -np.inf
    column, is_best = rng.integers(0, 6, 500).astype(np.int32), jax.jit(losses.is_argmax)
    np.testing.assert_array_equal(is_best(scores, column), np.argmax(scores, axis=1) == column)
    # Unlike np.argmax, a row of NaN has no best column.
    assert not is_best(np.full((500, 6), np.nan, np.float32), column).any()


def test_log_softmax_keeps_the_order_of_probabilities_near_one():
    """The logits are `lead`, 0, any number for a class without clips, and -1."""
    smaller = np.array([0.1, 3.0, 18.0, 60.0, 86.0])  # from 18 on, float32 rounds p to 1
    leads = np.stack([smaller, smaller + 0.01])
    logits = np.zeros((2, 5, 4))  # smaller and larger leads, 5 leads, 4 columns
    logits[..., 0], logits[..., 3] = leads, -1
    logits[0, :, 2], logits[1, :, 2] = 99, -99
    has_clips = np.array([True, True, False, True])
    logs = np.asarray(jax.jit(losses.log_softmax)(jnp.asarray(logits, jnp.float32), has_clips))
    others = 1 + np.exp(-1.0)  # so log p of column 0 is -log(1 + exp(-lead) others)
    np.testing.assert_allclose(logs[..., 0], -np.log1p(others * np.exp(-leads)), rtol=2e-5)
    np.testing.assert_allclose(logs[..., 1], -np.logaddexp(leads, np.log(others)), rtol=1e-5)
    of_smaller, of_larger = logs[..., 0]
    assert (of_smaller < of_larger).all() and of_larger.max() <= 0
    # Only column 1 counts. Its logarithm is 0, or NaN.
    logs = losses.log_softmax(jnp.array([[5.0, 1.0], [1.0, jnp.nan]]), np.array([False, True]))
    assert logs[0, 1] == 0.0 and np.isnan(logs[1, 1])
