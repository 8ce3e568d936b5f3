"""Selects the clips to enrol, finds people who may be mixed up, and migrates galleries.

To migrate a gallery means to enrol its people in a new gallery, whose vectors are from another net.
"""

import itertools
import math
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vidjax.apps.gallery import card_notes, ratios
from vidjax.apps.gallery.backend import sum_by_owner
from vidjax.apps.gallery.changes import check_person, find_equal
from vidjax.apps.gallery.enrolment import stack_vectors
from vidjax.apps.gallery.ratios import LEAST_ODDS
from vidjax.apps.gallery.store import STRANGER, State, StoredClip
from vidjax.apps.gallery.vectors import Vectors, select_usable_clips
from vidjax.utils import messages
from vidjax.utils.errors import UserError, check_argument, warn
from vidjax.utils.names import IGNORED, cut_film_name, show, strip_ending
from vidjax.utils.terminal import say

if TYPE_CHECKING:
    from vidjax.apps.gallery.gallery import AnyClips, Gallery

MOST_PAIRS = 10**9  # of a new clip and a person that `find_rivals` compares, in about 30 seconds


class Enrolment(NamedTuple):
    """How many clips `Gallery.enrol` has enrolled, and which clips and names are doubtful.

    Attributes:
      enrolled: the number of new clips.
      unchanged: the number of clips that were enrolled before.
      refused: the clips that were not enrolled, because they have no usable frame.
      similar: new person -> an enrolled person with a similar name.
      rivals: enrolled clip -> another person whom it probably shows, see `find_rivals`.
    """

    enrolled: int
    unchanged: int
    refused: tuple[str, ...]
    similar: dict[str, str]
    rivals: dict[str, str]

    @classmethod
    def join(cls, parts: "Sequence[Enrolment]") -> "Enrolment":
        """Joins the results of several calls to one result."""
        similar = {name: other for part in parts for name, other in part.similar.items()}
        rivals = {clip: person for part in parts for clip, person in part.rivals.items()}
        refused = tuple(clip for part in parts for clip in part.refused)
        enrolled, unchanged = sum(x.enrolled for x in parts), sum(x.unchanged for x in parts)
        return cls(enrolled, unchanged, refused, similar, rivals)


def check_identities(identities: str | Mapping[str, str | None] | None) -> None:
    """Raises UserError if `identities` of `Gallery.enrol` contains an invalid name of a person."""
    kinds, wanted = (str, Mapping, type(None)), "a name, or a dict {clip: name}"
    check_argument("enrol: identities", identities, kinds, wanted)
    given = {"": identities} if isinstance(identities, str) else identities or {}
    for name, identity in given.items():
        wanted = f"the name of a person for clip {name!r}"
        check_argument("enrol: identities", identity, (str, type(None)), wanted)
        _ = None if identity is None else check_person(identity)


def choose_clips(
    vectors: Vectors, identities: str | Mapping[str, str] | None, source: str, *, strangers: bool
) -> tuple[dict[str, StoredClip], tuple[str, ...]]:
    """Selects the clips to enrol: those with a person or, if `strangers` is True, those without.

    Returns name -> clip, and the names of the clips that are left out because no frame is usable.
    For the arguments and errors, see `Gallery.enrol`.
    """
    if isinstance(identities, str):
        identities = dict.fromkeys(vectors.names, identities)
    if identities is not None:
        identities = {strip_ending(clip): name for clip, name in identities.items()}
        bare = [*map(strip_ending, vectors.names)]
        check_given(identities, bare, source)
        vectors = vectors._replace(labels=tuple(map(identities.get, bare)))
    labels = zip(vectors.names, vectors.labels, strict=True)
    vectors = vectors.only({name for name, label in labels if (label is None) == strangers})
    if not vectors.names and strangers:
        raise UserError(
            "every clip has a label, so no clip shows a stranger\n"
            "leave out --strangers (in Python: strangers=True)"
        )
    if not vectors.names:
        raise UserError(
            "no clip has a label, so nobody can be enrolled\nname the person: --identity=NAME"
        )
    chosen = {
        name: clip._replace(identity=clip.identity and check_person(clip.identity))
        for name, clip in select_usable_clips(vectors).items()
    }
    refused = tuple(sorted({*vectors.names} - chosen.keys()))
    if not chosen:
        raise UserError(
            f"none of the clips, such as '{show(refused[0])}', has a usable frame\n"
            "give clips whose features are not 0"
        )
    return chosen, refused


def check_given(identities: Mapping[str, str], clips: Collection[str], source: str) -> None:
    """Compares the keys of `identities`, clip -> person, with the names of existing `clips`.

    Warns about keys that are not clips. Raises UserError if no key is a clip. `source` is the file
    of `identities`, for messages.
    """
    stray = sorted(map(str, identities.keys() - {*clips}))
    if not stray:
        return
    example = show(min(clips))
    text = f"no clip is called '{show(stray[0])}'; an example of a clip is '{example}'"
    if len(stray) == len(identities):
        raise UserError(f"{source}: {text}\nuse the names of the clips in the features")
    warn(f"{source}: {text}\n{len(stray):,} of {len(identities):,} names are ignored: correct them")


def complete(gallery: "Gallery", vectors: Vectors) -> set[str]:
    """Adds missing modalities, such as voices, to enrolled clips.

    `vectors` are the vectors of clips, in all modalities. A clip is left out if it is not enrolled,
    or if its enrolled vector of a modality differs from the given one. Returns the names of the
    clips that are not left out. They now have all modalities.
    """
    clips = select_usable_clips(vectors)
    with gallery.change() as draft:
        return draft.complete({name: clip.vector for name, clip in clips.items()})


def find_known(state: State, vectors: Vectors) -> dict[str, str | None]:
    """Finds clips in `vectors` that are enrolled with the same clip name and the same vectors.

    Returns clip name -> enrolled person, None for a stranger. If an enrolled clip lacks a modality,
    such as face, this modality is not compared.
    """
    given = {name: clip.vector for name, clip in select_usable_clips(vectors).items()}
    equal = find_equal(given, state.clips, state.index.backend)
    return {name: state.clips[name].identity for name in equal}


def find_rivals(state: State, clips: Mapping[str, StoredClip]) -> dict[str, str]:
    """Finds clips that are enrolled for one person, but seem to show another enrolled person.

    `clips` are name -> clip. Returns clip name -> the other person. If the two people only look
    alike, as twins do, the result lacks the clip. If the net cannot tell people apart, the result
    is empty. If a comparison of all `clips` would take minutes, the last clips are not compared,
    and a message says so.
    """
    index, rivals = state.index, dict[str, str]()
    owned = [name for name, clip in clips.items() if clip.identity in state.clips_of]
    most = max(MOST_PAIRS // max(len(index.names), 1), 1)
    if len(owned) > most:
        say(f"to save time, only {most:,} of {len(owned):,} clips were checked for wrong names")
    if card_notes.compare(state).problem == "blind":
        return {}
    vectors = stack_vectors(owned[:most], clips, sum(index.backend.widths.values()))
    for name, found in zip(owned, index.nearest(index.backend.split(vectors), 2), strict=False):
        others = (x for x in found.best if x[0] != clips[name].identity)
        like, log = next(others, ("", -math.inf))
        is_clear = log - found.new > math.log(LEAST_ODDS)
        is_copy = any(
            np.array_equal(state.clips[x].vector, clips[name].vector)
            for x in state.clips_of.get(like, ())
        )
        if is_copy or (is_clear and not _is_twin(state, name, clips[name], like)):
            rivals[name] = like
    return rivals


def _is_twin(state: State, name: str, clip: StoredClip, like: str) -> bool:
    """Returns whether the clip `name` shows the person for whom it is enrolled, and not `like`."""
    own = state.clips_of[clip.identity or STRANGER]
    mates = [x for x in own if strip_ending(x) != strip_ending(name)]
    if not mates:
        return False
    backend, others = state.index.backend, state.clips_of[like]
    vectors = [clip.vector, *(state.clips[x].vector for x in (*mates, *others))]
    owner = np.repeat(np.arange(3), [1, len(mates), len(others)])
    white = backend.whiten(backend.split(np.array(vectors)))
    sums = [sum_by_owner(z, owner, 3) for z in white]
    three = ratios.of_sums(backend, sums, np.ones(3), ratios.invert(backend))
    (fit, other_fit, alike), _ = ratios.compare(
        backend, three.take([0, 0, 1]), three.take([1, 2, 2])
    )
    # The clip fits its person better than `like`, and the clips of the two show two people.
    return bool(fit > other_fit and alike < 0)


def warn_of_similar(folder: Path, names: Mapping[str, str]) -> None:
    """Warns that a new name resembles an enrolled name. `names` are new name -> enrolled name."""
    for name, other in itertools.islice(names.items(), 1):
        more = f" (similar names: {len(names):,})" if len(names) > 1 else ""
        words = ["vidjax", "gallery", "rename", str(folder), f"--identity={name}", f"--to={other}"]
        warn(
            f"the name '{show(name)}' looks like '{show(other)}', but names another person{more}\n"
            f"if they are the same: {shlex.join([*words, '--merge'])}"
        )


def advise_other_films(state: State, people: Iterable[str]) -> None:
    """Prints which `people` need clips from other films.

    These are people with several clips that are all from one film, or that are so alike that they
    count as one clip.
    """
    enrolled, index = state.clips_of, state.index
    counts = dict(zip(index.names, index.counts.max(axis=0).tolist(), strict=True))
    few = [
        name for name in people if len(clips := enrolled.get(name, ())) > 1
        and (len({*map(cut_film_name, clips)}) == 1 or counts[name] == 1)
    ]  # fmt: skip
    if few:
        named = messages.list_some([*map(show, few)], 3)
        say(
            f"for {named}: the clips of each person are from one film or day and look alike\n"
            "add clips from other films or days"
        )


class Migration(NamedTuple):
    """The result of `migrate`, which enrols the clips of an old gallery in a new gallery."""

    moved: int  # the number of clips that are new or have another person in the new gallery
    unchanged: int  # the number of clips that an earlier call has moved
    relabelled: dict[str, str]  # clip -> its former person in the new gallery, who was replaced
    missing: list[str]  # the clips of the old gallery that the new gallery lacks
    lost: list[str]  # the people of the old gallery who have no clip in the new gallery


def migrate(old: "Gallery", new: "Gallery", clips: "AnyClips") -> Migration:
    """Enrols clips of the gallery `old` in the gallery `new`, which has other nets or another run.

    `clips` are these clips in a form that `new.embed` accepts. The person of a clip is taken from
    `old`. Further calls can add further clips. Raises UserError, and leaves `new` unchanged, if no
    usable clip of `clips` is in `old`, or if `new` already has a person's clip that `old` lacks.
    """
    old.refresh()
    person_of = {strip_ending(name): clip.identity for name, clip in old.clips.items()}
    extra = [name for name, clip in new.clips.items() if clip.identity and name not in person_of]
    if extra:
        raise UserError(
            f"gallery '{new.folder}' contains clips that '{old.folder}' lacks, such as "
            f"{show(min(extra))}\n"
            "create the new gallery again, without people: --models=DIR, or --run=RUN --empty"
        )
    vectors = new.embed(clips)
    labels = tuple(person_of.get(strip_ending(name)) for name in vectors.names)
    known = {name for name in vectors.names if strip_ending(name) in person_of}
    chosen = select_usable_clips(vectors._replace(labels=labels).only(known))
    if not chosen:
        remedy = "use the clip names of the old gallery"
        if any("/" in name for name in person_of):  # the names of photos
            place = shlex.quote(str(new.folder))
            remedy += f"; or enrol the photos again: vidjax gallery enrol {place} --photos=FOLDER"
        raise UserError(
            f"no usable clip in the features has the name of a clip in gallery '{old.folder}'. "
            f"Example of a name in the gallery: {show(min(person_of, default=''))}; in the "
            f"features: {show(min(vectors.names, default=''))}\n{remedy}"
        )
    with new.change() as draft:
        added, relabelled = dict[str, StoredClip](), dict[str, str]()
        for name, clip in chosen.items():
            before = draft.clips.get(strip_ending(name))
            if before is None:
                added[name] = clip
            elif before.identity != clip.identity:  # a label that was changed since an earlier call
                relabelled[name] = draft.relabel(name, clip.identity) or IGNORED
        moved = draft.add(added) + len(relabelled)
    missing = sorted(person_of.keys() - new.clips.keys())
    lost = sorted(old.people.keys() - new.people.keys())
    return Migration(moved, len(chosen) - moved, relabelled, missing, lost)
