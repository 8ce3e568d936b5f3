"""Chooses whether clips stay on the devices, and how many nets of an ensemble train together."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vidjax.core import devices, ensemble
from vidjax.core.batch import Packed
from vidjax.data import resident
from vidjax.data.resident import ResidentPlan
from vidjax.runs.config import Config
from vidjax.training import train_step
from vidjax.training.plan import RunPlan
from vidjax.utils import distributed
from vidjax.utils.errors import UserError
from vidjax.utils.terminal import say

MAX_MEMORY_SHARE = 0.5  # share of the free memory, besides a training step, that clips may take


def compile_loop(
    plan: RunPlan, layout: ResidentPlan, state: train_step.TrainState, mesh: Mesh,
    mode: str, group_size: int,
) -> tuple[jax.stages.Compiled, float]:  # fmt: skip
    """Compiles the training loop of `group_size` members (nets). The clips are not needed yet.

    `mode` is `resident` (all clips stay on the devices, as `layout` describes) or `streaming` (each
    batch is sent to the devices). `state` is the state of all members of the run, or its shapes.

    Returns:
      The compiled loop; and the number of bytes that a step needs on a device. The bytes include
        two batches if `mode` is `streaming`, but no state and no resident clips.
    """
    batches, whole = plan.batches, devices.replicated_layout(mesh)
    table: Any = jax.ShapeDtypeStruct(plan.labels.shape, np.int32)
    frames = layout.num_frames if mode == "resident" else dict.fromkeys(layout.num_frames, 0)
    clips = {
        name: Packed(*resident.shape_frames(kind, frames[name] + 1), start=table, length=table)
        for name, kind in layout.modalities.items()
    }
    drawn, zero = resident.draw_steps(batches, 0, 1), np.int32(0)
    given, streamed = devices.shapes(((clips, drawn), zero), whole), 0.0
    if mode == "streaming":
        devices.check_rows(mesh, batches.batch_size)
        sizes = batches.padded_lengths.items()
        gather = functools.partial(resident.gather_batch, sizes=sizes, lazy=False)
        batch = jax.eval_shape(gather, clips, *jax.tree.map(lambda rows: rows[0], drawn))
        given = devices.shapes(batch, devices.row_layout(mesh)), None
        streamed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)) / mesh.size

    def take_group(state: Any, constants: Any) -> tuple[Any, Any]:  # noqa: ANN401
        parts = train_step.split_state(state, group_size), ensemble.split(constants, group_size)
        return parts[0][0], parts[1][0]

    group = devices.shapes(jax.eval_shape(take_group, state, plan.constants), whole)
    say("train: compiling")
    loop = train_step.make_train_loop(plan.system, mesh, batches).lower(*group, *given).compile()
    memory: Any = loop.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return loop, memory.temp_size_in_bytes + results + 2 * streamed


def choose_placement(
    mode: str, layout: ResidentPlan, mesh: Mesh, sizes: Sequence[int],
    measure: Callable[[str, int], float],
) -> tuple[str, int]:  # fmt: skip
    """Chooses where the clips are, and how many members (nets of an ensemble) train together.

    All processes of a run get the same result.

    Args:
      mode: `resident` (all clips stay on the devices), `streaming` (each batch is sent to the
        devices), or `auto` (`resident` if a step of a single member leaves enough memory).
      layout: the clips, as they are stored if the mode is `resident`.
      mesh: the devices. Their memory already contains the state of all members.
      sizes: numbers of members that may train together. The first number that fits is chosen.
      measure: maps a mode and a number of members to the bytes that a step needs on a device.

    Returns:
      The mode, `resident` or `streaming`; and the number of members that train together.

    Raises:
      UserError: `mode` is `resident`, and the frames are too many for an index of type int32.
    """
    free = resident.find_least_free_bytes(mesh)

    def agree(fits: bool) -> bool:
        return not distributed.max_over_processes(int(not fits))[0]

    def fits(mode: str, size: int, share: float = 1.0) -> bool:
        clips = layout.nbytes if mode == "resident" else 0
        return agree(clips <= share * (free - measure(mode, size)))

    def choose_size(mode: str) -> tuple[str, int]:
        return mode, next((size for size in sizes if fits(mode, size)), 1)

    most = max(layout.num_frames.values())
    if mode == "resident" and most >= 2**31 - 1:
        raise UserError(
            f"config.data.mode='resident' is not possible: {most:,} frames are too many for an "
            "int32 (at most 2,147,483,646)\nuse --config.data.mode=streaming"
        )
    if mode != "auto":
        return choose_size(mode)
    # Clips that clearly do not fit need no program.
    if agree(most < 2**31 - 1 and layout.nbytes <= MAX_MEMORY_SHARE * free):
        chosen = choose_size("resident")
        if any(fits("resident", size, MAX_MEMORY_SHARE) for size in (chosen[1], 1)):
            return chosen
    return choose_size("streaming")


def agree_on_placement(
    config: Config, plan: RunPlan, layout: ResidentPlan, state: train_step.TrainState, mesh: Mesh,
    manifest: Mapping[str, Any],
) -> tuple[str, int, train_step.Loop]:  # fmt: skip
    """Chooses where the clips are and how many nets train together, and compiles the loop.

    Returns the mode (`resident` or `streaming`), the group size, which is the number of members
    (nets of an ensemble) that train together, and the compiled loop.

    On a CPU, the group size is 1, and each member gets exactly the weights of a separate run. On
    other devices, the group is as large as the memory allows. If possible, a resumed run keeps the
    mode and the group size in its `manifest`, because other choices change the rounding.
    """
    given = config.data.mode
    mode = (manifest.get("mode") if given == "auto" else None) or given
    compile_once = functools.cache(functools.partial(compile_loop, plan, layout, state, mesh))
    members, sizes = len(state.labels), [1]
    if not devices.is_cpu(mesh):
        sizes = [size for size in range(members, 0, -1) if members % size == 0]
        sizes.sort(key=lambda size: size != manifest.get("group_size"))

    def measure(mode: str, size: int) -> float:
        try:
            return compile_once(mode, size)[1]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):  # more than the memory of a device
                return float("inf")
            raise

    chosen, size = choose_placement(mode, layout, mesh, sizes, measure)
    if chosen == "streaming":
        reason = "because they do not fit into the memory"
        if mode != "auto":
            reason = "as before" if given == "auto" else f"because config.data.mode is {mode}"
        say(f"clips do not stay on the device, {reason}; each epoch reads the clips again")
    return chosen, size, compile_once(chosen, size)[0]
