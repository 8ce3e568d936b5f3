"""Answers of a gallery: probabilities from the equations, thresholds, and the search."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy

from tests.helpers import made_galleries
from tests.helpers.cases import nightly_after_first
from tests.helpers.embeddings import unit
from tests.helpers.made_galleries import SETTINGS, add, make, make_clip, make_clips, vectors_of
from tests.helpers.seen import refused
from vidjax.apps.gallery import (
    answers as answers_lib,
    backend as backend_lib,
    index as index_lib,
    run_vectors,
)
from vidjax.apps.gallery.enrolment import enrol
from vidjax.apps.gallery.store import StoredClip, list_clips_of
from vidjax.core import metrics
from vidjax.models import card_backend

PEOPLE = 700


def log_ratio(space, clips, query):
    """Returns log(p(query | clips of a person) / p(query)) from joint normal densities."""

    def log_density(vectors):
        cov: Any = np.kron(np.ones((len(vectors), len(vectors))), np.diag(space.ratio))
        cov += np.eye(len(cov))
        return scipy.stats.multivariate_normal.logpdf(np.concatenate(vectors), cov=cov)

    z = [(np.float64(x) - space.mean) @ space.transform for x in (*clips, query)]
    return log_density(z) - log_density(z[:-1]) - log_density(z[-1:])


def oracle(people, clip):
    """Returns name of an enrolled person -> log-probability of a clip. None is a new person."""
    front = people.backend
    ends = np.cumsum(list(front.widths.values()))[:-1]
    logits = {None: front.settings.stranger + np.log(len(people.identities))}
    for name in people.identities:
        logits[name] = 0.0
        enrolled = [x.vector for x in people.clips.values() if x.identity == name]
        for number, part in enumerate(front.parts):  # face, audio
            query, *known = (np.split(x, ends)[number] for x in (clip.vector, *enrolled))
            if not query.any():
                continue  # the clip lacks the modality
            known = [unit(x - part.centre) for x in known if x.any()]
            if known:
                of_part = log_ratio(part.space, known, unit(query - part.centre))
                logits[name] += front.settings.scale * of_part
            else:
                logits[name] += front.settings.unenrolled
    return dict(zip(logits, scipy.special.log_softmax([*logits.values()]).tolist(), strict=True))


def test_vectors_of_another_gallery_are_refused(tmp_path):
    gallery = make(tmp_path / "g")
    good = vectors_of(gallery, {"a": make_clip(1, "person 1")})
    face, audio = good.parts["face"], good.parts["audio"]
    # Parts in another order, a missing part, and a part of another width.
    narrow = {"face": face[:, :4], "audio": audio}
    for parts in ({"audio": audio, "face": face}, {"face": face}, narrow):
        for use in (gallery.identify, gallery.rank, gallery.group, gallery.enrol):
            refused(functools.partial(use, good._replace(parts=parts)), "`embed` of this gallery")
    assert gallery.version == 1


def test_vectors_of_a_run_are_unit_vectors_of_its_modalities_or_of_whole_embeddings():
    """Only a run of PLDA has settings for galleries."""
    values, widths = np.random.default_rng(0).normal(size=(3, 5)), {"face": 2, "audio": 3}
    for settings, wanted in (({"within": 1.0}, widths), ({}, {"embedding": 5})):
        model = SimpleNamespace(modalities=widths, gallery_settings=settings.copy)
        run: Any = SimpleNamespace(model=SimpleNamespace(system=SimpleNamespace(model=model)))
        parts = run_vectors._make_parts(run, values)
        assert {name: x.shape[1] for name, x in parts.items()} == wanted
        columns = np.split(values, np.cumsum([*wanted.values()])[:-1], axis=1)
        for part, x in zip(parts.values(), columns, strict=True):
            np.testing.assert_allclose(part, unit(x), rtol=1e-6)


@pytest.mark.parametrize("lacks", ["", "face"])
def test_probabilities_match_the_float64_equations(tmp_path, lacks):
    people = make(tmp_path / "g")
    clip = make_clip(777, "person 3", lacks=lacks)
    (logs,) = people.index.search(people.backend.split(clip.vector[None]))
    log_probabilities = dict(zip([None, *people.index.names], logs.tolist(), strict=True))
    assert log_probabilities == pytest.approx(oracle(people, clip), abs=2e-5)
    assert np.exp(logs).sum() == pytest.approx(1, abs=1e-9)


def test_log_softmax_is_exact():
    """The oracle computes x - max(x) - log1p(sum of exp(x - max(x)) of all but the maximum)."""
    for spread, size in ((1, 1), (1, 50), (30, 3), (300, 2), (300, 50)):
        logits = np.random.default_rng(size).normal(0, spread, size)
        wide, best = logits.astype(np.longdouble), int(np.argmax(logits))  # 80 bits
        others = np.sum(np.exp(np.delete(wide, best) - wide[best]))
        wanted = (wide - wide[best] - np.log1p(others)).astype(float)
        np.testing.assert_allclose(index_lib.log_softmax(logits), wanted, rtol=1e-10, atol=1e-300)


def test_fpir_threshold_needs_enough_strangers(tmp_path):
    people = make(tmp_path / "g")  # 12 people, 6 strangers
    # A stranger may come. A share of 0.29 is 2 of 7: the coming one and an enrolled stranger.
    threshold = people.threshold(fpir=0.29)
    assert (threshold.num_strangers, threshold.num_alarms, threshold.num_identities) == (6, 1, 12)
    assert threshold.interval == metrics.fpir_interval(1, 6)
    # With the coming stranger, 6 + 1 are too few: 7 x 0.14 is less than 1, and 8 x 0.14 is more.
    refused(lambda: people.threshold(0.14), "at least 7 clips of strangers, but", "has 6", "enrol")
    add(people, {"one more": make_clip(1234, None)})
    assert people.threshold(0.14).num_strangers == 7
    # A stranger whose vector is the centre resembles nobody.
    clips = make_clips(strangers=0) | {"x": StoredClip(None, np.full(8 + 5, 0.5, np.float32))}
    centred = made_galleries.make_with_cards(tmp_path / "centred", clips, centre=0.5)
    assert centred.threshold(0.5).score < -1e300
    nobody = make(tmp_path / "no strangers", make_clips(strangers=0))
    refused(lambda: nobody.threshold(1 - 1e-10), "at least 1 clip", "has 0")
    for fpir in (0, 1, float("nan")):
        refused(functools.partial(people.threshold, fpir), "give a number above 0 and below 1")


def test_a_refused_stranger_is_refused_in_every_batch():
    """In another batch, the score of a clip may be higher by a rounding error."""
    best = -np.geomspace(1e-9, 30, 99)
    threshold = answers_lib.measure_threshold(best, 0.05, 12)
    refused_scores = best[best < threshold.score]
    assert len(refused_scores) == 99 - threshold.num_alarms == 95
    rule = answers_lib.Rule("fpir", threshold.score, False, threshold, "")
    for error in (-5e-8, 5e-8):
        assert not rule.names(refused_scores * (1 + error)).any()


def test_default_rule_is_an_fpir_of_1_percent_if_there_are_99_strangers(tmp_path):
    rule = make(tmp_path / "few", make_clips(strangers=98)).rule()
    assert rule.default and rule.by == "new"  # a name needs a probability above one half
    assert "above 50 %" in rule.about and "99 clips of strangers instead of 98" in rule.about
    gallery = make(tmp_path / "enough", make_clips(strangers=99))
    assert gallery.rule() == gallery.rule(fpir=0.01)._replace(default=True)
    assert "is 99.9999 % or more" in gallery.rule(threshold=0.999999).about  # not 100 %
    assert gallery.rule().threshold == gallery.threshold(0.01)


@pytest.mark.parametrize(("by", "least", "others", "named"), [
    ("fpir", 0.01, 0.0, [0.3, 0.5, 0.51]),  # strangers do not reach 0.01, so 0.3 is enough
    ("fpir", 0.01, 0.3, [0.5, 0.51]),  # two people have 0.3 each
    ("fpir", 0.4, 0.0, [0.5, 0.51]),
    ("fpir", 0.6, 0.0, []),
    ("threshold", 0.3, 0.3, [0.3, 0.5, 0.51]),  # the user has chosen the threshold
    ("new", 0.5, 0.0, [0.51]),  # nothing was chosen, and too few strangers for a measurement
])  # fmt: skip
def test_a_name_needs_a_measured_threshold_or_one_half_or_the_choice_of_the_user(
    by, least, others, named
):
    rule = answers_lib.Rule(by, np.log(least), default=False, threshold=None, about="")
    probabilities = np.array([0.3, 0.5, 0.51])
    with np.errstate(divide="ignore"):
        names = rule.names(np.log(probabilities), np.log(others))
    assert probabilities[names].tolist() == named


def test_a_measured_threshold_far_below_one_half_names_people_but_no_twin(tmp_path):
    """The prior of strangers is high, so that each known clip has a low probability.

    `identify` and `rank` use the same rule. Two people with equal clips are not distinguished.
    """
    clips = make_clips(strangers=99)
    known = {name: clip for name, clip in clips.items() if clip.identity is not None}
    clips["twin"] = clips["clip 0"]._replace(identity="twin")
    people = make(tmp_path / "g", clips, settings=SETTINGS._replace(stranger=9.0))
    shown = vectors_of(people, known)
    answers, lists = people.identify(shown), people.rank(shown, fpir=0.01)
    named = {name: answer.identity for name, answer in answers.items() if answer.identity}
    assert named == {clip: name for name, pairs in lists.items() for clip, _ in pairs}
    assert all(known[name].identity == identity for name, identity in named.items())
    assert len(named) >= 0.8 * len(known) and "clip 0" not in named
    assert answers["clip 0"].probability > np.exp(people.rule().score)
    assert max(answers[name].probability for name in named) < 0.01


def test_few_strangers_report_the_clips_below_one_half_and_without_candidates(tmp_path):
    """With the rule `new`, clips with 10 to 50 % are counted, because more strangers may help."""
    rule = make(tmp_path / "g").rule()
    assert rule.by == "new" and rule.score == np.log(0.5)
    best = [(0.51, "Ada"), (0.5, None), (0.1, None), (0.09, None), (0.0, None)]
    answers = {f"{p}": answers_lib.Answer(name, p, 0.0, ()) for p, name in best}
    row = rule.describe(answers_lib.count_doubtful(answers))["doubtful"]
    assert "2 unknown clips, whose best person has 10 to 50 %" in row and "99 clips" in row
    assert "doubtful" not in rule._replace(by="fpir").describe(2)
    for evidence, words in (((), "no usable frame"), (("told",), "enrolled as a stranger")):
        answer = answers_lib.Answer(None, 0.0, -np.inf, (), evidence)
        assert [*answers_lib.table({"clip": answer})][-1][-1] == words


def test_clips_of_one_film_count_as_one_clip_with_a_warning(tmp_path, capsys):
    people = make(tmp_path / "g")
    of_ada = {f"film.s00{shot}.t00": make_clip(900 + shot, "Ada") for shot in range(3)}
    of_bob = {"film.s003.t00": make_clip(903, "Bob"), "photo": make_clip(904, "Bob")}
    more = {f"old.s00{n}.t00": make_clip(910 + n, f"Eve {n % 3}") for n in range(6)}
    people.enrol(vectors_of(people, of_ada | of_bob | more))
    words = "for Ada, Eve 0, Eve 1, ...: the clips of each person are from one film"
    assert words in capsys.readouterr().err
    assert people.identities["Ada"] == 3  # clips
    columns = [people.index.names.index(name) for name in ("Ada", "Bob")]
    counts = people.index.counts[:, columns].max(axis=0)  # of faces or voices
    assert counts.tolist() == [1, 2]  # Bob: the film and a photo
    # Ada is enrolled like a person with one clip, whose vector is the mean of the 3 clips.
    mean = np.mean([x.vector for x in of_ada.values()], axis=0, dtype=float).astype(np.float32)
    (expected,) = enrol(people.backend, {"Ada": ["film"]}, {"film": StoredClip("Ada", mean)})
    (block,) = (block for block in people.index.blocks if "Ada" in block.names)
    for coefficients, (wanted,) in zip(block.linear, expected.linear, strict=True):
        np.testing.assert_array_equal(coefficients[block.names.index("Ada")], wanted)


def make_index(*, cards=False, **settings):
    """Returns PEOPLE people in three blocks. `cards`: by distances, as in galleries of models."""
    backend = made_galleries.make_front(SETTINGS._replace(**settings))
    if cards:
        distances = card_backend.from_cosines((0.85, 0.1), (0.0, 0.3))
        parts = tuple(
            dataclasses.replace(x, space=None, distances=distances) for x in backend.parts
        )
        backend = backend_lib.Backend(parts, backend.settings)
    clips = make_clips(PEOPLE, strangers=0)
    (everybody,) = enrol(backend, list_clips_of(clips), clips)
    blocks = np.split(np.arange(PEOPLE), [300, 301])  # 300, 1 and 399 people
    return index_lib.Index(backend, map(everybody.take, blocks))


def query_vectors(count):
    """Returns a vector for each of `count` enrolled and `count` other people. Some lack a part."""
    numbers = [*range(count), *range(PEOPLE, PEOPLE + count)]
    lacks = ("", "face", "", "audio")
    clips = (make_clip(9000 + n, f"person {n}", lacks=lacks[n % 4]) for n in numbers)
    return np.stack([clip.vector for clip in clips])


def assert_near(answers, wanted):
    """Asserts that two lists of answers differ by at most 1e-6. The order of ties may differ."""
    for answer, expected in zip(answers, wanted, strict=True):
        assert answer.new == pytest.approx(expected.new, abs=1e-6, rel=1e-6)
        names, logs = zip(*answer.best, strict=True)
        wanted_names, wanted_logs = zip(*expected.best, strict=True)
        np.testing.assert_allclose(logs, wanted_logs, rtol=1e-6, atol=1e-6)
        no_tie = -np.diff(logs, append=-np.inf) > 1e-5  # with the next person
        assert np.array_equal(np.array(names)[no_tie], np.array(wanted_names)[no_tie])


@nightly_after_first("cards, scale", itertools.product([False, True], [0.3, 1.0]))
def test_answers_do_not_depend_on_other_clips_or_the_order_of_people(cards, scale):
    index = make_index(cards=cards, scale=scale)
    parts = index.backend.split(query_vectors(15))  # of 30 clips
    everybody, order = index_lib.join(index.blocks), np.random.default_rng(0).permutation(PEOPLE)
    blocks = [everybody.take(rows) for rows in np.array_split(order, [1, 50, 500])]
    shuffled = index_lib.Index(index.backend, blocks)
    for k, size in ((1, 7), (5, 1), (600, 7)):  # size of a batch of clips
        answers = list(index.nearest(parts, k))
        assert_near(answers, shuffled.nearest(parts, k))
        batches = [[part[at : at + size] for part in parts] for at in range(0, 30, size)]
        assert_near(answers, [x for batch in batches for x in index.nearest(batch, k)])


@nightly_after_first("stranger, scale", itertools.product([1.0, -30.0, 60.0], [1.0, 0.02]))
def test_top_people_have_the_same_probabilities_as_in_a_full_search(stranger, scale):
    """A search compares all people in float32, and the best again in float64 (`_logits_of`)."""
    index = make_index(stranger=stranger, scale=scale)
    parts = index.backend.split(query_vectors(20))
    clips_per_query = [np.ones(len(x)) for x in parts]
    asked = index._prepare(index.backend.units(parts), clips_per_query)
    found = zip(index.nearest(parts, 5), index.search(parts), strict=True)
    for row, (answer, logs) in enumerate(found):
        logits = index._logits_of(np.arange(PEOPLE), np.full(PEOPLE, row), asked)
        *of_people, new = scipy.special.log_softmax([*logits, stranger + np.log(PEOPLE)])
        np.testing.assert_allclose(logs, [new, *of_people], rtol=1e-6, atol=1e-4)
        best = np.argsort(-np.array(of_people), kind="stable")[:5]
        assert [name for name, _ in answer.best] == [index.names[n] for n in best]
        of_best = [log for _, log in answer.best]
        wanted = [new, new, *np.array(of_people)[best]]
        np.testing.assert_allclose([answer.new, logs[0], *of_best], wanted, rtol=1e-6, atol=1e-6)
        others = scipy.special.logsumexp(np.delete(of_people, best[0]))
        np.testing.assert_allclose(answer.others, others, rtol=1e-6, atol=1e-4)
    # Without a face and a voice, a new person has the log-probability 0, and nobody is listed.
    nothing = index.backend.split(np.zeros((1, 8 + 5), np.float32))
    assert [*index.nearest(nothing, 5)] == [(0.0, [], (), -np.inf)]
    assert np.isneginf([logs[1:] for logs in index.search(nothing)]).all()  # of enrolled people


def test_equally_probable_people_are_sorted_by_name(tmp_path, monkeypatch):
    names, clip = [f"twin {n:02}" for n in range(40)], make_clip(1234, "x")
    twins = {f"clip of {name}": clip._replace(identity=name) for name in names}
    people = make(tmp_path / "g", twins)
    (block,) = people.index.blocks
    reverse = index_lib.Index(people.backend, [block.take(np.arange(40)[::-1])])
    for limit in (30, 50):  # fewer and more than the equally probable people
        monkeypatch.setattr(index_lib, "MAX_FINE_PEOPLE", limit)
        (answer,) = reverse.nearest(people.backend.split(clip.vector[None]), 20)
        assert [name for name, _ in answer.best] == names[:20]


def test_gallery_that_has_outgrown_its_run_says_so(tmp_path):
    """Two people were in the run. With 40 people the probabilities hold, with 41 they are low."""
    names = [f"p{n:02}" for n in range(41)]
    clips = {name: made_galleries.make_clip(n, name) for n, name in enumerate(names)}
    clips |= {name: clips[name]._replace(fitted=True) for name in names[:2]}
    people = made_galleries.make(tmp_path / "g", clips)
    assert "fitted to 2 people, so with 41 people" in people.rule().about
    people.remove(clip=names[-1])
    assert "fitted" not in people.rule().about
