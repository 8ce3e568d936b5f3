"""Answers of a gallery: when a clip gets a name, and how answers are shown and written.

A clip gets a name from a chosen probability on, or from one that few strangers reach.

The columns of .tsv and .csv are clip, identity, probability, score, best_1, probability_1, ... A
line of .jsonl is {"clip", "identity", "probability", "score", "best": [...], "evidence": [...]}.
The identity of an unknown person is null, or an empty cell. The score is the logarithm of the
probability; for a clip without a usable frame it is -inf, in .jsonl null.
"""

import itertools
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from vidjax.apps import bulk
from vidjax.core import metrics
from vidjax.data.untrusted.names import clean_identity, is_unknown, show
from vidjax.utils import messages, tables
from vidjax.utils.errors import UserError, check_argument, named

if TYPE_CHECKING:
    from vidjax.apps.gallery.backend import Nearest
    from vidjax.data.memory import MemoryClips
    from vidjax.data.packing import Clips

DEFAULT_FPIR = 0.01  # where the user chooses nothing, and the strangers can show it
MIN_NAMED_PROBABILITY = 0.5  # a name is more probable than all other answers together
ABOVE_HALF = f"the probability is above {100 * MIN_NAMED_PROBABILITY:.0f} %"
UNKNOWN = "unknown "  # begins the name of a group of clips of somebody unknown
GROUP_COLUMNS = {"clip": "string", "identity": "string"}  # columns of a table of groups
IGNORED = "ignored"  # has no name and no number: somebody said so, or no face is clear
PLACE_COLUMNS = {
    "video": "string",
    "start": "string",
    "end": "string",
}  # more columns, where they help
NUM_TABLE_PEOPLE = 3  # identities of a line of the table
SCORE_ROUNDING = 1e-7  # a stranger's score may differ by this share between two batches of clips


class Answer(NamedTuple):
    """Who a clip shows.

    Attributes:
      identity: the person; None for unknown.
      probability: probability of the best identity; 0 for a clip without a usable frame.
      score: logarithm of the probability; it still differs where probabilities round to 1.
      best: the most probable identities with their probabilities, best first.
      evidence: the parts, as face and audio, in which the clip was compared with that person.
    """

    identity: str | None
    probability: float
    score: float
    best: tuple[tuple[str, float], ...]
    evidence: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Returns the answer as plain values for JSON; a score of -inf is None."""
        return {
            "identity": self.identity,
            "probability": self.probability,
            "score": self.score if math.isfinite(self.score) else None,
            "best": [{"identity": name, "probability": p} for name, p in self.best],
            "evidence": list(self.evidence),
        }


Answers = Mapping[str, Answer]  # clip -> answer
NOBODY = Answer(None, 0.0, -math.inf, ())


class Threshold(NamedTuple):
    """A threshold set on strangers, and how often strangers reach it.

    Attributes:
      fpir: the largest share of strangers that may get a name, as the user wants it.
      score: the threshold, a logarithm of the best identity's probability.
      num_identities: number of people that each stranger was compared with.
      num_alarms: number of the strangers that reach the threshold.
    """

    fpir: float
    score: float
    num_identities: int
    num_strangers: int
    num_alarms: int

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the interval in which the share of later strangers lies, at 95 %."""
        return metrics.fpir_interval(self.num_alarms, self.num_strangers)

    def to_dict(self) -> dict[str, object]:
        """Returns the threshold as plain values for JSON, with the interval."""
        return {**self._asdict(), **dict(zip(("low", "high"), self.interval, strict=True))}


class NamingRule(NamedTuple):
    """When a clip gets the name of its best identity.

    Attributes:
      by: `threshold`, if the user chose the lowest probability; `fpir`, if strangers set it; `new`,
        if there are too few strangers to set it. With `fpir` and `new`, a name also needs a
        probability above MIN_NAMED_PROBABILITY.
      score: logarithm of the lowest probability at which a clip gets a name.
      default: True if the user chose nothing.
      found: the threshold that strangers set; None except with `fpir`.
      about: the rule in words.
    """

    by: Literal["threshold", "fpir", "new"]
    score: float
    default: bool
    threshold: Threshold | None
    about: str

    def names(self, best: np.ndarray | float) -> np.ndarray:
        """Returns True where a clip gets a name, given log p of the best identity."""
        best = np.asarray(best)
        passes = (best >= self.score) & (best > -np.inf)
        return (
            passes if self.by == "threshold" else passes & (best > math.log(MIN_NAMED_PROBABILITY))
        )

    def answer(self, found: "Nearest", *, cards: bool) -> Answer:
        """Returns who a clip shows, of its most probable people, whom `cards` or a run compares."""
        if not found.best:
            return NOBODY
        name, score = found.best[0]
        best = tuple((name, math.exp(log)) for name, log in found.best)
        evidence = found.compared if self.names(score) else ()
        # By cards, a lone person of other parts is as probable as somebody new.
        known = self.names(score) and (evidence or not cards)
        return Answer(name if known else None, best[0][1], score, best, evidence)


def check_choice(fpir: float | None, threshold: float | None) -> None:
    """Refuses a `fpir` that is not in (0, 1), a `threshold` not in (0, 1], and both together."""
    for name, value in (("fpir", fpir), ("threshold", threshold)):
        check_argument(name, value, (numbers.Real, type(None)), "a number, or None")
    if fpir is not None and threshold is not None:
        raise UserError(
            "fpir and threshold: choose one\nfpir is a share of strangers, threshold a probability"
        )
    if threshold is not None and not 0 < threshold <= 1:
        raise UserError(
            f"threshold={threshold:g}: name a probability above 0 and at most 1, e.g. 0.5"
        )
    if fpir is not None and not 0 < fpir < 1:
        raise UserError(f"fpir={fpir:g}: name a rate above 0 and below 1, e.g. 0.01")


def count_needed_strangers(fpir: float) -> int:
    """Returns the least number of strangers that can set a threshold of this rate: 1 / fpir - 1."""
    return math.ceil(min(1 / fpir, 1e18) - 1e-9) - 1


def check_strangers(count: int, fpir: float) -> None:
    """Raises ValueError unless `count` strangers are enough for a threshold of rate `fpir`."""
    check_choice(fpir, None)
    if count < count_needed_strangers(fpir):
        raise UserError(
            f"fpir={fpir:g} needs {count_needed_strangers(fpir):,} clips of strangers or more, "
            f"the gallery has {count:,}\n"
            "ask for a higher rate, enrol more strangers, or choose a probability: threshold"
        )


def threshold(best: np.ndarray, fpir: float, num_identities: int) -> Threshold:
    """Returns the lowest threshold that a new stranger reaches with probability `fpir` at most.

    `best` [S] float64 is the logarithm of the best identity's probability for each of S strangers.
    Fewer than 1 / fpir - 1 strangers are a UserError.

    Source: FPIR of ISO/IEC 19795-1.
    """
    check_strangers(len(best), fpir)
    score = metrics.threshold_of(best, fpir=fpir)
    assert score is not None  # there are strangers enough
    score += SCORE_ROUNDING * abs(score)
    return Threshold(fpir, score, num_identities, len(best), int(np.sum(best >= score)))


def name_groups(clips: Sequence[str], labels: np.ndarray) -> dict[str, str]:
    """Returns clip -> `unknown N` of labels [N] int; larger groups have lower numbers."""
    found, first, counts = np.unique(labels, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    number = {int(found[row]): place + 1 for place, row in enumerate(order.tolist())}
    return {c: f"{UNKNOWN}{number[label]}" for c, label in zip(clips, labels.tolist(), strict=True)}


def parse_group_number(group: str) -> int:
    """Returns N of `unknown N`, the name of a group."""
    return int(group.removeprefix(UNKNOWN))


def write_groups(
    path: Path, groups: Mapping[str, str], places: Mapping[str, tuple[str, str, str]] | None = None
) -> None:
    """Writes clip -> name of its group to a new table, in which a user writes names of people.

    `places` are clip -> the cells of PLACE_COLUMNS, of all clips; None for a table without them.
    """
    order = sorted(groups.items(), key=lambda pair: (parse_group_number(pair[1]), pair[0]))
    rows = ((*pair, *places[pair[0]]) if places else pair for pair in order)
    tables.write(path, GROUP_COLUMNS | PLACE_COLUMNS if places else GROUP_COLUMNS, rows, ())


def read_groups(path: Path, *, unknown: bool = False) -> dict[str, str]:
    """Returns clip -> person of a table of groups, with `unknown` also those without a name.

    Columns after the first two are not read. A line that is wrong is a UserError.
    """
    found: dict[str, str] = {}
    for number, cells in tables.read_tsv(path):
        if cells[:2] == [*GROUP_COLUMNS]:
            continue
        if len(cells) < 2 or not all(map(str.strip, cells[:2])):
            raise UserError(f"{path}: line {number}: wanted CLIP, a tab, and a name")
        with named(f"{path}: line {number}"):
            clip, identity = cells[0].strip(), clean_identity(cells[1].strip())
        if found.setdefault(clip, identity) != identity:
            raise UserError(f"{path}: line {number}: clip '{show(clip)}' has two names: keep one")
    return {n: name for n, name in found.items() if unknown or not is_unknown(name)}


def table(answers: Answers) -> list[str]:
    """Returns lines of text: clip, answer, and the best identities with their probabilities."""
    rows = [("clip", "identity", "most probable")]
    for clip, answer in answers.items():
        best = ", ".join(f"{name} {share(p)}" for name, p in answer.best[:NUM_TABLE_PEOPLE])
        rows.append((clip, answer.identity or "unknown", best or "no usable frame"))
    return [f"  {line}" for line in messages.aligned(rows)]


def share(value: float) -> str:
    """Returns a probability or a rate in per cent: 2 significant digits, from 99 % on 4."""
    percent = 100 * value
    if percent >= 99:
        return f"{percent:.4g} %" if percent < 99.99 else "> 99.99 %"
    return f"{percent:.2g} %" if percent >= 0.01 else "< 0.01 %"


def describe_rule(rule: NamingRule) -> dict[str, str]:
    """Returns label -> text of the rows that say when a clip gets a name."""
    chosen = " (nothing was chosen: --fpir=R or --threshold=P)" if rule.default else ""
    return {"named if": rule.about + chosen, **(describe(rule.threshold) if rule.threshold else {})}


def rule_as_json(rule: NamingRule) -> dict[str, object]:
    """Returns a rule, which says when a clip gets a name, as plain values for JSON."""
    score = rule.score if math.isfinite(rule.score) else None
    return {"by": rule.by, "score": score, "default": rule.default, "about": rule.about}


def describe(found: Threshold) -> dict[str, str]:
    """Returns label -> text of the rows that describe a threshold."""
    low, high = map(share, found.interval)
    return {
        "threshold": f"{share(math.exp(min(found.score, 0.0)))} (logarithm {found.score:.6g})",
        "people": f"{found.num_identities:,}",
        "strangers": f"{found.num_strangers:,}, of whom {found.num_alarms:,} reach it",
        "rate": f"{low} to {high} at 95 % confidence",
    }


def write(path: Path, answers: Answers) -> None:
    """Writes answers to a new file, see `vidjax.utils.tables.write`."""
    most = max((len(answer.best) for answer in answers.values()), default=0)
    objects = itertools.starmap(as_json, answers.items())
    tables.write(path, _kinds(most), _rows(answers, most), objects)


class Identify(bulk.Work):
    """Makes the columns of a table of answers, by a gallery; `options` are those of `identify`."""

    def columns(self, clips: "MemoryClips | Clips") -> tables.Columns:
        """Returns who clips show."""
        answers = self.trained.identify(clips, **self.options)
        most = min(int(self.options.get("k") or 5), len(self.trained.identities))
        return tables.by_column(_kinds(most), list(_rows(answers, most)))


def _kinds(most: int) -> dict[str, str]:
    kinds = {"clip": "string", "identity": "string", "probability": "float64", "score": "float64"}
    for place in range(1, most + 1):
        kinds |= {f"best_{place}": "string", f"probability_{place}": "float64"}
    return kinds


def _rows(answers: Answers, most: int) -> Iterator[tuple[object, ...]]:
    for clip, answer in answers.items():
        best = [cell for pair in answer.best for cell in pair]
        empty = [None] * (2 * most - len(best))
        yield clip, answer.identity, answer.probability, answer.score, *best, *empty


def as_json(clip: str, answer: Answer) -> dict[str, object]:
    """Returns an answer as plain values for JSON."""
    return {"clip": clip, **answer.to_dict()}
