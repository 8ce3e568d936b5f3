"""Noise classes are classes of distractors. Distractors are clips of unknown people.

Each cluster of distractors is a class. Each identity also has a mirror class, for strangers who
resemble the identity. A distractor in no cluster starts in a random mirror class. Every
`noise.relabel_every_epochs` epochs, each of these distractors moves to the mirror class of the
identity that the model predicts.

Source: noise classes (5th place 2018). In the author's code, distractors in clusters move, too. In
the article, the number of a mirror class is 8,652 + the number of the identity. This is a misprint
of 8,625, the sum of 4,934 identities and 3,691 clusters.
"""

import numpy as np

from vidjax.core.batch import NoiseClassLayout
from vidjax.utils.errors import UserError


def cluster(vectors: np.ndarray, *, eps: float, min_samples: int) -> np.ndarray:
    """Clusters `vectors` [n, D] with DBSCAN. Returns the cluster of each vector, [n] int32.

    The vectors are scaled to length 1, and distances are Euclidean: a distance of d is a cosine of
    1 - d^2 / 2. Clusters are numbered in the order of their first vectors. A vector in no cluster
    has the number -1. The zero vector of a clip without frames is in no cluster.

    Args:
      eps: the largest distance between neighbours, above 0 and at most 2. A chain of neighbours is
        a cluster. With more vectors, use a smaller value, because accidental neighbours join
        different people in a long chain.
      min_samples: a vector extends a chain if it has at least this number of neighbours, counting
        the vector itself.

    Source: Ester et al. 1996 (DBSCAN), in scikit-learn.
    """
    vectors = np.asarray(vectors, np.float64)  # [n, D]
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise UserError(
            "the training clips without an identity cannot be clustered: the mean feature of "
            f"number {row} of these clips, counted from 0, is not finite: leave out this clip"
        )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    real = np.flatnonzero(lengths[:, 0] > 0)
    clusters = np.full(len(vectors), -1, np.int32)
    if not len(real):
        return clusters

    # The import takes almost a second, and few runs need it.
    from sklearn.cluster import DBSCAN

    model = DBSCAN(eps=eps, min_samples=min_samples)
    labels = model.fit_predict(vectors[real] / lengths[real])
    clustered = labels >= 0
    _, first, number = np.unique(labels[clustered], return_index=True, return_inverse=True)
    by_first_member = np.argsort(np.argsort(first))
    clusters[real[clustered]] = by_first_member[number]
    return clusters


def initial_labels(clusters: np.ndarray, layout: NoiseClassLayout, seed: int) -> np.ndarray:
    """Returns the class of each distractor at step 0, [n] int32.

    `clusters` [n] int has the cluster of each distractor, or -1. A distractor in a cluster gets the
    class of the cluster. Any other distractor gets the mirror class of a random identity: a class
    of strangers who resemble the identity. `seed` is the seed of the random choice.
    """
    identities = 1 + np.random.default_rng(seed).integers(0, layout.num_identities, len(clusters))
    mirrors = identities + layout.mirror_shift
    columns = np.where(clusters >= 0, 1 + layout.num_identities + clusters, mirrors)
    return columns.astype(np.int32)


def relabel(
    labels: np.ndarray, predicted: np.ndarray, layout: NoiseClassLayout, *, keep: str = "label"
) -> np.ndarray:
    """Returns new labels of distractors (clips of unknown people), [...] int.

    `labels` [...] int are the present classes of the distractors: clusters of distractors, or
    mirror classes (each for strangers who resemble an identity). `predicted` [...] int are the
    predictions of the model. `keep` selects one of two rules:
    - `label`: if the label is a mirror class, and the prediction is an identity, the new label is
      the mirror class of this identity. All other labels stay.
    - `prediction`: if the prediction is an identity, the new label is the mirror class of this
      identity. If the prediction is class 0 ("other"), the label stays. Any other prediction
      becomes the label.

    Source: noise classes (5th place 2018): `label` from the article, `prediction` from the code.
    """
    mirrors = (predicted + layout.mirror_shift).astype(labels.dtype)
    if keep == "prediction":
        moved = np.where(predicted > 0, predicted.astype(labels.dtype), labels)
        return np.where(layout.is_identity(predicted), mirrors, moved)
    moves = layout.is_mirror(labels) & layout.is_identity(predicted)
    return np.where(moves, mirrors, labels)
