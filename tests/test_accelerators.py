"""Training steps for several devices, and for TPUs, which this machine lacks."""

import importlib.util
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from tests.benchmarks import common
from tests.helpers.cases import quick_first
from vidjax.core import devices, ensemble
from vidjax.data import resident
from vidjax.data.clips import Modality
from vidjax.training import placement, train_step

# Settings that are fitted before the training.
PLDA = {"within": 0.5, "between": 0.5, "scale": 0.1, "unenrolled": 0.0, "stranger": 0.0,
        "centred": 1.0}  # fmt: skip
SYSTEMS = {
    "knn": "knn.py:iqiyi_vid", "plda": "plda.py:iqiyi_vid", "cosine": "cosine.py:iqiyi_vid,face",
    "mma": "mma.py:iqiyi_vid", "quality_fusion": "quality_fusion.py:iqiyi_vid",
    "deepmef": "deepmef.py:iqiyi_vid", "noise_classes": "noise_classes.py:iqiyi_vid",
    "residual_dense": "residual_dense.py:iqiyi_vid",
}  # fmt: skip
# In a streamed batch, a device has only its clips, so joined clips need the clips of all devices.
# The state of `knn` is the training clips, and every device has the whole state.
GATHERS = {("noise_classes", "streaming"), ("knn", "streaming"), ("knn", "resident")}
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|ragged-all-to-all"
# Copies to the host and calls of Python. S(5) is the memory of the host.
UNWANTED = r"\bf64\[| (?:infeed|outfeed|send|recv)\(|S\(5\)|callback"
V5E = 0.93 * 16.9e9  # bytes of a chip of a TPU v5e that JAX uses by default


def compile_step(system, mode, mesh, *words, group=1, num_clips=57_820, num_clusters=8_652):
    """Compiles the training step of `group` members, by default in the official size.

    Returns the collectives of the step, and the bytes that it needs in addition to resident clips.
    """
    options = {"num_clips": num_clips, **(PLDA if system == "plda" else {})}
    if system == "noise_classes":
        options["num_clusters"] = num_clusters
    plan = common.make_plan(SYSTEMS[system], *words, **options)
    plan.labels, labels = np.zeros(num_clips), np.zeros((len(plan.members), num_clips), np.int32)
    plan.constants = train_step.make_member_constants(plan.members, labels)
    rngs = ensemble.make_rngs(plan.members, plan.config.seed)
    state = jax.eval_shape(lambda: train_step.init_state(plan.system, rngs, labels))
    frames = {name: num_clips * common.MAX_FRAMES[name] // 2 for name in plan.config.modalities}
    kinds = {name: Modality(common.DIM, "float16") for name in frames}
    layout = resident.ResidentPlan((), (), frames, {}, 0, kinds)
    step, nbytes = placement.compile_loop(plan, layout, state, mesh, mode, group)
    text = str(step.as_text())
    assert not re.findall(UNWANTED, text)
    found = {*re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text)}
    assert found <= {"all-reduce"} | ({"all-gather"} if (system, mode) in GATHERS else set())
    return found, nbytes + sum(4 * x.size for x in jax.tree.leaves(state))


@pytest.mark.parametrize("mode", quick_first(("streaming", "resident")))
def test_devices_join_clips_without_sorting_them_together(mode):
    """Two members train together. With a sort over all devices, XLA exchanges more arrays."""
    words = "batch_size=16", "ensemble.folds=2", "model.layers=()"
    sizes = {"group": 2, "num_clips": 40, "num_clusters": 3}
    found, _ = compile_step("noise_classes", mode, devices.make_mesh(8), *words, **sizes)
    assert "all-reduce" in found


@pytest.mark.nightly
@pytest.mark.optimized
@pytest.mark.parametrize("number", [1, 8])
@pytest.mark.parametrize("system", SYSTEMS)
def test_streamed_steps_fit_into_a_tpu_of_16_gb(monkeypatch, system, number):
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("no libtpu: pip install 'jax[tpu]'")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # otherwise, libtpu looks for TPUs
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    axes = {"axis_types": (AxisType.Auto,), "devices": topology.devices[:number]}
    mesh = jax.make_mesh((number,), ("data",), **axes)
    _, nbytes = compile_step(system, "streaming", mesh)
    assert nbytes < V5E
