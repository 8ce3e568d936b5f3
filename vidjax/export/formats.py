"""The formats of `vidjax export`: each writes its file, and loads it again by its own runtime."""

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from vidjax import devices, predict
from vidjax.export import arrays as arrays_lib
from vidjax.export import function, reader, saved_model, weights
from vidjax.export.function import Exported
from vidjax.gallery.gallery import Gallery
from vidjax.predict import Predictor

PLATFORMS = ("cpu", "cuda", "tpu")
Answer = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


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
    write: Callable[[Predictor, Exported, Path], Answer]
    packages: tuple[str, ...]
    extra: str
    outputs: tuple[str, ...] = function.OUTPUTS
    gallery: Callable[[Gallery, Path], float] | None = None
    bounded: bool = False


def stablehlo(run: Predictor, exported: Exported, folder: Path) -> Answer:
    """Writes the compiled form that `jax.export` reads."""
    del run
    path = folder / "model.stablehlo"
    compiled = jax.export.export(jax.jit(exported.function), platforms=PLATFORMS)
    path.write_bytes(compiled(dict(exported.inputs)).serialize())
    loaded = jax.export.deserialize(bytearray(path.read_bytes()))

    def answer(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        with devices.keep_no_programs():  # a program for each size, with all weights
            return jax.device_get(jax.jit(loaded.call).lower(inputs).compile()(inputs))

    return answer


def tensorflow(run: Predictor, exported: Exported, folder: Path) -> Answer:
    """Writes a SavedModel."""
    whole, members = functools.partial(function.outputs, run), function.members(run)
    saved_model.write(folder / "saved_model", whole, members, exported.inputs)
    return saved_model.load(folder / "saved_model")


def onnx(run: Predictor, exported: Exported, folder: Path) -> Answer:
    """Writes an ONNX model."""
    del run
    import onnxruntime

    from vidjax.export import onnx_graph

    path = folder / "model.onnx"
    model = onnx_graph.to_model(exported.function, exported.inputs, function.OUTPUTS)
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    read = [one.name for one in session.get_inputs()]

    def answer(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        found = session.run(list(function.OUTPUTS), {name: inputs[name] for name in read})
        return {n: np.asarray(x) for n, x in zip(function.OUTPUTS, found, strict=True)}

    return answer


def safetensors(run: Predictor, exported: Exported, folder: Path) -> Answer:
    """Makes a run of the weights that lie in the folder already, and asks that."""
    del run, exported
    again = folder / "again"
    weights.read(folder, again)
    copy = predict.restore(again)
    shutil.rmtree(again)
    compiled, members = jax.jit(functools.partial(function.outputs, copy)), function.members(copy)
    return lambda inputs: jax.device_get(compiled(members, dict(inputs)))


def numpy(run: Predictor, exported: Exported, folder: Path) -> Answer:
    """Writes the arrays of a PLDA run, and the reader."""
    del exported
    read = _with_reader(folder, arrays_lib.of_run(run))

    def answer(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        vectors = arrays_lib.unit_means(run, inputs)
        logs = read(vectors)[:, 1:]
        logs[~np.any([x.any(axis=1) for x in vectors.values()], axis=0)] = -np.inf
        return {"scores": logs}

    return answer


def _with_reader(
    folder: Path, arrays: Mapping[str, Any]
) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """Writes arrays with the reader beside them, and returns what it answers from the file."""
    np.savez(folder / "arrays.npz", **arrays)
    shutil.copyfile(reader.__file__, folder / "reader.py")
    with np.load(folder / "arrays.npz") as loaded:
        found = dict(loaded)
    return lambda vectors: reader.log_probabilities(found, vectors)


def gallery_numpy(gallery: Gallery, folder: Path) -> float:
    """Writes the arrays of a gallery, and the reader."""
    read = _with_reader(folder, arrays_lib.of_gallery(gallery))
    return arrays_lib.check_gallery(gallery, read)


def gallery_safetensors(gallery: Gallery, folder: Path) -> float:
    """Writes the arrays of a gallery as safetensors, and the reader."""
    from safetensors.numpy import load_file, save_file

    path = folder / "arrays.safetensors"
    save_file(arrays_lib.of_gallery(gallery), path)
    shutil.copyfile(reader.__file__, folder / "reader.py")
    found = load_file(path)
    return arrays_lib.check_gallery(gallery, lambda x: reader.log_probabilities(found, x))


# name -> format. To add one, write its function above and add a line here.
FORMATS = {
    "stablehlo": Format("model.stablehlo", stablehlo, (), "", bounded=True),
    "saved_model": Format("saved_model", tensorflow, ("tensorflow",), "tensorflow"),
    "onnx": Format("model.onnx", onnx, ("onnx", "onnxruntime"), "onnx", bounded=True),
    "safetensors": Format("", safetensors, (), "", gallery=gallery_safetensors),
    "numpy": Format("arrays.npz", numpy, (), "", ("scores",), gallery_numpy),
}
