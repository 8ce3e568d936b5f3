"""Points, strangers, frame numbers and boxes that the synthetic dataset draws."""

import numpy as np

RANK = 64  # dimensions in which people differ
_SINGLETON_RATE = 0.4
_CLUSTER_SIZE = 5
_LOOKALIKE_COSINE = 0.75


def unit(rng: np.random.Generator, count: int, dim: int = RANK) -> np.ndarray:
    """Points [count, dim] float32, uniform on the unit sphere."""
    points = rng.standard_normal((count, dim), np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def near(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """Returns [n, R] float32 unit vectors with cosine _LOOKALIKE_COSINE, about, to `points`."""
    side = np.sqrt(1 - _LOOKALIKE_COSINE**2).astype(np.float32)
    mixed = np.float32(_LOOKALIKE_COSINE) * points + side * unit(rng, len(points))
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def orthonormal(rng: np.random.Generator, rank: int, dim: int) -> np.ndarray:
    """Orthonormal rows [rank, dim] float32."""
    return np.linalg.qr(rng.standard_normal((dim, rank)))[0].T.astype(np.float32)


def cluster(rng: np.random.Generator, count: int) -> np.ndarray:
    """Strangers [count] int from 0: some appear once, the others about five times."""
    singles = round(count * _SINGLETON_RATE)
    sizes = [1] * singles
    while sum(sizes) < count:
        sizes.append(min(2 + int(rng.poisson(_CLUSTER_SIZE - 2)), count - sum(sizes)))
    return np.repeat(np.arange(len(sizes)), sizes)


def steps(rng: np.random.Generator, clip: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Frame numbers [F] counted from each clip's first; a number may repeat: two faces in one."""
    step = np.where(rng.random(len(clip)) < 0.02, 0, rng.integers(1, 8, len(clip)))
    total = np.cumsum(np.where(position == 0, 0, step))
    return total - total[position == 0][clip]


def boxes(centre: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Boxes [F, 4] of a face of `width` [F] about `centre` [F, 2], to a hundredth of a pixel."""
    half = np.stack([width / 2, width * 0.65], axis=1)
    return np.round(np.concatenate([centre - half, centre + half], axis=1), 2)
