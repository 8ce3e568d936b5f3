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
WIDTHS = {"face": 32, "head": 16, "body": 20, "audio": 16, "scene": 48}
# argument -> the parts of `settings` or `shapes` that it must change: the parameters of a member,
# the members, the frames that reach the model in training or in evaluation, the labels, the
# modalities that are decoded, the data, the passes over the data.
NET, BOTH = ("parameters", "modalities"), ("training frames", "evaluation frames")
COMMON = {"iqiyi_vid": ("data", "passes"), "iqiyi_vid,few": ("data",), "standard": ("data",),
          "everything": ("splits",)}  # fmt: skip
MANY = COMMON | {"face": NET, "face,audio": NET}  # experiments with several modalities
HELD_OUT = ("members", "splits")
CHANGES = {
    "mma": MANY | {
        "published": ("parameters", *BOTH), "average": ("parameters",), "concat": ("parameters",),
        "pooled": ("parameters",), "unit": ("length",), "ensemble": ("members",),
    },
    "cosine": MANY | {"trainval": HELD_OUT, "ensemble": ("members",)},
    "knn": COMMON | {"iqiyi_vid": ("data",), "head": ("memory", "modalities", *BOTH)},
    "plda": COMMON | {
        "iqiyi_vid": ("data",), "trainval": HELD_OUT, "face": ("memory", "modalities"),
        "face,audio": ("memory", "modalities"),
    },
    "quality_fusion": COMMON | {
        "published": ("passes", "rate", "what is dropped"), "folds": ("members",),
        "trainval": HELD_OUT, "raw": ("training frames",), "voting": ("evaluation frames",),
        **{f"mlp{number}": ("parameters",) for number in (1, 2, 3, 4)},
        "mlp5": (),  # the default, by its name
        "face,head": (*NET, *BOTH),
    },
    "residual_dense": MANY | {
        "iqiyi_vid": ("data", "passes", "parameters"), "trainval": HELD_OUT,
        "published": ("members", "passes", "rate", *BOTH, "what is dropped"),
        "plain": ("shortcut",), "one": ("members",), "single": BOTH, "folds": ("members",),
        "fused": ("evaluation frames",), "audio,face": (*NET, "training frames"),
    },
    "deepmef": MANY | {
        "iqiyi_vid": ("data", "passes", "modalities"), "iqiyi_vid,few": ("data", "modalities"),
        "published": ("parameters", "evaluation frames"), "danet": ("parameters",),
        "average": ("parameters",), "views": ("parameters", "members"), "scene": NET,
        "bagging": ("members", "samples"), "trainval": ("splits",),
    },
    "noise_classes": COMMON | {
        "iqiyi_vid": ("data", "passes", "members"), "everything": HELD_OUT,
        "published": ("passes", "members", "mirrors"), "prediction": ("labels",),
        "other": ("parameters", "labels"), "leave_out": ("parameters", "labels"),
        "head": (*NET, *BOTH),
    },
}  # fmt: skip
# The last three have the largest networks.
LATER = sorted(NAMES, key=lambda name: name in ("deepmef", "mma", "residual_dense"))
WORDS = {
    name: {word for words in table for word in words.split(",")} - WIDTHS.keys()
    for name, table in CHANGES.items()
}


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


@pytest.mark.parametrize("name", NAMES)
def test_config_json_shows_an_argument(name):
    plain = load(name)
    for words, wanted in CHANGES[name].items():
        changed = load(name, words)
        same_file = config_io.to_json(plain) == config_io.to_json(changed)
        assert same_file == (not wanted), words
        left, right = settings(plain), settings(changed)
        differs = {key for key in left if left[key] != right[key]}
        assert {*wanted} & left.keys() <= differs and (wanted or not differs), (words, differs)


@pytest.mark.slow
@pytest.mark.parametrize("name", quick_first(LATER, 5, mark=pytest.mark.nightly))
def test_an_argument_changes_the_shapes_that_its_description_names(name):
    for words, wanted in CHANGES[name].items():
        if not wanted or {*wanted} - settings(load(name)).keys():
            left, right = shapes(name), shapes(name, words)
            differs = {key for key in left if left[key] != right[key]}
            assert {*wanted} & left.keys() <= differs and (wanted or not differs), (words, differs)


@pytest.mark.parametrize("name", NAMES)
def test_no_argument_goes_untested_or_undocumented(name, monkeypatch):
    known, split = [], config_lib.split_args

    def noted(args, words):
        known.extend(words)
        return split(args, words)

    monkeypatch.setattr(config_lib, "split_args", noted)
    load(name)
    assert set(known) == WORDS[name]
    words = config_io.load_module(ROOT / "configs" / f"{name}.py").WORDS
    assert set(known) == set(words) and all(words.values())


@pytest.mark.parametrize("name", quick_first(NAMES, mark=pytest.mark.nightly))
def test_a_system_is_made_of_all_arguments_together(name):
    """All arguments that do not exclude each other, at once, make a system."""
    words = WORDS[name] - {"standard", "leave_out", "mlp1", "mlp2", "mlp3", "mlp4", "bagging"}
    words -= {"everything", "few"}
    shapes(name, ",".join(sorted(words)))
    shapes(name, ",".join(sorted((words - {"iqiyi_vid"}) | {"standard"})))
    config_lib.check(load(name, ",".join(sorted((words - {"trainval"}) | {"everything"}))))
