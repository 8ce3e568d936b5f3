"""Plans a run: checks the data, and chooses clips, labels and weights for each net."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, ensemble, fusion
from vidjax.core.augment import MemberClips, drop_poor_frames
from vidjax.core.batch import Array, Batch, Frames, NoiseClassLayout
from vidjax.data.checks import find_unusable
from vidjax.data.clips import (
    BatchPlan,
    ClipSource,
    Split,
    make_batch_plan,
    make_eval_plan,
    select_modalities,
)
from vidjax.data.dataset import Dataset
from vidjax.data.labels import load_clip_weights
from vidjax.evaluation.eval_step import make_predict_step
from vidjax.evaluation.trained_runs import check_labelled
from vidjax.models.base import ModelState, Params, TrainingClips
from vidjax.models.build_system import MODELS, System, TaskSpec, make_fusions, make_system
from vidjax.runs.config import Config, list_splits
from vidjax.training import noise_classes, train_step
from vidjax.training.dry_run import check_model
from vidjax.utils import files, messages
from vidjax.utils.errors import UserError, warn
from vidjax.utils.terminal import say

# (state of all members, source of the clips) -> labels [E, N]
Relabel = Callable[[train_step.TrainState, ClipSource], np.ndarray]
MAX_BATCH_ROWS = 65_536  # a larger batch is probably a typing error, unless there are as many clips


class RunPlan(NamedTuple):
    """The decisions before the first step of a run, such as the clips of each batch."""

    system: System  # for training data of the sizes `task`
    training_sets: ensemble.TrainingSets  # clips that each member (net) is trained on
    labels: np.ndarray  # [N] int32, the class of each training clip at step 0
    constants: train_step.MemberConstants  # weights of clips and other constants of members
    batches: BatchPlan  # decides which clips are in the batch of a step

    @property
    def task(self) -> TaskSpec:
        """The sizes of the training data, such as `num_clips`, that the model depends on."""
        return self.system.task


def explain_no_identity(config: Config) -> str:
    """Returns the message, with a remedy, for data without a training clip that has an identity."""
    if config.data.name != "arrays":
        names = ", ".join(f"{split}_gt.txt" for split in config.data.train_splits)
    else:
        if not config.data.dir:
            return (
                "no training clip has an identity\n"
                "pass the identities of training clips: vidjax.load_data(clips, labels=LABELS)"
            )
        names = "the file of labels"
        if not any(files.local(config.data.dir).glob("labels.*")):
            return (
                f"no training clip has an identity: '{config.data.dir}/labels.csv' is missing\n"
                "write this file with the columns clip and identity"
            )
    return f"no training clip has an identity: correct {names} or config.data.train_splits"


def make_plan(config: Config, data: Dataset) -> RunPlan:
    """Checks the configuration and the data, and decides what each training step does.

    Raises UserError if the run cannot be trained.
    """
    check_model(config)
    modalities = select_modalities(config.modalities, data.modalities)
    spec = config.ensemble.to_dict()
    members = ensemble.make_members(spec)
    data.split(config.eval.split)  # raises an error if the split is missing
    check_labelled(config, data)
    splits = [data.split(name) for name in config.data.train_splits]
    labels = np.concatenate([split.labels for split in splits])
    clips = tuple(clip for split in splits for clip in split.clips)
    if not np.any(labels > 0):
        raise UserError(explain_no_identity(config))
    warn_of_untrained_people(data.split(config.eval.split), labels)

    trained = ensemble.count_clip_uses(
        members, labels, spec["folds"], config.seed, spec["resample"]
    )  # [E, N]
    weight = trained * _compute_clip_weights(config, labels, clips)
    if config.data.distractors == "leave_out":
        weight = weight * (labels > 0)
    training_sets = ensemble.TrainingSets(members, clips, trained > 0)
    _check_plan(config, data, training_sets, weight)
    num_clusters = None
    if config.data.distractors == "noise":  # slow, so it comes after the other checks
        labels, layout = label_distractors(config, data, labels)
        num_clusters = layout.num_clusters
        weight = trained * _compute_clip_weights(config, labels, clips)  # the classes have changed
    batches = make_batch_plan(
        splits, tuple(modalities), batch_size=config.batch_size, max_frames=config.data.max_frames,
        crop=config.data.crop, seed=config.seed,
        epoch_clips=choose_epoch_clips(config, data, weight) if config.data.whole_epochs else None,
    )  # fmt: skip
    task = TaskSpec(
        modalities=modalities,
        num_identities=len(data.identities),
        num_clusters=num_clusters,
        num_clips=len(labels),
        total_steps=count_steps(config, batches.num_places),
        train_other=bool(np.any(weight[:, labels == 0])),
        num_places=batches.num_places,
    )
    system = make_system(config.to_dict(), task)
    # Compiled programs contain the settings of the model, so they are computed before step 0.
    clips = make_training_clips(config, data, labels, weight > 0)
    if settings := dict(system.model.prepare(clips)):
        system = make_system(config.to_dict(), task._replace(settings=settings))
    constants = train_step.make_member_constants(members, weight)
    return RunPlan(system, training_sets, labels, constants, batches)


def count_steps(config: Config, num_places: int) -> int:
    """Returns how many steps a run has, a multiple of `optim.accumulate`.

    `num_places` is the number of places for clips in all batches of an epoch.
    """
    every = config.optim.accumulate
    return math.ceil(config.num_epochs * num_places / (config.batch_size * every)) * every


def _check_plan(
    config: Config, data: Dataset, sets: ensemble.TrainingSets, weight: np.ndarray
) -> None:
    """Raises UserError if a net has no clip, a training split is unusable, or a batch is too large.

    `weight` [E, N] is the weight of each training clip for each member (net) of the ensemble. If
    an evaluated split is unusable, prints a warning.
    """
    for member, row in zip(sets.members, weight, strict=True):
        if not row.any():
            raise UserError(
                f"member {member.number} of the ensemble has no training clip of positive weight\n"
                "change config.ensemble, config.data.distractors or config.data.weights"
            )
    for problem in find_unusable(data.report, config.data.train_splits, config.modalities):
        raise UserError(problem)
    for problem in find_unusable(data.report, list_splits(config), config.modalities):
        warn(problem)
    num_clips = len(sets.clips)
    if config.batch_size > max(MAX_BATCH_ROWS, num_clips):
        raise UserError(
            f"config.batch_size={config.batch_size} is too large: there are {num_clips} training "
            "clips\n"
            f"use --config.batch_size={num_clips} or smaller"
        )


def choose_epoch_clips(config: Config, data: Dataset, weight: np.ndarray) -> np.ndarray:
    """Returns the indices of the training clips from which at least one net learns, [n] int32.

    `weight` [E, N] is the weight of each training clip for each net. A clip is left out if its
    weight is 0 for all nets, or if the filters `config.fusion` and `config.ensemble` remove all its
    frames. If a clip has more than 512 frames, only the 512 frames of the best quality are checked.
    """
    weighted = np.any(weight > 0, axis=0)
    fusions = make_fusions(config.fusion.to_dict(), config.modalities, "train")
    lowest = jnp.float32(min(config.ensemble.min_quality, default=-jnp.inf))
    poor_clips = config.ensemble.poor_clips

    @jax.jit
    def is_chosen(batch: Batch) -> Array:
        rng, ones = jax.random.key(config.seed), jnp.ones(batch.clip_index.shape)
        frames = {name: batch.frames[name] for name in fusions}
        clips = MemberClips(frames, batch.clip_index, ones, lowest, ())
        clips = drop_poor_frames(rng, clips, poor_clips=poor_clips)
        fused = {name: fuse(rng, clips.frames[name]) for name, fuse in fusions.items()}
        return fusion.has_frames(fused) & (clips.weight > 0)

    is_used = compute_values(config, data, tuple(config.modalities), is_chosen, weighted)
    if not is_used.any():
        raise UserError(
            "no frame of any training clip is good enough to be trained on\n"
            "lower min_quality and min_detection in config.fusion, or config.ensemble.min_quality"
        )
    return np.flatnonzero(weighted)[is_used].astype(np.int32)


def label_distractors(
    config: Config, data: Dataset, labels: np.ndarray
) -> tuple[np.ndarray, NoiseClassLayout]:
    """Clusters distractors (clips of unknown people, label 0) into noise classes.

    `labels` [N] are the classes of the training clips. Returns new labels [N] int32, and the layout
    of the columns of the logits. Raises UserError if there are no distractors, or the data do not
    have the modality `config.noise.modality`.
    """
    is_noise = labels == 0
    if not is_noise.any():
        raise UserError(
            "config.data.distractors=noise needs clips without a label, but "
            f"all clips of {' and '.join(config.data.train_splits)} have a label\n"
            "choose the system without noise classes, --config=configs/noise_classes.py:other,\n"
            "or another system, such as --config=configs/mma.py"
        )
    modality = config.noise.modality
    if modality not in data.modalities:
        raise UserError(
            f"config.noise.modality='{modality}' is not a modality of the data: choose from "
            f"{', '.join(data.modalities)}"
        )
    vectors = compute_values(
        config, data, (modality,), lambda batch: _mean_face(batch.frames[modality]), is_noise
    )
    clusters = noise_classes.cluster(
        vectors, eps=config.noise.eps, min_samples=config.noise.min_samples
    )
    layout = NoiseClassLayout(len(data.identities), int(clusters.max(initial=-1)) + 1)
    labels = labels.copy()
    labels[is_noise] = noise_classes.initial_labels(clusters, layout, config.seed)
    say(
        f"{len(clusters)} distractors: {np.sum(clusters >= 0)} in {layout.num_clusters} clusters, "
        f"{np.sum(clusters < 0)} unclustered"
    )
    return labels, layout


@jax.jit
def _mean_face(frames: Frames) -> Array:
    return fusion.mean_frame(frames, weighting="quality").features[:, 0]


def compute_values(
    config: Config,
    data: ClipSource,
    modalities: Sequence[str],
    value_of: Callable[[Batch], Array],
    wanted: np.ndarray,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Computes a value for each wanted training clip, from its frames, [n, ...].

    `wanted` [N] bool selects n of the N training clips, at least one. `value_of` maps a batch of B
    clips, with all their frames in `modalities`, to values [B, ...]. If `mesh` is given, each batch
    is split over its devices, and all processes of the run must call this function together.
    """
    rows = config.eval.block_size * (mesh.size if mesh else 1)
    values, start = [], 0
    for name in config.data.train_splits:
        split = data.split(name)
        chosen = wanted[start : start + len(split.clips)]
        start += len(chosen)
        if not chosen.any():
            continue
        results = []
        plan = make_eval_plan(split, modalities, only=chosen)
        for block in data.eval_batches(plan, rows=rows):
            batch = devices.shard_batch(mesh, block) if mesh else block
            results.append(devices.fetch((value_of(batch), batch.clip_index, batch.batch_mask)))
        value, index, real = (np.concatenate(part) for part in zip(*results, strict=True))
        values.append(value[real][np.argsort(index[real])])
    return np.concatenate(values)


def make_relabel(config: Config, plan: RunPlan, mesh: Mesh) -> Relabel:
    """Returns a function that computes new classes of distractors (clips of unknown people).

    The function maps (state of all E nets, source of the clips) to [E, N] int32: for each net, the
    classes of all N training clips. Only classes of distractors change, see
    `noise_classes.relabel`. All processes of the run must call the function together.
    """
    classes, system = plan.task.layout, plan.system
    if config.noise.relabel_by == "train":
        system = system._replace(fuse_eval=system.fuse_train)
    predict = make_predict_step(system, mesh)
    members, _, trained = plan.training_sets

    def relabel(state: train_step.TrainState, clips: ClipSource) -> np.ndarray:
        assert classes
        # The labels of step 0 decide, because a later label may be a cluster.
        movable = np.asarray(classes.is_mirror(plan.labels)) & trained  # [E, N]
        old, wanted = np.asarray(devices.fetch(state.labels)), np.any(movable, axis=0)
        weights: list[tuple[Params, ModelState]] = [
            ensemble.take((state.params, state.model_state), number) for number in range(len(old))
        ]

        def best_columns(batch: Batch) -> np.ndarray:  # [B, E]
            columns = [
                predict(*weight, jnp.int32(member.view), batch)
                for weight, member in zip(weights, members, strict=True)
            ]
            return np.stack(devices.fetch(columns), axis=1)

        predicted = np.zeros_like(old)
        if wanted.any():
            values = compute_values(
                config, clips, tuple(plan.system.fuse_eval), best_columns, wanted, mesh
            )
            predicted[:, wanted] = values.T
        new = noise_classes.relabel(old, predicted, classes, keep=config.noise.keep)
        return np.where(movable, new, old).astype(np.int32)

    return relabel


def make_training_clips(
    config: Config, data: Dataset, labels: np.ndarray, used: np.ndarray
) -> TrainingClips:
    """Returns the training clips that the method `prepare` of a model may use before training.

    `labels` [N] are the classes of the clips. `used` [E, N] bool is True for the clips that each
    member of the ensemble is trained on.
    """
    splits = [data.split(name) for name in config.data.train_splits]
    present = {
        name: np.concatenate([split.lengths[name] > 0 for split in splits])
        for name in config.modalities
    }
    return TrainingClips(
        labels=labels,
        used=used,
        present=present,
        fusions=make_fusions(config.fusion.to_dict(), config.modalities, "evaluate"),
        values=lambda modality, value_of, wanted: compute_values(
            config, data, (modality,), lambda batch: value_of(batch.frames[modality]), wanted
        ),
        seed=config.seed,
        print_message=say,
    )


def warn_of_untrained_people(split: Split, labels: np.ndarray) -> None:
    """Warns if most people of the evaluated split have no training clip.

    `labels` [N] are the classes of the training clips.
    """
    people = np.flatnonzero(split.positives) + 1
    absent = len(np.setdiff1d(people, labels))
    if 2 * absent > len(people):
        warn(
            f"{absent:,} of {len(people):,} people of {split.name} have no training clip, so the "
            "run cannot recognise them\n"
            "add training clips of them, or correct names that differ between the splits"
        )


def describe_repeated_clips(config: Config, plan: RunPlan) -> str | None:
    """Returns a note if a batch is larger than the number of training clips, otherwise None.

    For a model in closed form, returns None, because the size of batches does not change the model.
    """
    most, is_whole = plan.batches.num_clips, plan.batches.epoch_clips is not None
    if config.batch_size <= most or MODELS[config.model.name].is_closed_form:
        return None
    effect, fewer = ("uses all clips", -(-most // 2)) if is_whole else ("repeats clips", most)
    return (
        f"config.batch_size={config.batch_size} is more than the {most} training clips, so a step "
        f"{effect}, and the training has {messages.count(plan.task.total_steps, 'step')}; "
        f"for more steps, use --config.batch_size={fewer} or smaller"
    )


def _compute_clip_weights(config: Config, labels: np.ndarray, clips: Sequence[str]) -> np.ndarray:
    """Returns the weight of each of N training clips in the loss, [N] float.

    The weight is the product of a weight of the clip's class (`config.data.balance`) and the weight
    in the file `config.data.weights`.
    """
    _, column, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weight = counts[column] ** -float(config.data.balance)
    weight = weight / weight.mean()
    if config.data.weights:
        given = load_clip_weights(config.data.weights, clips)
        if MODELS[config.model.name].is_closed_form and not np.all((given == 0) | (given == 1)):
            raise UserError(
                f"a weight in the file of config.data.weights is not 0 or 1, but the model "
                f"'{config.model.name}' cannot use other weights\nwrite only 0 or 1 into the file"
            )
        weight = weight * given
    return weight
