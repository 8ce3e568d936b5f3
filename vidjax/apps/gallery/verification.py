"""Decides if a clip shows a given person, or if two clips show the same person.

The log-likelihood ratio of a clip and a person is log(p(clip | the person) / p(clip | a stranger)),
as in `Gallery.identify`. For two clips, it is log(p(clips | one person) / p(clips | two people)).
The second ratio is symmetric. At even odds, which means that the same person is shown in half of
all comparisons, the probability of the same person is 1 / (1 + exp(-ratio)).

A clip is accepted if its ratio reaches a threshold. The false match rate (FMR) is the share of
clips of other people that reach the threshold. There are two ways to choose a threshold:

- Measured: the clips of strangers in the gallery are compared with the person. With S clips, the
  lowest rate that can be measured is 1 / (S + 1). For two clips, the strangers form S / 2 pairs, so
  that no two comparisons have a clip in common.
- By the model, if there are too few strangers: for the rate R, the threshold is a likelihood ratio
  of 1 / R. At most a share R of the clips of other people reaches this threshold, by Markov's
  inequality, because the mean likelihood ratio of these clips is 1. This holds only if the clips
  are distributed as the gallery assumes. If the enrolled people are closer to each other than the
  card (the JSON file of a net) states, the threshold for two clips is 1 / R or a threshold that is
  computed from the distances between the enrolled people, whichever is higher.
"""

import hashlib
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from vidjax.apps.gallery import answers as answers_lib, card_notes, grouping
from vidjax.apps.gallery.answers import Rule
from vidjax.apps.gallery.audit import audit
from vidjax.apps.gallery.backend import Backend
from vidjax.apps.gallery.changes import find_person
from vidjax.apps.gallery.store import State
from vidjax.apps.gallery.vectors import Vectors
from vidjax.models import card_backend, card_check
from vidjax.utils import tables
from vidjax.utils.errors import UserError, check_argument
from vidjax.utils.names import normal_form, show

DEFAULT_FMR = 0.01  # false match rate: 99 strangers can show it
MAX_PAIRS = 10_000  # of clips that are compared with each other
# If at most this many pairs of strangers seem to show one stranger, they are chance, and exchange
# clips with other pairs. If there are more, the rule says so.
MAX_DOUBLES = 3
MAX_COUNTED = 1000  # clips of strangers that are grouped, to count the strangers
MIN_STRANGERS = 0.6  # if strangers are fewer than this share of the needed number, the rule says so


class Match(NamedTuple):
    """The comparison of a clip with a person, or with another clip.

    Attributes:
      accepted: True if the ratio reaches the threshold.
      log_ratio: the natural logarithm of the likelihood ratio, or 0 if no modality is compared.
      probability: the probability of the same person, if the prior probability is 0.5.
      evidence: the compared modalities, such as face. If there is none, the clip is not accepted.
      best: the person's enrolled clip that fits this clip best, with the log ratio of the two
        clips. None if two clips are compared, or if no modality is compared.
      worst: in the same form, the person's enrolled clip that fits this clip worst.
    """

    accepted: bool
    log_ratio: float
    probability: float
    evidence: tuple[str, ...]
    best: tuple[str, float] | None = None
    worst: tuple[str, float] | None = None

    def to_dict(self) -> dict[str, object]:
        """Returns the fields as values for JSON."""
        clips = {"best": self.best, "worst": self.worst}
        fits = {key: x and {"clip": x[0], "log_ratio": x[1]} for key, x in clips.items()}
        return {**self._asdict(), "evidence": [*self.evidence], **fits}


# Clip -> its comparison with a person; or two clips -> their comparison.
Matches: TypeAlias = Mapping[str, Match] | Mapping[tuple[str, str], Match]


class Verification(NamedTuple):
    """The comparison of several clips with one person.

    Attributes:
      matches: clip -> its comparison with the person.
      rule: the rule that decides if a clip is accepted.
      misfits: enrolled clip of the person that does not fit the person's other clips -> log ratio,
        see `audit.Audit`.
    """

    matches: dict[str, Match]
    rule: Rule
    misfits: dict[str, float]


def make_rule(
    ratios: np.ndarray, fmr: float | None, *, pairs: bool, least: float = -math.inf
) -> Rule:
    """Makes a rule from S comparisons of different people.

    Args:
      ratios: [S], the log ratios.
      fmr: the share of other people's clips that may be accepted, or None for DEFAULT_FMR.
      pairs: True if a ratio compares two clips of strangers, False for a clip and a person.
      least: the smallest `score` if `fmr` is None and there are too few comparisons to measure
        the rule, see `find_least_ratio`.

    Raises:
      UserError: `fmr` is given, and there are too few comparisons to measure it.
    """
    rate, count, each = fmr or DEFAULT_FMR, len(ratios), 2 if pairs else 1
    needed = each * answers_lib.count_needed_strangers(rate)
    if each * count >= needed:
        limit = answers_lib.measure_threshold(ratios, rate, 1)
        about = f"the log ratio is {limit.score:.6g} or more, which on average at most "
        about += f"{100 * rate:.10g} % of comparisons with new strangers reach"
        return Rule("measured", limit.score, fmr is None, limit, about, rate)
    if fmr is not None:
        lowest = f"the lowest fmr is {1 / (count + 1):.2g}" if count else "no fmr is possible"
        raise UserError(
            f"fmr={fmr:g} needs at least {needed:,} usable clips of strangers. The gallery has "
            f"{each * count:,}, so {lowest}\n"
            "choose a higher fmr, enrol more strangers (people without a name), or leave out fmr"
        )
    usual = -math.log(rate)
    model = "people are as near each other as here" if least > usual else "the model is right"
    least = max(least, usual)
    about = f"the log ratio is {least:.6g} or more. If {model}, at most {100 * rate:g} % "
    about += f"of other people's clips reach it; with {needed} clips of strangers, it is measured"
    return Rule("model", least, True, None, about, rate)


def order_by_hash(names: Sequence[str]) -> np.ndarray:
    """Returns the indices [N] of clips in a pseudo-random order: by the sha256 of their names."""
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    return np.array(sorted(range(len(names)), key=digests.__getitem__), int)


def pair_strangers(
    backend: Backend,
    names: Sequence[str],
    parts: Sequence[np.ndarray],
    max_doubles: int = MAX_DOUBLES,
) -> tuple[np.ndarray, np.ndarray]:
    """Compares N clips of strangers in N / 2 pairs.

    `parts` are the vectors of the clips, M arrays [N, D], one for each modality. Returns the log
    ratios, and the compared modalities, see `Backend.compare`. A pair that probably shows a single
    stranger is avoided, unless there are more than `max_doubles` such pairs.
    """
    half, clips = len(names) // 2, backend.summarise_clips(parts)
    first, second = order_by_hash(names)[: 2 * half].reshape(2, half)
    ratios, shared = backend.compare(clips.take(first), clips.take(second))
    doubles = np.flatnonzero(ratios > math.log(max(len(names), 1)))
    if 0 < len(doubles) <= min(max_doubles, half - 1):
        for row in doubles:
            second[[row, row - 1]] = second[[row - 1, row]]
        ratios, shared = backend.compare(clips.take(first), clips.take(second))
    return ratios, shared


def count_strangers(state: State) -> int:
    """Estimates the number of strangers from their clips, at most MAX_COUNTED clips."""
    names = state.strangers
    names = [names[row] for row in order_by_hash(names)[:MAX_COUNTED]]
    return 1 + int(grouping.group(state.index.backend, names, state.stack_parts(names)).max())


def find_least_ratio(state: State, fmr: float) -> float:
    """Returns the log ratio that two clips of different people reach with the probability `fmr`.

    The log ratio is log(p(clips | one person) / p(clips | two people)). Use this function if the
    enrolled people are more similar than the card (JSON file) of the net predicts.
    """
    backend, between = state.index.backend, card_notes.compare(state).between
    limits = [part.distances for part in backend.parts if part.name == "face" and part.distances]
    mean = 2 * limits[0].within + 2 * max(between, 0.0) * limits[0].between
    z = statistics.NormalDist().inv_cdf(fmr)
    square = mean * card_check.quantile(2 * limits[0].different, z)
    return float(card_backend.pair_log_ratios(limits[0], np.array(square), np.array(2.0)))


def choose_rule(state: State, identity: str | None, fmr: float | None) -> Rule:
    """Returns the rule by which a clip is accepted.

    If `identity` is given, the rule decides if a clip shows this person. If it is None, the rule
    decides if two clips show one person. For `fmr`, see `Gallery.verify`.
    """
    answers_lib.check_rate("fmr", fmr)
    if identity is not None:
        check_argument("identity", identity, str, "the name of a person")
        find_person(identity := normal_form(identity), state.clips_of)
    problem = card_notes.compare(state).problem
    if about := card_notes.REFUSED.get(problem):
        return Rule("blind", math.inf, fmr is None, None, about, fmr or DEFAULT_FMR)

    rate, names = fmr or DEFAULT_FMR, state.strangers

    def compare_strangers() -> np.ndarray:
        parts = state.stack_parts(names)
        if identity is not None:
            ratios, shared = state.index.ratios(parts, identity)
        else:
            most = 0 if problem else MAX_DOUBLES  # if people are close, two may look like one
            ratios, shared = pair_strangers(state.index.backend, names, parts, most)
        return ratios[shared.any(axis=0)]

    is_close = problem == "closer" and identity is None
    least = find_least_ratio(state, rate) if is_close else -math.inf
    ratios = state.index.remember(("verify", identity), compare_strangers)
    rule = make_rule(ratios, fmr, pairs=identity is None, least=least)
    if rule.by != "measured":
        return rule
    note, doubles = "", int(np.sum(ratios > math.log(len(names)))) if identity is None else 0
    if doubles > MAX_DOUBLES:
        note = f"; {doubles} pairs of strangers look like one person, so the threshold may be far "
        note += "too high: enrol one clip of each stranger"
    elif not problem:  # if people are close, two may look like one
        people = state.index.remember("people of strangers", lambda: count_strangers(state))
        if people < MIN_STRANGERS * answers_lib.count_needed_strangers(rate):
            note = f"; the clips of strangers show only about {people} people, so the rate may be "
            note += "wrong: enrol clips of more strangers"
    return rule._replace(about=rule.about + note)


def verify(state: State, rule: Rule, vectors: Vectors, identity: str) -> Verification:
    """Decides by `rule` for each clip if it shows the person `identity`.

    `vectors` are the vectors of the clips. For the result, see `Verification`.
    """
    parts, person = [*vectors.parts.values()], normal_form(identity)
    backend, names = state.index.backend, state.clips_of[person]
    clips, known = map(backend.summarise_clips, (parts, state.stack_parts(names)))
    matches = dict[str, Match]()
    made = make_matches(rule, backend, *state.index.ratios(parts, person))
    for row, (clip, match) in enumerate(zip(vectors.names, made, strict=True)):
        ratios, shared = backend.compare(clips.take([row]), known)
        pairs = zip(names, ratios.tolist(), np.any(shared, axis=0).tolist(), strict=True)
        fits = [(name, ratio) for name, ratio, is_compared in pairs if is_compared]
        best, worst = (f(fits, key=lambda x: x[1], default=None) for f in (max, min))
        matches[clip] = match._replace(best=best, worst=worst)
    return Verification(matches, rule, audit(state, names, among_all=False).misfits)


def compare(
    state: State, rule: Rule, first: Vectors, second: Vectors | None
) -> dict[tuple[str, str], Match]:
    """Decides by `rule` for pairs of clips if they show one person.

    Each clip in `first` is compared with each clip in `second`. If `second` is None, each clip in
    `first` is compared with each other clip. Returns (clip, other clip) -> comparison.
    """
    num = len(first.names)
    count, remedy = num * (num - 1) // 2, "give at least two clips, or --with=PATH"
    if second is not None:
        count, remedy = num * len(second.names), "give at least one clip and one other clip"
    if not 0 < count <= MAX_PAIRS:
        remedy = f"give fewer clips: at most {MAX_PAIRS:,} pairs are compared" if count else remedy
        raise UserError(f"cannot compare {count:,} pairs of clips\n{remedy}")
    others, backend = second or first, state.index.backend
    rows, columns = (
        np.triu_indices(num, 1)
        if second is None
        else np.divmod(np.arange(count), len(others.names))
    )
    x, y = (backend.summarise_clips([*v.parts.values()]) for v in (first, others))
    ratios, shared = backend.compare(x.take(rows), y.take(columns))
    keys = ((first.names[a], others.names[b]) for a, b in zip(rows, columns, strict=True))
    return dict(zip(keys, make_matches(rule, backend, ratios, shared), strict=True))


def make_matches(
    rule: Rule, backend: Backend, ratios: np.ndarray, shared: np.ndarray
) -> Iterator[Match]:
    """Yields Q comparisons: applies `rule` to the log-likelihood ratios `ratios` [Q].

    `shared` [M, Q] bool is True for the modalities of `backend` that were compared.
    """
    for ratio, compared in zip(ratios.tolist(), shared.T, strict=True):
        evidence = tuple(itertools.compress(backend.widths, compared))
        ratio = ratio if evidence else 0.0
        probability = 1 / (1 + math.exp(-ratio)) if ratio > -700 else 0.0
        yield Match(bool(evidence and rule.names(ratio)), ratio, probability, evidence)


def as_json(key: str | tuple[str, str], match: Match, identity: str = "") -> dict[str, object]:
    """Returns a comparison as values for JSON.

    `key` is the name of a clip that was compared with the person `identity`, or two names of clips.
    """
    names = {"clip": key, "identity": identity}
    if not isinstance(key, str):
        names = dict(zip(("clip", "other"), key, strict=True))
    return names | match.to_dict()


def table(matches: Matches) -> Iterator[tuple[str, ...]]:
    """Yields a table of comparisons for the terminal: a heading, and a row for each comparison."""
    yield "accepted", "log ratio", "even odds", "clips", "fits best", "fits worst"
    for key, match in matches.items():
        fits = [f"{show(x[0])} {x[1]:.3g}" if x else "" for x in (match.best, match.worst)]
        cells = ["yes" if match.accepted else "no", f"{match.log_ratio:.4g}"]
        cells.append(answers_lib.share(match.probability) if match.evidence else "not compared")
        cells.append(show(key if isinstance(key, str) else ", ".join(key)))
        yield (*cells, *fits)


def write(path: Path, matches: Matches, identity: str = "") -> None:
    """Writes comparisons to a new file, whose ending, such as .csv, determines the format.

    If clips were compared with a person, `identity` is the name of the person.
    """
    objects = [as_json(key, match, identity) for key, match in matches.items()]
    columns = dict.fromkeys([*objects[0]][:2], "string")
    columns |= {"accepted": "bool_", "log_ratio": "float64", "probability": "float64"}
    for name in ("best", "worst"):
        columns |= {name: "string", f"{name}_log_ratio": "float64"}
    none = (None, None)
    rows = (
        (*[*names.values()][:2], *match[:3], *(match.best or none), *(match.worst or none))
        for names, match in zip(objects, matches.values(), strict=True)
    )
    tables.write(path, columns, rows, objects)
