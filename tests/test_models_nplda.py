"""NPLDA as a model: where it starts, what it learns from, and that its gradients are finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_models_plda import (
    DIMS,
    NUM_CLASSES,
    NUM_CLIPS,
    SETTINGS,
    TWICE,
    made_up,
    oracle,
    take,
)
from vidjax.batch import ClipInfo
from vidjax.models import two_covariance
from vidjax.models.identifier import make_identifier

ALL = np.arange(NUM_CLIPS)


def make_model(name="nplda", **options):
    spec = {"name": name, **SETTINGS._asdict(), **options}
    return make_identifier(spec, modalities=DIMS, num_classes=NUM_CLASSES, num_clips=NUM_CLIPS)


def info(rows, labels):
    rows = np.asarray(rows)
    return ClipInfo(np.maximum(rows, 0).astype(np.int32), rows >= 0, labels[rows])


@functools.partial(jax.jit, static_argnums=0)
def init(model, frames, clips):
    return model.init(jax.random.key(0), frames, clips, train=False)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, frames, clips):
    rngs = {name: jax.random.key(3) for name in ("dropout", "modality_dropout")}
    mutable = [name for name in variables if name != "params"]
    return model.apply(variables, frames, clips, train=True, mutable=mutable, rngs=rngs)


def step(model, variables, frames, labels, rows):
    """Returns the output for a batch of rows, -1 for a padded one, and the new collections."""
    part = take(frames, np.asarray(rows))
    output, new = apply(model, variables, part, info(rows, labels))
    return output, {**variables, **new}


def started(model, frames, labels, batches=(TWICE,)):
    """Returns the variables after batches of rows."""
    variables = init(model, take(frames, np.zeros(1, int)), info([0], labels))
    for rows in batches:
        _, variables = step(model, variables, frames, labels, rows)
    return variables


def with_maps(variables, size=0.1):
    """Returns variables with random maps."""
    rng = np.random.default_rng(5)
    maps = {
        name: jnp.asarray(size * rng.normal(size=x.shape), x.dtype)
        for name, x in variables["params"].items()
    }
    return {**variables, "params": maps}


def in_float64(frames):
    return {
        name: part._replace(features=part.features.astype(np.float64))
        for name, part in frames.items()
    }


def evaluated(model, variables, frames):
    """Returns the logits of all clips as an evaluation computes them."""
    state = {name: x for name, x in variables.items() if name != "params"}
    params, state = jax.tree.map(lambda x: jnp.stack([x]), (variables.get("params", {}), state))
    solved = jax.tree.map(lambda x: x[0], model.solve(params, state))
    clips = ClipInfo(ALL.astype(np.int32), np.ones(NUM_CLIPS, bool))
    variables = {"params": variables.get("params", {}), **solved}
    return model.apply(variables, frames, clips, train=False).logits[:, 0]


def test_without_learning_it_is_plda():
    frames, labels = made_up()
    found = [
        evaluated(model, started(model, frames, labels), frames)
        for model in (make_model(), make_model("plda"))
    ]
    np.testing.assert_allclose(*found, atol=1e-6)  # two programs that round the sums


@pytest.mark.slow
def test_the_start_is_the_closed_form_of_all_clips_and_stays():
    frames, labels = made_up()
    batches = [TWICE[:30], TWICE[30:], [5, 6, 7]]
    with jax.enable_x64(True):
        model, frames = make_model(), in_float64(frames)
        variables = started(model, frames, labels, batches[:2])
        assert not variables["start"]["start"]["is_done"]
        output, variables = step(model, variables, frames, labels, batches[2])
        assert variables["start"]["start"]["is_done"]
        np.testing.assert_array_equal(output.train_weight, 1.0)
        for name in DIMS:
            sums = oracle(frames, labels, name, ALL)[1]
            found = two_covariance.covariances(sums)
            wanted = two_covariance.make_space(found, within=0.8, between=0.5)
            space = variables["start"]["start"]["spaces"][name]
            np.testing.assert_allclose(space.ratio, wanted.ratio, rtol=1e-9)
            # Axes have no sign; the covariance that they whiten has one.
            np.testing.assert_allclose(
                space.transform @ space.transform.T,
                wanted.transform @ wanted.transform.T,
                rtol=1e-8,
            )
        _, later = step(model, variables, frames, labels, [1, 2])
    jax.tree.map(np.testing.assert_array_equal, later["start"], variables["start"])
    jax.tree.map(
        np.testing.assert_array_equal,
        later["sums"]["sums"]["face"],
        variables["sums"]["sums"]["face"],
    )


@pytest.mark.parametrize("rows", [TWICE[20:40], [*TWICE[20:39], -1], [-1] * 20])
def test_nothing_is_learned_before_the_sums_are_whole(rows):
    frames, labels = made_up()
    model = make_model()
    variables = started(model, frames, labels, [TWICE[:20]])
    output, variables = step(model, variables, frames, labels, rows)
    np.testing.assert_array_equal(output.train_weight, 0.0)
    assert not variables["start"]["start"]["is_done"]


def left_out_oracle(variables, frames, labels, hidden=False):
    """Returns logits and right columns, one clip after another, from sums without the clip."""
    logits, answers = np.zeros((NUM_CLIPS, NUM_CLASSES)), np.zeros(NUM_CLIPS, int)
    for clip in ALL:
        others = [i for i in ALL if i != clip and not (hidden and labels[i] == labels[clip])]
        shown = False
        for name in DIMS:
            centre, all_sums = oracle(frames, labels, name, ALL)
            found = two_covariance.covariances(all_sums)
            space = two_covariance.make_space(found, within=0.8, between=0.5)
            change = np.eye(DIMS[name]) + np.asarray(variables["params"][f"{name}_map"])
            space = space._replace(transform=change @ space.transform)
            count, total = np.zeros(NUM_CLASSES), np.zeros((NUM_CLASSES, DIMS[name]))
            vectors = {}
            for i in [*others, clip]:
                if (mask := frames[name].mask[i]).any():
                    mean = frames[name].features[i][mask].mean(axis=0)
                    mean = mean / np.linalg.norm(mean) - centre
                    vectors[i] = mean / np.linalg.norm(mean)
            for i in others:
                if i in vectors and labels[i] > 0:
                    count[labels[i]] += 1
                    total[labels[i]] += vectors[i]
            shown |= count[labels[clip]] > 0
            if clip in vectors:
                enrolled = two_covariance.enrol(space, count, total)
                x = jnp.asarray(vectors[clip])[None]
                ratios = np.asarray(two_covariance.log_ratios(space, enrolled, x))[0]
                logits[clip] += np.where(count > 0, 0.1 * ratios, -2.0)
        logits[clip, 0] = 0.5
        answers[clip] = labels[clip] if shown else 0
    return logits, answers


@pytest.mark.parametrize("hidden", [pytest.param(False, marks=pytest.mark.slow), True])
def test_clips_are_judged_as_if_they_were_not_enrolled(hidden):
    frames, labels = made_up()
    lonely = np.flatnonzero(labels == 3)[1:]
    labels[lonely] = 1  # identity 3 has one clip
    assert (labels == 3).sum() == 1 and (labels == 0).any()
    with jax.enable_x64(True):
        model, frames = make_model(stranger_rate=float(hidden)), in_float64(frames)
        variables = with_maps(started(model, frames, labels, [TWICE, [0]]))
        output, _ = step(model, variables, frames, labels, ALL)
        wanted, answers = left_out_oracle(variables, frames, labels, hidden)
    exchanged = answers != labels
    assert exchanged[labels == 3].all() and exchanged.sum() == (sum(labels > 0) if hidden else 1)
    for clip in np.flatnonzero(exchanged):
        columns = [labels[clip], 0]
        wanted[clip, columns] = wanted[clip, columns[::-1]]
    np.testing.assert_allclose(output.logits[:, 0], wanted, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"modality_dropout_rate": 0.5, "stranger_rate": 0.5},
    ],
)
def test_gradients_are_finite(options):
    """For clips without a modality or any, identities of one clip, distractors, padded rows."""
    frames, labels = made_up()
    labels[np.flatnonzero(labels == 3)[1:]] = 1
    for part in frames.values():
        part.mask[4] = False
    for part in (frames["face"],):
        part.mask[5] = False
    model = make_model(**options)
    variables = with_maps(started(model, frames, labels, [TWICE, [0]]))

    def loss(params):
        output, _ = step(model, {**variables, "params": params}, frames, labels, [*ALL, -1, -1])
        logs = jax.nn.log_softmax(output.logits[:, 0])
        return -jnp.mean(logs[jnp.arange(NUM_CLIPS), labels])

    value, slopes = jax.value_and_grad(loss)(variables["params"])
    assert np.isfinite(value)
    for name in DIMS:
        slope = slopes[f"{name}_map"]
        assert np.isfinite(slope).all() and np.any(slope != 0)


@pytest.mark.slow
def test_members_with_other_clips_start_when_they_are_ready():
    """As members of one program, where one has seen its clips and the other has not."""
    frames, labels = made_up()
    model = make_model()
    ready = started(model, frames, labels, [TWICE])
    early = started(model, frames, labels, [TWICE[:30]])
    together = jax.tree.map(lambda *x: jnp.stack(x), ready, early)
    found = jax.vmap(lambda one: step(model, one, frames, labels, [10, 11])[1])(together)
    np.testing.assert_array_equal(found["start"]["start"]["is_done"], [True, False])
    _, alone = step(model, ready, frames, labels, [10, 11])
    space = jax.tree.map(lambda x: x[0], found["start"]["start"]["spaces"]["face"])
    np.testing.assert_allclose(space.ratio, alone["start"]["start"]["spaces"]["face"].ratio, 1e-4)


@pytest.mark.slow
def test_bad_clips_are_sought_without_a_finished_model():
    """A step that is skipped is computed again, with labels and not as training."""
    frames, labels = made_up()
    model = make_model(stranger_rate=0.5)
    variables = with_maps(started(model, frames, labels, [TWICE, [0]]))
    again = model.apply(variables, frames, info(ALL, labels), train=False)
    assert np.isfinite(again.logits).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "model 'nplda': scale=0.0: must be above 0"),
        ({"stranger_rate": 1.5}, "model 'nplda': stranger_rate=1.5: must be from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_model(**options)
