"""Chooses what stays in the memory of the devices: clips, and members that train together."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vidjax.core import devices, distributed
from vidjax.core.batch import Array, ClipInfo, Frames
from vidjax.data import resident
from vidjax.data.clips import BatchPlan
from vidjax.data.resident import ResidentPlan
from vidjax.models.build_system import System
from vidjax.runs.config import Config
from vidjax.runs.terminal import say
from vidjax.training.plan import RunPlan
from vidjax.training.train_step import TrainState

# XLA keeps at most this number of copies, gradients included, of each array of logits, and of each
# array of fused frames. `tests/benchmarks/accelerators.md` compares estimates with compilers.
COPIES_OF_LOGITS, COPIES_OF_FRAMES = 2.5, 5
OTHER_BYTES = 64e6  # of smaller arrays


class Placement(NamedTuple):
    """The choices that depend on the memory of the devices."""

    mode: str  # `resident` or `streaming` clips
    group_size: int  # number of members (nets) that a program trains together


def estimate_step_bytes(
    system: System, batches: BatchPlan, params: float, mesh: Mesh, group_size: int
) -> float:
    """Estimates the memory that a training step needs on a device, in bytes.

    The state and the clips are not included. `params` is the size of the parameters of a member in
    bytes. `group_size` is the number of members that train together.
    """

    def compute() -> tuple[list[Array], Array]:
        """Returns the fused features and the logits of a clip."""
        rng, frames = jax.random.key(0), {}
        for name, length in batches.padded_lengths.items():
            values = jnp.zeros((1, length, system.task.modalities[name]))
            row = values[..., 0]
            frames[name] = Frames(values, row, row, row.astype(jnp.int32), row == 0)
        fused, exists = system.to_examples(system.fuse(rng, frames, jnp.int32(0)))
        rows = jnp.zeros(exists.size, jnp.int32)
        clips = ClipInfo(index=rows, mask=rows == 0, labels=rows)
        made: tuple[Any, Any] = system.model.init_with_output(rng, fused, clips, train=False)
        return [x.features for x in fused.values()], made[0].logits

    features, logits = jax.eval_shape(compute)
    sizes = COPIES_OF_LOGITS * logits.size + COPIES_OF_FRAMES * sum(x.size for x in features)
    clips = batches.batch_size / mesh.size
    # The gradients are as large as the parameters.
    return group_size * (clips * 4 * sizes + params) + OTHER_BYTES


def choose_placement(
    mode: str, layout: ResidentPlan, system: System, batches: BatchPlan, state: TrainState,
    mesh: Mesh, before: int | None = None,
) -> Placement:  # fmt: skip
    """Chooses where the clips are, and then how many members train together.

    Clips come first: they stay on the devices if a step of a single member leaves room for them. On
    a CPU, members are trained one after another, and each has the bits of a separate run. On other
    devices, as many members as possible train together, with large matrix products.

    Args:
      mode, layout: see `resident.choose_mode`.
      state: the state of all members, on the devices.
      before: the `group_size` of a resumed run. It is kept if it fits, because steps of groups of
        another size round differently.
    """
    num_members, on_cpu = len(state.labels), devices.is_cpu(mesh)
    if on_cpu and mode != "auto":
        return Placement(resident.choose_mode(mode, layout, mesh), 1)
    params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params)) / num_members
    step = functools.partial(estimate_step_bytes, system, batches, params, mesh)
    mode = resident.choose_mode(mode, layout, mesh, step(1))
    if on_cpu:
        return Placement(mode, 1)
    free = resident.find_least_free_bytes(mesh)
    if mode == "resident":
        free -= layout.nbytes
    else:  # this batch and the next
        frames = sum(batches.padded_lengths.values()) * batches.batch_size / mesh.size
        free -= 2 * frames * layout.nbytes / max(1, sum(layout.num_frames.values()))
    sizes = [size for size in range(num_members, 0, -1) if num_members % size == 0]
    if before in sizes:
        sizes.insert(0, before)
    return Placement(mode, next((size for size in sizes if step(size) <= free), 1))


def agree_on_placement(
    config: Config, plan: RunPlan, layout: ResidentPlan, state: TrainState, mesh: Mesh,
    manifest: Mapping[str, Any],
) -> Placement:  # fmt: skip
    """Chooses where the clips are, and how many members train together, in all processes alike.

    With `config.data.mode=auto`, a resumed run keeps the mode in its `manifest`, because the steps
    of `streaming` and `resident` round differently. In a new run, the free memory decides.
    """
    given = config.data.mode
    mode = (manifest.get("mode") if given == "auto" else None) or given
    own = choose_placement(
        mode, layout, plan.system, plan.batches, state, mesh, manifest.get("group_size")
    )
    numbers = int(own.mode == "streaming"), -own.group_size
    is_streaming, size = distributed.max_over_processes(*numbers)
    if is_streaming:
        reason = "because they do not fit into the memory"
        if mode != "auto":
            reason = "as before" if given == "auto" else f"because config.data.mode is {mode}"
        say(f"each epoch reads the clips again, {reason}")
    return Placement("streaming" if is_streaming else "resident", -size)
