"""Configurations: overrides, JSON, shipped files, and refused values."""

import copy
import functools
import math
import shutil
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.helpers import docs
from tests.helpers.made_models import zero_draws
from tests.helpers.seen import refused
from vidjax.cli import program, run_commands
from vidjax.data.synthetic import CALIBRATED
from vidjax.runs import config as config_lib, config_io
from vidjax.runs.run_folder import describe_changes
from vidjax.training.dry_run import dry_run

load = config_io.load_file


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
def test_shipped_configuration_is_valid_and_survives_json(name):
    words = config_io.load_module(ROOT / "configs" / f"{name}.py").WORDS
    as_json = {}  # word after the name, such as `mma:face` -> JSON of the configuration
    for word in ("", *words):
        # `few` is refused without `iqiyi_vid`.
        config = load(f"{name}:{'iqiyi_vid,few' if word == 'few' else word}")
        config_lib.check(config)
        as_json[word] = config_io.to_json(config)
        again = config_io.from_json(as_json[word])
        values, expected = (dict(config_lib.fields(each)) for each in (again, config))
        assert values == expected and config_lib.differences(config, again) == {}
        assert list(map(type, values.values())) == list(map(type, expected.values()))
        # Fields without a value can still be set.
        assert config_io.override(again, ["--config.data.dir=/data"]).data.dir == "/data"
    # Every word changes something, except `mlp5`, which names the default.
    without_change = [word for word in words if as_json[word] == as_json[""]]
    assert without_change == (["mlp5"] if "mlp5" in words else [])
    few = load("joint:plda,face" if name == "joint" else name)
    # Each modality and each system takes time. A model with parts needs two modalities.
    few.modalities = few.modalities[: 1 + ("main" in few.model)]
    with zero_draws():
        dry_run(few)


@pytest.mark.parametrize(("spec", "error"), [
    ("deepmef:trainval,everything", "'everything' and 'trainval'"),
    ("mma:concat,pooled", "exclude each other: name only"),
    ("knn:published", "has no argument 'published': leave it out"),
    ("knn:face,head", "only one of the modalities face, head"),
    ("mma:face:body", "write 'face,body'"), ("knn:face,face", "'face' comes twice"),
])  # fmt: skip
def test_words_of_a_configuration_that_exclude_each_other_are_refused(spec, error):
    refused(lambda: load(spec), error)


def test_override_has_the_type_of_its_field_and_the_last_one_counts():
    for word, value in {
        "batch_size=64": 64, "num_epochs=3": 3.0, "num_epochs=inf": math.inf,
        "modalities=('face',)": ("face",), "modalities=face, head": ("face", "head"),
        "modalities=": (), "model.attention=false": False, "eval.report=0": False,
        "loss.schedule=((0, 1.0), (5, 0.5))": ((0, 1.0), (5, 0.5)),
        "ensemble.only=2": (2,), "ensemble.only=[0,2]": (0, 2),
        "ensemble.min_quality=-1000,20": (-1000, 20), "data.dir=a=b": "a=b", "eval.split=5": "5",
    }.items():  # fmt: skip
        config = config_io.override(load("mma"), [f"--config.{word}"])
        actual = dict(config_lib.fields(config))[word.partition("=")[0]]
        assert (actual, type(actual)) == (value, type(value)), word
    assert config_io.override(load("mma"), ["--config.seed=1", "--config.seed=2"]).seed == 2
    config = load("plda")  # a file of a user may set an argument to None, or to a list
    config.model.update(within=None, centred=None, sizes=[3])
    words = ("within=0.5", "centred=None", "sizes=4,5")
    model = config_io.override(config, [f"--config.model.{word}" for word in words]).model
    assert (model.within, model.centred, model.sizes) == (0.5, None, [4, 5])


def test_differences_of_configurations_omit_unread_fields():
    plain = load("noise_classes:other")
    # `eps` is read only for noise classes, and `momentum` only for SGD.
    other = config_io.override(plain, ["--config.noise.eps=0.5", "--config.optim.momentum=0.5"])
    sgd = config_io.override(other, ["--config.optim.name=sgd"])
    assert config_lib.differences(plain, other) == {}
    assert set(config_lib.differences(plain, sgd)) == {"optim.name", "optim.momentum"}
    # JSON has no tuples, so a tuple and a list with the same content do not differ.
    plain.model.sizes = ([1, 2], {"a": [3]})
    assert config_lib.differences(config_io.from_json(config_io.to_json(plain)), plain) == {}


def test_unknown_attribute_has_the_hint_of_the_command_line():
    config = copy.deepcopy(load("mma"))
    with pytest.raises(AttributeError, match=r"config\.lr: did you mean --config\.optim\.learning"):
        _ = config.lr
    assert not hasattr(config, "_lr")


# Word of the command line -> fields that are read only with this word -> a value of the field.
# Only `vidjax evaluate` reads the fields of the empty word.
UNREAD = {
    "loss.schedule=((0,0.5),)": {"loss.focal": "multiclass"},
    "loss.schedule=((0,0),(1,1))": {"loss.gamma": "3"},
    "loss.margin=0.1": {"loss.margin_type": "additive"},
    "optim.name=sgd": {"optim.momentum": "0.5"},
    "optim.weight_decay=1e-5": {"optim.decay_all": "true"},
    "optim.decay=steps": {"optim.decay_factor": "0.5", "optim.decay_every_epochs": "2"},
    "optim.decay=piecewise": {"optim.points": "((0,1),(2,0.5))"},
    "ensemble.views=2": {"ensemble.chunks": "8"},
    "ensemble.bootstraps=2": {"ensemble.resample": "all"},
    "ensemble.min_quality=0,20": {"ensemble.poor_clips": "drop"},
    "data.distractors=noise": {
        "noise.eps": "0.5", "noise.min_samples": "3", "noise.modality": "head",
        "noise.relabel_every_epochs": "2", "noise.relabel_by": "train",
        "noise.keep": "prediction", "noise.mirror_weight": "((0,0.5),)",
    },
    "noise.join=true": {"noise.pieces": "random"},
    "early_stop.patience=2": {"early_stop.metric": "top1"},
    "after_fusion=examples": {"eval.reduce": "max"},
    "data.name=arrays": {"data.dir": "folder", "data.quality": "norm"},
    "join.learned=true join.systems=a,b": {"join.diffusion": "true"},
    "": {"join.weights": "1,2", "join.learned": "true", "join.runs": "a,b"},
}  # fmt: skip
# A field that is read by default -> (value, a word with which the field is not read).
READ = {
    "loss.label_smoothing": ("0.1", "loss.schedule=((0,1),)"),
    "loss.classification": ("binary", "loss.schedule=((0,1),)"),
    "optim.final_scale": ("0.5", "optim.decay=constant"),
    "optim.warmup_scale": ("0.5", "optim.warmup=0"),
    "noise.join": ("true", "data.distractors=leave_out"),
    "data.size": ("standard", "data.name=arrays"),
    "data.seed": ("1", "data.name=iqiyi_vid"),
    **{f"data.{knob}": ("0.5", "data.name=arrays") for knob in CALIBRATED._fields},
}


def problems(*words):
    """Returns the errors of a configuration with some overrides."""
    config = config_io.override(config_lib.default(), [f"--config.{word}" for word in words])
    return list(config_lib.problems(config))


def test_value_of_a_field_that_is_not_read_is_refused_with_a_remedy():
    for needed_word, fields in UNREAD.items():
        remedy = needed_word.partition("=")[0] or "vidjax evaluate"
        for name, value in fields.items():
            (problem,) = problems(f"{name}={value}")
            assert problem.startswith(f"config.{name}=") and 1 <= len(problem.splitlines()) <= 3
            assert remedy in problem
            if needed_word:
                assert problems(f"{name}={value}", *needed_word.split()) == []
    for name, (value, excluding_word) in READ.items():
        assert problems(f"{name}={value}") == []
        assert len(problems(f"{name}={value}", excluding_word)) == 1
        assert problems(excluding_word) == []  # the default is never refused
    # The values of two other fields decide.
    words = "noise.keep=prediction", "data.distractors=noise", "noise.relabel_every_epochs=0"
    (problem,) = problems(*words)
    assert "--config.noise.relabel_every_epochs=1" in problem
    assert problems("optim.decay_all=true", "optim.total_decay=1") == []  # as with weight decay
    # Some loss of weight above 0 must read `gamma`; softmax does not. `loss.focal` has weight 0.
    assert problems("loss.gamma=3", "loss.classification=binary") == []
    (problem,) = problems("loss.gamma=3", "loss.classification=binary", "loss.focal=softmax")
    assert problem.startswith("config.loss.focal=")  # `loss.gamma` is accepted


# Fields that may change when a run resumes. `num_epochs` may grow.
MAY_CHANGE = {
    "data.dir", "data.weights", "data.cache_dir", "init_from",  # paths
    "deterministic", "eval.splits", "eval.block_size", "eval.members", "eval.report",
    "eval.keep_scores", "eval.checkpoint",
    "log_every_steps", "checkpoint_every_seconds", "eval.every_epochs", "profile",  # logs
    "data.mode",  # rounding
}  # fmt: skip


def test_fields_that_change_results_are_refused_when_a_run_resumes():
    other: dict[type, Any] = {int: 3, float: 0.5, str: "other", tuple: ("other",)}
    for name, field in config_lib.FIELDS.items():
        value = not field.default if isinstance(field.default, bool) else other.get(
            type(field.default), "/other"
        )  # fmt: skip
        old, new = config_lib.default(), config_lib.default()
        for config in (old, new):
            config.num_epochs = 0.1
        group, _, leaf = name.rpartition(".")
        (new[group] if group else new)[leaf] = value
        # A field that is not read has no effect, so it is not compared.
        is_read = name in config_lib.differences(old, new)
        may_change = name in MAY_CHANGE or name == "num_epochs" or not is_read
        assert (describe_changes(old, new) == "") == may_change, name
    new = config_lib.default()
    new.seed, new.batch_size, new.data.crop, new.eval.split = 7, 7, "quality", "test"
    new.data.dir = f"/{'long' * 50}"
    text = describe_changes(config_lib.default(), new)
    assert text.count("->") == 3 and text.endswith(" more") and len(text) < 260
    page = (ROOT / "vidjax" / "runs" / "README.md").read_text()
    listed = page.partition("may be larger. These")[2].partition("\n\n")[0]
    assert {name for name in config_lib.FIELDS if f"`{name}`" in listed} == MAY_CHANGE


def test_evaluation_refuses_exactly_the_fields_that_it_does_not_read(tmp_path):
    (tmp_path / "config.json").write_text(config_io.to_json(load("mma:iqiyi_vid")))
    for word, is_refused in {
        "optim.learning_rate=1": True, "seed=1": True, "data.mode=streaming": True,
        "log_every_steps=1": True, "data.weights=x": True,
        "fusion.face.train.num_draws=2": True, "num_epochs=2": True,
        "eval.temperature=2": False, "eval.checkpoint=best": False, "eval.block_size=8": False,
        "deterministic=true": False, "data.dir=x": False, "model.embed_dim=3": False,
    }.items():  # fmt: skip
        words = program.parse(["evaluate", f"--workdir={tmp_path}", f"--config.{word}"])
        read = functools.partial(run_commands.read_evaluate_settings, words)
        refused(read, "evaluate does not train") if is_refused else read()


def test_tables_of_this_file_list_every_field_that_is_not_always_read():
    conditional = {name for name, field in config_lib.FIELDS.items() if field.read_when}
    # `join.runs` has no `read_when`, because training refuses it by a separate check.
    assert conditional | {"join.runs"} == {*READ}.union(*UNREAD.values())


def test_evaluation_of_training_clips_is_refused_with_remedies():
    (problem,) = problems("data.train_splits=train,val")  # val is evaluated by default
    assert "--config=FILE:everything" in problem
    for remedy in ("ensemble.folds=5", "eval.split=test"):
        assert f"--config.{remedy}" in problem
        assert problems("data.train_splits=train,val", remedy) == []
    # With folds or bootstraps, each member leaves clips out, so train can be evaluated.
    for members in ("folds", "bootstraps"):
        assert problems("eval.split=train", f"ensemble.{members}=5") == []


def test_values_outside_the_range_of_a_field_are_refused():
    for name, field in config_lib.FIELDS.items():
        values: dict[str, Any] = dict(config_lib.DEFAULTS)
        outside: list[Any] = ["zzz"] if field.choices else []
        if field.low is not None:
            outside.append(field.low - 1)
        if (field.below or field.high or math.inf) < math.inf:  # there is an upper bound
            outside.append(math.inf)
        if name in ("modalities", "data.train_splits"):
            outside.append(("face", 1))
        for value in outside:
            with pytest.raises(ValueError, match=rf"^config\.{name}=.*: (must be|choose from) "):
                config_lib.check_ranges(values | {name: value})
        for value in (field.low, field.high):  # these bounds are accepted
            if value is not None and abs(value) < math.inf:
                config_lib.check_ranges(values | {name: value})


def test_configuration_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_io.load_file("mma:face").modalities == ("face",)
    assert config_io.load_file("knn:head").modalities == ("head",)
    for name in ("mmaa", "configs/mma.py", "mma.py"):
        with pytest.raises(ValueError, match="'mma'"):  # the error suggests this name
            config_io.load_file(name)
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "knn.py", tmp_path / "configs" / "mma.py")
    assert config_io.load_file("mma").model.name == "knn"  # from the working directory
    assert config_io.load_file("~/configs/mma.py").model.name == "knn"
    shutil.copy(ROOT / "configs" / "mma.py", tmp_path / "configs" / "mine.py")
    assert config_io.load_file("mine").model.name == "mma"
    refused(lambda: load("mine:published"), "published/mine.py", "copy it from configs")


def test_file_that_changes_twice_in_a_second_is_read_again(tmp_path):
    """Python would use the bytecode of the first file, because both files have the same size."""
    text = (ROOT / "configs" / "knn.py").read_text()
    for size in (128, 512):
        (tmp_path / "mine.py").write_text(text.replace("batch_size = 256", f"batch_size = {size}"))
        assert load(str(tmp_path / "mine.py")).batch_size == size


def test_page_of_configurations_equals_the_generated_documentation():
    page = (ROOT / "configs" / "README.md").read_text()
    assert docs.update(page) == page, "python -m tests.helpers.docs configs/README.md"
