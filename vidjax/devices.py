"""Devices: the mesh, and how arrays are laid out on it."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vidjax.batch import Array, Batch, Frames, LazyFeatures


def keep_programs(folder: Path) -> None:
    """Keeps compiled programs in a folder for later processes, unless jax was told of another."""
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    # A folder may be shared by machines whose processors differ.
    try:
        facts = Path("/proc/cpuinfo").read_text()
        processor = next(line for line in facts.splitlines() if line.startswith(("flags", "Feat")))
    except (OSError, StopIteration):
        processor = platform.processor()
    kind = hashlib.sha256(f"{platform.machine()} {processor}".encode()).hexdigest()[:8]
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs" / kind))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def be_deterministic() -> None:
    """Has every run on a GPU give the same bits; before jax looks for devices."""
    known = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{known} --xla_gpu_deterministic_ops=true".strip()


def versions() -> dict[str, str]:
    """Returns what a score was computed with: package -> version, Python and the devices."""
    packages = ("vidjax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    devices = jax.devices()
    device = f"{len(devices)} x {devices[0].device_kind}"
    return {**found, "python": platform.python_version(), "device": device}


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh with the one axis `data` over the first devices (all when None).

    The axis is Auto: one program runs on 1 or N devices with bit-identical random draws and with
    batch statistics over all of them, which is what pmap could not do.

    Raises:
      ValueError: jax cannot use the platform that it was told to.
    """
    devices = _devices()[:num_devices]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def _devices() -> list[Any]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where no platform is left
        platform = jax.config.values["jax_platforms"] or "the default platform"
        reason = (str(error) or "it is not there").splitlines()[0][:300]
        raise ValueError(
            f"jax cannot use {platform}: {reason}\n"
            "an NVIDIA GPU needs vidjax's extra [cuda], a TPU [tpu]: pip install '.[cuda]'"
        ) from error


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout of what every device holds whole: parameters and tables."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Returns the layout of what is split over the devices by its leading axis: batches."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Returns a tree of arrays, a copy on every device."""
    return jax.device_put(tree, replicated(mesh))


def batch_specs(batch: Batch) -> Batch:
    """Returns how a batch is split: by clips, but the values of LazyFeatures are whole."""
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def of_modality(one: Frames) -> Frames:
        lazy = isinstance(one.features, LazyFeatures)
        return Frames(
            LazyFeatures(whole, rows) if lazy else rows, *[rows] * (len(Frames._fields) - 1)
        )

    frames = {name: of_modality(one) for name, one in batch.frames.items()}
    return Batch(frames, clip_index=rows, batch_mask=rows)


def shard_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Returns a batch on the devices, B / devices clips on each.

    Args:
      batch: arrays of B clips, of numpy or already on the devices.

    Raises:
      ValueError: B is no multiple of the number of devices.
    """
    rows, devices = np.shape(batch.clip_index)[0], mesh.size
    if rows % devices:
        raise ValueError(
            f"config.batch_size={rows} cannot be split over {devices} devices: use a multiple"
        )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), batch_specs(batch))
    return jax.device_put(batch, shardings)


def constrain_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Returns a batch that is made within a compiled function, split as `shard_batch` would."""

    def constrain(spec: PartitionSpec, x: Array) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(constrain, batch_specs(batch), batch)


class CompileClock:
    """Counts the seconds that XLA compiles in this process while the context is open."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "CompileClock":
        jax.monitoring.register_event_duration_secs_listener(self._add)
        return self

    def __exit__(self, *args: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._add)

    def _add(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration_secs
