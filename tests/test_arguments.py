"""Every argument of every shipped experiment changes what its description names."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.cases import quick_first
from vidjax.core import ensemble
from vidjax.core.batch import Frames
from vidjax.models.system import TaskSpec, make_system
from vidjax.runs import config as config_lib
from vidjax.runs import config_io
from vidjax.training import train_step

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# Arguments of every experiment, and what they change at least.
COMMON = {"iqiyi_vid,few": {"data"}, "standard": {"data"}, "everything": {"splits"}}
WIDTHS = {"face": 32, "head": 16, "body": 20, "audio": 16, "scene": 48}

# experiment -> argument -> the parts of `settings` or `shapes` that it must change: the parameters
# of a member, the members, the frames that reach the model in training or in evaluation, the
# labels, the modalities that are decoded, the data, the passes over the data.
CHANGES = {
    "mma": {
        "iqiyi_vid": {"data", "passes"},
        "standard": {"data", "passes"},
        "published": {"parameters", "training frames", "evaluation frames"},
        "average": {"parameters"},
        "concat": {"parameters"},
        "pooled": {"parameters"},
        "unit": {"length"},
        "ensemble": {"members"},
        "face": {"parameters", "modalities"},
        "face,audio": {"parameters", "modalities"},
    },
    "cosine": {
        "iqiyi_vid": {"data", "passes"},
        "trainval": {"members", "splits"},
        "ensemble": {"members"},
        "face": {"parameters", "modalities"},
        "face,audio": {"parameters", "modalities"},
    },
    "knn": {
        "iqiyi_vid": {"data"},
        "head": {"memory", "modalities", "training frames", "evaluation frames"},
    },
    "plda": {
        "iqiyi_vid": {"data"},
        "trainval": {"members", "splits"},
        "face": {"memory", "modalities"},
        "face,audio": {"memory", "modalities"},
    },
    "quality_fusion": {
        "iqiyi_vid": {"data", "passes"},
        "published": {"passes", "rate", "what is dropped"},
        "folds": {"members"},
        "trainval": {"members", "splits"},
        "raw": {"training frames"},
        "voting": {"evaluation frames"},
        "mlp1": {"parameters"},
        "mlp2": {"parameters"},
        "mlp3": {"parameters"},
        "mlp4": {"parameters"},
        "mlp5": set(),  # the default, by its name
        "face,head": {"parameters", "modalities", "training frames", "evaluation frames"},
    },
    "residual_dense": {
        "iqiyi_vid": {"data", "passes", "parameters"},
        "published": {
            *("members", "passes", "rate", "training frames", "evaluation frames"),
            "what is dropped",
        },
        "trainval": {"members", "splits"},
        "plain": {"shortcut"},
        "one": {"members"},
        "single": {"training frames", "evaluation frames"},
        "fused": {"evaluation frames"},
        "folds": {"members"},
        "face": {"parameters", "modalities"},
        "face,audio": {"parameters", "modalities"},
        "audio,face": {"parameters", "modalities", "training frames"},
    },
    "deepmef": {
        "iqiyi_vid": {"data", "passes", "modalities"},
        "iqiyi_vid,few": {"data", "modalities"},
        "published": {"parameters", "evaluation frames"},
        "danet": {"parameters"},
        "average": {"parameters"},
        "views": {"parameters", "members"},
        "bagging": {"members", "samples"},
        "trainval": {"splits"},
        "scene": {"parameters", "modalities"},
        "face": {"parameters", "modalities"},
        "face,audio": {"parameters", "modalities"},
    },
    "noise_classes": {
        "iqiyi_vid": {"data", "passes", "members"},
        "everything": {"members", "splits"},
        "published": {"passes", "members", "mirrors"},
        "prediction": {"labels"},
        "other": {"parameters", "labels"},
        "leave_out": {"parameters", "labels"},
        "head": {"parameters", "modalities", "training frames", "evaluation frames"},
    },
}
CHANGES = {name: COMMON | table for name, table in CHANGES.items()}
CASES = [(name, words) for name, table in CHANGES.items() for words in table]


def load(name, words=""):
    return config_io.load_file(f"{ROOT}/configs/{name}.py:{words}")


@functools.cache
def shapes(name, words=""):
    """Shapes of what a run would train, and of the frames that reach it."""
    config = load(name, words)
    widths = {m: WIDTHS[m] for m in config.modalities}
    clusters = 7 if config.data.distractors == "noise" else None
    sizes = TaskSpec(widths, 12, clusters, 96, 20, train_other=False)
    system = make_system(config.to_dict(), sizes)
    rngs = ensemble.make_rngs(ensemble.make_members(config.ensemble)[:1], 0)

    def init():
        return train_step.init_state(system, rngs, jnp.zeros((1, 96), jnp.int32))

    state = jax.eval_shape(init)

    def reach(phase, fns, rng):
        specs = {m: config.to_dict()["fusion"].get(m, {}).get(phase) for m in widths}
        fused = {m: jax.eval_shape(functools.partial(fn, rng), frames(m)) for m, fn in fns.items()}
        return config.after_fusion, specs, _shapes(fused)

    def frames(m):
        shapes = ((2, 50, widths[m]), *[(2, 50)] * 4)
        dtypes = (jnp.float16, jnp.float32, jnp.float32, jnp.int32, bool)
        arrays: list[Any] = list(map(jax.ShapeDtypeStruct, shapes, dtypes))
        return Frames(*arrays)

    return {
        "parameters": _shapes(state.params),
        "memory": _shapes(state.model_state.get("memory", state.model_state.get("sums", {}))),
        "training frames": reach("train", system.fuse_train, jax.random.key(0)),
        "evaluation frames": reach("evaluate", system.fuse_eval, None),
    }


def settings(config):
    """What a configuration sets by itself."""
    return {
        "members": ensemble.make_members(config.ensemble),
        "labels": (config.data.distractors, config.noise.keep),
        "mirrors": config.noise.mirror_weight,
        "splits": (config.data.train_splits, config.eval.split),
        "samples": config.ensemble.resample,
        "what is dropped": (
            *(_find(config.to_dict(), name) for name in ("poor_clips", "top_classes")),
            _find(config.fusion.to_dict(), "poor_clips"),
        ),
        "rate": {name: config.optim[name] for name in ("learning_rate", "decay", "points")},
        "shortcut": _find(config.model.to_dict(), "shortcut"),
        "length": config.model.get("unit_length"),
        "modalities": config.modalities,
        "data": (config.data.name, config.data.size),
        "passes": (config.batch_size, config.num_epochs),
    }


def _find(spec, name):
    """Returns the value of an option of a model, or of the models that it is made of."""
    found = [_find(part, name) for part in spec.values() if isinstance(part, dict)]
    return spec.get(name) or next((value for value in found if value), None)


def _shapes(tree):
    return {
        jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize(("name", "words"), quick_first(CASES, 20))
def test_an_argument_changes_what_its_description_names(name, words):
    wanted = CHANGES[name][words]
    plain, changed = load(name), load(name, words)
    same_file = config_io.to_json(plain) == config_io.to_json(changed)
    assert same_file == (not wanted), "config.json does not show the argument"
    left, right = settings(plain), settings(changed)
    if not wanted or wanted - left.keys():
        left, right = left | shapes(name), right | shapes(name, words)
    differs = {key for key in left if left[key] != right[key]}
    assert wanted <= differs, (wanted, differs)
    if not wanted:
        assert not differs


@pytest.mark.parametrize("name", NAMES)
def test_no_argument_goes_untested_or_undocumented(name, monkeypatch):
    known = []
    split = config_lib.split_args

    def noted(args, words):
        known.extend(words)
        return split(args, words)

    monkeypatch.setattr(config_lib, "split_args", noted)
    load(name)
    tested = {word for words in CHANGES[name] for word in words.split(",")}
    assert set(known) == tested - set(WIDTHS)
    words = config_io.load_module(ROOT / "configs" / f"{name}.py").WORDS
    assert set(known) == set(words)
    assert all(meaning for meaning in words.values())


@pytest.mark.parametrize("name", quick_first(NAMES))
def test_a_system_is_made_of_all_arguments_together(name):
    """All arguments that do not exclude each other, at once, make a system."""
    words = {word for words in CHANGES[name] for word in words.split(",")} - set(WIDTHS)
    words -= {"standard", "leave_out", "mlp1", "mlp2", "mlp3", "mlp4", "bagging", "everything"}
    shapes(name, ",".join(sorted(words - {"few"})))
    shapes(name, ",".join(sorted((words - {"iqiyi_vid", "few"}) | {"standard"})))
    config_lib.check(load(name, ",".join(sorted((words - {"trainval"}) | {"everything"}))))
