"""Shared parts of the benchmarks: made-up clips and runs, timing in turns, products, tables.

Made-up clips are drawn on the device, so a benchmark needs neither TensorFlow nor a dataset.
"""

import argparse
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from vidjax.core import devices, ensemble, fusion
from vidjax.core.batch import Array, Frames, Packed
from vidjax.data import resident
from vidjax.data.clips import BatchPlan
from vidjax.models.system import System, TaskSpec, make_system
from vidjax.runs import config_io
from vidjax.training import train_step

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
# The nets of published size, the residual one 4096 wide with one draw a clip.
WIDE = ("model.width=4096", "fusion.face.train.num_draws=1")
NETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mlp": ("quality_fusion.py:iqiyi_vid", ()),
    "residual": ("residual_dense.py:iqiyi_vid,face,one", WIDE),
    "mma": ("mma.py:iqiyi_vid", ()),
}
DIM = 512
LONGEST = {"face": 59, "head": 59, "body": 29, "audio": 1}  # frames: 1 to these, 30 on average
PLACES = {"face": 64, "head": 64, "body": 32, "audio": 1}  # to which they are padded
DRAWN = 1 << 16  # different frames of a modality; more frames repeat them
SECONDS = 0.25  # the least that is timed at once: a step of an accelerator takes milliseconds
MIB = 1 << 20
median = statistics.median


def parse(
    doc: str | None, *flags: str, argv: Sequence[str] | None = None, **options: Any
) -> argparse.Namespace:
    """Returns the parsed words of a command: flags, and options with their defaults.

    If a type stands in place of a default, the word is required, and has no `--name=`.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in options.items():
        if isinstance(value, type):
            parser.add_argument(name, type=value)
        else:
            parser.add_argument(f"--{name}", type=type(value), default=value, metavar="X")
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args(argv)


def say(text: str) -> None:
    """Prints a line at once, also into a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def children_seconds() -> float:
    """Returns the seconds of the processor that ended children of this process used."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # user and system


def timed(command: Sequence[str], **options: Any) -> tuple[float, float]:
    """Runs a command; returns its seconds, and the seconds of all cores."""
    began, used = time.perf_counter(), children_seconds()
    subprocess.run(command, capture_output=True, check=True, **options)
    return time.perf_counter() - began, children_seconds() - used


def make_clips(modalities: Sequence[str], num_clips: int) -> dict[str, Packed]:
    """Returns resident clips of random frames, 512 numbers in float16 each."""
    clips = {}
    for number, name in enumerate(modalities):
        lengths = np.random.default_rng((0, number)).integers(1, LONGEST[name] + 1, num_clips)
        fields = _draw_frames(jax.random.key(number), 1 + int(lengths.sum()))
        start = jnp.asarray(np.cumsum(lengths) - lengths, jnp.int32)
        clips[name] = Packed(*fields, start=start, length=jnp.asarray(lengths, jnp.int32))
    return clips


@partial(jax.jit, static_argnums=1)
def _draw_frames(key: Array, count: int) -> list[Array]:
    """Returns features, qualities, detections and numbers of frames; the last frame is padding."""
    keys = jax.random.split(key, 3)
    # Numbers between -2 and 2 by their bits: a normal draw of all would take minutes.
    bits = jax.random.bits(keys[0], (DRAWN, DIM), jnp.uint16)
    drawn = jax.lax.bitcast_convert_type(bits & jnp.uint16(0xBFFF), jnp.float16)
    features = drawn[jnp.arange(count) % DRAWN].at[-1].set(0)
    quality = jax.random.uniform(keys[1], (count,), minval=1, maxval=100)
    detection = jax.random.uniform(keys[2], (count,), minval=0.5, maxval=1)
    return [features, quality, detection, jnp.arange(count, dtype=jnp.int32)]


class Run(NamedTuple):
    """A system on made-up resident clips, ready to train."""

    system: System
    state: train_step.TrainState
    constants: train_step.MemberConstants
    clips: dict[str, Packed]
    plan: BatchPlan
    num_params: int


def make_run(
    spec: str, overrides: Sequence[str] = (), *, batch_size: int, num_identities: int,
    num_clips: int | None = None,
) -> Run:  # fmt: skip
    """Returns the system of a configuration on as many clips as there are in four batches.

    `spec` is NAME:ARGS of a file in `configs/`, `overrides` are FIELD=VALUE.
    """
    config = config_io.load_file(f"{CONFIGS / spec}")
    words = [f"batch_size={batch_size}", "data.distractors=other", *overrides]
    config = config_io.override(config, [f"--config.{word}" for word in words])
    num_clips = num_clips or 4 * batch_size
    modalities = dict.fromkeys(config.modalities, DIM)
    sizes = TaskSpec(modalities, num_identities, None, num_clips, 10_000, True)
    system = make_system(config.to_dict(), sizes)
    members = ensemble.make_members(config.ensemble.to_dict())
    labels = np.random.default_rng(1).integers(0, 1 + num_identities, (len(members), num_clips))
    mesh = devices.make_mesh(1)

    def init() -> train_step.TrainState:
        rngs = ensemble.make_rngs(members, config.seed)
        return train_step.init_state(system, rngs, jnp.asarray(labels, jnp.int32))

    state: Any = train_step.make_state(init, system.tx, devices.replicated_layout(mesh))
    tables = train_step.make_member_constants(members, np.ones((len(members), num_clips)))
    tables = devices.replicate(mesh, tables)
    clips = devices.replicate(mesh, make_clips(config.modalities, num_clips))
    places = {name: PLACES[name] for name in modalities}
    plan = BatchPlan(("train",), batch_size, num_clips, places, (), "window", config.seed)
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    return Run(system, state, tables, clips, plan, num_params)


def make_loop(run: Run) -> Any:
    """Returns compiled steps on resident clips: (state, tables, clips, count) to state, outcome."""
    draw = lambda clips, step: resident.draw_batch(clips, run.plan, step)  # noqa: E731
    return train_step.make_train_loop(run.system, devices.make_mesh(1), draw)


def for_torch(frames: Mapping[str, Frames]) -> dict[str, tuple[np.ndarray, ...]]:
    return {
        name: tuple(map(np.array, (fusion.read(x.features), x.quality, x.detection, x.mask)))
        for name, x in frames.items()
    }


def products(jaxpr: Any) -> Iterator[Any]:
    """Yields the equation of every matrix product of a trace and of its inner functions.

    Raises ValueError for a product in a loop: it would count once and run often.
    """
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            yield equation
        for inner in core.jaxprs_in_params(equation.params):
            for product in products(inner):
                if name in ("scan", "while", "cond"):
                    raise ValueError(f"a matrix product within '{name}'")
                yield product


def flops(product: Any) -> int:
    left, axes = product.invars[0].aval.shape, product.params["dimension_numbers"][0][0]
    inner = math.prod(left[axis] for axis in axes)
    return 2 * inner * math.prod(product.outvars[0].aval.shape)


def make_bare(found: Sequence[Any], times: int) -> Callable[[], Array]:
    """Returns a compiled program that makes only the products, of made-up operands.

    The program repeats all of them `times` times in a loop, as training repeats its steps.
    Otherwise it would also measure how the system hands out memory for new results.
    """
    keys = iter(jax.random.split(jax.random.key(1), 2 * len(found)))
    operands = [  # all differ, so no product stands for another
        [jax.random.normal(next(keys), x.aval.shape, x.aval.dtype) for x in product.invars]
        for product in found
    ]

    @jax.jit
    def bare(operands: Any) -> Array:
        def body(_: Array, total: Array) -> Array:
            # Behind the barriers nothing is moved out of the loop, and no product is cut short.
            pairs = jax.lax.optimization_barrier((operands, total))[0]
            results = [
                product.primitive.bind(*pair, **product.params)
                for product, pair in zip(found, pairs, strict=True)
            ]
            results = jax.lax.optimization_barrier(results)
            return total + sum(jnp.ravel(x)[0].astype(jnp.float32) for x in results)

        return jax.lax.fori_loop(0, times, body, jnp.float32(0))

    return lambda: bare(operands)


def seconds_each(function: Callable[[], Any], repeats: int) -> float:
    """Returns the time of one call, over calls that are dispatched one after another."""
    start, result = time.perf_counter(), None
    for _ in range(repeats):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def in_turns(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns name -> seconds of a call, by round; each runs in every round, in turn.

    Machines drift, so only figures of one round can be compared.
    """
    repeats = {}
    for name, function in functions.items():
        jax.block_until_ready(function())  # compiles
        repeats[name] = math.ceil(SECONDS / seconds_each(function, 1))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            found[name].append(seconds_each(function, repeats[name]))
    return found


def ratio(found: Mapping[str, Sequence[float]], above: str, below: str) -> str:
    """Returns the median and the range of the ratio of two times, of the same rounds."""
    values = [a / b for a, b in zip(found[above], found[below], strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe() -> str:
    """Returns the processor, its flags and the JAX version that the figures were measured with."""
    kind = jax.devices()[0].device_kind
    if kind == "cpu":
        parts = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        lines = {name.strip(): value.strip() for name, _, value in parts}
        known = ("avx512f", "avx512_bf16", "amx_bf16")  # change products in bfloat16
        flags = [flag for flag in known if flag in lines.get("flags", "").split()]
        kind = f"{os.cpu_count()} cores of {lines.get('model name', 'a processor')}"
        kind += f" with {', '.join(flags) or 'no AVX-512'}"
    return f"{kind}, jax {jax.__version__}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def read_markdown(text: str) -> list[list[str]]:
    """Returns the cells of the rows of a Markdown table, the first row the header."""
    rows = [[*map(str.strip, line.strip()[1:-1].split("|"))] for line in text.splitlines()]
    return [row for row in rows if set(row[0]) != {"-"}]


def replace_table(text: str, name: str, table: str) -> str:
    """Returns a page with another table below `<!-- table: NAME -->`, of which it must have one."""
    pattern = rf"(<!-- table: {name} -->\n)(?:\|.*\n)+"
    new, count = re.subn(pattern, lambda match: match[1] + table, text)
    if count != 1:
        raise ValueError(f"wanted one table below `<!-- table: {name} -->`")
    return new


def write_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    say(markdown(header, rows))
