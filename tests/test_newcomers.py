"""Newcomers of PLDA against the densities of normal vectors, and against the run itself."""

import math
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small_runs
from tests.helpers.pages import check_numbers, section
from vidjax import config as config_lib
from vidjax import devices, ensemble
from vidjax.batch import ClipInfo, Frames
from vidjax.data.load import load_dataset
from vidjax.models.identifier import make_identifier
from vidjax.models.plda import Settings
from vidjax.models.two_covariance import SMALLEST_VARIANCE
from vidjax.modes import newcomers, open_set, restore, train
from vidjax.report import significance
from vidjax.run import results as results_lib
from vidjax.steps import newcomers as newcomers_lib
from vidjax.steps import scoring
from vidjax.steps.newcomers import SHOTS, Clips
from vidjax.steps.sinks import ClipScores
from vidjax.steps.topk import TopK
from vidjax.system import log_softmax

WIDTHS = {"face": 6, "audio": 4}
NUM, NEW = 24, np.array([3, 8, 9, 20])  # identities and newcomers
SCALE, UNENROLLED = 0.6, -1.0
SETTINGS = Settings(0.3, 0.2, SCALE, UNENROLLED, stranger=1.5, clips=0.2)


def made_up(seed, num, *, strangers):
    """Returns clips of people around centres of their own; some lack a modality or both."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, NUM + 1, num) * (rng.random(num) >= strangers)
    vectors = []
    for number, width in enumerate(WIDTHS.values()):
        centres = np.random.default_rng(100 + number).normal(size=(NUM + 1, width))
        x = np.where(labels[:, None] > 0, centres[labels], rng.normal(size=(num, width)))
        x = x + 0.5 * rng.normal(size=x.shape) + 0.3
        x[rng.random(num) < 0.2] = 0
        x[5] = 0
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        vectors.append((x / np.maximum(norm, 1e-9)).astype(np.float32))
    return Clips(vectors, labels)


def exact(clips):
    """Returns the clips with vectors whose length is 1 in float64."""
    wide = [x.astype(np.float64) for x in clips.vectors]
    norms = [np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in wide]
    return clips._replace(vectors=[x / norm for x, norm in zip(wide, norms, strict=True)])


def log_density(x, mean, covariance):
    """Returns log N(x; mean, covariance) from the formula."""
    _, log_det = np.linalg.slogdet(covariance)
    gap = x - mean
    return -0.5 * (
        gap @ np.linalg.solve(covariance, gap) + log_det + len(x) * math.log(2 * math.pi)
    )


def shrunk(covariance, share):
    level = np.trace(covariance) / len(covariance)
    return (1 - share) * covariance + share * level * np.eye(len(covariance))


class Oracle:
    """One modality: fitted to some clips, then people are enrolled. Float64, clip by clip."""

    def __init__(self, vectors, labels, left_out):
        fitted = [i for i, x in enumerate(vectors) if x.any() and labels[i] not in left_out]
        self.centre = sum(vectors[i].astype(np.float64) for i in fitted) / len(fitted)
        people = {}
        for i in fitted:
            if labels[i]:
                people.setdefault(labels[i], []).append(self.unit(vectors[i]))
        every = [x for clips in people.values() for x in clips]
        self.mean = sum(every) / len(every)
        gaps = [x - sum(clips) / len(clips) for clips in people.values() for x in clips]
        within = sum(np.outer(gap, gap) for gap in gaps) / (len(every) - len(people))
        total = sum(np.outer(x - self.mean, x - self.mean) for x in every) / len(every)
        values, axes = np.linalg.eigh(total - within)
        between = (axes * np.maximum(values, SMALLEST_VARIANCE)) @ axes.T
        self.within = shrunk(within, SETTINGS.within)
        self.between = shrunk(between, SETTINGS.between)
        self.people = people

    def unit(self, x):
        gap = x.astype(np.float64) - self.centre
        return gap / np.linalg.norm(gap)

    def log_ratio(self, x, person):
        """Returns log p(x | clips of the person) / p(x | nobody's clips), by Bayes' rule."""
        clips = self.people[person]
        precision = np.linalg.inv(self.between) + len(clips) * np.linalg.inv(self.within)
        pull = np.linalg.solve(self.between, self.mean) + np.linalg.solve(self.within, sum(clips))
        posterior = np.linalg.inv(precision)
        given = log_density(self.unit(x), posterior @ pull, posterior + self.within)
        return given - log_density(self.unit(x), self.mean, self.between + self.within)


def oracle_scores(train, clips, turn, shots):
    """Returns [Q, NUM] logarithms of probabilities, newcomers enrolled with their first clips."""
    parts = []
    for x in train.vectors:
        part = Oracle(x, train.labels, set(NEW))
        for i, label in enumerate(train.labels):
            if label in NEW and turn[i] < shots and x[i].any():
                part.people.setdefault(label, []).append(part.unit(x[i]))
        parts.append(part)
    found = np.full((len(clips.labels), NUM), -np.inf)
    for row in range(len(found)):
        queries = [x[row] for x in clips.vectors]
        if not any(x.any() for x in queries):
            continue
        logits = [SETTINGS.stranger]
        for person in range(1, NUM + 1):
            logit = 0.0
            for part, x in zip(parts, queries, strict=True):
                if x.any() and person in part.people:
                    logit += SCALE * part.log_ratio(x, person)
                elif x.any():
                    logit += UNENROLLED
            most = max(len(part.people.get(person, ())) for part in parts)
            logits.append(logit + SETTINGS.clips * math.log(max(most, 1)))
        highest = max(logits)
        total = math.log(math.fsum(math.exp(x - highest) for x in logits)) + highest
        found[row] = [x - total for x in logits[1:]]
    return found


def oracle_map(scores, labels, positives):
    """Returns the mean over newcomers of the average precision of their first 100 clips."""
    averages = []
    for person in NEW:
        order = sorted(range(len(labels)), key=lambda i: (-scores[i, person - 1], i))[:100]
        right, total = 0, 0.0
        for rank, clip in enumerate(order, 1):
            if labels[clip] == person:
                right += 1
                total += right / rank
        averages.append(total / positives[person - 1])
    return sum(averages) / len(averages)


def oracle_fnir(scores, labels, rate):
    """Returns the share of clips of newcomers that are missed, counted clip by clip."""
    best = scores.max(axis=1)
    strange = sorted((best[i] for i in range(len(labels)) if labels[i] == 0), reverse=True)
    refused = strange[math.floor(rate * len(strange) + 1e-9)]
    clips = [i for i in range(len(labels)) if labels[i] in NEW]
    hits = [best[i] > refused and 1 + scores[i].argmax() == labels[i] for i in clips]
    return 1 - sum(hits) / len(clips)


def make_model(num_clips) -> Any:
    spec = {"name": "plda", **SETTINGS._asdict()}
    return make_identifier(spec, modalities=WIDTHS, num_classes=1 + NUM, num_clips=num_clips)


def frames_of(clips):
    """Returns the Frames [N, 1] of clips of one frame."""
    found = {}
    for name, x in zip(WIDTHS, clips.vectors, strict=True):
        ones = np.ones((len(x), 1))
        mask = x.any(axis=1)[:, None]
        found[name] = Frames(x[:, None].astype(float), ones, ones, np.zeros((len(x), 1), int), mask)
    return found


def entry_of(train, clips, trained):
    """Returns the entry of the analysis; `trained` [Q, NUM] are the scores of the run itself."""
    model = make_model(len(train.labels))
    num = len(clips.labels)
    every = np.ones((1, len(train.labels)), bool)
    found = newcomers._enrolled(model, train, every, clips, np.ones((1, num), bool), NEW)
    order = np.argsort(-trained, axis=0, kind="stable")[:100].T
    positives = np.bincount(clips.labels, minlength=1 + NUM)[1:]
    right = (1 + trained.argmax(axis=1) == clips.labels) & (clips.labels > 0)
    scores = ClipScores(np.ones(num, bool), trained.max(axis=1).astype(np.float32), right)
    top = TopK(np.take_along_axis(trained.T, order, axis=1), order.astype(np.int32))
    evaluation = scoring.Evaluation(top, [], positives, scores, {})
    return newcomers._entry(evaluation, clips.labels, NEW, *found)


def test_map_and_fnir_are_those_of_the_equations():
    learned, clips = made_up(0, 150, strangers=0.1), made_up(1, 220, strangers=0.55)
    learned = learned.take(learned.usable)
    positives = np.bincount(clips.labels, minlength=1 + NUM)[1:]
    new = np.isin(learned.labels, NEW)
    turn = np.zeros(len(learned.labels), int)
    turn[new] = newcomers_lib.turns(learned.take(new), newcomers.SEED)
    trained = np.log(np.random.default_rng(2).dirichlet(np.ones(NUM), len(clips.labels)))
    entry = entry_of(learned, clips, trained)
    assert (entry["num_newcomers"], entry["num_identities"]) == (len(NEW), NUM)
    assert entry["num_known"] == np.sum(np.isin(clips.labels, NEW))
    assert entry["num_strange"] == np.sum(clips.labels == 0)
    scores = [oracle_scores(learned, clips, turn, shots) for shots in SHOTS]
    for row, own in zip((*entry["rows"], entry["trained"]), (*scores, trained), strict=True):
        wanted = oracle_map(own, clips.labels, positives)
        assert row["map"]["value"] == pytest.approx(wanted, abs=1e-12)
        gap = wanted - oracle_map(trained, clips.labels, positives)
        assert row["map"]["gap"] == pytest.approx(gap, abs=1e-12)
        assert [one["rate"] for one in row["fnir"]] == [0.01, 0.1]
        for one in row["fnir"]:
            wanted = oracle_fnir(own, clips.labels, one["rate"])
            assert one["value"] == pytest.approx(wanted, abs=1e-12)
    for row, shots in zip(entry["rows"], SHOTS, strict=True):
        has = [min(shots, np.sum(learned.labels == person)) for person in NEW]
        assert row["shots"] == shots and row["clips"] == pytest.approx(np.mean(has))
    assert entry["rows"][0]["map"]["value"] < entry["rows"][-1]["map"]["value"]
    assert "low" not in entry["trained"]["map"]  # four people have no interval


def test_scores_are_those_of_the_equations_in_blocks_of_any_size(monkeypatch):
    learned, clips = made_up(0, 150, strangers=0.1), made_up(1, 40, strangers=0.5)
    new = np.isin(learned.labels, NEW)
    parts = newcomers_lib.fit(learned.take(~new), 1 + NUM, SETTINGS)
    own = learned.take(new)
    turn = newcomers_lib.turns(own, 0)
    enrolments = [newcomers_lib.enrol(parts, own.take(turn < shots)) for shots in (1, 3)]
    whole = np.zeros(len(learned.labels), int)
    whole[new] = turn
    for size in (1 << 20, 7 * NUM):
        monkeypatch.setattr(newcomers_lib, "BLOCK", size)
        found = newcomers_lib.score(enrolments, SETTINGS, clips, NEW)
        for one, shots in zip(found, (1, 3), strict=True):
            wanted = oracle_scores(learned, clips, whole, shots)
            np.testing.assert_allclose(one.of, wanted[:, NEW - 1], rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(one.best, wanted.max(axis=1), rtol=1e-9, atol=1e-9)
            right = (1 + wanted.argmax(axis=1) == clips.labels) & np.isfinite(one.best)
            np.testing.assert_array_equal(one.right, right)
            assert one.best[5] == -np.inf and not one.right[5]  # it lacks both modalities


def test_log_softmax_is_that_of_the_system():
    logits = np.random.default_rng(0).normal(size=(50, 9)) * 30
    with jax.enable_x64(True):
        wanted = np.asarray(log_softmax(jnp.asarray(logits), jnp.ones(9, bool)))
    np.testing.assert_allclose(newcomers_lib.log_softmax(logits), wanted, rtol=1e-12)


@pytest.mark.parametrize(("num", "wanted"), [(9, 0), (10, 1), (413, 41), (3000, 100)])
def test_newcomers_are_some_of_those_that_can_be_measured(num, wanted):
    shown = np.arange(num + 5) % 3 > 0
    labels = np.r_[np.zeros(20, int), np.repeat(np.arange(1, num + 1), 2)]
    people = newcomers_lib.draw(labels, shown, 0)
    assert len(people) == wanted == len(np.unique(people))
    assert shown[people - 1].all()
    np.testing.assert_array_equal(people, newcomers_lib.draw(labels, shown, 0))
    if wanted > 1:
        assert (people != newcomers_lib.draw(labels, shown, 1)).any()


def test_every_clip_has_its_turn():
    clips = made_up(3, 200, strangers=0.0)
    turn = newcomers_lib.turns(clips, 0)
    for person in range(1, NUM + 1):
        own = clips.labels == person
        assert sorted(turn[own].tolist()) == list(range(own.sum()))
        assert not np.any(turn[own & clips.usable] > turn[own & ~clips.usable].min(initial=99))


def test_resamples_are_the_same_for_all_systems():
    """So the gap of two that err alike is 0, and its interval is narrower than that of each."""
    rng = np.random.default_rng(0)
    strange, known = rng.normal(size=(3, 150)), 2 + rng.normal(size=(3, 80))
    strange[2], known[2] = strange[0] + 5, known[0] + 5  # as the first, on another scale
    right, people = rng.random((3, 80)) < 0.9, np.repeat(np.arange(1, 41), 2)
    right[2] = right[0]
    drawn = open_set.resampled_fnir(strange, known, right, people, 0.1)
    np.testing.assert_array_equal(drawn[0], drawn[2])
    for number in range(3):
        one = slice(number, number + 1)
        alone = open_set.resampled_fnir(strange[one], known[one], right[one], people, 0.1)
        np.testing.assert_array_equal(alone[0], drawn[number])
    assert (drawn[0] != drawn[1]).any()


@pytest.mark.parametrize("num", [19, 20, 60])
def test_intervals_are_those_of_the_house(num):
    """MAP: of the averages and of their gaps. FNIR: the gap to itself is 0 in all resamples."""
    rng = np.random.default_rng(num)
    averages = rng.beta(4, 1, size=(3, num))
    rows = newcomers._maps(averages)
    labels = np.r_[np.zeros(120, int), np.repeat(np.arange(1, num + 1), 2)]
    best = rng.normal(size=(3, len(labels))) + 2 * (labels > 0)
    right = (labels > 0) & (rng.random((3, len(labels))) < 0.9)
    arms = [newcomers._Arm(*arm) for arm in zip(averages, best, right, strict=True)]
    found = newcomers._fnirs(arms, labels, 0.1)
    for row, own, fnir in zip(rows, averages, found, strict=True):
        assert row["value"] == own.mean() and row["gap"] == own.mean() - averages[-1].mean()
        assert ("low" in row) == ("low" in fnir) == (num >= 20)
        if num < 20:
            continue
        assert (row["low"], row["high"]) == significance.map_interval(own, resamples=1000)
        (low,), (high,), _ = significance.bootstrap(own - averages[-1], resamples=1000)
        assert (row["gap_low"], row["gap_high"]) == pytest.approx((low, high), abs=1e-12)
        assert fnir["low"] < fnir["value"] < fnir["high"]
        assert fnir["gap_low"] <= fnir["gap"] <= fnir["gap_high"]
    if num >= 20:
        assert (found[-1]["gap_low"], found[-1]["gap_high"]) == (0, 0)


def test_only_plda_has_newcomers():
    """The weights of a net know the people that would be left out."""
    for name in ("nplda", "mma", "knn"):
        spec = config_lib.load_file(f"{small_runs.ROOT}/configs/{name}.py").model.to_dict()
        if name == "nplda":
            spec |= SETTINGS._asdict()
        net = make_identifier(spec, modalities=WIDTHS, num_classes=5, num_clips=9)
        model: Any = types.SimpleNamespace(system=types.SimpleNamespace(model=net))
        nothing: Any = None
        assert newcomers.newcomers(model, nothing, "val", nothing, 16) is None


@pytest.mark.slow
def test_enrolling_everybody_gives_the_ranking_of_the_model():
    """In float64, nobody left out of the fit: enrolled at once, or newcomers after the others."""
    learned, clips = exact(made_up(0, 150, strangers=0.1)), exact(made_up(1, 60, strangers=0.4))
    num = len(learned.labels)
    twice = np.tile(np.arange(num), 2)
    pair = Clips([x[twice] for x in learned.vectors], learned.labels[twice])
    with jax.enable_x64(True):
        model = make_model(num)
        info = ClipInfo(twice, np.ones(2 * num, bool), pair.labels)
        state = model.init(jax.random.key(0), frames_of(pair), info, train=False)
        add = jax.jit(lambda *x: model.apply(*x, train=True, mutable=["sums"])[1])
        sums = jax.tree.map(lambda x: x[None], add(state, frames_of(pair), info))
        solved = ensemble.take(model.solve({}, sums), 0)
        info = ClipInfo(np.arange(60), np.ones(60, bool))
        compare = jax.jit(lambda *x: model.apply(*x, train=False).logits[:, 0])
        logits = compare(solved, frames_of(clips), info)
        logs = np.asarray(log_softmax(logits, jnp.ones(1 + NUM, bool)))[:, 1:]
    wanted = np.where(clips.usable[:, None], logs, -np.inf)
    pool = np.arange(60) % 7 > 0
    order = np.argsort(-wanted[pool], axis=0, kind="stable")[:20].T

    parts = newcomers_lib.fit(learned, 1 + NUM, SETTINGS)
    nobody = [one._replace(count=0 * one.count, total=0 * one.total) for one in parts]
    new = np.isin(learned.labels, NEW)
    others = newcomers_lib.enrol(nobody, learned.take(~new))
    for enrolled in (parts, newcomers_lib.enrol(others, learned.take(new))):
        (found,) = newcomers_lib.score([enrolled], SETTINGS, clips, np.arange(1, 1 + NUM))
        np.testing.assert_allclose(found.of, wanted, rtol=1e-9, atol=1e-9)
        lists = newcomers_lib.lists(found.of, pool, 20)
        np.testing.assert_array_equal(lists, np.flatnonzero(pool)[order])


# Runs on the small official files: 12 people.

SPEC = "configs/plda.py:iqiyi_vid,face,head,audio"
FOLDS = (
    "--config.data.train_splits=train,val",
    "--config.ensemble.folds=3",
    "--config.data.distractors=leave_out",
)


@pytest.fixture(scope="module")
def data(official_dir, cache_dir):
    return load_dataset("iqiyi_vid", directory=str(official_dir), cache_dir=str(cache_dir))


@pytest.fixture(scope="module", params=[(), FOLDS], ids=["one", "folds"])
def workdir(request, data, tmp_path_factory):
    """A run of PLDA whose report is on four newcomers."""
    folder = tmp_path_factory.mktemp("newcomers")
    config = small_runs.shrunk("--config.num_epochs=2", *request.param, spec=SPEC)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(newcomers_lib, "SHARE", 0.34)
        train.train(config, folder, data, num_devices=1, analyse=True)
    return folder


def scored(workdir, data, *words):
    """Returns the model of a run, the evaluation, and the group `data` of its configuration."""
    config = config_lib.override(config_lib.load_workdir(workdir), words)
    mesh = devices.make_mesh(1)
    _, model = restore.restore(config, workdir, data, mesh)
    return model, scoring.score([model], config.eval.split, mesh, block_size=16), config.data


@pytest.mark.slow
def test_with_all_clips_the_ranking_is_that_of_the_run(workdir, data):
    """Nobody is left out: every member scores the clips that it was not trained on."""
    model, evaluation, given = scored(workdir, data)
    plda: Any = model.system.model
    read = newcomers._reader(model, plda, 16)
    learned = read(*(model.data.split(name) for name in given.train_splits))
    split = model.data.split("val")
    clips, people = read(split), np.arange(1, plda.num_classes)
    scores = np.full((len(split.clips), len(people)), -np.inf)
    for row, use in zip(
        model.training_sets.trained,
        ensemble.held_out(model.training_sets, split.clips),
        strict=True,
    ):
        known = row & ((learned.labels > 0) | (given.distractors != "leave_out"))
        parts = newcomers_lib.fit(learned.take(known), plda.num_classes, plda.settings)
        (found,) = newcomers_lib.score([parts], plda.settings, clips.take(use), people)
        scores[use] = found.of
        np.testing.assert_array_equal(found.right, evaluation.clips.right[use])
        np.testing.assert_allclose(found.best, evaluation.clips.best[use], atol=2e-4)
    lists = newcomers_lib.lists(scores, evaluation.clips.pool, 100)
    np.testing.assert_array_equal(lists, evaluation.top.index[:, : lists.shape[1]])


@pytest.mark.slow
def test_the_analysis_of_a_run_has_newcomers(workdir):
    values, arrays = results_lib.load_analysis(workdir / "analysis.npz")
    entry = values["newcomers"]
    assert entry["num_newcomers"] == 4 and entry["num_identities"] == 12
    assert [row["shots"] for row in entry["rows"]] == list(SHOTS)
    rng = np.random.default_rng(newcomers.SEED)
    people = np.sort(rng.permutation(np.arange(1, 13)[arrays["positives"] > 0])[:4])
    assert entry["trained"]["map"]["value"] == pytest.approx(arrays["ap"][people - 1].mean())
    assert entry["num_known"] == arrays["positives"][people - 1].sum()
    assert [one["rate"] for one in entry["trained"]["fnir"]] == [0.1]  # of 20 distractors
    text = (workdir / "report.html").read_text()
    check_numbers(workdir, text)
    assert len(re.findall("<table", section(text, "newcomers"))) == 2


@pytest.mark.slow
def test_what_cannot_be_measured_has_a_reason(workdir, data, monkeypatch):
    model, evaluation, given = scored(workdir, data)

    def reason(model=model, results=evaluation.results):
        made = evaluation._replace(results=results)
        entry = newcomers.newcomers(model, made, "val", given, 16)
        assert entry is not None
        return entry.get("reason")

    assert reason() is None
    assert reason(results={}) == "labels"
    assert reason(model._replace(system=model.system._replace(top_classes=3))) == "run"
    sets = model.training_sets
    assert reason(model._replace(training_sets=sets._replace(trained=~sets.trained))) == "run"
    others = sets._replace(clips=("another clip", *sets.clips[1:]))
    assert reason(model._replace(training_sets=others)) == "data"
    fewer = sets._replace(trained=sets.trained & (np.arange(len(sets.clips)) > 3))
    assert reason(model._replace(training_sets=fewer)) == "run"  # as with weights of 0
    monkeypatch.setattr(newcomers_lib, "SHARE", 0.05)
    assert reason() == "people"
    monkeypatch.setattr(newcomers, "MOST_CLIPS", len(sets.clips) + 59)
    assert reason() == "clips"
