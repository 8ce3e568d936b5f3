"""The mesh of devices, and the layout of arrays on it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vidjax.core.batch import Array, Batch, LazyFeatures
from vidjax.utils import distributed
from vidjax.utils.errors import UserError, check_argument, warn

Tree = TypeVar("Tree")  # a tree of arrays
NVIDIA = Path("/dev/nvidia0")
CUDA = "'vidjax[cuda13]' (driver 580 or newer) or 'vidjax[cuda12]' (driver 525 or newer)"


def is_cpu(mesh: Mesh) -> bool:
    """Returns True if `mesh` consists of CPUs. JAX may emulate several devices on one CPU."""
    return mesh.devices.flat[0].platform == "cpu"


def jit(
    function: Callable[..., Any],
    mesh: Mesh,
    **options: Any,  # noqa: ANN401
) -> jax.stages.Wrapped:
    """Returns `jax.jit(function, **options)`, but compiles faster if `mesh` consists of CPUs."""
    # LLVM optimises less. Matrix products are not slower, because libraries compute them.
    level = {"xla_backend_optimization_level": 1} if is_cpu(mesh) else None
    return jax.jit(function, compiler_options=level, **options)


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh of the first `num_devices` devices, or of all devices if it is None.

    Clips are split over the only axis, `data`. Random draws and batch statistics are the same for
    every number of devices.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: no platform is left
        name = jax.config.values["jax_platforms"] or "any device"
        reason = (str(error) or "no such device").splitlines()[0].partition(" (set JAX_")[0][:200]
        raise UserError(
            f"jax cannot use {name}: {reason}\n"
            f"an NVIDIA GPU needs {CUDA}, a TPU 'vidjax[tpu]'\n"
            "to let jax choose a device, unset JAX_PLATFORMS; for the CPU, set JAX_PLATFORMS=cpu"
        ) from error
    if NVIDIA.exists() and devices[0].platform == "cpu" and not jax.config.values["jax_platforms"]:
        warn(
            "jax uses the CPU, although this machine has an NVIDIA GPU\n"
            f"to use the GPU, pip install {CUDA}\n"
            "to use the CPU without this warning, set JAX_PLATFORMS=cpu"
        )
    check_argument("num_devices", num_devices, (int, type(None)), "a number, or None")
    if num_devices is not None and not 0 < num_devices <= len(devices):
        raise UserError(
            f"num_devices={num_devices}: this machine has {len(devices)} devices\n"
            f"choose from 1 to {len(devices)}, or None for all"
        )
    devices = devices[:num_devices]
    # With axes of the type Auto, JAX inserts the communication.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated_layout(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device stores whole, such as parameters."""
    return NamedSharding(mesh, PartitionSpec())


def row_layout(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are split along their first axis, such as batches."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Copies a tree of arrays to every device of a mesh."""
    return put(tree, replicated_layout(mesh))


def put(tree: Tree, layout: NamedSharding | Tree) -> Tree:
    """Copies a tree of arrays to the devices. `layout` is a sharding or a tree of shardings.

    If several processes call this function, each process passes the same whole arrays.
    """
    if distributed.count() == 1:
        return jax.device_put(tree, layout)

    def place(sharding: NamedSharding, x: Array) -> Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.jit(_return_unchanged, out_shardings=sharding)(x)
        # `jax.device_put` would send the whole array to the other processes to compare it.
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, jax.tree.broadcast(layout, tree), tree)


def _return_unchanged(x: Array) -> Array:
    return x


def shapes(tree: Tree, layout: NamedSharding) -> Tree:
    """Returns a tree of ShapeDtypeStruct: the shapes and dtypes of arrays, with one sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), tree)


def fetch(tree: Tree) -> Tree:
    """Copies a tree of arrays to the host, including the parts on devices of other processes.

    All processes must call this function together, with the same arrays.
    """

    def copy(x: Array) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(copy, tree)


def batch_specs(batch: Tree) -> Tree:
    """Returns the PartitionSpec of each array of a batch, or of other arrays with a row per clip.

    Arrays are split by clips. Every device stores all of `LazyFeatures.values`.
    """
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def spec(leaf: Array | LazyFeatures) -> PartitionSpec | LazyFeatures:
        if isinstance(leaf, LazyFeatures):
            return leaf._replace(values=whole, index=rows)
        return rows

    return jax.tree.map(spec, batch, is_leaf=lambda x: isinstance(x, LazyFeatures))


def _batch_layouts(mesh: Mesh, batch: Tree) -> Tree:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), batch_specs(batch))


def shard_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Copies a batch to the devices of a mesh. Each device gets equally many clips.

    Raises UserError if the number of clips is not a multiple of the number of devices.
    """
    check_rows(mesh, np.shape(batch.clip_index)[0])
    return put(batch, _batch_layouts(mesh, batch))


def check_rows(mesh: Mesh, rows: int) -> None:
    """Raises UserError if a batch of `rows` clips cannot be split equally over the devices."""
    if rows % mesh.size:
        raise UserError(
            f"config.batch_size={rows} is not a multiple of {mesh.size}, the number of devices\n"
            f"set --config.batch_size={-(-rows // mesh.size) * mesh.size}"
        )


def constrain_batch(mesh: Mesh, batch: Tree) -> Tree:
    """Splits the clips of a batch over the devices of a mesh, inside a jitted function.

    A batch is a tree of arrays with a row per clip. `shard_batch` does the same outside of jit.
    """
    return jax.lax.with_sharding_constraint(batch, _batch_layouts(mesh, batch))


@contextlib.contextmanager
def compile_seconds() -> Iterator[list[float]]:
    """Yields a list that receives the seconds of each XLA compilation in the `with` block."""
    seconds: list[float] = []

    def add(event: str, duration_secs: float, **kwargs: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(add)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(add)
