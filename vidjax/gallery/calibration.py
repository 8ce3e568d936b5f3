"""When a clip gets a name: a probability that the user chose, or a rate at which strangers pass."""

import math
from typing import Literal, NamedTuple

import numpy as np

from vidjax import metrics
from vidjax.errors import UserError

DEFAULT_FPIR = 0.01  # where the user chooses nothing, and the strangers can show it


class Threshold(NamedTuple):
    """A threshold and what is known of its rate.

    Attributes:
      fpir: the wanted share of strangers who get a name.
      score: logarithm of the lowest probability at which the best identity is named.
      num_identities: people that each stranger was compared with.
      num_alarms: clips of strangers that reach it.
      low, high: interval of the rate for clips like these, at 95 % confidence.
    """

    fpir: float
    score: float
    num_identities: int
    num_strangers: int
    num_alarms: int
    low: float
    high: float


class Rule(NamedTuple):
    """When a clip gets the name of its best identity.

    Attributes:
      by: `threshold`, the user's probability; `fpir`, the score that a share of the strangers
        reaches; `new`, where there are too few strangers. Except for `threshold`, a clip also gets
        no name where somebody new is more probable.
      score: logarithm of the lowest probability of a name.
      default: True if the user chose nothing.
    """

    by: Literal["threshold", "fpir", "new"]
    score: float
    default: bool
    found: Threshold | None
    about: str

    def names(self, best: np.ndarray | float, new: np.ndarray | float) -> np.ndarray:
        """Returns where an identity is named, of logarithms of its probability and of new's."""
        best = np.asarray(best)
        passes = (best >= self.score) & (best > -np.inf)
        return passes if self.by == "threshold" else passes & (best >= new)


NEW = "nobody new is more probable"


def rule_of_probability(probability: float) -> Rule:
    """Returns the rule of a lowest probability."""
    check_probability(probability)
    about = f"the probability is {100 * probability:.3g} % or more"
    return Rule("threshold", math.log(probability), False, None, about)


def rule_of_strangers(found: Threshold, *, default: bool = False) -> Rule:
    """Returns the rule of a threshold that strangers have set."""
    about = f"at most {100 * found.fpir:.3g} % of strangers reach its probability, and {NEW}"
    return Rule("fpir", found.score, default, found, about)


def rule_of_new(num_strangers: int) -> Rule:
    """Returns the rule of a gallery that has too few strangers for the default rate."""
    about = (
        f"{NEW}; with {needed(DEFAULT_FPIR)} clips of strangers instead of {num_strangers} it "
        f"would hold {100 * DEFAULT_FPIR:g} % of them"
    )
    return Rule("new", -math.inf, True, None, about)


def check_probability(probability: float) -> None:
    """Raises ValueError unless a number is a lowest probability."""
    if not 0 < probability <= 1:
        raise UserError(
            f"threshold={probability:g}: name a probability above 0 and at most 1, e.g. 0.5"
        )


def check_rate(fpir: float) -> None:
    """Raises ValueError unless a number is a rate of false alarms."""
    if not 0 < fpir < 1:
        raise UserError(f"fpir={fpir:g}: name a rate above 0 and below 1, e.g. 0.01")


def needed(fpir: float) -> int:
    """Returns how many strangers can show a rate."""
    return math.ceil(1 / fpir - 1e-9)


def check_strangers(count: int, fpir: float) -> None:
    """Raises ValueError unless so many clips of strangers can show a rate."""
    check_rate(fpir)
    if count < needed(fpir):
        raise UserError(
            f"fpir={fpir:g} needs {needed(fpir):,} clips of strangers or more, the gallery has "
            f"{count:,}\nask for a higher rate, enrol more strangers, or choose a probability: "
            "threshold"
        )


def threshold(best: np.ndarray, fpir: float, num_identities: int) -> Threshold:
    """Sets a threshold on the best scores of strangers, and counts those that reach it.

    `best` is [S] float64, the logarithm of the best identity's probability of every stranger. Fewer
    than 1 / fpir strangers cannot show the rate: UserError.

    Source: FPIR of ISO/IEC 19795-1.
    """
    check_strangers(len(best), fpir)
    score = metrics.threshold_of(best, fpir=fpir)
    alarms = int(np.sum(best >= score))
    low, high = metrics.fpir_interval(alarms, len(best))
    return Threshold(fpir, score, num_identities, len(best), alarms, low, high)
