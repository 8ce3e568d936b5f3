"""Classes that several devices share: training, checkpoints and rankings do not depend on it."""

import json
import re
from typing import Any

import jax
import numpy as np
import pytest

from tests.helpers.made_steps import make
from tests.helpers.small_runs import run, saved, shrunk
from vidjax import config_io, devices
from vidjax.analysis import analysis
from vidjax.run import checkpoint
from vidjax.steps import class_sharding, eval_step, topk

MESHES = {"1x1": (1, 1), "1x2": (2, 2), "4x2": (8, 2), "1x8": (8, 8)}
SGD = ("--config.optim.name=sgd", "--config.optim.learning_rate=0.01")
STEPS = "--config.num_epochs=3.3"  # 10 of them


def on_mesh(name, *words, spec="mma"):
    """Returns a small configuration for a mesh, and the number of devices."""
    num_devices, model = MESHES[name]
    words = (*words, f"--config.mesh.model={model}")
    stem, _, arguments = spec.partition(":")
    return shrunk(*words, spec=f"configs/{stem}.py:iqiyi_vid,{arguments}"), num_devices


def learned(workdir):
    """Returns path -> saved parameter, without the padding of class columns."""
    manifest = checkpoint.manifests(workdir)[max(checkpoint.manifests(workdir))]
    padded, count = manifest["padded_columns"], 1 + manifest["num_identities"]
    leaves = jax.tree_util.tree_leaves_with_path(saved(workdir).get("params", {}))
    found = {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}
    for name, x in found.items():
        if padded and x.shape[-1] == padded:
            assert np.all(x[..., count:] == 0), name
            found[name] = x[..., :count]
    return found


ENSEMBLE = ("--config.ensemble.seeds=2", "--config.data.mode=streaming")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "words", "meshes"),
    [
        ("mma", (*SGD, *ENSEMBLE), ("1x1", "4x2")),
        ("cosine", SGD, ("1x1", "4x2")),
        ("plda", (), ("1x1", "4x2")),
        ("quality_fusion", SGD, ("1x1", "4x2")),
        ("deepmef", SGD, ("1x1", "1x8")),
        ("residual_dense:face,head", SGD, ("1x1", "1x2")),
        ("knn", (), ("1x1", "1x2")),
    ],
)
def test_training_does_not_depend_on_the_mesh(data, tmp_path, spec, words, meshes):
    found = {}
    for name in meshes:
        config, num_devices = on_mesh(name, STEPS, *words, spec=spec)
        results = run(config, tmp_path / name, data, num_devices=num_devices)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [row["train_loss"] for row in map(json.loads, lines) if "train_loss" in row]
        found[name] = learned(tmp_path / name), losses, results
    weights, losses, results = found.pop("1x1")
    for name, (other_weights, other_losses, other) in found.items():
        assert weights.keys() == other_weights.keys()
        for path, x in weights.items():
            np.testing.assert_allclose(other_weights[path], x, rtol=0, atol=1e-5, err_msg=path)
        np.testing.assert_allclose(other_losses, losses, rtol=0, atol=1e-5, err_msg=name)
        assert other["num_identities"] == results["num_identities"]
        assert abs(other["map"] - results["map"]) < 0.02


@pytest.mark.slow
@pytest.mark.optimized  # without, the tolerances are too narrow by a factor of 200
@pytest.mark.parametrize(
    ("words", "shapes", "most"),
    [(SGD, [(4, 2), (1, 8)], 1e-12), ((), [(8, 1)], 1e-10)],
    ids=["sgd", "adam"],
)
def test_steps_in_float64_do_not_depend_on_the_mesh(words, shapes, most):
    def train(shape):
        own = ("--config.dtype=float64", "--config.model.embed_dim=16", *words)
        with jax.enable_x64(True):
            return make("mma", *own, other=True, shape=shape).train(20)

    wanted, losses = train((1, 1))
    assert losses.dtype == np.float64 and losses[-1] < losses[0]
    for shape in shapes:
        found, other = train(shape)
        np.testing.assert_allclose(other, losses, rtol=0, atol=most)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        for left, right in pairs:
            np.testing.assert_allclose(left, right, rtol=0, atol=most)


def collectives(text):
    """Returns (operation, shape) of everything that a compiled program moves between devices."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = []
    for kinds, name in re.findall(rf"= (\(.*?\)|\S+) ({names})(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", kinds):
            found.append((name, tuple(int(size) for size in shape.split(",") if size)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [1.0, 0.1])
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("quality_fusion", ()),
        ("mma", ("--config.model.embed_dim=64",)),
        ("cosine", ("--config.model.embed_dim=64",)),
        ("deepmef:face", ("--config.optim.name=adam",)),
    ],
)
def test_no_logits_move_between_devices(spec, words, sampled):
    words = (*words, f"--config.loss.sampled_classes={sampled}")
    made = make(spec, *words, num_identities=4000, shape=(4, 2), batch_size=64)
    found = collectives(made.compiled().as_text())
    assert found
    share = made.system.model.num_classes // 2
    drawn = share if sampled == 1 else class_sharding.num_drawn(made.system, 64, 2)
    gradients = {x.shape for x in jax.tree.leaves(made.state.params)}
    gradients = {tuple(drawn if n == 2 * share else n for n in shape) for shape in gradients}
    widest = max(n for shape in gradients for n in shape if n != drawn)
    for name, shape in found:
        is_gradient = bool({(1, *shape), (1, *shape[::-1])} & gradients)
        assert is_gradient or np.prod(shape) <= 64 * widest, (name, shape)
    assert not any(name != "all-reduce" and {share, drawn} & {*shape} for name, shape in found)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["mma", "cosine", "quality_fusion"])
def test_no_scores_move_between_devices(spec):
    made = make(spec, num_identities=4000, shape=(4, 2), batch_size=64)
    state = jax.tree.map(lambda x: x[0], (made.state.params, made.state.model_state))
    step: Any = eval_step.make_eval_step(made.system, made.mesh)
    compiled = step.lower(*state, np.int32(-1), made.batch).compile()
    found = collectives(compiled.as_text())
    assert max([np.prod(shape) for _, shape in found], default=0) <= 64
    scores = compiled(*state, np.int32(-1), made.batch)
    assert scores.shape == (64, 4096)
    assert {shard.data.shape for shard in scores.addressable_shards} == {(16, 2048)}
    assert np.all(np.isneginf(scores[:, :1])) and np.all(np.isneginf(scores[:, 4001:]))


def evaluate_on(name, folder, data, config):
    """Evaluates a run on a mesh; returns its results and its ranking."""
    num_devices, model = MESHES[name]
    config = config_io.override(config, [f"--config.mesh.model={model}"])
    results = analysis.evaluate(config, folder, data, num_devices=num_devices)
    return results, (folder / "ranking.txt").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "words", "meshes"),
    [
        ("mma", (), ("1x2", "4x2", "1x8")),
        ("quality_fusion", ("--config.after_fusion=examples",), ("4x2",)),
        ("deepmef:face", ("--config.ensemble.seeds=2", "--config.eval.top_classes=5"), ("1x8",)),
        ("noise_classes:face", (), ("4x2",)),
        ("plda", (), ("1x2", "4x2")),
    ],
)
def test_a_ranking_is_the_same_to_the_byte_on_every_mesh(data, tmp_path, spec, words, meshes):
    config, num_devices = on_mesh("1x1", *words, "--config.num_epochs=2", spec=spec)
    run(config, tmp_path, data, num_devices=num_devices)
    scores = ("map", "top1", "num_ties", "members")
    wanted, ranking = evaluate_on("1x1", tmp_path, data, config)
    for name in meshes:
        found, other = evaluate_on(name, tmp_path, data, config)
        assert other == ranking, name
        assert [found.get(key) for key in scores] == [wanted.get(key) for key in scores]


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(data, tmp_path):
    """Four devices that share the classes, then one, then two; and all steps on one."""
    words = (*SGD, "--config.optim.decay=constant", "--config.optim.warmup=0")
    words = (*words, "--config.optim.total_decay=0")
    for number, (name, epochs) in enumerate([("1x8", 2), ("1x1", 4), ("1x2", 6)]):
        config, num_devices = on_mesh(name, f"--config.num_epochs={epochs}", *words, spec="cosine")
        results = run(config, tmp_path / "moved", data, num_devices=num_devices)
        manifest = checkpoint.manifests(tmp_path / "moved")[results["step"]]
        assert manifest["padded_columns"] == (None if number == 1 else 128)
    config, _ = on_mesh("1x1", "--config.num_epochs=6", *words, spec="cosine")
    run(config, tmp_path / "still", data)
    moved, still = learned(tmp_path / "moved"), learned(tmp_path / "still")
    for path, x in still.items():
        np.testing.assert_allclose(moved[path], x, rtol=0, atol=1e-5, err_msg=path)


def test_a_mesh_of_other_devices_than_there_are_is_one_error():
    with pytest.raises(ValueError, match=r"config\.mesh\.model=1") as caught:
        devices.make_mesh(8, 3)
    assert len(str(caught.value).splitlines()) <= 3
    for number in (0, 9):
        with pytest.raises(ValueError, match=f"num_devices={number}: there are 8"):
            devices.make_mesh(number)


def test_tops_of_devices_are_those_of_one():
    rng = np.random.default_rng(0)
    scores = rng.choice(rng.standard_normal(60).astype(np.float32), (5, 64, 16))  # with ties
    index = rng.permutation(5 * 64).astype(np.int32).reshape(5, 64)
    mask = rng.random((5, 64)) < 0.9
    blocks = list(zip(scores, index, mask, strict=True))
    wanted = topk.rank(blocks, 16, 7)
    for name in ("1x1", "4x2", "1x8"):
        mesh = devices.make_mesh(*MESHES[name])
        top = topk.RunningTopK(16, 7, rows=128, mesh=mesh, identities=slice(3, 13))
        for block in blocks:
            top.add(block)
        found = top.finish()
        np.testing.assert_array_equal(found.index, wanted.index[3:13])
        np.testing.assert_array_equal(found.scores, wanted.scores[3:13])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("local", [1, 2, 3, 4, 6])
def test_a_process_reads_the_rows_that_its_devices_hold(count, local):
    for model in (n for n in range(1, count * local + 1) if count * local % n == 0):
        owners = np.repeat(np.arange(count), local).reshape(-1, model)
        shares = devices.shares(owners)
        assert len({share.parts for share in shares.values()}) == 1
        for process, (number, parts) in shares.items():
            rows = len(owners) // parts
            held = np.flatnonzero((owners == process).any(1))
            assert len(owners) % parts == 0
            assert set(held) <= set(range(number * rows, (number + 1) * rows))
            if local % model == 0 or model % local == 0:  # and no other one
                assert len(held) == rows
