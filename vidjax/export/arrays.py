"""PLDA runs and galleries as plain arrays, which `reader.py` scores clips by.

    scale, unenrolled, stranger, temperature   [E], of `two_covariance.Settings` and `config.eval`
    PART/centre, PART/mean      [E, D], subtracted from vectors before and after they are scaled
    PART/transform              [E, D, D], columns are the axes of the coordinates z
    PART/linear, PART/constant  [E, N, D] and [E, N], coefficients of z, and the constant
    PART/curve, PART/kind       [E, U, D] and [E, N], coefficients of z^2, and each person's row
    PART/known                  [E, N], 1 for people with a clip that has the part
    PART/scale, PART/limit      [E], factor on ratios, and their bound beside other parts

N are the people in the order of identities.json, E the members of an ensemble. All are float32 or
float64, but `kind` and `known`, which are int32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from vidjax.errors import UserError
from vidjax.export import function
from vidjax.gallery.backend import MOST_OF_VOICE
from vidjax.gallery.gallery import Gallery
from vidjax.models.plda import PLDAIdentifier
from vidjax.models.plda_logits import unit_mean
from vidjax.predict import Predictor

Arrays = dict[str, np.ndarray]
ONLY = "holds sums and products alone: a run of configs/plda.py, or a gallery"


def of_run(run: Predictor) -> Arrays:
    """Returns the arrays of a PLDA run; UserError for another one."""
    config = run.config
    if not isinstance(run.system.model, PLDAIdentifier):
        raise UserError(f"--format=numpy {ONLY}, not '{config.model.name}'\nchoose safetensors")
    if config.eval.scores != "log_softmax" or config.eval.top_classes or config.ensemble.views:
        raise UserError(
            "--format=numpy has scores of all identities, eval.scores=log_softmax, and no views\n"
            "choose safetensors"
        )
    solved = jax.device_get(run.model_state["solved"])
    own = slice(1, 1 + len(run.identities))
    members = len(run.training_sets.members)
    settings = solved["settings"]
    arrays = {name: getattr(settings, name) for name in ("scale", "unenrolled", "stranger")}
    arrays["temperature"] = np.full(members, config.eval.temperature)
    for part in run.modalities:
        space, enrolled = solved[part]["space"], solved[part]["enrolled"]
        arrays |= {
            f"{part}/centre": solved[part]["centre"],
            f"{part}/mean": space.mean,
            f"{part}/transform": space.transform,
            f"{part}/linear": enrolled.linear[:, own],
            f"{part}/constant": enrolled.constant[:, own],
            f"{part}/curve": enrolled.curve,
            f"{part}/kind": enrolled.kind[:, own],
            f"{part}/known": enrolled.known[:, own].astype(np.int32),
            f"{part}/scale": np.ones(members),
            f"{part}/limit": np.full(members, np.inf),
        }
    return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


def of_gallery(gallery: Gallery) -> Arrays:
    """Returns the arrays of a gallery; people are in the order of `gallery.index.names`."""
    index, backend = gallery.index, gallery.backend
    if not index.names:
        raise UserError(f"gallery '{gallery.folder}' has nobody: there is nothing to export")
    arrays: Arrays = {
        name: np.asarray(getattr(backend.settings, name), np.float64)
        for name in ("scale", "unenrolled", "stranger")
    }
    arrays["temperature"] = np.ones(())
    for number, part in enumerate(backend.parts):
        counts, none = np.unique(index.counts[number], return_inverse=True)
        blank = part.coefficients(counts, np.zeros((len(counts), len(part.centre))))
        own: dict[str, Any] = {
            f"{part.name}/centre": part.centre,
            f"{part.name}/mean": part.space.mean,
            f"{part.name}/transform": part.space.transform,
            f"{part.name}/linear": np.concatenate([b.linear[number] for b in index.blocks]),
            f"{part.name}/constant": np.concatenate([b.constant[number] for b in index.blocks]),
            f"{part.name}/curve": np.asarray(blank.curve),
            f"{part.name}/kind": none.astype(np.int32),
            f"{part.name}/known": (index.counts[number] > 0).astype(np.int32),
            f"{part.name}/scale": np.asarray(part.scale),
            f"{part.name}/limit": np.asarray(MOST_OF_VOICE if part.hearsay else np.inf),
        }
        arrays |= own
    return {name: np.ascontiguousarray(value)[None] for name, value in arrays.items()}


def unit_means(run: Predictor, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns part -> [B, D], what the reader takes: mean frames, scaled to length 1."""
    batch = function.as_batch(run, inputs)
    fused = run.system.fuse(None, batch.frames, jax.numpy.int32(-1))
    return {part: np.asarray(unit_mean(fused[part])) for part in run.modalities}


def check_gallery(
    gallery: Gallery, answer: Callable[[Mapping[str, np.ndarray]], np.ndarray]
) -> float:
    """Compares a reader with the gallery on made-up vectors; returns the largest difference.

    Raises:
      UserError: they differ by more than `function.TOLERANCE`.
    """
    rng, parts = np.random.default_rng(0), {}
    for number, (name, width) in enumerate(gallery.backend.widths.items()):
        x = rng.normal(size=(6, width)).astype(np.float32)
        parts[name] = x / np.linalg.norm(x, axis=1, keepdims=True)
        parts[name][1 + number % 5] = 0  # a clip that lacks the part
    if len(parts) > 1:
        for x in parts.values():
            x[0] = 0  # and one that lacks all
    wanted = np.stack(list(gallery.index.search(list(parts.values()))))
    worst = function.difference({"scores": answer(parts)}, {"scores": wanted})
    function.check_tolerance("numpy", worst)
    return worst
