"""Computes the arrays with which numpy scores clips with a PLDA run."""

from collections.abc import Mapping

import jax
import numpy as np

from vidjax.core.batch import Array, Frames
from vidjax.evaluation.export import function
from vidjax.evaluation.predict import Predictor
from vidjax.models.plda import PLDAIdentifier
from vidjax.models.plda_fit import unit_mean
from vidjax.utils.errors import UserError

NUMPY_SCOPE = "supports only runs of configs/plda.py and galleries"


def make_run_arrays(run: Predictor) -> dict[str, np.ndarray]:
    """Returns the arrays of a PLDA run, name -> array. `array_files` lists them.

    Raises UserError for other models and unsupported settings.
    """
    config = run.config
    if not isinstance(run.system.model, PLDAIdentifier):
        raise UserError(
            f"--format=numpy {NUMPY_SCOPE}, not runs of the model '{config.model.name}'\n"
            "choose --format=safetensors"
        )
    if config.eval.scores != "log_softmax" or config.eval.top_classes or config.ensemble.views:
        raise UserError(
            "--format=numpy needs a run with config.eval.scores=log_softmax, "
            "config.eval.top_classes=0 and config.ensemble.views=0\n"
            "choose --format=safetensors"
        )
    solved = jax.device_get(run.model_state["solved"])
    columns = slice(1, 1 + len(run.identities))
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
            f"{part}/linear": enrolled.linear[:, columns],
            f"{part}/constant": enrolled.constant[:, columns],
            f"{part}/curve": enrolled.curve,
            f"{part}/kind": enrolled.kind[:, columns],
            f"{part}/known": enrolled.known[:, columns].astype(np.int32),
            f"{part}/scale": np.ones(members),
            f"{part}/limit": np.full(members, np.inf),
        }
    return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


def compute_unit_means(run: Predictor, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the mean vectors of B clips, scaled to unit length: modality -> [B, D].

    The means are the input of `reader.log_probabilities`. `run` is a PLDA run. `inputs` are name ->
    array, see `function.input_shapes`.
    """

    @jax.jit
    def compute(frames: Mapping[str, Frames]) -> dict[str, Array]:
        fused = run.system.fuse(None, frames, jax.numpy.int32(0))
        return {part: unit_mean(fused[part]) for part in run.modalities}

    means = compute(function.make_batch(run, inputs).frames)
    return {part: np.asarray(mean) for part, mean in means.items()}
