"""The front of a gallery: coordinates in which vectors are compared, and the settings.

A clip is one vector in each of M parts: the modalities of a PLDA run, or the embedding of a net.
The front is fitted from the vectors of labelled clips. It holds no vector of a clip, but sums over
them; `fit` of other clips replaces it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vidjax.models import plda, two_covariance
from vidjax.models.plda import Settings, blank_space
from vidjax.models.two_covariance import Space
from vidjax.training.plda_fit import fit_settings, some_identities, tell_of_few

MOST_ROWS = 1024  # clips or identities that are computed at a time


class Part(NamedTuple):
    """One vector of every clip.

    Attributes:
      name: of the modality, or `embedding`.
      centre: [D] float64, subtracted from unit vectors before they are made unit again; 0 where
        the run did that.
      space: the coordinates, float64.
    """

    name: str
    centre: np.ndarray
    space: Space


class Front(NamedTuple):
    """Coordinates of every part, and settings.

    Attributes:
      parts: M parts.
      settings: see `models.plda.Settings`.
    """

    parts: tuple[Part, ...]
    settings: Settings

    @property
    def widths(self) -> dict[str, int]:
        """Name -> D of every part."""
        return {part.name: len(part.centre) for part in self.parts}


def fit(
    vectors: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    centred: bool,
    settings: Settings | None = None,
    seed: int = 0,
) -> Front:
    """Fits a front.

    Args:
      vectors: part -> [N, D] float32, unit vectors; 0 for clips that lack the part.
      labels: [N] int, classes from 1.
      centred: True for vectors from which the run has subtracted a centre.
      settings: given settings; None to fit them, too.
      seed: of the fit of settings.
    """
    tell_of_few(labels)
    if settings is None:
        wanted = some_identities(labels, seed) if len(labels) else np.zeros(0, bool)
        some = {name: x[wanted] for name, x in vectors.items()}
        settings = fit_settings(some, labels[wanted], {}, seed)
    parts = []
    for name, x in vectors.items():
        present = np.any(x != 0, axis=1)
        width = x.shape[1]
        blank = Part(name, np.zeros(width), blank_space(width))
        if present.any():
            x = np.asarray(x[present], np.float64)
            if not centred:
                blank = blank._replace(centre=settings.centred * x.mean(axis=0))
            u = unit(blank, x)
            sums = two_covariance.make_sums(u, labels[present], int(labels.max()) + 1)
            blank = blank._replace(space=plda.fit(sums._asdict(), settings))
        parts.append(blank)
    return Front(tuple(parts), settings)


def unit(part: Part, x: np.ndarray) -> np.ndarray:
    """Returns unit vectors [N, D] float64 from the centre to x; 0 where x is 0."""
    shifted = np.asarray(x, np.float64) - part.centre
    norm = np.sqrt(np.vecdot(shifted, shifted))[:, None]
    present = np.any(np.asarray(x) != 0, axis=1)[:, None]
    return np.where(present, shifted / np.maximum(norm, 1e-12), 0.0)


def to_numbers(front: Front) -> np.ndarray:
    """Returns all arrays of a front in one, float64."""
    return np.concatenate(
        [
            np.ravel(array)
            for part in front.parts
            for array in (part.centre, part.space.mean, part.space.transform, part.space.ratio)
        ]
    ).astype("<f8")


def num_numbers(widths: Mapping[str, int]) -> int:
    """Returns the length of `to_numbers`."""
    return sum(width * (width + 3) for width in widths.values())


def from_numbers(widths: Mapping[str, int], settings: Settings, numbers: np.ndarray) -> Front:
    """Returns the front that `to_numbers` was given.

    Args:
      widths: part -> D.
      settings: the settings.
      numbers: [num_numbers(widths)] float64.
    """
    parts, at = [], 0
    for name, width in widths.items():
        arrays = []
        for size in (width, width, width * width, width):
            arrays.append(numbers[at : at + size].astype(np.float64))
            at += size
        centre, mean, transform, ratio = arrays
        parts.append(Part(name, centre, Space(mean, transform.reshape(width, width), ratio)))
    return Front(tuple(parts), settings)
