"""Writes a run or a gallery in the formats of `vidjax export`.

Each format is a function that writes a file, and also loads the file with the runtime of the
format, so that the results can be compared with vidjax.

The format `numpy`, and the format `safetensors` of a gallery, contain arrays with which `reader.py`
scores clips. PART is a modality, and D is the length of its vectors. N is the number of people, in
the order of identities.json. E is the number of ensemble members. PLDA compares the vectors:

    scale                        [E], a factor of the log-likelihood ratios
    unenrolled                   [E], the scaled ratio for people without a clip of PART
    stranger                     [E], the logarithm of the prior odds of a stranger
    temperature                  [E], divides the logits, see `config.eval.temperature`
    PART/centre                  [E, D], is subtracted before a vector is scaled to unit length
    PART/mean, PART/transform    [E, D] and [E, D, D], z = (unit vector - mean) @ transform
    PART/linear, PART/constant   [E, N, D] and [E, N], the coefficients of z and of 1
    PART/curve                   [E, U, D], the coefficients of z^2
    PART/kind                    [E, N] int32, the row of each person in `curve`
    PART/known                   [E, N] int32, 1 for people with a clip of PART
    PART/scale                   [E], an additional factor of the ratios of PART
    PART/limit                   [E], a bound of the ratios of clips with several modalities

The log-likelihood ratio of PART is a polynomial of z with the coefficients `linear`, `constant`
and `curve`. People with the same number of clips share one of the U rows of `curve`. Arrays without
a dtype are float32 or float64. If distances are compared instead, see `make_gallery_arrays`.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from vidjax.apps.export import function, reader, weights
from vidjax.apps.export.function import Shapes
from vidjax.apps.gallery.backend import MAX_VOICE_RATIO, Ratios
from vidjax.apps.gallery.gallery import Gallery
from vidjax.core import devices
from vidjax.core.batch import Array, Frames
from vidjax.evaluation import predict
from vidjax.evaluation.predict import Predictor
from vidjax.models.plda import PLDAIdentifier
from vidjax.models.plda_fit import unit_mean
from vidjax.utils import files
from vidjax.utils.errors import UserError

PLATFORMS = ("cpu", "cuda", "tpu")
Arrays = dict[str, np.ndarray]
Predict = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
NUMPY_SCOPE = "supports only runs of configs/plda.py and galleries"


class Format(NamedTuple):
    """A format of `vidjax export`."""

    file: str  # the name of the file or folder with the model of a run
    # Writes the model of a run into a folder, which already contains the weights. Returns a
    # function that computes the outputs with the runtime of the format.
    write: Callable[[Predictor, Shapes, Path], Predict]
    packages: tuple[str, ...]  # the packages that the format needs in addition to vidjax
    extra: str  # the extra that installs the packages, as in `pip install vidjax[onnx]`
    outputs: tuple[str, ...] = function.OUTPUTS  # the names of the outputs
    gallery_file: str = ""  # the file with the arrays of a gallery; "" if only runs are supported
    bounded: bool = False  # True if weights in the file are limited to `function.LARGEST` bytes


def stablehlo(run: Predictor, inputs: Shapes, folder: Path) -> Predict:
    """Writes a run as a serialised StableHLO program; returns a function that runs the program."""
    path = folder / "model.stablehlo"
    export = jax.export.export(jax.jit(function.make_function(run)), platforms=PLATFORMS)
    path.write_bytes(export(dict(inputs)).serialize())
    loaded = jax.export.deserialize(bytearray(path.read_bytes()))

    def predict_outputs(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        # A program is compiled for each input size and contains all weights, so it is not cached.
        with devices.disable_program_cache():
            return jax.device_get(jax.jit(loaded.call).lower(inputs).compile()(inputs))

    return predict_outputs


def tensorflow(run: Predictor, inputs: Shapes, folder: Path) -> Predict:
    """Writes a run as a SavedModel of TensorFlow; returns a function that runs the model.

    The model is a single operation, which TensorFlow runs with XLA. So runtimes without XLA, such
    as TensorFlow Lite, cannot load the model. Raises UserError if the name of a modality contains
    `-`. The returned function raises UserError if JAX is too new for TensorFlow.
    """
    if refused := [name for name in run.modalities if "-" in name]:
        raise UserError(
            f"--format=saved_model: TensorFlow allows no '-' in names, as in '{refused[0]}'\n"
            "choose --format=stablehlo or --format=onnx"
        )
    from jax.experimental import jax2tf

    from vidjax.data.records.streaming import tf

    path = folder / "saved_model"
    shapes: Any = {name: f"({', '.join(map(str, spec.shape))})" for name, spec in inputs.items()}
    converted = jax2tf.convert(
        partial(function.compute_outputs, run),
        polymorphic_shapes=[None, shapes],
        with_gradient=False,
        native_serialization_platforms=("cpu", "cuda"),
    )
    specs = {
        name: tf.TensorSpec(
            [x if isinstance(x, int) else None for x in spec.shape], spec.dtype.name, name
        )
        for name, spec in inputs.items()
    }
    # Constants of a graph are limited to 2 GB and are copied dozens of times. Variables are not.
    variables = jax.tree.map(tf.Variable, function.get_members(run))
    serving: Any = tf.function(lambda **arrays: converted(variables, arrays), autograph=False)
    signature = serving.get_concrete_function(**specs)
    module: Any = tf.Module()
    module.weights = jax.tree.leaves(variables)
    with files.disk_errors(path, tf.errors.OpError):
        tf.saved_model.save(module, str(path), signatures={"serving_default": signature})
    loaded = tf.saved_model.load(str(path)).signatures["serving_default"]

    def predict_outputs(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        tensors = {name: tf.constant(value) for name, value in inputs.items()}
        try:
            return {name: value.numpy() for name, value in loaded(**tensors).items()}
        except tf.errors.InvalidArgumentError as error:
            if "deserialize" not in str(error):
                raise
            raise UserError(
                f"--format=saved_model: TensorFlow {tf.__version__} cannot run programs of jax "
                f"{jax.__version__}\ninstall an older jax or a newer TensorFlow, or choose "
                "--format=stablehlo or --format=onnx"
            ) from error

    return predict_outputs


def onnx(run: Predictor, inputs: Shapes, folder: Path) -> Predict:
    """Writes a run as an ONNX model; returns a function that runs the model in ONNX Runtime."""
    import onnxruntime

    from vidjax.apps.export import onnx_graph

    path = folder / "model.onnx"
    model = onnx_graph.to_model(function.make_function(run), inputs, function.OUTPUTS)
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    input_names = [value.name for value in session.get_inputs()]

    def predict_outputs(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        feeds = {name: inputs[name] for name in input_names}
        arrays = session.run(list(function.OUTPUTS), feeds)
        return {n: np.asarray(x) for n, x in zip(function.OUTPUTS, arrays, strict=True)}

    return predict_outputs


def safetensors(run: Predictor, inputs: Shapes, folder: Path) -> Predict:
    """Returns a function that computes outputs with the weights in `folder`, for the comparison.

    `vidjax export` has already written the weights, in the format safetensors.
    """
    del run, inputs
    imported = folder / "imported"
    weights.read(folder, imported)
    copy = predict.restore(imported)
    shutil.rmtree(imported)
    compiled = jax.jit(partial(function.compute_outputs, copy))
    members = function.get_members(copy)
    return lambda arrays: jax.device_get(compiled(members, dict(arrays)))


def numpy(run: Predictor, inputs: Shapes, folder: Path) -> Predict:
    """Writes the arrays of a PLDA run and `reader.py`; returns a function that scores with them."""
    del inputs
    read = _write_arrays(folder / "arrays.npz", make_run_arrays(run))

    def predict_outputs(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        vectors = compute_unit_means(run, inputs)
        logs = read(vectors)[:, 1:]
        logs[~np.any([x.any(axis=1) for x in vectors.values()], axis=0)] = -np.inf
        return {"scores": logs}

    return predict_outputs


def _write_arrays(
    path: Path, arrays: dict[str, Any]
) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """Writes arrays to a file, and copies `reader.py` next to the file.

    Returns a function that scores the vectors of clips with `reader.py` and the written arrays.
    """
    from safetensors.numpy import load_file

    if path.suffix == ".npz":
        np.savez(path, **arrays)
        written = files.read_npz(path, path.stat().st_size)
    else:
        weights.save(arrays, path)
        written = load_file(path)
    path.with_name("reader.py").write_bytes(Path(reader.__file__).read_bytes())
    return lambda vectors: reader.log_probabilities(written, vectors)


def write_gallery(format_name: str, gallery: Gallery, folder: Path) -> float:
    """Writes the arrays of a gallery and `reader.py`; returns the largest error of the scores.

    The scores of random clips are compared with the scores of the gallery. Raises UserError if the
    error is above `function.TOLERANCE`.
    """
    path = folder / FORMATS[format_name].gallery_file
    read = _write_arrays(path, make_gallery_arrays(gallery))
    rng, parts = np.random.default_rng(0), {}
    for number, (name, width) in enumerate(gallery.backend.widths.items()):
        x = rng.normal(size=(6, width)).astype(np.float32)
        parts[name] = x / np.linalg.norm(x, axis=1, keepdims=True)
        parts[name][1 + number % 5] = 0  # a clip that lacks the modality
    if len(parts) > 1:
        for x in parts.values():
            x[0] = 0  # a clip that lacks all modalities
    expected = np.stack(list(gallery.index.search(list(parts.values()))))
    worst = function.difference({"scores": read(parts)}, {"scores": expected})
    function.check_tolerance(format_name, worst)
    return worst


def make_run_arrays(run: Predictor) -> Arrays:
    """Returns the arrays of a PLDA run, name -> array. The docstring of this file lists them.

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


def make_gallery_arrays(gallery: Gallery) -> Arrays:
    """Returns the arrays of a gallery, name -> array. The docstring of this file lists them.

    People are in the order of `gallery.index.names`. If a modality is compared by distances, the
    arrays `share`, `radius`, `variance` and `card` of `backend.DistanceRatios` replace `transform`,
    `constant`, `curve`, `kind` and `scale`. Here, `variance` is the sum of the variance of
    `DistanceRatios` and of `Distances.within`.
    """
    index, backend = gallery.index, gallery.backend
    if not index.names:
        raise UserError(
            f"nobody is enrolled in gallery '{gallery.folder}'\n"
            "enrol people first: vidjax gallery enrol"
        )
    arrays: dict[str, Any] = {
        name: np.asarray(getattr(backend.settings, name), np.float64)
        for name in ("scale", "unenrolled", "stranger")
    }
    arrays["temperature"] = np.ones(())
    for number, part in enumerate(backend.parts):
        scorer = index.scorers[number]
        part_arrays: dict[str, Any] = {
            "centre": part.centre,
            "linear": np.concatenate([block.linear[number] for block in index.blocks]),
            "known": (index.counts[number] > 0).astype(np.int32),
            "limit": np.asarray(MAX_VOICE_RATIO if part.may_be_offscreen else np.inf),
        }
        if isinstance(scorer, Ratios):
            assert part.space is not None
            part_arrays |= {
                "mean": part.space.mean,
                "transform": part.space.transform,
                "constant": np.concatenate([block.constant[number] for block in index.blocks]),
                "curve": scorer.curve,
                "kind": scorer.kind.astype(np.int32),
                "scale": np.ones(()),
            }
        elif part.distances is not None:
            part_arrays |= {
                "mean": scorer.population.mean,
                "share": scorer.share,
                "radius": scorer.radius,
                "variance": scorer.variance + part.distances.within,
                "card": scorer.card,
            }
        arrays |= {f"{part.name}/{name}": value for name, value in part_arrays.items()}
    return {name: np.ascontiguousarray(value)[None] for name, value in arrays.items()}


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


# Name -> format. To add a format, write a function above, and add a line here.
FORMATS = {
    "stablehlo": Format("model.stablehlo", stablehlo, (), "", bounded=True),
    "saved_model": Format("saved_model", tensorflow, ("tensorflow",), "tensorflow"),
    "onnx": Format("model.onnx", onnx, ("onnx", "onnxruntime"), "onnx", bounded=True),
    "safetensors": Format(
        "weights.safetensors", safetensors, (), "", gallery_file="arrays.safetensors"
    ),
    "numpy": Format("arrays.npz", numpy, (), "", ("scores",), gallery_file="arrays.npz"),
}
