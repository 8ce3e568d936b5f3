"""PLDA models a vector as person + noise, both normal.

`within` and `between` are shares by which the covariances of noise and people are shrunk to a
multiple of the identity matrix. Label 0 is a stranger, and column 0 of the logits a new person.
"""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from tests.benchmarks import calibration
from tests.helpers import small_runs
from tests.helpers.embeddings import exact, unit
from tests.helpers.made_frames import make_frames
from tests.helpers.made_models import init_identifier
from tests.helpers.seen import refused
from vidjax.apps.gallery import backend as backend_lib, index as index_lib
from vidjax.core import ensemble
from vidjax.core.batch import ClipInfo
from vidjax.models import plda_fit, two_covariance
from vidjax.models.build_system import TaskSpec, make_identifier, make_system
from vidjax.models.two_covariance import Settings
from vidjax.runs import config_io
from vidjax.training import plan

DIMS, NUM_CLASSES, NUM_CLIPS = {"face": 6, "audio": 4}, 6, 23
NUM_COLUMNS, WIDTH = 7, 5
log_ratios = jax.jit(plda_fit.log_ratios)
SETTINGS = Settings(within=0.8, between=0.5, scale=0.1, unenrolled=-2.0, stranger=0.5, centred=0.9)
TWICE = [*range(NUM_CLIPS)] * 2  # the rows of two passes
EVERY = ClipInfo(np.arange(NUM_CLIPS, dtype=np.int32), np.ones(NUM_CLIPS, bool))
SPEC = {"name": "plda", **SETTINGS._asdict()}
MODEL: Any = make_identifier(SPEC, modalities=DIMS, num_classes=NUM_CLASSES, num_clips=NUM_CLIPS)


def make_clips():
    """Returns frames of all clips and their labels, 0 to 4. Some clips lack a modality."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, NUM_CLIPS).astype(np.int32)  # identity 5 has no clip
    lengths = {name: rng.integers(0, 4, NUM_CLIPS) for name in DIMS}
    lengths["audio"][labels == 4] = 0  # nobody of identity 4 has a voice
    frames = {}
    for name, dim in DIMS.items():
        noise = make_frames(lengths[name], max_frames=3, dim=dim, seed=dim, dtype="float32")
        centres = 0.5 + rng.normal(size=(5, dim)).astype(np.float32)
        frames[name] = noise._replace(features=centres[labels][:, None] + noise.features)
    return frames, labels


@jax.jit
def after_step(state, frames, clips):
    return MODEL.apply(state, frames, clips, train=True, mutable=["sums"])[1]


@jax.jit
def logits_of(state, frames):
    """Returns the logits [N, K] of all clips."""
    return MODEL.apply(state, frames, EVERY, train=False).logits[:, 0]


def train(frames, labels, batches):
    """Returns the variables after training on batches of rows; -1 is a padded row."""
    state = init_identifier(MODEL, frames, EVERY)
    for rows in batches:
        rows = np.asarray(rows)
        clips = ClipInfo(np.maximum(rows, 0).astype(np.int32), rows >= 0, labels[rows])
        state = after_step(state, jax.tree.map(lambda x, rows=rows: x[rows], frames), clips)
    return state


def oracle(frames, labels, name, used):
    """Returns the centre and the sums of a modality, computed in float64 clip by clip."""
    part = frames[name]
    means = {
        clip: unit(part.features[clip][part.mask[clip]].astype(np.float64).mean(axis=0))
        for clip in used
        if part.mask[clip].any()
    }
    centre = SETTINGS.centred * np.mean(list(means.values()), axis=0)
    known = [clip for clip in means if labels[clip] > 0]
    centred = np.stack([unit(means[clip] - centre) for clip in known])
    return centre, two_covariance.make_sums(centred, labels[known], NUM_CLASSES)


def solved(*states):
    """Returns the variables for the evaluation of each member."""
    collections = MODEL.finalise_state({}, jax.tree.map(lambda *x: jnp.stack(x), *states))
    return [ensemble.take(collections, number) for number in range(len(states))]


def test_plda_logits_match_the_equations():
    """Column 0 is a new person, and column 5 an identity without clips."""
    # Two batches of 30 rows contain two passes over 23 clips, and 14 repeated clips. Every clip
    # counts once. Clips of another fold are padded rows.
    used, drawn = [clip for clip in range(NUM_CLIPS) if clip % 3], [*TWICE, *range(14)]
    with jax.enable_x64(True):
        frames, labels = make_clips()
        for name, part in frames.items():
            frames[name] = part._replace(features=part.features.astype(np.float64))
        state = train(frames, labels, np.split(np.where(np.isin(drawn, used), drawn, -1), 2))
        of_two, _ = solved(state, train(frames, labels, [TWICE]))  # members with other clips
        logits = logits_of(of_two, frames)
        np.testing.assert_array_equal(logits_of(*solved(state), frames), logits)
        wanted = np.zeros((NUM_CLIPS, NUM_CLASSES))
        for name in DIMS:
            # The two covariances of the modality, with the shrinkage of SETTINGS.
            centre, sums = oracle(frames, labels, name, used)
            covariances = two_covariance.covariances(sums)
            space = two_covariance.make_space(covariances, within=0.8, between=0.5)
            enrolled = two_covariance.enrol(space, sums.count, sums.total)
            # The logit adds 0.1 x ratio, or -2 if the identity has no clip of the modality.
            features, mask = np.asarray(frames[name].features), frames[name].mask
            has_frames = np.flatnonzero(mask.any(axis=1))
            means = [unit(features[clip][mask[clip]].mean(axis=0)) for clip in has_frames]
            x = jnp.stack([unit(mean - centre) for mean in means])
            ratios = np.asarray(log_ratios(space, enrolled, x))
            wanted[has_frames] += np.where(sums.count > 0, 0.1 * ratios, -2.0)
        wanted[:, 0] = 0.5 + np.log(4)  # `stranger` + log of 4 identities that have clips
    np.testing.assert_allclose(logits[:, :5], wanted[:, :5], atol=1e-9)
    assert not scipy.special.softmax(logits, axis=-1)[:, 5].any()


@pytest.mark.slow
def test_fitted_settings_favour_no_modality(monkeypatch):
    """Half of the people are enrolled without a voice. They are named as often as the others."""
    monkeypatch.setattr(plda_fit, "FOLDS", 2)  # fewer programs are compiled
    rng, labels = np.random.default_rng(1), np.repeat(np.arange(1, 61), 12)
    # Every second clip of a person is enrolled. The other clips are identified.
    enrolled, voiceless, vectors = np.arange(len(labels)) % 2 == 0, labels > 30, {}
    for name in ("face", "audio"):
        centres, noise = rng.normal(size=(61, 12)), rng.normal(size=(len(labels), 12))
        vectors[name] = unit(centres[labels] + 0.5 * noise).astype(np.float32)
    vectors["audio"][enrolled & voiceless] = 0
    known = {name: x[enrolled] for name, x in vectors.items()}
    backend = backend_lib.fit(known, labels[enrolled], centred=False)
    names, joined = [str(n) for n in range(1, 61)], np.concatenate([*known.values()], axis=1)
    index = index_lib.Index(backend, [backend.enrol(names, joined, labels[enrolled] - 1)])
    answers = index.nearest([x[~enrolled] for x in vectors.values()], k=1)
    named = np.array([int(answer.best[0][0]) for answer in answers])  # the most likely people
    right, has_voice = named == labels[~enrolled], ~voiceless[~enrolled]
    assert right[has_voice].mean() > 0.9 and right[~has_voice].mean() > 0.8
    assert abs((named > 30).mean() - 0.5) < 0.06  # half of the clips show voiceless people


def test_settings_given_at_evaluation_replace_fitted_settings():
    config = config_io.load_file("plda:face,audio")
    sizes: Any = {"num_identities": 4, "num_clusters": None, "num_clips": 9, "total_steps": 2}
    task = TaskSpec(DIMS, **sizes, train_other=False, settings=SETTINGS._asdict())
    model: Any = make_system(config.to_dict(), task).model
    assert model.settings() == SETTINGS
    config.model.scale = 0.7
    model = make_system(config.to_dict(), task).model
    assert model.settings() == SETTINGS._replace(scale=0.7)


@pytest.mark.slow
@pytest.mark.parametrize("num_people", [60, pytest.param(1000, marks=pytest.mark.nightly)])
def test_plda_probabilities_are_calibrated(num_people):
    """The people follow the model exactly, and half of the clips show strangers."""
    result = calibration.measure(num_people, clips=4, width=64, within=0.5, seed=0)
    assert abs(result.new - 0.5) < 0.03  # the mean probability of a stranger
    assert result.error <= 0.03  # the expected calibration error


def draw_photos(rng, people, clips, *, shared=0.0):
    """Draws photos [people, clips, D], which have the share `shared` of their noise in common."""
    noise = np.sqrt(1 - shared) * rng.normal(size=(people, clips, 64))
    noise += np.sqrt(shared) * rng.normal(size=(people, 1, 64))
    return unit(rng.normal(size=(people, 1, 64)) + noise).astype(np.float32)


@pytest.mark.slow
def test_few_people_of_a_fit_do_not_name_strangers_as_people_who_are_enrolled_later():
    """PLDA is fitted to 30 people. 100 people are enrolled later, with one photo each."""
    results, names, labels = [], [*map(str, range(100))], np.repeat(np.arange(1, 31), 3)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        photos, strangers = draw_photos(rng, 100, 2), draw_photos(rng, 100, 1)[:, 0]
        fitted = {"face": draw_photos(rng, 30, 3).reshape(-1, 64)}
        backend = backend_lib.fit(fitted, labels, centred=False)
        index = index_lib.Index(backend, [backend.enrol(names, photos[:, 0], np.arange(100))])
        answers = [*index.nearest([np.concatenate([photos[:, 1], strangers])], 1)]
        named = np.array([answer.best[0][1] > np.log(0.5) for answer in answers])
        right = named[:100] & np.equal(names, [answer.best[0][0] for answer in answers[:100]])
        new = np.mean([np.exp(answer.new) for answer in answers])
        of_a_day = draw_photos(rng, 100, 4, shared=0.7).reshape(-1, 64)
        num = backend.enrol(names, of_a_day, np.repeat(np.arange(100), 4)).num_clips.mean()
        results.append((new, right.mean(), named[100:].mean(), num))
    new, known, named_strangers, num = np.mean(results, axis=0)
    assert 0.4 < new < 0.6 and known > 0.75 and named_strangers < 0.15
    assert num < 2.1  # four photos of a day count as one or two


@pytest.mark.parametrize(("shared", "most", "low", "high"), [
    (0.0, 10, 9, 10), (0.5, 10, 1.6, 2.2), (0.9, 10, 1, 1.1), (0.0, 3, 3, 3), (0.5, 1, 1, 1),
])  # fmt: skip
def test_similar_clips_count_as_few_clips(shared, most, low, high):
    """Ten clips with a share r in common are worth 1 / (r + (1 - r) / 10) clips, at most `most`."""
    # A person without a clip has no clips.
    x = draw_photos(np.random.default_rng(0), 200, 10, shared=shared)
    count, total = np.append(np.full(200, 10.0), 0), np.append(x.sum(axis=1), np.zeros((1, 64)), 0)
    found = two_covariance.count_independent(0.5, count, total, np.minimum(count, most))
    assert low <= found[:-1].mean() <= high and found[-1] == 0


def test_settings_of_three_people_with_one_clip_each_are_the_defaults():
    """Without a second clip of a person, nothing is fitted. The mean counts 0 as half a person."""
    settings = plda_fit.fit_settings({"face": np.eye(3)}, np.array([1, 2, 3]), given={}, seed=0)
    prior = {"scale": 1.0, "unenrolled": -1.0, "stranger": -2.0}
    assert settings == Settings(within=0.8, between=0.75, **prior, centred=3 / (3 + 0.5))


@pytest.mark.parametrize(("labels", "counts"), [
    # At most 4000 clips are drawn, and 400 of a person: 10 people x 400, or 40 people x 100.
    (np.tile(np.arange(51), 600), {0: 40, 400: 10}),
    (np.tile(np.arange(51), 100), {0: 10, 100: 40}),
    # 50 of 30,000 people have a second clip. First, 10 of these are drawn: 10 x 2 + 3980 clips.
    (np.append(np.arange(1, 30_001), np.arange(1, 30_001, 600)), {0: 26_010, 1: 3980, 2: 10}),
], ids=["600 clips of 50 people", "100 clips of 50 people", "most have one"])  # fmt: skip
def test_settings_are_fitted_on_enough_people_with_two_clips_or_more(labels, counts):
    chosen = labels[plda_fit.draw_identities(labels, seed=0)]
    assert chosen.all()  # no strangers, which have the label 0
    assert Counter(np.bincount(chosen, minlength=labels.max() + 1)[1:].tolist()) == counts


def test_settings_are_fitted_although_no_clip_or_only_one_clip_has_a_voice(monkeypatch):
    """A fitted value differs from its PRIOR. The number of cores makes no difference."""
    faces = exact(np.random.default_rng(0), people=30, clips=3, width=8, within=0.5)
    labels, faces = np.repeat(np.arange(1, 31), 3), faces.reshape(-1, 8)
    vectors = {"face": faces, "audio": np.zeros_like(faces)}

    def fit(cores, **given):
        monkeypatch.setattr(plda_fit, "num_cores", lambda: cores)
        monkeypatch.setattr(plda_fit, "FOLDS", 2)  # fewer programs are compiled
        return plda_fit.fit_settings(vectors, labels, given, seed=0)

    for num_voices, cores in ((0, 1), (1, 5)):
        vectors["audio"][:num_voices] = 8**-0.5  # a unit vector of 8 numbers
        fitted = fit(cores, within=0.33)
        assert fitted.within == 0.33 and fitted.stranger != plda_fit.PRIOR["stranger"]
    assert fitted == fit(cores=1, within=0.33)
    # In a gallery, W is at least 0.9, and held-out clips are scored as if they were of other days.
    fold: Any = plda_fit._hold_out(vectors, vectors, 0, labels, 0, 0.9, later=False)
    same_day = fold._replace(covariances=[x._replace(shared=0.0) for x in fold.covariances])
    moved, kept = (plda_fit._compute_ratios(x, 0.5, 0.5).ratios[0] for x in (fold, same_day))
    own = fold.labels > 0, fold.labels[fold.labels > 0]
    assert np.mean(np.asarray(moved)[own]) < np.mean(np.asarray(kept)[own]) - 0.5
    # If no clip has a face or a voice, nothing is fitted: the settings are typical values.
    vectors = dict.fromkeys(vectors, 0 * faces)
    assert fit(cores=1).stranger == plda_fit.PRIOR["stranger"]


@pytest.mark.parametrize(("name", "word", "remedy"), [
    ("plda", "mixup=0.2", "--config.mixup=0.0"),
    ("plda", "num_epochs=1.5", "--config.num_epochs=2"),  # it reads all clips twice
    ("knn", "ensemble.bootstraps=3", "--config.ensemble.bootstraps=0"),
    ("plda", "ensemble.seeds=3", "--config.ensemble.seeds=1"),  # the members would be equal
    ("knn", "dtype=bfloat16", "--config.dtype=float32"),
    ("plda", "noise.mirror_weight=((0, 0.5),)", "'--config.noise.mirror_weight=((0.0, 1.0),)'"),
])  # fmt: skip
def test_closed_form_models_refuse_settings_of_gradient_training(data, name, word, remedy):
    config = small_runs.shrunk(f"--config.{word}", spec=f"configs/{name}.py:iqiyi_vid,face")
    refused(lambda: plan.make_plan(config, data), f"config.{word} ", remedy)


@pytest.mark.slow
def test_settings_of_a_fold_do_not_depend_on_clips_that_it_leaves_out(data, monkeypatch):
    monkeypatch.setattr(plda_fit, "FEWEST_PEOPLE", 2)
    monkeypatch.setattr(plda_fit, "FOLDS", 2)  # fewer programs are compiled
    labels = data.split("train").labels.copy()
    labels[1] = labels.max() + 1  # an identity with a single clip, which member 1 leaves out
    used = np.stack([np.arange(len(labels)) % 2 != fold for fold in range(2)])  # [members, clips]
    clips = plan.make_training_clips(config_io.load_file("plda:iqiyi_vid,face"), data, labels, used)
    # Settings that are None are fitted for each member.
    given = {**dict.fromkeys(plda_fit.Settings._fields), "within": 0.8, "between": 0.5}
    settings: Any = plda_fit.fit_member_settings(given, clips)
    assert len(set(settings["scale"])) == 2  # a different scale for each member
    assert "within" not in settings  # it is given, so it is not fitted
    # A run of only member 1 (see `ensemble.only`) has its scale. All members share `centred`.
    single: Any = plda_fit.fit_member_settings(given, clips._replace(used=used[1:2]))
    assert single["centred"] == settings["centred"] and single["scale"] == settings["scale"][1]
    # The clips that member 1 leaves out lose their labels. Settings of member 1 do not change.
    unlabelled = clips._replace(labels=np.where(used[1], labels, 0))
    changed: Any = plda_fit.fit_member_settings(given, unlabelled)
    for field in ("scale", "stranger"):
        assert settings[field][1] == changed[field][1] and settings[field][0] != changed[field][0]


def draw_vectors():
    """Returns 60 vectors [N, D], labels [N] of 1..6, and their sums."""
    rng = np.random.default_rng(0)
    labels = rng.integers(1, NUM_COLUMNS, 60)
    centres = rng.normal(size=(NUM_COLUMNS, WIDTH)) * np.linspace(0.5, 2, WIDTH)
    vectors = centres[labels] + rng.normal(size=(60, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH))
    return vectors, labels, two_covariance.make_sums(vectors, labels, NUM_COLUMNS)


def log_density(vectors, mean, within, between):
    """Returns log p of all clips of one identity. Any two clips have the covariance `between`."""
    n = len(vectors)
    covariance = np.kron(np.eye(n), within) + np.kron(np.ones((n, n)), between)
    normal: Any = scipy.stats.multivariate_normal(np.tile(mean, n), covariance)
    return normal.logpdf(np.concatenate(vectors))


def shrink(covariance, share):
    return (1 - share) * covariance + share * np.trace(covariance) / WIDTH * np.eye(WIDTH)


@pytest.mark.parametrize(("within", "between"), [(0.8, 0.5), (0.0, 0.0)])
def test_log_ratios_equal_ratios_of_joint_densities(within, between):
    vectors, labels, sums = draw_vectors()
    fit = two_covariance.covariances(sums)
    space = two_covariance.make_space(fit, within=within, between=between)
    enrolled = two_covariance.enrol(space, sums.count, sums.total)
    noise, people = (fit.axes @ x @ fit.axes.T for x in (np.diag(fit.within), fit.between))
    normal = {"mean": fit.mean, "within": shrink(noise, within), "between": shrink(people, between)}

    def wanted(group, other):
        """Returns log(p(the groups show one person) / p(the groups show two people))."""
        together = log_density([*group, *other], **normal)
        return together - log_density(group, **normal) - log_density(other, **normal)

    close = functools.partial(np.testing.assert_allclose, rtol=5e-10, atol=5e-10)
    groups = [vectors[labels == label] for label in range(1, NUM_COLUMNS)]
    new = np.random.default_rng(1).normal(size=(4, WIDTH))
    with jax.enable_x64(True):
        ratios = np.asarray(log_ratios(space, enrolled, jnp.asarray(new)))
    close(ratios[:, 1:], [[wanted(group, [clip]) for group in groups] for clip in new])
    assert not enrolled.known[0]  # a class without a clip
    assert np.abs(ratios[:, 0]).max() < 1e-9
    counts = np.array([1, 2, 4])  # clips of three groups, which are compared with each other
    groups = [group[:count] for group, count in zip(groups, counts, strict=False)]
    means = [((group - space.mean) @ space.transform).mean(axis=0) for group in groups]
    for row, group in enumerate(groups):
        noise = 1 / counts
        one, all_ = (means[row], noise[row]), (np.stack(means), noise)
        ratios, others = two_covariance.pair_log_ratios(space, *one, *all_), np.arange(3) != row
        close(ratios[others], [wanted(group, groups[other]) for other in np.flatnonzero(others)])


def test_covariances_equal_their_definitions():
    """The prior counts as 10 clips and as 10 people. For the mean, 0 counts as half a person."""
    vectors, labels, sums = draw_vectors()
    fit = two_covariance.covariances(sums)
    num_people, num_clips = len(np.unique(labels)), len(vectors)
    prior = np.mean(vectors**2) * np.eye(WIDTH) / 2  # half is noise, half are people
    gaps = vectors - np.stack([vectors[labels == label].mean(axis=0) for label in labels])
    within = (gaps.T @ gaps + 10 * prior) / (num_clips - num_people + 10)
    np.testing.assert_allclose(fit.axes * fit.within @ fit.axes.T, within, atol=1e-10)
    least = two_covariance.covariances(sums, least_within=2.0)  # W is scaled up to this trace
    np.testing.assert_allclose(np.sum(least.within), 2 * np.mean(vectors**2) * WIDTH)
    np.testing.assert_allclose(least.within * (1 - least.shared), fit.within)
    np.testing.assert_allclose(fit.mean, num_people / (num_people + 0.5) * vectors.mean(axis=0))
    spread = (vectors - fit.mean).T @ (vectors - fit.mean) / num_clips
    between = ((num_people - 1) * (spread - within) + 10 * prior) / (num_people - 1 + 10)
    values, axes = np.linalg.eigh(between)
    between = axes * np.maximum(values, two_covariance.SMALLEST_VARIANCE) @ axes.T
    np.testing.assert_allclose(fit.axes @ fit.between @ fit.axes.T, between, atol=1e-10)
