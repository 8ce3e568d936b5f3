"""The formats of `vidjax export`: each writes its file, and loads it again by its own runtime.

`numpy`, and `safetensors` of a gallery, are plain arrays, which `reader.py` scores clips by:

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

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from vidjax.apps.export import function, reader, weights
from vidjax.apps.export.function import Shapes
from vidjax.apps.gallery.backend import MOST_OF_VOICE, Ratios
from vidjax.apps.gallery.gallery import Gallery
from vidjax.core import devices
from vidjax.evaluation import predict
from vidjax.evaluation.predict import Predictor
from vidjax.models.plda import PLDAIdentifier
from vidjax.models.plda_fit import unit_mean
from vidjax.utils import files
from vidjax.utils.errors import UserError

PLATFORMS = ("cpu", "cuda", "tpu")
Arrays = dict[str, np.ndarray]
Answer = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
ONLY = "holds sums and products alone: a run of configs/plda.py, or a gallery"


class Format(NamedTuple):
    """A format.

    Attributes:
      file: the file or folder that it adds to the weights; "" for none.
      write: writes it into a folder that holds the weights; returns what its runtime answers.
      packages: what it needs beside vidjax, and the extra that installs them.
      outputs: what the file answers.
      gallery: writes a gallery in place of a run and returns the largest difference, or None.
      bounded: whether weights and program lie in one file, of less than `function.LARGEST` bytes.
    """

    file: str
    write: Callable[[Predictor, Shapes, Path], Answer]
    packages: tuple[str, ...]
    extra: str
    outputs: tuple[str, ...] = function.OUTPUTS
    gallery: Callable[[Gallery, Path], float] | None = None
    bounded: bool = False


def stablehlo(run: Predictor, inputs: Shapes, folder: Path) -> Answer:
    """Writes the compiled form that `jax.export` reads."""
    path = folder / "model.stablehlo"
    compiled = jax.export.export(jax.jit(function.of_members(run)), platforms=PLATFORMS)
    path.write_bytes(compiled(dict(inputs)).serialize())
    loaded = jax.export.deserialize(bytearray(path.read_bytes()))

    def answer(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        with devices.keep_no_programs():  # a program for each size, with all weights
            return jax.device_get(jax.jit(loaded.call).lower(inputs).compile()(inputs))

    return answer


def tensorflow(run: Predictor, inputs: Shapes, folder: Path) -> Answer:
    """Writes a SavedModel, the compiled form as one operation that XLA inside of TensorFlow runs.

    TensorFlow and TF Serving load it, TensorFlow Lite and runtimes without XLA do not. The weights
    lie beside it, as variables: as constants of a graph they would be copied dozens of times, and
    could not have more than 2 GB.
    """
    from jax.experimental import jax2tf

    from vidjax.data.records.streaming import tf

    path = str(folder / "saved_model")
    shapes: Any = {name: f"({', '.join(map(str, one.shape))})" for name, one in inputs.items()}
    converted = jax2tf.convert(
        functools.partial(function.outputs, run),
        polymorphic_shapes=[None, shapes],
        with_gradient=False,
        native_serialization_platforms=("cpu", "cuda"),
    )
    given = {
        name: tf.TensorSpec(
            [x if isinstance(x, int) else None for x in one.shape], one.dtype.name, name
        )
        for name, one in inputs.items()
    }
    variables = jax.tree.map(tf.Variable, function.members(run))
    serving: Any = tf.function(lambda **arrays: converted(variables, arrays), autograph=False)
    signature = serving.get_concrete_function(**given)
    module: Any = tf.Module()
    module.weights = jax.tree.leaves(variables)
    tf.saved_model.save(module, path, signatures={"serving_default": signature})
    loaded = tf.saved_model.load(path).signatures["serving_default"]

    def answer(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        tensors = {name: tf.constant(value) for name, value in inputs.items()}
        return {name: value.numpy() for name, value in loaded(**tensors).items()}

    return answer


def onnx(run: Predictor, inputs: Shapes, folder: Path) -> Answer:
    """Writes an ONNX model."""
    import onnxruntime

    from vidjax.apps.export import onnx_graph

    path = folder / "model.onnx"
    model = onnx_graph.to_model(function.of_members(run), inputs, function.OUTPUTS)
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    read = [one.name for one in session.get_inputs()]

    def answer(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        found = session.run(list(function.OUTPUTS), {name: inputs[name] for name in read})
        return {n: np.asarray(x) for n, x in zip(function.OUTPUTS, found, strict=True)}

    return answer


def safetensors(run: Predictor, inputs: Shapes, folder: Path) -> Answer:
    """Makes a run of the weights that lie in the folder already, and asks that."""
    del run, inputs
    again = folder / "again"
    weights.read(folder, again)
    copy = predict.restore(again)
    shutil.rmtree(again)
    compiled, members = jax.jit(functools.partial(function.outputs, copy)), function.members(copy)
    return lambda arrays: jax.device_get(compiled(members, dict(arrays)))


def numpy(run: Predictor, inputs: Shapes, folder: Path) -> Answer:
    """Writes the arrays of a PLDA run, and the reader."""
    del inputs
    read = _with_reader(folder, of_run(run))

    def answer(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        vectors = unit_means(run, inputs)
        logs = read(vectors)[:, 1:]
        logs[~np.any([x.any(axis=1) for x in vectors.values()], axis=0)] = -np.inf
        return {"scores": logs}

    return answer


def _with_reader(
    folder: Path, arrays: Mapping[str, Any]
) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """Writes arrays with the reader beside them, and returns what it answers from the file."""
    path = folder / "arrays.npz"
    np.savez(path, **arrays)
    shutil.copyfile(reader.__file__, folder / "reader.py")
    found = files.read_npz(path, path.stat().st_size)
    return lambda vectors: reader.log_probabilities(found, vectors)


def gallery_numpy(gallery: Gallery, folder: Path) -> float:
    """Writes the arrays of a gallery, and the reader."""
    read = _with_reader(folder, of_gallery(gallery))
    return check_gallery(gallery, read)


def gallery_safetensors(gallery: Gallery, folder: Path) -> float:
    """Writes the arrays of a gallery as safetensors, and the reader."""
    from safetensors.numpy import load_file, save_file

    path = folder / "arrays.safetensors"
    save_file(of_gallery(gallery), path)
    shutil.copyfile(reader.__file__, folder / "reader.py")
    found = load_file(path)
    return check_gallery(gallery, lambda x: reader.log_probabilities(found, x))


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
    arrays: dict[str, Any] = {
        name: np.asarray(getattr(backend.settings, name), np.float64)
        for name in ("scale", "unenrolled", "stranger")
    }
    arrays["temperature"] = np.ones(())
    for number, part in enumerate(backend.parts):
        scorer = index.scorers[number]
        own: dict[str, Any] = {
            "centre": part.centre,
            "linear": np.concatenate([block.linear[number] for block in index.blocks]),
            "known": (index.counts[number] > 0).astype(np.int32),
            "limit": np.asarray(MOST_OF_VOICE if part.hearsay else np.inf),
        }
        if isinstance(scorer, Ratios):
            assert part.space is not None
            own |= {
                "mean": part.space.mean,
                "transform": part.space.transform,
                "constant": np.concatenate([block.constant[number] for block in index.blocks]),
                "curve": scorer.curve,
                "kind": scorer.kind.astype(np.int32),
                "scale": np.ones(()),
            }
        elif part.distances is not None:
            own |= {
                "mean": scorer.population.mean,
                "share": scorer.share,
                "radius": scorer.radius,
                "variance": scorer.variance + part.distances.within,
                "card": scorer.card,
            }
        arrays |= {f"{part.name}/{name}": value for name, value in own.items()}
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


# name -> format. To add one, write its function above and add a line here.
FORMATS = {
    "stablehlo": Format("model.stablehlo", stablehlo, (), "", bounded=True),
    "saved_model": Format("saved_model", tensorflow, ("tensorflow",), "tensorflow"),
    "onnx": Format("model.onnx", onnx, ("onnx", "onnxruntime"), "onnx", bounded=True),
    "safetensors": Format("", safetensors, (), "", gallery=gallery_safetensors),
    "numpy": Format("arrays.npz", numpy, (), "", ("scores",), gallery_numpy),
}
