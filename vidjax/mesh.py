"""Devices: the mesh, and how arrays are laid out on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vidjax.batch import Batch


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh with the one axis `data` over the first devices (all when None).

    The axis is Auto: one program runs on 1 or N devices with bit-identical random draws and with
    batch statistics over all of them, which is what pmap could not do.
    """
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout of what every device holds whole: parameters and tables."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Returns the layout of what is split over the devices by its leading axis: batches."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Returns a tree of arrays, a copy on every device."""
    return jax.device_put(tree, replicated(mesh))


def shard_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Returns a batch on the devices, B / devices clips on each.

    Args:
      batch: numpy arrays of B clips.

    Raises:
      ValueError: B is no multiple of the number of devices.
    """
    rows, devices = np.shape(batch.clip_index)[0], mesh.size
    if rows % devices:
        raise ValueError(
            f"config.batch_size={rows} cannot be split over {devices} devices: use a multiple"
        )
    return jax.device_put(batch, by_rows(mesh))
