"""A gallery, in which people are enrolled, identified and deleted without training.

    import vidjax

    gallery = vidjax.Gallery.create("people", vidjax.restore("runs/plda"))
    gallery.enrol({"clip_1": {"face": features}}, "Ada")
    gallery.identify({"clip_2": {"face": features}}, fpir=0.01)  # clip -> Answer
    gallery.remove(identity="Ada")

Thresholds are measured on strangers, clips of people who are not enrolled. The parameters that
compare vectors are called the back end. The order of changes does not matter: a new gallery of the
same clips with the same back end gives the same answers to 1e-6.

An open gallery always answers from the current content of its folder, even if another process has
changed the folder. `len`, `in`, iteration, `identities` and `digest` are current, too. The other
properties, such as `clips` and `version`, show the content that was read last, see `refresh`.

A change makes a new `State`, the content in memory, and never edits the old state. So a thread that
computes an answer uses one state. A change is first written to the folder. If writing fails, folder
and memory stay as they were, see `store.UncertainWriteError` for an exception.

A removed person leaves no trace in the folder. From the back end and all clips except one, the
vector of this one clip could be computed. Therefore `remove` fits the back end again to all clips
that are left. Clips that are enrolled after the removal do not change the back end. The training
run still depends on its training clips, and so does the back end of a gallery that was made with
`empty=True`. Only a new training run without the clips removes this dependence.
"""

import contextlib
import itertools
import math
import numbers
import os
import shlex
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np

from vidjax.apps.gallery import (
    answers as answers_lib,
    backend as backend_lib,
    card_notes,
    grouping,
    run_vectors,
    verification,
)
from vidjax.apps.gallery.answers import (
    ABOVE_HALF,
    DEFAULT_FPIR,
    MIN_NAMED_PROBABILITY,
    Answer,
    NamingRule,
    Threshold,
)
from vidjax.apps.gallery.backend import Backend, Index
from vidjax.apps.gallery.changes import (
    Draft,
    check_clip,
    check_person,
    find_enrolled,
    find_equal,
)
from vidjax.apps.gallery.enrolment import make_state, refit, stack_vectors
from vidjax.apps.gallery.run_vectors import RunVectors
from vidjax.apps.gallery.store import (
    MAX_VECTOR_WIDTH,
    STRANGER,
    Denials,
    NoGalleryError,
    State,
    Store,
    StoredClip,
    UnreadableError,
    UnwritableError,
    VectorOrigin,
)
from vidjax.apps.gallery.vectors import NetVectors, Vectors, select_usable_clips
from vidjax.apps.gallery.verification import Match, MatchRule
from vidjax.data.dataset import Dataset
from vidjax.data.labels import sort_identities
from vidjax.data.memory import FrameClips, MemoryClips, load_clips
from vidjax.evaluation import topk
from vidjax.models.card_check import Comparison
from vidjax.runs.terminal import ignore_count, say
from vidjax.utils import files, messages
from vidjax.utils.errors import InUseError, UserError, check_argument, warn
from vidjax.utils.names import cut_film_name, find_similar_names, normal_form, show, strip_ending

if TYPE_CHECKING:
    from vidjax.apps.cards import BackEnd
    from vidjax.data.packed_clips import Quality
    from vidjax.evaluation.predict import Predictor

T = TypeVar("T")
AnyClips: TypeAlias = FrameClips | Vectors
RANK_ROWS = 64  # clips that are ranked together
# The share of strangers with a probability above 0.5 in galleries of nets, see the benchmarks
# `calibration` and `decision`.
OF_STRANGERS = "2 to 7 %"


class Enrolment(NamedTuple):
    """The result of an enrolment.

    Attributes:
      enrolled: the number of new clips.
      unchanged: the number of clips that were enrolled before.
      refused: the clips without a usable frame, which were not enrolled.
      similar: new person -> an enrolled person with a similar name.
    """

    enrolled: int
    unchanged: int
    refused: tuple[str, ...]
    similar: dict[str, str]


class NobodyError(UserError):
    """No clip can be identified, because nobody is enrolled."""


class Gallery:
    """Enrolled people and their clips, in a folder. A gallery identifies the person in a new clip.

    `len`, `in` and iteration apply to the names of the people.

    The argument `clips` of a method is one of these:
      clips in memory, {clip: {modality: features}}, as for `Predictor.embed`. A clip may also have
        values of frames, such as `face_quality`;
      a dataset, together with the name of a `split`;
      the vectors that `embed` returns.

    A method that changes the gallery returns when the change is on the disk. After an error,
    nothing is changed. If the disk fails after the change was written, the message of the OSError
    says that the gallery was changed. All these methods raise ValueError if another process is
    changing the gallery, or if the gallery is read-only. They raise OSError if the disk is full or
    fails.
    """

    def __init__(self, folder: str | Path, *, run: "Predictor | str | Path | None" = None):
        """Opens a gallery.

        Args:
          run: the training run that computed the vectors, or its folder. The default is the folder
            that is stored in the gallery. If the run is no longer there, the default is the folder
            `runs/NAME` next to the gallery. The run is loaded when it is needed.

        Raises:
          ValueError: the folder contains no gallery, or a file of the gallery is damaged.
        """
        check_argument("Gallery: folder", folder, (str, os.PathLike), "the path of a folder")
        self._store = Store(Path(folder).expanduser().absolute())
        self._state = self._store.read()
        self._lock = threading.RLock()  # an older state must not replace a newer `_state`
        if run is not None and self.origin.cards:
            raise UserError(
                f"gallery '{self.folder}' was made from nets, so no run computes its vectors\n"
                "leave out --run, in Python run="
            )
        self._run = run
        self._checked: tuple[str, Predictor] | None = None  # digest of the run, and the run
        # A state, and values that were computed for it, see `_remember`.
        self._known: tuple[State, dict[object, Any]] = self._state, {}

    @classmethod
    def create(
        cls,
        folder: str | Path,
        run: "Predictor | str | Path",
        data: Dataset | None = None,
        *,
        strangers: str | None = None,
        empty: bool = False,
    ) -> "Gallery":
        """Makes a gallery that enrols the labelled training clips of a run.

        Clips are compared by PLDA. If the run is a PLDA run, the gallery uses the settings of the
        run. Otherwise, the settings are fitted to the training clips. They are also fitted, with a
        message, if the training clips of a person are as alike as photos of one day.

        Args:
          folder: a new or empty folder.
          run: the training run, or its folder.
          data: the dataset of the run. By default, it is loaded.
          strangers: the name of a split. Its clips without a label become clips of strangers,
            people who must not get a name. The default is the evaluated split, if any of its clips
            has a label.
          empty: True to enrol nobody. The gallery then contains only clips of strangers, and the
            parameters that were fitted to the training clips.

        Raises:
          ValueError: the folder is not empty, or no training clip has a label.
        """
        from vidjax.runs import digests
        from vidjax.training.public import check_loaded, load_data

        check_argument("Gallery.create: folder", folder, (str, os.PathLike), "the path of a folder")
        check_new(Path(folder))
        run = run_vectors.restore(run)
        if data is not None:
            check_loaded("Gallery.create", data)
        else:
            data = load_data(run.config)
            digests.check_data(run.workdir, run.manifest["data"], run.config, data)
        origin, backend, clips = run_vectors.fit(run, data, strangers=strangers, empty=empty)
        return cls.of_clips(folder, origin, backend, clips, run=run)

    @classmethod
    def of_models(cls, folder: str | Path, models: str | Path) -> "Gallery":
        """Makes an empty gallery for features that `vidjax extract` computes with the given models.

        Clips are compared by the distances of their vectors. Each model has a JSON file, its card,
        with the distribution of these distances.

        Args:
          folder: a new or empty folder.
          models: the folder of the models and their cards, see `vidjax.apps.cards`.

        Raises:
          ValueError: no card of a face or voice model contains a distribution of distances.
        """
        origin, back_ends = make_models_origin(models)
        return cls.of_clips(folder, origin, backend_lib.make_card_backend(back_ends), {})

    @classmethod
    def of_clips(
        cls,
        folder: str | Path,
        origin: VectorOrigin,
        backend: Backend,
        clips: Mapping[str, StoredClip],
        *,
        run: "Predictor | None" = None,
    ) -> "Gallery":
        """Makes a gallery of clips whose vectors are known, in a new or empty folder.

        `origin` describes the run or the models that computed the vectors. `backend` has the
        parameters that compare vectors. `clips` are name -> clip. `run` is the loaded run, if any.
        """
        path = Path(folder).expanduser().absolute()
        width = _check_width(backend)
        clips = {name: check_clip(name, clip, width) for name, clip in clips.items()}
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
        files.make_folder(path, "gallery:")
        check_new(path)
        store = Store(path)
        state = make_state(1, origin, backend, clips)
        store.create(state)
        _warn_of_similar(path, find_similar_names(state.people, ()))
        return cls(path, run=run)

    def __repr__(self) -> str:
        people, clips = len(self._state.index.names), len(self.clips) - len(self.strangers)
        return (
            f"<gallery '{self.folder}': {people} people, {clips} clips, "
            f"{len(self.strangers)} strangers, version {self.version}>"
        )

    def __len__(self) -> int:
        clips_of = self._read_current().clips_of
        return len(clips_of) - (STRANGER in clips_of)

    def __bool__(self) -> bool:
        return True  # even if nobody is enrolled

    def __contains__(self, identity: object) -> bool:
        if not isinstance(identity, str) or identity == STRANGER:
            return False
        return normal_form(identity) in self._read_current().clips_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.identities)

    # ---- content of the gallery

    @property
    def folder(self) -> Path:
        """The absolute path of the folder of the gallery."""
        return self._store.folder

    @property
    def version(self) -> int:
        """The number of changes of the gallery, including its creation."""
        return self._state.version

    @property
    def digest(self) -> str:
        """The sha256 of the current content, in hexadecimal digits."""
        return self._read_current().sha256.hex()

    @property
    def rows(self) -> int:
        """A digest of the enrolled clips. It does not depend on denied names."""
        return self._read_current().rows

    @property
    def origin(self) -> VectorOrigin:
        """The run or the models that compute the vectors."""
        return self._state.origin

    @property
    def index(self) -> Index:
        """The enrolled people, and the coefficients that compare clips with them."""
        return self._state.index

    @property
    def backend(self) -> Backend:
        """The parameters that compare the vectors of clips."""
        return self._state.index.backend

    @property
    def clips(self) -> Mapping[str, StoredClip]:
        """Name -> clip, including clips of strangers."""
        return self._state.clips

    @property
    def strangers(self) -> list[str]:
        """The sorted names of the clips of strangers."""
        return list(self._state.clips_of.get(STRANGER, ()))

    @property
    def identities(self) -> dict[str, int]:
        """The enrolled people, sorted: name -> number of clips."""
        return {name: len(clips) for name, clips in self.people.items()}

    @property
    def people(self) -> dict[str, tuple[str, ...]]:
        """The enrolled people, sorted: name -> sorted names of their clips."""
        return self._read_current().people

    @property
    def denied(self) -> Denials:
        """The names that a user denied: digest of a film -> clip of the film -> wrong names."""
        return self._read_current().denied

    def refresh(self) -> None:
        """Reads the gallery again if another process has changed it."""
        with self._lock:
            if self._store.sha256() != self._state.sha256:
                self._state = self._store.read()

    def remove_leftovers(self) -> None:
        """Deletes files of a killed process, because they may contain removed people.

        If the folder is in use or read-only, nothing is deleted.
        """
        with contextlib.suppress(InUseError, UnwritableError, OSError):
            self._store.remove_leftovers()

    def _read_current(self) -> State:
        with self._lock:
            self.refresh()
            return self._state

    def _remember(self, state: State, key: object, compute: Callable[[], T]) -> T:
        """Returns `compute()`, or its earlier result for the same state and key."""
        of, known = self._known  # another thread may replace the attribute
        if of is not state:
            self._known = state, (known := {})
        if key not in known:
            known[key] = compute()
        return known[key]

    @property
    def run(self) -> "Predictor":
        """The training run that computes vectors.

        Raises:
          ValueError: the gallery has no run, the run is missing, or its weights have changed.
        """
        if self.origin.cards:
            raise UserError(
                f"gallery '{self.folder}' was made from nets, not from a trained run\n"
                "give it features that vidjax extract has written: --input=FOLDER"
            )
        wanted = self.origin.digest  # changes if the gallery is made again
        if self._checked is None or self._checked[0] != wanted:
            place = self.origin.workdir
            remedy = "name its folder: run=FOLDER in Python, --run=FOLDER on the command line"
            copied = self.folder.parent / "runs" / Path(place).name  # with the gallery
            places = [x for x in (Path(place), copied) if (x / "config.json").exists()]
            if self._run is None and not places:
                raise UnreadableError(
                    f"the run that made gallery '{self.folder}' is neither at '{place}' nor at "
                    f"'{copied}'\n{remedy}"
                )
            run = run_vectors.restore(places[0] if self._run is None else self._run)
            if run_vectors.make_origin(run).digest != wanted:
                raise UnreadableError(
                    f"gallery '{self.folder}' was made with the run at '{place}', but "
                    f"'{run.workdir}' has other weights\n{remedy}"
                )
            self._checked = wanted, run
        return self._checked[1]

    def embed(
        self,
        clips: AnyClips,
        split: str | None = None,
        advance: Callable[[int], None] = ignore_count,
    ) -> Vectors:
        """Computes the vectors of clips.

        In a gallery of a run, the run computes the vectors. In a gallery of models, see
        `of_models`, the vector of a modality is the mean of its frames. If this mean is almost 0,
        the clip has no usable frame, and a warning appears. If `clips` are already vectors, they
        are returned unchanged.

        Args:
          clips, split: see the class.
          advance: is called with the number of clips of each finished batch.

        Raises:
          ValueError: `clips` are vectors, but their modalities or lengths do not fit the gallery.
        """
        self.refresh()  # another process may have added a modality
        if isinstance(clips, Vectors):
            return _check_modalities(clips, self.backend)
        return self._source.embed(clips, split, advance)

    @property
    def _source(self) -> NetVectors | RunVectors:
        return NetVectors(self.backend) if self.origin.cards else RunVectors(self.run)

    @property
    def reads(self) -> "tuple[dict[str, int], Quality]":
        """How `load` reads clips: modality -> width of features, and the quality: given or norm."""
        return self._source.reads

    def load(self, path: str | Path) -> MemoryClips:
        """Loads the clips of a folder or parquet table with the modalities of the gallery."""
        widths, quality = self.reads
        return load_clips(path, widths, (), quality=quality, nets=self.origin.cards)

    # ---- changes

    @contextlib.contextmanager
    def change(self, advance: Callable[[int], None] = ignore_count) -> Iterator[Draft]:
        """Makes several changes at once: `with gallery.change() as draft: draft.remove(...)`.

        The draft has the methods `add`, `remove`, `rename` and `relabel` of this class. It also has
        `complete`, but with the argument {clip: vector of all modalities}, and `deny`. All changes
        are written at the end of the block. If the block raises an error, nothing is written.
        During the block, no other process can change the gallery. `advance` is called at the end of
        the block, with numbers of new and changed clips that are finished.
        """
        with self._store.open(write=True) as transaction:
            draft = Draft(self._read_current())
            try:
                yield draft
            finally:
                draft.is_open = False
            if not draft:
                return
            state, people = draft.state(advance)
            if draft.refits:
                state = refit(state)
            with self._lock:
                self._state = self._store.write(transaction, state, draft.inserted, people)
        _warn_of_similar(self.folder, draft.similar)

    def enrol(
        self,
        clips: AnyClips,
        identities: str | Mapping[str, str] | None = None,
        *,
        split: str | None = None,
        strangers: bool = False,
        source: str = "identities",
        advance: Callable[[int], None] = ignore_count,
    ) -> Enrolment:
        """Enrols clips of new people, or more clips of enrolled people.

        Clips without a usable frame are left out. After an error, no clip is enrolled.

        Args:
          clips, split: see the class.
          identities: the person that all clips show, or clip -> person. The default is the labels
            of the dataset.
          strangers: False to leave out clips without a person. True to add only these clips, as
            clips of strangers.
          source: where the identities are from, such as a file, for a warning.
          advance: is called with numbers of new clips whose people are finished.

        Raises:
          ValueError: no clip has a person, no clip has a usable frame, the features do not fit the
            gallery, or a clip is already enrolled for another person or with another vector.
        """
        if identities is not None:
            wanted = "a name, or a dict {clip: name}"
            check_argument("enrol: identities", identities, (str, Mapping), wanted)
            # Names are checked before the vectors are computed, because this may take long.
            given = {"": identities} if isinstance(identities, str) else identities
            for name, identity in given.items():
                wanted = f"the name of a person for clip {name!r}"
                check_argument("enrol: identities", identity, (str, type(None)), wanted)
                _ = None if identity is None else check_person(identity)
        vectors = self.embed(clips, split)
        del clips  # a large table would need the memory twice
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
                "leave out --strangers, in Python strangers=True"
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
        del vectors
        if not chosen:
            raise UserError(
                f"none of the clips, such as '{show(refused[0])}', has a usable frame\n"
                "give clips with other frames"
            )
        with self.change(advance) as draft:
            new = draft.add(chosen)
        people = sorted({clip.identity for clip in chosen.values() if clip.identity})
        advise_other_films(self, people)
        return Enrolment(new, len(chosen) - new, refused, draft.similar)

    def add(self, clips: Mapping[str, StoredClip]) -> int:
        """Adds clips whose vectors are known; returns the number of new or changed clips.

        A clip that is already enrolled is skipped. If it is enrolled as a clip of a stranger, it is
        changed: it gets the person in `clips`.

        Raises:
          ValueError: a clip is malformed, or already enrolled for another person or with another
            vector. Then no clip is added.
        """
        with self.change() as draft:
            return draft.add(clips)

    def remove(
        self,
        *,
        identity: str | Collection[str] | None = None,
        clip: str | Collection[str] | None = None,
    ) -> int:
        """Removes people with all their clips, or single clips; returns the number of clips.

        Give either `identity` or `clip`: a name, or several names. If the parameters that compare
        vectors were fitted to a removed clip, they are fitted again to the remaining clips.

        Raises:
          ValueError: no person or clip has this name.
        """
        with self.change() as draft:
            return draft.remove(identity=identity, clip=clip)

    def rename(self, identity: str, to: str, *, merge: bool = False) -> int:
        """Renames the person `identity` to `to`; returns the number of the person's clips.

        If `merge` is True, `to` may be an enrolled person, and the two become one person.

        Raises:
          ValueError: nobody is called `identity`, or `to` is enrolled and `merge` is False.
        """
        with self.change() as draft:
            return draft.rename(identity, to, merge=merge)

    def relabel(self, clip: str, identity: str | None) -> str | None:
        """Changes the person of a clip; returns the old person. None stands for a stranger.

        Raises:
          ValueError: the clip is not enrolled, or already belongs to `identity`.
        """
        with self.change() as draft:
            return draft.relabel(clip, identity)

    def widen(
        self, models: str | Path, waiting: Mapping[str, str] | None = None
    ) -> tuple[str, ...]:
        """Adds new modalities, such as voices, to a gallery of models; returns their names.

        The folder `models` contains the models of the gallery, and models of new modalities.
        Enrolled clips lack the new modalities until `complete` adds them. If the cards of the
        models contain new numbers, the gallery uses the new numbers, with a message.

        If `waiting` is given, models of the gallery may have changed. Enrolled clips then lack the
        modalities of these models, and the result contains them, too. `waiting` is clip -> new name
        for clips that lose all modalities. A clip without any modality resembles nobody.

        Raises:
          ValueError: the gallery was made with a run, or a model of the gallery is missing in the
            folder, or has changed.
        """
        return self._adopt(*make_models_origin(models), waiting)

    def follow_cards(self) -> None:
        """Uses the numbers that the cards of the gallery's nets contain now.

        If the gallery or the cards cannot be read or written, the gallery keeps its numbers.
        """
        back_ends = self._read_back_ends()
        wanted = backend_lib.make_card_backend(back_ends)
        if back_ends and not backend_lib.compare_equal(self.backend, wanted):
            with contextlib.suppress(UnwritableError, InUseError, OSError):
                self._adopt(self.origin, back_ends)

    def _read_back_ends(self) -> "dict[str, BackEnd]":
        """Returns modality -> numbers in the card of its net; {} if the cards are not found."""
        from vidjax.apps import cards

        was = self.origin.cards
        try:
            found = cards.list_embedders(cards.read_all(Path(self.origin.workdir))) if was else {}
        except (UserError, OSError):
            return {}
        same = {part: x.back_end for part, x in found.items() if was.get(part) == x.digest}
        return {part: x for part, x in same.items() if x} if same.keys() == was.keys() else {}

    def _adopt(
        self,
        origin: VectorOrigin,
        back_ends: "Mapping[str, BackEnd]",
        waiting: Mapping[str, str] | None = None,
    ) -> tuple[str, ...]:
        """Uses other numbers, more modalities, or other models, see `widen`."""
        with self._store.open(write=True) as transaction:
            state = self._read_current()
            was, now = state.origin.cards, origin.cards
            changed = sorted(part for part in was if was[part] != now.get(part))
            blind = state.origin.blind and not changed
            origin = msgspec.structs.replace(origin, blind=blind)
            if not was or (changed and (waiting is None or was.keys() - now.keys())):
                made = f"other models of {', '.join(changed)}" if was else "a run, not with models"
                raise UserError(
                    f"gallery '{self.folder}' was made with {made}\n"
                    "use the same models, or name a new folder: --out=DIR"
                )
            backend = state.index.backend
            wide = backend_lib.make_card_backend(back_ends)
            is_equal = not changed and backend_lib.compare_equal(backend, wide)
            if was == now and is_equal and origin == state.origin and not waiting:
                return ()
            if not is_equal and not changed:
                say(
                    f"gallery '{self.folder}': the numbers in the card of the net have changed, "
                    "and the gallery uses the new numbers"
                )
            _check_width(wide)
            waiting, clips = waiting or {}, dict[str, StoredClip]()
            for name, clip in state.clips.items():
                vector = _widen(clip.vector, backend, wide, was if name in waiting else changed)
                clips[waiting.get(name, name)] = clip._replace(vector=vector)
            state = make_state(state.version + 1, origin, wide, clips, state.denied)
            with self._lock:
                self._state = self._store.write(transaction, state)
        return tuple(part for part in now if now[part] != was.get(part))

    def check_mirrored(self, cosines: Sequence[float]) -> None:
        """Names nobody from now on if a mirrored photo differs like the photo of another person.

        `cosines` are of the vectors of enrolled photos and their mirror images. If there are fewer
        than two, for example because photos are missing, the earlier result stays.
        """
        if len(cosines) < 2:
            return
        with self._store.open(write=True) as transaction:
            state = self._read_current()
            blind = state.index.compare_with_card().is_blind(cosines)
            if blind != state.origin.blind:
                origin = msgspec.structs.replace(state.origin, blind=blind)
                state = state._replace(version=state.version + 1, origin=origin)
                with self._lock:
                    self._state = self._store.write(transaction, state)

    def compare_with_card(self) -> Comparison:
        """Compares the enrolled people with the card of the net of faces.

        If there is no such card, the people do not contradict it.
        """
        return self._compare(self._read_current())

    def _compare(self, state: State) -> Comparison:
        comparison = self._remember(state, "card", state.index.compare_with_card)
        return comparison._replace(problem="blind") if state.origin.blind else comparison

    def describe_card(self) -> str:
        """Returns why names cannot be believed or are rare, with a remedy, or ""."""
        models = self.origin.workdir
        if problem := card_notes.describe_problem(self.compare_with_card(), models):
            return problem
        if not len(self):
            return ""
        face = self._read_back_ends().get("face")
        return card_notes.describe_default(models) if face and not face.is_measured else ""

    def warn_of_card(self) -> None:
        """Prints a warning if the enrolled people contradict the card of the net."""
        comparison = self.compare_with_card()
        if problem := card_notes.describe_problem(comparison, self.origin.workdir):
            say(problem, warning=True)

    def find_enrolled(self, vectors: Vectors) -> dict[str, str | None]:
        """Finds the clips that are enrolled with these vectors; returns clip -> person or None.

        None stands for a stranger. An enrolled clip may lack a modality.
        """
        given = {name: clip.vector for name, clip in select_usable_clips(vectors).items()}
        clips = self._read_current().clips
        return {name: clips[name].identity for name in find_equal(given, clips, self.backend)}

    def complete(self, vectors: AnyClips) -> set[str]:
        """Adds missing modalities to enrolled clips.

        `vectors` are clips with all modalities. A clip is skipped if it is not enrolled, or if it
        is enrolled with another vector of a modality. Returns the clips that are not skipped.
        """
        clips = select_usable_clips(self.embed(vectors))
        with self.change() as draft:
            return draft.complete({name: clip.vector for name, clip in clips.items()})

    # ---- answers

    def group(
        self,
        vectors: AnyClips,
        apart: Collection[tuple[str, str]] = (),
        *,
        clarity: Mapping[str, float] | None = None,
        together: Mapping[str, int] | None = None,
        settled: Collection[int] = (),
        for_votes: bool = False,
    ) -> dict[str, str]:
        """Groups clips that show the same person; returns clip -> name of its group.

        The largest group is called `unknown 1`, the next group `unknown 2`, and so on. Clips
        without a usable frame are left out.

        Args:
          vectors: clips in memory, or the vectors that `embed` returns.
          apart: pairs of clips that show different people, for example two faces in a picture.
          clarity: clip -> the clarity of its best face, 0 to 1, see `align.measure_clarity`. By
            default, it is 1. Unclear faces, with a clarity below 0.35, are never grouped only with
            each other.
          together: clip -> number. Clips with the same number certainly show the same person.
          settled: numbers in `together` of people who certainly differ from each other. Groups
            without these people are joined only with each other or with one of these people.
          for_votes: True for the groups of `identify`, whose clips vote on one name. These groups
            are larger, and a few contain clips of two people.
        """
        vectors = self.embed(vectors)
        usable = np.flatnonzero(np.any([x.any(axis=1) for x in vectors.parts.values()], axis=0))
        names = [vectors.names[place] for place in usable.tolist()]
        parts = [x[usable] for x in vectors.parts.values()]
        clear = [(clarity or {}).get(name, 1.0) for name in names]
        first, people = dict[object, int](), [(together or {}).get(name, name) for name in names]
        labels = grouping.group(
            self.backend, names, parts, apart, clarity=clear, for_votes=for_votes,
            start=[first.setdefault(person, row) for row, person in enumerate(people)],
            settled=[person in settled for person in people],
        )  # fmt: skip
        return answers_lib.name_groups(names, labels)

    def _require_people(self) -> State:
        state = self._read_current()
        if not state.index.names:
            raise NobodyError(
                f"nobody is enrolled in gallery '{self.folder}'\n"
                "enrol people first: vidjax gallery enrol"
            )
        return state

    def threshold(self, fpir: float) -> Threshold:
        """Returns the threshold that limits the share of new strangers who get a name to `fpir`.

        The first call after a change is slow: all clips of strangers are compared with all people.

        Raises:
          ValueError: nobody is enrolled, or there are fewer than 1 / fpir - 1 clips of strangers.
        """
        check_argument("threshold: fpir", fpir, numbers.Real, "a number")
        return self._measure_threshold(self._require_people(), fpir)

    def _measure_threshold(self, state: State, fpir: float) -> Threshold:
        def compare() -> np.ndarray:
            strangers = [*_list_usable_strangers(state)]
            answers_lib.check_strangers(len(strangers), fpir)
            nearest = state.index.nearest(self._stack(state, strangers), 1)
            # A stranger who equals the centre of all vectors resembles nobody.
            return np.array([match.best[0][1] if match.best else -math.inf for match in nearest])

        best = self._remember(state, "strangers", compare)
        answers_lib.check_strangers(len(best), fpir)
        return answers_lib.measure_threshold(best, fpir, len(state.index.names))

    def rule(self, *, fpir: float | None = None, threshold: float | None = None) -> NamingRule:
        """Returns the rule that decides if a clip gets a name. See `identify` for the arguments."""
        return self._rule(self._require_people(), fpir, threshold)

    def _rule(self, state: State, fpir: float | None, threshold: float | None) -> NamingRule:
        answers_lib.check_choice(fpir, threshold)
        if self._compare(state).problem == "blind":
            is_default = fpir is None and threshold is None
            return NamingRule("threshold", math.inf, is_default, None, card_notes.NOBODY)
        if threshold is not None:
            about = f"the probability is {100 * threshold:.10g} % or more"
            return NamingRule("threshold", math.log(threshold), False, None, about)
        wanted = answers_lib.count_needed_strangers(DEFAULT_FPIR)
        strangers = len([*itertools.islice(_list_usable_strangers(state), wanted)])
        if fpir is None and strangers < wanted:
            about = ABOVE_HALF
            about += f", which {OF_STRANGERS} of strangers reach" if state.origin.cards else ""
            about += f"; with {wanted} clips of strangers instead of {strangers}, at most "
            about += f"{100 * DEFAULT_FPIR:g} % of new strangers would get a name"
            return NamingRule("new", math.log(MIN_NAMED_PROBABILITY), True, None, about)
        limit = self._measure_threshold(state, DEFAULT_FPIR if fpir is None else fpir)
        about = f"the probability is {answers_lib.describe_probability(limit.score)} or more, "
        about += f"which at most {100 * limit.fpir:.10g} % of new strangers reach, and is higher "
        about += "than the probability of all other enrolled people together"
        return NamingRule("fpir", limit.score, fpir is None, limit, about)

    def identify(
        self,
        clips: AnyClips,
        k: int = 5,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        split: str | None = None,
        groups: Mapping[str, str] | None = None,
        advance: Callable[[int], None] = ignore_count,
    ) -> dict[str, Answer]:
        """Identifies the person in each clip; returns clip -> answer.

        The person of a clip without a usable frame is unknown. In a gallery of models, the person
        is also unknown if the clip and the most probable person have no modality in common.

        Args:
          clips, split: see the class.
          k: the largest number of identities in `Answer.best`.
          fpir: the largest share of new strangers that may get a name. The lowest probability of a
            name is measured on the clips of strangers in the gallery. A name must also be more
            probable than all other enrolled people together. The default is 0.01. If the gallery
            has fewer than 99 clips of strangers, by default a name needs a probability above 0.5.
          threshold: the lowest probability at which a clip gets a name. Give either `fpir` or
            `threshold`. (In `Predictor.identify`, `threshold` is a logarithm.)
          groups: clip -> group, as `group` returns. All clips of a group are compared together and
            get the same name. Each clip has two probabilities of this name: for the whole group,
            and for only this clip. The answer has the lower one, which must reach `threshold` or
            the measured threshold. If the second probability is below 0.1, the clip leaves the
            group. Only a gallery of models accepts groups.
          advance: is called for each answer, with the number of clips that get this answer.

        Raises:
          ValueError: nobody is enrolled, there are fewer than 1 / fpir - 1 clips of strangers, the
            features do not fit the gallery, or `groups` are given for a gallery of a run.
        """
        check_argument("identify: k", k, numbers.Integral, "a number of identities")
        if k < 1:
            raise UserError(f"k={k} is below 1: give the number of identities to list")
        if groups is not None and not self.origin.cards:
            raise UserError(
                "groups need a gallery that was created with --models; this gallery has a run\n"
                "leave groups out"
            )
        if not isinstance(clips, Vectors):  # reports mistakes before vectors are computed
            self.rule(fpir=fpir, threshold=threshold)
        vectors, state = self.embed(clips, split), self._require_people()
        rule, parts = self._rule(state, fpir, threshold), list(vectors.parts.values())
        owner = np.arange(len(vectors.names))
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

    def match_rule(self, identity: str | None = None, *, fmr: float | None = None) -> MatchRule:
        """Returns the rule by which `verify` accepts clips of the person `identity`.

        If `identity` is None, returns the rule by which `compare` accepts two clips.
        """
        return self._match_rule(self._read_current(), identity, fmr)

    def _match_rule(self, state: State, identity: str | None, fmr: float | None) -> MatchRule:
        verification.check_fmr(fmr)
        if identity is not None:
            check_argument("identity", identity, str, "the name of a person")
            find_enrolled("identity", identity := normal_form(identity), state.people)
        if self._compare(state).problem == "blind":
            rate = fmr or verification.DEFAULT_FMR
            return MatchRule("blind", rate, math.inf, None, card_notes.NOBODY)

        def make() -> MatchRule:
            parts = self._stack(state, [*_list_usable_strangers(state)])
            if identity is not None:
                ratios, shared = state.index.ratios(parts, identity)
            else:
                ratios, shared = verification.pair_strangers(state.index.backend, parts)
            ratios = ratios[shared.any(axis=0)]
            return verification.make_rule(ratios, fmr, pairs=identity is None)

        return self._remember(state, (identity, fmr), make)

    def _stack(self, state: State, names: Sequence[str]) -> list[np.ndarray]:
        """Returns the vectors of enrolled clips, M arrays [N, D]."""
        width = sum(state.index.backend.widths.values())
        return state.index.backend.split(stack_vectors(names, state.clips, width))

    def verify(
        self,
        clips: AnyClips,
        identity: str,
        *,
        fmr: float | None = None,
        split: str | None = None,
    ) -> dict[str, Match]:
        """Decides for each clip if it shows the person `identity`; returns clip -> comparison.

        Args:
          clips, split: see the class.
          fmr: the largest share of clips of other people that may be accepted. The threshold is
            measured on the clips of strangers in the gallery. The default is 0.01. If the gallery
            has fewer than 99 clips of strangers, the default threshold is a likelihood ratio of
            100, see `verification`.

        Raises:
          ValueError: nobody is called `identity`, or there are fewer than 1 / fmr - 1 clips of
            strangers, or the features do not fit the gallery.
        """
        check_argument("verify: identity", identity, str, "the name of a person")
        if not isinstance(clips, Vectors):  # reports mistakes before vectors are computed
            self.match_rule(identity, fmr=fmr)
        vectors, state = self.embed(clips, split), self._read_current()
        rule, person = self._match_rule(state, identity, fmr), normal_form(identity)
        parts, names = [*vectors.parts.values()], state.clips_of[person]
        backend = state.index.backend
        matches = verification.make_matches(rule, backend, *state.index.ratios(parts, person))
        enrolled = self._stack(state, names)
        matches = verification.add_fits(backend, matches, parts, names, enrolled)
        return dict(zip(vectors.names, matches, strict=True))

    def find_misfits(self, identity: str, clips: Collection[str] | None = None) -> dict[str, float]:
        """Finds enrolled clips that differ from most clips of the person `identity`.

        Each clip is compared with the person's other clips. If the names `clips` are given, only
        these clips are compared with the others. Returns clip -> median of its log ratios, if the
        median is below 0, lowest first.
        """
        state = self._read_current()
        names = find_enrolled("identity", normal_form(identity), state.people)
        vectors = self._stack(state, names)
        return verification.find_misfits(state.index.backend, names, vectors, clips)

    def compare(
        self, clips: AnyClips, others: AnyClips | None = None, *, fmr: float | None = None
    ) -> dict[tuple[str, str], Match]:
        """Decides for pairs of clips if they show the same person. Nobody needs to be enrolled.

        Args:
          clips, others: see the class. Each of `clips` is compared with each of `others`. If
            `others` is None, each of `clips` is compared with each other clip.
          fmr: as in `verify`. For two clips, the threshold is measured on pairs of strangers, so
            twice as many are needed.

        Returns:
          (clip, other clip) -> comparison.

        Raises:
          ValueError: there are no pairs or too many pairs, or as in `verify`.
        """
        self.match_rule(fmr=fmr)  # reports mistakes before vectors are computed
        first = self.embed(clips)
        second, state = first if others is None else self.embed(others), self._read_current()
        num_others = None if others is None else len(second.names)
        rows, columns = verification.list_pairs(len(first.names), num_others)
        backend, rule = state.index.backend, self._match_rule(state, None, fmr)
        x, y = (backend.whiten([*v.parts.values()]) for v in (first, second))
        ratios, shared = verification.pair_log_ratios(
            backend, [a[rows] for a in x], [b[columns] for b in y]
        )
        matches = verification.make_matches(rule, backend, ratios, shared)
        keys = ((first.names[a], second.names[b]) for a, b in zip(rows, columns, strict=True))
        return dict(zip(keys, matches, strict=True))

    def rank(
        self,
        clips: AnyClips,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        split: str | None = None,
        advance: Callable[[int], None] = ignore_count,
    ) -> dict[str, list[tuple[str, float]]]:
        """Lists the most probable clips of each enrolled person.

        Args:
          clips, split: see the class.
          fpir, threshold: if one of them is given, the list of a person contains only clips whose
            probability is high enough for a name, see `identify`.
          advance: is called with the number of clips of each finished block.

        Returns:
          Identity -> list of (clip, logarithm of the probability) of the best 100 clips, best
          first. Clips with equal scores are in the order of their names. Identities are sorted by
          name. If all identities are whole numbers, they are sorted by number.

        Raises:
          ValueError: as in `identify`.
        """
        self.rule(fpir=fpir, threshold=threshold)  # reports mistakes before vectors are computed
        vectors, state = self.embed(clips, split), self._require_people()
        rule, searched = self._rule(state, fpir, threshold), state.index
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


def _list_usable_strangers(state: State) -> Iterator[str]:
    # A clip without a vector waits until `vidjax who` reads its film with the present models.
    return (name for name in state.clips_of.get(STRANGER, ()) if state.clips[name].vector.any())


def _sum_others(scores: np.ndarray) -> np.ndarray:
    """Returns the argument `others` [Q, N] of `NamingRule.names` for Q clips and N people.

    `scores` [Q, N] are log-probabilities. For the most probable person of a clip, the result is the
    log-probability of all other people together. For other people, it is the highest score of the
    clip, so that they get no name.
    """
    # Only the most probable person can have a higher probability than all others together.
    others = np.repeat(scores.max(axis=1, keepdims=True), scores.shape[1], axis=1)
    for row, best in enumerate(scores.argmax(axis=1).tolist()):
        others[row, best] = backend_lib.sum_others(scores[row], best)
    return others


def check_new(folder: Path) -> None:
    """Raises UserError if a folder contains files. Files of a killed process are ignored."""
    store = Store(folder.expanduser().absolute())
    if not store.folder.is_dir():
        return
    if foreign := store.foreign():
        raise UserError(
            f"'{store.folder}' is not empty: it contains '{show(foreign)}'\n"
            f"{store.advise_on_run() or 'name a new folder'}"
        )
    with contextlib.suppress(NoGalleryError):
        store.sha256()
        raise UserError(f"'{store.folder}' already contains a gallery: name another folder")


def _check_width(backend: Backend) -> int:
    width = sum(backend.widths.values())
    if width > MAX_VECTOR_WIDTH:
        raise UserError(
            f"the vector of a clip has {width:,} numbers, but a gallery can store at most "
            f"{MAX_VECTOR_WIDTH:,}\nuse an ensemble with fewer members, or a narrower net"
        )
    return width


def _check_modalities(vectors: Vectors, backend: Backend) -> Vectors:
    widths = {part: x.shape[1] for part, x in vectors.parts.items()}
    if [*widths.items()] != [*backend.widths.items()]:
        raise UserError(
            f"the vectors have the widths {widths}, but the gallery compares {backend.widths}\n"
            "compute them with `embed` of this gallery"
        )
    return vectors


def _widen(
    vector: np.ndarray, backend: Backend, wide: Backend, changed: Collection[str]
) -> np.ndarray:
    """Extends a clip's vector to the modalities of `wide`. New and `changed` modalities are 0."""
    present = dict(zip(backend.widths, backend.split(vector[None]), strict=True))
    present = {part: x for part, x in present.items() if part not in changed}
    parts = [present.get(part, np.zeros((1, width))) for part, width in wide.widths.items()]
    return np.concatenate(parts, axis=1, dtype=np.float32)[0]


def make_models_origin(models: str | Path) -> "tuple[VectorOrigin, dict[str, BackEnd]]":
    """Reads the cards of models, the JSON files that describe them.

    Returns a description of the models, and modality -> distribution of cosines. Raises UserError
    if no card contains such a distribution.
    """
    from vidjax.apps import cards

    check_argument("Gallery: models", models, (str, os.PathLike), "the path of a folder")
    path = Path(models).expanduser().absolute()
    usable = cards.list_embedders(cards.load(path))
    back_ends = {part: card.back_end for part, card in usable.items() if card.back_end}
    if not back_ends:
        raise UserError(
            f"'{path}' needs a net of faces or voices whose JSON file has a back_end\n"
            f"{cards.describe_remedy('face_embedder', path)}"
        )
    digests = {part: usable[part].digest for part in back_ends}
    return VectorOrigin(str(path), files.sha256_json(digests), True, digests), back_ends


def check_given(identities: Mapping[str, str], clips: Collection[str], source: str) -> None:
    """Warns about keys of `identities` that are not clips. Raises UserError if no key is a clip."""
    stray = sorted(map(str, identities.keys() - {*clips}))
    if not stray:
        return
    example = show(min(clips))
    text = f"no clip is called '{show(stray[0])}'; an example of a clip is '{example}'"
    if len(stray) == len(identities):
        raise UserError(f"{source}: {text}\nuse the clip names of the features")
    warn(f"{source}: {text}\n{len(stray):,} of {len(identities):,} names are not used")


def _warn_of_similar(folder: Path, names: Mapping[str, str]) -> None:
    """Warns that a new name resembles an enrolled name. `names` are new name -> enrolled name."""
    for name, other in itertools.islice(names.items(), 1):
        more = f" (similar names: {len(names):,})" if len(names) > 1 else ""
        words = ["vidjax", "gallery", "rename", str(folder), f"--identity={name}", f"--to={other}"]
        warn(
            f"'{show(name)}' looks like '{show(other)}', but was enrolled as another person{more}\n"
            f"if they are the same: {shlex.join([*words, '--merge'])}"
        )


def advise_other_films(gallery: Gallery, people: Iterable[str]) -> None:
    """Prints which `people` have only clips of a single film, or clips that count as one clip."""
    enrolled, index = gallery.people, gallery.index
    counts = dict(zip(index.names, index.counts.max(axis=0).tolist(), strict=True))
    clips_of = {name: enrolled.get(name, ()) for name in people}
    few = [
        name for name, clips in clips_of.items()
        if len(clips) > 1 and (len({*map(cut_film_name, clips)}) == 1 or counts[name] == 1)
    ]  # fmt: skip
    if few:
        named = messages.list_some([*map(show, few)], 3)
        say(
            f"for {named}: the clips of each person are from one film or day and look alike: "
            "add clips from other films or days"
        )
