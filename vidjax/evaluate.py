"""Evaluation: every clip of a split through a system, into a ranking and its MAP@100."""

import difflib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vidjax import checkpoint, metrics, ranking, steps
from vidjax import config as config_lib
from vidjax import mesh as mesh_lib
from vidjax import workdir as workdir_lib
from vidjax.batch import Array, Batch
from vidjax.config import Config
from vidjax.logs import CompileClock, Progress

# What metrics.json says of the training, whatever is evaluated later.
OF_TRAINING = (
    "best_step",
    "best_map",
    "num_params",
    "train_clips_per_second",
    "seconds",
    "seed",
    "finished",
    "versions",
)


class Evaluation(NamedTuple):
    """Scores of one split.

    Attributes:
      top: the best 100 clips of every identity, in their final order.
      results: `map`, `map_kind` and `top1` (where there is a ground truth), counts,
        `eval_clips_per_second`.
    """

    top: ranking.TopK
    results: dict[str, Any]


class Evaluator:
    """The compiled evaluation of a system; one serves every evaluation of a run."""

    def __init__(self, system: steps.System, mesh: Mesh, *, block_size: int):
        """Prepares an evaluation in blocks of `block_size` clips on every device of a mesh."""
        if block_size < 1:
            raise ValueError(f"config.eval.block_size={block_size}: must be positive")
        self._eval_step = steps.make_eval_step(system, mesh)
        self._modalities = tuple(system.fuse_eval)
        self._num_identities = len(system.class_mask) - 1
        self._mesh = mesh
        self._rows = block_size * mesh.size

    def __call__(
        self,
        params: Any,
        model_state: Any,
        data: Any,
        split_name: str,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Scores every clip of a split once.

        Args:
          params: the model's parameters.
          model_state: the model's other collections.
          data: a `vidjax.data.pipeline.Dataset` of the system's identities.
          split_name: which split.
          check: called after every block; what it raises ends the evaluation.
        """
        split = data.split(split_name)
        labels = mesh_lib.replicate(self._mesh, jnp.asarray(split.labels))
        right: list[tuple[Array, Array]] = []

        def blocks() -> Iterator[tuple[Array, Array, Array]]:
            progress = Progress(len(split.clips), unit="clip", label="evaluate", leave=False)
            for host_batch in data.eval_batches(
                split=split_name, modalities=self._modalities, rows=self._rows
            ):
                batch = mesh_lib.shard_batch(self._mesh, host_batch)
                scores = self._eval_step(params, model_state, batch)
                right.append(_top1(scores, labels, batch))
                yield scores, batch.clip_index, batch.batch_mask
                jax.block_until_ready(scores)
                progress.advance(int(np.sum(host_batch.batch_mask)))
                check()
            progress.close()

        began = time.monotonic()
        with CompileClock() as compiling:
            top = ranking.rank(blocks(), self._num_identities)
        seconds = time.monotonic() - began - compiling.seconds
        results: dict[str, Any] = {}
        if split.labelled:
            results["map"] = metrics.mean_average_precision(
                top.index, split.labels, split.positives, split.num_others
            )
            results["map_kind"] = split_name
            correct, labelled = np.sum(np.asarray(right), axis=0)
            results["top1"] = float(correct / max(labelled, 1))
        results |= {
            "num_clips": len(split.clips),
            "num_identities": self._num_identities,
            "num_distractors": int(np.sum(split.labels == 0)) if split.labelled else None,
            "eval_clips_per_second": len(split.clips) / max(seconds, 1e-9),
        }
        return Evaluation(top, results)


@jax.jit
def _top1(scores: Array, labels: Array, batch: Batch) -> tuple[Array, Array]:
    return metrics.top1(scores, labels[batch.clip_index], batch.batch_mask)


def evaluate(
    config: Config, workdir: Path, data: Any, *, num_devices: int | None = None
) -> dict[str, Any]:
    """Scores a split with the weights of a run; writes the ranking and returns the metrics.

    The files are `metrics.json` and `ranking.txt` for the split that training watched,
    `metrics_<split>.json` and `ranking_<split>.txt` for any other.

    Args:
      config: the run's configuration, with what differs now.
      workdir: the run's folder.
      data: a `vidjax.data.pipeline.Dataset`; it need not be the one that was trained on, nor have a
        ground truth.
      num_devices: how many devices to use; None for all. Scores do not depend on it.

    Raises:
      ValueError: the data does not fit the run.
      CheckpointError: no usable checkpoint.
    """
    began = time.monotonic()
    step = _choose_step(config, workdir)
    manifest = checkpoint.manifests(workdir)[step]
    sizes = steps.Sizes(**{name: manifest[name] for name in steps.Sizes._fields})
    if tuple(config.modalities) != tuple(sizes.modalities):
        raise ValueError(
            f"config.modalities={','.join(config.modalities)}: the run was trained on "
            f"{','.join(sizes.modalities)}, in this order"
        )
    found = select_modalities(tuple(sizes.modalities), data)
    for name, width in sizes.modalities.items():
        if found[name] != width:
            raise ValueError(f"modality '{name}': the run wants width {width}, got {found[name]}")
    identities = _identities(workdir / "identities.json", manifest["identities_sha256"])
    data = data.with_identities(identities)
    split = config.eval.split
    if data.split(split).labelled and not np.any(data.split(split).positives):
        raise ValueError(
            f"config.eval.split={split}: its ground truth names no identity that the run knows"
        )

    system = steps.make_system(config.to_dict(), sizes)
    mesh = mesh_lib.make_mesh(num_devices)
    abstract = jax.eval_shape(
        lambda: steps.init_state(system, sizes.modalities, jax.random.key(config.seed))
    )
    items = checkpoint.restore(
        workdir,
        step,
        {"params": abstract.params, "model_state": abstract.model_state},
        mesh_lib.replicated(mesh),
    )
    evaluator = Evaluator(system, mesh, block_size=config.eval.block_size)
    evaluation = evaluator(items["params"], items["model_state"], data, split)
    results = evaluation.results | {"step": step, "eval_seconds": time.monotonic() - began}
    if split in config.data.train_splits:
        results["map_kind"] = "in_sample"

    trained = config_lib.load_workdir(workdir)
    suffix = "" if split == trained.eval.split else f"_{split}"
    ranking.write_ranking(
        workdir / f"ranking{suffix}.txt", identities, data.split(split).clips, evaluation.top
    )
    trained_path = workdir / "metrics.json"
    facts = json.loads(trained_path.read_text()) if trained_path.exists() else {}
    kept = {name: facts[name] for name in OF_TRAINING if name in facts}
    workdir_lib.write_json(workdir / f"metrics{suffix}.json", kept | results)
    return results


def _identities(path: Path, wanted: str) -> tuple[str, ...]:
    try:
        identities = tuple(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise checkpoint.CheckpointError(f"cannot read '{path}': {error}") from error
    if digest(identities) != wanted:
        raise checkpoint.CheckpointError(f"'{path}' is not the list that the run was trained on")
    return identities


def _choose_step(config: Config, workdir: Path) -> int:
    saved = checkpoint.manifests(workdir)
    best = checkpoint.best_step(workdir)
    choices = {"latest": max(saved, default=None), "best": best}
    if config.eval.checkpoint not in choices:
        raise ValueError(f"config.eval.checkpoint='{config.eval.checkpoint}': latest or best")
    step = choices[config.eval.checkpoint]
    if step is None:
        raise checkpoint.CheckpointError(f"no {config.eval.checkpoint} checkpoint in '{workdir}'")
    return step


def select_modalities(names: Sequence[str], data: Any) -> dict[str, int]:
    """Returns name -> feature width of the modalities that a configuration asks for.

    Raises:
      ValueError: there is none of that name, or no name at all.
    """
    if not names:
        raise ValueError("config.modalities is empty: name at least one")
    if len(set(names)) < len(names):
        raise ValueError(f"config.modalities={','.join(names)}: one is named twice")
    for name in names:
        if name not in data.modalities:
            close = difflib.get_close_matches(name, data.modalities, n=1)
            hint = (
                f"did you mean '{close[0]}'?" if close else f"there: {', '.join(data.modalities)}"
            )
            raise ValueError(f"config.modalities: the data has no modality '{name}'; {hint}")
    return {name: data.modalities[name].dim for name in names}


def digest(identities: Sequence[str]) -> str:
    """Returns the sha256 of a list of identities, in its order."""
    return hashlib.sha256(json.dumps(list(identities)).encode()).hexdigest()
