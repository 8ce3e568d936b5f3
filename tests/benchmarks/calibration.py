"""How far the probabilities of PLDA hold, for made-up people exactly of its model.

    python -m tests.benchmarks.calibration

People are enrolled, and clips are identified. Half of these clips show strangers. The columns:

    P(new)        mean probability of somebody new; .5 is right
    ECE           expected calibration error of the best name
    named at 1 %  share of OTHERS that get a name
    right         share of the clips of enrolled people whose best name is right
    settings      of PLDA, as they were fitted
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.benchmarks import common
from tests.helpers import embeddings
from vidjax.apps.gallery import backend
from vidjax.apps.gallery.backend import Nearest
from vidjax.core import metrics
from vidjax.models.two_covariance import Settings

CASES = [  # people, clips of each, width, share of the variance that is not the person's
    (50, 4, 64, 0.5), (50, 4, 128, 0.6), (300, 4, 64, 0.5), (300, 4, 64, 0.7), (1000, 4, 128, 0.65),
    (5000, 3, 128, 0.65),
]  # fmt: skip
MOST = 2000  # clips of known people that are identified, and of strangers that set a threshold
OTHERS = 10_000  # more strangers, of whom 1 % should reach the threshold


class Found(NamedTuple):
    """The figures of a case: see the docstring of this file."""

    new: float
    error: float
    alarms: float
    right: float
    settings: Settings


def calibration_error(probability: np.ndarray, right: np.ndarray) -> float:
    """Returns the expected calibration error, in ten bins, of N answers that may be `right`."""
    place = np.minimum((probability * 10).astype(int), 9)
    return float(np.abs(np.bincount(place, probability - right)).sum() / len(right))


def log_probabilities(answers: Sequence[Nearest]) -> np.ndarray:
    """Returns the logarithm of the probability of the best name of each clip."""
    return np.array([answer.best[0][1] for answer in answers])


def measure(num_people: int, *, clips: int, width: int, within: float, seed: int) -> Found:
    rng = np.random.default_rng(seed)
    x = embeddings.exact(rng, num_people, clips + 2, width, within)
    rows, enrolled = np.repeat(np.arange(num_people), clips), x[:, :clips].reshape(-1, width)
    fitted = backend.fit({"face": enrolled}, 1 + rows, centred=False)
    index = backend.Index(fitted, [fitted.enrol([*map(str, range(num_people))], enrolled, rows)])

    def identify(queries: np.ndarray) -> list[Nearest]:
        return list(index.nearest([queries.astype(np.float32)], 1))

    def strangers(count: int) -> list[Nearest]:
        return identify(embeddings.exact(rng, count, 1, width, within)[:, 0])

    asked = rng.permutation(2 * num_people)[:MOST]
    known = identify(x[:, clips:].reshape(-1, width)[asked])
    answers = known + strangers(len(asked))
    truth = [*map(str, asked // 2), *[None] * len(asked)]  # every person is asked about twice
    right = np.array([x.best[0][0] == name for x, name in zip(answers, truth, strict=True)])
    threshold = metrics.find_threshold(log_probabilities(strangers(MOST)), fpir=0.01)
    some = [log_probabilities(strangers(MOST)) for _ in range(OTHERS // MOST)]
    return Found(
        new=float(np.mean([np.exp(answer.new) for answer in answers])),
        error=calibration_error(np.exp(log_probabilities(answers)), right),
        alarms=float(np.mean(np.concatenate(some) >= threshold)),
        right=float(np.mean(right[: len(known)])),
        settings=fitted.settings,
    )


def main() -> None:
    common.parse(__doc__)
    common.say("people clips width within   P(new)    ECE  named at 1 %  right   settings")
    for people, clips, width, within in CASES:
        found = measure(people, clips=clips, width=width, within=within, seed=0)
        shown = " ".join(f"{value:.2f}" for value in found.settings)
        common.say(
            f"{people:6} {clips:5} {width:5} {within:6.2f}   {found.new:6.3f} {found.error:6.3f}  "
            f"{100 * found.alarms:10.2f} %  {found.right:5.3f}   {shown}"
        )


if __name__ == "__main__":
    main()
