"""Adding a loss, a model, a dataset and so on: one function and one line in one table each."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

COSFACE = '''
def cosface(logits, labels, class_mask=None, *, logit_scale, margin):
    """Returns softmax cross-entropy with an additive cosine margin (CosFace, equation 4)."""
    label = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return softmax_cross_entropy(logits - logit_scale * margin * label, labels, class_mask)
'''

MODEL = '''
class Centroid(Identifier):
    """Cosines between the mean frame of the first modality and a direction per class."""

    modalities: Mapping[str, int]
    num_classes: int
    logit_scale: float = 16.0

    @nn.compact
    def __call__(self, frames, clips, *, train):
        frames, _ = real_frames(frames, self.modalities, clips.mask)
        x = fusion.mean_frame(next(iter(frames.values()))).features[:, 0]
        logits = CosineClassifier(self.num_classes, self.logit_scale, name="classifier")(x)
        return ModelOutput(logits[:, None], embedding=x)
'''

DATASET = '''
def open_blobs(data, digests):
    """Returns six people, each a point with noise."""
    rng = np.random.default_rng(data["seed"])
    people = rng.normal(size=(6, 12))
    splits, labels = {}, {}
    for split, count in {"train": 48, "val": 24}.items():
        x = people[np.arange(count) % 6][:, None] + rng.normal(size=(count, 3, 12))
        splits[split] = {f"{split}_{i}": {"face": one} for i, one in enumerate(np.float32(x))}
        labels |= {f"{split}_{i}": f"person_{i % 6}" for i in range(count)}
    return FeatureDict(splits, labels)
'''

FUSION = '''
def first_frame(frames):
    """Returns the first frame of every clip."""
    return jax.tree.map(lambda x: x[:, :1], frames._replace(features=read(frames.features)))
'''

TRANSFORM = '''
def halve(rng, clips):
    """Halves the weight of one clip in two."""
    keep = jax.random.bernoulli(rng, 0.5, clips.weight.shape)
    return clips._replace(weight=jnp.where(keep, clips.weight, clips.weight / 2))
'''

METRIC = '''
def confident(clips, labels):
    """Returns the share of ranked clips whose best probability is above one half."""
    del labels
    return float(np.mean(clips.best[clips.pool] > np.log(0.5)))
'''

ADDITIONS = (  # file, table, function, line of the table
    ("core/losses.py", "CLASSIFICATION", COSFACE, '"cosface": cosface'),
    ("models/identifier.py", "MODELS", MODEL, '"centroid": Centroid'),
    ("data/sources.py", "DATASETS", DATASET, '"blobs": open_blobs'),
    ("core/fusion.py", "FUSIONS", FUSION, '"first": Fusion(first_frame)'),
    ("core/augment.py", "TRANSFORMS", TRANSFORM, '"halve": Transform(halve)'),
    ("core/metrics.py", "CLIP_METRICS", METRIC,
     '"confident": Metric("confident clips", "above 0.5", confident, log=True)'),
)  # fmt: skip
# What the functions above use of the package and the file does not import yet.
IMPORTS = {
    "models/identifier.py": (
        "import flax.linen as nn\nfrom vidjax.core import fusion\n"
        "from vidjax.core.batch import ModelOutput\n"
        "from vidjax.models.layers import CosineClassifier, real_frames\n"
    ),
    "data/sources.py": "import numpy as np\n",
}
EXPERIMENT = """
from vidjax.runs import config as config_lib

def get_config(args=""):
    config = config_lib.default()
    config.data.name = "blobs"
    config.model.update(name="centroid", logit_scale=16.0)
    config.fusion.face = {"train": {"name": "first"}, "evaluate": {"name": "mean"}}
    config.batch_size, config.num_epochs, config.log_every_steps = 16, 5.0, 4
    config.optim.learning_rate = 0.02
    config.transforms = ("halve",)
    config.loss.classification, config.loss.margin = "cosface", 0.2
    return config
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package with the six additions and an experiment that uses all of them."""
    for name in ("vidjax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file, imports in IMPORTS.items():
        path = tmp_path / "vidjax" / file
        path.write_text(re.sub(r"(?m)^(?=import |from )", imports, path.read_text(), count=1))
    for file, table, function, line in ADDITIONS:
        source = (tmp_path / "vidjax" / file).read_text()
        head = re.search(rf"^((?:#.*\n)*){table}: .*\{{\n", source, re.MULTILINE)
        assert head, f"{file} has no table {table}"
        new = f"{function.lstrip()}\n\n{head[0]}    {line},\n"
        (tmp_path / "vidjax" / file).write_text(source.replace(head[0], new, 1))
    (tmp_path / "configs" / "probe.py").write_text(EXPERIMENT)
    return tmp_path


@pytest.mark.slow
def test_a_run_uses_all_six_and_shows_the_metric(tree: Path, python: Callable[..., str]) -> None:
    program = "import sys; from vidjax.main import main; sys.exit(main(sys.argv[1:]))"
    words = ("--config=configs/probe.py", "--workdir=run")
    said = python(program, *words, cwd=tree, PYTHONPATH=str(tree), VIDJAX_CACHE=str(tree / "cache"))
    results, config = (
        json.loads((tree / "run" / name).read_text()) for name in ("metrics.json", "config.json")
    )
    assert 0 <= results["confident"] <= 1 and results["map"] > 0.5 and "confident" in said
    lines = [json.loads(line) for line in (tree / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line.get("bad_steps", 0) == 0 for line in lines)
    assert any("confident" in line for line in lines)
    assert "confident clips" in (tree / "run" / "report.html").read_text()
    assert config["data"]["name"] == "blobs" and config["model"]["name"] == "centroid"
    assert config["transforms"] == ["halve"] and config["loss"]["classification"] == "cosface"
    assert config["fusion"]["face"]["train"]["name"] == "first"
    numbers = [value for value in results.values() if isinstance(value, float)]
    assert len(numbers) > 5 and all(map(math.isfinite, numbers))
