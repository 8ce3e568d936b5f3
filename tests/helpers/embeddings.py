"""Made-up vectors, exactly of the two-covariance model."""

import numpy as np


def unit(x: np.ndarray) -> np.ndarray:
    """Returns vectors of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def exact(
    rng: np.random.Generator, people: int, clips: int, width: int, within: float
) -> np.ndarray:
    """Returns vectors of length 1 of people of the two-covariance model, [people, clips, width].

    `within` is the share of the variance that is not the person's.
    """
    between, noise = np.geomspace(1, 0.1, width), np.geomspace(0.3, 1, width)
    who, each = (1 - within) * between / between.sum(), within * noise / noise.sum()
    found = rng.normal(size=(people, 1, width)) * np.sqrt(who)
    return unit(found + rng.normal(size=(people, clips, width)) * np.sqrt(each))
