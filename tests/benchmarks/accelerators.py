"""Compiles the programs of each system, at official size, for devices that this machine lacks.

    python -m tests.benchmarks.accelerators [--systems=NAME,NAME] [--devices=NAME,NAME] [--collect]
    python -m tests.benchmarks.accelerators --run [--systems=NAME,NAME]

The first command needs `jax[tpu]` and `jax-cuda13-plugin[with-cuda]`, but no device. A program is
compiled again only if its text or its compiler has changed, which takes up to two minutes per
program. The figures are stored in `accelerators.json` and in the tables of `accelerators.md`.

- `--collect` only writes the tables.
- `--run` takes resident training steps on the first device of this machine. It prints the measured
  time and memory next to the figures of the compiler.
"""

import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if "--run" not in sys.argv:  # without this, jax would look for the devices of the plugins
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.extend import core
from jax.sharding import AxisType, Mesh, NamedSharding

from tests.benchmarks import common
from vidjax.core import devices, ensemble
from vidjax.core.batch import Batch, Frames
from vidjax.data import resident
from vidjax.evaluation import eval_step
from vidjax.training import train_step

RESULTS, PAGE = (Path(__file__).with_suffix(suffix) for suffix in (".json", ".md"))
GB, MS = 1e9, 1e-3
NUM_CLIPS = {"train": 57_820, "val": 72_530}  # of the official files
NUM_CLUSTERS = 8_652  # of distractors, as in the article of noise classes
PLDA = {"within": 0.5, "between": 0.5, "scale": 0.1, "unenrolled": 0.0, "stranger": 0.0,
        "centred": 1.0}  # fmt: skip
# Name -> FILE:ARGUMENTS and the settings that are fitted before the training.
SYSTEMS: dict[str, tuple[str, dict[str, float]]] = {
    "knn": ("knn.py:iqiyi_vid", {}),
    "plda": ("plda.py:iqiyi_vid", PLDA),
    "cosine": ("cosine.py:iqiyi_vid,face", {}),
    "mma": ("mma.py:iqiyi_vid", {}),
    "quality_fusion": ("quality_fusion.py:iqiyi_vid", {}),
    "deepmef": ("deepmef.py:iqiyi_vid", {}),
    "noise_classes": ("noise_classes.py:iqiyi_vid", {}),
    "residual_dense": ("residual_dense.py:iqiyi_vid", {}),
}
PROGRAMS = ("streamed", "resident", "evaluation", "parameters", "optimiser")
TRAINING = PROGRAMS[:2]


class Device(NamedTuple):
    """The figures of a kind of device, from the data sheet of its maker."""

    count: int
    memory: float  # bytes
    usable: float  # share of the memory that JAX uses by default
    bandwidth: float  # bytes per second
    flops: float  # per second, of the usual products: TF32, on a T4 float32, on a TPU bfloat16
    flops_float32: float  # per second, of products of the highest precision
    target: str | dict[str, Any]  # topology of a TPU, or the entries of GPU for a GPU


def _gpu(cores: int, threads: int, units: int, shared: int, cache: int, clock: float) -> Any:
    return {"cores": cores, "threads": threads, "units": units, "shared": shared, "clock": clock,
            "cache": cache << 20}  # fmt: skip


TPU = (16.9e9, 0.93, 819e9, 197e12, 33e12)
DEVICES = {
    "T4": Device(1, 15.8e9, 0.75, 320e9, 8.1e12, 8.1e12, _gpu(40, 1024, 64, 65_536, 4, 1.59)),
    "L4": Device(1, 23.7e9, 0.75, 300e9, 60e12, 30e12, _gpu(58, 1536, 128, 101_376, 48, 2.04)),
    "A100": Device(1, 85e9, 0.75, 2e12, 156e12, 19e12, _gpu(108, 2048, 64, 166_912, 40, 1.41)),
    "H100": Device(1, 85e9, 0.75, 3.35e12, 494e12, 67e12, _gpu(132, 2048, 128, 232_448, 50, 1.98)),
    "v5e": Device(1, *TPU, "v5e:1x1"),
    "8 x v5e": Device(8, *TPU, "v5e:2x4"),
}  # fmt: skip
CAPABILITIES = {"T4": (7, 5), "L4": (8, 9), "A100": (8, 0), "H100": (9, 0)}
REQUIRED = ("T4", "H100", "v5e", "8 x v5e")
# A GpuTargetConfigProto.
GPU = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: {shared}
shared_memory_per_block_optin: {shared} threads_per_core_limit: {threads} core_count: {cores}
fpus_per_core: {units} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
block_dim_limit_z: 65535 registers_per_core_limit: 65536 registers_per_block_limit: 65536
clock_rate_ghz: {clock} memory_bandwidth: {bandwidth:.0f} l2_cache_size: {cache}
device_memory_size: {memory:.0f} cuda_compute_capability {{ major: {major} minor: {minor} }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }} device_description_str: "{name}" """


def make_mesh(name: str) -> Mesh:
    """Returns a mesh of devices that are not there. Raises an error if their compiler is absent."""
    device = DEVICES[name]
    if isinstance(device.target, str):
        topology = topologies.get_topology_desc(platform="tpu", topology_name=device.target)
    else:
        from jax_plugins import xla_cuda13  # pyright: ignore[reportMissingImports]

        xla_cuda13.initialize()
        major, minor = CAPABILITIES[name]
        target = GPU.format(**device._asdict(), **device.target, name=name, major=major, minor=minor)
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=target
        )
    return jax.make_mesh(
        (device.count,), ("data",), axis_types=(AxisType.Auto,),
        devices=topology.devices[: device.count],
    )  # fmt: skip


def make_plan(name: str, *overrides: str) -> Any:
    """Returns the plan of a system at official size, see `common.make_plan`."""
    spec, settings = SYSTEMS[name]
    options: dict[str, Any] = {"num_clips": 1, **settings}
    config = common.make_plan(spec, *overrides, **options).config
    options["num_clips"] = sum(NUM_CLIPS[split] for split in config.data.train_splits)
    if config.data.distractors == "noise":
        options["num_clusters"] = NUM_CLUSTERS
    return common.make_plan(spec, *overrides, **options)


def make_arguments(plan: Any, mesh: Mesh, group: int) -> dict[str, Any]:
    """Returns the shapes of the arguments of all programs, for `group` members together."""
    system, config = plan.system, plan.config
    members, num_clips = plan.members[:group], plan.batches.num_clips
    rngs = ensemble.make_rngs(members, config.seed)
    init = functools.partial(
        train_step.init_state, system, rngs, jnp.zeros((group, num_clips), jnp.int32)
    )
    whole, rows = devices.replicated_layout(mesh), devices.row_layout(mesh)

    def shape(tree: Any, layout: NamedSharding = whole) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), tree
        )

    def batch(size: int) -> Batch:
        def array(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=rows)

        frames = {
            name: Frames(array(length, common.DIM, dtype=jnp.float16), array(length), array(length),
                         array(length, dtype=jnp.int32), array(length, dtype=bool))
            for name, length in plan.batches.padded_lengths.items()
        }  # fmt: skip
        return Batch(frames, array(dtype=jnp.int32), array(dtype=bool))

    state = jax.eval_shape(init)
    weight = np.ones((group, num_clips), np.float32)
    model_state = state.model_state
    if system.model.is_closed_form:  # of a single member
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), dict(model_state))
        model_state = system.model.finalise_state({}, zeros)
    return {
        "init": init,
        "drawn": shape(state.replace(opt_state=None)),
        "state": shape(state),
        "constants": shape(train_step.make_member_constants(members, weight)),
        "clips": shape(jax.eval_shape(lambda: common.make_clips(config.modalities, num_clips))),
        "count": shape(np.zeros((), np.int32)),
        "batch": batch(config.batch_size),
        # The weights of one member.
        "model": shape(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
                         (state.params, model_state))
        ),
        "block": batch(config.eval.block_size * mesh.size),
    }  # fmt: skip


def make_programs(plan: Any, mesh: Mesh, group: int) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Returns the name of each program -> its compiled function, and the shapes of its arguments."""
    system, given = plan.system, make_arguments(plan, mesh, group)
    draw, complete = train_step.make_init_programs(given["init"], system.tx, mesh)
    stream = train_step.make_train_loop(system, mesh, lambda batch, _: batch)
    reside = make_resident_loop(plan, mesh)
    evaluate = eval_step.make_eval_step(system, mesh)
    learned = given["state"], given["constants"]
    return {
        "streamed": (stream, (*learned, given["batch"], None)),
        "resident": (reside, (*learned, given["clips"], given["count"])),
        "evaluation": (evaluate, (*given["model"], given["count"], given["block"])),
        "parameters": (draw, ()),
        "optimiser": (complete, (given["drawn"],)),
    }


def make_resident_loop(plan: Any, mesh: Mesh) -> Callable[..., Any]:
    """Returns the compiled loop of training steps on resident clips."""
    return train_step.make_train_loop(
        plan.system, mesh, lambda clips, step: resident.draw_batch(clips, plan.batches, step)
    )


def take_steps(name: str) -> None:
    """Takes resident steps on the first device, and prints measured and computed figures."""
    plan, mesh, seconds = make_plan(name), devices.make_mesh(1), []
    group = len(plan.members)
    given = make_arguments(plan, mesh, group)
    loop = make_resident_loop(plan, mesh)
    start = time.perf_counter()
    arguments = (given["state"], given["constants"], given["clips"], given["count"])
    compiled = loop.lower(*arguments).compile()
    memory, compile_seconds = compiled.memory_analysis(), time.perf_counter() - start
    state = train_step.make_state(given["init"], plan.system.tx, mesh)
    labels = np.random.default_rng(1).integers(0, plan.system.task.num_columns, state.labels.shape)
    state = state.replace(labels=devices.replicate(mesh, labels.astype(np.int32)))
    constants = train_step.make_member_constants(plan.members, np.ones(state.labels.shape))
    constants = devices.replicate(mesh, constants)
    clips = devices.replicate(mesh, common.make_clips(plan.config.modalities, plan.batches.num_clips))
    count = lambda n: devices.replicate(mesh, np.int32(n))  # noqa: E731
    before = mesh.devices.flat[0].memory_stats() or {}
    for steps in (1, 10, 10, 10):
        start = time.perf_counter()
        state, result = compiled(state, constants, clips, count(steps))
        loss = np.asarray(result.loss)
        seconds.append((time.perf_counter() - start) / steps)
    stats = mesh.devices.flat[0].memory_stats() or {}
    figures = {
        "members": group,
        "ms": 1e3 * min(seconds[1:]),
        "compile s": compile_seconds,
        "arguments GB": memory.argument_size_in_bytes / GB,
        "temporary GB": memory.temp_size_in_bytes / GB,
        "peak before the steps GB": before.get("peak_bytes_in_use", 0) / GB,
        "peak GB": stats.get("peak_bytes_in_use", 0) / GB,
        "limit GB": stats.get("bytes_limit", 0) / GB,
        "loss": float(loss.mean()),
    }
    cells = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
    common.print_text(f"{name}: {cells}")


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(
        __doc__, "--collect", "--run", argv=argv, systems=",".join(SYSTEMS),
        devices=",".join(REQUIRED),
    )  # fmt: skip
    names = args.systems.split(",")
    if args.run and len(names) > 1:  # a process each, because the peak of the memory never falls
        for name in names:
            words = ["-m", "tests.benchmarks.accelerators", "--run", f"--systems={name}"]
            subprocess.run([sys.executable, *words], cwd=common.ROOT, check=False)
    elif args.run:
        take_steps(*names)


if __name__ == "__main__":
    main()
