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
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if "--run" not in sys.argv:  # without this, jax would look for the devices of the plugins
    os.environ |= {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3", "TPU_WORKER_HOSTNAMES": "localhost",
    }  # fmt: skip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.extend import core
from jax.sharding import AxisType, Mesh

from tests.benchmarks import common, training_step
from vidjax.core import devices, ensemble
from vidjax.core.batch import Batch, Frames
from vidjax.data import resident
from vidjax.evaluation import eval_step
from vidjax.training import placement, train_step

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
PROGRAM_OF_MODE = {"streaming": "streamed", "resident": "resident"}
MAX_STEPS = 10  # of a call


class Device(NamedTuple):
    """The figures of a kind of device, from the data sheet of its maker."""

    number: int
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
    "v5e": Device(1, *TPU, "v5e:2x4"),
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
    """Returns a mesh of devices that this machine lacks."""
    device = DEVICES[name]
    if isinstance(device.target, str):
        topology = topologies.get_topology_desc(platform="tpu", topology_name=device.target)
    else:
        major, minor = CAPABILITIES[name]
        fields = {**device._asdict(), **device.target, "major": major, "minor": minor}
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1",
            target_config=GPU.format(**fields, name=name),
        )  # fmt: skip
    return jax.make_mesh(
        (device.number,), ("data",), axis_types=(AxisType.Auto,),
        devices=topology.devices[: device.number],
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


def make_state(plan: Any, group: int) -> tuple[Callable[[], Any], Any]:
    """Returns a function that makes the state of `group` members, and the shapes of the state."""
    rngs = ensemble.make_rngs(plan.members[:group], plan.config.seed)
    labels = jnp.zeros((group, plan.batches.num_clips), jnp.int32)
    init = functools.partial(train_step.init_state, plan.system, rngs, labels)
    return init, jax.eval_shape(init)


def make_arguments(plan: Any, mesh: Mesh, group: int) -> dict[str, Any]:
    """Returns the shapes of the arguments of all programs, for `group` members together."""
    system, config = plan.system, plan.config
    members, num_clips = plan.members[:group], plan.batches.num_clips
    init, state = make_state(plan, group)
    whole, rows = devices.replicated_layout(mesh), devices.row_layout(mesh)

    def shape(tree: Any) -> Any:
        return devices.shapes(tree, whole)

    def batch(size: int) -> Batch:
        def array(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=rows)

        frames = {
            name: Frames(array(length, common.DIM, dtype=jnp.float16), array(length), array(length),
                         array(length, dtype=jnp.int32), array(length, dtype=bool))
            for name, length in plan.batches.padded_lengths.items()
        }  # fmt: skip
        return Batch(frames, array(dtype=jnp.int32), array(dtype=bool))

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
        "clips": (shape(jax.eval_shape(lambda: common.make_clips(config.modalities, num_clips))),
                  shape(resident.draw_steps(plan.batches, 0, 1))),
        "count": shape(np.zeros((), np.int32)),
        "batch": batch(config.batch_size),
        # The weights of one member.
        "model": shape(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
                         (state.params, model_state))
        ),
        "block": batch(config.eval.block_size * mesh.size),
    }  # fmt: skip


def make_programs(plan: Any, mesh: Mesh, group: int) -> dict[str, tuple[Any, Any]]:
    """Returns the name of each program -> its function, and the shapes of its arguments."""
    system, given = plan.system, make_arguments(plan, mesh, group)
    draw, complete = train_step.make_init_programs(given["init"], system.tx, mesh)
    loop = train_step.make_train_loop(system, mesh, plan.batches)
    evaluate = eval_step.make_eval_step(system, mesh)
    learned = given["state"], given["constants"]
    return {
        "streamed": (loop, (*learned, given["batch"], None)),
        "resident": (loop, (*learned, given["clips"], given["count"])),
        "evaluation": (evaluate, (*given["model"], given["count"], given["block"])),
        "parameters": (draw, ()),
        "optimiser": (complete, (given["drawn"],)),
    }


def count_flops(jaxpr: Any, num_devices: int) -> Iterator[tuple[bool, float]]:
    """Yields for each matrix product whether it needs float32, and its operations on a device.

    Iterations of a loop count once.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            highest = "HIGHEST" in str(equation.params["precision"])
            yield highest, training_step.count_flops(equation) / num_devices
        inside = 1 if equation.primitive.name == "shard_map" else num_devices
        for inner in core.jaxprs_in_params(equation.params):
            yield from count_flops(inner, inside)


COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|ragged-all-to-all"
# Copies to the host and calls of Python. S(5) is the memory of the host.
TRANSFERS = r" (?:infeed|outfeed|send|recv)\(|S\(5\)|callback"


def count_traffic(text: str) -> dict[str, Any]:
    """Counts the collectives, the arrays of float64 and the transfers to the host of a program."""
    return {
        "collectives": dict(Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text))),
        "float64": len(re.findall(r"\bf64\[", text)),
        "transfers": len(re.findall(TRANSFERS, text)),
    }


def choose_placement(system: str, device: str, rows: dict[str, Any]) -> tuple[str, int]:
    """Returns the choices that training makes on a device whose memory contains only the state.

    Programs are compiled until one of them fits.
    """
    plan, mesh = make_plan(system), make_mesh(device)
    members = len(plan.members)
    num_clips = sum(NUM_CLIPS.values())  # of training, and of the evaluated split
    frames = {x: common.MAX_FRAMES[x] // 2 + 1 for x in plan.config.modalities}  # of a clip
    frames = {x: num_clips * count for x, count in frames.items()}
    nbytes = sum(frames.values()) * (2 * common.DIM + resident.SCALAR_BYTES)
    layout = resident.ResidentPlan((), (), frames, {}, nbytes, {})

    def measure(mode: str, group: int) -> float:
        row = compile_program(system, device, PROGRAM_OF_MODE[mode], group, rows)
        batch = make_arguments(plan, mesh, group)["batch"] if mode == "streaming" else ()
        waiting = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)) / mesh.size
        return row["temporary"] + row["outputs"] + 2 * waiting

    _, state = make_state(plan, members)
    taken = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(state))
    with pytest.MonkeyPatch.context() as patch:
        free = DEVICES[device].memory * DEVICES[device].usable - taken
        patch.setattr(resident, "find_least_free_bytes", lambda mesh: free)
        sizes = [size for size in range(members, 0, -1) if members % size == 0]
        return placement.choose_placement("auto", layout, mesh, sizes, measure)


def measure(system: str, device: str, program: str, rows: dict[str, Any]) -> None:
    """Stores the row of a program in `rows`."""
    mode, group = choose_placement(system, device, rows)
    row = compile_program(system, device, program, group, rows)
    members = len(make_plan(system).members)
    chosen = {"members": members, "group": group, "auto": mode}
    rows[f"{system}, {device}, {program}"] = row | chosen


def compile_program(
    system: str, device: str, program: str, group: int, rows: dict[str, Any]
) -> dict[str, Any]:
    """Returns the figures of a program for `group` members.

    If `rows` has no figures of this program, it is compiled, and a row is added.
    """
    plan, mesh = make_plan(system), make_mesh(device)
    function, arguments = make_programs(plan, mesh, group)[program]
    traced = function.trace(*arguments)
    lowered = traced.lower()
    target = DEVICES[device].target
    key = f"{target} {jax.__version__} {lowered.as_text()}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    for row in rows.values():
        if row["digest"] == digest:
            return row
    start = time.process_time()  # of all cores, because the machine may be busy
    compiled = lowered.compile()
    seconds = time.process_time() - start
    memory: Any = compiled.memory_analysis()
    flops = {True: 0.0, False: 0.0}
    for highest, count in count_flops(traced.jaxpr.jaxpr, mesh.size):
        flops[highest] += count
    rows[f"{system}, {device}, {program}, {group} members"] = row = {
        "digest": digest,
        "jax": jax.__version__,
        "seconds": round(seconds, 1),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "state": sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(arguments[:1])),
        "flops": flops[False],
        "flops_float32": flops[True],
        "bytes": (compiled.cost_analysis() or {}).get("bytes accessed"),
        **count_traffic(compiled.as_text()),
    }
    return row


def take_steps(name: str) -> None:
    """Takes resident steps on the first device, and prints measured and computed figures."""
    plan, mesh, seconds = make_plan(name), devices.make_mesh(1), []
    group = len(plan.members)
    given = make_arguments(plan, mesh, group)
    loop = train_step.make_train_loop(plan.system, mesh, plan.batches)
    start = time.perf_counter()
    arguments = (given["state"], given["constants"], given["clips"], given["count"])
    compiled = loop.lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    compile_seconds = time.perf_counter() - start
    state = train_step.make_state(given["init"], plan.system.tx, mesh)
    labels = np.random.default_rng(1).integers(0, plan.system.task.num_columns, state.labels.shape)
    state = state.replace(labels=devices.replicate(mesh, labels.astype(np.int32)))
    constants = train_step.make_member_constants(plan.members, np.ones(state.labels.shape))
    constants = devices.replicate(mesh, constants)
    drawn = resident.draw_steps(plan.batches, 0, MAX_STEPS)
    clips = common.make_clips(plan.config.modalities, plan.batches.num_clips)
    clips = devices.replicate(mesh, (clips, drawn))
    count = lambda n: devices.replicate(mesh, np.int32(n))  # noqa: E731
    before = mesh.devices.flat[0].memory_stats() or {}
    for steps in (1, MAX_STEPS, MAX_STEPS, MAX_STEPS):
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


def bound_seconds(row: Mapping[str, Any], device: Device) -> float:
    """Returns the least time of a step of all members.

    It is the larger of two times: of the products, and of reading and writing the state.
    """
    products = row["flops"] / device.flops + row["flops_float32"] / device.flops_float32
    of_group = max(products, 2 * row["state"] / device.bandwidth)
    return row["members"] / row["group"] * of_group


def count_bytes(row: Mapping[str, Any]) -> float:
    return row["arguments"] + row["temporary"] + row["outputs"]


def fits(row: Mapping[str, Any], device: Device) -> bool:
    return count_bytes(row) <= device.memory * device.usable


def format_row(name: str, row: Mapping[str, Any]) -> list[str]:
    """Returns the cells of a row of the table."""
    system, device_name, program = name.split(", ")
    device = DEVICES[device_name]
    trains = program in TRAINING
    return [
        system, device_name, program,
        f"{row['group']} of {row['members']}" if trains else "",
        PROGRAM_OF_MODE[row["auto"]] if trains else "",
        f"{row['arguments'] / GB:.2f}", f"{row['temporary'] / GB:.2f}",
        f"{count_bytes(row) / device.memory:.0%}",
        f"{(row['flops'] + row['flops_float32']) / 1e12:.3f}",
        f"{row['bytes'] / GB:.1f}" if row["bytes"] else "",
        f"{1e3 * bound_seconds(row, device):.1f}" if trains else "",
        ", ".join(f"{count} {kind}" for kind, count in sorted(row["collectives"].items())),
        str(row["float64"]), str(row["transfers"]),
        f"{row['seconds']:.0f}" if row["seconds"] else "",
    ]  # fmt: skip


HEADER = [
    "system", "device", "program", "members together", "`auto` chooses", "arguments, GB",
    "temporary, GB", "of the memory", "flops, 1e12", "bytes, GB",
    "lower bound, ms", "collectives", "float64", "transfers", "compiled in, CPU s",
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(
        __doc__, "--collect", "--run", argv=argv, systems=",".join(SYSTEMS),
        devices=",".join(REQUIRED), programs=",".join(PROGRAMS), out=str(RESULTS),
    )  # fmt: skip
    names = args.systems.split(",")
    if args.run and len(names) > 1:  # a process each, because the peak of the memory never falls
        for name in names:
            words = ["-m", "tests.benchmarks.accelerators", "--run", f"--systems={name}"]
            subprocess.run([sys.executable, *words], cwd=common.ROOT, check=False)
        return
    if args.run:
        take_steps(*names)
        return
    out = Path(args.out)
    rows = json.loads(out.read_text()) if out.exists() else {}
    chosen = itertools.product(args.programs.split(","), names, args.devices.split(","))
    for program, system, device in [] if args.collect else chosen:
        measure(system, device, program, rows)
        out.write_text(json.dumps(rows, indent=1) + "\n")
        name = f"{system}, {device}, {program}"
        common.print_text(" | ".join(format_row(name, rows[name])))
    order = [", ".join(x) for x in itertools.product(SYSTEMS, DEVICES, PROGRAMS)]
    table = [format_row(name, rows[name]) for name in order if name in rows]
    if out == RESULTS:
        page = common.replace_table(
            PAGE.read_text(), "accelerators", common.format_table(HEADER, table)
        )
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
