"""Rate of training batches against the rate of reading the same TFRecords raw.

    python -m tests.benchmarks.input [--clips=4096] [--rounds=5]

Four modalities (face, head and body of 20 to 30 frames, one audio vector; 512 float16 each), batch
1024, 64 frames. The two are timed in turns in one process, because the machine drifts between runs.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.benchmarks import common
from tests.helpers.batches import train_batches
from tests.helpers.clip_files import random_clip, write_pickle
from tests.helpers.datasets import load_dataset
from vidjax.data.records.tensors import tf

MODALITIES = ("audio", "body", "face", "head")
BATCH_SIZE = 1024
LAY_READY = 4  # batches that a pipeline prepares while the other one is timed


def write_clips(directory: Path, num_clips: int) -> None:
    """Writes `num_clips` made-up train clips as official files."""
    rng = np.random.default_rng(0)
    frames = random_clip(rng, 30, 512)
    for modality in MODALITIES:
        clips = {}
        for number in range(num_clips):
            num_frames = int(rng.integers(20, 31))
            clips[f"clip_{number:06d}"] = type(frames)(*(field[:num_frames] for field in frames))
        write_pickle(directory, modality, "train", clips)


def read_raw(paths: list[str]) -> Iterator[int]:
    """Yields the number of records of each batch of a raw read, without end."""
    dataset = tf.data.Dataset.from_tensor_slices(paths).repeat()
    dataset = dataset.interleave(tf.data.TFRecordDataset, cycle_length=16)
    for batch in dataset.batch(BATCH_SIZE).prefetch(1):
        yield int(batch.shape[0])


def clips_per_second(batches: Iterator, num_batches: int) -> float:
    """Returns the rate of the next batches, once those that lay ready are used up."""
    for _ in range(LAY_READY):
        next(batches)
    start = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return num_batches * BATCH_SIZE / (time.perf_counter() - start)


def main() -> None:
    """Prints clips per second of both and their ratio, by round and as median."""
    args = common.parse(__doc__, clips=4096, rounds=5)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        write_clips(source, args.clips)
        dataset = load_dataset("iqiyi_vid", directory=source, cache_dir=Path(folder) / "cache")
        paths = sorted(str(p) for p in Path(folder).glob("cache/**/*.tfrecord*"))
        raw = read_raw(paths)
        batches = train_batches(
            dataset,
            splits=("train",),
            modalities=MODALITIES,
            batch_size=BATCH_SIZE,
            max_frames=64,
            crop="window",
            seed=0,
        )
        num_batches = 4 * max(1, args.clips // BATCH_SIZE)
        ratios = []
        sys.stdout.write("round  raw clips/s  batches clips/s  ratio\n")
        for number in range(args.rounds):
            raw_rate = clips_per_second(raw, num_batches)
            rate = clips_per_second(batches, num_batches)
            ratios.append(rate / raw_rate)
            sys.stdout.write(f"{number:5} {raw_rate:12.0f} {rate:16.0f} {ratios[-1]:6.2f}\n")
        sys.stdout.write(f"median ratio {statistics.median(ratios):.2f}\n")


if __name__ == "__main__":
    main()
