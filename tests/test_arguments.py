"""Every argument of every shipped experiment changes what its description names."""

from pathlib import Path

import pytest

from tests.helpers.cases import quick_first
from vidjax.core import ensemble
from vidjax.runs import config as config_lib
from vidjax.runs import config_io
from vidjax.training import plan

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# argument -> the parts of `settings` that it must change: the network of a member, the members, the
# frames that reach the model in training or in evaluation, the labels, the modalities that are
# decoded, the data, the passes over the data.
MODALITIES = {"face", "head", "body", "audio", "scene"}
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
    "knn": COMMON | {"iqiyi_vid": ("data",), "head": ("modalities", *BOTH)},
    "plda": COMMON | {
        "iqiyi_vid": ("data",), "trainval": HELD_OUT, "face": ("modalities",),
        "face,audio": ("modalities",),
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
        "average": ("parameters",), "views": ("members",), "scene": NET,
        "bagging": ("members", "samples"), "trainval": ("splits",),
    },
    "noise_classes": COMMON | {
        "iqiyi_vid": ("data", "passes", "members"), "everything": HELD_OUT,
        "published": ("passes", "members", "mirrors"), "prediction": ("labels",),
        "other": ("labels",), "leave_out": ("labels",),
        "head": (*NET, *BOTH),
    },
}  # fmt: skip
WORDS = {
    name: {word for words in table for word in words.split(",")} - MODALITIES
    for name, table in CHANGES.items()
}


def load(name, words=""):
    return config_io.load_file(f"{ROOT}/configs/{name}.py:{words}")


def settings(config):
    """Returns the parts of a configuration that arguments change."""
    fusion = config.fusion.to_dict()
    train, evaluate = (
        [(name, fusion.get(name, {}).get(phase)) for name in config.modalities]
        for phase in ("train", "evaluate")
    )
    return {
        "parameters": (config.model.to_dict(), config.modalities),
        "training frames": (config.after_fusion, train),
        "evaluation frames": (config.after_fusion, evaluate),
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


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_changes_what_its_description_names(name):
    plain = load(name)
    for words, wanted in CHANGES[name].items():
        changed = load(name, words)
        same_file = config_io.to_json(plain) == config_io.to_json(changed)
        assert same_file == (not wanted), words
        left, right = settings(plain), settings(changed)
        differs = {key for key in left if left[key] != right[key]}
        assert {*wanted} <= differs and (wanted or not differs), (words, wanted, differs)


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
    everything = words - {"trainval"} | {"everything"}
    config_lib.check(load(name, ",".join(sorted(everything))))
    plan.dry_run(load(name, ",".join(sorted(words - {"iqiyi_vid"} | {"standard"}))))
