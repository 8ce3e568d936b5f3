"""How far the probabilities of PLDA hold, for made-up people exactly of its model.

    python -m tests.benchmarks.calibration

Half of the clips show strangers. The columns: mean probability of somebody new (.5 is right), the
expected calibration error of the best name, the share of other strangers named at the threshold
that 2,000 of them set for 1 %, known clips that are right, and the settings that were fitted.
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks import common
from tests.helpers import embeddings
from vidjax.apps.gallery import backend as backend_lib
from vidjax.core import metrics
from vidjax.models import plda_fit, two_covariance
from vidjax.models.two_covariance import Settings

CASES = [  # people, clips of each, width, share of the variance that is not the person's
    (50, 4, 64, 0.5), (50, 4, 128, 0.6), (300, 4, 64, 0.5), (300, 4, 64, 0.7), (1000, 4, 128, 0.65),
    (5000, 3, 128, 0.65),
]  # fmt: skip
MOST = 2000  # clips of known people that are searched, and of strangers that set a threshold


class Found(NamedTuple):
    new: float  # mean probability of somebody new
    error: float  # expected calibration error of the best name, in ten bins
    alarms: float  # share of further strangers at the threshold for 1 %
    right: float  # share of known clips whose best name is right
    settings: Settings  # those that were fitted


def calibration_error(probability: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Returns the expected calibration error of N probabilities of answers that are `right`."""
    place = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = [abs(np.sum((probability - right)[place == n])) for n in range(bins)]
    return float(sum(gaps) / len(right))


def measure(
    num_people: int, *, clips: int, width: int, within: float, seed: int, others: int = 0
) -> Found:
    """Enrols people, and searches clips of them, as many of strangers, and `others`."""
    rng = np.random.default_rng(seed)
    x = embeddings.exact(rng, num_people, clips + 2, width, within)
    labels = np.repeat(np.arange(1, num_people + 1), clips)
    enrolled = x[:, :clips].reshape(-1, width)
    front = backend_lib.fit({"face": enrolled}, labels, centred=False)
    part, settings = front.parts[0], front.settings
    assert part.space is not None
    sums = two_covariance.make_sums(backend_lib.unit(part, enrolled), labels, num_people + 1)
    space, people = plda_fit.to_device_arrays(
        part.space, two_covariance.enrol(part.space, sums.count, sums.total), jnp.dtype("float32")
    )

    def logs_of(queries: np.ndarray) -> np.ndarray:
        some = jnp.asarray(backend_lib.unit(part, queries), jnp.float32)
        ratios = plda_fit.log_ratios(space, people, some)[None]
        every = jnp.ones((1, len(some)), bool)
        scores = plda_fit.combine_modalities(ratios, people.known[None], every, settings)
        return np.asarray(jax.nn.log_softmax(scores))

    def strangers(count: int) -> np.ndarray:
        return logs_of(embeddings.exact(rng, count, 1, width, within)[:, 0])

    places = rng.permutation(2 * num_people)[:MOST]
    known = logs_of(x[:, clips:].reshape(-1, width)[places])
    logs = np.concatenate([known, strangers(len(places))])
    answers = np.concatenate([1 + places // 2, np.zeros(len(places), int)])
    best, right = logs[:, 1:].max(axis=1), 1 + logs[:, 1:].argmax(axis=1) == answers
    alarms = np.nan
    if others:
        score = metrics.find_threshold(strangers(MOST)[:, 1:].max(axis=1), fpir=0.01)
        some = [strangers(MOST)[:, 1:].max(axis=1) for _ in range(others // MOST)]
        alarms = float(np.mean(np.concatenate(some) >= score))
    error, new = calibration_error(np.exp(best), right), float(np.mean(np.exp(logs[:, 0])))
    return Found(new, error, alarms, float(np.mean(right[: len(known)])), settings)


def main() -> None:
    common.parse(__doc__)
    sys.stdout.write("people clips width within   P(new)    ECE  named at 1 %  right   settings\n")
    for people, clips, width, within in CASES:
        found = measure(people, clips=clips, width=width, within=within, seed=0, others=10_000)
        shown = " ".join(f"{value:.2f}" for value in found.settings)
        sys.stdout.write(
            f"{people:6} {clips:5} {width:5} {within:6.2f}   {found.new:6.3f} {found.error:6.3f}  "
            f"{100 * found.alarms:10.2f} %  {found.right:5.3f}   {shown}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
