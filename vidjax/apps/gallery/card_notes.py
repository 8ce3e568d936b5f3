"""Reads the cards of a gallery's nets, and warns if enrolled people contradict a card.

A card is the JSON file of a net. It says how much two vectors of the same person differ, and how
much two vectors of different people differ. `models.card_check` explains how far a card can be
believed.
"""

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from vidjax.apps import cards
from vidjax.apps.cards import BackEnd
from vidjax.apps.gallery.backend import Backend, compare_equal, make_card_backend
from vidjax.apps.gallery.changes import Draft
from vidjax.apps.gallery.enrolment import check_width
from vidjax.apps.gallery.store import State, StoredClip, VectorOrigin
from vidjax.apps.gallery.vectors import Vectors
from vidjax.models import card_check
from vidjax.models.card_check import Comparison
from vidjax.utils import files
from vidjax.utils.errors import UserError, check_argument
from vidjax.utils.terminal import say

NOBODY = "nobody gets a name: for the net, two people are as alike as photos of one person"
FEW = "nobody gets a name: at most two people are enrolled, and no faces show that the net fits"
REFUSED = {"blind": NOBODY, "few": FEW}  # problem -> why nobody gets a name
CONVERT = "convert the net again: its colours (--colour), scale or points (--like) may be wrong"
TWO_NAMES = "if two names are one person, or a photo shows another person, correct them"
# If nobody has measured the card, the net does not fit if people differ less, or if the cosines of
# two people vary more. Both are relative to the card, see `Comparison`.
LEAST_BETWEEN, MOST_DEVIATION = 0.5, 1.4


def read_cards(models: str | Path) -> tuple[VectorOrigin, Backend]:
    """Reads the JSON files (cards) that describe the nets in the folder `models`.

    Returns a description of the nets, and the parameters that compare embeddings, which follow from
    the distributions of cosines in the cards. Raises UserError if no card contains distributions.
    """
    check_argument("Gallery: models", models, (str, os.PathLike), "the path of a folder")
    path = files.local(models).absolute()
    usable = cards.list_embedders(cards.load(path))
    back_ends = {part: card.back_end for part, card in usable.items() if card.back_end}
    if not back_ends:
        raise UserError(
            f"'{path}' contains no embedding net whose JSON file has cosine statistics (back_end)\n"
            f"{cards.describe_remedy('face_embedder', path)}"
        )
    digests = {part: usable[part].digest for part in back_ends}
    default = "face" in back_ends and not back_ends["face"].is_measured
    digest = files.sha256_json(digests)
    origin = VectorOrigin(str(path), digest, True, digests, unmeasured=default)
    return origin, make_card_backend(back_ends)


def _read_back_ends(origin: VectorOrigin) -> dict[str, BackEnd]:
    """Returns modality -> `back_end` in the card, the JSON file of a gallery's net.

    Returns {} if a card is missing, damaged, or has another `digest` than in `origin`.
    """
    was = origin.cards
    try:
        found = cards.list_embedders(cards.read_all(Path(origin.workdir))) if was else {}
    except (UserError, OSError):
        return {}
    same = {part: x.back_end for part, x in found.items() if was.get(part) == x.digest}
    return {part: x for part, x in same.items() if x} if same.keys() == was.keys() else {}


def adopt(draft: Draft, models: str | Path) -> None:
    """Adds modalities, such as voices, to a gallery whose vectors nets compute.

    The folder `models` contains the nets of the gallery, and nets for the new modalities. Enrolled
    clips lack the new modalities until `Draft.add` adds them. If only the numbers in the
    card (the JSON file of a net) were measured again, the gallery uses the new numbers.

    Raises:
      UserError: the gallery was made with a run, or the folder lacks a net of the gallery.
    """
    origin, wide = read_cards(models)
    was, now, backend = draft.origin.cards, origin.cards, draft.backend
    changed = sorted(part for part in was if was[part] != now.get(part))
    if not was or changed:
        made = f"other nets for {', '.join(changed)}" if was else "a run, not with nets"
        raise UserError(
            f"the gallery was made with {made}\nuse the same nets, or name a new folder: --out=DIR"
        )
    origin = msgspec.structs.replace(origin, blind=draft.origin.blind)
    is_equal = compare_equal(backend, wide)
    if is_equal and origin == draft.origin:
        return
    if not is_equal:
        say("to compare clips, the gallery uses the new numbers in the JSON file of its net")
    check_width(wide)
    draft.origin, draft.backend, clips = origin, wide, dict[str, StoredClip]()
    for name, clip in draft.clips.items():
        parts = {part: np.zeros((1, width)) for part, width in wide.widths.items()}
        parts |= zip(backend.widths, backend.split(clip.vector[None]), strict=True)
        vector = np.concatenate([*parts.values()], axis=1, dtype=np.float32)[0]
        clips[name] = clip._replace(vector=vector)
    draft.hold(clips)


def compare(state: State) -> Comparison:
    """Compares the enrolled faces with the card, the JSON file of the face net.

    The field `problem` of the result is a `card_check.Problem`. It is "blind" if `check_apart` or
    `judge` has found that the net does not separate people. It is "few" if the card has only
    default numbers, and too few people are enrolled to check these numbers.
    """
    comparison, unmeasured = state.index.card_comparison, state.origin.unmeasured
    is_close = comparison.problem == "closer" and comparison.between < LEAST_BETWEEN
    is_wrong = unmeasured and (is_close or comparison.deviation > MOST_DEVIATION)
    if state.origin.blind or state.separates is False or is_wrong:
        return comparison._replace(problem="blind")
    is_few = unmeasured and len(state.index.names) < card_check.FEWEST_PEOPLE
    if is_few and not state.separates and comparison.problem != "blind":
        return comparison._replace(problem="few")
    return comparison


def check_apart(state: State, vectors: Vectors, apart: Iterable[tuple[str, str, float]]) -> State:
    """Checks with pairs of faces of different people whether the face net separates people.

    Returns `state` with the result in the field `separates`: True, False, or None for unknown. If
    the statistics in the card (the JSON file of the net) were measured, the result is None. For
    `vectors` and `apart`, see `Gallery.check_apart`.
    """
    backend, separates = state.index.backend, None
    if state.origin.unmeasured:
        number = [*backend.widths].index("face")
        units = backend.units([*vectors.parts.values()])[number]
        face = {name: x for name, x in zip(vectors.names, units, strict=True) if x.any()}
        pairs = [(face[x] @ face[y], clarity) for x, y, clarity in apart if {x, y} <= face.keys()]
        distances, found = backend.parts[number].distances, np.array(pairs).reshape(-1, 2)
        separates = card_check.differ(distances, *found.T) if distances else None
    return state._replace(separates=separates)


def judge(state: State, mirrored: Sequence[float]) -> State:
    """Checks with mirror images whether the net of a gallery separates people.

    Returns `state` with the result in `origin.blind`: True if the vectors of a photo and its mirror
    image differ almost as much as the vectors of two people. `mirrored` are the cosines of enrolled
    photos and their mirror images. With too few cosines, `state` does not change.
    """
    comparison, origin = state.index.card_comparison, state.origin
    # Two cosines are needed, or one if a single person is enrolled, and nobody measured the card.
    if len(mirrored) < (1 if len(state.index.names) == 1 and origin.unmeasured else 2):
        return state
    blind = comparison.is_blind(mirrored)
    return state._replace(origin=msgspec.structs.replace(origin, blind=blind))


def describe(state: State) -> str:
    """Returns why clips get wrong names or no names, with a remedy; "" if all is well."""
    models = state.origin.workdir
    if not state.index.names:
        return ""
    back_ends = _read_back_ends(state.origin)
    present = make_card_backend(back_ends) if back_ends else state.index.backend
    is_old = not compare_equal(state.index.backend, present)
    if is_old and compare(state).problem != "blind":
        words = ["vidjax", "measure-card", models, "--gallery=G"]
        return f"the JSON file of the net has newer numbers\nto use them: {shlex.join(words)}"
    if problem := _describe_problem(state):
        return problem
    face = back_ends.get("face")
    if not face or face.is_measured:
        return ""
    text = "this net is not yet tested on your photos, so fewer people get a name"
    return f"{text}\nif names are wrong, {CONVERT}\n{_advise_to_measure(models)}"


def warn(state: State) -> None:
    """Prints why clips get wrong names or no names, and a remedy, unless all is well."""
    if problem := _describe_problem(state):
        say(problem, warning=True)


def _describe_problem(state: State) -> str:
    """Returns why clips get wrong or no names, with a remedy; "" if `compare` finds no problem."""
    comparison, origin = compare(state), state.origin
    if comparison.problem == "closer" and comparison.between < card_check.SAME:
        return f"your people are as alike as photos of one person\n{TWO_NAMES}"
    measure, between = _advise_to_measure(origin.workdir), f"{comparison.between:.2g}"
    return {
        "": "",
        "few": f"{FEW}\nenrol a third person, or add a film of two people\n{measure}",
        "blind": f"{NOBODY}\n{TWO_NAMES}" + f"\nif not, {CONVERT}" * origin.unmeasured,
        "closer": "similar people, such as relatives, may get a wrong name: your people differ "
        f"only {between} times as much as the net expects\n{measure}",
        "varied": "many names are missing or wrong: the photos of one person differ "
        f"{comparison.within:.2g} times as much as the net expects\n{measure}",
        "farther": "many names are missing or wrong: your people differ "
        f"{between} times as much as the net expects\n{measure}",
    }[comparison.problem]


def _advise_to_measure(models: str) -> str:
    words = ["vidjax", "measure-card", models, "--photos=FOLDER"]
    return f"to test the net on photos of your people: {shlex.join(words)}"
