"""A gallery of people: enrolled, found and deleted without training.

    import vidjax

    gallery = vidjax.Gallery.create("people", vidjax.restore("runs/plda"))
    gallery.enrol({"clip_1": {"face": features}}, "Ada")
    gallery.identify({"clip_2": {"face": features}}, fpir=0.01)  # clip -> Answer
    gallery.remove(identity="Ada")

A person is, in each modality, a number of clips and the sum of their vectors. Enrolling adds to
them and removing subtracts: answers equal, to the bit, those of a gallery that was made at once of
the clips that are there, with the same back end. `refit` fits the back end to these, too.

An open gallery answers from what the folder holds at that moment, whoever changed it.

The folder forgets who is removed, the back end included: where it was fitted to a clip that goes,
`remove` fits it anew. The run does not forget. Its weights, or the centre of a PLDA run, were made
of its training clips, as is the back end of a gallery made with `empty`, to which its training
clips were fitted that are not in the gallery: only another training without them forgets them.
"""

import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vidjax import predict
from vidjax.commands.arguments import load_data
from vidjax.data.clips import TrainingData
from vidjax.data.ground_truth import sort_identities
from vidjax.data.untrusted.names import show
from vidjax.errors import UserError, check_argument
from vidjax.evaluation import run_data
from vidjax.gallery import calibration
from vidjax.gallery import vectors as vectors_lib
from vidjax.gallery.calibration import DEFAULT_FPIR, Rule, Threshold
from vidjax.gallery.people import People, fit_front
from vidjax.gallery.store import Clip
from vidjax.gallery.vectors import AnyClips, Vectors
from vidjax.predict import Predictor
from vidjax.run.terminal import uncounted
from vidjax.steps import topk

RANK_ROWS = 256  # clips of a block of scores


class Answer(NamedTuple):
    """Who a clip shows.

    Attributes:
      identity: the person; None for unknown.
      probability: of the best identity; 0 for a clip without a usable frame.
      score: the logarithm of it, which tells clips apart whose probability is almost 1.
      best: the best identities with their probabilities, best first.
    """

    identity: str | None
    probability: float
    score: float
    best: tuple[tuple[str, float], ...]


class Enrolment(NamedTuple):
    """What became of clips that were to be enrolled.

    Attributes:
      enrolled: how many are new.
      unchanged: how many were there already, the same.
      refused: clips without a usable frame, which show nobody.
    """

    enrolled: int
    unchanged: int
    refused: tuple[str, ...]


class Ranked(NamedTuple):
    """The best clips of every person.

    Attributes:
      identities: C people, in the order of a submission.
      clips: N clips, in the order of names.
      top: [C, 100] scores and places in `clips`, as numpy arrays.
    """

    identities: tuple[str, ...]
    clips: tuple[str, ...]
    top: topk.TopK

    def lists(self) -> dict[str, list[tuple[str, float]]]:
        """Returns identity -> its clips as (name, score), best first."""
        rows = zip(self.top.index.tolist(), self.top.scores.tolist(), strict=True)
        return {
            identity: [
                (self.clips[clip], score)
                for clip, score in zip(indices, scores, strict=True)
                if clip != topk.NO_CLIP
            ]
            for identity, (indices, scores) in zip(self.identities, rows, strict=True)
        }


class Gallery:
    """A gallery in a folder.

    Attributes:
      people: the vectors, and what is done with them.
    """

    def __init__(
        self, folder: str | Path, *, run: Predictor | str | Path | None = None, sync: bool = False
    ):
        """Opens a gallery.

        Args:
          folder: the gallery.
          run: the run that it was made with, or its folder; None for the folder that the gallery
            names. It is restored at the first use.
          sync: whether a change waits until the disk has it. A killed process leaves the old state
            or the new one in any case; with `sync` so does a power cut.

        Raises:
          ValueError: there is no gallery, or it is damaged; the error names the file.
        """
        check_argument("Gallery: folder", folder, (str, os.PathLike), "the path of a folder")
        self.people = People(folder, sync=sync)
        self._run = run
        self._checked: Predictor | None = None

    @classmethod
    def create(
        cls,
        folder: str | Path,
        run: Predictor | str | Path,
        data: TrainingData | None = None,
        *,
        strangers: str | None = None,
        empty: bool = False,
        sync: bool = False,
    ) -> "Gallery":
        """Makes a gallery of the training clips of a run.

        The coordinates are fitted to these clips. The settings are those of a PLDA run, or fitted.

        Args:
          folder: a folder that is new, or empty.
          run: the run, or its folder.
          data: the dataset of the run; None to load it.
          strangers: the split whose clips without a label are strangers; None for the evaluated
            split, where that has labels.
          empty: whether nobody is enrolled: only the coordinates and the strangers are kept.
          sync: see above.

        Raises:
          ValueError: the folder holds something else, or no clip has a label.
          OSError: the gallery cannot be written.
        """
        run = _restored(run)
        if data is None:
            data = load_data(run.config)
            run_data.check_training(run.workdir, run.manifest.get("data"), run.config, data)
        clips: dict[str, Clip] = {}
        labelled = 0
        for split in run.config.data.train_splits:
            found = vectors_lib.embed(run, data, split)
            labelled += sum(label is not None for label in found.labels)
            known = {n: c for n, c in _clips_of(found).items() if c.identity is not None}
            clips |= {name: clip._replace(fitted=True) for name, clip in known.items()}
        if not labelled:
            raise UserError("no training clip has a label: there is nobody to enrol")
        if not clips:
            raise UserError(
                f"none of the {labelled:,} labelled training clips has a vector: nothing "
                "tells people apart\ntrain a run on clips of more people"
            )
        run_of = vectors_lib.origin_of(run)
        settings = vectors_lib.settings_of(run)
        widths = vectors_lib.widths_of(run, len(next(iter(clips.values())).vector))
        front = fit_front(clips, widths, centred=run_of.centred, settings=settings)
        chosen = strangers or run.config.eval.split
        if strangers or data.split(chosen).labelled:
            found = _clips_of(vectors_lib.embed(run, data, chosen))
            others = {n: c for n, c in found.items() if c.identity is None and n not in clips}
            clips = others | ({} if empty else clips)
        elif empty:
            clips = {}
        People.create(folder, run_of, front, clips, sync=sync)
        return cls(folder, run=run, sync=sync)

    def __repr__(self) -> str:
        counts, held = self.people.identities, self.people.still_held
        return (
            f"<gallery '{self.people.folder}': {len(counts)} people, {sum(counts.values())} clips, "
            f"{len(self.people.strangers)} strangers, version {self.people.version}"
            + (f", {held} removed clips still in the back end>" if held else ">")
        )

    @property
    def identities(self) -> dict[str, int]:
        """Identity -> its number of clips, in the order of names."""
        self.people.refresh()
        return self.people.identities

    @property
    def run(self) -> Predictor:
        """The run that makes vectors.

        Raises:
          ValueError: it is not there, or not the one that the gallery was made with.
        """
        if self._checked is None:
            place = self.people.run.workdir
            if self._run is None and not Path(place, "config.json").exists():
                raise UserError(
                    f"the run of gallery '{self.people.folder}' is no longer at '{place}'\n"
                    "say where it is: run=FOLDER, by command --run=FOLDER"
                )
            run = _restored(place if self._run is None else self._run)
            if vectors_lib.origin_of(run).digest != self.people.run.digest:
                raise UserError(
                    f"'{run.workdir}' is not the run that gallery '{self.people.folder}' was made "
                    f"with, which was at '{place}'\n"
                    "say where that is: run=FOLDER, by command --run=FOLDER"
                )
            self._checked = run
        return self._checked

    def embed(
        self,
        clips: AnyClips,
        split: str | None = None,
        advance: Callable[[int], None] = uncounted,
    ) -> Vectors:
        """Returns the vectors of clips, see `vectors.embed`."""
        return vectors_lib.embed(self.run, clips, split, advance)

    def enrol(
        self,
        clips: AnyClips,
        identities: str | Mapping[str, str] | None = None,
        *,
        split: str | None = None,
        strangers: bool = False,
    ) -> Enrolment:
        """Enrols clips of people who are there already, or new.

        Args:
          clips: a dataset, or clips in memory as `Predictor.embed` takes them.
          identities: the person that all clips show, or clip -> person; None for the labels of the
            dataset. Clips that it does not name are left out.
          split: the split of a dataset.
          strangers: whether to add the clips without a label as strangers, instead.

        Raises:
          ValueError: no clip has a label or a usable frame, clips do not fit the run, or one is
            enrolled as somebody else's or with another vector. Nothing is enrolled then.
          OSError: the change cannot be written. Nothing is enrolled then, unless it says so.
        """
        if identities is not None:
            wanted = "a name, or a dict {clip: name}"
            check_argument("enrol: identities", identities, (str, Mapping), wanted)
        found = self.embed(clips, split)
        if isinstance(identities, str):
            labels = (identities,) * len(found.names)
        elif identities is not None:
            for name, identity in identities.items():
                wanted = f"the name of a person for clip {name!r}"
                check_argument("enrol: identities", identity, (str, type(None)), wanted)
            labels = tuple(identities.get(name) for name in found.names)
        else:
            labels = found.labels
        found = found._replace(labels=labels)
        wanted = [n for n, label in zip(found.names, labels, strict=True)
                  if (label is None) == strangers]  # fmt: skip
        if not wanted:
            problem = "every clip has a label" if strangers else "no clip has a label"
            raise UserError(f"{problem}: there is nobody to enrol\nsay who the clips show")
        usable = _clips_of(found)
        chosen = {name: usable[name] for name in wanted if name in usable}
        refused = tuple(sorted(name for name in wanted if name not in usable))
        if not chosen:
            raise UserError(f"no clip has a usable frame, as '{show(refused[0])}'")
        new = self.people.add(chosen)
        return Enrolment(new, len(chosen) - new, refused)

    def remove(
        self, *, identity: str | None = None, clip: str | None = None, refit: bool = True
    ) -> int:
        """Removes a person with all clips, or one clip; returns the number of removed clips.

        Args:
          identity: the person.
          clip: the clip.
          refit: whether to fit the back end anew where it was fitted to a clip that goes, see
            `People.remove`. Without it the gallery still holds the person until `refit`.

        Raises:
          ValueError: there is no such name, or both or none are given.
          OSError: the change cannot be written; nothing is removed then.
        """
        if (identity is None) == (clip is None):
            raise UserError("name one: remove(identity=NAME), or remove(clip=NAME)")
        for name, value in (("identity", identity), ("clip", clip)):
            check_argument(f"remove: {name}", value, (str, type(None)), "a name")
        return self.people.remove(
            identities=() if identity is None else (identity,),
            clips=() if clip is None else (clip,),
            refit=refit,
        )

    def rename(self, identity: str, to: str, *, merge: bool = False) -> int:
        """Gives a person another name; returns the number of clips. See `People.rename`."""
        return self.people.rename(identity, to, merge=merge)

    def relabel(self, clip: str, identity: str) -> str | None:
        """Says that a clip shows somebody else; returns who it showed. See `People.relabel`."""
        return self.people.relabel(clip, identity)

    def refit(self) -> None:
        """Fits coordinates and settings to the clips that are enrolled now; see `People.refit`."""
        self.people.refit()

    def threshold(self, fpir: float) -> Threshold:
        """Returns the threshold for a rate of false alarms; see `People.threshold`."""
        check_argument("threshold: fpir", fpir, numbers.Real, "a number")
        return self.people.threshold(fpir)

    def rule(self, *, fpir: float | None = None, threshold: float | None = None) -> Rule:
        """Returns when a clip gets a name; the arguments are those of `identify`.

        Raises:
          ValueError: both are given, nobody is enrolled, or the strangers cannot show the rate.
        """
        for name, value in (("fpir", fpir), ("threshold", threshold)):
            if value is not None:
                check_argument(name, value, numbers.Real, "a number, or None")
        if fpir is not None and threshold is not None:
            raise UserError(
                "fpir and threshold: choose one\n"
                "fpir is a share of strangers, threshold a probability"
            )
        if threshold is not None:
            return calibration.rule_of_probability(threshold)
        if fpir is not None:
            return calibration.rule_of_strangers(self.threshold(fpir))
        self.people.refresh()
        strangers = len(self.people.strangers)
        if strangers < calibration.needed(DEFAULT_FPIR):
            return calibration.rule_of_new(strangers)
        return calibration.rule_of_strangers(self.threshold(DEFAULT_FPIR), default=True)

    def identify(
        self,
        clips: AnyClips,
        k: int = 5,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        split: str | None = None,
    ) -> dict[str, Answer]:
        """Returns clip -> who it shows.

        A clip without a usable frame is unknown.

        Args:
          clips: a dataset, or clips in memory as `Predictor.embed` takes them.
          k: number of identities in `Answer.best`, at most.
          fpir: the share of strangers who may get a name, at most. Where somebody new is more
            probable than the best identity, a clip is unknown, too. None: 0.01 where the gallery
            has 100 strangers; else somebody new decides alone. `rule` tells.
          threshold: instead, the lowest probability of a name, whoever else is probable. (The
            threshold of `Predictor.identify` is a logarithm.)
          split: the split of a dataset.

        Raises:
          ValueError: nobody is enrolled, the strangers cannot show the rate, or clips do not fit
            the run.
        """
        check_argument("identify: k", k, numbers.Integral, "a number of identities")
        if k < 1:
            raise UserError(f"k={k}: name 1 identity or more")
        rule = self.rule(fpir=fpir, threshold=threshold)
        found = self.embed(clips, split)
        return dict(
            zip(found.names, self.answers(list(found.parts.values()), k, rule), strict=True)
        )

    def answers(
        self, parts: Sequence[np.ndarray], k: int = 5, rule: Rule | None = None
    ) -> Iterator[Answer]:
        """Yields who clips show.

        Args:
          parts: [M] of [Q, D] float32, the vectors of clips.
          k: number of identities in `Answer.best`, at most.
          rule: when a clip gets a name; None for the rule of nothing chosen.
        """
        self.people.refresh()
        self.people.check_anybody()
        rule = self.rule() if rule is None else rule
        index = self.people.index
        for logs in index.search(parts):
            best = index.best(logs, k)
            score = best[0][1] if best else -np.inf
            identity = best[0][0] if best and rule.names(score, logs[0]) else None
            shown = tuple((name, float(np.exp(log))) for name, log in best)
            yield Answer(identity, float(np.exp(score)), score, shown)

    def rank(
        self,
        clips: AnyClips,
        *,
        fpir: float | None = None,
        threshold: float | None = None,
        split: str | None = None,
    ) -> dict[str, list[tuple[str, float]]]:
        """Returns identity -> its best 100 clips as (name, score), best first, ties by name.

        Identities are in the order of a submission, and scores are logarithms of probabilities.

        Args:
          clips: a dataset, or clips in memory as `Predictor.embed` takes them.
          fpir, threshold: where one is given, lists hold only clips that pass; see `identify`.
          split: the split of a dataset.

        Raises:
          ValueError: nobody is enrolled, or clips do not fit the run.
        """
        chosen = fpir is not None or threshold is not None
        rule = self.rule(fpir=fpir, threshold=threshold) if chosen else None
        return self.top(self.embed(clips, split), rule).lists()

    def top(
        self,
        found: Vectors,
        rule: Rule | None = None,
        advance: Callable[[int], None] = uncounted,
    ) -> Ranked:
        """Returns the ranking of clips for every person; see `rank`.

        Args:
          found: the vectors of clips.
          rule: when a person is found in a clip; None to rank all clips.
          advance: is told the number of clips of each finished block.

        Raises:
          ValueError: nobody is enrolled.
        """
        self.people.refresh()
        self.people.check_anybody()
        searched = self.people.index
        identities = sort_identities(searched.names)
        row = {name: number for number, name in enumerate(searched.names)}
        columns = np.array([1 + row[name] for name in identities])
        order = np.argsort(np.array(found.names, object), kind="stable")
        parts = [x[order] for x in found.parts.values()]
        size = min(RANK_ROWS, len(order))
        new = np.empty(len(order))

        def blocks() -> Iterator[topk.ScoreBlock]:
            scores = np.empty((size, len(columns)), np.float32)
            for place, logs in enumerate(searched.search(parts)):
                scores[place % size], new[place] = logs[columns], logs[0]
                if (place + 1) % size == 0 or place + 1 == len(order):
                    index = place // size * size + np.arange(size, dtype=np.int32)
                    yield scores.copy(), index, index <= place
                    advance(place % size + 1)

        top = topk.rank(blocks(), len(columns), rows=size)
        clips = tuple(found.names[place] for place in order.tolist())
        scores, index = np.asarray(top.scores), np.asarray(top.index)
        if rule is not None:
            listed = np.minimum(index, len(order) - 1)  # NO_CLIP is beyond the last one
            index = np.where(rule.names(scores, new[listed]), index, topk.NO_CLIP)
        return Ranked(identities, clips, topk.TopK(scores, index))


def _restored(run: Predictor | str | Path) -> Predictor:
    return run if isinstance(run, Predictor) else predict.restore(run)


def _clips_of(found: Vectors) -> dict[str, Clip]:
    """Returns the clips that have a usable frame."""
    rows = np.concatenate(list(found.parts.values()), axis=1)
    pairs = zip(found.names, found.labels, rows, found.usable.tolist(), strict=True)
    return {name: Clip(label, row) for name, label, row, usable in pairs if usable}
