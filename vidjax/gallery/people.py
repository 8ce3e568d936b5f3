"""The people of a gallery: who is enrolled by which clips, on disk and in the index, as vectors.

Every change is written first. What is in memory changes after that, so an error leaves both as they
were. Where another process has changed the folder meanwhile, a change begins by reading it anew.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vidjax import files
from vidjax.data.untrusted.names import check_name, show
from vidjax.gallery import blocks as blocks_lib
from vidjax.gallery import calibration
from vidjax.gallery import front as front_lib
from vidjax.gallery.blocks import Block, Clip
from vidjax.gallery.calibration import Threshold
from vidjax.gallery.contents import Contents
from vidjax.gallery.coordinates import Coordinates
from vidjax.gallery.front import Front
from vidjax.gallery.index import Index
from vidjax.gallery.manifest import MOST_LETTERS, MOST_WIDTH, Origin
from vidjax.gallery.store import State, Store, most_clips
from vidjax.models.plda import Settings
from vidjax.run import workdir as workdir_lib
from vidjax.suggest import closest

MOST_SUGGESTED = 20_000  # names that a misspelt one is compared with: takes a second


class People:
    """Enrolled clips and strangers.

    Attributes:
      index: the identities that clips are compared with.
    """

    def __init__(self, folder: str | Path, *, sync: bool = False):
        """Reads a gallery.

        Args:
          folder: the gallery.
          sync: whether a change waits until the disk has it, see `Store`.

        Raises:
          ValueError: there is no gallery, or it is damaged; the error names the file.
        """
        self._store = Store(Path(folder).expanduser().absolute(), sync=sync)
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
            raise ValueError(
                f"vectors of {sum(front.widths.values()):,} numbers are too wide for a gallery: "
                f"{MOST_WIDTH:,} are the most\nmake it with fewer members, or with a narrower net"
            )
        for name, clip in clips.items():
            _check(name, clip, front)
        workdir_lib.make_workdir(path, "gallery:")
        store = Store(path, sync=sync)
        with store.lock():
            if files.exists(store.path):
                raise ValueError(f"'{path}' holds a gallery: name another folder, or delete it")
            if foreign := store.foreign():
                raise ValueError(
                    f"'{path}' is not empty: it holds '{show(foreign)}'\nname a new folder"
                )
            store.sweep()
            change = Contents(most_clips(sum(front.widths.values())), {}).plan(clips, ())
            store.write(1, run, front, gone=(), new=change.blocks(Coordinates(front)))
        return cls(path, sync=sync)

    def _take(self, state: State) -> None:
        """Takes what the folder holds."""
        self._version, self._run, self._contents = state.version, state.run, state.contents
        self._use(state.front, state.contents.blocks)

    def _use(self, front: Front, blocks: Mapping[str, Block]) -> None:
        """Takes a front, and blocks in its coordinates."""
        self._coordinates = Coordinates(front)
        self.index = Index(self._coordinates)
        self.index.replace((), blocks)
        self._calibration: np.ndarray | None = None

    @property
    def folder(self) -> Path:
        """The folder, an absolute path."""
        return self._store.folder

    @property
    def version(self) -> int:
        """Number of changes of the folder, creation included."""
        return self._version

    @property
    def run(self) -> Origin:
        """The run that makes vectors."""
        return self._run

    @property
    def front(self) -> Front:
        """Coordinates and settings."""
        return self._coordinates.front

    @property
    def coordinates(self) -> Coordinates:
        """The coordinates, to turn vectors."""
        return self._coordinates

    @property
    def clips(self) -> Mapping[str, Clip]:
        """Name -> clip, strangers included."""
        return self._contents

    @property
    def identities(self) -> dict[str, int]:
        """Identity -> its number of clips, in the order of names."""
        return self._contents.counts

    @property
    def strangers(self) -> list[str]:
        """The clips of strangers, in the order of names."""
        return self._contents.strangers

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the folder, reads it anew where another process has changed it, and cleans up."""
        with self._store.lock():
            if not self._store.is_current():
                self._take(self._store.read())
            self._store.sweep()
            yield

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
        with self._changing():
            new = {name: clip for name, clip in clips.items() if self._is_new(name, clip)}
            if new:
                self._change(new, ())
            return len(new)

    def _is_new(self, name: str, clip: Clip) -> bool:
        """Returns whether a clip is to be written; ValueError where it contradicts one."""
        old = self._contents.get(name)
        if old is None:
            return True
        if clip.identity is None and old.identity is not None:
            return False
        remedy = f"remove it first: remove G --clip={show(name)}"
        if old.identity is not None and old.identity != clip.identity:
            raise ValueError(
                f"clip '{show(name)}' is enrolled as '{show(old.identity)}', "
                f"not '{show(str(clip.identity))}'\n{remedy}"
            )
        same = old.vector.tobytes() == clip.vector.tobytes()
        if not same and old.identity == clip.identity:
            raise ValueError(
                f"clip '{show(name)}' is enrolled with another vector: its features have changed, "
                f"or it is another clip of this name\n{remedy}"
            )
        return not same or old.identity != clip.identity

    def remove(self, *, identities: Iterable[str] = (), clips: Iterable[str] = ()) -> int:
        """Removes people with all their clips, or single clips; returns the number of clips.

        Raises:
          ValueError: a name is not there, or another process changes the gallery.
          OSError: the change cannot be written.
        """
        with self._changing():
            gone = set()
            for name in identities:
                shown = self._contents.clips_of(name)
                if not shown:
                    raise _unknown("identity", name, self.index.names)
                gone |= shown.keys()
            for name in clips:
                if name not in self._contents:
                    raise _unknown("clip", name, self._contents)
                gone.add(name)
            if gone:
                self._change({}, gone)
            return len(gone)

    def _change(self, new: Mapping[str, Clip], gone: Collection[str]) -> None:
        """Writes a change, then makes it in memory."""
        change = self._contents.plan(new, gone)
        blocks = dict(change.blocks(self._coordinates))
        moves = change.moves
        self._store.write(
            self._version + 1, self._run, self.front, gone=moves.gone, new=blocks.items()
        )
        self._version += 1
        self._contents.apply(change, blocks)
        self.index.replace(moves.gone, blocks)
        self._calibration = None

    def refit(self) -> None:
        """Fits coordinates and settings to the clips that are enrolled now.

        Raises:
          ValueError: nobody is enrolled, or another process changes the gallery.
          OSError: the change cannot be written.
        """
        with self._changing():
            self.check_anybody()
            front = fit_front(self._contents, self.front.widths, centred=self._run.centred)
            coordinates, old = Coordinates(front), self._contents.blocks
            new = {p: blocks_lib.refitted(coordinates, block) for p, block in old.items()}
            self._store.write(
                self._version + 1, self._run, front, gone=(), new=new.items(), refitted=True
            )
            self._version += 1
            old.update(new)
            self._use(front, new)

    def check_anybody(self) -> None:
        """Raises ValueError if nobody is enrolled."""
        if not self.index.names:
            raise ValueError(
                f"gallery '{self.folder}' has nobody enrolled\nenrol people first: enrol G"
            )

    def log_probabilities(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields for every clip the logarithms of probabilities, see `Index.log_probabilities`.

        Args:
          parts: [M] of [Q, D] float32, 0 for clips that lack the part.
        """
        for at in range(0, len(parts[0]), front_lib.MOST_ROWS):
            block = self._coordinates.whiten([x[at : at + front_lib.MOST_ROWS] for x in parts])
            for row in range(len(block[0])):
                yield self.index.log_probabilities([z[row] for z in block])

    def threshold(self, fpir: float) -> Threshold:
        """Sets a threshold on the strangers of the gallery, see `calibration.threshold`.

        The strangers are compared with all people once after every change.

        Raises:
          ValueError: nobody is enrolled, or the strangers cannot show the rate.
        """
        self.check_anybody()
        strangers = self.strangers
        calibration.threshold(np.zeros(len(strangers)), fpir, 1)  # refuses what cannot be
        if self._calibration is None:
            vectors = np.stack([self._contents[name].vector for name in strangers])
            logs = self.log_probabilities(self._coordinates.split(vectors))
            self._calibration = np.array([row[1:].max() for row in logs])
        return calibration.threshold(self._calibration, fpir, len(self.index.names))


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
    stacked = np.stack([clips[name].vector for name in names])
    parts = np.split(stacked, np.cumsum(list(widths.values()))[:-1].tolist(), axis=1)
    vectors = dict(zip(widths, parts, strict=True))
    return front_lib.fit(vectors, labels, centred=centred, settings=settings)


def _check(name: str, clip: Clip, front: Front) -> None:
    """Raises ValueError unless a clip can be kept."""
    for kind, word in (("clip name", name), ("identity", clip.identity)):
        if word is not None and len(check_name(word, kind)) > MOST_LETTERS:
            raise ValueError(f"{kind} '{show(word)}' is longer than {MOST_LETTERS:,} letters")
    width = sum(front.widths.values())
    if clip.vector.shape != (width,) or clip.vector.dtype != np.float32:
        raise ValueError(
            f"clip '{show(name)}': its vector is {clip.vector.dtype} {clip.vector.shape}, "
            f"wanted float32 ({width},)"
        )
    if not np.isfinite(clip.vector).all():
        raise ValueError(f"clip '{show(name)}': its vector has a number that is not finite")
    if not clip.vector.any():
        raise ValueError(f"clip '{show(name)}' has no usable frame: it shows nobody")


def _unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    known = list(known)
    close = closest(name, known) if len(known) <= MOST_SUGGESTED else None
    hint = f": did you mean '{show(close)}'?" if close else ""
    return ValueError(f"no {kind} '{show(name)}' is enrolled{hint}\nlist G names all people")
