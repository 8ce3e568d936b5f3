"""A gallery of people: enrolled, found and deleted without training.

    import vidjax

    gallery = vidjax.Gallery.create("people", vidjax.restore("runs/plda"))
    gallery.enrol({"clip_1": {"face": features}}, "Ada")
    gallery.identify({"clip_2": {"face": features}}, fpir=0.01)  # clip -> Answer
    gallery.remove(identity="Ada")

A person is stored, for each modality, as a number of clips and the sum of their vectors. Strangers
are clips of people who are not enrolled; thresholds are set on them. A gallery made at once of the
same clips with the same back end gives the same answers, to 1e-6.

An open gallery answers from what the folder holds at that moment, whoever changed it. A `State` is
replaced and never changed: an answer under way in another thread uses the state that it began with.
A change is written to the folder first, so an error leaves folder and memory as they were.

A removed person leaves no trace in the folder. A back end that was fitted to a removed clip would:
its centre and the other clips give the vector. So `remove` fits such a back end anew. The run keeps
what it learned of its training clips, and so does the back end of a gallery made with `empty`.
Only another training without the clips ends that.
"""

import contextlib
import itertools
import math
import numbers
import os
import shlex
import threading
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, Union

import numpy as np

from vidjax.apps.gallery import answers as answers_lib
from vidjax.apps.gallery import backend as backend_lib
from vidjax.apps.gallery import grouping
from vidjax.apps.gallery.answers import ABOVE_HALF, DEFAULT_FPIR, Answer, NamingRule, Threshold
from vidjax.apps.gallery.backend import MAX_BLOCK_PEOPLE, Backend, Index
from vidjax.apps.gallery.changes import Draft, by_film, check_clip, check_person, enrol, stack_films
from vidjax.apps.gallery.store import (
    MAX_VECTOR_WIDTH,
    STRANGER,
    NoGalleryError,
    State,
    Store,
    StoredClip,
    UnreadableError,
    UnwritableError,
    VectorOrigin,
    group,
)
from vidjax.apps.video.features_folder import cut_film_name
from vidjax.data.clips import BUCKETS, MAX_EVAL_FRAMES, PAD_LENGTHS, EvalPlan, TrainingData, longest
from vidjax.data.labels import sort_identities
from vidjax.data.memory import MemoryClips, load_clips
from vidjax.data.untrusted.names import normal_form, show, similar_names
from vidjax.models.two_covariance import Settings
from vidjax.runs.terminal import say, uncounted
from vidjax.utils import files
from vidjax.utils.errors import InUseError, UserError, check_argument, warn

if TYPE_CHECKING:
    from vidjax.apps.video.cards import BackEnd
    from vidjax.core.batch import Batch
    from vidjax.data.clips import ClipSource
    from vidjax.data.frame_fields import Quality
    from vidjax.data.packing import Clips
    from vidjax.evaluation.predict import Predictor
    from vidjax.evaluation.topk import ScoreBlock

FrameClips: TypeAlias = Union["Clips", TrainingData, MemoryClips]
AnyClips: TypeAlias = Union[FrameClips, "Vectors"]
RANK_ROWS = 256  # clips of a block of scores
EMBED_ROWS = 32  # clips of a block of vectors
EMBEDDING = "embedding"  # the one part of a run that is no PLDA


class Enrolment(NamedTuple):
    """Counts of new and of already enrolled clips, and names of those without a usable frame.

    `similar` are new person -> another person, whose name looks alike.
    """

    enrolled: int
    unchanged: int
    refused: tuple[str, ...]
    similar: dict[str, str]


class Vectors(NamedTuple):
    """The unit vectors of N clips: `parts` are name -> [N, D] float32, 0 for a clip that lacks one.

    `labels` are the names of the people; None where the ground truth names nobody.
    """

    names: tuple[str, ...]
    parts: dict[str, np.ndarray]
    labels: tuple[str | None, ...]

    def only(self, names: Collection[str]) -> "Vectors":
        """Returns the vectors of some clips, in the same order."""
        rows = [row for row, name in enumerate(self.names) if name in names]
        parts = {part: x[rows] for part, x in self.parts.items()}
        return Vectors(
            tuple(self.names[row] for row in rows), parts, tuple(self.labels[row] for row in rows)
        )


class NobodyError(UserError):
    """Nobody is enrolled, so that nobody can be named."""


class Gallery:
    """A gallery in a folder: a collection of names of people, with `len`, `in` and iteration.

    Methods take `clips` as a dataset, then with the name of a `split`; as clips in memory, see
    `Predictor.embed`; or as the vectors that `embed` returns. A change waits until the disk has it.
    It raises ValueError while another process changes the gallery, and OSError where it cannot be
    written. Nothing is changed then.
    """

    def __init__(self, folder: str | Path, *, run: "Predictor | str | Path | None" = None):
        """Opens a gallery.

        Args:
          folder: the folder of the gallery.
          run: the run that the gallery was made with, or its folder; None for the folder that the
            gallery names. The run is restored at its first use.

        Raises:
          ValueError: there is no gallery, or it is damaged; the error names the file.
        """
        check_argument("Gallery: folder", folder, (str, os.PathLike), "the path of a folder")
        self._store = Store(Path(folder).expanduser().absolute())
        self._state = _read(self._store)
        self._lock = threading.RLock()  # of `_state`: no older state replaces a newer one
        self._run = run
        self._checked: tuple[str, Predictor] | None = None  # digest of the run, and the run
        self._calibration: tuple[State, np.ndarray] | None = None  # best scores of its strangers

    @classmethod
    def create(
        cls,
        folder: str | Path,
        run: "Predictor | str | Path",
        data: TrainingData | None = None,
        *,
        strangers: str | None = None,
        empty: bool = False,
    ) -> "Gallery":
        """Makes a gallery of a run's training clips; settings come from a PLDA run, or are fitted.

        Args:
          folder: a folder that is new, or empty.
          run: the run, or its folder.
          data: the dataset of the run; None to load it.
          strangers: the split whose clips without a label are strangers; None for the evaluated
            split, where that has labels.
          empty: True to enrol nobody: only the back end and the strangers are kept.

        Raises:
          ValueError: the folder holds something else, or no clip has a label.
        """
        from vidjax.evaluation import restore
        from vidjax.training.api import load_data

        check_new(Path(folder))
        run = _restored(run)
        if data is None:
            data = load_data(run.config)
            restore.check_data(run.workdir, run.manifest["data"], run.config, data)
        clips: dict[str, StoredClip] = {}
        labelled, widths = 0, {}
        for split in run.config.data.train_splits:
            found = embed(run, data, split)
            widths = {name: x.shape[1] for name, x in found.parts.items()}
            labelled += sum(label is not None for label in found.labels)
            for name, clip in usable_clips(found).items():
                if clip.identity is not None:
                    clips[name] = clip._replace(fitted=True)
        if not labelled:
            raise UserError("no training clip has a label: there is nobody to enrol")
        if not clips:
            raise UserError(
                f"the vectors of all {labelled:,} labelled training clips are 0: the run cannot "
                "tell people apart\ntrain a run on clips with usable frames, of more people"
            )
        origin = make_run_origin(run)
        settings = run.system.model.gallery_settings()
        backend = fit_backend(clips, widths, centred=origin.centred, settings=settings)
        chosen = strangers or run.config.eval.split
        kept = {} if empty else clips
        if strangers or data.split(chosen).labelled:
            found = usable_clips(embed(run, data, chosen))
            others = {n: c for n, c in found.items() if c.identity is None and n not in clips}
            kept = others | kept
        return cls.of_clips(folder, origin, backend, kept, run=run)

    @classmethod
    def of_models(
        cls, folder: str | Path, models: str | Path, *, stranger_odds: float = 1.0
    ) -> "Gallery":
        """Makes a gallery without a run and without anybody: cards of models say what is like.

        Clips are then features that `vidjax extract` made with the same models.

        Args:
          folder: a folder that is new, or empty.
          models: the folder of models, with a card each; see `vidjax.apps.video.cards`.
          stranger_odds: number of clips of strangers for each clip of somebody enrolled, among the
            clips that will be identified. 1 says that half of the clips show strangers.

        Raises:
          ValueError: no card of a model that makes vectors has a back end.
        """
        origin, back_ends = make_models_origin(models)
        return cls.of_clips(
            folder, origin, backend_lib.make_card_backend(back_ends, stranger_odds), {}
        )

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
        """Makes a gallery of clips given as vectors, which `origin` made; see `create`."""
        path = Path(folder).expanduser().absolute()
        width = _check_width(backend)
        clips = {name: check_clip(name, clip, width) for name, clip in clips.items()}
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
        files.make_folder(path, "gallery:")
        check_new(path)
        store = Store(path)
        state = _state(1, origin, backend, clips)
        store.create(state)
        _tell_of_similar(path, similar_names(state.people, ()))
        return cls(path, run=run)

    def __repr__(self) -> str:
        people, clips = len(self._state.index.names), len(self.clips) - len(self.strangers)
        return (
            f"<gallery '{self.folder}': {people} people, {clips} clips, "
            f"{len(self.strangers)} strangers, version {self.version}>"
        )

    def __len__(self) -> int:
        groups = self._now().groups
        return len(groups) - (STRANGER in groups)

    def __bool__(self) -> bool:
        return True  # also of a gallery of nobody

    def __contains__(self, identity: object) -> bool:
        if not isinstance(identity, str) or identity == STRANGER:
            return False
        return normal_form(identity) in self._now().groups

    def __iter__(self) -> Iterator[str]:
        return iter(self.identities)

    # ---- what the gallery holds, as it was read last

    @property
    def folder(self) -> Path:
        """The folder, an absolute path."""
        return self._store.folder

    @property
    def version(self) -> int:
        """Number of changes of the folder, creation included."""
        return self._state.version

    @property
    def digest(self) -> str:
        """The sha256, in hexadecimal, of what the folder holds now; no other state has it."""
        return self._now().sha256.hex()

    @property
    def origin(self) -> VectorOrigin:
        """The folder and the digest of the run that makes the vectors."""
        return self._state.run

    @property
    def index(self) -> Index:
        """The identities that clips are compared with."""
        return self._state.index

    @property
    def backend(self) -> Backend:
        """The coordinates in which vectors are compared, and the settings."""
        return self._state.index.backend

    @property
    def clips(self) -> Mapping[str, StoredClip]:
        """Name -> clip, strangers included."""
        return self._state.clips

    @property
    def strangers(self) -> list[str]:
        """The names of the strangers, sorted."""
        return list(self._state.groups.get(STRANGER, ()))

    @property
    def identities(self) -> dict[str, int]:
        """Identity -> its number of clips, sorted by name, as the folder holds them now."""
        return {name: len(clips) for name, clips in self._now().people.items()}

    def refresh(self) -> None:
        """Reads the gallery anew if this process or another one has changed it."""
        with self._lock:
            if self._store.sha256() != self._state.sha256:
                self._state = _read(self._store)

    def remove_leftovers(self) -> None:
        """Deletes what a killed process left, unless the folder is changed now, or read-only."""
        with contextlib.suppress(InUseError, UnwritableError, OSError):
            self._store.remove_leftovers()

    def _now(self) -> State:
        """Returns the state of the folder."""
        with self._lock:
            self.refresh()
            return self._state

    @property
    def run(self) -> "Predictor":
        """The run that makes the vectors; ValueError if it is missing or has other weights."""
        if self.origin.cards:
            raise UserError(
                f"gallery '{self.folder}' was made of models, not of a run\n"
                "its clips are features that vidjax extract made: --input=FOLDER"
            )
        wanted = self.origin.digest  # another one, if somebody made the gallery anew
        if self._checked is None or self._checked[0] != wanted:
            place = self.origin.workdir
            if self._run is None and not Path(place, "config.json").exists():
                raise UnreadableError(
                    f"the run of gallery '{self.folder}' is no longer at '{place}'\n"
                    "say where it is: run=FOLDER, by command --run=FOLDER"
                )
            run = _restored(place if self._run is None else self._run)
            if make_run_origin(run).digest != wanted:
                raise UnreadableError(
                    f"'{run.workdir}' is not the run that gallery '{self.folder}' was made "
                    f"with, which was at '{place}'\n"
                    "say where that is: run=FOLDER, by command --run=FOLDER"
                )
            self._checked = wanted, run
        return self._checked[1]

    def embed(
        self, clips: AnyClips, split: str | None = None, advance: Callable[[int], None] = uncounted
    ) -> Vectors:
        """Returns the vectors of clips, see `embed`; by cards, the mean frames of each part.

        Vectors are returned as they are.
        """
        if isinstance(clips, Vectors):
            return clips
        if not self.origin.cards:
            return embed(self.run, clips, split, advance)
        widths = self.backend.widths
        if not isinstance(clips, MemoryClips):
            if not isinstance(clips, Mapping):
                raise UserError(
                    "a gallery of models takes clips in memory, not a split of a dataset\n"
                    "give {clip: {modality: features}}, by command --input=FOLDER"
                )
            clips = MemoryClips.from_dict(clips, widths, ())
        found = clips
        parts = {part: found.mean_vectors(part) for part in widths}
        advance(len(found.names))
        return Vectors(found.names, parts, (None,) * len(found.names))

    @property
    def reads(self) -> "tuple[dict[str, int], Quality]":
        """Modality -> width of the clips that it takes, and the quality of their frames."""
        if self.origin.cards:
            return self.backend.widths, "given"
        return dict(self.run.modalities), self.run.config.data.quality

    def load(self, path: str | Path) -> MemoryClips:
        """Returns the clips of a folder or a parquet table, see `memory.load_clips`."""
        widths, quality = self.reads
        return load_clips(path, widths, (), quality=quality)

    # ---- changes

    @contextlib.contextmanager
    def change(self) -> Iterator[Draft]:
        """Yields a draft with the methods `add`, `remove`, `rename` and `relabel` of this class.

        What is done to it is written at the end, in one; after an error, nothing is. Nobody else
        can change the gallery meanwhile.
        """
        with self._store.open(write=True) as transaction:
            draft = Draft(self._now())
            yield draft
            if not draft:
                return
            state, people = draft.state()
            if draft.refits:
                state = _refitted(state)
            with self._lock:
                self._state = self._store.write(transaction, state, draft.inserted, people)
        _tell_of_similar(self.folder, draft.similar)

    def enrol(
        self,
        clips: AnyClips,
        identities: str | Mapping[str, str] | None = None,
        *,
        split: str | None = None,
        strangers: bool = False,
    ) -> Enrolment:
        """Enrols clips of new people or of people who are enrolled already; all clips or none.

        Args:
          clips, split: see the class.
          identities: the person that all clips show, or clip -> person; None for the labels of the
            dataset. Clips without a person are left out.
          strangers: True to add only the clips without a person, as strangers.

        Raises:
          ValueError: no clip has a label or a usable frame, clips do not fit the run, or a clip is
            enrolled already for another person or with another vector.
        """
        if identities is not None:
            wanted = "a name, or a dict {clip: name}"
            check_argument("enrol: identities", identities, (str, Mapping), wanted)
            # A mistake is reported before vectors are made.
            given = {"": identities} if isinstance(identities, str) else identities
            for name, identity in given.items():
                wanted = f"the name of a person for clip {name!r}"
                check_argument("enrol: identities", identity, (str, type(None)), wanted)
                _ = None if identity is None else check_person(identity)
        found = self.embed(clips, split)
        if isinstance(identities, str):
            identities = dict.fromkeys(found.names, identities)
        if identities is not None:
            _check_given(identities, found.names)
            found = found._replace(labels=tuple(map(identities.get, found.names)))
        wanted = [n for n, label in zip(found.names, found.labels, strict=True)
                  if (label is None) == strangers]  # fmt: skip
        if not wanted:
            if strangers:
                raise UserError(
                    "every clip has a label: none shows a stranger\n"
                    "leave out strangers=True, by command --strangers"
                )
            raise UserError("no clip has a label: there is nobody to enrol\nsay who they show")
        labels = [None if label is None else check_person(label) for label in found.labels]
        usable = usable_clips(found._replace(labels=tuple(labels)))
        shown = {name: usable[name] for name in wanted if name in usable}
        refused = tuple(sorted(name for name in wanted if name not in usable))
        if not shown:
            raise UserError(f"no clip has a usable frame, as '{show(refused[0])}'")
        with self.change() as draft:
            new = draft.add(shown)
        groups, people = self._state.groups, {clip.identity or STRANGER for clip in shown.values()}
        _tell_of_films({name: groups.get(name, ()) for name in sorted(people - {STRANGER})})
        return Enrolment(new, len(shown) - new, refused, draft.similar)

    def add(self, clips: Mapping[str, StoredClip]) -> int:
        """Adds clips given as vectors, all or none; returns how many are new.

        Clips that the gallery has already are skipped. A stranger may become a person; a person's
        clip that comes as a stranger is skipped, too. ValueError for a malformed clip, or one
        enrolled already for another person or with another vector.
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

        If the back end was fitted to a removed clip, it is fitted anew to the clips that are left.

        Args:
          identity: the name of a person, or several.
          clip: the name of a clip, or several, instead.

        Raises:
          ValueError: there is no such name.
        """
        with self.change() as draft:
            return draft.remove(identity=identity, clip=clip)

    def rename(self, identity: str, to: str, *, merge: bool = False) -> int:
        """Gives a person another name; returns the number of clips.

        With `merge`, `to` may be another enrolled person: the two become one. Else ValueError. The
        back end stays as it is.
        """
        with self.change() as draft:
            return draft.rename(identity, to, merge=merge)

    def relabel(self, clip: str, identity: str | None) -> str | None:
        """Gives a clip another identity; returns the one it had; None is a stranger's."""
        with self.change() as draft:
            return draft.relabel(clip, identity)

    def widen(self, models: str | Path) -> tuple[str, ...]:
        """Takes over the parts of models that are new beside the gallery's own; returns them.

        Enrolled clips keep their vectors, and have none of the new parts until `complete`.

        Raises:
          ValueError: a model of the gallery is missing, or is another one.
        """
        origin, back_ends = make_models_origin(models)
        with self._store.open(write=True) as transaction:
            state = self._now()
            was, now = state.run.cards, origin.cards
            changed = sorted(part for part in was if was[part] != now.get(part))
            if changed or not was:
                raise UserError(
                    f"'{self.folder}' was made with other models of {', '.join(changed) or 'a run'}"
                    "\ntake the same models, or name a new folder: --out=DIR"
                )
            if was == now:
                return ()
            backend = state.index.backend
            wide = backend_lib.make_card_backend(
                back_ends, float(np.exp(backend.settings.stranger))
            )
            _check_width(wide)
            clips = {
                name: clip._replace(vector=_widened(clip.vector, backend, wide))
                for name, clip in state.clips.items()
            }
            state = _state(state.version + 1, origin, wide, clips)
            with self._lock:
                self._state = self._store.write(transaction, state)
        return tuple(part for part in now if part not in was)

    def complete(self, found: Vectors) -> set[str]:
        """Returns the clips that are enrolled with these vectors; they get parts that they lack."""
        rows = zip(*found.parts.values(), strict=True)
        vectors = dict(zip(found.names, map(np.concatenate, rows), strict=True))
        with self.change() as draft:
            return draft.complete(vectors)

    # ---- answers

    def group(
        self,
        found: Vectors,
        apart: Collection[tuple[str, str]] = (),
        *,
        begin: Mapping[str, str] | None = None,
        absorb: bool = True,
    ) -> dict[str, str]:
        """Groups clips by the people that they show; returns clip -> `unknown 1`, and so on.

        The largest group is the first. Clips without a usable frame are in none.

        Args:
          found: vectors of any number of clips.
          apart: pairs of clips that do not show one person, such as clips seen at one time.
          begin: clip -> group, of all clips with a usable frame: groups that are joined further.
          absorb: False to leave clips that fit no group well on their own.
        """
        usable = np.flatnonzero(np.any([x.any(axis=1) for x in found.parts.values()], axis=0))
        names = [found.names[place] for place in usable.tolist()]
        parts = [x[usable] for x in found.parts.values()]
        first = None if begin is None else [begin[name] for name in names]
        labels = grouping.group(self.backend, names, parts, apart, begin=first, absorb=absorb)
        return answers_lib.name_groups(names, labels)

    def _anybody(self) -> State:
        """Returns the state of the folder; ValueError if nobody is enrolled."""
        state = self._now()
        if not state.index.names:
            raise NobodyError(f"gallery '{self.folder}' has nobody enrolled\nenrol people first")
        return state

    def threshold(self, fpir: float) -> Threshold:
        """Returns the lowest threshold that new strangers reach with probability `fpir` at most.

        The strangers are compared with all people at the first call after a change. ValueError if
        nobody is enrolled, or there are fewer than 1 / fpir - 1 strangers.
        """
        check_argument("threshold: fpir", fpir, numbers.Real, "a number")
        return self._threshold(self._anybody(), fpir)

    def _threshold(self, state: State, fpir: float) -> Threshold:
        strangers = state.groups.get(STRANGER, ())
        answers_lib.check_strangers(len(strangers), fpir)
        of, best = self._calibration or (None, np.zeros(0))
        if of is not state:
            vectors = np.stack([state.clips[name].vector for name in strangers])
            found = state.index.nearest(state.index.backend.split(vectors), 1)
            best = np.array([one.best[0][1] for one in found])
            self._calibration = state, best
        return answers_lib.threshold(best, fpir, len(state.index.names))

    def rule(self, *, fpir: float | None = None, threshold: float | None = None) -> NamingRule:
        """Returns the rule by which a clip gets a name; arguments and errors as in `identify`."""
        answers_lib.check_choice(fpir, threshold)
        return self._rule(self._anybody(), fpir, threshold)

    def _rule(self, state: State, fpir: float | None, threshold: float | None) -> NamingRule:
        if threshold is not None:
            about = f"the probability is {100 * threshold:.3g} % or more"
            return NamingRule("threshold", math.log(threshold), False, None, about)
        wanted, strangers = (
            answers_lib.count_needed_strangers(DEFAULT_FPIR),
            len(state.groups.get(STRANGER, ())),
        )
        if fpir is None and strangers < wanted:
            about = f"{ABOVE_HALF}; with {wanted} clips of strangers instead of {strangers}, "
            about += f"at most {100 * DEFAULT_FPIR:g} % of new strangers would get a name"
            return NamingRule("new", -math.inf, True, None, about)
        found = self._threshold(state, DEFAULT_FPIR if fpir is None else fpir)
        about = f"at most {100 * found.fpir:.3g} % of strangers reach its probability, "
        about += f"and {ABOVE_HALF}"
        return NamingRule("fpir", found.score, fpir is None, found, about)

    def identify(
        self,
        clips: AnyClips,
        k: int = 5,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        split: str | None = None,
        groups: Mapping[str, str] | None = None,
        advance: Callable[[int], None] = uncounted,
    ) -> dict[str, Answer]:
        """Returns clip -> who it shows; a clip without a usable frame is unknown.

        If the gallery compares by cards, nobody is named who has no part in common with the clip.

        Args:
          clips, split: see the class.
          k: number of identities in `Answer.best`, at most.
          fpir: the largest share of strangers that may get a name. A name also needs a probability
            above one half. None is 0.01 if the gallery has 99 strangers or more; with fewer, only
            one half counts.
          threshold: instead, the lowest probability at which a clip gets a name.
            (The threshold of `Predictor.identify` is a logarithm.)
          groups: clip -> group, see `group`, in a gallery of models. All clips of a group vote, and
            get one answer.
          advance: is called with the number of clips that got an answer, after each.

        Raises:
          ValueError: nobody is enrolled, there are fewer than 1 / fpir - 1 strangers, clips do not
            fit the run, or `groups` are given for a gallery of a run.
        """
        check_argument("identify: k", k, numbers.Integral, "a number of identities")
        if k < 1:
            raise UserError(f"k={k}: name 1 identity or more")
        if groups is not None and not self.origin.cards:
            raise UserError("groups: clips vote only in a gallery of models\nleave out the groups")
        self.rule(fpir=fpir, threshold=threshold)  # a mistake is reported before vectors are made
        found, state = self.embed(clips, split), self._anybody()
        rule, parts = self._rule(state, fpir, threshold), list(found.parts.values())
        owner = np.arange(len(found.names))
        if groups is not None:
            # A clip without a group is not of the group that has its name.
            keys = [(n in groups, groups.get(n, n)) for n in found.names]
            place = {key: number for number, key in enumerate(dict.fromkeys(keys))}
            owner = np.array([place[key] for key in keys], int)
        nearest = state.index.nearest(parts, k, None if groups is None else owner)
        known = [rule.answer(one, cards=bool(state.run.cards)) for one in nearest]
        answers = {}
        for clip, place in zip(found.names, owner.tolist(), strict=True):
            answers[clip] = known[place]
            advance(1)
        return answers

    def rank(
        self,
        clips: AnyClips,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        split: str | None = None,
        advance: Callable[[int], None] = uncounted,
    ) -> dict[str, list[tuple[str, float]]]:
        """Returns identity -> its best 100 clips as (name, score), best first, ties by name.

        Identities are in the order of a submission; scores are logarithms of probabilities. With
        `fpir` or `threshold`, lists hold only clips that pass; see `identify` for the arguments.
        `advance` is called with the number of clips of each finished block.
        """
        from vidjax.evaluation import (
            predict,  # JAX, only for those who rank
            topk,
        )

        self.rule(fpir=fpir, threshold=threshold)  # a mistake is reported before vectors are made
        found, state = self.embed(clips, split), self._anybody()
        chosen = fpir is not None or threshold is not None
        searched, rule = state.index, self._rule(state, fpir, threshold) if chosen else None
        identities = sort_identities(searched.names)
        row = {name: number for number, name in enumerate(searched.names)}
        columns = np.array([1 + row[name] for name in identities])
        order = np.argsort(np.array(found.names, object), kind="stable")
        parts = [x[order] for x in found.parts.values()]
        logs, there = searched.search(parts), np.array([x.any(axis=1) for x in parts])
        known = searched.counts[:, columns - 1] > 0
        size = min(RANK_ROWS, len(order))

        def blocks() -> "Iterator[ScoreBlock]":
            for at in range(0, len(order), RANK_ROWS):
                index = np.arange(at, at + size, dtype=np.int32)
                scores = np.full((size, len(columns)), -np.inf, np.float32)
                for place, one in enumerate(itertools.islice(logs, size)):
                    row, best = scores[place], one[columns]
                    # Before they are rounded to float32: a threshold lies just above a stranger.
                    passes = True if rule is None else rule.names(best)
                    if rule is not None and state.run.cards:  # as in `NamingRule.answer`
                        passes &= there[:, at + place] @ known
                    np.copyto(row, best, where=passes, casting="same_kind")
                exists = index < len(order)
                yield scores, index, exists
                advance(int(exists.sum()))

        top = topk.rank(blocks(), len(columns), rows=size)
        names = {place: found.names[row] for place, row in enumerate(order.tolist())}
        if rule is not None:
            scores, index = np.asarray(top.scores), np.asarray(top.index)
            top = topk.TopK(scores, np.where(scores > -np.inf, index, topk.NO_CLIP))
        return predict.as_lists(identities, names, top)


def check_new(folder: Path) -> None:
    """Raises ValueError if a folder holds anything; what a killed process left does not count."""
    store = Store(folder.expanduser().absolute())
    if not store.folder.is_dir():
        return
    if foreign := store.foreign():
        remedy = "name a new folder"
        if files.exists(store.folder / "config.json"):
            remedy = f"it is a run: Gallery.create('NEW_FOLDER', {str(store.folder)!r})"
        raise UserError(f"'{store.folder}' is not empty: it holds '{show(foreign)}'\n{remedy}")
    with contextlib.suppress(NoGalleryError):
        store.sha256()
        raise UserError(f"'{store.folder}' holds a gallery: name another folder")


def _check_width(backend: Backend) -> int:
    """Returns the width of the vectors of a back end; refuses those that no gallery can hold."""
    width = sum(backend.widths.values())
    if width > MAX_VECTOR_WIDTH:
        raise UserError(
            f"vectors of {width:,} numbers are too wide for a gallery: the limit is "
            f"{MAX_VECTOR_WIDTH:,}\nmake it with fewer members, or with a narrower net"
        )
    return width


def _widened(vector: np.ndarray, backend: Backend, wide: Backend) -> np.ndarray:
    """Returns the vector of a clip with zeros for the parts that only `wide` has."""
    own = dict(zip(backend.widths, backend.split(vector[None]), strict=True))
    parts = [own.get(part, np.zeros((1, width))) for part, width in wide.widths.items()]
    return np.concatenate(parts, axis=1, dtype=np.float32)[0]


def _restored(run: "Predictor | str | Path") -> "Predictor":
    from vidjax.evaluation import predict  # JAX, for galleries of runs alone

    return run if isinstance(run, predict.Predictor) else predict.restore(run)


def make_run_origin(run: "Predictor") -> VectorOrigin:
    """Returns what a gallery keeps of its run, to find it again and to know its weights."""
    digest = files.sha256_json(sorted(run.manifest["files"].items()))
    return VectorOrigin(str(run.workdir), digest, run.system.model.gallery_settings() is not None)


def make_models_origin(models: str | Path) -> "tuple[VectorOrigin, dict[str, BackEnd]]":
    """Returns what a gallery keeps of models, to know them again, and part -> their back ends."""
    from vidjax.apps.video import cards

    path = Path(models).expanduser().absolute()
    usable = cards.list_embedders(cards.load(path))
    # Clothes and places tell no person: they change, and others wear and visit the same.
    back_ends = {
        part: card.back_end for part, card in usable.items()
        if card.back_end and part not in ("body", "scene")
    }  # fmt: skip
    if not back_ends:
        raise UserError(
            f"'{path}' holds no net of faces or voices whose card has a back end\n"
            f"{cards.describe_download('face_embedder')}"
        )
    digests = {part: usable[part].digest for part in back_ends}
    return VectorOrigin(str(path), files.sha256_json(digests), True, digests), back_ends


def embed(
    run: "Predictor",
    clips: FrameClips,
    split: str | None = None,
    advance: Callable[[int], None] = uncounted,
) -> Vectors:
    """Returns the vectors of clips; in an ensemble of PLDA the first member makes them.

    `clips` are a dataset, then with the name of a `split`, or clips in memory as `Predictor.embed`
    takes them. `advance` is called with the number of clips of each finished block.
    """
    if split is None and hasattr(clips, "train_batches"):
        raise UserError("name the split of the dataset: --split=S, or split=S")
    source, split, places, names, _ = run.request(clips, split)
    values: np.ndarray | None = None
    found = source.split(split)
    for batch in padded_batches(source, split, tuple(run.modalities), EMBED_ROWS):
        (block,) = run.embed_blocks([batch])
        if values is None:
            values = np.zeros((len(found.clips), block.shape[1]), np.float32)
        real = np.asarray(batch.batch_mask)
        values[np.asarray(batch.clip_index)[real]] = block[real]
        advance(int(real.sum()))
    assert values is not None  # there is at least one clip
    known = (None, *source.identities) if found.labelled else (None,)
    labels = tuple(known[label] for label in found.labels[places].tolist())
    return Vectors(names, _parts(run, values[places]), labels)


def padded_batches(
    source: "ClipSource", split: str, modalities: tuple[str, ...], rows: int
) -> "Iterator[Batch]":
    """Yields the clips of a split in batches of `rows`, whose shapes are few: each compiles once.

    A clip is padded to the least of PAD_LENGTHS that its longest modality needs.
    """
    lengths = longest(source.split(split), modalities)
    pad = np.searchsorted(PAD_LENGTHS, np.minimum(lengths, MAX_EVAL_FRAMES))
    for number in np.unique(pad).tolist():
        bucket = np.where(pad == number, 0, -1)
        padded = dict.fromkeys(modalities, (PAD_LENGTHS[number],) * len(BUCKETS))
        yield from source.eval_batches(EvalPlan(split, modalities, bucket, padded), rows=rows)


def _parts(run: "Predictor", values: np.ndarray) -> dict[str, np.ndarray]:
    """Splits embeddings [N, sum of D] into unit vectors: a part per modality for PLDA, else one."""
    parts, at, model = {}, 0, run.system.model
    plda = model.gallery_settings()
    for name, width in (model.modalities if plda else {EMBEDDING: values.shape[1]}).items():
        x = values[:, at : at + width].astype(np.float64)
        norm = np.sqrt(np.vecdot(x, x))[:, None]
        parts[name] = (x / np.where(norm > 0, norm, 1.0)).astype(np.float32)
        at += width
    return parts


def usable_clips(found: Vectors) -> dict[str, StoredClip]:
    """Returns clip -> as it is enrolled, of clips with a usable frame."""
    rows = np.concatenate(list(found.parts.values()), axis=1)
    clips = zip(found.names, found.labels, rows, strict=True)
    return {name: StoredClip(label, row) for name, label, row in clips if row.any()}


def _check_given(identities: Mapping[str, str], clips: Collection[str]) -> None:
    """Refuses labels of which none is of a clip that is there; warns if some are not."""
    stray = sorted(map(str, identities.keys() - {*clips}))
    if not stray:
        return
    place = f"identities: no clip is called '{show(stray[0])}'; one is '{show(min(clips))}'"
    if len(stray) == len(identities):
        raise UserError(f"{place}\ngive clips the names that they have in the features")
    warn(f"{place}: {len(stray):,} of {len(identities):,} names are not used")


def _tell_of_similar(folder: Path, names: Mapping[str, str]) -> None:
    """Warns of new people whose names look like the names of others."""
    for name, other in itertools.islice(names.items(), 1):
        more = f" ({len(names):,} new names are such)" if len(names) > 1 else ""
        words = ["vidjax", "gallery", "rename", str(folder), f"--identity={name}", f"--to={other}"]
        warn(
            f"'{show(name)}' looks like '{show(other)}', and is another person here{more}\n"
            f"if they are the same: {shlex.join([*words, '--merge'])}"
        )


def _tell_of_films(groups: Mapping[str, Collection[str]]) -> None:
    """Tells the user of whom all clips, two or more, are of one film; name -> clips."""
    few = [
        name for name, some in groups.items() if len(some) > 1 == len({*map(cut_film_name, some)})
    ]
    if few:
        named = ", ".join(map(show, few[:3])) + (" ..." if len(few) > 3 else "")
        say(f"all clips of {named} are of one film, and alike: add clips of another day")


def fit_backend(
    clips: Mapping[str, StoredClip],
    widths: Mapping[str, int],
    *,
    centred: bool,
    settings: Settings | None = None,
) -> Backend:
    """Fits a back end to the clips with an identity, in any order; see `backend.fit`.

    Of the clips of a person in one film, the first is fitted, and the mean is enrolled.
    """
    names = sorted(name for name, clip in clips.items() if clip.identity is not None)
    films = by_film(names, clips)
    people = np.array([identity for identity, _ in films], object)
    labels = 1 + np.unique(people, return_inverse=True)[1]
    ends = np.cumsum(list(widths.values()))[:-1].tolist()
    vectors, enrolled = (
        dict(zip(widths, np.split(stack_films(some, clips, widths), ends, axis=1), strict=True))
        for some in ([names[:1] for names in films.values()], films.values())
    )
    return backend_lib.fit(vectors, labels, enrolled, centred=centred, settings=settings)


def _refitted(state: State) -> State:
    """Returns the state with a back end fitted to its own clips."""
    backend = fit_backend(state.clips, state.index.backend.widths, centred=state.run.centred)
    clips = {
        name: clip._replace(fitted=clip.identity is not None) for name, clip in state.clips.items()
    }
    return _state(state.version, state.run, backend, clips)


def _read(store: Store) -> State:
    """Returns what a folder holds; names in another Unicode form, of earlier versions, are changed.

    The next change then writes the whole file.
    """
    state = store.read()
    if all(unicodedata.is_normalized("NFC", name) for name in state.groups):
        return state
    clips = {
        name: clip._replace(identity=normal_form(clip.identity)) if clip.identity else clip
        for name, clip in state.clips.items()
    }
    new = _state(state.version, state.run, state.index.backend, clips)
    return new._replace(sha256=state.sha256)


def _state(
    version: int, run: VectorOrigin, backend: Backend, clips: Mapping[str, StoredClip]
) -> State:
    groups = group(clips)
    names = sorted(groups.keys() - {STRANGER})
    blocks = (
        enrol(backend, {name: groups[name] for name in names[at : at + MAX_BLOCK_PEOPLE]}, clips)
        for at in range(0, len(names), MAX_BLOCK_PEOPLE)
    )
    return State(version, run, Index(backend, blocks), clips, groups)
