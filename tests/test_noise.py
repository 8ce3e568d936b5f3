"""Noise classes: clusters against a slow loop and a library, the published arithmetic, the log."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidjax.core.batch import NoiseLayout
from vidjax.training import plan

LAYOUT = NoiseLayout(num_identities=3, num_clusters=2)
COLUMNS = np.arange(9)  # 0 other, 1-3 identities, 4-5 clusters, 6-8 mirrors


def slow_dbscan(vectors: np.ndarray, eps: float, min_samples: int) -> list[int]:
    """DBSCAN by its definition: cores that a chain of neighbours connects, and their borders."""
    unit = [v / np.sqrt(sum(x * x for x in v)) if any(v) else None for v in vectors]

    def near(a: int, b: int) -> bool:
        left, right = unit[a], unit[b]
        if left is None or right is None:
            return False
        return np.sqrt(sum((x - y) ** 2 for x, y in zip(left, right, strict=True))) <= eps

    n = len(vectors)
    neighbours = [[b for b in range(n) if near(a, b)] for a in range(n)]
    cores = {a for a in range(n) if len(neighbours[a]) >= min_samples}
    found = [-1] * n
    for number, seed in enumerate(sorted(cores)):
        if found[seed] != -1:
            continue
        todo = [seed]
        while todo:
            a = todo.pop()
            if found[a] == -1:
                found[a] = number
                todo += neighbours[a] if a in cores else []
    return by_first_member(found)


def by_first_member(clusters: list[int]) -> list[int]:
    numbers: dict[int, int] = {-1: -1}
    for number in clusters:
        numbers.setdefault(number, len(numbers) - 1)
    return [numbers[number] for number in clusters]


def strangers(rng: np.random.Generator, count: int, spread: float) -> np.ndarray:
    """Vectors [n, 16] of any length about `count` random directions."""
    centres = rng.normal(size=(count, 16))
    whose = rng.permutation(np.repeat(np.arange(count), 4))
    vectors = centres[whose] + spread * rng.normal(size=(len(whose), 16))
    return vectors * rng.lognormal(size=(len(whose), 1))


@pytest.mark.parametrize("eps", [0.2, 0.5, 0.9, 1.4])
@pytest.mark.parametrize("min_samples", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dbscan_is_what_its_definition_says(eps: float, min_samples: int, dtype) -> None:
    vectors = strangers(np.random.default_rng(0), 8, 0.4).astype(dtype)
    vectors[[3, 11]] = 0
    found = plan.cluster(vectors, eps=eps, min_samples=min_samples)
    assert found.dtype == np.int32 and found.shape == (32,)
    expected = np.array(slow_dbscan(vectors.astype(float), eps, min_samples))
    if min_samples <= 2:  # no border may belong to two clusters then
        assert found.tolist() == expected.tolist()
    else:
        assert ((found >= 0) == (expected >= 0)).all()
        assert found.max() == expected.max()
    assert found[3] == found[11] == -1


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_handful_of_vectors_are_no_mistake(count) -> None:
    apart = np.eye(4)[:count]
    for vectors in (apart, 0 * apart):
        found = plan.cluster(vectors, eps=0.5, min_samples=2)
        assert found.tolist() == [-1] * count and found.dtype == np.int32
        found = plan.cluster(vectors, eps=0.5, min_samples=5)
        assert found.tolist() == [-1] * count


def test_mistakes_in_clustering_are_named() -> None:
    vectors = np.eye(3)
    mistakes = [
        ({"eps": 0.0, "min_samples": 2}, "config.noise.eps=0.0 must be"),
        ({"eps": float("nan"), "min_samples": 2}, "config.noise.eps=nan must be"),
        ({"eps": 2.1, "min_samples": 2}, "config.noise.eps=2.1 must be"),
        ({"eps": 0.5, "min_samples": 0}, "config.noise.min_samples=0 1 or more"),
    ]
    for arguments, message in mistakes:
        with pytest.raises(ValueError, match=message):
            plan.cluster(vectors, **arguments)
    with pytest.raises(ValueError, match="not finite"):
        plan.cluster(np.array([[1.0, np.nan]]), eps=0.5, min_samples=2)


@pytest.mark.parametrize("module", [np, jnp])
def test_every_column_is_one_thing(module) -> None:
    columns = module.asarray(COLUMNS)
    assert LAYOUT.num_columns == 9 == len(COLUMNS)
    kinds = [LAYOUT.is_identity(columns), LAYOUT.is_cluster(columns), LAYOUT.is_mirror(columns)]
    assert [np.flatnonzero(kind).tolist() for kind in kinds] == [[1, 2, 3], [4, 5], [6, 7, 8]]
    assert not any(LAYOUT.is_mirror(module.asarray([-1, 9, 100])))
    bare = NoiseLayout(3, 0)
    assert bare.num_columns == 7 and not bare.is_cluster(columns).any()


@pytest.mark.parametrize("keep", ["label", "prediction"])
def test_published_arithmetic(keep) -> None:
    """Prediction l becomes l + C + K where l is an identity, and is the label anywhere else.

    The article keeps the label there; its code takes the prediction.
    """
    published = NoiseLayout(num_identities=4934, num_clusters=3691)
    assert published.mirror_shift == 4934 + 3691 == 8625 != 8652  # a misprint of the article
    assert published.num_columns == 1 + 2 * 4934 + 3691
    everything = np.arange(1, published.num_columns)
    start = np.full(len(everything), published.num_columns - 1)  # the last mirror class
    ours = plan.relabel(start, everything, published, keep=keep)
    theirs = everything - 1  # which count columns from 0 and have none for "other"
    other = theirs if keep == "prediction" else start - 1
    np.testing.assert_array_equal(ours, 1 + np.where(theirs < 4934, theirs + 8625, other))
    start, nobody = start[:1], np.zeros(1, int)  # "other", a column that the code does not have
    np.testing.assert_array_equal(plan.relabel(start, nobody, published, keep=keep), start)


def test_clustered_clips_start_in_their_cluster_and_others_anywhere() -> None:
    clusters = np.array([0, -1, 1, -1, 0] * 200, np.int32)
    labels = plan.initial_labels(clusters, LAYOUT, seed=3)
    assert labels.dtype == np.int32
    assert (labels[clusters == 0] == 4).all() and (labels[clusters == 1] == 5).all()
    drawn = labels[clusters == -1]
    assert set(drawn.tolist()) == {6, 7, 8}
    assert np.bincount(drawn).max() < 0.45 * len(drawn)
    np.testing.assert_array_equal(labels, plan.initial_labels(clusters, LAYOUT, seed=3))
    assert (drawn != plan.initial_labels(clusters, LAYOUT, seed=4)[clusters == -1]).any()
    fewer = plan.initial_labels(np.full(1000, -1), LAYOUT, seed=3)
    np.testing.assert_array_equal(drawn, fewer[clusters == -1])
    assert plan.initial_labels(clusters[:0], LAYOUT, seed=0).shape == (0,)
    for wrong in ([2], [-2]):
        with pytest.raises(ValueError, match="must lie below 2"):
            plan.initial_labels(np.array(wrong), LAYOUT, seed=0)


def slow_relabel(label: int, predicted: int) -> int:
    if label in (6, 7, 8) and predicted in (1, 2, 3):
        return predicted + 5
    return label


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_only_unclustered_clips_taken_for_somebody_move(make) -> None:
    labels, predicted = np.meshgrid(COLUMNS, COLUMNS, indexing="ij")  # [9, 9]
    expected = [[slow_relabel(old, p) for p in range(9)] for old in range(9)]
    new = plan.relabel(make(labels.astype(np.int32)), make(predicted), LAYOUT)
    assert isinstance(new, type(make(0))) and new.dtype == np.int32
    np.testing.assert_array_equal(new, expected)
    again = plan.relabel(new, make(predicted), LAYOUT)
    np.testing.assert_array_equal(again, new)
    traced = jax.jit(lambda a, b: plan.relabel(a, b, LAYOUT))
    np.testing.assert_array_equal(traced(labels.astype(np.int32), predicted), expected)
