"""Selects the clips to enrol, and finds names and people that may be mixed up."""

import itertools
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from vidjax.apps.gallery.changes import check_person, shows_same
from vidjax.apps.gallery.store import State, StoredClip
from vidjax.apps.gallery.vectors import Vectors, select_usable_clips
from vidjax.utils import messages
from vidjax.utils.errors import UserError, check_argument, warn
from vidjax.utils.names import cut_film_name, show, strip_ending
from vidjax.utils.terminal import say


class Enrolment(Struct, frozen=True):
    """How many clips `Gallery.enrol` has enrolled, and which clips and names are doubtful.

    Attributes:
      enrolled: the number of new clips.
      unchanged: the number of clips that were enrolled before.
      refused: the clips that were not enrolled, because they have no usable frame.
      similar: new person -> an enrolled person with a similar name.
      rivals: enrolled clip -> another person whom it probably shows, see `audit.Audit`.
      misfits: clip that does not fit its person's other clips -> log ratio, see `audit.Audit`.
    """

    enrolled: int
    unchanged: int
    refused: tuple[str, ...]
    similar: dict[str, str]
    rivals: dict[str, str]
    misfits: dict[str, float]

    @classmethod
    def join(cls, parts: "Sequence[Enrolment]") -> "Enrolment":
        """Joins the results of several calls to one result."""
        similar = {name: other for part in parts for name, other in part.similar.items()}
        rivals = {clip: person for part in parts for clip, person in part.rivals.items()}
        misfits = {clip: ratio for part in parts for clip, ratio in part.misfits.items()}
        refused = tuple(clip for part in parts for clip in part.refused)
        enrolled, unchanged = sum(x.enrolled for x in parts), sum(x.unchanged for x in parts)
        return cls(enrolled, unchanged, refused, similar, rivals, misfits)


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
    chosen = select_usable_clips(vectors)
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


def find_known(state: State, vectors: Vectors) -> dict[str, str | None]:
    """Finds clips in `vectors` that are enrolled with the same clip name and the same vectors.

    Returns clip name -> enrolled person, None for a stranger. If an enrolled clip lacks a modality,
    such as face, this modality is not compared.
    """
    return {
        name: old.identity
        for name, clip in select_usable_clips(vectors).items()
        if (old := state.clips.get(name)) and shows_same(state.index.backend, old, clip)
    }


def warn_of_similar(folder: Path, names: Mapping[str, str], command: str = "") -> None:
    """Warns that a new name resembles an enrolled name. `names` are new name -> enrolled name.

    `folder` is the folder of the gallery. `command` is the only command that may change it, or "".
    """
    for name, other in itertools.islice(names.items(), 1):
        more = f" (similar names: {len(names):,})" if len(names) > 1 else ""
        words = ["vidjax", "gallery", "rename", str(folder), f"--identity={name}", f"--to={other}"]
        warn(
            f"the name '{show(name)}' looks like '{show(other)}', but names another person{more}\n"
            f"if they are the same: {command or shlex.join([*words, '--merge'])}"
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
