"""Configurations: overrides, JSON, shipped files, and that every field is read by something."""

import ast
from pathlib import Path

import pytest

from vidjax import config as config_lib

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.py"))
ARGUMENTS = {
    "mma": ["published,face", "standard,face,head", "average,concat", "ensemble"],
    "knn": ["head", "standard"],
    "quality_fusion": ["mlp1", "mlp2", "mlp3", "mlp4", "mlp5,folds", "voting", "standard"],
    "residual_dense": ["one", "single", "fused,folds", "face", "standard"],
    "deepmef": ["published", "views", "face", "face,body,audio", "standard"],
    "noise_classes": ["other", "leave_out", "head", "standard"],
}
SPECS = [
    f"configs/{name}.py:{words}"
    for name, arguments in ARGUMENTS.items()
    for words in ["", "iqiyi_vid", "iqiyi_vid,few", *arguments]
]


def test_no_shipped_configuration_is_left_out():
    assert {path.stem for path in SHIPPED} == set(ARGUMENTS)


def load(spec="configs/mma.py"):
    name, _, words = spec.partition(":")
    return config_lib.load_file(f"{ROOT / name}:{words}")


@pytest.mark.parametrize("spec", SPECS)
def test_json_brings_back_types_and_values(spec):
    config = load(spec)
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.differences(config, again) == {}
    types = {name: type(value) for name, value in config_lib.fields(config)}
    assert types == {name: type(value) for name, value in config_lib.fields(again)}
    # An unset field is still one that can be set after the round trip.
    moved = config_lib.override(again, ["--config.data.dir=/data", "--config.modalities=face,head"])
    assert moved.data.dir == "/data"
    assert moved.modalities == ("face", "head")


def test_override_knows_types():
    config = config_lib.override(
        load(),
        [
            "--config.batch_size=64",
            "--config.optim.learning_rate=3e-4",
            "--config.modalities=('face',)",
            "--config.model.attention=false",
            "--config.loss.schedule=((0, 1.0), (5, 0.5))",
        ],
    )
    assert config.batch_size == 64
    assert config.optim.learning_rate == 3e-4
    assert config.modalities == ("face",)
    assert config.model.attention is False
    assert config.loss.schedule == ((0, 1.0), (5, 0.5))


def test_the_last_of_two_overrides_counts():
    config = config_lib.override(
        load(),
        [
            "--config.modalities=face",
            "--config.seed=1",
            "--config.modalities=head,audio",
            "--config.seed=2",
        ],
    )
    assert config.modalities == ("head", "audio")
    assert config.seed == 2


def test_override_leaves_the_original_alone():
    config = load()
    config_lib.override(config, ["--config.seed=7"])
    assert config.seed == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.batchsize=1", "did you mean --config.batch_size"),
        ("--config.learning_rate=1", "did you mean --config.optim.learning_rate"),
        ("--config.data.dri=x", "did you mean --config.data.dir"),
        ("--config.batch_size=many", "batch_size"),
        ("--config.num_epochs=1e", "num_epochs"),
        ("--config.seed", "needs a value"),
    ],
)
def test_override_mistakes(word, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_lib.override(load(), [word])
    assert len(str(caught.value).splitlines()) <= 3


def test_a_misspelt_argument_is_no_modality():
    with pytest.raises(ValueError, match="did you mean 'published'"):
        load("configs/mma.py:publisched")


def test_differences_names_the_fields():
    other = config_lib.override(load(), ["--config.seed=1", "--config.data.max_frames=5"])
    assert set(config_lib.differences(load(), other)) == {"seed", "data.max_frames"}


def test_every_field_is_read():
    """A field that nothing reads is a promise that nobody keeps."""
    read = set()
    for path in (ROOT / "vidjax").rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
            elif isinstance(node, ast.arg):  # what a specification is spread into
                read.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                read.add(node.target.id)
    for spec in SPECS:
        config = load(spec)
        names = [name for name, _ in config_lib.fields(config)]
        per_modality = set(config.modalities)
        for name in names:
            leaf = set(name.split(".")) - per_modality
            assert leaf <= read, f"{spec}: nothing reads config.{name}"
