"""Noise classes: distractors as clusters of strangers and as mirrors of the identities.

A distractor whose face is seen in others too is a stranger that one can learn: each cluster is a
class. What is left over resembles nobody in particular, so it starts in a random one of C mirror
classes, and after every epoch each of these clips moves to the mirror of the identity that it is
mistaken for: the model learns to tell an identity from what only looks like it.

Source: the noise-classes system, 5th place of 2018. Ours: column 0 is "other", as everywhere here,
so the published `l < C` is `1 <= l <= C`; the shift of C + K is the same. (Its 8,652 is a misprint
of 4934 + 3691 = 8625.) The authors' code moves every distractor, their article only the unclustered
ones: so do we.
"""

from typing import Literal, NamedTuple

import numpy as np

from vidjax.batch import Array


class NoiseLayout(NamedTuple):
    """Which class column is what: 0 other, 1..C identities, then K clusters, then C mirrors.

    Attributes:
      num_identities: C.
      num_clusters: K.
    """

    num_identities: int
    num_clusters: int

    @property
    def num_columns(self) -> int:
        """The number of class columns, 1 + 2C + K."""
        return 1 + 2 * self.num_identities + self.num_clusters

    @property
    def mirror_shift(self) -> int:
        """What leads from the column of an identity to that of its mirror, C + K."""
        return self.num_identities + self.num_clusters

    def is_identity(self, columns: Array) -> Array:
        """Returns bool, True for 1..C; columns are integers of any shape, numpy or jax."""
        return (columns >= 1) & (columns <= self.num_identities)

    def is_cluster(self, columns: Array) -> Array:
        """Returns bool, True for C+1..C+K; columns are integers of any shape, numpy or jax."""
        return (columns > self.num_identities) & (columns <= self.mirror_shift)

    def is_mirror(self, columns: Array) -> Array:
        """Returns bool, True for C+K+1..2C+K; columns are integers of any shape, numpy or jax."""
        return (columns > self.mirror_shift) & (columns < self.num_columns)


def cluster(
    vectors: np.ndarray,
    *,
    method: Literal["dbscan", "hdbscan"] = "dbscan",
    eps: float,
    min_samples: int,
) -> np.ndarray:
    """Returns the cluster of every vector, counted from 0 by its first member; -1 without one.

    Vectors are compared by direction: at a distance d on the unit sphere their cosine is
    1 - d^2 / 2. A zero vector, as of a clip without frames, is in no cluster.

    Args:
      vectors: [n, D] float.
      method: 'dbscan' joins what a chain of neighbours connects; 'hdbscan' finds for every cluster
        the density at which it holds together, but never one cluster alone.
      eps: distance 0..2 up to which two are neighbours. The more vectors, the smaller it must be,
        or chance neighbours join strangers in one long chain. For 'hdbscan', clusters that are
        closer are not told apart, and 0 is no such limit.
      min_samples: how many vectors, itself included, must lie about one to make it a core; for
        'hdbscan' clusters have as many members at least, and never fewer than 2.

    Returns:
      [n] int32.

    Raises:
      ValueError: an unknown method, an eps or min_samples that cannot be, a vector not finite.

    Source: Ester et al. 1996 (DBSCAN), Campello et al. 2013 (HDBSCAN), both of scikit-learn.
    """
    if method not in ("dbscan", "hdbscan"):
        raise ValueError(f"method is 'dbscan' or 'hdbscan', got {method!r}")
    if min_samples < 1 or not (0 < eps <= 2 or (method == "hdbscan" and eps == 0)):
        raise ValueError(f"eps {eps} must be within 0..2 and min_samples {min_samples} 1 or more")
    vectors = np.asarray(vectors, np.float64)  # [n, D]
    if not np.isfinite(vectors).all():
        raise ValueError("a vector to be clustered is not finite")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    real = np.flatnonzero(lengths[:, 0] > 0)
    found = np.full(len(vectors), -1, np.int32)
    least = max(min_samples, 2) if method == "hdbscan" else 1
    if len(real) < least:
        return found

    # The import takes most of a second, and few runs cluster anything.
    from sklearn.cluster import DBSCAN, HDBSCAN

    if method == "dbscan":
        model = DBSCAN(eps=eps, min_samples=min_samples)
    else:
        model = HDBSCAN(
            min_cluster_size=least,
            min_samples=min_samples,
            cluster_selection_epsilon=eps,
            copy=False,  # pyright: ignore[reportArgumentType]  (its default is a string)
        )
    labels = model.fit_predict(vectors[real] / lengths[real])
    clustered = labels >= 0
    _, first, number = np.unique(labels[clustered], return_index=True, return_inverse=True)
    by_first_member = np.argsort(np.argsort(first))
    found[real[clustered]] = by_first_member[number]
    return found


def initial_labels(clusters: np.ndarray, layout: NoiseLayout, seed: int) -> np.ndarray:
    """Returns the class column that each distractor starts in.

    Args:
      clusters: [n] int, as `cluster` returns them.
      layout: the class columns.
      seed: of the mirror classes; which one a clip draws depends on its row alone.

    Returns:
      [n] int32, the column of its cluster, or of a random mirror class for -1.

    Raises:
      ValueError: a cluster that has no column.
    """
    if clusters.size and not -1 <= clusters.min() <= clusters.max() < layout.num_clusters:
        raise ValueError(
            f"clusters {clusters.min()}..{clusters.max()} do not fit {layout.num_clusters} classes"
        )
    identities = 1 + np.random.default_rng(seed).integers(0, layout.num_identities, len(clusters))
    columns = np.where(
        clusters >= 0, 1 + layout.num_identities + clusters, identities + layout.mirror_shift
    )
    return columns.astype(np.int32)


def relabel(labels: Array, predicted: Array, layout: NoiseLayout) -> Array:
    """Returns the labels after an epoch: unclustered clips go where they are mistaken for somebody.

    Args:
      labels: [...] int, class columns; only those of mirrors can change.
      predicted: [...] int, the best column of the model, any of them. A clip that is taken for an
        identity goes to its mirror, any other stays.
      layout: the class columns.

    Returns:
      [...] of the labels' dtype, numpy or jax as the labels are.
    """
    moves = layout.is_mirror(labels) & layout.is_identity(predicted)
    mirrors = (predicted + layout.mirror_shift).astype(labels.dtype)
    return labels.__array_namespace__().where(moves, mirrors, labels)


def audit(old: Array, new: Array, predicted: Array, layout: NoiseLayout) -> dict[str, int]:
    """Returns what a relabelling did, in numbers of clips.

    Args:
      old: [...] int, the labels before.
      new: [...] int, those that `relabel` returned.
      predicted: [...] int, the columns that it was given.
      layout: the class columns.

    Returns:
      `clustered`, `unclustered` = `moved` + `kept`, and `kept` by its reason: `kept_identity` was
      in the mirror of the predicted identity already, `kept_other`, `kept_cluster` and
      `kept_mirror` were predicted to be that. Labels of other columns do not count.
    """
    unclustered = layout.is_mirror(old)
    kept = unclustered & (old == new)
    reasons = {
        "kept_identity": layout.is_identity(predicted),
        "kept_other": predicted == 0,
        "kept_cluster": layout.is_cluster(predicted),
        "kept_mirror": layout.is_mirror(predicted),
    }
    masks = {
        "clustered": layout.is_cluster(old),
        "unclustered": unclustered,
        "moved": unclustered & (old != new),
        "kept": kept,
        **{name: kept & reason for name, reason in reasons.items()},
    }
    return {name: int(np.sum(mask)) for name, mask in masks.items()}
