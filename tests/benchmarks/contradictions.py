"""Measures how often enrolled people contradict the card of dlib's net; measures the card again.

    python -m tests.benchmarks.contradictions --tracks=FOLDER

FOLDER contains `tracks.npz`, with vectors of photos of 12 actors, and of tracks in films of 23
actors. `as the card says` are draws from the model of the card. *half as far* moves the people of
the line before together, until their distances are half as long.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from tests.benchmarks import common, decision
from tests.helpers.embeddings import CARD, Population, unit
from vidjax.models import card_backend, card_check, card_measure

SHIPPED = card_backend.from_cosines(CARD.same, CARD.different)
CASES = [(5, 3), (5, 2), (5, 1), (12, 3), (3, 3), (2, 1)]  # people, photos of each
DRAWS = 2000

Draw = Callable[[int, int], np.ndarray]  # (people, count) -> unit vectors [people, count, D]


def compare(photos: np.ndarray) -> card_check.Comparison:
    """Compares photos [people, count, D] with the card of dlib's net."""
    means, counts = photos.mean(1), np.full(len(photos), photos.shape[1])
    return card_check.compare(SHIPPED, means.sum(0), np.vecdot(means, means), counts)


def measure(draw: Draw, people: int, count: int, draws: int = DRAWS) -> dict[str, float]:
    """Returns problem -> share of the draws that have the problem. "" is no problem."""
    problems = Counter(compare(draw(people, count)).problem for _ in range(draws))
    return {problem: number / draws for problem, number in problems.items()}


def draw_model(scale: float = 1.0) -> Draw:
    """Draws from the model of the card. `scale` multiplies distances of two people."""
    made = Population(0, SHIPPED)

    def draw(people: int, count: int) -> np.ndarray:
        found = made.mean + scale * (made.people(people) - made.mean)
        return made.photos(found, count)

    return draw


def draw_vectors(vectors: Iterable[np.ndarray], scale: float = 1.0) -> Draw:
    """Draws from the vectors [N, D] of real people. `scale` multiplies distances of two people."""
    rng, means = np.random.default_rng(0), np.array([x.mean(0) for x in vectors])
    shifts = (1 - scale) * (means - means.mean(0))
    moved = [unit(x - shift) for x, shift in zip(vectors, shifts, strict=True)]

    def draw(people: int, count: int) -> np.ndarray:
        chosen = [moved[row] for row in rng.permutation(len(moved))[:people]]
        return np.array([rng.permutation(x)[:count] for x in chosen])

    return draw


def load(folder: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns unit vectors of photos [P, K, D], and of the clear tracks of each person, [N, D]."""
    films, photos = decision.load(folder)
    clear = films.clarity >= card_backend.LEAST_CLARITY
    people = sorted({*films.people.tolist()})
    return photos, [films.vectors[clear & (films.people == person)] for person in people]


if __name__ == "__main__":
    photos, tracks = load(Path(common.parse(__doc__, tracks="").tracks))
    people, count, width = photos.shape
    found = card_measure.measure(photos.reshape(-1, width), np.repeat(np.arange(people), count))
    for name, spread in (("same", found.same), ("different", found.different)):
        shipped = getattr(CARD, name)
        ends = [f"{low:.3f} to {high:.3f}" for low, high in spread[2:]]
        common.print_text(
            f"{name}: mean {spread.mean:.4f} ({ends[0]}), deviation {spread.deviation:.4f} "
            f"({ends[1]}); the card: {shipped[0]:.3f}, {shipped[1]:.3f}"
        )
    common.print_text(f"pairs {found.pairs}, equal error rate {found.equal_error_rate:.3f}")
    draws = {
        "as the card says": draw_model(), "half as far": draw_model(0.5),
        "photos of actors": draw_vectors(photos), "actors half as far": draw_vectors(photos, 0.5),
        "tracks of actors": draw_vectors(tracks),
    }  # fmt: skip
    for name, draw in draws.items():
        for people, count in CASES:
            shares = measure(draw, people, count)
            cells = ", ".join(f"{key or 'none'} {x:.4f}" for key, x in sorted(shares.items()))
            common.print_text(f"{name}: {people} people x {count}: {cells}")
