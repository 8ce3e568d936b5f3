"""Measures whether the probabilities of PLDA are correct for people drawn from its own model.

    python -m tests.benchmarks.calibration

Half of the identified clips show strangers. The columns:

    P(new)        mean probability that a clip shows a stranger; it should be 0.5
    ECE           expected calibration error of the most probable person
    named at 1 %  share of new strangers above a threshold that 1 % of earlier strangers reach
    right         share of the clips of enrolled people whose most probable person is right
    settings      the fitted settings of PLDA

A second table shows galleries of a net. One clip of each person is enrolled, and the probabilities
follow from the card of dlib's net. The people are random draws to which the card applies. Columns:

    strangers     share of strangers with a probability above 0.5 of an enrolled person
    known         share of the clips of enrolled people with such a probability of the right person
"""

from collections import namedtuple

import numpy as np

from tests.benchmarks import common
from tests.helpers import embeddings
from vidjax.apps.gallery import backend
from vidjax.apps.gallery.index import Index
from vidjax.core import metrics
from vidjax.models import card_backend

CASES = [  # people, enrolled clips of each, width, share of the variance within a person
    (50, 4, 64, 0.5), (50, 4, 128, 0.6), (300, 4, 64, 0.5), (300, 4, 64, 0.7), (1000, 4, 128, 0.65),
    (5000, 3, 128, 0.65),
]  # fmt: skip
MAX_CLIPS = 2000  # of enrolled people
NUM_STRANGERS = 2000  # that determine the threshold; five times as many strangers are tested
Figures = namedtuple("Figures", "new error named right settings")  # the columns of the table


def compute_calibration_error(probability: np.ndarray, right: np.ndarray) -> float:
    """Returns the expected calibration error, in ten bins. `right` [N] marks right answers."""
    bins = np.minimum((probability * 10).astype(int), 9)
    return float(np.abs(np.bincount(bins, probability - right)).sum() / len(right))


def identify(index: Index, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the best people, their log-probabilities, and the probabilities of strangers."""
    answers = [*index.nearest([vectors.astype(np.float32)], 1)]
    best, logs = zip(*(answer.best[0] for answer in answers), strict=True)
    return np.array(best, int), np.array(logs), np.exp([answer.new for answer in answers])


def measure(num_people: int, *, clips: int, width: int, within: float, seed: int) -> Figures:
    """Enrols `clips` clips of each person, and identifies two more clips. CASES has arguments."""
    rng = np.random.default_rng(seed)
    x = embeddings.exact(rng, num_people, clips + 2, width, within)
    people, enrolled = np.repeat(np.arange(num_people), clips), x[:, :clips].reshape(-1, width)
    fitted = backend.fit({"face": enrolled}, 1 + people, centred=False)
    index = Index(fitted, [fitted.enrol([*map(str, range(num_people))], enrolled, people)])

    def draw_strangers(count: int) -> np.ndarray:
        return embeddings.exact(rng, count, 1, width, within)[:, 0]

    chosen = rng.permutation(2 * num_people)[:MAX_CLIPS]
    best, logs, new = identify(index, x[:, clips:].reshape(-1, width)[chosen])
    _, stranger_logs, stranger_new = identify(index, draw_strangers(len(chosen)))
    right = best == chosen // 2
    draws = [identify(index, draw_strangers(NUM_STRANGERS))[1] for _ in range(6)]
    threshold, tests = metrics.find_threshold(draws[0], fpir=0.01), np.concatenate(draws[1:])
    probability = np.exp(np.concatenate([logs, stranger_logs]))
    return Figures(
        new=float(np.mean([new, stranger_new])),
        error=compute_calibration_error(probability, np.pad(right, (0, len(right)))),
        named=float(np.mean(tests >= threshold)),
        right=float(np.mean(right)),
        settings=fitted.settings,
    )


def measure_net(num_people: int, *, clips: int, seed: int) -> dict[str, float]:
    """Enrols `clips` clips of each person in a gallery of a net, and identifies 1,000 clips."""
    fit = embeddings.CARD_WITHOUT_MEAN
    made = embeddings.Population(seed, card_backend.from_cosines(fit.same, fit.different))
    known, strangers = made.people(num_people), made.people(500)
    person = made.rng.integers(0, num_people, 500)  # whom each of the first 500 clips shows
    shown = np.concatenate([known[person], strangers])
    queries = embeddings.unit(shown + made.noise(1000))
    model, names = backend.make_card_backend({"face": fit}), [*map(str, range(num_people))]
    enrolled = made.photos(known, clips).reshape(-1, embeddings.WIDTH).astype(np.float32)
    people = model.enrol(names, enrolled, np.repeat(np.arange(num_people), clips))
    best, logs, new = identify(Index(model, [people]), queries)
    right, named = np.pad(best[:500] == person, (0, 500)), logs > np.log(0.5)
    return {
        "P(new)": float(new.mean()), "ECE": compute_calibration_error(np.exp(logs), right),
        "strangers": float(named[500:].mean()), "known": float((named & right)[:500].mean()),
    }  # fmt: skip


if __name__ == "__main__":
    common.parse(__doc__)
    common.print_text("people clips width within   P(new)    ECE  named at 1 %  right   settings")
    for people, clips, width, within in CASES:
        figures = measure(people, clips=clips, width=width, within=within, seed=0)
        settings = " ".join(f"{value:.2f}" for value in figures.settings)
        common.print_text(
            f"{people:6} {clips:5} {width:5} {within:6.2f}   {figures.new:6.3f} "
            f"{figures.error:6.3f}  {figures.named:12.2%}  {figures.right:5.3f}   {settings}"
        )
    for people in (5, 50, 100, 1000, 5000):
        runs = [measure_net(people, clips=1, seed=seed) for seed in range(3)]
        means = {name: np.mean([run[name] for run in runs]) for name in runs[0]}
        cells = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        common.print_text(f"{people:6} people of a net  {cells}")
