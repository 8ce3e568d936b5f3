"""Edits a copy of the content of a gallery, a `Draft`, which `Gallery.change` then stores.

Also selects the clips to enrol, and finds names and people that may be mixed up.
"""

import itertools
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from msgspec import Struct

from vidjax.apps.gallery.backend import Backend, People
from vidjax.apps.gallery.enrolment import enrol, make_state, refit
from vidjax.apps.gallery.store import MAX_NAME_LETTERS, STRANGER, State, StoredClip
from vidjax.apps.gallery.vectors import Vectors, select_usable_clips
from vidjax.utils import messages
from vidjax.utils.errors import UserError, check_argument, closest, warn
from vidjax.utils.names import (
    ENDING,
    check_name,
    clean_identity,
    cut_film_name,
    find_similar_names,
    is_reserved,
    normal_form,
    show,
    strip_ending,
)
from vidjax.utils.terminal import ignore_count, say

T = TypeVar("T")


class Draft:
    """The future content of a gallery, which the `with` block of `Gallery.change` edits."""

    def __init__(self, state: State):
        self.present = state
        # The nets, and the parameters of the comparison. `card_notes` may replace them.
        self.origin, self.backend = state.origin, state.index.backend
        # False after the block of `Gallery.change`, when the gallery may share this content.
        self.is_open = True
        self.clips = dict(state.clips)  # name -> clip, including strangers
        # Identity or STRANGER -> names of its clips; a tuple, or a set if the draft has changed it.
        self.clips_of: dict[str, Collection[str]] = dict(state.clips_of)
        self._changed_clips: set[str] = set()
        self._changed_people: set[str] = set()

    def __bool__(self) -> bool:
        """Returns whether the draft has changes."""
        old = self.present
        has_other_nets = self.backend is not old.index.backend or self.origin != old.origin
        return bool(self._changed_clips) or has_other_nets

    def add(self, clips: Mapping[str, StoredClip]) -> int:
        """Adds clips whose vectors are known; returns the number of new or changed clips.

        `clips` are name -> clip. If a clip is already enrolled for a stranger, it gets the given
        `identity`. An enrolled clip that lacks a modality, such as audio, gets the given vector of
        this modality. A clip is skipped if the person already has it, and if it is enrolled for any
        person and the given `identity` is None.

        Raises:
          UserError: a clip is malformed, or enrolled for another person or with another vector.
            Then no clip is added.
        """
        width = sum(self.backend.widths.values())
        checked: dict[str, StoredClip] = {}
        for given, clip in clips.items():
            clip = check_clip(given, clip, width)
            name = strip_ending(given)
            if name in checked:
                raise UserError(
                    f"two clips are called '{show(name)}', because {ENDING} is left out of names\n"
                    "leave out one of them, or rename it"
                )
            checked[name] = clip
        merged = {name: self._merge(name, clip) for name, clip in checked.items()}
        new = {name: x for name, x in merged.items() if x is not self.clips.get(name)}
        self._edit(new)
        return len(new)

    def hold(self, clips: Mapping[str, StoredClip]) -> None:
        """Replaces all clips by `clips`, name -> clip."""
        edits: dict[str, StoredClip | None] = dict.fromkeys(self.clips.keys() - clips.keys())
        for name, clip in clips.items():
            old = self.clips.get(name)
            if old is None or not np.array_equal(old.vector, clip.vector):
                edits[name] = clip
            elif old.identity != clip.identity:
                edits[name] = old._replace(identity=clip.identity)
        self._edit(edits)

    def remove(
        self,
        *,
        identity: str | Collection[str] | None = None,
        clip: str | Collection[str] | None = None,
    ) -> int:
        """Removes people or clips; returns the number of clips. See `Gallery.remove`."""
        if (identity is None) == (clip is None):
            raise UserError(
                "remove needs either people or clips\n"
                "call remove(identity=NAME), or remove(clip=NAME)"
            )
        for kind, value in (("identity", identity), ("clip", clip)):
            check_argument(f"remove: {kind}", value, (str, Collection, type(None)), "a name")
            for name in [] if isinstance(value, str) else value or ():
                check_argument(f"remove: {kind}", name, str, "a name")
        people, single = ([x] if isinstance(x, str) else x or () for x in (identity, clip))
        removed = {clip for name in people for clip in find_person(name, self.clips_of)}
        for name in map(strip_ending, single):
            find_enrolled("clip", name, self.clips)
            removed.add(name)
        self._edit(dict.fromkeys(removed))
        return len(removed)

    def rename(self, identity: str, to: str, *, merge: bool = False) -> int:
        """Renames a person; returns the number of the person's clips. See `Gallery.rename`."""
        check_argument("rename: identity", identity, str, "a name")
        to, names = check_person(to), find_person(identity, self.clips_of)
        if to == normal_form(identity):
            raise UserError(f"the person is already called '{show(to)}': choose another name")
        if to in self.clips_of and not merge:
            raise UserError(
                f"'{show(to)}' is already enrolled, so two people would become one\n"
                "if they are the same person, use merge=True in Python, or --merge"
            )
        renamed = {name: self.clips[name]._replace(identity=to) for name in names}
        self._edit(renamed)
        return len(renamed)

    def relabel(self, clip: str, identity: str | None) -> str | None:
        """Changes a clip's person; returns the old person. None is a stranger."""
        check_argument("relabel: clip", clip, str, "a name")
        identity = None if identity is None else check_person(identity)
        clip = strip_ending(clip)
        old = self.clips.get(clip)
        if old is None:  # no hint: a clip with a similar name may show another person
            raise UserError(
                f"no clip '{show(clip)}' is enrolled: enrol it with an identity or --strangers\n"
                "to see the clips of all people: vidjax gallery list G --clips"
            )
        if old.identity == identity:
            raise UserError(
                f"clip '{show(clip)}' already belongs to {_describe_person(identity)}\n"
                "choose another identity"
            )
        self._edit({clip: old._replace(identity=identity)})
        return old.identity

    def _edit(self, clips: Mapping[str, StoredClip | None]) -> None:
        """Replaces or adds clips, name -> clip. If the value is None, the clip is removed."""
        if not self.is_open:
            raise UserError(
                "the block 'with gallery.change() as draft' has ended, so nothing was changed\n"
                "change the draft inside the block"
            )
        for name, clip in clips.items():
            if old := self.clips.pop(name, None):
                names = self._open_clips(old.identity)
                names.discard(name)
                if not names:
                    del self.clips_of[old.identity or STRANGER]
            if clip is not None:
                self._open_clips(clip.identity).add(name)
                self.clips[name] = clip
            if self.clips.get(name) is self.present.clips.get(name):
                self._changed_clips.discard(name)  # the change was undone
            else:
                self._changed_clips.add(name)

    def _open_clips(self, identity: str | None) -> set[str]:
        key = identity or STRANGER
        names = self.clips_of.get(key, ())
        if not isinstance(names, set):
            names = self.clips_of[key] = {*names}
            self._changed_people.add(key)
        return names

    def _merge(self, name: str, clip: StoredClip) -> StoredClip:
        """Returns what is stored for `clip`: the enrolled clip `name` itself if nothing is new.

        Raises UserError if `clip` and the enrolled clip `name` contradict each other.
        """
        old = self.clips.get(name)
        if old is None:
            return clip
        if clip.identity is None and old.identity is not None:
            return old
        remedy, is_equal = "relabel", old.vector.tobytes() == clip.vector.tobytes()
        if old.identity not in (None, clip.identity):
            problem = f"as {_describe_person(old.identity)}, not {_describe_person(clip.identity)}"
        elif not is_equal and not shows_same(self.backend, old, clip):
            remedy, problem = "remove", "with another vector: its features have changed, or another"
            problem += " clip has this name"
        elif not is_equal:  # the clip gets another modality
            return old._replace(identity=clip.identity, vector=clip.vector)
        else:
            return old if old.identity == clip.identity else old._replace(identity=clip.identity)
        raise UserError(
            f"clip '{show(name)}' is already enrolled {problem}\n"
            f"if these are two clips, rename the new clip; if not, {remedy} the enrolled clip"
        )

    # ---- results

    @property
    def similar(self) -> dict[str, str]:
        """The new names that are spelled like an enrolled name: new name -> enrolled name."""
        changed = self.clips_of.keys() & self._changed_people
        new = changed - self.present.clips_of.keys() - {STRANGER}
        known = (name for name in self.clips_of if name != STRANGER and name not in new)
        return find_similar_names(sorted(new), known)

    def finish(
        self, advance: Callable[[int], None] = ignore_count
    ) -> tuple[State, Mapping[str, StoredClip] | None, list[People]]:
        """Returns the arguments `state`, `new` and `people` of `Store.write`.

        `people` is a list of blocks of people whose clips have changed. `advance` is called after
        each block of people, with the number of new and changed clips of these people.
        """
        old, backend, clips = self.present, self.backend, self.clips
        pairs = [(old.clips.get(name), clips.get(name)) for name in self._changed_clips]
        # Only new clips, and strangers' clips that got a person, can be added to the file.
        other = [(x, y) for x, y in pairs if y is None or (x and (x.identity or _differ(x, y)))]
        if any(x and x.fitted and _differ(x, y) for x, y in other):
            backend, clips = refit(clips, backend, centred=self.origin.centred)
        if backend is not old.index.backend:
            args = old.version + 1, self.origin, backend, clips, old.command
            return make_state(*args), None, []
        # `keys & set` iterates over the small set, but `set & keys` over all keys.
        changed = sorted(self.clips_of.keys() & self._changed_people)
        clips_of = {name: tuple(sorted(self.clips_of[name])) for name in changed}
        self.clips_of |= clips_of
        clips_of.pop(STRANGER, None)
        people, of_plda = list[People](), old.origin.counts_every_clip
        for block in enrol(backend, clips_of, clips, of_plda=of_plda):
            people.append(block)
            advance(sum(len(self._changed_clips.intersection(clips_of[x])) for x in block.names))
        state = old._replace(
            version=old.version + 1,
            index=old.index.replaced(old.clips_of.keys() & self._changed_people, people),
            clips=clips,
            clips_of=self.clips_of,
            origin=self.origin,
        )
        return state, None if other else {x: clips[x] for x in self._changed_clips}, people


def _differ(old: StoredClip, new: StoredClip | None) -> bool:
    """Returns whether the clip `old` was removed (`new` is None), or `new` has another vector."""
    return new is None or new.vector is not old.vector


def shows_same(backend: Backend, old: StoredClip, clip: StoredClip) -> bool:
    """Returns whether `clip` has the vectors of the enrolled clip `old`.

    If `old` lacks a modality, such as audio, this modality is not compared.
    """
    if np.array_equal(old.vector, clip.vector):
        return True
    parts = zip(*map(backend.split, (old.vector[None], clip.vector[None])), strict=True)
    return all(np.array_equal(x, y) for x, y in parts if x.any())


def _describe_person(identity: str | None) -> str:
    return "a stranger" if identity is None else f"'{show(identity)}'"


def check_clip(name: str, clip: StoredClip, width: int) -> StoredClip:
    """Checks a clip before it is stored; returns the clip with the cleaned name of its person.

    Raises UserError if a name is invalid, or if the vector is not finite float32 [width]. The
    vector 0 is refused, too: no frame of such a clip is usable.
    """
    check_argument("clip name", name, str, "a name")
    _check_length("clip name", check_name(name))
    if clip.identity is not None:
        clip = clip._replace(identity=check_person(clip.identity))
    if clip.vector.shape != (width,) or clip.vector.dtype != np.float32:
        raise UserError(
            f"clip '{show(name)}' has a vector of the type {clip.vector.dtype} and the shape "
            f"{clip.vector.shape}\ngive a float32 vector of the shape ({width},)"
        )
    if not np.isfinite(clip.vector).all():
        raise UserError(f"the vector of clip '{show(name)}' is not finite: compute it again")
    if not clip.vector.any():
        raise UserError(f"clip '{show(name)}' has no usable frame: leave out the clip")
    return clip


def check_person(name: str) -> str:
    """Returns the cleaned name of a person.

    Raises UserError if the name is invalid, too long, or reserved, such as `unknown 3`.
    """
    check_argument("identity", name, str, "a name")
    name = _check_length("identity", clean_identity(name))
    if is_reserved(name):
        raise UserError(
            f"the name '{show(name)}' is reserved for people without a name\n"
            "choose another name, such as 'neighbour'"
        )
    return name


def _check_length(kind: str, name: str) -> str:
    if len(name) > MAX_NAME_LETTERS:
        raise UserError(
            f"the {kind} '{show(name)}' is longer than {MAX_NAME_LETTERS:,} letters\nshorten it"
        )
    return name


def find_enrolled(kind: str, name: str, among: Mapping[str, T]) -> T:
    """Returns `among[name]`, or raises NotEnrolledError.

    `kind` is the word for the name in the message: `identity` or `clip`.
    """
    if name not in among:
        raise NotEnrolledError(kind, name, among)
    return among[name]


def find_person(name: str, clips_of: Mapping[str, T]) -> T:
    """Returns `clips_of[name]` for a person, or raises NotEnrolledError if nobody has this name."""
    if name == STRANGER:
        raise NotEnrolledError("identity", name, ())
    return find_enrolled("identity", normal_form(name), clips_of)


class NotEnrolledError(UserError):
    """No person or clip has the given name. The message suggests a similar name.

    A server does not show the message, because its answers must not reveal names.
    """

    def __init__(self, kind: str, name: str, among: Iterable[str]):
        super().__init__(kind, name, list(among))  # a view of a dict cannot be pickled

    def __str__(self) -> str:  # searches here, when the gallery is unlocked: the search is slow
        kind, name, among = self.args
        close = closest(name, among)
        hint = f": did you mean '{show(close)}'?" if close else ""
        return (
            f"no {kind} '{show(name)}' is enrolled{hint}\n"
            "to see all people and their clips: vidjax gallery list G --clips"
        )


# ---- clips to enrol


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
    text = f"no clip is called '{show(stray[0])}'; an example of a clip is '{show(min(clips))}'"
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
