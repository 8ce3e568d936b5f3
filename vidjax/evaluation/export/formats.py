"""Writes runs in the formats of `vidjax export`.

Each format is a function that writes a file with the model. The function also loads the file with
the runtime of the format, so that the outputs can be compared with vidjax. JAX and other runtimes
are imported only in the functions, because the imports are slow.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vidjax.utils import files
from vidjax.utils.errors import UserError

if TYPE_CHECKING:
    from vidjax.evaluation.export.function import Shapes
    from vidjax.evaluation.predict import Predictor

OUTPUTS: tuple[str, ...] = ("scores", "embeddings")  # [B, C] and [B, D], float32
PLATFORMS = ("cpu", "cuda", "tpu")
Predict = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class Format(NamedTuple):
    """A format of `vidjax export`: the function that writes it, its files and its packages."""

    file: str  # the name of the file or folder with the model of a run
    # Writes the model of a run into a folder, which already contains the weights. Returns a
    # function that computes the outputs with the runtime of the format.
    write: Callable[["Predictor", "Shapes", Path], Predict]
    packages: tuple[str, ...]  # the packages that the format needs in addition to vidjax
    extra: str  # the extra that installs the packages, as in `pip install vidjax[onnx]`
    bounded: bool = False  # True if weights in the file are limited to `function.LARGEST` bytes


def stablehlo(run: "Predictor", inputs: "Shapes", folder: Path) -> Predict:
    """Writes a run as a serialised StableHLO program; returns a function that runs the program."""
    import jax
    import jax.export

    from vidjax.evaluation.export import function
    from vidjax.runs import programs

    path = folder / "model.stablehlo"
    export = jax.export.export(jax.jit(function.make_function(run)), platforms=PLATFORMS)
    path.write_bytes(export(dict(inputs)).serialize())
    loaded = jax.export.deserialize(bytearray(path.read_bytes()))

    def predict_outputs(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        # A program is compiled for each input size and contains all weights, so it is not cached.
        with programs.disable_program_cache():
            return jax.device_get(jax.jit(loaded.call).lower(inputs).compile()(inputs))

    return predict_outputs


def tensorflow(run: "Predictor", inputs: "Shapes", folder: Path) -> Predict:
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
    from vidjax.data.tfds.streaming import tf  # first, because it hides messages of TensorFlow

    # isort: split
    import jax
    from jax.experimental import jax2tf

    from vidjax.evaluation.export import function

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


def onnx(run: "Predictor", inputs: "Shapes", folder: Path) -> Predict:
    """Writes a run as an ONNX model; returns a function that runs the model in ONNX Runtime."""
    import onnxruntime

    from vidjax.evaluation.export import function, onnx_graph

    path = folder / "model.onnx"
    model = onnx_graph.to_model(function.make_function(run), inputs, OUTPUTS)
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    input_names = [value.name for value in session.get_inputs()]

    def predict_outputs(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        feeds = {name: inputs[name] for name in input_names}
        arrays = session.run(list(OUTPUTS), feeds)
        return {n: np.asarray(x) for n, x in zip(OUTPUTS, arrays, strict=True)}

    return predict_outputs


def safetensors(run: "Predictor", inputs: "Shapes", folder: Path) -> Predict:
    """Returns a function that computes outputs with the weights in `folder`.

    Every export has already written its weights as safetensors, so no file is added.
    """
    del run, inputs
    import jax

    from vidjax.evaluation import predict
    from vidjax.evaluation.export import function, weights

    imported = folder / "imported"
    weights.read(folder, imported)
    copy = predict.restore_run(imported)
    shutil.rmtree(imported)
    compiled = jax.jit(partial(function.compute_outputs, copy))
    members = function.get_members(copy)
    return lambda arrays: jax.device_get(compiled(members, dict(arrays)))


# Name -> format. To add a format, write a function above, and add a line here.
FORMATS = {
    "stablehlo": Format("model.stablehlo", stablehlo, (), "", bounded=True),
    "saved_model": Format("saved_model", tensorflow, ("tensorflow",), "tensorflow"),
    "onnx": Format("model.onnx", onnx, ("onnx", "onnxruntime"), "onnx", bounded=True),
    "safetensors": Format("weights.safetensors", safetensors, (), ""),
}


def write_run(
    name: str, workdir: Path, folder: Path, step: Literal["latest", "best"]
) -> dict[str, Any]:
    """Exports the run in `workdir` in the format `name`, and checks the exported outputs.

    The weights and the model are written to `folder`. `step` chooses the checkpoint. Returns the
    entries of `export.json`, such as the names of the outputs, and the largest difference between
    exported outputs and outputs of vidjax. Raises UserError if the difference is too large, or if
    the format cannot store so many weights.
    """
    import jax

    from vidjax.evaluation import predict
    from vidjax.evaluation.export import function, weights
    from vidjax.runs.versions import collect_versions

    run, target = predict.restore_run(workdir, step=step, num_devices=1), FORMATS[name]
    size = sum(x.nbytes for x in jax.tree.leaves((run.model.params, run.model.model_state)))
    if target.bounded and size >= function.LARGEST:
        raise UserError(
            f"--format={name} is limited to {function.LARGEST / 1e9:.1f} GB, but the weights have "
            f"{size / 1e9:.1f} GB\nchoose --format=safetensors or --format=saved_model"
        )
    inputs = function.input_shapes(run)
    weights.write(run.workdir, folder, step)
    outputs = target.write(run, inputs, folder)
    return {
        "step": run.step,
        "inputs": {
            name: {"shape": [x if isinstance(x, int) else str(x) for x in spec.shape],
                   "dtype": spec.dtype.name}
            for name, spec in inputs.items()
        },
        "outputs": list(OUTPUTS),
        "num_identities": len(run.identities),
        "scores": run.config.eval.scores,
        "difference": function.check(name, run, outputs),
        "versions": collect_versions(),
    }  # fmt: skip
