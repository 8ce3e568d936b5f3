"""Conversion and training where few files may be open and memory is small."""

import sys

import numpy as np
import pytest

from tests.helpers import limits
from tests.helpers.clip_files import write_labels, write_npz
from vidjax.data import arrays
from vidjax.data.records.conversion import convert


def write_own(folder, splits, widths):
    """Writes own features, split -> number of clips, and their labels: 20 people."""
    rng = np.random.default_rng(0)
    people = {name: rng.standard_normal((20, width)) for name, width in widths.items()}
    clips = {
        split: {
            f"{split}{number}": {
                name: (mean[number % 20] + rng.standard_normal((4, widths[name]))).astype("f2")
                for name, mean in people.items()
            }
            for number in range(count)
        }
        for split, count in splits.items()
    }
    labels = {name: f"p{n % 20}" for names in clips.values() for n, name in enumerate(names)}
    write_labels(write_npz(folder, clips) / "labels.csv", labels)


@pytest.mark.slow
def test_conversion_with_eight_workers_needs_few_open_files(tmp_path):
    """The writers read 320 files, more than may be open."""
    widths = dict.fromkeys(("face", "head", "body", "audio"), 4)
    write_own(tmp_path / "data", {"train": 40, "val": 10}, widths)
    words = [sys.executable, "-m", "vidjax.data.arrays", tmp_path / "data"]
    ended = limits.run([*words, "--workers=8", f"--cache_dir={tmp_path / 'some'}"], files=128)
    assert ended.returncode == 0, ended.stderr
    reference = convert(arrays.FeatureFolder(tmp_path / "data", workers=1), tmp_path / "one")
    (manifest,) = tmp_path.glob("some/arrays/*/manifest.json")
    shards = {path.name: path.read_bytes() for path in reference.folder.rglob("*.tfrecord*")}
    assert shards == {path.name: path.read_bytes() for path in manifest.parent.rglob("*.tfrecord*")}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_conversion_and_training_fit_into_2_gb_and_256_open_files(tmp_path, mode):
    """The limits are `ulimit -n 256` and 2 GB of memory; the features take 0.1 GB in shards."""
    write_own(tmp_path / "data", {"train": 2500, "val": 500}, {"face": 2048, "body": 2048})
    ended = limits.run(
        [
            sys.executable, "-m", "vidjax.main", "--config=quality_fusion:face,body",
            "--config.num_epochs=1", "--config.data.name=arrays",
            f"--config.data.dir={tmp_path / 'data'}", f"--config.data.mode={mode}",
            f"--workdir={tmp_path / 'run'}",
        ],
        files=256, memory=2 * limits.GB, env={"VIDJAX_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert ended.returncode == 0, (ended.stderr[-1000:], ended.peak)
    assert (tmp_path / "run" / "report.html").exists()
