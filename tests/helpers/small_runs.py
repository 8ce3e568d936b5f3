"""Runs that take seconds: shipped experiments with tiny nets on the small official files."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from vidjax.core import devices
from vidjax.evaluation import analysis, scores as scores_lib, trained_runs
from vidjax.runs import checkpoint, config_io, members_file
from vidjax.runs.run_folder import RunFolder
from vidjax.training import loop
from vidjax.utils import files

ROOT = Path(__file__).parents[2]
# Environment variables with which a command compiles in half of the time, as tests do.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
if jax.__version_info__ < (0, 11):  # later versions may lack the flag, which would be an error
    QUICK["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
MODALITIES = "--config.modalities=face,head,audio"
STREAMED = "--config.data.mode=streaming"
LAYER = "--config.model.layers=((8,'swish',True,0.5),)"  # BatchNorm and dropout
SMALL = {
    "mma": ("--config.model.embed_dim=16", "--config.model.num_clusters=2", MODALITIES),
    "cosine": ("--config.model.embed_dim=16", MODALITIES), "knn": (), "plda": (MODALITIES,),
    "quality_fusion": (LAYER,), "residual_dense": ("--config.model.{main}width=8",),
    "noise_classes": ("--config.model.layers=((8,'linear',False,0.0),)",),
    "deepmef": ("--config.model.{main}branch_dims=(6,4)", "--config.model.{main}hidden_dim=8"),
}  # fmt: skip
# PLDA reads all clips twice. It gets settings, because fitting them takes long and has other tests.
CLOSED_FORM = (
    "--config.num_epochs=2", "--config.model.within=0.8", "--config.model.between=0.75",
    "--config.model.scale=0.06", "--config.model.unenrolled=-1", "--config.model.stranger=2",
)  # fmt: skip


def shrunk(*overrides, spec="configs/mma.py:iqiyi_vid"):
    """Returns a configuration of the folder `configs` with tiny nets and few epochs, overridden."""
    name, _, words = spec.partition(":")
    config = config_io.load_file(f"{ROOT / name}:{words}")
    stem = Path(name).stem
    small = [
        "--config.batch_size=32", "--config.num_epochs=8", "--config.log_every_steps=5",
        "--config.eval.every_epochs=0", "--config.eval.block_size=16",
        "--config.eval.report=False", *SMALL[stem],
    ]  # fmt: skip
    if config.data.distractors == "noise":
        small.append("--config.noise.eps=1.1")
    if config.ensemble.folds:
        small.append("--config.ensemble.folds=3")
    main = "main." if "main" in config.model else ""
    small = [word.replace("{main}", main) for word in small]
    if main and "layers" in config.model.other:
        small.append("--config.model.other.layers=((6,'prelu',True,0.5),)")
    return config_io.override(config, [*small, *overrides])


def evaluate(config, folder, data, **options):
    """Ranks a split with a trained run or a blend; `options` go to `analysis.evaluate`."""
    metrics = analysis.evaluate(config, RunFolder(folder), lambda _: data, **options)
    return metrics[config.eval.split]


def run(config, folder, data, num_devices=1):
    """Trains a run in a folder, or resumes it; returns the results."""
    folder.mkdir(exist_ok=True, parents=True)
    return loop.train(config, folder, data, num_devices=num_devices)


def saved(workdir, step=None):
    """Returns name -> tree of arrays of a checkpoint, by default the latest."""
    step = step or max(checkpoint.manifests(workdir))
    state = workdir / "checkpoints" / str(step) / "state"
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    metadata = ocp.checkpointables_metadata(state).metadata
    found = {name: tree for name, tree in metadata.items() if tree}
    # Other processes and devices may have saved the arrays.
    here = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), found)
    return ocp.load_checkpointables(state, here)


def weights(workdir, step=None):
    """Returns path in the tree -> array, of all saved parameters and running statistics."""
    tree = saved(workdir, step)
    return flat({key: tree[key] for key in ("params", "model_state") if key in tree})


def flat(tree):
    """Returns path -> array of a tree. Random keys become arrays of numbers."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = jax.random.key_data(leaf) if is_key else leaf
        found[jax.tree_util.keystr(path)] = np.asarray(data)
    return found


def assert_equal_weights(left, right):
    """Asserts that two runs have the same weights, bit for bit."""
    np.testing.assert_equal(weights(left), weights(right))


RUN_FILES = ("metrics.jsonl", "ranking.txt", "config.json", "identities.json")


def assert_same_run(left, right, names=RUN_FILES[:2]):
    """Asserts that two runs have the same weights, and the same content in some files."""
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    assert_equal_weights(left, right)


class Spoilt:
    """A dataset in which all features of some clips are replaced by `value`.

    `hidden` is split -> bool [N], True for these clips.
    """

    def __init__(self, data, hidden, value=7.0):
        self._data, self._hidden, self._value = data, hidden, value

    def __getattr__(self, name):
        return getattr(self._data, name)

    def train_batches(self, plan, **options):
        hidden = np.concatenate([self._hidden[split] for split in plan.splits])
        for batch in self._data.train_batches(plan, **options):
            spoilt = hidden[batch.clip_index][:, None, None]
            frames = {name: self._spoil(one, spoilt) for name, one in batch.frames.items()}
            yield batch._replace(frames=frames)

    def packed(self, split, modalities):
        for clip_index, frames in self._data.packed(split, modalities):
            spoilt = self._hidden[split][clip_index]
            for name, one in frames.items():
                frames[name] = self._spoil(one, np.repeat(spoilt, one.length)[:, None])
            yield clip_index, frames

    def _spoil(self, one, where):
        features = np.where(where, self._value, one.features)
        return one._replace(features=features.astype(one.features.dtype))


class Interrupting:
    """A dataset that sends a signal to this process before batch number `batch` of training.

    If `signum` is None, the batch cannot be read.
    """

    def __init__(self, data, batch, signum):
        self._data, self._batch, self._signum = data, batch, signum

    def __getattr__(self, name):
        return getattr(self._data, name)

    def train_batches(self, plan, **options):
        for i, batch in enumerate(self._data.train_batches(plan, **options)):
            if i == self._batch and self._signum is None:
                raise OSError("the disk is gone")
            if i == self._batch:
                os.kill(os.getpid(), self._signum)
            yield batch


def training_sets(folder):
    """Returns the clips that each member of a run was trained on."""
    latest = checkpoint.find(folder)
    assert latest is not None
    return members_file.read_lists(latest)[1]


def make_earlier(folder):
    """Makes a run like one of version 0.1.0, whose checkpoints have no lists of identities."""
    for step, manifest in checkpoint.manifests(folder).items():
        place = folder / "checkpoints" / str(step)
        metadata = json.loads((place / "state" / "_CHECKPOINT_METADATA").read_text())
        for name in ("identities", "members"):
            shutil.rmtree(place / "state" / name)
            del metadata["item_handlers"][name]
        (place / "state" / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
        manifest |= {"files": files.sha256_folder(place / "state")}
        files.write_manifest(place / "manifest.json", manifest)


def restored(folder, data, config=None, mesh=None):
    """Returns the model that an evaluation of a run would load."""
    config = config or config_io.load_workdir(folder)
    found = trained_runs.find_run(config, RunFolder(folder))
    return trained_runs.make_model(config, found, data, mesh or devices.make_mesh(1))


def scores(model, split="val"):
    """Returns the scores [N, C] of N clips for C identities."""
    written = scores_lib.write_scores(model, split)
    assert written.pool.all()
    return np.array(written.array)
