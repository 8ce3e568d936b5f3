"""The people of a gallery: who is enrolled by which clips, on disk and in the index, as vectors.

What is in memory is one `State`, which is replaced and never changed: an answer that is under way
in another thread goes on with the one it began with. Every change is written first, so an error
leaves both as they were; what another process has changed meanwhile is read before.

The back end is fitted to clips, and from its centre and the other clips a removed one could be
computed again. So `remove` fits it anew where it was fitted to a clip that goes.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from vidjax import files
from vidjax.data.untrusted.names import check_identity, check_name, show
from vidjax.errors import UserError, closest
from vidjax.gallery import calibration
from vidjax.gallery import front as front_lib
from vidjax.gallery import index as index_lib
from vidjax.gallery.calibration import Threshold
from vidjax.gallery.coordinates import Coordinates
from vidjax.gallery.front import Front
from vidjax.gallery.index import MOST_ROWS, Index
from vidjax.gallery.store import (
    MOST_LETTERS,
    MOST_WIDTH,
    STRANGER,
    Clip,
    Origin,
    State,
    Store,
    group,
)
from vidjax.models.plda import Settings
from vidjax.run import workdir as workdir_lib

MOST_SUGGESTED = 20_000  # names that a misspelt one is compared with: takes a second


class People:
    """Enrolled clips and strangers."""

    def __init__(self, folder: str | Path, *, sync: bool = False):
        """Reads a gallery.

        Args:
          folder: the gallery.
          sync: whether a change waits until the disk has it, see `Store`.

        Raises:
          ValueError: there is no gallery, or it is damaged; the error names the file.
        """
        self._store = Store(Path(folder).expanduser().absolute(), sync=sync)
        self._calibration: tuple[State, np.ndarray] | None = None  # best scores of its strangers
        self._take(self._store.read())

    @classmethod
    def create(
        cls,
        folder: str | Path,
        run: Origin,
        front: Front,
        clips: Mapping[str, Clip],
        *,
        sync: bool = False,
    ) -> "People":
        """Makes a gallery and returns it.

        Args:
          folder: a folder that is new, or empty.
          run: the run that made the vectors.
          front: coordinates and settings.
          clips: name -> clip.
          sync: see `Store`.

        Raises:
          ValueError: the folder holds something else, or a clip is malformed.
          OSError: it cannot be written.
        """
        path = Path(folder).expanduser().absolute()
        if sum(front.widths.values()) > MOST_WIDTH:
            raise UserError(
                f"vectors of {sum(front.widths.values()):,} numbers are too wide for a gallery: "
                f"{MOST_WIDTH:,} are the most\nmake it with fewer members, or with a narrower net"
            )
        for name, clip in clips.items():
            _check(name, clip, front)
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
        workdir_lib.make_workdir(path, "gallery:")
        store = Store(path, sync=sync)
        with store.lock():
            if files.exists(store.path):
                raise UserError(f"'{path}' holds a gallery: name another folder")
            if foreign := store.foreign():
                raise UserError(
                    f"'{path}' is not empty: it holds '{show(foreign)}'\nname a new folder"
                )
            store.replace(_state(1, run, front, clips))
        return cls(path, sync=sync)

    def _take(self, state: State) -> None:
        """Takes what the folder holds."""
        self._state = state

    def refresh(self) -> None:
        """Reads the gallery anew if it was changed, by this process or another one.

        Raises:
          ValueError: the folder holds no gallery any more, or it is damaged.
        """
        if self._store.sha256() != self._state.sha256:
            self._take(self._store.read())

    @property
    def index(self) -> Index:
        """The identities that clips are compared with."""
        return self._state.index

    @property
    def folder(self) -> Path:
        """The folder, an absolute path."""
        return self._store.folder

    @property
    def version(self) -> int:
        """Number of changes of the folder, creation included."""
        return self._state.version

    @property
    def run(self) -> Origin:
        """The run that makes vectors."""
        return self._state.run

    @property
    def front(self) -> Front:
        """Coordinates and settings."""
        return self.coordinates.front

    @property
    def coordinates(self) -> Coordinates:
        """The coordinates, to turn vectors."""
        return self._state.index.coordinates

    @property
    def clips(self) -> Mapping[str, Clip]:
        """Name -> clip, strangers included."""
        return self._state.clips

    @property
    def identities(self) -> dict[str, int]:
        """Identity -> its number of clips, in the order of names."""
        groups = self._state.groups
        return {name: len(clips) for name, clips in groups.items() if name != STRANGER}

    @property
    def strangers(self) -> list[str]:
        """The clips of strangers, in the order of names."""
        return list(self._state.groups.get(STRANGER, ()))

    @property
    def still_held(self) -> int:
        """Number of removed clips to which the back end is fitted still; `refit` ends it."""
        return self._state.still_held

    @contextlib.contextmanager
    def _changing(self) -> Iterator[State]:
        """Holds the folder, cleans up, and gives what it holds now."""
        with self._store.lock():
            self._store.recover()
            self.refresh()
            yield self._state

    def add(self, clips: Mapping[str, Clip]) -> int:
        """Adds clips of people and of strangers, all or none, and returns how many are new.

        A clip that is there already, the same, is no change. A stranger may become a person, but no
        person a stranger: such clips stay what they are.

        Raises:
          ValueError: a clip is malformed, or is there as somebody else's or with another vector; or
            another process changes the gallery.
          OSError: the change cannot be written.
        """
        for name, clip in clips.items():
            _check(name, clip, self.front)
        with self._changing() as state:
            new = {name: clip for name, clip in clips.items() if _is_new(state, name, clip)}
            if new:
                every = {**state.clips, **new}
                groups = _regrouped(state, new)
                shown = {clip.identity for clip in new.values() if clip.identity is not None}
                people = _enrol(state.index.coordinates, {n: groups[n] for n in shown}, every)
                state = state._replace(
                    version=state.version + 1,
                    index=state.index.replaced(shown, people),
                    clips=every,
                    groups=groups,
                )
                self._take(state._replace(sha256=self._store.insert(state, new, people)))
            return len(new)

    def remove(
        self,
        *,
        identities: Iterable[str] = (),
        clips: Iterable[str] = (),
        refit: bool = True,
    ) -> int:
        """Removes people with all their clips, or single clips; returns the number of clips.

        Args:
          identities: the people.
          clips: the single clips.
          refit: whether to fit the back end anew, at once, where it was fitted to a clip that goes.
            Until that is done the gallery counts as holding the clip, see `still_held`.

        Raises:
          ValueError: a name is not there, or another process changes the gallery.
          OSError: the change cannot be written.
        """
        with self._changing() as state:
            gone: set[str] = set()
            for name in identities:
                if name == STRANGER or name not in state.groups:
                    raise unknown("identity", name, self.index.names)
                gone.update(state.groups[name])
            for name in clips:
                if name not in state.clips:
                    raise unknown("clip", name, state.clips)
                gone.add(name)
            if gone:
                held = state.still_held + sum(state.clips[name].fitted for name in gone)
                left = {name: clip for name, clip in state.clips.items() if name not in gone}
                touched = {state.clips[name].identity for name in gone}
                state = _with_clips(state, left, touched)._replace(still_held=held)
                self._write(state, refit=refit and held > 0)
            return len(gone)

    def rename(self, identity: str, to: str, *, merge: bool = False) -> int:
        """Gives a person another name; returns the number of clips.

        Args:
          identity: the person.
          to: the new name.
          merge: whether it may be that of another person, who is the same one.

        Raises:
          ValueError: nobody has the name, somebody has the new one, or another process changes the
            gallery.
          OSError: the change cannot be written.
        """
        _check_word("identity", to)
        with self._changing() as state:
            if identity == STRANGER or identity not in state.groups:
                raise unknown("identity", identity, self.index.names)
            if to == identity:
                raise UserError(f"'{show(to)}' has this name already")
            if to in state.groups and not merge:
                raise UserError(
                    f"'{show(to)}' is enrolled, too: this would make one person of two\n"
                    "if they are the same: merge=True, by command --merge; it cannot be undone"
                )
            names = state.groups[identity]
            self._relabel(state, dict.fromkeys(names, to))
            return len(names)

    def relabel(self, clip: str, identity: str) -> str | None:
        """Says that a clip shows somebody else; returns who it showed, None for a stranger.

        Raises:
          ValueError: the clip is not there, or shows this person already; or another process
            changes the gallery.
          OSError: the change cannot be written.
        """
        _check_word("identity", identity)
        with self._changing() as state:
            if clip not in state.clips:
                raise unknown("clip", clip, state.clips)
            before = state.clips[clip].identity
            if before == identity:
                raise UserError(f"clip '{show(clip)}' shows '{show(identity)}' already")
            self._relabel(state, {clip: identity})
            return before

    def _relabel(self, state: State, identity: Mapping[str, str]) -> None:
        """Writes other people to clips; the back end stays as it is until `refit`."""
        new = {n: state.clips[n]._replace(identity=person) for n, person in identity.items()}
        touched = {state.clips[name].identity for name in new} | set(identity.values())
        self._write(_with_clips(state, {**state.clips, **new}, touched), refit=False)

    def refit(self) -> None:
        """Fits coordinates and settings to the clips that are enrolled now.

        Where nobody is enrolled, they become those of no clip if a removed one is in them still.

        Raises:
          ValueError: nobody is enrolled, or another process changes the gallery.
          OSError: the change cannot be written.
        """
        with self._changing() as state:
            if not state.still_held:
                self.check_anybody()
            self._write(state, refit=True)

    def _write(self, state: State, *, refit: bool) -> None:
        """Writes the gallery as a new file, with a new back end if wanted."""
        version = state.version + 1
        if refit:
            front = fit_front(state.clips, self.front.widths, centred=state.run.centred)
            clips = {
                name: clip._replace(fitted=clip.identity is not None)
                for name, clip in state.clips.items()
            }
            state = _state(version, state.run, front, clips)
        else:
            state = state._replace(version=version)
        self._take(state._replace(sha256=self._store.replace(state)))

    def check_anybody(self) -> None:
        """Raises ValueError if nobody is enrolled."""
        if not self.index.names:
            raise UserError(f"gallery '{self.folder}' has nobody enrolled\nenrol people first")

    def log_probabilities(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields for every clip the logarithms of probabilities, see `Index.search`.

        Args:
          parts: [M] of [Q, D] float32, 0 for clips that lack the part.
        """
        self.refresh()
        return self.index.search(parts)

    def threshold(self, fpir: float) -> Threshold:
        """Sets a threshold on the strangers of the gallery, see `calibration.threshold`.

        The strangers are compared with all people once after every change.

        Raises:
          ValueError: nobody is enrolled, or the strangers cannot show the rate.
        """
        self.refresh()
        state = self._state
        self.check_anybody()
        strangers = state.groups.get(STRANGER, ())
        calibration.check_strangers(len(strangers), fpir)
        of, best = self._calibration or (None, np.zeros(0))
        if of is not state:
            vectors = np.stack([state.clips[name].vector for name in strangers])
            logs = state.index.search(state.index.coordinates.split(vectors))
            best = np.array([row[1:].max() for row in logs])
            self._calibration = state, best
        return calibration.threshold(best, fpir, len(state.index.names))


def fit_front(
    clips: Mapping[str, Clip],
    widths: Mapping[str, int],
    *,
    centred: bool,
    settings: Settings | None = None,
) -> Front:
    """Fits a front to labelled clips; their order does not matter. See `front.fit`."""
    names = sorted(name for name, clip in clips.items() if clip.identity is not None)
    people = sorted({str(clips[name].identity) for name in names})
    column = {person: number for number, person in enumerate(people, 1)}
    labels = np.array([column[str(clips[name].identity)] for name in names], np.int64)
    stacked = np.zeros((len(names), sum(widths.values())), np.float32)
    for row, name in enumerate(names):
        stacked[row] = clips[name].vector
    parts = np.split(stacked, np.cumsum(list(widths.values()))[:-1].tolist(), axis=1)
    vectors = dict(zip(widths, parts, strict=True))
    return front_lib.fit(vectors, labels, centred=centred, settings=settings)


def _state(version: int, run: Origin, front: Front, clips: Mapping[str, Clip]) -> State:
    """Returns the state of a gallery of some clips, whose people are computed."""
    coordinates, groups = Coordinates(front), group(clips)
    names = [name for name in groups if name != STRANGER]
    blocks = (
        _enrol(coordinates, {name: groups[name] for name in names[at : at + MOST_ROWS]}, clips)
        for at in range(0, len(names), MOST_ROWS)
    )
    return State(version, run, Index(coordinates, blocks), clips, groups)


def _enrol(
    coordinates: Coordinates, groups: Mapping[str, Sequence[str]], clips: Mapping[str, Clip]
) -> index_lib.People:
    """Returns people, whose clips are added up in the order of names."""
    width = sum(coordinates.front.widths.values())
    vectors = np.zeros((sum(map(len, groups.values())), width), np.float32)
    names = (name for some in groups.values() for name in some)
    for row, name in enumerate(names):
        vectors[row] = clips[name].vector
    sizes = np.array([len(some) for some in groups.values()], int)
    owner = np.repeat(np.arange(len(groups)), sizes)
    return index_lib.People(tuple(groups), coordinates.enrol(vectors, owner, len(groups)))


def _regrouped(state: State, new: Mapping[str, Clip]) -> dict[str, tuple[str, ...]]:
    """Returns the groups of a state with clips that are new, or a stranger's no more."""
    changed: dict[str, set[str]] = {}
    for name, clip in new.items():
        identity = clip.identity or STRANGER
        changed.setdefault(identity, set(state.groups.get(identity, ()))).add(name)
    if known := {name for name in new if name in state.clips}:
        changed[STRANGER] = changed.get(STRANGER, set(state.groups[STRANGER])) - known
    groups = {**state.groups, **{name: tuple(sorted(some)) for name, some in changed.items()}}
    return {name: groups[name] for name in sorted(groups) if groups[name]}


def _with_clips(state: State, clips: Mapping[str, Clip], touched: Collection[str | None]) -> State:
    """Returns a state with other clips of the touched people, in the same coordinates."""
    groups = group(clips)
    people = {name for name in touched if name is not None}
    some = {name: groups[name] for name in sorted(people) if name in groups}
    index = state.index.replaced(people, _enrol(state.index.coordinates, some, clips))
    return state._replace(index=index, clips=clips, groups=groups)


def _is_new(state: State, name: str, clip: Clip) -> bool:
    """Returns whether a clip is to be written; ValueError where it contradicts one."""
    old = state.clips.get(name)
    if old is None:
        return True
    if clip.identity is None and old.identity is not None:
        return False
    remedy = "names of clips are unique: give the new clip another name"
    if old.identity is not None and old.identity != clip.identity:
        raise UserError(
            f"clip '{show(name)}' is enrolled as '{show(old.identity)}', "
            f"not '{show(str(clip.identity))}'\n{remedy}"
        )
    same = old.vector.tobytes() == clip.vector.tobytes()
    if not same and old.identity == clip.identity:
        raise UserError(
            f"clip '{show(name)}' is enrolled with another vector: its features have changed, "
            f"or it is another clip of this name\n{remedy}"
        )
    return not same or old.identity != clip.identity


def _check(name: str, clip: Clip, front: Front) -> None:
    """Raises ValueError unless a clip can be kept."""
    _check_word("clip name", name)
    if clip.identity is not None:
        _check_word("identity", clip.identity)
    width = sum(front.widths.values())
    if clip.vector.shape != (width,) or clip.vector.dtype != np.float32:
        raise UserError(
            f"clip '{show(name)}': its vector is {clip.vector.dtype} {clip.vector.shape}, "
            f"wanted float32 ({width},)"
        )
    if not np.isfinite(clip.vector).all():
        raise UserError(f"clip '{show(name)}': its vector has a number that is not finite")
    if not clip.vector.any():
        raise UserError(f"clip '{show(name)}' has no usable frame: it shows nobody")


def _check_word(kind: Literal["clip name", "identity"], word: str) -> None:
    """Raises ValueError unless a name can be kept."""
    check_identity(word) if kind == "identity" else check_name(word)
    if len(word) > MOST_LETTERS:
        raise UserError(f"{kind} '{show(word)}' is longer than {MOST_LETTERS:,} letters")


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error of a clip or an identity that is not there, with one of a like name."""
    known = list(known)
    close = closest(name, known) if len(known) <= MOST_SUGGESTED else None
    hint = f": did you mean '{show(close)}'?" if close else ""
    return UserError(
        f"no {kind} '{show(name)}' is enrolled{hint}\nlist --clips names all people and clips"
    )
