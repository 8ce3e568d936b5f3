"""When a clip gets a name: from a chosen probability on, or one that few strangers reach."""

import math
from typing import Literal, NamedTuple

import numpy as np

from vidjax import metrics
from vidjax.errors import UserError

DEFAULT_FPIR = 0.01  # where the user chooses nothing, and the strangers can show it


class Threshold(NamedTuple):
    """A threshold set on strangers, and how often strangers reach it.

    Attributes:
      fpir: the largest share of strangers that may get a name, as the user wants it.
      score: the threshold, a logarithm of the best identity's probability.
      num_identities: number of people that each stranger was compared with.
      num_alarms: number of the strangers that reach the threshold.
      low, high: 95 % confidence interval of the share of later strangers that reach it.
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
      by: `threshold`, if the user chose the lowest probability; `fpir`, if strangers set it; `new`,
        if there are too few strangers to set it. With `fpir` and `new`, a clip gets no name where
        somebody new is more probable.
      score: logarithm of the lowest probability at which a clip gets a name.
      default: True if the user chose nothing.
      found: the threshold that strangers set; None except with `fpir`.
      about: the rule in words.
    """

    by: Literal["threshold", "fpir", "new"]
    score: float
    default: bool
    found: Threshold | None
    about: str

    def names(self, best: np.ndarray | float, new: np.ndarray | float) -> np.ndarray:
        """Returns True where a clip gets a name, given log p of the best identity and of new."""
        best = np.asarray(best)
        passes = (best >= self.score) & (best > -np.inf)
        return passes if self.by == "threshold" else passes & (best >= new)


NEW = "nobody new is more probable"


def rule_of_probability(probability: float) -> Rule:
    """Returns the rule that names a clip whose best identity has this probability or more."""
    check_probability(probability)
    about = f"the probability is {100 * probability:.3g} % or more"
    return Rule("threshold", math.log(probability), False, None, about)


def rule_of_strangers(found: Threshold, *, default: bool = False) -> Rule:
    """Returns the rule of a threshold that was set on strangers."""
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
    """Raises ValueError unless 0 < probability <= 1."""
    if not 0 < probability <= 1:
        raise UserError(
            f"threshold={probability:g}: name a probability above 0 and at most 1, e.g. 0.5"
        )


def check_rate(fpir: float) -> None:
    """Raises ValueError unless 0 < fpir < 1."""
    if not 0 < fpir < 1:
        raise UserError(f"fpir={fpir:g}: name a rate above 0 and below 1, e.g. 0.01")


def needed(fpir: float) -> int:
    """Returns the least number of strangers that can set a threshold of this rate: 1 / fpir."""
    return math.ceil(1 / fpir - 1e-9)


def check_strangers(count: int, fpir: float) -> None:
    """Raises ValueError unless `count` strangers are enough for a threshold of rate `fpir`."""
    check_rate(fpir)
    if count < needed(fpir):
        raise UserError(
            f"fpir={fpir:g} needs {needed(fpir):,} clips of strangers or more, the gallery has "
            f"{count:,}\nask for a higher rate, enrol more strangers, or choose a probability: "
            "threshold"
        )


def threshold(best: np.ndarray, fpir: float, num_identities: int) -> Threshold:
    """Returns the lowest threshold that at most a share `fpir` of S strangers reaches.

    `best` [S] float64 is the logarithm of the best identity's probability for each stranger. Fewer
    than 1 / fpir strangers are a UserError.

    Source: FPIR of ISO/IEC 19795-1.
    """
    check_strangers(len(best), fpir)
    score = metrics.threshold_of(best, fpir=fpir)
    alarms = int(np.sum(best >= score))
    low, high = metrics.fpir_interval(alarms, len(best))
    return Threshold(fpir, score, num_identities, len(best), alarms, low, high)
