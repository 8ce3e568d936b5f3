"""Identifies clips with the content of a gallery: decides names, makes answers and ranks."""

import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np

from vidjax.apps.gallery import (
    answers as answers_lib,
    card_notes,
    index as index_lib,
)
from vidjax.apps.gallery.answers import (
    ABOVE_HALF,
    DEFAULT_FPIR,
    MIN_NAMED_PROBABILITY,
    Answer,
    NamingRule,
    Threshold,
)
from vidjax.apps.gallery.enrolment import list_usable_strangers, stack_parts
from vidjax.apps.gallery.store import State
from vidjax.apps.gallery.vectors import Advance, Vectors
from vidjax.data.labels import sort_identities
from vidjax.evaluation import topk
from vidjax.utils.errors import UserError

RANK_ROWS = 64  # clips that are ranked together
# The share of strangers with a probability above 0.5 in galleries of nets, see the benchmarks
# `calibration` and `decision`.
OF_STRANGERS = "2 to 7 %"


class NobodyError(UserError):
    """No clip can be identified, because nobody is enrolled."""


def require_people(state: State) -> None:
    """Raises NobodyError if nobody is enrolled."""
    if not state.index.names:
        raise NobodyError(
            "nobody is enrolled in the gallery\nenrol people first: vidjax gallery enrol"
        )


def measure_threshold(state: State, fpir: float) -> Threshold:
    """Returns the threshold for `fpir`, see `Gallery.threshold`."""
    require_people(state)

    def compare() -> np.ndarray:
        strangers = [*list_usable_strangers(state)]
        answers_lib.check_strangers(len(strangers), fpir)
        nearest = state.index.nearest(stack_parts(state, strangers), 1)
        # A stranger who equals the centre of all vectors resembles nobody.
        return np.array([match.best[0][1] if match.best else -math.inf for match in nearest])

    best = state.index.remember("strangers", compare)
    answers_lib.check_strangers(len(best), fpir)
    return answers_lib.measure_threshold(best, fpir, len(state.index.names))


def choose_rule(state: State, fpir: float | None, threshold: float | None) -> NamingRule:
    """Returns the rule that decides if a clip gets a name, see `Gallery.identify`."""
    require_people(state)
    answers_lib.check_choice(fpir, threshold)
    if card_notes.compare(state).problem == "blind":
        is_default = fpir is None and threshold is None
        return NamingRule("threshold", math.inf, is_default, None, card_notes.NOBODY)
    if threshold is not None:
        about = f"the probability is {100 * threshold:.10g} % or more"
        return NamingRule("threshold", math.log(threshold), False, None, about)
    wanted = answers_lib.count_needed_strangers(DEFAULT_FPIR)
    strangers = len([*itertools.islice(list_usable_strangers(state), wanted)])
    if fpir is None and strangers < wanted:
        about = ABOVE_HALF
        about += f", which {OF_STRANGERS} of strangers reach" if state.origin.cards else ""
        about += f"; with {wanted} clips of strangers instead of {strangers}, at most "
        about += f"{100 * DEFAULT_FPIR:g} % of new strangers would get a name"
        return NamingRule("new", math.log(MIN_NAMED_PROBABILITY), True, None, about)
    limit = measure_threshold(state, DEFAULT_FPIR if fpir is None else fpir)
    about = f"the probability is {answers_lib.describe_probability(limit.score)} or more, "
    about += f"which at most {100 * limit.fpir:.10g} % of new strangers reach, and is higher "
    about += "than the probability of all other enrolled people together"
    return NamingRule("fpir", limit.score, fpir is None, limit, about)


def identify(
    state: State,
    rule: NamingRule,
    vectors: Vectors,
    k: int,
    groups: Mapping[str, str] | None,
    advance: Advance,
) -> dict[str, Answer]:
    """Identifies the person in each clip by `rule`, see `Gallery.identify`."""
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
    for row, match in zip(shared.tolist(), singly, strict=True):
        own = rule.answer(match, cards=bool(state.origin.cards))
        answer = answers_lib.join_answers(answers[vectors.names[row]], own)
        if rule.by != "new" and not rule.names(answer.score):  # a promise for single clips
            answer = answer._replace(identity=None, evidence=())
        answers[vectors.names[row]] = answer._replace(best=answer.best[:k])
    return answers


def rank(
    state: State, rule: NamingRule, vectors: Vectors, advance: Advance
) -> dict[str, list[tuple[str, float]]]:
    """Lists the most probable clips of each person, see `Gallery.rank`.

    If the user has chosen `rule`, a list contains only clips that get the name of the person.
    """
    searched = state.index
    identities = sort_identities(searched.names)
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
                if state.origin.cards:  # as in `NamingRule.answer`
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
    """Returns the argument `others` [Q, N] of `NamingRule.names` for Q clips and N people.

    `scores` [Q, N] are log-probabilities. For the most probable person of a clip, the result is the
    log-probability of all other people together. For other people, it is the highest score of the
    clip, so that they get no name.
    """
    # Only the most probable person can have a higher probability than all others together.
    others = np.repeat(scores.max(axis=1, keepdims=True), scores.shape[1], axis=1)
    for row, best in enumerate(scores.argmax(axis=1).tolist()):
        others[row, best] = index_lib.sum_others(scores[row], best)
    return others
