"""The search for the most probable people: equal in any order and number of people and clips."""

import itertools

import numpy as np
import pytest
from scipy import special

from tests.helpers.cases import quick_first
from tests.helpers.embeddings import unit
from tests.helpers.made_galleries import SETTINGS
from vidjax.apps.gallery import backend as backend_lib
from vidjax.models import distance

PEOPLE = 700
NIGHTLY = pytest.mark.nightly


def make(rng, widths, *, scale, spread, cards=False):
    """Returns an index of PEOPLE in blocks, of whom some lack a part, and a function for clips."""
    centres = {name: rng.normal(size=(PEOPLE, width)) for name, width in widths.items()}

    def draw(people, lacks=0.2, strange=False):
        parts = []
        for centre in centres.values():
            own = (1 - strange) * centre[people]
            x = unit(own + spread * rng.normal(size=own.shape))
            x[rng.random(len(x)) < lacks] = 0
            parts.append(x.astype(np.float32))
        return parts

    labels = np.repeat(np.arange(1, 101), 3)
    fitted = dict(zip(widths, draw(labels, lacks=0), strict=True))
    settings = SETTINGS._replace(scale=scale, unenrolled=-2.0, stranger=1.0)
    backend = backend_lib.fit(fitted, labels, centred=False, settings=settings)
    if cards:
        distances = distance.from_cosines((1 - 0.4 * spread, 0.1), (0.1, 0.15))
        parts = tuple(part._replace(space=None, distances=distances) for part in backend.parts)
        backend = backend_lib.Backend(parts, settings)
    owner = np.repeat(np.arange(PEOPLE), rng.integers(1, 4, PEOPLE))
    vectors, people = np.concatenate(draw(owner), axis=1), []
    for rows in np.split(np.arange(PEOPLE), [300, 301]):  # 300, 1 and 399 people
        own = np.isin(owner, rows)
        names = [f"p{n:03}" for n in rows]
        people.append(backend.enrol(names, vectors[own], owner[own] - rows[0]))
    return backend_lib.Index(backend, people), draw


def near(answers, wanted):
    """Asserts that two lists of answers are equal to 1e-6, but for the order of ties."""
    for answer, expected in zip(answers, wanted, strict=True):
        assert answer.new == pytest.approx(expected.new, abs=1e-6, rel=1e-6)
        names, logs = ([[pair[i] for pair in x.best] for x in (answer, expected)] for i in range(2))
        np.testing.assert_allclose(*logs, rtol=1e-6, atol=1e-6)
        apart = -np.diff(logs[0], append=-np.inf) > 1e-5
        assert [*itertools.compress(names[0], apart)] == [*itertools.compress(names[1], apart)]


@pytest.mark.parametrize(
    ("cards", "scale", "spread"),
    quick_first(itertools.product([False, True], [0.3, 1.0], [0.3, 1.5]), mark=NIGHTLY),
)
def test_answers_do_not_depend_on_other_clips_or_the_order_of_people(cards, scale, spread):
    rng = np.random.default_rng(int(100 * scale + 10 * spread))
    index, draw = make(rng, {"face": 48, "audio": 20}, scale=scale, spread=spread, cards=cards)
    known, strange = (draw(rng.integers(0, PEOPLE, 15), strange=s) for s in (False, True))
    parts = [np.concatenate(pair) for pair in zip(known, strange, strict=True)]
    whole, order = backend_lib.join(index.blocks), rng.permutation(PEOPLE)
    blocks = [whole.take(rows) for rows in np.array_split(order, [1, 50, 500])]
    for k in (1, 5, 600):
        answers = list(index.nearest(parts, k))
        near(answers, backend_lib.Index(index.backend, blocks).nearest(parts, k))
        for size in (1, 7):
            cut = [[x[at : at + size] for x in parts] for at in range(0, 30, size)]
            near(answers, [answer for batch in cut for answer in index.nearest(batch, k)])


@pytest.mark.parametrize(
    ("stranger", "scale"),
    quick_first(itertools.product([1.0, -30.0, 60.0], [1.0, 0.02]), mark=NIGHTLY),
)
def test_top_people_have_the_same_probabilities_as_in_a_full_search(stranger, scale):
    rng = np.random.default_rng(1)
    index, draw = make(rng, {"face": 40, "audio": 8}, scale=scale, spread=0.5)
    settings = index.backend.settings._replace(stranger=stranger)
    index = backend_lib.Index(backend_lib.Backend(index.backend.parts, settings), index.blocks)
    parts = draw(np.arange(PEOPLE - 40, PEOPLE))
    asked = index._prepare(index.backend.units(parts), [np.ones(len(x)) for x in parts])
    answers = zip(index.nearest(parts, 5), index.search(parts), strict=True)
    for row, (answer, logs) in enumerate(answers):
        if asked.missing[:, row].all():
            assert answer == (0.0, [], ()) and (logs[1:] == -np.inf).all()
            continue
        logits = index._logits_of(np.arange(PEOPLE), np.full(PEOPLE, row), asked)
        wanted = special.log_softmax([*logits, stranger + np.log(PEOPLE)])
        np.testing.assert_allclose(logs, np.roll(wanted, 1), rtol=1e-6, atol=1e-4)
        best = np.argsort(-wanted[:-1], kind="stable")[:5]
        assert [name for name, _ in answer.best] == [index.names[n] for n in best]
        logs = [answer.new, logs[0], *(log for _, log in answer.best)]
        np.testing.assert_allclose(logs, wanted[[-1, -1, *best]], rtol=1e-6, atol=1e-6)


def test_equally_probable_people_are_sorted_by_name(monkeypatch):
    monkeypatch.setattr(backend_lib, "MAX_FINE_PEOPLE", 40)
    index, draw = make(np.random.default_rng(0), {"face": 32, "audio": 8}, scale=1.0, spread=0.3)
    face, audio = draw(np.array([5]), lacks=0)
    same = np.tile(np.concatenate([face, audio], axis=1), (3, 1))
    twins = index.backend.enrol(["b", "a", "c"], same, np.arange(3))
    both = backend_lib.Index(index.backend, [*index.blocks, twins])
    (answer,) = both.nearest([face, audio], 3)
    assert [name for name, _ in answer.best] == ["a", "b", "c"]
    whole = backend_lib.join(index.blocks)  # and people without a common part
    voices = whole.take(np.flatnonzero(whole.num_clips[0] == 0)[::-1])
    (answer,) = backend_lib.Index(index.backend, [voices]).nearest([face, 0 * audio], 3)
    assert [name for name, _ in answer.best] == sorted(voices.names)[:3]
