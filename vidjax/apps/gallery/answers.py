"""Decides which clips get a name, and writes the answers of a gallery to tables.

A clip gets the name of its most probable person if the probability reaches a threshold. The user
can choose the threshold. By default, the threshold is measured on strangers, clips of people who
are not enrolled. With a measured threshold, the person must also be more probable than all other
enrolled people together. If there are too few strangers, the probability must be above 0.5.

A .tsv or .csv table has the columns clip, identity, probability, score, best_1, probability_1, ...
A line of .jsonl has the fields clip, identity, probability, score, best and evidence, see `Answer`.
The identity of an unknown person is an empty cell, or null in .jsonl. The score is the logarithm of
the probability. If a clip has no usable frame, the score is -inf, or null in .jsonl.
"""

import itertools
import math
import numbers
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vidjax.apps import bulk
from vidjax.apps.gallery import card_notes, grouping, index as index_lib
from vidjax.apps.gallery.store import State
from vidjax.apps.gallery.vectors import Advance, Vectors, select_usable_clips
from vidjax.core import metrics
from vidjax.data import labels
from vidjax.data.memory import MemoryClips
from vidjax.data.packing import Clips
from vidjax.evaluation import topk
from vidjax.utils import messages, tables
from vidjax.utils.errors import UserError, check_argument
from vidjax.utils.groups import group_by_key
from vidjax.utils.names import is_unknown

DEFAULT_FPIR = 0.01  # false positive identification rate, if there are enough strangers
MIN_NAMED_PROBABILITY = 0.5  # above it, a name is more probable than all other answers together
ABOVE_HALF = f"the probability is above {100 * MIN_NAMED_PROBABILITY:.0f} %"
# From here to MIN_NAMED_PROBABILITY, an unknown clip is doubtful. The number is our choice.
MIN_DOUBTFUL_PROBABILITY = 0.1
DOUBTFUL = f"{100 * MIN_DOUBTFUL_PROBABILITY:.0f} to {100 * MIN_NAMED_PROBABILITY:.0f} %"
UNKNOWN = "unknown "  # the name of a group of unknown people starts with this word
FACE = "unknown face "  # the name of an unclear face, which is in no group, starts with these words
# At a lower probability of its name, a clip leaves its group. We measured this on films: at 0.5,
# groups give no more right names than single clips; at 0.05, more strangers get a lookalike's name.
LEAST_OWN_PROBABILITY = 0.1
OTHER_CLIPS = "clips"  # the evidence for a clip that would have no name without its group
GROUP_COLUMNS = {"clip": "string", "identity": "string"}  # columns of a table of groups
# Optional columns after GROUP_COLUMNS: the video of a clip, and its times.
PLACE_COLUMNS = dict.fromkeys(("video", "start", "end"), "string")
NUM_TABLE_PEOPLE = 3  # best identities that a line of text lists
RANK_ROWS = 64  # clips that are ranked together
# The share of strangers with a probability above 0.5 in galleries of nets, see the benchmarks
# `calibration` and `decision`.
OF_STRANGERS = "2 to 7 %"
# If a gallery has more than this many times the people to whom its run was fitted, many known clips
# get no name. In a simulation with 500 times the people, it was every second clip.
MAX_GROWTH = 20
# The score of a clip depends on the batch of clips that it is in, by at most this relative error.
SCORE_ROUNDING = 1e-7


class Answer(NamedTuple):
    """The answer for a clip.

    Attributes:
      identity: the person; None if unknown.
      probability: the probability of the most probable identity; 0 if the clip has no usable frame.
      score: the logarithm of the probability. The scores of two clips differ even if
        both probabilities round to 1.
      best: (identity, probability) of the most probable identities, best first.
      evidence: a tuple of words: the modalities, such as face, that the clip and `identity` have in
        common. If the clip got the name only because of other clips (see `groups` of
        `Gallery.identify`), the tuple also contains `clips`. If a user has named the face in a
        film, or has said that the face is a stranger, the tuple is (`told`,). For any other unknown
        person, the tuple is empty.
    """

    identity: str | None
    probability: float
    score: float
    best: tuple[tuple[str, float], ...]
    evidence: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Returns the fields as values for JSON. A score of -inf becomes None."""
        return {
            "identity": self.identity,
            "probability": self.probability,
            "score": self.score if math.isfinite(self.score) else None,
            "best": [{"identity": name, "probability": p} for name, p in self.best],
            "evidence": list(self.evidence),
        }


Answers = Mapping[str, Answer]  # clip -> answer
NOBODY = Answer(None, 0.0, -math.inf, ())


def join_answers(
    vote: Answer, own: Sequence[Answer], least: float = LEAST_OWN_PROBABILITY
) -> list[Answer]:
    """Returns an answer for each clip of a group. The group probably shows one person.

    Let P be the person in `vote`. The first line that applies gives the answer for a clip:

        `vote` has no person                       `vote`
        no answer in `own` has the person P        the answer for the clip in `own`
        the clip's probability of P is low         the answer for the clip in `own`
        otherwise                                  `vote`, with at most the clip's probability of P

    Args:
      vote: the answer for all clips of the group together.
      own: the answer for each single clip, with at least 10 identities in `Answer.best`.
      least: the lowest probability of P with which a clip can get the name from other clips.
    """
    if vote.identity is None:
        return [vote] * len(own)
    if all(x.identity != vote.identity for x in own):
        return list(own)
    return [_join_answer(vote, x, least) for x in own]


def _join_answer(vote: Answer, own: Answer, least: float) -> Answer:
    probability = dict(own.best).get(str(vote.identity), 0.0)
    if probability < least:
        return own
    if probability >= vote.probability:
        return vote
    others = [pair for pair in own.best if pair[0] != vote.identity]
    best = ((str(vote.identity), probability), *others)
    rests_on = () if own.identity == vote.identity else (OTHER_CLIPS,)
    return vote._replace(
        probability=probability, score=math.log(probability), best=best,
        evidence=vote.evidence + rests_on,
    )  # fmt: skip


class Threshold(NamedTuple):
    """A threshold that was measured on the strangers of a gallery.

    Attributes:
      fpir: the false positive identification rate that the user chose: the largest share of new
        strangers that may get a name.
      score: the threshold, for the log-probability of the most probable identity.
      num_identities: the number of enrolled people. Each stranger was compared with them.
      num_strangers: the number of clips of strangers.
      num_alarms: the number of clips of strangers that reach the threshold.
    """

    fpir: float
    score: float
    num_identities: int
    num_strangers: int
    num_alarms: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval (low, high) of the share of strangers above the threshold."""
        return metrics.fpir_interval(self.num_alarms, self.num_strangers)

    def to_dict(self) -> dict[str, object]:
        """Returns values for JSON: the attributes, and `interval` as `low` and `high`."""
        return {**self._asdict(), **dict(zip(("low", "high"), self.interval, strict=True))}

    def describe(self) -> dict[str, str]:
        """Returns the lines that describe the threshold for the user: label -> text."""
        low, high = map(share, self.interval)
        return {
            "threshold": f"{describe_probability(self.score)} (logarithm {self.score:.6g})",
            "people": f"{self.num_identities:,}",
            "strangers": f"{self.num_strangers:,}, of whom {self.num_alarms:,} reach it",
            "rate": f"{low} to {high} at 95 % confidence",
        }


class Rule(NamedTuple):
    """The rule that decides if a clip gets a name, or if `Gallery.verify` accepts a comparison.

    Attributes:
      by: the kind of the rule.
        `threshold`: the probability must reach a threshold that the user chose.
        `fpir`: the probability must reach a threshold measured on strangers, and be higher than the
          probability of all other enrolled people together.
        `new`: the probability must be above 0.5, as there are too few strangers to measure.
        `measured`: the log-likelihood ratio must reach a threshold measured on strangers.
        `model`: the ratio must reach a computed threshold, as there are too few strangers.
        `blind`: nothing is accepted, because the vectors do not separate people.
      score: the logarithm of the lowest probability, or the lowest log-likelihood ratio.
      default: True if the user chose no rule.
      threshold: for the kinds `fpir` and `measured`, how the threshold was measured; else None.
      about: a description of the rule for the user.
      fmr: for `measured` and `model`, the largest share of other people's clips to accept.
    """

    by: Literal["threshold", "fpir", "new", "measured", "model", "blind"]
    score: float
    default: bool
    threshold: Threshold | None
    about: str
    fmr: float | None = None

    def names(self, best: np.ndarray | float, others: np.ndarray | float = -math.inf) -> np.ndarray:
        """Returns bool [...], True if a clip gets a name, or a comparison is accepted.

        `best` [...] is the log-probability of the most probable person of each clip, or the log
        ratio of each comparison. `others` [...] is the log-probability that the clip shows one of
        the other enrolled people.
        """
        best = np.asarray(best)
        if self.by != "fpir":
            return best > self.score if self.by == "new" else best >= self.score
        # A measured threshold may be far below 0.5. It separates people from strangers, but does
        # not show which of two similar people a clip shows.
        return (best >= self.score) & (best > others)

    def to_dict(self) -> dict[str, object]:
        """Returns the rule as values for JSON. `to_entries` adds the threshold of `fpir`."""
        score = self.score if math.isfinite(self.score) else None
        if self.fmr is None:
            values = {"score": score, "probability": math.exp(min(self.score, 0.0))}
            return {"by": self.by, **values, "default": self.default, "about": self.about}
        limit = self.threshold
        ends = dict(zip(("low", "high"), limit.interval, strict=True)) if limit else {}
        counts = limit and {"comparisons": limit.num_strangers, "alarms": limit.num_alarms}
        measured = counts and counts | ends
        values = {"fmr": self.fmr, "log_ratio": score, "measured": measured}
        return {"by": self.by, **values, "about": self.about}

    def to_entries(self) -> dict[str, object]:
        """Returns values for JSON: the rule as `rule`, and the measured threshold as `threshold`.

        `threshold` is None if no threshold was measured.
        """
        limit = self.threshold
        return {"rule": self.to_dict(), "threshold": limit and limit.to_dict()}

    def describe(self, doubtful: int = 0) -> dict[str, str]:
        """Returns the lines that describe the rule for the user: label -> text.

        `doubtful` is the number of clips that nearly get a name, see `count_doubtful`.
        """
        limit = self.threshold
        rows = limit.describe() if limit else {}
        if self.fmr is not None:
            measured = {
                "false matches": f"{rows['rate']}, measured on {limit.num_strangers:,} "
                f"comparisons, of which {limit.num_alarms:,} reach it"
            } if limit else {}  # fmt: skip
            return {"accepted if": self.about, **measured}
        can_choose = self.default and math.isfinite(self.score)
        chosen = " (to choose another rule: --fpir=R or --threshold=P)" if can_choose else ""
        rows = {"named if": self.about + chosen, **rows}
        if self.by == "new" and doubtful:
            wanted = count_needed_strangers(DEFAULT_FPIR)
            rows["doubtful"] = (
                f"{messages.count(doubtful, 'unknown clip')}, whose best person has {DOUBTFUL}; "
                f"with {wanted} clips of strangers, a measured limit decides"
            )
        return rows

    def answer(self, nearest: index_lib.Nearest, *, cards: bool) -> Answer:
        """Returns the answer for a clip.

        `nearest` are the most probable people of the clip. `cards` is True if `Gallery.of_models`
        made the gallery, without a training run. Such a gallery gives a name only if the clip and
        the person have a modality, such as face, in common.
        """
        if not nearest.best:
            return NOBODY
        name, score = nearest.best[0]
        best = tuple((name, math.exp(log)) for name, log in nearest.best)
        # In a gallery of nets, the most probable person may have no modality of the clip.
        is_named = self.names(score, nearest.others) and (nearest.compared or not cards)
        evidence = nearest.compared if is_named else ()
        return Answer(name if is_named else None, best[0][1], score, best, evidence)


def check_rate(name: str, rate: float | None) -> None:
    """Raises UserError if `rate` is a number outside (0, 1). `name` is its name in the message."""
    check_argument(name, rate, (numbers.Real, type(None)), "a number, or None")
    if rate is not None and not 0 < rate < 1:
        raise UserError(f"{name}={rate:g} is not a rate: give a number above 0 and below 1")


def check_choice(fpir: float | None, threshold: float | None) -> None:
    """Checks `fpir` (false positive identification rate) and `threshold` (a probability).

    Either of them decides which clips get a name. Raises UserError if `fpir` is not in (0, 1), if
    `threshold` is not in (0, 1], or if both are given.
    """
    check_rate("fpir", fpir)
    check_argument("threshold", threshold, (numbers.Real, type(None)), "a number, or None")
    if fpir is not None and threshold is not None:
        raise UserError(
            "fpir and threshold cannot be used together: give one of them\n"
            "fpir limits the share of strangers who get a name; threshold is the lowest "
            "probability of a name"
        )
    if threshold is not None and not 0 < threshold <= 1:
        raise UserError(
            f"threshold={threshold:g} is not a probability: give a number above 0 and at most 1"
        )


def count_needed_strangers(fpir: float) -> int:
    """Returns how many clips of strangers are needed to measure a threshold for `fpir`.

    `fpir` is the largest share of new strangers that may get a name. The result is at least 1.
    """
    return max(1, math.ceil(min(1 / fpir, 1e18) - 1e-9) - 1)


def measure_threshold(best: np.ndarray, fpir: float, num_identities: int) -> Threshold:
    """Returns the threshold at which at most a share `fpir` of new strangers gets a name.

    `best` [S] float64 is the log-probability of the most probable person for each of S strangers,
    who were compared with `num_identities` people. The caller has checked the number S, see
    `count_needed_strangers`.

    Source: FPIR of ISO/IEC 19795-1.
    """
    score = metrics.find_threshold(best, fpir=fpir)
    assert score is not None  # there are enough strangers
    score += SCORE_ROUNDING * abs(score)
    return Threshold(fpir, score, num_identities, len(best), int(np.sum(best >= score)))


class NobodyError(UserError):
    """No clip can be identified, because nobody is enrolled."""


def require_people(state: State) -> None:
    """Raises NobodyError if nobody is enrolled."""
    if not state.index.names:
        raise NobodyError("nobody is enrolled in the gallery\nenrol people: vidjax gallery enrol")


def measure_on_strangers(state: State, fpir: float) -> Threshold:
    """Compares all clips of strangers with all people; returns the threshold for `fpir`.

    Raises UserError if nobody is enrolled, or there are fewer than 1 / fpir - 1 clips of strangers.
    """
    require_people(state)
    check_rate("fpir", fpir)
    strangers, needed = state.strangers, count_needed_strangers(fpir)
    if len(strangers) < needed:
        raise UserError(
            f"fpir={fpir:g} needs at least {needed:,} clips of strangers, but the gallery has "
            f"{len(strangers):,}\n"
            "choose a higher fpir, enrol more strangers, or choose a threshold instead"
        )

    def compare() -> np.ndarray:
        nearest = state.index.nearest(state.stack_parts(strangers), 1)
        # A stranger who equals the centre of all vectors resembles nobody.
        return np.array([match.best[0][1] if match.best else -math.inf for match in nearest])

    best = state.index.remember("strangers", compare)
    return measure_threshold(best, fpir, len(state.index.names))


def choose_rule(state: State, fpir: float | None, threshold: float | None) -> Rule:
    """Returns the rule that decides if a clip gets a name.

    For `fpir` and `threshold`, see `Gallery.identify`. At most one of them is given.
    """
    require_people(state)
    check_choice(fpir, threshold)
    if about := card_notes.REFUSED.get(card_notes.compare(state).problem):
        is_default = fpir is None and threshold is None
        return Rule("blind", math.inf, is_default, None, about)
    if threshold is not None:
        about = f"the probability is {100 * threshold:.10g} % or more"
        return Rule("threshold", math.log(threshold), False, None, about)
    wanted = count_needed_strangers(DEFAULT_FPIR)
    strangers = len(state.strangers)
    if fpir is None and strangers < wanted:
        about = ABOVE_HALF
        about += f", which {OF_STRANGERS} of strangers reach" if state.origin.cards else ""
        about += f"; with {wanted} clips of strangers instead of {strangers}, at most "
        about += f"{100 * DEFAULT_FPIR:g} % of new strangers would get a name"
        if not state.origin.cards:
            about += _describe_growth(state)
        return Rule("new", math.log(MIN_NAMED_PROBABILITY), True, None, about)
    limit = measure_on_strangers(state, DEFAULT_FPIR if fpir is None else fpir)
    about = f"the probability is {describe_probability(limit.score)} or more, "
    about += f"which at most {100 * limit.fpir:.10g} % of new strangers reach, and is higher "
    about += "than the probability of all other enrolled people together"
    return Rule("fpir", limit.score, fpir is None, limit, about)


def _describe_growth(state: State) -> str:
    """Returns a warning if a gallery has far more people than its parameters were fitted to.

    Otherwise, returns "".
    """
    fitted = state.index.remember(
        "fitted", lambda: len({x.identity for x in state.clips.values() if x.fitted and x.identity})
    )
    if not 0 < MAX_GROWTH * fitted < (people := len(state.index.names)):
        return ""
    return (
        f". The probabilities were fitted to {fitted:,} people, so with {people:,} people, many "
        "known clips get no name"
    )


def identify(
    state: State,
    rule: Rule,
    vectors: Vectors,
    k: int,
    groups: Mapping[str, str] | None,
    advance: Advance,
) -> dict[str, Answer]:
    """Identifies the person in each clip by `rule`; returns clip -> answer.

    `vectors` are the vectors of the clips. For the other arguments, see `Gallery.identify`.
    """
    parts, owner = list(vectors.parts.values()), np.arange(len(vectors.names))
    if groups is not None:
        # The bool distinguishes a clip without a group from a group with the name of the clip.
        keys = [(n in groups, groups.get(n, n)) for n in vectors.names]
        place = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        owner = np.array([place[key] for key in keys], int)
    nearest = state.index.nearest(parts, k, owner if groups is not None else None)
    by_owner, counts = list[Answer](), np.bincount(owner)
    for match, num_clips in zip(nearest, counts.tolist(), strict=True):
        by_owner.append(rule.answer(match, cards=bool(state.origin.cards)))
        advance(num_clips)
    answers = {clip: by_owner[row] for clip, row in zip(vectors.names, owner, strict=True)}
    # A group without a name needs no comparison of its clips. At most 10 people have a
    # probability of at least 0.1.
    named = np.array([answer.identity is not None for answer in by_owner], bool)
    shared = np.flatnonzero((counts > 1)[owner] & named[owner])
    singly = state.index.nearest([x[shared] for x in parts], max(k, 10))
    own = [rule.answer(match, cards=bool(state.origin.cards)) for match in singly]
    pairs = zip(owner[shared].tolist(), zip(shared.tolist(), own, strict=True), strict=True)
    # Low probabilities from a card that nobody has measured mean nothing.
    least = MIN_NAMED_PROBABILITY if state.origin.unmeasured else LEAST_OWN_PROBABILITY
    for group, clips in group_by_key(pairs).items():
        rows, single = zip(*clips, strict=True)
        joined = join_answers(by_owner[group], single, least)
        for row, answer in zip(rows, joined, strict=True):
            if rule.by != "new" and not rule.names(answer.score):  # a promise for single clips
                answer = answer._replace(identity=None, evidence=())
            answers[vectors.names[row]] = answer._replace(best=answer.best[:k])
    return answers


def rank(
    state: State, rule: Rule, vectors: Vectors, advance: Advance
) -> dict[str, list[tuple[str, float]]]:
    """Lists the most probable clips of each person: returns identity -> list of (clip, score).

    If `rule.default` is True, `rule` has no effect. If it is False, a list contains only clips to
    which `rule` gives the name of the person. For `advance`, see `Gallery.rank`.
    """
    searched = state.index
    identities = labels.sort_identities(searched.names)
    row = {name: number for number, name in enumerate(searched.names)}
    columns = np.array([1 + row[name] for name in identities])
    order = np.argsort(np.array(vectors.names, object), kind="stable")
    parts = [x[order] for x in vectors.parts.values()]
    logs, clip_has = searched.search(parts), np.array([x.any(axis=1) for x in parts])
    person_has = searched.counts[:, columns - 1] > 0

    def blocks() -> Iterator[topk.ScoreBlock]:
        for at in range(0, len(order), RANK_ROWS):
            scores = np.array([row[columns] for row in itertools.islice(logs, RANK_ROWS)])
            index = np.arange(at, at + len(scores), dtype=np.int32)
            if not rule.default:
                # float64 is needed: a threshold is hardly higher than a stranger's score.
                passes = rule.names(scores, _sum_others(scores))
                if state.origin.cards:  # as in `Rule.answer`
                    passes &= clip_has[:, index].T @ person_has
                scores[~passes] = -np.inf
            yield scores, index, np.ones(len(index), bool)
            advance(len(index))

    top = topk.rank(blocks(), len(columns))
    names = {place: vectors.names[row] for place, row in enumerate(order.tolist())}
    if not rule.default:
        top = top._replace(index=np.where(top.scores > -np.inf, top.index, topk.NO_CLIP))
    return topk.convert_to_lists(identities, names, top)


def _sum_others(scores: np.ndarray) -> np.ndarray:
    """For each of N people, returns the log-probability that a clip shows another enrolled person.

    `scores` [Q, N] are the log-probabilities of the people for Q clips. The result [Q, N] is exact
    for the most probable person of a clip, and a lower limit for all other people.
    """
    # Only the most probable person can be more probable than all others together. So for another
    # person, a lower limit is enough for `Rule.names` to deny the name.
    others = np.repeat(scores.max(axis=1, keepdims=True), scores.shape[1], axis=1)
    for row, best in enumerate(scores.argmax(axis=1).tolist()):
        others[row, best] = index_lib.sum_others(scores[row], best)
    return others


def group(
    state: State,
    vectors: Vectors,
    apart: Collection[tuple[str, str]] = (),
    **options: Any,  # noqa: ANN401
) -> dict[str, str]:
    """Groups clips that show the same person. For `apart` and `options`, see `Gallery.group`."""
    vectors, backend = vectors.only(select_usable_clips(vectors)), state.index.backend
    parts = [*vectors.parts.values()]
    labels = grouping.group(backend, vectors.names, parts, apart, **options).tolist()
    order = Counter(labels).most_common()  # equal counts are in the order of the clips
    number = {label: place for place, (label, _) in enumerate(order, 1)}
    return {c: f"{UNKNOWN}{number[x]}" for c, x in zip(vectors.names, labels, strict=True)}


def parse_group_number(group: str) -> int:
    """Returns the number of a group, such as 3 for `unknown 3` or `unknown face 3`."""
    return int(group.rpartition(" ")[2])


def count_unknown(groups: Iterable[str]) -> tuple[int, int, str]:
    """Counts the unknown people and the unclear faces in `groups`, the names of groups of clips.

    A name is `unknown 3` for a person, or `unknown face 4` for an unclear face. Returns the number
    of people, the number of unclear faces, and a text such as `2 people and 1 unclear face`.
    """
    names = {*groups}
    faces = sum(name.startswith(FACE) for name in names)
    people = len(names) - faces
    more = f" and {messages.count(faces, 'unclear face')}" if faces else ""
    return people, faces, f"{messages.count(people, 'person')}{more}"


def rank_group(group: str) -> tuple[bool, int]:
    """Returns a key that sorts `unknown 2`, `unknown 10` and `unknown face 1` in this order."""
    return group.startswith(FACE), parse_group_number(group)


def write_groups(
    path: Path, groups: Mapping[str, str], places: Mapping[str, tuple[str, str, str]] | None = None
) -> None:
    """Writes a table of clips and their groups, in which a user replaces groups by names of people.

    The ending of `path` is the format. `groups` are clip -> group, such as `unknown 1`. `places`
    are clip -> (video, start, end), the values of three more columns.
    """
    order = sorted(groups.items(), key=lambda pair: (rank_group(pair[1]), pair[0]))
    rows = ((*pair, *places[pair[0]]) if places else pair for pair in order)
    tables.write(path, GROUP_COLUMNS | PLACE_COLUMNS if places else GROUP_COLUMNS, rows, ())


def read_groups(path: Path, *, unknown: bool = False) -> dict[str, str]:
    """Reads a table of `write_groups` that a user has edited; returns clip -> person.

    Other tables of clips and people are read, too, see `labels.read_table`. Clips without a name
    are left out. If `unknown` is False, clips whose group is still called `unknown N` or `unknown
    face N` are left out, too. Raises UserError if a line is malformed, or a clip has two names.
    """
    names = labels.clean_labels(labels.read_table(path))
    return {clip: name for clip, name in names.items() if unknown or not is_unknown(name)}


def table(answers: Answers) -> Iterator[tuple[str, ...]]:
    """Yields a table of answers for the terminal: the heading, and a row for each clip."""
    yield "clip", "identity", "most probable"
    for clip, answer in answers.items():
        best = ", ".join(f"{name} {share(p)}" for name, p in answer.best[:NUM_TABLE_PEOPLE])
        nobody = "enrolled as a stranger" if answer.evidence else "no usable frame"
        yield clip, answer.identity or "unknown", best or nobody


def share(value: float) -> str:
    """Formats a share (0 to 1) in per cent, such as `0.89 %`: 2 digits, or 4 digits above 99 %."""
    percent = 100 * value
    if percent >= 99:
        return f"{percent:.4g} %" if percent < 99.99 else "> 99.99 %"
    return f"{percent:.2g} %" if percent >= 0.01 else "< 0.01 %"


def describe_probability(score: float) -> str:
    """Formats the probability exp(`score`) in per cent: 3 significant digits, or 10 above 99 %.

    The function `share` writes `> 99.99 %` and `< 0.01 %`. This function always writes the number.
    """
    percent = 100 * math.exp(min(score, 0.0))
    return f"{percent:.3g} %" if percent < 99 else f"{percent:.10g} %"


def count_doubtful(answers: Answers) -> int:
    """Counts the answers whose `identity` is None and whose `probability` is 0.1 to 0.5."""
    unknown = [answer.probability for answer in answers.values() if answer.identity is None]
    return sum(MIN_DOUBTFUL_PROBABILITY <= x <= MIN_NAMED_PROBABILITY for x in unknown)


def write(path: Path, answers: Answers) -> None:
    """Writes answers to a new file. Its ending, such as .csv or .jsonl, determines the format."""
    most = max((len(answer.best) for answer in answers.values()), default=0)
    objects = itertools.starmap(as_json, answers.items())
    tables.write(path, _list_kinds(most), _rows(answers, most), objects)


class Identify(bulk.TableTask):
    """Identifies the clips of a parquet table. For the arguments, see `TableTask`."""

    num_doubtful = 0  # of all tables, see `count_doubtful`

    def columns(self, clips: MemoryClips | Clips) -> tables.Columns:
        """Returns the answers for `clips` as a table: name of a column -> (type, values)."""
        answers = self.trained.identify(clips, **self.options)
        self.num_doubtful += count_doubtful(answers)
        most = min(int(self.options.get("k") or 5), len(self.trained.identities))
        return tables.to_columns(_list_kinds(most), list(_rows(answers, most)))


def _list_kinds(most: int) -> dict[str, str]:
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
    """Returns the name of a clip and the answer for this clip as values for JSON."""
    return {"clip": clip, **answer.to_dict()}
