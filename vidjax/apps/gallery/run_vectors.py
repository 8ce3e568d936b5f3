"""Computes the vectors of a gallery with a training run.

JAX is imported in the functions that use the run.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from vidjax.apps.gallery import backend as backend_lib
from vidjax.apps.gallery.backend import Backend
from vidjax.apps.gallery.enrolment import stack_people
from vidjax.apps.gallery.store import StoredClip, UnreadableError, VectorOrigin
from vidjax.apps.gallery.vectors import Advance, Vectors, select_usable_clips
from vidjax.data.clips import BUCKETS, MAX_EVAL_FRAMES, PAD_LENGTHS, EvalPlan, longest
from vidjax.data.dataset import Dataset
from vidjax.data.memory import FrameClips, MemoryClips, warn_of_zeros
from vidjax.data.packed_clips import Quality
from vidjax.models.two_covariance import split_embeddings
from vidjax.utils import files
from vidjax.utils.errors import UserError, check_argument
from vidjax.utils.terminal import ignore_count, say

if TYPE_CHECKING:
    from vidjax.core.batch import Batch
    from vidjax.data.clips import ClipSource
    from vidjax.evaluation.predict import Predictor

EMBED_ROWS = 32  # clips that are embedded together
EMBEDDING = "embedding"  # if the run is not PLDA, this word replaces the modality


def restore(run: "Predictor | str | Path") -> "Predictor":
    """Loads a run from its folder. If `run` is already a loaded run, returns it unchanged."""
    from vidjax.evaluation import predict

    if isinstance(run, predict.Predictor):
        return run
    check_argument("Gallery: run", run, (str, os.PathLike), "a run, or the path of its folder")
    return predict.restore_run(run)


def load_data(run: "Predictor", data: Dataset | None) -> Dataset:
    """Returns the dataset of a run: `data` if it is given. If it is None, loads the dataset.

    Raises UserError if a loaded dataset is not the one that the run was trained on.
    """
    from vidjax.runs import digests
    from vidjax.training import public

    if data is not None:
        public.check_loaded("Gallery.create", data)
        return data
    data = public.load_data(run.config)
    digests.check_data(run.workdir, run.manifest["data"], run.config, data)
    return data


def make_origin(run: "Predictor") -> VectorOrigin:
    """Describes a run: by its folder, a digest of its weights, and whether it centres vectors."""
    digest = files.sha256_json(sorted(run.manifest["files"].items()))
    is_centred = run.model.system.model.gallery_settings() is not None
    return VectorOrigin(str(run.workdir), digest, is_centred)


def find_run(
    folder: Path, origin: VectorOrigin, given: "Predictor | str | Path | None"
) -> "Predictor":
    """Loads the run that computes the vectors of the gallery `folder`, see `Gallery`.

    `given` is the run or its folder. If it is None, the run is loaded from the folder in `origin`,
    such as `/a/RUN`, or from the folder `runs/RUN` next to the gallery.

    Raises:
      UserError: the gallery has no run; the run is missing; the weights of the run have changed;
        or this version of vidjax lacks the model of the run.
    """
    if origin.cards:
        raise UserError(
            f"gallery '{folder}' was made from nets, not from a trained run\n"
            "give it features that vidjax extract has written: --input=FOLDER"
        )
    place = origin.workdir
    remedy = "name its folder: run=FOLDER in Python, --run=FOLDER on the command line"
    copied = folder.parent / "runs" / Path(place).name  # with the gallery
    places = [x for x in (Path(place), copied) if (x / "config.json").exists()]
    if given is None and not places:
        raise UnreadableError(
            f"the run that made gallery '{folder}' is neither at '{place}' nor at "
            f"'{copied}'\n{remedy}"
        )
    from vidjax.runs import checkpoint

    try:
        run = restore(places[0] if given is None else given)
    except checkpoint.OtherModelError as error:
        raise UnreadableError(
            f"this version of vidjax cannot read the run of gallery '{folder}': "
            f"{str(error).splitlines()[0]}\n"
            "train the run again: vidjax gallery create NEW --run=FOLDER --empty\n"
            "then enrol the people again: vidjax gallery enrol NEW --input=FEATURES"
        ) from error
    if make_origin(run).digest != origin.digest:
        raise UnreadableError(
            f"the run '{run.workdir}' has other weights than the run of gallery '{folder}', "
            f"which was at '{place}'\n{remedy}"
        )
    return run


class RunVectors(NamedTuple):
    """Computes the vectors of clips for a gallery that was made from a run."""

    run: "Predictor"

    @property
    def reads(self) -> tuple[dict[str, int], Quality]:
        """The modalities that the gallery reads, and where it finds the quality of a frame.

        The first value is modality -> width of its features. The second is `given` (the quality in
        the file or, if it is missing, the norm of the features) or `norm` (always the norm).
        """
        return dict(self.run.modalities), self.run.config.data.quality

    def embed(
        self, clips: FrameClips, split: str | None = None, advance: Advance = ignore_count
    ) -> Vectors:
        """Computes the vectors of clips with the run, see `Gallery.embed`.

        If the run is an ensemble of PLDA models, its first model computes the vectors.
        """
        run = self.run
        if split is None and hasattr(clips, "train_batches"):
            raise UserError(
                "a dataset has several splits, and none is chosen\n"
                "name one: --split=S, or split=S in Python"
            )
        source, split, places, names, _ = run.request(clips, split)
        parts: dict[str, np.ndarray] = {}
        chosen = source.split(split)
        rows = np.argsort(places)  # of each clip of the split in `names`
        for batch in pad_batches(run, source, split):
            (block,) = run.embed_blocks([batch])
            real = np.asarray(batch.batch_mask)
            for part, x in _make_parts(run, block[real]).items():
                if part not in parts:
                    parts[part] = np.zeros((len(names), x.shape[1]), np.float32)
                parts[part][rows[np.asarray(batch.clip_index)[real]]] = x
            advance(int(real.sum()))
        people = (None, *source.identities) if chosen.labelled else (None,)
        labels = tuple(people[label] for label in chosen.labels[places].tolist())
        for part, x in parts.items() if isinstance(clips, Mapping | MemoryClips) else ():
            lengths = chosen.lengths.get(part, np.sum([*chosen.lengths.values()], axis=0))[places]
            zeros = np.flatnonzero((lengths > 0) & ~x.any(axis=1))
            warn_of_zeros(part, [names[clip] for clip in zeros])
        return Vectors(names, parts, labels)


def fit(
    run: "Predictor", data: Dataset, *, strangers: str | None = None, empty: bool = False
) -> tuple[VectorOrigin, Backend, dict[str, StoredClip]]:
    """Computes the content of a new gallery from the labelled training clips of a run.

    Returns three values: a description of the run, the parameters that compare vectors, and name ->
    clip. The arguments are as in `Gallery.create`.
    """
    clips: dict[str, StoredClip] = {}
    labelled, widths = 0, {}
    for split in run.config.data.train_splits:
        vectors = RunVectors(run).embed(data, split)
        widths = {name: x.shape[1] for name, x in vectors.parts.items()}
        labelled += sum(label is not None for label in vectors.labels)
        for name, clip in select_usable_clips(vectors).items():
            if clip.identity is not None:
                clips[name] = clip._replace(fitted=True)
    if not labelled:
        raise UserError(
            "no training clip has a label, so nobody can be enrolled\n"
            "name a run that was trained on clips with labels: --run=FOLDER"
        )
    if not clips:
        raise UserError(
            f"the run cannot distinguish people: the vectors of all {labelled:,} labelled "
            "training clips are 0\ntrain a run on more people, and on clips with usable frames"
        )
    origin = make_origin(run)
    settings = run.model.system.model.gallery_settings()
    vectors, labels, enrolled = stack_people(clips, widths)
    if settings and backend_lib.measure_shared(vectors, labels) > backend_lib.MOST_SHARED:
        say(
            "the training clips of a person are as alike as photos of one day, so the gallery will "
            "name fewer clips\ntrain the run on clips of different days"
        )
        origin, settings = msgspec.structs.replace(origin, refitted=True), None
    backend = backend_lib.fit(vectors, labels, enrolled, centred=origin.centred, settings=settings)
    chosen = strangers or run.config.eval.split
    kept = {} if empty else clips
    if strangers or data.split(chosen).labelled:
        usable = select_usable_clips(RunVectors(run).embed(data, chosen))
        kept = {n: c for n, c in usable.items() if c.identity is None and n not in clips} | kept
    return origin, backend, kept


def pad_batches(run: "Predictor", source: "ClipSource", split: str) -> "Iterator[Batch]":
    """Yields the clips of a split in batches of EMBED_ROWS clips.

    All clips and modalities of a batch are padded to one of the lengths in PAD_LENGTHS. So JAX
    compiles few programs.
    """
    modalities = tuple(run.modalities)
    lengths = longest(source.split(split), modalities)
    pad = np.searchsorted(PAD_LENGTHS, np.minimum(lengths, MAX_EVAL_FRAMES))
    for number in np.unique(pad).tolist():
        bucket = np.where(pad == number, 0, -1)
        padded = dict.fromkeys(modalities, (PAD_LENGTHS[number],) * len(BUCKETS))
        yield from source.eval_batches(EvalPlan(split, modalities, bucket, padded), rows=EMBED_ROWS)


def _make_parts(run: "Predictor", values: np.ndarray) -> dict[str, np.ndarray]:
    """Splits embeddings [N, sum of D] into unit vectors: modality -> [N, D] float32."""
    model = run.model.system.model
    widths = model.modalities if model.gallery_settings() else {EMBEDDING: values.shape[1]}
    return split_embeddings(values, widths)
