"""The quick search for the best people: equal, bit by bit, to all logarithms of all people."""

import numpy as np
import pytest

from vidjax.gallery import backend as backend_lib
from vidjax.gallery import nearest as nearest_lib
from vidjax.models.two_covariance import Settings

PEOPLE = 700


def make(rng, widths, *, scale, spread, blocks=(300, 1, 399), cards=False):
    """Returns an index of PEOPLE in blocks, of whom some lack a part, and a function for clips."""
    settings = Settings(
        within=0.6, between=0.7, scale=scale, unenrolled=-2.0, stranger=1.0, centred=1.0
    )
    centres = {name: rng.normal(size=(PEOPLE, width)) for name, width in widths.items()}

    def draw(people, lacks=0.2, strange=False):
        parts = []
        for name in widths:
            x = (0 if strange else 1) * centres[name][people] + spread * rng.normal(
                size=centres[name][people].shape
            )
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            x[rng.random(len(x)) < lacks] = 0
            parts.append(x.astype(np.float32))
        return parts

    labels = np.repeat(np.arange(1, 101), 3)
    fitted = dict(zip(widths, draw(labels, lacks=0), strict=True))
    backend = backend_lib.fit(fitted, labels, centred=False, settings=settings)
    if cards:
        parts = tuple(part._replace(by_distance=True, scale=0.3) for part in backend.parts)
        backend = backend_lib.Backend(parts, settings)
    owner = np.repeat(np.arange(PEOPLE), rng.integers(1, 4, PEOPLE))
    vectors = np.concatenate(draw(owner), axis=1)
    people, at = [], 0
    for size in blocks:
        own = (owner >= at) & (owner < at + size)
        names = [f"p{n:03}" for n in range(at, at + size)]
        people.append(backend.enrol(names, vectors[own], owner[own] - at))
        at += size
    return backend_lib.Index(backend, people), draw


@pytest.mark.parametrize("cards", [False, True])
@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_answers_are_those_of_all_people_to_the_bit(monkeypatch, cards, scale, spread):
    rng = np.random.default_rng(int(100 * scale + 10 * spread))
    widths = {"face": 48, "audio": 20}
    index, draw = make(rng, widths, scale=scale, spread=spread, cards=cards)
    known, strange = (draw(rng.integers(0, PEOPLE, 45), strange=s) for s in (False, True))
    parts = [np.concatenate(pair) for pair in zip(known, strange, strict=True)]
    screened = []
    exact = backend_lib.Index.logits_of
    monkeypatch.setattr(
        backend_lib.Index,
        "logits_of",
        lambda *words: screened.append(len(words[1])) or exact(*words),
    )
    monkeypatch.setattr(nearest_lib, "MOST_LEFT", 1.0 if scale == 0.3 else 0.5)
    for k in (1, 5, 600):
        found = list(nearest_lib.nearest(index, parts, k))
        for one, logs in zip(found, index.search(parts), strict=True):
            assert one.best == index.best(logs, k)
            assert one.new == float(logs[0]) or abs(one.new - logs[0]) < 1e-15
    assert screened or scale < 1 or spread > 1


def test_bounds_hold(monkeypatch):
    rng = np.random.default_rng(3)
    index, draw = make(rng, {"face": 64, "body": 16}, scale=1.0, spread=0.5)
    z = index.backend.whiten(draw(rng.integers(0, PEOPLE, 40)))
    bounds = nearest_lib._Screen(index).bounds(z)
    assert bounds
    logits, errors = bounds
    rows = np.arange(PEOPLE)
    for row, near in enumerate(logits):
        off = np.abs(near - index.logits_of(rows, np.full(PEOPLE, row), z))
        assert off.max() <= errors[row] < 0.5


def test_equal_people_are_in_the_order_of_names():
    rng = np.random.default_rng(0)
    index, draw = make(rng, {"face": 32}, scale=1.0, spread=0.3)
    (one,) = draw(np.array([5]), lacks=0)
    twins = index.backend.enrol(["b", "a", "c"], np.tile(one, (3, 1)), np.arange(3))
    both = backend_lib.Index(index.backend, [*index.blocks, twins])
    (found,) = nearest_lib.nearest(both, [one], 3)
    assert [name for name, _ in found.best] == ["a", "b", "c"]


@pytest.mark.parametrize("stranger", [-30.0, 1.0, 30.0, 60.0])
def test_somebody_new_who_is_nearly_sure_changes_no_bit(stranger):
    rng = np.random.default_rng(1)
    index, draw = make(rng, {"face": 40}, scale=1.0, spread=0.5)
    settings = index.backend.settings._replace(stranger=stranger)
    index = backend_lib.Index(backend_lib.Backend(index.backend.parts, settings), index.blocks)
    (parts,) = draw(np.arange(PEOPLE - 40, PEOPLE), lacks=0)
    for one, logs in zip(
        nearest_lib.nearest(index, [parts], 5), index.search([parts]), strict=True
    ):
        assert one.best == index.best(logs, 5)
        assert (one.best[0][1] >= one.new) == (one.best[0][1] >= logs[0])


def test_logits_that_are_one_logarithm_are_ties():
    """Beside somebody new who is sure, logarithms of people differ less than their logits."""
    rng = np.random.default_rng(4)
    index, draw = make(rng, {"face": 40}, scale=1e-14, spread=0.5)
    settings = index.backend.settings._replace(stranger=60.0, unenrolled=0.0)
    index = backend_lib.Index(backend_lib.Backend(index.backend.parts, settings), index.blocks)
    (parts,) = draw(np.arange(40), lacks=0)
    for k in (2, 40):
        found = nearest_lib.nearest(index, [parts], k)
        for one, logs in zip(found, index.search([parts]), strict=True):
            assert one.best == index.best(logs, k)
