"""A gallery, in which people are enrolled, identified and deleted without training.

    import vidjax

    gallery = vidjax.Gallery.create("people", vidjax.restore("runs/plda"))
    gallery.enrol({"clip_1": {"face": features}}, "Ada")
    gallery.identify({"clip_2": {"face": features}}, fpir=0.01)  # clip -> Answer
    gallery.remove(identity="Ada")

Thresholds are measured on strangers, clips of people who are not enrolled. The back end contains
the parameters by which clips are compared with people. The order of changes does not matter:
probabilities differ by at most 1e-6 from those of a new gallery with the same clips and back end.

An open gallery always answers from the current content of its folder, even if another process has
changed the folder. `len`, `in`, iteration, `identities` and `digest` are current, too. Other
properties, such as `clips` and `version`, show the content that was read last, see `refresh`.

A change makes a new `State`, the content in memory, and never edits the old state. So a thread that
computes an answer uses the same state until the answer is complete. A change is first written to
the folder. If writing fails, folder and memory stay as they were. For a disk that fails at the end
of a change, see `store.UncertainWriteError`.

A removed person leaves no trace in the folder. A back end that was fitted to a clip may reveal
the clip's vector, so `remove` fits a new back end to the clips that are left. `create` fits the
back end to the training clips of a run, and enrols these clips, except with `empty=True`. Enrolling
clips later does not change the back end. The run always depends on its training clips: to forget
one of them, train a new run without this clip, and create a new gallery.
"""

import contextlib
import numbers
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vidjax.apps.gallery import answers, card_notes, changes, run_vectors, verification
from vidjax.apps.gallery.answers import Answer, Rule, Threshold
from vidjax.apps.gallery.audit import audit
from vidjax.apps.gallery.backend import Backend
from vidjax.apps.gallery.changes import Draft, Enrolment, check_clip, find_person
from vidjax.apps.gallery.enrolment import check_width, make_state
from vidjax.apps.gallery.index import Index
from vidjax.apps.gallery.run_vectors import RunVectors
from vidjax.apps.gallery.store import STRANGER, ResultError, State, Store, StoredClip, VectorOrigin
from vidjax.apps.gallery.vectors import Advance, NetVectors, Vectors
from vidjax.apps.gallery.verification import Match, Verification
from vidjax.apps.server_limits import LOCK_SECONDS
from vidjax.data.dataset import Dataset
from vidjax.data.memory import FrameClips, MemoryClips, load_clips
from vidjax.utils import messages
from vidjax.utils.errors import UserError, check_argument
from vidjax.utils.names import find_similar_names, normal_form, strip_ending
from vidjax.utils.terminal import ignore_count

if TYPE_CHECKING:
    from vidjax.evaluation.predict import Predictor

AnyClips: TypeAlias = FrameClips | Vectors


class Gallery:
    """Enrolled people and their clips, in a folder. `len`, `in` and iteration apply to the people.

    The argument `clips` of a method is one of these:
      clips in memory, {clip: {modality: features}}, as for `Predictor.embed`. A clip may also have
        keys for values of its frames, such as `face_quality`;
      a dataset, together with the name of a `split`;
      the vectors that `embed` returns.

    A method that changes the gallery returns when the change is on the disk. After an error,
    nothing is changed, with one exception: if the disk fails after the change was written, the
    message of the OSError says that the gallery was changed. All methods that change the gallery
    raise ValueError if another process is changing the gallery, or if the gallery is read-only.
    They raise OSError if the disk is full or fails. They raise ResultError (a ValueError) if the
    gallery is a result of another command.
    """

    def __init__(self, folder: str | Path, *, run: "Predictor | str | Path | None" = None):
        """Opens the gallery in `folder`.

        Args:
          run: the training run that computed the vectors, or its folder. Default: the folder that
            the run had when the gallery was made, or else the folder of the same name in `runs`,
            next to the gallery. The run is loaded when it is needed.

        Raises:
          ValueError: the folder contains no gallery, or a file of the gallery is damaged.
        """
        self._store = Store(folder)
        self._state = self._store.read()
        self._lock = threading.RLock()  # an older state must not replace a newer `_state`
        self._is_changing = False
        # How long a change waits for changes of other programs.
        self.lock_seconds = LOCK_SECONDS
        if run is not None and self.origin.cards:
            raise UserError(
                f"gallery '{self.folder}' was made from nets, not from a trained run\n"
                "leave out --run (in Python: run=)"
            )
        self._run = run
        self._checked: tuple[str, Predictor] | None = None  # digest of the run, and the run

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
        """Makes a gallery, and enrols the labelled training clips of a run.

        Clips are compared by PLDA. A PLDA run gives the settings of PLDA, such as `scale`. The
        settings are fitted to the training clips if the run is no PLDA run, or (with a message) if
        the training clips of a person are as alike as photos of one day.

        Args:
          folder: a new or empty folder.
          run: the training run, or its folder.
          data: the dataset of the run. By default, it is loaded.
          strangers: the name of a split. Its clips without a label are stored as clips of
            strangers (people who must not get a name). Default: the evaluated split if it has
            labels, otherwise no split.
          empty: True to enrol nobody. The gallery then contains only clips of strangers, and the
            parameters that were fitted to the training clips.

        Raises:
          ValueError: the folder is not empty, or no training clip has a label.
        """
        Store(folder).check_new()
        run = run_vectors.restore(run)
        data = run_vectors.load_data(run, data)
        origin, backend, clips = run_vectors.fit(run, data, strangers=strangers, empty=empty)
        return cls.of_clips(folder, origin, backend, clips, run=run)

    @classmethod
    def of_models(cls, folder: str | Path, models: str | Path, command: str = "") -> "Gallery":
        """Makes an empty gallery for features that `vidjax extract` computes with the given nets.

        Clips are compared by the distances of their vectors. Each net has a JSON file, its card,
        with the distribution of these distances.

        Args:
          folder: a new or empty folder.
          models: the folder of the nets and their cards, see `vidjax.apps.cards`.
          command: see `of_clips`.

        Raises:
          ValueError: no card of a face or voice net contains a distribution of distances.
        """
        origin, backend = card_notes.read_cards(models)
        return cls.of_clips(folder, origin, backend, {}, command)

    @classmethod
    def of_clips(
        cls,
        folder: str | Path,
        origin: VectorOrigin,
        backend: Backend,
        clips: Mapping[str, StoredClip],
        command: str = "",
        *,
        run: "Predictor | None" = None,
    ) -> "Gallery":
        """Makes a gallery of clips whose vectors are known.

        Args:
          folder: a new or empty folder.
          origin: a description of the run or the nets that computed the vectors.
          backend: the parameters of the comparison.
          clips: name -> clip.
          command: the command of which the gallery is a result, such as `vidjax review {}`. `{}`
            is the folder that contains `folder`, also after it was moved. Only this command can
            change the gallery, see `change`. "" for any other gallery.
          run: the loaded run, if a run computed the vectors.
        """
        store, width = Store(folder), check_width(backend)
        clips = {strip_ending(name): check_clip(name, clip, width) for name, clip in clips.items()}
        state = make_state(1, origin, backend, clips, command)
        store.create(state)
        changes.warn_of_similar(store.folder, find_similar_names(state.people, ()))
        return cls(folder, run=run)

    def __repr__(self) -> str:
        people, clips = len(self._state.index.names), len(self.clips) - len(self.strangers)
        return (
            f"<gallery '{self.folder}': {people} people, {clips} clips, "
            f"{len(self.strangers)} strangers, version {self.version}>"
        )

    def __len__(self) -> int:
        return len(self.state.index.names)

    def __bool__(self) -> bool:
        return True  # even if nobody is enrolled

    def __contains__(self, identity: object) -> bool:
        if not isinstance(identity, str) or identity == STRANGER:
            return False
        return normal_form(identity) in self.state.clips_of

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
        return self.state.sha256.hex()

    @property
    def origin(self) -> VectorOrigin:
        """The run or the nets that compute the vectors."""
        return self._state.origin

    @property
    def command(self) -> str:
        """The only command that may change the gallery, such as `vidjax review OUT`, or ""."""
        return self._state.command.replace("{}", messages.quote_path(self.folder.parent))

    @property
    def index(self) -> Index:
        """The object that compares clips with the enrolled people."""
        return self._state.index

    @property
    def backend(self) -> Backend:
        """The parameters that compare the vectors of clips."""
        return self._state.index.backend

    @property
    def clips(self) -> Mapping[str, StoredClip]:
        """All clips, including clips of strangers: name -> clip."""
        return self._state.clips

    @property
    def strangers(self) -> list[str]:
        """The sorted names of the clips of strangers."""
        return list(self._state.strangers)

    @property
    def identities(self) -> dict[str, int]:
        """The enrolled people, sorted: name -> number of clips."""
        return {name: len(clips) for name, clips in self.people.items()}

    @property
    def people(self) -> dict[str, tuple[str, ...]]:
        """The enrolled people, sorted: name -> sorted names of their clips."""
        return self.state.people

    def refresh(self) -> None:
        """Reads the gallery again if another process has changed it."""
        with self._lock:
            # During a change by this object, no other process can change the file, and the file may
            # be locked for seconds. So other threads answer from the content before the change.
            if not self._is_changing and self._store.sha256() != self._state.sha256:
                self._state = self._store.read()

    @property
    def state(self) -> State:
        """A snapshot of the current content of the gallery."""
        with self._lock:
            self.refresh()
            return self._state

    @property
    def run(self) -> "Predictor":
        """The loaded model of the training run. It computes the vectors of clips.

        Raises:
          ValueError: the gallery has no run, the run is missing, or its weights have changed.
        """
        wanted = self.origin.digest  # changes if the gallery is made again
        if self._checked is None or self._checked[0] != wanted:
            self._checked = wanted, run_vectors.find_run(self.folder, self.origin, self._run)
        return self._checked[1]

    def embed(
        self, clips: AnyClips, split: str | None = None, advance: Advance = ignore_count
    ) -> Vectors:
        """Computes the vectors of clips.

        In a gallery made from a trained run, the run computes the vectors. In a gallery made from
        nets, the vector of a modality, such as face, is the mean of the frames' vectors. If the
        mean is almost 0, the clip has no usable frame, and a warning appears. If `clips` are
        already vectors, they are returned unchanged.

        Args:
          clips, split: see the class.
          advance: is called with the number of clips of each finished batch.

        Raises:
          ValueError: `clips` are vectors, but their modalities or lengths do not fit the gallery.
        """
        self.refresh()  # another process may have added a modality
        if isinstance(clips, Vectors):
            widths = {part: x.shape[1] for part, x in clips.parts.items()}
            if [*widths.items()] != [*self.backend.widths.items()]:
                raise UserError(
                    f"the vectors have the lengths {widths}, but the gallery has "
                    f"{self.backend.widths}\ncompute them with `embed` of this gallery"
                )
            return clips
        return self.source.embed(clips, split, advance)

    @property
    def source(self) -> NetVectors | RunVectors:
        """The object that reads clips and computes their vectors."""
        return NetVectors(self.backend) if self.origin.cards else RunVectors(self.run)

    def load(self, path: str | Path) -> MemoryClips:
        """Loads the clips of a folder or table, with the modalities that the gallery uses."""
        widths, quality = self.source.reads
        return load_clips(path, widths, (), quality=quality, nets=self.origin.cards)

    # ---- changes

    @contextlib.contextmanager
    def change(self, advance: Advance = ignore_count, *, command: str = "") -> Iterator[Draft]:
        """Makes several changes at once: `with gallery.change() as draft: draft.remove(...)`.

        The draft has the methods `remove`, `rename` and `relabel` of this class, and `add` for
        clips with vectors. All changes are written at the end of the block. If the block raises an
        error, nothing is written. During the block, no other process can change the gallery.

        Args:
          advance: shows progress at the end of the block. It is called several times, with the
            number of clips that are finished since the last call of `advance`.
          command: the command that changes the gallery. It matters only if the gallery is a result.

        Raises:
          ResultError: the gallery is a result of a command, and `command` is another one.
        """
        with self._store.open(write=True, wait=self.lock_seconds) as transaction:
            draft = Draft(self.state)
            self._check_command(command)
            self._is_changing = True
            try:
                yield draft
                if not draft:
                    return
                state = self._store.write(transaction, *draft.finish(advance))
                with self._lock:
                    self._state = state
            finally:
                self._is_changing = draft.is_open = False
        changes.warn_of_similar(self.folder, draft.similar, self.command)

    def _check_command(self, command: str = "") -> None:
        if self.command not in ("", command):
            raise ResultError(
                f"the gallery '{messages.relative_path(self.folder)}' is a result of another "
                f"command, so it cannot be changed here\nto change names: {self.command}"
            )

    def enrol(
        self,
        clips: AnyClips,
        identities: str | Mapping[str, str] | None = None,
        *,
        split: str | None = None,
        strangers: bool = False,
        source: str = "identities",
        advance: Advance = ignore_count,
    ) -> Enrolment:
        """Enrols clips of new people, or more clips of enrolled people.

        Clips without a usable frame are left out. After an error, no clip is enrolled.

        Args:
          clips, split: see the class.
          identities: the person that all clips show, or clip -> person. The default is the labels
            of the dataset.
          strangers: False to enrol only clips with a person. True to enrol only clips without a
            person, as clips of strangers.
          source: the name of the file or argument that contains `identities`, for messages.
          advance: is called several times, with the number of new clips that are finished since the
            last call.

        Raises:
          ValueError: no clip has a person or a usable frame, the features do not fit the gallery,
            or a clip is already enrolled with another person or vector.
        """
        changes.check_identities(identities)  # before the vectors are computed
        self._check_command()
        vectors = self.embed(clips, split)
        del clips  # a large table would need the memory twice
        chosen, refused = changes.choose_clips(vectors, identities, source, strangers=strangers)
        del vectors
        with self.change(advance) as draft:
            new = draft.add(chosen)
        people = sorted({normal_form(x.identity) for x in chosen.values() if x.identity})
        changes.advise_other_films(state := self.state, people)
        misfits, found = audit(state, chosen)
        rivals = {clip: rival.person for clip, rival in found.items()}
        return Enrolment(new, len(chosen) - new, refused, draft.similar, rivals, misfits)

    def remove(
        self,
        *,
        identity: str | Collection[str] | None = None,
        clip: str | Collection[str] | None = None,
    ) -> int:
        """Removes people with all their clips, or single clips; returns the number of clips.

        Give either `identity` or `clip`: a name, or several names. If the parameters that compare
        vectors were fitted to a removed clip, these parameters are fitted again to the other clips.

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
          apart: pairs of clips that show different people, for example two faces in a photo.
          clarity: clip -> the clarity of its best face, 0 to 1, see `align.measure_clarity`. By
            default, it is 1. Two groups that contain only unclear faces, with a clarity below 0.35,
            are never joined.
          together: clip -> number. Clips with the same number certainly show the same person.
          settled: some numbers in `together`. Clips with different settled numbers are never in
            the same group.
          for_votes: True makes larger groups for `identify`, where the clips of a group vote on a
            name. A few of these groups contain clips of two people.
        """
        return answers.group(
            self.state, self.embed(vectors), apart, clarity=clarity, together=together,
            settled=settled, for_votes=for_votes,
        )  # fmt: skip

    def check_apart(self, vectors: Vectors, apart: Iterable[tuple[str, str, float]]) -> None:
        """Checks with faces of different people whether the net of the gallery separates people.

        `vectors` are the vectors of the clips. `apart` are pairs of clips that certainly show
        different people: (clip, other clip, clarity of the better face, 0 to 1).

        A face net is checked only if the statistics in its card (JSON file) were never measured.
        If the pairs contradict the card, `identify` gives no names. If at most two people are
        enrolled, `identify` gives names only after a successful check. The result of the check is
        not written to the disk.
        """
        with self._lock:
            self._state = card_notes.check_apart(self.state, vectors, apart)

    def threshold(self, fpir: float) -> Threshold:
        """Returns the threshold at which at most a share `fpir` of new strangers gets a name.

        The first call after a change is slow: all clips of strangers are compared with all people.

        Raises:
          ValueError: nobody is enrolled, or there are fewer than 1 / fpir - 1 clips of strangers.
        """
        check_argument("threshold: fpir", fpir, numbers.Real, "a number")
        return answers.measure_on_strangers(self.state, fpir)

    def rule(self, *, fpir: float | None = None, threshold: float | None = None) -> Rule:
        """Returns the rule that decides if a clip gets a name. See `identify` for its arguments."""
        return answers.choose_rule(self.state, fpir, threshold)

    def identify(
        self,
        clips: AnyClips,
        k: int = 5,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        split: str | None = None,
        groups: Mapping[str, str] | None = None,
        advance: Advance = ignore_count,
    ) -> dict[str, Answer]:
        """Identifies the person in each clip; returns clip -> answer.

        The person of a clip without a usable frame is unknown. In a gallery made from nets, the
        person is also unknown if the clip and the most probable person have no modality in common.

        Args:
          clips, split: see the class.
          k: the largest number of identities in `Answer.best`.
          fpir: the largest share of clips of unknown people that may get a name. The threshold for
            the probability of a name is measured on the gallery's strangers (clips that were
            enrolled without a person). The person must also be more probable than all other
            enrolled people together. The default is 0.01. With fewer than 99 clips of strangers,
            the default rule is a probability above 0.5.
          threshold: the lowest probability at which a clip gets a name. Give either `fpir` or
            `threshold`. (In `Predictor.identify`, `threshold` is a logarithm.)
          groups: clip -> group, as `group` returns. Only a gallery made from nets accepts groups.
            The clips of a group get the name that fits all of them together. A clip gets another
            answer if, without the group, its probability of this name is below 0.1. For all rules,
            see `answers.join_answers`.
          advance: is called for each answer, with the number of clips that get this answer.

        Raises:
          ValueError: nobody is enrolled, `fpir` is given with fewer than 1 / fpir - 1 clips of
            strangers, the features do not fit the gallery, or `groups` are given for a gallery
            made from a trained run.
        """
        check_argument("identify: k", k, numbers.Integral, "a number of identities")
        if k < 1:
            raise UserError(f"k={k} is below 1: give the number of identities to list")
        if groups is not None and not self.origin.cards:
            raise UserError(
                f"gallery '{self.folder}' was made from a run, so `groups` cannot be used\n"
                "leave out `groups`, or make a gallery from the nets in a folder: --models=FOLDER"
            )
        if not isinstance(clips, Vectors):  # reports mistakes before vectors are computed
            self.rule(fpir=fpir, threshold=threshold)
        vectors, state = self.embed(clips, split), self.state
        rule = answers.choose_rule(state, fpir, threshold)
        return answers.identify(state, rule, vectors, k, groups, advance)

    def match_rule(self, identity: str | None = None, *, fmr: float | None = None) -> Rule:
        """Returns the rule by which `verify` accepts clips of the person `identity`.

        If `identity` is None, returns the rule by which `compare` accepts two clips as one person.
        For `fmr`, see `verify`.
        """
        return verification.choose_rule(self.state, identity, fmr)

    def verify(
        self, clips: AnyClips, identity: str, *, fmr: float | None = None, split: str | None = None
    ) -> dict[str, Match]:
        """Decides for each clip if it shows the person `identity`; returns clip -> comparison.

        Args:
          clips, split: see the class.
          fmr: the largest share of clips of other people that may be accepted. The threshold is
            measured on the clips of strangers in the gallery. The default is 0.01. If the gallery
            has fewer than 99 clips of strangers, the default threshold is a likelihood ratio of
            100, see `verification`.

        Raises:
          ValueError: nobody is called `identity`, `fmr` is given with fewer than 1 / fmr - 1 clips
            of strangers, or the features do not fit the gallery.
        """
        return self.verify_person(clips, identity, fmr=fmr, split=split).matches

    def verify_person(
        self, clips: AnyClips, identity: str, *, fmr: float | None = None, split: str | None = None
    ) -> Verification:
        """Verifies clips as `verify`; also returns the rule to accept a clip, and doubtful clips.

        Doubtful clips are enrolled clips that do not fit the person's other clips, see
        `find_misfits`. All parts of the result are from the same content of the gallery, even if
        another process changes the gallery.
        """
        check_argument("verify: identity", identity, str, "the name of a person")
        if not isinstance(clips, Vectors):  # reports mistakes before vectors are computed
            self.match_rule(identity, fmr=fmr)
        vectors, state = self.embed(clips, split), self.state
        rule = verification.choose_rule(state, identity, fmr)
        return verification.verify(state, rule, vectors, identity)

    def find_misfits(self, identity: str) -> dict[str, float]:
        """Finds enrolled clips that do not fit the other clips of the person `identity`.

        Each clip is compared with all other clips of the person. A clip is listed if the likelihood
        ratio p(clips | one person) / p(clips | two people) is below 0.1. If a person has two clips
        that differ, both are listed, because nothing shows which is wrong. Returns clip -> log of
        the ratio, lowest first.
        """
        state = self.state
        return audit(state, find_person(identity, state.clips_of), among_all=False).misfits

    def compare(
        self, clips: AnyClips, others: AnyClips | None = None, *, fmr: float | None = None
    ) -> dict[tuple[str, str], Match]:
        """Decides for pairs of clips if they show the same person.

        If the statistics in the card (JSON file) of the face net were never measured, no pair is
        accepted until three people are enrolled, or `check_apart` has shown that the net separates
        people. In all other galleries, nobody needs to be enrolled.

        Args:
          clips, others: see the class. Each of `clips` is compared with each of `others`. If
            `others` is None, each of `clips` is compared with each other clip.
          fmr: as in `verify`, but the threshold is measured on pairs of clips of strangers. A clip
            is in at most one pair. So `compare` needs twice as many clips of strangers.

        Returns:
          (clip, other clip) -> comparison.

        Raises:
          ValueError: there are no pairs or more than 10,000 pairs, there are too few strangers for
            `fmr`, or the features do not fit the gallery.
        """
        self.match_rule(fmr=fmr)  # reports mistakes before vectors are computed
        first = self.embed(clips)
        second, state = None if others is None else self.embed(others), self.state
        rule = verification.choose_rule(state, None, fmr)
        return verification.compare(state, rule, first, second)

    def rank(
        self,
        clips: AnyClips,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        split: str | None = None,
        advance: Advance = ignore_count,
    ) -> dict[str, list[tuple[str, float]]]:
        """Lists the most probable clips of each enrolled person.

        Args:
          clips, split: see the class.
          fpir, threshold: see `identify`. If one is given, the list of a person contains only clips
            that get this person's name.
          advance: is called with the number of clips of each finished block.

        Returns:
          Identity -> list of (clip, logarithm of the probability) of the best 100 clips, best
          first. Clips with equal scores are in the order of their names. Identities are sorted by
          name. If all identities are whole numbers, they are sorted by number.

        Raises:
          ValueError: as in `identify`.
        """
        self.rule(fpir=fpir, threshold=threshold)  # reports mistakes before vectors are computed
        vectors, state = self.embed(clips, split), self.state
        rule = answers.choose_rule(state, fpir, threshold)
        return answers.rank(state, rule, vectors, advance)
