"""Adding a loss, a model, a dataset and so on: one function and one line in one table each.

The test does what a user would do, in a copy of the tree, and then runs the command there.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
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
    splits = {
        split: {
            f"{split}_{i}": {
                "face": (people[i % 6] + rng.normal(size=(1 + i % 4, 12))).astype(np.float32)
            }
            for i in range(count)
        }
        for split, count in {"train": 48, "val": 24}.items()
    }
    labels = {clip: f"person_{int(clip.split('_')[1]) % 6}" for s in splits.values() for clip in s}
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

# file, table, function, line of the table
ADDITIONS = (
    ("core/losses.py", "CLASSIFICATION", COSFACE, '    "cosface": cosface,\n'),
    ("models/identifier.py", "MODELS", MODEL, '    "centroid": Centroid,\n'),
    ("data/sources.py", "DATASETS", DATASET, '    "blobs": open_blobs,\n'),
    ("core/fusion.py", "FUSIONS", FUSION, '    "first": Fusion(first_frame),\n'),
    ("core/augment.py", "TRANSFORMS", TRANSFORM, '    "halve": Transform(halve),\n'),
    (
        "core/metrics.py",
        "CLIP_METRICS",
        METRIC,
        '    "confident": Metric("confident clips", "above 0.5", confident, log=True),\n',
    ),
)
# What the functions above use of the package and the file does not import yet.
IMPORTS = {
    "models/identifier.py": (
        "import flax.linen as nn\nfrom vidjax.core import fusion\n"
        "from vidjax.core.batch import ModelOutput\n"
        "from vidjax.models.layers import CosineClassifier, real_frames\n"
    ),
    "data/sources.py": "import numpy as np\n",
}
# field -> its value in the experiment
FIELDS = {
    "loss.classification": "cosface",
    "data.name": "blobs",
    "transforms": "halve",
    "model.name": "centroid",
    "fusion.face.train.name": "first",
}
EXPERIMENT = """
from vidjax.runs import config as config_lib

def get_config(args=""):
    config = config_lib.default()
    config.data.name = "blobs"
    config.model.update(name="centroid", logit_scale=16.0)
    config.fusion.face = {"train": {"name": "first"}, "evaluate": {"name": "mean"}}
    config.batch_size, config.num_epochs, config.log_every_steps = 16, 10.0, 4
    config.optim.learning_rate = 0.02
    config.transforms = ("halve",)
    config.loss.classification, config.loss.margin = "cosface", 0.2
    return config
"""


def add(package: Path, file: str, table: str, function: str, line: str) -> None:
    """Inserts a function above a table, and a line at its beginning."""
    path = package / file
    source = path.read_text()
    head = re.search(rf"^((?:#.*\n)*){table}: .*\{{\n", source, re.MULTILINE)
    assert head, f"{file} has no table {table}"
    before, after = source[: head.start()], source[head.end() :]
    path.write_text(f"{before}{function.lstrip()}\n\n{head[0]}{line}{after}")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the six additions and an experiment that uses all of them."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("vidjax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file, imports in IMPORTS.items():
        path = folder / "vidjax" / file
        path.write_text(re.sub(r"(?m)^(?=import |from )", imports, path.read_text(), count=1))
    for addition in ADDITIONS:
        add(folder / "vidjax", *addition)
    (folder / "configs" / "probe.py").write_text(EXPERIMENT)
    return folder


def run(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs `python WORDS` in the copy."""
    env = {**os.environ, "XLA_FLAGS": "", "VIDJAX_CACHE": str(tree / "cache")}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_a_run_uses_all_six_and_shows_the_metric(tree: Path) -> None:
    done = run(tree, "-m", "vidjax.main", "--config=configs/probe.py", "--workdir=runs/probe")
    workdir = tree / "runs" / "probe"
    results = json.loads((workdir / "metrics.json").read_text())
    assert 0 <= results["confident"] <= 1 and results["map"] > 0.5
    assert "confident" in done.stdout
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(line["bad_steps"] == 0 for line in lines if "bad_steps" in line)
    assert any("confident" in line for line in lines)
    report = (workdir / "report.html").read_text()
    assert "confident clips" in report
    for field, name in FIELDS.items():
        value = json.loads((workdir / "config.json").read_text())
        for part in field.split("."):
            value = value[part]
        assert name in value, field
    numbers = [value for value in results.values() if isinstance(value, float)]
    assert len(numbers) > 5 and all(map(math.isfinite, numbers))
